package state

import (
	"slices"

	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
	"github.com/musternet/muster/verify"
)

// index is what follows from the values: it is kept up to date by every
// command, so that nothing has to be counted or searched, is no part of
// snapshots, and is rebuilt by Restore. Nobody else sees it, so that it is
// changed in place.
type index struct {
	accounts  map[string]*accountIndex
	workers   map[string]*workerIndex
	jobs      map[string]*jobIndex // those that are not settled
	wanting   map[string]struct{}  // jobs with a check that wants a run
	toCompare map[string]struct{}  // checks with results that were not compared yet
	undecided map[uint64]int       // by epoch: results of the batch whose check is open
	settled   []string             // jobs, in the order in which they settled
	running   int                  // attempts that a worker may be running
}

// accountIndex belongs to an account.
type accountIndex struct {
	money string // the name of its ledger account
	units int64  // that it has running
}

// workerIndex belongs to a worker.
type workerIndex struct {
	money   string // the name of its owner's ledger account
	class   string // of its newest attempt, which all of them can share
	use     Use
	running map[string]struct{} // attempts
	made    uint64              // the entry that made the stored worker
	told    uint64              // the entry that noted a change
}

// jobIndex belongs to a job that is not settled.
type jobIndex struct {
	account *accountIndex
	money   string               // the name of its ledger account
	due     int                  // results to come, or there, whose check has no run yet
	wanted  queue                // checks that want so many further runs
	order   *jobspec.Permutation // of its items, once something was placed
	made    uint64               // the entry that made the stored job
	told    uint64               // the entry that noted a change
}

func newIndex() index {
	return index{
		accounts: map[string]*accountIndex{}, workers: map[string]*workerIndex{}, jobs: map[string]*jobIndex{},
		wanting: map[string]struct{}{}, toCompare: map[string]struct{}{}, undecided: map[uint64]int{},
	}
}

// Use is what the live attempts of a worker use.
type Use struct {
	MilliCPUs, MemoryBytes, DiskBytes int64
	Devices                           []string // UUIDs, in no order
	Attempts                          int
}

// add counts an attempt once more, or with -1 once less.
func (u *Use) add(sign int64, r *musterpb.Resources, devices []string) {
	u.MilliCPUs += sign * r.GetMilliCpus()
	u.MemoryBytes += sign * r.GetMemoryBytes()
	u.DiskBytes += sign * r.GetDiskBytes()
	u.Attempts += int(sign)
	for _, d := range devices {
		if sign > 0 {
			u.Devices = append(u.Devices, d)
		} else if i := slices.Index(u.Devices, d); i >= 0 {
			u.Devices[i] = u.Devices[len(u.Devices)-1]
			u.Devices = u.Devices[:len(u.Devices)-1]
		}
	}
}

func (s *State) indexAccount(a *musterpb.Account) {
	s.index.accounts[a.Id] = &accountIndex{money: ledger.Of(a.Id)}
}

func (s *State) indexWorker(w *musterpb.Worker) {
	x := s.index.workers[w.Id]
	if x == nil {
		x = &workerIndex{money: s.index.accounts[w.Owner].money, running: map[string]struct{}{}}
		s.index.workers[w.Id] = x
	}
	s.tellWorker(w.Id, x)
}

func (s *State) indexJob(j *musterpb.Job) {
	x := &jobIndex{account: s.index.accounts[j.Account], money: ledger.OfJob(j.Id)}
	s.index.jobs[j.Id] = x
	s.tellJob(j.Id, x)
}

// tell notes that readers have to look again; tellWorker and tellJob do once per
// entry. While a snapshot is restored there is no entry, and nobody to tell.
func (s *State) tell(kind changeKind, id string) {
	if s.entry > 0 {
		s.journal.add(kind, id)
	}
}

func (s *State) tellWorker(id string, x *workerIndex) {
	if x.told != s.entry {
		x.told = s.entry
		s.tell(workerChanged, id)
	}
}

func (s *State) tellJob(id string, x *jobIndex) {
	if x.told != s.entry {
		x.told = s.entry
		s.tell(jobChanged, id)
	}
}

