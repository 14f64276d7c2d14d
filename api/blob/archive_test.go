package blob

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"pgregory.net/rapid"

	"github.com/musternet/muster/api"
)

// write makes files below dir; a name that ends in a slash is a directory.
func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if strings.HasSuffix(name, "/") {
			if err := os.MkdirAll(path, 0o700); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		mode := fs.FileMode(0o600)
		if strings.HasSuffix(name, ".sh") {
			mode = 0o700
		}
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
}

// tree lists what is below dir.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		content := []byte{}
		if !entry.IsDir() {
			content, err = os.ReadFile(path)
		}
		rel, _ := filepath.Rel(dir, path)
		lines = append(lines, fmt.Sprintf("%s %s %s", info.Mode(), rel, content))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(lines, "\n")
}

func TestDirRoundTrip(t *testing.T) {
	files := map[string]string{"b.txt": "b", "a/c.txt": strings.Repeat("c", 100_000), "a/run.sh": "#!", "empty/": "", "zero": ""}
	m := &Memory{}
	var digests []api.Digest
	for range 2 { // other directory, other times, same digest
		dir := t.TempDir()
		write(t, dir, files)
		digest, _, err := PutDir(t.Context(), m, dir)
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, digest)
	}
	if digests[0] != digests[1] {
		t.Error("the same content has two digests")
	}
	r, err := m.Open(t.Context(), digests[0])
	if err != nil {
		t.Fatal(err)
	}
	dst := t.TempDir()
	if err := ExtractDir(r, dst, Limits{Bytes: 100_003, Files: 6}); err != nil {
		t.Fatal(err)
	}
	want := "drwxr-xr-x a \n-rw-r--r-- a/c.txt " + files["a/c.txt"] + "\n-rwxr-xr-x a/run.sh #!\n-rw-r--r-- b.txt b\ndrwxr-xr-x empty \n-rw-r--r-- zero "
	if got := tree(t, dst); got != want {
		t.Errorf("%s", got)
	}
	for _, limits := range []Limits{{100_002, 6}, {100_003, 5}} {
		r.Seek(0, io.SeekStart)
		if err := ExtractDir(r, t.TempDir(), limits); api.KindOf(err) != api.TooLarge {
			t.Errorf("%v: %v", limits, err)
		}
	}
}

// A file far larger than the compressor's window comes back too.
func TestLargeDir(t *testing.T) {
	content := make([]byte, 3*maxWindow+1)
	rand.NewChaCha8([32]byte{}).Read(content)
	src, dst := t.TempDir(), t.TempDir()
	write(t, src, map[string]string{"x": string(content)})
	var b bytes.Buffer
	if err := WriteDir(t.Context(), &b, src); err != nil {
		t.Fatal(err)
	}
	if err := ExtractDir(&b, dst, Limits{Bytes: int64(len(content)), Files: 1}); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dst, "x")); err != nil || !bytes.Equal(got, content) {
		t.Error(err)
	}
}

func TestPutDirRefuses(t *testing.T) {
	for name, make := range map[string]func(path string) error{
		"symbolic link": func(path string) error { return os.Symlink("/etc/passwd", path) },
		"named pipe":    func(path string) error { return syscall.Mkfifo(path, 0o600) },
	} {
		dir := t.TempDir()
		if err := make(filepath.Join(dir, "odd")); err != nil {
			t.Fatal(err)
		}
		_, _, err := PutDir(t.Context(), &Memory{}, dir)
		if api.KindOf(err) != api.Invalid || !strings.Contains(err.Error(), filepath.Join(dir, "odd")+": is a "+name) {
			t.Errorf("%v", err)
		}
	}
	if _, _, err := PutDir(t.Context(), &Memory{}, "/no/such/dir"); api.KindOf(err) != api.NotFound {
		t.Errorf("%v", err)
	}
}

