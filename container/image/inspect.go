package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/musternet/muster/api"
)

// Bounds on an archive. Layers are not read into memory; everything else is.
const (
	maxEntries       = 1 << 16
	maxDocumentBytes = 4 << 20 // one manifest, index or configuration
	maxManifests     = 64      // images in one archive
	maxLayers        = 512     // layers in one image
	maxIndexDepth    = 3
)

// Format is how a program is packed.
type Format string

// The formats that runtimes take.
const (
	DockerSave Format = "docker-save" // what `docker save` writes
	OCILayout  Format = "oci-layout"  // an OCI image layout in a tar
	Wasm       Format = "wasm"        // a bare WebAssembly module
)

// WasmPlatform is the platform of every WebAssembly module.
const WasmPlatform = "wasip1/wasm"

// Info is what an archive says about itself.
type Info struct {
	// Digest is of the file, not of a manifest in it.
	Digest api.Digest `json:"digest"`
	Bytes  int64      `json:"bytes"`
	Format Format     `json:"format"`
	// Platforms are those with all their layers in the archive, sorted:
	// "linux/amd64". Never empty.
	Platforms []string `json:"platforms"`
	// Tags are the names that the archive gives its image; often none.
	Tags []string `json:"tags,omitempty"`
	// The rest is of the image for the first platform.
	Entrypoint []string `json:"entrypoint,omitempty"`
	Command    []string `json:"command,omitempty"`
	Env        []string `json:"env,omitempty"`
	User       string   `json:"user,omitempty"`
}

// Inspect reads what the file at path is: a docker-save or OCI-layout tar, or a
// WebAssembly module. It checks that every part that the archive names is in it,
// and the digests of manifests and configurations; the layers' own digests are
// left to the engine that unpacks them. Errors have kind Invalid, Unsupported or
// TooLarge when the file is to blame.
func Inspect(path string) (Info, error) {
	f, err := os.Open(path)
	if err != nil {
		return Info{}, err
	}
	defer f.Close()
	info, err := inspect(f)
	if err != nil {
		return Info{}, fmt.Errorf("%s: %w", path, err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return Info{}, err
	}
	sum := sha256.New()
	if info.Bytes, err = io.Copy(sum, f); err != nil {
		return Info{}, err
	}
	info.Digest = api.DigestFromSum(sum.Sum(nil))
	return info, nil
}

// source is a file or, in tests, bytes.
type source interface {
	io.ReadSeeker
	io.ReaderAt
}

func inspect(f source) (Info, error) {
	if wasm, err := isWasm(f); err != nil {
		return Info{}, err
	} else if wasm {
		return Info{Format: Wasm, Platforms: []string{WasmPlatform}}, nil
	}
	a, err := readArchive(f)
	if err != nil {
		return Info{}, err
	}
	switch {
	case a.has("manifest.json"):
		return a.dockerSave()
	case a.has("index.json"):
		return a.ociLayout()
	}
	return Info{}, api.Errorf(api.Invalid, "neither a docker-save nor an OCI-layout archive: it has no manifest.json and no index.json")
}

// archive is the table of contents of a tar.
type archive struct {
	file  io.ReaderAt
	parts map[string]part
}

type part struct {
	offset, size int64
	link         string // the entry that this one stands for, empty for a file
}

func readArchive(f source) (*archive, error) {
	if err := refuseCompressed(f); err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	a := &archive{file: f, parts: make(map[string]part)}
	r := tar.NewReader(f)
	for entries := 0; ; entries++ {
		h, err := r.Next()
		if err == io.EOF && entries > 0 {
			return a, nil
		}
		if err == io.EOF {
			return nil, api.Errorf(api.Invalid, "the archive is empty")
		}
		if err != nil {
			return nil, api.Errorf(api.Invalid, "not a tar archive, or a damaged one: %w", err)
		}
		if entries == maxEntries {
			return nil, api.Errorf(api.TooLarge, "the archive has more than %d entries", maxEntries)
		}
		name := path.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			// The reader is not buffered, so the file stands at the entry's content.
			at, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			a.parts[name] = part{offset: at, size: h.Size}
		case tar.TypeSymlink:
			a.parts[name] = part{link: path.Join(path.Dir(name), h.Linkname)}
		case tar.TypeLink:
			a.parts[name] = part{link: path.Clean(h.Linkname)}
		}
	}
}

// refuseCompressed tells the usual mistake apart from a broken file.
func refuseCompressed(f io.ReaderAt) error {
	magic := make([]byte, 6)
	n, err := f.ReadAt(magic, 0)
	if err != nil && err != io.EOF {
		return err
	}
	magic = magic[:n]
	for kind, want := range map[string]string{"gzip": "\x1f\x8b", "zstd": "\x28\xb5\x2f\xfd", "xz": "\xfd7zXZ", "bzip2": "BZh"} {
		if bytes.HasPrefix(magic, []byte(want)) {
			return api.Errorf(api.Unsupported, "the archive is compressed (%s): give the plain .tar, it is compressed on its way", kind)
		}
	}
	return nil
}

