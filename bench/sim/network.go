package main

import (
	"container/heap"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/place"
	"github.com/musternet/muster/scheduler/state"
	"github.com/musternet/muster/verify"
)

// network is a whole network in one process: the real replicated state and the
// real placement engine, driven by real commands in virtual time. What is left
// out is what they do not contain: consensus, connections, containers.
type network struct {
	state  *state.State
	engine *place.Engine
	cursor uint64
	rng    *rand.Rand
	nowMS  int64

	chain    *verify.Chain
	node     string
	lastDraw int64
	undrawn  bool // nothing is drawn, so that there are no checks

	kinds    map[string]kind // by job
	running  runHeap
	attempts int

	checkPPM uint32 // rate of proven owners

	placing   time.Duration // what the engine took
	decisions int
	refused   int
	refusal   error // the last

	placed func(run) // may be nil
}

// kind is what jobs of one sort ask for.
type kind struct {
	name    string
	gpus    uint32
	vramGB  int64
	models  []string
	cpus    int64 // thousandths
	seconds int   // a run takes, give or take a half
}

// run is an attempt that a worker works on.
type run struct {
	attempt         string
	kind            kind
	account, worker string
	check           bool
	startMS, endMS  int64
}

// runHeap orders runs by their end.
type runHeap []run

func (h runHeap) Len() int { return len(h) }
func (h runHeap) Less(a, b int) bool {
	return h[a].endMS < h[b].endMS || (h[a].endMS == h[b].endMS && h[a].attempt < h[b].attempt)
}
func (h runHeap) Swap(a, b int) { h[a], h[b] = h[b], h[a] }
func (h *runHeap) Push(x any)   { *h = append(*h, x.(run)) }
func (h *runHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	*h = old[:len(old)-1]
	return last
}

// batchEveryMS is how often commits are drawn from.
const batchEveryMS = 2000

// newNetwork makes a network with so many workers and these customers.
func newNetwork(seed uint64, workers int, customers []string) *network {
	n := &network{
		state: state.New(), rng: rand.New(rand.NewPCG(seed, uint64(workers))), nowMS: 1_700_000_000_000,
		chain: verify.NewChain([]byte("simulated")), kinds: map[string]kind{}, checkPPM: 30_000,
	}
	n.engine = place.NewEngine(n.seedOf)
	n.must(&musterpb.Command{Body: &musterpb.Command_CreateCluster{CreateCluster: &musterpb.CreateCluster{Cluster: "simulated"}}})
	key := sha256.Sum256([]byte("scheduler"))
	n.node = string(api.NodeIDOf(key[:]))
	n.must(
		&musterpb.Command{Body: &musterpb.Command_RegisterNode{RegisterNode: &musterpb.RegisterNode{Node: &musterpb.Node{Id: n.node, PublicKey: key[:], ApiAddress: "a:1", RaftAddress: "a:2"}}}},
		&musterpb.Command{Body: &musterpb.Command_RegisterTip{RegisterTip: &musterpb.RegisterTip{Node: n.node, Tip: n.chain.Tip()}}})
	for _, c := range customers {
		n.must(createAccount(c), &musterpb.Command{Body: &musterpb.Command_Deposit{Deposit: &musterpb.Deposit{Account: c, AmountMicroUsd: int64(100_000_000 * api.Dollars)}}})
	}
	var cmds []*musterpb.Command
	owners := map[string]bool{}
	for i := range workers {
		w := machine(n.rng, i)
		if w.Owner = ownerOf(i); !owners[w.Owner] {
			owners[w.Owner] = true
			cmds = append(cmds, createAccount(w.Owner))
		}
		cmds = append(cmds, &musterpb.Command{Body: &musterpb.Command_RegisterWorker{RegisterWorker: &musterpb.RegisterWorker{Worker: w}}})
	}
	n.must(cmds...)
	return n
}

func createAccount(name string) *musterpb.Command {
	return &musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: name}}}
}

func (n *network) apply(cmds []*musterpb.Command) []*musterpb.Answer {
	for _, c := range cmds {
		c.TimeUnixMs = n.nowMS
	}
	return n.state.ApplyAll(cmds)
}

// must applies commands that have to be accepted.
func (n *network) must(cmds ...*musterpb.Command) {
	for i, a := range n.apply(cmds) {
		if err := state.ErrorOf(a); err != nil {
			panic(fmt.Sprintf("sim: %v: %v", cmds[i], err))
		}
	}
}

