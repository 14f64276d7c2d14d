package archive

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"sort"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/musterpb"
)

// segment reads one segment for one call. It opens the blob only when the cache
// does not have what is asked for. It is not safe for concurrent use.
type segment struct {
	ctx    context.Context
	store  blob.Store
	cache  *cache
	digest string
	size   int64
	blob   blob.Reader // nil until something had to be read
}

func (s *segment) close() {
	if s.blob != nil {
		s.blob.Close()
	}
}

// Unreadable is a segment that can't be read. Its message names the segment, and
// a segment holds the work of every account: the message is for operators and
// logs, never for customers.
type Unreadable struct {
	Digest api.Digest
	err    error // with a kind
}

func (u *Unreadable) Error() string { return u.err.Error() }
func (u *Unreadable) Unwrap() error { return u.err }

// fail says which segment an error is about. What passes by itself keeps its
// kind; anything else is damage, and a segment that is gone is damage, too.
func (s *segment) fail(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errMissing), s.ctx.Err() != nil, api.KindOf(err) == api.Unavailable:
		err = api.Errorf(api.Unavailable, "sealed segment %s: %w", s.digest, err)
	default:
		err = api.Errorf(api.Internal, "sealed segment %s is damaged: %w; restore this blob from another scheduler or from a backup", s.digest, err)
	}
	return &Unreadable{Digest: api.Digest(s.digest), err: err}
}

// errMissing is a segment that the store does not have. It may have been merged
// since the reader learned of it.
var errMissing = errors.New("the blob store does not have it")

