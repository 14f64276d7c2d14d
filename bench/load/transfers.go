package main

import (
	"context"
	"errors"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/bench/load/rawraft"
)

const (
	transfersPerCommand = 8000
	transferClients     = 16
)

// transfers measures the ledger: deposits in commands of 8,000 by clients that
// wait for the answer, and then raw Raft with as many clients and commands of
// the same size.
func (b *bench) transfers(ctx context.Context) (err error) {
	rate, size, err := b.deposits(ctx)
	if err != nil {
		return err
	}
	r, err := rawraft.Run(ctx, rawraft.Config{
		Dir: filepath.Join(b.dir, "raw-transfers"), Nodes: b.schedulers, Clients: transferClients, CommandBytes: size, Duration: rawDuration,
	})
	if err != nil {
		return err
	}
	limit := r.CommandsPerSecond * transfersPerCommand
	b.results.Set("transfers_per_s", rate)
	b.results.Set("raw_raft_transfers_per_s", limit)
	b.results.Set("transfers_share_of_raw_raft", rate/limit)
	b.logf("transfers: %.0f/s in commands of %d B; raw Raft carries %.0f/s (%.1f MB/s)", rate, size, limit, r.BytesPerSecond/1e6)
	return nil
}

func (b *bench) deposits(ctx context.Context) (perSecond float64, commandBytes int, err error) {
	w, err := newWorld(ctx, b, b.schedulers, b.workers)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	list := make([]*musterpb.Deposit, transfersPerCommand)
	for i := range list {
		list[i] = &musterpb.Deposit{Account: "owner-" + strconv.Itoa(i%len(w.owners)), AmountMicroUsd: 1}
	}
	size := (&musterpb.Command{Body: &musterpb.Command_Deposits{Deposits: &musterpb.Deposits{Deposits: list}}}).SizeVT()
	var made atomic.Int64
	g, gctx := errgroup.WithContext(ctx)
	run, stop := context.WithCancel(gctx)
	defer stop()
	for range transferClients {
		g.Go(func() error {
			c, err := w.client(w.net.AdminKey)
			if err != nil {
				return err
			}
			for run.Err() == nil {
				if _, err := c.DepositMany(gctx, connect.NewRequest(&musterpb.DepositManyRequest{Id: client.NewID(), Deposits: list})); err != nil {
					return err
				}
				made.Add(transfersPerCommand)
			}
			return nil
		})
	}
	g.Go(func() error {
		defer stop()
		if err := sleep(gctx, time.Second); err != nil {
			return err
		}
		began, before := time.Now(), made.Load()
		err := sleep(gctx, rawDuration)
		perSecond = float64(made.Load()-before) / time.Since(began).Seconds()
		return err
	})
	if err := g.Wait(); err != nil {
		return 0, 0, err
	}
	return perSecond, size, w.agree(ctx)
}
