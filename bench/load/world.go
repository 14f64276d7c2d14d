package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/bench/load/fleet"
	"github.com/musternet/muster/bench/load/network"
	"github.com/musternet/muster/verify"
)

// world is a network with accounts and a fleet, ready to be measured.
type world struct {
	bench  *bench
	net    *network.Network
	fleet  *fleet.Fleet // nil before startFleet
	jobs   *jobs
	image  *musterpb.Image
	owners []string // keys
	warm   int      // jobs of the warm-up
}

// Accounts of a world.
const (
	customers       = 4
	workersPerOwner = 20
	leastOwners     = 5
)

// newWorld starts a network with accounts for so many workers, and with more
// flags of its schedulers.
func newWorld(ctx context.Context, b *bench, schedulers, workers int, flags ...string) (_ *world, err error) {
	b.worlds++
	w := &world{bench: b, jobs: &jobs{}}
	cfg := network.Config{
		Binary: b.binary, Dir: filepath.Join(b.dir, "net-"+strconv.Itoa(b.worlds)), Schedulers: schedulers,
		Flags: slices.Concat(b.flags, flags),
	}
	if w.net, err = network.Start(ctx, cfg); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.owners, err = w.accounts(ctx, "owner", max(workers/workersPerOwner, leastOwners)); err != nil {
		return nil, err
	}
	payers, err := w.accounts(ctx, "customer", customers)
	if err != nil {
		return nil, err
	}
	for i, key := range payers {
		if err := w.net.Deposit(ctx, "customer-"+strconv.Itoa(i), 10_000_000*api.Dollars); err != nil {
			return nil, err
		}
		c, err := w.client(key)
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
	return w, nil
}

func (w *world) client(key string) (*client.Client, error) {
	return client.New(client.Config{Addresses: w.net.Addresses, Key: key, Patience: 30 * time.Second})
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

// startFleet connects workers with so many slots each.
func (w *world) startFleet(ctx context.Context, workers, slots int) (err error) {
	w.fleet, err = fleet.Start(ctx, fleet.Config{Addresses: w.net.Addresses, Keys: w.owners, Workers: workers, Slots: slots, Watch: w.jobs})
	if err == nil {
		w.jobs.clock = w.fleet.Now
	}
	return err
}

// newWarmWorld is a world with a fleet whose owners have the record with which
// samples are drawn at the policy's rate.
func newWarmWorld(ctx context.Context, b *bench, schedulers, workers, slots int, flags ...string) (*world, error) {
	w, err := newWorld(ctx, b, schedulers, workers, flags...)
	if err != nil {
		return nil, err
	}
	if err = w.startFleet(ctx, workers, slots); err == nil {
		err = w.warmUp(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, w.close())
	}
	return w, nil
}

// close stops everything.
func (w *world) close() error {
	var errs []error
	if w.fleet != nil {
		errs = append(errs, w.fleet.Stop())
		w.fleet = nil
	}
	return errors.Join(append(errs, w.net.Stop())...)
}

// spec is a job of n tasks of one item, each of one slot.
func (w *world) spec(job *job) *musterpb.JobSpec {
	return &musterpb.JobSpec{
		Name: "load", Command: fleet.Command(job.number), Items: &musterpb.Items{Count: uint64(job.items)}, Chunk: 1, Retries: 3, TimeoutMs: 60_000,
		Image: w.image, Resources: &musterpb.Resources{MilliCpus: 1000, MemoryBytes: 1 << 30, DiskBytes: 1 << 20},
		// Four attempts of a task at once at the most that each may cost.
		MaxPriceMicroUsdPerHour: fleet.PriceMicroUSDPerHour, BudgetMicroUsd: int64(job.items+1) * 4 * 1700,
		Verify: &musterpb.Verify{Comparator: "exact", RatePpm: verify.FloorPPM},
	}
}

// submit submits one more job of n tasks.
func (w *world) submit(ctx context.Context, n int) (*job, error) {
	job := w.jobs.add(n)
	return job, w.jobs.submit(ctx, job, w.spec(job))
}

// warmUpRounds bounds the jobs that earn the owners their record.
const warmUpRounds = 20

// warmUp runs tasks that take a whole worker each, and long enough that every
// worker gets one, until each owner has passed enough checks.
func (w *world) warmUp(ctx context.Context) error {
	began := time.Now()
	w.fleet.SetRuntime(time.Second)
	defer w.fleet.SetRuntime(0)
	defer func() { w.jobs.resetLatencies() }()
	for range warmUpRounds {
		proven, err := w.proven(ctx)
		if err != nil {
			return err
		}
		if proven == len(w.owners) {
			w.bench.logf("warm-up: each of %d owners has passed %d checks after %.1f s", proven, verify.ProvenAfter, time.Since(began).Seconds())
			return nil
		}
		job := w.jobs.add(w.fleet.Workers)
		spec := w.spec(job)
		spec.Resources.MilliCpus *= int64(w.fleet.Slots)
		if err := w.jobs.submit(ctx, job, spec); err != nil {
			return err
		}
		w.warm++
		if err := w.jobs.waitSettled(ctx); err != nil {
			return fmt.Errorf("warm-up: %w", err)
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

// checkAll wants every item accounted for, the books in balance, and all
// schedulers of one mind. Every measurement that settles its jobs ends with it.
// The attempts of a sample of jobs are looked at, or with everyJob those of all.
func (w *world) checkAll(ctx context.Context, sampled int) error {
	items, checks, err := w.jobs.account()
	if err != nil {
		return err
	}
	paid, err := w.checkPayments(ctx, sampled)
	if err != nil {
		return err
	}
	if err := w.agree(ctx); err != nil {
		return err
	}
	w.bench.logf("checked: all of %d items in %d jobs are verified, with %d check runs; payments are right, attempt by attempt, in %s; the books are in balance, and %d schedulers agree; %d results were refused",
		items, len(w.jobs.list), checks, ofJobs(paid, len(w.jobs.list)-w.warm), len(w.net.Schedulers), w.fleet.Refused())
	return nil
}

// account counts items and check runs of all jobs, and wants each job settled.
func (j *jobs) account() (items, checks int, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, job := range j.list {
		if job.last == nil || !job.last.Settled || !job.cancelled && job.last.ItemsVerified != uint64(job.items) {
			return 0, 0, fmt.Errorf("job %d of %d items is not accounted for: %v", job.number, job.items, job.last)
		}
		items, checks = items+int(job.last.ItemsVerified), checks+int(job.last.Checks)
	}
	return items, checks, nil
}

const (
	// sampledJobs is how many jobs are looked at attempt by attempt.
	sampledJobs = 5
	everyJob    = math.MaxInt
	// payWithin bounds how long payments are looked at.
	payWithin = 10 * time.Second
)

// ofJobs says how many of all jobs were looked at.
func ofJobs(n, all int) string {
	if n == all {
		return fmt.Sprintf("all of %d jobs", all)
	}
	return fmt.Sprintf("a sample of %d of %d jobs", n, all)
}

// checkPayments wants every task of so many jobs paid once, and returns how many
// jobs it had the time for.
func (w *world) checkPayments(ctx context.Context, sampled int) (int, error) {
	began, list := time.Now(), w.sample(sampled)
	rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] }) // where time ends, the rest is a sample, too
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(lookTogether)
	paid := 0
	for _, job := range list {
		if time.Since(began) > payWithin {
			break
		}
		paid++
		g.Go(func() error {
			resp, err := w.jobs.detail(gctx, job)
			if err != nil {
				return err
			}
			return paidOnce(resp)
		})
	}
	return paid, g.Wait()
}

// paidOnce wants every task of a job paid once.
func paidOnce(resp *musterpb.GetJobResponse) error {
	paid, spent := map[uint32]int{}, int64(0)
	for _, a := range resp.Attempts {
		if spent += a.PaidMicroUsd; a.Check == "" && a.State == musterpb.AttemptState_ATTEMPT_STATE_VERIFIED {
			paid[a.Task]++
		}
	}
	for n := range resp.Job.Tasks {
		if paid[n] > 1 || paid[n] == 0 && resp.Job.State == musterpb.JobState_JOB_STATE_VERIFIED {
			return fmt.Errorf("task %d of job %s was paid %d times", n, resp.Job.Id, paid[n])
		}
	}
	if spent < resp.Job.SpentMicroUsd {
		return fmt.Errorf("job %s has spent %d, its attempts were paid %d", resp.Job.Id, resp.Job.SpentMicroUsd, spent)
	}
	return nil
}

// sample is n of the jobs after the warm-up, evenly spread.
func (w *world) sample(n int) []*job {
	w.jobs.mu.Lock()
	defer w.jobs.mu.Unlock()
	list := w.jobs.list[w.warm:]
	var out []*job
	for i := range min(n, len(list)) {
		out = append(out, list[(2*i+1)*len(list)/(2*min(n, len(list)))])
	}
	return out
}

// agree waits until every scheduler, asked itself, has applied as much and has
// the same state, with a ledger whose sum is zero.
func (w *world) agree(ctx context.Context) error {
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
	return nil
}
