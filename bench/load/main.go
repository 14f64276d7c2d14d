// Load measures muster from outside: real scheduler processes with fsync on,
// simulated workers that speak the real protocol, and the limit that raw Raft
// sets on the same machine in the same run. See bench/README.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/musternet/muster/bench/load/report"
)

// bench is one run of this command.
type bench struct {
	// The command line.
	only       string
	full       bool
	schedulers int
	workers    int
	slots      int
	clients    int
	duration   time.Duration
	binary     string
	dir        string
	profile    string
	keep       bool
	out        string
	sim        string
	history    string
	report     bool
	flags      []string // more flags of every scheduler, of tests

	results *report.Results
	worlds  int // so far
	began   time.Time
}

// measurement is one thing that is measured, with the keys that it sets.
type measurement struct {
	name string
	keys []string
	run  func(*bench, context.Context) error
}

// measurements are all of them, in the order in which they run: the limit is
// measured with what the lifecycle found of its commands.
var measurements = []measurement{
	{"lifecycle", []string{"lifecycle_", "stage_", "generator_"}, (*bench).lifecycle},
	{"raw", []string{"raw_raft_commands_", "lifecycle_share_of_raw_raft"}, (*bench).raw},
	{"single", []string{"single_jobs_"}, (*bench).single},
	{"instant", []string{"start_instant_"}, (*bench).instant},
	{"failover", []string{"failover_"}, (*bench).failover},
	{"cost", []string{"cost_"}, (*bench).cost},
	{"memory", []string{"heap_bytes_per_"}, (*bench).memory},
	{"finished", []string{"heap_growth_finished", "heap_bytes_finished_"}, (*bench).finished},
	{"restart", []string{"restart_s", "snapshot_pause_"}, (*bench).restart},
	{"copy", []string{"blob_"}, (*bench).copies},
	{"docker", []string{"docker_", "start_overhead_"}, (*bench).docker},
	{"transfers", []string{"transfers_", "raw_raft_transfers_"}, (*bench).transfers},
}

func main() {
	b := &bench{results: report.New(), began: time.Now()}
	flag.StringVar(&b.only, "only", "", "measure these alone, separated by commas: "+names())
	flag.BoolVar(&b.full, "full", false, "measure longer, and more of it")
	flag.IntVar(&b.schedulers, "schedulers", 3, "scheduler processes: 1, 3 or 5")
	flag.IntVar(&b.workers, "workers", 1000, "simulated workers")
	flag.IntVar(&b.slots, "slots", 16, "attempts that a simulated worker takes at once")
	flag.IntVar(&b.clients, "clients", 8, "clients that submit the lifecycle's jobs")
	flag.DurationVar(&b.duration, "duration", 15*time.Second, "how long throughput is measured")
	flag.StringVar(&b.binary, "binary", "", "muster binary (default: built now)")
	flag.StringVar(&b.dir, "dir", "", "directory for data (default: a temporary one)")
	flag.BoolVar(&b.keep, "keep", false, "keep the data of the schedulers")
	flag.StringVar(&b.profile, "profile", "", "directory for CPU and heap profiles of every process while lifecycle, single and finished are measured")
	flag.StringVar(&b.out, "out", "", "directory for results.json, samples.json and charts (default: none are written)")
	flag.StringVar(&b.sim, "sim", "", "results of bench/sim to take in")
	flag.StringVar(&b.history, "history", "", "file that gets a line with all results")
	flag.BoolVar(&b.report, "report", false, "measure nothing; print --out's results.json as Markdown")
	keys := flag.Bool("keys", false, "measure nothing; print the keys of results.json as Markdown")
	flag.Parse()
	if *keys {
		fmt.Print(report.KeyTable())
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func names() string {
	var list []string
	for _, m := range measurements {
		list = append(list, m.name)
	}
	return strings.Join(list, ", ")
}

// logf tells whoever waits what goes on.
func (b *bench) logf(format string, args ...any) {
	fmt.Printf("%6.1fs  %s\n", time.Since(b.began).Seconds(), fmt.Sprintf(format, args...))
}

func (b *bench) run(ctx context.Context) (err error) {
	if b.report {
		return b.printReport()
	}
	chosen, err := b.chosen()
	if err != nil {
		return err
	}
	if b.dir == "" {
		if b.dir, err = os.MkdirTemp("", "muster-load-"); err != nil {
			return err
		}
	}
	if !b.keep {
		defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	}
	if b.binary == "" {
		if b.binary, err = build(ctx, b.dir); err != nil {
			return err
		}
	}
	var failed []error
	for _, m := range chosen {
		b.logf("== %s", m.name)
		err := m.run(b, ctx)
		if ctx.Err() != nil {
			failed = append(failed, ctx.Err()) // what was measured before is shown
			break
		}
		if skip := (skipped)(""); errors.As(err, &skip) {
			b.logf("%s: skipped: %v", m.name, err)
			b.missing(m, err.Error())
		} else if err != nil {
			b.logf("%s FAILED: %v", m.name, err)
			b.missing(m, "failed: "+err.Error())
			failed = append(failed, fmt.Errorf("%s: %w", m.name, err))
		}
	}
	return errors.Join(append(failed, b.finish(context.WithoutCancel(ctx)))...)
}

// skipped is why something can't be measured on this machine.
type skipped string

func (s skipped) Error() string { return string(s) }

func (b *bench) chosen() ([]measurement, error) {
	if b.only == "" {
		return measurements, nil
	}
	var list []measurement
	for name := range strings.SplitSeq(b.only, ",") {
		at := slices.IndexFunc(measurements, func(m measurement) bool { return m.name == name })
		if at < 0 {
			return nil, fmt.Errorf("--only %s: there are %s", name, names())
		}
		list = append(list, measurements[at])
	}
	return list, nil
}

// missing notes why the keys of a measurement have no value.
func (b *bench) missing(m measurement, why string) {
	for _, key := range report.Keys {
		if slices.ContainsFunc(m.keys, func(prefix string) bool { return strings.HasPrefix(key.Name, prefix) }) {
			b.results.Missing(why, key.Name)
		}
	}
}

// simMeasures are the keys that bench/sim measures.
var simMeasures = measurement{name: "sim", keys: []string{"spread_over_pack", "place_growth_10k", "sim_"}}

// finish shows and writes what was measured.
func (b *bench) finish(ctx context.Context) error {
	if b.sim != "" {
		text, err := os.ReadFile(b.sim)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			b.missing(simMeasures, "bench/sim left no results")
		case err != nil:
			return err
		default:
			unknown, err := b.results.Merge(text)
			if err != nil {
				return fmt.Errorf("%s: %w", b.sim, err)
			}
			if len(unknown) > 0 {
				b.logf("%s holds more than is kept: %s", b.sim, strings.Join(unknown, ", "))
			}
		}
	}
	fmt.Println()
	b.results.Table(os.Stdout)
	if b.out == "" {
		return nil
	}
	return b.write(ctx)
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
