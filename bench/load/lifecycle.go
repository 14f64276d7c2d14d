package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
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
	"github.com/musternet/muster/verify"
)

// world is a network with a fleet and accounts, ready to be measured.
type world struct {
	net   *network.Network
	fleet *fleet.Fleet
	jobs  *jobs
	image *musterpb.Image
}

// customers is how many accounts submit.
const customers = 4

// newWorld starts a network with workers, and earns their owners the record
// with which samples are drawn at the policy's rate.
func newWorld(ctx context.Context, o options) (_ *world, err error) {
	w := &world{jobs: &jobs{}}
	if w.net, err = network.Start(ctx, network.Config{Binary: o.binary, Dir: filepath.Join(o.dir, "net"), Schedulers: o.schedulers}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	owners := max(o.workers/20, 5)
	keys, err := w.accounts(ctx, "owner", owners)
	if err != nil {
		return nil, err
	}
	payers, err := w.accounts(ctx, "customer", customers)
	if err != nil {
		return nil, err
	}
	for i := range payers {
		if err := w.net.Deposit(ctx, "customer-"+strconv.Itoa(i), 10_000_000*api.Dollars); err != nil {
			return nil, err
		}
		c, err := client.New(client.Config{Addresses: w.net.Addresses, Key: payers[i], Patience: 30 * time.Second})
		if err != nil {
			return nil, err
		}
		w.jobs.clients = append(w.jobs.clients, c)
	}
	// An image of a registry is one application whoever runs it, so that one
	// warm-up does for all customers.
	digest := string(api.DigestOf([]byte("simulated")))
	w.image = &musterpb.Image{
		Kind: musterpb.ImageKind_IMAGE_KIND_REGISTRY, Ref: "registry.example/simulated@" + digest, Digest: digest,
		Platforms: []string{"linux/amd64"}, Name: "registry.example/simulated",
	}
	before := heapBytes()
	w.fleet, err = fleet.Start(ctx, fleet.Config{Addresses: w.net.Addresses, Keys: keys, Workers: o.workers, Slots: o.slots, Watch: w.jobs})
	if err != nil {
		return nil, err
	}
	w.jobs.clock = w.fleet.Now
	fmt.Printf("%d schedulers, %d workers of %d owners, %d slots each; the generator's heap per worker is %d KiB\n",
		o.schedulers, o.workers, owners, o.slots, (heapBytes()-min(before, heapBytes()))/uint64(o.workers)>>10)
	return w, w.warmUp(ctx, o, owners)
}

func (w *world) accounts(ctx context.Context, kind string, n int) ([]string, error) {
	keys := make([]string, n)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i := range keys {
		g.Go(func() (err error) {
			keys[i], err = w.net.Account(ctx, kind+"-"+strconv.Itoa(i))
			return err
		})
	}
	return keys, g.Wait()
}

func (w *world) close() {
	if w.fleet != nil {
		if err := w.fleet.Stop(); err != nil {
			fmt.Println("stopping the fleet:", err)
		}
	}
	if err := w.net.Stop(); err != nil {
		fmt.Println("stopping the schedulers:", err)
	}
}

// spec is a job of n tasks of one item.
func (w *world) spec(job, n int) *musterpb.JobSpec {
	return &musterpb.JobSpec{
		Name: "load", Command: fleet.Command(job), Items: &musterpb.Items{Count: uint64(n)}, Chunk: 1, Retries: 3, TimeoutMs: 60_000,
		Image: w.image, Resources: &musterpb.Resources{MilliCpus: 1000, MemoryBytes: 1 << 30, DiskBytes: 1 << 20},
		MaxPriceMicroUsdPerHour: 100_000, BudgetMicroUsd: int64(n+1) * 4 * 1700, Verify: &musterpb.Verify{Comparator: "exact", RatePpm: verify.FloorPPM},
	}
}

// warmUpRounds bounds the jobs that earn the owners their record.
const warmUpRounds = 20

// warmUp runs tasks that take a whole worker each, and long enough that every
// worker gets one, until each owner has passed enough checks.
func (w *world) warmUp(ctx context.Context, o options, owners int) error {
	began := time.Now()
	w.fleet.SetRuntime(time.Second)
	defer w.fleet.SetRuntime(0)
	for range warmUpRounds {
		proven, err := w.proven(ctx)
		if err != nil {
			return err
		}
		if proven == owners {
			fmt.Printf("warm-up: every owner has passed %d checks after %.1f s\n", verify.ProvenAfter, time.Since(began).Seconds())
			return nil
		}
		number := w.jobs.add(o.workers)
		spec := w.spec(number, o.workers)
		spec.Resources.MilliCpus = int64(o.slots) * 1000
		if err := w.jobs.submit(ctx, number, spec); err != nil {
			return err
		}
		if err := w.jobs.waitSettled(ctx); err != nil {
			return err
		}
	}
	return fmt.Errorf("after %d rounds, not every owner has passed %d checks", warmUpRounds, verify.ProvenAfter)
}

// proven counts the owners that have passed enough checks.
func (w *world) proven(ctx context.Context) (int, error) {
	resp, err := w.net.Client.ListWorkers(ctx, connect.NewRequest(&musterpb.ListWorkersRequest{}))
	if err != nil {
		return 0, err
	}
	passed := map[string]bool{}
	for _, s := range resp.Msg.Workers {
		for _, r := range s.Records {
			if r.Passed >= verify.ProvenAfter {
				passed[r.Owner] = true
			}
		}
	}
	return len(passed), nil
}

// jobs are the jobs of a run, and what is known of them.
type jobs struct {
	clients []*client.Client
	clock   func() int64

	mu        sync.Mutex
	list      []*job // guarded by mu; by number
	unsettled []*job // guarded by mu
	assigned  latencies
	answered  latencies
	submits   latencies
	settles   latencies
	refusals  map[string]int // guarded by mu; results that were refused, by reason
}

// job is one submitted job.
type job struct {
	number    int
	items     int
	id        string // set under mu, once it is submitted
	client    *client.Client
	submitted atomic.Int64 // on the fleet's clock
	began     atomic.Int64
	answered  atomic.Int64 // results that were taken, of checks too
	last      *musterpb.Job
}

var _ fleet.Watcher = (*jobs)(nil)

func (j *jobs) add(items int) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := len(j.list)
	j.list = append(j.list, &job{number: n, items: items, client: j.clients[n%len(j.clients)]})
	return n
}

