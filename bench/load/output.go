package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/metrics"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/musternet/muster/bench/load/report"
)

// write writes the results' files and charts, and a line of history.
func (b *bench) write(ctx context.Context) error {
	if err := b.results.WriteFiles(b.out); err != nil {
		return err
	}
	if err := b.results.Charts(b.out); err != nil {
		return err
	}
	if err := b.writeBenchfmt(); err != nil {
		return err
	}
	b.logf("results.json, benchmark.txt and charts are in %s", b.out)
	if b.history == "" {
		return nil
	}
	m, err := b.machine(ctx)
	if err != nil {
		return err
	}
	return b.results.Append(b.history, m, time.Now())
}

// writeBenchfmt adds this run to benchmark.txt, in the format that benchstat
// compares: a run more is a sample more.
func (b *bench) writeBenchfmt() error {
	f, err := os.OpenFile(filepath.Join(b.out, "benchmark.txt"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(b.results.Benchmark())
	return errors.Join(err, f.Close())
}

// printReport prints an earlier run's results.
func (b *bench) printReport() error {
	text, err := os.ReadFile(filepath.Join(b.out, "results.json"))
	if err != nil {
		return fmt.Errorf("--report needs --out with the results of an earlier run: %w", err)
	}
	r := report.New()
	if _, err := r.Merge(text); err != nil {
		return err
	}
	r.Markdown(os.Stdout)
	return nil
}

// machine describes where and of what these results are.
func (b *bench) machine(ctx context.Context) (report.Machine, error) {
	m := report.Machine{Cores: runtime.NumCPU(), Go: runtime.Version(), Set: "standard"}
	if b.full {
		m.Set = "full"
	}
	if b.only != "" {
		m.Set = b.only
	}
	if out, err := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").Output(); err == nil {
		m.Commit = strings.TrimSpace(string(out))
	}
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	if found := regexp.MustCompile(`(?m)^model name\s*:\s*(.*)$`).FindSubmatch(text); found != nil {
		m.CPU = string(found[1])
	}
	if text, err = os.ReadFile("/proc/meminfo"); err != nil {
		return m, err
	}
	if fields := bytes.Fields(text); len(fields) > 1 {
		kib, err := strconv.ParseInt(string(fields[1]), 10, 64)
		if err != nil {
			return m, fmt.Errorf("/proc/meminfo: %w", err)
		}
		m.MemoryBytes = kib << 10
	}
	if text, err = os.ReadFile("/proc/sys/kernel/osrelease"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	m.Kernel = strings.TrimSpace(string(text))
	m.FsyncMS, err = fsyncMS(b.dir)
	return m, err
}

// fsyncMS is how long the disk takes to append 4 KiB durably, p50.
func fsyncMS(dir string) (float64, error) {
	f, err := os.CreateTemp(dir, "fsync-")
	if err != nil {
		return 0, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	block, ms := make([]byte, 4096), []float64(nil)
	for range 200 {
		began := time.Now()
		if _, err := f.Write(block); err != nil {
			return 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
		ms = append(ms, time.Since(began).Seconds()*1e3)
	}
	return quantile(ms, 0.5), nil
}

// selfCPU is the processor time that this process has used.
func selfCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// selfHeap is this process's heap.
func selfHeap() int64 {
	s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(s)
	return int64(s[0].Value.Uint64())
}
