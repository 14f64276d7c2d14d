package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"

	"github.com/musternet/muster/api/musterpb"
)

const (
	costSlots    = 16
	costWorkers  = 200
	costDuration = 4 * time.Second
	fewItems     = 10_000
	manyItems    = 1_000_000
)

// cost measures whether a task costs more because many others wait: schedulers'
// CPU per verified task of jobs of 1,000 items, while a job of 1,000,000 items
// waits beside them that no worker can run, over the same with one of 10,000
// items. Both are measured twice, by turns, on the same network.
func (b *bench) cost(ctx context.Context) (err error) {
	w, err := newWarmWorld(ctx, b, b.schedulers, costWorkers, costSlots)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	var cpu, tasks [2]float64
	for range 2 {
		for kind, items := range []int{fewItems, manyItems} {
			used, done, err := w.costOf(ctx, items)
			if err != nil {
				return err
			}
			cpu[kind] += used.Seconds() * 1e6
			tasks[kind] += float64(done)
			b.logf("while %d items wait: %.1f µs/task of the schedulers' CPU, %.0f tasks/s", items, used.Seconds()*1e6/float64(done), float64(done)/costDuration.Seconds())
		}
	}
	b.results.Set("cost_us_per_task_10k", cpu[0]/tasks[0])
	b.results.Set("cost_us_per_task_1m", cpu[1]/tasks[1])
	b.results.Set("cost_growth_1m", cpu[1]/tasks[1]/(cpu[0]/tasks[0]))
	return w.checkAll(ctx, sampledJobs)
}

// costOf works on jobs for a while, beside one of so many items that waits and is
// then cancelled.
func (w *world) costOf(ctx context.Context, items int) (cpu time.Duration, tasks int, err error) {
	nowhere, err := w.submitNowhere(ctx, items)
	if err != nil {
		return 0, 0, err
	}
	feed, stop := context.WithCancel(ctx)
	defer stop()
	fed := make(chan error, 1)
	go func() { fed <- w.keepBusy(ctx, feed) }()
	if err := sleep(ctx, time.Second); err != nil {
		return 0, 0, err
	}
	from, err := w.moment(ctx, 0)
	if err != nil {
		return 0, 0, err
	}
	if err := sleep(ctx, costDuration); err != nil {
		return 0, 0, err
	}
	to, err := w.moment(ctx, 0)
	if err != nil {
		return 0, 0, err
	}
	for i := range to.usages {
		cpu += to.usages[i].CPU - from.usages[i].CPU
	}
	stop()
	if err := errors.Join(<-fed, w.cancel(ctx, nowhere), w.jobs.waitSettled(ctx)); err != nil {
		return 0, 0, err
	}
	if to.verified == from.verified {
		return 0, 0, fmt.Errorf("no task was settled within %s", costDuration)
	}
	return cpu, to.verified - from.verified, nil
}

// submitNowhere submits a job that no worker can run.
func (w *world) submitNowhere(ctx context.Context, items int) (*job, error) {
	nowhere := w.jobs.add(items)
	spec := w.spec(nowhere)
	spec.Resources.Gpus = 1 // no worker has one
	return nowhere, w.jobs.submit(ctx, nowhere, spec)
}

// keepBusy keeps more tasks queued than the fleet can hold until feed ends.
func (w *world) keepBusy(ctx, feed context.Context) error {
	for feed.Err() == nil {
		if err := w.jobs.look(ctx, false); err != nil {
			return err
		}
		for w.jobs.outstanding() < 1+2*costWorkers*costSlots/tasksPerJob { // and the one that waits
			if _, err := w.submit(ctx, tasksPerJob); err != nil {
				return err
			}
		}
		if sleep(feed, 20*time.Millisecond) != nil {
			return nil
		}
	}
	return nil
}

// cancel cancels a job.
func (w *world) cancel(ctx context.Context, job *job) error {
	w.jobs.mu.Lock()
	job.cancelled = true
	w.jobs.mu.Unlock()
	_, err := job.client.CancelJob(ctx, connect.NewRequest(&musterpb.CancelJobRequest{Job: *job.id.Load()}))
	return err
}
