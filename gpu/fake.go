package gpu

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// Fake is a Detector for tests. The zero value finds nothing; Set changes what
// it finds, as a machine changes when a device is lost. It is safe for
// concurrent use.
type Fake struct {
	mu    sync.Mutex // guards the fields below
	found Inventory
	hang  bool
	calls int
}

var _ Detector = (*Fake)(nil)

// NewFake finds these devices, with the driver of the first.
func NewFake(devices ...Device) *Fake {
	f := &Fake{}
	f.Set(Inventory{Devices: devices})
	return f
}

// FakeDevice is a healthy device of which only the index, the name and the
// memory matter; its UUID follows from the index.
func FakeDevice(index int, name string, memoryBytes uint64) Device {
	return Device{
		Index: index, UUID: fmt.Sprintf("GPU-00000000-0000-0000-0000-%012d", index), Name: name, MemoryBytes: memoryBytes,
		ComputeCapability: "9.0", Architecture: "hopper", Driver: "550.54.15", MIG: "disabled",
	}
}

// Set changes what later calls find. Where it has no driver or no reason, they
// get one, so that a Fake keeps what Inventory promises.
func (f *Fake) Set(found Inventory) {
	found.Devices = slices.Clone(found.Devices)
	if found.Driver == "" && len(found.Devices) > 0 {
		found.Driver = found.Devices[0].Driver
	}
	if found.Reason == "" && len(found.Devices) == 0 {
		found.Reason = "this fake has no devices"
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.found = found
}

// Hang makes later calls wait for the end of their context, like a driver that
// does not answer.
func (f *Fake) Hang(hang bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hang = hang
}

// Calls is how often Detect was called.
func (f *Fake) Calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

// Detect implements Detector.
func (f *Fake) Detect(ctx context.Context) Inventory {
	f.mu.Lock()
	f.calls++
	found, hang := f.found, f.hang
	f.mu.Unlock()
	if hang {
		<-ctx.Done()
		return Inventory{Reason: "this fake hangs: " + ctx.Err().Error()}
	}
	if found.Devices == nil && found.Reason == "" {
		found.Reason = "this fake has no devices"
	}
	found.Devices = slices.Clone(found.Devices)
	return found
}
