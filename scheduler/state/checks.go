package state

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
	"github.com/musternet/muster/verify"
)

// MaxBatch bounds the commits that are drawn together, which one Apply does.
const MaxBatch = 4096

// closeBatch fixes which commits are drawn together, before any reveal. The
// oldest commits come first, and one batch is drawn at a time.
func (s *State) closeBatch(c *musterpb.CloseBatch) (string, error) {
	if last := s.batches.Get(s.epoch); last != nil && !last.Drawn {
		return "", api.Errorf(api.Conflict, "epoch %d is not drawn yet", s.epoch)
	}
	if c.Epoch != s.epoch+1 {
		return "", api.Errorf(api.Conflict, "closing epoch %d: %d is next", c.Epoch, s.epoch+1)
	}
	if c.Attempts == 0 || int(c.Attempts) > len(s.openBatch) {
		return "", api.Errorf(api.Conflict, "closing a batch of %d commits: %d are open", c.Attempts, len(s.openBatch))
	}
	attempts := slices.Clone(s.openBatch[:c.Attempts])
	if !bytes.Equal(c.Digest, s.batchDigest(c.Epoch, attempts)) {
		return "", api.Errorf(api.Conflict, "the digest of epoch %d does not belong to its commits", c.Epoch)
	}
	batch := &musterpb.Batch{Epoch: c.Epoch, Digest: c.Digest, Attempts: attempts, ClosedUnixMs: s.now}
	for _, id := range sortedKeys(s.nodes) {
		if len(s.nodes[id].Tip) > 0 {
			batch.Committee = append(batch.Committee, id)
		}
	}
	s.epoch = c.Epoch
	s.openBatch = slices.Clone(s.openBatch[c.Attempts:])
	if len(batch.Committee) == 0 {
		batch.FailedClosed = true
		s.draw(batch)
		return "", nil
	}
	s.batches.Set(c.Epoch, batch)
	return "", nil
}

func (s *State) batchDigest(epoch uint64, attempts []string) []byte {
	roots := make([][]byte, len(attempts))
	for i, id := range attempts {
		roots[i] = s.attempts.Get(id).Commit.Root
	}
	return verify.BatchDigest(epoch, attempts, roots)
}

// reveal takes a committee member's value for the batch that is being drawn;
// the last one draws it.
func (s *State) reveal(c *musterpb.RevealValue) (string, error) {
	r := c.Reveal
	batch, node := s.batches.Get(r.GetEpoch()), s.nodes[r.GetNode()]
	switch {
	case batch == nil || node == nil:
		return "", api.Errorf(api.Invalid, "reveal by %q for epoch %d: no such scheduler or no such batch is closed", r.GetNode(), r.GetEpoch())
	case batch.Drawn:
		return "", api.Errorf(api.Conflict, "reveal by %s for epoch %d: it is drawn already", r.Node, r.Epoch)
	case !slices.Contains(batch.Committee, r.Node):
		return "", api.Errorf(api.Denied, "reveal by %s for epoch %d: it is not in that committee", r.Node, r.Epoch)
	case slices.ContainsFunc(batch.Reveals, func(o *musterpb.Reveal) bool { return o.Node == r.Node }):
		return "", api.Errorf(api.Conflict, "second reveal by %s for epoch %d", r.Node, r.Epoch)
	case !verify.CheckReveal(node.Tip, r.Value):
		return "", api.Errorf(api.Invalid, "reveal by %s for epoch %d does not hash to its tip", r.Node, r.Epoch)
	}
	fresh := node.CloneVT()
	fresh.Tip, fresh.Reveals = r.Value, node.Reveals+1
	s.nodes[r.Node] = fresh
	batch = copyBatch(batch)
	batch.Reveals = append(batch.Reveals, r)
	if len(batch.Reveals) < len(batch.Committee) {
		s.batches.Set(batch.Epoch, batch)
		return "", nil
	}
	values := map[string][]byte{}
	for _, r := range batch.Reveals {
		values[r.Node] = r.Value
	}
	batch.Seed = verify.Seed(batch.Epoch, batch.Digest, values)
	s.draw(batch)
	return "", nil
}

// failBatchClosed gives up waiting for a reveal: everything in the batch is
// checked, and who withheld leaves the committee.
func (s *State) failBatchClosed(c *musterpb.FailBatchClosed) (string, error) {
	batch := s.batches.Get(c.Epoch)
	if batch == nil || batch.Drawn {
		return "", api.Errorf(api.Conflict, "epoch %d is not being drawn", c.Epoch)
	}
	batch = copyBatch(batch)
	for _, id := range batch.Committee {
		if slices.ContainsFunc(batch.Reveals, func(r *musterpb.Reveal) bool { return r.Node == id }) {
			continue
		}
		fresh := s.nodes[id].CloneVT()
		fresh.Tip, fresh.Reveals, fresh.LeftReason = nil, 0, fmt.Sprintf("no reveal for epoch %d: %s", c.Epoch, c.Reason)
		s.nodes[id] = fresh
	}
	batch.FailedClosed = true
	s.draw(batch)
	return "", nil
}

