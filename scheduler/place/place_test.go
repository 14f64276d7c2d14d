package place

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

const gb = 1_000_000_000

func gpu(i int, vram uint64, architecture string) *musterpb.Device {
	return &musterpb.Device{
		Index: uint32(i), Uuid: fmt.Sprintf("gpu-%d", i), Name: "NVIDIA " + architecture, MemoryBytes: vram,
		ComputeCapability: map[string]string{"Ada": "8.9", "Ampere": "8.6", "Hopper": "9.0", "Blackwell": "10.0"}[architecture],
		Architecture:      architecture, Driver: "570.10",
	}
}

// worker is a machine that can run anything in these tests, with GPUs.
func worker(id string, devices ...*musterpb.Device) *Worker {
	return NewWorker(&musterpb.Worker{
		Id: id, Owner: "owner of " + id, PriceMicroUsdPerHour: 200_000,
		Capacity: &musterpb.Capacity{
			MilliCpus: 8000, MemoryBytes: 32 * gb, DiskBytes: 100 * gb, Devices: devices, Runtimes: []string{"docker", "wasm"}, Platform: "linux/amd64",
		},
	}, true, func(string) bool { return false })
}

func with(w *Worker, change func(*Worker)) *Worker { change(w); return w }

func job(id string, change ...func(*musterpb.Job)) *musterpb.Job {
	j := &musterpb.Job{Id: id, Account: "acme", Sequence: uint64(id[len(id)-1]), Spec: &musterpb.JobSpec{
		Image:     &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_REGISTRY, Digest: "image", Platforms: []string{"linux/amd64"}},
		Resources: &musterpb.Resources{MilliCpus: 1000, MemoryBytes: gb, DiskBytes: gb}, MaxPriceMicroUsdPerHour: 400_000, Verify: &musterpb.Verify{},
	}}
	for _, c := range change {
		c(j)
	}
	return j
}

func needs(r *musterpb.Resources) func(*musterpb.Job) {
	return func(j *musterpb.Job) {
		r.MilliCpus, r.MemoryBytes, r.DiskBytes = cmp.Or(r.MilliCpus, 1000), cmp.Or(r.MemoryBytes, gb), cmp.Or(r.DiskBytes, gb)
		j.Spec.Resources = r
	}
}

func tasks(j *musterpb.Job, n int) state.Work {
	return state.Work{Job: j, End: uint32(n)}
}

func wanted(id, class string, runs int, parties ...*Worker) state.WantedRun {
	w := state.WantedRun{Check: &musterpb.Check{Id: id}, Class: class, Runs: runs}
	for _, p := range parties {
		w.Parties = append(w.Parties, &musterpb.Attempt{Worker: p.Id, Owner: p.Owner, Task: 7, Batch: 3})
	}
	return w
}

func plan(workers []*Worker, work ...state.Work) []Placement {
	return Plan(&Input{NowUnixMS: 1000, Workers: workers, Work: work, Usage: map[string]int64{}, Max: 1000})
}

// text is a plan in one line.
func text(placements []Placement) string {
	var parts []string
	for _, p := range placements {
		s := fmt.Sprintf("%s/%d", p.Job.Id, p.Task)
		if p.Check != nil {
			s = p.Check.Id
		}
		s += "→" + p.Worker
		if len(p.Devices) > 0 {
			s += "(" + strings.Join(p.Devices, ",") + ")"
		}
		parts = append(parts, s)
	}
	return strings.Join(parts, " ")
}

