package state

import (
	"slices"
	"strings"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
)

func (s *State) submitJob(c *musterpb.SubmitJob) (string, error) {
	account := s.index.accounts[c.Account]
	if account == nil {
		return "", api.Errorf(api.NotFound, "account %q does not exist", c.Account)
	}
	if c.Job == "" || s.jobs.Get(c.Job) != nil {
		return "", api.Errorf(api.Conflict, "job ID %q is in use", c.Job)
	}
	if err := jobspec.Validate(c.Spec); err != nil {
		return "", err
	}
	if len(c.PermutationKey) < 16 {
		return "", api.Errorf(api.Invalid, "job %s: permutation key of %d bytes, want at least 16", c.Job, len(c.PermutationKey))
	}
	items, err := jobspec.Count(c.Spec.Items)
	if err != nil {
		return "", err
	}
	budget := api.MicroUSD(c.Spec.BudgetMicroUsd)
	if err := CheckBudget(c.Spec); err != nil {
		return "", err
	}
	err = s.ledger.Move(ledger.Entry{
		TimeUnixMS: s.now, Debit: account.money, Credit: ledger.OfJob(c.Job), Amount: budget, Ref: c.Job, Memo: "budget of " + c.Spec.Name,
	})
	if err != nil {
		return "", api.Errorf(api.Exhausted, "budget of %s: %w; deposit money or lower price.budget", budget, err)
	}
	s.finishSweep(c.Job)
	s.jobSequence++
	job := &musterpb.Job{
		Id: c.Job, Account: c.Account, Spec: c.Spec, State: musterpb.JobState_JOB_STATE_QUEUED, SubmittedUnixMs: s.now,
		PermutationKey: c.PermutationKey, Sequence: s.jobSequence, Items: items, Tasks: jobspec.Tasks(items, c.Spec.Chunk),
	}
	s.jobs.Set(job.Id, job)
	s.indexJob(job)
	return c.Job, nil
}

func (s *State) cancelJob(c *musterpb.CancelJob) (string, error) {
	job := s.jobs.Get(c.Job)
	switch {
	case job == nil:
		return "", api.Errorf(api.NotFound, "job %q is not known", c.Job)
	case job.State == musterpb.JobState_JOB_STATE_CANCELLED:
		return c.Job, nil
	case Ended(job.State):
		return "", api.Errorf(api.Conflict, "job %s is %s already", c.Job, StateName(job.State))
	}
	s.endJob(c.Job, musterpb.JobState_JOB_STATE_CANCELLED, c.Reason)
	return c.Job, nil
}

func (s *State) fundJob(c *musterpb.FundJob) (string, error) {
	job := s.jobs.Get(c.Job)
	switch {
	case job == nil:
		return "", api.Errorf(api.NotFound, "job %q is not known", c.Job)
	case Ended(job.State):
		return "", api.Errorf(api.Conflict, "job %s is %s already", c.Job, StateName(job.State))
	}
	err := s.ledger.Move(ledger.Entry{
		TimeUnixMS: s.now, Debit: ledger.Of(job.Account), Credit: ledger.OfJob(c.Job), Amount: api.MicroUSD(c.AmountMicroUsd),
		Ref: c.Job, Memo: "more budget for " + job.Spec.Name,
	})
	if err != nil {
		return "", err
	}
	job = s.editJob(c.Job)
	job.Spec = job.Spec.CloneVT()
	job.Spec.BudgetMicroUsd += c.AmountMicroUsd
	resume(job)
	return c.Job, nil
}

// endJob stops a job for good: nothing new is placed, what runs is cancelled,
// and what was committed is still judged and paid before the rest of the
// budget goes back.
func (s *State) endJob(id string, state musterpb.JobState, reason string) {
	job := s.editJob(id)
	job.State, job.Reason, job.EndedUnixMs = state, reason, s.now
	for n := range job.NextTask {
		task := s.tasks.Get(taskKey{id, n})
		if task.State != musterpb.TaskState_TASK_STATE_RUNNING {
			continue
		}
		for _, attempt := range task.Attempts {
			if a := s.attempts.Get(attempt); running(a.State) {
				s.closeAttempt(a, musterpb.AttemptState_ATTEMPT_STATE_CANCELLED, ended(state))
			}
		}
		s.requeue(copyTask(task))
	}
	s.settleJob(id)
}

// ended says in words how a job ended.
func ended(state musterpb.JobState) string {
	if state == musterpb.JobState_JOB_STATE_FAILED {
		return "the job failed"
	}
	return "the job was " + StateName(state)
}

