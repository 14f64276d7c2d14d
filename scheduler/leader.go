package scheduler

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/place"
	"github.com/musternet/muster/scheduler/replica"
	"github.com/musternet/muster/scheduler/state"
	"github.com/musternet/muster/verify"
)

// Bounds of the leader's own work.
const (
	maxPlacements = replica.MaxTogether // of one round
	maxExaminers  = 4                   // results examined or compared at once
	maxCompares   = 64                  // examinations of one account's results, under way or waiting
	// maxAccountExaminers bounds how many of them work for one account's jobs, so
	// that nobody's large results keep those of everybody else waiting.
	maxAccountExaminers = 2
	// examineWithin bounds one examination: neither a store that hangs nor a
	// result without end may keep an examiner.
	examineWithin = 15 * time.Minute
	// unreadablePause is how long a comparison waits whose results could not be
	// read, and refusedPause how long placement does after a refusal: both change
	// the state themselves, and would try again at once without it.
	unreadablePause = 5 * time.Second
	refusedPause    = 250 * time.Millisecond
)

// leader is what only the leading scheduler has, for one term.
type leader struct {
	*Scheduler
	// ctx is that of the term. What was begun for a worker goes on when the
	// worker's stream breaks, and ends with the leadership.
	ctx       context.Context
	examiners *semaphore.Weighted
	bundles   *bundles
	// cores has a place for each core. Whoever computes on a session's goroutine
	// takes one: hundreds of goroutines that are ready to run would make Raft's
	// wait for their turn, and the lead be lost.
	cores chan struct{}
	wake  chan struct{} // capacity 1: sessions or leases changed

	mu        sync.Mutex
	sessions  map[string]*session            // guarded by mu; by worker
	touched   map[string]struct{}            // guarded by mu; workers whose session changed
	leases    map[string]*lease              // guarded by mu; by attempt
	began     int64                          // in the cluster's time
	waiting   map[string]int                 // guarded by mu; by account, see examining
	unread    map[string]time.Time           // guarded by mu; checks whose results can't be read, since when
	byAccount map[string]*semaphore.Weighted // guarded by mu; examiners of one account's jobs
	busy      map[string]bool                // guarded by mu; checks and attempts being examined
	closed    bool                           // guarded by mu; no session attaches any more
	work      sync.WaitGroup                 // what examine and beside began; grows under mu while not closed
}

// lease is the right of a worker to run an attempt.
type lease struct {
	worker   string
	deadline time.Time
	log      []byte // the newest output, at most maxLogTail
}

const maxLogTail = 64 << 10

func newLeader(ctx context.Context, s *Scheduler) *leader {
	l := &leader{
		Scheduler: s, ctx: ctx, cores: make(chan struct{}, runtime.GOMAXPROCS(0)), examiners: semaphore.NewWeighted(maxExaminers), wake: make(chan struct{}, 1),
		sessions: map[string]*session{}, touched: map[string]struct{}{}, leases: map[string]*lease{}, byAccount: map[string]*semaphore.Weighted{}, waiting: map[string]int{}, unread: map[string]time.Time{}, began: s.Replica.Now(), busy: map[string]bool{},
	}
	l.bundles = &bundles{l: l, pending: map[string]*pending{}}
	return l
}

// run runs the loops until the leadership ends.
func (l *leader) run(ctx context.Context) {
	l.grantLeases(l.State.LiveAttempts())
	var loops sync.WaitGroup
	for _, loop := range []func(context.Context){l.placeLoop, l.leaseLoop, l.batchLoop, l.compareLoop, l.sealLoop} {
		loops.Go(func() { loop(ctx) })
	}
	loops.Wait()
	l.close()
	l.work.Wait()
}

// close ends every session; the workers dial the new leader.
func (l *leader) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for _, s := range l.sessions {
		s.close()
	}
}

// grantLeases gives a full lease to every attempt that has none: a new leader
// knows nothing of the last heartbeats.
func (l *leader) grantLeases(live []*musterpb.Attempt) {
	deadline := time.Now().Add(l.Timing.LeaseTTL)
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range live {
		if l.leases[a.Id] == nil {
			l.leases[a.Id] = &lease{worker: a.Worker, deadline: deadline}
		}
	}
}

// nudge makes the loops look again.
func (l *leader) nudge() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// waitForChange returns when the state or a session changed, or after d.
func (l *leader) waitForChange(ctx context.Context, changed <-chan struct{}, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-changed:
	case <-l.wake:
	case <-timer.C:
	}
}

