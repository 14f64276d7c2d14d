package place

import (
	"slices"
)

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
