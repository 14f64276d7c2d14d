// Package place decides, purely, which worker gets which attempt: it filters
// by constraints, ranks what is left, packs devices, and gives accounts their
// fair share. The same filters, asked for their reasons, are the answer to
// "why does my job wait?".
package place

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"strings"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// Worker is a worker as the leader sees it now.
type Worker struct {
	*musterpb.Worker
	Connected bool
	// Cached reports whether the worker holds a blob or an image. May be nil.
	Cached func(digest string) bool

	// What live attempts leave free. Take subtracts from it.
	FreeMilliCPUs   int64
	FreeMemoryBytes int64
	FreeDiskBytes   int64
	UsedDevices     map[string]bool
}

// NewWorker is a worker with everything free.
func NewWorker(w *musterpb.Worker, connected bool, cached func(string) bool) *Worker {
	c := w.Capacity
	return &Worker{
		Worker: w, Connected: connected, Cached: cached, UsedDevices: map[string]bool{},
		FreeMilliCPUs: c.GetMilliCpus(), FreeMemoryBytes: c.GetMemoryBytes(), FreeDiskBytes: c.GetDiskBytes(),
	}
}

// Take subtracts what an attempt uses.
func (w *Worker) Take(r *musterpb.Resources, devices []string) {
	w.FreeMilliCPUs -= r.GetMilliCpus()
	w.FreeMemoryBytes -= r.GetMemoryBytes()
	w.FreeDiskBytes -= r.GetDiskBytes()
	for _, d := range devices {
		w.UsedDevices[d] = true
	}
}

// Placement is one decision.
type Placement struct {
	Job     *musterpb.Job
	Task    uint32
	Check   *musterpb.Check // nil for work
	Worker  string
	Devices []string
	Class   string
	Relaxed string
}

// Input is all that Plan looks at.
type Input struct {
	NowUnixMS int64
	Workers   []*Worker
	Work      []state.Work
	// Usage is what each account has running: units of attempts (see state.Units).
	Usage map[string]int64
	// Seed draws the checkers of a check, by the epoch of its target. May be nil.
	Seed func(epoch uint64) []byte
	// Max bounds the number of placements.
	Max int
}

// Plan decides placements. It takes the resources of each from in.Workers and
// adds to in.Usage.
//
// The account that uses least goes first, one attempt at a time (max-min
// fairness); within an account the jobs of highest priority, oldest first;
// within a job its checks before its tasks, since they let owners be paid.
func Plan(in *Input) []Placement {
	queues := queuesByAccount(in.Work)
	var out []Placement
	for len(out) < in.Max {
		account := leastUsed(queues, in.Usage)
		if account == "" {
			break
		}
		p, ok := next(in, queues[account])
		if !ok {
			delete(queues, account)
			continue
		}
		in.Usage[account] += state.Units(p.Job.Spec.Resources)
		out = append(out, p)
	}
	return out
}

// queue is the work of one account, best first; what was placed or can't be
// placed is cut off its front.
type queue struct{ work []state.Work }

func queuesByAccount(work []state.Work) map[string]*queue {
	queues := map[string]*queue{}
	for _, w := range work {
		q := queues[w.Job.Account]
		if q == nil {
			q = &queue{}
			queues[w.Job.Account] = q
		}
		q.work = append(q.work, w)
	}
	for _, q := range queues {
		slices.SortStableFunc(q.work, func(a, b state.Work) int {
			return cmp.Or(cmp.Compare(b.Job.Spec.Priority, a.Job.Spec.Priority), cmp.Compare(a.Job.Sequence, b.Job.Sequence))
		})
	}
	return queues
}

func leastUsed(queues map[string]*queue, usage map[string]int64) string {
	best := ""
	for account := range queues {
		if best == "" || usage[account] < usage[best] || (usage[account] == usage[best] && account < best) {
			best = account
		}
	}
	return best
}

// next places the best request of a queue that can be placed.
func next(in *Input, q *queue) (Placement, bool) {
	for len(q.work) > 0 {
		w := &q.work[0]
		for len(w.Checks) > 0 {
			run := &w.Checks[0]
			p, ok := placeRun(in, w.Job, run)
			if run.Runs--; !ok || run.Runs == 0 {
				w.Checks = w.Checks[1:]
			}
			if ok {
				return p, true
			}
		}
		for len(w.Tasks) > 0 {
			task := w.Tasks[0]
			w.Tasks = w.Tasks[1:]
			if awaitsOwner(in, w.Job, task) {
				continue
			}
			if p, ok := placeTask(in, w.Job, task); ok {
				return p, true
			}
			// The tasks of a job want the same: where one finds no place, none does.
			w.Tasks = nil
		}
		q.work = q.work[1:]
	}
	return Placement{}, false
}

func placeTask(in *Input, job *musterpb.Job, task *musterpb.Task) (Placement, bool) {
	var best *Worker
	var bestScore score
	for _, w := range in.Workers {
		if reject(in.NowUnixMS, job, nil, w) != nil {
			continue
		}
		if s := rank(job, task, w); best == nil || s.better(bestScore) {
			best, bestScore = w, s
		}
	}
	if best == nil {
		return Placement{}, false
	}
	return take(job, task.Number, nil, best), true
}

