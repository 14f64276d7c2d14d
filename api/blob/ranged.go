package blob

import (
	"context"
	"crypto/sha256"
	"hash"
	"io"
	"time"

	"github.com/musternet/muster/api"
)

// maxStalls is how often in a row a transfer may break without a new byte.
const maxStalls = 5

// ranged is the Reader of a remote blob: it opens ranges as they are needed and
// goes on where a broken transfer stopped.
type ranged struct {
	ctx    context.Context
	digest api.Digest
	size   int64
	// open returns the bytes from offset on, length of them, or all the rest
	// for -1. The body may hold more or fewer.
	open  func(ctx context.Context, offset, length int64) (io.ReadCloser, error)
	delay time.Duration // before the second try; doubles from try to try

	pos    int64
	body   io.ReadCloser // at pos; nil if none is open
	hashed int64         // bytes in sum; -1 once the reading was not in order
	sum    hash.Hash
}

func newRanged(ctx context.Context, digest api.Digest, size int64, delay time.Duration, open func(context.Context, int64, int64) (io.ReadCloser, error)) *ranged {
	return &ranged{ctx: ctx, digest: digest, size: size, open: open, delay: delay, sum: sha256.New()}
}

func (r *ranged) Size() int64 { return r.size }

func (r *ranged) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if r.pos >= r.size {
		return 0, r.end()
	}
	p = p[:min(int64(len(p)), r.size-r.pos)]
	var n int
	err := r.retry(func() (progress bool, err error) {
		if r.body == nil {
			if r.body, err = r.open(r.ctx, r.pos, -1); err != nil {
				return false, err
			}
		}
		n, err = r.body.Read(p)
		if n > 0 {
			return true, nil // an error comes back with the next Read
		}
		r.drop()
		return false, brokenOff(err)
	})
	if r.hashed == r.pos {
		r.sum.Write(p[:n])
		r.hashed += int64(n)
	}
	r.pos += int64(n)
	return n, err
}

// end is io.EOF if what was read is what the digest says.
func (r *ranged) end() error {
	if r.hashed == r.size && api.DigestFromSum(r.sum.Sum(nil)) != r.digest {
		return api.Errorf(api.Internal, "blob %s: the store returned other bytes under this digest", r.digest)
	}
	return io.EOF
}

func brokenOff(err error) error {
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return api.Errorf(api.Unavailable, "the transfer broke off: %w", err)
}

// retry repeats f until it makes progress, or fails for reasons that will not
// pass.
func (r *ranged) retry(f func() (progress bool, err error)) error {
	delay := r.delay
	for stalls := 1; ; stalls++ {
		progress, err := f()
		if progress || err == nil {
			return nil
		}
		if stalls == maxStalls || api.KindOf(err) != api.Unavailable || r.ctx.Err() != nil {
			return err
		}
		timer := time.NewTimer(delay)
		select {
		case <-timer.C:
		case <-r.ctx.Done():
			timer.Stop()
			return api.Errorf(api.Unavailable, "blob %s: the transfer was given up: %w", r.digest, r.ctx.Err())
		}
		delay *= 2
	}
}

func (r *ranged) drop() {
	if r.body != nil {
		r.body.Close()
		r.body = nil
	}
}

// ReadAt fetches its own range and leaves the position of Read alone.
func (r *ranged) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, api.Errorf(api.Invalid, "blob %s: offset %d", r.digest, off)
	}
	if off >= r.size {
		return 0, io.EOF
	}
	want := p[:min(int64(len(p)), r.size-off)]
	done := 0
	for done < len(want) {
		err := r.retry(func() (bool, error) {
			body, err := r.open(r.ctx, off+int64(done), int64(len(want)-done))
			if err != nil {
				return false, err
			}
			defer body.Close()
			n, err := io.ReadFull(body, want[done:])
			done += n
			return n > 0, brokenOff(err)
		})
		if err != nil {
			return done, err
		}
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

func (r *ranged) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += r.pos
	case io.SeekEnd:
		offset += r.size
	}
	if offset < 0 {
		return 0, api.Errorf(api.Invalid, "blob %s: seek to %d", r.digest, offset)
	}
	if offset != r.pos {
		r.drop()
		r.pos = offset
	}
	return offset, nil
}

func (r *ranged) Close() error {
	r.drop()
	return nil
}
