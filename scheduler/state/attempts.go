package state

import (
	"fmt"
	"math/bits"
	"slices"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
	"github.com/musternet/muster/verify"
)

const hourMS = 3_600_000

// live reports whether the attempt's hold is open: it may yet be paid.
func live(s musterpb.AttemptState) bool {
	return running(s) || s == musterpb.AttemptState_ATTEMPT_STATE_COMMITTED
}

// running reports whether a worker may be busy with the attempt.
func running(s musterpb.AttemptState) bool {
	return s == musterpb.AttemptState_ATTEMPT_STATE_PLACED || s == musterpb.AttemptState_ATTEMPT_STATE_RUNNING
}

// maxMoney is what a product that no account can pay counts as: comparisons
// with it come out right, and sums of a few stay far from overflow.
const maxMoney api.MicroUSD = 1 << 60

// Cost is the price of some time, rounded up to a micro-dollar.
func Cost(perHour api.MicroUSD, ms int64) api.MicroUSD {
	hi, lo := bits.Mul64(uint64(max(perHour, 0)), uint64(max(ms, 0)))
	lo, carry := bits.Add64(lo, hourMS-1, 0)
	if hi += carry; hi >= hourMS {
		return maxMoney // the quotient has more than 64 bits
	}
	q, _ := bits.Div64(hi, lo, hourMS)
	return api.MicroUSD(min(q, uint64(maxMoney)))
}

// times is amount·n for amounts that are not negative.
func times(amount api.MicroUSD, n uint64) api.MicroUSD {
	hi, lo := bits.Mul64(uint64(amount), n)
	if hi > 0 || lo > uint64(maxMoney) {
		return maxMoney
	}
	return api.MicroUSD(lo)
}

// fee is the network's share of an amount, rounded down.
func fee(amount api.MicroUSD) api.MicroUSD {
	return amount/1_000_000*FeePPM + amount%1_000_000*FeePPM/1_000_000
}

// Units is how many times the hourly price an attempt costs: one per GPU, and
// one for a job without GPUs.
func Units(r *musterpb.Resources) int64 { return max(int64(r.GetGpus()), 1) }

func (s *State) placeAttempt(c *musterpb.PlaceAttempt) (string, error) {
	job, worker := s.jobs.Get(c.Job), s.workers.Get(c.Worker)
	switch {
	case c.Attempt == "" || s.attempt(c.Attempt) != nil:
		return "", api.Errorf(api.Conflict, "attempt ID %q is in use", c.Attempt)
	case job == nil:
		return "", api.Errorf(api.NotFound, "job %q is not known", c.Job)
	case worker == nil:
		return "", api.Errorf(api.NotFound, "worker %q is not known", c.Worker)
	case worker.Draining:
		return "", api.Errorf(api.Conflict, "worker %s is draining", c.Worker)
	case worker.PriceMicroUsdPerHour > job.Spec.MaxPriceMicroUsdPerHour:
		return "", api.Errorf(api.Conflict, "worker %s asks %s per hour, the job pays %s", c.Worker,
			api.MicroUSD(worker.PriceMicroUsdPerHour), api.MicroUSD(job.Spec.MaxPriceMicroUsdPerHour))
	case uint32(len(c.Devices)) != job.Spec.Resources.GetGpus():
		return "", api.Errorf(api.Invalid, "attempt %s has %d devices, the job needs %d", c.Attempt, len(c.Devices), job.Spec.Resources.GetGpus())
	}
	for _, d := range c.Devices {
		if !slices.ContainsFunc(worker.Capacity.Devices, func(have *musterpb.Device) bool { return have.Uuid == d }) {
			return "", api.Errorf(api.Conflict, "worker %s has no device %s (any more)", c.Worker, d)
		}
	}
	if old := s.attempts.Get(c.Attempt); old != nil {
		s.finishSweep(old.Job)
	}
	x := s.index.workers[c.Worker]
	if busy := x.use.busyDevice(c.Devices); busy != "" {
		return "", api.Errorf(api.Conflict, "device %s of worker %s is in use", busy, c.Worker)
	}
	if x.class != c.Class {
		x.class = c.Class
	}
	// Names are those of the stored values: a million attempts share them.
	a := &musterpb.Attempt{
		Id: c.Attempt, Job: job.Id, Task: c.Task, Check: c.Check, Worker: worker.Id, Owner: worker.Owner, Class: x.class, Devices: c.Devices,
		State:                musterpb.AttemptState_ATTEMPT_STATE_PLACED,
		PriceMicroUsdPerHour: worker.PriceMicroUsdPerHour * Units(job.Spec.Resources), PlacedUnixMs: s.now,
	}
	a.HoldMicroUsd = int64(max(Cost(api.MicroUSD(a.PriceMicroUsdPerHour), job.Spec.TimeoutMs), 1))
	if c.Check != "" {
		return c.Attempt, s.placeCheckRun(c, a)
	}
	return c.Attempt, s.placeWork(job, a)
}

