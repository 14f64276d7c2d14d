package place

import (
	"cmp"

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
	maxReviews = 1 << 19
	// maxAccountReviews is the share of that for which one account may have the
	// others wait in a round.
	maxAccountReviews = maxReviews / 8
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
