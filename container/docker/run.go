package docker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/docker/docker/api/types"
	dcontainer "github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/pkg/stdcopy"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/container"
)

// How a shell reports a command that could not be run at all. Engines use the
// same codes.
const (
	exitCannotRun = 126
	exitNotFound  = 127
	exitKilled    = 128 + 9  // SIGKILL
	exitStopped   = 128 + 15 // SIGTERM
)

// killEventDelay is how long after an exit the engine may report the signal that
// somebody sent through it and that caused the exit.
const killEventDelay = time.Second

// Run implements container.Runtime.
func (r *Runtime) Run(ctx context.Context, spec container.Spec) (container.Result, error) {
	if err := spec.Check(); err != nil {
		return container.Result{}, err
	}
	engine, err := r.known(ctx)
	if err != nil {
		return container.Result{}, err
	}
	if err := r.enter(spec.ID); err != nil {
		return container.Result{}, err
	}
	defer r.leave(spec.ID)

	user := identify(engine, identity{os.Getuid(), os.Getgid()})
	restore, err := handOver(spec, engine, user)
	if err != nil {
		return container.Result{}, fmt.Errorf("docker: run %s: prepare directories: %w", spec.ID, err)
	}
	logs := container.NewLog(spec.Logs, container.MaxLogBytes)
	defer logs.Close()

	began := time.Now()
	result, err := r.runOnce(ctx, spec, engine, user, logs)
	result.Started, result.Ended = began, time.Now()
	err = errors.Join(err, restore())
	if ctx.Err() != nil && err != nil && result.Reason == "" {
		// Cancelled before the program could start: nothing went wrong here.
		result.Reason, err = container.Cancelled, nil
	}
	if err != nil {
		return container.Result{}, err
	}
	return container.Settle(result, spec, logs)
}

// handOver lets the program's user reach /in and /out, and returns what gives
// /out back afterwards.
func handOver(spec container.Spec, engine Engine, user identity) (restore func() error, err error) {
	nothing := func() error { return nil }
	if os.Getuid() != 0 || engine.rootless {
		return nothing, nil
	}
	if spec.Inputs != "" {
		if err := allow(spec.Inputs, 0o555); err != nil {
			return nil, err
		}
	}
	before, err := os.Stat(spec.Outputs)
	if err != nil {
		return nil, err
	}
	restore = func() error {
		return errors.Join(os.Chown(spec.Outputs, os.Getuid(), os.Getgid()), os.Chmod(spec.Outputs, before.Mode().Perm()))
	}
	if engine.remapped {
		// Which host user the program is, only the engine knows.
		return restore, os.Chmod(spec.Outputs, 0o777)
	}
	return restore, os.Chown(spec.Outputs, user.uid, user.gid)
}

// allow adds permission bits to those that a directory has.
func allow(dir string, bits os.FileMode) error {
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm()&bits == bits {
		return err
	}
	return os.Chmod(dir, info.Mode().Perm()|bits)
}

// runOnce creates a container, watches it to its end and removes it.
func (r *Runtime) runOnce(ctx context.Context, spec container.Spec, engine Engine, user identity, logs *container.Log) (result container.Result, err error) {
	id, result, err := r.create(ctx, spec, engine, user, logs)
	if id == "" {
		return result, err
	}
	defer func() { err = errors.Join(err, r.remove(ctx, id)) }()

	if ctx.Err() != nil {
		return container.Result{Reason: container.Cancelled}, nil
	}
	stream, err := r.attach(ctx, id)
	if err != nil {
		return container.Result{}, err
	}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		// An error means that the stream ended early, which the wait reports too.
		_, _ = stdcopy.StdCopy(logs, logs, stream.Reader)
	}()
	defer func() { drain(stream, copied) }()

	return r.supervise(ctx, spec, id, logs)
}

// drain waits for the rest of a stopped program's output. The engine closes
// the stream; closing it from here is for an engine that does not.
func drain(stream types.HijackedResponse, copied <-chan struct{}) {
	select {
	case <-copied:
	case <-time.After(askTimeout):
	}
	stream.Close()
	<-copied
}

// create makes the container. An empty id means that there is none: then the
// result or the error says why.
//
// It finishes even when ctx ends meanwhile, because a container that was made
// without this process learning its ID could not be removed.
func (r *Runtime) create(ctx context.Context, spec container.Spec, engine Engine, user identity, logs *container.Log) (id string, _ container.Result, _ error) {
	tag, err := r.tag(spec.Image)
	if err != nil {
		return "", container.Result{}, err
	}
	created, err := r.createFrom(ctx, spec, tag, engine, user)
	if cerrdefs.IsNotFound(err) {
		// Somebody removed the image since it was last looked at.
		r.forgetFacts(tag)
		if err := r.Ensure(ctx, spec.Image); err != nil {
			return "", container.Result{}, err
		}
		created, err = r.createFrom(ctx, spec, tag, engine, user)
	}
	if cerrdefs.IsInvalidArgument(err) && strings.Contains(strings.ToLower(err.Error()), "no command specified") {
		logs.Note("the image has no command of its own, and the job gave none")
		return "", container.Result{Reason: container.Exited, ExitCode: exitNotFound}, nil
	}
	if err != nil {
		return "", container.Result{}, r.fault("create a container for run "+spec.ID, err)
	}
	return created.ID, container.Result{}, nil
}

