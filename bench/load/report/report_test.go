package report

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What nobody measured is there, as null and with a reason.
func TestEveryKeyIsInTheResults(t *testing.T) {
	r := New()
	r.Set("lifecycle_tasks_per_s", 12345.6)
	r.Missing("no engine", "start_overhead_ms_p50", "lifecycle_tasks_per_s")
	var flat map[string]any
	if err := json.Unmarshal(r.JSON(), &flat); err != nil {
		t.Fatal(err)
	}
	for _, k := range Keys {
		v, ok := flat[k.Name]
		why, _ := flat[k.Name+whySuffix].(string)
		if !ok || (v == nil) != (why != "") {
			t.Errorf("%s is %v, because of %q", k.Name, v, why)
		}
	}
	if flat["lifecycle_tasks_per_s"] != 12346.0 || flat["start_overhead_ms_p50"+whySuffix] != "no engine" {
		t.Errorf("%v", flat)
	}
}

// An earlier run's file is read back as it was.
func TestMerge(t *testing.T) {
	r := New()
	r.Set("restart_s", 3.25)
	r.Missing("bench/sim left no results", "spread_over_pack")
	again := New()
	unknown, err := again.Merge(r.JSON())
	if err != nil || len(unknown) > 0 {
		t.Fatalf("%v, unknown %v", err, unknown)
	}
	if !bytes.Equal(again.JSON(), r.JSON()) {
		t.Errorf("read back as %s", again.JSON())
	}
	unknown, err = again.Merge([]byte(`{"spread_over_pack": 1.5, "jain": 0.9, "name": "x"}`))
	if v, ok := again.Get("spread_over_pack"); err != nil || !ok || v != 1.5 || len(unknown) != 2 {
		t.Errorf("spread_over_pack is %v; unknown %v; %v", v, unknown, err)
	}
	if _, err := again.Merge([]byte("[]")); err == nil {
		t.Error("a list was merged")
	}
}

func TestTable(t *testing.T) {
	r := New()
	r.Set("lifecycle_tasks_per_s", 20_000)
	r.Set("failover_ms_p50", 1500)
	r.Set("failover_kills", 20)
	r.Missing("no engine answers here", "start_overhead_ms_p50")
	var out, md strings.Builder
	r.Table(&out)
	r.Markdown(&md)
	for _, want := range []string{"20000 tasks/s", "2.00", "met", "1500 ms (of 20)", "1.50", "MISSED", "not measured: no engine answers here", "not measured: " + notRun} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, out.String())
		}
		if !strings.Contains(md.String(), want) {
			t.Errorf("the Markdown lacks %q:\n%s", want, md.String())
		}
	}
}

func TestQuantile(t *testing.T) {
	values := []float64{5, 1, 4, 2, 3}
	for q, want := range map[float64]float64{0: 1, 0.2: 1, 0.5: 3, 0.81: 5, 0.99: 5, 1: 5} {
		if got := Quantile(values, q); got != want {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
	}
}

// Charts are drawn of whatever there is, of all and of nothing.
func TestCharts(t *testing.T) {
	dir := t.TempDir()
	full := New()
	for i, k := range Keys {
		full.Set(k.Name, float64(i+1))
	}
	for _, s := range Stages {
		full.Distribution("stage_"+s+"_ms", []float64{0, 1, 2, 10, 500})
	}
	for _, r := range []*Results{full, New()} {
		if err := r.Charts(dir); err != nil {
			t.Fatal(err)
		}
		files, err := filepath.Glob(filepath.Join(dir, "*.svg"))
		if err != nil {
			t.Fatal(err)
		}
		if want := map[bool]int{true: 6, false: 0}[r == full]; len(files) != want {
			t.Errorf("%d charts, want %d", len(files), want)
		}
	}
}

func TestHistory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "history.jsonl")
	r := New()
	r.Set("restart_s", 3)
	for range 2 {
		if err := r.Append(path, Machine{Commit: "abc", Cores: 2}, time.Unix(0, 0)); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(lines) != 2 || !strings.Contains(lines[1], `"commit":"abc","date":"1970-01-01T00:00:00Z"`) || !strings.Contains(lines[1], `"restart_s":3`) {
		t.Errorf("%s", text)
	}
}

// The README lists every key, with its unit, target and meaning.
func TestReadmeListsEveryKey(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), KeyTable()) {
		t.Errorf("bench/README.md does not hold the table of keys as go run ./bench/load --keys prints it:\n%s", KeyTable())
	}
}
