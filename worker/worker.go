// Package worker is the owner's side: one process on one machine that dials
// the schedulers, runs attempts in containers, and reports what came out.
//
// It dials out and never listens, so it works behind any router. What it runs
// survives a broken connection: on every new session it states what it has, and
// is told what to keep.
package worker

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/cpu"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/container"
	"github.com/musternet/muster/gpu"
)

// Config is what a worker is made of.
type Config struct {
	Key        ed25519.PrivateKey // the machine's identity
	Name       string             // for people; need not be unique
	Dir        string             // of caches and of running attempts
	Schedulers []string           // API addresses; one is enough
	APIKey     string             // of the owner's account
	// PricePerHour is asked for one GPU, or for a job without GPUs.
	PricePerHour api.MicroUSD
	AllowNetwork bool
	// Runtimes by name: "docker", "wasm".
	Runtimes  map[string]container.Runtime
	Inventory gpu.Inventory
	// Detector looks at the GPUs again every GPUInterval, which is a minute where
	// it is 0. Nil: Inventory stays as it is.
	Detector    gpu.Detector
	GPUInterval time.Duration
	// What jobs may use of this machine.
	MilliCPUs, MemoryBytes, DiskBytes int64
	// CacheBytes bounds the cache of images and inputs.
	CacheBytes int64
	// BlobPatience is how long an attempt waits for a blob store that can't be
	// reached: finished work is worth more than the wait. 0 is 10 minutes.
	BlobPatience time.Duration
	Logger       *slog.Logger
}

// Worker is one worker. Run runs it.
type Worker struct {
	Config
	id     string
	http   *http.Client // of the session
	files  *http.Client // of the blobs
	blobs  *blob.HTTP
	cache  *blob.Cache
	images *images

	restate chan struct{} // capacity 1: the inventory changed

	mu         sync.Mutex
	found      gpu.Inventory   // guarded by mu; what the detector found last
	runs       map[string]*run // guarded by mu; by attempt, until the schedulers know how it ended
	schedulers []string        // guarded by mu; addresses to dial, the best first
	attempts   sync.WaitGroup
	news       *news
}

// New makes a worker.
func New(cfg Config) *Worker {
	if cfg.GPUInterval == 0 {
		cfg.GPUInterval = time.Minute
	}
	if cfg.BlobPatience == 0 {
		cfg.BlobPatience = 10 * time.Minute
	}
	w := &Worker{
		Config: cfg, id: string(api.WorkerIDOf(cfg.Key.Public().(ed25519.PublicKey))), http: &http.Client{Transport: client.NewTransport()},
		files: &http.Client{Transport: client.NewBlobTransport()},
		found: cfg.Inventory, restate: make(chan struct{}, 1), runs: map[string]*run{}, schedulers: slices.Clone(cfg.Schedulers), news: newNews(),
	}
	w.blobs = client.Blobs(w.files, cfg.APIKey, w.addresses)
	return w
}

// ID is the worker's identity.
func (w *Worker) ID() string { return w.id }