// What keeps a worker from a job, in the words for one and for two.
func TestReasons(t *testing.T) {
	any := job("j1")
	oneGPU := job("j1", needs(&musterpb.Resources{Gpus: 1}))
	for name, c := range map[string]struct {
		job       *musterpb.Job
		worker    func() *Worker
		one, many string
	}{
		"suits":        {any, func() *Worker { return worker("w") }, "1 worker: 1 can take it now", "2 workers: 2 can take it now"},
		"disconnected": {any, func() *Worker { return with(worker("w"), func(w *Worker) { w.Connected = false }) }, "1 worker: 1 is not connected", "2 workers: 2 are not connected"},
		"draining":     {any, func() *Worker { return with(worker("w"), func(w *Worker) { w.Draining = true }) }, "1 worker: 1 is draining", "2 workers: 2 are draining"},
		"no docker": {any, func() *Worker { return with(worker("w"), func(w *Worker) { w.Capacity.Runtimes = []string{"wasm"} }) },
			"1 worker: 1 does not have a Docker engine", "2 workers: 2 do not have a Docker engine"},
		"no wasm": {job("j1", func(j *musterpb.Job) { j.Spec.Image = &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_WASM} }),
			func() *Worker { return with(worker("w"), func(w *Worker) { w.Capacity.Runtimes = []string{"docker"} }) },
			"1 worker: 1 does not have the WebAssembly runtime", "2 workers: 2 do not have the WebAssembly runtime"},
		"platform": {any, func() *Worker { return with(worker("w"), func(w *Worker) { w.Capacity.Platform = "linux/arm64" }) },
			"1 worker: 1 runs linux/arm64, the image is for linux/amd64", "2 workers: 2 run linux/arm64, the image is for linux/amd64"},
		"variant": {job("j1", func(j *musterpb.Job) { j.Spec.Image.Platforms = []string{"linux/arm64/v8"} }),
			func() *Worker { return with(worker("w"), func(w *Worker) { w.Capacity.Platform = "linux/arm64" }) },
			"1 worker: 1 can take it now", "2 workers: 2 can take it now"},
		"no GPU": {oneGPU, func() *Worker { return worker("w") }, "1 worker: 1 has no GPU", "2 workers: 2 have no GPU"},
		"sick GPU": {oneGPU, func() *Worker {
			return with(worker("w", gpu(0, 24*gb, "Ada")), func(w *Worker) { w.Capacity.Devices[0].Unhealthy = "XID 79" })
		},
			"1 worker: 1 has no GPU", "2 workers: 2 have no GPU"},
		"split GPU": {oneGPU, func() *Worker {
			return with(worker("w", gpu(0, 24*gb, "Ada")), func(w *Worker) { w.Capacity.Devices[0].Mig = "enabled" })
		},
			"1 worker: 1 has no GPU", "2 workers: 2 have no GPU"},
		"few GPUs": {job("j1", needs(&musterpb.Resources{Gpus: 2})), func() *Worker { return worker("w", gpu(0, 24*gb, "Ada")) },
			"1 worker: 1 has fewer than 2 GPUs of one kind", "2 workers: 2 have fewer than 2 GPUs of one kind"},
		"mixed GPUs": {job("j1", needs(&musterpb.Resources{Gpus: 2})), func() *Worker { return worker("w", gpu(0, 24*gb, "Ada"), gpu(1, 24*gb, "Ampere")) },
			"1 worker: 1 has fewer than 2 GPUs of one kind", "2 workers: 2 have fewer than 2 GPUs of one kind"},
		"model": {job("j1", needs(&musterpb.Resources{Gpus: 1, GpuModels: []string{"H100", "hopper"}})), func() *Worker { return worker("w", gpu(0, 24*gb, "Ada")) },
			"1 worker: 1 has no H100 or hopper", "2 workers: 2 have no H100 or hopper"},
		"VRAM": {job("j1", needs(&musterpb.Resources{Gpus: 1, MinVramBytes: 48 << 30})), func() *Worker { return worker("w", gpu(0, 24*gb, "Ada")) },
			"1 worker: 1 has less than 48 GiB VRAM", "2 workers: 2 have less than 48 GiB VRAM"},
		"capability": {job("j1", needs(&musterpb.Resources{Gpus: 1, MinComputeCapability: "9.0"})), func() *Worker { return worker("w", gpu(0, 24*gb, "Ada")) },
			"1 worker: 1 is below compute capability 9.0", "2 workers: 2 are below compute capability 9.0"},
		"capability 10 is above 9": {job("j1", needs(&musterpb.Resources{Gpus: 1, MinComputeCapability: "9.0"})), func() *Worker { return worker("w", gpu(0, 24*gb, "Blackwell")) },
			"1 worker: 1 can take it now", "2 workers: 2 can take it now"},
		"CPUs":   {job("j1", needs(&musterpb.Resources{MilliCpus: 8500})), func() *Worker { return worker("w") }, "1 worker: 1 has fewer than 8.5 CPUs", "2 workers: 2 have fewer than 8.5 CPUs"},
		"memory": {job("j1", needs(&musterpb.Resources{MemoryBytes: 64 * gb})), func() *Worker { return worker("w") }, "1 worker: 1 has less than 64 GB memory", "2 workers: 2 have less than 64 GB memory"},
		"disk":   {job("j1", needs(&musterpb.Resources{DiskBytes: 101 * gb})), func() *Worker { return worker("w") }, "1 worker: 1 has less than 101 GB disk", "2 workers: 2 have less than 101 GB disk"},
		"network": {job("j1", func(j *musterpb.Job) { j.Spec.Network = true }), func() *Worker { return worker("w") },
			"1 worker: 1 does not allow network", "2 workers: 2 do not allow network"},
		"price": {job("j1", func(j *musterpb.Job) { j.Spec.MaxPriceMicroUsdPerHour = 199_999 }), func() *Worker { return worker("w") },
			"1 worker: 1 asks more than $0.199999/h", "2 workers: 2 ask more than $0.199999/h"},
		"resting": {any, func() *Worker { return with(worker("w"), func(w *Worker) { w.BackoffUntilUnixMs = 1001 }) },
			"1 worker: 1 is paused after failures", "2 workers: 2 are paused after failures"},
		"rested": {any, func() *Worker { return with(worker("w"), func(w *Worker) { w.BackoffUntilUnixMs = 1000 }) },
			"1 worker: 1 can take it now", "2 workers: 2 can take it now"},
		"busy": {any, func() *Worker {
			return with(worker("w"), func(w *Worker) { w.Take(&musterpb.Resources{MilliCpus: 7001}, nil) })
		},
			"1 worker: 1 is busy", "2 workers: 2 are busy"},
		"busy GPU": {oneGPU, func() *Worker {
			return with(worker("w", gpu(0, 24*gb, "Ada")), func(w *Worker) { w.Take(&musterpb.Resources{}, []string{"gpu-0"}) })
		}, "1 worker: 1 is busy", "2 workers: 2 are busy"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := Explain(1000, []*Worker{c.worker()}, c.job, nil).Summary; got != c.one {
				t.Errorf("got  %s\nwant %s", got, c.one)
			}
			if got := Explain(1000, []*Worker{c.worker(), c.worker()}, c.job, nil).Summary; got != c.many {
				t.Errorf("got  %s\nwant %s", got, c.many)
			}
			placed := len(plan([]*Worker{c.worker()}, tasks(c.job, 1))) == 1
			if want := strings.HasSuffix(c.one, "can take it now"); placed != want {
				t.Errorf("placed: %v, explained: %s", placed, c.one)
			}
		})
	}
}