// compress makes an archive of whatever headers a hostile uploader may choose.
func compress(t testing.TB, headers ...*tar.Header) []byte {
	var b bytes.Buffer
	z, _ := zstd.NewWriter(&b)
	w := tar.NewWriter(z)
	for _, h := range headers {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			io.CopyN(w, zeros{}, h.Size)
		}
	}
	w.Close()
	z.Close()
	return b.Bytes()
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestExtractDirRefuses(t *testing.T) {
	file := func(name string) *tar.Header { return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: 1} }
	for _, test := range []struct {
		name    string
		archive []byte
		kind    api.Kind
		want    string
	}{
		{"parent", compress(t, file("../x")), api.Invalid, `the archive holds "../x", which is not a plain path`},
		{"absolute", compress(t, file("/x")), api.Invalid, `the archive holds "/x", which is not a plain path`},
		{"unclean", compress(t, file("a/./b")), api.Invalid, `not a plain path`},
		{"symlink", compress(t, &tar.Header{Typeflag: tar.TypeSymlink, Name: "x", Linkname: "/etc"}), api.Invalid, `the archive holds "x", which is neither a file nor a directory`},
		{"hard link", compress(t, &tar.Header{Typeflag: tar.TypeLink, Name: "x", Linkname: "/etc/passwd"}), api.Invalid, `neither a file nor a directory`},
		{"twice", compress(t, file("x"), file("x")), api.Invalid, `holds "x" twice`},
		{"below a file", compress(t, file("x"), file("x/y")), api.Invalid, `holds "x/y" below a file`},
		{"bomb", compress(t, &tar.Header{Typeflag: tar.TypeReg, Name: "x", Size: 64 << 20}), api.TooLarge, `more than the limit of 1000000 bytes`},
		{"cut short", compress(t, file("x"))[:40], api.Invalid, `the archive is damaged`},
		{"no archive", []byte("hello"), api.Invalid, `the archive is damaged`},
	} {
		dst := t.TempDir()
		err := ExtractDir(bytes.NewReader(test.archive), dst, Limits{Bytes: 1e6, Files: 10})
		if api.KindOf(err) != test.kind || !strings.Contains(fmt.Sprint(err), test.want) {
			t.Errorf("%s: %v; want %s", test.name, err, test.want)
		}
	}
}

// A symbolic link that is in the destination already leads nowhere.
func TestExtractDirStaysInside(t *testing.T) {
	outside, dst := t.TempDir(), t.TempDir()
	if err := os.Symlink(outside, filepath.Join(dst, "link")); err != nil {
		t.Fatal(err)
	}
	archive := compress(t, &tar.Header{Typeflag: tar.TypeReg, Name: "link/x", Size: 1})
	if err := ExtractDir(bytes.NewReader(archive), dst, Limits{Bytes: 10, Files: 10}); err == nil {
		t.Error("no error")
	}
	if got := tree(t, outside); got != "" {
		t.Errorf("written outside: %s", got)
	}
}

func FuzzExtractDir(f *testing.F) {
	f.Add(compress(f, &tar.Header{Typeflag: tar.TypeReg, Name: "a/x", Size: 3}, &tar.Header{Typeflag: tar.TypeDir, Name: "b/"}))
	f.Add(compress(f, &tar.Header{Typeflag: tar.TypeReg, Name: "../x", Size: 3}))
	parent := f.TempDir()
	f.Fuzz(func(t *testing.T, archive []byte) {
		dst, err := os.MkdirTemp(parent, "x")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dst)
		if err := ExtractDir(bytes.NewReader(archive), dst, Limits{Bytes: 1 << 16, Files: 16}); err != nil && api.KindOf(err) == api.Internal {
			t.Fatalf("the archive broke the machine: %v", err)
		}
		if n, err := diskUsage(dst, false); err != nil || n > 1<<16 {
			t.Fatalf("%d bytes, %v", n, err)
		}
		if entries, _ := os.ReadDir(parent); len(entries) != 1 {
			t.Fatal("written outside")
		}
	})
}

func digestN(n int) api.Digest { return api.DigestOf([]byte{byte(n)}) }

// fetchBytes is a fetch that makes an entry of n bytes.
func fetchBytes(n int) func(string) error {
	return func(dst string) error {
		if err := os.Mkdir(dst, 0o755); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dst, "x"), make([]byte, n), 0o644)
	}
}

func mustGet(t *testing.T, c *Cache, n, size int) (release func()) {
	t.Helper()
	path, release, err := c.Get(t.Context(), digestN(n), fetchBytes(size))
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(path, "x")); err != nil || info.Size() != int64(size) {
		t.Fatalf("entry %d: %v", n, err)
	}
	return release
}

func digests(ns ...int) []api.Digest {
	var d []api.Digest
	for _, n := range ns {
		d = append(d, digestN(n))
	}
	slices.Sort(d)
	return d
}

func TestCacheEvicts(t *testing.T) {
	dir := t.TempDir()
	c, err := OpenCache(dir, 100)
	if err != nil {
		t.Fatal(err)
	}
	mustGet(t, c, 1, 40)()
	mustGet(t, c, 2, 40)()
	mustGet(t, c, 1, 40)() // 2 is now the oldest
	mustGet(t, c, 3, 40)()
	if got := c.Digests(); !slices.Equal(got, digests(1, 3)) || c.Bytes() != 80 {
		t.Errorf("%v %d", got, c.Bytes())
	}
	// Pinned entries stay, even above the size.
	r1, r3, r4 := mustGet(t, c, 1, 40), mustGet(t, c, 3, 40), mustGet(t, c, 4, 90)
	if c.Bytes() != 170 {
		t.Errorf("%d bytes", c.Bytes())
	}
	r4()
	r4() // releasing twice has no effect
	if got := c.Digests(); !slices.Equal(got, digests(1, 3)) {
		t.Errorf("%v", got)
	}
	r1()
	r3()
	if tmp, err := os.ReadDir(filepath.Join(dir, "tmp")); err != nil || len(tmp) != 0 {
		t.Errorf("left over: %v %v", tmp, err)
	}
}

