// Package outputs is the archive of what one attempt produced.
//
// The archive is a sequence of zstd frames, one per item in order of index, and
// nothing else. Each frame is a tar of that item's files with sorted names and
// nothing but content, so that one item can be fetched, verified and compared
// without the others. The manifest says where each frame lies and what it must
// hold; it is what the worker signs.
//
// Write trusts nothing that a job's program left, and WalkItem, OpenItem and
// Extract trust nothing that a worker uploaded.
package outputs

import (
	"crypto/sha256"
	"encoding/binary"
	"path"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// Names in a job's output directory.
const (
	// ResultsFile holds the results of a job whose outputs are lines.
	ResultsFile = "results.jsonl"
	// LineFile is the one file of an item whose output is a line.
	LineFile = "line.json"
)

// MaxLineBytes bounds a line of an input and of ResultsFile.
const MaxLineBytes = 16 << 20

// MaxInline bounds a manifest, an archive and a log that travel with their
// worker's report, in place of being uploaded before it.
const MaxInline = 32 << 10

// maxPathBytes bounds the path of an output file within its item.
const maxPathBytes = 1024

// Limits bounds the outputs of an attempt when they are written, and of one item
// when they are read.
type Limits struct {
	Bytes int64 // of all files together, uncompressed
	Files int   // of one item, directories included
}

// Item is an item that an attempt has to produce.
type Item struct {
	Index    uint64
	Value    uint64
	CustomID string // of its input line; empty where it has none
}

// Summary describes a written archive.
type Summary struct {
	Digest       api.Digest // of the archive
	ArchiveBytes int64
	OutputBytes  int64 // uncompressed
	Files        int
}

// fileDigest is one file of an item, as the item's digest covers it.
type fileDigest struct {
	path string
	size int64
	sum  [sha256.Size]byte
}

// digestDomain separates the digest of an item from any other use of SHA-256.
const digestDomain = "muster item output v1\x00"

// itemDigest covers paths, sizes and contents of an item's files, which are in
// order of path: every part has a fixed length or its length in front, so that no
// two sets of files share an encoding.
func itemDigest(files []fileDigest) [sha256.Size]byte {
	var space [512]byte // enough for the usual few
	b := append(space[:0], digestDomain...)
	b = binary.BigEndian.AppendUint64(b, uint64(len(files)))
	for _, f := range files {
		b = binary.BigEndian.AppendUint64(b, uint64(len(f.path)))
		b = append(b, f.path...)
		b = binary.BigEndian.AppendUint64(b, uint64(f.size))
		b = append(b, f.sum[:]...)
	}
	return sha256.Sum256(b)
}

// checkPath is what is wrong with the path of an output file; empty for
// nothing. The rules hold on every system that results are downloaded to.
func checkPath(p string) string {
	switch {
	case len(p) > maxPathBytes:
		return "has a path that is too long"
	case !utf8.ValidString(p) || strings.ContainsFunc(p, unicode.IsControl) || strings.Contains(p, `\`):
		return "has a name with control characters, a backslash or broken UTF-8"
	case p == "" || p == "." || path.Clean(p) != p || !filepath.IsLocal(filepath.FromSlash(p)):
		return "is not a plain relative path"
	}
	for name := range strings.SplitSeq(p, "/") {
		if len(name) > 255 {
			return "has a name that is too long"
		}
	}
	return ""
}

// CheckManifest checks that a manifest covers exactly the items with the
// ascending indexes in want, and that its frames fill an archive of archiveBytes
// one after the other. It does not read the archive.
func CheckManifest(m *musterpb.Manifest, want []uint64, archiveBytes int64) error {
	if len(m.GetItems()) != len(want) {
		return api.Errorf(api.Invalid, "the manifest lists %d items in place of %d", len(m.GetItems()), len(want))
	}
	end := int64(0)
	for i, mi := range m.GetItems() {
		switch {
		case mi.GetIndex() != want[i]:
			return api.Errorf(api.Invalid, "the manifest lists index %d in place of %d", mi.GetIndex(), want[i])
		case len(mi.GetOutputDigest()) != sha256.Size:
			return api.Errorf(api.Invalid, "index %d: the output digest has %d bytes; want %d", mi.Index, len(mi.GetOutputDigest()), sha256.Size)
		case mi.Offset != end:
			return api.Errorf(api.Invalid, "index %d: the frame starts at %d; the one before it ends at %d", mi.Index, mi.Offset, end)
		case mi.Length <= 0 || mi.Length > archiveBytes-mi.Offset:
			return api.Errorf(api.Invalid, "index %d: a frame of %d bytes at %d does not fit the archive of %d", mi.Index, mi.Length, mi.Offset, archiveBytes)
		case mi.OutputBytes < 0 || mi.Files == 0:
			return api.Errorf(api.Invalid, "index %d: %d bytes in %d files", mi.Index, mi.OutputBytes, mi.Files)
		}
		end = mi.Offset + mi.Length
	}
	if end != archiveBytes {
		return api.Errorf(api.Invalid, "the frames end at %d; the archive has %d bytes", end, archiveBytes)
	}
	return nil
}
