// Package nvml finds NVIDIA GPUs through the driver's management library. The
// library is loaded in a child process, the program itself started again with
// a hidden first argument, so that a driver that crashes or hangs takes down
// the child and nothing else. A program that uses this package calls
//
//	if nvml.MaybeProbe(os.Args[1:]) {
//		return
//	}
//
// as the first thing in main. ../DESIGN.md says why it is made so.
package nvml

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync/atomic"
	"time"

	"github.com/musternet/muster/gpu"
)

const (
	// LibraryEnv names another library than the driver's, by a name that the
	// dynamic loader searches for or by a path.
	LibraryEnv = "MUSTER_NVML_LIBRARY"
	// DefaultTimeout bounds one detection. A first call without the persistence
	// daemon makes the driver initialize every GPU, which takes seconds.
	DefaultTimeout = 10 * time.Second

	defaultLibrary = "libnvidia-ml.so.1"
	// probeArg makes the program a probe: probeArg LIBRARY LIMIT.
	probeArg = "__nvml-probe"
	// probeEnv marks the child, so that a program whose main forgot MaybeProbe
	// does not start itself for ever.
	probeEnv = "MUSTER_NVML_PROBE"
	// maxAnswerBytes bounds what is read from the child: 256 devices with 7
	// slices each need about 0.8 MB.
	maxAnswerBytes = 1 << 20
	maxStderrBytes = 64 << 10
	// reapGrace is how long a killed child is waited for. One that is stuck in
	// the kernel does not end even then.
	reapGrace = 250 * time.Millisecond
)

// Options say how devices are found. The zero value is right for production.
type Options struct {
	// Library is loaded instead of the driver's; empty means what LibraryEnv
	// names, and else libnvidia-ml.so.1.
	Library string
	// Timeout bounds one detection; 0 means DefaultTimeout.
	Timeout time.Duration
}

type detector struct {
	library string
	timeout time.Duration
	wait    func(*exec.Cmd) error // (*exec.Cmd).Wait, but for tests
	// stuck is the process ID of a child that outlived its kill, 0 if none.
	stuck atomic.Int64
}

// New makes the detector of this machine's NVIDIA GPUs. It does no work.
func New(o Options) gpu.Detector {
	d := &detector{library: o.Library, timeout: o.Timeout, wait: (*exec.Cmd).Wait}
	if d.library == "" {
		d.library = os.Getenv(LibraryEnv)
	}
	if d.library == "" {
		d.library = defaultLibrary
	}
	if d.timeout <= 0 {
		d.timeout = DefaultTimeout
	}
	return d
}

// Detect implements gpu.Detector. It is safe for concurrent use.
func (d *detector) Detect(ctx context.Context) gpu.Inventory {
	if unsupported != "" {
		return gpu.Inventory{Reason: unsupported}
	}
	if os.Getenv(probeEnv) != "" {
		return gpu.Inventory{Reason: "GPU detection was called inside its own probe; main has to call nvml.MaybeProbe first"}
	}
	if pid := d.stuck.Load(); pid != 0 {
		return gpu.Inventory{Reason: fmt.Sprintf("the NVIDIA driver does not let go of an earlier probe (process %d, killed and still there); reboot this machine", pid)}
	}
	limit := d.timeout
	if deadline, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(deadline)-reapGrace)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return d.probe(ctx, limit)
}

// probe runs the child until it ends or ctx does, and reads its answer.
func (d *detector) probe(ctx context.Context, limit time.Duration) gpu.Inventory {
	executable, err := os.Executable()
	if err != nil {
		return gpu.Inventory{Reason: fmt.Sprintf("GPUs were not looked for: this program's file is not known: %v", err)}
	}
	cmd := exec.CommandContext(ctx, executable, probeArg, d.library, limit.String())
	cmd.Env = append(os.Environ(), probeEnv+"=1")
	stdout, stderr := &limited{max: maxAnswerBytes}, &limited{max: maxStderrBytes, discard: true}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.WaitDelay = reapGrace / 2 // for pipes that a grandchild holds open
	if err := cmd.Start(); err != nil {
		if ctx.Err() != nil {
			return gpu.Inventory{Reason: timeoutReason(ctx, limit)}
		}
		return gpu.Inventory{Reason: fmt.Sprintf("GPUs were not looked for: the probe did not start: %v", err)}
	}
	pid := int64(cmd.Process.Pid)
	done := make(chan error, 1)
	go func() { // ends with the child
		done <- d.wait(cmd)
		d.stuck.CompareAndSwap(pid, 0)
	}()
	select {
	case err = <-done:
	case <-ctx.Done():
		select {
		case err = <-done:
		case <-time.After(reapGrace):
			d.stuck.Store(pid)
			if len(done) > 0 { // it ended just now, perhaps before Store
				d.stuck.CompareAndSwap(pid, 0)
			}
			return gpu.Inventory{Reason: timeoutReason(ctx, limit) + fmt.Sprintf(", and its probe (process %d) cannot be killed", pid)}
		}
	}
	switch {
	case stdout.over:
		return gpu.Inventory{Reason: fmt.Sprintf("the NVML probe answered with more than %d bytes", maxAnswerBytes)}
	case err != nil && ctx.Err() != nil:
		return gpu.Inventory{Reason: timeoutReason(ctx, limit)}
	case err != nil:
		return gpu.Inventory{Reason: exitReason(err, stderr.data)}
	}
	return readAnswer(stdout.data)
}

// readAnswer decodes what a child printed that ended well.
func readAnswer(data []byte) gpu.Inventory {
	var found gpu.Inventory
	if err := json.Unmarshal(data, &found); err != nil {
		return gpu.Inventory{Reason: fmt.Sprintf("the NVML probe's answer is unreadable (%d bytes that begin with %.40q)", len(data), data)}
	}
	switch {
	case len(found.Devices) > 0:
		found.Reason = ""
	case found.Reason == "":
		return gpu.Inventory{Reason: "the NVML probe answered with neither devices nor a reason"}
	}
	return found
}

// MaybeProbe does the child's part and reports true if args, the arguments
// without the program's name, ask for it; the program then has to end. It
// prints the inventory as JSON on standard output.
func MaybeProbe(args []string) (handled bool) {
	if len(args) == 0 || args[0] != probeArg {
		return false
	}
	if err := runProbe(args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return true
}

func runProbe(args []string, stdout io.Writer) error {
	if len(args) != 2 {
		return fmt.Errorf("%s: want a library and a time limit, got %d arguments", probeArg, len(args))
	}
	limit, err := time.ParseDuration(args[1])
	if err != nil {
		return fmt.Errorf("%s: time limit: %w", probeArg, err)
	}
	// The parent kills this process at its limit. Where the parent is gone, a
	// probe that hangs must not stay.
	orphan := time.AfterFunc(max(limit, 0)+time.Second, func() { os.Exit(exitHung) })
	defer orphan.Stop()
	answer, err := json.Marshal(probe(args[0]))
	if err != nil {
		return fmt.Errorf("%s: %w", probeArg, err)
	}
	_, err = stdout.Write(append(answer, '\n'))
	return err
}

// limited keeps the first max bytes written to it. More is an error, or is
// thrown away.
type limited struct {
	data    []byte
	max     int
	discard bool
	over    bool
}

var errTooMuch = errors.New("too much output")

func (l *limited) Write(p []byte) (int, error) {
	keep := min(len(p), l.max-len(l.data))
	l.data = append(l.data, p[:keep]...)
	if keep < len(p) {
		l.over = true
		if !l.discard {
			return keep, errTooMuch
		}
	}
	return len(p), nil
}
