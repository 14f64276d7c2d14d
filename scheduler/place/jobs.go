package place

import (
	"slices"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// SetJob says what could be placed of a job now: it replaces what was known and
// what Plan booked of it. A job without any is removed. The engine changes
// nothing of w.
func (e *Engine) SetJob(w state.Work) {
	if len(w.Requeued) == 0 && w.Next >= w.End && len(w.Checks) == 0 {
		e.RemoveJob(w.Job.Id)
		return
	}
	j := e.jobOf(w.Job)
	listed := make(map[string]struct{}, len(w.Checks))
	for i := range w.Checks {
		listed[w.Checks[i].Check.Id] = struct{}{}
	}
	for id, r := range j.checks { // one does not depend on another
		if _, ok := listed[id]; !ok {
			e.dequeue(r)
			delete(j.checks, id)
		}
	}
	after := 0
	for _, run := range w.Checks {
		after = e.setCheck(j, run, after)
	}
	e.setTasks(j, w)
}

// SetTasks is SetJob for a change of the tasks alone: what checks want is told
// by SetCheck and RemoveCheck. It changes nothing and reports false where that
// does not do, as the job is not known or was, or is, paused or over: then the
// checks may be affected too.
func (e *Engine) SetTasks(w state.Work) bool {
	j := e.jobs[w.Job.Id]
	if j == nil || halted(j.Job) != halted(w.Job) || j.Spec != w.Job.Spec {
		return false
	}
	if e.setTasks(j, w); len(j.checks) == 0 && !j.hasTasks() {
		e.RemoveJob(j.Id)
	}
	return true
}

// halted reports whether no tasks of a job are placed.
func halted(job *musterpb.Job) bool {
	return state.Ended(job.State) || job.State == musterpb.JobState_JOB_STATE_PAUSED
}

// SetCheck says what a check wants now, as SetJob does for all checks of a job.
func (e *Engine) SetCheck(job *musterpb.Job, run state.WantedRun) {
	e.setCheck(e.jobOf(job), run, 0)
}

// RemoveCheck forgets a check that wants nothing.
func (e *Engine) RemoveCheck(job, check string) {
	j := e.jobs[job]
	if j == nil || j.checks[check] == nil {
		return
	}
	e.dequeue(j.checks[check])
	if delete(j.checks, check); len(j.checks) == 0 && !j.hasTasks() && len(j.passed) == 0 {
		e.RemoveJob(job)
	}
}

// jobOf is the entry of a job, made where there is none for its specification:
// a change of the budget makes a new one.
func (e *Engine) jobOf(job *musterpb.Job) *queuedJob {
	if j := e.jobs[job.Id]; j != nil {
		if j.Spec == job.Spec {
			return j
		}
		e.RemoveJob(j.Id)
	}
	return e.addJob(job)
}

func (e *Engine) setTasks(j *queuedJob, w state.Work) {
	j.Job = w.Job
	if c := j.counts; c != nil {
		for _, s := range c.decided {
			e.spread(c, s, -1)
		}
		c.decided = c.decided[:0]
	}
	j.requeued, j.passed, j.next, j.end = w.Requeued, nil, w.Next, w.End
	switch queued := j.tasks.lane != nil; {
	case j.hasTasks() && !queued:
		e.enqueue(j.tasks)
	case !j.hasTasks() && queued:
		e.dequeue(j.tasks)
	}
}

func (e *Engine) addJob(of *musterpb.Job) *queuedJob {
	j := &queuedJob{Job: of, digests: cacheable(of.Spec)}
	j.tasks = &request{job: j}
	key := shapeKey(j.Spec)
	s := e.shapes[key]
	if s == nil {
		s = newShape(key, j.Spec)
		e.shapes[key], e.byAge = s, append(e.byAge, s)
	}
	s.jobs++
	j.shape, j.account = s, e.account(j.Account)
	j.account.jobs++
	j.orderKey = orderKey(of, j.digests)
	if spreads(of) {
		j.counts = e.countsOf(of)
	}
	e.jobs[j.Id] = j
	return j
}

// setCheck says what a check wants, with an index above another, and returns
// its index. It keeps that where it can.
func (e *Engine) setCheck(j *queuedJob, run state.WantedRun, after int) int {
	old := j.checks[run.Check.Id]
	keeps := old != nil && old.index > after
	if keeps && sameRun(old.run, &run) {
		*old.run = run
		return old.index
	}
	r := &request{job: j, run: &run, parties: partiesOf(j.shape, &run)}
	if old != nil {
		e.dequeue(old)
	}
	if keeps {
		r.index = old.index
	} else {
		j.lastIndex++
		r.index = j.lastIndex
	}
	if j.checks == nil {
		j.checks = map[string]*request{}
	}
	if j.checks[run.Check.Id] = r; run.Unpaid == "" && run.Runs > 0 {
		e.enqueue(r)
	}
	return r.index
}

// sameRun reports whether what a check wants has not changed. A check that is
// the same value has the same parties, and as many as Plan did not book more.
func sameRun(a, b *state.WantedRun) bool {
	return a.Runs == b.Runs && a.Unpaid == b.Unpaid && len(a.Parties) == len(b.Parties) && len(a.Tried) == len(b.Tried) &&
		(a.Check == b.Check || a.Check.Id == b.Check.Id && a.Class == b.Class && slices.Equal(a.Tried, b.Tried) &&
			slices.EqualFunc(a.Parties, b.Parties, func(a, b *musterpb.Attempt) bool { return a.Worker == b.Worker && a.Batch == b.Batch }))
}

// RemoveJob forgets what could be placed of a job.
func (e *Engine) RemoveJob(id string) {
	j := e.jobs[id]
	if j == nil {
		return
	}
	e.dequeue(j.tasks)
	for _, r := range j.checks {
		e.dequeue(r)
	}
	j.shape.jobs--
	j.account.jobs--
	delete(e.jobs, id)
	e.dropAccount(j.account)
	e.dropCounts(id)
}

func (e *Engine) account(name string) *account {
	a := e.accounts[name]
	if a == nil {
		a = newAccount(name)
		e.accounts[name] = a
	}
	return a
}

func (e *Engine) dropAccount(a *account) {
	if a.jobs == 0 && a.units == 0 {
		delete(e.accounts, a.name)
	}
}

// SetUsage says how much an account has running, in units of attempts (see
// state.Units). Plan adds to it what it decides.
func (e *Engine) SetUsage(account string, units int64) {
	a := e.accounts[account]
	if a == nil && units == 0 {
		return
	}
	a = e.account(account)
	a.units = units
	if a.pos >= 0 {
		e.turns.fix(a.pos)
	}
	e.dropAccount(a)
}

// SetAttempt says how an attempt is now. Only those of jobs that spread are
// counted; a call for another is free. It comes before SetTasks or SetJob, which
// forget what Plan decided and no attempt was told of.
func (e *Engine) SetAttempt(job *musterpb.Job, a *musterpb.Attempt) {
	if !spreads(job) {
		return
	}
	c := e.countsOf(job)
	_, known := c.live[a.Id]
	running := a.State == musterpb.AttemptState_ATTEMPT_STATE_PLACED || a.State == musterpb.AttemptState_ATTEMPT_STATE_RUNNING
	switch at := (spot{a.Worker, a.Owner}); {
	case running && !known:
		if c.live[a.Id] = at; !c.isDecided(at) {
			e.spread(c, at, 1)
		}
	case !running && known:
		delete(c.live, a.Id)
		e.spread(c, at, -1)
	}
	e.dropCounts(job.Id)
}

func spreads(job *musterpb.Job) bool {
	return job.Spec.Placement.GetSpread() != musterpb.Spread_SPREAD_NONE
}

func (e *Engine) countsOf(job *musterpb.Job) *counts {
	c := e.counts[job.Id]
	if c == nil {
		c = newCounts(job.Spec.Placement.Spread)
		e.counts[job.Id] = c
	}
	return c
}

func (e *Engine) dropCounts(job string) {
	if c := e.counts[job]; c != nil && e.jobs[job] == nil && len(c.live) == 0 {
		if c.order != nil {
			c.order.drop()
		}
		delete(e.counts, job)
	}
}

// ForgetJob forgets a job that is gone, with the attempts of it whose end nobody
// told of.
func (e *Engine) ForgetJob(id string) {
	e.RemoveJob(id)
	if c := e.counts[id]; c != nil {
		clear(c.live)
		e.dropCounts(id)
	}
}
