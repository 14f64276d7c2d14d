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

	takes int // how often Take was called
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
	w.takes++
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

// Plan decides placements. It takes the resources of each from in.Workers, uses
// up in.Work, and adds to in.Usage.
//
// The account that uses least goes first, one attempt at a time (max-min
// fairness); within an account the jobs of highest priority, oldest first;
// within a job its checks before its tasks, since they let owners be paid.
func Plan(in *Input) []Placement {
	plan := &planner{in: in, byJob: map[string][]candidate{}}
	queues := queuesByAccount(in.Work)
	var out []Placement
	for len(out) < in.Max {
		account := leastUsed(queues, in.Usage)
		if account == "" {
			break
		}
		p, ok := plan.next(queues[account])
		if !ok {
			delete(queues, account)
			continue
		}
		in.Usage[account] += state.Units(p.Job.Spec.Resources)
		out = append(out, p)
	}
	return out
}

// planner is one run of Plan.
type planner struct {
	in    *Input
	byJob map[string][]candidate // made when a job has its first turn
}

// candidate is a worker that suits a job, when it is free. Most workers are
// looked at for every task and taken for few, so what follows from their free
// resources is kept until they are taken.
type candidate struct {
	*Worker
	score      // for a task that avoids nobody
	busy  bool // can't take an attempt of the job now
	asOf  int  // Worker.takes that score and busy are as of; -1 is never
}

// refresh brings busy and score up to date.
func (c *candidate) refresh(nowUnixMS int64, job *musterpb.Job) {
	if c.asOf == c.takes {
		return
	}
	c.asOf = c.takes
	if c.busy = rejectNow(nowUnixMS, job.Spec, "", c.Worker) != nil; c.busy {
		return
	}
	// Best fit: the worker that this leaves fullest. GPUs are what is scarce.
	if n := job.Spec.Resources.GetGpus(); n > 0 {
		c.spare = int64(len(suitable(&musterpb.Resources{}, c.Worker, true))) - int64(n)
	} else {
		c.spare = c.FreeMilliCPUs
	}
}

func (plan *planner) candidates(job *musterpb.Job) []candidate {
	list, ok := plan.byJob[job.Id]
	if !ok {
		digests := cacheable(job.Spec)
		for _, w := range plan.in.Workers {
			if rejectJob(job, w) == nil {
				list = append(list, candidate{Worker: w, asOf: -1, score: score{
					unsure: unsure(w), price: w.PriceMicroUsdPerHour, missing: missing(digests, w), id: w.Id,
				}})
			}
		}
		markAlone(job.Spec, list)
		plan.byJob[job.Id] = list
	}
	return list
}

// markAlone marks the candidates whose results nobody else here could check: no
// other owner has a machine of their class. They are taken last, since their
// results stay provisional until somebody comes.
func markAlone(spec *musterpb.JobSpec, list []candidate) {
	if spec.Verify.GetSameOwner() {
		return
	}
	owners := map[string]map[string]bool{}
	classes := make([]string, len(list))
	for i, c := range list {
		classes[i] = Class(spec, c.Worker.Worker, pickDevices(spec, c.Worker, "", false))
		if owners[classes[i]] == nil {
			owners[classes[i]] = map[string]bool{}
		}
		owners[classes[i]][c.Owner] = true
	}
	for i := range list {
		if len(owners[classes[i]]) < 2 {
			list[i].alone = 1
		}
	}
}

// maxCacheable bounds how many inputs of a job decide where it runs.
const maxCacheable = 16

// cacheable are the digests of the image and of the largest inputs: those that
// take long to fetch.
func cacheable(spec *musterpb.JobSpec) []string {
	inputs := slices.Clone(spec.Inputs)
	slices.SortStableFunc(inputs, func(a, b *musterpb.Input) int { return cmp.Compare(b.SizeBytes, a.SizeBytes) })
	digests := []string{spec.Image.GetDigest()}
	for _, in := range inputs[:min(maxCacheable, len(inputs))] {
		digests = append(digests, in.Digest)
	}
	return digests
}

func missing(digests []string, w *Worker) (n int) {
	if w.Cached == nil {
		return len(digests)
	}
	for _, d := range digests {
		if !w.Cached(d) {
			n++
		}
	}
	return n
}