// bytes reads a part of the blob.
func (s *segment) bytes(offset uint64, length int) ([]byte, error) {
	if s.blob == nil {
		r, err := s.store.Open(s.ctx, api.Digest(s.digest))
		if api.KindOf(err) == api.NotFound && err != nil {
			return nil, errMissing
		} else if err != nil {
			return nil, err
		}
		if r.Size() != s.size {
			r.Close()
			return nil, errorf("it has %d bytes in place of %d", r.Size(), s.size)
		}
		s.blob = r
	}
	if offset > uint64(s.size) || uint64(length) > uint64(s.size)-offset {
		return nil, errorf("%d bytes at %d lie beyond its %d bytes", length, offset, s.size)
	}
	b := make([]byte, length)
	if n, err := s.blob.ReadAt(b, int64(offset)); n < length {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return b, nil
}

// load returns a part from the cache, or makes it and keeps it.
func load[T any](s *segment, key cacheKey, read func() (T, int64, error)) (T, error) {
	key.digest = s.digest
	if v, ok := s.cache.get(key); ok {
		return v.(T), nil
	}
	v, size, err := read()
	if err == nil {
		s.cache.put(key, v, size)
	}
	return v, err
}

// footer is where everything is.
func (s *segment) footer() (*musterpb.SealedFooter, error) {
	return load(s, cacheKey{part: partFooter}, func() (*musterpb.SealedFooter, int64, error) {
		if s.size < int64(len(magic)+trailerBytes) {
			return nil, 0, errorf("%d bytes are no segment", s.size)
		}
		// One read gets the trailer and, as a rule, the footer with it.
		tail, err := s.bytes(uint64(max(0, s.size-1024)), int(min(s.size, 1024)))
		if err != nil {
			return nil, 0, err
		}
		trailer := tail[len(tail)-trailerBytes:]
		if got := string(trailer[16:]); got != magic {
			return nil, 0, errorf("it ends with %q, not with %q: a newer muster may have written it", got, magic)
		}
		offset, length, sum := binary.BigEndian.Uint64(trailer), binary.BigEndian.Uint32(trailer[8:]), binary.BigEndian.Uint32(trailer[12:])
		if length > maxFooter || offset+uint64(length)+uint64(trailerBytes) != uint64(s.size) {
			return nil, 0, errorf("its footer of %d bytes at %d does not end where its trailer begins", length, offset)
		}
		var text []byte
		if int(length)+trailerBytes <= len(tail) {
			text = tail[len(tail)-trailerBytes-int(length) : len(tail)-trailerBytes]
		} else if text, err = s.bytes(offset, int(length)); err != nil {
			return nil, 0, err
		}
		if checksum(text) != sum {
			return nil, 0, errorf("its footer has the wrong checksum")
		}
		f := &musterpb.SealedFooter{}
		if err := f.UnmarshalVT(text); err != nil {
			return nil, 0, errorf("its footer: %w", err)
		}
		if f.BodyBytes > uint64(s.size) || f.PagesOffset > uint64(s.size) || f.Pages > (uint64(s.size)-f.PagesOffset)/pageBytes {
			return nil, 0, errorf("%d pages at %d, or %d bytes of content, lie beyond its %d bytes", f.Pages, f.PagesOffset, f.BodyBytes, s.size)
		}
		return f, int64(length) * 4, nil
	})
}

// frames lists the frames of a kind; there may be none.
func (s *segment) frames(k kind) (*musterpb.SealedFrames, error) {
	return load(s, cacheKey{part: partList, kind: k}, func() (*musterpb.SealedFrames, int64, error) {
		t := &musterpb.SealedFrames{}
		f, err := s.footer()
		if err != nil {
			return nil, 0, err
		}
		at := slices.IndexFunc(f.Sections, func(x *musterpb.SealedSection) bool { return x.Kind == uint32(k) })
		if at < 0 {
			return t, 0, nil
		}
		section := f.Sections[at]
		packed, err := s.bytes(section.Offset, int(section.Length))
		if err != nil {
			return nil, 0, err
		}
		raw, err := unpack(packed, section.Crc, section.RawLength)
		if err != nil {
			return nil, 0, errorf("the list of its %s frames: %w", k, err)
		}
		if err := t.UnmarshalVT(raw); err != nil {
			return nil, 0, errorf("the list of its %s frames: %w", k, err)
		}
		if err := checkFrames(t, k, s.size); err != nil {
			return nil, 0, err
		}
		return t, int64(len(t.Offset)) * 56, nil
	})
}

// frame is the content of one frame.
func (s *segment) frame(k kind, number int) ([]byte, error) {
	return load(s, cacheKey{part: partFrame, kind: k, number: uint64(number)}, func() ([]byte, int64, error) {
		t, err := s.frames(k)
		if err != nil {
			return nil, 0, err
		}
		if number < 0 || number >= len(t.Offset) {
			return nil, 0, errorf("there is no %s frame %d of %d", k, number, len(t.Offset))
		}
		packed, err := s.bytes(t.Offset[number], int(t.Length[number]))
		if err != nil {
			return nil, 0, err
		}
		raw, err := unpack(packed, t.Crc[number], t.RawLength[number])
		if err != nil {
			return nil, 0, errorf("%s frame %d: %w", k, number, err)
		}
		return raw, int64(len(raw)), nil
	})
}

// page is a page of the table of job IDs.
func (s *segment) page(number uint64) ([]byte, error) {
	return load(s, cacheKey{part: partPage, number: number}, func() ([]byte, int64, error) {
		f, err := s.footer()
		if err != nil {
			return nil, 0, err
		}
		page, err := s.bytes(f.PagesOffset+number*pageBytes, pageBytes)
		if err != nil {
			return nil, 0, err
		}
		return page, pageBytes, checkPage(page)
	})
}

// found is a job, and what its frames are counted from.
type found struct {
	*musterpb.SealedJob
	base [3]uint32
}

// job finds a job by its ID; the answer is nil where the segment does not have
// it.
func (s *segment) job(id string) (*found, error) {
	f, err := s.footer()
	if err != nil || f.Pages == 0 {
		return nil, err
	}
	hash := hashOf(id)
	page, err := s.page(pageOf(hash, f.Pages))
	if err != nil {
		return nil, err
	}
	var places []place
	entriesOf(page, func(h hashed) {
		if h.hash == hash {
			places = append(places, h.place)
		}
	})
	for _, p := range places {
		job, err := s.jobAt(p)
		if err != nil {
			return nil, err
		}
		if job.Job.Id == id {
			return job, nil
		}
	}
	return nil, nil
}

func (s *segment) jobAt(p place) (*found, error) {
	list, err := s.frames(heads)
	if err != nil {
		return nil, err
	}
	raw, err := s.frame(heads, int(p.frame))
	if err != nil {
		return nil, err
	}
	if uint64(p.offset) > uint64(len(raw)) {
		return nil, errorf("a job at %d of a frame with %d bytes", p.offset, len(raw))
	}
	record, _, err := nextRecord(raw[p.offset:])
	if err != nil {
		return nil, err
	}
	job := &musterpb.SealedJob{}
	if err := job.UnmarshalVT(record); err != nil {
		return nil, errorf("a job: %w", err)
	}
	if job.Job == nil || job.Job.Spec == nil {
		return nil, errorf("the record of a job holds none")
	}
	return &found{job, frameAt(list, heads, int(p.frame)).base}, nil
}

// jobs lists jobs of an account, or all with an empty name, newest first, that
// were submitted before a sequence, at most limit of them.
func (s *segment) jobs(account string, before uint64, limit int) (list []*musterpb.Job, err error) {
	k, hash := bySequence, uint64(0)
	if account != "" {
		k, hash = byAccount, hashOf(account)
	}
	frames, err := s.frames(k)
	if err != nil {
		return nil, err
	}
	// The first frame that begins at or after the place to go back from.
	beyond := sort.Search(len(frames.Offset), func(i int) bool {
		if k == bySequence {
			return frames.First[i] >= before
		}
		return frames.First[i] > hash || frames.First[i] == hash && frames.Second[i] >= before
	})
	for i := beyond - 1; i >= 0 && len(list) < limit; i-- {
		if k == byAccount && i+1 < beyond && frames.First[i+1] < hash {
			break // that of the account ended in the frame before
		}
		raw, err := s.frame(k, i)
		if err != nil {
			return nil, err
		}
		m := &musterpb.SealedEntries{}
		if err := m.UnmarshalVT(raw); err != nil {
			return nil, errorf("%s frame %d: %w", k, i, err)
		}
		n := len(m.Sequence)
		if len(m.Account) != n || len(m.Frame) != n || len(m.Offset) != n {
			return nil, errorf("%s frame %d has columns of different lengths", k, i)
		}
		for e := n - 1; e >= 0 && len(list) < limit; e-- {
			if m.Sequence[e] >= before || k == byAccount && m.Account[e] != hash {
				continue
			}
			job, err := s.jobAt(place{m.Frame[e], m.Offset[e]})
			if err != nil {
				return nil, err
			}
			if account == "" || job.Job.Account == account {
				list = append(list, job.Job)
			}
		}
	}
	return list, nil
}

// records calls f with the records of a run that belong to a task from a number
// on, and with some before them, in order, until f says that it has enough.
func (s *segment) records(k kind, base uint32, run *musterpb.SealedRun, from uint32, f func(record []byte) (more bool, err error)) error {
	if run.GetRecords() == 0 {
		return nil
	}
	list, err := s.frames(k)
	if err != nil {
		return err
	}
	first := uint64(base) + uint64(run.Frame)
	if run.Frames == 0 || first+uint64(run.Frames) > uint64(len(list.Offset)) {
		return errorf("%s frames %d and %d more are not all there: it has %d", k, first, run.Frames, len(list.Offset))
	}
	number, end := int(first), int(first)+int(run.Frames)
	if run.Frames > 1 { // a task may begin at the end of the frame before the one that it is the first of
		number += max(0, sort.Search(int(run.Frames), func(i int) bool { return list.First[int(first)+i] >= uint64(from) })-1)
	}
	for ; number < end; number++ {
		raw, err := s.frame(k, number)
		if err != nil {
			return err
		}
		n := list.Records[number]
		if run.Frames == 1 {
			if n = run.Records; uint64(run.Offset) > uint64(len(raw)) {
				return errorf("%s at %d of a frame with %d bytes", k, run.Offset, len(raw))
			}
			raw = raw[run.Offset:]
		}
		for range n {
			var record []byte
			if record, raw, err = nextRecord(raw); err != nil {
				return errorf("%s frame %d: %w", k, number, err)
			}
			if more, err := f(record); err != nil || !more {
				return err
			}
		}
		if err := s.ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// tasks lists up to limit tasks of a job from a number on.
func (s *segment) tasks(job *found, from uint32, limit int) (list []*musterpb.Task, err error) {
	err = s.records(tasks, job.base[0], job.Tasks, from, func(record []byte) (bool, error) {
		t := &musterpb.Task{}
		if err := t.UnmarshalVT(record); err != nil {
			return false, errorf("a task: %w", err)
		}
		if t.Number >= from {
			list = append(list, t)
		}
		return len(list) < limit, nil
	})
	return list, err
}

// attempts calls each with the attempts of a job's tasks from a number on.
func (s *segment) attempts(job *found, from uint32, each func(*musterpb.Attempt) (more bool)) error {
	return s.records(attempts, job.base[1], job.Attempts, from, func(record []byte) (bool, error) {
		a := &musterpb.Attempt{}
		if err := a.UnmarshalVT(record); err != nil {
			return false, errorf("an attempt: %w", err)
		}
		return a.Task < from || each(a), nil
	})
}

// checks lists the checks of a job's tasks from ≤ n < to; to is 0 for all.
func (s *segment) checks(job *found, from, to uint32) (list []*musterpb.Check, err error) {
	err = s.records(checks, job.base[2], job.Checks, from, func(record []byte) (bool, error) {
		c := &musterpb.SealedCheck{}
		if err := c.UnmarshalVT(record); err != nil || c.Check == nil {
			return false, errorf("a check: %w", orEmpty(err))
		}
		if to > 0 && c.Task >= to {
			return false, nil
		}
		if c.Task >= from {
			list = append(list, c.Check)
		}
		return true, nil
	})
	return list, err
}

func orEmpty(err error) error {
	if err == nil {
		return errors.New("the record is empty")
	}
	return err
}

// transfers lists transfers after an ID, of one account or, with an empty name,
// of all.
func (s *segment) transfers(account string, after uint64, limit int) (list []*musterpb.Transfer, err error) {
	frames, err := s.frames(transfers)
	if err != nil {
		return nil, err
	}
	about := func(int) (bool, error) { return true, nil }
	if account != "" {
		hash := hashOf(account)
		if has, err := s.hasTransfersOf(hash); err != nil || !has {
			return nil, err
		}
		filter := &filterReader{s: s, low: -1}
		about = func(i int) (bool, error) { return filter.has(i, uint32(hash>>32)) }
	}
	first := max(0, sort.Search(len(frames.Offset), func(i int) bool { return frames.First[i] > after })-1)
	for i := first; i < len(frames.Offset) && len(list) < limit; i++ {
		if ok, err := about(i); err != nil {
			return nil, err
		} else if !ok {
			continue
		}
		raw, err := s.frame(transfers, i)
		if err != nil {
			return nil, err
		}
		for range frames.Records[i] {
			var record []byte
			if record, raw, err = nextRecord(raw); err != nil {
				return nil, errorf("transfers frame %d: %w", i, err)
			}
			t := &musterpb.SealedTransfer{}
			if err := t.UnmarshalVT(record); err != nil || t.Transfer == nil {
				return nil, errorf("a transfer: %w", orEmpty(err))
			}
			if t.Transfer.Id <= after || account != "" && !slices.Contains(ownersOf(t), account) {
				continue
			}
			if list = append(list, t.Transfer); len(list) == limit {
				break
			}
		}
		if err := s.ctx.Err(); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func ownersOf(t *musterpb.SealedTransfer) []string {
	names := accountsOf(t)
	return names[:]
}

// hasTransfersOf reports whether the segment has transfers of the account with
// this hash.
func (s *segment) hasTransfersOf(hash uint64) (bool, error) {
	list, err := s.frames(accounts)
	if err != nil || len(list.Offset) == 0 {
		return false, err
	}
	raw, err := s.frame(accounts, 0)
	if err != nil {
		return false, err
	}
	m := &musterpb.SealedAccounts{}
	if err := m.UnmarshalVT(raw); err != nil {
		return false, errorf("the list of its accounts: %w", err)
	}
	_, has := slices.BinarySearch(m.Hash, hash)
	return has, nil
}

// filterReader answers which frames of transfers are about an account. It keeps
// the frame of filters that it used last.
type filterReader struct {
	s       *segment
	low     int // the first frame of transfers that filters are loaded for; -1: none
	filters []*musterpb.SealedFilter
}

func (f *filterReader) has(frame int, hash uint32) (bool, error) {
	if f.low < 0 || frame < f.low || frame >= f.low+len(f.filters) {
		if err := f.load(frame); err != nil {
			return false, err
		}
	}
	sum := uint32(0)
	for _, step := range f.filters[frame-f.low].Steps {
		if sum += step; sum == hash {
			return true, nil
		}
	}
	return false, nil
}

func (f *filterReader) load(frame int) error {
	list, err := f.s.frames(filters)
	if err != nil {
		return err
	}
	at := sort.Search(len(list.Offset), func(i int) bool { return list.First[i] > uint64(frame) }) - 1
	if at < 0 {
		return errorf("transfers frame %d has no filter", frame)
	}
	raw, err := f.s.frame(filters, at)
	if err != nil {
		return err
	}
	f.low, f.filters = int(list.First[at]), nil
	for len(raw) > 0 {
		var record []byte
		if record, raw, err = nextRecord(raw); err != nil {
			return err
		}
		m := &musterpb.SealedFilter{}
		if err := m.UnmarshalVT(record); err != nil {
			return errorf("a filter: %w", err)
		}
		f.filters = append(f.filters, m)
	}
	if frame >= f.low+len(f.filters) {
		return errorf("transfers frame %d has no filter", frame)
	}
	return nil
}

// batches lists batches after an epoch.
func (s *segment) batches(after uint64, limit int) (list []*musterpb.Batch, err error) {
	frames, err := s.frames(batches)
	if err != nil {
		return nil, err
	}
	first := max(0, sort.Search(len(frames.Offset), func(i int) bool { return frames.First[i] > after })-1)
	for i := first; i < len(frames.Offset) && len(list) < limit; i++ {
		raw, err := s.frame(batches, i)
		if err != nil {
			return nil, err
		}
		for range frames.Records[i] {
			var record []byte
			if record, raw, err = nextRecord(raw); err != nil {
				return nil, errorf("batches frame %d: %w", i, err)
			}
			b := &musterpb.Batch{}
			if err := b.UnmarshalVT(record); err != nil {
				return nil, errorf("a batch: %w", err)
			}
			if b.Epoch > after && len(list) < limit {
				list = append(list, b)
			}
		}
	}
	return list, nil
}
