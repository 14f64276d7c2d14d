package archive

import (
	"bufio"
	"cmp"
	"context"
	"io"
	"slices"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/musterpb"
)

// How segments are merged: fanIn neighbours of a level make one of the next,
// as long as that gets no larger than maxMerged. Every record is then copied a
// few times at most, and a lookup asks a few segments per level, and those that
// are full.
const (
	fanIn         = 8
	maxMerged     = 256 << 20
	maxMergedJobs = 1 << 20
)

// Mergeable picks neighbours of the same level that should become one segment,
// the lowest level first; nil means that there is nothing to merge.
func Mergeable(segments []*musterpb.Segment) []*musterpb.Segment {
	var best []*musterpb.Segment
	for start := 0; start < len(segments); {
		end := start + 1
		for end < len(segments) && segments[end].Level == segments[start].Level {
			end++
		}
		if run := fitting(segments[start:end]); run != nil && (best == nil || run[0].Level < best[0].Level) {
			best = run
		}
		start = end
	}
	return best
}

// fitting picks from neighbours of one level the first that fit into one
// segment together. Those that are full stay as they are.
func fitting(run []*musterpb.Segment) []*musterpb.Segment {
	for len(run) >= fanIn {
		var bytes int64
		var jobs uint64
		n := 0
		for n < fanIn && bytes+run[n].Bytes <= maxMerged && jobs+run[n].Jobs <= maxMergedJobs {
			bytes, jobs = bytes+run[n].Bytes, jobs+run[n].Jobs
			n++
		}
		if n >= 2 {
			return run[:n]
		}
		run = run[1:]
	}
	return nil
}

// Merge writes one segment with the content of several, which have to be
// neighbours. What was sealed is verified and copied as it is, without being
// unpacked; only what leads to it is made anew.
func Merge(ctx context.Context, store blob.Store, segments []*musterpb.Segment, w io.Writer) (*musterpb.Segment, error) {
	if len(segments) < 2 {
		return nil, api.Errorf(api.Internal, "%d segments can't be merged: two or more are needed", len(segments))
	}
	m := &merger{out: NewWriter(w)}
	level := uint32(0)
	for _, seg := range segments {
		level = max(level, seg.Level)
		s := &segment{ctx: ctx, store: store, cache: newCache(16 << 20), digest: seg.Digest, size: seg.Bytes}
		err := s.fail(m.add(s))
		s.close()
		if err != nil {
			return nil, err
		}
	}
	slices.SortFunc(m.jobs, func(a, b entry) int { return cmp.Compare(a.sequence, b.sequence) })
	out, err := m.out.finish(m.jobs, m.hashes)
	if err != nil {
		return nil, err
	}
	out.Level = level + 1
	return out, nil
}

type merger struct {
	out    *Writer
	jobs   []entry // without the hash of the ID
	hashes []hashed
}

// add copies one segment behind those before it.
func (m *merger) add(s *segment) error {
	f, err := s.footer()
	if err != nil {
		return err
	}
	if err := m.follow(f); err != nil {
		return err
	}
	var base [bodies]uint64 // frames of each kind that are there already
	for k := range bodies {
		base[k] = uint64(len(m.out.tables[k].Offset))
	}
	if err := m.entries(s, uint32(base[heads])); err != nil {
		return err
	}
	if err := m.table(s, f, uint32(base[heads])); err != nil {
		return err
	}
	if err := m.accounts(s); err != nil {
		return err
	}
	return m.copy(s, f, base)
}

// follow takes over what a footer says, and makes sure that the segment comes
// after the ones before.
func (m *merger) follow(f *musterpb.SealedFooter) error {
	out := &m.out.footer
	if f.FirstTransfer > 0 {
		if f.FirstTransfer <= out.LastTransfer {
			return errorf("its transfer %d comes after transfer %d of its neighbour", f.FirstTransfer, out.LastTransfer)
		}
		out.FirstTransfer, out.LastTransfer = cmp.Or(out.FirstTransfer, f.FirstTransfer), f.LastTransfer
	}
	if f.FirstEpoch > 0 {
		if f.FirstEpoch <= out.LastEpoch {
			return errorf("its batch %d comes after batch %d of its neighbour", f.FirstEpoch, out.LastEpoch)
		}
		out.FirstEpoch, out.LastEpoch = cmp.Or(out.FirstEpoch, f.FirstEpoch), f.LastEpoch
	}
	if f.Jobs > 0 {
		if out.FirstEndedUnixMs == 0 || f.FirstEndedUnixMs < out.FirstEndedUnixMs {
			out.FirstEndedUnixMs = f.FirstEndedUnixMs
		}
		out.LastEndedUnixMs = max(out.LastEndedUnixMs, f.LastEndedUnixMs)
	}
	return nil
}

