package place

import (
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

func prefers(spread musterpb.Spread, affinities ...*musterpb.Affinity) func(*musterpb.Job) {
	return func(j *musterpb.Job) {
		j.Spec.Placement = &musterpb.Placement{Spread: spread, Affinities: affinities}
	}
}

func affinity(attribute, value string, weight int32) *musterpb.Affinity {
	return &musterpb.Affinity{Attribute: attribute, Value: value, Weight: weight}
}

// Where a job would rather run decides, and never keeps it from running.
func TestPreferences(t *testing.T) {
	const none, byWorker, byOwner = musterpb.Spread_SPREAD_NONE, musterpb.Spread_SPREAD_WORKER, musterpb.Spread_SPREAD_OWNER
	small := func(id, owner string, places int64) *Worker { // places for a job of 1 CPU
		return with(worker(id), func(w *Worker) { w.Owner, w.FreeMilliCPUs = owner, 1000*places })
	}
	four := []*Worker{small("a", "x", 2), small("b", "x", 2), small("c", "y", 2), small("d", "z", 2)}
	dear := with(worker("dear", gpu(0, 24*gb, "Hopper")), func(w *Worker) { w.PriceMicroUsdPerHour = 400_000 })
	cheap := worker("cheap", gpu(0, 24*gb, "Ada"))
	oneGPU := needs(&musterpb.Resources{Gpus: 1})
	for name, c := range map[string]struct {
		workers []*Worker
		job     *musterpb.Job
		tasks   int
		want    string
	}{
		"packed":              {four, job("j1"), 5, "a a b b c"},
		"over workers":        {four, job("j1", prefers(byWorker)), 6, "a b c d a b"},
		"over owners":         {four, job("j1", prefers(byOwner)), 6, "a c d a c d"},
		"until they are full": {four, job("j1", prefers(byOwner)), 9, "a c d a c d b b"},
		"an owner":            {four, job("j1", prefers(none, affinity("owner", "y", 1))), 3, "c c a"},
		"not an owner":        {four, job("j1", prefers(none, affinity("owner", "x", -100))), 5, "c c d d a"},
		"a worker":            {four, job("j1", prefers(none, affinity("worker", "d", 5))), 3, "d d a"},
		"weights add up":      {four, job("j1", prefers(none, affinity("worker", "d", 5), affinity("owner", "z", -6), affinity("worker", "b", -2))), 8, "a a c c d d b b"},
		"then spread":         {four, job("j1", prefers(byWorker, affinity("owner", "x", 50))), 5, "a b a b c"},
		"a GPU, before price": {[]*Worker{cheap, dear}, job("j1", oneGPU, prefers(none, affinity("gpu", "hopper", 1))), 3, "dear cheap"},
		"a GPU of several": {[]*Worker{worker("w", gpu(0, 12*gb, "Ada"), gpu(1, 24*gb, "Hopper"))}, job("j1", oneGPU, prefers(none, affinity("gpu", "Hopper", 1))), 2,
			"w(gpu-1) w(gpu-0)"},
		"a platform": {[]*Worker{worker("a"), with(worker("b"), func(w *Worker) { w.Capacity.Platform = "linux/arm64" })},
			job("j1", prefers(none, affinity("platform", "linux/arm64", 1)), func(j *musterpb.Job) { j.Spec.Image.Platforms = []string{"linux/amd64", "linux/arm64/v8"} }), 1, "b"},
		"what nobody has": {[]*Worker{cheap}, job("j1", oneGPU, prefers(byOwner, affinity("gpu", "B200", 100), affinity("owner", "owner of cheap", -100))), 1, "cheap(gpu-0)"},
	} {
		t.Run(name, func(t *testing.T) {
			var workers []*Worker
			for _, w := range c.workers {
				workers = append(workers, copyWorker(w))
			}
			got := text(plan(workers, state.Work{Job: c.job, End: uint32(c.tasks)}))
			var places []string
			for _, p := range strings.Fields(got) {
				_, place, _ := strings.Cut(p, "→")
				if len(workers) > 1 {
					place, _, _ = strings.Cut(place, "(")
				}
				places = append(places, place)
			}
			if got := strings.Join(places, " "); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

// Attempts that ended make room in the count; those that began before this
// engine did are in it.
func TestSpreadCountsWhatRuns(t *testing.T) {
	e := NewEngine(nil)
	for _, id := range []string{"a", "b", "c"} {
		e.SetWorker(worker(id))
	}
	j := job("j1", prefers(musterpb.Spread_SPREAD_WORKER))
	attempt := func(worker string, s musterpb.AttemptState) *musterpb.Attempt {
		return &musterpb.Attempt{Id: "att-" + worker, Worker: worker, Owner: "owner of " + worker, State: s}
	}
	e.SetAttempt(j, attempt("a", musterpb.AttemptState_ATTEMPT_STATE_RUNNING))
	e.SetAttempt(j, attempt("b", musterpb.AttemptState_ATTEMPT_STATE_PLACED))
	e.SetAttempt(j, attempt("b", musterpb.AttemptState_ATTEMPT_STATE_RUNNING)) // counts once
	e.SetJob(state.Work{Job: j, End: 9})
	if got := text(e.Plan(0, 1)); got != "j1/0→c" {
		t.Errorf("got %s", got)
	}
	e.SetAttempt(j, &musterpb.Attempt{Id: "att-c", Worker: "c", Owner: "owner of c", State: musterpb.AttemptState_ATTEMPT_STATE_RUNNING})
	e.SetAttempt(j, attempt("b", musterpb.AttemptState_ATTEMPT_STATE_COMMITTED))
	e.SetTasks(state.Work{Job: j, Next: 1, End: 9})
	if got := text(e.Plan(0, 3)); got != "j1/1→b j1/2→b j1/3→c" { // of equals the fuller
		t.Errorf("got %s", got)
	}
	for _, w := range []string{"a", "b", "c"} {
		e.SetAttempt(j, attempt(w, musterpb.AttemptState_ATTEMPT_STATE_LOST))
	}
	e.RemoveJob(j.Id)
	if len(e.counts) != 0 {
		t.Errorf("the job is gone, and %d counts are kept", len(e.counts))
	}
}

// What many jobs and workers make the engine remember is bounded.
func TestEngineForgets(t *testing.T) {
	e := NewEngine(nil)
	for i := range 3 * minNames {
		w := worker("w", gpu(0, 24*gb, "Ada"))
		w.Capacity.Devices[0].Name = fmt.Sprint("model ", i)
		w.Capacity.Devices[0].Architecture = fmt.Sprint("architecture ", i)
		e.SetWorker(w)
	}
	if n := len(e.names.kinds) + len(e.names.classOf); n > minNames {
		t.Errorf("%d kinds and classes are known, for one GPU", n)
	}
	for i := range 2 * maxShapes {
		j := job("j1", needs(&musterpb.Resources{MilliCpus: int64(i + 1)}))
		e.SetJob(state.Work{Job: j, End: 1})
		e.Plan(0, 1)
		e.RemoveJob(j.Id)
		e.SetUsage(j.Account, 0)
	}
	if len(e.byAge) > maxShapes+1 || len(e.shapes) != len(e.byAge) || len(e.accounts) != 0 || len(e.jobs) != 0 {
		t.Errorf("%d shapes, %d accounts and %d jobs are kept, none has work", len(e.byAge), len(e.accounts), len(e.jobs))
	}
	for i := range 100 {
		e.SetWorker(worker(fmt.Sprint("x", i)))
	}
	for i := range 100 {
		e.RemoveWorker(fmt.Sprint("x", i))
	}
	if len(e.machines) > 101 || len(e.names.owners) != 1 {
		t.Errorf("one worker is left, and there are %d places and %d owners", len(e.machines), len(e.names.owners))
	}
}

// With machines kept for large tasks, too, nothing is placed where it does not
// fit, or twice, and the engine comes to rest.
func TestKeepingIsSafe(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := NewEngine(nil)
		e.patience = 0
		truth := map[string]*Worker{}
		for i := range rapid.IntRange(1, 6).Draw(t, "workers") {
			var devices []*musterpb.Device
			for d := range rapid.IntRange(1, 4).Draw(t, "devices") {
				devices = append(devices, gpu(d, 24*gb, "Ada"))
			}
			w := worker(fmt.Sprintf("w%d", i), devices...)
			truth[w.Id] = w
			e.SetWorker(copyWorker(w))
		}
		jobs := map[string]*musterpb.Job{}
		for i := range rapid.IntRange(2, 4).Draw(t, "jobs") {
			r := &musterpb.Resources{Gpus: uint32(rapid.IntRange(1, 4).Draw(t, "GPUs")), MilliCpus: 100}
			j := job(fmt.Sprintf("j%d", i), needs(r), func(j *musterpb.Job) { j.Account = fmt.Sprintf("account%d", i%3) })
			jobs[j.Id] = j
			e.SetJob(state.Work{Job: j, End: 40})
		}
		var running []Placement
		seen := map[string]bool{}
		for now := int64(1000); now < 80_000; now += 1000 {
			for _, p := range e.Plan(now, 3) {
				key := fmt.Sprint(p.Job.Id, " ", p.Task)
				if seen[key] {
					t.Fatalf("task %s was placed twice", key)
				}
				seen[key] = true
				checkPlacement(t, p, truth[p.Worker])
				truth[p.Worker].Take(p.Job.Spec.Resources, p.Devices)
				running = append(running, p)
			}
			if len(e.kept) > max(len(truth)/keepShare, 1) {
				t.Fatalf("%d of %d machines are kept", len(e.kept), len(truth))
			}
			for range min(len(running), rapid.IntRange(0, 2).Draw(t, "ends")) {
				i := rapid.IntRange(0, len(running)-1).Draw(t, "which")
				p := running[i]
				running = append(running[:i], running[i+1:]...)
				w := truth[p.Worker]
				w.FreeMilliCPUs += 100
				w.FreeMemoryBytes += gb
				w.FreeDiskBytes += gb
				for _, d := range p.Devices {
					delete(w.UsedDevices, d)
				}
				e.SetWorker(copyWorker(w))
			}
		}
	})
}