func TestCacheSurvivesRestart(t *testing.T) {
	dir := t.TempDir()
	c, err := OpenCache(dir, 100)
	if err != nil {
		t.Fatal(err)
	}
	for n := range 3 {
		mustGet(t, c, n, 30)()
		// The order of use is kept to what the file system resolves.
		at := time.Unix(int64(1000-n), 0)
		if err := os.Chtimes(c.path(digestN(n)), at, at); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir, map[string]string{"tmp/half": "x", "sha256/README": "not ours"})
	c, err = OpenCache(dir, 70)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Digests(); !slices.Equal(got, digests(0, 1)) {
		t.Errorf("%v", got)
	}
	_, release, err := c.Get(t.Context(), digestN(0), func(string) error { return errors.New("fetched again") })
	if err != nil {
		t.Fatal(err)
	}
	release()
	if _, err := os.Stat(filepath.Join(dir, "tmp", "half")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func TestCacheFetchesOnce(t *testing.T) {
	c, err := OpenCache(t.TempDir(), 100)
	if err != nil {
		t.Fatal(err)
	}
	var fetches atomic.Int32
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			_, release, err := c.Get(t.Context(), digestN(1), func(dst string) error {
				fetches.Add(1)
				return os.WriteFile(dst, []byte("a file"), 0o644)
			})
			if err != nil {
				t.Error(err)
				return
			}
			release()
		})
	}
	wg.Wait()
	if fetches.Load() != 1 {
		t.Errorf("%d fetches", fetches.Load())
	}
}

func TestCacheFailures(t *testing.T) {
	c, err := OpenCache(t.TempDir(), 100)
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	if _, _, err := c.Get(t.Context(), digestN(1), func(dst string) error {
		fetchBytes(10)(dst)
		return broken
	}); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	if _, _, err := c.Get(t.Context(), "x", fetchBytes(1)); api.KindOf(err) != api.Invalid {
		t.Errorf("%v", err)
	}
	// One caller gives up; the one that waited for it does the work itself.
	started, waiting := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _, err := c.Get(t.Context(), digestN(1), func(string) error {
			close(started)
			<-waiting
			return context.Canceled
		})
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	<-started
	wg.Go(func() {
		_, release, err := c.Get(t.Context(), digestN(1), fetchBytes(10))
		if err != nil {
			t.Error(err)
			return
		}
		release()
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := c.Get(ctx, digestN(1), fetchBytes(10)); api.KindOf(err) != api.Unavailable {
		t.Errorf("%v", err)
	}
	close(waiting)
	wg.Wait()
	// A fetch that panics wakes the others.
	func() {
		defer func() { recover() }()
		c.Get(t.Context(), digestN(2), func(string) error { panic("oops") })
	}()
	mustGet(t, c, 2, 10)()
}

// The cache never exceeds its size while nothing is in use, and never loses
// what is.
func TestCacheProperty(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(t.TempDir(), "c")
		if err != nil {
			rt.Fatal(err)
		}
		c, err := OpenCache(dir, 100)
		if err != nil {
			rt.Fatal(err)
		}
		type use struct {
			path    string
			release func()
		}
		var uses []use
		for range rapid.IntRange(1, 30).Draw(rt, "steps") {
			if len(uses) > 0 && rapid.Bool().Draw(rt, "release") {
				uses[0].release()
				uses = uses[1:]
			} else {
				n := rapid.IntRange(0, 6).Draw(rt, "n")
				path, release, err := c.Get(t.Context(), digestN(n), fetchBytes(n*15))
				if err != nil {
					rt.Fatal(err)
				}
				uses = append(uses, use{path, release})
			}
			for _, u := range uses {
				if _, err := os.Stat(filepath.Join(u.path, "x")); err != nil {
					rt.Fatalf("in use and gone: %v", err)
				}
			}
			if len(uses) == 0 && c.Bytes() > 100 {
				rt.Fatalf("%d bytes", c.Bytes())
			}
		}
		for _, u := range uses {
			u.release()
		}
		if n, err := diskUsage(dir, false); err != nil || n != c.Bytes() || n > 100 {
			rt.Fatalf("%d bytes on disk, %d counted, %v", n, c.Bytes(), err)
		}
	})
}