// draw decides, for every commit of a batch, which of its items are checked.
func (s *State) draw(batch *musterpb.Batch) {
	batch.Drawn = true
	s.batches.Set(batch.Epoch, batch)
	lottery := verify.NewLottery(batch.Seed)
	var of []uint64
	for _, id := range batch.Attempts {
		a := s.attempts.Get(id)
		if a.State != musterpb.AttemptState_ATTEMPT_STATE_COMMITTED {
			continue
		}
		job, x := s.jobs.Get(a.Job), s.index.jobs[a.Job]
		rate := uint32(verify.PPM)
		if !batch.FailedClosed {
			passed := s.records.Get(recordKey{a.Owner, a.Class, Application(job)}).GetPassed()
			rate = verify.Rate(passed, job.Spec.Verify.RatePpm)
		}
		if x.order == nil {
			x.order = jobspec.OrderOf(job.Spec, job.PermutationKey)
		}
		of = x.order.AppendTaskItems(of[:0], job.Spec.Chunk, a.Task)
		items := lottery.Draw(id, of, a.Commit.Root, rate)
		if len(items) == 0 {
			s.acceptWork(a, batch.Epoch, "not sampled")
			continue
		}
		fresh := copyAttempt(a)
		fresh.Batch = batch.Epoch
		s.setAttempt(a, fresh)
		s.setCheck(&musterpb.Check{Id: checkID(id), Job: a.Job, Target: id, Items: items, OpenedUnixMs: s.now})
		job = s.editJob(a.Job)
		job.OpenChecks++
		job.CheckedItems += uint64(len(items))
	}
}

// check is a stored check, nil for an unknown one. Commands name checks by it.
func (s *State) check(id string) *musterpb.Check {
	if c := s.checks.Get(id); c != nil && !s.isDropped(c.Job) {
		return c
	}
	return nil
}

// setCheck stores a check.
func (s *State) setCheck(c *musterpb.Check) {
	s.checks.Set(c.Id, c)
	s.indexCheck(c)
}

// placeCheckRun places a re-execution: an attempt like any other, by an owner
// who has no part in the check so far.
func (s *State) placeCheckRun(c *musterpb.PlaceAttempt, a *musterpb.Attempt) error {
	check := s.check(c.Check)
	if check == nil || check.Job != c.Job {
		return api.Errorf(api.NotFound, "check %q of job %s is not known", c.Check, c.Job)
	}
	if !open(check) {
		return api.Errorf(api.Conflict, "check %s has its verdict", check.Id)
	}
	job, x := s.jobs.Get(c.Job), s.index.jobs[c.Job]
	if x.wanted.get(check.Id) == 0 {
		return api.Errorf(api.Conflict, "check %s needs no further run", check.Id)
	}
	target := s.attempts.Get(check.Target)
	if a.Task != target.Task {
		return api.Errorf(api.Invalid, "check %s is of task %d, not of task %d", check.Id, target.Task, a.Task)
	}
	if a.Class != target.Class {
		return api.Errorf(api.Invalid, "check %s needs hardware class %s, worker %s is %s", check.Id, target.Class, a.Worker, a.Class)
	}
	for _, id := range append([]string{check.Target}, check.Runs...) {
		o := s.attempts.Get(id)
		if !live(o.State) {
			continue // it ended without a result
		}
		if o.Worker == a.Worker {
			return api.Errorf(api.Denied, "worker %s has a part in check %s already", a.Worker, check.Id)
		}
		if o.Owner == a.Owner && !job.Spec.Verify.SameOwner {
			return api.Errorf(api.Denied, "account %s has a part in check %s already", a.Owner, check.Id)
		}
	}
	a.Check, a.Items = check.Id, check.Items
	payer := s.payerOf(check, api.MicroUSD(a.HoldMicroUsd))
	if payer == "" {
		err := api.Errorf(api.Exhausted, "%s of the budget is free, and the check of a result may cost up to %s; wait, or add to the budget with: muster job fund %s AMOUNT",
			s.ledger.Account(x.money).Available(), api.MicroUSD(a.HoldMicroUsd), c.Job)
		s.pause(c.Job, err.Error())
		return err
	}
	must(s.hold(a, payer))
	fresh := copyCheck(check)
	fresh.Runs = append(fresh.Runs, a.Id)
	if c.Relaxed != "" {
		fresh.Relaxed = c.Relaxed
	}
	s.checks.Set(fresh.Id, fresh)
	s.setAttempt(nil, a)
	job = s.editJob(c.Job)
	job.Checks++
	job.LiveAttempts++
	return nil
}

