package worker

import (
	"context"
	"testing"
	"time"

	"github.com/musternet/muster/container"
	"github.com/musternet/muster/gpu"
)

// A GPU that turns unhealthy is stated at once in a new session; attempts go on.
func TestGPUsAreWatched(t *testing.T) {
	f := newFakeScheduler(t)
	detector := gpu.NewFake(gpu.FakeDevice(0, "NVIDIA L4", 24<<30), gpu.FakeDevice(1, "NVIDIA L4", 24<<30))
	release := make(chan struct{})
	fake := &container.Fake{OnRun: blocking(release)}
	cfg := testConfig(t, f, fake)
	cfg.Inventory, cfg.Detector, cfg.GPUInterval = detector.Detect(t.Context()), detector, 10*time.Millisecond
	w := &testWorker{fake: fake, Worker: New(cfg)}
	w.start(t)
	s := f.session()
	if n := len(s.hello.Capacity.Devices); n != 2 {
		t.Fatalf("%d devices at first", n)
	}
	a := f.assignment("att-1", "{items}")
	f.set(func() { f.keep = []string{"att-1"} })
	s.assign(a)
	eventually(t, "the run", func() bool { return fake.Live() == 1 })

	broken := detector.Detect(context.Background())
	broken.Devices[1].Unhealthy = "it fell off the bus"
	detector.Set(broken)
	again := f.session()
	if d := again.hello.Capacity.Devices; len(d) != 2 || d[1].Unhealthy != "it fell off the bus" || d[0].Unhealthy != "" {
		t.Errorf("devices: %v", d)
	}
	if len(again.running) != 1 || fake.Live() != 1 {
		t.Errorf("running %v, %d live", again.running, fake.Live())
	}
	close(release)
}
