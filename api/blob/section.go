package blob

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// OpenSection returns length bytes of a blob from offset on: one of many small
// results that were stored as one blob. The bytes of a remote blob's section are
// not verified on the way; whoever reads them knows a digest of their own.
func OpenSection(ctx context.Context, store Store, digest api.Digest, offset, length int64) (Reader, error) {
	r, err := store.Open(ctx, digest)
	if err != nil {
		return nil, err
	}
	if offset < 0 || length < 0 || length > r.Size()-offset {
		r.Close()
		return nil, api.Errorf(api.Invalid, "blob %s has %d bytes: %d of them at %d are not there", digest, r.Size(), length, offset)
	}
	return &section{io.NewSectionReader(r, offset, length), r}, nil
}

// section is a Reader of a part of a blob.
type section struct {
	*io.SectionReader
	blob io.Closer
}

var _ Reader = (*section)(nil)

func (s *section) Close() error { return s.blob.Close() }

// ReadSection reads a section of a blob that is small and whose own digest is
// known.
func ReadSection(ctx context.Context, store Store, bundle api.Digest, offset, length int64, want api.Digest) ([]byte, error) {
	r, err := OpenSection(ctx, store, bundle, offset, length)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data := make([]byte, length)
	if _, err := io.ReadFull(r, data); err != nil {
		return nil, fmt.Errorf("blob %s: %w", bundle, err)
	}
	if got := api.DigestOf(data); got != want {
		return nil, api.Errorf(api.Internal, "blob %s: the %d bytes at %d have the digest %s, not %s", bundle, length, offset, got, want)
	}
	return data, nil
}

// Bytes is a Reader of bytes at hand.
func Bytes(data []byte) Reader { return memoryReader{bytes.NewReader(data)} }

// OpenManifest, OpenArchive and OpenLog open a part of a result, whether it is a
// blob of its own or lies in a bundle. A part of a bundle that is read whole
// here, the manifest and the log, is verified; the items of an archive have
// digests in the manifest.

// OpenManifest opens the manifest of a result.
func OpenManifest(ctx context.Context, store Store, digest string, s *musterpb.Stored) (Reader, error) {
	if s == nil {
		return store.Open(ctx, api.Digest(digest))
	}
	return openPart(ctx, store, digest, s.Bundle, s.ManifestOffset, s.ManifestBytes)
}

// OpenLog opens the compressed log of a result.
func OpenLog(ctx context.Context, store Store, digest string, s *musterpb.Stored) (Reader, error) {
	if s.GetLogBytes() == 0 {
		return store.Open(ctx, api.Digest(digest))
	}
	return openPart(ctx, store, digest, s.Bundle, s.LogOffset, s.LogBytes)
}

// OpenArchive opens the outputs of a result.
func OpenArchive(ctx context.Context, store Store, digest string, size int64, s *musterpb.Stored) (Reader, error) {
	if s == nil {
		return store.Open(ctx, api.Digest(digest))
	}
	return OpenSection(ctx, store, api.Digest(s.Bundle), s.ArchiveOffset, size)
}

// maxPart bounds a part of a bundle that is read whole.
const maxPart = 1 << 20

func openPart(ctx context.Context, store Store, digest, bundle string, offset, length int64) (Reader, error) {
	if length > maxPart {
		return nil, api.Errorf(api.TooLarge, "blob %s: a part of %d bytes, at most %d are in a bundle", bundle, length, maxPart)
	}
	data, err := ReadSection(ctx, store, api.Digest(bundle), offset, length, api.Digest(digest))
	if err != nil {
		return nil, err
	}
	return Bytes(data), nil
}
