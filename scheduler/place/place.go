// Package place decides, purely, which worker gets which attempt: it filters
// by constraints, ranks what is left, packs devices, and gives accounts their
// fair share. The same filters, asked for their reasons, are the answer to
// "why does my job wait?".
package place

import (
	"cmp"
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
	// CacheVersion changes whenever Cached may answer otherwise; 0 is not known.
	CacheVersion uint64

	// What live attempts leave free. Take subtracts from it.
	FreeMilliCPUs   int64
	FreeMemoryBytes int64
	FreeDiskBytes   int64
	UsedDevices     map[string]bool

	kept bool // for an attempt that needs more of it than is free
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

// Input is what one round of planning looks at.
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

// Plan decides placements with an engine that is made for it. It takes the
// resources of each from in.Workers and adds to in.Usage.
func Plan(in *Input) []Placement {
	e := NewEngine(in.Seed)
	for _, w := range in.Workers {
		e.SetWorker(w)
	}
	for _, w := range in.Work {
		e.SetUsage(w.Job.Account, in.Usage[w.Job.Account])
		e.SetJob(w)
	}
	plan := e.Plan(in.NowUnixMS, in.Max)
	for _, p := range plan {
		in.Usage[p.Job.Account] += state.Units(p.Job.Spec.Resources)
	}
	return plan
}

// Bounds of what decides where a job runs: the largest inputs, and only those
// that take longer to fetch than a worker is kept waiting for other reasons.
const (
	maxCacheable      = 16
	minCacheableBytes = 16 << 20
)

// cacheable are the digests of the image and of the largest inputs: those that
// take long to fetch.
func cacheable(spec *musterpb.JobSpec) []string {
	inputs := make([]*musterpb.Input, 0, len(spec.Inputs))
	for _, in := range spec.Inputs {
		if in.SizeBytes >= minCacheableBytes {
			inputs = append(inputs, in)
		}
	}
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
	slices.SortStableFunc(fit, smallerDevice)
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

// wasmClass is the class of a WebAssembly module's results: the same bits on
// every machine.
const wasmClass = "wasm"

// cpuClass is the class of results that no GPU had a part in. Libraries choose
// code by instruction set, and rounding follows from it.
func cpuClass(w *musterpb.Worker) string {
	return strings.TrimSuffix("cpu/"+w.Capacity.GetPlatform()+"/"+w.Capacity.GetCpuLevel(), "/")
}

// Class is the hardware class of an attempt: results of one class can be
// compared bit by bit.
func Class(spec *musterpb.JobSpec, w *musterpb.Worker, devices []*musterpb.Device) string {
	switch {
	case spec.Image.GetKind() == musterpb.ImageKind_IMAGE_KIND_WASM:
		return wasmClass
	case len(devices) == 0:
		return cpuClass(w)
	}
	return deviceClass(devices[0])
}

// deviceClass is the architecture and the driver's branch.
func deviceClass(d *musterpb.Device) string {
	branch, _, _ := strings.Cut(d.Driver, ".")
	return d.Architecture + "/" + branch
}
