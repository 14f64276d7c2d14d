package state

import (
	"cmp"
	"slices"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
)

// What readers get are the stored values themselves: they are never changed,
// and the reader must not change them either.

// Changed is closed when the next command is applied.
func (s *State) Changed() <-chan struct{} {
	s.mu.RLock()
	defer s.mu.RUnlock()
	s.watched.Store(true)
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
	return s.keys.Get(string(hash))
}

// HasAccount reports whether an account exists.
func (s *State) HasAccount(id string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.accounts.Get(id) != nil
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
	list := make([]*musterpb.Node, 0, len(s.nodes))
	for _, id := range sortedKeys(s.nodes) {
		list = append(list, s.nodes[id])
	}
	return list
}

// Worker is a worker, nil for an unknown one.
func (s *State) Worker(id string) *musterpb.Worker {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.workers.Get(id)
}

// Workers are all workers, by ID.
func (s *State) Workers() []*musterpb.Worker {
	s.mu.RLock()
	list := slices.Collect(s.workers.Values())
	s.mu.RUnlock()
	slices.SortFunc(list, func(a, b *musterpb.Worker) int { return cmp.Compare(a.Id, b.Id) })
	return list
}

// AnyWorker reports whether a worker satisfies f, which is called until one does.
func (s *State) AnyWorker(f func(*musterpb.Worker) bool) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for w := range s.workers.Values() {
		if f(w) {
			return true
		}
	}
	return false
}

// Records are the track records of an owner.
func (s *State) Records(owner string) []*musterpb.Record {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var list []*musterpb.Record
	for key, r := range s.records.All() {
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
	return s.jobs.Get(id)
}

// Jobs are the jobs of an account, or all with an empty name, newest first.
func (s *State) Jobs(account string, limit int) []*musterpb.Job {
	s.mu.RLock()
	var list []*musterpb.Job
	for job := range s.jobs.Values() {
		if account == "" || job.Account == account {
			list = append(list, job)
		}
	}
	s.mu.RUnlock()
	slices.SortFunc(list, func(a, b *musterpb.Job) int { return cmp.Compare(b.Sequence, a.Sequence) })
	return list[:min(limit, len(list))]
}

// Task is a task, nil for one that was never placed.
func (s *State) Task(job string, number uint32) *musterpb.Task {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.isDropped(job) {
		return nil
	}
	return s.tasks.Get(taskKey{job, number})
}

// Attempt is an attempt, nil for an unknown one.
func (s *State) Attempt(id string) *musterpb.Attempt {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.attempt(id)
}

// Attempts are the attempts of a job, in the order that they were placed in.
func (s *State) Attempts(job string) []*musterpb.Attempt {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var list []*musterpb.Attempt
	if j := s.jobs.Get(job); j != nil {
		for n := range j.NextTask {
			list, _ = s.appendOf(list, nil, s.tasks.Get(taskKey{job, n}))
		}
	}
	slices.SortStableFunc(list, func(a, b *musterpb.Attempt) int {
		return cmp.Or(cmp.Compare(a.PlacedUnixMs, b.PlacedUnixMs), cmp.Compare(a.Hold, b.Hold))
	})
	return list
}

// Checks are the checks of a job, oldest first.
func (s *State) Checks(job string) []*musterpb.Check {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var list []*musterpb.Check
	if j := s.jobs.Get(job); j != nil {
		for n := range j.NextTask {
			_, list = s.appendOf(nil, list, s.tasks.Get(taskKey{job, n}))
		}
	}
	slices.SortStableFunc(list, func(a, b *musterpb.Check) int { return cmp.Compare(a.OpenedUnixMs, b.OpenedUnixMs) })
	return list
}

// appendOf appends the attempts and the checks of a task.
func (s *State) appendOf(attempts []*musterpb.Attempt, checks []*musterpb.Check, task *musterpb.Task) ([]*musterpb.Attempt, []*musterpb.Check) {
	for _, id := range task.Attempts {
		a := s.attempts.Get(id)
		attempts = append(attempts, a)
		if a.Batch == 0 {
			continue // not drawn yet
		}
		if c := s.checks.Get(checkID(id)); c != nil {
			checks = append(checks, c)
			for _, run := range c.Runs {
				attempts = append(attempts, s.attempts.Get(run))
			}
		}
	}
	return attempts, checks
}

// Check is a check, nil for an unknown one.
func (s *State) Check(id string) *musterpb.Check {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.check(id)
}

// ItemsOf are the indexes of the items that an attempt works on, ascending.
func (s *State) ItemsOf(a *musterpb.Attempt) []uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.itemsOf(a)
}

// LiveAttempts are all attempts that a worker may be running, by ID.
func (s *State) LiveAttempts() []*musterpb.Attempt {
	s.mu.RLock()
	list := make([]*musterpb.Attempt, 0, s.index.running)
	for _, w := range s.index.workers {
		for id := range w.running {
			list = append(list, s.attempts.Get(id))
		}
	}
	s.mu.RUnlock()
	slices.SortFunc(list, func(a, b *musterpb.Attempt) int { return cmp.Compare(a.Id, b.Id) })
	return list
}

