package place

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// slow plans by looking at every worker for every decision: what the engine's
// indexes have to come to.
type slow struct {
	now     int64
	workers []*Worker // by ID
	work    []*slowWork
	usage   map[string]int64
	seed    func(uint64) []byte
	counts  map[string]map[string]int64 // by job: attempts by worker, or by owner
}

type slowWork struct{ state.Work }

func (s *slow) plan(most int) (out []Placement) {
	slices.SortStableFunc(s.work, func(a, b *slowWork) int {
		return cmp.Or(cmp.Compare(b.Job.Spec.Priority, a.Job.Spec.Priority), cmp.Compare(a.Job.Sequence, b.Job.Sequence))
	})
	done := map[string]bool{}
	for len(out) < most {
		account := ""
		for _, w := range s.work {
			if a := w.Job.Account; !done[a] && (account == "" || s.usage[a] < s.usage[account] || s.usage[a] == s.usage[account] && a < account) {
				account = a
			}
		}
		if account == "" {
			return out
		}
		p, ok := s.next(account)
		if !ok {
			done[account] = true
			continue
		}
		s.usage[account] += state.Units(p.Job.Spec.Resources)
		out = append(out, p)
	}
	return out
}

func (s *slow) next(account string) (Placement, bool) {
	for _, w := range s.work {
		if w.Job.Account != account {
			continue
		}
		for i := range w.Checks {
			if run := &w.Checks[i]; run.Runs > 0 && run.Unpaid == "" {
				if p, ok := s.check(w.Job, run); ok {
					return p, true
				}
			}
		}
		for i, task := range w.Requeued {
			if p, ok := s.task(w.Job, task); ok {
				w.Requeued = slices.Delete(slices.Clone(w.Requeued), i, i+1)
				return p, true
			}
		}
		if w.Next < w.End {
			if p, ok := s.task(w.Job, &musterpb.Task{Number: w.Next}); ok {
				w.Next++
				return p, true
			}
		}
	}
	return Placement{}, false
}

// score is smaller for better workers, number by number.
func (s *slow) score(j *musterpb.Job, task *musterpb.Task, w *Worker) []int64 {
	flag := func(b bool) int64 {
		if b {
			return 1
		}
		return 0
	}
	place := j.Spec.Placement
	affinity, spread := int64(0), int64(0)
	for _, a := range place.GetAffinities() {
		affinity += int64(a.Weight) * flag(map[string]bool{
			"owner": a.Value == w.Owner, "worker": a.Value == w.Id, "platform": a.Value == w.Capacity.Platform,
			"gpu": slices.ContainsFunc(w.Capacity.Devices, func(d *musterpb.Device) bool { return suits(j.Spec.Resources, d) && isModel(d, a.Value) }),
		}[a.Attribute])
	}
	switch place.GetSpread() {
	case musterpb.Spread_SPREAD_OWNER:
		spread = s.counts[j.Id][w.Owner]
	case musterpb.Spread_SPREAD_WORKER:
		spread = s.counts[j.Id][w.Id]
	}
	spare := w.FreeMilliCPUs
	if n := j.Spec.Resources.Gpus; n > 0 {
		spare = int64(len(suitable(&musterpb.Resources{}, w, true))) - int64(n)
	}
	return []int64{flag(slices.Contains(task.AvoidOwners, w.Owner)), flag(s.alone(j, w)), -affinity, spread, unsure(w), w.PriceMicroUsdPerHour,
		int64(missing(cacheable(j.Spec), w)), spare}
}

func (s *slow) alone(j *musterpb.Job, w *Worker) bool {
	class := Class(j.Spec, w.Worker, pickDevices(j.Spec, w, "", false))
	return !j.Spec.Verify.SameOwner && !slices.ContainsFunc(s.workers, func(o *Worker) bool {
		return o.Owner != w.Owner && rejectJob(j, o) == nil && Class(j.Spec, o.Worker, pickDevices(j.Spec, o, "", false)) == class
	})
}

func (s *slow) task(j *musterpb.Job, task *musterpb.Task) (Placement, bool) {
	var best *Worker
	var bestScore []int64
	others, othersFree := false, false
	for _, w := range s.workers {
		if rejectJob(j, w) != nil {
			continue
		}
		free := rejectNow(s.now, j.Spec, "", w) == nil
		if !slices.Contains(task.AvoidOwners, w.Owner) {
			others, othersFree = true, othersFree || free
		}
		if !free {
			continue
		}
		if score := s.score(j, task, w); best == nil || slices.Compare(score, bestScore) < 0 {
			best, bestScore = w, score
		}
	}
	if best == nil || (task.Failures > 0 && others && !othersFree) {
		return Placement{}, false
	}
	if spreads(j) {
		if s.counts[j.Id] == nil {
			s.counts[j.Id] = map[string]int64{}
		}
		s.counts[j.Id][best.Id]++
		s.counts[j.Id][best.Owner]++
	}
	return s.take(j, task.Number, nil, best), true
}