// unsure counts a worker without a history as one that failed 1 of 10.
func unsure(w *Worker) int64 { return int64((w.Failed*10 + 10) / (w.Finished + w.Failed + 10)) }

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
func (plan *planner) next(q *queue) (Placement, bool) {
	for len(q.work) > 0 {
		w := &q.work[0]
		for len(w.Checks) > 0 {
			run := &w.Checks[0]
			p, ok := plan.placeRun(w.Job, run)
			if run.Runs--; !ok || run.Runs == 0 {
				w.Checks = w.Checks[1:]
			}
			if ok {
				return p, true
			}
		}
		for task := nextTask(w); task != nil; task = nextTask(w) {
			if plan.awaitsOwner(w.Job, task) {
				continue
			}
			if p, ok := plan.placeTask(w.Job, task); ok {
				return p, true
			}
			// The tasks of a job want the same: where one finds no place, none does.
			w.Requeued, w.Next = nil, w.End
		}
		q.work = q.work[1:]
	}
	return Placement{}, false
}

// nextTask takes the next task of a job's work; nil is that there is none.
func nextTask(w *state.Work) *musterpb.Task {
	if len(w.Requeued) > 0 {
		task := w.Requeued[0]
		w.Requeued = w.Requeued[1:]
		return task
	}
	if w.Next == w.End {
		return nil
	}
	w.Next++
	return &musterpb.Task{Job: w.Job.Id, Number: w.Next - 1, State: musterpb.TaskState_TASK_STATE_QUEUED}
}

