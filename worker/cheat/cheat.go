// Package cheat makes a worker cheat, so that anybody can watch it being
// caught: in the demo, in tests, and before trusting a network with money. It
// wraps a runtime and lies in the ways that real cheaters do: it saves work, or
// does none.
package cheat

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/container"
)

// The ways to cheat.
const (
	FewerSamples = "fewer-samples" // renders with 3/4 of the --samples it was told
	StaleFrame   = "stale-frame"   // sends an earlier frame again
	MadeUpLine   = "made-up-line"  // invents a completion
)

// Kinds are the names that Wrap takes.
var Kinds = []string{FewerSamples, StaleFrame, MadeUpLine}

// Wrap is a runtime that cheats in all the given ways, wherever a run gives
// occasion, and is honest otherwise. dir keeps earlier frames.
func Wrap(honest container.Runtime, dir string, kinds ...string) (container.Runtime, error) {
	for _, k := range kinds {
		if !slices.Contains(Kinds, k) {
			return nil, api.Errorf(api.Invalid, "cheat %q: want one of %s", k, strings.Join(Kinds, ", "))
		}
	}
	return &runtime{Runtime: honest, dir: dir, kinds: kinds}, nil
}

type runtime struct {
	container.Runtime
	dir   string
	kinds []string

	mu   sync.Mutex
	kept string // guarded by mu; a directory with an earlier frame
}

func (r *runtime) Run(ctx context.Context, spec container.Spec) (container.Result, error) {
	if slices.Contains(r.kinds, FewerSamples) {
		spec.Command = fewerSamples(spec.Command)
	}
	res, err := r.Runtime.Run(ctx, spec)
	if err != nil || !res.OK() {
		return res, err
	}
	if slices.Contains(r.kinds, StaleFrame) {
		if err := r.staleFrame(spec.Outputs); err != nil {
			return res, fmt.Errorf("cheating: %w", err)
		}
	}
	if slices.Contains(r.kinds, MadeUpLine) {
		if err := madeUpLine(filepath.Join(spec.Outputs, "results.jsonl")); err != nil {
			return res, fmt.Errorf("cheating: %w", err)
		}
	}
	return res, nil
}

func fewerSamples(command []string) []string {
	out := slices.Clone(command)
	for i, arg := range out[:max(len(out)-1, 0)] {
		if n, err := strconv.Atoi(out[i+1]); arg == "--samples" && err == nil && n > 1 {
			out[i+1] = strconv.Itoa(n * 3 / 4)
		}
	}
	return out
}

// staleFrame replaces every frame by the first that this worker ever made.
func (r *runtime) staleFrame(out string) error {
	entries, err := os.ReadDir(out)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range entries {
		frame := filepath.Join(out, e.Name())
		switch {
		case !e.IsDir():
		case r.kept == "":
			kept := filepath.Join(r.dir, "stale-frame")
			if err := os.RemoveAll(kept); err != nil {
				return err
			}
			if err := os.CopyFS(kept, os.DirFS(frame)); err != nil {
				return err
			}
			r.kept = kept
		default:
			if err := os.RemoveAll(frame); err != nil {
				return err
			}
			if err := os.CopyFS(frame, os.DirFS(r.kept)); err != nil {
				return err
			}
		}
	}
	return nil
}

// madeUpLine answers the first prompt of a run with something that looks
// plausible.
func madeUpLine(path string) error {
	data, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil
	} else if err != nil {
		return err
	}
	first, rest, _ := bytes.Cut(data, []byte("\n"))
	var line map[string]json.RawMessage
	if err := json.Unmarshal(first, &line); err != nil || line["completion"] == nil {
		return nil
	}
	line["completion"] = json.RawMessage(`"yes."`)
	invented, err := json.Marshal(line)
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(append(invented, '\n'), rest...), fs.FileMode(0o644))
}
