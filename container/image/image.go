// Package image makes and reads the images that jobs run: it packs a static
// binary into an image without a container engine, looks into archives before
// they are shipped, and pins registry references to digests.
package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/container"
)

// Options say what goes into an image that starts from nothing.
type Options struct {
	// Binary is the program, a file on this machine.
	Binary string
	// Name is what the program is called in the root of the image; empty means
	// the base name of Binary.
	Name string
	// Entrypoint is the command line that a job's command is appended to; empty
	// means the program alone.
	Entrypoint []string
	// Files adds further files: path in the image to path on this machine.
	Files map[string]string
	// Env holds NAME=value pairs.
	Env []string
	// Platform is "os/arch" or "os/arch/variant", such as "linux/amd64".
	Platform string
}

// epoch is the time of everything in an image, so that the same bytes in make
// the same digest. It is not zero: some engines show that as a broken date.
var epoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// Scratch assembles an image from a binary and a few files. The image reads
// those files when it is written, so they must stay as they are until then. The
// same files and options always give the same digest: times, owners and order
// are fixed and the layer is not compressed.
func Scratch(o Options) (v1.Image, error) {
	platform, err := v1.ParsePlatform(o.Platform)
	if err != nil || platform.OS == "" || platform.Architecture == "" {
		return nil, api.Errorf(api.Invalid, "platform %q: want os/arch, such as linux/amd64", o.Platform)
	}
	for _, pair := range o.Env {
		if key, _, ok := strings.Cut(pair, "="); !ok || key == "" {
			return nil, api.Errorf(api.Invalid, "environment %q: want NAME=value", pair)
		}
	}
	program := programName(o)
	entries, err := layerEntries(o, program)
	if err != nil {
		return nil, err
	}
	layer, err := newPlainLayer(entries)
	if err != nil {
		return nil, fmt.Errorf("layer of %s: %w", o.Binary, err)
	}
	img, err := mutate.Append(empty.Image, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: v1.Time{Time: epoch}, CreatedBy: "muster image pack"},
	})
	if err != nil {
		return nil, fmt.Errorf("image of %s: %w", o.Binary, err)
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("image of %s: %w", o.Binary, err)
	}
	file = file.DeepCopy()
	file.Created = v1.Time{Time: epoch}
	file.OS, file.Architecture, file.Variant = platform.OS, platform.Architecture, platform.Variant
	file.Config.Entrypoint = o.Entrypoint
	if len(o.Entrypoint) == 0 {
		file.Config.Entrypoint = []string{"/" + program}
	}
	file.Config.Env = o.Env
	file.Config.WorkingDir = "/"
	return mutate.ConfigFile(img, file)
}

func programName(o Options) string {
	if o.Name != "" {
		return o.Name
	}
	return filepath.Base(o.Binary)
}

// entry is one file or, with an empty source, one directory of the layer.
type entry struct {
	name   string // without a leading slash
	source string
	size   int64
	mode   int64
}

// layerEntries lists the layer in the order of its paths, parents first. The
// mount points of the contract are there, for engines that do not make them.
func layerEntries(o Options, program string) ([]entry, error) {
	if program != path.Base(path.Clean("/"+program)) {
		return nil, api.Errorf(api.Invalid, "name %q: want a plain file name", program)
	}
	entries := map[string]entry{}
	for _, dir := range []string{container.InputDir, container.OutputDir} {
		entries[dir[1:]] = entry{name: dir[1:], mode: 0o755}
	}
	entries[container.TempDir[1:]] = entry{name: container.TempDir[1:], mode: 0o1777}
	add := func(name, source string, mode int64) error {
		info, err := os.Stat(source)
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return api.Errorf(api.Invalid, "%s is not a regular file", source)
		}
		if old, taken := entries[name]; taken {
			return api.Errorf(api.Invalid, "/%s would be in the image twice (%s and %s)", name, old.source, source)
		}
		entries[name] = entry{name: name, source: source, size: info.Size(), mode: mode}
		return nil
	}
	if err := add(program, o.Binary, 0o755); err != nil {
		return nil, err
	}
	for _, target := range slices.Sorted(maps.Keys(o.Files)) {
		clean := strings.TrimPrefix(path.Clean("/"+target), "/")
		if clean == "" || strings.HasSuffix(target, "/") {
			return nil, api.Errorf(api.Invalid, "file %q: want the path of a file in the image", target)
		}
		if err := add(clean, o.Files[target], 0o644); err != nil {
			return nil, err
		}
		for dir := path.Dir(clean); dir != "."; dir = path.Dir(dir) {
			if parent, taken := entries[dir]; taken && parent.source != "" {
				return nil, api.Errorf(api.Invalid, "/%s would be in the image both as a file and as a directory", dir)
			} else if !taken {
				entries[dir] = entry{name: dir, mode: 0o755}
			}
		}
	}
	return slices.SortedFunc(maps.Values(entries), func(a, b entry) int { return strings.Compare(a.name, b.name) }), nil
}

