package blob

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// The benchmarks move MUSTER_BLOB_MIB (256) MiB of random bytes over loopback,
// from disk to disk. They report CPU seconds per GiB of the whole process, both
// ends of the connection: on a machine that others use too, that says more than
// the time.
func benchSource(b *testing.B) (path string, size int64) {
	b.Helper()
	size = 256 << 20
	if text := os.Getenv("MUSTER_BLOB_MIB"); text != "" {
		mib, err := strconv.Atoi(text)
		if err != nil {
			b.Fatal(err)
		}
		size = int64(mib) << 20
	}
	path = filepath.Join(b.TempDir(), "source")
	f, err := os.Create(path)
	if err == nil {
		_, err = io.CopyN(f, rand.Reader, size)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(size)
	return path, size
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// measured runs f b.N times, after prepare, which does not count.
func measured(b *testing.B, size int64, prepare, f func()) {
	var spent time.Duration
	b.ResetTimer()
	for range b.N {
		b.StopTimer()
		prepare()
		b.StartTimer()
		before := cpuTime()
		f()
		spent += cpuTime() - before
	}
	b.ReportMetric(spent.Seconds()/float64(b.N)/float64(size)*(1<<30), "cpu-s/GiB")
}

// BenchmarkPlainCopy is what the others are measured against: a file served by
// net/http, hashed on its way to the disk, and synced.
func BenchmarkPlainCopy(b *testing.B) {
	source, size := benchSource(b)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, source) }))
	defer server.Close()
	dst := filepath.Join(b.TempDir(), "dst")
	measured(b, size, func() { os.Remove(dst) }, func() {
		resp, err := http.Get(server.URL)
		if err != nil {
			b.Fatal(err)
		}
		defer resp.Body.Close()
		f, err := os.Create(dst)
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		if _, err := io.Copy(io.MultiWriter(f, sha256.New()), resp.Body); err != nil {
			b.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			b.Fatal(err)
		}
	})
}

// benchClient talks to store as client.NewBlobTransport does.
func benchClient(b *testing.B, store Store, authorize func(*http.Request) (Caller, error), replica bool) *HTTP {
	server := httptest.NewServer(Handler(store, authorize, 1<<40))
	b.Cleanup(server.Close)
	transport := &http.Transport{DisableCompression: true}
	b.Cleanup(transport.CloseIdleConnections)
	return NewHTTP(HTTPConfig{
		Client: &http.Client{Transport: transport}, Addresses: func() []string { return []string{server.URL} }, Replica: replica,
	})
}

func benchServer(b *testing.B) (*Dir, *HTTP) {
	dir, err := NewDir(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	return dir, benchClient(b, dir, allow, false)
}

func BenchmarkPutFile(b *testing.B) {
	source, size := benchSource(b)
	dir, client := benchServer(b)
	digest, _, err := PutFile(context.Background(), &Memory{}, source)
	if err != nil {
		b.Fatal(err)
	}
	measured(b, size, func() { dir.Delete(context.Background(), digest) }, func() {
		if _, _, err := PutFile(context.Background(), client, source); err != nil {
			b.Fatal(err)
		}
	})
}

func BenchmarkFetch(b *testing.B) {
	source, size := benchSource(b)
	dir, client := benchServer(b)
	digest, _, err := PutFile(context.Background(), dir, source)
	if err != nil {
		b.Fatal(err)
	}
	dst := filepath.Join(b.TempDir(), "dst")
	measured(b, size, func() { os.Remove(dst) }, func() {
		if _, err := Fetch(context.Background(), client, digest, dst, NoLimit); err != nil {
			b.Fatal(err)
		}
	})
}

// BenchmarkPutFileReplicated is BenchmarkPutFile with three schedulers, two of
// which have to have the blob.
func BenchmarkPutFileReplicated(b *testing.B) {
	source, size := benchSource(b)
	var dirs [3]*Dir
	var peers []Store
	for i := range dirs {
		dir, err := NewDir(b.TempDir())
		if err != nil {
			b.Fatal(err)
		}
		dirs[i] = dir
		if i > 0 {
			peers = append(peers, benchClient(b, dir, allowPeer, true))
		}
	}
	store := NewReplicated(dirs[0], func() []Store { return peers }, func() int { return 2 })
	defer store.Close()
	client := benchClient(b, store, allow, false)
	digest, _, err := PutFile(context.Background(), &Memory{}, source)
	if err != nil {
		b.Fatal(err)
	}
	measured(b, size, func() {
		store.Delete(context.Background(), digest)
		for _, dir := range dirs {
			dir.Delete(context.Background(), digest)
		}
	}, func() {
		if _, _, err := PutFile(context.Background(), client, source); err != nil {
			b.Fatal(err)
		}
	})
}
