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
	if s.accounts[c.Account] == nil {
		return "", api.Errorf(api.NotFound, "account %q does not exist", c.Account)
	}
	if c.Job == "" || s.jobs[c.Job] != nil {
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
		TimeUnixMS: s.now, Debit: ledger.Of(c.Account), Credit: ledger.OfJob(c.Job), Amount: budget, Ref: c.Job, Memo: "budget of " + c.Spec.Name,
	})
	if err != nil {
		return "", api.Errorf(api.Exhausted, "budget of %s: %w; deposit money or lower price.budget", budget, err)
	}
	s.jobSequence++
	s.setJob(&musterpb.Job{
		Id: c.Job, Account: c.Account, Spec: c.Spec, State: musterpb.JobState_JOB_STATE_QUEUED, SubmittedUnixMs: s.now,
		PermutationKey: c.PermutationKey, Sequence: s.jobSequence, Items: items, Tasks: jobspec.Tasks(items, c.Spec.Chunk),
	})
	return c.Job, nil
}

func (s *State) cancelJob(c *musterpb.CancelJob) (string, error) {
	job := s.jobs[c.Job]
	switch {
	case job == nil:
		return "", api.Errorf(api.NotFound, "job %q is not known", c.Job)
	case job.State == musterpb.JobState_JOB_STATE_CANCELLED:
		return c.Job, nil
	case Ended(job.State):
		return "", api.Errorf(api.Conflict, "job %s is %s already", c.Job, StateName(job.State))
	}
	s.endJob(copyJob(job), musterpb.JobState_JOB_STATE_CANCELLED, c.Reason)
	return c.Job, nil
}

func (s *State) fundJob(c *musterpb.FundJob) (string, error) {
	job := s.jobs[c.Job]
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
	fresh := copyJob(job)
	fresh.Spec = job.Spec.CloneVT()
	fresh.Spec.BudgetMicroUsd += c.AmountMicroUsd
	s.resume(fresh)
	s.setJob(fresh)
	return c.Job, nil
}

// endJob stops a job for good: nothing new is placed, what runs is cancelled,
// and what was committed is still judged and paid before the rest of the
// budget goes back. It takes a copy of the job that it may change.
func (s *State) endJob(job *musterpb.Job, state musterpb.JobState, reason string) {
	job.State, job.Reason, job.EndedUnixMs = state, reason, s.now
	s.setJob(job)
	for _, id := range slices.Clone(s.byJob[job.Id]) {
		if a := s.attempts[id]; a.Check == "" && running(a.State) {
			s.closeAttempt(a, musterpb.AttemptState_ATTEMPT_STATE_CANCELLED, ended(state))
			s.requeue(s.task(a.Job, a.Task))
		}
	}
	s.settleJob(job.Id)
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
	job := s.jobs[id]
	if job.Settled || job.LiveAttempts > 0 || job.OpenChecks > 0 {
		return
	}
	if !Ended(job.State) && job.TasksVerified < job.Tasks {
		return
	}
	job = copyJob(job)
	if !Ended(job.State) {
		job.State, job.Reason, job.EndedUnixMs = musterpb.JobState_JOB_STATE_VERIFIED, "", s.now
	}
	job.Settled = true
	s.setJob(job)
	if rest := s.ledger.Account(ledger.OfJob(id)).Available(); rest > 0 {
		// Nothing is held of the job's account any more, so this can't be refused.
		must(s.ledger.Move(ledger.Entry{
			TimeUnixMS: s.now, Debit: ledger.OfJob(id), Credit: ledger.Of(job.Account), Amount: rest, Ref: id, Memo: "unused budget",
		}))
	}
}

// setJob stores a job and keeps the index of live ones.
func (s *State) setJob(job *musterpb.Job) {
	s.jobs[job.Id] = job
	if job.Settled {
		delete(s.liveJobs, job.Id)
	} else {
		s.liveJobs[job.Id] = struct{}{}
	}
}

// copyJob is a copy of a job that may be changed, except for its specification
// and its key: those can have megabytes, and every step of an attempt changes
// the job's counters.
func copyJob(j *musterpb.Job) *musterpb.Job {
	return &musterpb.Job{
		Id: j.Id, Account: j.Account, Spec: j.Spec, State: j.State, Reason: j.Reason,
		SubmittedUnixMs: j.SubmittedUnixMs, EndedUnixMs: j.EndedUnixMs, PermutationKey: j.PermutationKey, Sequence: j.Sequence,
		Items: j.Items, Tasks: j.Tasks, NextTask: j.NextTask, Requeued: slices.Clone(j.Requeued), TasksVerified: j.TasksVerified,
		ItemsCommitted: j.ItemsCommitted, ItemsVerified: j.ItemsVerified, Attempts: j.Attempts, Checks: j.Checks,
		CheckedItems: j.CheckedItems, Caught: j.Caught, SpentMicroUsd: j.SpentMicroUsd, LiveAttempts: j.LiveAttempts,
		OpenChecks: j.OpenChecks, Settled: j.Settled,
	}
}

func (s *State) changeJob(id string, change func(*musterpb.Job)) {
	job := copyJob(s.jobs[id])
	change(job)
	s.setJob(job)
}

// resume lets a paused job try again after money came free.
func (s *State) resume(job *musterpb.Job) {
	if job.State == musterpb.JobState_JOB_STATE_PAUSED {
		job.State, job.Reason = musterpb.JobState_JOB_STATE_RUNNING, ""
	}
}

// task is a copy of a task that may be changed and stored; one that was never
// placed is made here.
func (s *State) task(job string, number uint32) *musterpb.Task {
	if t := s.tasks[taskKey{job, number}]; t != nil {
		return t.CloneVT()
	}
	return &musterpb.Task{Job: job, Number: number, State: musterpb.TaskState_TASK_STATE_QUEUED}
}

func (s *State) setTask(t *musterpb.Task) { s.tasks[taskKey{t.Job, t.Number}] = t }

// requeue makes a task wait for another attempt. That of a job that has ended
// waits for ever, and is not listed.
func (s *State) requeue(t *musterpb.Task) {
	t.State, t.Result = musterpb.TaskState_TASK_STATE_QUEUED, ""
	s.setTask(t)
	if Ended(s.jobs[t.Job].State) {
		return
	}
	s.changeJob(t.Job, func(job *musterpb.Job) {
		if !slices.Contains(job.Requeued, t.Number) {
			job.Requeued = append(job.Requeued, t.Number)
		}
	})
}

// ItemsOf are the indexes of the items that an attempt works on, ascending.
func (s *State) itemsOf(a *musterpb.Attempt) []uint64 {
	if len(a.Items) > 0 {
		return a.Items
	}
	job := s.jobs[a.Job]
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
