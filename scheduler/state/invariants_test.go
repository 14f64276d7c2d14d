package state

import (
	"bytes"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
)

// broken lists every invariant of the state that does not hold. It recounts
// from the values alone and trusts no counter and no index.
func broken(s *State) (problems []string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	bad := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	brokenMoney(s, bad)
	for _, id := range sortedKeys(s.jobs) {
		brokenJob(s, s.jobs[id], bad)
	}
	for _, id := range sortedKeys(s.attempts) {
		brokenAttempt(s, s.attempts[id], bad)
	}
	for _, k := range slices.SortedFunc(maps.Keys(s.tasks), compareTasks) {
		brokenTask(s, s.tasks[k], bad)
	}
	for _, id := range sortedKeys(s.checks) {
		c := s.checks[id]
		if _, open := s.openChecks[id]; open != (c.ClosedUnixMs == 0) {
			bad("check %s: closed at %d, open %v", id, c.ClosedUnixMs, open)
		}
		for i, a := range c.Comparisons {
			for _, b := range c.Comparisons[:i] {
				if a.A == b.A && a.B == b.B {
					bad("check %s: %s and %s were compared twice", id, a.A, a.B)
				}
			}
		}
	}
	if len(s.answerOrder) != len(s.answered) {
		bad("%d answers are remembered, %d in order", len(s.answered), len(s.answerOrder))
	}
	return problems
}

type complain func(format string, args ...any)

func brokenMoney(s *State, bad complain) {
	if sum := s.ledger.Sum(); sum != 0 {
		bad("the ledger sums to %s", sum)
	}
	var held, wantHeld api.MicroUSD
	for _, name := range s.ledger.Accounts() {
		a := s.ledger.Account(name)
		held += a.Held
		if name != ledger.External && (a.Balance < 0 || a.Available() < 0) || a.Held < 0 || a.Expected < 0 {
			bad("%s has %+v", name, a)
		}
	}
	for _, id := range sortedKeys(s.attempts) {
		a := s.attempts[id]
		live := live(a.State)
		if live {
			wantHeld += api.MicroUSD(a.HoldMicroUsd)
		}
		if s.ledger.Open(a.Hold) != live {
			bad("attempt %s is %s and its hold is open: %v", id, StateName(a.State), !live)
		}
		paid := a.State == musterpb.AttemptState_ATTEMPT_STATE_VERIFIED
		if !paid && a.PaidMicroUsd != 0 || a.PaidMicroUsd < 0 || a.PaidMicroUsd > a.HoldMicroUsd {
			bad("attempt %s is %s, %s held, %s paid", id, StateName(a.State), api.MicroUSD(a.HoldMicroUsd), api.MicroUSD(a.PaidMicroUsd))
		}
	}
	if held != wantHeld {
		bad("%s is held, the live attempts account for %s", held, wantHeld)
	}
	posts := map[string]int{}
	all, _ := s.ledger.Transfers("", 0, 1<<62)
	for _, t := range all {
		switch {
		case t.Kind == musterpb.TransferKind_TRANSFER_KIND_POST:
			if posts[t.Ref]++; posts[t.Ref] > 1 {
				bad("attempt %s was paid twice", t.Ref)
			}
		case t.Memo == "inconclusive check" && s.attempts[t.Ref].State != musterpb.AttemptState_ATTEMPT_STATE_INCONCLUSIVE:
			bad("attempt %s was paid as inconclusive and is %s", t.Ref, StateName(s.attempts[t.Ref].State))
		}
	}
}

