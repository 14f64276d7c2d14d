// Package blob stores bytes under their SHA-256: images, inputs, outputs,
// manifests and logs. A directory, an S3 bucket, memory, another machine over
// HTTP and a set of replicas all keep the same contract, Store.
package blob

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"os"
	"path/filepath"
	"syscall"

	"github.com/musternet/muster/api"
)

// NoLimit is the limit of a Put that takes everything.
const NoLimit int64 = math.MaxInt64

// Store keeps immutable blobs by digest. All methods are safe for concurrent
// use and return when ctx ends. Errors have kinds: api.Invalid for a malformed
// digest, api.Unavailable for a store that cannot be reached or is full.
type Store interface {
	// Put stores the bytes of r and returns their number. Once it returns nil
	// the blob is durable: it survives the loss of power, and for a replicated
	// store the loss of a minority. The bytes are hashed on their way in; if
	// they do not match digest (api.Invalid), exceed limit (api.TooLarge) or r
	// fails, nothing is stored. Putting a blob again has no effect, and Put may
	// then return without reading r. Put never closes r.
	Put(ctx context.Context, digest api.Digest, r io.Reader, limit int64) (size int64, err error)

	// Open returns the blob, or an error of kind api.NotFound. The Reader uses
	// ctx until it is closed.
	Open(ctx context.Context, digest api.Digest) (Reader, error)

	// Stat returns the size of a blob that is durable in the sense of Put, or
	// an error of kind api.NotFound.
	Stat(ctx context.Context, digest api.Digest) (size int64, err error)

	// Delete removes the blob; one that is not there is no error. A Reader that
	// is open may fail from then on.
	Delete(ctx context.Context, digest api.Digest) error
}

// Reader reads one blob. ReadAt is safe for concurrent use, the rest is not.
// A remote blob that is read from start to end is verified on the way: wrong
// bytes yield an error in place of io.EOF.
type Reader interface {
	io.ReadSeekCloser
	io.ReaderAt
	Size() int64
}

func checkDigest(digest api.Digest) error {
	_, err := api.ParseDigest(string(digest))
	return err
}

func notFound(digest api.Digest) error {
	return api.Errorf(api.NotFound, "blob %s is not stored here", digest)
}

// intake reads what a Put takes in: it hashes, counts, and stops above the
// limit.
type intake struct {
	ctx   context.Context
	r     io.Reader
	sum   hash.Hash
	size  int64
	limit int64
	// failed is what r itself returned, to tell its errors from the store's.
	failed error
}

func newIntake(ctx context.Context, r io.Reader, limit int64) *intake {
	return &intake{ctx: ctx, r: r, sum: sha256.New(), limit: limit}
}

func (in *intake) Read(p []byte) (int, error) {
	if in.failed != nil {
		return 0, in.failed
	}
	if err := in.ctx.Err(); err != nil {
		in.failed = api.Errorf(api.Unavailable, "the transfer was given up: %w", err)
		return 0, in.failed
	}
	n, err := in.r.Read(p)
	in.sum.Write(p[:n])
	if in.size += int64(n); in.size > in.limit {
		in.failed = api.Errorf(api.TooLarge, "more than the limit of %d bytes", in.limit)
		return 0, in.failed
	}
	if err != nil && err != io.EOF {
		in.failed = err
	}
	return n, err
}

// verify compares what was read with the digest that it came under.
func (in *intake) verify(digest api.Digest) error {
	if got := api.DigestFromSum(in.sum.Sum(nil)); got != digest {
		return api.Errorf(api.Invalid, "blob %s: the %d bytes that came have the digest %s; send them again", digest, in.size, got)
	}
	return nil
}

// Fetch writes a blob into the file dst, verified: dst appears only once all
// its bytes are there and match. It returns their number.
func Fetch(ctx context.Context, store Store, digest api.Digest, dst string, limit int64) (int64, error) {
	r, err := store.Open(ctx, digest)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	if r.Size() > limit {
		return 0, api.Errorf(api.TooLarge, "blob %s: %d bytes, more than the limit of %d", digest, r.Size(), limit)
	}
	f, err := os.CreateTemp(filepath.Dir(dst), ".fetch-*")
	if err != nil {
		return 0, diskError(filepath.Dir(dst), err)
	}
	defer os.Remove(f.Name()) // no effect after the rename
	in := newIntake(ctx, r, limit)
	if err := writeDurably(f, in); err != nil {
		return 0, fmt.Errorf("blob %s: %w", digest, err)
	}
	if err := in.verify(digest); err != nil {
		return 0, err
	}
	return in.size, diskError(dst, os.Rename(f.Name(), dst))
}

// writeDurably copies in into f, syncs and closes it.
func writeDurably(f *os.File, in *intake) error {
	_, err := io.Copy(f, in)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil && in.failed != nil {
		return in.failed
	}
	return diskError(f.Name(), err)
}

// diskError gives an error of the local disk a kind, and a full disk a message
// that says so.
func diskError(path string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return api.Errorf(api.Unavailable, "the disk of %s is full; free some space: %w", path, err)
	}
	return api.Errorf(api.Internal, "%w", err)
}

// PutFile stores a file and returns its digest and size.
func PutFile(ctx context.Context, store Store, path string) (api.Digest, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, fileError(path, err)
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, &ctxReader{ctx, f}); err != nil {
		return "", 0, fileError(path, err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", 0, fileError(path, err)
	}
	digest := api.DigestFromSum(sum.Sum(nil))
	size, err := store.Put(ctx, digest, f, NoLimit)
	if err != nil {
		return "", 0, fmt.Errorf("%s: %w", path, err)
	}
	return digest, size, nil
}

func fileError(path string, err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return api.Errorf(api.NotFound, "%s: there is no such file", path)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return api.Errorf(api.Unavailable, "%s: %w", path, err)
	}
	return api.Errorf(api.Invalid, "%w", err)
}

// ctxReader stops reading when ctx ends.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
