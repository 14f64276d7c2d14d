// Tinylm is a small language model with its trainer. It is an example of a job
// for muster: an item is a line of a prompts file, and its completion depends on
// the weights and the line alone, so that two honest machines agree on it.
//
//	tinylm run --prompts prompts.jsonl --items 0,5,7 --out /out
//
// leaves /out/results.jsonl, one line per item. The other commands make what
// this one uses: train (the weights), prompts (the prompts file) and grade.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/musternet/muster/examples/internal/items"
)

// Exit codes: 2 tells that the command line is wrong and a retry is useless.
const (
	exitFailure = 1
	exitUsage   = 2
)

// published is the recipe of weights.bin.
var published = recipe{
	config: config{Vocab: 256, Dim: 64, Layers: 2, Heads: 4, KVHeads: 2, Hidden: 192, Context: 128},
	seed:   1, steps: 900, batch: 16, rate: 0.004, warmup: 50, decay: 0.05, clip: 1,
}

const usage = `usage:
  tinylm run --prompts FILE.jsonl [--items 0,5,7-9] [--max-tokens N] [--weights FILE] [--out DIR]
  tinylm grade [--weights FILE]
  tinylm train --out FILE [--seed N] [--steps N]
  tinylm prompts
`

// usageError is a mistake in the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	err := dispatch(args, stdout, stderr)
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
		return 0
	case errors.As(err, &usageError{}):
		fmt.Fprintln(stderr, "tinylm:", err)
		return exitUsage
	}
	fmt.Fprintln(stderr, "tinylm:", err)
	return exitFailure
}

func dispatch(args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 || strings.HasPrefix(args[0], "-") {
		fmt.Fprint(stderr, usage)
		if len(args) > 0 && slices.Contains([]string{"-h", "-help", "--help"}, args[0]) {
			return nil
		}
		return usagef("want a command: run, grade, train or prompts")
	}
	set := flag.NewFlagSet("tinylm "+args[0], flag.ContinueOnError)
	set.SetOutput(stderr)
	switch args[0] {
	case "run":
		return runPrompts(set, args[1:], stderr)
	case "grade":
		return runGrade(set, args[1:], stdout)
	case "train":
		return runTrain(set, args[1:], stderr)
	case "prompts":
		return runWritePrompts(set, args[1:], stdout)
	}
	return usagef("unknown command %q: want run, grade, train or prompts", args[0])
}

func parse(set *flag.FlagSet, args []string) error {
	if err := set.Parse(args); errors.Is(err, flag.ErrHelp) {
		return err
	} else if err != nil {
		return usageError{err}
	}
	if set.NArg() > 0 {
		return usagef("unexpected argument %q", set.Arg(0))
	}
	return nil
}

func runPrompts(set *flag.FlagSet, args []string, stderr io.Writer) error {
	weightsPath := set.String("weights", "", "weights `file` (default: those in this program)")
	promptsPath := set.String("prompts", "", "prompts `file`, one JSON object per line")
	list := set.String("items", "", "`list` of lines to answer, counted from 0, such as 0,5,7-9 (default: all)")
	most := set.Int("max-tokens", 32, "most tokens to write where a line does not say")
	out := set.String("out", "/out", "`directory` for results.jsonl")
	if err := parse(set, args); err != nil {
		return err
	}
	if *promptsPath == "" {
		return usagef("--prompts is missing")
	}
	w, err := loadWeights(*weightsPath)
	if err != nil {
		return err
	}
	if *most < 1 || *most > w.Context {
		return usagef("--max-tokens %d: want 1 to %d", *most, w.Context)
	}
	b, err := readBounded(*promptsPath, maxPromptsBytes)
	if err != nil {
		return err
	}
	lines := splitLines(b)
	if len(lines) == 0 {
		return fmt.Errorf("%s has no lines", *promptsPath)
	}
	if *list == "" {
		*list = fmt.Sprintf("0-%d", len(lines)-1)
	}
	numbers, err := items.Parse(*list, 0, len(lines)-1)
	if err != nil {
		return usagef("--items %.80q: %w", *list, err)
	}
	start := time.Now()
	results, err := answer(w, lines, numbers, *most)
	if err != nil {
		return fmt.Errorf("%s: %w", *promptsPath, err)
	}
	encoded, err := encodeLines(results)
	if err != nil {
		return err
	}
	if err := writeWhole(filepath.Join(*out, "results.jsonl"), encoded); err != nil {
		return err
	}
	fmt.Fprintf(stderr, "%d completions in %.2f s\n", len(results), time.Since(start).Seconds())
	return nil
}

func runGrade(set *flag.FlagSet, args []string, stdout io.Writer) error {
	weightsPath := set.String("weights", "", "weights `file` (default: those in this program)")
	if err := parse(set, args); err != nil {
		return err
	}
	w, err := loadWeights(*weightsPath)
	if err != nil {
		return err
	}
	topics, results := grade(w)
	for _, topic := range topics {
		fmt.Fprintf(stdout, "%-22s %3d of %3d right\n", topic, results[topic].right, results[topic].asked)
	}
	return nil
}

func runTrain(set *flag.FlagSet, args []string, stderr io.Writer) error {
	r := published
	out := set.String("out", "", "weights `file` to write")
	set.Uint64Var(&r.seed, "seed", r.seed, "seed of the random numbers")
	set.IntVar(&r.steps, "steps", r.steps, "steps")
	if err := parse(set, args); err != nil {
		return err
	}
	if *out == "" {
		return usagef("--out is missing")
	}
	if r.steps <= r.warmup || r.steps > 1_000_000 {
		return usagef("--steps %d: want %d to 1000000", r.steps, r.warmup+1)
	}
	sum := 0.0
	w := train(r, trainingSet(), func(step int, loss float64) {
		if sum += loss; step%100 == 0 {
			fmt.Fprintf(stderr, "step %d of %d: loss %.4f\n", step, r.steps, sum/100)
			sum = 0
		}
	})
	return writeWhole(*out, encodeWeights(w))
}

func runWritePrompts(set *flag.FlagSet, args []string, stdout io.Writer) error {
	if err := parse(set, args); err != nil {
		return err
	}
	b, err := promptsFile()
	if err != nil {
		return err
	}
	_, err = stdout.Write(b)
	return err
}

// promptsFile is the content of prompts.jsonl.
func promptsFile() ([]byte, error) {
	var prompts []prompt
	for i, f := range promptFacts() {
		prompts = append(prompts, prompt{CustomID: fmt.Sprintf("%s-%03d", f.topic, i), Prompt: f.prompt})
	}
	return encodeLines(prompts)
}
