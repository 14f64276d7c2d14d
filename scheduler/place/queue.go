package place

import (
	"cmp"
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
	order    *order // of this job alone, where it has many attempts; may be gone by now
	counts   *counts

	requeued  []*musterpb.Task // next first
	passed    []*musterpb.Task // of those, which wait for another owner; tried again in the next round
	next, end uint32
	tasks     *request            // queued while there are tasks
	checks    map[string]*request // by check
	lastIndex int                 // that a check has got
}

// hasTasks reports whether a task waits that was not passed over.
func (j *queuedJob) hasTasks() bool { return len(j.requeued) > 0 || j.next < j.end }

// request is what takes its turn in a queue: the tasks of a job, or a check.
type request struct {
	job   *queuedJob
	run   *state.WantedRun // nil for tasks
	index int              // orders the checks of a job
	lane  *lane
	// Who has a part in a check can't run it, so checks with the same parties find
	// a place together or not at all.
	parties string
	stuck   bool // its lane found nobody without a part in it
	pos     int  // in its lane, or among those that are stuck with it
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
	account  *account
	gate     *gate
	requests heap[*request]
	stuck    map[string][]*request // checks that found nobody, by their parties
	pos      int                   // among the account's lanes that may go on, -1 elsewhere
	listed   bool                  // at the gate, since it is parked or something is stuck
	parked   bool
	since    int64 // when others went past it first, since it was served; 0 when none did
}

// idle reports whether nothing of the account waits here any more.
func (l *lane) idle() bool { return len(l.requests.items) == 0 && len(l.stuck) == 0 }

// gate is what lanes park at: a shape for tasks, a pool for checks.
type gate struct {
	shape  *shape
	pool   *pool // nil for tasks
	lanes  []*lane
	listed bool // among the engine's closed gates
}

// account is a customer with its share of what runs.
type account struct {
	name  string
	units int64 // running
	jobs  int   // with work to place
	lanes map[*gate]*lane
	open  heap[*lane] // that may go on, by their first request
	pos   int         // among the accounts with such lanes, -1 elsewhere

	reviews int // machines that were looked at for it in this round
}

func newAccount(name string) *account {
	a := &account{name: name, lanes: map[*gate]*lane{}, pos: -1}
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
	at, a := e.gateOf(r), r.job.account
	l := a.lanes[at]
	if l == nil {
		l = &lane{account: a, gate: at, pos: -1}
		l.requests = heap[*request]{less: (*request).before, moved: func(r *request, at int) { r.pos = at }}
		a.lanes[at] = l
	}
	r.lane = l
	if len(l.stuck[r.parties]) > 0 {
		l.stick(r)
		return
	}
	l.requests.push(r)
	if !l.parked {
		e.present(l)
	}
}

// stick puts a check beside the others that found nobody.
func (l *lane) stick(r *request) {
	if l.stuck == nil {
		l.stuck = map[string][]*request{}
	}
	r.stuck, r.pos = true, len(l.stuck[r.parties])
	l.stuck[r.parties] = append(l.stuck[r.parties], r)
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
	if l == nil {
		return
	}
	r.lane = nil
	if r.stuck {
		list := l.stuck[r.parties]
		last := list[len(list)-1]
		list[r.pos], last.pos = last, r.pos
		if l.stuck[r.parties] = list[:len(list)-1]; len(list) == 1 {
			delete(l.stuck, r.parties)
		}
		r.stuck = false
	} else {
		e.unqueue(l, r)
	}
	if l.idle() {
		delete(l.account.lanes, l.gate)
	}
}

// unqueue takes a request out of the heap of its lane.
func (e *Engine) unqueue(l *lane, r *request) {
	if len(l.requests.items) == 1 {
		e.withdraw(l) // while it has a first request to compare by
	}
	l.requests.remove(r.pos)
	if l.pos >= 0 {
		l.account.open.fix(l.pos)
	}
}

// list makes a lane be looked at when its gate may have opened.
func (e *Engine) list(l *lane) {
	g := l.gate
	if !l.listed {
		l.listed = true
		g.lanes = append(g.lanes, l)
	}
	if !g.listed {
		g.listed = true
		e.closed = append(e.closed, g)
	}
}

// park makes a lane wait for its gate.
func (e *Engine) park(l *lane) {
	e.withdraw(l)
	l.parked = true
	e.list(l)
}

// unpark lets a lane go on.
func (e *Engine) unpark(l *lane) {
	l.parked = false
	if len(l.requests.items) > 0 {
		e.present(l)
	}
}

// gateOf says what a request waits for.
func (e *Engine) gateOf(r *request) *gate {
	s := r.job.shape
	if r.run == nil {
		return &s.gate
	}
	p := s.pools[r.run.Class]
	if p == nil {
		p = &pool{name: r.run.Class, opened: true}
		p.gate.shape, p.gate.pool = s, p
		s.pools[r.run.Class] = p
	}
	return &p.gate
}

// partiesOf is equal for checks of a shape that the same can't run.
func partiesOf(s *shape, run *state.WantedRun) string {
	party := func(a *musterpb.Attempt) string {
		if s.spec.Verify.GetSameOwner() {
			return a.Worker
		}
		return a.Owner
	}
	if len(run.Parties) == 1 {
		return party(run.Parties[0])
	}
	var parties []string
	for _, a := range run.Parties {
		parties = append(parties, party(a))
	}
	slices.Sort(parties)
	return strings.Join(slices.Compact(parties), " ")
}

// reopen lets lanes go on whose gate has opened since they parked. It looks at
// a bounded number of machines, and at the gates that it did not come to first
// in the next round.
func (e *Engine) reopen() {
	limit := e.reviews + maxReviews/2
	for n := len(e.closed); n > 0 && e.reviews < limit; n-- {
		g := e.closed[0]
		e.closed = e.closed[1:]
		if g.review(e); len(g.lanes) > 0 {
			e.closed = append(e.closed, g)
		} else {
			g.listed = false
		}
	}
}

// review lets the lanes go on that could, and keeps those listed for which
// there is more to wait for.
func (g *gate) review(e *Engine) {
	if p := g.pool; p != nil && p.built {
		if e.catchUp(g.shape); !p.opened {
			return // nobody could go on
		}
	}
	g.lanes = slices.DeleteFunc(g.lanes, func(l *lane) bool {
		l.listed = !l.idle()
		return !l.listed
	})
	if len(g.lanes) == 0 { // nothing waits any more
		return
	}
	opened := false
	if g.pool == nil {
		e.catchUp(g.shape)
		opened = g.shape.total.ready > 0
	} else {
		g.pool.catchUp(e)
		opened = g.pool.opened && g.pool.free > 0
		g.pool.opened = false
	}
	if !opened {
		return
	}
	g.lanes = slices.DeleteFunc(g.lanes, func(l *lane) bool {
		for parties, list := range l.stuck { // one does not depend on another
			if g.pool.candidates(e, list[0].run, true) > 0 {
				delete(l.stuck, parties)
				for _, r := range list {
					r.stuck = false
					l.requests.push(r)
				}
			}
		}
		e.unpark(l)
		l.listed = len(l.stuck) > 0
		return !l.listed
	})
}
