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
	top    []peak // heap of owners
	e      *Engine
}

// rank is the score of a machine, best first: smaller is better, word by word.
type rank struct {
	score
	fixed uint64 // of the machine, that the lasting part is as of
	pos   int32  // in its owner's heap, -1 while it is not there
	known bool
}

// score orders machines.
type score struct {
	prefer uint64 // see below
	price  uint64
	spare  uint64 // what is missing in the cache, and what it would have left
}

func (s *score) less(o *score) bool {
	switch {
	case s.prefer != o.prefer:
		return s.prefer < o.prefer
	case s.price != o.price:
		return s.price < o.price
	}
	return s.spare < o.spare
}

// branch is an owner's ready machines.
type branch struct {
	machines []int32 // heap of slots
	pos      int32   // in the heap of owners; only while there are machines
	count    uint32  // attempts of the job that spreads over owners
}

// peak is an owner's best machine, beside those of others: what is compared
// most lies together.
type peak struct {
	score
	rank  uint64 // of the machine's ID
	owner int32
	slot  int32
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
			o.lift(owner)
		}
	}
}

// lift puts an owner where its best machine says.
func (o *order) lift(owner int32) {
	b := &o.owners[owner]
	slot := b.machines[0]
	p := peak{score: o.at[slot].score, rank: o.e.machines[slot].rank, owner: owner, slot: slot}
	p.prefer += uint64(b.count) << spreadShift
	if at := &o.top[b.pos]; *at != p {
		*at = p
		o.fixTop(b.pos)
	}
}

// in puts a machine where its rank says.
func (o *order) in(m *machine) {
	b, at := &o.owners[m.owner], &o.at[m.slot]
	if len(b.machines) == 0 {
		b.pos = int32(len(o.top))
		o.top = append(o.top, peak{owner: m.owner, slot: noSlot})
	}
	if at.pos < 0 {
		at.pos = int32(len(b.machines))
		b.machines = append(b.machines, m.slot)
	}
	o.fixMachine(b.machines, at.pos)
	o.lift(m.owner)
}

func (o *order) out(m *machine) {
	at := &o.at[m.slot]
	if at.pos < 0 {
		return
	}
	b := &o.owners[m.owner]
	last := len(b.machines) - 1
	moved := b.machines[last]
	if b.machines = b.machines[:last]; int(at.pos) < last {
		b.machines[at.pos] = moved
		o.fixMachine(b.machines, at.pos)
	}
	if at.pos = -1; last > 0 {
		o.lift(m.owner)
		return
	}
	end := len(o.top) - 1
	p := o.top[end]
	if o.top = o.top[:end]; int(b.pos) < end {
		o.top[b.pos] = p
		o.fixTop(b.pos)
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
	at := 0
	if len(avoid) > 0 {
		at = max(o.pass(avoid, 0, none), 0)
	}
	return o.e.machines[o.top[at].slot]
}

const (
	none         = -1
	noSlot int32 = -1
)

// pass is the place of the best owner, from a place of the heap downwards, that
// is none of these and better than another.
func (o *order) pass(avoid []string, at, best int) int {
	if at >= len(o.top) || (best != none && !o.earlier(&o.top[at], &o.top[best])) {
		return best // everything below is worse still
	}
	if !slices.Contains(avoid, o.e.names.ownerOf[o.top[at].owner]) {
		return at
	}
	return o.pass(avoid, 2*at+2, o.pass(avoid, 2*at+1, best))
}

// earlier compares two owners.
func (o *order) earlier(a, b *peak) bool {
	switch {
	case a.score != b.score:
		return a.less(&b.score)
	case a.rank != b.rank:
		return a.rank < b.rank
	}
	return o.e.machines[a.slot].Id < o.e.machines[b.slot].Id
}

// machineLess compares two machines of an owner. Ties are broken by ID.
func (o *order) machineLess(a, b int32) bool {
	if x, y := &o.at[a].score, &o.at[b].score; *x != *y {
		return x.less(y)
	}
	return o.e.before(o.e.machines[a], o.e.machines[b])
}

// before breaks ties: it orders machines by ID.
func (e *Engine) before(a, b *machine) bool {
	return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.Id, b.Id)) < 0
}

// fixMachine restores a heap of machines of which one has changed.
func (o *order) fixMachine(items []int32, at int32) {
	item := items[at]
	put := func(slot, at int32) { items[at], o.at[slot].pos = slot, at }
	start := at
	for at > 0 && o.machineLess(item, items[(at-1)/2]) {
		put(items[(at-1)/2], at)
		at = (at - 1) / 2
	}
	for at >= start { // it did not go up
		child := 2*at + 1
		if int(child)+1 < len(items) && o.machineLess(items[child+1], items[child]) {
			child++
		}
		if int(child) >= len(items) || !o.machineLess(items[child], item) {
			break
		}
		put(items[child], at)
		at = child
	}
	put(item, at)
}

// fixTop restores the heap of owners of which one has changed.
func (o *order) fixTop(at int32) {
	item := o.top[at]
	put := func(p *peak, at int32) { o.top[at], o.owners[p.owner].pos = *p, at }
	start := at
	for at > 0 && o.earlier(&item, &o.top[(at-1)/2]) {
		put(&o.top[(at-1)/2], at)
		at = (at - 1) / 2
	}
	for at >= start { // it did not go up
		child := 2*at + 1
		if int(child)+1 < len(o.top) && o.earlier(&o.top[child+1], &o.top[child]) {
			child++
		}
		if int(child) >= len(o.top) || !o.earlier(&o.top[child], &item) {
			break
		}
		put(&o.top[child], at)
		at = child
	}
	put(&item, at)
}