// payerOf is who can pay for a run of a check: a dispute is not the customer's
// fault, so the network does as far as its fund reaches. Empty is nobody.
func (s *State) payerOf(check *musterpb.Check, amount api.MicroUSD) string {
	if len(check.Comparisons) > 0 && s.ledger.Account(ledger.Network).Available() >= amount {
		return ledger.Network
	}
	if x := s.index.jobs[check.Job]; s.ledger.Account(x.money).Available() >= amount {
		return x.money
	}
	return ""
}

// failedCheckRun counts a run that failed, other than by the network's fault;
// too many of them, and the check is given up.
func (s *State) failedCheckRun(a *musterpb.Attempt) {
	if a.Blame == musterpb.Blame_BLAME_NETWORK || a.State != musterpb.AttemptState_ATTEMPT_STATE_FAILED {
		return
	}
	check := copyCheck(s.checks.Get(a.Check))
	check.FailedRuns++
	s.setCheck(check)
	if check.FailedRuns >= verify.MaxRuns {
		s.inconclusive(check, fmt.Sprintf("%d runs on other owners' machines failed; last: %s", check.FailedRuns, a.Reason))
	}
}

// runsOf splits a check's runs into those with a result and a count of those
// still under way; others ended without one.
func (s *State) runsOf(check *musterpb.Check) (committed []string, underWay int) {
	for _, id := range check.Runs {
		switch state := s.attempts.Get(id).State; {
		case state == musterpb.AttemptState_ATTEMPT_STATE_COMMITTED:
			committed = append(committed, id)
		case running(state):
			underWay++
		}
	}
	return committed, underWay
}

func (s *State) recordComparisons(c *musterpb.RecordComparisons) (string, error) {
	check := s.check(c.Check)
	if check == nil {
		return "", api.Errorf(api.NotFound, "check %q is not known", c.Check)
	}
	if !open(check) {
		return "", api.Errorf(api.Conflict, "check %s has its verdict", c.Check)
	}
	committed, _ := s.runsOf(check)
	missing := verify.MissingPairs(check.Target, committed, check.Comparisons)
	wanted := len(missing)
	for _, cmp := range c.Comparisons {
		at := slices.Index(missing, [2]string{cmp.A, cmp.B})
		if at < 0 {
			return "", api.Errorf(api.Conflict, "check %s: the comparison of %s with %s is not wanted", c.Check, cmp.A, cmp.B)
		}
		missing = slices.Delete(missing, at, at+1) // each once
	}
	if wanted == 0 || len(missing) > 0 {
		return "", api.Errorf(api.Conflict, "check %s: %d comparisons where %d are wanted", c.Check, len(c.Comparisons), wanted)
	}
	fresh := copyCheck(check)
	fresh.Comparisons = append(fresh.Comparisons, c.Comparisons...)
	s.decide(fresh, committed)
	return "", nil
}

// decide gives a check its verdict as soon as there is one, and carries out
// what follows from it. It takes a copy of the check that it may change.
func (s *State) decide(check *musterpb.Check, committed []string) {
	d := verify.Decide(check.Target, committed, check.Comparisons)
	switch d.Verdict {
	case musterpb.Verdict_VERDICT_SUCCESS:
		s.closeCheck(check, d.Verdict, fmt.Sprintf("%d runs agree on %d items", len(d.Right), len(check.Items)))
		s.judgeRuns(check, d)
		target := s.attempts.Get(check.Target)
		s.changeRecord(target.Owner, target.Class, Application(s.jobs.Get(check.Job)), true)
		s.acceptWork(target, target.Batch, "checked and right")
	case musterpb.Verdict_VERDICT_FAILURE:
		s.closeCheck(check, d.Verdict, differs(check))
		s.judgeRuns(check, d)
		s.rejectWork(check)
	case musterpb.Verdict_VERDICT_INCONCLUSIVE:
		s.inconclusive(check, fmt.Sprintf("%d runs and no %d of them agree; %s", len(committed)+1, verify.Quorum, differs(check)))
	default:
		check.Verdict = musterpb.Verdict_VERDICT_AWAITING_DATA
		s.setCheck(check)
	}
}

// closeCheck stores a verdict and stops the runs that can't change it. It takes
// a copy of the check that it may change.
func (s *State) closeCheck(check *musterpb.Check, verdict musterpb.Verdict, reason string) {
	check.Verdict, check.Reason, check.ClosedUnixMs = verdict, reason, s.now
	s.setCheck(check)
	for _, id := range check.Runs {
		if a := s.attempts.Get(id); running(a.State) {
			s.closeAttempt(a, musterpb.AttemptState_ATTEMPT_STATE_CANCELLED, "the result is not needed any more")
		}
	}
	s.editJob(check.Job).OpenChecks--
}