func (s *slow) check(j *musterpb.Job, run *state.WantedRun) (Placement, bool) {
	machines, free := map[string][]*Worker{}, map[string]bool{}
	usable := map[bool]int{}
	alone := *run
	alone.Parties = nil
	for _, w := range s.workers {
		if rejectJob(j, w) != nil || rejectChecker(j.Spec, &alone, w) != nil {
			continue
		}
		machines[w.Owner] = append(machines[w.Owner], w)
		if rejectAttempt(s.now, j, run, w) == nil {
			free[w.Id] = true
			usable[slices.Contains(run.Tried, w.Owner)]++
		}
	}
	if len(free) == 0 {
		return Placement{}, false
	}
	owners := slices.Sorted(maps.Keys(machines))
	lots := newLottery(s.seed(run.Parties[0].Batch), run.Check.Id)
	owner := owners[lots.first(drawOwner, len(owners), ownerDraws, func(i int) bool {
		return slices.ContainsFunc(machines[owners[i]], func(w *Worker) bool {
			return free[w.Id] && (usable[false] == 0 || !slices.Contains(run.Tried, w.Owner))
		})
	})]
	list := machines[owner]
	w := list[lots.first(drawWorker, len(list), workerDraws, func(i int) bool { return free[list[i].Id] })]
	p := s.take(j, run.Parties[0].Task, run, w)
	if slices.ContainsFunc(run.Parties, func(a *musterpb.Attempt) bool { return a.Owner == w.Owner }) {
		p.Relaxed = "relaxed"
	}
	run.Runs--
	run.Parties = append(slices.Clip(run.Parties), &musterpb.Attempt{Worker: w.Id, Owner: w.Owner})
	return p, true
}

func (s *slow) take(j *musterpb.Job, task uint32, run *state.WantedRun, w *Worker) Placement {
	p := Placement{Job: j, Task: task, Worker: w.Id}
	class := ""
	if run != nil {
		p.Check, class = run.Check, run.Class
	}
	devices := pickDevices(j.Spec, w, class, true)
	for _, d := range devices {
		p.Devices = append(p.Devices, d.Uuid)
	}
	p.Class = Class(j.Spec, w.Worker, devices)
	w.Take(j.Spec.Resources, p.Devices)
	return p
}

// world is the truth that an engine follows.
type world struct {
	t        *rapid.T
	e        *Engine
	now      int64
	workers  map[string]*Worker
	work     map[string]state.Work
	usage    map[string]int64
	attempts map[string]Placement // that run
	placed   int
}

func seedOf(epoch uint64) []byte { return fmt.Append(nil, "seed", epoch) }

func copyWorker(w *Worker) *Worker {
	c := *w
	c.UsedDevices = maps.Clone(w.UsedDevices)
	return &c
}

func copyWork(w state.Work) state.Work {
	w.Checks = slices.Clone(w.Checks)
	return w
}

func (w *world) setWorker(x *Worker) {
	w.workers[x.Id] = x
	w.e.SetWorker(copyWorker(x))
}

