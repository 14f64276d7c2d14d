package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/musternet/muster/api/blob"
)

const copyBytes = 1 << 30

// copies measures the data path: 1 GiB of incompressible input from a file of
// the submitter through one scheduler to a file of a worker, against a plain
// copy by HTTP that makes the same copies: a PUT whose receiver computes
// SHA-256, writes the file and syncs it, and a GET whose receiver does the same.
// There is one scheduler: with three, a majority has to have the bytes.
// With --full each is done three times, by turns, and the fastest counts.
func (b *bench) copies(ctx context.Context) (err error) {
	w, err := newWorld(ctx, b, 1, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	best := [2]time.Duration{1 << 62, 1 << 62}
	rounds := 1
	if b.full {
		rounds = 3
	}
	for round := range rounds {
		source := filepath.Join(b.dir, "input")
		digest, err := randomFile(source, uint64(round), copyBytes)
		if err != nil {
			return err
		}
		for kind, send := range []func() error{
			func() error { return w.throughMuster(ctx, source, filepath.Join(b.dir, "fetched")) },
			func() error { return plainCopy(ctx, source, b.dir, digest) },
		} {
			began := time.Now()
			if err := send(); err != nil {
				return err
			}
			took := time.Since(began)
			best[kind] = min(best[kind], took)
			b.logf("%s: %.0f MiB/s", []string{"1 GiB through muster", "1 GiB by plain HTTP"}[kind], copyBytes/took.Seconds()/(1<<20))
		}
	}
	b.results.Set("blob_mib_per_s", copyBytes/best[0].Seconds()/(1<<20))
	b.results.Set("blob_copy_mib_per_s", copyBytes/best[1].Seconds()/(1<<20))
	b.results.Set("blob_share_of_copy", best[1].Seconds()/best[0].Seconds())
	return nil
}

// randomFile makes a file that nothing compresses, and returns its SHA-256.
func randomFile(path string, seed uint64, size int) (string, error) {
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	source, sum := rand.NewChaCha8([32]byte{byte(seed)}), sha256.New()
	if _, err := io.CopyN(io.MultiWriter(f, sum), source, int64(size)); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), f.Close()
}

// throughMuster uploads a file as a submission does, and fetches it as a worker
// does.
func (w *world) throughMuster(ctx context.Context, source, dst string) error {
	store := w.net.Client.Blobs()
	digest, size, err := blob.PutFile(ctx, store, source)
	if err != nil {
		return err
	}
	defer os.Remove(dst)
	_, err = blob.Fetch(ctx, store, digest, dst, size)
	return err
}

// plainCopy sends a file to a plain HTTP server and fetches it again.
func plainCopy(ctx context.Context, source, dir, want string) error {
	stored, fetched := filepath.Join(dir, "plain-stored"), filepath.Join(dir, "plain-fetched")
	defer os.Remove(stored)
	defer os.Remove(fetched)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			http.ServeFile(rw, r, stored)
			return
		}
		if err := receive(stored, r.Body, want); err != nil {
			http.Error(rw, err.Error(), http.StatusInternalServerError)
		}
	})}
	go func() { _ = srv.Serve(l) }() // until Close
	defer srv.Close()
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, call := range []struct {
		method string
		body   io.Reader
	}{{http.MethodPut, f}, {http.MethodGet, nil}} {
		req, err := http.NewRequestWithContext(ctx, call.method, "http://"+l.Addr().String()+"/", call.body)
		if err != nil {
			return err
		}
		if call.body != nil {
			req.ContentLength = copyBytes
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			text, _ := io.ReadAll(io.LimitReader(resp.Body, 1000)) // for the message
			return fmt.Errorf("plain copy: %s: %s", resp.Status, text)
		}
		if call.method == http.MethodGet {
			return receive(fetched, resp.Body, want)
		}
	}
	return nil
}

// receive writes a file that must have the digest, and syncs it.
func receive(path string, r io.Reader, want string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	var sum hash.Hash = sha256.New()
	_, err = io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(f, sum)}, r, make([]byte, 256<<10))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != want {
		return fmt.Errorf("%s has SHA-256 %s, want %s", path, got, want)
	}
	return nil
}