func (j *jobs) get(number int) *job {
	j.mu.Lock()
	defer j.mu.Unlock()
	if number < 0 || number >= len(j.list) {
		return nil
	}
	return j.list[number]
}

// submit submits the job of a number that add gave.
func (j *jobs) submit(ctx context.Context, number int, spec *musterpb.JobSpec) error {
	job := j.get(number)
	job.submitted.Store(j.clock())
	resp, err := job.client.SubmitJob(ctx, connect.NewRequest(&musterpb.SubmitJobRequest{Id: client.NewID(), Spec: spec}))
	if err != nil {
		return fmt.Errorf("submitting: %w", err)
	}
	j.submits.add(j.clock() - job.submitted.Load())
	j.mu.Lock()
	defer j.mu.Unlock()
	job.id = resp.Msg.Job
	j.unsettled = append(j.unsettled, job)
	return nil
}

// Assigned implements fleet.Watcher.
func (j *jobs) Assigned(number int, index uint64, at int64) {
	if job := j.get(number); job != nil && job.began.CompareAndSwap(0, at) {
		j.assigned.add(at - job.submitted.Load())
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
	settled := map[*job]bool{}
	for _, job := range list {
		if !everything && job.answered.Load() < int64(job.items) {
			continue
		}
		req := connect.NewRequest(&musterpb.GetJobRequest{Job: job.id})
		req.Header().Set(server.HeaderRead, "stale")
		resp, err := job.client.GetJob(ctx, req)
		if err != nil {
			if api.KindOf(err) == api.NotFound {
				continue // the scheduler that was asked does not know it yet
			}
			return err
		}
		job.last = resp.Msg.Job
		if settled[job] = job.last.Settled; settled[job] {
			j.settles.add(j.clock() - job.submitted.Load())
			if job.last.State != musterpb.JobState_JOB_STATE_VERIFIED || job.last.ItemsVerified != uint64(job.items) {
				return fmt.Errorf("job %s of %d items ended as %s with %d verified: %s", job.id, job.items, job.last.State, job.last.ItemsVerified, job.last.Reason)
			}
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.unsettled = slices.DeleteFunc(j.unsettled, func(job *job) bool { return settled[job] })
	return nil
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
	err := network.Poll(ctx, 50*time.Millisecond, func() (bool, error) {
		err := j.look(ctx, false)
		return j.outstanding() == 0, err
	})
	if err != nil {
		return fmt.Errorf("%d jobs are not settled: %w", j.outstanding(), err)
	}
	return nil
}

// latencies are durations in nanoseconds.
type latencies struct {
	mu   sync.Mutex
	list []int64 // guarded by mu
}

func (l *latencies) add(d int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.list = append(l.list, d)
}

func (l *latencies) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.list = l.list[:0]
}

func (l *latencies) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.list) == 0 {
		return "none"
	}
	sorted := slices.Sorted(slices.Values(l.list))
	at := func(q float64) time.Duration {
		return time.Duration(sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]).Round(10 * time.Microsecond)
	}
	return fmt.Sprintf("p50 %s p99 %s max %s (%d)", at(0.5), at(0.99), at(1), len(sorted))
}

// taskPerJob is how many items the jobs of the lifecycle have.
const tasksPerJob = 1000

