package state

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/verify"
)

// Work is what of a job could be placed now.
type Work struct {
	Job *musterpb.Job
	// Requeued are the first tasks that wait for another attempt, in that order.
	Requeued []*musterpb.Task
	// Tasks from Next on, before End, were never placed.
	Next, End uint32
	// Checks are those that want a further run.
	Checks []WantedRun
}

// maxListed bounds the requeued tasks of a Work: those behind them come up when
// they are placed. Checks are listed all, since the first may wait for ever for
// somebody who could run them, and others would wait behind.
const maxListed = 1024

// WantedRun is a check that wants another owner's run.
type WantedRun struct {
	Check *musterpb.Check
	Class string
	// Parties are the attempts that have a part in the check: the target, and
	// the runs that delivered or still may.
	Parties []*musterpb.Attempt
	// Tried are the owners whose run ended without a result. They are asked
	// again when nobody else can run it.
	Tried []string
	Runs  int
	// Unpaid says that nobody can pay for a run now, and why: proposing one
	// would be refused, again and again. Money that comes in elsewhere, as to the
	// network's fund, may change it without a change of the job.
	Unpaid string
}

// Queued lists the live jobs with work to place, in order of submission.
func (s *State) Queued() []Work {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.workOf(maps.Keys(s.index.jobs))
}

// Wanting lists those jobs with work to place of which a check wants a run, in
// order of submission.
func (s *State) Wanting() []Work {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.workOf(maps.Keys(s.index.wanting))
}

// WorkOf is what of one job could be placed now, and whether there is any.
func (s *State) WorkOf(job string) (Work, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.work(job)
}

// TasksOf is WorkOf without the checks, of which there may be many.
func (s *State) TasksOf(job string) (w Work, waits bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.taskWork(job)
}

// Wanted is what a check wants now, and whether it wants a run at all.
func (s *State) Wanted(check string) (WantedRun, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	c := s.checks.Get(check)
	if c == nil {
		return WantedRun{}, false
	}
	x := s.index.jobs[c.Job]
	if x == nil || x.wanted.get(check) <= 0 {
		return WantedRun{Check: c}, false
	}
	return s.wantedRun(c, x.wanted.get(check)), true
}

func (s *State) workOf(jobs func(func(string) bool)) (list []Work) {
	for id := range jobs {
		if w, ok := s.work(id); ok {
			list = append(list, w)
		}
	}
	slices.SortFunc(list, func(a, b Work) int { return cmp.Compare(a.Job.Sequence, b.Job.Sequence) })
	return list
}

func (s *State) work(id string) (Work, bool) {
	w, waits := s.taskWork(id)
	if x := s.index.jobs[id]; x != nil {
		for check := range x.wanted.all() {
			w.Checks = append(w.Checks, s.wantedRun(s.checks.Get(check), x.wanted.get(check)))
		}
	}
	return w, waits || len(w.Checks) > 0
}

func (s *State) taskWork(id string) (Work, bool) {
	job := s.jobs.Get(id)
	w := Work{Job: job}
	if s.index.jobs[id] != nil && !Ended(job.State) && job.State != musterpb.JobState_JOB_STATE_PAUSED {
		w.Next, w.End = job.NextTask, job.Tasks
		for _, n := range job.Requeued[:min(len(job.Requeued), maxListed)] {
			w.Requeued = append(w.Requeued, s.tasks.Get(taskKey{id, n}))
		}
	}
	return w, w.Next < w.End || len(w.Requeued) > 0
}

func (s *State) wantedRun(check *musterpb.Check, n int) WantedRun {
	target, job := s.attempts.Get(check.Target), s.jobs.Get(check.Job)
	w := WantedRun{Check: check, Class: target.Class, Parties: []*musterpb.Attempt{target}, Runs: n}
	for _, id := range check.Runs {
		if run := s.attempts.Get(id); live(run.State) {
			w.Parties = append(w.Parties, run)
		} else if !slices.Contains(w.Tried, run.Owner) {
			w.Tried = append(w.Tried, run.Owner)
		}
	}
	// A job that runs is allowed one refusal, which pauses it and says why.
	if job.State == musterpb.JobState_JOB_STATE_PAUSED || Ended(job.State) {
		if limit := attemptLimit(job.Spec); s.payerOf(check, limit) == "" {
			w.Unpaid = fmt.Sprintf("the budget does not cover another run of up to %s", limit)
		}
	}
	return w
}

// Comparable is a check with results that were not compared yet.
type Comparable struct {
	Check *musterpb.Check
	Pairs [][2]string
}

// ToCompare lists the checks that wait for a comparison, by ID.
func (s *State) ToCompare() []Comparable {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var list []Comparable
	for _, id := range sortedKeys(s.index.toCompare) {
		list = append(list, s.comparable(id))
	}
	return list
}

// ToCompareOf is one check, and whether it waits for a comparison.
func (s *State) ToCompareOf(check string) (Comparable, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if _, waits := s.index.toCompare[check]; !waits {
		return Comparable{}, false
	}
	return s.comparable(check), true
}

func (s *State) comparable(id string) Comparable {
	check := s.checks.Get(id)
	committed, _ := s.runsOf(check)
	return Comparable{check, verify.MissingPairs(check.Target, committed, check.Comparisons)}
}