func (s *State) placeWork(job *musterpb.Job, a *musterpb.Attempt) error {
	if Ended(job.State) || job.State == musterpb.JobState_JOB_STATE_PAUSED {
		return api.Errorf(api.Conflict, "job %s is %s", job.Id, StateName(job.State))
	}
	at := slices.Index(job.Requeued, a.Task)
	if at < 0 && (a.Task != job.NextTask || a.Task >= job.Tasks) {
		return api.Errorf(api.Conflict, "task %d of job %s is not queued", a.Task, job.Id)
	}
	x := s.index.jobs[job.Id]
	if err := s.affords(x, job, a); err != nil {
		s.pause(job.Id, err.Error())
		return err
	}
	must(s.hold(a, x.money))
	if x.order == nil { // every step from here on wants the attempt's items
		x.order = jobspec.OrderOf(job.Spec, job.PermutationKey)
	}
	job = s.editJob(a.Job)
	if at >= 0 {
		unqueue(job, at)
	} else {
		job.NextTask++
	}
	job.State = musterpb.JobState_JOB_STATE_RUNNING
	job.Attempts++
	job.LiveAttempts++
	var task *musterpb.Task
	if at >= 0 {
		task = s.task(a.Job, a.Task)
		task.Attempts = append(task.Attempts, a.Id)
	} else {
		task = newTask(a)
	}
	task.State = musterpb.TaskState_TASK_STATE_RUNNING
	s.setTask(task)
	s.setAttempt(nil, a)
	return nil
}

// affords checks that the budget covers an attempt and, for it and for every
// other result whose check is still to come, one check at the job's own price
// limit. Without that reserve a job could spend everything on results that it
// then can't have judged.
func (s *State) affords(x *jobIndex, job *musterpb.Job, a *musterpb.Attempt) error {
	need := api.MicroUSD(a.HoldMicroUsd) + times(attemptLimit(job.Spec), uint64(x.due)+1)
	if free := s.ledger.Account(x.money).Available(); free < need {
		return api.Errorf(api.Exhausted, "%s of the budget is free, and another attempt with the checks that are due may cost up to %s; wait, or add to the budget with: muster job fund %s AMOUNT",
			free, need, job.Id)
	}
	return nil
}

// attemptLimit is the most that one attempt of a job can cost.
func attemptLimit(spec *musterpb.JobSpec) api.MicroUSD {
	return max(Cost(times(api.MicroUSD(spec.MaxPriceMicroUsdPerHour), uint64(Units(spec.Resources))), spec.TimeoutMs), 1)
}

// LeastBudget is the least with which a job can do anything: one attempt, and
// its check.
func LeastBudget(spec *musterpb.JobSpec) api.MicroUSD { return 2 * attemptLimit(spec) }

// CheckBudget refuses a job that could do nothing with its budget.
func CheckBudget(spec *musterpb.JobSpec) error {
	if budget, least := api.MicroUSD(spec.BudgetMicroUsd), LeastBudget(spec); budget < least {
		return api.Errorf(api.Invalid, "price.budget %s: one attempt and its check may cost %s (timeout × max_per_gpu_hour × GPUs, twice); raise the budget or lower the timeout", budget, least)
	}
	return nil
}

func (s *State) pause(id, reason string) {
	if Ended(s.jobs.Get(id).State) {
		return
	}
	job := s.editJob(id)
	job.State, job.Reason = musterpb.JobState_JOB_STATE_PAUSED, reason
}

