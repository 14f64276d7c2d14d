// Package bench measures muster from outside: real schedulers over loopback TCP
// with fsync, real sessions, signatures and blobs. See README.md.
package bench

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/cmd/muster/node"
	"github.com/musternet/muster/container"
	"github.com/musternet/muster/gpu"
	"github.com/musternet/muster/worker"
)

// BenchmarkLife is the whole life of a task: submitted in one job, placed, run
// by a program that ends at once, committed, drawn, checked on another owner's
// worker, and paid. One operation is one task with its check.
func BenchmarkLife(b *testing.B) {
	for _, schedulers := range []int{1, 3} {
		b.Run(fmt.Sprintf("schedulers=%d", schedulers), func(b *testing.B) { benchmarkLife(b, schedulers, 8) })
	}
}

func benchmarkLife(b *testing.B, schedulers, workers int) {
	ctx, cancel := context.WithCancel(b.Context())
	g, ctx := errgroup.WithContext(ctx)
	stop := func() {
		cancel()
		if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
			b.Error(err)
		}
	}
	defer stop()
	c, addresses := startSchedulers(b, ctx, g, schedulers)
	for i := range workers {
		startWorker(b, ctx, g, c, addresses, i)
	}
	spec := jobOf(b, ctx, c, b.N)
	waitConnected(b, ctx, c, workers)

	b.ResetTimer()
	resp, err := c.SubmitJob(ctx, connect.NewRequest(&musterpb.SubmitJobRequest{Id: client.NewID(), Spec: spec}))
	if err != nil {
		b.Fatal(err)
	}
	job := waitSettled(b, ctx, c, resp.Msg.Job)
	b.StopTimer()
	if job.State != musterpb.JobState_JOB_STATE_VERIFIED || job.ItemsVerified != uint64(b.N) || job.Caught != 0 {
		b.Fatalf("the job ended as %v with %d items verified: %s", job.State, job.ItemsVerified, job.Reason)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "tasks/s")
	b.ReportMetric(float64(job.Checks)/float64(b.N), "checks/task")
}

func startSchedulers(b *testing.B, ctx context.Context, g *errgroup.Group, n int) (*client.Client, []string) {
	b.Helper()
	quiet := slog.New(slog.DiscardHandler)
	dir, key := b.TempDir(), ""
	var addresses []string
	for i := range n {
		ready := make(chan node.Info, 1)
		s := node.Scheduler{
			Dir: filepath.Join(dir, strconv.Itoa(i)), Listen: freeAddress(b), RaftListen: freeAddress(b), Join: addresses[:min(i, 1)], Key: key,
			Logger: quiet, Ready: func(info node.Info) { ready <- info },
		}
		g.Go(func() error { return s.Run(ctx) })
		select {
		case info := <-ready:
			if addresses = append(addresses, info.Address); info.AdminKey != "" {
				key = info.AdminKey
			}
		case <-ctx.Done():
			b.Fatal(g.Wait())
		}
	}
	c, err := client.New(client.Config{Addresses: addresses, Key: key})
	if err != nil {
		b.Fatal(err)
	}
	deposit := &musterpb.DepositRequest{Id: client.NewID(), Account: node.AdminAccount, AmountMicroUsd: int64(1_000_000 * api.Dollars)}
	if _, err := c.Deposit(ctx, connect.NewRequest(deposit)); err != nil {
		b.Fatal(err)
	}
	return c, addresses
}

func freeAddress(b *testing.B) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// startWorker starts a worker of its own owner, with a program that writes one
// small file per item.
func startWorker(b *testing.B, ctx context.Context, g *errgroup.Group, c *client.Client, addresses []string, i int) {
	b.Helper()
	owner := "owner-" + strconv.Itoa(i)
	resp, err := c.CreateAccount(ctx, connect.NewRequest(&musterpb.CreateAccountRequest{Account: owner}))
	if err != nil {
		b.Fatal(err)
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	instant := &container.Fake{OnRun: func(_ context.Context, spec container.Spec) (container.Result, error) {
		now := time.Now()
		err := os.WriteFile(filepath.Join(spec.Outputs, "result"), []byte(spec.Command[0]), 0o644)
		return container.Result{Reason: container.Exited, Started: now, Ended: now, OutputBytes: 8}, err
	}}
	w := worker.New(worker.Config{
		Key: key, Name: owner, Dir: b.TempDir(), Schedulers: addresses, APIKey: resp.Msg.Key, PricePerHour: 100_000,
		Runtimes: map[string]container.Runtime{"wasm": instant}, Inventory: gpu.Inventory{Reason: "a benchmark"},
		MilliCPUs: 8000, MemoryBytes: 64 << 30, DiskBytes: 64 << 30, CacheBytes: 1 << 30, Logger: slog.New(slog.DiscardHandler),
	})
	g.Go(func() error { return w.Run(ctx) })
}

// jobOf is a job of n tasks of one item.
func jobOf(b *testing.B, ctx context.Context, c *client.Client, n int) *musterpb.JobSpec {
	b.Helper()
	program := []byte("\x00asm\x01\x00\x00\x00")
	digest := api.DigestOf(program)
	if _, err := c.Blobs().Put(ctx, digest, bytes.NewReader(program), int64(len(program))); err != nil {
		b.Fatal(err)
	}
	return &musterpb.JobSpec{
		Name: "bench", Command: []string{"{item}"}, Items: &musterpb.Items{Count: uint64(n)}, Chunk: 1, Retries: 3, TimeoutMs: 60_000,
		Image:                   &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_WASM, Digest: string(digest), SizeBytes: int64(len(program)), Platforms: []string{"wasip1/wasm"}, Name: "bench.wasm"},
		Resources:               &musterpb.Resources{MilliCpus: 1000, MemoryBytes: 1 << 30, DiskBytes: 1 << 20},
		MaxPriceMicroUsdPerHour: 400_000, BudgetMicroUsd: int64(100_000 * api.Dollars), Verify: &musterpb.Verify{Comparator: "exact", RatePpm: 36_000},
	}
}

func waitConnected(b *testing.B, ctx context.Context, c *client.Client, workers int) {
	b.Helper()
	for {
		resp, err := c.ClusterStatus(ctx, connect.NewRequest(&musterpb.ClusterStatusRequest{}))
		if err != nil {
			b.Fatal(err)
		}
		if int(resp.Msg.WorkersConnected) == workers {
			return
		}
	}
}

func waitSettled(b *testing.B, ctx context.Context, c *client.Client, id string) *musterpb.Job {
	b.Helper()
	stream, err := c.WatchJob(ctx, connect.NewRequest(&musterpb.GetJobRequest{Job: id}))
	if err != nil {
		b.Fatal(err)
	}
	defer stream.Close()
	var job *musterpb.Job
	for stream.Receive() {
		job = stream.Msg().Job
	}
	if err := stream.Err(); err != nil {
		b.Fatal(err)
	}
	return job
}
