package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/bench/load/network"
	"github.com/musternet/muster/container/image"
	"github.com/musternet/muster/verify"
)

const (
	dockerStarts = 25
	// dockerPause lets everything of one container be over before the next.
	dockerPause = 300 * time.Millisecond
)

// docker measures what muster adds to the start of a container: from the moment
// before the submission's call until the engine says that the container has
// started, on an idle network with a real worker process that has the image,
// against a plain create and start of the same image through the engine's API,
// without a network as muster's containers are. The two take turns.
func (b *bench) docker(ctx context.Context) (err error) {
	e, err := openEngine(ctx)
	if err != nil {
		return err
	}
	w, err := newWorld(ctx, b, b.schedulers, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	spec, err := w.containerSpec(ctx)
	if err != nil {
		return err
	}
	worker, err := network.StartProcess(b.binary, filepath.Join(b.dir, "docker-worker.log"),
		"worker", "--data", filepath.Join(b.dir, "docker-worker"), "--join", strings.Join(w.net.Addresses, ","), "--key", w.owners[0],
		"--runtime", "docker", "--cpus", "2", "--memory", "2GiB", "--disk", "1GiB", "--price", "0.10")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, worker.Stop()) }()
	if err := worker.WaitReady(ctx); err != nil {
		return err
	}
	w.jobs.clock = func() int64 { return int64(time.Since(b.began)) }
	listening, stop := context.WithCancel(ctx)
	defer stop()
	events, err := e.events(listening)
	if err != nil {
		return err
	}
	// The first job brings the image to the worker, and is not counted.
	_, first, err := w.containerStart(ctx, spec, events)
	if err != nil {
		return err
	}
	n := dockerStarts
	if b.full {
		n *= 4
	}
	var muster, plain []float64
	for range n {
		ms, _, err := w.containerStart(ctx, spec, events)
		if err != nil {
			return err
		}
		muster = append(muster, ms)
		if ms, err = e.plainStart(ctx, first.Actor.Attributes["image"], events); err != nil {
			return err
		}
		plain = append(plain, ms)
	}
	b.results.Set("docker_starts", float64(len(muster)))
	b.results.Distribution("docker_start_ms", muster)
	b.results.Distribution("docker_plain_ms", plain)
	b.results.Set("start_overhead_ms_p50", quantile(muster, 0.5)-quantile(plain, 0.5))
	b.results.Set("start_overhead_ms_p99", quantile(muster, 0.99)-quantile(plain, 0.99))
	b.logf("submit to container started: %s; plain create and start: %s", summary(muster), summary(plain))
	return nil
}

// containerSpec is a job of one item that runs a small program in a container,
// and uploads its image.
func (w *world) containerSpec(ctx context.Context) (*musterpb.JobSpec, error) {
	binary, archive := filepath.Join(w.bench.dir, "prog"), filepath.Join(w.bench.dir, "prog.tar")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", binary, "github.com/musternet/muster/cmd/muster/testdata/prog")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building the container's program: %w\n%s", err, text)
	}
	info, err := image.Pack(binary, archive, image.Options{})
	if err != nil {
		return nil, err
	}
	if _, _, err := blob.PutFile(ctx, w.net.Client.Blobs(), archive); err != nil {
		return nil, err
	}
	return &musterpb.JobSpec{
		Name: "start", Command: []string{"-items", "{items}"}, Items: &musterpb.Items{Count: 1}, Chunk: 1, Retries: 3, TimeoutMs: 60_000,
		Image: &musterpb.Image{
			Kind: musterpb.ImageKind_IMAGE_KIND_ARCHIVE, Digest: string(info.Digest), SizeBytes: info.Bytes, Platforms: info.Platforms, Name: "start.tar",
		},
		Resources:               &musterpb.Resources{MilliCpus: 1000, MemoryBytes: 256 << 20, DiskBytes: 1 << 20},
		MaxPriceMicroUsdPerHour: int64(api.Dollars), BudgetMicroUsd: int64(api.Dollars), Verify: &musterpb.Verify{Comparator: "exact", RatePpm: verify.FloorPPM},
	}, nil
}

// containerStart submits a job, and returns the milliseconds until its
// container had started. It waits until that is over, too.
func (w *world) containerStart(ctx context.Context, spec *musterpb.JobSpec, events <-chan event) (float64, event, error) {
	began := time.Now()
	if err := w.jobs.submit(ctx, w.jobs.add(1), spec); err != nil {
		return 0, event{}, err
	}
	return awaited(ctx, began, events)
}

// plainStart does the least that starts a container.
func (e *engine) plainStart(ctx context.Context, image string, events <-chan event) (float64, error) {
	began := time.Now()
	var made struct{ Id string }
	config := map[string]any{"Image": image, "Cmd": []string{}, "HostConfig": map[string]any{"NetworkMode": "none"}}
	if err := e.call(ctx, http.MethodPost, "/containers/create", config, &made); err != nil {
		return 0, err
	}
	if err := e.call(ctx, http.MethodPost, "/containers/"+made.Id+"/start", nil, nil); err != nil {
		return 0, err
	}
	ms, _, err := awaited(ctx, began, events)
	return ms, errors.Join(err, e.call(ctx, http.MethodDelete, "/containers/"+made.Id+"?force=1", nil, nil))
}

func awaited(ctx context.Context, began time.Time, events <-chan event) (float64, event, error) {
	started, err := next(ctx, events, "start")
	if err != nil {
		return 0, started, err
	}
	if _, err := next(ctx, events, "die"); err != nil {
		return 0, started, err
	}
	return float64(started.TimeNano-began.UnixNano()) / 1e6, started, sleep(ctx, dockerPause)
}
