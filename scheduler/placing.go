package scheduler

import (
	"context"
	"time"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/place"
	"github.com/musternet/muster/scheduler/state"
)

// placer places what waits. Its engine follows the committed state by what
// changed since it was read last, so that a round costs what it places.
type placer struct {
	*leader
	engine *place.Engine
	cursor uint64 // of the state's journal
	// What a refused placement made the engine believe wrongly, to be read again:
	// jobs as a whole where that is said, else their tasks.
	jobs     map[string]bool
	machines map[string]struct{}
	unpaid   time.Time // when checks that nobody could pay for were read again
}

// placeLoop places what waits, whenever something changed. The timer is for
// what changes by the clock alone: a worker's pause after a failure.
func (l *leader) placeLoop(ctx context.Context) {
	p := &placer{leader: l, engine: place.NewEngine(l.seedOf), jobs: map[string]bool{}, machines: map[string]struct{}{}}
	for ctx.Err() == nil {
		changed := l.State.Changed()
		p.follow()
		switch placed, refused := p.round(ctx); {
		case placed > 0:
		case refused > 0:
			l.waitForChange(ctx, nil, refusedPause)
		default:
			l.waitForChange(ctx, changed, time.Second)
		}
	}
}

// follow brings the engine in line with the state and the sessions.
func (p *placer) follow() {
	c, next := p.State.ChangesSince(p.cursor)
	p.cursor = next
	if c.Reset {
		p.readAll()
		return
	}
	for _, id := range p.takeTouched() {
		p.machines[id] = struct{}{}
	}
	for _, id := range c.Workers {
		p.machines[id] = struct{}{}
	}
	for _, id := range c.Jobs {
		if _, known := p.jobs[id]; !known {
			p.jobs[id] = false
		}
	}
	p.readUnpaid()
	for id := range p.machines {
		p.readWorker(id)
	}
	for _, id := range c.Attempts {
		p.readAttempt(p.State.Attempt(id))
	}
	for id, whole := range p.jobs {
		p.readJob(id, whole)
	}
	for _, id := range c.Checks {
		p.readCheck(id)
	}
	clear(p.machines)
	clear(p.jobs)
}

// readAll starts anew: this leader is, or its engine fell behind.
func (p *placer) readAll() {
	p.engine = place.NewEngine(p.seedOf)
	p.takeTouched()
	clear(p.machines)
	clear(p.jobs)
	for _, w := range p.State.Workers() {
		p.readWorker(w.Id)
	}
	for _, a := range p.State.LiveAttempts() {
		p.readAttempt(a)
	}
	for _, w := range p.State.Queued() {
		p.engine.SetJob(w)
	}
	for _, account := range p.State.Accounts() {
		p.engine.SetUsage(account, p.State.UsageOf(account))
	}
}

// readAttempt counts an attempt; it, or its job, may be sealed by now.
func (p *placer) readAttempt(a *musterpb.Attempt) {
	if job := p.State.Job(a.GetJob()); job != nil {
		p.engine.SetAttempt(job, a)
	}
}

func (p *placer) readWorker(id string) {
	w := p.State.Worker(id)
	if w == nil {
		return
	}
	if view := p.view(w); view.Connected {
		p.engine.SetWorker(view)
	} else {
		p.engine.RemoveWorker(id)
	}
}

// readJob reads the tasks of a job again, and its checks too where that is
// asked for or needed.
func (p *placer) readJob(id string, whole bool) {
	work, _ := p.State.TasksOf(id)
	if work.Job == nil {
		p.engine.ForgetJob(id)
		return
	}
	if whole || !p.engine.SetTasks(work) {
		var any bool
		if work, any = p.State.WorkOf(id); any {
			p.engine.SetJob(work)
		} else {
			p.engine.RemoveJob(id)
		}
	}
	if work.Job != nil {
		p.engine.SetUsage(work.Job.Account, p.State.UsageOf(work.Job.Account))
	}
}

func (p *placer) readCheck(id string) {
	run, wants := p.State.Wanted(id)
	switch {
	case wants:
		p.engine.SetCheck(p.State.Job(run.Check.Job), run)
	case run.Check != nil:
		p.engine.RemoveCheck(run.Check.Job, id)
	}
}

// readUnpaid looks again, now and then, at checks that nobody could pay for:
// money that comes in elsewhere changes that, and not the job.
func (p *placer) readUnpaid() {
	if time.Since(p.unpaid) < time.Second {
		return
	}
	p.unpaid = time.Now()
	for _, w := range p.State.Wanting() {
		for _, run := range w.Checks {
			if run.Unpaid != "" {
				p.jobs[w.Job.Id] = true
			}
		}
	}
}

