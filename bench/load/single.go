package main

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	singleClients = 256
	singleSlots   = 64 // more than are filled: nothing ends while this is measured
	forever       = time.Hour
	// singleCommands are those that a job costs while this is measured: it is
	// submitted, placed and started.
	singleCommands = 3
)

// single measures jobs of one item, each submitted on its own: 256 clients, each
// with a connection of its own, submit a job, wait until a worker has it, and
// submit the next. Programs do not end meanwhile, so that placing alone is
// measured.
func (b *bench) single(ctx context.Context) (err error) {
	w, err := newWorld(ctx, b, b.schedulers, b.workers)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := w.moreClients(ctx, singleClients); err != nil {
		return err
	}
	if err := w.startFleet(ctx, b.workers, singleSlots); err != nil {
		return err
	}
	w.fleet.SetRuntime(forever)
	g, gctx := errgroup.WithContext(ctx)
	run, stop := context.WithCancel(gctx)
	defer stop()
	for range singleClients {
		g.Go(func() error {
			for run.Err() == nil {
				job, err := w.submit(gctx, 1)
				if err != nil {
					return err
				}
				select {
				case <-job.placed:
				case <-run.Done():
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		defer stop()
		if err := sleep(gctx, time.Second); err != nil {
			return err
		}
		profiled := w.profile(gctx, "single-", b.duration/3)
		w.jobs.resetLatencies()
		began := time.Now()
		if err := sleep(gctx, b.duration/3); err != nil {
			return err
		}
		placed, took := w.jobs.assigned.take(), time.Since(began).Seconds()
		b.results.Set("single_jobs_placed_per_s", float64(len(placed))/took)
		b.results.Distribution("single_jobs_ms", placed)
		b.logf("single jobs: %.0f/s; submit to placed %s", float64(len(placed))/took, summary(placed))
		return <-profiled
	})
	if err := g.Wait(); err != nil {
		return err
	}
	rate, _ := b.results.Get("single_jobs_placed_per_s")
	if limit, ok := b.results.Get("raw_raft_commands_per_s"); ok {
		b.results.Set("single_jobs_share_of_raw_raft", rate*singleCommands/limit)
	} else {
		b.results.Missing("raw Raft was not measured in the same run", "single_jobs_share_of_raw_raft")
	}
	return w.agree(ctx)
}

// moreClients gives each of n clients a connection of its own.
func (w *world) moreClients(ctx context.Context, n int) error {
	keys, err := w.accounts(ctx, "customer", customers)
	if err != nil {
		return err
	}
	for len(w.jobs.clients) < n {
		c, err := w.client(keys[len(w.jobs.clients)%customers])
		if err != nil {
			return err
		}
		w.jobs.clients = append(w.jobs.clients, c)
	}
	return nil
}
