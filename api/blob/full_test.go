package blob

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/musternet/muster/api"
)

// brimming is a Dir whose disk is full for a moment: when the n-th byte of a
// blob is written, half a piece gets through and the rest does not; from then on
// there is room again.
type brimming struct {
	*Dir
	at   int64
	full atomic.Bool // now or later
}

func newBrimming(t *testing.T, at int64) *brimming {
	b := &brimming{Dir: newDir(t), at: at}
	b.full.Store(true)
	return b
}

func (b *brimming) stage(ctx context.Context) (staged, error) {
	s, err := b.Dir.stage(ctx)
	if err != nil {
		return nil, err
	}
	file := s.(*stagedFile)
	file.w = &brimmingWriter{b, file.w, 0}
	return file, nil
}

func (b *brimming) Put(ctx context.Context, digest api.Digest, r io.Reader, limit int64) (int64, error) {
	return putStaged(ctx, b, digest, newIntake(ctx, r, limit))
}

type brimmingWriter struct {
	b    *brimming
	w    io.Writer
	size int64
}

func (w *brimmingWriter) Write(p []byte) (int, error) {
	if w.size += int64(len(p)); w.size > w.b.at && w.b.full.CompareAndSwap(true, false) {
		n, err := w.w.Write(p[:len(p)/2])
		return n, errors.Join(err, &os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC})
	}
	return w.w.Write(p)
}