func TestExplain(t *testing.T) {
	var workers []*Worker
	for i := range 8 {
		workers = append(workers, worker(fmt.Sprint("small", i), gpu(0, 12*gb, "Ada")))
	}
	for i := range 3 {
		workers = append(workers, with(worker(fmt.Sprint("dear", i), gpu(0, 48*gb, "Ada")), func(w *Worker) { w.PriceMicroUsdPerHour = 400_001 }))
	}
	workers = append(workers, with(worker("leaving", gpu(0, 48*gb, "Ada")), func(w *Worker) { w.Draining = true }))
	j := job("j1", needs(&musterpb.Resources{Gpus: 1, MinVramBytes: 24 * gb}))
	got := Explain(0, workers, j, nil)
	if want := "12 workers: 8 have less than 24 GB VRAM, 3 ask more than $0.40/h, 1 is draining"; got.Summary != want {
		t.Errorf("got  %s\nwant %s", got.Summary, want)
	}
	if got.Workers != 12 || got.Eligible != 0 || len(got.Reasons) != 3 || got.Reasons[0].Workers != 8 {
		t.Errorf("got %v", got)
	}
	workers = append(workers, worker("fits", gpu(0, 24*gb, "Ada")))
	if got, want := Explain(0, workers, j, nil).Summary, "13 workers: 1 can take it now, 8 have less than 24 GB VRAM, 3 ask more than $0.40/h, 1 is draining"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got, want := Explain(0, nil, j, nil).Summary, "no worker has joined this network"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	target := worker("fits", gpu(0, 24*gb, "Ada"))
	other := with(worker("other", gpu(0, 24*gb, "Ada")), func(w *Worker) { w.Owner = target.Owner })
	run := wanted("chk", "Ada/570", 1, target)
	if got, want := Explain(0, []*Worker{target, other, worker("old", gpu(0, 24*gb, "Ampere"))}, j, &run).Summary,
		"3 workers: 2 belong to owners whose results are being compared, 1 is not of hardware class Ada/570"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	run.Unpaid = "the budget does not cover another run of up to $0.40"
	if got := Explain(0, workers, j, &run); got.Summary != run.Unpaid || got.Eligible != 0 {
		t.Errorf("got %v", got)
	}
}