// submit adds a job of so many items, one to a task.
func (n *network) submit(account string, k kind, items uint64, p *musterpb.Placement) string {
	digest := string(api.DigestOf([]byte("simulated")))
	id := fmt.Sprintf("job-%06d", len(n.kinds))
	n.kinds[id] = k
	cpus := k.cpus
	if cpus == 0 {
		cpus = int64(k.gpus) * 4000
	}
	spec := &musterpb.JobSpec{
		Name: k.name, Image: &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_REGISTRY, Ref: "registry.example/simulated@" + digest, Digest: digest, Platforms: []string{"linux/amd64"}, Name: "registry.example/simulated"},
		Items: &musterpb.Items{Count: items}, Chunk: 1, TimeoutMs: 3_600_000, Retries: 3, MaxPriceMicroUsdPerHour: 10_000_000, BudgetMicroUsd: int64(1_000_000 * api.Dollars),
		Resources: &musterpb.Resources{Gpus: k.gpus, GpuModels: k.models, MinVramBytes: k.vramGB * 1_000_000_000, MilliCpus: cpus, MemoryBytes: cpus << 20, DiskBytes: 1 << 30},
		Verify:    &musterpb.Verify{Comparator: "exact", RatePpm: n.checkPPM}, Placement: p,
	}
	n.must(&musterpb.Command{Body: &musterpb.Command_SubmitJob{SubmitJob: &musterpb.SubmitJob{Job: id, Account: account, Spec: spec, PermutationKey: []byte("0123456789abcdef")}}})
	return id
}

// round lets at most so many of the attempts that end first end, and at most
// until a time passes, then draws, compares and places. It reports whether
// anything runs afterwards.
func (n *network) round(ends int, forMS int64) bool {
	until := n.nowMS + forMS
	if len(n.running) > 0 {
		until = max(until, n.running[0].endMS)
	}
	var commits []*musterpb.Command
	for len(commits) < ends && len(n.running) > 0 && n.running[0].endMS <= until {
		r := heap.Pop(&n.running).(run)
		n.nowMS = max(n.nowMS, r.endMS)
		root := sha256.Sum256([]byte(r.attempt))
		commits = append(commits, &musterpb.Command{Body: &musterpb.Command_CommitResult{CommitResult: &musterpb.CommitResult{Commit: &musterpb.Commit{Attempt: r.attempt, Root: root[:]}}}})
	}
	if len(commits) < ends {
		n.nowMS = until
	}
	n.must(commits...)
	n.draw()
	n.compare()
	for n.place() > 0 {
	}
	return len(n.running) > 0
}

// draw closes a batch now and then and reveals what draws from it.
func (n *network) draw() {
	if n.undrawn || n.nowMS-n.lastDraw < batchEveryMS {
		return
	}
	waiting, free, epoch, digest := n.state.Committed()
	if waiting == 0 || !free {
		return
	}
	n.lastDraw = n.nowMS
	n.must(&musterpb.Command{Body: &musterpb.Command_CloseBatch{CloseBatch: &musterpb.CloseBatch{Epoch: epoch, Digest: digest, Attempts: uint32(waiting)}}})
	node := n.state.Node(n.node)
	value := n.chain.Reveal(node.Reveals, node.Tip)
	if value == nil {
		panic("sim: the hash chain has run out: the simulation is too long")
	}
	n.must(&musterpb.Command{Body: &musterpb.Command_Reveal{Reveal: &musterpb.RevealValue{Reveal: &musterpb.Reveal{Node: n.node, Epoch: epoch, Value: value}}}})
}

// compare finds that all results agree.
func (n *network) compare() {
	var cmds []*musterpb.Command
	for _, c := range n.state.ToCompare() {
		r := &musterpb.RecordComparisons{Check: c.Check.Id}
		for _, p := range c.Pairs {
			r.Comparisons = append(r.Comparisons, &musterpb.Comparison{A: p[0], B: p[1], Match: true})
		}
		cmds = append(cmds, &musterpb.Command{Body: &musterpb.Command_RecordComparisons{RecordComparisons: r}})
	}
	n.must(cmds...)
}

func (n *network) seedOf(epoch uint64) []byte {
	if b := n.state.Batches(epoch-1, 1); len(b) > 0 {
		return b[0].Seed
	}
	return nil
}

// maxPlacements is what the leader places in one round.
const maxPlacements = 512

