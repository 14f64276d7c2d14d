package blob

import (
	"context"
	"crypto/sha256"
	"hash"
	"io"
	"sync"

	"github.com/musternet/muster/api"
)

// pieceBytes is what a transfer reads, writes and hashes at a time: large enough
// that system calls do not count, small enough to stay in a core's cache.
const pieceBytes = 256 << 10

// maxPieces bounds the pieces of one transfer that are read but not yet hashed.
const maxPieces = 4

var pieces = sync.Pool{New: func() any { return new([pieceBytes]byte) }}

// intake reads what comes in from r: it hashes, counts, and stops above the
// limit.
type intake struct {
	ctx   context.Context
	r     io.Reader
	sum   hash.Hash
	size  int64 // bytes in sum, once copyTo has returned
	limit int64
	// tap, if set, gets every piece once it is written. It keeps none of it.
	tap func(p []byte) error
	// failed is what r itself returned, or tap, to tell their errors from the
	// store's. It is nil after a write that failed, whatever else did.
	failed error
}

func newIntake(ctx context.Context, r io.Reader, limit int64) *intake {
	return &intake{ctx: ctx, r: r, sum: sha256.New(), limit: limit}
}

// read is one Read of r.
func (in *intake) read(p []byte) (int, error) {
	if in.failed != nil {
		return 0, in.failed
	}
	if err := in.ctx.Err(); err != nil {
		in.failed = api.Errorf(api.Unavailable, "the transfer was given up: %w", err)
		return 0, in.failed
	}
	n, err := in.r.Read(p)
	if int64(n) > in.limit-in.size {
		in.failed = api.Errorf(api.TooLarge, "more than the limit of %d bytes", in.limit)
		return 0, in.failed
	}
	in.size += int64(n)
	if err != nil && err != io.EOF {
		in.failed = err
	}
	return n, err
}

// fill reads until p is full or r ends; the last bytes come with io.EOF.
func (in *intake) fill(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var got int
		got, err = in.read(p[n:])
		n += got
	}
	return n, err
}

// copyTo writes everything to w, also what came before r failed, whose error is
// in.failed too. A piece whose write failed is neither hashed nor counted, though
// some of it may lie in w: nothing can go on behind it. What fits in one piece is
// hashed here; the rest is hashed by another goroutine, since hashing takes as
// long as everything else about a transfer.
func (in *intake) copyTo(w io.Writer) error {
	piece := pieces.Get().(*[pieceBytes]byte)
	n, err := in.fill(piece[:])
	if err != nil {
		defer pieces.Put(piece)
		if writeErr := in.write(w, piece[:n]); writeErr != nil {
			return writeErr
		}
		in.sum.Write(piece[:n])
		return errorOf(err, in.show(piece[:n]))
	}
	h := startHashing(in.sum)
	defer h.wait()
	for {
		if writeErr := in.write(w, piece[:n]); writeErr != nil {
			pieces.Put(piece)
			return writeErr
		}
		tapErr := in.show(piece[:n])
		h.take(piece, n)
		if err != nil || tapErr != nil {
			return errorOf(err, tapErr)
		}
		piece = pieces.Get().(*[pieceBytes]byte)
		n, err = in.fill(piece[:])
	}
}

// write writes a piece, or takes it out of the count.
func (in *intake) write(w io.Writer, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	_, err := w.Write(p)
	if err != nil {
		in.size -= int64(len(p))
		in.failed = nil
	}
	return err
}

// show gives a piece that is written to the tap.
func (in *intake) show(p []byte) error {
	if len(p) == 0 || in.tap == nil {
		return nil
	}
	err := in.tap(p)
	if err != nil {
		in.failed = err
	}
	return err
}

// errorOf is the error of a read and of the tap that followed it.
func errorOf(read, tap error) error {
	if read == nil || read == io.EOF {
		return tap
	}
	return read
}

// hasher hashes pieces in the order in which it takes them, on a goroutine of
// its own.
type hasher struct {
	pieces chan filled
	done   chan struct{}
}

type filled struct {
	piece *[pieceBytes]byte
	n     int
}

func startHashing(sum hash.Hash) *hasher {
	h := &hasher{pieces: make(chan filled, maxPieces), done: make(chan struct{})}
	go func() {
		defer close(h.done)
		for f := range h.pieces {
			sum.Write(f.piece[:f.n])
			pieces.Put(f.piece)
		}
	}()
	return h
}

// take hashes the first n bytes of piece, which is the hasher's from now on.
func (h *hasher) take(piece *[pieceBytes]byte, n int) { h.pieces <- filled{piece, n} }

// wait returns once everything is hashed.
func (h *hasher) wait() {
	close(h.pieces)
	<-h.done
}

// verify compares what was read with the digest that it came under.
func (in *intake) verify(digest api.Digest) error { return verifySum(digest, in.sum, in.size) }

func verifySum(digest api.Digest, sum hash.Hash, size int64) error {
	if got := api.DigestFromSum(sum.Sum(nil)); got != digest {
		return api.Errorf(api.Invalid, "blob %s: the %d bytes that came have the digest %s; send them again", digest, size, got)
	}
	return nil
}