// assignment is what a worker learns of an attempt: the same for work and for
// checks.
func (l *leader) assignment(a *musterpb.Attempt) assignment {
	return assignment{l.State.Job(a.Job).Spec, a, l.State.ItemsOf(a)}
}

// seedOf is what draws the checkers of a batch's commits. A batch that failed
// closed has no seed; its digest is then at least not the leader's to choose
// after the commits.
func (l *leader) seedOf(epoch uint64) []byte {
	batches := l.State.Batches(epoch-1, 1)
	if len(batches) == 0 || batches[0].Epoch != epoch {
		return nil // no check that waits is of a batch that was sealed
	}
	if len(batches[0].Seed) > 0 {
		return batches[0].Seed
	}
	return batches[0].Digest
}

// How often the leader looks at what only time changes.
const (
	reconcileEvery = 5 * time.Second
	disputesEvery  = time.Second
)

// leaseLoop ends attempts whose worker was silent for too long, and disputes
// that nobody can decide.
func (l *leader) leaseLoop(ctx context.Context) {
	expiry := time.NewTicker(min(l.Timing.LeaseTTL/8, 250*time.Millisecond))
	defer expiry.Stop()
	reconcile := time.NewTicker(min(reconcileEvery, l.Timing.LeaseTTL/4))
	defer reconcile.Stop()
	disputes := time.NewTicker(min(disputesEvery, l.Timing.DisputePatience/4))
	defer disputes.Stop()
	stuck := map[string]time.Time{} // disputes that nobody can run, since when
	for {
		select {
		case <-ctx.Done():
			return
		case <-expiry.C:
			l.expireLeases(ctx)
		case <-reconcile.C:
			l.reconcileLeases(ctx)
		case <-disputes.C:
			l.touchSilent()
			l.giveUpDisputes(ctx, stuck)
		}
	}
}

// expireLeases ends the attempts whose lease ran out.
func (l *leader) expireLeases(ctx context.Context) {
	now := time.Now()
	var expired []string
	l.mu.Lock()
	for id, lease := range l.leases {
		if now.After(lease.deadline) && !l.busy[id] {
			expired = append(expired, id)
		}
	}
	l.mu.Unlock()
	for _, id := range expired {
		a := l.State.Attempt(id)
		if a == nil || !live(a) {
			l.dropLease(id)
			continue
		}
		reason := fmt.Sprintf("worker %s was not heard of for a whole lease (%s)", a.Worker, l.Timing.LeaseTTL)
		// An error means that it is over already, or that the leadership is.
		_ = l.end(ctx, &musterpb.EndAttempt{Attempt: id, State: musterpb.AttemptState_ATTEMPT_STATE_LOST, Reason: reason, Blame: musterpb.Blame_BLAME_NETWORK})
	}
}

func (l *leader) dropLease(attempt string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.leases, attempt)
}

// reconcileLeases brings the leases in line with what is live in the log, and
// ends attempts that last longer than their job allows.
func (l *leader) reconcileLeases(ctx context.Context) {
	l.grantLeases(l.State.LiveAttempts())
	var overdue []*musterpb.Attempt
	l.mu.Lock()
	maps.DeleteFunc(l.unread, func(id string, _ time.Time) bool {
		c := l.State.Check(id)
		return c == nil || c.ClosedUnixMs > 0
	})
	for id := range l.leases {
		switch a := l.State.Attempt(id); {
		case a == nil || !live(a):
			delete(l.leases, id)
		case !l.busy[id] && l.overdue(a):
			overdue = append(overdue, a)
		}
	}
	l.mu.Unlock()
	for _, a := range overdue {
		reason := fmt.Sprintf("worker %s neither delivered nor gave up within the job's time-out of %s and %s for fetching and uploading",
			a.Worker, time.Duration(l.State.Job(a.Job).Spec.TimeoutMs)*time.Millisecond, l.Timing.TransferLimit)
		_ = l.end(ctx, &musterpb.EndAttempt{Attempt: a.Id, State: musterpb.AttemptState_ATTEMPT_STATE_FAILED, Reason: reason, Blame: musterpb.Blame_BLAME_WORKER})
	}
}

// overdue reports whether an attempt lasts longer than its job allows, whatever
// its worker says: a lease that is renewed for ever would hold money for ever.
// Time in which nobody led, or another clock did, does not count.
func (l *leader) overdue(a *musterpb.Attempt) bool {
	since, limit := a.PlacedUnixMs, l.Timing.TransferLimit
	if a.StartedUnixMs > 0 {
		since, limit = a.StartedUnixMs, limit+time.Duration(l.State.Job(a.Job).Spec.TimeoutMs)*time.Millisecond
	}
	return l.Replica.Now()-max(since, l.began) > limit.Milliseconds()
}