func (w *world) setJob(x state.Work) {
	old := w.work[x.Job.Id]
	w.work[x.Job.Id] = x
	if w.draw(1, "in parts") == 0 || !grewBehind(old.Checks, x.Checks) || !w.e.SetTasks(x) {
		w.e.SetJob(copyWork(x))
	} else {
		for _, run := range old.Checks {
			if !slices.ContainsFunc(x.Checks, func(n state.WantedRun) bool { return n.Check.Id == run.Check.Id }) {
				w.e.RemoveCheck(x.Job.Id, run.Check.Id)
			}
		}
		for _, run := range x.Checks {
			w.e.SetCheck(x.Job, run)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(w.attempts)) {
		if p := w.attempts[id]; p.Job.Id == x.Job.Id && p.Check == nil {
			w.e.SetAttempt(p.Job, w.attempt(id, musterpb.AttemptState_ATTEMPT_STATE_RUNNING))
		}
	}
}

// grewBehind reports whether what is new in a list of checks is at its end.
func grewBehind(old, list []state.WantedRun) bool {
	at := 0
	for _, run := range list {
		i := slices.IndexFunc(old, func(o state.WantedRun) bool { return o.Check.Id == run.Check.Id })
		if i < 0 {
			i = len(old)
		}
		if i < at {
			return false
		}
		at = i
	}
	return true
}

func (w *world) attempt(id string, s musterpb.AttemptState) *musterpb.Attempt {
	p := w.attempts[id]
	return &musterpb.Attempt{Id: id, Worker: p.Worker, Owner: w.workers[p.Worker].Owner, State: s}
}

// change replaces a worker.
func (w *world) change(id string, f func(*Worker)) {
	x := copyWorker(w.workers[id])
	x.Worker = x.Worker.CloneVT()
	f(x)
	w.setWorker(x)
}

func (w *world) draw(most int, what string) int { return rapid.IntRange(0, most).Draw(w.t, what) }

func pickOf[V any](w *world, m map[string]V, what string) string {
	return rapid.SampledFrom(slices.Sorted(maps.Keys(m))).Draw(w.t, what)
}

func (w *world) anyWorker() *Worker {
	t := w.t
	id := fmt.Sprintf("w%d", len(w.workers))
	var devices []*musterpb.Device
	for d := range w.draw(3, "devices") {
		devices = append(devices, gpu(d, uint64(rapid.SampledFrom([]int{12, 24}).Draw(t, "VRAM"))*gb, rapid.SampledFrom([]string{"Ada", "Ampere"}).Draw(t, "architecture")))
	}
	x := worker(id, devices...)
	x.Owner = fmt.Sprintf("owner%d", w.draw(4, "owner"))
	x.PriceMicroUsdPerHour = int64(100_000 * w.draw(4, "price"))
	x.Capacity.MilliCpus = int64(1000 * (1 + w.draw(5, "CPUs")))
	x.FreeMilliCPUs = x.Capacity.MilliCpus
	x.Capacity.Platform = rapid.SampledFrom([]string{"linux/amd64", "linux/amd64", "linux/arm64"}).Draw(t, "platform")
	w.cache(x)
	return x
}

func (w *world) cache(x *Worker) {
	has := w.draw(1, "cached") == 1
	x.Cached, x.CacheVersion = func(string) bool { return has }, uint64(w.draw(1, "version known"))
	if x.CacheVersion > 0 && has {
		x.CacheVersion = 2
	}
}

func (w *world) anyJob() *musterpb.Job {
	t := w.t
	r := &musterpb.Resources{Gpus: uint32(w.draw(2, "GPUs")), MilliCpus: int64(500 * (1 + w.draw(2, "CPUs")))}
	return job(fmt.Sprintf("j%d", len(w.work)), needs(r), func(j *musterpb.Job) {
		j.Sequence = uint64(len(w.work))
		j.Account = fmt.Sprintf("account%d", w.draw(2, "account"))
		j.Spec.Priority = int32(w.draw(1, "priority"))
		j.Spec.MaxPriceMicroUsdPerHour = int64(100_000 * (1 + w.draw(3, "limit")))
		j.Spec.Verify.SameOwner = w.draw(3, "same owner") == 0
		if r.Gpus == 0 && w.draw(4, "wasm") == 0 {
			j.Spec.Image = &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_WASM, Digest: "image"}
		}
		if w.draw(1, "placement") == 0 {
			return
		}
		j.Spec.Placement = &musterpb.Placement{Spread: musterpb.Spread(w.draw(2, "spread"))}
		for range w.draw(2, "affinities") {
			a := rapid.SampledFrom([][2]string{{"owner", "owner0"}, {"owner", "owner1"}, {"worker", "w0"}, {"platform", "linux/arm64"}}).Draw(t, "affinity")
			j.Spec.Placement.Affinities = append(j.Spec.Placement.Affinities, &musterpb.Affinity{Attribute: a[0], Value: a[1], Weight: int32(w.draw(100, "weight") - 50)})
		}
	})
}

