package state

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
	"github.com/musternet/muster/scheduler/table"
	"github.com/musternet/muster/verify"
)

// broken lists every invariant of the state that does not hold. It recounts
// from the values alone and trusts no counter and no index.
func broken(s *State) (problems []string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	bad := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	brokenMoney(s, bad)
	for _, id := range keysOf(s.jobs) {
		brokenJob(s, s.jobs.Get(id), bad)
	}
	for _, id := range attemptIDs(s) {
		brokenAttempt(s, s.attempts.Get(id), bad)
	}
	for _, k := range slices.SortedFunc(s.tasks.Keys(), compareTasks) {
		if !s.isDropped(k.job) {
			brokenTask(s, s.tasks.Get(k), bad)
		}
	}
	for _, id := range keysOf(s.checks) {
		c := s.check(id)
		if c == nil {
			continue
		}
		if open(c) != (c.ClosedUnixMs == 0) {
			bad("check %s: closed at %d, open %v", id, c.ClosedUnixMs, open(c))
		}
		for i, a := range c.Comparisons {
			for _, b := range c.Comparisons[:i] {
				if a.A == b.A && a.B == b.B {
					bad("check %s: %s and %s were compared twice", id, a.A, a.B)
				}
			}
		}
	}
	if len(s.answerOrder) != s.answered.Len() {
		bad("%d answers are remembered, %d in order", s.answered.Len(), len(s.answerOrder))
	}
	brokenIndex(s, bad)
	return problems
}

type complain func(format string, args ...any)

// attemptIDs are the attempts that are there for readers.
func attemptIDs(s *State) []string {
	return slices.DeleteFunc(keysOf(s.attempts), func(id string) bool { return s.attempt(id) == nil })
}

// brokenIndex compares everything that is derived with what a walk over all
// values gives.
func brokenIndex(s *State, bad complain) {
	uses, running, units := map[string]Use{}, map[string][]string{}, map[string]int64{}
	due, wanted, toCompare, undecided := map[string]int{}, map[string]map[string]int{}, []string{}, map[uint64]int{}
	count := 0
	for _, id := range attemptIDs(s) {
		a := s.attempts.Get(id)
		job := s.jobs.Get(a.Job)
		if isRunning(a) {
			u := uses[a.Worker]
			u.add(1, job.Spec.Resources, a.Devices)
			uses[a.Worker] = u
			running[a.Worker] = append(running[a.Worker], id)
			units[job.Account] += Units(job.Spec.Resources)
			count++
		}
		if a.Check == "" && live(a.State) {
			due[a.Job] += owed(s, a)
			if check := s.checks.Get(checkID(id)); check != nil {
				undecided[a.Batch]++
			}
			if (s.checks.Get(checkID(id)) != nil) != (a.Batch != 0) {
				bad("attempt %s has batch %d, and has a check: %v", id, a.Batch, a.Batch == 0)
			}
		}
	}
	for _, id := range keysOf(s.checks) {
		check := s.check(id)
		if check == nil || check.ClosedUnixMs != 0 {
			continue
		}
		committed, underWay := s.runsOf(check)
		if len(verify.MissingPairs(check.Target, committed, check.Comparisons)) > 0 {
			toCompare = append(toCompare, id)
		} else if n := verify.Decide(check.Target, committed, check.Comparisons).MoreRuns - underWay; n > 0 {
			if wanted[check.Job] == nil {
				wanted[check.Job] = map[string]int{}
			}
			wanted[check.Job][id] = n
		}
	}
	same := func(what string, got, want any) {
		if !reflect.DeepEqual(got, want) {
			bad("%s: %v, recounted %v", what, got, want)
		}
	}
	for _, id := range keysOf(s.workers) {
		x := s.index.workers[id]
		got, want := x.use, uses[id]
		slices.Sort(want.Devices)
		got.Devices = slices.Sorted(slices.Values(got.Devices))
		same("use of "+id, got, want)
		same("running on "+id, sortedKeys(x.running), running[id])
	}
	for _, id := range keysOf(s.accounts) {
		same("usage of "+id, s.index.accounts[id].units, units[id])
	}
	same("number of live attempts", s.index.running, count)
	same("checks to compare", sortedKeys(s.index.toCompare), slices.Clip(append([]string(nil), toCompare...)))
	same("undecided", s.index.undecided, undecided)
	same("jobs with checks that want a run", sortedKeys(s.index.wanting), sortedKeys(wanted))
	var jobs, settled []string
	for _, id := range keysOf(s.jobs) {
		if s.jobs.Get(id).Settled {
			settled = append(settled, id)
			continue
		}
		jobs = append(jobs, id)
		if x := s.index.jobs[id]; x != nil {
			same("results of "+id+" that are due", x.due, due[id])
			got := map[string]int{}
			for check := range x.wanted.all() {
				got[check] = x.wanted.get(check)
			}
			same("runs wanted of "+id, len(got), x.wanted.len())
			if len(got)+len(wanted[id]) > 0 {
				same("runs wanted of "+id, got, wanted[id])
			}
		}
	}
	same("live jobs", sortedKeys(s.index.jobs), jobs)
	same("settled jobs", slices.Sorted(slices.Values(s.index.settled)), settled)
}