// end ends an attempt without a result. An error of kind api.Unavailable means
// that it may not have ended.
func (l *leader) end(ctx context.Context, cmd *musterpb.EndAttempt) error {
	if _, err := l.Propose(ctx, &musterpb.Command{Body: &musterpb.Command_EndAttempt{EndAttempt: cmd}}); err != nil {
		l.Logger.Debug("an attempt could not be ended", "attempt", cmd.Attempt, "err", err)
		return err
	}
	l.Logger.Info("attempt ended without a result", "attempt", cmd.Attempt, "state", state.StateName(cmd.State), "reason", cmd.Reason)
	return nil
}

// giveUpDisputes ends the checks that need a run which no worker could ever
// take, for longer than the policy is patient; since says since when that is so.
// Owners who are only busy are waited for, and a check without a mismatch waits
// as long as it takes: its result stays provisional.
func (l *leader) giveUpDisputes(ctx context.Context, since map[string]time.Time) {
	now := time.Now()
	stuck := map[string]bool{}
	var workers []*place.Worker
	for _, w := range l.State.Wanting() {
		for _, run := range w.Checks {
			if len(run.Check.Comparisons) == 0 && !state.Ended(w.Job.State) {
				continue
			}
			if workers == nil {
				workers = l.views()
			}
			if place.Possible(workers, w.Job, &run) {
				continue
			}
			id := run.Check.Id
			stuck[id] = true
			if since[id].IsZero() {
				since[id] = now
			}
			if now.Sub(since[id]) < l.Timing.DisputePatience {
				continue
			}
			why := place.Explain(l.Replica.Now(), workers, w.Job, &run).Summary
			cmd := &musterpb.GiveUpCheck{Check: id, Reason: "no further owner could run it: " + why}
			if _, err := l.Propose(ctx, &musterpb.Command{Body: &musterpb.Command_GiveUpCheck{GiveUpCheck: cmd}}); err != nil {
				l.Logger.Debug("a check could not be given up", "check", id, "err", err)
			}
		}
	}
	maps.DeleteFunc(since, func(id string, _ time.Time) bool { return !stuck[id] })
}

// batchLoop closes batches, and gives up on reveals that do not come.
func (l *leader) batchLoop(ctx context.Context) {
	tick := time.NewTicker(l.Timing.BatchInterval)
	defer tick.Stop()
	var drawing uint64 // the epoch that waits for reveals, as seen last
	var since time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if b := l.State.Drawing(); b != nil {
			if b.Epoch != drawing {
				drawing, since = b.Epoch, time.Now()
			} else if time.Since(since) > l.Timing.RevealTimeout {
				l.failBatchClosed(ctx, b)
			}
			continue
		}
		waiting, free, epoch, digest := l.State.Committed() // no more than one batch takes
		if waiting == 0 || !free {
			continue
		}
		cmd := &musterpb.CloseBatch{Epoch: epoch, Digest: digest, Attempts: uint32(waiting)}
		if _, err := l.Propose(ctx, &musterpb.Command{Body: &musterpb.Command_CloseBatch{CloseBatch: cmd}}); err != nil {
			l.Logger.Debug("a batch could not be closed", "epoch", epoch, "err", err)
		}
	}
}

func (l *leader) failBatchClosed(ctx context.Context, b *musterpb.Batch) {
	var missing []string
	for _, id := range b.Committee {
		if !slices.ContainsFunc(b.Reveals, func(r *musterpb.Reveal) bool { return r.Node == id }) {
			missing = append(missing, id)
		}
	}
	cmd := &musterpb.FailBatchClosed{Epoch: b.Epoch, Reason: fmt.Sprintf("none within %s", l.Timing.RevealTimeout)}
	if _, err := l.Propose(ctx, &musterpb.Command{Body: &musterpb.Command_FailBatchClosed{FailBatchClosed: cmd}}); err != nil {
		l.Logger.Debug("a batch could not be failed closed", "epoch", b.Epoch, "err", err)
		return
	}
	l.Logger.Warn("reveals are missing: everything in the batch is checked", "epoch", b.Epoch, "missing", missing)
}

