package worker

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/musternet/muster/gpu"
)

// errInventory ends a session so that the next one states the new inventory.
var errInventory = errors.New("the GPUs changed")

// watchGPUs looks at the GPUs again and again: one that falls off the bus, or
// turns unhealthy, takes no further jobs, and one that comes back does. A machine
// that had no driver at the start is not asked again.
func (w *Worker) watchGPUs(ctx context.Context) {
	if w.Detector == nil || (w.inventory().Driver == "" && len(w.inventory().Devices) == 0) {
		return
	}
	tick := time.NewTicker(w.GPUInterval)
	defer tick.Stop()
	missed := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		found := w.Detector.Detect(ctx)
		if ctx.Err() != nil || sameGPUs(w.inventory(), found) {
			continue
		}
		if len(found.Devices) == 0 && !missed {
			missed = true // a driver that was slow once is no reason to drop everything
			continue
		}
		missed = false
		w.Logger.Warn("the GPUs changed", "devices", len(found.Devices), "reason", found.Reason)
		w.mu.Lock()
		w.found = found
		w.mu.Unlock()
		select {
		case w.restate <- struct{}{}:
		default: // it is about to happen already
		}
	}
}

func (w *Worker) inventory() gpu.Inventory {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.found
}

// sameGPUs compares what decides about jobs; temperatures come and go.
func sameGPUs(a, b gpu.Inventory) bool {
	return a.Driver == b.Driver && slices.EqualFunc(a.Devices, b.Devices, func(x, y gpu.Device) bool {
		return x.UUID == y.UUID && x.Unhealthy == y.Unhealthy && x.MIG == y.MIG && x.MemoryBytes == y.MemoryBytes
	})
}
