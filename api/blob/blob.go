// Package blob stores bytes under their SHA-256: images, inputs, outputs,
// manifests and logs. A directory, an S3 bucket, memory, another machine over
// HTTP and a set of replicas all keep the same contract, Store.
package blob

import (
	"context"
	"errors"
	"io"
	"math"
	"os"
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
