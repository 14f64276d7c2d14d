package outputs

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// File is one file of an item.
type File struct {
	Path string // within the item, with forward slashes
	Data []byte
}

// tarOverhead is what a tar needs per file beside its content: headers, an
// extended header for a long path, and padding.
const tarOverhead = 8 << 10

// WalkItem reads one item of an archive and calls visit for its files in order
// of path; visit may leave content unread. Only when WalkItem returns nil is the
// content what the manifest's digest says: until then it may be anything,
// within the sizes that the manifest declares and limits allow. Anything wrong
// with the archive is of kind api.Invalid; an item above limits, api.TooLarge.
func WalkItem(ctx context.Context, archive io.ReaderAt, mi *musterpb.ManifestItem, limits Limits, visit func(path string, size int64, content io.Reader) error) error {
	if mi.GetOutputBytes() > limits.Bytes || int64(mi.GetFiles()) > int64(limits.Files) {
		return api.Errorf(api.TooLarge, "index %d: %d bytes in %d files; the limits are %d bytes and %d files",
			mi.GetIndex(), mi.GetOutputBytes(), mi.GetFiles(), limits.Bytes, limits.Files)
	}
	if mi.GetOutputBytes() < 0 || mi.GetOffset() < 0 || mi.GetLength() <= 0 {
		return invalid(mi, "the manifest has a negative size")
	}
	w := &walk{mi: mi, left: mi.OutputBytes, visit: visit}
	defer w.close()
	stored, err := w.frame(ctx, archive, mi.OutputBytes+(int64(mi.Files)+1)*tarOverhead)
	switch {
	case stored != nil:
		return api.Errorf(api.KindOf(stored), "index %d: %w", mi.Index, stored) // the store failed, not the worker
	case w.visitErr != nil:
		return w.visitErr
	case err != nil:
		return invalid(mi, "the frame is damaged: %w", err)
	}
	return w.verify()
}

// frame walks the item's frame, which may unpack to most bytes. It tells errors
// of the archive's store from damage.
func (w *walk) frame(ctx context.Context, archive io.ReaderAt, most int64) (stored, damaged error) {
	if isSmall(w.mi.Length, most) {
		if err := ctx.Err(); err != nil {
			return givenUp(err), nil
		}
		w.decoder = smallDecoders.Get().(*smallDecoder)
		unpacked, whole, err := w.decoder.unpack(archive, w.mi.Offset, w.mi.Length, most)
		if err != nil {
			return err, nil
		}
		if whole {
			return nil, w.small(unpacked)
		}
		// Read as a stream, the errors say what is wrong.
	}
	from := &origin{r: io.NewSectionReader(archive, w.mi.Offset, w.mi.Length), ctx: ctx}
	z, release, err := stream(from)
	if err != nil {
		return err, nil
	}
	defer release()
	err = w.tar(&bounded{r: z, left: most})
	return from.err, err
}

func (w *walk) close() {
	if w.decoder != nil {
		smallDecoders.Put(w.decoder)
	}
}

func givenUp(err error) error {
	return api.Errorf(api.Unavailable, "reading the archive was given up: %w", err)
}

func invalid(mi *musterpb.ManifestItem, format string, args ...any) error {
	return api.Errorf(api.Invalid, "index %d: "+format, append([]any{mi.GetIndex()}, args...)...)
}

// origin tells errors of the archive's store from those of its content.
type origin struct {
	ctx context.Context
	r   io.Reader
	err error
}

func (o *origin) Read(p []byte) (int, error) {
	if err := o.ctx.Err(); err != nil {
		o.err = givenUp(err)
		return 0, o.err
	}
	n, err := o.r.Read(p)
	if err != nil && err != io.EOF {
		o.err = err
	}
	return n, err
}

// bounded fails once more than left bytes came out of the decompressor.
type bounded struct {
	r    io.Reader
	left int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, errTooMuch
	}
	return n, err
}

// walk is one pass over an item's tar.
type walk struct {
	mi       *musterpb.ManifestItem
	left     int64 // declared bytes that have not come yet
	visit    func(string, int64, io.Reader) error
	visitErr error
	last     string
	paths    nameSet       // nil until it can matter
	decoder  *smallDecoder // holds files and what visit reads; nil for a stream
	files    []fileDigest
}

// small walks a tar that is in memory.
func (w *walk) small(unpacked []byte) error {
	d, plain := w.decoder, false
	if d.files, plain = parsePlain(d.files[:0], unpacked); !plain {
		return w.tar(bytes.NewReader(unpacked))
	}
	w.files = d.digests[:0]
	for _, f := range d.files {
		size := int64(len(f.content))
		if err := w.enter(f.name, size); err != nil {
			return err
		}
		if err := w.visit(f.name, size, bytes.NewReader(f.content)); err != nil {
			w.visitErr = err
			return err
		}
		w.files = append(w.files, fileDigest{f.name, size, sha256.Sum256(f.content)})
	}
	d.digests = w.files
	return nil
}

