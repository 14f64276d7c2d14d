package wasm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/experimental"
	"github.com/tetratelabs/wazero/experimental/sysfs"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	wasmsys "github.com/tetratelabs/wazero/sys"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/container"
)

const (
	// clockSeconds is the time of day in every run, always: 2022-01-01T00:00:00Z.
	clockSeconds = 1_640_995_200
	// exitTrap is the exit code of a program that trapped, as a shell reports a
	// program that aborted.
	exitTrap = 134
)

// randomSeed makes every run draw the same random numbers. Nothing secret may
// depend on them; a program without a network has no use for secrets.
var randomSeed = [32]byte([]byte("muster deterministic random seed"))

// errTimeout is the cause of a context that ended by the job's time limit.
var errTimeout = errors.New("time limit reached")

// Run implements container.Runtime.
func (r *Runtime) Run(ctx context.Context, spec container.Spec) (_ container.Result, err error) {
	if err := spec.Check(); err != nil {
		return container.Result{}, err
	}
	if len(spec.GPUs) > 0 || spec.Network {
		return container.Result{}, api.Errorf(api.Unsupported, "wasm: run %s asks for GPUs or a network; WebAssembly programs have neither", spec.ID)
	}
	dir, err := r.moduleDir(spec.Image.Digest)
	if err != nil {
		return container.Result{}, err
	}
	scratch, err := r.enter(spec.ID)
	if err != nil {
		return container.Result{}, err
	}
	defer func() { err = errors.Join(err, r.leave(spec.ID)) }()

	binary, err := os.ReadFile(modulePath(dir))
	if err != nil {
		return container.Result{}, fmt.Errorf("wasm: run %s: module %s is not ready: %w", spec.ID, spec.Image.Digest, err)
	}
	p, err := load(context.WithoutCancel(ctx), dir, binary)
	if err != nil {
		return container.Result{}, fmt.Errorf("wasm: run %s: %w", spec.ID, err)
	}
	defer func() { err = errors.Join(err, p.close(context.WithoutCancel(ctx))) }()
	if _, err := wasi_snapshot_preview1.Instantiate(context.WithoutCancel(ctx), p.runtime); err != nil {
		return container.Result{}, fmt.Errorf("wasm: run %s: %w", spec.ID, err)
	}
	logs := container.NewLog(spec.Logs, container.MaxLogBytes)
	defer logs.Close()

	result, err := runProgram(ctx, p, spec, scratch, logs)
	if err != nil {
		return container.Result{}, fmt.Errorf("wasm: run %s: %w", spec.ID, err)
	}
	return container.Settle(result, spec, logs)
}

// runProgram runs a loaded program in its sandbox, with everything that may
// end it early running beside it.
func runProgram(ctx context.Context, p *program, spec container.Spec, scratch string, logs *container.Log) (_ container.Result, err error) {
	var open atomic.Int64
	mounts, err := openMounts(spec, scratch, &open)
	if err != nil {
		return container.Result{}, err
	}
	defer func() { err = errors.Join(err, mounts.close()) }()

	memory := newMemoryLimit(spec.Memory())
	if p.compiled.ExportedMemories()["memory"].Min() > uint32(memory.bytes/pageBytes) {
		now := time.Now()
		logs.Note("the module starts with more memory than its limit of %d bytes", spec.Memory())
		return container.Result{Reason: container.OutOfMemory, ExitCode: exitTrap, Started: now, Ended: now}, nil
	}

	began := time.Now()
	runCtx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	timeout := time.AfterFunc(spec.Timeout, func() { stop(errTimeout) })
	defer timeout.Stop()
	watchCtx, stopWatching := context.WithCancel(runCtx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if err := container.Watch(watchCtx,
			container.Quota{Dir: spec.Outputs, LimitBytes: spec.OutputLimit()},
			container.Quota{Dir: mounts.tmpDir, LimitBytes: spec.Memory() / 2},
		); err != nil {
			stop(err)
		}
	}()
	spec.HasStarted()
	ended := execute(experimental.WithMemoryAllocator(runCtx, memory), p, moduleConfig(runCtx, spec, mounts, logs))
	stopWatching()
	<-watched

	result, err := verdict(runCtx, ended, memory.refused.Load(), spec, logs)
	result.Started, result.Ended = began, time.Now()
	return result, err
}

// execute runs the program to its end. A defect of the embedded runtime must
// not take the worker and its other jobs with it, so a panic is an error.
func execute(ctx context.Context, p *program, config wazero.ModuleConfig) (err error) {
	defer func() {
		if value := recover(); value != nil {
			err = &defect{value}
		}
	}()
	module, err := p.runtime.InstantiateModule(ctx, p.compiled, config)
	if module != nil {
		err = errors.Join(err, module.Close(context.WithoutCancel(ctx)))
	}
	return err
}

// defect is a panic inside wazero.
type defect struct{ value any }

