package outputs

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// Write packs what a job's program left in dir, the host's side of /out, into
// the file dst, and returns the manifest's items. Items come in order of index.
//
// With OUTPUT_MODE_FILES an item's output is the directory named like its value,
// or all of dir when there is one item and no such directory; whatever else is
// there is left out. With OUTPUT_MODE_LINES it is the item's line of ResultsFile,
// found by custom_id where the item has one and by index otherwise.
//
// An error of kind api.Invalid is the program's fault and names item and file;
// any other is this machine's. On an error dst does not exist.
func Write(ctx context.Context, dir string, mode musterpb.OutputMode, items []Item, dst string, limits Limits) ([]*musterpb.ManifestItem, Summary, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, Summary{}, api.Errorf(api.Internal, "outputs: %w", err)
	}
	defer root.Close()
	f, err := os.Create(dst)
	if err != nil {
		return nil, Summary{}, diskError(err)
	}
	w := newWriter(ctx, f, root, limits)
	if mode == musterpb.OutputMode_OUTPUT_MODE_LINES {
		err = w.lines(items)
	} else {
		err = w.directories(items)
	}
	w.close()
	if err == nil {
		err = diskError(f.Sync())
	}
	if closeErr := f.Close(); err == nil {
		err = diskError(closeErr)
	}
	if err != nil {
		os.Remove(dst)
		return nil, Summary{}, err
	}
	return w.manifest, w.summary(), nil
}

// diskError gives an error of the machine's disk its kind: nothing that the job
// did.
func diskError(err error) error {
	if err == nil {
		return nil
	}
	return api.Errorf(api.Unavailable, "writing the archive: %w", err)
}

// writer appends frames to an archive.
type writer struct {
	ctx    context.Context
	root   *os.Root // /out; nil where the files are in memory
	limits Limits

	archive  io.Writer
	sum      hash.Hash // of the archive
	offset   int64     // its length
	small    *smallEncoder
	zstd     *zstd.Encoder // nil until an item is too large for small
	manifest []*musterpb.ManifestItem
	bytes    int64 // of all outputs so far
	files    int
}

// newWriter returns a writer that close must follow.
func newWriter(ctx context.Context, archive io.Writer, root *os.Root, limits Limits) *writer {
	return &writer{ctx: ctx, root: root, limits: limits, archive: archive, sum: sha256.New(), small: smallEncoders.Get().(*smallEncoder)}
}

// close gives the compressors back.
func (w *writer) close() {
	smallEncoders.Put(w.small)
	if w.zstd != nil {
		w.zstd.Reset(nil)
		streamEncoders.Put(w.zstd)
	}
}

func (w *writer) summary() Summary {
	return Summary{Digest: api.DigestFromSum(w.sum.Sum(nil)), ArchiveBytes: w.offset, OutputBytes: w.bytes, Files: w.files}
}

// Write takes what the compressor yields.
func (w *writer) Write(p []byte) (int, error) {
	n, err := w.archive.Write(p)
	w.sum.Write(p[:n])
	w.offset += int64(n)
	return n, diskError(err)
}

// source is one file of an item, still to be read.
type source struct {
	path  string // within the item
	shown string // as a message names it
	size  int64
	data  []byte // its content, where open is nil
	open  func() (io.ReadCloser, error)
}

// frame appends the frame of one item.
func (w *writer) frame(item Item, sources []source) error {
	slices.SortFunc(sources, func(a, b source) int { return strings.Compare(a.path, b.path) })
	start, total, most := w.offset, int64(0), int64(tarOverhead)
	for _, s := range sources {
		total += s.size
		most += s.size + tarOverhead
	}
	pack := w.streamed
	if most <= maxSmall {
		pack = w.inOnePiece
	}
	files, err := pack(item, sources)
	if err != nil {
		return err
	}
	digest := itemDigest(files)
	w.bytes += total
	w.files += len(sources)
	w.manifest = append(w.manifest, &musterpb.ManifestItem{
		Index:        item.Index,
		OutputDigest: digest[:],
		Offset:       start,
		Length:       w.offset - start,
		OutputBytes:  total,
		Files:        uint32(len(sources)),
	})
	return nil
}

// inOnePiece appends a frame that fits in memory.
func (w *writer) inOnePiece(item Item, sources []source) ([]fileDigest, error) {
	e := w.small
	e.tar = e.tar[:0]
	files := e.files[:0]
	for _, s := range sources {
		file, err := e.add(w.ctx, s)
		if err != nil {
			return nil, fmt.Errorf("item %d: %w", item.Value, err)
		}
		files = append(files, file)
	}
	e.files = files
	e.tar = append(e.tar, zeroBlocks[:]...)
	_, err := w.Write(e.compress())
	return files, err
}

// streamed appends a frame of any size.
func (w *writer) streamed(item Item, sources []source) ([]fileDigest, error) {
	if w.zstd == nil {
		w.zstd = streamEncoders.Get().(*zstd.Encoder)
	}
	w.zstd.Reset(w)
	files, err := w.tar(w.zstd, item, sources)
	if err != nil {
		return nil, err
	}
	return files, diskError(w.zstd.Close())
}

// tar writes an item's files and returns their digests.
func (w *writer) tar(to io.Writer, item Item, sources []source) ([]fileDigest, error) {
	t := tar.NewWriter(to)
	files := make([]fileDigest, 0, len(sources))
	for _, s := range sources {
		sum, err := w.file(t, s)
		if err != nil {
			return nil, fmt.Errorf("item %d: %w", item.Value, err)
		}
		files = append(files, fileDigest{s.path, s.size, sum})
	}
	return files, diskError(t.Close())
}

