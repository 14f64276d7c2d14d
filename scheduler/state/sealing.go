package state

import (
	"fmt"
	"iter"
	"slices"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// Sealable is finished work that could leave the state.
type Sealable struct {
	// Seal is the command that takes it out, but for the digest, the size and the
	// level of the segment.
	Seal *musterpb.Seal
	// Attempts are those of the jobs, checks included; Transfers and Batches
	// count the others that would go.
	Attempts, Transfers, Batches uint64
}

const (
	// transfersPerAttempt is how many transfers go with the attempts that a caller
	// asked for: a hold, a post and the fee, and as many again for checks.
	transfersPerAttempt = 6
	// keptBatches are the newest ones, which are never sealed.
	keptBatches = 8
)

// Sealable is the oldest finished work, with at most about so many attempts, or
// with one job that has more. Everything of a job leaves at once, and with it, or
// before it, every transfer up to the one that settled it: where many transfers
// wait, some of them go first and alone.
func (s *State) Sealable(limit int) Sealable {
	s.mu.RLock()
	defer s.mu.RUnlock()
	sealed := s.ledger.Sealed()
	seal := &musterpb.Seal{Segment: &musterpb.Segment{}, ThroughTransfer: min(s.ledger.Last(), sealed+uint64(limit)*transfersPerAttempt)}
	found := Sealable{Seal: seal}
	for _, id := range s.index.settled {
		job := s.jobs.Get(id)
		n := job.Attempts + job.Checks
		if len(seal.Jobs) > 0 && found.Attempts+n > uint64(limit) || len(seal.Jobs) == maxSealedJobs {
			break
		}
		if job.SettledTransfer > seal.ThroughTransfer {
			break // its transfers go first
		}
		seal.Jobs = append(seal.Jobs, id)
		found.Attempts += n
	}
	found.Transfers = seal.ThroughTransfer - sealed
	seal.ThroughEpoch = s.decidedEpoch(uint64(limit))
	found.Batches = seal.ThroughEpoch - s.sealedEpoch
	s.describe(seal, seal.Segment)
	if found.Transfers == 0 {
		seal.ThroughTransfer = 0
	}
	if found.Batches == 0 {
		seal.ThroughEpoch = 0
	}
	return found
}

// decidedEpoch is the newest epoch up to which every result has its verdict,
// with about so many results in between.
func (s *State) decidedEpoch(limit uint64) uint64 {
	epoch, results := s.sealedEpoch, uint64(0)
	for epoch+keptBatches < s.epoch && s.index.undecided[epoch+1] == 0 && results < limit {
		epoch++
		results += uint64(len(s.batches.Get(epoch).Attempts))
	}
	return epoch
}

// describe fills in what a segment has to say of the content of a seal.
func (s *State) describe(seal *musterpb.Seal, segment *musterpb.Segment) {
	segment.Jobs = uint64(len(seal.Jobs))
	for i, id := range seal.Jobs {
		ended := s.jobs.Get(id).EndedUnixMs
		segment.LastEndedUnixMs = max(segment.LastEndedUnixMs, ended)
		if i == 0 || ended < segment.FirstEndedUnixMs {
			segment.FirstEndedUnixMs = ended
		}
	}
	if seal.ThroughTransfer > s.ledger.Sealed() {
		segment.FirstTransfer, segment.LastTransfer = s.ledger.Sealed()+1, seal.ThroughTransfer
	}
	if seal.ThroughEpoch > s.sealedEpoch {
		segment.FirstEpoch, segment.LastEpoch = s.sealedEpoch+1, seal.ThroughEpoch
	}
}

// SealContent is what a seal would take out, as records: for each job the job,
// its tasks by number with their attempts and checks, and after the jobs the
// transfers and the batches. The lock is held for a task at a time; where
// another seal was first, records are missing, and this one would be refused.
func (s *State) SealContent(seal *musterpb.Seal) iter.Seq[*musterpb.SnapshotRecord] {
	return func(yield func(*musterpb.SnapshotRecord) bool) {
		for _, id := range seal.Jobs {
			if !s.sealJob(id, yield) {
				return
			}
		}
		s.mu.RLock()
		tail := s.ledger.Tail(0)
		s.mu.RUnlock()
		for _, t := range tail {
			if t.Id <= seal.ThroughTransfer && !yield(transferRecord(t)) {
				return
			}
		}
		for _, b := range s.Batches(0, int(seal.ThroughEpoch)) {
			if b.Epoch <= seal.ThroughEpoch && !yield(batchRecord(b)) {
				return
			}
		}
	}
}

func (s *State) sealJob(id string, yield func(*musterpb.SnapshotRecord) bool) bool {
	job := s.Job(id)
	if job == nil || !yield(jobRecord(job)) {
		return job == nil
	}
	for n := range job.NextTask {
		for _, r := range s.taskRecords(id, n) {
			if !yield(r) {
				return false
			}
		}
	}
	return true
}

// taskRecords are a task, its attempts, and their checks.
func (s *State) taskRecords(job string, number uint32) []*musterpb.SnapshotRecord {
	s.mu.RLock()
	defer s.mu.RUnlock()
	task := s.tasks.Get(taskKey{job, number})
	if task == nil || s.isDropped(job) {
		return nil
	}
	records := []*musterpb.SnapshotRecord{taskRecord(task)}
	attempts, checks := s.appendOf(nil, nil, task)
	for _, a := range attempts {
		records = append(records, attemptRecord(a))
	}
	for _, c := range checks {
		records = append(records, checkRecord(c))
	}
	return records
}

// maxSealedJobs bounds the jobs of one seal.
const maxSealedJobs = 1 << 16

// seal takes finished work out of the state. The segment was written before, so
// that nothing is lost when it goes.
func (s *State) seal(c *musterpb.Seal) (string, error) {
	if err := s.checkSeal(c); err != nil {
		return "", err
	}
	for _, id := range c.Jobs {
		s.sweeps = append(s.sweeps, sweep{job: id, tasks: s.jobs.Get(id).NextTask})
		s.dropped.Set(id, struct{}{})
		s.jobs.Delete(id)
		s.journal.add(jobChanged, id)
	}
	s.index.settled = slices.DeleteFunc(s.index.settled, func(id string) bool { return s.jobs.Get(id) == nil })
	if c.ThroughTransfer > 0 {
		must(s.ledger.Seal(c.ThroughTransfer))
	}
	for ; s.sealedEpoch < c.ThroughEpoch; s.sealedEpoch++ {
		s.batches.Delete(s.sealedEpoch + 1)
	}
	s.segments = append(s.segments, c.Segment)
	return c.Segment.Digest, nil
}

func (s *State) checkSeal(c *musterpb.Seal) error {
	if err := s.checkSegment(c.Segment); err != nil {
		return err
	}
	if len(c.Jobs) > maxSealedJobs {
		return api.Errorf(api.TooLarge, "sealing %d jobs: at most %d at a time", len(c.Jobs), maxSealedJobs)
	}
	if len(c.Jobs) == 0 && c.ThroughTransfer == 0 && c.ThroughEpoch == 0 {
		return api.Errorf(api.Invalid, "segment %s would hold nothing", c.Segment.Digest)
	}
	if t := c.ThroughTransfer; t != 0 && (t <= s.ledger.Sealed() || t > s.ledger.Last()) {
		return api.Errorf(api.Conflict, "sealing transfers up to %d: %d are sealed, the newest is %d", t, s.ledger.Sealed(), s.ledger.Last())
	}
	seen := make(map[string]struct{}, len(c.Jobs))
	for _, id := range c.Jobs {
		job := s.jobs.Get(id)
		_, twice := seen[id]
		switch {
		case job == nil || twice:
			return api.Errorf(api.Conflict, "sealing job %q: it is not known, or named twice", id)
		case !job.Settled:
			return api.Errorf(api.Conflict, "sealing job %s: it is not settled", id)
		case job.SettledTransfer > max(c.ThroughTransfer, s.ledger.Sealed()):
			return api.Errorf(api.Conflict, "sealing job %s: its transfers up to %d have to be sealed with it", id, job.SettledTransfer)
		}
		seen[id] = struct{}{}
	}
	if e := c.ThroughEpoch; e != 0 && (e <= s.sealedEpoch || e >= s.epoch) {
		return api.Errorf(api.Conflict, "sealing epochs up to %d: %d are sealed, and %d is the newest, which stays", e, s.sealedEpoch, s.epoch)
	}
	for e := s.sealedEpoch + 1; e <= c.ThroughEpoch; e++ {
		if n := s.index.undecided[e]; n > 0 {
			return api.Errorf(api.Conflict, "sealing epoch %d: %d of its results have no verdict", e, n)
		}
	}
	want := c.Segment.CloneVT()
	want.FirstEndedUnixMs, want.LastEndedUnixMs, want.FirstTransfer, want.LastTransfer, want.FirstEpoch, want.LastEpoch = 0, 0, 0, 0, 0, 0
	s.describe(c, want)
	return checkContent(c.Segment, want)
}

// checkContent wants a segment to say of its content what is right.
func checkContent(segment, want *musterpb.Segment) error {
	if segment.EqualVT(want) {
		return nil
	}
	return api.Errorf(api.Conflict, "segment %s is said to hold %s; right is %s", segment.Digest, contentOf(segment), contentOf(want))
}

// contentOf is in words what a segment says of its content. It must not be left
// to the text format of protobuf, which differs between builds on purpose.
func contentOf(o *musterpb.Segment) string {
	return fmt.Sprintf("%d jobs that ended from %d to %d, transfers %d to %d, epochs %d to %d",
		o.Jobs, o.FirstEndedUnixMs, o.LastEndedUnixMs, o.FirstTransfer, o.LastTransfer, o.FirstEpoch, o.LastEpoch)
}

// checkSegment checks what a segment says of its blob.
func (s *State) checkSegment(segment *musterpb.Segment) error {
	if _, err := api.ParseDigest(segment.GetDigest()); err != nil {
		return api.Errorf(api.Invalid, "segment: %w", err)
	}
	if segment.Bytes <= 0 {
		return api.Errorf(api.Invalid, "segment %s has %d bytes", segment.Digest, segment.Bytes)
	}
	if slices.ContainsFunc(s.segments, func(o *musterpb.Segment) bool { return o.Digest == segment.Digest }) {
		return api.Errorf(api.Conflict, "segment %s is there already", segment.Digest)
	}
	return nil
}

// mergeSegments puts one segment in the place of neighbours whose content it
// holds.
func (s *State) mergeSegments(c *musterpb.MergeSegments) (string, error) {
	if len(c.Replaced) == 0 {
		return "", api.Errorf(api.Invalid, "merging no segments")
	}
	at := slices.IndexFunc(s.segments, func(o *musterpb.Segment) bool { return o.Digest == c.Replaced[0] })
	if at < 0 || at+len(c.Replaced) > len(s.segments) {
		return "", api.Errorf(api.Conflict, "merging segments: %s and %d after it are not all there", c.Replaced[0], len(c.Replaced)-1)
	}
	replaced := s.segments[at : at+len(c.Replaced)]
	for i, o := range replaced {
		if o.Digest != c.Replaced[i] {
			return "", api.Errorf(api.Conflict, "merging segments: %s is where %s was expected", o.Digest, c.Replaced[i])
		}
	}
	if err := s.checkSegment(c.Segment); err != nil {
		return "", err
	}
	want := sumOf(replaced)
	want.Digest, want.Bytes, want.Level = c.Segment.Digest, c.Segment.Bytes, c.Segment.Level
	if err := checkContent(c.Segment, want); err != nil {
		return "", err
	}
	s.segments = slices.Concat(s.segments[:at], []*musterpb.Segment{c.Segment}, s.segments[at+len(replaced):])
	return c.Segment.Digest, nil
}

// sumOf is what one segment with the content of several says of it.
func sumOf(segments []*musterpb.Segment) *musterpb.Segment {
	sum := &musterpb.Segment{}
	first := func(a *uint64, b uint64) {
		if *a == 0 {
			*a = b
		}
	}
	for _, o := range segments {
		if o.Jobs > 0 && (sum.Jobs == 0 || o.FirstEndedUnixMs < sum.FirstEndedUnixMs) {
			sum.FirstEndedUnixMs = o.FirstEndedUnixMs
		}
		sum.Jobs += o.Jobs
		sum.LastEndedUnixMs = max(sum.LastEndedUnixMs, o.LastEndedUnixMs)
		first(&sum.FirstTransfer, o.FirstTransfer)
		first(&sum.FirstEpoch, o.FirstEpoch)
		sum.LastTransfer, sum.LastEpoch = max(sum.LastTransfer, o.LastTransfer), max(sum.LastEpoch, o.LastEpoch)
	}
	return sum
}

// sweep is what is left in the tables of a job that was sealed: tasks from next
// on, with their attempts and checks. Nobody sees it, neither readers nor
// snapshots, and it goes a little with every entry: a job of a million tasks
// would stop everything else for most of a second.
type sweep struct {
	job         string
	next, tasks uint32
}

// sweepPerEntry is how many tasks of sealed jobs go with every entry.
const sweepPerEntry = 1024

func (s *State) sweep(tasks int) {
	for ; tasks > 0 && len(s.sweeps) > 0; tasks-- {
		d := &s.sweeps[0]
		if d.next == d.tasks {
			s.dropped.Delete(d.job)
			s.sweeps = s.sweeps[1:]
			continue
		}
		s.remove(d.job, d.next)
		d.next++
	}
	if len(s.sweeps) == 0 {
		s.sweeps = nil
	}
}

// finishSweep removes what is left of a sealed job, when an ID of it is used
// again.
func (s *State) finishSweep(job string) {
	if !s.isDropped(job) {
		return
	}
	i := slices.IndexFunc(s.sweeps, func(d sweep) bool { return d.job == job })
	for n := s.sweeps[i].next; n < s.sweeps[i].tasks; n++ {
		s.remove(job, n)
	}
	s.dropped.Delete(job)
	s.sweeps = slices.Delete(s.sweeps, i, i+1)
}

// remove takes a task of a sealed job out of the tables.
func (s *State) remove(job string, number uint32) {
	key := taskKey{job, number}
	attempts, checks := s.appendOf(nil, nil, s.tasks.Get(key))
	for _, a := range attempts {
		s.attempts.Delete(a.Id)
	}
	for _, c := range checks {
		s.checks.Delete(c.Id)
	}
	s.tasks.Delete(key)
}

// isDropped reports whether what is left of a job is about to go.
func (d *data) isDropped(job string) bool {
	if d.dropped.Len() == 0 {
		return false
	}
	_, ok := d.dropped.Find(job)
	return ok
}