func (w *walk) tar(r io.Reader) error {
	t := tar.NewReader(r)
	for {
		header, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := w.file(header, t); err != nil {
			return err
		}
	}
	// Behind the end of a tar there may be padding, and nothing may hide there.
	// A bomb may unpack to gigabytes of it, so none of it is kept.
	_, err := io.Copy(onlyZeros{}, r)
	return err
}

// onlyZeros takes zero bytes only.
type onlyZeros struct{}

func (onlyZeros) Write(p []byte) (int, error) {
	if len(bytes.Trim(p, "\x00")) > 0 {
		return 0, errors.New("there are bytes behind its end")
	}
	return len(p), nil
}

// enter checks that a file may come next.
func (w *walk) enter(name string, size int64) error {
	switch {
	case checkPath(name) != "":
		return errors.New(shorten(name) + " " + checkPath(name))
	case name <= w.last:
		return errors.New(shorten(name) + " is out of order")
	case len(w.files) == int(w.mi.Files):
		return errors.New("it holds more files than the manifest declares")
	case size > w.left:
		return errors.New("it holds more bytes than the manifest declares")
	case w.paths.parent(name) != "":
		return errors.New(shorten(name) + " lies below a file")
	}
	if w.mi.Files > 1 {
		if w.paths == nil {
			w.paths = make(nameSet)
		}
		w.paths[name] = true
	}
	w.last = name
	w.left -= size
	return nil
}

func (w *walk) file(header *tar.Header, content io.Reader) error {
	name := header.Name
	if header.Typeflag != tar.TypeReg {
		return errors.New(shorten(name) + " is not a file")
	}
	if err := w.enter(name, header.Size); err != nil {
		return err
	}
	h := sha256.New()
	counted := &counter{r: io.TeeReader(content, h)}
	if err := w.visit(name, header.Size, counted); err != nil {
		if counted.err != nil {
			return counted.err
		}
		w.visitErr = err
		return err
	}
	if _, err := io.Copy(io.Discard, counted); err != nil {
		return err
	}
	if counted.n != header.Size {
		return io.ErrUnexpectedEOF
	}
	w.files = append(w.files, fileDigest{name, header.Size, [sha256.Size]byte(h.Sum(nil))})
	return nil
}

// counter counts what is read, and remembers that reading failed.
type counter struct {
	r   io.Reader
	n   int64
	err error
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if err != nil && err != io.EOF {
		c.err = err
	}
	return n, err
}

func (w *walk) verify() error {
	if w.left != 0 || len(w.files) != int(w.mi.Files) {
		return invalid(w.mi, "the frame holds %d bytes in %d files; the manifest declares %d in %d",
			w.mi.OutputBytes-w.left, len(w.files), w.mi.OutputBytes, w.mi.Files)
	}
	if digest := itemDigest(w.files); subtle.ConstantTimeCompare(digest[:], w.mi.OutputDigest) != 1 {
		return invalid(w.mi, "the files do not match the digest in the manifest")
	}
	return nil
}

// OpenItem reads one item of an archive into memory, verified, in order of path.
// Limits.Bytes bounds the memory.
func OpenItem(ctx context.Context, archive io.ReaderAt, mi *musterpb.ManifestItem, limits Limits) ([]File, error) {
	var files []File
	err := WalkItem(ctx, archive, mi, limits, func(path string, size int64, content io.Reader) error {
		// A declared size is only believed as far as content follows it.
		data, err := io.ReadAll(content)
		files = append(files, File{path, data})
		return err
	})
	if err != nil {
		return nil, err
	}
	return files, nil
}

// Extract writes one item of an archive, verified, into the directory dst, which
// must not exist: it appears with all its files or not at all.
func Extract(ctx context.Context, archive io.ReaderAt, mi *musterpb.ManifestItem, dst string, limits Limits) error {
	if _, err := os.Lstat(dst); err == nil {
		return api.Errorf(api.Conflict, "%s exists already; choose another directory or remove it", dst)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dst), ".extract-*")
	if err != nil {
		return extractError(err)
	}
	defer os.RemoveAll(tmp) // no effect after the rename
	root, err := os.OpenRoot(tmp)
	if err != nil {
		return extractError(err)
	}
	defer root.Close()
	err = WalkItem(ctx, archive, mi, limits, func(name string, size int64, content io.Reader) error {
		return extractFile(root, name, content)
	})
	if err != nil {
		return err
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return extractError(err)
	}
	return extractError(os.Rename(tmp, dst))
}

func extractFile(root *os.Root, name string, content io.Reader) error {
	if dir := path.Dir(name); dir != "." {
		if err := root.MkdirAll(filepath.FromSlash(dir), 0o755); err != nil {
			return extractError(err)
		}
	}
	f, err := root.OpenFile(filepath.FromSlash(name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, fs.FileMode(0o644))
	if err != nil {
		return extractError(err)
	}
	_, err = io.Copy(f, content)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	return extractError(err)
}

func extractError(err error) error {
	if err == nil {
		return nil
	}
	return api.Errorf(api.Unavailable, "writing the results: %w", err)
}
