package main

import (
	"context"
	"errors"
	"time"
)

const (
	instantWorkers = 100
	instantJobs    = 300
	// instantPause lets the network become idle between two jobs: no draw, no
	// check is under way.
	instantPause = 15 * time.Millisecond
)

// instant measures how long a job of one item waits on an idle network: from
// the moment before the submission's call until a simulated worker has the
// attempt, which it starts at once.
func (b *bench) instant(ctx context.Context) (err error) {
	w, err := newWarmWorld(ctx, b, b.schedulers, instantWorkers, 4)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	n := instantJobs
	if b.full {
		n *= 5
	}
	for range n {
		job, err := w.submit(ctx, 1)
		if err != nil {
			return err
		}
		select {
		case <-job.placed:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := sleep(ctx, instantPause); err != nil {
			return err
		}
	}
	list := w.jobs.assigned.take()
	b.results.Distribution("start_instant_ms", list)
	b.results.Set("start_instant_starts", float64(len(list)))
	b.logf("submit to start: %s; of that the call: %s", summary(list), summary(w.jobs.submits.take()))
	if err := w.jobs.waitSettled(ctx); err != nil {
		return err
	}
	return w.checkAll(ctx, sampledJobs)
}