// compareLoop compares results that wait for it, a few at once. It learns of
// them from the journal; all that wait are looked through only now and then, for
// those whose results could not be read.
func (l *leader) compareLoop(ctx context.Context) {
	waiting := map[string][]string{} // checks by account, oldest first
	add := func(c state.Comparable) {
		if job := l.State.Job(c.Check.Job); job != nil {
			waiting[job.Account] = append(waiting[job.Account], c.Check.Id)
		}
	}
	again := time.NewTicker(unreadablePause)
	defer again.Stop()
	for cursor := uint64(0); ctx.Err() == nil; {
		changed := l.State.Changed()
		c, next := l.State.ChangesSince(cursor)
		cursor = next
		if c.Reset {
			clear(waiting)
			for _, c := range l.State.ToCompare() {
				add(c)
			}
		}
		for _, id := range c.Checks {
			if c, ok := l.State.ToCompareOf(id); ok {
				add(c)
			}
		}
		for account, list := range waiting {
			if waiting[account] = l.beginCompares(account, list); len(waiting[account]) == 0 {
				delete(waiting, account)
			}
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-again.C:
			cursor = 0
		}
	}
}

// beginCompares begins comparisons for an account, as many as it may have under
// way, and returns those that wait on: the first of the others to end changes
// the state.
func (l *leader) beginCompares(account string, checks []string) []string {
	for len(checks) > 0 && l.examining(account, 0) < maxCompares {
		if c, ok := l.State.ToCompareOf(checks[0]); ok {
			l.examine(account, c.Check.Id, func(ctx context.Context) (func(), error) { return l.compare(ctx, c) })
		}
		checks = checks[1:]
	}
	return checks
}

// examine runs f beside the caller, once an examiner is free, unless something
// with that key is under way, and then what f returns, for which no examiner is
// needed. After an error the key stays taken for a while.
func (l *leader) examine(account, key string, f func(context.Context) (then func(), err error)) {
	l.examining(account, 1)
	began := l.beside(key, func() {
		defer l.examining(account, -1)
		then, err := l.examineNow(account, f)
		if err == nil {
			then()
			return
		}
		select {
		case <-l.ctx.Done():
		case <-time.After(unreadablePause):
		}
	})
	if !began {
		l.examining(account, -1)
	}
}

func (l *leader) examineNow(account string, f func(context.Context) (func(), error)) (then func(), err error) {
	own := l.accountExaminers(account)
	if err := own.Acquire(l.ctx, 1); err != nil {
		return nil, err
	}
	defer own.Release(1)
	if err := l.examiners.Acquire(l.ctx, 1); err != nil {
		return nil, err
	}
	defer l.examiners.Release(1)
	ctx, cancel := context.WithTimeout(l.ctx, examineWithin)
	defer cancel()
	return f(ctx)
}

// accountExaminers bounds the examiners that work for one account's jobs.
func (l *leader) accountExaminers(account string) *semaphore.Weighted {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byAccount[account] == nil {
		l.byAccount[account] = semaphore.NewWeighted(maxAccountExaminers)
	}
	return l.byAccount[account]
}

// goBeside runs f beside the caller, and reports whether it does: a leader that
// stops begins nothing any more.
func (l *leader) goBeside(f func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	l.work.Go(f)
	return true
}

// beside runs f beside the caller, unless something with that key is under way.
func (l *leader) beside(key string, f func()) (began bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy[key] || l.closed {
		return false
	}
	l.busy[key] = true
	l.work.Go(func() {
		defer func() {
			l.mu.Lock()
			delete(l.busy, key)
			l.mu.Unlock()
			l.nudge()
		}()
		f()
	})
	return true
}

// unreadable puts off a comparison whose results can't be read, and gives the
// check up when that lasts: a blob that is lost for good may not hold a job, and
// its money, for ever.
func (l *leader) unreadable(check string, err error) error {
	if l.ctx.Err() != nil || api.KindOf(err) == api.Unavailable || errors.Is(err, context.DeadlineExceeded) {
		// The store can't be reached: work pauses, and goes on when it can.
		l.Logger.Warn("the blob store can't be reached for a comparison", "check", check, "err", err)
		return err
	}
	l.mu.Lock()
	if l.unread[check].IsZero() {
		l.unread[check] = time.Now()
	}
	since := l.unread[check]
	l.mu.Unlock()
	l.Logger.Warn("results could not be read for a comparison; it is tried again", "check", check, "err", err)
	if time.Since(since) < l.Timing.DisputePatience {
		return err
	}
	cmd := &musterpb.GiveUpCheck{Check: check, Reason: clip(fmt.Sprintf("results could not be read for %s: %v", l.Timing.DisputePatience, err), maxReason)}
	_, proposed := l.Propose(l.ctx, &musterpb.Command{Body: &musterpb.Command_GiveUpCheck{GiveUpCheck: cmd}})
	return proposed
}

