package state

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
	"github.com/musternet/muster/verify"
)

// What readers get are the stored values themselves: they are never changed,
// and the reader must not change them either.

// Changed is closed when the next command is applied.
func (s *State) Changed() <-chan struct{} {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.changed
}

// Now is the time of the newest command, in milliseconds since 1970.
func (s *State) Now() int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.now
}

// Cluster is the ID of the cluster; empty before its first command.
func (s *State) Cluster() string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.cluster
}

// Key is the API key with this hash, nil for an unknown one.
func (s *State) Key(hash []byte) *musterpb.Key {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.keys[string(hash)]
}

// HasAccount reports whether an account exists.
func (s *State) HasAccount(id string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.accounts[id] != nil
}

// Node is a scheduler, nil for an unknown one.
func (s *State) Node(id string) *musterpb.Node {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.nodes[id]
}

// Nodes are the schedulers, by ID.
func (s *State) Nodes() []*musterpb.Node {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return sorted(s.nodes)
}

// Worker is a worker, nil for an unknown one.
func (s *State) Worker(id string) *musterpb.Worker {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.workers[id]
}

// Workers are all workers, by ID.
func (s *State) Workers() []*musterpb.Worker {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return sorted(s.workers)
}

// Records are the track records of an owner.
func (s *State) Records(owner string) []*musterpb.Record {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var list []*musterpb.Record
	for key, r := range s.records {
		if key.owner == owner {
			list = append(list, r)
		}
	}
	slices.SortFunc(list, func(a, b *musterpb.Record) int {
		return cmp.Or(cmp.Compare(a.Class, b.Class), cmp.Compare(a.Application, b.Application))
	})
	return list
}

// Job is a job, nil for an unknown one.
func (s *State) Job(id string) *musterpb.Job {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.jobs[id]
}

// Jobs are the jobs of an account, or all with an empty name, newest first.
func (s *State) Jobs(account string, limit int) []*musterpb.Job {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var list []*musterpb.Job
	for _, job := range s.jobs {
		if account == "" || job.Account == account {
			list = append(list, job)
		}
	}
	slices.SortFunc(list, func(a, b *musterpb.Job) int { return cmp.Compare(b.Sequence, a.Sequence) })
	return list[:min(limit, len(list))]
}

// Task is a task, nil for one that was never placed.
func (s *State) Task(job string, number uint32) *musterpb.Task {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.tasks[taskKey{job, number}]
}

// Attempt is an attempt, nil for an unknown one.
func (s *State) Attempt(id string) *musterpb.Attempt {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.attempts[id]
}

// Attempts are the attempts of a job, in the order that they were placed in.
func (s *State) Attempts(job string) []*musterpb.Attempt {
	s.mu.RLock()
	defer s.mu.RUnlock()
	list := make([]*musterpb.Attempt, 0, len(s.byJob[job]))
	for _, id := range s.byJob[job] {
		list = append(list, s.attempts[id])
	}
	return list
}

// Checks are the checks of a job, oldest first.
func (s *State) Checks(job string) []*musterpb.Check {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var list []*musterpb.Check
	for _, id := range s.byJob[job] {
		if c := s.checks[checkID(id)]; c != nil {
			list = append(list, c)
		}
	}
	slices.SortStableFunc(list, func(a, b *musterpb.Check) int { return cmp.Compare(a.OpenedUnixMs, b.OpenedUnixMs) })
	return list
}

// Check is a check, nil for an unknown one.
func (s *State) Check(id string) *musterpb.Check {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.checks[id]
}

// ItemsOf are the indexes of the items that an attempt works on, ascending.
func (s *State) ItemsOf(a *musterpb.Attempt) []uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.itemsOf(a)
}

// LiveAttempts are all attempts that a worker may be running.
func (s *State) LiveAttempts() []*musterpb.Attempt {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var list []*musterpb.Attempt
	for _, live := range s.liveByWorker {
		for id := range live {
			list = append(list, s.attempts[id])
		}
	}
	slices.SortFunc(list, func(a, b *musterpb.Attempt) int { return cmp.Compare(a.Id, b.Id) })
	return list
}

// Committed counts the commits that wait for a batch, and says whether one
// may be closed; epoch and digest are those of the next batch.
func (s *State) Committed() (waiting int, free bool, epoch uint64, digest []byte) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	last := s.batches[s.epoch]
	free = last == nil || last.Drawn
	if len(s.openBatch) > 0 {
		digest = s.batchDigest(s.epoch+1, s.openBatch)
	}
	return len(s.openBatch), free, s.epoch + 1, digest
}

// Drawing is the batch that waits for reveals, nil when there is none.
func (s *State) Drawing() *musterpb.Batch {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if b := s.batches[s.epoch]; b != nil && !b.Drawn {
		return b
	}
	return nil
}

// Epoch is the number of the newest batch.
func (s *State) Epoch() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.epoch
}

// Batches are the batches after an epoch, up to a limit.
func (s *State) Batches(after uint64, limit int) []*musterpb.Batch {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var list []*musterpb.Batch
	for e := after + 1; e <= s.epoch && len(list) < limit; e++ {
		list = append(list, s.batches[e])
	}
	return list
}

// Work is what could be placed now.
type Work struct {
	Job *musterpb.Job
	// Requeued are the tasks that were placed before and wait again, in order.
	Requeued []*musterpb.Task
	// Tasks from Next up to, and without, End were never placed.
	Next, End uint32
	// Checks that want a further run.
	Checks []WantedRun
}

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
	// would be refused, again and again.
	Unpaid string
}

