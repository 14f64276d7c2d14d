package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime/metrics"
	"syscall"
	"time"

	"github.com/musternet/muster/bench/load/report"
)

// write writes the results' files.
func (b *bench) write(ctx context.Context) error {
	return b.results.WriteFiles(b.out)
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
