package outputs

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// Packed is an item with its files in memory.
type Packed struct {
	Index uint64
	Files []File
}

// Packer makes archives of outputs that are in memory, in the format of Write,
// one after the other with the same compressor and buffers. It is not safe for
// concurrent use.
type Packer struct {
	zstd *zstd.Encoder
	tar  bytes.Buffer
}

// NewPacker makes a packer.
func NewPacker() (*Packer, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(maxWindow), zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return nil, api.Errorf(api.Internal, "zstd: %w", err)
	}
	return &Packer{zstd: enc}, nil
}

// Pack appends the archive of items, in order of index, to dst. It returns the
// longer slice, the manifest's items and what the archive is; the summary is of
// what was appended.
func (p *Packer) Pack(dst []byte, items []Packed) ([]byte, []*musterpb.ManifestItem, Summary, error) {
	begin, sum := len(dst), Summary{}
	manifest := make([]*musterpb.ManifestItem, 0, len(items))
	for _, item := range items {
		if err := p.fill(item); err != nil {
			return nil, nil, Summary{}, err
		}
		start := len(dst)
		dst = p.zstd.EncodeAll(p.tar.Bytes(), dst)
		entry := &musterpb.ManifestItem{
			Index: item.Index, Offset: int64(start - begin), Length: int64(len(dst) - start), Files: uint32(len(item.Files)),
		}
		files := make([]fileDigest, len(item.Files))
		for i, f := range item.Files {
			files[i] = fileDigest{f.Path, int64(len(f.Data)), sha256.Sum256(f.Data)}
			entry.OutputBytes += int64(len(f.Data))
		}
		entry.OutputDigest = itemDigest(files)
		manifest = append(manifest, entry)
		sum.OutputBytes += entry.OutputBytes
		sum.Files += len(files)
	}
	sum.ArchiveBytes = int64(len(dst) - begin)
	sum.Digest = api.DigestOf(dst[begin:])
	return dst, manifest, sum, nil
}

// fill writes the tar of an item.
func (p *Packer) fill(item Packed) error {
	if len(item.Files) == 0 {
		return api.Errorf(api.Invalid, "index %d holds no files", item.Index)
	}
	slices.SortFunc(item.Files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	p.tar.Reset()
	t := tar.NewWriter(&p.tar)
	for _, f := range item.Files {
		if problem := checkPath(f.Path); problem != "" {
			return api.Errorf(api.Invalid, "index %d: %s %s", item.Index, shorten(f.Path), problem)
		}
		header := &tar.Header{Typeflag: tar.TypeReg, Name: f.Path, Size: int64(len(f.Data)), Mode: 0o644, ModTime: time.Unix(0, 0)}
		if err := t.WriteHeader(header); err != nil {
			return api.Errorf(api.Internal, "index %d: %s: %w", item.Index, shorten(f.Path), err)
		}
		if _, err := t.Write(f.Data); err != nil {
			return api.Errorf(api.Internal, "index %d: %s: %w", item.Index, shorten(f.Path), err)
		}
	}
	if err := t.Close(); err != nil {
		return api.Errorf(api.Internal, "index %d: %w", item.Index, err)
	}
	return nil
}
