package place

import (
	"cmp"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// pool is who can run checks of one hardware class for the jobs of a shape.
//
// A checker is drawn by lottery, owners first and one of the owner's workers
// next: machines are cheap to register, and would otherwise be as many tickets.
// The draws follow from the seed of the target's batch, the check and the list
// of owners who have such a worker at all. Who draws decides nothing but who
// counts as free, and an owner that is passed over changes nobody else's draw.
type pool struct {
	gate
	name  string // of the hardware class
	class int32  // its number, once it is built

	built  bool    // else the rest is empty; it follows the shape
	opened bool    // a machine became ready since lanes were reviewed
	at     []int8  // by slot: unfit, waiting or ready
	owners []share // by owner
	sorted []int32 // owners with a machine that suits, by name
	free   int     // owners with a machine that is ready
}

// share is what an owner has in a pool.
type share struct {
	machines []int32 // that suit, by ID
	ready    int
}

func (p *pool) forget() {
	p.built, p.opened, p.at, p.owners, p.sorted, p.free = false, true, nil, nil, nil, 0
}

// catchUp makes the pool, or leaves it to its shape to bring it up to date.
func (p *pool) catchUp(e *Engine) {
	s := p.shape
	e.catchUp(s)
	if p.built {
		return
	}
	p.class, p.built = e.names.class(p.name), true
	s.built[p.class] = p
	for _, m := range e.machines {
		if m != nil {
			p.update(e, m, true)
		}
	}
	e.reviews += len(e.machines)
	slices.SortFunc(p.sorted, func(a, b int32) int { return cmp.Compare(e.names.ownerOf[a], e.names.ownerOf[b]) })
	for _, o := range p.sorted {
		slices.SortFunc(p.owners[o].machines, e.byIDs)
	}
}

// byIDs is the order of machines in a share.
func (e *Engine) byIDs(a, b int32) int { return cmp.Compare(e.machines[a].Id, e.machines[b].Id) }

func (p *pool) update(e *Engine, m *machine, fresh bool) {
	if len(p.at) < len(e.machines) {
		p.at = append(p.at, make([]int8, len(e.machines)-len(p.at))...)
	}
	if len(p.owners) < len(e.names.ownerOf) {
		p.owners = append(p.owners, make([]share, len(e.names.ownerOf)-len(p.owners))...)
	}
	s := p.shape
	state := unfit
	if s.at[m.slot].home != noClass {
		switch {
		case s.gpus() == 0:
			if s.at[m.slot].home == p.class {
				state = s.at[m.slot].state
			}
		default:
			if _, ok := s.pick(m.devices, p.class, false, nil); ok {
				state = waiting
				if _, ok := s.pick(m.devices, p.class, true, nil); ok && s.open(e.now, m) {
					state = ready
				}
			}
		}
	}
	p.set(e, m, state, fresh)
}

func (p *pool) set(e *Engine, m *machine, state int8, fresh bool) {
	old := p.at[m.slot]
	if old == state {
		return
	}
	p.at[m.slot] = state
	o := &p.owners[m.owner]
	switch {
	case old == ready:
		if o.ready--; o.ready == 0 {
			p.free--
		}
	case state == ready:
		p.opened = true
		if o.ready++; o.ready == 1 {
			p.free++
		}
	}
	byName := func(a int32, name string) int { return cmp.Compare(e.names.ownerOf[a], name) }
	switch {
	case old == unfit && fresh:
		o.machines = append(o.machines, m.slot)
		if len(o.machines) == 1 {
			p.sorted = append(p.sorted, m.owner)
		}
	case old == unfit:
		at, _ := slices.BinarySearchFunc(o.machines, m.slot, e.byIDs)
		o.machines = slices.Insert(o.machines, at, m.slot)
		if len(o.machines) == 1 {
			at, _ := slices.BinarySearchFunc(p.sorted, m.Owner, byName)
			p.sorted = slices.Insert(p.sorted, at, m.owner)
		}
	case state == unfit:
		if at := slices.Index(o.machines, m.slot); at >= 0 {
			o.machines = slices.Delete(o.machines, at, at+1)
		}
		if len(o.machines) == 0 {
			at := slices.Index(p.sorted, m.owner)
			p.sorted = slices.Delete(p.sorted, at, at+1)
		}
	}
}

func (p *pool) remove(e *Engine, m *machine) {
	if int(m.slot) < len(p.at) && int(m.owner) < len(p.owners) {
		p.set(e, m, unfit, false)
	}
}

// freeOf is how many machines of an owner could take a run of a check now.
func (p *pool) freeOf(e *Engine, owner int32, run *state.WantedRun) int {
	n := p.owners[owner].ready
	for i, party := range run.Parties {
		if party.Owner != e.names.ownerOf[owner] { // a worker never changes hands
			continue
		}
		if !p.shape.spec.Verify.GetSameOwner() {
			return 0
		}
		m := e.byID[party.Worker]
		if m != nil && p.at[m.slot] == ready && !slices.ContainsFunc(run.Parties[:i], sameWorker(party.Worker)) {
			n--
		}
	}
	return n
}

// candidates is how many owners could run a check now, those who tried before
// included only when asked for.
func (p *pool) candidates(e *Engine, run *state.WantedRun, tried bool) int {
	n := p.free
	var seen []int32
	without := func(name string, always bool) {
		o, ok := e.names.owners[name]
		if !ok || int(o) >= len(p.owners) || p.owners[o].ready == 0 || slices.Contains(seen, o) {
			return
		}
		if always || p.freeOf(e, o, run) == 0 {
			n--
			seen = append(seen, o)
		}
	}
	if !tried {
		for _, name := range run.Tried {
			without(name, true)
		}
	}
	for _, party := range run.Parties {
		without(party.Owner, false)
	}
	return n
}

// Bounds of the lottery: how often an owner, and a worker of that owner, is
// drawn before the next one in the list is taken. Whoever is listed behind many
// that are busy then has better chances than others; that is rare, and the
// leader can't choose who it is.
const (
	ownerDraws  = 1024
	workerDraws = 256
)

// draw is the machine that runs a check; there is a candidate. Owners who
// tried before and did not deliver draw only where nobody else does.
func (p *pool) draw(e *Engine, run *state.WantedRun, seed []byte) *machine {
	withTried := len(run.Tried) > 0 && p.candidates(e, run, false) == 0
	lots := newLottery(seed, run.Check.Id)
	owner := lots.first(drawOwner, len(p.sorted), ownerDraws, func(i int) bool {
		o := p.sorted[i]
		return p.owners[o].ready > 0 && p.freeOf(e, o, run) > 0 && (withTried || !slices.Contains(run.Tried, e.names.ownerOf[o]))
	})
	machines := p.owners[p.sorted[owner]].machines
	which := lots.first(drawWorker, len(machines), workerDraws, func(i int) bool {
		m := e.machines[machines[i]]
		return p.at[m.slot] == ready && !slices.ContainsFunc(run.Parties, sameWorker(m.Id))
	})
	return e.machines[machines[which]]
}

// lottery draws for a check. Its numbers are key streams of AES-256-CTR, one
// for owners and one for workers, under a key that follows from seed and check.
type lottery struct{ cipher.Block }

// What is drawn, the first bytes of the stream's counter.
const (
	drawOwner  = 1
	drawWorker = 2
)

func newLottery(seed []byte, check string) lottery {
	mac := hmac.New(sha256.New, seed)
	mac.Write([]byte("muster checker v2\n" + check))
	block, err := aes.NewCipher(mac.Sum(nil))
	if err != nil {
		panic("place: 32 bytes are no AES key")
	}
	return lottery{block}
}

// first draws numbers below n until one will do, and at last tries those behind
// the last draw. One of them has to.
func (l lottery) first(what uint64, n, draws int, ok func(int) bool) int {
	if n == 1 {
		return 0
	}
	var counter [aes.BlockSize]byte
	binary.BigEndian.PutUint64(counter[:], what)
	stream := cipher.NewCTR(l.Block, counter[:])
	var numbers [128]byte
	at := 0
	for i := range draws {
		next := numbers[i*8%len(numbers):]
		if len(next) == len(numbers) {
			clear(next)
			stream.XORKeyStream(next, next)
		}
		if at = int(binary.BigEndian.Uint64(next) % uint64(n)); ok(at) {
			return at
		}
	}
	for !ok(at) {
		at = (at + 1) % n
	}
	return at
}

func sameWorker(id string) func(*musterpb.Attempt) bool {
	return func(a *musterpb.Attempt) bool { return a.Worker == id }
}
