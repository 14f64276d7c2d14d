// Sim drives the real placement engine and the real replicated state in virtual
// time, with up to 50,000 workers of mixed GPUs and 10,000,000 items that wait:
// what a decision costs as the network grows, how well GPUs are filled, and what
// customers get of them. See bench/README.md.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"slices"
	"text/tabwriter"
	"time"
)

// size is how much is simulated.
type size struct {
	sizes      []int // workers
	decisions  int   // that are measured, for each size
	queued     uint64
	spread     int // workers
	contention int // workers
	hours      float64
	makespan   int // workers
	tasks      int
}

var (
	quick = size{[]int{100, 1000, 10_000, 50_000}, 10_000, 10_000_000, 5000, 120, 4, 60, 4000}
	full  = size{[]int{100, 1000, 10_000, 50_000}, 100_000, 10_000_000, 5000, 400, 24, 200, 60_000}
)

func main() {
	small := flag.Bool("quick", false, "simulate less: some seconds instead of some minutes")
	seed := flag.Uint64("seed", 1, "what is random follows from this number")
	out := flag.String("out", "", "file for the results as flat JSON (default: standard output)")
	profile := flag.String("profile", "", "file for a CPU profile")
	flag.Parse()
	if err := simulate(*small, *seed, *out, *profile); err != nil {
		fmt.Fprintln(os.Stderr, "sim:", err)
		os.Exit(1)
	}
}

// simulate runs everything and reports it: the table for people goes to standard
// error, so that standard output can be read by programs.
func simulate(small bool, seed uint64, out, profile string) (err error) {
	if profile != "" {
		f, err := os.Create(profile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	s := full
	if small {
		s = quick
	}
	debug.SetGCPercent(400) // as muster scheduler
	results := map[string]float64{}
	costs(s, seed, results)
	quality(s, seed, results)
	if err := table(os.Stderr, results); err != nil {
		return err
	}
	text, err := json.MarshalIndent(results, "", "  ")
	if err != nil {
		return err
	}
	text = append(text, '\n')
	if out == "" {
		_, err = os.Stdout.Write(text)
		return err
	}
	return os.WriteFile(out, text, 0o644)
}

func logf(start time.Time, format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%6.1fs  %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
}

// costs measures what decisions cost.
func costs(s size, seed uint64, results map[string]float64) {
	start := time.Now()
	for _, workers := range s.sizes {
		c := measureCost(seed, load{workers: workers, decisions: s.decisions, queued: s.queued})
		results[fmt.Sprintf("sim_decision_ns_%d", workers)] = c.engineNS
		results["sim_decisions_per_s"] = 1e9 / c.wholeNS // of the largest
		results["sim_queued_items"] = float64(c.queued)
		logf(start, "%d workers, %d items wait: %.0f ns a decision, %.0f ns with the state's part", workers, c.queued, c.engineNS, c.wholeNS)
		runtime.GC()
	}
	results["place_growth_10k"] = results["sim_decision_ns_10000"] / results["sim_decision_ns_100"]
	plain := measureCost(seed, load{workers: s.spread, decisions: s.decisions, queued: s.queued})
	runtime.GC()
	prefer := measureCost(seed, load{workers: s.spread, decisions: s.decisions, queued: s.queued, prefer: spread})
	runtime.GC()
	results["sim_pack_ns"], results["sim_spread_ns"] = plain.engineNS, prefer.engineNS
	results["spread_over_pack"] = prefer.engineNS / plain.engineNS
	checked := measureCost(seed, load{workers: s.spread, decisions: s.decisions, queued: s.queued, checked: true})
	runtime.GC()
	results["sim_checked_ns"] = checked.engineNS
	logf(start, "%d workers: %.0f ns a decision where every result is checked", s.spread, checked.engineNS)
	logf(start, "%d workers: %.0f ns a decision packed, %.0f ns with spread and affinity", s.spread, plain.engineNS, prefer.engineNS)
}

// quality measures what the decisions are worth.
func quality(s size, seed uint64, results map[string]float64) {
	start := time.Now()
	c := measureContention(seed, s.contention, s.hours)
	results["sim_jain"], results["sim_gpu_used_share"] = c.jain, c.used
	for kind, seconds := range c.waitS {
		results["sim_longest_wait_s_"+kind] = seconds
	}
	logf(start, "%d workers, %d customers, %.0f hours: %d decisions", s.contention, len(c.waitS), s.hours, c.decisions)
	over, decisions := measureMakespan(seed, s.makespan, s.tasks)
	results["sim_makespan_over_bound"] = over
	logf(start, "%d workers run %d tasks to the end: %d decisions", s.makespan, s.tasks, decisions)
}

func table(w io.Writer, results map[string]float64) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, key := range slices.Sorted(maps.Keys(results)) {
		fmt.Fprintf(t, "%s\t%.4g\n", key, results[key])
	}
	return t.Flush()
}
