package wasm

import (
	"errors"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/tetratelabs/wazero/experimental/sys"
	"github.com/tetratelabs/wazero/experimental/sysfs"
	wasmsys "github.com/tetratelabs/wazero/sys"
)

// maxOpenFiles bounds the files that one program has open: they are files of
// the worker's process, which would otherwise run out of descriptors.
const maxOpenFiles = 256

// mount is one host directory as a program sees it. wazero's own directory
// mounts resolve names with the host's rules: a link that the program makes, or
// finds in its inputs, leads anywhere on the host. Here os.Root resolves every
// name first and refuses what leaves the directory; then wazero may open it.
//
// Between the two steps nothing can change: a program has one thread, its
// directories are its own, and programs cannot make links at all.
//
// A mount also hides what differs between machines: times, inode numbers, link
// counts and the order of directory entries.
type mount struct {
	sys.UnimplementedFS
	root     *os.Root
	host     sys.FS
	readOnly bool
	open     *atomic.Int64 // files open in all mounts of the run
}

var _ sys.FS = (*mount)(nil)

func openMount(dir string, readOnly bool, open *atomic.Int64) (*mount, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	host := sysfs.DirFS(dir)
	if readOnly {
		host = &sysfs.ReadFS{FS: host}
	}
	return &mount{root: root, host: host, readOnly: readOnly, open: open}, nil
}

func (m *mount) close() error { return m.root.Close() }

func clean(name string) string {
	return strings.TrimPrefix(path.Clean("/"+name), "/")
}

func rooted(name string) string {
	if name = clean(name); name == "" {
		return "."
	}
	return name
}

// follow checks a name whose last element may be a link that is followed.
func (m *mount) follow(name string) sys.Errno {
	info, err := m.root.Stat(rooted(name))
	return admit(info, err)
}

// keep checks a name whose last element is not followed.
func (m *mount) keep(name string) sys.Errno {
	_, err := m.root.Lstat(rooted(name))
	return admit(nil, err)
}

// admit lets names through that are inside, exist or not: one that does not
// exist stops at the same element when wazero resolves it. Opening a FIFO or a
// device could block for good, so only files and directories may be named.
func admit(info fs.FileInfo, err error) sys.Errno {
	var errno syscall.Errno
	switch {
	case err == nil && info != nil && !info.Mode().IsRegular() && !info.IsDir():
		return sys.EPERM
	case err == nil, errors.Is(err, fs.ErrNotExist):
		return 0
	case errors.As(err, &errno):
		return sys.UnwrapOSError(errno)
	}
	return sys.EPERM // it leaves the directory
}

// OpenFile implements sys.FS.
func (m *mount) OpenFile(name string, flag sys.Oflag, perm fs.FileMode) (sys.File, sys.Errno) {
	check := m.follow
	if flag&sys.O_NOFOLLOW != 0 {
		check = m.keep
	}
	if errno := check(name); errno != 0 {
		return nil, errno
	}
	if m.open.Add(1) > maxOpenFiles {
		m.open.Add(-1)
		return nil, sys.EIO // WASI's "too many open files" is not among wazero's errors
	}
	f, errno := m.host.OpenFile(name, flag, perm)
	if errno != 0 {
		m.open.Add(-1)
		return nil, errno
	}
	return &file{File: f, name: clean(name), open: m.open}, 0
}

// Lstat implements sys.FS.
func (m *mount) Lstat(name string) (wasmsys.Stat_t, sys.Errno) {
	if errno := m.keep(name); errno != 0 {
		return wasmsys.Stat_t{}, errno
	}
	st, errno := m.host.Lstat(name)
	return uniform(st, name), errno
}

// Stat implements sys.FS.
func (m *mount) Stat(name string) (wasmsys.Stat_t, sys.Errno) {
	if errno := m.follow(name); errno != 0 {
		return wasmsys.Stat_t{}, errno
	}
	st, errno := m.host.Stat(name)
	return uniform(st, name), errno
}

// Mkdir implements sys.FS.
func (m *mount) Mkdir(name string, perm fs.FileMode) sys.Errno {
	if errno := m.keep(name); errno != 0 {
		return errno
	}
	return m.host.Mkdir(name, perm)
}

// Rename implements sys.FS.
func (m *mount) Rename(from, to string) sys.Errno {
	for _, name := range []string{from, to} {
		if errno := m.keep(name); errno != 0 {
			return errno
		}
	}
	return m.host.Rename(from, to)
}