// entries takes over the list of jobs.
func (m *merger) entries(s *segment, base uint32) error {
	list, err := s.frames(bySequence)
	if err != nil {
		return err
	}
	for i := range list.Offset {
		raw, err := s.frame(bySequence, i)
		if err != nil {
			return err
		}
		e := &musterpb.SealedEntries{}
		if err := e.UnmarshalVT(raw); err != nil {
			return errorf("%s frame %d: %w", bySequence, i, err)
		}
		n := len(e.Sequence)
		if len(e.Account) != n || len(e.Frame) != n || len(e.Offset) != n {
			return errorf("%s frame %d has columns of different lengths", bySequence, i)
		}
		for j := range n {
			m.jobs = append(m.jobs, entry{account: e.Account[j], sequence: e.Sequence[j], place: place{base + e.Frame[j], e.Offset[j]}})
		}
	}
	return nil
}

// table takes over the table of job IDs.
func (m *merger) table(s *segment, f *musterpb.SealedFooter, base uint32) error {
	before := len(m.hashes)
	for number := range f.Pages {
		page, err := s.page(number)
		if err != nil {
			return err
		}
		entriesOf(page, func(h hashed) {
			h.frame += base
			m.hashes = append(m.hashes, h)
		})
	}
	if n := len(m.hashes) - before; uint64(n) != f.Jobs || len(m.hashes) != len(m.jobs) {
		return errorf("%d jobs can be found by ID and %d are in its list, of %d", n, len(m.jobs)-before, f.Jobs)
	}
	return nil
}

// accounts takes over whose transfers there are.
func (m *merger) accounts(s *segment) error {
	list, err := s.frames(accounts)
	if err != nil || len(list.Offset) == 0 {
		return err
	}
	raw, err := s.frame(accounts, 0)
	if err != nil {
		return err
	}
	a := &musterpb.SealedAccounts{}
	if err := a.UnmarshalVT(raw); err != nil {
		return errorf("the list of its accounts: %w", err)
	}
	for _, h := range a.Hash {
		m.out.merged[h] = struct{}{}
	}
	return nil
}

// copy copies the frames of what was sealed, and lists them.
func (m *merger) copy(s *segment, f *musterpb.SealedFooter, base [bodies]uint64) error {
	type numbered struct {
		kind
		frame
	}
	var all []numbered
	shift := uint64(m.out.out.size) - uint64(len(magic))
	for k := range bodies {
		list, err := s.frames(k)
		if err != nil {
			return err
		}
		for i := range list.Offset {
			x := frameAt(list, k, i)
			all = append(all, numbered{k, x})
			x.offset += shift
			switch k {
			case heads:
				x.base[0], x.base[1], x.base[2] = x.base[0]+uint32(base[tasks]), x.base[1]+uint32(base[attempts]), x.base[2]+uint32(base[checks])
			case filters:
				x.first += base[transfers]
			}
			appendFrame(m.out.tables[k], k, x)
		}
	}
	slices.SortFunc(all, func(a, b numbered) int { return cmp.Compare(a.offset, b.offset) })
	in := bufio.NewReaderSize(&reader{s: s, at: uint64(len(magic)), end: f.BodyBytes}, 256<<10)
	at := uint64(len(magic))
	var buf []byte
	for _, x := range all {
		if x.offset != at {
			return errorf("%s frame at %d, where %d is next", x.kind, x.offset, at)
		}
		buf = slices.Grow(buf[:0], int(x.length))[:x.length]
		if _, err := io.ReadFull(in, buf); err != nil {
			return err
		}
		if checksum(buf) != x.crc {
			return errorf("%s frame at %d has the wrong checksum", x.kind, at)
		}
		if _, err := m.out.out.Write(buf); err != nil {
			return err
		}
		at += uint64(x.length)
		if err := s.ctx.Err(); err != nil {
			return err
		}
	}
	if at != f.BodyBytes {
		return errorf("its frames end at %d, its content at %d", at, f.BodyBytes)
	}
	return nil
}

// reader reads a part of a segment from start to end.
type reader struct {
	s       *segment
	at, end uint64
}

func (r *reader) Read(p []byte) (int, error) {
	if r.at >= r.end {
		return 0, io.ErrUnexpectedEOF
	}
	n := min(len(p), int(r.end-r.at))
	b, err := r.s.bytes(r.at, n)
	if err != nil {
		return 0, err
	}
	copy(p, b)
	r.at += uint64(n)
	return n, nil
}