func TestBytes(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 bytes", 999: "999 bytes", 1000: "1 kB", 1024: "1 KiB", 24 * gb: "24 GB", 24 << 30: "24 GiB", 1 << 40: "1 TiB", 1e12: "1 TB", 1<<30 + 1: "1.0 GiB", 3 << 29: "1536 MiB",
	} {
		if got := Bytes(n); got != want {
			t.Errorf("Bytes(%d) = %s, want %s", n, got, want)
		}
	}
}

func TestPlan(t *testing.T) {
	a := worker("a", gpu(0, 24*gb, "Ada"))
	twin := func(w *Worker, id string) *Worker {
		return with(worker(id, w.Capacity.Devices...), func(t *Worker) { t.Owner = w.Owner })
	}
	oneGPU := func(id string, change ...func(*musterpb.Job)) *musterpb.Job {
		return job(id, append([]func(*musterpb.Job){needs(&musterpb.Resources{Gpus: 1})}, change...)...)
	}
	priority := func(p int32) func(*musterpb.Job) { return func(j *musterpb.Job) { j.Spec.Priority = p } }
	of := func(account string) func(*musterpb.Job) { return func(j *musterpb.Job) { j.Account = account } }
	for name, c := range map[string]struct {
		workers []*Worker
		work    []state.Work
		want    string
	}{
		"the smallest GPU that will do": {
			[]*Worker{worker("w", gpu(0, 80*gb, "Ada"), gpu(1, 24*gb, "Ada"), gpu(2, 12*gb, "Ada"))},
			[]state.Work{tasks(job("j1", needs(&musterpb.Resources{Gpus: 1, MinVramBytes: 16 * gb})), 1)}, "j1/0→w(gpu-1)",
		},
		"several GPUs are of one class": {
			[]*Worker{worker("w", gpu(0, 12*gb, "Ampere"), gpu(1, 24*gb, "Ada"), gpu(2, 24*gb, "Hopper"), gpu(3, 48*gb, "Hopper"))},
			[]state.Work{tasks(job("j1", needs(&musterpb.Resources{Gpus: 2})), 1)}, "j1/0→w(gpu-2,gpu-3)",
		},
		"the worker that is left fullest": {
			[]*Worker{worker("big", gpu(0, 24*gb, "Ada"), gpu(1, 24*gb, "Ada")), worker("small", gpu(0, 24*gb, "Ada"))},
			[]state.Work{tasks(oneGPU("j1"), 3)}, "j1/0→small(gpu-0) j1/1→big(gpu-0) j1/2→big(gpu-1)",
		},
		"the cheaper worker": {
			[]*Worker{worker("a"), with(worker("b"), func(w *Worker) { w.PriceMicroUsdPerHour = 100_000 })},
			[]state.Work{tasks(job("j1"), 1)}, "j1/0→b",
		},
		"the reliable worker before the cheap one": {
			[]*Worker{with(worker("a"), func(w *Worker) { w.PriceMicroUsdPerHour, w.Failed = 100_000, 30 }), with(worker("b"), func(w *Worker) { w.Finished = 10 })},
			[]state.Work{tasks(job("j1"), 1)}, "j1/0→b",
		},
		"the worker that has the image and the inputs": {
			[]*Worker{worker("a"), with(worker("b"), func(w *Worker) { w.Cached = func(d string) bool { return d == "image" } }),
				with(worker("c"), func(w *Worker) { w.Cached = func(d string) bool { return d == "image" || d == "in" } })},
			[]state.Work{tasks(job("j1", func(j *musterpb.Job) { j.Spec.Inputs = []*musterpb.Input{{Digest: "in", SizeBytes: 1 << 30}} }), 1)}, "j1/0→c",
		},
		"an owner who failed the task comes last": {
			[]*Worker{worker("a"), with(worker("b"), func(w *Worker) { w.PriceMicroUsdPerHour = 300_000 })},
			[]state.Work{{Job: job("j1"), Requeued: []*musterpb.Task{{Job: "j1", AvoidOwners: []string{"owner of a"}}}}}, "j1/0→b",
		},
		"an owner who failed the task is better than nobody": {
			[]*Worker{worker("a")},
			[]state.Work{{Job: job("j1"), Requeued: []*musterpb.Task{{Job: "j1", AvoidOwners: []string{"owner of a"}}}}}, "j1/0→a",
		},
		"accounts take turns": {
			[]*Worker{worker("w")},
			[]state.Work{tasks(job("j1"), 9), tasks(job("j2"), 9), tasks(job("j3", of("zeta")), 2)},
			"j1/0→w j3/0→w j1/1→w j3/1→w j1/2→w j1/3→w j1/4→w j1/5→w",
		},
		"priority orders the jobs of an account, not accounts": {
			[]*Worker{with(worker("w"), func(w *Worker) { w.FreeMilliCPUs = 4000 })},
			[]state.Work{tasks(job("j1", priority(-5)), 9), tasks(job("j2", priority(5)), 2), tasks(job("j3", of("zeta"), priority(-100)), 9)},
			"j2/0→w j3/0→w j2/1→w j3/1→w",
		},
		"a job that finds no place does not keep others from theirs": {
			[]*Worker{worker("w")},
			[]state.Work{tasks(oneGPU("j1", priority(5)), 5), tasks(job("j2"), 1)}, "j2/0→w",
		},
		"checks before tasks": {
			[]*Worker{a, with(worker("b", gpu(0, 24*gb, "Ada")), func(w *Worker) {})},
			[]state.Work{{Job: oneGPU("j1"), End: 2, Checks: []state.WantedRun{wanted("chk", "Ada/570", 1, a)}}},
			"chk→b(gpu-0) j1/0→a(gpu-0)",
		},
		"no party checks itself, on another of its machines neither": {
			[]*Worker{worker("a", gpu(0, 24*gb, "Ada")), twin(a, "a2")},
			[]state.Work{{Job: oneGPU("j1"), Checks: []state.WantedRun{wanted("chk", "Ada/570", 1, a)}}}, "",
		},
		"but with same_owner": {
			[]*Worker{worker("a", gpu(0, 24*gb, "Ada")), twin(a, "a2")},
			[]state.Work{{Job: oneGPU("j1", func(j *musterpb.Job) { j.Spec.Verify.SameOwner = true }), Checks: []state.WantedRun{wanted("chk", "Ada/570", 1, a)}}}, "chk→a2(gpu-0)",
		},
		"two runs go to two owners": {
			[]*Worker{worker("b", gpu(0, 24*gb, "Ada"), gpu(1, 24*gb, "Ada")), worker("c", gpu(0, 24*gb, "Ada"))},
			[]state.Work{{Job: oneGPU("j1"), Checks: []state.WantedRun{wanted("chk", "Ada/570", 3, a)}}}, "chk→b(gpu-0) chk→c(gpu-0)",
		},
		"the same class, on a worker that has others too": {
			[]*Worker{worker("b", gpu(0, 12*gb, "Ampere"), gpu(1, 24*gb, "Ada")), worker("c", gpu(0, 24*gb, "Ampere"))},
			[]state.Work{{Job: oneGPU("j1"), Checks: []state.WantedRun{wanted("chk", "Ada/570", 2, a)}}}, "chk→b(gpu-1)",
		},
		"whose one of that class is in use": {
			[]*Worker{with(worker("b", gpu(0, 12*gb, "Ampere"), gpu(1, 24*gb, "Ada")), func(w *Worker) { w.UsedDevices["gpu-1"] = true })},
			[]state.Work{{Job: oneGPU("j1"), Checks: []state.WantedRun{wanted("chk", "Ada/570", 2, a)}}}, "",
		},
		"owners who tried a check come last": {
			[]*Worker{worker("b", gpu(0, 24*gb, "Ada")), worker("c", gpu(0, 24*gb, "Ada")), worker("d", gpu(0, 24*gb, "Ada"))},
			[]state.Work{{Job: oneGPU("j1"), Checks: []state.WantedRun{with2(wanted("chk", "Ada/570", 3, a), "owner of b", "owner of d")}}},
			"chk→c(gpu-0) chk→b(gpu-0) chk→d(gpu-0)",
		},
		"nothing that nobody pays": {
			[]*Worker{worker("b", gpu(0, 24*gb, "Ada"))},
			[]state.Work{{Job: oneGPU("j1"), Checks: []state.WantedRun{{Check: &musterpb.Check{Id: "chk"}, Class: "Ada/570", Runs: 1, Parties: wanted("", "", 1, a).Parties, Unpaid: "no money"}}}}, "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := text(plan(c.workers, c.work...)); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

func with2(w state.WantedRun, tried ...string) state.WantedRun { w.Tried = tried; return w }

func TestRelaxedIsSaid(t *testing.T) {
	a := worker("a")
	b := with(worker("b"), func(w *Worker) { w.Owner = a.Owner })
	j := job("j1", func(j *musterpb.Job) { j.Spec.Verify.SameOwner = true })
	p := plan([]*Worker{b}, state.Work{Job: j, Checks: []state.WantedRun{wanted("chk", "cpu/linux/amd64", 1, a)}})
	if len(p) != 1 || p[0].Relaxed == "" || p[0].Task != 7 {
		t.Errorf("got %+v", p)
	}
}

// The checker follows from the seed: others draw others, the same the same.
func TestCheckerIsDrawn(t *testing.T) {
	drawn := map[string]int{}
	for i := range 100 {
		workers := []*Worker{worker("b"), worker("c"), worker("d")}
		in := &Input{
			Workers: workers, Usage: map[string]int64{}, Max: 1, Seed: func(epoch uint64) []byte { return fmt.Append(nil, i, epoch) },
			Work: []state.Work{{Job: job("j1"), Checks: []state.WantedRun{wanted("chk", "cpu/linux/amd64", 1, worker("a"))}}},
		}
		drawn[Plan(in)[0].Worker]++
	}
	for _, w := range []string{"b", "c", "d"} {
		if drawn[w] < 15 {
			t.Errorf("worker %s was drawn %d times of 100", w, drawn[w])
		}
	}
}

func TestMax(t *testing.T) {
	in := &Input{Workers: []*Worker{worker("w")}, Work: []state.Work{tasks(job("j1"), 9)}, Usage: map[string]int64{}, Max: 3}
	if got := len(Plan(in)); got != 3 {
		t.Errorf("%d placements, at most 3 were asked for", got)
	}
}

// cluster draws workers and work.
func cluster(t *rapid.T) (workers []*Worker, work []state.Work) {
	draw := func(most int, what string) int { return rapid.IntRange(0, most).Draw(t, what) }
	for i := range rapid.IntRange(1, 8).Draw(t, "workers") {
		var devices []*musterpb.Device
		for d := range draw(4, "devices") {
			devices = append(devices, gpu(d, uint64(rapid.SampledFrom([]int{12, 24, 80}).Draw(t, "VRAM"))*gb, rapid.SampledFrom([]string{"Ada", "Ampere"}).Draw(t, "architecture")))
		}
		w := worker(fmt.Sprintf("w%d", i), devices...)
		w.Owner = fmt.Sprintf("owner%d", draw(4, "owner"))
		w.PriceMicroUsdPerHour = int64(100_000 * draw(6, "price"))
		w.FreeMilliCPUs = int64(1000 * draw(8, "free CPUs"))
		w.Connected, w.Draining = draw(9, "connected") > 0, draw(9, "draining") == 0
		w.BackoffUntilUnixMs = int64(2000 * max(0, draw(9, "rests")-8))
		if len(devices) > 0 && draw(2, "uses") == 0 {
			w.UsedDevices["gpu-0"] = true
		}
		w.Capacity.Runtimes = rapid.SampledFrom([][]string{{"docker"}, {"docker", "wasm"}, {"wasm"}}).Draw(t, "runtimes")
		w.Capacity.Platform = rapid.SampledFrom([]string{"linux/amd64", "linux/amd64", "linux/arm64"}).Draw(t, "platform")
		workers = append(workers, w)
	}
	for i := range rapid.IntRange(1, 6).Draw(t, "jobs") {
		r := &musterpb.Resources{Gpus: uint32(draw(2, "GPUs")), MilliCpus: int64(500 * (1 + draw(4, "CPUs"))), MemoryBytes: int64(draw(12, "memory")) * gb, DiskBytes: int64(draw(40, "disk")) * gb}
		j := job(fmt.Sprintf("j%d", i), needs(r), func(j *musterpb.Job) {
			j.Account = fmt.Sprintf("account%d", draw(2, "account"))
			j.Spec.Priority = int32(draw(2, "priority"))
			j.Spec.MaxPriceMicroUsdPerHour = int64(100_000 * draw(6, "limit"))
			j.Spec.Verify.SameOwner = draw(3, "same owner") == 0
			if draw(4, "wasm") == 0 {
				j.Spec.Image = &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_WASM, Digest: "image"}
			}
		})
		w := tasks(j, draw(6, "tasks"))
		for c := range draw(2, "checks") {
			target := rapid.SampledFrom(workers).Draw(t, "target")
			class := rapid.SampledFrom([]string{"Ada/570", "Ampere/570", "cpu/linux/amd64", "wasm"}).Draw(t, "class")
			w.Checks = append(w.Checks, wanted(fmt.Sprintf("chk-%s-%d", j.Id, c), class, 1+draw(2, "runs"), target))
		}
		work = append(work, w)
	}
	return workers, work
}

// copies lets the same input be planned twice.
func copies(workers []*Worker, work []state.Work) (ws []*Worker, wk []state.Work) {
	for _, w := range workers {
		c := *w
		c.UsedDevices = map[string]bool{}
		for d := range w.UsedDevices {
			c.UsedDevices[d] = true
		}
		ws = append(ws, &c)
	}
	for _, w := range work {
		w.Checks = slices.Clone(w.Checks)
		wk = append(wk, w)
	}
	return ws, wk
}

func TestPlanProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		workers, work := cluster(t)
		before, wanted := copies(workers, work)
		again, sameWork := copies(workers, work)
		in := &Input{NowUnixMS: 1000, Workers: workers, Work: work, Usage: map[string]int64{}, Max: 100}
		placements := Plan(in)
		if second := text(Plan(&Input{NowUnixMS: 1000, Workers: again, Work: sameWork, Usage: map[string]int64{}, Max: 100})); second != text(placements) {
			t.Fatalf("planned %s, then %s", text(placements), second)
		}
		byID := map[string]*Worker{}
		for _, w := range before {
			byID[w.Id] = w
		}
		parties := map[string][]*Worker{}
		seen := map[string]bool{}
		for _, p := range placements {
			w, spec := byID[p.Worker], p.Job.Spec
			checkPlacement(t, p, w)
			w.Take(spec.Resources, p.Devices)
			if p.Check == nil {
				key := fmt.Sprintf("%s/%d", p.Job.Id, p.Task)
				if seen[key] {
					t.Fatalf("task %s was placed twice", key)
				}
				seen[key] = true
				continue
			}
			parties[p.Check.Id] = append(parties[p.Check.Id], w)
		}
		for _, w := range wanted {
			for _, run := range w.Checks {
				checkParties(t, w.Job, run, parties[run.Check.Id])
			}
		}
	})
}

