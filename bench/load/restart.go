package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/bench/load/network"
	"github.com/musternet/muster/scheduler/replica"
	"github.com/musternet/muster/scheduler/state"
)

const (
	restartTasks   = 1_000_000
	restartWorkers = 1000
	restartWithin  = 2 * time.Minute
	// together is how many commands one proposal carries.
	together = 2048
	// snapshots are taken, with so many entries of so many commands before and
	// after each.
	snapshots     = 5
	pauseEntries  = 10
	pauseCommands = 400
)

// restart measures how long a scheduler with 1,000,000 live tasks takes from
// the start of its process to its first linearizable read, and on the way how
// long a snapshot holds Apply up. The tasks are placed and started by this
// process, which for that runs the scheduler's own replica and state on its data
// directory while the scheduler is stopped: through workers it would take
// minutes. The restart replays the log; no snapshot shortens it.
func (b *bench) restart(ctx context.Context) (err error) {
	w, err := newWorld(ctx, b, 1, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	id, raftAddress, err := w.net.Node(ctx, 0)
	if err != nil {
		return err
	}
	if err := w.net.Schedulers[0].Stop(); err != nil {
		return err
	}
	st := state.New()
	rep, err := replica.Open(replica.Config{
		ID: id, Dir: filepath.Join(w.net.DataDir(0), "raft"), Listen: raftAddress, Advertise: raftAddress, Logger: slog.New(slog.DiscardHandler),
	}, st)
	if err != nil {
		return err
	}
	leading, stop := context.WithCancel(ctx)
	led := make(chan error, 1)
	go func() { led <- rep.Run(leading, func(ctx context.Context) { <-ctx.Done() }) }()
	err = b.fill(ctx, w, rep, st)
	stop()
	if err := errors.Join(err, <-led, rep.Close()); err != nil {
		return err
	}
	st, rep = nil, nil
	debug.FreeOSMemory() // the scheduler needs as much

	began := time.Now()
	if err := w.net.StartScheduler(ctx, 0); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, restartWithin)
	defer cancel()
	if err := network.Poll(ctx, 20*time.Millisecond, func() (bool, error) {
		resp, err := w.jobs.clients[0].GetJob(ctx, connect.NewRequest(&musterpb.GetJobRequest{Job: restartJob}))
		if err == nil && resp.Msg.Job.LiveAttempts != restartTasks {
			return false, fmt.Errorf("%d attempts are live after the restart, %d were before", resp.Msg.Job.LiveAttempts, restartTasks)
		}
		return err == nil, err
	}); err != nil {
		return err
	}
	took := time.Since(began)
	b.results.Set("restart_s", took.Seconds())
	b.logf("restart with %d live tasks: %.1f s", restartTasks, took.Seconds())
	return nil
}

const restartJob = "job-restart"

// fill makes the live tasks, and measures snapshots when half of them are there
// and at the end.
func (b *bench) fill(ctx context.Context, w *world, rep *replica.Replica, st *state.State) error {
	ctx, cancel := context.WithTimeout(ctx, restartWithin)
	defer cancel()
	if err := network.Poll(ctx, 10*time.Millisecond, func() (bool, error) { return rep.Leading(), nil }); err != nil {
		return fmt.Errorf("leading the stopped scheduler's group: %w", err)
	}
	propose := func(cmds ...*musterpb.Command) error {
		answers, err := rep.ProposeAll(ctx, cmds)
		for _, a := range answers {
			err = errors.Join(err, state.ErrorOf(a))
		}
		return err
	}
	job := &job{items: restartTasks}
	spec := w.spec(job)
	first := []*musterpb.Command{{Body: &musterpb.Command_SubmitJob{SubmitJob: &musterpb.SubmitJob{
		Job: restartJob, Account: "customer-0", Spec: spec, PermutationKey: make([]byte, 32),
	}}}}
	workers := make([]string, restartWorkers)
	for i := range workers {
		key := make([]byte, 32)
		copy(key, strconv.Itoa(i))
		workers[i] = string(api.WorkerIDOf(key))
		first = append(first, &musterpb.Command{Body: &musterpb.Command_RegisterWorker{RegisterWorker: &musterpb.RegisterWorker{Worker: &musterpb.Worker{
			Id: workers[i], PublicKey: key, Owner: "owner-" + strconv.Itoa(i%len(w.owners)), Name: "worker-" + strconv.Itoa(i), PriceMicroUsdPerHour: 100_000,
			Capacity: &musterpb.Capacity{MilliCpus: 1 << 40, MemoryBytes: 1 << 60, DiskBytes: 1 << 60, Runtimes: []string{"docker"}, Platform: "linux/amd64"},
		}}}})
	}
	if err := propose(first...); err != nil {
		return err
	}
	began := time.Now()
	for n := 0; n < restartTasks; {
		var cmds []*musterpb.Command
		for ; n < restartTasks && len(cmds) < together; n++ {
			id := "att-" + strconv.Itoa(n)
			cmds = append(cmds,
				&musterpb.Command{Body: &musterpb.Command_PlaceAttempt{PlaceAttempt: &musterpb.PlaceAttempt{
					Attempt: id, Job: restartJob, Task: uint32(n), Worker: workers[n%len(workers)], Class: "cpu/linux/amd64/x86-64-v3",
				}}},
				&musterpb.Command{Body: &musterpb.Command_StartAttempt{StartAttempt: &musterpb.StartAttempt{Attempt: id}}})
		}
		if err := propose(cmds...); err != nil {
			return err
		}
		if before := n - len(cmds)/2; before < restartTasks/2 && n >= restartTasks/2 {
			if err := b.pause("snapshot_pause_ms", n, st); err != nil {
				return err
			}
		}
	}
	b.logf("%d tasks placed and started through the replica in %.1f s", restartTasks, time.Since(began).Seconds())
	return b.pause("snapshot_pause_ms_1m_tasks", restartTasks, st)
}

