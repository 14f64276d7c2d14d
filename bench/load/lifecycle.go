package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/bench/load/network"
	"github.com/musternet/muster/bench/load/rawraft"
)

const (
	// tasksPerJob is how many items the jobs of the lifecycle have.
	tasksPerJob = 1000
	// rampUp is how long the load runs before it is measured.
	rampUp = 3 * time.Second
)

// lifecycle measures the whole life of tasks: submitted in jobs of 1,000 items,
// placed, run by a program that ends at once, committed, drawn at 3%, checked,
// paid. There is always enough work that no slot of the fleet need wait.
func (b *bench) lifecycle(ctx context.Context) (err error) {
	heap := selfHeap()
	w, err := newWarmWorld(ctx, b, b.schedulers, b.workers, b.slots)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	runtime.GC()
	b.results.Set("generator_heap_bytes_per_worker", float64(selfHeap()-heap)/float64(b.workers))
	var s span
	if err := w.underLoad(ctx, func(ctx context.Context) (err error) {
		for range steadyTries {
			if s, err = w.measure(ctx); !errors.Is(err, errDeposed) {
				return err
			}
			b.logf("%v; once more", err)
		}
		return err
	}); err != nil {
		return err
	}
	if err := w.stages(ctx); err != nil {
		return err
	}
	if err := w.checkAll(ctx, everyJob); err != nil {
		return err
	}
	if err := w.close(); err != nil {
		return err
	}
	return w.readLog(s)
}

// underLoad keeps the fleet busy with jobs while f runs, and then waits until
// all jobs are settled.
func (w *world) underLoad(ctx context.Context, f func(context.Context) error) error {
	g, gctx := errgroup.WithContext(ctx)
	feed, stop := context.WithCancel(gctx)
	defer stop()
	// As many tasks queued as the fleet can hold, and some for the next moment.
	room := make(chan struct{}, max(4, 2*w.fleet.Workers*w.fleet.Slots/tasksPerJob))
	for range w.bench.clients {
		g.Go(func() error {
			for {
				select {
				case <-feed.Done():
					return nil
				case room <- struct{}{}:
				}
				if _, err := w.submit(gctx, tasksPerJob); err != nil {
					return err
				}
			}
		})
	}
	g.Go(func() error { // a job whose results were all answered makes room
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for n, freed := 0, 0; ; n++ {
			select {
			case <-feed.Done():
				return nil
			case <-tick.C:
			}
			if err := w.jobs.look(gctx, n%100 == 99); err != nil {
				return err
			}
			for done := w.jobs.done(w.warm); freed < done; freed++ {
				<-room
			}
		}
	})
	g.Go(func() error {
		defer stop()
		return f(gctx)
	})
	if err := g.Wait(); err != nil {
		return err
	}
	return w.jobs.waitSettled(ctx)
}

// done counts the jobs from a number on all of whose results were answered.
func (j *jobs) done(from int) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := 0
	for _, job := range j.list[from:] {
		if job.answered.Load() >= int64(job.items) || job.last.GetSettled() {
			n++
		}
	}
	return n
}

// steadyTries is how often a steady state is looked for, on a machine so busy
// that leaders are taken for dead.
const steadyTries = 3

var errDeposed = errors.New("another scheduler leads than at the start of the measurement: the machine is too busy for a steady state")

// span is a time that was measured, by the log and in tasks.
type span struct {
	after, through uint64 // indexes
	leader         int
	seconds        float64
	tasks          float64
}

// measure measures throughput and what it costs, in a steady state.
func (w *world) measure(ctx context.Context) (s span, err error) {
	b := w.bench
	if err := sleep(ctx, rampUp); err != nil {
		return s, err
	}
	if s.leader, err = w.net.Leader(ctx); err != nil {
		return s, err
	}
	profiled := w.profile(ctx, "", b.duration)
	w.jobs.resetLatencies()
	from, err := w.moment(ctx, s.leader)
	if err != nil {
		return s, err
	}
	if err := sleep(ctx, b.duration); err != nil {
		return s, err
	}
	to, err := w.moment(ctx, s.leader)
	if err != nil {
		return s, err
	}
	if now, err := w.net.Leader(ctx); err != nil || now != s.leader {
		return s, errors.Join(err, errDeposed, <-profiled)
	}
	s.after, s.through = from.applied, to.applied
	s.seconds, s.tasks = to.at.Sub(from.at).Seconds(), float64(to.verified-from.verified)
	if s.tasks == 0 {
		return s, fmt.Errorf("no task was settled within %s", b.duration)
	}
	b.results.Set("lifecycle_tasks_per_s", s.tasks/s.seconds)
	b.logf("lifecycle: %.0f tasks/s (%.0f tasks in %.1f s)", s.tasks/s.seconds, s.tasks, s.seconds)
	w.costs(s, from, to)
	b.results.Set("stage_submit_per_s", float64(to.submitted-from.submitted)/s.seconds)
	b.results.Set("stage_place_per_s", float64(to.attempts-from.attempts)/s.seconds)
	for _, stage := range []struct {
		key  string
		from *latencies
	}{{"stage_submit_ms", &w.jobs.submits}, {"stage_place_ms", &w.jobs.assigned}, {"stage_commit_ms", &w.jobs.answered}} {
		list := stage.from.take()
		b.results.Distribution(stage.key, list)
		b.logf("%s: %s", stage.key, summary(list))
	}
	if vars, err := w.net.Vars(ctx, s.leader, false); err == nil {
		b.results.Set("lifecycle_heap_bytes_leader", float64(vars.HeapBytes))
	}
	return s, <-profiled
}