// place does what the leader's placer does: it tells the engine what changed,
// lets it decide, and proposes. It returns how many attempts were placed.
func (n *network) place() (placed int) {
	told := n.changes()
	start := cpuTime()
	n.tell(told)
	plan := n.engine.Plan(n.nowMS, maxPlacements)
	n.placing += cpuTime() - start
	n.decisions += len(plan)
	cmds := make([]*musterpb.Command, len(plan))
	for i, p := range plan {
		n.attempts++
		cmds[i] = &musterpb.Command{Body: &musterpb.Command_PlaceAttempt{PlaceAttempt: &musterpb.PlaceAttempt{
			Attempt: fmt.Sprintf("att-%08x", n.attempts), Job: p.Job.Id, Task: p.Task, Check: p.Check.GetId(), Worker: p.Worker, Class: p.Class, Devices: p.Devices, Relaxed: p.Relaxed,
		}}}
	}
	for i, a := range n.apply(cmds) {
		p := plan[i]
		if err := state.ErrorOf(a); err != nil {
			n.refused, n.refusal = n.refused+1, err
			n.tellJob(p.Job.Id) // the engine believes that it placed
			n.engine.SetWorker(n.worker(p.Worker))
			continue
		}
		k := n.kinds[p.Job.Id]
		ms := int64(k.seconds) * int64(500+n.rng.IntN(1000))
		r := run{attempt: a.Id, kind: k, account: p.Job.Account, worker: p.Worker, check: p.Check != nil, startMS: n.nowMS, endMS: n.nowMS + ms}
		heap.Push(&n.running, r)
		if placed++; n.placed != nil {
			n.placed(r)
		}
	}
	return placed
}

// news is what the engine is told. It is read from the state first, so that the
// engine's own time can be taken.
type news struct {
	workers  []*place.Worker
	attempts []*musterpb.Attempt
	jobs     []state.Work // without checks, unless whole
	whole    bool
	wanted   []state.WantedRun
	sated    []*musterpb.Check
	usage    map[string]int64
	of       map[string]*musterpb.Job
}

func (n *network) tell(t *news) {
	e := n.engine
	for _, w := range t.workers {
		e.SetWorker(w)
	}
	for _, a := range t.attempts {
		e.SetAttempt(t.of[a.Job], a)
	}
	for _, w := range t.jobs {
		if t.whole || !e.SetTasks(w) {
			n.tellJob(w.Job.Id)
		}
	}
	for _, run := range t.wanted {
		e.SetCheck(t.of[run.Check.Job], run)
	}
	for _, c := range t.sated {
		e.RemoveCheck(c.Job, c.Id)
	}
	for account, units := range t.usage {
		e.SetUsage(account, units)
	}
}

func (n *network) tellJob(id string) {
	if w, ok := n.state.WorkOf(id); ok {
		n.engine.SetJob(w)
	} else {
		n.engine.RemoveJob(id)
	}
}

func (n *network) changes() *news {
	c, next := n.state.ChangesSince(n.cursor)
	n.cursor = next
	t := &news{usage: map[string]int64{}, of: map[string]*musterpb.Job{}}
	if c.Reset {
		n.engine, t.whole = place.NewEngine(n.seedOf), true
		for _, w := range n.state.Workers() {
			c.Workers = append(c.Workers, w.Id)
		}
		for _, w := range n.state.Queued() {
			c.Jobs = append(c.Jobs, w.Job.Id)
		}
		for _, a := range n.state.LiveAttempts() {
			c.Attempts = append(c.Attempts, a.Id)
		}
	}
	for _, id := range c.Workers {
		t.workers = append(t.workers, n.worker(id))
	}
	for _, id := range c.Attempts {
		if a := n.state.Attempt(id); a != nil {
			t.attempts = append(t.attempts, a)
			t.of[a.Job] = n.state.Job(a.Job)
		}
	}
	for _, id := range c.Jobs {
		w, _ := n.state.TasksOf(id)
		t.jobs = append(t.jobs, w)
		t.usage[w.Job.Account] = n.state.UsageOf(w.Job.Account)
	}
	for _, id := range c.Checks {
		if run, ok := n.state.Wanted(id); ok {
			t.wanted = append(t.wanted, run)
			t.of[run.Check.Job] = n.state.Job(run.Check.Job)
		} else if run.Check != nil {
			t.sated = append(t.sated, run.Check)
		}
	}
	return t
}

// worker is a worker as placement sees it.
func (n *network) worker(id string) *place.Worker {
	w := place.NewWorker(n.state.Worker(id), true, nil)
	w.CacheVersion = 1
	use := n.state.UseOf(id)
	w.FreeMilliCPUs -= use.MilliCPUs
	w.FreeMemoryBytes -= use.MemoryBytes
	w.FreeDiskBytes -= use.DiskBytes
	for _, d := range use.Devices {
		w.UsedDevices[d] = true
	}
	return w
}

// items counts what waits.
func (n *network) items() (queued uint64) {
	for _, w := range n.state.Queued() {
		queued += uint64(w.End - w.Next)
	}
	return queued
}

// shuffleKey makes the order of accounts, which is that of their names, say
// nothing of their work.
func shuffleKey(i int) string {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], uint64(i))
	sum := sha256.Sum256(b[:])
	return fmt.Sprintf("customer-%x", sum[:4])
}