func (d *defect) Error() string { return fmt.Sprintf("the WebAssembly runtime panicked: %v", d.value) }

// verdict says how a program ended, from what wazero and the context say.
func verdict(ctx context.Context, ended error, refusedMemory bool, spec container.Spec, logs *container.Log) (container.Result, error) {
	var exit *wasmsys.ExitError
	var broken *defect
	switch {
	case errors.As(ended, &broken):
		return container.Result{}, broken
	case errors.As(ended, &exit):
		// A program may exit with any code, the one for "stopped" included.
		stopped := exit.ExitCode() == wasmsys.ExitCodeContextCanceled || exit.ExitCode() == wasmsys.ExitCodeDeadlineExceeded
		if stopped && ctx.Err() != nil {
			return interrupted(context.Cause(ctx), spec, logs)
		}
		return failedOrNot(int(exit.ExitCode()), refusedMemory), nil
	case ended != nil:
		logs.Note("the program trapped: %s", firstLines(ended.Error(), 12))
		return failedOrNot(exitTrap, refusedMemory), nil
	}
	return container.Result{Reason: container.Exited}, nil
}

// interrupted is the result of a program that was stopped from outside.
func interrupted(cause error, spec container.Spec, logs *container.Log) (container.Result, error) {
	stopped := container.Result{ExitCode: exitTrap}
	switch {
	case errors.Is(cause, errTimeout):
		logs.Note("stopped after %v, the job's time limit", spec.Timeout)
		stopped.Reason = container.TimedOut
	case errors.Is(cause, container.ErrTooLarge):
		logs.Note("outputs or %s: %v", container.TempDir, cause)
		stopped.Reason = container.OutputTooLarge
	case api.KindOf(cause) == api.Unavailable:
		return container.Result{}, cause // the machine's disk
	default:
		logs.Note("cancelled")
		stopped.Reason = container.Cancelled
	}
	return stopped, nil
}

// failedOrNot takes a failure after a refused request for memory to be the
// consequence of it. A program that was refused and still succeeded coped.
func failedOrNot(code int, refusedMemory bool) container.Result {
	if code != 0 && refusedMemory {
		return container.Result{Reason: container.OutOfMemory, ExitCode: code}
	}
	return container.Result{Reason: container.Exited, ExitCode: code}
}

func firstLines(text string, n int) string {
	lines := strings.SplitN(text, "\n", n+1)
	return strings.Join(lines[:min(n, len(lines))], "\n")
}

// moduleConfig is the world that the program sees.
func moduleConfig(ctx context.Context, spec container.Spec, mounts *mounts, logs *container.Log) wazero.ModuleConfig {
	config := wazero.NewModuleConfig().
		WithName("main").
		WithArgs(append([]string{"main"}, spec.Command...)...).
		WithStdout(logs).
		WithStderr(logs).
		WithFSConfig(mounts.config()).
		WithRandSource(rand.NewChaCha8(randomSeed)).
		WithWalltime(func() (int64, int32) { return clockSeconds, 0 }, wasmsys.ClockResolution(time.Microsecond)).
		WithSysNanotime().
		WithNanosleep(func(ns int64) { sleep(ctx, time.Duration(ns)) })
	for _, pair := range spec.Env {
		name, value, _ := strings.Cut(pair, "=")
		config = config.WithEnv(name, value)
	}
	return config
}

// sleep really sleeps, but not past the end of the run.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// mounts are the directories of one run.
type mounts struct {
	tmpDir       string
	in, out, tmp *mount
}

func openMounts(spec container.Spec, scratch string, open *atomic.Int64) (_ *mounts, err error) {
	inDir := spec.Inputs
	if inDir == "" {
		inDir = filepath.Join(scratch, "in")
		if err := os.Mkdir(inDir, 0o700); err != nil {
			return nil, err
		}
	}
	m := &mounts{tmpDir: filepath.Join(scratch, "tmp")}
	if err := os.Mkdir(m.tmpDir, 0o700); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close())
		}
	}()
	if m.in, err = openMount(inDir, true, open); err != nil {
		return nil, err
	}
	if m.out, err = openMount(spec.Outputs, false, open); err != nil {
		return nil, err
	}
	m.tmp, err = openMount(m.tmpDir, false, open)
	return m, err
}

func (m *mounts) close() error {
	var errs []error
	for _, mount := range []*mount{m.in, m.out, m.tmp} {
		if mount != nil {
			errs = append(errs, mount.close())
		}
	}
	return errors.Join(errs...)
}

func (m *mounts) config() wazero.FSConfig {
	config := wazero.NewFSConfig()
	// In this order always: it decides the program's first file descriptors.
	for _, at := range []struct {
		path  string
		mount *mount
	}{{container.InputDir, m.in}, {container.OutputDir, m.out}, {container.TempDir, m.tmp}} {
		config = config.(sysfs.FSConfig).WithSysFSMount(at.mount, at.path)
	}
	return config
}