// Queued lists the live jobs with work to place, in order of submission.
func (s *State) Queued() []Work {
	s.mu.RLock()
	defer s.mu.RUnlock()
	wanted := s.wanted()
	var list []Work
	for id := range s.liveJobs {
		if w, ok := s.workOf(id, wanted); ok {
			list = append(list, w)
		}
	}
	slices.SortFunc(list, func(a, b Work) int { return cmp.Compare(a.Job.Sequence, b.Job.Sequence) })
	return list
}

// WorkOf is what could be placed of one job, if anything.
func (s *State) WorkOf(job string) (Work, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if _, ok := s.liveJobs[job]; !ok {
		return Work{}, false
	}
	return s.workOf(job, s.wanted())
}

func (s *State) wanted() map[string][]WantedRun {
	wanted := map[string][]WantedRun{}
	for _, id := range sortedKeys(s.openChecks) {
		check := s.checks[id]
		if n := s.runsWanted(check); n > 0 {
			wanted[check.Job] = append(wanted[check.Job], s.wantedRun(check, n))
		}
	}
	return wanted
}

func (s *State) workOf(id string, wanted map[string][]WantedRun) (Work, bool) {
	job := s.jobs[id]
	w := Work{Job: job, Checks: wanted[id]}
	if !Ended(job.State) && job.State != musterpb.JobState_JOB_STATE_PAUSED {
		for _, n := range job.Requeued {
			w.Requeued = append(w.Requeued, s.tasks[taskKey{id, n}])
		}
		w.Next, w.End = job.NextTask, job.Tasks
	}
	return w, len(w.Requeued) > 0 || w.Next < w.End || len(w.Checks) > 0
}

func (s *State) wantedRun(check *musterpb.Check, n int) WantedRun {
	target, job := s.attempts[check.Target], s.jobs[check.Job]
	w := WantedRun{Check: check, Class: target.Class, Parties: []*musterpb.Attempt{target}, Runs: n}
	for _, id := range check.Runs {
		if run := s.attempts[id]; live(run.State) {
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

// ToCompare lists the checks that wait for a comparison.
func (s *State) ToCompare() []Comparable {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var list []Comparable
	for _, id := range sortedKeys(s.openChecks) {
		check := s.checks[id]
		committed, _ := s.runsOf(check)
		if pairs := verify.MissingPairs(check.Target, committed, check.Comparisons); len(pairs) > 0 {
			list = append(list, Comparable{check, pairs})
		}
	}
	return list
}

// LiveJobs counts the jobs that are not settled.
func (s *State) LiveJobs() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.liveJobs)
}

// Balance explains the money of an account.
func (s *State) Balance(account string) *musterpb.Balance {
	s.mu.RLock()
	defer s.mu.RUnlock()
	own := s.ledger.Account(ledger.Of(account))
	b := &musterpb.Balance{
		Account: account, BalanceMicroUsd: int64(own.Balance), HeldMicroUsd: int64(own.Held), PendingMicroUsd: int64(own.Expected),
	}
	for id := range s.liveJobs {
		if job := s.jobs[id]; job.Account == account {
			b.InJobsMicroUsd += int64(s.ledger.Account(ledger.OfJob(id)).Balance)
		}
	}
	for _, job := range s.jobs {
		if job.Account == account {
			b.SpentMicroUsd += job.SpentMicroUsd
		}
	}
	transfers, _ := s.ledger.Transfers(ledger.Of(account), 0, 1<<62)
	for _, t := range transfers {
		moved := t.Kind == musterpb.TransferKind_TRANSFER_KIND_MOVE
		switch {
		case t.Credit != ledger.Of(account):
		case moved && t.Debit == ledger.External:
			b.DepositedMicroUsd += t.AmountMicroUsd
		case t.Kind == musterpb.TransferKind_TRANSFER_KIND_POST || moved && t.Debit == ledger.Network:
			b.EarnedMicroUsd += t.AmountMicroUsd
		}
	}
	return b
}

// Accounts are the names of all accounts, sorted.
func (s *State) Accounts() []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return sortedKeys(s.accounts)
}

// LedgerAccount is the money of one ledger account, by its full name.
func (s *State) LedgerAccount(name string) ledger.Account {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.ledger.Account(name)
}

// LedgerSum is the sum over all ledger accounts: zero, or the book is broken.
func (s *State) LedgerSum() api.MicroUSD {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.ledger.Sum()
}

// HoldOpen reports whether a hold has been neither posted nor voided.
func (s *State) HoldOpen(transfer uint64) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.ledger.Open(transfer)
}

// Transfers lists transfers after an ID, of one account's own ledger account
// and its jobs' or, with an empty name, of all.
func (s *State) Transfers(account string, after uint64, limit int) (list []*musterpb.Transfer, more bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if account == "" {
		return s.ledger.Transfers("", after, limit)
	}
	names := []string{ledger.Of(account)}
	for _, job := range s.jobs {
		if job.Account == account {
			names = append(names, ledger.OfJob(job.Id))
		}
	}
	for _, name := range names {
		page, m := s.ledger.Transfers(name, after, limit)
		list, more = append(list, page...), more || m
	}
	slices.SortFunc(list, func(a, b *musterpb.Transfer) int { return cmp.Compare(a.Id, b.Id) })
	list = slices.CompactFunc(list, func(a, b *musterpb.Transfer) bool { return a.Id == b.Id })
	return list[:min(limit, len(list))], more || len(list) > limit
}

func sorted[V any](m map[string]V) []V {
	list := make([]V, 0, len(m))
	for _, k := range sortedKeys(m) {
		list = append(list, m[k])
	}
	return list
}