func (w *world) anyWork(j *musterpb.Job) state.Work {
	x := state.Work{Job: j, End: uint32(w.draw(6, "tasks"))}
	for i := range w.draw(2, "requeued") {
		task := &musterpb.Task{Job: j.Id, Number: uint32(100 + i), Failures: uint32(w.draw(1, "failures"))}
		for range w.draw(2, "avoid") {
			task.AvoidOwners = append(task.AvoidOwners, fmt.Sprintf("owner%d", w.draw(4, "avoided")))
		}
		x.Requeued = append(x.Requeued, task)
	}
	for c := range w.draw(2, "checks") {
		target := w.workers[pickOf(w, w.workers, "target")]
		class := rapid.SampledFrom([]string{"Ada/570", "Ampere/570", "cpu/linux/amd64", "wasm"}).Draw(w.t, "class")
		run := wanted(fmt.Sprintf("chk-%s-%d", j.Id, c), class, 1+w.draw(1, "runs"), target)
		if w.draw(2, "tried") == 0 {
			run.Tried = append(run.Tried, fmt.Sprintf("owner%d", w.draw(4, "who tried")))
		}
		x.Checks = append(x.Checks, run)
	}
	return x
}

// round plans in both ways, compares, and lets some of it happen.
func (w *world) round() {
	s := &slow{now: w.now, usage: maps.Clone(w.usage), seed: seedOf, counts: map[string]map[string]int64{}}
	for _, id := range slices.SortedFunc(maps.Keys(w.workers), func(a, b string) int {
		return cmp.Or(cmp.Compare(rankOf(a), rankOf(b)), cmp.Compare(a, b))
	}) {
		s.workers = append(s.workers, copyWorker(w.workers[id]))
	}
	slices.SortFunc(s.workers, func(a, b *Worker) int { return cmp.Compare(a.Id, b.Id) })
	for _, id := range slices.Sorted(maps.Keys(w.work)) {
		s.work = append(s.work, &slowWork{Work: copyWork(w.work[id])})
	}
	for id, p := range w.attempts {
		if p.Check == nil && spreads(p.Job) {
			if s.counts[p.Job.Id] == nil {
				s.counts[p.Job.Id] = map[string]int64{}
			}
			a := w.attempt(id, 0)
			s.counts[p.Job.Id][a.Worker]++
			s.counts[p.Job.Id][a.Owner]++
		}
	}
	most := 1 + w.draw(8, "at most")
	want, got := s.plan(most), w.e.Plan(w.now, most)
	if text(got) != text(want) {
		w.t.Fatalf("planned %s\n   want %s", text(got), text(want))
	}
	for i, p := range got {
		if p.Class != want[i].Class || (p.Relaxed == "") != (want[i].Relaxed == "") {
			w.t.Fatalf("planned %+v, want %+v", p, want[i])
		}
	}
	refused := false
	for _, p := range got {
		refused = !w.settle(p) || refused
	}
	if refused || w.draw(1, "tell") == 0 {
		w.tellAll()
	}
}

// settle lets the cluster take a decision, or refuse it.
func (w *world) settle(p Placement) (accepted bool) {
	x := w.work[p.Job.Id]
	if accepted = w.draw(9, "accepted") > 0; accepted {
		w.placed++
		w.attempts[fmt.Sprintf("att%04d", w.placed)] = p
		w.workers[p.Worker].Take(p.Job.Spec.Resources, p.Devices)
		w.usage[p.Job.Account] += state.Units(p.Job.Spec.Resources)
		switch {
		case p.Check != nil:
			i := slices.IndexFunc(x.Checks, func(r state.WantedRun) bool { return r.Check.Id == p.Check.Id })
			x.Checks = slices.Clone(x.Checks)
			if run := &x.Checks[i]; run.Runs > 1 {
				run.Runs--
				run.Parties = append(slices.Clip(run.Parties), &musterpb.Attempt{Worker: p.Worker, Owner: w.workers[p.Worker].Owner})
			} else {
				x.Checks = slices.Delete(x.Checks, i, i+1)
			}
		case p.Task >= 100:
			x.Requeued = slices.DeleteFunc(slices.Clone(x.Requeued), func(t *musterpb.Task) bool { return t.Number == p.Task })
		default:
			x.Next++
		}
		w.work[p.Job.Id] = x
	}
	return accepted
}

// tellAll tells the engine how everything is.
func (w *world) tellAll() {
	for _, id := range slices.Sorted(maps.Keys(w.workers)) {
		w.setWorker(w.workers[id])
	}
	for _, id := range slices.Sorted(maps.Keys(w.work)) {
		w.setJob(w.work[id])
	}
	for i := range 3 {
		a := fmt.Sprintf("account%d", i)
		w.e.SetUsage(a, w.usage[a])
	}
}