func (a *archive) has(name string) bool {
	_, err := a.find(name)
	return err == nil
}

// find follows the links that older engines write in place of repeated layers.
func (a *archive) find(name string) (part, error) {
	at := path.Clean(name)
	for range 8 {
		p, ok := a.parts[at]
		if !ok {
			return part{}, api.Errorf(api.Invalid, "%q is not in the archive", name)
		}
		if p.link == "" {
			return p, nil
		}
		at = p.link
	}
	return part{}, api.Errorf(api.Invalid, "%q is a chain of links that does not end", name)
}

func (a *archive) read(name string) ([]byte, error) {
	p, err := a.find(name)
	if err != nil {
		return nil, err
	}
	if p.size > maxDocumentBytes {
		return nil, api.Errorf(api.TooLarge, "%q has %d bytes: want at most %d", name, p.size, maxDocumentBytes)
	}
	b := make([]byte, p.size)
	if _, err := a.file.ReadAt(b, p.offset); err != nil {
		return nil, api.Errorf(api.Invalid, "%q is cut short: %w", name, err)
	}
	return b, nil
}

func (a *archive) decode(name string, v any) error {
	b, err := a.read(name)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return api.Errorf(api.Invalid, "%q: %w", name, err)
	}
	return nil
}

// dockerSave reads an archive whose manifest.json lists images, each with its
// configuration and layers by name.
func (a *archive) dockerSave() (Info, error) {
	var images tarball.Manifest
	if err := a.decode("manifest.json", &images); err != nil {
		return Info{}, err
	}
	if len(images) > maxManifests {
		return Info{}, api.Errorf(api.TooLarge, "the archive has %d images: want at most %d", len(images), maxManifests)
	}
	if len(images) != 1 {
		return Info{}, api.Errorf(api.Invalid, "the archive has %d images: a job runs exactly one", len(images))
	}
	img := images[0]
	config, err := a.read(img.Config)
	if err != nil {
		return Info{}, fmt.Errorf("configuration: %w", err)
	}
	if err := checkName(img.Config, config); err != nil {
		return Info{}, err
	}
	info := Info{Format: DockerSave, Tags: img.RepoTags}
	layers, err := info.configure(config)
	if err != nil {
		return Info{}, err
	}
	if len(img.Layers) != layers || layers > maxLayers {
		return Info{}, api.Errorf(api.Invalid, "manifest.json lists %d layers and the configuration %d: want the same number, at most %d", len(img.Layers), layers, maxLayers)
	}
	for _, layer := range img.Layers {
		if _, err := a.find(layer); err != nil {
			return Info{}, fmt.Errorf("layer: %w", err)
		}
	}
	return info, nil
}

// checkName compares a part with the digest in its name, where there is one.
func checkName(name string, b []byte) error {
	hex := strings.TrimSuffix(path.Base(name), ".json")
	hex = strings.TrimPrefix(hex, "sha256:")
	want, err := api.ParseDigest("sha256:" + hex)
	if err == nil && api.DigestOf(b) != want {
		return api.Errorf(api.Invalid, "%q does not have the digest in its name: the archive is damaged", name)
	}
	return nil
}

// configure adds an image's configuration and returns how many layers it has.
// The first image's command line is kept.
func (i *Info) configure(config []byte) (layers int, err error) {
	var c v1.ConfigFile
	if err := json.Unmarshal(config, &c); err != nil {
		return 0, api.Errorf(api.Invalid, "the image's configuration: %w", err)
	}
	if c.OS == "" || c.Architecture == "" {
		return 0, api.Errorf(api.Invalid, "the image's configuration has os %q and architecture %q: want both", c.OS, c.Architecture)
	}
	if len(i.Platforms) == 0 {
		i.Entrypoint, i.Command, i.Env, i.User = c.Config.Entrypoint, c.Config.Cmd, c.Config.Env, c.Config.User
	}
	i.Platforms = append(i.Platforms, platformName(c.OS, c.Architecture, c.Variant))
	return len(c.RootFS.DiffIDs), nil
}

func platformName(os, arch, variant string) string {
	// v8 is the only variant of arm64 in use, and half of the builders leave it out.
	if variant == "" || arch == "arm64" && variant == "v8" {
		return os + "/" + arch
	}
	return os + "/" + arch + "/" + variant
}

// ociLayout reads an archive whose index.json leads to manifests by digest.
func (a *archive) ociLayout() (Info, error) {
	var layout struct {
		Version string `json:"imageLayoutVersion"`
	}
	if err := a.decode("oci-layout", &layout); err != nil {
		return Info{}, err
	}
	if !strings.HasPrefix(layout.Version, "1.") {
		return Info{}, api.Errorf(api.Unsupported, "OCI layout version %q: want 1.x", layout.Version)
	}
	var index v1.IndexManifest
	if err := a.decode("index.json", &index); err != nil {
		return Info{}, err
	}
	w := layoutWalk{archive: a, info: Info{Format: OCILayout}}
	if err := w.index(index, 1); err != nil {
		return Info{}, err
	}
	if len(w.info.Platforms) == 0 {
		if w.incomplete != nil {
			return Info{}, w.incomplete
		}
		return Info{}, api.Errorf(api.Invalid, "index.json leads to no image")
	}
	slices.Sort(w.info.Platforms)
	w.info.Platforms = slices.Compact(w.info.Platforms)
	return w.info, nil
}