// fileHeader is the header of a file in an item's tar: outputs have no times,
// owners and modes.
func fileHeader(name string, size int64) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0)}
}

// file streams one file into the item's tar and hashes it on the way.
func (w *writer) file(t *tar.Writer, s source) (sum [sha256.Size]byte, err error) {
	if err := t.WriteHeader(fileHeader(s.path, s.size)); err != nil {
		return sum, diskError(err)
	}
	h := sha256.New()
	if err := s.copyTo(w.ctx, io.MultiWriter(t, h)); err != nil {
		return sum, err
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

// copyTo writes the content of a file.
func (s *source) copyTo(ctx context.Context, to io.Writer) error {
	if s.open == nil {
		_, err := to.Write(s.data)
		return machineError(err)
	}
	r, err := s.open()
	if err != nil {
		return machineError(err)
	}
	defer r.Close()
	n, err := io.Copy(to, io.LimitReader(&ctxReader{ctx, r}, s.size))
	if err == nil && n < s.size {
		err = api.Errorf(api.Invalid, "%s became shorter while it was read; the program must have ended before its outputs are taken", s.shown)
	}
	return machineError(err)
}

// machineError gives an error without a kind that of a broken machine.
func machineError(err error) error {
	var known *api.Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	return api.Errorf(api.Unavailable, "reading the outputs: %w", err)
}

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

// claim counts the bytes of a file against the limit before they are read.
func (w *writer) claim(total *int64, size int64) bool {
	*total += size
	return *total >= 0 && *total <= w.limits.Bytes-w.bytes
}

// directories packs each item's directory.
func (w *writer) directories(items []Item) error {
	for _, item := range items {
		dir := strconv.FormatUint(item.Value, 10)
		info, err := w.root.Lstat(dir)
		switch {
		case err == nil && info.IsDir():
		case err == nil && info.Mode()&fs.ModeSymlink != 0:
			return refused(item, dir, "is a symbolic link; write the files themselves")
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return machineError(err)
		case len(items) == 1:
			dir = "."
		case err == nil:
			return refused(item, dir, "is a file; write the item's files into a directory of this name")
		default:
			return refused(item, dir, "is missing; the program writes the files of an item into the directory named like its value%s", w.present())
		}
		sources, err := w.collect(item, dir)
		if err != nil {
			return err
		}
		if err := w.frame(item, sources); err != nil {
			return err
		}
	}
	return nil
}

func refused(item Item, name, format string, args ...any) error {
	return api.Errorf(api.Invalid, "item %d: %s %s", item.Value, shownPath(name), fmt.Sprintf(format, args...))
}

// shownPath is a path below /out as the program knows it.
func shownPath(name string) string { return shorten(path.Join("/out", name)) }

func shorten(s string) string {
	const most = 200
	if strings.ContainsFunc(s, func(r rune) bool { return !strconv.IsPrint(r) }) {
		s = strconv.Quote(s)
	}
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// present names what is in /out, for whoever looks for a missing directory.
func (w *writer) present() string {
	f, err := w.root.Open(".")
	if err != nil {
		return ""
	}
	defer f.Close()
	names, _ := f.Readdirnames(10)
	if len(names) == 0 {
		return "; /out is empty"
	}
	slices.Sort(names)
	return "; /out holds " + shorten(strings.Join(names, ", "))
}

// collect lists the files of an item without reading them. Memory is bounded by
// the limit on their number.
func (w *writer) collect(item Item, dir string) ([]source, error) {
	var sources []source
	entries, total := 0, int64(0)
	pending := []string{dir}
	for len(pending) > 0 {
		current := pending[len(pending)-1]
		pending = pending[:len(pending)-1]
		err := w.each(current, func(entry fs.DirEntry) error {
			if entries++; entries > w.limits.Files {
				return refused(item, dir, "holds more than the limit of %d files", w.limits.Files)
			}
			name := path.Join(current, entry.Name())
			within := name
			if dir != "." {
				within = strings.TrimPrefix(name, dir+"/")
			}
			if problem := checkPath(within); problem != "" {
				return refused(item, name, "%s", problem)
			}
			if entry.IsDir() {
				pending = append(pending, name)
				return nil
			}
			if !entry.Type().IsRegular() {
				return refused(item, name, "is a %s; outputs are files and directories", typeName(entry.Type()))
			}
			info, err := entry.Info()
			if err != nil {
				return err
			}
			if !w.claim(&total, info.Size()) {
				return refused(item, name, "takes the outputs above the limit of %d bytes; ask for more with resources.disk", w.limits.Bytes)
			}
			sources = append(sources, source{
				path: within, shown: shownPath(name), size: info.Size(),
				open: func() (io.ReadCloser, error) { return w.root.Open(filepath.FromSlash(name)) },
			})
			return nil
		})
		if err != nil {
			return nil, machineError(err)
		}
	}
	if len(sources) == 0 {
		return nil, refused(item, dir, "holds no files")
	}
	return sources, nil
}

// each calls f for the entries of a directory, a few at a time.
func (w *writer) each(dir string, f func(fs.DirEntry) error) error {
	d, err := w.root.Open(filepath.FromSlash(dir))
	if err != nil {
		return err
	}
	defer d.Close()
	for {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		entries, err := d.ReadDir(1024)
		for _, entry := range entries {
			if err := f(entry); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func typeName(mode fs.FileMode) string {
	switch {
	case mode.IsDir():
		return "directory"
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
