// Package container is the contract between the worker and whatever runs a
// job's program: a Spec goes in, a Result comes out.
//
// The implementations are container/docker (a real engine) and container/wasm
// (embedded WebAssembly). Fake, in this package, is the one for tests.
package container

import (
	"context"
	"io"
	"time"
)

// Mount points that every job sees, in every runtime.
const (
	InputDir  = "/in"  // read-only: the job's inputs
	OutputDir = "/out" // writable: what the job leaves here is its result
	TempDir   = "/tmp" // writable, in memory, gone with the container
)

// Image names a program, always by content.
type Image struct {
	// Ref is a registry reference pinned to a digest ("host/name@sha256:…"),
	// empty for an image that travels as an archive.
	Ref string
	// Archive is the path of a local file: a docker-save or OCI-layout tar for
	// Docker, a .wasm module for wasm. Empty for a registry image.
	Archive string
	// Digest is "sha256:<hex>": of the manifest for a registry image, of the
	// archive file otherwise. It is the key under which a runtime caches.
	Digest string
}

// Spec is one run of a program.
type Spec struct {
	// ID names the run: the attempt ID. Two live runs never share one.
	ID    string
	Image Image
	// Command replaces the image's own command; its entrypoint stays.
	Command []string
	// Env holds NAME=value pairs.
	Env []string
	// Inputs is the host directory shown read-only at /in. Empty: an empty /in.
	// What is in it must be readable by any user, because the program runs as
	// one that owns nothing; the directory itself is made so.
	Inputs string
	// Outputs is the host directory shown at /out. It must exist and be empty.
	Outputs string

	// GPUs are device UUIDs. Nothing else of the host's GPUs is visible.
	GPUs []string

	MilliCPUs   int64 // 1000 = one core; 0 = no limit
	MemoryBytes int64 // 0 = the runtime's default, never "unlimited"
	// OutputBytes bounds what /out may hold; a run that exceeds it is stopped.
	// 0 = DefaultOutputBytes, never "unlimited".
	OutputBytes int64
	PIDs        int64         // 0 = the runtime's default
	Timeout     time.Duration // wall time; 0 is refused

	// Network gives the job the owner's default network. Off: loopback only.
	Network bool

	// Started, if set, is called once, when the program has started as far as the
	// runtime can tell: an engine's init process may still fail to execute it. Run
	// goes on once it returns.
	Started func()

	// Logs receives stdout and stderr, interleaved as written. May be nil.
	// Writes come from one goroutine at a time and stop before Run returns.
	Logs io.Writer
}

// Reason says how a run ended.
type Reason string

// The reasons a run can end for. Exited alone carries a meaningful exit code.
const (
	Exited         Reason = "exited"
	OutOfMemory    Reason = "out_of_memory"
	TimedOut       Reason = "timed_out"
	OutputTooLarge Reason = "output_too_large"
	Cancelled      Reason = "cancelled"
)

// Result is how a run ended. A program that fails is a Result, not an error.
type Result struct {
	Reason   Reason
	ExitCode int
	Started  time.Time
	Ended    time.Time
	// OutputBytes is what /out held at the end, as far as it was counted.
	OutputBytes int64
}

// OK reports whether the program ran to its end and exited with 0.
func (r Result) OK() bool { return r.Reason == Exited && r.ExitCode == 0 }

// Runtime runs programs. All methods are safe for concurrent use.
type Runtime interface {
	// Name is "docker", "wasm" or "fake"; it is part of the hardware class.
	Name() string

	// Ensure makes the image ready to run and returns once it is. It is
	// idempotent, and concurrent calls for one digest do the work once. An
	// error of kind api.NotFound or api.Unsupported is the image's fault (missing,
	// or no platform that runs here); any other error is this machine's.
	Ensure(ctx context.Context, image Image) error

	// Forget drops a cached image; unknown digests are no error.
	Forget(ctx context.Context, image Image) error

	// Run runs spec and returns when everything of it is gone from the machine
	// (process, container, mounts), whatever the outcome; only spec.Outputs
	// stays. Cancelling ctx stops the run and yields Reason Cancelled. The error is
	// non-nil only when the run could not be started or watched, which is this
	// machine's fault, never the program's.
	Run(ctx context.Context, spec Spec) (Result, error)

	// Sweep removes what an earlier process with the same owner label left
	// behind, and returns how many runs that were. Called before the first Run.
	Sweep(ctx context.Context) (int, error)
}