func brokenJob(s *State, job *musterpb.Job, bad complain) {
	want := &musterpb.Job{}
	spent := api.MicroUSD(0)
	for _, id := range sortedKeys(s.attempts) {
		a := s.attempts[id]
		if a.Job != job.Id {
			continue
		}
		if live(a.State) {
			want.LiveAttempts++
		}
		if a.Check == "" {
			want.Attempts++
		} else {
			want.Checks++
		}
		if a.State == musterpb.AttemptState_ATTEMPT_STATE_REJECTED {
			want.Caught++
		}
		if a.Payer == ledger.OfJob(job.Id) {
			spent += api.MicroUSD(a.PaidMicroUsd)
		}
	}
	for _, c := range s.checks {
		if c.Job == job.Id {
			want.CheckedItems += uint64(len(c.Items))
			if c.ClosedUnixMs == 0 {
				want.OpenChecks++
			}
		}
	}
	requeued := []uint32{}
	for n := range job.NextTask {
		t := s.tasks[taskKey{job.Id, n}]
		if t == nil {
			bad("task %s/%d was placed and is not there", job.Id, n)
			continue
		}
		items := uint64(len(s.itemsOf(&musterpb.Attempt{Job: job.Id, Task: n})))
		switch t.State {
		case musterpb.TaskState_TASK_STATE_QUEUED:
			requeued = append(requeued, n)
		case musterpb.TaskState_TASK_STATE_PROVISIONAL:
			want.ItemsCommitted += items
		case musterpb.TaskState_TASK_STATE_VERIFIED:
			want.ItemsCommitted += items
			want.ItemsVerified += items
			want.TasksVerified++
		}
	}
	got := &musterpb.Job{
		LiveAttempts: job.LiveAttempts, Attempts: job.Attempts, Checks: job.Checks, Caught: job.Caught, CheckedItems: job.CheckedItems,
		OpenChecks: job.OpenChecks, ItemsCommitted: job.ItemsCommitted, ItemsVerified: job.ItemsVerified, TasksVerified: job.TasksVerified,
	}
	if !got.EqualVT(want) {
		bad("job %s counts %v, recounted %v", job.Id, got, want)
	}
	if api.MicroUSD(job.SpentMicroUsd) != spent {
		bad("job %s spent %s, recounted %s", job.Id, api.MicroUSD(job.SpentMicroUsd), spent)
	}
	if sorted := slices.Sorted(slices.Values(job.Requeued)); !Ended(job.State) && !slices.Equal(sorted, requeued) {
		bad("job %s: requeued tasks %v, recounted %v", job.Id, sorted, requeued)
	}
	over := Ended(job.State) && job.LiveAttempts == 0 && job.OpenChecks == 0
	if over != job.Settled {
		bad("job %s: settled %v, is over %v", job.Id, job.Settled, over)
	}
	if money := s.ledger.Account(ledger.OfJob(job.Id)); job.Settled && (money != ledger.Account{}) {
		bad("job %s is settled and has %+v", job.Id, money)
	}
	if Ended(job.State) != (job.EndedUnixMs != 0) {
		bad("job %s is %s and ended at %d", job.Id, StateName(job.State), job.EndedUnixMs)
	}
	if job.State == musterpb.JobState_JOB_STATE_VERIFIED && job.TasksVerified != job.Tasks {
		bad("job %s is verified with %d of %d tasks", job.Id, job.TasksVerified, job.Tasks)
	}
}

func brokenAttempt(s *State, a *musterpb.Attempt, bad complain) {
	if running(a.State) && a.Check == "" {
		if job := s.jobs[a.Job]; Ended(job.State) {
			bad("attempt %s runs and its job is %s", a.Id, StateName(job.State))
		}
	}
	if n := count(s.openBatch, a.Id); n != 0 && n != 1 {
		bad("attempt %s is in the open batch %d times", a.Id, n)
	} else if waits := a.State == musterpb.AttemptState_ATTEMPT_STATE_COMMITTED && a.Check == "" && a.Batch == 0; waits != (n == 1) {
		bad("attempt %s (%s, batch %d) is in the open batch: %v", a.Id, StateName(a.State), a.Batch, n == 1)
	}
	check := s.checks[checkID(a.Id)]
	if a.Check != "" {
		check = s.checks[a.Check]
		if !slices.Contains(check.Runs, a.Id) {
			bad("check run %s is not among the runs of its check", a.Id)
		}
	}
	closed := check != nil && check.ClosedUnixMs != 0
	switch a.State {
	case musterpb.AttemptState_ATTEMPT_STATE_COMMITTED:
		if closed {
			bad("attempt %s has no verdict and its check is closed", a.Id)
		}
		if a.Check == "" && a.Batch != 0 && s.batches[a.Batch].Drawn && check == nil {
			bad("attempt %s was drawn and has neither verdict nor check", a.Id)
		}
	case musterpb.AttemptState_ATTEMPT_STATE_VERIFIED:
		drawn := a.Check != "" || a.Batch != 0 && s.batches[a.Batch].Drawn
		if !drawn || check != nil && (!closed || check.Verdict == musterpb.Verdict_VERDICT_INCONCLUSIVE) {
			bad("attempt %s was paid without a verdict", a.Id)
		}
	case musterpb.AttemptState_ATTEMPT_STATE_REJECTED, musterpb.AttemptState_ATTEMPT_STATE_INCONCLUSIVE:
		if !closed {
			bad("attempt %s is %s without a verdict", a.Id, StateName(a.State))
		}
	}
	if running(a.State) {
		for _, id := range sortedKeys(s.attempts) {
			if o := s.attempts[id]; id < a.Id && o.Worker == a.Worker && running(o.State) {
				for _, d := range a.Devices {
					if slices.Contains(o.Devices, d) {
						bad("attempts %s and %s both use device %s", id, a.Id, d)
					}
				}
			}
		}
	}
}

