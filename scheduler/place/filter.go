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

// reason is why a worker does not qualify, as it reads for one and for many.
type reason struct{ one, many string }

func because(one, many string, args ...any) *reason {
	return &reason{fmt.Sprintf(one, args...), fmt.Sprintf(many, args...)}
}

// reject is the first constraint that a worker fails, nil when it can run the
// attempt now. run is nil for work. What can't change comes before what can,
// so that the reason given is the one that matters most.
func reject(nowUnixMS int64, job *musterpb.Job, run *state.WantedRun, w *Worker) *reason {
	if r := rejectEver(job, run, w); r != nil {
		return r
	}
	return rejectNow(nowUnixMS, job.Spec.Resources, w)
}

// rejectEver leaves out what changes by itself, when other work ends.
func rejectEver(job *musterpb.Job, run *state.WantedRun, w *Worker) *reason {
	if !w.Connected {
		return because("is not connected", "are not connected")
	}
	if w.Draining {
		return because("is draining", "are draining")
	}
	for _, check := range []func() *reason{
		func() *reason { return rejectImage(job.Spec, w) },
		func() *reason { return rejectDevices(job.Spec.Resources, w) },
		func() *reason { return rejectMachine(job.Spec, w) },
		func() *reason { return rejectChecker(job.Spec, run, w) },
	} {
		if r := check(); r != nil {
			return r
		}
	}
	return nil
}

func rejectImage(spec *musterpb.JobSpec, w *Worker) *reason {
	runtime, need := "docker", "a Docker engine"
	if spec.Image.GetKind() == musterpb.ImageKind_IMAGE_KIND_WASM {
		runtime, need = "wasm", "the WebAssembly runtime"
	}
	if !slices.Contains(w.Capacity.GetRuntimes(), runtime) {
		return because("does not have %s", "do not have %s", need)
	}
	platform := w.Capacity.GetPlatform()
	if runtime == "docker" && len(spec.Image.GetPlatforms()) > 0 && !slices.ContainsFunc(spec.Image.Platforms, func(p string) bool { return samePlatform(p, platform) }) {
		return because("runs "+platform+", the image is for %s", "run "+platform+", the image is for %s", strings.Join(spec.Image.Platforms, ", "))
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
	only := &musterpb.Resources{Gpus: r.Gpus}
	if have := len(suitable(only, w, false)); have == 0 {
		return because("has no GPU", "have no GPU")
	} else if have < n {
		return because("has fewer than %d GPUs", "have fewer than %d GPUs", n)
	}
	if only.GpuModels = r.GpuModels; len(suitable(only, w, false)) < n {
		return because("has no %s", "have no %s", strings.Join(r.GpuModels, " or "))
	}
	if only.MinVramBytes = r.MinVramBytes; len(suitable(only, w, false)) < n {
		return because("has less than %s VRAM", "have less than %s VRAM", Bytes(r.MinVramBytes))
	}
	if len(suitable(r, w, false)) < n {
		return because("is below compute capability %s", "are below compute capability %s", r.MinComputeCapability)
	}
	return nil
}

func rejectMachine(spec *musterpb.JobSpec, w *Worker) *reason {
	r, c := spec.Resources, w.Capacity
	switch {
	case c.GetMilliCpus() < r.GetMilliCpus():
		return because("has fewer than %s CPUs", "have fewer than %s CPUs", strconv.FormatFloat(float64(r.MilliCpus)/1000, 'f', -1, 64))
	case c.GetMemoryBytes() < r.GetMemoryBytes():
		return because("has less than %s memory", "have less than %s memory", Bytes(r.MemoryBytes))
	case c.GetDiskBytes() < r.GetDiskBytes():
		return because("has less than %s disk", "have less than %s disk", Bytes(r.DiskBytes))
	case spec.Network && !w.AllowNetwork:
		return because("does not allow network", "do not allow network")
	case w.PriceMicroUsdPerHour > spec.MaxPriceMicroUsdPerHour:
		return because("asks more than %s/h", "ask more than %s/h", api.MicroUSD(spec.MaxPriceMicroUsdPerHour))
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
			return because("belongs to an owner whose results are being compared", "belong to owners whose results are being compared")
		}
	}
	if class := Class(spec, w.Worker, suitable(spec.Resources, w, false)[:spec.Resources.GetGpus()]); class != run.Class {
		return because("is not of hardware class %s", "are not of hardware class %s", run.Class)
	}
	return nil
}

// rejectNow is what changes by itself.
func rejectNow(nowUnixMS int64, r *musterpb.Resources, w *Worker) *reason {
	switch {
	case w.BackoffUntilUnixMs > nowUnixMS:
		return because("is paused after failures", "are paused after failures")
	case w.FreeMilliCPUs < r.GetMilliCpus(), w.FreeMemoryBytes < r.GetMemoryBytes(), w.FreeDiskBytes < r.GetDiskBytes(),
		len(suitable(r, w, true)) < int(r.GetGpus()):
		return because("is busy", "are busy")
	}
	return nil
}

// suitable are the devices that satisfy r; with free, only those not in use.
func suitable(r *musterpb.Resources, w *Worker, free bool) []*musterpb.Device {
	var fit []*musterpb.Device
	for _, d := range w.Capacity.GetDevices() {
		switch {
		case d.Unhealthy != "" || d.Mig == "enabled": // a split GPU works through its slices
		case free && w.UsedDevices[d.Uuid]:
		case len(r.GetGpuModels()) > 0 && !slices.ContainsFunc(r.GpuModels, func(m string) bool {
			return strings.Contains(strings.ToLower(d.Name), strings.ToLower(m))
		}):
		case d.MemoryBytes < uint64(max(r.GetMinVramBytes(), 0)):
		case r.GetMinComputeCapability() != "" && lessVersion(d.ComputeCapability, r.MinComputeCapability):
		default:
			fit = append(fit, d)
		}
	}
	return fit
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
