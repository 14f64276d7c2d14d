package main

import (
	"context"
	"path/filepath"
	"time"

	"github.com/musternet/muster/bench/load/rawraft"
	"github.com/musternet/muster/bench/load/report"
)

const (
	// rawClients wait for commands at the limit.
	rawClients = 256
	// rawDuration is long enough for a rate that repeats.
	rawDuration = 5 * time.Second
	// usualCommandBytes stands for the lifecycle's commands where those were not
	// measured in the same run.
	usualCommandBytes = 250
)

// raw measures the limit: raw Raft with the same log store, transport, number
// of nodes and grouping, and commands of the lifecycle's mean size.
func (b *bench) raw(ctx context.Context) error {
	size, ok := b.results.Get("lifecycle_command_bytes")
	if !ok {
		size = usualCommandBytes
	}
	r, err := rawraft.Run(ctx, rawraft.Config{
		Dir: filepath.Join(b.dir, "raw"), Nodes: b.schedulers, Clients: rawClients, CommandBytes: int(size), Duration: rawDuration,
	})
	if err != nil {
		return err
	}
	b.results.Set("raw_raft_commands_per_s", r.CommandsPerSecond)
	b.results.Set("raw_raft_commands_per_entry", r.CommandsPerEntry)
	b.logf("raw Raft: %.0f commands/s of %.0f B in %.0f entries/s, %.1f in an entry", r.CommandsPerSecond, size, r.EntriesPerSecond, r.CommandsPerEntry)
	if commands, ok := b.results.Get("lifecycle_commands_per_s"); ok {
		b.results.Set("lifecycle_share_of_raw_raft", commands/r.CommandsPerSecond)
	} else {
		b.results.Missing("the lifecycle was not measured in the same run", "lifecycle_share_of_raw_raft")
	}
	return nil
}

func quantile(values []float64, q float64) float64 { return report.Quantile(values, q) }