// examining adds to the number of examinations of an account's results that are
// under way or wait for an examiner, and returns it.
func (l *leader) examining(account string, change int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting[account] += change
	n := l.waiting[account]
	if n == 0 {
		delete(l.waiting, account)
	}
	return n
}

// compare compares what a check has results of; an error means that they could
// not be read.
func (l *leader) compare(ctx context.Context, c state.Comparable) (then func(), err error) {
	job := l.State.Job(c.Check.Job)
	comparator, err := verify.ComparatorOf(job.Spec.Verify)
	if err != nil {
		l.Logger.Error("a job has no comparator", "job", job.Id, "err", err)
		return nil, err
	}
	cmd := &musterpb.RecordComparisons{Check: c.Check.Id}
	for _, pair := range c.Pairs {
		match, detail, err := l.comparePair(ctx, comparator, pair, c.Check.Items, job.Spec.Resources.GetDiskBytes())
		if err != nil {
			return func() {}, l.unreadable(c.Check.Id, err)
		}
		cmd.Comparisons = append(cmd.Comparisons, &musterpb.Comparison{A: pair[0], B: pair[1], Match: match, Detail: detail})
	}
	l.mu.Lock()
	delete(l.unread, c.Check.Id)
	l.mu.Unlock()
	return func() { l.record(cmd) }, nil
}

// record enters a comparison into the log.
func (l *leader) record(cmd *musterpb.RecordComparisons) {
	if _, err := l.Propose(l.ctx, &musterpb.Command{Body: &musterpb.Command_RecordComparisons{RecordComparisons: cmd}}); err != nil {
		l.Logger.Debug("a comparison was refused", "check", cmd.Check, "err", err)
		return
	}
	if v := l.State.Check(cmd.Check); v.GetVerdict() == musterpb.Verdict_VERDICT_FAILURE {
		l.Logger.Warn("a result was proved wrong", "job", v.Job, "attempt", v.Target, "reason", v.Reason)
	}
}

// comparePair compares the given items of two results.
func (l *leader) comparePair(ctx context.Context, comparator verify.Comparator, pair [2]string, items []uint64, limit int64) (bool, string, error) {
	a, err := l.openResult(ctx, l.State.Attempt(pair[0]), limit)
	if err != nil {
		return false, "", err
	}
	defer a.close()
	b, err := l.openResult(ctx, l.State.Attempt(pair[1]), limit)
	if err != nil {
		return false, "", err
	}
	defer b.close()
	for _, item := range items {
		if a.same(b, item) {
			continue // the digests were verified at commit
		}
		fa, err := a.item(ctx, item, comparator)
		if err != nil {
			return false, "", err
		}
		fb, err := b.item(ctx, item, comparator)
		if err != nil {
			return false, "", err
		}
		if match, detail := comparator.Compare(fa, fb); !match {
			return false, fmt.Sprintf("item %d: %s", a.value(item), detail), nil
		}
	}
	return true, "", nil
}

// Explain says why a job waits.
func (s *Scheduler) Explain(id string) (*musterpb.ExplainJobResponse, error) {
	l, err := s.leading()
	if err != nil {
		return nil, err
	}
	job := s.State.Job(id)
	if job == nil {
		return nil, api.Errorf(api.NotFound, "job %q is not known", id)
	}
	now, workers := l.Replica.Now(), l.views()
	out := place.Explain(now, workers, job, nil)
	switch {
	case state.Ended(job.State):
		out = &musterpb.ExplainJobResponse{Workers: out.Workers, Summary: "the job is " + state.StateName(job.State)}
	case job.State == musterpb.JobState_JOB_STATE_PAUSED:
		out.Summary = "paused: " + job.Reason
	case job.NextTask >= job.Tasks && len(job.Requeued) == 0:
		out.Summary = fmt.Sprintf("nothing of it waits for a worker: %d attempts are under way, %d results are being checked", job.LiveAttempts, job.OpenChecks)
	}
	for _, w := range s.State.Wanting() {
		if w.Job.Id == id && len(w.Checks) > 0 {
			run := w.Checks[0]
			wait := "checks wait"
			if len(w.Checks) == 1 {
				wait = "check waits"
			}
			out.Summary += fmt.Sprintf("; %d %s for another owner's worker: %s", len(w.Checks), wait, place.Explain(now, workers, job, &run).Summary)
		}
	}
	return out, nil
}
