package blob

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/musternet/muster/api"
)

// Limits bounds what an archive may unpack to.
type Limits struct {
	Bytes int64 // of all files together
	Files int   // files and directories
}

// maxWindow bounds the memory that a zstd frame can ask for. The encoder here
// needs 8 MiB; the specification asks decoders to support that much.
const maxWindow = 8 << 20

// zeroTime is the modification time of everything in an archive.
var zeroTime = time.Unix(0, 0).UTC()

// PutDir stores a directory as one blob, the same for the same content: a
// zstd-compressed tar with sorted names, no times or owners, and the modes 0644
// and 0755. Files that do not compress, such as images and videos, are in it as
// they are. Anything but files and directories is refused.
func PutDir(ctx context.Context, store Store, dir string) (api.Digest, int64, error) {
	f, err := os.CreateTemp("", "muster-dir-*")
	if err != nil {
		return "", 0, diskError(os.TempDir(), err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := WriteDir(ctx, f, dir); err != nil {
		return "", 0, err
	}
	return PutFile(ctx, store, f.Name())
}

// WriteDir writes the archive of PutDir.
func WriteDir(ctx context.Context, w io.Writer, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fileError(dir, err)
	}
	defer root.Close()
	z, err := newPacker(w)
	if err != nil {
		return api.Errorf(api.Internal, "zstd: %w", err)
	}
	t := tar.NewWriter(z)
	err = fs.WalkDir(root.FS(), ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return fileError(filepath.Join(dir, name), err)
		}
		if name == "." {
			return ctx.Err()
		}
		return addToArchive(ctx, t, z, root, name, entry)
	})
	if err == nil {
		err = t.Close()
	}
	if closeErr := z.Close(); err == nil {
		err = closeErr
	}
	return archiveError(dir, err)
}

func archiveError(dir string, err error) error {
	var known *api.Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return api.Errorf(api.Unavailable, "%s: %w", dir, err)
	}
	return diskError(dir, err)
}

func addToArchive(ctx context.Context, t *tar.Writer, z *packer, root *os.Root, name string, entry fs.DirEntry) error {
	full := filepath.Join(root.Name(), filepath.FromSlash(name))
	header := &tar.Header{Name: name, Mode: 0o644, ModTime: zeroTime, Typeflag: tar.TypeReg}
	switch entry.Type() {
	case fs.ModeDir:
		header.Name, header.Mode, header.Typeflag = name+"/", 0o755, tar.TypeDir
		return t.WriteHeader(header)
	case 0:
	default:
		return api.Errorf(api.Invalid, "%s: is a %s; only files and directories can be uploaded, so replace it by what it stands for", full, typeName(entry.Type()))
	}
	f, err := root.Open(filepath.FromSlash(name))
	if err != nil {
		return fileError(full, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fileError(full, err)
	}
	if !info.Mode().IsRegular() {
		return api.Errorf(api.Invalid, "%s: changed while it was read; try again", full)
	}
	header.Size = info.Size()
	if info.Mode()&0o111 != 0 {
		header.Mode = 0o755
	}
	if err := t.WriteHeader(header); err != nil {
		return fileError(full, err)
	}
	if z.incompressible(f, header.Size) {
		if err := z.store(header.Size); err != nil {
			return err
		}
	}
	n, err := io.Copy(t, io.LimitReader(&ctxReader{ctx, f}, header.Size))
	if err == nil && n < header.Size {
		err = api.Errorf(api.Invalid, "%s: became shorter while it was read; try again", full)
	}
	return err
}

func typeName(mode fs.FileMode) string {
	switch {
	case mode&fs.ModeSymlink != 0:
		return "symbolic link"
	case mode&fs.ModeNamedPipe != 0:
		return "named pipe"
	case mode&fs.ModeSocket != 0:
		return "socket"
	case mode&fs.ModeDevice != 0:
		return "device"
	}
	return "special file"
}

// ExtractDir unpacks an archive of WriteDir into dst, an empty directory that
// exists. The archive may come from anybody: nothing outside of dst is touched,
// nothing but files and directories is made, and no more than limits allow. On
// an error dst holds a part of it, for the caller to remove.
func ExtractDir(archive io.Reader, dst string, limits Limits) error {
	root, err := os.OpenRoot(dst)
	if err != nil {
		return fileError(dst, err)
	}
	defer root.Close()
	z, err := zstd.NewReader(archive, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true))
	if err != nil {
		return api.Errorf(api.Invalid, "the archive is damaged: %w", err)
	}
	defer z.Close()
	e := &extraction{root: root, limits: limits, left: limits}
	// Headers count too: 64 KiB of them per file is far more than a name needs.
	t := tar.NewReader(&bounded{z, limits.Bytes + int64(limits.Files+1)*64<<10})
	for {
		header, err := t.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return damaged(err)
		}
		if err := e.add(header, t); err != nil {
			return err
		}
	}
}