type layoutWalk struct {
	*archive
	info      Info
	manifests int
	// incomplete is why the first image that is not whole was left out: an
	// engine that pulled one platform of many saves the names of all.
	incomplete error
}

// incompleteError marks an image of which a part is not in the archive.
type incompleteError struct{ error }

func (e incompleteError) Unwrap() error { return e.error }

func (w *layoutWalk) index(index v1.IndexManifest, depth int) error {
	if depth > maxIndexDepth {
		return api.Errorf(api.Invalid, "indexes are nested more than %d deep", maxIndexDepth)
	}
	for _, d := range index.Manifests {
		if w.manifests++; w.manifests > maxManifests {
			return api.Errorf(api.TooLarge, "the archive names more than %d images", maxManifests)
		}
		if tag := d.Annotations["org.opencontainers.image.ref.name"]; tag != "" && depth == 1 {
			w.info.Tags = append(w.info.Tags, tag)
		}
		err := w.manifest(d, depth)
		if missing := (incompleteError{}); errors.As(err, &missing) {
			if w.incomplete == nil {
				w.incomplete = err
			}
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *layoutWalk) manifest(d v1.Descriptor, depth int) error {
	if attached(d) {
		return nil
	}
	b, err := w.blob(d)
	if err != nil {
		return err
	}
	if d.MediaType.IsIndex() {
		var nested v1.IndexManifest
		if err := json.Unmarshal(b, &nested); err != nil {
			return api.Errorf(api.Invalid, "index %s: %w", d.Digest, err)
		}
		return w.index(nested, depth+1)
	}
	if !d.MediaType.IsImage() {
		return nil
	}
	var m v1.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return api.Errorf(api.Invalid, "manifest %s: %w", d.Digest, err)
	}
	if !m.Config.MediaType.IsConfig() {
		return nil // an artifact that is not an image
	}
	if len(m.Layers) > maxLayers {
		return api.Errorf(api.TooLarge, "manifest %s has %d layers: want at most %d", d.Digest, len(m.Layers), maxLayers)
	}
	for _, layer := range m.Layers {
		p, err := w.find(blobPath(layer.Digest))
		if err != nil {
			return incompleteError{fmt.Errorf("layer of manifest %s: %w", d.Digest, err)}
		}
		if p.size != layer.Size {
			return api.Errorf(api.Invalid, "layer %s has %d bytes: manifest %s says %d", layer.Digest, p.size, d.Digest, layer.Size)
		}
	}
	config, err := w.blob(m.Config)
	if err != nil {
		return err
	}
	layers, err := w.info.configure(config)
	if err == nil && layers != len(m.Layers) {
		err = api.Errorf(api.Invalid, "manifest %s lists %d layers and its configuration %d", d.Digest, len(m.Layers), layers)
	}
	return err
}

// attached reports whether a manifest describes another one (a builder's
// attestation) and is nothing to run.
func attached(d v1.Descriptor) bool {
	return d.Annotations["vnd.docker.reference.type"] != "" ||
		d.Platform != nil && d.Platform.OS == "unknown"
}

func blobPath(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }

// blob reads a part by its digest and checks it.
func (w *layoutWalk) blob(d v1.Descriptor) ([]byte, error) {
	name := blobPath(d.Digest)
	if !w.has(name) {
		return nil, incompleteError{api.Errorf(api.Invalid, "%q is not in the archive", name)}
	}
	b, err := w.read(name)
	if err != nil {
		return nil, err
	}
	if d.Digest.Algorithm != "sha256" || api.DigestOf(b).Hex() != d.Digest.Hex {
		return nil, api.Errorf(api.Invalid, "%q does not have the digest in its name: the archive is damaged", name)
	}
	return b, nil
}

// IsWasm reports whether the file at path is a WebAssembly module. A component,
// the newer container format, is an error of kind Unsupported.
func IsWasm(path string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	wasm, err := isWasm(f)
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return wasm, err
}

func isWasm(f io.ReaderAt) (bool, error) {
	head := make([]byte, 8)
	n, err := f.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return false, err
	}
	if n < 4 || string(head[:4]) != "\x00asm" {
		return false, nil
	}
	// The version is 16 bits, then 16 bits of layer: 0 a module, 1 a component.
	if version := head[4:n]; string(version) != "\x01\x00\x00\x00" {
		return false, api.Errorf(api.Unsupported, "WebAssembly version bytes %x: want a core module, 01000000 (components are not supported)", version)
	}
	return true, nil
}