// awaitsOwner reports whether a task that failed should wait for another owner
// who is only busy. The same owner again would burn a retry, and could not show
// that the job is at fault: for that it has to fail in the same way elsewhere.
func awaitsOwner(in *Input, job *musterpb.Job, task *musterpb.Task) bool {
	if task.Failures == 0 {
		return false
	}
	busy := false
	for _, w := range in.Workers {
		if slices.Contains(task.AvoidOwners, w.Owner) {
			continue
		}
		if reject(in.NowUnixMS, job, nil, w) == nil {
			return false
		}
		busy = busy || rejectEver(job, nil, w) == nil
	}
	return busy
}

// placeRun draws a checker among those that could run now, by a lottery that
// follows from the seed of the target's batch. Owners who tried before and did
// not deliver draw only where nobody else does.
func placeRun(in *Input, job *musterpb.Job, run *state.WantedRun) (Placement, bool) {
	if run.Unpaid != "" {
		return Placement{}, false
	}
	var seed []byte
	if in.Seed != nil {
		seed = in.Seed(run.Parties[0].Batch)
	}
	var best *Worker
	var bestTried bool
	var bestLot uint64
	for _, w := range in.Workers {
		if reject(in.NowUnixMS, job, run, w) != nil {
			continue
		}
		tried, lot := slices.Contains(run.Tried, w.Owner), checkerLot(seed, run.Check.Id, w.Id)
		if best == nil || (bestTried && !tried) || (bestTried == tried && lot < bestLot) {
			best, bestTried, bestLot = w, tried, lot
		}
	}
	if best == nil {
		return Placement{}, false
	}
	p := take(job, run.Parties[0].Task, run.Check, best)
	run.Parties = append(slices.Clip(run.Parties), &musterpb.Attempt{Worker: best.Id, Owner: best.Owner})
	if slices.ContainsFunc(run.Parties[:len(run.Parties)-1], func(a *musterpb.Attempt) bool { return a.Owner == best.Owner }) {
		p.Relaxed = "checked by another worker of the same owner, as verify.same_owner allows"
	}
	return p, true
}

func checkerLot(seed []byte, check, worker string) uint64 {
	mac := hmac.New(sha256.New, seed)
	mac.Write([]byte("muster checker v1\n" + check + "\n" + worker))
	return binary.BigEndian.Uint64(mac.Sum(nil))
}

func take(job *musterpb.Job, task uint32, check *musterpb.Check, w *Worker) Placement {
	devices := pickDevices(job.Spec.Resources, w)
	uuids := make([]string, len(devices))
	for i, d := range devices {
		uuids[i] = d.Uuid
	}
	w.Take(job.Spec.Resources, uuids)
	return Placement{Job: job, Task: task, Check: check, Worker: w.Id, Devices: uuids, Class: Class(job.Spec, w.Worker, devices)}
}

// pickDevices takes the smallest devices that will do, so that the big ones
// stay for jobs that need them.
func pickDevices(r *musterpb.Resources, w *Worker) []*musterpb.Device {
	fit := suitable(r, w, true)
	slices.SortStableFunc(fit, func(a, b *musterpb.Device) int {
		return cmp.Or(cmp.Compare(a.MemoryBytes, b.MemoryBytes), cmp.Compare(a.Index, b.Index))
	})
	return fit[:r.GetGpus()]
}

// score orders workers for a task; smaller is better, field by field.
type score struct {
	avoided int   // the owner failed this task before
	unsure  int64 // how unreliable, in steps of 10%
	price   int64
	missing int // of image and inputs, not in the worker's cache
	spare   int64
	id      string
}

func (s score) better(o score) bool {
	return cmp.Or(
		cmp.Compare(s.avoided, o.avoided), cmp.Compare(s.unsure, o.unsure), cmp.Compare(s.price, o.price),
		cmp.Compare(s.missing, o.missing), cmp.Compare(s.spare, o.spare), cmp.Compare(s.id, o.id)) < 0
}

func rank(job *musterpb.Job, task *musterpb.Task, w *Worker) score {
	s := score{price: w.PriceMicroUsdPerHour, id: w.Id}
	if slices.Contains(task.AvoidOwners, w.Owner) {
		s.avoided = 1
	}
	// A worker without a history counts as one that failed 1 of 10.
	s.unsure = int64((w.Failed*10 + 10) / (w.Finished + w.Failed + 10))
	if w.Cached != nil {
		if !w.Cached(job.Spec.Image.GetDigest()) {
			s.missing++
		}
		for _, in := range job.Spec.Inputs {
			if !w.Cached(in.Digest) {
				s.missing++
			}
		}
	}
	// Best fit: the worker that this leaves fullest. GPUs are what is scarce.
	if n := job.Spec.Resources.GetGpus(); n > 0 {
		s.spare = int64(len(suitable(&musterpb.Resources{}, w, true))) - int64(n)
	} else {
		s.spare = w.FreeMilliCPUs
	}
	return s
}

// Class is the hardware class of an attempt: results of one class can be
// compared bit by bit.
func Class(spec *musterpb.JobSpec, w *musterpb.Worker, devices []*musterpb.Device) string {
	if spec.Image.GetKind() == musterpb.ImageKind_IMAGE_KIND_WASM {
		return "wasm" // the same bits on every machine
	}
	if len(devices) == 0 {
		return "cpu/" + w.Capacity.GetPlatform()
	}
	branch, _, _ := strings.Cut(devices[0].Driver, ".")
	return devices[0].Architecture + "/" + branch
}