// round decides, proposes and hands out; it returns how many attempts were
// placed, and how many were not although there was a place for them.
func (p *placer) round(ctx context.Context) (placed, refused int) {
	plan := p.engine.Plan(p.Replica.Now(), maxPlacements)
	if len(plan) == 0 {
		return 0, 0
	}
	cmds := make([]*musterpb.Command, len(plan))
	for i, d := range plan {
		cmds[i] = &musterpb.Command{Body: &musterpb.Command_PlaceAttempt{PlaceAttempt: &musterpb.PlaceAttempt{
			Attempt: newID("att-"), Job: d.Job.Id, Task: d.Task, Check: d.Check.GetId(), Worker: d.Worker,
			Class: d.Class, Devices: d.Devices, Relaxed: d.Relaxed,
		}}}
	}
	answers, err := p.Replica.ProposeAll(ctx, cmds)
	if err != nil {
		p.Logger.Debug("placements were not taken", "placements", len(plan), "err", err)
	}
	attempts := make([]string, 0, len(plan))
	for i, d := range plan {
		if err == nil {
			refusal := state.ErrorOf(answers[i])
			if refusal == nil {
				attempts = append(attempts, answers[i].Id)
				continue
			}
			p.Logger.Debug("a placement was refused", "job", d.Job.Id, "task", d.Task, "worker", d.Worker, "err", refusal)
		}
		p.jobs[d.Job.Id], p.machines[d.Worker] = true, struct{}{}
	}
	p.handOutNew(attempts)
	return len(attempts), len(plan) - len(attempts)
}

// handOutNew gives the workers leases for their new attempts, and tells them.
func (p *placer) handOutNew(attempts []string) {
	byWorker := map[string][]assignment{}
	for _, id := range attempts {
		a := p.State.Attempt(id)
		if a == nil || !live(a) {
			continue // it ended already
		}
		byWorker[a.Worker] = append(byWorker[a.Worker], p.assignment(a))
	}
	now := time.Now()
	for worker, list := range byWorker {
		p.mu.Lock()
		s, ttl := p.open(worker), p.Timing.LeaseTTL
		if s == nil {
			ttl = p.Timing.ReconnectGrace // it left since the plan was made
		}
		for _, a := range list {
			p.leases[a.attempt.Id] = &lease{worker: worker, deadline: now.Add(ttl)}
		}
		p.mu.Unlock()
		if s != nil {
			s.assign(list...)
		}
	}
}

// touch makes the placer look at a worker again: its session changed.
func (l *leader) touch(worker string) {
	l.mu.Lock()
	l.touched[worker] = struct{}{}
	l.mu.Unlock()
	l.nudge()
}

func (l *leader) takeTouched() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.touched) == 0 {
		return nil
	}
	list := make([]string, 0, len(l.touched))
	for id := range l.touched {
		list = append(list, id)
	}
	clear(l.touched)
	return list
}

// touchSilent makes the placer look again at workers that fell silent, or are
// heard again, though their streams may look sound.
func (l *leader) touchSilent() {
	l.mu.Lock()
	var list []string
	for id, s := range l.sessions {
		if heard := s.heardWithin(l.Timing.LeaseTTL); heard != s.wasHeard {
			s.wasHeard = heard
			list = append(list, id)
		}
	}
	l.mu.Unlock()
	for _, id := range list {
		l.touch(id)
	}
}

// view is what placement sees of a worker.
func (l *leader) view(w *musterpb.Worker) *place.Worker {
	s := l.session(w.Id)
	var cached func(string) bool
	version := uint64(0)
	if s != nil {
		version = s.cacheVersion() // before what it stands for is asked
		cached = s.cached
	}
	v := place.NewWorker(w, s != nil && s.heardWithin(l.Timing.LeaseTTL), cached)
	v.CacheVersion = version
	use := l.State.UseOf(w.Id)
	v.FreeMilliCPUs -= use.MilliCPUs
	v.FreeMemoryBytes -= use.MemoryBytes
	v.FreeDiskBytes -= use.DiskBytes
	for _, d := range use.Devices {
		v.UsedDevices[d] = true
	}
	return v
}

// views are all workers, for explanations.
func (l *leader) views() []*place.Worker {
	workers := l.State.Workers()
	list := make([]*place.Worker, len(workers))
	for i, w := range workers {
		list[i] = l.view(w)
	}
	return list
}