// settleJob ends a job whose last attempt and check are over, and returns what
// is left of its budget.
func (s *State) settleJob(id string) {
	job := s.jobs.Get(id)
	if job.Settled || job.LiveAttempts > 0 || job.OpenChecks > 0 {
		return
	}
	if !Ended(job.State) && job.TasksVerified < job.Tasks {
		return
	}
	job = s.editJob(id)
	if !Ended(job.State) {
		job.State, job.Reason, job.EndedUnixMs = musterpb.JobState_JOB_STATE_VERIFIED, "", s.now
	}
	job.Settled = true
	x := s.index.jobs[id]
	if rest := s.ledger.Account(x.money).Available(); rest > 0 {
		// Nothing is held of the job's account any more, so this can't be refused.
		must(s.ledger.Move(ledger.Entry{
			TimeUnixMS: s.now, Debit: x.money, Credit: x.account.money, Amount: rest, Ref: id, Memo: "unused budget",
		}))
	}
	job.SettledTransfer = s.ledger.Last()
	delete(s.index.jobs, id)
	s.index.settled = append(s.index.settled, id)
}

// editJob is a stored job that may be changed until the next entry. Who got it
// before may find it changed, or not.
func (s *State) editJob(id string) *musterpb.Job {
	job, x := s.jobs.Get(id), s.index.jobs[id]
	if x.made != s.entry {
		job = copyJob(job)
		s.jobs.Set(id, job)
		x.made = s.entry
		s.tellJob(id, x)
	}
	return job
}

// resume lets a paused job try again after money came free.
func resume(job *musterpb.Job) {
	if job.State == musterpb.JobState_JOB_STATE_PAUSED {
		job.State, job.Reason = musterpb.JobState_JOB_STATE_RUNNING, ""
	}
}

// task is a copy of a task that may be changed and stored.
func (s *State) task(job string, number uint32) *musterpb.Task {
	return copyTask(s.tasks.Get(taskKey{job, number}))
}

// newTask is the task of its first attempt, in one piece.
func newTask(a *musterpb.Attempt) *musterpb.Task {
	t := &struct {
		musterpb.Task
		first [1]string
	}{first: [1]string{a.Id}}
	t.Job, t.Number, t.Attempts = a.Job, a.Task, t.first[:]
	return &t.Task
}

func (s *State) setTask(t *musterpb.Task) { s.tasks.Set(taskKey{t.Job, t.Number}, t) }

// requeue makes a task wait for another attempt. That of a job that has ended
// waits for ever, and is not listed.
func (s *State) requeue(t *musterpb.Task) {
	waits := t.State == musterpb.TaskState_TASK_STATE_QUEUED
	t.State, t.Result = musterpb.TaskState_TASK_STATE_QUEUED, ""
	s.setTask(t)
	if !waits && !Ended(s.jobs.Get(t.Job).State) {
		job := s.editJob(t.Job)
		job.Requeued = append(job.Requeued, t.Number)
	}
}

// unqueue takes a task out of those that wait again, at its place there.
func unqueue(job *musterpb.Job, at int) {
	if at == 0 {
		job.Requeued = job.Requeued[1:]
		return
	}
	job.Requeued = slices.Concat(job.Requeued[:at], job.Requeued[at+1:])
}

// itemsOf are the indexes of the items that an attempt works on, ascending.
func (s *State) itemsOf(a *musterpb.Attempt) []uint64 {
	if len(a.Items) > 0 {
		return a.Items
	}
	job := s.jobs.Get(a.Job)
	if x := s.index.jobs[a.Job]; x != nil && x.order != nil {
		return x.order.AppendTaskItems(nil, job.Spec.Chunk, a.Task)
	}
	return jobspec.TaskItems(job.Spec, job.PermutationKey, a.Task)
}

// countItems is how many items a task has, without walking the permutation.
func countItems(job *musterpb.Job, task uint32) uint64 {
	first := uint64(task) * uint64(job.Spec.Chunk)
	return min(uint64(job.Spec.Chunk), job.Items-min(first, job.Items))
}

// Application names what a record is kept for: an image repository, or the
// account's own program where there is no repository. It is not a digest, so
// that a record outlives a new build. Checks by the same owner prove something
// to the account that allowed them and to nobody else, so they count for an
// application of its own.
func Application(job *musterpb.Job) string {
	image := job.Spec.Image
	name := image.Name
	if image.Kind == musterpb.ImageKind_IMAGE_KIND_REGISTRY {
		name, _, _ = strings.Cut(image.Ref, "@")
		if !job.Spec.Verify.SameOwner {
			return name
		}
	}
	return job.Account + "/" + name
}

// Ended reports whether a job places nothing any more.
func Ended(s musterpb.JobState) bool {
	switch s {
	case musterpb.JobState_JOB_STATE_VERIFIED, musterpb.JobState_JOB_STATE_FAILED, musterpb.JobState_JOB_STATE_CANCELLED:
		return true
	}
	return false
}

// StateName is a state in the words of the command line: "verified".
func StateName(s interface{ String() string }) string {
	name := s.String()
	return strings.ToLower(name[strings.LastIndex(name, "STATE_")+len("STATE_"):])
}

// must is for what was checked before; a failure is a defect that has to stop
// the node before it diverges.
func must(err error) {
	if err != nil {
		panic("muster: broken invariant: " + err.Error())
	}
}