// moment is what is counted at one time.
type moment struct {
	at        time.Time
	applied   uint64
	verified  int
	submitted int
	attempts  int64
	usages    []network.Usage
	self      time.Duration
}

func (w *world) moment(ctx context.Context, leader int) (m moment, err error) {
	if m.usages, err = w.net.Usages(); err != nil {
		return m, err
	}
	m.self, m.attempts = selfCPU(), w.jobs.attempts.Load()
	w.jobs.mu.Lock()
	for _, job := range w.jobs.list {
		if job.id.Load() != nil {
			m.submitted += job.items
		}
	}
	w.jobs.mu.Unlock()
	m.at = time.Now()
	if m.applied, _, err = w.net.Progress(ctx, leader); err != nil {
		return m, err
	}
	m.verified, err = w.jobs.verified(ctx)
	return m, err
}

// costs notes what the processes used per task.
func (w *world) costs(s span, from, to moment) {
	b := w.bench
	perTask := func(d time.Duration) float64 { return d.Seconds() * 1e6 / s.tasks }
	self := to.self - from.self
	all, followers := self, time.Duration(0)
	var line strings.Builder
	for i := range to.usages {
		used := to.usages[i].CPU - from.usages[i].CPU
		all += used
		name := "follower"
		if i == s.leader {
			name = "leader"
			b.results.Set("lifecycle_cpu_us_per_task_leader", perTask(used))
			b.results.Set("lifecycle_rss_bytes_leader", float64(to.usages[i].RSSBytes))
		} else {
			followers += used
			largest, _ := b.results.Get("lifecycle_rss_bytes_follower")
			b.results.Set("lifecycle_rss_bytes_follower", max(largest, float64(to.usages[i].RSSBytes)))
		}
		fmt.Fprintf(&line, ", %s %.2f s (%.1f µs/task, RSS %d MiB)", name, used.Seconds(), perTask(used), to.usages[i].RSSBytes>>20)
	}
	b.results.Set("lifecycle_cpu_us_per_task", perTask(all))
	b.results.Set("lifecycle_cpu_us_per_task_followers", perTask(followers))
	b.results.Set("lifecycle_cpu_us_per_task_generator", perTask(self))
	b.logf("CPU: %.2f s (%.1f µs/task) in all; generator %.2f s (%.1f µs/task)%s", all.Seconds(), perTask(all), self.Seconds(), perTask(self), line.String())
}

func summary(ms []float64) string {
	if len(ms) == 0 {
		return "none"
	}
	return fmt.Sprintf("p50 %.2f ms, p99 %.2f ms, max %.2f ms (%d)", quantile(ms, 0.5), quantile(ms, 0.99), quantile(ms, 1), len(ms))
}

// profile profiles every process from now on for almost so long, if that is
// wanted; prefix begins the names of the files.
func (w *world) profile(ctx context.Context, prefix string, d time.Duration) <-chan error {
	done := make(chan error, 1)
	dir := w.bench.profile
	if dir == "" {
		done <- nil
		return done
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		done <- err
		return done
	}
	own, err := os.Create(filepath.Join(dir, prefix+"generator.cpu"))
	if err == nil {
		err = pprof.StartCPUProfile(own)
	}
	if err != nil {
		done <- err
		return done
	}
	var g errgroup.Group
	leader, err := w.net.Leader(ctx)
	if err != nil {
		done <- err
		return done
	}
	for i := range w.net.Schedulers {
		name := fmt.Sprintf("%sfollower-%d", prefix, i)
		if i == leader {
			name = prefix + "leader"
		}
		g.Go(func() error {
			return w.net.Profile(ctx, i, max(int(d.Seconds())-1, 1), filepath.Join(dir, name+".cpu"), filepath.Join(dir, name+".heap"))
		})
	}
	go func() {
		err := g.Wait()
		pprof.StopCPUProfile()
		done <- errors.Join(err, own.Close())
		w.bench.logf("profiles are in %s: go tool pprof -top %s", dir, filepath.Join(dir, prefix+"leader.cpu"))
	}()
	return done
}

// profileHeap saves a heap profile of the leader.
func (w *world) profileHeap(ctx context.Context, name string) error {
	if err := os.MkdirAll(w.bench.profile, 0o755); err != nil {
		return err
	}
	leader, err := w.net.Leader(ctx)
	if err != nil {
		return err
	}
	return w.net.HeapProfile(ctx, leader, filepath.Join(w.bench.profile, name))
}

