package place

import (
	"slices"

	"github.com/musternet/muster/api/musterpb"
)

// counts is how many attempts of a job that spreads are on each worker or with
// each owner: those that the engine was told of, and those that it has decided
// since.
type counts struct {
	by       musterpb.Spread
	byOwner  map[string]int64
	byWorker map[string]int64 // only where that is what the job spreads over
	known    []uint32         // the same, by number of the owner or slot of the worker
	live     map[string]spot  // by attempt
	decided  []spot           // that no attempt is known of yet
	order    *order           // of this job alone, where it has many attempts; may be gone by now
}

type spot struct{ worker, owner string }

func newCounts(by musterpb.Spread) *counts {
	return &counts{by: by, byOwner: map[string]int64{}, byWorker: map[string]int64{}, live: map[string]spot{}}
}

// of is how many count for a machine.
func (c *counts) of(m *machine) int64 {
	if at := c.index(m); int(at) < len(c.known) {
		return int64(c.known[at])
	}
	return 0
}

func (c *counts) index(m *machine) int32 {
	if c.by == musterpb.Spread_SPREAD_OWNER {
		return m.owner
	}
	return m.slot
}

// places is on how many workers, or with how many owners, attempts are.
func (c *counts) places() int {
	if c.by == musterpb.Spread_SPREAD_OWNER {
		return len(c.byOwner)
	}
	return len(c.byWorker)
}

// add counts attempts. It returns how many count for that place then.
func (c *counts) add(at spot, n int64) int64 {
	here := bump(c.byOwner, at.owner, n)
	if c.by == musterpb.Spread_SPREAD_WORKER {
		here = bump(c.byWorker, at.worker, n)
	}
	return here
}

func bump(m map[string]int64, key string, n int64) int64 {
	if n += m[key]; n == 0 {
		delete(m, key)
	} else {
		m[key] = n
	}
	return n
}

// set notes a count under its number.
func (c *counts) set(index int32, n int64) {
	if int(index) >= len(c.known) {
		if n == 0 {
			return
		}
		c.known = append(c.known, make([]uint32, int(index)+1-len(c.known))...)
	}
	c.known[index] = uint32(min(max(n, 0), maxSpread))
}

// isDecided takes an attempt for one that was decided, if one was there.
func (c *counts) isDecided(at spot) bool {
	i := slices.Index(c.decided, at)
	if i >= 0 {
		c.decided = slices.Delete(c.decided, i, i+1)
	}
	return i >= 0
}

// spread counts attempts of a job that spreads.
func (e *Engine) spread(c *counts, at spot, n int64) {
	here := c.add(at, n)
	if c.by == musterpb.Spread_SPREAD_OWNER {
		if owner, ok := e.names.owners[at.owner]; ok {
			c.set(owner, here)
			c.recount(owner)
		}
	} else if m := e.byID[at.worker]; m != nil {
		c.set(m.slot, here)
		e.touch(m)
	}
}

// recount tells the order of the job that an owner's count has changed.
func (c *counts) recount(owner int32) {
	if c.order != nil && !c.order.gone {
		c.order.recount(owner)
	}
}

// joined gives a machine that is new the counts of its worker and its owner.
func (e *Engine) joined(m *machine) {
	for _, c := range e.counts { // one does not depend on another
		if c.by == musterpb.Spread_SPREAD_OWNER {
			c.set(m.owner, c.byOwner[m.Owner])
		} else {
			c.set(m.slot, c.byWorker[m.Id])
		}
	}
}
