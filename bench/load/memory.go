package main

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/musternet/muster/bench/load/network"
)

const (
	memoryWorkers = 1000
	memorySlots   = 32
	// Raft keeps the last log entries (replica.LogCache) in memory, whatever they
	// are. So many small commands, of which few travel together, replace them.
	smallCommands = 4096
	smallClients  = 4
)

// memory measures what the leader's heap holds per idle worker, per item that
// waits and per attempt that runs: the heap after a collection, each time after
// Raft's cache of log entries was filled with small ones.
func (b *bench) memory(ctx context.Context) (err error) {
	w, err := newWorld(ctx, b, b.schedulers, memoryWorkers)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	empty, err := w.heap(ctx)
	if err != nil {
		return err
	}
	if err := w.startFleet(ctx, memoryWorkers, memorySlots); err != nil {
		return err
	}
	w.fleet.SetRuntime(forever)
	idle, err := w.heap(ctx)
	if err != nil {
		return err
	}
	b.results.Set("heap_bytes_per_idle_worker", (idle-empty)/memoryWorkers)

	if _, err := w.submitNowhere(ctx, manyItems); err != nil {
		return err
	}
	queued, err := w.heap(ctx)
	if err != nil {
		return err
	}
	b.results.Set("heap_bytes_per_queued_item", max(queued-idle, 0)/manyItems)

	const attempts = memoryWorkers * memorySlots
	if _, err := w.submit(ctx, attempts); err != nil {
		return err
	}
	if err := w.untilAttempts(ctx, attempts); err != nil {
		return err
	}
	live, err := w.heap(ctx)
	if err != nil {
		return err
	}
	b.results.Set("heap_bytes_per_live_attempt", (live-queued)/attempts)
	b.logf("leader's heap: %.1f MB; %.0f B per idle worker, %.2f B per queued item, %.0f B per live attempt",
		empty/1e6, (idle-empty)/memoryWorkers, max(queued-idle, 0)/manyItems, (live-queued)/attempts)
	return w.agree(ctx)
}

// untilAttempts waits until so many attempts are at workers and the schedulers
// know of them.
func (w *world) untilAttempts(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, settleWithin)
	defer cancel()
	job := w.jobs.list[len(w.jobs.list)-1]
	return network.Poll(ctx, 50*time.Millisecond, func() (bool, error) {
		if w.jobs.attempts.Load() < int64(n) {
			return false, nil
		}
		now, err := w.jobs.ask(ctx, job)
		return now.GetLiveAttempts() >= uint32(n), err
	})
}

// heap is the leader's heap in bytes, without garbage.
func (w *world) heap(ctx context.Context) (float64, error) {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(smallClients)
	for range smallCommands {
		g.Go(func() error { return w.net.Deposit(gctx, "customer-0", 1) })
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	return w.collected(ctx)
}

// collected is the leader's heap in bytes, after a collection.
func (w *world) collected(ctx context.Context) (float64, error) {
	leader, err := w.net.Leader(ctx)
	if err != nil {
		return 0, err
	}
	vars, err := w.net.Vars(ctx, leader, true)
	return float64(vars.HeapBytes), err
}
