// Command muster is the one binary: schedulers, workers, and everything that a
// customer, an owner or an operator does with them.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/gpu/nvml"
)

// Exit codes, as the help text states them.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitUnreachable = 3
)

func main() {
	if nvml.MaybeProbe(os.Args[1:]) {
		return
	}
	os.Exit(run())
}

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRoot()
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitDone
	}
	err = api.FromConnect(err)
	fmt.Fprintf(os.Stderr, "muster: %v\n", err)
	var usage *usageError
	if errors.As(err, &usage) {
		fmt.Fprintf(os.Stderr, "See: %s --help\n", cmd.CommandPath())
		return exitUsage
	}
	if api.KindOf(err) == api.Unavailable {
		return exitUnreachable
	}
	return exitFailed
}

// usageError is a command line that can't be carried out as it is.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }
