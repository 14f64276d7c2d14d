// Command demo shows muster at its main job, with real processes on this
// machine: three schedulers and five workers of different owners render 24
// frames and complete 200 prompts, one of the workers cheats and is caught, the
// leading scheduler is killed half-way, and everybody honest is paid.
//
// It exits with 0 only if everything that it claims at the end is true.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/musternet/muster/container/docker"
)

func main() {
	d := &demo{out: os.Stdout}
	flag.StringVar(&d.bin, "bin", "bin/muster", "the muster binary")
	flag.StringVar(&d.build, "build", "build", "directory with the example programs")
	flag.StringVar(&d.dir, "out", "demo-out", "directory for the results; replaced")
	flag.StringVar(&d.runtime, "runtime", "auto", "auto, docker or wasm")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 6*time.Minute)
	defer cancel()
	if err := d.run(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\nThe processes' logs are in %s.\n", err, filepath.Join(d.dir, "logs"))
		os.Exit(1)
	}
}

// The cast.
const (
	schedulers  = 3
	workers     = 5
	cheater     = 5 // the number of the worker that cheats
	cheats      = "fewer-samples,made-up-line"
	frames      = 24
	lines       = 200
	renderOwner = "studio" // the customers
	textOwner   = "lab"
)

// pictures are as large as two cores can trace twice in a minute: WebAssembly
// takes many times as long as native code (container/DESIGN.md says why).
var pictures = map[string]struct{ width, height, samples int }{
	"docker": {160, 90, 16},
	"wasm":   {96, 54, 4},
}

type demo struct {
	bin, build, dir, runtime string
	out                      *os.File
	started                  time.Time
	net                      *network
	leaderKilled             bool
}

func (d *demo) say(format string, args ...any) {
	fmt.Fprintf(d.out, "%6.1fs  %s\n", time.Since(d.started).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) run(ctx context.Context) (err error) {
	d.started = time.Now()
	if err := d.prepare(ctx); err != nil {
		return err
	}
	d.net = &network{bin: d.bin, logs: filepath.Join(d.dir, "logs")}
	defer func() { err = errors.Join(err, d.net.stop()) }()
	if err := d.net.start(ctx, d.runtime, d.say); err != nil {
		return err
	}
	render, text, err := d.submit(ctx)
	if err != nil {
		return err
	}
	if err := d.follow(ctx, render, text); err != nil {
		return err
	}
	return d.conclude(ctx, render, text)
}

// prepare decides on the runtime and makes an empty directory for the results.
func (d *demo) prepare(ctx context.Context) error {
	if d.runtime == "auto" {
		engine, err := docker.Probe(ctx, docker.Options{})
		if err == nil {
			d.runtime = "docker"
			d.say("runtime: Docker %s answers, so jobs run in containers", engine.Version)
		} else {
			d.runtime = "wasm"
			d.say("runtime: WebAssembly, because no container engine answers (%s)", firstLine(err))
		}
	} else {
		d.say("runtime: %s, as asked", d.runtime)
	}
	// Only what an earlier demo left is removed.
	for _, name := range []string{"logs", "frames", "completions", "contact-sheet.png", "summary.json"} {
		if err := os.RemoveAll(filepath.Join(d.dir, name)); err != nil {
			return err
		}
	}
	return os.MkdirAll(filepath.Join(d.dir, "logs"), 0o755)
}

// submit writes the two job files and submits them with the real command.
func (d *demo) submit(ctx context.Context) (render, text string, err error) {
	build, err := filepath.Abs(d.build)
	if err != nil {
		return "", "", err
	}
	suffix, size := map[string]string{"docker": ".tar", "wasm": ".wasm"}[d.runtime], pictures[d.runtime]
	examples, err := filepath.Abs("examples")
	if err != nil {
		return "", "", err
	}
	render, err = d.net.submit(ctx, renderOwner, fmt.Sprintf(renderJob, filepath.Join(build, "raytrace"+suffix), size.width, size.height, size.samples,
		filepath.Join(examples, "raytrace", "scene.json"), frames))
	if err != nil {
		return "", "", err
	}
	d.say("submitted %s: %d frames, %d×%d, %d samples a pixel, at most $0.40/h", render, frames, size.width, size.height, size.samples)
	text, err = d.net.submit(ctx, textOwner, fmt.Sprintf(textJob, filepath.Join(build, "tinylm"+suffix), filepath.Join(examples, "tinylm", "prompts.jsonl")))
	if err != nil {
		return "", "", err
	}
	d.say("submitted %s: %d prompts for a small language model", text, lines)
	return render, text, nil
}

const renderJob = `name: demo-render
image: %s
command: ["--scene", "/in/scene.json", "--frames", "{items}", "--width", "%d", "--height", "%d", "--samples", "%d", "--out", "/out"]
inputs: ["%s"]
items: {range: 1-%d}
chunk: 2
resources: {cpus: 1, memory: 512MB, disk: 64MB}
timeout: 3m
price: {max_per_gpu_hour: 0.40, budget: 5.00}
verify: {comparator: image, fail: 0.001, fail_percent: 1}
`

const textJob = `name: demo-inference
image: %s
command: ["run", "--prompts", "/in/prompts.jsonl", "--items", "{items}", "--max-tokens", "32", "--out", "/out"]
items: {lines: "%s"}
outputs: lines
chunk: 20
resources: {cpus: 1, memory: 256MB, disk: 64MB}
timeout: 3m
price: {max_per_gpu_hour: 0.40, budget: 5.00}
verify: {comparator: exact}
`

// follow shows the progress, and kills the leading scheduler half-way.
func (d *demo) follow(ctx context.Context, render, text string) error {
	shown := ""
	caught := uint64(0)
	for {
		r, err := d.net.job(ctx, render)
		if err != nil {
			return err
		}
		t, err := d.net.job(ctx, text)
		if err != nil {
			return err
		}
		line := fmt.Sprintf("frames %2d/%d (%2d verified)   lines %3d/%d (%3d verified)   %2d tasks, %2d checks   $%.6f",
			r.ItemsCommitted, r.Items, r.ItemsVerified, t.ItemsCommitted, t.Items, t.ItemsVerified,
			r.Attempts+t.Attempts, r.Checks+t.Checks, float64(r.SpentMicroUsd+t.SpentMicroUsd)/1e6)
		if line != shown {
			d.say("%s", line)
			shown = line
		}
		if n := r.Caught + t.Caught; n > caught {
			caught = n
			d.sayCaught(ctx, render, text)
		}
		if r.Settled && t.Settled {
			return nil
		}
		if !d.leaderKilled && r.ItemsCommitted*2 >= r.Items {
			node, err := d.net.killLeader(ctx)
			if err != nil {
				return fmt.Errorf("killing the leader: %w", err)
			}
			d.leaderKilled = true
			d.say("kill -9: the leading scheduler %s is dead", node)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the jobs did not end in time: %w", ctx.Err())
		case <-time.After(700 * time.Millisecond):
		}
	}
}

func (d *demo) sayCaught(ctx context.Context, jobs ...string) {
	for _, id := range jobs {
		detail, err := d.net.detail(ctx, id)
		if err != nil {
			continue // said again with the next one, and in the summary
		}
		for _, a := range detail.Attempts {
			if rejected(a) && !d.net.told[a.Id] {
				d.net.told[a.Id] = true
				d.say("caught: %s of %s is unpaid: %s", d.net.name(a.Worker), a.Owner, a.Reason)
			}
		}
	}
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}
