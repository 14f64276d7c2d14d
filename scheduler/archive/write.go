package archive

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
)

// Writer writes one segment: jobs, each with its tasks in order, each with its
// attempts and checks; transfers in order of ID; and batches in order of epoch.
// Equal calls give equal bytes. After an error a writer is of no use. It is not
// safe for concurrent use.
type Writer struct {
	out    *counted
	open   [bodies]buffer
	tables [kinds]*musterpb.SealedFrames
	footer musterpb.SealedFooter
	jobs   []entry
	seen   map[string]*seen    // accounts of transfers
	inside []uint32            // upper halves of the hashes of those of the open frame
	merged map[uint64]struct{} // hashes of the accounts of segments that were merged into this one

	current *musterpb.SealedJob // begun and not ended; nil: none
	task    uint32              // of the current job, what was added last
	rows    [kinds]row          // of the current job

	transfer musterpb.SealedTransfer // kept between calls, like packed
	packed   []byte
}

// row is a run that still grows.
type row struct {
	run    musterpb.SealedRun
	before uint64 // records of other runs in the frame where it began
	first  uint64 // its first key
}

// seen is an account that transfers are about.
type seen struct {
	hash  uint64
	frame int // 1 + the last frame of transfers that is about it
}

// entry is a job in the lists of a segment.
type entry struct {
	hash     uint64 // of its ID
	account  uint64 // hash
	sequence uint64
	place
}

// buffer is a frame that still grows.
type buffer struct {
	raw     []byte
	records uint64
	first   uint64
}

// NewWriter starts a segment; Close ends it.
func NewWriter(w io.Writer) *Writer {
	out := &Writer{out: newCounted(w), seen: map[string]*seen{}, merged: map[uint64]struct{}{}}
	for k := range out.tables {
		out.tables[k] = &musterpb.SealedFrames{}
	}
	out.out.Write([]byte(magic))
	return out
}

// counted writes, counts and hashes. The first error stays.
type counted struct {
	w    *bufio.Writer
	sum  hash.Hash
	size int64
	err  error
}

func newCounted(w io.Writer) *counted {
	return &counted{w: bufio.NewWriterSize(w, 64<<10), sum: sha256.New()}
}

func (c *counted) Write(b []byte) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	c.sum.Write(b)
	c.size += int64(len(b))
	if _, err := c.w.Write(b); err != nil {
		c.err = err
	}
	return len(b), c.err
}

// message is what every generated message can do.
type message interface {
	SizeVT() int
	MarshalToSizedBufferVT([]byte) (int, error)
}

// Job begins a job: what is added next is its first task, if it has any.
func (w *Writer) Job(job *musterpb.Job) error {
	if job.GetId() == "" || job.Sequence == 0 {
		return api.Errorf(api.Internal, "job %q with sequence %d can't be sealed: both are needed", job.GetId(), job.GetSequence())
	}
	if err := w.endJob(); err != nil {
		return err
	}
	w.current = &musterpb.SealedJob{Job: job}
	f := &w.footer
	if f.FirstEndedUnixMs == 0 || job.EndedUnixMs < f.FirstEndedUnixMs {
		f.FirstEndedUnixMs = job.EndedUnixMs
	}
	f.LastEndedUnixMs = max(f.LastEndedUnixMs, job.EndedUnixMs)
	return nil
}

// Task adds a task of the job that was begun last.
func (w *Writer) Task(t *musterpb.Task) error {
	if w.current == nil || t.Job != w.current.Job.Id {
		return api.Errorf(api.Internal, "task %d of job %s can't be sealed where job %s was begun last", t.Number, t.Job, w.current.GetJob().GetId())
	}
	if w.rows[tasks].run.Records > 0 && t.Number <= w.task {
		return api.Errorf(api.Internal, "task %d of job %s can't be sealed after task %d", t.Number, t.Job, w.task)
	}
	w.task = t.Number
	return w.append(tasks, t)
}

// Attempt adds an attempt of the task that was added last, or of its check.
func (w *Writer) Attempt(a *musterpb.Attempt) error {
	if w.current == nil || w.rows[tasks].run.Records == 0 || a.Job != w.current.Job.Id || a.Task != w.task {
		return api.Errorf(api.Internal, "attempt %s of task %d of job %s can't be sealed where task %d of job %s was added last", a.Id, a.Task, a.Job, w.task, w.current.GetJob().GetId())
	}
	return w.append(attempts, a)
}

// Check adds the check of a result of the task that was added last.
func (w *Writer) Check(c *musterpb.Check) error {
	if w.current == nil || w.rows[tasks].run.Records == 0 || c.Job != w.current.Job.Id {
		return api.Errorf(api.Internal, "check %s of job %s can't be sealed where job %s was begun last", c.Id, c.Job, w.current.GetJob().GetId())
	}
	return w.append(checks, &musterpb.SealedCheck{Check: c, Task: w.task})
}