// judgeRuns pays the check runs on the right side and rejects the others.
func (s *State) judgeRuns(check *musterpb.Check, d verify.Decision) {
	for _, id := range check.Runs {
		a := s.attempts.Get(id)
		switch {
		case slices.Contains(d.Right, id):
			s.payAttempt(a, a.Batch, "result agrees")
		case slices.Contains(d.Wrong, id):
			s.offence(a, "result differs from what other owners computed")
		}
	}
}

// offence rejects a result that was proved wrong: unpaid, and the owner starts
// again from nothing.
func (s *State) offence(a *musterpb.Attempt, reason string) {
	s.closeAttempt(a, musterpb.AttemptState_ATTEMPT_STATE_REJECTED, reason)
	s.failedWorker(a.Worker, true)
	s.changeRecord(a.Owner, a.Class, Application(s.jobs.Get(a.Job)), false)
	s.editJob(a.Job).Caught++
}

// acceptWork pays a result and counts its task as done.
func (s *State) acceptWork(a *musterpb.Attempt, epoch uint64, reason string) {
	s.payAttempt(a, epoch, reason)
	task := s.task(a.Job, a.Task)
	task.State = musterpb.TaskState_TASK_STATE_VERIFIED
	s.setTask(task)
	job := s.editJob(a.Job)
	job.TasksVerified++
	job.ItemsVerified += countItems(job, a.Task)
	s.settleJob(a.Job)
}

// rejectWork takes back a result that was proved wrong.
func (s *State) rejectWork(check *musterpb.Check) {
	target := s.attempts.Get(check.Target)
	s.offence(target, "a spot-check proved it wrong: "+differs(check))
	s.redo(target, "")
}

// redo queues the task of a result that does not count, counting a failure
// of the job's where there is a reason for it.
func (s *State) redo(a *musterpb.Attempt, failure string) {
	job := s.editJob(a.Job)
	job.ItemsCommitted -= countItems(job, a.Task)
	task := s.task(a.Job, a.Task)
	if Ended(job.State) {
		s.requeue(task)
		s.settleJob(a.Job)
		return
	}
	if !slices.Contains(task.AvoidOwners, a.Owner) {
		task.AvoidOwners = append(task.AvoidOwners, a.Owner)
	}
	if failure != "" {
		task.Failures++
	}
	s.requeue(task)
	if reason := s.outOfRetries(task, false, failure); reason != "" {
		s.endJob(a.Job, musterpb.JobState_JOB_STATE_FAILED, reason)
	}
}

func (s *State) giveUpCheck(c *musterpb.GiveUpCheck) (string, error) {
	check := s.check(c.Check)
	if check == nil {
		return "", api.Errorf(api.NotFound, "check %q is not known", c.Check)
	}
	if !open(check) {
		return "", api.Errorf(api.Conflict, "check %s has its verdict", c.Check)
	}
	s.inconclusive(copyCheck(check), c.Reason)
	return "", nil
}

// inconclusive ends a check that nobody could decide. No owner is at fault: who
// delivered is paid from the network's fund, as far as that reaches, and the
// checkers first, since theirs was not the result in doubt; the customer pays
// nothing, and the task is done again. It takes a copy of the check that it may
// change.
func (s *State) inconclusive(check *musterpb.Check, reason string) {
	s.closeCheck(check, musterpb.Verdict_VERDICT_INCONCLUSIVE, reason)
	for _, id := range append(slices.Clone(check.Runs), check.Target) {
		a := s.attempts.Get(id)
		if a.State != musterpb.AttemptState_ATTEMPT_STATE_COMMITTED {
			continue
		}
		s.closeAttempt(a, musterpb.AttemptState_ATTEMPT_STATE_INCONCLUSIVE, reason)
		amount := min(s.price(a), s.ledger.Account(ledger.Network).Available())
		if amount > 0 {
			must(s.ledger.Move(ledger.Entry{
				TimeUnixMS: s.now, Debit: ledger.Network, Credit: s.index.workers[a.Worker].money, Amount: amount, Ref: id, Memo: "inconclusive check",
			}))
		}
	}
	s.redo(s.attempts.Get(check.Target), "a check was inconclusive: "+reason)
}

// differs is what the first mismatch of a check was.
func differs(check *musterpb.Check) string {
	for _, c := range check.Comparisons {
		if !c.Match {
			return c.Detail
		}
	}
	return ""
}

// checkID is the ID of the check of an attempt; there is at most one.
func checkID(attempt string) string { return "chk-" + strings.TrimPrefix(attempt, "att-") }