// plainLayer is a layer that is not compressed: the bytes of a compressed one
// depend on the version of the compressor. Archives are compressed on their way.
type plainLayer struct {
	entries []entry
	hash    v1.Hash
	size    int64
}

var _ v1.Layer = (*plainLayer)(nil)

func newPlainLayer(entries []entry) (*plainLayer, error) {
	content, err := openLayer(entries)
	if err != nil {
		return nil, err
	}
	defer content.Close()
	hash, size, err := v1.SHA256(content)
	if err != nil {
		return nil, err
	}
	return &plainLayer{entries: entries, hash: hash, size: size}, nil
}

func (l *plainLayer) Digest() (v1.Hash, error)             { return l.hash, nil }
func (l *plainLayer) DiffID() (v1.Hash, error)             { return l.hash, nil }
func (l *plainLayer) Size() (int64, error)                 { return l.size, nil }
func (l *plainLayer) MediaType() (types.MediaType, error)  { return types.DockerUncompressedLayer, nil }
func (l *plainLayer) Compressed() (io.ReadCloser, error)   { return openLayer(l.entries) }
func (l *plainLayer) Uncompressed() (io.ReadCloser, error) { return openLayer(l.entries) }

// openLayer is the layer as a tar stream that reads each file when its turn comes.
func openLayer(entries []entry) (io.ReadCloser, error) {
	stream := &layerStream{}
	var header bytes.Buffer
	w := tar.NewWriter(&header)
	var parts []io.Reader
	for _, e := range entries {
		h := &tar.Header{Format: tar.FormatPAX, Name: e.name, Mode: e.mode, Size: e.size, ModTime: epoch, Typeflag: tar.TypeReg}
		if e.source == "" {
			h.Name, h.Typeflag = e.name+"/", tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("layer entry %s: %w", e.name, err)
		}
		parts = append(parts, bytes.NewReader(bytes.Clone(header.Bytes())))
		header.Reset()
		// The content goes around the writer, which is told nothing of it: a new
		// one for the next header keeps it from missing those bytes.
		w = tar.NewWriter(&header)
		if e.size > 0 {
			padding := make([]byte, (512-e.size%512)%512)
			parts = append(parts, &lazyFile{entry: e, stream: stream}, bytes.NewReader(padding))
		}
	}
	parts = append(parts, bytes.NewReader(make([]byte, 1024)))
	stream.Reader = io.MultiReader(parts...)
	return stream, nil
}

type layerStream struct {
	io.Reader
	open *os.File
}

func (s *layerStream) Close() error {
	if s.open == nil {
		return nil
	}
	f := s.open
	s.open = nil
	return f.Close()
}

// lazyFile yields exactly the bytes that the entry's header announced.
type lazyFile struct {
	entry
	stream *layerStream
	opened bool
	left   int64
}

func (l *lazyFile) Read(p []byte) (int, error) {
	if !l.opened {
		f, err := os.Open(l.source)
		if err != nil {
			return 0, err
		}
		l.opened, l.left, l.stream.open = true, l.size, f
	}
	if l.left == 0 {
		if err := l.stream.Close(); err != nil {
			return 0, err
		}
		return 0, io.EOF
	}
	n, err := l.stream.open.Read(p[:min(int64(len(p)), l.left)])
	l.left -= int64(n)
	if err == io.EOF && l.left > 0 {
		return n, fmt.Errorf("%s shrank while it was packed", l.source)
	}
	if err == io.EOF {
		err = nil
	}
	return n, err
}

// WriteArchive writes img as `docker save` would, tagged ref.
func WriteArchive(w io.Writer, ref string, img v1.Image) error {
	tag, err := name.NewTag(ref)
	if err != nil {
		return api.Errorf(api.Invalid, "image name %q: %w", ref, err)
	}
	return tarball.Write(tag, img, w)
}
