package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/server"
	"github.com/musternet/muster/bench/load/fleet"
	"github.com/musternet/muster/bench/load/network"
)

// jobs are the jobs that a run has submitted, and what its workers saw of them.
type jobs struct {
	clients []*client.Client // of the customers
	clock   func() int64     // the fleet's

	submits   latencies // the calls
	assigned  latencies // from a job's submission to its first attempt at a worker
	answered  latencies // from an assignment to the answer to its result
	attempts  atomic.Int64
	onAttempt atomic.Pointer[func(job int, attempt string, at int64)]

	mu        sync.Mutex
	list      []*job         // guarded by mu; by number
	unsettled []*job         // guarded by mu
	refusals  map[string]int // guarded by mu; results that were refused, by reason
}

// job is one submitted job.
type job struct {
	number    int
	items     int
	client    *client.Client
	id        atomic.Pointer[string] // set once it is submitted
	submitted atomic.Int64           // on the fleet's clock
	began     atomic.Int64           // when its first attempt came to a worker
	placed    chan struct{}          // closed then
	answered  atomic.Int64           // results that were taken, of checks too
	last      *musterpb.Job          // guarded by jobs.mu; as the schedulers said last
	cancelled bool                   // guarded by jobs.mu; on purpose
}

var _ fleet.Watcher = (*jobs)(nil)

// add makes a job with the next number, which its command will carry.
func (j *jobs) add(items int) *job {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := len(j.list)
	job := &job{number: n, items: items, client: j.clients[n%len(j.clients)], placed: make(chan struct{})}
	j.list = append(j.list, job)
	return job
}

func (j *jobs) get(number int) *job {
	j.mu.Lock()
	defer j.mu.Unlock()
	if number < 0 || number >= len(j.list) {
		return nil
	}
	return j.list[number]
}

// submit submits a job.
func (j *jobs) submit(ctx context.Context, job *job, spec *musterpb.JobSpec) error {
	job.submitted.Store(j.clock())
	id := client.NewID()
	resp, err := patiently(ctx, func() (*connect.Response[musterpb.SubmitJobResponse], error) {
		return job.client.SubmitJob(ctx, connect.NewRequest(&musterpb.SubmitJobRequest{Id: id, Spec: spec}))
	})
	if err != nil {
		return fmt.Errorf("submitting: %w", err)
	}
	j.submits.add(j.clock() - job.submitted.Load())
	job.id.Store(&resp.Msg.Job)
	j.mu.Lock()
	defer j.mu.Unlock()
	j.unsettled = append(j.unsettled, job)
	return nil
}

// Assigned implements fleet.Watcher.
func (j *jobs) Assigned(number int, attempt string, at int64) {
	j.attempts.Add(1)
	if f := j.onAttempt.Load(); f != nil {
		(*f)(number, attempt, at)
	}
	if job := j.get(number); job != nil && job.began.CompareAndSwap(0, at) {
		j.assigned.add(at - job.submitted.Load())
		close(job.placed)
	}
}

// Answered implements fleet.Watcher.
func (j *jobs) Answered(number int, accepted bool, reason string, assigned, at int64) {
	job := j.get(number)
	if job == nil {
		return
	}
	if !accepted {
		j.mu.Lock()
		defer j.mu.Unlock()
		if j.refusals == nil {
			j.refusals = map[string]int{}
		}
		j.refusals[reason]++
		return
	}
	job.answered.Add(1)
	j.answered.add(at - assigned)
}

// outstanding counts the jobs that are not settled.
func (j *jobs) outstanding() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.unsettled)
}