func (r *Runtime) createFrom(ctx context.Context, spec container.Spec, tag string, engine Engine, user identity) (dcontainer.CreateResponse, error) {
	facts, err := r.facts(ctx, tag)
	if err != nil {
		return dcontainer.CreateResponse{}, fmt.Errorf("image %s is not ready: %w", spec.Image.Digest, err)
	}
	detached, cancel := context.WithTimeout(context.WithoutCancel(ctx), createTimeout)
	defer cancel()
	return r.client.ContainerCreate(detached,
		config(spec, facts, user, r.opts.Owner, usesCDI(spec.GPUs, engine)),
		hostConfig(spec, facts, engine, user, r.opts), nil, nil, "")
}

// attach opens the output stream. It must come before start: the log driver is
// "none", so what is written before it is lost.
func (r *Runtime) attach(ctx context.Context, id string) (types.HijackedResponse, error) {
	stream, err := r.client.ContainerAttach(context.WithoutCancel(ctx), id, dcontainer.AttachOptions{Stream: true, Stdout: true, Stderr: true})
	if err != nil {
		return types.HijackedResponse{}, r.fault("attach to container "+id, err)
	}
	return stream, nil
}

// supervise starts the container, waits for the first of exit, cancellation,
// timeout and full outputs, makes sure that it has stopped, and says how it ended.
func (r *Runtime) supervise(ctx context.Context, spec container.Spec, id string, logs *container.Log) (container.Result, error) {
	if result, err := r.start(ctx, id, logs); err != nil || result.Reason != "" {
		return result, err
	}
	spec.HasStarted()
	waitCtx, stopWaiting := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWaiting()
	exited := r.exit(waitCtx, id)

	watchCtx, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	full := make(chan error, 1)
	go func() {
		full <- container.Watch(watchCtx, container.Quota{Dir: spec.Outputs, LimitBytes: spec.OutputLimit()})
	}()
	defer func() { stopWatching(); <-full }()
	timeout := time.NewTimer(spec.Timeout)
	defer timeout.Stop()

	select {
	case end := <-exited:
		switch {
		case end.err != nil:
			return container.Result{}, r.fault("wait for run "+spec.ID, end.err)
		case end.code == 0:
			return container.Result{Reason: container.Exited}, nil
		}
		return r.verdict(ctx, id, container.Exited)
	case <-ctx.Done():
		logs.Note("cancelled")
		return r.stop(ctx, id, container.Cancelled, exited)
	case <-timeout.C:
		logs.Note("stopped after %v, the job's time limit", spec.Timeout)
		return r.stop(ctx, id, container.TimedOut, exited)
	case err := <-full:
		full <- nil // for the deferred receive
		return r.kill(ctx, id, err, exited, logs)
	}
}

// exit is how waiting for a container ended.
type exit struct {
	code int64
	err  error // of the waiting, not the program's
}

// exit delivers one value when a container that was started has stopped, be that
// before the engine is asked: nothing but Run removes it.
func (r *Runtime) exit(ctx context.Context, id string) <-chan exit {
	stopped, failed := r.client.ContainerWait(ctx, id, dcontainer.WaitConditionNotRunning)
	exited := make(chan exit, 1)
	go func() {
		select {
		case answer := <-stopped:
			end := exit{code: answer.StatusCode}
			if answer.Error != nil {
				end.err = errors.New(answer.Error.Message)
			}
			exited <- end
		case err := <-failed:
			exited <- exit{err: err}
		}
	}()
	return exited
}

// start starts the container. A program that cannot be executed is a Result.
func (r *Runtime) start(ctx context.Context, id string, logs *container.Log) (container.Result, error) {
	detached, cancel := context.WithTimeout(context.WithoutCancel(ctx), createTimeout)
	defer cancel()
	err := r.client.ContainerStart(detached, id, dcontainer.StartOptions{})
	if err == nil {
		return container.Result{}, nil
	}
	state, inspectErr := r.state(ctx, id)
	if inspectErr == nil && (state.ExitCode == exitCannotRun || state.ExitCode == exitNotFound) {
		logs.Note("the command cannot be run: %v", err)
		return container.Result{Reason: container.Exited, ExitCode: state.ExitCode}, nil
	}
	return container.Result{}, r.fault("start container "+id, err)
}

