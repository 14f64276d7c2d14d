package main

import (
	"fmt"
	"slices"

	"github.com/musternet/muster/api/musterpb"
)

// mix is what customers ask for: most of it small, some of it all that one
// machine has.
var mix = []kind{
	{name: "gpu1", gpus: 1, seconds: 90},
	{name: "gpu1-24gb", gpus: 1, vramGB: 24, seconds: 240},
	{name: "gpu1-80gb", gpus: 1, vramGB: 80, seconds: 300},
	{name: "gpu1-4090", gpus: 1, models: []string{"RTX 4090"}, seconds: 120},
	{name: "gpu2", gpus: 2, seconds: 300},
	{name: "gpu4", gpus: 4, seconds: 600},
	{name: "gpu8", gpus: 8, vramGB: 80, seconds: 900},
	{name: "cpu", cpus: 4000, seconds: 60},
}

// cost is what decisions cost on a full network.
type cost struct {
	decisions int
	engineNS  float64 // per decision
	wholeNS   float64 // per decision, with the state's part: all commands of all attempts
	queued    uint64
}

// endsPerRound is how many attempts end between two rounds of placement. It is
// the same for every size, so that the sizes can be compared.
const endsPerRound = 64

// load is what decisions are measured with.
type load struct {
	workers, decisions int
	queued             uint64                            // items
	prefer             func(job int) *musterpb.Placement // nil for plain packing
	checked            bool                              // every result is, else none: as many checks whatever the size
}

// measureCost fills a network, lets it run so full for a number of decisions,
// and takes the time of those.
func measureCost(seed uint64, l load) cost {
	defer lockClock()()
	var customers []string
	for i := range 8 {
		customers = append(customers, shuffleKey(i))
	}
	n := newNetwork(seed, l.workers, customers)
	n.undrawn, n.checkPPM = !l.checked, 1_000_000
	jobs := len(customers) * len(mix)
	for i := range jobs {
		var p *musterpb.Placement
		if l.prefer != nil {
			p = l.prefer(i)
		}
		n.submit(customers[i%len(customers)], mix[i/len(customers)], l.queued/uint64(jobs), p)
	}
	for n.place() > 0 {
	}
	for warm := n.decisions + l.decisions/2; n.decisions < warm; { // runs get out of step
		n.round(endsPerRound, 1<<40)
	}
	best := cost{queued: n.items()}
	// The fastest of several parts: what else the machine does only adds to it.
	for range costParts {
		n.decisions, n.placing = 0, 0
		start := cpuTime()
		for n.decisions < l.decisions/costParts {
			n.round(endsPerRound, 1<<40)
		}
		part := cost{decisions: n.decisions, engineNS: float64(n.placing) / float64(n.decisions), wholeNS: float64(cpuTime()-start) / float64(n.decisions)}
		best.decisions += part.decisions
		if best.engineNS == 0 || part.engineNS < best.engineNS {
			best.engineNS = part.engineNS
		}
		if best.wholeNS == 0 || part.wholeNS < best.wholeNS {
			best.wholeNS = part.wholeNS
		}
	}
	if n.refused > 0 {
		panic(fmt.Sprintf("sim: the state refused %d placements, the last because: %v", n.refused, n.refusal))
	}
	return best
}

const costParts = 5

// spread is a preference of every kind at once.
func spread(i int) *musterpb.Placement {
	return &musterpb.Placement{
		Spread:     []musterpb.Spread{musterpb.Spread_SPREAD_OWNER, musterpb.Spread_SPREAD_WORKER}[i%2],
		Affinities: []*musterpb.Affinity{{Attribute: "worker", Value: fmt.Sprintf("machine-%d", i), Weight: 50}, {Attribute: "owner", Value: ownerOf(i), Weight: -100}, {Attribute: "platform", Value: "linux/amd64", Weight: 10}},
	}
}

// contention is how a full network treats customers with equal rights and
// different work.
type contention struct {
	jain      float64            // index of the GPU time that each got
	used      float64            // share of all GPU time that somebody used
	waitS     map[string]float64 // by kind: the longest time in which nothing of it was placed
	decisions int
}

