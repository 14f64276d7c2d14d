package container

import (
	"errors"
	"io"
	"os"
	"strings"

	"github.com/musternet/muster/api"
)

// What a Spec's zero values mean, in every runtime.
const (
	DefaultMemoryBytes = 2 << 30
	DefaultOutputBytes = 10 << 30
	DefaultPIDs        = 512
)

// Check refuses a Spec that no runtime can run, with an error of kind
// api.Invalid that names the field.
func (s Spec) Check() error {
	switch {
	case s.ID == "":
		return api.Errorf(api.Invalid, "container: a run needs an ID")
	case s.Timeout <= 0:
		return api.Errorf(api.Invalid, "container: run %s: timeout %v: a run needs a wall time limit above zero", s.ID, s.Timeout)
	case s.MilliCPUs < 0 || s.MemoryBytes < 0 || s.OutputBytes < 0 || s.PIDs < 0:
		return api.Errorf(api.Invalid, "container: run %s: limits below zero: milliCPUs %d, memory %d, output %d, PIDs %d",
			s.ID, s.MilliCPUs, s.MemoryBytes, s.OutputBytes, s.PIDs)
	}
	for _, pair := range s.Env {
		if name, _, ok := strings.Cut(pair, "="); !ok || name == "" || strings.ContainsRune(pair, 0) {
			return api.Errorf(api.Invalid, "container: run %s: environment entry %q is not NAME=value", s.ID, pair)
		}
	}
	for _, arg := range s.Command {
		if strings.ContainsRune(arg, 0) {
			return api.Errorf(api.Invalid, "container: run %s: argument %q holds a NUL byte", s.ID, arg)
		}
	}
	return s.checkOutputs()
}

func (s Spec) checkOutputs() error {
	dir, err := os.Open(s.Outputs)
	if err != nil {
		return api.Errorf(api.Invalid, "container: run %s: outputs: %w", s.ID, err)
	}
	defer dir.Close()
	switch names, err := dir.Readdirnames(1); {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		return api.Errorf(api.Invalid, "container: run %s: outputs: %w", s.ID, err)
	default:
		return api.Errorf(api.Invalid, "container: run %s: outputs: %s is not empty (it holds %q); every run needs its own directory",
			s.ID, s.Outputs, names[0])
	}
}

// HasStarted tells whoever wants to know that the program has started.
func (s Spec) HasStarted() {
	if s.Started != nil {
		s.Started()
	}
}

// Memory is the memory limit in bytes, never zero.
func (s Spec) Memory() int64 { return orDefault(s.MemoryBytes, DefaultMemoryBytes) }

// OutputLimit is what /out may hold in bytes, never zero.
func (s Spec) OutputLimit() int64 { return orDefault(s.OutputBytes, DefaultOutputBytes) }

// PIDLimit is how many processes and threads may live at once, never zero.
func (s Spec) PIDLimit() int64 { return orDefault(s.PIDs, DefaultPIDs) }

func orDefault(value, fallback int64) int64 {
	if value == 0 {
		return fallback
	}
	return value
}
