package place

import (
	"fmt"
	"slices"
	"testing"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// flood is a small network whose GPUs are always taken: an attempt that ended
// is followed by the next at once.
type flood struct {
	t       *testing.T
	e       *Engine
	workers map[string]*Worker
	running []Placement
	now     int64
}

func newFlood(t *testing.T, workers int) *flood {
	f := &flood{t: t, e: NewEngine(nil), workers: map[string]*Worker{}}
	for i := range workers {
		w := worker(fmt.Sprintf("w%02d", i), gpu(0, 24*gb, "Ada"), gpu(1, 24*gb, "Ada"), gpu(2, 24*gb, "Ada"), gpu(3, 24*gb, "Ada"))
		f.workers[w.Id] = w
		f.tell(w.Id)
	}
	return f
}

func (f *flood) tell(id string) { f.e.SetWorker(copyWorker(f.workers[id])) }

func (f *flood) submit(id, account string, gpus uint32, tasks uint32, change ...func(*musterpb.Job)) *musterpb.Job {
	j := job(id, append([]func(*musterpb.Job){needs(&musterpb.Resources{Gpus: gpus, MilliCpus: 100}), func(j *musterpb.Job) { j.Account = account }}, change...)...)
	f.e.SetJob(state.Work{Job: j, End: tasks})
	return j
}

// second lets the oldest attempts end, and plans; it returns what was placed.
func (f *flood) second(ends int) []Placement {
	f.now += 1000
	ended := f.running[:min(ends, len(f.running))]
	f.running = f.running[len(ended):]
	usage := map[string]int64{}
	for _, p := range ended {
		w := f.workers[p.Worker]
		w.FreeMilliCPUs += 100
		w.FreeMemoryBytes += gb
		w.FreeDiskBytes += gb
		for _, d := range p.Devices {
			delete(w.UsedDevices, d)
		}
		f.tell(p.Worker)
		usage[p.Job.Account] = 0
	}
	for _, p := range f.running {
		usage[p.Job.Account] += int64(len(p.Devices))
	}
	for a, n := range usage {
		f.e.SetUsage(a, n)
	}
	plan := f.e.Plan(f.now, 100)
	for _, p := range plan {
		f.workers[p.Worker].Take(p.Job.Spec.Resources, p.Devices)
	}
	f.running = append(f.running, plan...)
	return plan
}

// placedAfter is the second in which the first attempt of a job was placed.
func (f *flood) placedAfter(job string, seconds, ends int) int {
	for i := range seconds {
		if slices.ContainsFunc(f.second(ends), func(p Placement) bool { return p.Job.Id == job }) {
			return i
		}
	}
	return -1
}

// A task that needs all of a machine gets one, however many small ones there
// are, and soon after the time that machines need to empty.
func TestLargeTasksDoNotStarve(t *testing.T) {
	f := newFlood(t, 8)
	f.submit("small1", "small", 1, 1<<30)
	f.second(0)
	f.submit("big2", "big", 4, 2)
	if at := f.placedAfter("big2", 60, 1); at < keepAfterMS/1000 || at > keepAfterMS/1000+32+2 {
		t.Errorf("placed after %d seconds", at)
	}
	if at := f.placedAfter("big2", 100, 1); at < 0 {
		t.Error("its second task was never placed")
	}
	if len(f.e.kept) != 0 {
		t.Errorf("nothing large waits, and %d machines are kept", len(f.e.kept))
	}
}

func TestExplainEmptying(t *testing.T) {
	f := newFlood(t, 1)
	small := f.submit("small1", "small", 1, 1<<30)
	f.second(0)
	big := f.submit("big2", "big", 4, 1)
	for range keepAfterMS/1000 + 3 {
		f.second(1)
	}
	if got, want := f.e.Explain(f.now, small, nil).Summary, "1 worker: 1 is being emptied for a larger task"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	f.e.RemoveJob(big.Id)
	if got := len(f.second(1)); got < 2 {
		t.Errorf("the large job is gone, and %d small tasks were placed", got)
	}
}

// Who uses more than others has to wait for its turn, as with small tasks; and
// the newer job of an account for the older.
func TestKeepsNothingOutOfTurn(t *testing.T) {
	for name, of := range map[string]string{"another account": "big", "a newer job": "small"} {
		t.Run(name, func(t *testing.T) {
			f := newFlood(t, 8)
			if of == "big" {
				f.submit("large1", "big", 4, 6) // most of the network
				f.second(0)
			}
			f.submit("small2", "small", 1, 1<<30)
			f.second(0)
			f.submit("large3", of, 4, 2)
			for range 200 {
				plan := f.second(0) // as if small attempts alone ended
				if i := slices.IndexFunc(f.running, func(p Placement) bool { return p.Job.Id == "small2" }); i >= 0 {
					f.running[0], f.running[i] = f.running[i], f.running[0]
				}
				plan = append(plan, f.second(1)...)
				if slices.ContainsFunc(plan, func(p Placement) bool { return p.Job.Id == "large3" }) {
					t.Fatalf("placed at %d", f.now)
				}
			}
		})
	}
}

// An account whose jobs want machines that nobody has, each in another way, has
// nobody else's jobs wait.
func TestJobsThatFitNowhere(t *testing.T) {
	e := NewEngine(seedOf)
	const workers = 2000
	for i := range workers {
		e.SetWorker(worker(fmt.Sprintf("w%04d", i)))
	}
	for i := range 4 * maxAccountReviews / workers {
		j := job(fmt.Sprintf("odd%d", i), func(j *musterpb.Job) {
			j.Account = "a-odd"
			j.Spec.Resources.MemoryBytes = 1<<50 + int64(i)
		})
		e.SetJob(tasks(j, 1))
	}
	e.SetJob(tasks(job("plain", func(j *musterpb.Job) { j.Account = "plain" }), 4))
	if got := e.Plan(1, 100); len(got) != 4 {
		t.Errorf("placed %s in the first round", text(got))
	}
}
