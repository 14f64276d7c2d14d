package state

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strconv"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
	"github.com/musternet/muster/scheduler/table"
)

// snapshotFormat is raised when an older node could not read a snapshot.
const snapshotFormat = 2

// maxRecord bounds one record of a snapshot.
const maxRecord = 64 << 20

// Snapshot is the state at one moment. Taking it copies no values, and takes
// the same short time whatever is in there; writing it happens beside Apply.
type Snapshot struct{ data }

// Snapshot takes a snapshot.
func (s *State) Snapshot() *Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &Snapshot{s.data.copy()}
}

// Write writes the snapshot: length-delimited records in one order only, so
// that equal states give equal bytes, closed by their count and SHA-256.
func (s *Snapshot) Write(w io.Writer) error {
	out := &recordWriter{w: bufio.NewWriter(w), sum: sha256.New()}
	s.records(out)
	out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_End{
		End: &musterpb.SnapshotEnd{Records: out.count, Sha256: out.sum.Sum(nil)},
	}})
	if out.err != nil {
		return fmt.Errorf("writing the snapshot: %w", out.err)
	}
	return out.w.Flush()
}

// Hash identifies the state: schedulers that applied the same commands have
// the same.
func (s *Snapshot) Hash() []byte {
	out := &recordWriter{w: bufio.NewWriter(io.Discard), sum: sha256.New()}
	s.records(out)
	return out.sum.Sum(nil)
}

func (s *Snapshot) records(out *recordWriter) {
	out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Header{Header: &musterpb.SnapshotHeader{
		Format: snapshotFormat, JobSequence: s.jobSequence, Epoch: s.epoch, OpenBatch: s.openBatch, Cluster: s.cluster, TimeUnixMs: s.now,
		TransferSequence: s.ledger.Last(), SealedTransfer: s.ledger.Sealed(), SealedEpoch: s.sealedEpoch,
	}}})
	for _, k := range keysOf(s.accounts) {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Account{Account: s.accounts.Get(k)}})
	}
	for _, k := range keysOf(s.keys) {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Key{Key: s.keys.Get(k)}})
	}
	for _, k := range sortedKeys(s.nodes) {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Node{Node: s.nodes[k]}})
	}
	for _, k := range keysOf(s.workers) {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Worker{Worker: s.workers.Get(k)}})
	}
	s.work(out)
	for _, k := range slices.Sorted(s.batches.Keys()) {
		out.put(batchRecord(s.batches.Get(k)))
	}
	for _, k := range slices.SortedFunc(s.data.records.Keys(), compareRecords) {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Track{Track: s.data.records.Get(k)}})
	}
	accounts, transfers := s.ledger.Records()
	for a := range accounts {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_LedgerAccount{LedgerAccount: a}})
	}
	for t := range transfers {
		out.put(transferRecord(t))
	}
	for _, segment := range s.segments {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Segment{Segment: segment}})
	}
	for _, id := range s.answerOrder {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Answered{Answered: s.answered.Get(id)}})
	}
}

// work is the records of jobs and what belongs to them, without what is left of
// sealed jobs.
func (s *Snapshot) work(out *recordWriter) {
	for _, k := range keysOf(s.jobs) {
		out.put(jobRecord(s.jobs.Get(k)))
	}
	for _, k := range slices.SortedFunc(s.tasks.Keys(), compareTasks) {
		if !s.isDropped(k.job) {
			out.put(taskRecord(s.tasks.Get(k)))
		}
	}
	for _, k := range keysOf(s.attempts) {
		if a := s.attempts.Get(k); !s.isDropped(a.Job) {
			out.put(attemptRecord(a))
		}
	}
	for _, k := range keysOf(s.checks) {
		if c := s.checks.Get(k); !s.isDropped(c.Job) {
			out.put(checkRecord(c))
		}
	}
}

// The records that sealing writes, too.

func jobRecord(v *musterpb.Job) *musterpb.SnapshotRecord {
	return &musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Job{Job: v}}
}

func taskRecord(v *musterpb.Task) *musterpb.SnapshotRecord {
	return &musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Task{Task: v}}
}

func attemptRecord(v *musterpb.Attempt) *musterpb.SnapshotRecord {
	return &musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Attempt{Attempt: v}}
}

func checkRecord(v *musterpb.Check) *musterpb.SnapshotRecord {
	return &musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Check{Check: v}}
}

func transferRecord(v *musterpb.Transfer) *musterpb.SnapshotRecord {
	return &musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Transfer{Transfer: v}}
}

func batchRecord(v *musterpb.Batch) *musterpb.SnapshotRecord {
	return &musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Batch{Batch: v}}
}

func compareTasks(a, b taskKey) int {
	return cmp.Or(cmp.Compare(a.job, b.job), cmp.Compare(a.number, b.number))
}

