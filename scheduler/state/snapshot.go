package state

import (
	"bufio"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"slices"
	"strconv"

	"github.com/musternet/muster/api/musterpb"
)

// snapshotFormat is raised when an older node could not read a snapshot.
const snapshotFormat = 1

// maxRecord bounds one record of a snapshot.
const maxRecord = 64 << 20

// Snapshot is the state at one moment. Taking it copies maps and no values, so
// that Apply waits for milliseconds; writing it happens beside Apply.
type Snapshot struct {
	data
	transfers []*musterpb.Transfer
}

// Snapshot takes a snapshot.
func (s *State) Snapshot() *Snapshot {
	s.mu.RLock()
	defer s.mu.RUnlock()
	d := s.data
	d.openBatch, d.answerOrder = slices.Clone(d.openBatch), slices.Clone(d.answerOrder)
	d.accounts, d.keys, d.nodes, d.workers = maps.Clone(d.accounts), maps.Clone(d.keys), maps.Clone(d.nodes), maps.Clone(d.workers)
	d.jobs, d.tasks, d.attempts, d.checks = maps.Clone(d.jobs), maps.Clone(d.tasks), maps.Clone(d.attempts), maps.Clone(d.checks)
	d.batches, d.records, d.answered = maps.Clone(d.batches), maps.Clone(d.records), maps.Clone(d.answered)
	d.byJob = maps.Clone(d.byJob)
	transfers, _ := s.ledger.Transfers("", 0, 1<<62)
	d.ledger = nil // what counts of it is in transfers
	return &Snapshot{data: d, transfers: transfers}
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
	}}})
	for _, k := range sortedKeys(s.accounts) {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Account{Account: s.accounts[k]}})
	}
	for _, k := range sortedKeys(s.keys) {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Key{Key: s.keys[k]}})
	}
	for _, k := range sortedKeys(s.nodes) {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Node{Node: s.nodes[k]}})
	}
	for _, k := range sortedKeys(s.workers) {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Worker{Worker: s.workers[k]}})
	}
	for _, k := range sortedKeys(s.jobs) {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Job{Job: s.jobs[k]}})
	}
	for _, k := range slices.SortedFunc(maps.Keys(s.tasks), compareTasks) {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Task{Task: s.tasks[k]}})
	}
	// Attempts in the order that they were placed in, job by job: byJob follows from it.
	for _, job := range sortedKeys(s.byJob) {
		for _, id := range s.byJob[job] {
			out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Attempt{Attempt: s.attempts[id]}})
		}
	}
	for _, k := range sortedKeys(s.checks) {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Check{Check: s.checks[k]}})
	}
	for _, k := range slices.Sorted(maps.Keys(s.batches)) {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Batch{Batch: s.batches[k]}})
	}
	for _, k := range slices.SortedFunc(maps.Keys(s.data.records), compareRecords) {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Track{Track: s.data.records[k]}})
	}
	for _, t := range s.transfers {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Transfer{Transfer: t}})
	}
	for _, id := range s.answerOrder {
		out.put(&musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_Answered{Answered: &musterpb.Answered{Command: id, Answer: s.answered[id]}}})
	}
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
	fresh := &State{data: d}
	fresh.derive()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.data = fresh.data
	close(s.changed)
	s.changed = make(chan struct{})
	return nil
}

// derive fills the indexes from the values.
func (s *State) derive() {
	for _, job := range s.jobs {
		s.setJob(job)
	}
	for _, a := range s.attempts {
		s.indexLive(a)
		if a.Check == "" {
			s.countDue(a.Job, s.owed(a.Id))
		}
	}
	for _, c := range s.checks {
		s.indexOpen(c)
	}
}

// checkReferences makes sure that what a value names is there: Apply looks
// nothing up twice.
func (d *data) checkReferences() error {
	missing := func(what, id, of string) error { return fmt.Errorf("%s %q of %s is missing", what, id, of) }
	for _, job := range d.jobs {
		if job.Spec == nil || job.Spec.Image == nil || job.Spec.Items == nil || job.Spec.Resources == nil || job.Spec.Verify == nil {
			return missing("specification", "", "job "+job.Id)
		}
	}
	for k := range d.tasks {
		if d.jobs[k.job] == nil {
			return missing("job", k.job, fmt.Sprintf("task %d", k.number))
		}
	}
	for id, a := range d.attempts {
		if d.jobs[a.Job] == nil || d.tasks[taskKey{a.Job, a.Task}] == nil {
			return missing("job or task", fmt.Sprintf("%s/%d", a.Job, a.Task), "attempt "+id)
		}
		if d.workers[a.Worker] == nil {
			return missing("worker", a.Worker, "attempt "+id)
		}
		if a.Check != "" && d.checks[a.Check] == nil {
			return missing("check", a.Check, "attempt "+id)
		}
		if a.State == musterpb.AttemptState_ATTEMPT_STATE_COMMITTED && a.Commit == nil {
			return missing("commit", "", "attempt "+id)
		}
		if live(a.State) && !d.ledger.Open(a.Hold) {
			return missing("hold", strconv.FormatUint(a.Hold, 10), "attempt "+id)
		}
	}
	for id, check := range d.checks {
		if d.jobs[check.Job] == nil {
			return missing("job", check.Job, "check "+id)
		}
		for _, run := range append([]string{check.Target}, check.Runs...) {
			if d.attempts[run] == nil {
				return missing("attempt", run, "check "+id)
			}
		}
	}
	for _, t := range d.tasks {
		for _, id := range t.Attempts {
			if d.attempts[id] == nil {
				return missing("attempt", id, fmt.Sprintf("task %s/%d", t.Job, t.Number))
			}
		}
	}
	for e := uint64(1); e <= d.epoch; e++ {
		batch := d.batches[e]
		if batch == nil {
			return missing("batch", strconv.FormatUint(e, 10), "the epochs so far")
		}
		for _, id := range batch.Committee {
			if d.nodes[id] == nil {
				return missing("scheduler", id, fmt.Sprintf("batch %d", e))
			}
		}
	}
	for _, id := range d.openBatch {
		if d.attempts[id].GetCommit() == nil {
			return missing("commit", id, "the open batch")
		}
	}
	return nil
}

