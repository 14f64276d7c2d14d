package docker

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/musternet/muster/api"
)

// Bounds on what an archive from outside may make this process hold.
const (
	maxArchiveEntries = 100_000
	maxMetadataBytes  = 8 << 20
	maxIndexDepth     = 4
)

// archive is the table of contents of a docker-save or OCI-layout tar. The
// contents stay in the file.
type archive struct {
	file    io.ReaderAt
	files   map[string]span
	links   map[string]string
	maximum int64 // size of the file
}

type span struct{ offset, size int64 }

// savedImage is one image of an archive: the names of its entries.
type savedImage struct {
	config   string
	layers   []string
	platform string // "linux/amd64"
}

// readArchive reads the table of contents of an archive of the given size.
// Its errors, and those of the methods, are of kind api.Unsupported.
func readArchive(file io.ReaderAt, size int64) (*archive, error) {
	var magic [6]byte
	if n, err := file.ReadAt(magic[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read image archive: %w", err)
	} else if n >= 2 && magic[0] == 0x1f && magic[1] == 0x8b || n >= 4 && string(magic[:4]) == "\x28\xb5\x2f\xfd" {
		return nil, unusable("it is compressed; decompress it, an image archive is a plain tar")
	}
	a := &archive{file: file, files: make(map[string]span), links: make(map[string]string), maximum: size}
	section := io.NewSectionReader(file, 0, size)
	reader := tar.NewReader(section)
	for {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, unusable("it is not a tar: %w", err)
		}
		if err := a.note(header, section); err != nil {
			return nil, err
		}
	}
	if len(a.files) == 0 {
		return nil, unusable("it holds no files")
	}
	return a, nil
}

func (a *archive) note(header *tar.Header, section io.Seeker) error {
	if len(a.files)+len(a.links) >= maxArchiveEntries {
		return unusable("it holds more than %d entries", maxArchiveEntries)
	}
	name := path.Clean(header.Name)
	switch header.Typeflag {
	case tar.TypeReg:
		offset, err := section.Seek(0, io.SeekCurrent)
		if err != nil {
			return fmt.Errorf("read image archive: %w", err)
		}
		if header.Size > a.maximum-offset {
			return unusable("%s is cut off: it should hold %d bytes", name, header.Size)
		}
		a.files[name] = span{offset, header.Size}
	case tar.TypeSymlink:
		// Older engines save a layer that occurs twice as a link to the first.
		a.links[name] = path.Join(path.Dir(name), header.Linkname)
	case tar.TypeLink:
		a.links[name] = path.Clean(header.Linkname)
	}
	return nil
}

func (a *archive) find(name string) (span, bool) {
	name = path.Clean(name)
	for range 4 {
		if s, ok := a.files[name]; ok {
			return s, true
		}
		name = a.links[name]
	}
	return span{}, false
}

// metadata decodes a small JSON file of the archive into v.
func (a *archive) metadata(name string, v any) error {
	raw, err := a.bytes(name)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return unusable("%s: %w", name, err)
	}
	return nil
}

func (a *archive) bytes(name string) ([]byte, error) {
	s, ok := a.find(name)
	if !ok {
		return nil, unusable("it lacks %q", name)
	}
	if s.size > maxMetadataBytes {
		return nil, unusable("%s has %d bytes; at most %d are read", name, s.size, maxMetadataBytes)
	}
	raw := make([]byte, s.size)
	if _, err := io.ReadFull(io.NewSectionReader(a.file, s.offset, s.size), raw); err != nil {
		return nil, fmt.Errorf("read image archive: %s: %w", name, err)
	}
	return raw, nil
}

// image picks the one image that runs on platform.
func (a *archive) image(platform string) (savedImage, error) {
	all, err := a.images()
	if err != nil {
		return savedImage{}, err
	}
	var fits []savedImage
	var platforms []string
	for _, image := range all {
		var config struct{ OS, Architecture string }
		if err := a.metadata(image.config, &config); err != nil {
			return savedImage{}, err
		}
		image.platform = config.OS + "/" + config.Architecture
		platforms = append(platforms, image.platform)
		if image.platform == platform {
			fits = append(fits, image)
		}
	}
	switch len(fits) {
	case 1:
		return fits[0], a.checkLayers(fits[0])
	case 0:
		return savedImage{}, unusable("it is for %s; this engine runs %s", strings.Join(platforms, ", "), platform)
	}
	return savedImage{}, unusable("it holds %d images for %s; save exactly one", len(fits), platform)
}

func (a *archive) checkLayers(image savedImage) error {
	for _, layer := range image.layers {
		if _, ok := a.find(layer); !ok {
			return unusable("it lacks layer %q", layer)
		}
	}
	return nil
}

// images lists every image of the archive, without platforms.
func (a *archive) images() ([]savedImage, error) {
	if _, ok := a.find("manifest.json"); ok {
		return a.dockerImages()
	}
	if _, ok := a.find("index.json"); ok {
		seen := make(map[string]bool)
		return a.ociImages("index.json", seen, 1)
	}
	return nil, unusable("it has neither manifest.json (docker save) nor index.json (OCI layout)")
}

type dockerManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func (a *archive) dockerImages() ([]savedImage, error) {
	var manifests []dockerManifest
	if err := a.metadata("manifest.json", &manifests); err != nil {
		return nil, err
	}
	var images []savedImage
	for _, m := range manifests {
		images = append(images, savedImage{config: m.Config, layers: m.Layers})
	}
	return images, nil
}

// ociDocument is an OCI index (manifests) or manifest (config and layers).
type ociDocument struct {
	Manifests []ociDescriptor `json:"manifests"`
	Config    ociDescriptor   `json:"config"`
	Layers    []ociDescriptor `json:"layers"`
}

type ociDescriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Platform  *struct {
		OS string `json:"os"`
	} `json:"platform"`
}

// isImageConfig tells images from the attestations and other artifacts that
// builders put beside them.
func (d ociDescriptor) isImageConfig() bool {
	return d.MediaType == "application/vnd.oci.image.config.v1+json" ||
		d.MediaType == "application/vnd.docker.container.image.v1+json"
}

func (a *archive) ociImages(name string, seen map[string]bool, depth int) ([]savedImage, error) {
	if seen[name] {
		return nil, nil
	}
	seen[name] = true
	if depth > maxIndexDepth {
		return nil, unusable("its indexes are nested more than %d deep", maxIndexDepth)
	}
	var doc ociDocument
	if err := a.metadata(name, &doc); err != nil {
		return nil, err
	}
	if doc.Config.Digest != "" {
		return a.ociImage(doc)
	}
	var images []savedImage
	for _, m := range doc.Manifests {
		if m.Platform != nil && m.Platform.OS == "unknown" {
			continue
		}
		blob, err := blobPath(m.Digest)
		if err != nil {
			return nil, err
		}
		if _, ok := a.find(blob); !ok {
			continue // an index may name platforms that were not exported
		}
		below, err := a.ociImages(blob, seen, depth+1)
		if err != nil {
			return nil, err
		}
		images = append(images, below...)
	}
	return images, nil
}

func (a *archive) ociImage(doc ociDocument) ([]savedImage, error) {
	if !doc.Config.isImageConfig() {
		return nil, nil
	}
	var image savedImage
	var err error
	if image.config, err = blobPath(doc.Config.Digest); err != nil {
		return nil, err
	}
	for _, layer := range doc.Layers {
		blob, err := blobPath(layer.Digest)
		if err != nil {
			return nil, err
		}
		image.layers = append(image.layers, blob)
	}
	return []savedImage{image}, nil
}

func blobPath(digest string) (string, error) {
	algorithm, hexDigest, _ := strings.Cut(digest, ":")
	if raw, err := hex.DecodeString(hexDigest); algorithm != "sha256" || err != nil || len(raw) != sha256.Size {
		return "", unusable("%q is not a sha256 digest", digest)
	}
	return "blobs/sha256/" + hexDigest, nil
}

// writeTo writes the image as a docker-save tar that carries one tag only. The
// archive's own tags and entry names never reach the engine: loading them could
// take a name such as "ubuntu:latest" away from the owner of the machine.
func (a *archive) writeTo(w io.Writer, image savedImage, tag string) error {
	config, err := a.bytes(image.config)
	if err != nil {
		return err
	}
	sources := slices.Clone(image.layers)
	slices.Sort(sources)
	sources = slices.Compact(sources)
	names := make(map[string]string, len(sources))
	for i, source := range sources {
		names[source] = fmt.Sprintf("layer-%d.tar", i)
	}
	manifest := dockerManifest{Config: "config.json", RepoTags: []string{tag}, Layers: []string{}}
	for _, layer := range image.layers {
		manifest.Layers = append(manifest.Layers, names[layer])
	}
	manifestJSON, err := json.Marshal([]dockerManifest{manifest})
	if err != nil {
		return err
	}

	out := tar.NewWriter(w)
	if err := writeEntry(out, "manifest.json", strings.NewReader(string(manifestJSON)), int64(len(manifestJSON))); err != nil {
		return err
	}
	if err := writeEntry(out, "config.json", strings.NewReader(string(config)), int64(len(config))); err != nil {
		return err
	}
	for _, source := range sources {
		s, ok := a.find(source)
		if !ok {
			return unusable("it lacks layer %q", source)
		}
		if err := writeEntry(out, names[source], io.NewSectionReader(a.file, s.offset, s.size), s.size); err != nil {
			return err
		}
	}
	return out.Close()
}

func writeEntry(out *tar.Writer, name string, content io.Reader, size int64) error {
	if err := out.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size, Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	_, err := io.CopyN(out, content, size)
	return err
}

// unusable is an error about the archive itself, whoever made it.
func unusable(format string, args ...any) error {
	return api.Errorf(api.Unsupported, "image archive: "+format, args...)
}