func isRunning(a *musterpb.Attempt) bool { return running(a.State) }

// owed is 1 for a result that may yet be paid and whose check has no run.
func owed(s *State, a *musterpb.Attempt) int {
	if check := s.checks.Get(checkID(a.Id)); check != nil {
		for _, id := range check.Runs {
			if live(s.attempts.Get(id).State) {
				return 0
			}
		}
	}
	return 1
}

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
	for _, id := range attemptIDs(s) {
		a := s.attempts.Get(id)
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
	for _, t := range s.ledger.Tail(0) {
		switch {
		case t.Kind == musterpb.TransferKind_TRANSFER_KIND_POST:
			if posts[t.Ref]++; posts[t.Ref] > 1 {
				bad("attempt %s was paid twice", t.Ref)
			}
		case t.Memo == "inconclusive check" && s.attempt(t.Ref) != nil && s.attempts.Get(t.Ref).State != musterpb.AttemptState_ATTEMPT_STATE_INCONCLUSIVE:
			bad("attempt %s was paid as inconclusive and is %s", t.Ref, StateName(s.attempts.Get(t.Ref).State))
		}
	}
}

func brokenJob(s *State, job *musterpb.Job, bad complain) {
	want := &musterpb.Job{}
	spent := api.MicroUSD(0)
	for _, id := range attemptIDs(s) {
		a := s.attempts.Get(id)
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
	for c := range s.checks.Values() {
		if c.Job == job.Id {
			want.CheckedItems += uint64(len(c.Items))
			if c.ClosedUnixMs == 0 {
				want.OpenChecks++
			}
		}
	}
	requeued := []uint32{}
	for n := range job.NextTask {
		t := s.tasks.Get(taskKey{job.Id, n})
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
		if job := s.jobs.Get(a.Job); Ended(job.State) {
			bad("attempt %s runs and its job is %s", a.Id, StateName(job.State))
		}
	}
	if n := count(s.openBatch, a.Id); n != 0 && n != 1 {
		bad("attempt %s is in the open batch %d times", a.Id, n)
	} else if b := s.batches.Get(s.epoch); b != nil && !b.Drawn && slices.Contains(b.Attempts, a.Id) {
		if n == 1 || a.Batch != 0 || a.State != musterpb.AttemptState_ATTEMPT_STATE_COMMITTED {
			bad("attempt %s (%s, batch %d) is being drawn, and in the open batch: %v", a.Id, StateName(a.State), a.Batch, n == 1)
		}
	} else if waits := a.State == musterpb.AttemptState_ATTEMPT_STATE_COMMITTED && a.Check == "" && a.Batch == 0; waits != (n == 1) {
		bad("attempt %s (%s, batch %d) is in the open batch: %v", a.Id, StateName(a.State), a.Batch, n == 1)
	}
	check := s.checks.Get(checkID(a.Id))
	if a.Check != "" {
		check = s.checks.Get(a.Check)
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
		if a.Check == "" && a.Batch != 0 && drawn(s, a.Batch) && check == nil {
			bad("attempt %s was drawn and has neither verdict nor check", a.Id)
		}
	case musterpb.AttemptState_ATTEMPT_STATE_VERIFIED:
		drawn := a.Check != "" || a.Batch != 0 && drawn(s, a.Batch)
		if !drawn || check != nil && (!closed || check.Verdict == musterpb.Verdict_VERDICT_INCONCLUSIVE) {
			bad("attempt %s was paid without a verdict", a.Id)
		}
	case musterpb.AttemptState_ATTEMPT_STATE_REJECTED, musterpb.AttemptState_ATTEMPT_STATE_INCONCLUSIVE:
		if !closed {
			bad("attempt %s is %s without a verdict", a.Id, StateName(a.State))
		}
	}
	if running(a.State) {
		for _, id := range attemptIDs(s) {
			if o := s.attempts.Get(id); id < a.Id && o.Worker == a.Worker && running(o.State) {
				for _, d := range a.Devices {
					if slices.Contains(o.Devices, d) {
						bad("attempts %s and %s both use device %s", id, a.Id, d)
					}
				}
			}
		}
	}
}

// drawn reports whether a batch was drawn; what is sealed was.
func drawn(s *State, epoch uint64) bool { return epoch <= s.sealedEpoch || s.batches.Get(epoch).Drawn }

func brokenTask(s *State, t *musterpb.Task, bad complain) {
	var live, paid, committed []string
	for _, id := range attemptIDs(s) {
		a := s.attempts.Get(id)
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
// that has to hold whatever the command is. A third gets them later, in entries
// of several.
type replicas struct {
	*State
	twin *State
	t    interface {
		Helper()
		Fatalf(string, ...any)
	}
	grouped  *State
	pending  []*musterpb.Command // that grouped did not get yet
	expected []*musterpb.Answer
	entries  int
	cursor   uint64 // of the changes
	work     map[string]Work
	uses     map[string]Use
	units    map[string]int64
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
		inJobs := api.MicroUSD(0)
		for _, job := range r.Jobs(account, 1<<30) {
			inJobs += r.LedgerAccount(ledger.OfJob(job.Id)).Balance
		}
		if b := r.Balance(account); api.MicroUSD(b.InJobsMicroUsd) != inJobs {
			r.t.Fatalf("the balance of %s does not add up: %v, and %s is in its jobs", account, b, inJobs)
		}
	}
	r.told(cmd, before, after)
	r.group(cmd, answer, hash)
	r.restart(after, hash)
	return answer
}

// group applies what is pending to the third state, now and then: whatever the
// entries are, answers and state are the same.
func (r *replicas) group(cmd *musterpb.Command, answer *musterpb.Answer, hash []byte) {
	r.t.Helper()
	r.pending, r.expected = append(r.pending, cmd.CloneVT()), append(r.expected, answer)
	if len(r.pending) <= r.entries%13 {
		return
	}
	before := r.grouped.Snapshot()
	beforeHash := before.Hash()
	for i, got := range r.grouped.ApplyAll(r.pending) {
		if !got.EqualVT(r.expected[i]) {
			r.t.Fatalf("%v: answered %v, in an entry of %d %v", r.pending[i], r.expected[i], len(r.pending), got)
		}
	}
	if !bytes.Equal(before.Hash(), beforeHash) {
		r.t.Fatalf("an entry of %v changed values that were stored before", r.pending)
	}
	if !bytes.Equal(r.grouped.Snapshot().Hash(), hash) {
		r.t.Fatalf("%v: applied in one entry they give another state", r.pending)
	}
	if problems := broken(r.grouped); len(problems) > 0 {
		r.t.Fatalf("after an entry of %v:\n%q", r.pending, problems)
	}
	r.pending, r.expected = nil, nil
	r.entries++
}

// told checks that readers are told of everything that changed.
func (r *replicas) told(cmd *musterpb.Command, before, after *Snapshot) {
	r.t.Helper()
	c, next := r.ChangesSince(r.cursor)
	if c.Reset != (r.cursor == 0) {
		r.t.Fatalf("after %v, changes since %d: reset is %v", cmd, r.cursor, c.Reset)
	}
	r.cursor = next
	work := map[string]Work{}
	for id := range r.index.jobs {
		w, _ := r.WorkOf(id)
		for i := range w.Checks {
			w.Checks[i].Unpaid = "" // follows from the money of others, too
		}
		work[id] = w
	}
	uses, units := map[string]Use{}, map[string]int64{}
	for _, id := range keysOf(r.workers) {
		uses[id] = r.UseOf(id)
	}
	for _, id := range r.Accounts() {
		units[id] = r.UsageOf(id)
	}
	previous, usesBefore, unitsBefore := r.work, r.uses, r.units
	r.work, r.uses, r.units = work, uses, units
	if c.Reset {
		return
	}
	for id, use := range uses {
		if !slices.Contains(c.Workers, id) && !reflect.DeepEqual(use, usesBefore[id]) {
			r.t.Fatalf("%v changed the use of worker %s and did not tell", cmd, id)
		}
	}
	for id, n := range units {
		if n != unitsBefore[id] && !slices.ContainsFunc(c.Jobs, func(job string) bool { return r.Job(job).GetAccount() == id }) {
			r.t.Fatalf("%v changed the usage of account %s and told of none of its jobs", cmd, id)
		}
	}
	for what, missing := range map[string][]string{
		"workers":  untold(before.workers, after.workers, c.Workers),
		"jobs":     untold(before.jobs, after.jobs, c.Jobs),
		"checks":   untold(before.checks, after.checks, c.Checks),
		"attempts": untold(before.attempts, after.attempts, c.Attempts),
	} {
		if len(missing) > 0 {
			r.t.Fatalf("%v changed the %s %v and did not tell", cmd, what, missing)
		}
	}
	for id, w := range work {
		if !slices.Contains(c.Jobs, id) && !reflect.DeepEqual(w, previous[id]) {
			r.t.Fatalf("%v changed the work of job %s and did not tell", cmd, id)
		}
	}
	for _, list := range [][]string{c.Workers, c.Jobs, c.Checks, c.Attempts} {
		if len(slices.Compact(slices.Sorted(slices.Values(list)))) != len(list) {
			r.t.Fatalf("changes are told twice: %v", list)
		}
	}
}

// untold are the IDs whose values differ and that are not in a list. What was
// sealed is told by its job.
func untold[V comparable](before, after *table.Map[string, V], told []string) (ids []string) {
	for id, v := range after.All() {
		if before.Get(id) != v && !slices.Contains(told, id) {
			ids = append(ids, id)
		}
	}
	return ids
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
	if problems := broken(restored); len(problems) > 0 {
		r.t.Fatalf("what was restored:\n%q", problems)
	}
	r.twin = restored
}

// essence is the hash of all that a refused command must leave alone. The one
// thing that it may do is pause the job whose budget it exceeds: given the
// snapshot before, a job that was paused since counts as it was.
func essence(s, before *Snapshot) []byte {
	e := Snapshot{s.data.copy()}
	e.now, e.answerOrder = 0, nil
	if before != nil {
		for id, job := range s.jobs.All() {
			if old := before.jobs.Get(id); old != nil && job.State == musterpb.JobState_JOB_STATE_PAUSED {
				fresh := copyJob(job)
				fresh.State, fresh.Reason = old.State, old.Reason
				e.jobs.Set(id, fresh)
			}
		}
	}
	return e.Hash()
}

func newReplicas(t interface {
	Helper()
	Fatalf(string, ...any)
}) *replicas {
	r := &replicas{State: New(), twin: New(), grouped: New(), t: t}
	r.State.sweeper = 1 // what is sealed stays around for a while
	return r
}
