package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/musternet/muster/bench/load/network"
)

const (
	finishedFew  = 10_000
	finishedMany = 1_000_000
	// finishedEnough tasks say whether the heap grows, where time did not suffice
	// for all.
	finishedEnough = 500_000
	// finishedSealAfter replaces the 30 s of the default, so that what is still
	// young is not taken for growth and nobody waits for it.
	finishedSealAfter = time.Second
	// finishedWithin bounds what the standard set spends on it.
	finishedWithin = 110 * time.Second
	// sealedWithin is how long finished work may take to be sealed, and
	// stillWithin how long the heap may fall after that.
	sealedWithin = time.Minute
	stillWithin  = 20 * time.Second
)

// finished measures whether the leader's heap grows with history: the heap
// after 1,000,000 finished tasks, or as many as there was time for, over that
// after 10,000, both when nothing is live and everything is sealed. The tasks go
// through the network like any others; its schedulers seal after one second.
func (b *bench) finished(ctx context.Context) (err error) {
	w, err := newWarmWorld(ctx, b, b.schedulers, b.workers, b.slots, "--seal-after", finishedSealAfter.String())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	for range finishedFew / tasksPerJob {
		if _, err := w.submit(ctx, tasksPerJob); err != nil {
			return err
		}
	}
	if err := w.jobs.waitSettled(ctx); err != nil {
		return err
	}
	few, err := w.restingHeap(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	err = w.underLoad(ctx, func(ctx context.Context) error {
		said := began
		for w.jobs.tasksDone() < finishedMany && (b.full || time.Since(began) < finishedWithin) {
			if err := sleep(ctx, 100*time.Millisecond); err != nil {
				return err
			}
			if time.Since(said) > 15*time.Second {
				said = time.Now()
				b.logf("%d tasks have finished", w.jobs.tasksDone())
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	many, err := w.restingHeap(ctx)
	if err != nil {
		return err
	}
	done, err := w.jobs.verified(ctx)
	if err != nil {
		return err
	}
	if b.profile != "" {
		if err := w.profileHeap(ctx, "finished-leader.heap"); err != nil {
			return err
		}
	}
	b.results.Set("heap_growth_finished_tasks", float64(done))
	b.results.Set("heap_bytes_finished_10k", few)
	b.results.Set("heap_bytes_finished_1m", many)
	b.logf("leader's heap: %.1f MB after %d finished tasks, %.1f MB after %d (%.0f s, %.0f tasks/s)", few/1e6, finishedFew, many/1e6, done,
		time.Since(began).Seconds(), float64(done-finishedFew)/time.Since(began).Seconds())
	if done < finishedEnough {
		b.results.Missing(fmt.Sprintf("only %d tasks finished within %s, %d are enough; the heap was then %.2f times that after %d; --full waits for %d",
			done, finishedWithin, finishedEnough, many/few, finishedFew, finishedMany), "heap_growth_finished")
	} else {
		b.results.Set("heap_growth_finished", many/few)
	}
	return w.checkAll(ctx, sampledJobs)
}

// tasksDone counts the tasks whose results were taken.
func (j *jobs) tasksDone() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := 0
	for _, job := range j.list {
		n += min(int(job.answered.Load()), job.items)
	}
	return n
}

// restingHeap is the leader's heap once everything that ended is sealed, and the
// heap falls no more.
func (w *world) restingHeap(ctx context.Context) (float64, error) {
	if err := w.waitSealed(ctx); err != nil {
		return 0, err
	}
	waiting, cancel := context.WithTimeout(ctx, stillWithin)
	defer cancel()
	least, still := 0.0, 0
	err := network.Poll(waiting, time.Second, func() (bool, error) {
		now, err := w.collected(waiting)
		switch {
		case err != nil:
			return false, err
		case least == 0 || now < least*0.99:
			least, still = now, 0
		default:
			still++
		}
		return still >= 3, nil
	})
	if err != nil && (waiting.Err() == nil || ctx.Err() != nil) {
		return 0, err // else it still falls, slowly
	}
	return w.heap(ctx)
}

// waitSealed waits until every job is sealed. All of them are settled.
func (w *world) waitSealed(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, sealedWithin)
	defer cancel()
	leader, err := w.net.Leader(ctx)
	if err != nil {
		return err
	}
	w.jobs.mu.Lock()
	settled := uint64(len(w.jobs.list))
	w.jobs.mu.Unlock()
	sealed := uint64(0)
	err = network.Poll(ctx, 100*time.Millisecond, func() (bool, error) {
		sealed, err = w.net.SealedJobs(ctx, leader)
		return sealed == settled, err
	})
	if err != nil {
		return fmt.Errorf("%d of %d jobs are sealed: %w", sealed, settled, err)
	}
	return nil
}