// After a write that failed nothing is stored under the blob's name, however
// much more comes and though its digest is right.
func TestStagedFileThatIsBroken(t *testing.T) {
	content := random(3<<20, 20)
	digest := api.DigestOf(content)
	broke := errors.New("the line broke")
	for _, test := range []struct {
		name string
		at   int64
		in   io.Reader // what is appended first
	}{
		{"large", 1 << 20, bytes.NewReader(content)},
		{"one piece", 100, bytes.NewReader(content[:1000])},
		{"the line breaks with the disk", 100, io.MultiReader(bytes.NewReader(content[:1000]), iotest.ErrReader(broke))},
		{"the line breaks with the disk, later", 1 << 20, io.MultiReader(bytes.NewReader(content[:1<<20+9]), iotest.ErrReader(broke))},
	} {
		b := newBrimming(t, test.at)
		s, err := b.stage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		in := newIntake(t.Context(), test.in, NoLimit)
		if err := s.append(in); api.KindOf(err) != api.Unavailable || !strings.Contains(err.Error(), "is full") || in.failed != nil {
			t.Errorf("%s: %v, %v", test.name, err, in.failed)
		}
		if s.length() > test.at {
			t.Errorf("%s: %d bytes count, and %d were written", test.name, s.length(), test.at)
		}
		rest := newIntake(t.Context(), bytes.NewReader(content[s.length():]), NoLimit)
		if err := s.append(rest); api.KindOf(err) != api.Unavailable {
			t.Errorf("%s: append: %v", test.name, err)
		}
		if err := s.commit(t.Context(), digest); api.KindOf(err) != api.Unavailable {
			t.Errorf("%s: commit: %v", test.name, err)
		}
		s.discard()
		noLeftovers(t, b.Dir)
		if _, err := b.Dir.Stat(t.Context(), digest); api.KindOf(err) != api.NotFound {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

// What lies in the file is compared with what was counted, whoever lost it.
func TestCommitOfAFileThatIsShort(t *testing.T) {
	d := newDir(t)
	s, err := d.stage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.discard()
	if err := s.append(newIntake(t.Context(), strings.NewReader("hello"), NoLimit)); err != nil {
		t.Fatal(err)
	}
	if err := s.(*stagedFile).f.Truncate(4); err != nil {
		t.Fatal(err)
	}
	err = s.commit(t.Context(), api.DigestOf([]byte("hello")))
	if api.KindOf(err) != api.Unavailable || !strings.Contains(err.Error(), "holds 4 of its 5 bytes; send it again") {
		t.Error(err)
	}
}

// A client whose upload met a full disk begins anew where there is room, and no
// store holds anything but the blob.
func TestUploadMeetsAFullDisk(t *testing.T) {
	content := random(minParts+12345, 21)
	digest := api.DigestOf(content)
	path := filepath.Join(t.TempDir(), "source")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{100, 5 << 20, int64(len(content)) - 1} {
		b, other := newBrimming(t, at), newDir(t)
		h := Handler(b, allow, 1<<30)
		// The only scheduler: the call fails, and the next one begins anew.
		store := serve(t, HTTPConfig{}, h)
		store.delay = 0
		if _, _, err := PutFile(t.Context(), store, path); api.KindOf(err) != api.Unavailable {
			t.Errorf("%d: %v", at, err)
		}
		if _, err := b.Stat(t.Context(), digest); api.KindOf(err) != api.NotFound {
			t.Errorf("%d: %v", at, err)
		}
		if got, _, err := PutFile(t.Context(), store, path); err != nil || got != digest {
			t.Errorf("%d: %v", at, err)
		}
		holds(t, b, content)
		noLeftovers(t, b.Dir)
		// One of two: the same call goes to the other.
		b = newBrimming(t, at)
		store = serve(t, HTTPConfig{}, Handler(b, allow, 1<<30), Handler(other, allow, 1<<30))
		store.delay = 0
		if got, _, err := PutFile(t.Context(), store, path); err != nil || got != digest {
			t.Errorf("%d: %v", at, err)
		}
		holds(t, other, content)
		noLeftovers(t, b.Dir, other)
		// As a whole.
		b = newBrimming(t, at)
		if _, err := b.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); api.KindOf(err) != api.Unavailable {
			t.Errorf("%d: %v", at, err)
		}
		if _, err := b.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); err != nil {
			t.Errorf("%d: %v", at, err)
		}
		holds(t, b, content)
	}
}

// A disk that is full for a moment costs a replica its stream and not its copy,
// wherever it is.
func TestReplicaMeetsAFullDisk(t *testing.T) {
	content := random(minParts, 22)
	digest := api.DigestOf(content)
	for full := range 2 {
		stores := [2]*brimming{newBrimming(t, 3<<20), newBrimming(t, 3<<20)}
		stores[1-full].full.Store(false)
		peer := serve(t, HTTPConfig{Replica: true}, Handler(stores[1], allowPeer, NoLimit))
		both := replicated(t, stores[0], 2, peer)
		_, err := both.Put(t.Context(), digest, bytes.NewReader(content), NoLimit)
		if full == 0 {
			if api.KindOf(err) != api.Unavailable {
				t.Error(err)
			}
			_, err = both.Put(t.Context(), digest, bytes.NewReader(content), NoLimit)
		}
		if err != nil {
			t.Error(err)
		}
		both.copies.Wait()
		for _, s := range stores {
			holds(t, s, content)
		}
	}
}

// A line that breaks is no fault of the store: the upload stays, through
// replicas too.
func TestBrokenLineKeepsAReplicatedUpload(t *testing.T) {
	content := random(minTee+5*pieceBytes, 23)
	both := replicated(t, newDir(t), 2, newDir(t))
	s, err := both.stage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.discard()
	broke := api.Errorf(api.Unavailable, "the line broke")
	for _, n := range []int64{100, pieceBytes + 7, minTee + 1, minTee + 3*pieceBytes, int64(len(content))} {
		in := newIntake(t.Context(), io.MultiReader(bytes.NewReader(content[s.length():n]), iotest.ErrReader(broke)), NoLimit)
		if err := s.append(in); !errors.Is(err, broke) || api.KindOf(err) != api.Unavailable || in.failed == nil || s.length() != n {
			t.Fatalf("%d of %d bytes: %v, %v", s.length(), n, err, in.failed)
		}
	}
	if err := s.commit(t.Context(), api.DigestOf(content)); err != nil {
		t.Fatal(err)
	}
	holds(t, both, content)
}

const limitedDirVariable = "MUSTER_TEST_LIMITED_DIR"

// The kernel itself refuses the write, in a process of its own, as its limit
// counts for the whole process.
func TestFileSizeLimit(t *testing.T) {
	if dir := os.Getenv(limitedDirVariable); dir != "" {
		limitedProcess(t, dir)
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestFileSizeLimit$", "-test.v")
	cmd.Env = append(os.Environ(), limitedDirVariable+"="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: TestFileSizeLimit")) {
		t.Errorf("%v\n%s", err, out)
	}
}

func limitedProcess(t *testing.T, dir string) {
	signal.Ignore(syscall.SIGXFSZ) // or the write would end the process
	var whole syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &whole); err != nil {
		t.Fatal(err)
	}
	limit := func(l syscall.Rlimit) {
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &l); err != nil {
			t.Fatal(err)
		}
	}
	d, err := NewDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	content := random(3<<20, 24)
	digest := api.DigestOf(content)
	s, err := d.stage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	limit(syscall.Rlimit{Cur: 1<<20 + 1000, Max: whole.Max})
	if err := s.append(newIntake(t.Context(), bytes.NewReader(content), NoLimit)); !errors.Is(err, syscall.EFBIG) || s.length() != 1<<20 {
		t.Errorf("%d bytes: %v", s.length(), err)
	}
	if _, err := d.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); !errors.Is(err, syscall.EFBIG) {
		t.Error(err)
	}
	limit(whole)
	if err := s.append(newIntake(t.Context(), bytes.NewReader(content[s.length():]), NoLimit)); err == nil {
		t.Error("it went on behind a hole")
	}
	if err := s.commit(t.Context(), digest); err == nil {
		t.Error("it was stored")
	}
	s.discard()
	if _, err := d.Stat(t.Context(), digest); api.KindOf(err) != api.NotFound {
		t.Error(err)
	}
	if _, err := d.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); err != nil {
		t.Error(err)
	}
	holds(t, d, content)
	noLeftovers(t, d)
}
