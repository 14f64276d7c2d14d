package blob

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/musternet/muster/api"
)

// partSuffix marks the beginning of a blob whose transfer broke off.
const partSuffix = ".part"

// minPart is what a broken transfer must have brought for its beginning to be
// kept: less is fetched again sooner than it is looked after.
const minPart = 1 << 20

// Fetch writes a blob into the file dst, verified: dst appears only once all
// its bytes are there and match. It returns their number. A transfer that breaks
// off leaves its beginning beside dst, where the next Fetch of the blob goes on;
// PartOf names it for whoever wants to remove it. Two calls for one dst must not
// run at the same time.
func Fetch(ctx context.Context, store Store, digest api.Digest, dst string, limit int64) (int64, error) {
	r, err := store.Open(ctx, digest)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	if r.Size() > limit {
		return 0, api.Errorf(api.TooLarge, "blob %s: %d bytes, more than the limit of %d", digest, r.Size(), limit)
	}
	if remote, ok := r.(*ranged); ok {
		remote.hashed = -1 // hashing once is enough
	}
	f, err := os.OpenFile(PartOf(dst), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return 0, diskError(filepath.Dir(dst), err)
	}
	defer f.Close()
	p := &part{ctx: ctx, f: f, digest: digest, limit: limit}
	if err := p.complete(r); err != nil {
		p.keepOrRemove(err)
		return 0, err
	}
	return p.size, diskError(dst, os.Rename(f.Name(), dst))
}

// PartOf is where Fetch leaves the beginning of a blob whose transfer to dst
// broke off.
func PartOf(dst string) string { return dst + partSuffix }

// part is a file that a blob is being written to.
type part struct {
	ctx    context.Context
	f      *os.File
	digest api.Digest
	limit  int64
	size   int64
}

// complete takes from r what the file does not hold yet.
func (p *part) complete(r Reader) error {
	info, err := p.f.Stat()
	if err != nil {
		return diskError(p.f.Name(), err)
	}
	if have := info.Size(); have > 0 && have <= r.Size() {
		// Nobody knows who wrote what is there, so it counts only if the whole
		// verifies.
		if err := p.fill(r, have); api.KindOf(err) != api.Invalid {
			return err
		}
	}
	return p.fill(r, 0)
}

// fill goes on behind the first have bytes of the file.
func (p *part) fill(r Reader, have int64) error {
	if err := p.f.Truncate(have); err != nil {
		return diskError(p.f.Name(), err)
	}
	if _, err := p.f.Seek(0, io.SeekStart); err != nil {
		return diskError(p.f.Name(), err)
	}
	in := newIntake(p.ctx, io.LimitReader(p.f, have), have)
	if err := in.copyTo(io.Discard); err != nil {
		return diskError(p.f.Name(), err)
	}
	if _, err := r.Seek(have, io.SeekStart); err != nil {
		return err
	}
	in.r, in.limit = r, p.limit
	if err := writeDurably(p.f, in); err != nil {
		return fmt.Errorf("blob %s: %w", p.digest, err)
	}
	p.size = in.size
	return in.verify(p.digest)
}

// keepOrRemove keeps what the next call can go on from.
func (p *part) keepOrRemove(err error) {
	info, statErr := p.f.Stat()
	if api.KindOf(err) != api.Unavailable || statErr != nil || info.Size() < minPart {
		os.Remove(p.f.Name())
	}
}

// writeDurably copies in into f and syncs it.
func writeDurably(f *os.File, in *intake) error {
	err := in.copyTo(&flusher{f: f})
	if err == nil {
		err = f.Sync()
	}
	if err != nil && in.failed != nil {
		return in.failed
	}
	return diskError(f.Name(), err)
}

// flushBytes is how much is written before the disk is told to begin.
const flushBytes = 8 << 20

// flusher lets the disk write while the next bytes come in, so that the sync at
// the end has little left to wait for.
type flusher struct {
	f       *os.File
	pending int64 // since the last start of write-back
}

func (w *flusher) Write(p []byte) (int, error) {
	n, err := w.f.Write(p)
	if w.pending += int64(n); w.pending >= flushBytes {
		startWriteBack(w.f)
		w.pending = 0
	}
	return n, err
}

// PutFile stores a file and returns its digest and size.
func PutFile(ctx context.Context, store Store, path string) (api.Digest, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, fileError(path, err)
	}
	defer f.Close()
	if remote, ok := store.(*HTTP); ok {
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() && info.Size() >= minParts {
			digest, err := remote.putFile(ctx, f, info.Size())
			if api.KindOf(err) == api.Unsupported && digest != "" {
				_, err = remote.Put(ctx, digest, f, NoLimit)
			}
			if err != nil {
				return "", 0, fmt.Errorf("%s: %w", path, err)
			}
			return digest, info.Size(), nil
		}
	}
	digest, err := digestOf(ctx, f)
	if err != nil {
		return "", 0, fileError(path, err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", 0, fileError(path, err)
	}
	size, err := store.Put(ctx, digest, f, NoLimit)
	if err != nil {
		return "", 0, fmt.Errorf("%s: %w", path, err)
	}
	return digest, size, nil
}

// digestOf hashes what is left of r.
func digestOf(ctx context.Context, r io.Reader) (api.Digest, error) {
	piece := pieces.Get().(*[pieceBytes]byte)
	defer pieces.Put(piece)
	sum := sha256.New()
	for {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		n, err := r.Read(piece[:])
		sum.Write(piece[:n])
		if errors.Is(err, io.EOF) {
			return api.DigestFromSum(sum.Sum(nil)), nil
		}
		if err != nil {
			return "", err
		}
	}
}
