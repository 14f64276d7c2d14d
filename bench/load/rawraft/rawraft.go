// Package rawraft measures the limit that Raft itself sets on this machine:
// hashicorp/raft with the same log store, transport, settings (replica.RaftConfig)
// and grouping as muster's replica, and nothing behind it. It also reads what muster wrote into
// its log.
package rawraft

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"

	"github.com/musternet/muster/scheduler/replica"
)

// Config says what to measure.
type Config struct {
	Dir          string // fresh
	Nodes        int    // in this process, over loopback TCP
	Clients      int    // each waits for its command before it makes the next
	CommandBytes int
	Duration     time.Duration
	// ElectionTimeout is how long a silent leader is followed; 0 is what muster
	// scheduler does.
	ElectionTimeout time.Duration
}

// Result is what was measured.
type Result struct {
	CommandsPerSecond float64
	EntriesPerSecond  float64
	CommandsPerEntry  float64
	BytesPerSecond    float64
}

// The grouping of muster's replica.
const (
	maxEntryCommands = replica.MaxTogether
	maxEntryBytes    = 1 << 20
	maxInFlight      = 8
)

// electionTimeout is the default of muster scheduler --election-timeout.
const electionTimeout = 350 * time.Millisecond

// Run starts a cluster, measures it and stops it.
func Run(ctx context.Context, cfg Config) (_ Result, err error) {
	c := &cluster{}
	defer func() { err = errors.Join(err, c.close()) }()
	if err := c.start(cfg); err != nil {
		return Result{}, err
	}
	leader, err := c.leader(ctx)
	if err != nil {
		return Result{}, err
	}
	return drive(ctx, cfg, leader)
}

// counter is the state behind the log: how many entries there were.
type counter struct{ applied atomic.Uint64 }

var _ raft.FSM = (*counter)(nil)

func (c *counter) Apply(*raft.Log) any                 { return c.applied.Add(1) }
func (c *counter) Snapshot() (raft.FSMSnapshot, error) { return nothing{}, nil }
func (c *counter) Restore(r io.ReadCloser) error       { return r.Close() }

type nothing struct{}

func (nothing) Persist(sink raft.SnapshotSink) error { return sink.Close() }
func (nothing) Release()                             {}

type cluster struct {
	nodes      []*raft.Raft
	transports []*raft.NetworkTransport
	logs       []*wal.WAL
}

func (c *cluster) start(cfg Config) error {
	hlog := hclog.NewNullLogger() // what matters comes back as errors
	var servers []raft.Server
	for i := range cfg.Nodes {
		dir := filepath.Join(cfg.Dir, strconv.Itoa(i))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		log, err := wal.Open(dir, wal.WithLogger(hlog))
		if err != nil {
			return err
		}
		c.logs = append(c.logs, log)
		t, err := raft.NewTCPTransportWithLogger("127.0.0.1:0", nil, 4, 10*time.Second, hlog)
		if err != nil {
			return err
		}
		c.transports = append(c.transports, t)
		servers = append(servers, raft.Server{ID: raft.ServerID(strconv.Itoa(i)), Address: t.LocalAddr()})
	}
	for i := range cfg.Nodes {
		conf := replica.RaftConfig(cmp.Or(cfg.ElectionTimeout, electionTimeout))
		conf.LocalID, conf.Logger = servers[i].ID, hlog
		conf.SnapshotThreshold = 1 << 60 // there is no state to take one of
		cache, err := raft.NewLogCache(replica.LogCache, c.logs[i])
		if err != nil {
			return err
		}
		snapshots := raft.NewDiscardSnapshotStore()
		if err := raft.BootstrapCluster(conf, cache, c.logs[i], snapshots, c.transports[i], raft.Configuration{Servers: servers}); err != nil {
			return err
		}
		node, err := raft.NewRaft(conf, &counter{}, cache, c.logs[i], snapshots, c.transports[i])
		if err != nil {
			return err
		}
		c.nodes = append(c.nodes, node)
	}
	return nil
}

func (c *cluster) leader(ctx context.Context) (*raft.Raft, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		for _, n := range c.nodes {
			if n.State() == raft.Leader && n.Barrier(10*time.Second).Error() == nil {
				return n, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("no leader was elected: %w", ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (c *cluster) close() error {
	var errs []error
	for _, n := range c.nodes {
		errs = append(errs, n.Shutdown().Error())
	}
	for _, t := range c.transports {
		t.CloseStreams()
		errs = append(errs, t.Close())
	}
	for _, l := range c.logs {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

type flight struct {
	waiting []chan error
	future  raft.ApplyFuture
}

// drive has the clients make commands for a second, and then for as long as is
// measured.
func drive(ctx context.Context, cfg Config, leader *raft.Raft) (Result, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	queue, inFlight := make(chan chan error, cfg.Clients), make(chan flight, maxInFlight)
	var commands, entries atomic.Int64
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(inFlight)
		group(ctx, cfg.CommandBytes, queue, inFlight, leader)
	})
	wg.Go(func() {
		for f := range inFlight {
			err := f.future.Error()
			commands.Add(int64(len(f.waiting)))
			entries.Add(1)
			for _, w := range f.waiting {
				w <- err
			}
		}
	})
	for range cfg.Clients {
		wg.Go(func() {
			done := make(chan error, 1)
			for {
				select {
				case queue <- done:
				case <-ctx.Done():
					return
				}
				select {
				case err := <-done:
					if err != nil {
						cancel(err)
						return
					}
				case <-ctx.Done():
					return
				}
			}
		})
	}
	pause := func(d time.Duration) {
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
	}
	pause(time.Second)
	began, c, e := time.Now(), commands.Load(), entries.Load()
	pause(cfg.Duration)
	took, made, written := time.Since(began).Seconds(), float64(commands.Load()-c), float64(entries.Load()-e)
	err := context.Cause(ctx)
	cancel(nil)
	wg.Wait()
	if err != nil {
		return Result{}, err
	}
	return Result{
		CommandsPerSecond: made / took, EntriesPerSecond: written / took, CommandsPerEntry: made / max(written, 1),
		BytesPerSecond: made * float64(cfg.CommandBytes) / took,
	}, nil
}

// group drains the queue into entries, as the replica does.
func group(ctx context.Context, size int, queue <-chan chan error, inFlight chan<- flight, leader *raft.Raft) {
	command := bytes.Repeat([]byte("x"), max(size, 8))
	for {
		var f flight
		select {
		case first := <-queue:
			f.waiting = append(f.waiting, first)
		case <-ctx.Done():
			return
		}
		entry := append([]byte(nil), command...)
		for more := true; more && len(f.waiting) < maxEntryCommands && len(entry) < maxEntryBytes; {
			select {
			case next := <-queue:
				f.waiting = append(f.waiting, next)
				entry = append(entry, command...)
			default:
				more = false
			}
		}
		binary.BigEndian.PutUint64(entry[:8:8], uint64(len(f.waiting)))
		f.future = leader.Apply(entry, 10*time.Second)
		inFlight <- f // its receiver never stops before this does
	}
}
