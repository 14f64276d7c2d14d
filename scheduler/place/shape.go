package place

import (
	"fmt"
	"slices"
	"strings"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// shape is what jobs with identical constraints have in common: the machines
// that suit them, and those of them that could take an attempt now. It catches
// up with the machines that changed when it is asked.
type shape struct {
	key  string
	spec *musterpb.JobSpec // of one of the jobs; only its constraints matter here
	jobs int               // that have work to place
	gate

	seen     uint64   // change of a machine up to which the rest is right
	used     uint64   // when it was asked last, in the engine's ticks
	suits    []int8   // by kind of device: 0 is not known yet, 1 yes, -1 no
	at       []member // by slot
	ready    []int32  // slots of the machines that are ready, in no order
	owners   []tally  // by owner
	total    tally
	checkers map[int32]*checkable // by hardware class
	orders   map[string]*order
	pools    map[string]*pool // by name of the class
	built    map[int32]*pool  // those with an index
}

// member is what a shape knows of a machine.
type member struct {
	fixed uint64 // of the machine, that the rest is as of
	home  int32  // hardware class that its results would have, noClass where it does not suit
	pos   int32  // among those that are ready
	state int8
}

const noClass int32 = -1

// States of a machine for a shape.
const (
	unfit   int8 = iota // it does not suit, whatever it has free
	waiting             // it is busy or resting
	ready               // it can take an attempt now
)

// tally counts machines.
type tally struct{ suit, ready int32 }

// checkable counts the machines of each owner whose results are of one
// hardware class: where there is one owner only, nobody else could check them.
type checkable struct {
	owners   int
	machines map[int32]int // by owner
}

// shapeKey is equal for specifications with equal constraints.
func shapeKey(spec *musterpb.JobSpec) string {
	r, image := spec.Resources, spec.Image
	return fmt.Sprintf("%d %q %d %q %d %q %d %d %d %t %d %t", image.GetKind(), image.GetPlatforms(), r.GetGpus(), r.GetGpuModels(),
		r.GetMinVramBytes(), r.GetMinComputeCapability(), r.GetMilliCpus(), r.GetMemoryBytes(), r.GetDiskBytes(),
		spec.Network, spec.MaxPriceMicroUsdPerHour, spec.Verify.GetSameOwner())
}

func newShape(key string, spec *musterpb.JobSpec) *shape {
	// A copy of what matters: the specification itself may have megabytes.
	only := &musterpb.JobSpec{
		Image:     &musterpb.Image{Kind: spec.Image.GetKind(), Platforms: spec.Image.GetPlatforms()},
		Resources: spec.Resources, Network: spec.Network, MaxPriceMicroUsdPerHour: spec.MaxPriceMicroUsdPerHour,
		Verify: &musterpb.Verify{SameOwner: spec.Verify.GetSameOwner()},
	}
	s := &shape{key: key, spec: only}
	s.gate.shape = s
	s.forget()
	return s
}

// forget drops what can be found out again.
func (s *shape) forget() {
	s.seen, s.suits, s.at, s.ready, s.owners, s.total = 0, nil, nil, nil, nil, tally{}
	for _, o := range s.orders {
		o.gone = true
	}
	s.checkers, s.orders, s.built = map[int32]*checkable{}, map[string]*order{}, map[int32]*pool{}
	if s.pools == nil {
		s.pools = map[string]*pool{}
	}
	for _, p := range s.pools { // checks wait at them
		p.forget()
	}
}

func (s *shape) gpus() int { return int(s.spec.Resources.GetGpus()) }

func (s *shape) wasm() bool { return s.spec.Image.GetKind() == musterpb.ImageKind_IMAGE_KIND_WASM }

// takes reports whether devices of a kind satisfy the constraints.
func (s *shape) takes(k *kind) bool {
	for len(s.suits) <= k.number {
		s.suits = append(s.suits, 0)
	}
	if s.suits[k.number] == 0 {
		s.suits[k.number] = -1
		if suits(s.spec.Resources, k.model) {
			s.suits[k.number] = 1
		}
	}
	return s.suits[k.number] > 0
}

// pick finds as many devices of one class as an attempt needs, the first that
// will do, and says which class that is; of the given one unless that is
// noClass. With taken it says where they are.
func (s *shape) pick(devices []device, class int32, free bool, taken *[]int) (int32, bool) {
	n, tried := s.gpus(), noClass
	fits := func(d *device) bool { return !(free && d.used) && s.takes(d.kind) }
	for i := range devices {
		of := devices[i].kind.class
		if of == tried || (class != noClass && of != class) || !fits(&devices[i]) {
			continue
		}
		found := 0
		for j := i; j < len(devices); j++ {
			if d := &devices[j]; d.kind.class != of || !fits(d) {
				continue
			}
			if taken != nil {
				*taken = append(*taken, j)
			}
			if found++; found == n {
				return of, true
			}
		}
		if taken != nil {
			*taken = (*taken)[:0]
		}
		tried = of
	}
	return noClass, false
}

// home is the hardware class that results of a machine would have, if it
// suits the constraints.
func (s *shape) home(n *names, m *machine) (int32, bool) {
	if !m.Connected || m.Draining || rejectImage(s.spec, m.Worker) != nil || rejectMachine(s.spec, m.Worker) != nil {
		return noClass, false
	}
	if s.gpus() == 0 {
		if s.wasm() {
			return n.class(wasmClass), true
		}
		return m.cpus, true
	}
	return s.pick(m.devices, noClass, false, nil)
}

func (s *shape) units() int64 { return state.Units(s.spec.Resources) }

// open reports whether a machine that suits may be used, and has everything but
// devices, for an attempt.
func (s *shape) open(nowUnixMS int64, m *machine) bool { return m.kept == nil && s.room(nowUnixMS, m) }

// fits reports whether a machine that suits has all that an attempt needs.
func (s *shape) fits(nowUnixMS int64, m *machine) bool {
	if s.gpus() > 0 {
		if _, ok := s.pick(m.devices, noClass, true, nil); !ok {
			return false
		}
	}
	return s.room(nowUnixMS, m)
}

func (s *shape) room(nowUnixMS int64, m *machine) bool {
	r := s.spec.Resources
	return m.BackoffUntilUnixMs <= nowUnixMS &&
		m.FreeMilliCPUs >= r.GetMilliCpus() && m.FreeMemoryBytes >= r.GetMemoryBytes() && m.FreeDiskBytes >= r.GetDiskBytes()
}

// update takes up a change of a machine.
func (s *shape) update(e *Engine, m *machine) {
	if int(m.slot) >= len(s.at) {
		s.at = append(s.at, make([]member, len(e.machines)-len(s.at))...)
	}
	if len(s.owners) < len(e.names.ownerOf) {
		s.owners = append(s.owners, make([]tally, len(e.names.ownerOf)-len(s.owners))...)
	}
	at := &s.at[m.slot]
	fixed := at.fixed == m.fixed
	if !fixed {
		home, ok := s.home(e.names, m)
		s.settle(e, m, at, home, ok)
		at.fixed = m.fixed
	}
	state := unfit
	if at.home != noClass {
		state = waiting
		if m.kept == nil && s.fits(e.now, m) {
			state = ready
		}
	}
	s.count(m, at, state)
	s.updatePools(e, m, fixed)
}

// updatePools takes up a change in the pools of the machine's classes or,
// where those may have changed too, in all.
func (s *shape) updatePools(e *Engine, m *machine, sameClasses bool) {
	if len(s.built) == 0 {
		return
	}
	if !sameClasses {
		for _, p := range s.built { // one does not depend on another
			p.update(e, m, false)
		}
		return
	}
	if s.gpus() == 0 {
		if p := s.built[s.at[m.slot].home]; p != nil {
			p.update(e, m, false)
		}
		return
	}
	last := noClass
	for i := range m.devices {
		if of := m.devices[i].kind.class; of != last {
			if p := s.built[of]; p != nil {
				p.update(e, m, false)
			}
			last = of
		}
	}
}

// settle notes the class of a machine's results. When that gives an owner's
// machines their first possible checker, or takes the last, they count as
// changed: they are worth more, or less.
func (s *shape) settle(e *Engine, m *machine, at *member, home int32, ok bool) {
	if at.fixed == 0 {
		at.home = noClass // a fresh entry
	}
	if !ok {
		home = noClass
	}
	old := at.home
	if at.home = home; old == home {
		return
	}
	if old != noClass {
		c := s.checkers[old]
		if c.machines[m.owner]--; c.machines[m.owner] == 0 {
			delete(c.machines, m.owner)
			if c.owners--; c.owners == 1 {
				s.touchClass(e, old)
			}
		}
	}
	if home != noClass {
		c := s.checkers[home]
		if c == nil {
			c = &checkable{machines: map[int32]int{}}
			s.checkers[home] = c
		}
		if c.machines[m.owner]++; c.machines[m.owner] == 1 {
			if c.owners++; c.owners == 2 {
				s.touchClass(e, home)
			}
		}
	}
}

func (s *shape) touchClass(e *Engine, class int32) {
	for slot := range s.at {
		if s.at[slot].fixed > 0 && s.at[slot].home == class && e.machines[slot] != nil {
			e.touch(e.machines[slot])
		}
	}
}

// count notes the state of a machine.
func (s *shape) count(m *machine, at *member, state int8) {
	if at.state == state {
		return
	}
	owner := &s.owners[m.owner]
	change := func(state int8, n int32) {
		if state != unfit {
			s.total.suit, owner.suit = s.total.suit+n, owner.suit+n
		}
		if state == ready {
			s.total.ready, owner.ready = s.total.ready+n, owner.ready+n
		}
	}
	change(at.state, -1)
	change(state, 1)
	if at.state == ready {
		last := s.ready[len(s.ready)-1]
		s.ready = s.ready[:len(s.ready)-1]
		s.at[last].pos = at.pos
		if last != m.slot {
			s.ready[at.pos] = last
		}
	}
	if at.state = state; state == ready {
		at.pos = int32(len(s.ready))
		s.ready = append(s.ready, m.slot)
	}
}

// remove takes up that a machine is gone.
func (s *shape) remove(e *Engine, m *machine) {
	if int(m.slot) < len(s.at) && s.at[m.slot].fixed > 0 {
		at := &s.at[m.slot]
		s.settle(e, m, at, noClass, false)
		s.count(m, at, unfit)
		*at = member{}
	}
	for _, o := range s.orders {
		o.remove(m)
	}
	for _, p := range s.built {
		p.remove(e, m)
	}
}

// alone reports whether nobody else could check the results of a machine.
func (s *shape) alone(slot int32) bool {
	return !s.spec.Verify.GetSameOwner() && s.checkers[s.at[slot].home].owners < 2
}

// otherOwnerIsBusy reports whether some machine suits that belongs to none of
// these owners, and all such are busy.
func (s *shape) otherOwnerIsBusy(n *names, owners []string) bool {
	others := s.total
	for i, name := range owners {
		if o, ok := n.owners[name]; ok && int(o) < len(s.owners) && !slices.Contains(owners[:i], name) {
			others.suit, others.ready = others.suit-s.owners[o].suit, others.ready-s.owners[o].ready
		}
	}
	return others.suit > 0 && others.ready == 0
}

// orderKey is equal for specifications of one shape that prefer the same
// machines, however they spread.
func orderKey(job *musterpb.Job, digests []string) string {
	var b strings.Builder
	for _, d := range digests {
		b.WriteString(d)
		b.WriteByte(' ')
	}
	for _, a := range job.Spec.Placement.GetAffinities() {
		fmt.Fprintf(&b, "%q %q %d ", a.Attribute, a.Value, a.Weight)
	}
	return b.String()
}