// endJob puts the job that was begun last behind its parts.
func (w *Writer) endJob() error {
	sealed := w.current
	if sealed == nil {
		return w.out.err
	}
	sealed.Tasks, sealed.Attempts, sealed.Checks = w.endRun(tasks), w.endRun(attempts), w.endRun(checks)
	at, err := w.add(heads, sealed, sealed.Job.Sequence)
	if err != nil {
		return err
	}
	w.jobs = append(w.jobs, entry{hash: hashOf(sealed.Job.Id), account: hashOf(sealed.Job.Account), sequence: sealed.Job.Sequence, place: at})
	w.current = nil
	return nil
}

func (w *Writer) endRun(k kind) *musterpb.SealedRun {
	r := &w.rows[k]
	if r.run.Records == 0 {
		return nil
	}
	if r.run.Frames > 1 {
		w.flush(k)
	}
	run := r.run.CloneVT()
	*r = row{}
	return run
}

// append adds a record to a run of the current job; its key is the task. A run
// that does not fit into what is left of the open frame starts the next; one
// that is longer than a frame fills several, and shares them with no other.
func (w *Writer) append(k kind, m message) error {
	b, r := &w.open[k], &w.rows[k]
	if r.run.Records == 0 {
		*r = row{before: b.records, first: uint64(w.task)}
		r.run = musterpb.SealedRun{Frame: uint32(len(w.tables[k].Offset)), Offset: uint32(len(b.raw)), Frames: 1}
	}
	r.run.Records++
	size := m.SizeVT()
	if r.before > 0 && len(b.raw)+size > k.frameTarget() {
		w.split(k, r)
	}
	if r.before == 0 && len(b.raw) > 0 && len(b.raw)+size > k.frameTarget() {
		w.flush(k)
		r.run.Frames++
	}
	if err := b.add(m, size, uint64(w.task)); err != nil {
		return err
	}
	return w.out.err
}

// Write writes the records that the state seals as one segment; account is that
// of a job whose money a transfer moves.
func Write(ctx context.Context, out io.Writer, records iter.Seq[*musterpb.SnapshotRecord], account func(job string) string) (*musterpb.Segment, error) {
	w := NewWriter(out)
	var lastJob, lastAccount string // what follows each other is often about one job
	for r := range records {
		var err error
		switch r := r.Record.(type) {
		case *musterpb.SnapshotRecord_Job:
			err = w.Job(r.Job)
		case *musterpb.SnapshotRecord_Task:
			err = w.Task(r.Task)
		case *musterpb.SnapshotRecord_Attempt:
			err = w.Attempt(r.Attempt)
		case *musterpb.SnapshotRecord_Check:
			err = w.Check(r.Check)
		case *musterpb.SnapshotRecord_Transfer:
			if job := jobOf(r.Transfer); job != lastJob {
				lastJob, lastAccount = job, ""
				if job != "" {
					lastAccount = account(job)
				}
			}
			err = w.Transfer(r.Transfer, lastAccount)
		case *musterpb.SnapshotRecord_Batch:
			err = w.Batch(r.Batch)
		default:
			err = api.Errorf(api.Internal, "a record of kind %T can't be sealed", r)
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return nil, err
		}
	}
	return w.Close()
}

// jobOf is the job whose money a transfer moves, empty where it moves no job's.
func jobOf(t *musterpb.Transfer) string {
	for _, side := range [2]string{t.Debit, t.Credit} {
		if job, ok := ledger.JobOf(side); ok {
			return job
		}
	}
	return ""
}

// split ends a frame before the run that does not fit into it.
func (w *Writer) split(k kind, r *row) {
	b := &w.open[k]
	moved, records := slices.Clone(b.raw[r.run.Offset:]), b.records-r.before
	b.raw, b.records = b.raw[:r.run.Offset], r.before
	w.flush(k)
	b.raw, b.records, b.first = append(b.raw, moved...), records, r.first
	r.run.Frame, r.run.Offset, r.before = uint32(len(w.tables[k].Offset)), 0, 0
}

// add puts one record of a kind whose records stand alone.
func (w *Writer) add(k kind, m message, key uint64) (place, error) {
	b := &w.open[k]
	size := m.SizeVT()
	if len(b.raw) > 0 && len(b.raw)+size > k.frameTarget() {
		w.flush(k)
	}
	at := place{uint32(len(w.tables[k].Offset)), uint32(len(b.raw))}
	if err := b.add(m, size, key); err != nil {
		return at, err
	}
	return at, w.out.err
}