func readSnapshot(r io.Reader) (data, error) {
	d := newData()
	in := &recordReader{r: bufio.NewReader(r), sum: sha256.New()}
	for {
		record, err := in.next()
		if err != nil {
			return d, err
		}
		if _, header := record.Record.(*musterpb.SnapshotRecord_Header); header != (in.count == 0) {
			return d, fmt.Errorf("record %d: a snapshot has one header, at its start", in.count)
		}
		switch v := record.Record.(type) {
		case *musterpb.SnapshotRecord_Header:
			if v.Header.Format != snapshotFormat {
				return d, fmt.Errorf("format %d: this version reads %d; upgrade muster", v.Header.Format, snapshotFormat)
			}
			d.jobSequence, d.epoch, d.openBatch = v.Header.JobSequence, v.Header.Epoch, v.Header.OpenBatch
			d.cluster, d.now = v.Header.Cluster, v.Header.TimeUnixMs
		case *musterpb.SnapshotRecord_Account:
			d.accounts[v.Account.Id] = v.Account
		case *musterpb.SnapshotRecord_Key:
			d.keys[string(v.Key.Hash)] = v.Key
		case *musterpb.SnapshotRecord_Node:
			d.nodes[v.Node.Id] = v.Node
		case *musterpb.SnapshotRecord_Worker:
			d.workers[v.Worker.Id] = v.Worker
		case *musterpb.SnapshotRecord_Job:
			d.jobs[v.Job.Id] = v.Job
		case *musterpb.SnapshotRecord_Task:
			d.tasks[taskKey{v.Task.Job, v.Task.Number}] = v.Task
		case *musterpb.SnapshotRecord_Attempt:
			d.attempts[v.Attempt.Id] = v.Attempt
			d.byJob[v.Attempt.Job] = append(d.byJob[v.Attempt.Job], v.Attempt.Id)
		case *musterpb.SnapshotRecord_Check:
			d.checks[v.Check.Id] = v.Check
		case *musterpb.SnapshotRecord_Batch:
			d.batches[v.Batch.Epoch] = v.Batch
		case *musterpb.SnapshotRecord_Track:
			d.records[recordKey{v.Track.Owner, v.Track.Class, v.Track.Application}] = v.Track
		case *musterpb.SnapshotRecord_Transfer:
			if err := d.ledger.Replay(v.Transfer); err != nil {
				return d, err
			}
		case *musterpb.SnapshotRecord_Answered:
			d.answered[v.Answered.Command] = v.Answered.Answer
			d.answerOrder = append(d.answerOrder, v.Answered.Command)
		case *musterpb.SnapshotRecord_End:
			return d, in.checkEnd(v.End)
		default:
			return d, errors.New("a record of a kind that this version does not know; upgrade muster")
		}
	}
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
	last  []byte    // the newest record, with its length
	count uint64    // records before the newest
}

func (r *recordReader) next() (*musterpb.SnapshotRecord, error) {
	if r.last != nil {
		r.sum.Write(r.last)
		r.count++
	}
	size, err := binary.ReadUvarint(r.r)
	if err != nil {
		return nil, fmt.Errorf("cut short after %d records: %w", r.count, err)
	}
	if size > maxRecord {
		return nil, fmt.Errorf("record %d has %d bytes, at most %d are allowed", r.count, size, maxRecord)
	}
	r.last = binary.AppendUvarint(nil, size)
	body, err := io.ReadAll(io.LimitReader(r.r, int64(size)))
	if err != nil || uint64(len(body)) < size {
		return nil, fmt.Errorf("cut short in record %d: %w", r.count, cmp.Or(err, io.ErrUnexpectedEOF))
	}
	r.last = append(r.last, body...)
	record := &musterpb.SnapshotRecord{}
	if err := record.UnmarshalVT(body); err != nil {
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
