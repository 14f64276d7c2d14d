package docker

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	dcontainer "github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/image"
)

// BenchmarkStart measures how long it takes from a ready image to a started
// program: plain is create and start through the API without a network and with
// the engine's defaults for the rest, sandboxed the same with our sandbox, and run
// is Run. They take turns, so that a busy machine is busy for all.
func BenchmarkStart(b *testing.B) {
	r := engine(b)
	s := spec(b, "exit", "0")
	must(b, r.Ensure(b.Context(), s.Image))
	tag, err := r.tag(s.Image)
	must(b, err)
	known, err := r.known(b.Context())
	must(b, err)
	found, err := r.facts(b.Context(), tag)
	must(b, err)
	user := identify(known, nobody)
	bare := &dcontainer.HostConfig{NetworkMode: "none"}
	plain := func(config *dcontainer.Config, host *dcontainer.HostConfig) time.Duration {
		began := time.Now()
		created, err := r.client.ContainerCreate(b.Context(), config, host, nil, nil, "")
		must(b, err)
		must(b, r.client.ContainerStart(b.Context(), created.ID, dcontainer.StartOptions{}))
		took := time.Since(began)
		must(b, r.remove(b.Context(), created.ID))
		return took
	}
	times := map[string][]time.Duration{}
	n := 0
	for b.Loop() {
		n++
		s.ID, s.Outputs = fmt.Sprintf("start-%d", n), b.TempDir()
		times["plain"] = append(times["plain"], plain(&dcontainer.Config{Image: tag, Cmd: s.Command, Labels: map[string]string{labelOwner: r.opts.Owner}}, bare))
		times["sandboxed"] = append(times["sandboxed"], plain(
			config(s, found, user, r.opts.Owner, false), hostConfig(s, found, known, user, r.opts)))
		began := time.Now()
		var took time.Duration
		s.Started = func() { took = time.Since(began) }
		must(b, r.Ensure(context.Background(), s.Image))
		result, err := r.Run(context.Background(), s)
		must(b, err)
		if !result.OK() || took == 0 {
			b.Fatalf("%+v after %s", result, took)
		}
		times["run"] = append(times["run"], took)
	}
	b.ReportMetric(0, "ns/op")
	for name, all := range times {
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, name+"-ms-p50")
		b.ReportMetric(float64(all[len(all)*99/100].Microseconds())/1000, name+"-ms-p99")
	}
}

// Started is called once, while the program runs.
func TestStartedIsSaid(t *testing.T) {
	r := engine(t)
	s := spec(t, "exit", "0")
	calls := 0
	s.Started = func() {
		calls++
		if len(containers(t, r)) != 1 {
			t.Error("there is no container yet")
		}
	}
	run(t, r, s)
	if calls != 1 {
		t.Errorf("said %d times", calls)
	}
}

// An image that somebody removed behind the worker's back is made ready again.
func TestImageIsRemovedBehindItsBack(t *testing.T) {
	r := engine(t)
	s := spec(t, "exit", "0")
	must(t, r.Ensure(t.Context(), s.Image))
	tag, err := r.tag(s.Image)
	must(t, err)
	_, err = r.client.ImageRemove(t.Context(), tag, image.RemoveOptions{Force: true, PruneChildren: true})
	must(t, err)
	result, err := r.Run(t.Context(), s)
	must(t, err)
	if !result.OK() {
		t.Errorf("%+v", result)
	}
}