// pause measures by how much a snapshot holds Apply up: taking it, which Raft
// does between two entries, and what the slowest entry after it takes more than
// an entry usually takes, as its commands have to copy what the snapshot still
// holds. An entry is 400 commands that end attempts of random tasks; Apply is
// held for a whole entry. The worst of several snapshots counts. The commands go
// to this process's state alone, which nobody uses afterwards.
func (b *bench) pause(key string, tasks int, st *state.State) error {
	random := rand.New(rand.NewPCG(uint64(tasks), 0))
	var live []string
	for _, n := range random.Perm(tasks) {
		if id := "att-" + strconv.Itoa(n); st.Attempt(id).GetState() == musterpb.AttemptState_ATTEMPT_STATE_RUNNING {
			live = append(live, id)
		}
	}
	entries := func() (ms []float64, err error) {
		for range pauseEntries {
			if len(live) < pauseCommands {
				return nil, fmt.Errorf("no attempts are left to end")
			}
			cmds := make([]*musterpb.Command, pauseCommands)
			for i := range cmds {
				cmds[i] = &musterpb.Command{TimeUnixMs: st.Now(), Body: &musterpb.Command_EndAttempt{EndAttempt: &musterpb.EndAttempt{
					Attempt: live[i], State: musterpb.AttemptState_ATTEMPT_STATE_LOST, Blame: musterpb.Blame_BLAME_NETWORK, Blameless: true,
				}}}
			}
			live = live[pauseCommands:]
			began := time.Now()
			answers := st.ApplyAll(cmds)
			ms = append(ms, time.Since(began).Seconds()*1e3)
			for _, a := range answers {
				if err := state.ErrorOf(a); err != nil {
					return nil, err
				}
			}
		}
		return ms, nil
	}
	var pauses, taking, usual, slowest []float64
	for round := range snapshots {
		runtime.GC() // minutes lie between real ones, and no garbage of the one before
		before, err := entries()
		if err != nil {
			return err
		}
		began := time.Now()
		s := st.Snapshot()
		took := time.Since(began).Seconds() * 1e3
		after, err := entries()
		if err != nil {
			return err
		}
		taking, usual, slowest = append(taking, took), append(usual, quantile(before, 0.5)), append(slowest, quantile(after, 1))
		pauses = append(pauses, took+max(quantile(after, 1)-quantile(before, 0.5), 0))
		if round == 0 {
			began = time.Now()
			err := s.Write(io.Discard)
			b.logf("writing a snapshot of %d live tasks: %.1f s, %v", tasks, time.Since(began).Seconds(), err)
		}
		runtime.KeepAlive(s)
	}
	b.results.Set(key, quantile(pauses, 1))
	b.logf("snapshot of %d live tasks holds Apply up by %.1f ms at worst (each of %d: %.1f ms); taking it alone %.2f ms; an entry of %d commands usually takes %.1f ms, the slowest after each snapshot %.1f ms",
		tasks, quantile(pauses, 1), snapshots, pauses, taking, pauseCommands, usual, slowest)
	return nil
}
