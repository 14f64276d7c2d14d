// Load measures muster from outside: real scheduler processes with fsync on,
// simulated workers that speak the real protocol, and the limit that raw Raft
// sets on the same machine in the same run. See bench/README.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// options are the command line.
type options struct {
	only       string
	schedulers int
	workers    int
	slots      int
	clients    int
	duration   time.Duration
	binary     string
	dir        string
	profile    string
	keep       bool
}

func main() {
	o := options{}
	flag.StringVar(&o.only, "only", "lifecycle", "measure this alone")
	flag.IntVar(&o.schedulers, "schedulers", 3, "scheduler processes")
	flag.IntVar(&o.workers, "workers", 1000, "simulated workers")
	flag.IntVar(&o.slots, "slots", 16, "attempts that a simulated worker takes at once")
	flag.IntVar(&o.clients, "clients", 8, "submitting clients")
	flag.DurationVar(&o.duration, "duration", 10*time.Second, "how long to measure in a steady state")
	flag.StringVar(&o.binary, "binary", "", "muster binary (default: built now)")
	flag.StringVar(&o.dir, "dir", "", "directory for data (default: a temporary one)")
	flag.BoolVar(&o.keep, "keep", false, "keep the data of the schedulers")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "muster-load-"); err != nil {
			return err
		}
	}
	if !o.keep {
		defer func() { err = errors.Join(err, os.RemoveAll(o.dir)) }()
	}
	if o.binary == "" {
		if o.binary, err = build(ctx, o.dir); err != nil {
			return err
		}
	}
	switch o.only {
	case "lifecycle":
		return lifecycle(ctx, o)
	}
	return fmt.Errorf("--only %s: no such measurement", o.only)
}

// build builds muster from the source that this command comes from.
func build(ctx context.Context, dir string) (string, error) {
	out := filepath.Join(dir, "muster")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, "github.com/musternet/muster/cmd/muster")
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("building muster: %w", err)
	}
	return out, nil
}

// selfCPU is the processor time that this process has used.
func selfCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// heapBytes is this process's heap.
func heapBytes() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