func compareRecords(a, b recordKey) int {
	return cmp.Or(cmp.Compare(a.owner, b.owner), cmp.Compare(a.class, b.class), cmp.Compare(a.application, b.application))
}

// Restore replaces the state by a snapshot. On an error the old state stays.
func (s *State) Restore(r io.Reader) error {
	d, err := readSnapshot(r)
	if err == nil {
		err = d.checkReferences()
	}
	if err != nil {
		return fmt.Errorf("restoring a snapshot: %w", err)
	}
	fresh := &State{data: d, index: newIndex()}
	fresh.derive()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.data, s.index, s.sweeps = fresh.data, fresh.index, nil
	s.journal.forget()
	s.wake()
	return nil
}

// derive fills the index from the values.
func (s *State) derive() {
	for a := range s.accounts.Values() {
		s.indexAccount(a)
	}
	for w := range s.workers.Values() {
		s.indexWorker(w)
	}
	for job := range s.jobs.Values() {
		if job.Settled {
			s.index.settled = append(s.index.settled, job.Id)
		} else {
			s.indexJob(job)
		}
	}
	slices.SortFunc(s.index.settled, func(a, b string) int {
		x, y := s.jobs.Get(a), s.jobs.Get(b)
		return cmp.Or(cmp.Compare(x.SettledTransfer, y.SettledTransfer), cmp.Compare(x.Sequence, y.Sequence))
	})
	for a := range s.attempts.Values() {
		if running(a.State) {
			s.indexRunning(a, true)
		}
		if a.Check != "" || !live(a.State) {
			continue
		}
		if sampled(a) {
			s.countUndecided(a.Batch, true)
		}
		s.indexDue(a, a)
	}
	for c := range s.checks.Values() {
		s.indexCheck(c)
	}
}

func missing(what, id, of string) error { return fmt.Errorf("%s %q of %s is missing", what, id, of) }