func (plan *planner) placeTask(job *musterpb.Job, task *musterpb.Task) (Placement, bool) {
	var best *Worker
	var bestScore score
	list := plan.candidates(job)
	for i := range list {
		c := &list[i]
		if c.refresh(plan.in.NowUnixMS, job); c.busy {
			continue
		}
		s := c.score
		if slices.Contains(task.AvoidOwners, c.Owner) {
			s.avoided = 1
		}
		if best == nil || s.better(&bestScore) {
			best, bestScore = c.Worker, s
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
func (plan *planner) awaitsOwner(job *musterpb.Job, task *musterpb.Task) bool {
	if task.Failures == 0 {
		return false
	}
	waits := false
	list := plan.candidates(job)
	for i := range list {
		c := &list[i]
		if slices.Contains(task.AvoidOwners, c.Owner) {
			continue
		}
		if c.refresh(plan.in.NowUnixMS, job); !c.busy {
			return false
		}
		waits = true
	}
	return waits
}

// placeRun draws a checker among those that could run now, by a lottery that
// follows from the seed of the target's batch. Owners who tried before and did
// not deliver draw only where nobody else does.
func (plan *planner) placeRun(job *musterpb.Job, run *state.WantedRun) (Placement, bool) {
	if run.Unpaid != "" {
		return Placement{}, false
	}
	var seed []byte
	if plan.in.Seed != nil {
		seed = plan.in.Seed(run.Parties[0].Batch)
	}
	var best *Worker
	var bestTried bool
	var bestLot lot
	for _, c := range plan.candidates(job) {
		w := c.Worker
		if rejectAttempt(plan.in.NowUnixMS, job, run, w) != nil {
			continue
		}
		tried, drawn := slices.Contains(run.Tried, w.Owner), checkerLot(seed, run.Check.Id, w)
		if best == nil || (bestTried && !tried) || (bestTried == tried && drawn.less(bestLot)) {
			best, bestTried, bestLot = w, tried, drawn
		}
	}
	if best == nil {
		return Placement{}, false
	}
	p := take(job, run.Parties[0].Task, run, best)
	run.Parties = append(slices.Clip(run.Parties), &musterpb.Attempt{Worker: best.Id, Owner: best.Owner})
	if slices.ContainsFunc(run.Parties[:len(run.Parties)-1], func(a *musterpb.Attempt) bool { return a.Owner == best.Owner }) {
		p.Relaxed = "checked by another worker of the same owner, as verify.same_owner allows"
	}
	return p, true
}

// lot is a worker's number in the lottery for a check. Owners are drawn first,
// and a worker of that owner next: machines are cheap to register, and would
// otherwise be as many tickets.
type lot struct{ owner, worker uint64 }

func (l lot) less(o lot) bool {
	return cmp.Or(cmp.Compare(l.owner, o.owner), cmp.Compare(l.worker, o.worker)) < 0
}

func checkerLot(seed []byte, check string, w *Worker) lot {
	draw := func(what, name string) uint64 {
		mac := hmac.New(sha256.New, seed)
		mac.Write([]byte("muster checker v1\n" + check + "\n" + what + "\n" + name))
		return binary.BigEndian.Uint64(mac.Sum(nil))
	}
	return lot{draw("owner", w.Owner), draw("worker", w.Id)}
}

// take books a worker that was not rejected.
func take(job *musterpb.Job, task uint32, run *state.WantedRun, w *Worker) Placement {
	var check *musterpb.Check
	class := ""
	if run != nil {
		check, class = run.Check, run.Class
	}
	devices := pickDevices(job.Spec, w, class, true)
	uuids := make([]string, len(devices))
	for i, d := range devices {
		uuids[i] = d.Uuid
	}
	w.Take(job.Spec.Resources, uuids)
	return Placement{Job: job, Task: task, Check: check, Worker: w.Id, Devices: uuids, Class: Class(job.Spec, w.Worker, devices)}
}

// pickDevices takes the smallest devices that will do, so that the big ones
// stay for jobs that need them: all of one class, and of the given one unless
// that is empty. Nil is that there are not enough; a job without GPUs gets an
// empty list.
func pickDevices(spec *musterpb.JobSpec, w *Worker, class string, free bool) []*musterpb.Device {
	n := int(spec.Resources.GetGpus())
	if n == 0 {
		return []*musterpb.Device{}
	}
	if spec.Image.GetKind() == musterpb.ImageKind_IMAGE_KIND_WASM {
		class = "" // the same bits on every machine
	}
	fit := suitable(spec.Resources, w, free)
	slices.SortStableFunc(fit, func(a, b *musterpb.Device) int {
		return cmp.Or(cmp.Compare(a.MemoryBytes, b.MemoryBytes), cmp.Compare(a.Index, b.Index))
	})
	for i, first := range fit {
		of := deviceClass(first)
		if class != "" && of != class {
			continue
		}
		group := make([]*musterpb.Device, 0, n)
		for _, d := range fit[i:] {
			if len(group) < n && deviceClass(d) == of {
				group = append(group, d)
			}
		}
		if len(group) == n {
			return group
		}
	}
	return nil
}

// score orders workers for a task; smaller is better, field by field.
type score struct {
	alone   int   // nobody else could check the result
	avoided int   // the owner failed this task before
	unsure  int64 // how unreliable, in steps of 10%
	price   int64
	missing int   // of image and inputs, not in the worker's cache
	spare   int64 // what is left over of it: GPUs, or milli-CPUs
	id      string
}

func (s *score) better(o *score) bool {
	switch {
	case s.avoided != o.avoided:
		return s.avoided < o.avoided
	case s.alone != o.alone:
		return s.alone < o.alone
	case s.unsure != o.unsure:
		return s.unsure < o.unsure
	case s.price != o.price:
		return s.price < o.price
	case s.missing != o.missing:
		return s.missing < o.missing
	case s.spare != o.spare:
		return s.spare < o.spare
	}
	return s.id < o.id
}

// Class is the hardware class of an attempt: results of one class can be
// compared bit by bit.
func Class(spec *musterpb.JobSpec, w *musterpb.Worker, devices []*musterpb.Device) string {
	if spec.Image.GetKind() == musterpb.ImageKind_IMAGE_KIND_WASM {
		return "wasm" // the same bits on every machine
	}
	if len(devices) == 0 {
		// Libraries choose code by instruction set, and rounding follows from it.
		return strings.TrimSuffix("cpu/"+w.Capacity.GetPlatform()+"/"+w.Capacity.GetCpuLevel(), "/")
	}
	return deviceClass(devices[0])
}

// deviceClass is the architecture and the driver's branch.
func deviceClass(d *musterpb.Device) string {
	branch, _, _ := strings.Cut(d.Driver, ".")
	return d.Architecture + "/" + branch
}