// lifecycle measures the whole life of tasks: submitted in jobs of 1,000 items,
// placed, run by a program that ends at once, committed, drawn at 3%, checked,
// paid. There are always enough jobs that no slot of the fleet waits.
func lifecycle(ctx context.Context, o options) error {
	w, err := newWorld(ctx, o)
	if err != nil {
		return err
	}
	defer w.close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	enough := max(4, 2*o.workers*o.slots/tasksPerJob)
	g, gctx := errgroup.WithContext(ctx)
	feed, stopFeeding := context.WithCancel(gctx)
	defer stopFeeding()
	var slots = make(chan struct{}, enough)
	for range o.clients {
		g.Go(func() error {
			for {
				select {
				case <-feed.Done():
					return nil
				case slots <- struct{}{}:
				}
				number := w.jobs.add(tasksPerJob)
				if err := w.jobs.submit(gctx, number, w.spec(number, tasksPerJob)); err != nil {
					return err
				}
			}
		})
	}
	g.Go(func() error {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-feed.Done():
				return nil
			case <-tick.C:
			}
			if err := w.jobs.look(gctx, false); err != nil {
				return err
			}
			for len(slots) > w.jobs.outstanding() {
				<-slots
			}
		}
	})
	g.Go(func() error {
		defer stopFeeding()
		return w.measure(gctx, o)
	})
	if err := g.Wait(); err != nil {
		return err
	}
	if err := w.jobs.waitSettled(ctx); err != nil {
		return err
	}
	return w.checkAll(ctx)
}

// rampUp is how long the load runs before it is measured.
const rampUp = 3 * time.Second

func (w *world) measure(ctx context.Context, o options) error {
	if err := sleep(ctx, rampUp); err != nil {
		return err
	}
	for _, l := range []*latencies{&w.jobs.assigned, &w.jobs.answered, &w.jobs.submits, &w.jobs.settles} {
		l.reset()
	}
	before, err := w.net.Usages()
	if err != nil {
		return err
	}
	began, self := time.Now(), selfCPU()
	from, err := w.jobs.verified(ctx)
	if err != nil {
		return err
	}
	if err := sleep(ctx, o.duration); err != nil {
		return err
	}
	to, err := w.jobs.verified(ctx)
	if err != nil {
		return err
	}
	took, tasks := time.Since(began), float64(to-from)
	self = selfCPU() - self
	after, err := w.net.Usages()
	if err != nil {
		return err
	}
	leader, err := w.net.Leader(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("lifecycle: %.0f tasks/s (%.0f tasks in %.1f s)\n", tasks/took.Seconds(), tasks, took.Seconds())
	total := self
	line := ""
	for i := range after {
		used := after[i].CPU - before[i].CPU
		total += used
		name := "follower"
		if i == leader {
			name = "leader"
		}
		line += fmt.Sprintf(", %s %.2f s (%.1f µs/task, RSS %d MiB)", name, used.Seconds(), used.Seconds()*1e6/tasks, after[i].RSSBytes>>20)
	}
	fmt.Printf("CPU: %.1f µs/task in all; generator %.2f s (%.1f µs/task)%s\n", total.Seconds()*1e6/tasks, self.Seconds(), self.Seconds()*1e6/tasks, line)
	fmt.Printf("submit call: %s\nsubmit to first assignment of a job: %s\nassignment to answer: %s\njob settled: %s\n",
		&w.jobs.submits, &w.jobs.assigned, &w.jobs.answered, &w.jobs.settles)
	return nil
}

// checkAll wants every item accounted for, the books in balance, and all
// schedulers of one mind.
func (w *world) checkAll(ctx context.Context) error {
	w.jobs.mu.Lock()
	defer w.jobs.mu.Unlock()
	items, checks := 0, 0
	for _, job := range w.jobs.list {
		if job.last == nil || !job.last.Settled {
			return fmt.Errorf("job %s was never settled", job.id)
		}
		items, checks = items+job.items, checks+int(job.last.Checks)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var seen []string
	err := network.Poll(ctx, 100*time.Millisecond, func() (bool, error) {
		seen = nil
		for i := range w.net.Schedulers {
			m, err := w.net.Status(ctx, i)
			if err != nil {
				return false, err
			}
			if m.LedgerSumMicroUsd != 0 {
				return false, fmt.Errorf("scheduler %d: the ledger's sum is %d", i, m.LedgerSumMicroUsd)
			}
			if text := fmt.Sprintf("applied %d, state %x", m.AppliedIndex, m.StateHash); !slices.Contains(seen, text) {
				seen = append(seen, text)
			}
		}
		return len(seen) == 1, nil
	})
	if err != nil {
		return fmt.Errorf("the schedulers do not agree (%v): %w", seen, err)
	}
	fmt.Printf("checked: %d items in %d jobs are verified, %d check runs; the books are in balance; %d schedulers agree; %d results were refused %v\n",
		items, len(w.jobs.list), checks, len(w.net.Schedulers), w.fleet.Refused(), w.jobs.refusals)
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
