package place

import "slices"

// Where many small attempts take turns on a machine, all of it is never free at
// once, and what needs most of it would wait for ever. So a lane that others
// went past for long gets a machine kept free for it: nothing new is placed
// there until a task of that lane fits.

const (
	// keepAfterMS is how long others go past a lane before a machine is kept for
	// it: about the time in which a machine empties by itself.
	keepAfterMS = 30_000
	// keepShare is which part of all machines may be kept at once. They stand
	// partly idle.
	keepShare = 8
)

// kept is a machine that is being emptied for a lane.
type kept struct {
	machine *machine
	lane    *lane
}

// booked is a decision of this round, as far as it matters to those it went
// past.
type booked struct {
	slot    int32
	gpus    bool
	request *request
	units   int64 // that the account had
}

// useKept places on machines that were kept, where that is possible now, and
// gives up those that are not needed any more.
func (e *Engine) useKept(out []Placement, most int) []Placement {
	list := e.kept
	e.kept = nil
	for i, k := range list {
		l, s := k.lane, k.lane.gate.shape
		e.catchUp(s)
		state := s.at[k.machine.slot].state
		if l.parked && !l.idle() && state == waiting && !s.fits(e.now, k.machine) || len(out) == most {
			e.kept = append(e.kept, list[i])
			continue
		}
		e.release(k)
		if state == unfit || !l.parked || l.idle() {
			continue
		}
		e.unpark(l)
		if p, ok := e.turn(l); ok {
			e.charge(l.account, p)
			out = append(out, p)
		}
	}
	return out
}

// release makes a machine that was kept one like others.
func (e *Engine) release(k kept) {
	k.machine.kept, k.machine.Worker.kept = nil, false
	e.touch(k.machine)
}

// forgetKept gives up the machine that a worker was.
func (e *Engine) forgetKept(m *machine) {
	if m.kept != nil {
		e.kept = slices.DeleteFunc(e.kept, func(k kept) bool { return k.machine == m })
		m.kept = nil
	}
}

// keep finds the lanes that others went past in this round, and keeps a machine
// for those to whom that happens for too long.
func (e *Engine) keep() {
	if len(e.booked) == 0 {
		return
	}
	for _, g := range e.closed {
		if g.pool != nil || g.shape.total.suit == 0 {
			continue
		}
		for _, l := range g.lanes {
			if l.idle() || !l.parked || !e.wentPast(l) {
				continue
			}
			if l.since == 0 {
				l.since = e.now
			} else if e.now-l.since >= e.patience && len(e.kept) < max(len(e.byID)/keepShare, 1) {
				e.keepOne(l)
			}
		}
	}
}

// wentPast reports whether something was placed in this round, on a machine
// that suits a lane, whose turn was after that of the lane.
func (e *Engine) wentPast(l *lane) bool {
	s, r := l.gate.shape, l.requests.items[0]
	units := l.account.units
	for _, k := range e.kept {
		if k.lane.account == l.account {
			units += s.units() // it will have them
		}
	}
	return slices.ContainsFunc(e.booked, func(b booked) bool {
		if int(b.slot) >= len(s.at) || s.at[b.slot].state == unfit || (s.gpus() > 0 && !b.gpus) {
			return false
		}
		if b.request.job.account == l.account {
			return r.before(b.request)
		}
		return units < b.units
	})
}

// keepOne keeps the machine that has least to wait for before a task of the lane fits.
func (e *Engine) keepOne(l *lane) {
	s := l.gate.shape
	var best *machine
	var bestLack [3]int64
	for slot := range s.at {
		m := e.machines[slot]
		if m == nil || s.at[slot].state != waiting || m.kept != nil || m.BackoffUntilUnixMs > e.now {
			continue
		}
		r := s.spec.Resources
		lack := [3]int64{max(int64(s.gpus()-m.idle), 0), max(r.GetMilliCpus()-m.FreeMilliCPUs, 0), max(r.GetMemoryBytes()-m.FreeMemoryBytes, 0)}
		if order := slices.Compare(lack[:], bestLack[:]); best == nil || order < 0 || (order == 0 && e.before(m, best)) {
			best, bestLack = m, lack
		}
	}
	if best == nil {
		return
	}
	best.kept, best.Worker.kept = l, true
	e.touch(best)
	e.kept = append(e.kept, kept{best, l})
}
