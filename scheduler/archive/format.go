package archive

import (
	"encoding/binary"
	"hash/crc32"
	"math"
	"math/bits"
	"slices"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// magic opens and closes every segment; its last byte is the format's version.
const magic = "MUSTERS1"

// trailerBytes are the last of a segment: offset (8), length (4) and CRC-32C (4)
// of the footer, and the magic.
const trailerBytes = 8 + 4 + 4 + len(magic)

// Bounds of what a segment is made of. A reader takes nothing larger, whatever
// the bytes say.
const (
	// headFrame and bodyFrame are how long a frame grows, uncompressed, before the
	// next begins. Whoever looks one job up unpacks one frame of each kind.
	headFrame = 64 << 10
	bodyFrame = 256 << 10
	// maxRecord bounds one record, as in a snapshot; it has a frame to itself.
	maxRecord = 64 << 20
	maxRaw    = maxRecord + 16
	// maxFooter bounds the footer: it has a fixed number of small fields.
	maxFooter = 64 << 10
	// entriesPerFrame bounds the frames of entries.
	entriesPerFrame = 4096
	// filtersPerFrame bounds the frames of filters.
	filtersPerFrame = 64
)

// kind is what the records of a frame are. Each kind numbers its own frames.
type kind int

// The kinds up to batches hold what was sealed; merging copies their frames as
// they are. The others lead to it, and are made anew.
const (
	heads      kind = iota // SealedJob, as they were written
	attempts               // Attempt; a frame's first key is a position among its job's attempts
	checks                 // SealedCheck; the position of its target
	tasks                  // SealedTask; its number
	transfers              // SealedTransfer; its ID
	filters                // SealedFilter, one per frame of transfers; the number of that frame
	batches                // Batch; its epoch
	bySequence             // SealedEntries, one record per frame; the sequence of its first job
	byAccount              // SealedEntries, one record per frame; the account and sequence of its first job
	accounts               // SealedAccounts, one record
	kinds

	bodies = bySequence // kinds below it are copied
)

func (k kind) String() string {
	return [...]string{"jobs", "tasks", "attempts", "checks", "transfers", "transfer filters", "batches", "job list", "account list", "accounts"}[k]
}

// frameTarget is how long a frame of this kind grows.
func (k kind) frameTarget() int {
	if k == heads {
		return headFrame
	}
	return bodyFrame
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// One encoder serves all writers and one decoder all readers: both keep their
// tables between calls, and work on whole buffers.
var (
	encoder = sync.OnceValue(func() *zstd.Encoder {
		// One thread and the fastest level: sealing runs beside placement, and the
		// bytes depend on nothing but the content. Frames carry no checksum of their
		// own, since the list of frames has one of each.
		z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest),
			zstd.WithEncoderCRC(false), zstd.WithWindowSize(1<<20), zstd.WithLowerEncoderMem(true))
		if err != nil {
			panic("muster: zstd refuses its options: " + err.Error())
		}
		return z
	})
	decoder = sync.OnceValue(func() *zstd.Decoder {
		z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(2), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(maxRaw))
		if err != nil {
			panic("muster: zstd refuses its options: " + err.Error())
		}
		return z
	})
)

// hashOf is the hash under which names are found: FNV-1a, and the finalizer of
// MurmurHash3, since the table of jobs goes by the upper bits. It can't change
// without a new format.
func hashOf(name string) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(name) {
		h = (h ^ uint64(name[i])) * 1099511628211
	}
	h = (h ^ h>>33) * 0xff51afd7ed558ccd
	h = (h ^ h>>33) * 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// place is where the record of a job is: in a frame of heads, at an offset.
type place struct{ frame, offset uint32 }

// The table of job IDs is a row of pages. A job is in the page that the upper
// bits of its hash say, so that one read tells whether a segment has it.
// A page is entries of hash (8), frame (4) and offset (4), ascending by hash,
// then their number (2), and a CRC-32C (4) over all of it.
const (
	pageBytes   = 4096
	entryBytes  = 16
	pageEntries = (pageBytes - 6) / entryBytes
	// meanEntries fill a page on average: more than five standard deviations
	// below what fits.
	meanEntries = 180
)

func pageOf(hash, pages uint64) uint64 {
	page, _ := bits.Mul64(hash, pages)
	return page
}

// hashed is an entry of the table of job IDs.
type hashed struct {
	hash uint64
	place
}

// appendPages encodes the table. It takes ownership of list.
func appendPages(b []byte, list []hashed) (_ []byte, pages uint64, err error) {
	if len(list) == 0 {
		return b, 0, nil
	}
	slices.SortFunc(list, func(a, b hashed) int {
		switch {
		case a.hash != b.hash && a.hash < b.hash, a.hash == b.hash && a.frame < b.frame, a.hash == b.hash && a.frame == b.frame && a.offset < b.offset:
			return -1
		case a == b:
			return 0
		}
		return 1
	})
	pages = uint64(len(list)+meanEntries-1) / meanEntries
	for overfull(list, pages) {
		if pages += 1 + pages/8; pages > uint64(len(list)) {
			return nil, 0, api.Errorf(api.Internal, "the IDs of %d jobs can't be told apart", len(list))
		}
	}
	next := 0
	for page := range pages {
		start := len(b)
		count := 0
		for ; next < len(list) && pageOf(list[next].hash, pages) == page; next++ {
			b = binary.BigEndian.AppendUint64(b, list[next].hash)
			b = binary.BigEndian.AppendUint32(b, list[next].frame)
			b = binary.BigEndian.AppendUint32(b, list[next].offset)
			count++
		}
		b = append(b, make([]byte, pageBytes-6-(len(b)-start))...)
		b = binary.BigEndian.AppendUint16(b, uint16(count))
		b = binary.BigEndian.AppendUint32(b, checksum(b[start:]))
	}
	return b, pages, nil
}

