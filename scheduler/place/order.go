package place

import (
	"cmp"
	"slices"

	"github.com/musternet/muster/api/musterpb"
)

// order ranks the machines of a shape that are ready, for jobs that prefer the
// same ones: a heap of each owner's machines, and a heap of owners by their
// best machine. So an owner can be passed over, and an owner's count of
// attempts changes the rank of all of its machines at once.
type order struct {
	shape   *shape
	digests []string // see cacheable
	want    *musterpb.Placement
	counts  *counts // of the job that spreads, nil for others

	seen   uint64 // change of a machine up to which the rest is right
	used   uint64 // when it was asked last, in the engine's ticks
	key    string
	gone   bool   // dropped from its shape
	at     []rank // by slot
	owners []branch
	top    []int32 // heap of owners
	e      *Engine
}

// rank is the score of a machine, best first: smaller is better, word by word.
type rank struct {
	prefer uint64 // see prefer
	price  uint64
	spare  uint64 // what is missing in the cache, and what it would have left
	fixed  uint64 // of the machine, that the lasting part is as of
	pos    int32  // in its owner's heap, -1 while it is not there
	known  bool
}

// branch is an owner's ready machines.
type branch struct {
	machines []int32 // heap of slots
	pos      int32   // in the heap of owners; only while there are machines
	count    uint32  // attempts of the job that spreads over owners
}

// Layout of rank.prefer. From the top: whether nobody else could check the
// result, affinity, attempts of the job that are there, unreliability.
const (
	aloneShift    = 63
	affinityShift = 51
	spreadShift   = 19
	maxSpread     = 1<<(affinityShift-spreadShift) - 1
	unsureShift   = 15
	maxAffinity   = 1 << (aloneShift - affinityShift - 1) // of either sign
	// missingShift is that of rank.spare.
	missingShift = 58
)

func newOrder(e *Engine, s *shape, key string, job *musterpb.Job, digests []string, counts *counts) *order {
	return &order{key: key, shape: s, digests: digests, want: job.Spec.Placement, counts: counts, e: e}
}

// drop takes an order out of its shape; it is made anew when it is needed.
func (o *order) drop() {
	if !o.gone {
		o.gone = true
		delete(o.shape.orders, o.key)
	}
}

// catchUp takes up what changed since the order was asked last.
func (o *order) catchUp() {
	e := o.e
	e.catchUp(o.shape)
	o.used = e.tick
	if o.seen == e.seq {
		return
	}
	if len(o.at) < len(e.machines) {
		o.at = append(o.at, make([]rank, len(e.machines)-len(o.at))...)
	}
	if len(o.owners) < len(e.names.ownerOf) {
		o.owners = append(o.owners, make([]branch, len(e.names.ownerOf)-len(o.owners))...)
	}
	for m := e.newest; m != nil && m.seq > o.seen; m = m.older {
		o.update(m)
	}
	o.seen = e.seq
}

func (o *order) update(m *machine) {
	o.e.reviews++
	at := &o.at[m.slot]
	if !at.known {
		at.known, at.pos = true, -1
	}
	if o.counts != nil && o.want.Spread == musterpb.Spread_SPREAD_OWNER {
		o.recount(m.owner)
	}
	if o.shape.at[m.slot].state != ready {
		o.out(m)
		return
	}
	if at.fixed != m.fixed {
		at.fixed = m.fixed
		at.prefer = uint64(maxAffinity-o.affinity(m))<<affinityShift | uint64(unsure(m.Worker))<<unsureShift
		at.price = uint64(max(m.PriceMicroUsdPerHour, 0))
		at.spare = uint64(missing(o.digests, m.Worker)) << missingShift
	}
	at.prefer &^= 1<<aloneShift | maxSpread<<spreadShift
	if o.shape.alone(m.slot) {
		at.prefer |= 1 << aloneShift
	}
	if o.counts != nil && o.want.Spread == musterpb.Spread_SPREAD_WORKER {
		at.prefer |= min(uint64(o.counts.byWorker[m.Id]), maxSpread) << spreadShift
	}
	// Best fit: the machine that this leaves fullest. GPUs are what is scarce.
	spare := m.FreeMilliCPUs
	if n := o.shape.gpus(); n > 0 {
		spare = int64(m.idle - n)
	}
	at.spare = at.spare&^(1<<missingShift-1) | uint64(min(max(spare, 0), 1<<missingShift-1))
	o.in(m)
}

// affinity is the sum of the weights that fit a machine, and the devices that
// an attempt would get there when it is empty.
func (o *order) affinity(m *machine) (sum int64) {
	for _, a := range o.want.GetAffinities() {
		var fits bool
		switch a.Attribute {
		case "owner":
			fits = a.Value == m.Owner
		case "worker":
			fits = a.Value == m.Id || a.Value == m.Name
		case "platform":
			fits = samePlatform(a.Value, m.Capacity.GetPlatform())
		case "gpu":
			fits = slices.ContainsFunc(m.devices, func(d device) bool { return o.shape.takes(d.kind) && isModel(d.kind.model, a.Value) })
		}
		if fits {
			sum += int64(a.Weight)
		}
	}
	return min(max(sum, -maxAffinity+1), maxAffinity-1)
}