func (b *buffer) add(m message, size int, key uint64) error {
	if size > maxRecord {
		return api.Errorf(api.TooLarge, "a record of %d bytes can't be sealed, at most %d are allowed", size, maxRecord)
	}
	if b.records == 0 {
		b.first = key
	}
	b.records++
	b.raw = binary.AppendUvarint(b.raw, uint64(size))
	head := len(b.raw)
	b.raw = slices.Grow(b.raw, size)[:head+size]
	_, err := m.MarshalToSizedBufferVT(b.raw[head:])
	return err
}

// flush ends the open frame of a kind.
func (w *Writer) flush(k kind) {
	b := &w.open[k]
	if b.records == 0 {
		return
	}
	if k == transfers {
		w.filter()
	}
	w.frame(k, b.raw, frame{records: b.records, first: b.first})
	b.raw, b.records = b.raw[:0], 0
	if cap(b.raw) > 4*bodyFrame {
		b.raw = nil // one large record does not keep its buffer
	}
}

// frame writes a frame and lists it.
func (w *Writer) frame(k kind, raw []byte, f frame) {
	w.packed = encoder().EncodeAll(raw, w.packed[:0])
	f.offset, f.length, f.raw, f.crc = uint64(w.out.size), uint32(len(w.packed)), uint32(len(raw)), checksum(w.packed)
	appendFrame(w.tables[k], k, f)
	w.out.Write(w.packed)
}

// Transfer adds a transfer; account is that of the job whose money it moves,
// empty where it moves no job's.
func (w *Writer) Transfer(t *musterpb.Transfer, account string) error {
	if t.Id <= w.footer.LastTransfer {
		return api.Errorf(api.Internal, "transfer %d can't be sealed after transfer %d", t.Id, w.footer.LastTransfer)
	}
	w.transfer.Transfer, w.transfer.Account = t, account
	at, err := w.add(transfers, &w.transfer, t.Id)
	if err != nil {
		return err
	}
	for _, name := range accountsOf(&w.transfer) {
		if name != "" {
			w.about(name, int(at.frame)+1)
		}
	}
	if w.footer.FirstTransfer == 0 {
		w.footer.FirstTransfer = t.Id
	}
	w.footer.LastTransfer = t.Id
	return nil
}

// about notes that the frame of transfers with this number, counted from 1, is
// about an account.
func (w *Writer) about(name string, frame int) {
	a := w.seen[name]
	if a == nil {
		a = &seen{hash: hashOf(name)}
		w.seen[name] = a
	}
	if a.frame != frame {
		a.frame = frame
		w.inside = append(w.inside, uint32(a.hash>>32))
	}
}

// accountsOf are the accounts whose owners see a transfer: those of its two
// sides, a job's being that of its account. Empty is nobody.
func accountsOf(t *musterpb.SealedTransfer) [2]string {
	var names [2]string
	for i, side := range [2]string{t.Transfer.GetDebit(), t.Transfer.GetCredit()} {
		if name, ok := strings.CutPrefix(side, ledger.Of("")); ok {
			names[i] = name
		} else if _, ok := ledger.JobOf(side); ok {
			names[i] = t.Account
		}
	}
	return names
}

// filter says of the open frame of transfers whom it is about.
func (w *Writer) filter() {
	slices.Sort(w.inside)
	m := &musterpb.SealedFilter{Steps: slices.Clone(w.inside)}
	for i := len(m.Steps) - 1; i > 0; i-- {
		m.Steps[i] -= m.Steps[i-1]
	}
	w.inside = w.inside[:0]
	b := &w.open[filters]
	if b.records == filtersPerFrame {
		w.flush(filters)
	}
	if err := b.add(m, m.SizeVT(), uint64(len(w.tables[transfers].Offset))); err != nil && w.out.err == nil {
		w.out.err = err
	}
}

// Batch adds a batch.
func (w *Writer) Batch(b *musterpb.Batch) error {
	if b.Epoch <= w.footer.LastEpoch {
		return api.Errorf(api.Internal, "batch %d can't be sealed after batch %d", b.Epoch, w.footer.LastEpoch)
	}
	if _, err := w.add(batches, b, b.Epoch); err != nil {
		return err
	}
	if w.footer.FirstEpoch == 0 {
		w.footer.FirstEpoch = b.Epoch
	}
	w.footer.LastEpoch = b.Epoch
	return nil
}

// Bytes is how long the segment is so far, without what its open frames hold.
func (w *Writer) Bytes() int64 { return w.out.size }