func (s *State) startAttempt(c *musterpb.StartAttempt) (string, error) {
	a := s.attempt(c.Attempt)
	if a == nil {
		return "", unknownAttempt(c.Attempt)
	}
	if a.State != musterpb.AttemptState_ATTEMPT_STATE_PLACED {
		return "", api.Errorf(api.Conflict, "attempt %s is %s", a.Id, StateName(a.State))
	}
	fresh := copyAttempt(a)
	fresh.State, fresh.StartedUnixMs = musterpb.AttemptState_ATTEMPT_STATE_RUNNING, s.now
	if c.ReceivedUnixMs > 0 {
		fresh.StartedUnixMs = min(s.now, max(c.ReceivedUnixMs, a.PlacedUnixMs))
	}
	s.setAttempt(a, fresh)
	return a.Id, nil
}

// commitResult binds a worker to its outputs. The signature and the outputs
// themselves were examined before the command was proposed.
func (s *State) commitResult(c *musterpb.CommitResult) (string, error) {
	a := s.attempt(c.Commit.GetAttempt())
	if a == nil {
		return "", unknownAttempt(c.Commit.GetAttempt())
	}
	if verify.SameResult(a.Commit, c.Commit) {
		return a.Id, nil // the worker did not hear the first answer
	}
	late := a.State == musterpb.AttemptState_ATTEMPT_STATE_LOST
	if !late && !running(a.State) {
		return "", api.Errorf(api.Conflict, "attempt %s is over: it is %s%s", a.Id, StateName(a.State), because(a.Reason))
	}
	fresh := copyAttempt(a)
	if late {
		if err := s.reviveLost(fresh); err != nil {
			return "", err
		}
	}
	fresh.State, fresh.CommittedUnixMs, fresh.Commit, fresh.LogDigest = musterpb.AttemptState_ATTEMPT_STATE_COMMITTED, s.now, c.Commit, c.Commit.LogDigest
	fresh.Stored = c.Stored
	fresh.Reason = ""
	// Waiting for the scheduler to examine a result is not the customer's to pay.
	if c.ReceivedUnixMs > 0 {
		fresh.CommittedUnixMs = min(s.now, max(c.ReceivedUnixMs, fresh.PlacedUnixMs, fresh.StartedUnixMs))
	}
	if fresh.StartedUnixMs == 0 {
		fresh.StartedUnixMs = fresh.PlacedUnixMs
	}
	s.setAttempt(a, fresh)
	if fresh.Check != "" {
		return a.Id, nil // the leader compares next
	}
	task := s.task(a.Job, a.Task)
	queued := task.State == musterpb.TaskState_TASK_STATE_QUEUED
	task.State, task.Result = musterpb.TaskState_TASK_STATE_PROVISIONAL, a.Id
	s.setTask(task)
	job := s.editJob(a.Job)
	job.ItemsCommitted += countItems(job, a.Task)
	if queued {
		unqueue(job, slices.Index(job.Requeued, a.Task))
	}
	s.openBatch = append(s.openBatch, a.Id)
	return a.Id, nil
}

// reviveLost lets the late result of a lost attempt count where none came
// first. It ends the attempt that took its place, and holds the price again.
func (s *State) reviveLost(a *musterpb.Attempt) error {
	job, x := s.jobs.Get(a.Job), s.index.jobs[a.Job]
	if a.Check != "" {
		return api.Errorf(api.Conflict, "attempt %s was lost (%s); another took its place", a.Id, a.Reason)
	}
	if Ended(job.State) {
		return api.Errorf(api.Conflict, "attempt %s comes too late: the job is %s", a.Id, StateName(job.State))
	}
	task := s.tasks.Get(taskKey{a.Job, a.Task})
	if task.Result != "" {
		return api.Errorf(api.Conflict, "attempt %s comes too late: attempt %s of its task was committed first", a.Id, task.Result)
	}
	// The late result needs what any attempt needs, and gets what its
	// replacement, of which there is one at most, has held and had in reserve.
	free, due := s.ledger.Account(x.money).Available(), x.due
	var replacement *musterpb.Attempt
	for _, id := range task.Attempts {
		if o := s.attempts.Get(id); running(o.State) {
			replacement, free, due = o, free+api.MicroUSD(o.HoldMicroUsd), due-1
		}
	}
	if free < api.MicroUSD(a.HoldMicroUsd)+times(attemptLimit(job.Spec), uint64(due)+1) {
		return api.Errorf(api.Exhausted, "attempt %s comes too late: other tasks use the budget of job %s by now", a.Id, a.Job)
	}
	if replacement != nil {
		s.closeAttempt(replacement, musterpb.AttemptState_ATTEMPT_STATE_CANCELLED, "another attempt of the task was faster")
	}
	must(s.hold(a, x.money))
	s.editJob(a.Job).LiveAttempts++
	return nil
}

