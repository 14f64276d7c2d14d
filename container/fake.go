package container

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/musternet/muster/api"
)

// Fake is a Runtime for tests: it starts nothing and does what its fields say.
// Set the fields before the first call. The zero Fake succeeds at everything.
type Fake struct {
	// OnRun plays the program: it may write to spec.Outputs and spec.Logs, and
	// wait for ctx. Nil: exit with 0 at once. A Result without a Reason means
	// Exited; Started and Ended are filled in where they are zero. A ctx that
	// ended before OnRun returned makes the Reason Cancelled or TimedOut, as it
	// would with a real program.
	OnRun func(ctx context.Context, spec Spec) (Result, error)
	// OnEnsure decides whether an image can be had. Nil: yes.
	OnEnsure func(ctx context.Context, image Image) error
	// Leftovers is what the next Sweep reports.
	Leftovers atomic.Int64

	gate Gate

	mu      sync.Mutex // guards what follows
	live    map[string]bool
	ready   map[string]bool
	started int
	peak    int
}

var _ Runtime = (*Fake)(nil)

// Name implements Runtime.
func (f *Fake) Name() string { return "fake" }

// Ensure implements Runtime; OnEnsure is asked once per digest until it says yes.
func (f *Fake) Ensure(ctx context.Context, image Image) error {
	leave, err := f.gate.Enter(ctx, image.Digest)
	if err != nil {
		return err
	}
	defer leave()
	if f.Ready(image.Digest) {
		return nil
	}
	if f.OnEnsure != nil {
		if err := f.OnEnsure(ctx, image); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ready == nil {
		f.ready = make(map[string]bool)
	}
	f.ready[image.Digest] = true
	return nil
}

// Forget implements Runtime.
func (f *Fake) Forget(_ context.Context, image Image) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.ready, image.Digest)
	return nil
}

// Run implements Runtime. It refuses what every runtime refuses, an image that
// was not ensured, and a second live run of one ID.
func (f *Fake) Run(ctx context.Context, spec Spec) (Result, error) {
	if err := spec.Check(); err != nil {
		return Result{}, err
	}
	if !f.Ready(spec.Image.Digest) {
		return Result{}, api.Errorf(api.Internal, "fake: run %s: image %s was not ensured", spec.ID, spec.Image.Digest)
	}
	if err := f.enter(spec.ID); err != nil {
		return Result{}, err
	}
	defer f.leave(spec.ID)

	began := time.Now()
	runCtx, cancel := context.WithTimeout(ctx, spec.Timeout)
	defer cancel()
	spec.HasStarted()
	result, err := f.play(runCtx, spec)
	if err != nil && runCtx.Err() == nil {
		return Result{}, err
	}
	switch {
	case ctx.Err() != nil:
		result.Reason = Cancelled
	case errors.Is(runCtx.Err(), context.DeadlineExceeded):
		result.Reason = TimedOut
	case result.Reason == "":
		result.Reason = Exited
	}
	if result.Started.IsZero() {
		result.Started = began
	}
	if result.Ended.IsZero() {
		result.Ended = time.Now()
	}
	if result.OutputBytes != 0 {
		return result, nil // the script said so itself
	}
	return Settle(result, spec, NewLog(nil, 0))
}

func (f *Fake) play(ctx context.Context, spec Spec) (Result, error) {
	if f.OnRun == nil {
		return Result{}, nil
	}
	return f.OnRun(ctx, spec)
}

// Sweep implements Runtime.
func (f *Fake) Sweep(context.Context) (int, error) {
	return int(f.Leftovers.Swap(0)), nil
}

// Ready reports whether an image was ensured and not forgotten since.
func (f *Fake) Ready(digest string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ready[digest]
}

// Live is the number of runs right now.
func (f *Fake) Live() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.live)
}

// Peak is the largest number of runs that were live at once.
func (f *Fake) Peak() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.peak
}

// Started is the number of runs so far, the live ones included.
func (f *Fake) Started() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.started
}

func (f *Fake) enter(id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.live[id] {
		return api.Errorf(api.Invalid, "fake: a run with ID %s is live already", id)
	}
	if f.live == nil {
		f.live = make(map[string]bool)
	}
	f.live[id] = true
	f.started++
	f.peak = max(f.peak, len(f.live))
	return nil
}

func (f *Fake) leave(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.live, id)
}
