package place

import (
	"cmp"
	"slices"
	"strings"

	"github.com/musternet/muster/api/musterpb"
)

// machine is a worker as the engine keeps it: with words that many workers
// share turned into numbers, and a place in the list of changes.
type machine struct {
	*Worker
	slot    int32 // position in whatever has an entry per machine
	owner   int32 // number of the owner
	cpus    int32 // hardware class of attempts without GPUs
	devices []device
	idle    int // devices that work and are not in use
	rank    uint64

	seq          uint64 // of the newest change
	fixed        uint64 // of the newest change of more than what attempts use
	newer, older *machine
	resting      int   // position among those that rest, -1 elsewhere
	kept         *lane // that the machine is kept free for
}

// device is a GPU of a machine; those of a machine are in the order in which
// they are taken, smallest first.
type device struct {
	uuid string
	kind *kind
	used bool
}

// kind is what constraints can tell of a GPU, shared by all that are alike.
type kind struct {
	number int
	class  int32
	model  *musterpb.Device
}

// kindKey is what makes two GPUs of one kind.
type kindKey struct {
	name, capability, class string
	memoryBytes             uint64
	out                     bool // sick, or split into slices
}

// names turns words into numbers. Numbers of owners are used again once the
// owner has no machine left; those of kinds and classes are given anew when
// most of them are out of use, since the words come from workers.
type names struct {
	owners     map[string]int32
	ownerOf    []string
	machines   []int // by owner
	freeOwners []int32
	kinds      map[kindKey]*kind
	classes    map[string]int32
	classOf    []string
}

func newNames() *names {
	return &names{owners: map[string]int32{}, kinds: map[kindKey]*kind{}, classes: map[string]int32{}}
}

func (n *names) class(name string) int32 {
	c, ok := n.classes[name]
	if !ok {
		c = int32(len(n.classOf))
		name = strings.Clone(name) // a part of a longer word would keep that in memory
		n.classes[name], n.classOf = c, append(n.classOf, name)
	}
	return c
}

func (n *names) kind(d *musterpb.Device) *kind {
	key := kindKey{d.Name, d.ComputeCapability, deviceClass(d), d.MemoryBytes, !works(d)}
	k := n.kinds[key]
	if k == nil {
		k = &kind{number: len(n.kinds), class: n.class(key.class), model: d}
		n.kinds[key] = k
	}
	return k
}

// join counts a machine for its owner.
func (n *names) join(owner string) int32 {
	o, ok := n.owners[owner]
	if !ok {
		if last := len(n.freeOwners) - 1; last >= 0 {
			o, n.freeOwners = n.freeOwners[last], n.freeOwners[:last]
			n.ownerOf[o] = owner
		} else {
			o = int32(len(n.ownerOf))
			n.ownerOf, n.machines = append(n.ownerOf, owner), append(n.machines, 0)
		}
		n.owners[owner] = o
	}
	n.machines[o]++
	return o
}

func (n *names) leave(owner int32) {
	if n.machines[owner]--; n.machines[owner] == 0 {
		delete(n.owners, n.ownerOf[owner])
		n.freeOwners = append(n.freeOwners, owner)
	}
}

// describe takes up what a worker is and what it has free.
func (m *machine) describe(n *names, w *Worker) {
	m.Worker, m.rank, w.kept = w, rankOf(w.Id), m.kept != nil
	m.cpus = n.class(cpuClass(w.Worker))
	m.devices = m.devices[:0]
	for _, d := range w.Capacity.GetDevices() {
		m.devices = append(m.devices, device{uuid: d.Uuid, kind: n.kind(d), used: w.UsedDevices[d.Uuid]})
	}
	order := w.Capacity.GetDevices()
	if !slices.IsSortedFunc(order, smallerDevice) {
		index := make(map[string]*musterpb.Device, len(order))
		for _, d := range order {
			index[d.Uuid] = d
		}
		slices.SortStableFunc(m.devices, func(a, b device) int { return smallerDevice(index[a.uuid], index[b.uuid]) })
	}
	m.countIdle()
}

// refresh takes up what a worker has free, where nothing else of it changed.
func (m *machine) refresh(w *Worker) {
	m.Worker, w.kept = w, m.kept != nil
	for i := range m.devices {
		m.devices[i].used = w.UsedDevices[m.devices[i].uuid]
	}
	m.countIdle()
}

func (m *machine) countIdle() {
	m.idle = 0
	for i := range m.devices {
		if d := &m.devices[i]; !d.used && works(d.kind.model) {
			m.idle++
		}
	}
}

// take books an attempt.
func (m *machine) take(r *musterpb.Resources, devices []string) {
	m.Take(r, devices)
	for i := range m.devices {
		if d := &m.devices[i]; !d.used && slices.Contains(devices, d.uuid) {
			d.used = true
		}
	}
	m.countIdle()
}

// smallerDevice is the order in which devices are taken.
func smallerDevice(a, b *musterpb.Device) int {
	return cmp.Or(cmp.Compare(a.MemoryBytes, b.MemoryBytes), cmp.Compare(a.Index, b.Index))
}

// rankOf orders workers by ID, most of them by one comparison of numbers.
func rankOf(id string) (rank uint64) {
	id = strings.TrimPrefix(id, "wrk-")
	for i := range 8 {
		rank <<= 8
		if i < len(id) {
			rank |= uint64(id[i])
		}
	}
	return rank
}

// sameFixed reports whether two states of a worker differ in no more than what
// attempts use and in the counters that no score shows.
func sameFixed(a, b *Worker) bool {
	return a.Connected == b.Connected && a.Draining == b.Draining && a.Owner == b.Owner && a.Name == b.Name &&
		a.PriceMicroUsdPerHour == b.PriceMicroUsdPerHour && a.AllowNetwork == b.AllowNetwork && unsure(a) == unsure(b) &&
		a.CacheVersion == b.CacheVersion && a.CacheVersion != 0 && sameCapacity(a.Capacity, b.Capacity)
}

func sameCapacity(a, b *musterpb.Capacity) bool {
	if a == b {
		return true
	}
	return a.GetMilliCpus() == b.GetMilliCpus() && a.GetMemoryBytes() == b.GetMemoryBytes() && a.GetDiskBytes() == b.GetDiskBytes() &&
		a.GetPlatform() == b.GetPlatform() && a.GetCpuLevel() == b.GetCpuLevel() && slices.Equal(a.GetRuntimes(), b.GetRuntimes()) &&
		slices.EqualFunc(a.GetDevices(), b.GetDevices(), func(a, b *musterpb.Device) bool {
			return a.Uuid == b.Uuid && a.Index == b.Index && a.Name == b.Name && a.MemoryBytes == b.MemoryBytes && a.ComputeCapability == b.ComputeCapability &&
				a.Architecture == b.Architecture && a.Driver == b.Driver && works(a) == works(b)
		})
}
