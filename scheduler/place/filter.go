package place

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// reason is why a worker does not qualify, as it reads for one and for many,
// with a place for what the job asks for. The words are made when somebody
// wants to read them.
type reason struct {
	one, many string
	arg       func() string // nil where the words have no such place
}

func because(one, many string, arg func() string) *reason { return &reason{one, many, arg} }

// words is the reason for so many workers.
func (r *reason) words(n uint32) string {
	text := r.many
	if n == 1 {
		text = r.one
	}
	if r.arg == nil {
		return text
	}
	return fmt.Sprintf(text, r.arg())
}

// What is often the reason, and needs no words made for it.
var (
	notConnected = because("is not connected", "are not connected", nil)
	draining     = because("is draining", "are draining", nil)
	resting      = because("is paused after failures", "are paused after failures", nil)
	busy         = because("is busy", "are busy", nil)
	emptying     = because("is being emptied for a larger task", "are being emptied for larger tasks", nil)
	hasPart      = because("belongs to an owner whose results are being compared", "belong to owners whose results are being compared", nil)
)

// reject is the first constraint that a worker fails, nil when it can run the
// attempt now. run is nil for work. What can't change comes before what can,
// so that the reason given is the one that matters most.
func reject(nowUnixMS int64, job *musterpb.Job, run *state.WantedRun, w *Worker) *reason {
	if r := rejectJob(job, w); r != nil {
		return r
	}
	return rejectAttempt(nowUnixMS, job, run, w)
}

// rejectJob is what keeps a worker from every attempt of a job, whatever it is
// busy with.
func rejectJob(job *musterpb.Job, w *Worker) *reason {
	if !w.Connected {
		return notConnected
	}
	if w.Draining {
		return draining
	}
	if r := rejectImage(job.Spec, w); r != nil {
		return r
	}
	if r := rejectDevices(job.Spec.Resources, w); r != nil {
		return r
	}
	return rejectMachine(job.Spec, w)
}

// rejectAttempt is what keeps a worker that suits the job from one attempt of
// it now.
func rejectAttempt(nowUnixMS int64, job *musterpb.Job, run *state.WantedRun, w *Worker) *reason {
	if r := rejectChecker(job.Spec, run, w); r != nil {
		return r
	}
	class := ""
	if run != nil {
		class = run.Class
	}
	return rejectNow(nowUnixMS, job.Spec, class, w)
}

func rejectImage(spec *musterpb.JobSpec, w *Worker) *reason {
	runtime, need := "docker", "a Docker engine"
	if spec.Image.GetKind() == musterpb.ImageKind_IMAGE_KIND_WASM {
		runtime, need = "wasm", "the WebAssembly runtime"
	}
	if !slices.Contains(w.Capacity.GetRuntimes(), runtime) {
		return because("does not have %s", "do not have %s", func() string { return need })
	}
	platform := w.Capacity.GetPlatform()
	if runtime == "docker" && len(spec.Image.GetPlatforms()) > 0 && !slices.ContainsFunc(spec.Image.Platforms, func(p string) bool { return samePlatform(p, platform) }) {
		return because("runs "+strings.ReplaceAll(platform, "%", "%%")+", the image is for %s", "run "+strings.ReplaceAll(platform, "%", "%%")+", the image is for %s", func() string { return strings.Join(spec.Image.Platforms, ", ") })
	}
	return nil
}

// samePlatform ignores the variant ("linux/arm64/v8").
func samePlatform(image, worker string) bool {
	return image == worker || strings.HasPrefix(image, worker+"/")
}

// rejectDevices tries the constraints on GPUs one after the other.
func rejectDevices(r *musterpb.Resources, w *Worker) *reason {
	n := int(r.GetGpus())
	if n == 0 {
		return nil
	}
	if alike(r, w, false) >= n {
		return nil
	}
	only := &musterpb.Resources{Gpus: r.Gpus}
	if have := alike(only, w, false); have == 0 {
		return because("has no GPU", "have no GPU", nil)
	} else if have < n {
		return because("has fewer than %s GPUs of one kind", "have fewer than %s GPUs of one kind", func() string { return strconv.Itoa(n) })
	}
	if only.GpuModels = r.GpuModels; alike(only, w, false) < n {
		return because("has no %s", "have no %s", func() string { return strings.Join(r.GpuModels, " or ") })
	}
	if only.MinVramBytes = r.MinVramBytes; alike(only, w, false) < n {
		return because("has less than %s VRAM", "have less than %s VRAM", func() string { return Bytes(r.MinVramBytes) })
	}
	return because("is below compute capability %s", "are below compute capability %s", func() string { return r.MinComputeCapability })
}

