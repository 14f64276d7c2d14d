// Package docker runs jobs in containers of a Docker engine, hardened for
// programs that nobody vouches for. It is the only importer of the engine's
// client. DESIGN.md in the folder above says why each restriction is there.
package docker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	dcontainer "github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/system"
	"github.com/docker/docker/client"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/container"
)

// Labels of every container that this package creates.
const (
	labelOwner = "net.muster.owner"
	labelRun   = "net.muster.run"
)

// Bounds on the engine's own work, apart from what the program does.
const (
	askTimeout    = 10 * time.Second // questions: ping, info, inspect
	createTimeout = 2 * time.Minute  // create and start, each
	removeTimeout = time.Minute
)

// Options configure a Runtime.
type Options struct {
	// Owner tells this worker's containers and images from those of others on
	// the same engine. It must be the same after a restart and unique per data
	// directory. Required.
	Owner string
	// Host is the engine's address, such as "unix:///run/docker.sock". Empty:
	// DOCKER_HOST, or the platform's default. The engine must see the worker's
	// file system, because inputs and outputs are bind-mounted.
	Host string
	// OCIRuntime names one of the engine's runtimes, such as "runsc". Empty:
	// the engine's default.
	OCIRuntime string
	// Network is the engine's network for jobs that may use one. Empty: "bridge".
	Network string
	// StopGrace is how long a program that is cancelled or out of time may take
	// after SIGTERM, before SIGKILL. Zero: 5 seconds.
	StopGrace time.Duration
}

// Engine is what a usable engine said about itself.
type Engine struct {
	Version  string
	Platform string // "linux/amd64"
	// Warnings are protections that this engine does not offer, one sentence each.
	Warnings []string

	init       bool // has an init process to give to containers
	rootless   bool // root in a container is the engine's unprivileged user
	remapped   bool // users in a container are other users on the host
	cdiDevices []string
}

// Runtime implements container.Runtime on one Docker engine.
type Runtime struct {
	opts   Options
	client *client.Client
	images container.Gate // one load or pull per digest at a time

	mu      sync.Mutex // guards engine, live and present
	engine  *Engine    // nil until the engine has answered once
	live    map[string]bool
	present map[string]imageFacts // by tag: images that the engine was seen to have
}

var _ container.Runtime = (*Runtime)(nil)

// New prepares a Runtime. It does not call the engine; Probe does.
func New(opts Options) (*Runtime, error) {
	if opts.Owner == "" {
		return nil, api.Errorf(api.Invalid, "docker: Options.Owner is empty; it must name this worker's data directory")
	}
	if opts.Network == "" {
		opts.Network = "bridge"
	}
	if opts.StopGrace == 0 {
		opts.StopGrace = 5 * time.Second
	}
	clientOpts := []client.Opt{client.FromEnv, client.WithAPIVersionNegotiation()}
	if opts.Host != "" {
		clientOpts = append(clientOpts, client.WithHost(opts.Host))
	}
	c, err := client.NewClientWithOpts(clientOpts...)
	if err != nil {
		return nil, api.Errorf(api.Invalid, "docker: engine address: %w", err)
	}
	return &Runtime{opts: opts, client: c, live: make(map[string]bool), present: make(map[string]imageFacts)}, nil
}

// Probe asks the engine that the options name whether it can run jobs. The
// error says in one sentence why not, and what to do.
func Probe(ctx context.Context, opts Options) (Engine, error) {
	if opts.Owner == "" {
		opts.Owner = "probe"
	}
	r, err := New(opts)
	if err != nil {
		return Engine{}, err
	}
	defer r.Close()
	return r.Probe(ctx)
}

// Close drops idle connections. The Runtime must have no live runs.
func (r *Runtime) Close() error { return r.client.Close() }

// Name implements container.Runtime.
func (r *Runtime) Name() string { return "docker" }

// Probe asks the engine afresh whether it can run jobs.
func (r *Runtime) Probe(ctx context.Context) (Engine, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	info, err := r.client.Info(ctx)
	if err != nil {
		return Engine{}, r.unreachable(err)
	}
	engine, err := judge(info, r.opts.OCIRuntime, os.Getuid() == 0)
	if err != nil {
		return Engine{}, err
	}
	r.mu.Lock()
	r.engine = &engine
	r.mu.Unlock()
	return engine, nil
}

// known is the engine as it was probed, probing it first if need be.
func (r *Runtime) known(ctx context.Context) (Engine, error) {
	r.mu.Lock()
	engine := r.engine
	r.mu.Unlock()
	if engine != nil {
		return *engine, nil
	}
	return r.Probe(ctx)
}