// endAttempt is how an attempt ends without a result.
func (s *State) endAttempt(c *musterpb.EndAttempt) (string, error) {
	a := s.attempt(c.Attempt)
	if a == nil {
		return "", unknownAttempt(c.Attempt)
	}
	if !running(a.State) {
		return "", api.Errorf(api.Conflict, "attempt %s is over: it is %s%s", a.Id, StateName(a.State), because(a.Reason))
	}
	switch c.State {
	case musterpb.AttemptState_ATTEMPT_STATE_FAILED, musterpb.AttemptState_ATTEMPT_STATE_LOST, musterpb.AttemptState_ATTEMPT_STATE_CANCELLED:
	default:
		return "", api.Errorf(api.Invalid, "an attempt does not end as %s", StateName(c.State))
	}
	fresh := copyAttempt(a)
	fresh.Blame, fresh.ExitCode, fresh.LogDigest = c.Blame, c.ExitCode, c.LogDigest
	must(s.ledger.Void(a.Hold, s.now, c.Reason))
	s.finishAttempt(a, fresh, c.State, c.Reason)
	switch {
	case c.Blame == musterpb.Blame_BLAME_WORKER || c.State == musterpb.AttemptState_ATTEMPT_STATE_LOST:
		s.failedWorker(a.Worker, false)
	case c.Blame != musterpb.Blame_BLAME_JOB && c.State == musterpb.AttemptState_ATTEMPT_STATE_FAILED:
		s.restWorker(a.Worker) // what stopped it is likely to stop the next one
	}
	if a.Check != "" {
		s.failedCheckRun(fresh)
		return a.Id, nil
	}
	s.failedWork(fresh, c)
	return a.Id, nil
}

// failedWork decides what a failed attempt means for its task: another owner
// tries, or the job is at fault and stops before it burns its budget.
func (s *State) failedWork(a *musterpb.Attempt, c *musterpb.EndAttempt) {
	job := s.jobs.Get(a.Job)
	if Ended(job.State) {
		s.settleJob(job.Id)
		return
	}
	task := s.task(a.Job, a.Task)
	if !slices.Contains(task.AvoidOwners, a.Owner) {
		task.AvoidOwners = append(task.AvoidOwners, a.Owner)
	}
	sameElsewhere := false
	switch c.Blame {
	case musterpb.Blame_BLAME_JOB:
		task.Failures++
		sameElsewhere = sameExit(task, a.Owner, c.ExitCode) >= sameExits(job)
	case musterpb.Blame_BLAME_WORKER:
		task.Failures++
	default:
		// What kills workers, or their connections, is in the end the task's own
		// fault; an owner's own end of an attempt, or a store out of reach, is not.
		if !c.Blameless {
			task.Losses++
			if task.Losses%lossesPerFailure == 0 {
				task.Failures++
			}
		}
	}
	s.requeue(task)
	if reason := s.outOfRetries(task, sameElsewhere, c.Reason); reason != "" {
		s.endJob(a.Job, musterpb.JobState_JOB_STATE_FAILED, reason)
	}
}

// lossesPerFailure is how many attempts of a task may end without blame before
// that counts as a failure of it.
const lossesPerFailure = 3

// sameExit notes an owner's report that the program failed, and counts the
// owners who reported that exit code one after the other.
func sameExit(task *musterpb.Task, owner string, code int32) int {
	if task.LastExitCode != code {
		task.LastExitOwners = nil
	}
	task.LastExitCode = code
	if !slices.Contains(task.LastExitOwners, owner) {
		task.LastExitOwners = append(task.LastExitOwners, owner)
	}
	return len(task.LastExitOwners)
}