func rejectMachine(spec *musterpb.JobSpec, w *Worker) *reason {
	r, c := spec.Resources, w.Capacity
	switch {
	case c.GetMilliCpus() < r.GetMilliCpus():
		return because("has fewer than %s CPUs", "have fewer than %s CPUs", func() string { return strconv.FormatFloat(float64(r.MilliCpus)/1000, 'f', -1, 64) })
	case c.GetMemoryBytes() < r.GetMemoryBytes():
		return because("has less than %s memory", "have less than %s memory", func() string { return Bytes(r.MemoryBytes) })
	case c.GetDiskBytes() < r.GetDiskBytes():
		return because("has less than %s disk", "have less than %s disk", func() string { return Bytes(r.DiskBytes) })
	case spec.Network && !w.AllowNetwork:
		return because("does not allow network", "do not allow network", nil)
	case w.PriceMicroUsdPerHour > spec.MaxPriceMicroUsdPerHour:
		return because("asks more than %s/h", "ask more than %s/h", func() string { return api.MicroUSD(spec.MaxPriceMicroUsdPerHour).String() })
	}
	return nil
}

// rejectChecker keeps everybody from having a part in a check twice.
func rejectChecker(spec *musterpb.JobSpec, run *state.WantedRun, w *Worker) *reason {
	if run == nil {
		return nil
	}
	for _, party := range run.Parties {
		if party.Worker == w.Id || (party.Owner == w.Owner && !spec.Verify.SameOwner) {
			return hasPart
		}
	}
	if devices := pickDevices(spec, w, run.Class, false); devices == nil || Class(spec, w.Worker, devices) != run.Class {
		return because("is not of hardware class %s", "are not of hardware class %s", func() string { return run.Class })
	}
	return nil
}

// rejectNow is what changes by itself. class is that of the devices, where it
// matters.
func rejectNow(nowUnixMS int64, spec *musterpb.JobSpec, class string, w *Worker) *reason {
	r := spec.Resources
	switch {
	case w.BackoffUntilUnixMs > nowUnixMS:
		return resting
	case w.FreeMilliCPUs < r.GetMilliCpus(), w.FreeMemoryBytes < r.GetMemoryBytes(), w.FreeDiskBytes < r.GetDiskBytes(),
		pickDevices(spec, w, class, true) == nil:
		return busy
	case w.kept:
		return emptying
	}
	return nil
}

// suits reports whether a device satisfies r.
func suits(r *musterpb.Resources, d *musterpb.Device) bool {
	switch {
	case !works(d):
		return false
	case len(r.GetGpuModels()) > 0 && !slices.ContainsFunc(r.GpuModels, func(m string) bool { return isModel(d, m) }):
		return false
	case d.MemoryBytes < uint64(max(r.GetMinVramBytes(), 0)):
		return false
	}
	return r.GetMinComputeCapability() == "" || !lessVersion(d.ComputeCapability, r.MinComputeCapability)
}

// works reports whether attempts can use a device at all. A split GPU works
// through its slices.
func works(d *musterpb.Device) bool { return d.Unhealthy == "" && d.Mig != "enabled" }

// isModel reports whether a device is of a model, as people write models.
func isModel(d *musterpb.Device, model string) bool {
	return strings.Contains(strings.ToLower(d.Name), strings.ToLower(model))
}

// suitable are the devices that satisfy r; with free, only those not in use.
func suitable(r *musterpb.Resources, w *Worker, free bool) []*musterpb.Device {
	var fit []*musterpb.Device
	for _, d := range w.Capacity.GetDevices() {
		if suits(r, d) && !(free && w.UsedDevices[d.Uuid]) {
			fit = append(fit, d)
		}
	}
	return fit
}

// alike is how many devices of one hardware class satisfy r. An attempt never
// mixes classes: nobody else could check its result.
func alike(r *musterpb.Resources, w *Worker, free bool) (most int) {
	counts := map[string]int{}
	for _, d := range suitable(r, w, free) {
		class := deviceClass(d)
		counts[class]++
		most = max(most, counts[class])
	}
	return most
}

// lessVersion compares "major.minor".
func lessVersion(a, b string) bool {
	am, an, _ := strings.Cut(a, ".")
	bm, bn, _ := strings.Cut(b, ".")
	ai, _ := strconv.Atoi(am)
	bi, _ := strconv.Atoi(bm)
	if ai != bi {
		return ai < bi
	}
	ai, _ = strconv.Atoi(an)
	bi, _ = strconv.Atoi(bn)
	return ai < bi
}

// Bytes writes a size in the unit that it was most likely given in.
func Bytes(n int64) string {
	for _, unit := range []struct {
		name string
		size int64
	}{{"TB", 1e12}, {"TiB", 1 << 40}, {"GB", 1e9}, {"GiB", 1 << 30}, {"MB", 1e6}, {"MiB", 1 << 20}, {"kB", 1e3}, {"KiB", 1 << 10}} {
		if n >= unit.size && n%unit.size == 0 {
			return fmt.Sprintf("%d %s", n/unit.size, unit.name)
		}
	}
	if n >= 1<<30 {
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	}
	return fmt.Sprintf("%d bytes", n)
}