func brokenTask(s *State, t *musterpb.Task, bad complain) {
	var live, paid, committed []string
	for _, id := range sortedKeys(s.attempts) {
		a := s.attempts[id]
		if a.Job != t.Job || a.Task != t.Number || a.Check != "" {
			continue
		}
		switch {
		case running(a.State):
			live = append(live, id)
		case a.State == musterpb.AttemptState_ATTEMPT_STATE_COMMITTED:
			committed = append(committed, id)
		case a.State == musterpb.AttemptState_ATTEMPT_STATE_VERIFIED:
			paid = append(paid, id)
		}
		if !slices.Contains(t.Attempts, id) {
			bad("task %s/%d does not know its attempt %s", t.Job, t.Number, id)
		}
	}
	result := []string{}
	if t.Result != "" {
		result = append(result, t.Result)
	}
	fits := false
	switch t.State {
	case musterpb.TaskState_TASK_STATE_QUEUED:
		fits = len(live)+len(committed)+len(paid)+len(result) == 0
	case musterpb.TaskState_TASK_STATE_RUNNING:
		fits = len(live) == 1 && len(committed)+len(paid)+len(result) == 0
	case musterpb.TaskState_TASK_STATE_PROVISIONAL:
		fits = len(live)+len(paid) == 0 && slices.Equal(committed, result)
	case musterpb.TaskState_TASK_STATE_VERIFIED:
		fits = len(live)+len(committed) == 0 && slices.Equal(paid, result) && len(paid) == 1
	}
	if !fits {
		bad("task %s/%d is %s with result %q: running %v, committed %v, paid %v", t.Job, t.Number, StateName(t.State), t.Result, live, committed, paid)
	}
}

func count[T comparable](list []T, v T) (n int) {
	for _, x := range list {
		if x == v {
			n++
		}
	}
	return n
}

// replicas applies every command to two states and checks, around each, all
// that has to hold whatever the command is.
type replicas struct {
	*State
	twin *State
	t    interface {
		Helper()
		Fatalf(string, ...any)
	}
}

func (r *replicas) apply(cmd *musterpb.Command) *musterpb.Answer {
	r.t.Helper()
	before := r.Snapshot()
	hash := before.Hash()
	answer := r.State.Apply(cmd.CloneVT())
	if again := r.twin.Apply(cmd.CloneVT()); !again.EqualVT(answer) {
		r.t.Fatalf("%v: answered %v, then by another scheduler %v", cmd, answer, again)
	}
	if !bytes.Equal(before.Hash(), hash) {
		r.t.Fatalf("%v changed values that were stored before", cmd)
	}
	after := r.Snapshot()
	hash = after.Hash()
	if !bytes.Equal(r.twin.Snapshot().Hash(), hash) {
		r.t.Fatalf("%v: two schedulers differ", cmd)
	}
	if answer.ErrorKind != 0 && !bytes.Equal(essence(before, nil), essence(after, before)) {
		r.t.Fatalf("%v was refused (%s) and changed the state", cmd, answer.Error)
	}
	if problems := broken(r.State); len(problems) > 0 {
		r.t.Fatalf("after %v (%v):\n%q", cmd, answer, problems)
	}
	for _, account := range r.Accounts() {
		if b := r.Balance(account); b.DepositedMicroUsd+b.EarnedMicroUsd != b.BalanceMicroUsd+b.InJobsMicroUsd+b.SpentMicroUsd {
			r.t.Fatalf("the balance of %s does not add up: %v", account, b)
		}
	}
	r.restart(after, hash)
	return answer
}

// restart replaces the twin by a state restored from a snapshot.
func (r *replicas) restart(snapshot *Snapshot, hash []byte) {
	r.t.Helper()
	var buf bytes.Buffer
	if err := snapshot.Write(&buf); err != nil {
		r.t.Fatalf("%v", err)
	}
	restored := New()
	if err := restored.Restore(&buf); err != nil {
		r.t.Fatalf("%v", err)
	}
	if !bytes.Equal(restored.Snapshot().Hash(), hash) {
		r.t.Fatalf("a restored state has another hash")
	}
	for name, pair := range map[string][2]any{
		"liveJobs":     {r.liveJobs, restored.liveJobs},
		"openChecks":   {r.openChecks, restored.openChecks},
		"liveByWorker": {r.liveByWorker, restored.liveByWorker},
		"byJob":        {r.byJob, restored.byJob},
		"due":          {r.due, restored.due},
	} {
		if !reflect.DeepEqual(pair[0], pair[1]) {
			r.t.Fatalf("%s is %v, rebuilt %v", name, pair[0], pair[1])
		}
	}
	r.twin = restored
}

// essence is the hash of all that a refused command must leave alone. The one
// thing that it may do is pause the job whose budget it exceeds: given the
// snapshot before, a job that was paused since counts as it was.
func essence(s, before *Snapshot) []byte {
	e := *s
	e.now, e.answered, e.answerOrder = 0, nil, nil
	if before != nil {
		e.jobs = maps.Clone(s.jobs)
		for id, job := range s.jobs {
			if old := before.jobs[id]; old != nil && job.State == musterpb.JobState_JOB_STATE_PAUSED {
				fresh := job.CloneVT()
				fresh.State, fresh.Reason = old.State, old.Reason
				e.jobs[id] = fresh
			}
		}
	}
	return e.Hash()
}

func newReplicas(t interface {
	Helper()
	Fatalf(string, ...any)
}) *replicas {
	return &replicas{State: New(), twin: New(), t: t}
}
