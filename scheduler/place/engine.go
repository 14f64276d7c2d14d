package place

import (
	"cmp"
	"slices"

	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// Bounds of what the engine keeps and does.
const (
	// maxIndexBytes bounds, roughly, the indexes over the machines. What was not
	// used for longest is dropped, and made anew when it is needed.
	maxIndexBytes = 128 << 20
	// maxShapes bounds how many sets of constraints are remembered that no job
	// has any more.
	maxShapes = 1024
	// maxReviews bounds how many machines one Plan looks at, all shapes together:
	// ten thousand jobs that each want something else may not stop the leader.
	maxReviews = 4 << 20
	// minNames is how many kinds of devices and classes are known before those
	// that are out of use are dropped.
	minNames = 4096
)

// Engine decides placements. It keeps workers and jobs from one round to the
// next, in indexes that follow each change, so that a decision costs about the
// same however many workers and jobs there are.
//
// The same calls in the same order give the same decisions: it reads no clock
// and draws nothing by itself. It is not safe for concurrent use.
type Engine struct {
	seed func(epoch uint64) []byte
	now  int64 // the latest that Plan was told

	names    *names
	limit    int // of names
	byID     map[string]*machine
	machines []*machine // by slot, nil for a free one
	slots    []int32    // free
	newest   *machine   // of the list of machines, newest change first
	seq      uint64     // of the newest change
	resting  heap[*machine]
	changed  []*machine // scratch of catchUp

	tick    uint64 // counts decisions
	reviews int    // how often a machine was looked at
	shapes  map[string]*shape
	byAge   []*shape // the same, oldest first

	jobs     map[string]*queuedJob // with work to place
	deferred []*queuedJob          // that have passed over tasks
	counts   map[string]*counts
	accounts map[string]*account
	turns    heap[*account] // that have something which may be placed
	closed   []*gate        // that lanes park at

	kept   []kept
	booked []booked // in this round

	// Limits, that tests set otherwise.
	patience int64 // keepAfterMS
	scanned  int   // maxScanned
	narrow   int   // maxNarrow
}

// NewEngine is an engine that knows nothing yet. Seed draws the checkers of a
// check, by the epoch of its target's batch. It may be nil.
func NewEngine(seed func(epoch uint64) []byte) *Engine {
	e := &Engine{
		seed: seed, names: newNames(), limit: minNames, byID: map[string]*machine{}, shapes: map[string]*shape{}, jobs: map[string]*queuedJob{},
		counts: map[string]*counts{}, accounts: map[string]*account{}, patience: keepAfterMS, scanned: maxScanned, narrow: maxNarrow,
	}
	e.resting = heap[*machine]{
		less: func(a, b *machine) bool {
			return cmp.Or(cmp.Compare(a.BackoffUntilUnixMs, b.BackoffUntilUnixMs), cmp.Compare(a.slot, b.slot)) < 0
		},
		moved: func(m *machine, at int) { m.resting = at },
	}
	e.turns = heap[*account]{less: usesLess, moved: func(a *account, at int) { a.pos = at }}
	return e
}

// SetWorker says how a worker is now, with everything that its live attempts
// use taken: it replaces what was known, and what Plan booked on it. The engine
// keeps w and changes it.
func (e *Engine) SetWorker(w *Worker) {
	m := e.byID[w.Id]
	if m != nil && m.Owner != w.Owner {
		e.RemoveWorker(w.Id)
		m = nil
	}
	if m != nil && m.resting >= 0 {
		e.resting.remove(m.resting)
	}
	switch {
	case m == nil:
		m = e.addMachine(w)
	case sameFixed(m.Worker, w):
		m.refresh(w)
		e.touch(m)
	default:
		m.describe(e.names, w)
		e.touch(m)
		m.fixed = m.seq
	}
	if w.BackoffUntilUnixMs > e.now {
		e.resting.push(m)
	}
	if len(e.names.kinds)+len(e.names.classOf) > e.limit {
		e.rename()
	}
}

func (e *Engine) addMachine(w *Worker) *machine {
	m := &machine{owner: e.names.join(w.Owner), resting: -1}
	if last := len(e.slots) - 1; last >= 0 {
		m.slot, e.slots = e.slots[last], e.slots[:last]
		e.machines[m.slot] = m
	} else {
		m.slot = int32(len(e.machines))
		e.machines = append(e.machines, m)
	}
	m.describe(e.names, w)
	e.byID[w.Id] = m
	e.touch(m)
	m.fixed = m.seq
	e.joined(m)
	return m
}

// RemoveWorker forgets a worker.
func (e *Engine) RemoveWorker(id string) {
	m := e.byID[id]
	if m == nil {
		return
	}
	if m.resting >= 0 {
		e.resting.remove(m.resting)
	}
	e.forgetKept(m)
	delete(e.byID, id)
	e.unlist(m)
	e.machines[m.slot] = nil
	for _, s := range e.byAge {
		s.remove(e, m)
	}
	e.names.leave(m.owner)
	e.slots = append(e.slots, m.slot)
}

// touch counts a machine as changed.
func (e *Engine) touch(m *machine) {
	e.unlist(m)
	e.seq++
	m.seq, m.newer, m.older = e.seq, nil, e.newest
	if e.newest != nil {
		e.newest.newer = m
	}
	e.newest = m
}

func (e *Engine) unlist(m *machine) {
	if m.newer != nil {
		m.newer.older = m.older
	} else if e.newest == m {
		e.newest = m.older
	}
	if m.older != nil {
		m.older.newer = m.newer
	}
}

// rename gives kinds of devices and classes new numbers, those in use only.
func (e *Engine) rename() {
	e.names.kinds, e.names.classes, e.names.classOf = map[kindKey]*kind{}, map[string]int32{}, nil
	for _, m := range e.machines {
		if m != nil {
			m.describe(e.names, m.Worker)
		}
	}
	for _, s := range e.byAge {
		s.forget()
	}
	e.limit = max(minNames, 2*(len(e.names.kinds)+len(e.names.classOf)))
}

// SetJob says what could be placed of a job now: it replaces what was known and
// what Plan booked of it. A job without any is removed. The engine changes
// nothing of w.
func (e *Engine) SetJob(w state.Work) {
	if len(w.Requeued) == 0 && w.Next >= w.End && len(w.Checks) == 0 {
		e.RemoveJob(w.Job.Id)
		return
	}
	j := e.jobOf(w.Job)
	listed := make(map[string]struct{}, len(w.Checks))
	for i := range w.Checks {
		listed[w.Checks[i].Check.Id] = struct{}{}
	}
	for id, r := range j.checks { // one does not depend on another
		if _, ok := listed[id]; !ok {
			e.dequeue(r)
			delete(j.checks, id)
		}
	}
	after := 0
	for _, run := range w.Checks {
		after = e.setCheck(j, run, after)
	}
	e.setTasks(j, w)
}

// SetTasks is SetJob for a change of the tasks alone: what checks want is told
// by SetCheck and RemoveCheck. It changes nothing and reports false where that
// does not do, as the job is not known or was, or is, paused or over: then the
// checks may be affected too.
func (e *Engine) SetTasks(w state.Work) bool {
	j := e.jobs[w.Job.Id]
	if j == nil || halted(j.Job) != halted(w.Job) || j.Spec != w.Job.Spec {
		return false
	}
	if e.setTasks(j, w); len(j.checks) == 0 && !j.hasTasks() {
		e.RemoveJob(j.Id)
	}
	return true
}

// halted reports whether no tasks of a job are placed.
func halted(job *musterpb.Job) bool {
	return state.Ended(job.State) || job.State == musterpb.JobState_JOB_STATE_PAUSED
}

// SetCheck says what a check wants now, as SetJob does for all checks of a job.
func (e *Engine) SetCheck(job *musterpb.Job, run state.WantedRun) {
	e.setCheck(e.jobOf(job), run, 0)
}

// RemoveCheck forgets a check that wants nothing.
func (e *Engine) RemoveCheck(job, check string) {
	j := e.jobs[job]
	if j == nil || j.checks[check] == nil {
		return
	}
	e.dequeue(j.checks[check])
	if delete(j.checks, check); len(j.checks) == 0 && !j.hasTasks() && len(j.passed) == 0 {
		e.RemoveJob(job)
	}
}

// jobOf is the entry of a job, made where there is none for its specification:
// a change of the budget makes a new one.
func (e *Engine) jobOf(job *musterpb.Job) *queuedJob {
	if j := e.jobs[job.Id]; j != nil {
		if j.Spec == job.Spec {
			return j
		}
		e.RemoveJob(j.Id)
	}
	return e.addJob(job)
}

func (e *Engine) setTasks(j *queuedJob, w state.Work) {
	j.Job = w.Job
	if c := j.counts; c != nil {
		for _, s := range c.decided {
			e.spread(c, s, -1)
		}
		c.decided = c.decided[:0]
	}
	j.requeued, j.passed, j.next, j.end = w.Requeued, nil, w.Next, w.End
	switch queued := j.tasks.lane != nil; {
	case j.hasTasks() && !queued:
		e.enqueue(j.tasks)
	case !j.hasTasks() && queued:
		e.dequeue(j.tasks)
	}
}

func (e *Engine) addJob(of *musterpb.Job) *queuedJob {
	j := &queuedJob{Job: of, digests: cacheable(of.Spec)}
	j.tasks = &request{job: j}
	key := shapeKey(j.Spec)
	s := e.shapes[key]
	if s == nil {
		s = newShape(key, j.Spec)
		e.shapes[key], e.byAge = s, append(e.byAge, s)
	}
	s.jobs++
	j.shape, j.account = s, e.account(j.Account)
	j.account.jobs++
	j.orderKey = orderKey(of, j.digests)
	if spreads(of) {
		j.counts = e.countsOf(of)
	}
	e.jobs[j.Id] = j
	return j
}

// setCheck says what a check wants, with an index above another, and returns
// its index. It keeps that where it can.
func (e *Engine) setCheck(j *queuedJob, run state.WantedRun, after int) int {
	old := j.checks[run.Check.Id]
	keeps := old != nil && old.index > after
	if keeps && sameRun(old.run, &run) {
		*old.run = run
		return old.index
	}
	r := &request{job: j, run: &run, parties: partiesOf(j.shape, &run)}
	if old != nil {
		e.dequeue(old)
	}
	if keeps {
		r.index = old.index
	} else {
		j.lastIndex++
		r.index = j.lastIndex
	}
	if j.checks == nil {
		j.checks = map[string]*request{}
	}
	if j.checks[run.Check.Id] = r; run.Unpaid == "" && run.Runs > 0 {
		e.enqueue(r)
	}
	return r.index
}

// sameRun reports whether what a check wants has not changed. A check that is
// the same value has the same parties, and as many as Plan did not book more.
func sameRun(a, b *state.WantedRun) bool {
	return a.Runs == b.Runs && a.Unpaid == b.Unpaid && len(a.Parties) == len(b.Parties) && len(a.Tried) == len(b.Tried) &&
		(a.Check == b.Check || a.Check.Id == b.Check.Id && a.Class == b.Class && slices.Equal(a.Tried, b.Tried) &&
			slices.EqualFunc(a.Parties, b.Parties, func(a, b *musterpb.Attempt) bool { return a.Worker == b.Worker && a.Batch == b.Batch }))
}

// RemoveJob forgets what could be placed of a job.
func (e *Engine) RemoveJob(id string) {
	j := e.jobs[id]
	if j == nil {
		return
	}
	e.dequeue(j.tasks)
	for _, r := range j.checks {
		e.dequeue(r)
	}
	j.shape.jobs--
	j.account.jobs--
	delete(e.jobs, id)
	e.dropAccount(j.account)
	e.dropCounts(id)
}

// ForgetJob forgets a job that is gone, with the attempts of it whose end nobody
// told of.
func (e *Engine) ForgetJob(id string) {
	e.RemoveJob(id)
	if c := e.counts[id]; c != nil {
		clear(c.live)
		e.dropCounts(id)
	}
}

func (e *Engine) account(name string) *account {
	a := e.accounts[name]
	if a == nil {
		a = newAccount(name)
		e.accounts[name] = a
	}
	return a
}

func (e *Engine) dropAccount(a *account) {
	if a.jobs == 0 && a.units == 0 {
		delete(e.accounts, a.name)
	}
}

// SetUsage says how much an account has running, in units of attempts (see
// state.Units). Plan adds to it what it decides.
func (e *Engine) SetUsage(account string, units int64) {
	a := e.accounts[account]
	if a == nil && units == 0 {
		return
	}
	a = e.account(account)
	a.units = units
	if a.pos >= 0 {
		e.turns.fix(a.pos)
	}
	e.dropAccount(a)
}

// SetAttempt says how an attempt is now. Only those of jobs that spread are
// counted; a call for another is free. It comes before SetTasks or SetJob, which
// forget what Plan decided and no attempt was told of.
func (e *Engine) SetAttempt(job *musterpb.Job, a *musterpb.Attempt) {
	if !spreads(job) {
		return
	}
	c := e.countsOf(job)
	_, known := c.live[a.Id]
	running := a.State == musterpb.AttemptState_ATTEMPT_STATE_PLACED || a.State == musterpb.AttemptState_ATTEMPT_STATE_RUNNING
	switch at := (spot{a.Worker, a.Owner}); {
	case running && !known:
		if c.live[a.Id] = at; !c.isDecided(at) {
			e.spread(c, at, 1)
		}
	case !running && known:
		delete(c.live, a.Id)
		e.spread(c, at, -1)
	}
	e.dropCounts(job.Id)
}

func spreads(job *musterpb.Job) bool {
	return job.Spec.Placement.GetSpread() != musterpb.Spread_SPREAD_NONE
}

func (e *Engine) countsOf(job *musterpb.Job) *counts {
	c := e.counts[job.Id]
	if c == nil {
		c = newCounts(job.Spec.Placement.Spread)
		e.counts[job.Id] = c
	}
	return c
}

func (e *Engine) dropCounts(job string) {
	if c := e.counts[job]; c != nil && e.jobs[job] == nil && len(c.live) == 0 {
		if c.order != nil {
			c.order.drop()
		}
		delete(e.counts, job)
	}
}

// Plan decides at most so many placements, and books them.
//
// The account that uses least goes first, one attempt at a time (max-min
// fairness); within an account the jobs of highest priority, oldest first;
// within a job its checks before its tasks, since they let owners be paid.
func (e *Engine) Plan(nowUnixMS int64, most int) []Placement {
	e.now, e.reviews = max(e.now, nowUnixMS), 0
	e.wake()
	e.restore()
	e.booked = e.booked[:0]
	out := e.useKept(nil, most)
	e.reopen()
	for len(out) < most && len(e.turns.items) > 0 && e.reviews < maxReviews {
		e.tick++
		account := e.turns.items[0]
		p, ok := e.turn(account.open.items[0])
		if !ok {
			continue // that lane is parked, or shorter
		}
		e.charge(account, p)
		out = append(out, p)
	}
	e.keep()
	return out
}

// charge adds what was placed to what an account has running.
func (e *Engine) charge(a *account, p Placement) {
	a.units += state.Units(p.Job.Spec.Resources)
	if a.pos >= 0 {
		e.turns.fix(a.pos)
	}
}

// wake counts the machines as changed whose rest is over.
func (e *Engine) wake() {
	for len(e.resting.items) > 0 && e.resting.items[0].BackoffUntilUnixMs <= e.now {
		m := e.resting.items[0]
		e.resting.remove(0)
		e.touch(m)
	}
}

// restore queues the tasks again that were passed over.
func (e *Engine) restore() {
	for _, j := range e.deferred {
		if e.jobs[j.Id] == j && len(j.passed) > 0 {
			j.requeued, j.passed = slices.Concat(j.passed, j.requeued), nil
			if j.tasks.lane == nil {
				e.enqueue(j.tasks)
			}
		}
	}
	clear(e.deferred)
	e.deferred = e.deferred[:0]
}

// turn places the first request of a lane. Where it can't, the lane parks or
// loses a request, so that trying again comes to an end.
func (e *Engine) turn(l *lane) (Placement, bool) {
	r := l.requests.items[0]
	if r.run != nil {
		return e.turnOfCheck(l, r)
	}
	j, s := r.job, r.job.shape
	e.catchUp(s)
	if s.total.ready == 0 {
		e.park(l)
		return Placement{}, false
	}
	for len(j.requeued) > 0 {
		task := j.requeued[0]
		j.requeued = j.requeued[1:]
		// The same owner again would burn a retry, and could not show that the job
		// is at fault: for that it has to fail in the same way elsewhere.
		if task.Failures > 0 && s.otherOwnerIsBusy(e.names, task.AvoidOwners) {
			if j.passed = append(j.passed, task); len(j.passed) == 1 {
				e.deferred = append(e.deferred, j)
			}
			continue
		}
		return e.placeTask(j, task.Number, task.AvoidOwners), true
	}
	if j.next < j.end {
		j.next++
		return e.placeTask(j, j.next-1, nil), true
	}
	e.dequeue(r)
	return Placement{}, false
}

// placeTask books a task on the best machine; there is one that is ready.
func (e *Engine) placeTask(j *queuedJob, task uint32, avoid []string) Placement {
	m := e.bestFor(j, avoid)
	j.tasks.lane.since = 0
	p := e.book(j.tasks, m, noClass, j.Spec.Placement.GetAffinities())
	p.Task = task
	if c := j.counts; c != nil {
		at := spot{m.Id, m.Owner}
		c.decided = append(c.decided, at)
		e.spread(c, at, 1)
	}
	if !j.hasTasks() {
		e.dequeue(j.tasks)
	}
	return p
}

// bestFor is the best machine for a task; there is one that is ready.
func (e *Engine) bestFor(j *queuedJob, avoid []string) *machine {
	j.order = e.orderOf(j.shape, j.order, j.orderKey, j, nil)
	o, c := j.order, j.counts
	switch {
	case c == nil:
		if o.scans() {
			return o.scan(nil, avoid)
		}
	case len(j.shape.ready) <= e.scanned:
		return o.scan(c, avoid)
	case c.places() <= e.narrow && len(avoid) == 0:
		o.catchUp()
		return o.bestSpread(c)
	default:
		if c.order == nil || c.order.gone {
			c.order = e.orderOf(j.shape, nil, j.orderKey+"of "+j.Id, j, c)
		}
		if o = c.order; o.scans() {
			return o.scan(c, avoid)
		}
	}
	o.catchUp()
	return o.best(avoid)
}

// orderOf is an order as it was used last, unless that is gone.
func (e *Engine) orderOf(s *shape, last *order, key string, j *queuedJob, c *counts) *order {
	if last != nil && !last.gone {
		return last
	}
	if s.orders[key] == nil {
		e.makeRoom()
		s.orders[key] = newOrder(e, s, key, j, c)
	}
	return s.orders[key]
}

func (e *Engine) turnOfCheck(l *lane, r *request) (Placement, bool) {
	p := l.gate.pool
	p.catchUp(e)
	if p.free == 0 {
		e.park(l)
		return Placement{}, false
	}
	if p.candidates(e, r.run, true) == 0 {
		e.unqueue(l, r)
		l.stick(r)
		e.list(l)
		return Placement{}, false
	}
	var seed []byte
	if e.seed != nil {
		seed = e.seed(r.run.Parties[0].Batch)
	}
	m := p.draw(e, r.run, seed)
	out := e.book(r, m, p.class, nil)
	out.Task, out.Check = r.run.Parties[0].Task, r.run.Check
	if slices.ContainsFunc(r.run.Parties, func(a *musterpb.Attempt) bool { return a.Owner == m.Owner }) {
		out.Relaxed = "checked by another worker of the same owner, as verify.same_owner allows"
	}
	e.dequeue(r)
	r.run.Parties = append(slices.Clip(r.run.Parties), &musterpb.Attempt{Worker: m.Id, Owner: m.Owner})
	if r.run.Runs--; r.run.Runs > 0 {
		r.parties = partiesOf(r.job.shape, r.run)
		e.enqueue(r)
	}
	return out, true
}

// book takes from a machine that is ready what an attempt needs, of the given
// class of devices unless that is noClass.
func (e *Engine) book(r *request, m *machine, class int32, prefer []*musterpb.Affinity) Placement {
	j, s := r.job, r.job.shape
	p := Placement{Job: j.Job, Worker: m.Id, Devices: []string{}}
	if n := s.gpus(); n > 0 {
		devices, taken := preferred(m.devices, prefer), make([]int, 0, n)
		if class == noClass && len(prefer) > 0 { // of the class that is preferred, if there are enough
			if _, ok := s.pick(devices, noClass, true, &taken); !ok {
				devices = m.devices
			}
			taken = taken[:0]
		}
		of, _ := s.pick(devices, class, true, &taken)
		for _, i := range taken {
			p.Devices = append(p.Devices, devices[i].uuid)
		}
		p.Class = e.names.classOf[of]
	} else {
		p.Class = e.names.classOf[s.at[m.slot].home]
	}
	m.take(s.spec.Resources, p.Devices)
	e.touch(m)
	e.booked = append(e.booked, booked{slot: m.slot, gpus: s.gpus() > 0, request: r, units: j.account.units})
	return p
}

// preferred are the devices with those first whose model is preferred.
func preferred(devices []device, affinities []*musterpb.Affinity) []device {
	weight := func(d device) (sum int32) {
		for _, a := range affinities {
			if a.Attribute == jobspec.AttributeGPU && isModel(d.kind.model, a.Value) {
				sum += a.Weight
			}
		}
		return sum
	}
	if !slices.ContainsFunc(affinities, func(a *musterpb.Affinity) bool { return a.Attribute == jobspec.AttributeGPU }) {
		return devices
	}
	devices = slices.Clone(devices)
	slices.SortStableFunc(devices, func(a, b device) int { return cmp.Compare(weight(b), weight(a)) })
	return devices
}

// catchUp takes up what changed since a shape was asked last.
func (e *Engine) catchUp(s *shape) {
	s.used = e.tick
	if s.seen == 0 {
		e.makeRoom()
	}
	for s.seen < e.seq { // a change may make others
		since := s.seen
		s.seen = e.seq
		e.changed = e.changed[:0]
		for m := e.newest; m != nil && m.seq > since; m = m.older {
			e.changed = append(e.changed, m)
		}
		e.reviews += len(e.changed)
		for _, m := range e.changed {
			s.update(e, m)
		}
	}
}

// makeRoom drops indexes that were not used for longest while there are too
// many, and constraints that no job has.
func (e *Engine) makeRoom() {
	for e.indexBytes() > maxIndexBytes && e.dropOldest() {
	}
	for len(e.byAge) > maxShapes && e.dropIdle() {
	}
}

func (e *Engine) indexBytes() (n int) {
	for _, s := range e.byAge {
		n += len(s.at) * 28
		for _, o := range s.orders {
			n += len(o.at) * 104
		}
		for _, p := range s.built {
			n += len(p.at) * 8
		}
	}
	return n
}

// dropOldest drops the shape or order that was used least recently, and not
// for the decision at hand.
func (e *Engine) dropOldest() bool {
	used, drop := e.tick, func() {}
	for _, s := range e.byAge {
		if len(s.at) > 0 && s.used < used {
			used, drop = s.used, s.forget
		}
		for _, o := range s.orders {
			if o.used < used { // no two orders are used for one decision
				used, drop = o.used, o.drop
			}
		}
	}
	drop()
	return used < e.tick
}

// dropIdle forgets the shape without jobs that was used least recently.
func (e *Engine) dropIdle() bool {
	at := -1
	for i, s := range e.byAge {
		if s.jobs == 0 && s.used < e.tick && (at < 0 || s.used < e.byAge[at].used) {
			at = i
		}
	}
	if at < 0 {
		return false
	}
	e.byAge[at].forget()
	delete(e.shapes, e.byAge[at].key)
	e.byAge = slices.Delete(e.byAge, at, at+1)
	return true
}

// Workers are all workers that the engine knows, with what Plan booked.
func (e *Engine) Workers() []*Worker {
	list := make([]*Worker, 0, len(e.byID))
	for _, m := range e.machines {
		if m != nil {
			list = append(list, m.Worker)
		}
	}
	return list
}

// Explain says how many workers fail which constraint of a job's next task,
// or of a check when run is given.
func (e *Engine) Explain(nowUnixMS int64, job *musterpb.Job, run *state.WantedRun) *musterpb.ExplainJobResponse {
	return Explain(nowUnixMS, e.Workers(), job, run)
}

// Possible reports whether any worker could take a run of a check, now or once
// what it is busy with is over.
func (e *Engine) Possible(job *musterpb.Job, run *state.WantedRun) bool {
	return Possible(e.Workers(), job, run)
}
