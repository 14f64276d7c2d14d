package main

import (
	"context"
	"errors"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/musternet/muster/bench/load/report"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A small load on three real schedulers leaves nothing out: every item is
// verified and paid once, the books are in balance, the schedulers agree; and
// what was measured is all there.
func TestSmallLoad(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	dir := t.TempDir()
	binary, err := build(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{
		results: report.New(), began: time.Now(), schedulers: 3, workers: 20, slots: 4, clients: 2, duration: 4 * time.Second,
		binary: binary, dir: dir, flags: []string{"--election-timeout", "2s"}, // other tests run beside it
	}
	if err := b.lifecycle(ctx); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{
		"lifecycle_tasks_per_s", "lifecycle_commands_per_s", "lifecycle_cpu_us_per_task_leader", "stage_place_per_s",
		"stage_commit_ms_p50", "stage_start_per_s", "stage_post_ms_max",
	} {
		if v, ok := b.results.Get(key); !ok || v <= 0 {
			t.Errorf("%s is %v", key, v)
		}
	}
}

// Books that do not add up are not passed over.
func TestChecksFail(t *testing.T) {
	j := &jobs{list: []*job{{number: 0, items: 3}}}
	if _, _, err := j.account(); err == nil {
		t.Error("a job that nobody has seen settled is accounted for")
	}
}

func TestChosen(t *testing.T) {
	for only, want := range map[string]int{"": len(measurements), "raw": 1, "raw,lifecycle": 2, "raw,nothing": -1} {
		b := &bench{only: only}
		list, err := b.chosen()
		if (err != nil) != (want < 0) || err == nil && len(list) != want {
			t.Errorf("--only %q: %d measurements, %v", only, len(list), err)
		}
	}
}

// Every key is some measurement's, or bench/sim's: a failure names its reason.
func TestEveryKeyHasAMeasurement(t *testing.T) {
	b := &bench{results: report.New()}
	for _, m := range append([]measurement{simMeasures}, measurements...) {
		b.missing(m, "failed")
	}
	for _, k := range report.Keys {
		if why := b.results.Why(k.Name); why != "failed" {
			t.Errorf("nothing measures %s: %s", k.Name, why)
		}
	}
}

func TestSkippedIsNoFailure(t *testing.T) {
	b := &bench{schedulers: 1}
	var skip skipped
	if err := b.failover(t.Context()); !errors.As(err, &skip) {
		t.Errorf("failover with one scheduler: %v", err)
	}
}