// judge decides whether an engine can hold untrusted programs. isRoot says
// whether this process is root.
func judge(info system.Info, ociRuntime string, isRoot bool) (Engine, error) {
	engine := Engine{
		Version:  info.ServerVersion,
		Platform: info.OSType + "/" + goArch(info.Architecture),
		// The engine reports "N/A" where its docker-init is missing or does not
		// run; asking for it then fails every container.
		init: info.InitCommit.ID != "N/A",
	}
	seccomp := false
	for _, option := range info.SecurityOptions {
		switch name, _, _ := strings.Cut(strings.TrimPrefix(option, "name="), ","); name {
		case "seccomp":
			seccomp = !strings.Contains(option, "profile=unconfined")
		case "rootless":
			engine.rootless = true
		case "userns":
			engine.remapped = true
		}
	}
	for _, device := range info.DiscoveredDevices {
		if device.Source == "cdi" {
			engine.cdiDevices = append(engine.cdiDevices, device.ID)
		}
	}
	refuse := func(format string, args ...any) (Engine, error) {
		return Engine{}, api.Errorf(api.Unsupported, "docker engine %s: "+format, append([]any{info.ServerVersion}, args...)...)
	}
	if info.OSType != "linux" {
		return refuse("it runs %s containers; jobs need linux", info.OSType)
	}
	if !info.MemoryLimit || !info.PidsLimit {
		return refuse("it cannot limit memory and processes (memory: %t, PIDs: %t); enable the memory and pids cgroup controllers",
			info.MemoryLimit, info.PidsLimit)
	}
	if _, ok := info.Runtimes[ociRuntime]; ociRuntime != "" && !ok {
		return refuse("it has no runtime %q (it has %s); register it in the engine's daemon.json",
			ociRuntime, strings.Join(slices.Sorted(maps.Keys(info.Runtimes)), ", "))
	}
	if !seccomp && ociRuntime == "" {
		return refuse("it starts containers without a seccomp profile; remove seccomp-profile=unconfined from its configuration, or use runsc")
	}
	if engine.remapped && !isRoot {
		return refuse("it remaps users (userns-remap), so outputs would not belong to this worker; run the worker as root, or use a rootless engine")
	}
	if !info.SwapLimit && info.CgroupVersion == "1" {
		engine.Warnings = append(engine.Warnings, "swap is not limited: the kernel lacks swap accounting (swapaccount=1)")
	}
	if !info.CPUCfsQuota {
		engine.Warnings = append(engine.Warnings, "CPU is not limited: the kernel lacks CFS quotas")
	}
	return engine, nil
}

// goArch translates uname's name of an architecture to the one in image
// configurations.
func goArch(machine string) string {
	switch machine {
	case "x86_64":
		return "amd64"
	case "aarch64":
		return "arm64"
	}
	return machine
}

// unreachable says why no engine answered, and what to do about it.
func (r *Runtime) unreachable(err error) error {
	host := r.client.DaemonHost()
	switch {
	case errors.Is(err, fs.ErrPermission):
		return api.Errorf(api.Unavailable, "docker: user %d may not use the engine at %s; add the user to the docker group and log in again: %w",
			os.Getuid(), host, err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED), client.IsErrConnectionFailed(err):
		return api.Errorf(api.Unavailable, "docker: no engine answers at %s; start it (systemctl start docker), or set DOCKER_HOST: %w", host, err)
	case errors.Is(err, context.DeadlineExceeded):
		return api.Errorf(api.Unavailable, "docker: the engine at %s did not answer within %v: %w", host, askTimeout, err)
	}
	return r.fault("ask the engine at "+host, err)
}

// fault is an error of this machine or its engine.
func (r *Runtime) fault(action string, err error) error {
	if client.IsErrConnectionFailed(err) || cerrdefs.IsUnavailable(err) {
		return api.Errorf(api.Unavailable, "docker: %s: %w", action, err)
	}
	return fmt.Errorf("docker: %s: %w", action, err)
}

// Sweep implements container.Runtime.
func (r *Runtime) Sweep(ctx context.Context) (int, error) {
	found, err := r.client.ContainerList(ctx, dcontainer.ListOptions{
		All:     true,
		Filters: filters.NewArgs(filters.Arg("label", labelOwner+"="+r.opts.Owner)),
	})
	if err != nil {
		return 0, r.fault("list leftover containers", err)
	}
	removed := 0
	for _, c := range found {
		if r.isLive(c.Labels[labelRun]) {
			continue
		}
		if err := r.remove(ctx, c.ID); err != nil {
			return removed, err
		}
		removed++
	}
	return removed, nil
}

// remove takes a container off the machine whatever its state, even when ctx
// is done already.
func (r *Runtime) remove(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	err := r.client.ContainerRemove(ctx, id, dcontainer.RemoveOptions{Force: true, RemoveVolumes: true})
	if err != nil && !cerrdefs.IsNotFound(err) {
		return r.fault("remove container "+id, err)
	}
	return nil
}

func (r *Runtime) isLive(run string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.live[run]
}

func (r *Runtime) enter(run string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.live[run] {
		return api.Errorf(api.Invalid, "docker: a run with ID %s is live already", run)
	}
	r.live[run] = true
	return nil
}

func (r *Runtime) leave(run string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.live, run)
}

// tag is the name under which the engine keeps an image for this worker. It
// holds the owner, so that Forget never takes an image from another worker, and
// the whole digest, so that it is found again after a restart.
func (r *Runtime) tag(image container.Image) (string, error) {
	hexDigest, ok := strings.CutPrefix(image.Digest, "sha256:")
	if raw, err := hex.DecodeString(hexDigest); !ok || err != nil || len(raw) != sha256.Size || strings.ToLower(hexDigest) != hexDigest {
		return "", api.Errorf(api.Unsupported, "docker: image digest %q is not sha256:<64 hex digits>", image.Digest)
	}
	owner := sha256.Sum256([]byte(r.opts.Owner))
	return "muster/" + hex.EncodeToString(owner[:6]) + ":" + hexDigest, nil
}