// overfull reports whether a page would get more than it can hold.
func overfull(list []hashed, pages uint64) bool {
	count, last := 0, uint64(math.MaxUint64)
	for _, h := range list {
		page := pageOf(h.hash, pages)
		if page != last {
			count, last = 0, page
		}
		if count++; count > pageEntries {
			return true
		}
	}
	return false
}

// checkPage verifies a page.
func checkPage(page []byte) error {
	if sum := binary.BigEndian.Uint32(page[pageBytes-4:]); sum != checksum(page[:pageBytes-4]) {
		return errorf("a page of job IDs has the wrong checksum")
	}
	if n := int(binary.BigEndian.Uint16(page[pageBytes-6:])); n > pageEntries {
		return errorf("a page of job IDs counts %d entries, at most %d fit", n, pageEntries)
	}
	return nil
}

// entriesOf calls f with the entries of a page that was checked.
func entriesOf(page []byte, f func(hashed)) {
	for i := range int(binary.BigEndian.Uint16(page[pageBytes-6:])) {
		e := page[i*entryBytes:]
		f(hashed{binary.BigEndian.Uint64(e), place{binary.BigEndian.Uint32(e[8:]), binary.BigEndian.Uint32(e[12:])}})
	}
}

// frame is one line of a list of frames.
type frame struct {
	offset  uint64
	length  uint32
	raw     uint32
	crc     uint32
	records uint64
	first   uint64
	second  uint64    // byAccount only
	base    [3]uint32 // heads only: of tasks, attempts and checks
}

// appendFrame adds a line.
func appendFrame(t *musterpb.SealedFrames, k kind, f frame) {
	t.Offset, t.Length, t.RawLength, t.Crc = append(t.Offset, f.offset), append(t.Length, f.length), append(t.RawLength, f.raw), append(t.Crc, f.crc)
	t.Records, t.First = append(t.Records, f.records), append(t.First, f.first)
	switch k {
	case byAccount:
		t.Second = append(t.Second, f.second)
	case heads:
		t.Tasks, t.Attempts, t.Checks = append(t.Tasks, f.base[0]), append(t.Attempts, f.base[1]), append(t.Checks, f.base[2])
	}
}

// frameAt is a line of a list that was checked.
func frameAt(t *musterpb.SealedFrames, k kind, i int) frame {
	f := frame{offset: t.Offset[i], length: t.Length[i], raw: t.RawLength[i], crc: t.Crc[i], records: t.Records[i], first: t.First[i]}
	switch k {
	case byAccount:
		f.second = t.Second[i]
	case heads:
		f.base = [3]uint32{t.Tasks[i], t.Attempts[i], t.Checks[i]}
	}
	return f
}

// checkFrames makes sure that a list can be used: its columns are equally long
// and its frames lie inside a segment of so many bytes.
func checkFrames(t *musterpb.SealedFrames, k kind, size int64) error {
	n := len(t.Offset)
	columns := []int{len(t.Length), len(t.RawLength), len(t.Crc), len(t.Records), len(t.First)}
	switch k {
	case byAccount:
		columns = append(columns, len(t.Second))
	case heads:
		columns = append(columns, len(t.Attempts), len(t.Checks), len(t.Tasks))
	}
	for _, c := range columns {
		if c != n {
			return errorf("the list of %s frames has columns of %d and %d values", k, n, c)
		}
	}
	for i := range n {
		f := frameAt(t, k, i)
		if f.raw > maxRaw || f.offset < uint64(len(magic)) || f.offset > uint64(size) || uint64(f.length) > uint64(size)-f.offset {
			return errorf("%s frame %d of %d bytes, %d unpacked, at %d does not lie within the %d bytes", k, i, f.length, f.raw, f.offset, size)
		}
		if uint64(f.raw) < f.records {
			return errorf("%s frame %d has %d records in %d bytes", k, i, f.records, f.raw)
		}
	}
	return nil
}

// unpack verifies and decompresses a frame, or a list of frames.
func unpack(packed []byte, crc, raw uint32) ([]byte, error) {
	if checksum(packed) != crc {
		return nil, errorf("the checksum of %d bytes is wrong", len(packed))
	}
	if raw > maxRaw {
		return nil, errorf("%d bytes unpacked, at most %d are allowed", raw, maxRaw)
	}
	// The buffer grows with what really comes out.
	out, err := decoder().DecodeAll(packed, make([]byte, 0, min(raw, 4<<20)))
	if err != nil {
		return nil, errorf("%w", err)
	}
	if uint64(len(out)) != uint64(raw) {
		return nil, errorf("%d bytes came out where %d were said to be", len(out), raw)
	}
	return out, nil
}

// nextRecord splits the first record off the bytes of a frame.
func nextRecord(b []byte) (record, rest []byte, err error) {
	size, n := binary.Uvarint(b)
	if n <= 0 || size > uint64(len(b)-n) {
		return nil, nil, errorf("a record ends beyond its frame")
	}
	return b[n : n+int(size)], b[n+int(size):], nil
}

// errorf is damage; the reader adds which segment it is.
func errorf(format string, args ...any) error { return api.Errorf(api.Internal, format, args...) }