func checkPlacement(t *rapid.T, p Placement, w *Worker) {
	spec := p.Job.Spec
	r := spec.Resources
	runtime := "docker"
	if spec.Image.Kind == musterpb.ImageKind_IMAGE_KIND_WASM {
		runtime = "wasm"
	}
	switch {
	case !w.Connected || w.Draining || w.BackoffUntilUnixMs > 1000:
		t.Fatalf("%s is connected %v, draining %v, rests until %d", w.Id, w.Connected, w.Draining, w.BackoffUntilUnixMs)
	case w.PriceMicroUsdPerHour > spec.MaxPriceMicroUsdPerHour:
		t.Fatalf("%s is too dear for %s", w.Id, p.Job.Id)
	case w.FreeMilliCPUs < r.MilliCpus || w.FreeMemoryBytes < r.MemoryBytes || w.FreeDiskBytes < r.DiskBytes:
		t.Fatalf("%s has %+v left, %s needs %v", w.Id, w, p.Job.Id, r)
	case !slices.Contains(w.Capacity.Runtimes, runtime) || (runtime == "docker" && w.Capacity.Platform != "linux/amd64"):
		t.Fatalf("%s can't run the image of %s", w.Id, p.Job.Id)
	case len(p.Devices) != int(r.Gpus):
		t.Fatalf("%s got %v, it needs %d devices", p.Job.Id, p.Devices, r.Gpus)
	}
	classes := map[string]bool{}
	for _, id := range p.Devices {
		if w.UsedDevices[id] {
			t.Fatalf("device %s of %s is in use", id, w.Id)
		}
		w.UsedDevices[id] = true
		at := slices.IndexFunc(w.Capacity.Devices, func(d *musterpb.Device) bool { return d.Uuid == id })
		classes[deviceClass(w.Capacity.Devices[at])] = true
	}
	if len(classes) > 1 {
		t.Fatalf("%s got devices of the classes %v", p.Job.Id, classes)
	}
}