// CountLive counts the attempts that a worker may be running.
func (s *State) CountLive() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.index.running
}

// LiveAttemptsOf are those of one worker, in no order.
func (s *State) LiveAttemptsOf(worker string) []*musterpb.Attempt {
	s.mu.RLock()
	defer s.mu.RUnlock()
	x := s.index.workers[worker]
	if x == nil {
		return nil
	}
	list := make([]*musterpb.Attempt, 0, len(x.running))
	for id := range x.running {
		list = append(list, s.attempts.Get(id))
	}
	return list
}

// UseOf is what the live attempts of a worker use.
func (s *State) UseOf(worker string) Use {
	s.mu.RLock()
	defer s.mu.RUnlock()
	x := s.index.workers[worker]
	if x == nil {
		return Use{}
	}
	use := x.use
	use.Devices = slices.Clone(use.Devices)
	return use
}

// UsageOf is how many units (see Units) an account has running.
func (s *State) UsageOf(account string) int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if x := s.index.accounts[account]; x != nil {
		return x.units
	}
	return 0
}

// Committed counts the commits that wait for a batch, and says whether one
// may be closed; epoch and digest are those of the next batch.
func (s *State) Committed() (waiting int, free bool, epoch uint64, digest []byte) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	last := s.batches.Get(s.epoch)
	free = last == nil || last.Drawn
	waiting = min(len(s.openBatch), MaxBatch)
	if waiting > 0 {
		digest = s.batchDigest(s.epoch+1, s.openBatch[:waiting])
	}
	return waiting, free, s.epoch + 1, digest
}

// Drawing is the batch that waits for reveals, nil when there is none.
func (s *State) Drawing() *musterpb.Batch {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if b := s.batches.Get(s.epoch); b != nil && !b.Drawn {
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

// Batches are the batches after an epoch that are not sealed, up to a limit.
func (s *State) Batches(after uint64, limit int) []*musterpb.Batch {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var list []*musterpb.Batch
	for e := max(after, s.sealedEpoch) + 1; e <= s.epoch && len(list) < limit; e++ {
		list = append(list, s.batches.Get(e))
	}
	return list
}

// LiveJobs counts the jobs that are not settled.
func (s *State) LiveJobs() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.index.jobs)
}

// Balance explains the money of an account.
func (s *State) Balance(account string) *musterpb.Balance {
	s.mu.RLock()
	defer s.mu.RUnlock()
	own := s.ledger.Account(ledger.Of(account))
	// What came in and is neither there nor spent is in the jobs' own accounts.
	return &musterpb.Balance{
		Account: account, BalanceMicroUsd: int64(own.Balance), HeldMicroUsd: int64(own.Held), PendingMicroUsd: int64(own.Expected),
		DepositedMicroUsd: int64(own.Deposited), EarnedMicroUsd: int64(own.Earned), SpentMicroUsd: int64(own.Spent),
		InJobsMicroUsd: int64(own.Deposited + own.Earned - own.Balance - own.Spent),
	}
}

// Accounts are the names of all accounts, sorted.
func (s *State) Accounts() []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return keysOf(s.accounts)
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

// transfersPerLock bounds how many transfers are looked at before Apply has its
// turn.
const transfersPerLock = 4096

// Transfers lists transfers after an ID that are not sealed, of one account's
// own ledger account and its jobs' or, with an empty name, of all.
func (s *State) Transfers(account string, after uint64, limit int) (list []*musterpb.Transfer, more bool) {
	s.mu.RLock()
	tail := s.ledger.Tail(after)
	s.mu.RUnlock()
	if account == "" {
		n := min(limit, len(tail))
		return tail[:n:n], n < len(tail)
	}
	for len(tail) > 0 && len(list) <= limit {
		n := min(transfersPerLock, len(tail))
		list = append(list, s.transfersOf(account, tail[:n], limit+1-len(list))...)
		tail = tail[n:]
	}
	n := min(limit, len(list))
	return list[:n:n], n < len(list)
}

// transfersOf picks an account's transfers, up to a limit.
func (s *State) transfersOf(account string, transfers []*musterpb.Transfer, limit int) (list []*musterpb.Transfer) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	own := ledger.Of(account)
	belongs := func(name string) bool {
		if job, ok := ledger.JobOf(name); ok {
			return s.jobs.Get(job).GetAccount() == account
		}
		return name == own
	}
	for _, t := range transfers {
		if len(list) < limit && (belongs(t.Debit) || belongs(t.Credit)) {
			list = append(list, t)
		}
	}
	return list
}

// Segments are where finished work was sealed, oldest first.
func (s *State) Segments() []*musterpb.Segment {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Clip(s.segments)
}