// Rmdir implements sys.FS.
func (m *mount) Rmdir(name string) sys.Errno {
	if errno := m.keep(name); errno != 0 {
		return errno
	}
	return m.host.Rmdir(name)
}

// Unlink implements sys.FS.
func (m *mount) Unlink(name string) sys.Errno {
	if errno := m.keep(name); errno != 0 {
		return errno
	}
	return m.host.Unlink(name)
}

// Readlink implements sys.FS. A link of the inputs may be read, wherever it leads.
func (m *mount) Readlink(name string) (string, sys.Errno) {
	if errno := m.keep(name); errno != 0 {
		return "", errno
	}
	return m.host.Readlink(name)
}

// Symlink implements sys.FS: there are none. A link in the outputs would be a
// trap for whoever reads them.
func (m *mount) Symlink(string, string) sys.Errno { return m.refusal() }

// Link implements sys.FS: there are none.
func (m *mount) Link(string, string) sys.Errno { return m.refusal() }

// Chmod implements sys.FS; WASI has no call for it.
func (m *mount) Chmod(string, fs.FileMode) sys.Errno { return m.refusal() }

// Utimens implements sys.FS. It accepts every time and keeps none, because
// none is ever shown.
func (m *mount) Utimens(name string, _, _ int64) sys.Errno {
	if m.readOnly {
		return sys.EROFS
	}
	return m.follow(name)
}

func (m *mount) refusal() sys.Errno {
	if m.readOnly {
		return sys.EROFS
	}
	return sys.EPERM
}

// inode is a number that depends on the name alone, never zero.
func inode(name string) wasmsys.Inode {
	hash := fnv.New64a()
	_, _ = io.WriteString(hash, clean(name)) // a hash does not fail
	return hash.Sum64() | 1
}

// uniform replaces what differs between machines.
func uniform(st wasmsys.Stat_t, name string) wasmsys.Stat_t {
	const now = clockSeconds * 1_000_000_000 // nanoseconds
	st.Dev, st.Ino, st.Nlink = 1, inode(name), 1
	st.Atim, st.Mtim, st.Ctim = now, now, now
	if st.Mode.IsDir() {
		st.Size = 0 // file systems disagree
	}
	return st
}

// file is an open file or directory of a mount.
type file struct {
	sys.File
	name    string
	open    *atomic.Int64
	closed  bool
	entries []sys.Dirent // what Readdir has yet to return
	listed  bool         // entries has been read
}

// Dev implements sys.File.
func (f *file) Dev() (uint64, sys.Errno) { return 1, 0 }

// Ino implements sys.File.
func (f *file) Ino() (wasmsys.Inode, sys.Errno) { return inode(f.name), 0 }

// Stat implements sys.File.
func (f *file) Stat() (wasmsys.Stat_t, sys.Errno) {
	st, errno := f.File.Stat()
	return uniform(st, f.name), errno
}

// Utimens implements sys.File; see mount.Utimens.
func (f *file) Utimens(int64, int64) sys.Errno { return 0 }

// Readdir implements sys.File, in the order of names.
func (f *file) Readdir(n int) ([]sys.Dirent, sys.Errno) {
	if !f.listed {
		entries, errno := f.File.Readdir(-1)
		if errno != 0 {
			return nil, errno
		}
		slices.SortFunc(entries, func(a, b sys.Dirent) int { return strings.Compare(a.Name, b.Name) })
		for i := range entries {
			entries[i].Ino = inode(path.Join(f.name, entries[i].Name))
		}
		f.entries, f.listed = entries, true
	}
	if n < 0 || n > len(f.entries) {
		n = len(f.entries)
	}
	page := f.entries[:n]
	f.entries = f.entries[n:]
	return page, 0
}

// position is what Seek takes. Under its own name go vet sees that Seek is
// sys.File's, with its error numbers, and not a misspelt io.Seeker's.
type position = int64

// Seek implements sys.File. A directory that is rewound is listed afresh.
func (f *file) Seek(offset position, whence int) (position, sys.Errno) {
	f.entries, f.listed = nil, false
	return f.File.Seek(offset, whence)
}

// Close implements sys.File.
func (f *file) Close() sys.Errno {
	if !f.closed {
		f.closed = true
		f.open.Add(-1)
	}
	return f.File.Close()
}