func (o *order) recount(owner int32) {
	b := &o.owners[owner]
	if n := uint32(min(o.counts.byOwner[o.e.names.ownerOf[owner]], maxSpread)); n != b.count {
		if b.count = n; len(b.machines) > 0 {
			fix(byOwner{o}, o.top, b.pos)
		}
	}
}

// in puts a machine where its rank says.
func (o *order) in(m *machine) {
	b, at := &o.owners[m.owner], &o.at[m.slot]
	if len(b.machines) == 0 {
		b.pos = int32(len(o.top))
		o.top = append(o.top, m.owner)
	}
	if at.pos < 0 {
		at.pos = int32(len(b.machines))
		b.machines = append(b.machines, m.slot)
	}
	fix(byMachine{o}, b.machines, at.pos)
	fix(byOwner{o}, o.top, b.pos)
}

func (o *order) out(m *machine) {
	at := &o.at[m.slot]
	if at.pos < 0 {
		return
	}
	b := &o.owners[m.owner]
	b.machines = take(byMachine{o}, b.machines, at.pos)
	at.pos = -1
	if len(b.machines) > 0 {
		fix(byOwner{o}, o.top, b.pos)
	} else {
		o.top = take(byOwner{o}, o.top, b.pos)
	}
}

// remove forgets a machine.
func (o *order) remove(m *machine) {
	if int(m.slot) < len(o.at) && o.at[m.slot].known {
		o.out(m)
		o.at[m.slot] = rank{}
		if b := &o.owners[m.owner]; len(b.machines) == 0 {
			*b = branch{}
		}
	}
}

// best is the best machine that is ready, of an owner that is none of these
// where there is one; nil when none is ready.
func (o *order) best(avoid []string) *machine {
	if len(o.top) == 0 {
		return nil
	}
	owner := o.top[0]
	if len(avoid) > 0 {
		if other := o.pass(avoid, 0, noOwner); other != noOwner {
			owner = other
		}
	}
	return o.e.machines[o.owners[owner].machines[0]]
}

const noOwner int32 = -1

// pass is the best owner, from a place of the heap downwards, that is none of
// these and better than another.
func (o *order) pass(avoid []string, at int, best int32) int32 {
	if at >= len(o.top) || (best != noOwner && !o.ownerLess(o.top[at], best)) {
		return best // everything below is worse still
	}
	if owner := o.top[at]; !slices.Contains(avoid, o.e.names.ownerOf[owner]) {
		return owner
	}
	return o.pass(avoid, 2*at+2, o.pass(avoid, 2*at+1, best))
}

func (o *order) machineLess(a, b int32) bool {
	x, y := &o.at[a], &o.at[b]
	switch {
	case x.prefer != y.prefer:
		return x.prefer < y.prefer
	case x.price != y.price:
		return x.price < y.price
	case x.spare != y.spare:
		return x.spare < y.spare
	}
	return o.e.earlier(a, b)
}

// ownerLess compares the best machines of two owners, with the attempts that
// each owner has of a job that spreads over owners.
func (o *order) ownerLess(a, b int32) bool {
	x, y := &o.owners[a], &o.owners[b]
	if x.count == y.count {
		return o.machineLess(x.machines[0], y.machines[0])
	}
	with := func(b *branch) uint64 { return o.at[b.machines[0]].prefer + uint64(b.count)<<spreadShift }
	if p, q := with(x), with(y); p != q {
		return p < q
	}
	return o.machineLess(x.machines[0], y.machines[0])
}

// earlier breaks ties, by ID.
func (e *Engine) earlier(a, b int32) bool {
	x, y := e.machines[a], e.machines[b]
	return cmp.Or(cmp.Compare(x.rank, y.rank), cmp.Compare(x.Id, y.Id)) < 0
}

// The two kinds of heaps of an order.
type (
	byMachine struct{ *order }
	byOwner   struct{ *order }
)

func (h byMachine) less(a, b int32) bool { return h.machineLess(a, b) }
func (h byMachine) moved(slot, at int32) { h.at[slot].pos = at }
func (h byOwner) less(a, b int32) bool   { return h.ownerLess(a, b) }
func (h byOwner) moved(owner, pos int32) { h.owners[owner].pos = pos }

// numbers is a heap of slots or owners; what it holds is kept by the caller,
// one slice of numbers each, since an order has one per owner.
type numbers interface {
	less(a, b int32) bool
	moved(item, at int32)
}

func fix[H numbers](h H, items []int32, at int32) {
	item := items[at]
	start := at
	for at > 0 && h.less(item, items[(at-1)/2]) {
		items[at] = items[(at-1)/2]
		h.moved(items[at], at)
		at = (at - 1) / 2
	}
	if at == start {
		for {
			least := 2*at + 1
			if int(least) >= len(items) {
				break
			}
			if int(least)+1 < len(items) && h.less(items[least+1], items[least]) {
				least++
			}
			if !h.less(items[least], item) {
				break
			}
			items[at] = items[least]
			h.moved(items[at], at)
			at = least
		}
	}
	items[at] = item
	h.moved(item, at)
}

func take[H numbers](h H, items []int32, at int32) []int32 {
	last := len(items) - 1
	moved := items[last]
	items = items[:last]
	if int(at) < last {
		items[at] = moved
		h.moved(moved, at)
		fix(h, items, at)
	}
	return items
}
