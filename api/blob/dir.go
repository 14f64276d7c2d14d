package blob

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	"github.com/musternet/muster/api"
)

// Dir is a store in a directory of one process: <two hex digits>/<hex digest>,
// and unfinished blobs in tmp.
type Dir struct {
	path string
}

var _ Store = (*Dir)(nil)

// NewDir opens the store in the directory path, makes it if needed, and removes
// what an earlier process left unfinished: nobody will finish it, and a crash can
// leave more of it than there is disk for twice. A second process that opened the
// directory would fail the first one's puts, no worse.
func NewDir(path string) (*Dir, error) {
	tmp := filepath.Join(path, "tmp")
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return nil, diskError(path, err)
	}
	if err := removeUnfinished(tmp); err != nil {
		return nil, diskError(path, err)
	}
	for i := range 256 {
		err := os.Mkdir(filepath.Join(path, fmt.Sprintf("%02x", i)), 0o755)
		if err != nil && !errors.Is(err, os.ErrExist) {
			return nil, diskError(path, err)
		}
	}
	return &Dir{path: path}, syncDir(path)
}

func removeUnfinished(tmp string) error {
	entries, err := os.ReadDir(tmp)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(tmp, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (d *Dir) file(digest api.Digest) string {
	hex := digest.Hex()
	return filepath.Join(d.path, hex[:2], hex)
}

// Put implements Store.
func (d *Dir) Put(ctx context.Context, digest api.Digest, r io.Reader, limit int64) (int64, error) {
	return putStaged(ctx, d, digest, newIntake(ctx, r, limit))
}

func (d *Dir) stage(context.Context) (staged, error) {
	f, err := os.CreateTemp(filepath.Join(d.path, "tmp"), "put-*")
	if err != nil {
		return nil, diskError(d.path, err)
	}
	return &stagedFile{dir: d, f: f, w: &flusher{f: f}, sum: sha256.New()}, nil
}

// stagedFile is an unfinished blob of a Dir.
type stagedFile struct {
	dir  *Dir
	f    *os.File
	w    io.Writer // writes to f
	sum  hash.Hash
	size int64
	// broken is why the file may hold other bytes than those in sum: a write
	// failed, perhaps halfway. Nothing mends that but starting over.
	broken error
}

func (s *stagedFile) append(in *intake) error {
	if s.broken != nil {
		return s.broken
	}
	in.sum, in.size = s.sum, s.size
	err := in.copyTo(s.w)
	s.size = in.size
	if err != nil && in.failed == nil {
		s.broken = diskError(s.dir.path, err)
		return s.broken
	}
	return err
}

func (s *stagedFile) length() int64 { return s.size }

// commit makes the blob durable by the order of its steps: the bytes are on disk
// before the name is, and the name before commit returns.
func (s *stagedFile) commit(_ context.Context, digest api.Digest) error {
	if err := checkDigest(digest); err != nil {
		return err
	}
	if s.broken != nil {
		return s.broken
	}
	if err := verifySum(digest, s.sum, s.size); err != nil {
		return err
	}
	if info, err := s.f.Stat(); err != nil {
		return diskError(s.dir.path, err)
	} else if info.Size() != s.size {
		// The sum is of what came and not of what lies there.
		return api.Errorf(api.Unavailable, "blob %s: the disk of %s holds %d of its %d bytes; send it again", digest, s.dir.path, info.Size(), s.size)
	}
	if err := s.f.Sync(); err != nil {
		return diskError(s.dir.path, err)
	}
	if err := os.Rename(s.f.Name(), s.dir.file(digest)); err != nil {
		return diskError(s.dir.path, err)
	}
	return syncDir(filepath.Dir(s.dir.file(digest)))
}

func (s *stagedFile) discard() {
	s.f.Close()
	os.Remove(s.f.Name()) // no effect after a commit
}

// Open implements Store.
func (d *Dir) Open(ctx context.Context, digest api.Digest) (Reader, error) {
	if err := checkDigest(digest); err != nil {
		return nil, err
	}
	f, err := os.Open(d.file(digest))
	if err != nil {
		return nil, d.readError(digest, err)
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, d.readError(digest, err)
	}
	return &dirReader{f, info.Size()}, nil
}

type dirReader struct {
	*os.File
	size int64
}

func (r *dirReader) Size() int64 { return r.size }

// Stat implements Store.
func (d *Dir) Stat(ctx context.Context, digest api.Digest) (int64, error) {
	if err := checkDigest(digest); err != nil {
		return 0, err
	}
	info, err := os.Stat(d.file(digest))
	if err != nil {
		return 0, d.readError(digest, err)
	}
	return info.Size(), nil
}

// Delete implements Store.
func (d *Dir) Delete(ctx context.Context, digest api.Digest) error {
	if err := checkDigest(digest); err != nil {
		return err
	}
	err := os.Remove(d.file(digest))
	if err == nil {
		return syncDir(filepath.Dir(d.file(digest)))
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return diskError(d.path, err)
}

func (d *Dir) readError(digest api.Digest, err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return notFound(digest)
	}
	return diskError(d.path, err)
}

// syncDir makes the names in a directory durable.
func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return diskError(path, err)
	}
	defer f.Close()
	return diskError(path, f.Sync())
}