// checkReferences makes sure that what a value names is there: Apply looks
// nothing up twice.
func (d *data) checkReferences() error {
	for k := range d.keys.Values() {
		if d.accounts.Get(k.Account) == nil {
			return missing("account", k.Account, "a key")
		}
	}
	for id, w := range d.workers.All() {
		if d.accounts.Get(w.Owner) == nil {
			return missing("account", w.Owner, "worker "+id)
		}
	}
	for _, check := range []func() error{d.checkJobs, d.checkAttempts, d.checkChecks, d.checkBatches} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func (d *data) checkJobs() error {
	for id, job := range d.jobs.All() {
		if job.Spec == nil || job.Spec.Image == nil || job.Spec.Items == nil || job.Spec.Resources == nil || job.Spec.Verify == nil {
			return missing("specification", "", "job "+id)
		}
		if d.accounts.Get(job.Account) == nil {
			return missing("account", job.Account, "job "+id)
		}
		for _, n := range job.Requeued {
			if t := d.tasks.Get(taskKey{id, n}); t == nil || (t.State != musterpb.TaskState_TASK_STATE_QUEUED && !Ended(job.State)) {
				return missing("waiting task", strconv.FormatUint(uint64(n), 10), "job "+id)
			}
		}
	}
	placed := map[string]uint32{} // tasks by job
	for k, t := range d.tasks.All() {
		if d.jobs.Get(k.job).GetNextTask() <= k.number {
			return missing("job", k.job, fmt.Sprintf("task %d", k.number))
		}
		placed[k.job]++
		for _, id := range t.Attempts {
			if a := d.attempts.Get(id); a == nil || a.Job != k.job || a.Task != k.number {
				return missing("attempt", id, fmt.Sprintf("task %s/%d", t.Job, t.Number))
			}
		}
	}
	for id, job := range d.jobs.All() {
		if placed[id] != job.NextTask { // each is there once, and none above
			return missing("task", strconv.FormatUint(uint64(job.NextTask-placed[id]), 10)+" of them", "job "+id)
		}
	}
	return nil
}

func (d *data) checkAttempts() error {
	holds := 0
	for id, a := range d.attempts.All() {
		job := d.jobs.Get(a.Job)
		if job == nil || a.Task >= job.NextTask {
			return missing("job or task", fmt.Sprintf("%s/%d", a.Job, a.Task), "attempt "+id)
		}
		if w := d.workers.Get(a.Worker); w == nil || w.Owner != a.Owner {
			return missing("worker", a.Worker, "attempt "+id)
		}
		if a.Check != "" && d.checks.Get(a.Check) == nil {
			return missing("check", a.Check, "attempt "+id)
		}
		if a.State == musterpb.AttemptState_ATTEMPT_STATE_COMMITTED && a.Commit == nil {
			return missing("commit", "", "attempt "+id)
		}
		if !live(a.State) {
			continue
		}
		if h := d.ledger.OpenHold(a.Hold); h == nil || h.Ref != id || h.AmountMicroUsd != a.HoldMicroUsd {
			return missing("hold", strconv.FormatUint(a.Hold, 10), "attempt "+id)
		}
		holds++
		if sampled(a) && (d.batches.Get(a.Batch) == nil || d.checks.Get(checkID(id)) == nil) {
			return missing("batch or check", strconv.FormatUint(a.Batch, 10), "attempt "+id)
		}
		if job.Settled {
			return fmt.Errorf("attempt %s is %s and its job is settled", id, StateName(a.State))
		}
	}
	if holds != d.ledger.OpenHolds() {
		return fmt.Errorf("%d holds are open, and %d attempts have one", d.ledger.OpenHolds(), holds)
	}
	return nil
}

func (d *data) checkChecks() error {
	for id, check := range d.checks.All() {
		job := d.jobs.Get(check.Job)
		if job == nil {
			return missing("job", check.Job, "check "+id)
		}
		if open(check) && job.Settled {
			return fmt.Errorf("check %s has no verdict and its job is settled", id)
		}
		for _, run := range append([]string{check.Target}, check.Runs...) {
			if a := d.attempts.Get(run); a == nil || a.Job != check.Job {
				return missing("attempt", run, "check "+id)
			}
		}
	}
	return nil
}

func (d *data) checkBatches() error {
	for e := d.sealedEpoch + 1; e <= d.epoch; e++ {
		batch := d.batches.Get(e)
		if batch == nil {
			return missing("batch", strconv.FormatUint(e, 10), "the epochs so far")
		}
		for _, id := range batch.Committee {
			if d.nodes[id] == nil {
				return missing("scheduler", id, fmt.Sprintf("batch %d", e))
			}
		}
		for _, id := range batch.Attempts {
			if !batch.Drawn && d.attempts.Get(id) == nil {
				return missing("attempt", id, fmt.Sprintf("batch %d", e))
			}
		}
	}
	if uint64(d.batches.Len()) != d.epoch-min(d.sealedEpoch, d.epoch) {
		return fmt.Errorf("%d batches, and epochs %d to %d", d.batches.Len(), d.sealedEpoch+1, d.epoch)
	}
	for _, id := range d.openBatch {
		if a := d.attempts.Get(id); a.GetState() != musterpb.AttemptState_ATTEMPT_STATE_COMMITTED {
			return missing("commit", id, "the open batch")
		}
	}
	return nil
}

func readSnapshot(r io.Reader) (data, error) {
	d := newData()
	in := &recordReader{r: bufio.NewReader(r), sum: sha256.New()}
	var money *ledger.Restoring
	var last uint64 // transfer
	for {
		record, err := in.next()
		if err != nil {
			return d, err
		}
		header, isHeader := record.Record.(*musterpb.SnapshotRecord_Header)
		if isHeader != (in.count == 0) {
			return d, fmt.Errorf("record %d: a snapshot has one header, at its start", in.count)
		}
		switch v := record.Record.(type) {
		case *musterpb.SnapshotRecord_Header:
			if err = d.readHeader(header.Header); err == nil {
				money, last = ledger.Restore(header.Header.SealedTransfer), header.Header.TransferSequence
			}
		case *musterpb.SnapshotRecord_LedgerAccount:
			err = money.Account(v.LedgerAccount)
		case *musterpb.SnapshotRecord_Transfer:
			err = money.Transfer(v.Transfer)
		case *musterpb.SnapshotRecord_End:
			if err = in.checkEnd(v.End); err == nil {
				d.ledger, err = money.Finish()
			}
			if err == nil && d.ledger.Last() != last {
				err = fmt.Errorf("the newest transfer is %d, not %d", d.ledger.Last(), last)
			}
			return d, err
		default:
			err = d.take(record)
		}
		if err != nil {
			return d, err
		}
	}
}

func (d *data) readHeader(h *musterpb.SnapshotHeader) error {
	if h.Format != snapshotFormat {
		return fmt.Errorf("format %d: this version reads %d; use the version of muster that wrote it", h.Format, snapshotFormat)
	}
	d.jobSequence, d.epoch, d.sealedEpoch, d.openBatch = h.JobSequence, h.Epoch, h.SealedEpoch, h.OpenBatch
	d.cluster, d.now = h.Cluster, h.TimeUnixMs
	return nil
}

// take stores a value. Names that a million values share are those of the values
// that they name, which come first.
func (d *data) take(record *musterpb.SnapshotRecord) error {
	switch v := record.Record.(type) {
	case *musterpb.SnapshotRecord_Account:
		return once(d.accounts, v.Account.Id, v.Account)
	case *musterpb.SnapshotRecord_Key:
		return once(d.keys, string(v.Key.Hash), v.Key)
	case *musterpb.SnapshotRecord_Node:
		d.nodes[v.Node.Id] = v.Node
	case *musterpb.SnapshotRecord_Worker:
		return once(d.workers, v.Worker.Id, v.Worker)
	case *musterpb.SnapshotRecord_Job:
		return once(d.jobs, v.Job.Id, v.Job)
	case *musterpb.SnapshotRecord_Task:
		if job := d.jobs.Get(v.Task.Job); job != nil {
			v.Task.Job = job.Id
		}
		return once(d.tasks, taskKey{v.Task.Job, v.Task.Number}, v.Task)
	case *musterpb.SnapshotRecord_Attempt:
		a := v.Attempt
		if job, w := d.jobs.Get(a.Job), d.workers.Get(a.Worker); job != nil && w != nil && w.Owner == a.Owner {
			a.Job, a.Worker, a.Owner = job.Id, w.Id, w.Owner
		}
		return once(d.attempts, a.Id, a)
	case *musterpb.SnapshotRecord_Check:
		return once(d.checks, v.Check.Id, v.Check)
	case *musterpb.SnapshotRecord_Batch:
		return once(d.batches, v.Batch.Epoch, v.Batch)
	case *musterpb.SnapshotRecord_Track:
		return once(d.records, recordKey{v.Track.Owner, v.Track.Class, v.Track.Application}, v.Track)
	case *musterpb.SnapshotRecord_Segment:
		d.segments = append(d.segments, v.Segment)
	case *musterpb.SnapshotRecord_Answered:
		d.answerOrder = append(d.answerOrder, v.Answered.Command)
		return once(d.answered, v.Answered.Command, v.Answered)
	default:
		return errors.New("a record of a kind that this version does not know; upgrade muster")
	}
	return nil
}

// once stores a value under a key that has none.
func once[K comparable, V any](t *table.Map[K, V], k K, v V) error {
	before := t.Len()
	if t.Set(k, v); t.Len() == before {
		return fmt.Errorf("%v is there twice", k)
	}
	return nil
}

type recordWriter struct {
	w     *bufio.Writer
	sum   hash.Hash // of everything put so far
	count uint64
	buf   []byte
	err   error // the first; later puts do nothing
}

func (w *recordWriter) put(r *musterpb.SnapshotRecord) {
	if w.err != nil {
		return
	}
	size := r.SizeVT()
	if size > maxRecord {
		w.err = fmt.Errorf("record %d has %d bytes, at most %d can be read back", w.count, size, maxRecord)
		return
	}
	w.buf = binary.AppendUvarint(w.buf[:0], uint64(size))
	head := len(w.buf)
	w.buf = slices.Grow(w.buf, size)[:head+size]
	if _, w.err = r.MarshalToSizedBufferVT(w.buf[head:]); w.err != nil {
		return
	}
	w.sum.Write(w.buf)
	w.count++
	_, w.err = w.w.Write(w.buf)
}

type recordReader struct {
	r     *bufio.Reader
	sum   hash.Hash // of everything before the newest record
	size  []byte    // the newest record's length
	body  bytes.Buffer
	count uint64 // records before the newest
}

func (r *recordReader) next() (*musterpb.SnapshotRecord, error) {
	if len(r.size) > 0 {
		r.sum.Write(r.size)
		r.sum.Write(r.body.Bytes())
		r.count++
	}
	size, err := binary.ReadUvarint(r.r)
	if err != nil {
		return nil, fmt.Errorf("cut short after %d records: %w", r.count, err)
	}
	if size > maxRecord {
		return nil, fmt.Errorf("record %d has %d bytes, at most %d are allowed", r.count, size, maxRecord)
	}
	r.size = binary.AppendUvarint(r.size[:0], size)
	r.body.Reset()
	// The buffer grows with what is there: a damaged length costs nothing.
	if _, err := io.CopyN(&r.body, r.r, int64(size)); err != nil {
		return nil, fmt.Errorf("cut short in record %d: %w", r.count, cmp.Or(err, io.ErrUnexpectedEOF))
	}
	record := &musterpb.SnapshotRecord{}
	if err := record.UnmarshalVT(r.body.Bytes()); err != nil {
		return nil, fmt.Errorf("record %d: %w", r.count, err)
	}
	return record, nil
}

func (r *recordReader) checkEnd(end *musterpb.SnapshotEnd) error {
	if end.Records != r.count || string(end.Sha256) != string(r.sum.Sum(nil)) {
		return fmt.Errorf("damaged: %d records of %d, or their checksum is wrong", r.count, end.Records)
	}
	return nil
}
