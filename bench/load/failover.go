package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/musternet/muster/bench/load/network"
)

const (
	failoverWorkers = 100
	failoverSlots   = 4
	failoverRuntime = 100 * time.Millisecond
	failoverWithin  = 30 * time.Second
	failoverKills   = 20
)

// failover kills the leading process with -9 while the network is busy, again
// and again, and measures the time until a worker has an attempt that the next
// leader placed. Attempts that the old leader had placed, and the next one only
// hands out again, do not count. The killed scheduler is started again, and is a
// member again, before the next kill.
func (b *bench) failover(ctx context.Context) (err error) {
	if b.schedulers < 3 {
		return skipped(fmt.Sprintf("%d schedulers do not survive the loss of one", b.schedulers))
	}
	w, err := newWarmWorld(ctx, b, b.schedulers, failoverWorkers, failoverSlots)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	w.fleet.SetRuntime(failoverRuntime)
	var took []float64
	err = w.underLoad(ctx, func(ctx context.Context) error {
		for range failoverKills {
			if err := sleep(ctx, time.Second); err != nil {
				return err
			}
			ms, err := w.killLeader(ctx)
			if err != nil {
				return err
			}
			took = append(took, ms)
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.results.Distribution("failover_ms", took)
	b.results.Set("failover_kills", float64(len(took)))
	b.logf("leader killed to first placement by the next: %s: %.0f", summary(took), took)
	return w.checkAll(ctx, sampledJobs)
}

// sighting is an attempt that came to a worker.
type sighting struct {
	job     int
	attempt string
	at      int64
}

// killLeader kills the leader, and returns how many milliseconds later a worker
// had an attempt that another one placed.
func (w *world) killLeader(ctx context.Context) (float64, error) {
	leader, err := w.net.Leader(ctx)
	if err != nil {
		return 0, err
	}
	var mu sync.Mutex
	var seen []sighting // guarded by mu
	note := func(job int, attempt string, at int64) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, sighting{job, attempt, at})
	}
	w.jobs.onAttempt.Store(&note)
	defer w.jobs.onAttempt.Store(nil)
	killed, killedUnixMS := w.fleet.Now(), time.Now().UnixMilli()
	w.net.Schedulers[leader].Kill()
	steps := w.followSteps(ctx, leader)
	ctx, cancel := context.WithTimeout(ctx, failoverWithin)
	defer cancel()
	var first int64
	err = network.Poll(ctx, 50*time.Millisecond, func() (bool, error) {
		mu.Lock()
		list := append([]sighting(nil), seen...)
		mu.Unlock()
		first, err = w.firstPlaced(ctx, list, killedUnixMS)
		return first > 0, err
	})
	if err != nil {
		return 0, fmt.Errorf("nothing was placed within %s after the leader was killed: %w", failoverWithin, err)
	}
	w.bench.logf("killed scheduler %d: placed again after %.0f ms (%s)", leader, float64(first-killed)/1e6, <-steps)
	if err := w.net.StartScheduler(ctx, leader); err != nil {
		return 0, err
	}
	return float64(first-killed) / 1e6, w.net.UntilCommittee(ctx)
}

// followSteps says what happened between a kill and the first placement.
func (w *world) followSteps(ctx context.Context, killed int) <-chan string {
	began, said := time.Now(), make(chan string, 1)
	other := (killed + 1) % len(w.net.Schedulers)
	go func() {
		_, old, _ := w.net.Progress(ctx, other) // it has not noticed yet
		var elected, session time.Duration
		err := network.Poll(ctx, 10*time.Millisecond, func() (bool, error) {
			if _, leader, err := w.net.Progress(ctx, other); elected == 0 && err == nil && leader != "" && leader != old {
				elected = time.Since(began)
			}
			if elected > 0 && w.fleet.Connected() > 0 {
				session = time.Since(began)
			}
			return session > 0, nil
		})
		if err != nil {
			said <- err.Error()
			return
		}
		said <- fmt.Sprintf("another led after %d ms, the first worker was back after %d ms", elected.Milliseconds(), session.Milliseconds())
	}()
	return said
}

// firstPlaced is when the first of the attempts that were placed after a time
// came to a worker; 0 is none.
func (w *world) firstPlaced(ctx context.Context, list []sighting, afterUnixMS int64) (int64, error) {
	placed := map[string]int64{} // by attempt
	asked := map[int]bool{}
	for _, s := range list {
		job := w.jobs.get(s.job)
		if job == nil || job.id.Load() == nil {
			continue
		}
		if !asked[s.job] {
			asked[s.job] = true
			resp, err := w.jobs.detail(ctx, job)
			if err != nil {
				return 0, err
			}
			for _, a := range resp.Attempts {
				placed[a.Id] = a.PlacedUnixMs
			}
		}
		if placed[s.attempt] > afterUnixMS {
			return s.at, nil // they are in the order in which they came
		}
	}
	return 0, nil
}