// stop asks the program to end, then makes it.
func (r *Runtime) stop(ctx context.Context, id string, reason container.Reason, exited <-chan exit) (container.Result, error) {
	graceSeconds := int(max(r.opts.StopGrace, time.Second) / time.Second)
	detached, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.opts.StopGrace+removeTimeout)
	defer cancel()
	if err := r.client.ContainerStop(detached, id, dcontainer.StopOptions{Timeout: &graceSeconds}); err != nil {
		return container.Result{}, r.fault("stop container "+id, err)
	}
	return r.gone(detached, id, reason, exited)
}

// kill ends a program that is doing harm to the machine's disk, without grace.
func (r *Runtime) kill(ctx context.Context, id string, cause error, exited <-chan exit, logs *container.Log) (container.Result, error) {
	detached, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	if err := r.client.ContainerKill(detached, id, "SIGKILL"); err != nil && !cerrdefs.IsConflict(err) && !cerrdefs.IsNotFound(err) {
		return container.Result{}, r.fault("kill container "+id, err)
	}
	if !errors.Is(cause, container.ErrTooLarge) {
		return container.Result{}, cause
	}
	logs.Note("outputs: %v", cause)
	return r.gone(detached, id, container.OutputTooLarge, exited)
}

// gone waits until the engine says that a program which was told to end has.
func (r *Runtime) gone(ctx context.Context, id string, reason container.Reason, exited <-chan exit) (container.Result, error) {
	select {
	case end := <-exited:
		if end.err != nil {
			return container.Result{}, r.fault("wait for container "+id, end.err)
		}
		return r.verdict(ctx, id, reason)
	case <-ctx.Done():
		return container.Result{}, api.Errorf(api.Unavailable, "docker: container %s did not stop within %v", id, removeTimeout)
	}
}

// signal returns the signal that somebody sent to the container through the
// engine while it ran, if it says so within killEventDelay of the end. The times
// are those of the engine, whose clock may be that of another machine.
func (r *Runtime) signal(ctx context.Context, id string, state dcontainer.State) (signal string, sent bool, err error) {
	started, startErr := time.Parse(time.RFC3339Nano, state.StartedAt)
	finished, finishErr := time.Parse(time.RFC3339Nano, state.FinishedAt)
	if err := errors.Join(startErr, finishErr); err != nil {
		return "", false, api.Errorf(api.Unavailable, "docker: the engine does not say when container %s ran: %w", id, err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), askTimeout)
	defer cancel()
	messages, ended := r.client.Events(ctx, events.ListOptions{
		// The engine keeps what happened last, and a signal came just before the exit.
		Since: timestamp(started), Until: timestamp(finished.Add(killEventDelay)),
		Filters: filters.NewArgs(
			filters.Arg("type", string(events.ContainerEventType)),
			filters.Arg("event", string(events.ActionKill)),
			filters.Arg("container", id),
		),
	})
	select {
	case event := <-messages:
		return event.Actor.Attributes["signal"], true, nil
	case <-ended:
		return "", false, nil
	}
}

func timestamp(t time.Time) string { return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond()) }

// verdict reads how the program ended. A kill by the memory limit counts only
// if the program failed: one that lost a helper and recovered did not.
//
// The engine's OOMKilled is not enough. It learns of the kill and of the exit
// by two paths, and loses the first now and then when the machine is busy. But
// if a program died of SIGKILL and nobody sent one through the engine, then the
// kernel did, for want of memory. A program that exits with 137 of its own will
// is reported as out of memory too; the engine cannot tell the two apart.
func (r *Runtime) verdict(ctx context.Context, id string, reason container.Reason) (container.Result, error) {
	state, err := r.state(ctx, id)
	if err != nil {
		return container.Result{}, err
	}
	result := container.Result{Reason: reason, ExitCode: state.ExitCode}
	if reason != container.Exited || state.ExitCode == 0 {
		return result, nil
	}
	if state.OOMKilled {
		result.Reason = container.OutOfMemory
		return result, nil
	}
	if state.ExitCode != exitKilled && state.ExitCode != exitStopped {
		return result, nil
	}
	signal, sent, err := r.signal(ctx, id, state)
	if err != nil {
		return container.Result{}, err
	}
	if sent {
		return container.Result{}, api.Errorf(api.Unavailable, "docker: somebody else stopped container %s (signal %s)", id, signal)
	}
	if state.ExitCode == exitKilled {
		result.Reason = container.OutOfMemory
	}
	return result, nil
}

func (r *Runtime) state(ctx context.Context, id string) (dcontainer.State, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), askTimeout)
	defer cancel()
	found, err := r.client.ContainerInspect(ctx, id)
	if err != nil {
		return dcontainer.State{}, r.fault("inspect container "+id, err)
	}
	return *found.State, nil
}
