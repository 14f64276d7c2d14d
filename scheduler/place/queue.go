package place

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// queuedJob is a job with work to place.
type queuedJob struct {
	*musterpb.Job
	account  *account
	shape    *shape
	digests  []string
	orderKey string
	order    *order // as it was used last; may be gone by now
	counts   *counts

	requeued  []*musterpb.Task // next first
	passed    []*musterpb.Task // of those, which wait for another owner; tried again in the next round
	next, end uint32
	tasks     *request // queued while there are tasks
	checks    []*request
}

// hasTasks reports whether a task waits that was not passed over.
func (j *queuedJob) hasTasks() bool { return len(j.requeued) > 0 || j.next < j.end }

// request is what takes its turn in a queue: the tasks of a job, or a check.
type request struct {
	job   *queuedJob
	run   *state.WantedRun // nil for tasks
	index int              // of a check, in its job
	lane  *lane
	pos   int // in its lane
}

// before orders the requests of an account: priority, then age; within a job
// checks before tasks, since they let owners be paid.
func (r *request) before(o *request) bool {
	if r.job != o.job {
		return cmp.Or(cmp.Compare(o.job.Spec.Priority, r.job.Spec.Priority), cmp.Compare(r.job.Sequence, o.job.Sequence), cmp.Compare(r.job.Id, o.job.Id)) < 0
	}
	if (r.run == nil) != (o.run == nil) {
		return o.run == nil
	}
	return r.index < o.index
}

// lane is the requests of an account that wait for the same: where the first
// finds no place, none does. A lane then parks at the gate until that opens.
type lane struct {
	key      string
	account  *account
	gate     *gate
	requests heap[*request]
	pos      int // among the account's lanes that may go on, -1 elsewhere
	parked   bool
	since    int64 // when others went past it first, since it was served; 0 when none did
}

// gate is what lanes park at: a shape for tasks, a pool for checks.
type gate struct {
	shape  *shape
	pool   *pool // nil for tasks
	parked []*lane
	listed bool // among the engine's closed gates
}

// account is a customer with its share of what runs.
type account struct {
	name  string
	units int64 // running
	jobs  int   // with work to place
	lanes map[string]*lane
	open  heap[*lane] // that may go on, by their first request
	pos   int         // among the accounts with such lanes, -1 elsewhere
}

func newAccount(name string) *account {
	a := &account{name: name, lanes: map[string]*lane{}, pos: -1}
	a.open = heap[*lane]{
		less:  func(a, b *lane) bool { return a.requests.items[0].before(b.requests.items[0]) },
		moved: func(l *lane, at int) { l.pos = at },
	}
	return a
}

// usesLess is the order in which accounts take turns.
func usesLess(a, b *account) bool {
	return a.units < b.units || (a.units == b.units && a.name < b.name)
}

// enqueue puts a request into its lane.
func (e *Engine) enqueue(r *request) {
	key, at := e.laneOf(r)
	a := r.job.account
	l := a.lanes[key]
	if l == nil {
		l = &lane{key: key, account: a, gate: at, pos: -1}
		l.requests = heap[*request]{less: (*request).before, moved: func(r *request, at int) { r.pos = at }}
		a.lanes[key] = l
	}
	r.lane = l
	l.requests.push(r)
	if !l.parked {
		e.present(l)
	}
}

// present lets a lane take part, at the place of its first request.
func (e *Engine) present(l *lane) {
	if l.pos < 0 {
		l.account.open.push(l)
	} else {
		l.account.open.fix(l.pos)
	}
	if l.account.pos < 0 {
		e.turns.push(l.account)
	}
}

// withdraw takes a lane out of its account's choice.
func (e *Engine) withdraw(l *lane) {
	if l.pos >= 0 {
		l.account.open.remove(l.pos)
	}
	if a := l.account; len(a.open.items) == 0 && a.pos >= 0 {
		e.turns.remove(a.pos)
	}
}

// dequeue takes a request out of its lane.
func (e *Engine) dequeue(r *request) {
	l := r.lane
	r.lane = nil
	if l == nil {
		return
	}
	if len(l.requests.items) == 1 {
		e.withdraw(l) // while it has a first request to compare by
		l.requests.remove(r.pos)
		delete(l.account.lanes, l.key)
		return
	}
	l.requests.remove(r.pos)
	if l.pos >= 0 {
		l.account.open.fix(l.pos)
	}
}

// park makes a lane wait for its gate.
func (e *Engine) park(l *lane) {
	e.withdraw(l)
	l.parked = true
	l.gate.parked = append(l.gate.parked, l)
	if !l.gate.listed {
		l.gate.listed = true
		e.closed = append(e.closed, l.gate)
	}
}

// laneOf says what a request waits for.
func (e *Engine) laneOf(r *request) (string, *gate) {
	s := r.job.shape
	if r.run == nil {
		return s.key, &s.gate
	}
	p := s.pools[r.run.Class]
	if p == nil {
		p = &pool{name: r.run.Class}
		p.gate.shape, p.gate.pool = s, p
		s.pools[r.run.Class] = p
	}
	// Who has a part in a check can't run it, so checks wait for the same when
	// the same have a part in them.
	var parties []string
	for _, a := range r.run.Parties {
		party := a.Owner
		if s.spec.Verify.GetSameOwner() {
			party = a.Worker
		}
		if !slices.Contains(parties, party) {
			parties = append(parties, party)
		}
	}
	slices.Sort(parties)
	return fmt.Sprintf("%q %q %s", r.run.Class, strings.Join(parties, " "), s.key), &p.gate
}

// reopen lets lanes go on whose gate has opened since they parked. It looks at
// a bounded number of machines, and at the gates that it did not come to first
// in the next round.
func (e *Engine) reopen() {
	limit := e.reviews + maxReviews/2
	for n := len(e.closed); n > 0 && e.reviews < limit; n-- {
		g := e.closed[0]
		e.closed = e.closed[1:]
		if g.review(e); len(g.parked) > 0 {
			e.closed = append(e.closed, g)
		} else {
			g.listed = false
		}
	}
}

// review presents the lanes that could go on.
func (g *gate) review(e *Engine) {
	g.parked = slices.DeleteFunc(g.parked, func(l *lane) bool { return len(l.requests.items) == 0 })
	switch {
	case len(g.parked) == 0: // nothing waits any more
		return
	case g.pool == nil:
		e.catchUp(g.shape)
	default:
		g.pool.catchUp(e)
	}
	still := g.parked[:0]
	for _, l := range g.parked {
		switch {
		case g.passable(e, l):
			l.parked = false
			e.present(l)
		default:
			still = append(still, l)
		}
	}
	clear(g.parked[len(still):])
	g.parked = still
}

func (g *gate) passable(e *Engine, l *lane) bool {
	if g.pool == nil {
		return g.shape.total.ready > 0
	}
	return g.pool.candidates(e, l.requests.items[0].run, true) > 0
}

// counts is how many attempts of a job that spreads are on each worker, and on
// those of each owner: those that the engine was told of, and those that it
// has decided since it was told.
type counts struct {
	byWorker map[string]int64
	byOwner  map[string]int64
	live     map[string]spot // by attempt
	decided  []spot
	order    *order // as it was used last; may be gone by now
}

type spot struct{ worker, owner string }

func (c *counts) add(s spot, n int64) {
	for _, x := range []struct {
		m    map[string]int64
		name string
	}{{c.byWorker, s.worker}, {c.byOwner, s.owner}} {
		if x.m[x.name] += n; x.m[x.name] == 0 {
			delete(x.m, x.name)
		}
	}
}