// Close writes what leads to the content, and returns what the state keeps of
// the segment.
func (w *Writer) Close() (*musterpb.Segment, error) {
	if err := w.endJob(); err != nil {
		return nil, err
	}
	for k := range bodies { // transfers before filters: their last frame gets one, too
		w.flush(k)
	}
	slices.SortFunc(w.jobs, func(a, b entry) int { return cmp.Compare(a.sequence, b.sequence) })
	for i := 1; i < len(w.jobs); i++ {
		if w.jobs[i].sequence == w.jobs[i-1].sequence {
			return nil, api.Errorf(api.Internal, "two jobs with the sequence %d can't be sealed", w.jobs[i].sequence)
		}
	}
	hashes := make([]hashed, len(w.jobs))
	for i, e := range w.jobs {
		hashes[i] = hashed{e.hash, e.place}
	}
	return w.finish(w.jobs, hashes)
}

// finish writes everything after the frames that merging copies. Jobs are in
// order of sequence; it takes ownership of both lists.
func (w *Writer) finish(jobs []entry, hashes []hashed) (*musterpb.Segment, error) {
	f := &w.footer
	f.BodyBytes, f.Jobs = uint64(w.out.size), uint64(len(jobs))
	if n := len(jobs); n > 0 {
		f.FirstSequence, f.LastSequence = jobs[0].sequence, jobs[n-1].sequence
	}
	w.entries(bySequence, jobs)
	slices.SortFunc(jobs, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.account, b.account), cmp.Compare(a.sequence, b.sequence))
	})
	w.entries(byAccount, jobs)
	w.accounts()
	f.PagesOffset = uint64(w.out.size)
	pages, n, err := appendPages(nil, hashes)
	if err != nil {
		return nil, err
	}
	f.Pages = n
	w.out.Write(pages)
	for k, t := range w.tables {
		if len(t.Offset) > 0 {
			if err := w.section(kind(k), t); err != nil {
				return nil, err
			}
		}
	}
	footer, err := f.MarshalVT()
	if err != nil {
		return nil, err
	}
	trailer := binary.BigEndian.AppendUint64(nil, uint64(w.out.size))
	trailer = binary.BigEndian.AppendUint32(trailer, uint32(len(footer)))
	trailer = binary.BigEndian.AppendUint32(trailer, checksum(footer))
	w.out.Write(footer)
	w.out.Write(append(trailer, magic...))
	if w.out.err == nil {
		w.out.err = w.out.w.Flush()
	}
	return &musterpb.Segment{
		Digest: string(api.DigestFromSum(w.out.sum.Sum(nil))), Bytes: w.out.size, Jobs: f.Jobs,
		FirstEndedUnixMs: f.FirstEndedUnixMs, LastEndedUnixMs: f.LastEndedUnixMs,
		FirstTransfer: f.FirstTransfer, LastTransfer: f.LastTransfer, FirstEpoch: f.FirstEpoch, LastEpoch: f.LastEpoch,
	}, w.out.err
}

// entries writes a list of jobs.
func (w *Writer) entries(k kind, jobs []entry) {
	for part := range slices.Chunk(jobs, entriesPerFrame) {
		m := &musterpb.SealedEntries{}
		for _, e := range part {
			m.Sequence, m.Account = append(m.Sequence, e.sequence), append(m.Account, e.account)
			m.Frame, m.Offset = append(m.Frame, e.frame), append(m.Offset, e.offset)
		}
		f := frame{records: uint64(len(part)), first: part[0].sequence}
		if k == byAccount {
			f.first, f.second = part[0].account, part[0].sequence
		}
		w.message(k, m, f)
	}
}

// accounts lists whose transfers the segment has.
func (w *Writer) accounts() {
	for _, a := range w.seen {
		w.merged[a.hash] = struct{}{}
	}
	if len(w.merged) == 0 {
		return
	}
	m := &musterpb.SealedAccounts{Hash: slices.Sorted(maps.Keys(w.merged))}
	w.message(accounts, m, frame{records: uint64(len(m.Hash))})
}

// message writes a frame that is one message.
func (w *Writer) message(k kind, m interface{ MarshalVT() ([]byte, error) }, f frame) {
	raw, err := m.MarshalVT()
	if err != nil && w.out.err == nil {
		w.out.err = err
	}
	w.frame(k, raw, f)
}

// section writes the list of a kind's frames.
func (w *Writer) section(k kind, t *musterpb.SealedFrames) error {
	raw, err := t.MarshalVT()
	if err != nil {
		return err
	}
	if len(raw) > maxRaw {
		return api.Errorf(api.TooLarge, "a list of %d %s frames has %d bytes, at most %d are allowed", len(t.Offset), k, len(raw), maxRaw)
	}
	w.packed = encoder().EncodeAll(raw, w.packed[:0])
	w.footer.Sections = append(w.footer.Sections, &musterpb.SealedSection{
		Kind: uint32(k), Offset: uint64(w.out.size), Length: uint32(len(w.packed)), RawLength: uint32(len(raw)), Crc: checksum(w.packed),
	})
	w.out.Write(w.packed)
	return nil
}