// measureContention runs one customer per kind of work, each with more of it
// than the network can take, for some hours. The first quarter, in which runs of
// different lengths get out of step, is left out.
func measureContention(seed uint64, workers int, hours float64) contention {
	kinds := slices.DeleteFunc(slices.Clone(mix), func(k kind) bool { return k.gpus == 0 })
	var customers []string
	for i := range kinds {
		customers = append(customers, shuffleKey(i))
	}
	n := newNetwork(seed, workers, customers)
	fromMS := n.nowMS + int64(hours*3_600_000/4)
	endMS := n.nowMS + int64(hours*3_600_000)
	used, last, wait := map[string]float64{}, map[string]int64{}, map[string]int64{}
	n.placed = func(r run) {
		if seconds := float64(min(r.endMS, endMS)-max(r.startMS, fromMS)) / 1000; seconds > 0 {
			used[r.account] += seconds * float64(r.kind.gpus)
		}
		if r.startMS >= fromMS && !r.check {
			wait[r.kind.name] = max(wait[r.kind.name], r.startMS-max(last[r.kind.name], fromMS))
			last[r.kind.name] = r.startMS
		}
	}
	for i, k := range kinds {
		n.submit(customers[i], k, 1_000_000, nil)
	}
	for n.place() > 0 {
	}
	for n.nowMS < endMS {
		n.round(1<<30, 1000)
	}
	c := contention{waitS: map[string]float64{}, decisions: n.decisions}
	var sum, squares float64
	for i, k := range kinds {
		x := used[customers[i]]
		sum, squares = sum+x, squares+x*x
		c.waitS[k.name] = float64(max(wait[k.name], endMS-max(last[k.name], fromMS))) / 1000
	}
	c.jain = sum * sum / (squares * float64(len(kinds)))
	c.used = sum / (float64(gpus(n, 0, 0)) * float64(endMS-fromMS) / 1000)
	return c
}

// gpus counts the devices that attempts can use which need so many of them, and
// each with so much memory.
func gpus(n *network, atOnce uint32, vramGB int64) (count int) {
	for _, w := range n.state.Workers() {
		d := w.Capacity.Devices
		if d[0].MemoryBytes >= uint64(vramGB)*1_000_000_000 && uint32(len(d)) >= atOnce { // the GPUs of a machine are alike
			if atOnce > 0 {
				count += len(d) / int(atOnce) * int(atOnce)
			} else {
				count += len(d)
			}
		}
	}
	return count
}

// jobsPerKind is how many jobs of each kind a customer has.
const jobsPerKind = 5

// measureMakespan runs a finite load to its end and compares with the shortest
// time that its GPU seconds could take: for every demand, the work that asks
// for at least as much over the devices that satisfy it.
func measureMakespan(seed uint64, workers, tasks int) (overBound float64, decisions int) {
	kinds := slices.DeleteFunc(slices.Clone(mix), func(k kind) bool { return k.gpus == 0 || len(k.models) > 0 })
	var customers []string
	for i := range 4 {
		customers = append(customers, shuffleKey(i))
	}
	n := newNetwork(seed, workers, customers)
	n.undrawn = true // else the end is that of checks which have one machine to run on
	var runs []run
	n.placed = func(r run) { runs = append(runs, r) }
	weights := map[string]int{"gpu1": 40, "gpu1-24gb": 25, "gpu1-80gb": 10, "gpu2": 15, "gpu4": 6, "gpu8": 4}
	startMS := n.nowMS
	// Within an account the older job goes first, so the order says how long the
	// largest tasks wait for their turn: none in particular.
	var jobs []kind
	for _, k := range kinds {
		for range jobsPerKind * len(customers) {
			jobs = append(jobs, k)
		}
	}
	n.rng.Shuffle(len(jobs), func(a, b int) { jobs[a], jobs[b] = jobs[b], jobs[a] })
	for i, k := range jobs {
		n.submit(customers[i%len(customers)], k, uint64(max(tasks*weights[k.name]/100/len(customers)/jobsPerKind, 1)), nil)
	}
	for n.place() > 0 {
	}
	for n.round(1<<30, 1000) {
	}
	bound, end := 0.0, startMS
	for _, r := range runs {
		end = max(end, r.endMS)
		bound = max(bound, float64(r.endMS-r.startMS)/1000)
	}
	for _, k := range kinds {
		work := 0.0
		for _, r := range runs {
			if r.kind.gpus >= k.gpus && r.kind.vramGB >= k.vramGB {
				work += float64(r.endMS-r.startMS) / 1000 * float64(r.kind.gpus)
			}
		}
		bound = max(bound, work/float64(gpus(n, k.gpus, k.vramGB)))
	}
	return float64(end-startMS) / 1000 / bound, n.decisions
}