// look asks the schedulers about the jobs all of whose results were answered,
// or about all with everything set, and drops those that are settled.
func (j *jobs) look(ctx context.Context, everything bool) error {
	j.mu.Lock()
	list := slices.Clone(j.unsettled)
	j.mu.Unlock()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(lookTogether)
	for _, job := range list {
		if everything || j.mayBeSettled(job) {
			g.Go(func() error { return j.check(gctx, job) })
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.unsettled = slices.DeleteFunc(j.unsettled, func(job *job) bool { return job.last.GetSettled() })
	return nil
}

// lookTogether is how many jobs are asked about at once.
const lookTogether = 8

// check asks about a job, and wants one that is settled verified, or cancelled
// on purpose.
func (j *jobs) check(ctx context.Context, job *job) error {
	now, err := j.ask(ctx, job)
	switch {
	case err != nil && api.KindOf(err) == api.NotFound:
		return nil // the scheduler that was asked does not know it yet
	case err != nil:
		return err
	case !now.Settled || now.State == musterpb.JobState_JOB_STATE_CANCELLED:
		return nil
	case now.State != musterpb.JobState_JOB_STATE_VERIFIED || now.ItemsVerified != uint64(job.items):
		return fmt.Errorf("job %s of %d items ended as %s with %d verified: %s", now.Id, job.items, now.State, now.ItemsVerified, now.Reason)
	}
	return nil
}

// mayBeSettled reports whether it is worth asking: the generator knows what its
// workers delivered.
func (j *jobs) mayBeSettled(job *job) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return job.cancelled || job.answered.Load() >= int64(job.items)
}

// ask asks any scheduler about a job.
func (j *jobs) ask(ctx context.Context, job *job) (*musterpb.Job, error) {
	resp, err := patiently(ctx, func() (*connect.Response[musterpb.GetJobResponse], error) {
		req := connect.NewRequest(&musterpb.GetJobRequest{Job: *job.id.Load()})
		req.Header().Set(server.HeaderRead, "stale") // it is asked again
		return job.client.GetJob(ctx, req)
	})
	if err != nil {
		return nil, err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	job.last = resp.Msg.Job
	return job.last, nil
}

// detail is a job with all its attempts and checks.
func (j *jobs) detail(ctx context.Context, job *job) (*musterpb.GetJobResponse, error) {
	return patiently(ctx, func() (*musterpb.GetJobResponse, error) { return job.client.Detail(ctx, *job.id.Load()) })
}

// tries is how often a call is made whose scheduler is killed while it answers.
const tries = 5

// patiently repeats a call that was cut off: it may be made twice.
func patiently[T any](ctx context.Context, call func() (T, error)) (resp T, err error) {
	for range tries {
		resp, err = call()
		if code := connect.CodeOf(err); err == nil || ctx.Err() != nil || code != connect.CodeUnknown && code != connect.CodeUnavailable && code != connect.CodeInternal {
			break
		}
	}
	return resp, err
}

// verified counts the items that are verified now.
func (j *jobs) verified(ctx context.Context) (int, error) {
	if err := j.look(ctx, true); err != nil {
		return 0, err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	n := 0
	for _, job := range j.list {
		if job.last != nil {
			n += int(job.last.ItemsVerified)
		}
	}
	return n, nil
}

// settleWithin is how long what was submitted may take after the last
// submission.
const settleWithin = 2 * time.Minute

// waitSettled waits until every job is settled.
func (j *jobs) waitSettled(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleWithin)
	defer cancel()
	n := 0
	err := network.Poll(ctx, 20*time.Millisecond, func() (bool, error) {
		// An answer that was lost with its leader is not heard again.
		n++
		err := j.look(ctx, n%100 == 0)
		return j.outstanding() == 0, err
	})
	if err != nil {
		return fmt.Errorf("%d jobs are not settled: %w", j.outstanding(), err)
	}
	return nil
}

// resetLatencies starts all of them anew.
func (j *jobs) resetLatencies() {
	for _, l := range []*latencies{&j.submits, &j.assigned, &j.answered} {
		l.take()
	}
}

// latencies are durations, in milliseconds.
type latencies struct {
	mu   sync.Mutex
	list []float64 // guarded by mu
}

func (l *latencies) add(ns int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.list = append(l.list, float64(ns)/1e6)
}

// take returns the durations so far, and forgets them.
func (l *latencies) take() []float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	list := l.list
	l.list = nil
	return list
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