func (w *world) end(id string) {
	p := w.attempts[id]
	x := copyWorker(w.workers[p.Worker])
	x.FreeMilliCPUs += p.Job.Spec.Resources.MilliCpus
	x.FreeMemoryBytes += p.Job.Spec.Resources.MemoryBytes
	x.FreeDiskBytes += p.Job.Spec.Resources.DiskBytes
	for _, d := range p.Devices {
		delete(x.UsedDevices, d)
	}
	w.setWorker(x)
	if p.Check == nil {
		w.e.SetAttempt(p.Job, w.attempt(id, musterpb.AttemptState_ATTEMPT_STATE_COMMITTED))
	}
	delete(w.attempts, id)
	w.setJob(w.work[p.Job.Id]) // every end of an attempt changes its job
	w.usage[p.Job.Account] -= state.Units(p.Job.Spec.Resources)
	w.e.SetUsage(p.Job.Account, w.usage[p.Job.Account])
}

// Whatever happened before, the engine decides what one would that looks at
// everything anew.
func TestEngineMatchesTheSlowWay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := &world{t: t, e: NewEngine(seedOf), now: 1000, workers: map[string]*Worker{}, work: map[string]state.Work{}, usage: map[string]int64{}, attempts: map[string]Placement{}}
		w.e.patience = 1 << 60 // the slow way keeps no machine for anybody
		w.e.scanned, w.e.narrow = 2*w.draw(2, "scanned"), 2*w.draw(2, "narrow")
		for range 1 + w.draw(5, "workers") {
			w.setWorker(w.anyWorker())
		}
		some := func(what string) string { return pickOf(w, w.workers, what) }
		t.Repeat(map[string]func(*rapid.T){
			"plan":  func(*rapid.T) { w.round() },
			"plan2": func(*rapid.T) { w.round() },
			"plan3": func(*rapid.T) { w.round() },
			"join": func(*rapid.T) {
				if len(w.workers) < 16 {
					w.setWorker(w.anyWorker())
				}
			},
			"submit": func(*rapid.T) {
				if len(w.work) < 8 {
					w.setJob(w.anyWork(w.anyJob()))
				}
			},
			"more": func(*rapid.T) {
				if len(w.work) > 0 {
					w.setJob(w.anyWork(w.work[pickOf(w, w.work, "job")].Job))
				}
			},
			"fund": func(*rapid.T) {
				if len(w.work) > 0 {
					x := w.work[pickOf(w, w.work, "job")]
					x.Job = x.Job.CloneVT()
					w.setJob(x)
				}
			},
			"end": func(*rapid.T) {
				if len(w.attempts) > 0 {
					w.end(pickOf(w, w.attempts, "attempt"))
				}
			},
			"end2": func(*rapid.T) {
				if len(w.attempts) > 0 {
					w.end(pickOf(w, w.attempts, "attempt"))
				}
			},
			"wait":    func(*rapid.T) { w.now += int64(w.draw(2000, "ms")) },
			"tell":    func(*rapid.T) { w.tellAll() },
			"drop":    func(*rapid.T) { w.dropIndexes() },
			"rename":  func(*rapid.T) { w.e.rename() },
			"connect": func(*rapid.T) { w.change(some("worker"), func(x *Worker) { x.Connected = !x.Connected }) },
			"drain":   func(*rapid.T) { w.change(some("worker"), func(x *Worker) { x.Draining = !x.Draining }) },
			"rest":    func(*rapid.T) { w.change(some("worker"), func(x *Worker) { x.BackoffUntilUnixMs = w.now + 1000 }) },
			"price": func(*rapid.T) {
				w.change(some("worker"), func(x *Worker) { x.PriceMicroUsdPerHour = int64(100_000 * w.draw(4, "price")) })
			},
			"cache": func(*rapid.T) { w.change(some("worker"), w.cache) },
			"fail":  func(*rapid.T) { w.change(some("worker"), func(x *Worker) { x.Failed += 3 }) },
			"sick": func(*rapid.T) {
				w.change(some("worker"), func(x *Worker) {
					if len(x.Capacity.Devices) > 0 {
						x.Capacity.Devices[0].Unhealthy = strings.Repeat("x", w.draw(1, "sick"))
					}
				})
			},
			"leave": func(*rapid.T) {
				id := some("worker")
				if len(w.workers) > 1 && !slices.ContainsFunc(slices.Collect(maps.Values(w.attempts)), func(p Placement) bool { return p.Worker == id }) {
					// Gone and back at once: its place is another one now.
					x := w.workers[id]
					w.e.RemoveWorker(id)
					w.setWorker(x)
				}
			},
		})
	})
}

// dropIndexes plays the limit of memory.
func (w *world) dropIndexes() {
	w.e.tick++
	w.e.dropOldest()
}
