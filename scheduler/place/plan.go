package place

import (
	"cmp"
	"slices"

	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

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
	var looked, late []*account // for which machines were looked at; that had their share of it
	for len(out) < most && len(e.turns.items) > 0 && e.reviews < maxReviews {
		e.tick++
		account := e.turns.items[0]
		if account.reviews > maxAccountReviews {
			e.turns.remove(account.pos)
			late = append(late, account)
			continue
		}
		before := e.reviews
		p, ok := e.turn(account.open.items[0])
		if e.reviews > before && account.reviews == 0 {
			looked = append(looked, account)
		}
		account.reviews += e.reviews - before
		if !ok {
			continue // that lane is parked, or shorter
		}
		e.charge(account, p)
		out = append(out, p)
	}
	e.readmit(looked, late)
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

// readmit lets accounts take part in the next round that were left out of this
// one.
func (e *Engine) readmit(looked, late []*account) {
	for _, a := range looked {
		a.reviews = 0
	}
	for _, a := range late {
		if a.pos < 0 && len(a.open.items) > 0 {
			e.turns.push(a)
		}
	}
}