// sameExits is how many owners must report the same failure before the job is
// at fault: two, or three for a job that has shown that it can succeed. Owners
// are believed here, and two of them could conspire.
func sameExits(job *musterpb.Job) int {
	if job.TasksVerified > 0 {
		return 3
	}
	return 2
}

// outOfRetries says why a task's failures end its job, or nothing.
func (s *State) outOfRetries(task *musterpb.Task, sameElsewhere bool, last string) string {
	switch {
	case sameElsewhere:
		return fmt.Sprintf("task %d fails in the same way on different owners' machines: %s", task.Number, last)
	case task.Failures > s.jobs.Get(task.Job).Spec.Retries:
		return fmt.Sprintf("task %d failed %d times, %d retries are allowed; last: %s", task.Number, task.Failures, s.jobs.Get(task.Job).Spec.Retries, last)
	}
	return ""
}

// hold reserves the most that an attempt can cost.
func (s *State) hold(a *musterpb.Attempt, payer string) error {
	id, err := s.ledger.Hold(ledger.Entry{
		TimeUnixMS: s.now, Debit: payer, Credit: s.index.workers[a.Worker].money, Amount: api.MicroUSD(a.HoldMicroUsd), Ref: a.Id, Memo: "attempt",
	})
	if err != nil {
		return err
	}
	a.Hold, a.Payer = id, payer
	return nil
}

// closeAttempt ends an attempt unpaid and voids its hold.
func (s *State) closeAttempt(a *musterpb.Attempt, state musterpb.AttemptState, reason string) {
	must(s.ledger.Void(a.Hold, s.now, reason))
	s.finishAttempt(a, copyAttempt(a), state, reason)
}

// payAttempt ends an attempt that was found right, or drawn in an epoch and not
// sampled, and posts its price.
func (s *State) payAttempt(a *musterpb.Attempt, epoch uint64, reason string) {
	amount := s.price(a)
	if amount == 0 {
		must(s.ledger.Void(a.Hold, s.now, "free of charge"))
	} else {
		must(s.ledger.Post(a.Hold, s.now, amount, fee(amount), reason))
	}
	fresh := copyAttempt(a)
	fresh.PaidMicroUsd, fresh.Batch = int64(amount), epoch
	s.finishAttempt(a, fresh, musterpb.AttemptState_ATTEMPT_STATE_VERIFIED, reason)
	if a.Payer != ledger.Network && amount > 0 {
		s.editJob(a.Job).SpentMicroUsd += int64(amount)
		s.ledger.Spend(s.index.jobs[a.Job].account.money, amount)
	}
	s.finishedWorker(a.Worker)
}

// price is what a committed attempt costs: the time that the scheduler saw
// between start and commit, never more than was held.
func (s *State) price(a *musterpb.Attempt) api.MicroUSD {
	return min(Cost(api.MicroUSD(a.PriceMicroUsdPerHour), a.CommittedUnixMs-a.StartedUnixMs), api.MicroUSD(a.HoldMicroUsd))
}

// finishAttempt stores how an attempt ended, in a copy of it.
func (s *State) finishAttempt(a, fresh *musterpb.Attempt, state musterpb.AttemptState, reason string) {
	fresh.State, fresh.Reason, fresh.EndedUnixMs = state, reason, s.now
	s.setAttempt(a, fresh)
	job := s.editJob(a.Job)
	job.LiveAttempts--
	resume(job)
}

// attempt is a stored attempt, nil for an unknown one. Commands name attempts
// by it; what values name is there.
func (s *State) attempt(id string) *musterpb.Attempt {
	if a := s.attempts.Get(id); a != nil && !s.isDropped(a.Job) {
		return a
	}
	return nil
}

// setAttempt stores what became of an attempt; old is nil for a new one.
func (s *State) setAttempt(old, a *musterpb.Attempt) {
	s.attempts.Set(a.Id, a)
	s.indexAttempt(old, a)
}

// busyDevice is the first of the devices that another attempt uses, or that is
// named twice.
func (u *Use) busyDevice(devices []string) string {
	for i, d := range devices {
		if slices.Contains(u.Devices, d) || slices.Contains(devices[:i], d) {
			return d
		}
	}
	return ""
}

func unknownAttempt(id string) error {
	return api.Errorf(api.NotFound, "attempt %q is not known", id)
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return " (" + reason + ")"
}
