package node

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/container"
	"github.com/musternet/muster/container/docker"
	"github.com/musternet/muster/container/wasm"
	"github.com/musternet/muster/gpu"
	"github.com/musternet/muster/worker"
	"github.com/musternet/muster/worker/cheat"
)

// Worker is what one worker process needs to know.
type Worker struct {
	Dir        string
	Name       string
	Join       []string
	Key        string // API key of the owner
	Price      api.MicroUSD
	Network    bool
	Runtime    string // "auto", "docker", "wasm"
	OCIRuntime string // of the Docker engine, such as "runsc"
	// DockerNetwork is the engine's network for jobs that may use one.
	DockerNetwork string
	Cheat         []string
	Detector      gpu.Detector
	// What jobs may use; 0 is what the machine has.
	MilliCPUs, MemoryBytes, DiskBytes int64
	CacheBytes                        int64
	Logger                            *slog.Logger
	// Ready is called when the worker starts to dial, with its identity.
	Ready func(id string)
}

// Run runs the worker until ctx ends.
func (c Worker) Run(ctx context.Context) error {
	if c.Key == "" {
		return api.Errorf(api.Invalid, "a worker needs its owner's API key: set --key or MUSTER_KEY")
	}
	key, err := identity(filepath.Join(c.Dir, "worker.key"))
	if err != nil {
		return err
	}
	unlock, err := lock(c.Dir)
	if err != nil {
		return err
	}
	defer unlock()
	runtimes, err := c.runtimes(ctx)
	if err != nil {
		return err
	}
	inventory := c.Detector.Detect(ctx)
	if len(inventory.Devices) == 0 {
		c.Logger.Info("no GPU: this is a CPU worker", "reason", inventory.Reason)
	}
	w := worker.New(worker.Config{
		Key: key, Name: c.Name, Dir: c.Dir, Schedulers: c.Join, APIKey: c.Key, PricePerHour: c.Price, AllowNetwork: c.Network,
		Runtimes: runtimes, Inventory: inventory, Detector: c.Detector, MilliCPUs: orElse(c.MilliCPUs, int64(runtime.NumCPU())*1000),
		MemoryBytes: orElse(c.MemoryBytes, machineMemory()), DiskBytes: orElse(c.DiskBytes, freeDisk(c.Dir)),
		CacheBytes: orElse(c.CacheBytes, 50<<30), Logger: c.Logger,
	})
	if c.Ready != nil {
		c.Ready(w.ID())
	}
	return w.Run(ctx)
}

// runtimes are what this machine can run jobs with. WebAssembly is always
// there; Docker where an engine answers, and then it must.
func (c Worker) runtimes(ctx context.Context) (map[string]container.Runtime, error) {
	out := map[string]container.Runtime{}
	if c.Runtime == "auto" || c.Runtime == "docker" || c.Runtime == "" {
		options := docker.Options{Owner: ownerLabel(c.Dir), OCIRuntime: c.OCIRuntime, Network: c.DockerNetwork}
		engine, err := docker.Probe(ctx, options)
		switch {
		case err == nil:
			for _, warning := range engine.Warnings {
				c.Logger.Warn("container engine: " + warning)
			}
			if out["docker"], err = docker.New(options); err != nil {
				return nil, err
			}
		case c.Runtime == "docker":
			return nil, api.Errorf(api.Unsupported, "this worker is to run containers, and can't: %w; start the engine, or use --runtime auto", err)
		default:
			c.Logger.Info("no container engine: only WebAssembly jobs run here", "reason", err)
		}
	} else if c.Runtime != "wasm" {
		return nil, api.Errorf(api.Invalid, "runtime %q: want auto, docker or wasm", c.Runtime)
	}
	rt, err := wasm.New(wasm.Options{Dir: filepath.Join(c.Dir, "wasm")})
	if err != nil {
		return nil, err
	}
	out["wasm"] = rt
	if len(c.Cheat) == 0 {
		return out, nil
	}
	c.Logger.Warn("this worker cheats, for demonstration", "kinds", c.Cheat)
	for name, honest := range out {
		if out[name], err = cheat.Wrap(honest, c.Dir, c.Cheat...); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// ownerLabel tells this worker's containers from those of others on the same
// engine; it follows from the data directory, so that a restart knows them.
func ownerLabel(dir string) string {
	abs, err := filepath.Abs(dir)
	if err != nil {
		abs = dir
	}
	return api.DigestOf([]byte(abs)).Hex()[:16]
}

func orElse(v, otherwise int64) int64 {
	if v > 0 {
		return v
	}
	return otherwise
}

// machineMemory is three quarters of this machine's memory: jobs may not push
// the owner's own programs out.
func machineMemory() int64 {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 1 << 30
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) >= 2 && fields[0] == "MemTotal:" {
			if kib, err := strconv.ParseInt(fields[1], 10, 64); err == nil {
				return kib << 10 / 4 * 3
			}
		}
	}
	return 1 << 30
}

// freeDisk is half of what is free where the worker keeps its files.
func freeDisk(dir string) int64 {
	var fs syscall.Statfs_t
	if err := syscall.Statfs(dir, &fs); err != nil {
		return 1 << 30
	}
	return int64(fs.Bavail) * fs.Bsize / 2
}

// CheatKinds are the values of Worker.Cheat.
func CheatKinds() string { return strings.Join(slices.Clone(cheat.Kinds), ", ") }