func checkParties(t *rapid.T, j *musterpb.Job, run state.WantedRun, checkers []*Worker) {
	if len(checkers) > run.Runs {
		t.Fatalf("%s wants %d runs and got %d", run.Check.Id, run.Runs, len(checkers))
	}
	all := []string{run.Parties[0].Worker}
	owners := []string{run.Parties[0].Owner}
	for _, w := range checkers {
		if slices.Contains(all, w.Id) || (slices.Contains(owners, w.Owner) && !j.Spec.Verify.SameOwner) {
			t.Fatalf("%s of %s has a part in %s already", w.Id, w.Owner, run.Check.Id)
		}
		all, owners = append(all, w.Id), append(owners, w.Owner)
	}
}

// Where everybody wants more than there is, nobody has more than one attempt
// more than another, whatever they had running before.
func TestFairShares(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		accounts := rapid.IntRange(2, 5).Draw(t, "accounts")
		usage, total := map[string]int64{}, int64(0)
		var work []state.Work
		for i := range accounts {
			account := fmt.Sprintf("account%d", i)
			usage[account] = int64(rapid.IntRange(0, 6).Draw(t, "running"))
			total += usage[account]
			for k := range rapid.IntRange(1, 3).Draw(t, "jobs") {
				work = append(work, tasks(job(fmt.Sprintf("j%d%d", i, k), func(j *musterpb.Job) {
					j.Account, j.Spec.Priority = account, int32(rapid.IntRange(-100, 100).Draw(t, "priority"))
				}), 200))
			}
		}
		var workers []*Worker
		for i := range rapid.IntRange(6, 12).Draw(t, "workers") {
			workers = append(workers, worker(fmt.Sprintf("w%d", i)))
		}
		placements := Plan(&Input{Workers: workers, Work: work, Usage: usage, Max: 1000})
		if len(placements) != 8*len(workers) {
			t.Fatalf("%d placements on %d workers with 8 places", len(placements), len(workers))
		}
		least, most := int64(1<<60), int64(0)
		for _, n := range usage {
			least, most = min(least, n), max(most, n)
		}
		if most-least > 1 && most > 6 {
			t.Fatalf("shares are %v", usage)
		}
	})
}

// BenchmarkPlan plans 1,000 tasks of 10 jobs onto 1,000 workers.
func BenchmarkPlan(b *testing.B) {
	for _, gpus := range []uint32{0, 1} {
		b.Run(fmt.Sprintf("gpus=%d", gpus), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				in := &Input{Usage: map[string]int64{}, Max: 1000}
				for i := range 1000 {
					in.Workers = append(in.Workers, worker(fmt.Sprintf("w%d", i), gpu(0, 24*gb, "Ada"), gpu(1, 24*gb, "Ada")))
				}
				for i := range 10 {
					in.Work = append(in.Work, tasks(job(fmt.Sprintf("j%d", i), needs(&musterpb.Resources{Gpus: gpus})), 100))
				}
				b.StartTimer()
				if n := len(Plan(in)); n != 1000 {
					b.Fatalf("%d placements", n)
				}
			}
		})
	}
}