// Run works until ctx ends, then stops what runs and waits for it.
func (w *Worker) Run(ctx context.Context) error {
	if len(w.Schedulers) == 0 {
		return api.Errorf(api.Invalid, "a worker needs the address of at least one scheduler")
	}
	if err := w.cleanUp(ctx); err != nil {
		return err
	}
	cache, err := blob.OpenCache(filepath.Join(w.Dir, "cache"), w.CacheBytes)
	if err != nil {
		return err
	}
	w.cache = cache
	w.images, err = openImages(filepath.Join(w.Dir, "images.json"), w.CacheBytes, w.forgetImage)
	if err != nil {
		return err
	}
	defer w.http.CloseIdleConnections()
	defer w.files.CloseIdleConnections()
	defer w.stopAll()
	watching := sync.WaitGroup{}
	defer watching.Wait()
	watchCtx, stopWatching := context.WithCancel(ctx)
	defer stopWatching()
	watching.Go(func() { w.watchGPUs(watchCtx) })
	for wait := time.Duration(0); ; wait = client.Redial(wait) {
		began := time.Now()
		err := w.connect(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if refused := (*refusal)(nil); errors.As(err, &refused) {
			return fmt.Errorf("the schedulers refuse this worker: %w", refused.err)
		}
		if time.Since(began) > client.MaxRedial {
			wait = 0 // it was a good session; dial again at once
		}
		// During an election two schedulers may each name the other.
		if errors.Is(err, errInventory) {
			wait = 0
		} else if errors.Is(err, errRedirected) {
			wait = min(wait, maxRedirect)
			w.Logger.Debug("another scheduler leads", "address", w.addresses()[0])
		} else {
			w.Logger.Warn("not connected to the schedulers", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// maxRedirect is the longest pause before the leader is dialled that another
// scheduler named.
const maxRedirect = 200 * time.Millisecond

// stopAll ends what still runs and waits until nothing of it is left.
func (w *Worker) stopAll() {
	for _, id := range w.running() {
		w.forget(id, "the worker stops")
	}
	w.attempts.Wait()
}

// forgetImage drops an image from a runtime. One of a runtime that this worker
// does not have any more is out of its reach.
func (w *Worker) forgetImage(ctx context.Context, name string, image container.Image) error {
	rt := w.Runtimes[name]
	if rt == nil {
		return nil
	}
	if err := rt.Forget(ctx, image); err != nil {
		w.Logger.Warn("an image could not be removed", "digest", image.Digest, "err", err)
		return err
	}
	return nil
}

// cleanUp removes what an earlier process of this worker left behind.
func (w *Worker) cleanUp(ctx context.Context) error {
	for name, rt := range w.Runtimes {
		n, err := rt.Sweep(ctx)
		if err != nil {
			return fmt.Errorf("cleaning up after an earlier run (%s): %w", name, err)
		}
		if n > 0 {
			w.Logger.Info("removed what an earlier process left behind", "runtime", name, "containers", n)
		}
	}
	if err := removeTree(w.attemptsDir()); err != nil {
		return fmt.Errorf("cleaning up after an earlier run: %w", err)
	}
	if err := os.MkdirAll(w.attemptsDir(), 0o700); err != nil {
		return fmt.Errorf("worker directory: %w", err)
	}
	return nil
}

// removeTree removes a directory even where a job took away the right to.
func removeTree(dir string) error {
	if os.RemoveAll(dir) == nil {
		return nil
	}
	// What can't be changed is named by the second attempt.
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, _ error) error {
		if d != nil && d.IsDir() {
			return os.Chmod(path, 0o700)
		}
		return nil
	})
	return os.RemoveAll(dir)
}

func (w *Worker) attemptsDir() string { return filepath.Join(w.Dir, "attempts") }

// addresses are the schedulers' addresses, the one that answered last first.
func (w *Worker) addresses() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.schedulers)
}

// prefer puts an address first, and keeps the others behind it.
func (w *Worker) prefer(address string) {
	if address == "" {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	rest := slices.DeleteFunc(slices.Clone(w.schedulers), func(a string) bool { return a == address })
	w.schedulers = append([]string{address}, rest...)
}

// learn adds the addresses of the cluster to those that the worker was given.
func (w *Worker) learn(addresses []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range addresses {
		if !slices.Contains(w.schedulers, a) && len(w.schedulers) < 64 {
			w.schedulers = append(w.schedulers, a)
		}
	}
}

// demote puts an address that did not answer last.
func (w *Worker) demote(address string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if i := slices.Index(w.schedulers, address); i >= 0 {
		w.schedulers = append(slices.Delete(w.schedulers, i, i+1), address)
	}
}

// hello is what the worker says of itself.
func (w *Worker) hello() *musterpb.WorkerHello {
	found := w.inventory()
	c := &musterpb.Capacity{
		MilliCpus: w.MilliCPUs, MemoryBytes: w.MemoryBytes, DiskBytes: w.DiskBytes,
		NoGpuReason: found.Reason, Platform: "linux/" + runtime.GOARCH, CpuLevel: cpuLevel(),
	}
	for name := range w.Runtimes {
		c.Runtimes = append(c.Runtimes, name)
	}
	slices.Sort(c.Runtimes)
	for _, d := range found.Devices {
		c.Devices = append(c.Devices, deviceMessage(d))
	}
	return &musterpb.WorkerHello{
		PublicKey: w.Key.Public().(ed25519.PublicKey), Name: w.Name, Capacity: c,
		PriceMicroUsdPerHour: int64(w.PricePerHour), AllowNetwork: w.AllowNetwork,
	}
}

// cpuLevel is the x86-64 psABI's level of this CPU: results of programs that
// choose their code by it can be compared within a level. Empty on other CPUs,
// whose baseline is what programs use.
func cpuLevel() string {
	x := cpu.X86
	switch {
	case !x.HasSSE2:
		return ""
	case !(x.HasSSE3 && x.HasSSSE3 && x.HasSSE41 && x.HasSSE42 && x.HasPOPCNT && x.HasCX16):
		return "x86-64"
	case !(x.HasAVX && x.HasAVX2 && x.HasBMI1 && x.HasBMI2 && x.HasFMA && x.HasOSXSAVE):
		return "x86-64-v2"
	case !(x.HasAVX512F && x.HasAVX512BW && x.HasAVX512CD && x.HasAVX512DQ && x.HasAVX512VL):
		return "x86-64-v3"
	}
	return "x86-64-v4"
}

func deviceMessage(d gpu.Device) *musterpb.Device {
	value := func(v *uint32) uint32 {
		if v == nil {
			return 0
		}
		return *v
	}
	return &musterpb.Device{
		Index: uint32(d.Index), Uuid: d.UUID, Name: d.Name, MemoryBytes: d.MemoryBytes, ComputeCapability: d.ComputeCapability,
		Architecture: d.Architecture, Driver: d.Driver, Mig: d.MIG, TemperatureCelsius: value(d.TemperatureC),
		PowerMilliwatts: value(d.PowerMilliwatts), UtilizationPercent: value(d.UtilizationPercent), Unhealthy: d.Unhealthy, ParentUuid: d.ParentUUID,
	}
}

// refusal is a scheduler's answer that dialling again does not change.
type refusal struct{ err error }

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

var (
	errSilent     = errors.New("the scheduler closed the session")
	errRedirected = errors.New("the scheduler does not lead, and named the one that does")
)
