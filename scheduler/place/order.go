package place

import (
	"cmp"
	"slices"

	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
)

// order ranks the machines of a shape that are ready, for jobs that prefer the
// same ones: a heap of each owner's machines, and a heap of owners by their
// best machine. So an owner can be passed over, and an owner's count of
// attempts changes the rank of all of its machines at once.
//
// Where few machines are ready, as on a network that is full, they are looked
// at one by one, and the heaps are not kept up to date.
type order struct {
	key        string
	shape      *shape
	digests    []string // see cacheable
	affinities []*musterpb.Affinity
	counts     *counts // of the one job that spreads widely, nil for others

	seen   uint64 // change of a machine up to which the rest is right
	debt   uint64 // machines that were looked at one by one since
	used   uint64 // when it was asked last, in the engine's ticks
	gone   bool   // dropped from its shape
	at     []rank // by slot
	owners []branch
	top    []peak // heap of owners
	e      *Engine
}

// rank is the score of a machine, best first: smaller is better, word by word.
type rank struct {
	score   // while it is in its owner's heap
	lasting score
	fixed   uint64 // of the machine, that lasting is as of
	pos     int32  // in its owner's heap, -1 while it is not there
	known   bool
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

const (
	// maxScanned is up to how many machines that are ready are looked at one by one.
	maxScanned = 16
	// maxNarrow is up to how many workers with attempts of a job that spreads are
	// told apart by looking at them, in an order that other jobs share.
	maxNarrow = 16
)

func newOrder(e *Engine, s *shape, key string, job *queuedJob, counts *counts) *order {
	return &order{key: key, shape: s, digests: job.digests, affinities: job.Spec.Placement.GetAffinities(), counts: counts, e: e}
}

// drop takes an order out of its shape; it is made anew when it is needed.
func (o *order) drop() {
	if !o.gone {
		o.gone = true
		delete(o.shape.orders, o.key)
	}
}

// grow makes room for all machines and owners.
func (o *order) grow() {
	if e := o.e; len(o.at) < len(e.machines) {
		o.at = append(o.at, make([]rank, len(e.machines)-len(o.at))...)
	}
	if n := len(o.e.names.ownerOf); len(o.owners) < n {
		o.owners = append(o.owners, make([]branch, n-len(o.owners))...)
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
	o.grow()
	for m := e.newest; m != nil && m.seq > o.seen; m = m.older {
		o.update(m)
	}
	o.seen, o.debt = e.seq, 0
}

// scans reports whether it is cheaper to look at all machines that are ready
// than to take up all that changed. What was spent on the former counts, so
// that together they cost no more than twice the better choice.
func (o *order) scans() bool {
	n := uint64(len(o.shape.ready))
	if n <= uint64(o.e.scanned) {
		return true
	}
	if o.debt+n > o.e.seq-o.seen {
		return false
	}
	o.debt += n
	return true
}

func (o *order) update(m *machine) {
	o.e.reviews++
	at := &o.at[m.slot]
	if !at.known {
		at.known, at.pos = true, -1
	}
	if o.shape.at[m.slot].state != ready {
		o.out(m)
		return
	}
	if at.score = o.scoreOf(m); o.counts != nil && o.counts.by == musterpb.Spread_SPREAD_WORKER {
		at.score.spread(o.counts.of(m))
	}
	o.in(m)
}

// scoreOf is the score of a machine that is ready, without attempts of a job
// that spreads.
func (o *order) scoreOf(m *machine) score {
	at := &o.at[m.slot]
	if at.fixed != m.fixed {
		at.fixed = m.fixed
		at.lasting = score{
			prefer: uint64(maxAffinity-o.affinity(m))<<affinityShift | uint64(unsure(m.Worker))<<unsureShift,
			price:  uint64(max(m.PriceMicroUsdPerHour, 0)),
			spare:  uint64(missing(o.digests, m.Worker)) << missingShift,
		}
	}
	s := at.lasting
	if o.shape.alone(m.slot) {
		s.prefer |= 1 << aloneShift
	}
	// Best fit: the machine that this leaves fullest. GPUs are what is scarce.
	spare := m.FreeMilliCPUs
	if n := o.shape.gpus(); n > 0 {
		spare = int64(m.idle - n)
	}
	s.spare |= uint64(min(max(spare, 0), 1<<missingShift-1))
	return s
}

// spread adds the attempts that a job has there already.
func (s *score) spread(attempts int64) {
	s.prefer += uint64(min(attempts, maxSpread)) << spreadShift
}

// affinity is the sum of the weights that fit a machine.
func (o *order) affinity(m *machine) (sum int64) {
	for _, a := range o.affinities {
		var fits bool
		switch a.Attribute {
		case jobspec.AttributeOwner:
			fits = a.Value == m.Owner
		case jobspec.AttributeWorker:
			fits = a.Value == m.Id || a.Value == m.Name
		case jobspec.AttributePlatform:
			fits = samePlatform(a.Value, m.Capacity.GetPlatform())
		case jobspec.AttributeGPU:
			fits = slices.ContainsFunc(m.devices, func(d device) bool { return o.shape.takes(d.kind) && isModel(d.kind.model, a.Value) })
		}
		if fits {
			sum += int64(a.Weight)
		}
	}
	return min(max(sum, -maxAffinity+1), maxAffinity-1)
}

// recount takes up that the job has more or fewer attempts with an owner.
func (o *order) recount(owner int32) {
	if int(owner) < len(o.owners) && len(o.owners[owner].machines) > 0 {
		o.lift(owner)
	}
}

// lift puts an owner where its best machine says.
func (o *order) lift(owner int32) {
	b := &o.owners[owner]
	slot := b.machines[0]
	p := peak{score: o.at[slot].score, rank: o.e.machines[slot].rank, owner: owner, slot: slot}
	if o.counts != nil && o.counts.by == musterpb.Spread_SPREAD_OWNER {
		p.spread(o.counts.of(o.e.machines[slot]))
	}
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

// scan is best, by looking at all that are ready.
func (o *order) scan(c *counts, avoid []string) *machine {
	o.used = o.e.tick
	o.grow()
	var best *machine
	var bestScore score
	bestAvoided := false
	for _, slot := range o.shape.ready {
		m := o.e.machines[slot]
		s, avoided := o.scoreOf(m), slices.Contains(avoid, m.Owner)
		if c != nil {
			s.spread(c.of(m))
		}
		switch {
		case best == nil, bestAvoided && !avoided:
		case avoided && !bestAvoided, bestScore.less(&s):
			continue
		case s == bestScore && o.e.before(best, m):
			continue
		}
		best, bestScore, bestAvoided = m, s, avoided
	}
	return best
}

// bestSpread is best for a job that spreads and has attempts in few places: the
// best of those places, or the best elsewhere.
func (o *order) bestSpread(c *counts) *machine {
	var best *machine
	var bestScore score
	try := func(slot int32) {
		m := o.e.machines[slot]
		s := o.at[slot].score
		if s.spread(c.of(m)); best == nil || s.less(&bestScore) || (s == bestScore && o.e.before(m, best)) {
			best, bestScore = m, s
		}
	}
	there := make([]string, 0, maxNarrow)
	for name := range c.byOwner { // the best is the same in any order
		there = append(there, name)
		owner, ok := o.e.names.owners[name]
		if !ok || len(o.owners[owner].machines) == 0 {
			continue
		}
		if c.by == musterpb.Spread_SPREAD_OWNER {
			try(o.owners[owner].machines[0])
		} else if slot := o.elsewhere(c, o.owners[owner].machines, 0, noSlot); slot != noSlot {
			try(slot)
		}
	}
	if c.by == musterpb.Spread_SPREAD_WORKER {
		for id := range c.byWorker {
			if m := o.e.byID[id]; m != nil && o.at[m.slot].known && o.at[m.slot].pos >= 0 {
				try(m.slot)
			}
		}
	}
	if at := o.pass(there, 0, none); at != none {
		try(o.top[at].slot)
	}
	return best
}

// elsewhere is the best machine of a heap, from a place downwards, that has no
// attempts and is better than another.
func (o *order) elsewhere(c *counts, heap []int32, at int, best int32) int32 {
	if at >= len(heap) || (best != noSlot && !o.machineLess(heap[at], best)) {
		return best
	}
	if c.of(o.e.machines[heap[at]]) == 0 {
		return heap[at]
	}
	return o.elsewhere(c, heap, 2*at+2, o.elsewhere(c, heap, 2*at+1, best))
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