// stages notes how long the stages took that only the schedulers can time, from
// the attempts and checks of a sample of jobs.
func (w *world) stages(ctx context.Context) error {
	var start, draw, verdict, post []float64
	ms := func(from, to int64) float64 { return float64(to - from) }
	for _, job := range w.sample(sampledJobs) {
		resp, err := w.jobs.detail(ctx, job)
		if err != nil {
			return err
		}
		committed := map[string]int64{}
		for _, a := range resp.Attempts {
			committed[a.Id] = a.CommittedUnixMs
			if a.State == musterpb.AttemptState_ATTEMPT_STATE_VERIFIED {
				start = append(start, ms(a.PlacedUnixMs, a.StartedUnixMs))
				post = append(post, ms(a.CommittedUnixMs, a.EndedUnixMs))
			}
		}
		for _, c := range resp.Checks {
			if c.ClosedUnixMs > 0 {
				draw = append(draw, ms(committed[c.Target], c.OpenedUnixMs))
				verdict = append(verdict, ms(c.OpenedUnixMs, c.ClosedUnixMs))
			}
		}
	}
	for _, stage := range []struct {
		key  string
		list []float64
	}{{"stage_start_ms", start}, {"stage_draw_ms", draw}, {"stage_verdict_ms", verdict}, {"stage_post_ms", post}} {
		if len(stage.list) == 0 {
			w.bench.results.Missing("no such event in the jobs that were looked at", stage.key+"_p50", stage.key+"_p99", stage.key+"_max")
			continue
		}
		w.bench.results.Distribution(stage.key, stage.list)
		w.bench.logf("%s: %s", stage.key, summary(stage.list))
	}
	checks, items := 0, 0
	w.jobs.mu.Lock()
	for _, job := range w.jobs.list[w.warm:] {
		checks, items = checks+int(job.last.GetChecks()), items+job.items
	}
	w.jobs.mu.Unlock()
	w.bench.results.Set("lifecycle_checks_per_task", float64(checks)/float64(items))
	return nil
}

// stageOf is the stage that a kind of command belongs to. Payments follow from
// the draw and the verdict: no command carries them.
var stageOf = map[string]string{
	"SubmitJob": "submit", "PlaceAttempt": "place", "StartAttempt": "start", "CommitResult": "commit",
	"CloseBatch": "draw", "Reveal": "draw", "RecordComparisons": "verdict",
}

// readLog counts what the leader wrote into its log while throughput was
// measured. Where a snapshot has replaced a part of that, the rest stands for it.
func (w *world) readLog(s span) error {
	b := w.bench
	entries, commands, size, drawn, checked, paid := 0, 0, 0, 0, 0, 0
	kinds, bytes := map[string]int{}, map[string]int{}
	first, err := rawraft.ReadLog(filepath.Join(w.net.DataDir(s.leader), "raft", "wal"), s.after, s.through, func(data []byte) error {
		var e musterpb.Entry
		if err := e.UnmarshalVT(data); err != nil {
			return err
		}
		entries++
		size += len(data)
		commands += len(e.Commands)
		for _, c := range e.Commands {
			kind := strings.TrimPrefix(fmt.Sprintf("%T", c.Body), "*musterpb.Command_")
			kinds[kind]++
			bytes[stageOf[kind]] += c.SizeVT()
			switch body := c.Body.(type) {
			case *musterpb.Command_CloseBatch:
				drawn += int(body.CloseBatch.Attempts)
			case *musterpb.Command_RecordComparisons:
				checked++
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading the leader's log: %w", err)
	}
	if entries == 0 {
		return fmt.Errorf("the leader's log holds nothing of what was measured: it begins with entry %d", first)
	}
	paid = int(s.tasks) + checked
	whole := float64(s.through-s.after) / float64(s.through-first+1)
	perSecond := func(n int) float64 { return float64(n) * whole / s.seconds }
	for key, v := range map[string]float64{
		"lifecycle_commands_per_s": perSecond(commands), "lifecycle_commands_per_entry": float64(commands) / float64(entries),
		"lifecycle_command_bytes": float64(size) / float64(commands), "lifecycle_log_bytes_per_task": float64(size) * whole / s.tasks,
		"stage_start_per_s": perSecond(kinds["StartAttempt"]), "stage_commit_per_s": perSecond(kinds["CommitResult"]),
		"stage_draw_per_s": perSecond(drawn), "stage_verdict_per_s": perSecond(checked), "stage_post_per_s": float64(paid) / s.seconds,
	} {
		b.results.Set(key, v)
	}
	for _, stage := range stageOf {
		b.results.Set("stage_"+stage+"_log_bytes", float64(bytes[stage])*whole/s.tasks)
	}
	b.logf("log: %.0f commands/s in %.0f entries/s, %.1f in an entry, %.0f B each, %.0f B per task; %v", perSecond(commands), perSecond(entries),
		float64(commands)/float64(entries), float64(size)/float64(commands), float64(size)*whole/s.tasks, kinds)
	return nil
}