func damaged(err error) error {
	if api.KindOf(err) == api.TooLarge || api.KindOf(err) == api.Unavailable {
		return err
	}
	return api.Errorf(api.Invalid, "the archive is damaged: %w", err)
}

// bounded fails, unlike io.LimitReader, once more than n bytes are there.
type bounded struct {
	r io.Reader
	n int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.n -= int64(n); b.n < 0 {
		return 0, api.Errorf(api.TooLarge, "the archive unpacks to more than the limit")
	}
	return n, err
}

type extraction struct {
	root   *os.Root
	limits Limits
	left   Limits
}

func (e *extraction) add(header *tar.Header, content io.Reader) error {
	name := strings.TrimSuffix(header.Name, "/")
	if name == "" || !filepath.IsLocal(filepath.FromSlash(name)) || path.Clean(name) != name || strings.ContainsAny(name, "\\\x00") {
		return api.Errorf(api.Invalid, "the archive holds %q, which is not a plain path inside of it", header.Name)
	}
	if e.left.Files--; e.left.Files < 0 {
		return api.Errorf(api.TooLarge, "the archive holds more than the limit of %d files", e.limits.Files)
	}
	switch header.Typeflag {
	case tar.TypeDir:
		if err := e.root.MkdirAll(name, 0o755); err != nil {
			return e.error(name, err)
		}
		return nil
	case tar.TypeReg:
		return e.file(name, header, content)
	}
	return api.Errorf(api.Invalid, "the archive holds %q, which is neither a file nor a directory", header.Name)
}

func (e *extraction) file(name string, header *tar.Header, content io.Reader) error {
	if header.Size > e.left.Bytes {
		return api.Errorf(api.TooLarge, "the archive unpacks to more than the limit of %d bytes", e.limits.Bytes)
	}
	e.left.Bytes -= header.Size
	if dir := path.Dir(name); dir != "." {
		if err := e.root.MkdirAll(dir, 0o755); err != nil {
			return e.error(name, err)
		}
	}
	mode := fs.FileMode(0o644)
	if header.Mode&0o111 != 0 {
		mode = 0o755
	}
	f, err := e.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return e.error(name, err)
	}
	in := &source{r: content}
	_, err = io.Copy(f, in)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if in.err != nil {
		return damaged(in.err)
	}
	return diskError(e.root.Name(), err)
}

// error tells names that the archive has twice, or below a file, from a disk
// that fails.
func (e *extraction) error(name string, err error) error {
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if info, statErr := e.root.Lstat(dir); statErr == nil && !info.IsDir() {
			return api.Errorf(api.Invalid, "the archive holds %q below a file", name)
		}
	}
	if errors.Is(err, fs.ErrExist) {
		return api.Errorf(api.Invalid, "the archive holds %q twice", name)
	}
	return fmt.Errorf("%s: %w", name, diskError(e.root.Name(), err))
}

// source remembers that reading, not writing, failed.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}