// indexAttempt follows a step of an attempt: a is what became of old, which is
// nil for a new one.
func (s *State) indexAttempt(old, a *musterpb.Attempt) {
	s.tell(attemptChanged, a.Id)
	was := old.GetState()
	if running(was) != running(a.State) {
		s.indexRunning(a, running(a.State))
	}
	if live(was) != live(a.State) {
		s.indexDue(old, a)
	}
	if is := sampled(a); is != sampled(old) {
		s.countUndecided(a.Batch, is)
	}
	if a.Check != "" && was != a.State {
		s.indexCheck(s.checks.Get(a.Check))
	}
}

// indexRunning counts what an attempt uses while a worker may be running it.
func (s *State) indexRunning(a *musterpb.Attempt, now bool) {
	sign := int64(-1)
	worker, job := s.index.workers[a.Worker], s.index.jobs[a.Job]
	if now {
		sign = 1
		worker.running[a.Id] = struct{}{}
	} else {
		delete(worker.running, a.Id)
	}
	resources := s.jobs.Get(a.Job).Spec.Resources
	worker.use.add(sign, resources, a.Devices)
	job.account.units += sign * Units(resources)
	s.index.running += int(sign)
	s.tellWorker(a.Worker, worker)
	s.tellJob(a.Job, job)
}

// sampled reports whether an attempt is a result whose check is open: one that
// was drawn and not sampled is over.
func sampled(a *musterpb.Attempt) bool {
	return a.GetBatch() != 0 && a.Check == "" && live(a.State)
}

// indexDue counts results that may yet be paid and whose check has no run; what
// changes that is an attempt whose hold opened or was closed.
func (s *State) indexDue(old, a *musterpb.Attempt) {
	change := -1
	if live(a.State) == (a.Check == "") {
		change = 1
	}
	if a.Check == "" {
		if sampled(old) && s.hasLiveRun(s.checks.Get(checkID(a.Id)), "") {
			return
		}
	} else if check := s.checks.Get(a.Check); !live(s.attempts.Get(check.Target).State) || s.hasLiveRun(check, a.Id) {
		return
	}
	s.index.jobs[a.Job].due += change
}

// hasLiveRun reports whether a run of a check, other than one, may yet be paid.
func (s *State) hasLiveRun(check *musterpb.Check, except string) bool {
	for _, id := range check.GetRuns() {
		if id != except && live(s.attempts.Get(id).State) {
			return true
		}
	}
	return false
}

func (s *State) countUndecided(epoch uint64, more bool) {
	if more {
		s.index.undecided[epoch]++
	} else if s.index.undecided[epoch]--; s.index.undecided[epoch] == 0 {
		delete(s.index.undecided, epoch)
	}
}

// indexCheck finds out what a check waits for: a comparison, or further runs.
func (s *State) indexCheck(c *musterpb.Check) {
	s.tell(checkChanged, c.Id)
	wanted, compare := 0, false
	if open(c) {
		committed, underWay := s.runsOf(c)
		if compare = len(verify.MissingPairs(c.Target, committed, c.Comparisons)) > 0; !compare {
			wanted = verify.Decide(c.Target, committed, c.Comparisons).MoreRuns - underWay
		}
	}
	if compare {
		s.index.toCompare[c.Id] = struct{}{}
	} else {
		delete(s.index.toCompare, c.Id)
	}
	x := s.index.jobs[c.Job]
	if x == nil {
		return // settled, so that the check is closed
	}
	if wanted <= 0 && x.wanted.get(c.Id) == 0 {
		return
	}
	if x.wanted.set(c.Id, max(wanted, 0)); x.wanted.len() > 0 {
		s.index.wanting[c.Job] = struct{}{}
	} else {
		delete(s.index.wanting, c.Job)
	}
	s.tellJob(c.Job, x)
}

// open reports whether a check has no verdict.
func open(c *musterpb.Check) bool {
	return c.Verdict == musterpb.Verdict_VERDICT_UNSPECIFIED || c.Verdict == musterpb.Verdict_VERDICT_AWAITING_DATA
}
