package place

import (
	"fmt"
	"testing"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// fleet is an engine with so many workers of 16 places each, and three kinds of GPUs.
func fleet(workers int) (*Engine, []*Worker) {
	e := NewEngine(seedOf)
	list := make([]*Worker, workers)
	for i := range list {
		list[i] = busyWorker(i)
		e.SetWorker(copyWorker(list[i]))
	}
	return e, list
}

func busyWorker(i int) *Worker {
	architecture := []string{"Ada", "Ampere", "Hopper"}[i%3]
	w := worker(fmt.Sprintf("wrk-%016x", uint64(i)*0x9e3779b97f4a7c15), gpu(0, 24*gb, architecture), gpu(1, 24*gb, architecture), gpu(2, 24*gb, architecture), gpu(3, 24*gb, architecture))
	w.Owner, w.CacheVersion = fmt.Sprintf("owner%d", i/3), 1
	w.PriceMicroUsdPerHour = int64(100_000 + i%7*10_000)
	w.Capacity.MilliCpus = 16_000
	w.FreeMilliCPUs = 16_000
	return w
}

// BenchmarkPlace is one decision, with what it takes to hear that an earlier
// attempt has ended, on a cluster that is half full.
func BenchmarkPlace(b *testing.B) {
	for _, workers := range []int{100, 1000, 5000, 10_000, 50_000} {
		for name, change := range map[string]func(*musterpb.Job){
			"pack": func(*musterpb.Job) {},
			"gpu":  needs(&musterpb.Resources{Gpus: 1}),
			"spread": func(j *musterpb.Job) {
				j.Spec.Placement = &musterpb.Placement{Spread: musterpb.Spread_SPREAD_OWNER, Affinities: []*musterpb.Affinity{{Attribute: "gpu", Value: "Hopper", Weight: 50}, {Attribute: "owner", Value: "owner1", Weight: -50}}}
			},
		} {
			b.Run(fmt.Sprintf("workers=%d/%s", workers, name), func(b *testing.B) { benchmarkPlace(b, workers, change) })
		}
	}
}

func benchmarkPlace(b *testing.B, workers int, change func(*musterpb.Job)) {
	e, list := fleet(workers)
	byID := map[string]*Worker{}
	for _, w := range list {
		byID[w.Id] = w
	}
	jobs := make([]*musterpb.Job, 10)
	for i := range jobs {
		jobs[i] = job(fmt.Sprintf("j%d", i), change, func(j *musterpb.Job) { j.Account = fmt.Sprintf("account%d", i%4) })
		e.SetJob(state.Work{Job: jobs[i], End: 1 << 30})
	}
	var running []Placement
	const round = 256
	for range workers * 8 / 4 / round { // half of what the GPUs allow
		running = append(running, e.Plan(0, round)...)
	}
	b.ReportAllocs()
	b.ResetTimer()
	for n := 0; n < b.N; n += round {
		plan := e.Plan(0, min(round, b.N-n))
		if len(plan) == 0 {
			b.Fatal("nothing was placed")
		}
		running = append(running, plan...)
		for i := range plan {
			p := running[i]
			w := e.byID[p.Worker].Worker
			w.FreeMilliCPUs += p.Job.Spec.Resources.MilliCpus
			w.FreeMemoryBytes += p.Job.Spec.Resources.MemoryBytes
			w.FreeDiskBytes += p.Job.Spec.Resources.DiskBytes
			for _, d := range p.Devices {
				delete(w.UsedDevices, d)
			}
			e.SetWorker(w)
			e.SetUsage(p.Job.Account, e.accounts[p.Job.Account].units-1)
			if spreads(p.Job) {
				c := e.countsOf(p.Job)
				c.isDecided(spot{p.Worker, w.Owner})
				e.spread(c, spot{p.Worker, w.Owner}, -1)
			}
		}
		running = running[len(plan):]
	}
}
