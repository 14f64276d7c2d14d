package gpu_test

import (
	"context"
	"testing"
	"time"

	"github.com/musternet/muster/gpu"
)

func TestFake(t *testing.T) {
	ctx := context.Background()
	var zero gpu.Fake
	if inv := zero.Detect(ctx); len(inv.Devices) != 0 || inv.Reason == "" {
		t.Errorf("the zero fake finds %+v", inv)
	}
	f := gpu.NewFake(gpu.FakeDevice(0, "H100", 80<<30), gpu.FakeDevice(1, "H100", 80<<30))
	inv := f.Detect(ctx)
	if len(inv.Devices) != 2 || inv.Driver == "" || inv.Reason != "" || inv.Devices[0].UUID == inv.Devices[1].UUID {
		t.Errorf("found %+v", inv)
	}
	inv.Devices[0].Name = "changed"
	if f.Detect(ctx).Devices[0].Name != "H100" {
		t.Error("a caller's change went into the fake")
	}
	f.Set(gpu.Inventory{Reason: "driver gone"})
	if inv := f.Detect(ctx); len(inv.Devices) != 0 || inv.Reason != "driver gone" {
		t.Errorf("after Set: %+v", inv)
	}
	f.Hang(true)
	ctx, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	if inv := f.Detect(ctx); inv.Reason == "" {
		t.Errorf("a fake that hangs finds %+v", inv)
	}
	if f.Calls() != 4 {
		t.Errorf("%d calls counted, 4 made", f.Calls())
	}
}
