// Package gpu holds what muster knows about a machine's GPUs, and the contract
// of whatever finds them. gpu/nvml is the real detector; Fake is for tests.
package gpu

import "context"

// Device is one GPU, or one MIG slice of one.
type Device struct {
	// Index is NVML's. A MIG slice has its parent's.
	Index int `json:"index"`
	// UUID is empty for a device that was lost before it could be asked.
	UUID string `json:"uuid"`
	Name string `json:"name"`
	// MemoryBytes is the total, not what is free; 0 where the device has no
	// memory of its own to report (GPUs that share the CPU's).
	MemoryBytes uint64 `json:"memory_bytes"`
	// ComputeCapability is "major.minor", such as "9.0".
	ComputeCapability string `json:"compute_capability"`
	// Architecture is NVIDIA's name in lower case: "turing", "ampere", "ada",
	// "hopper", "blackwell"; "unknown" for one newer than this build.
	Architecture string `json:"architecture"`
	// Driver is the full version, such as "550.54.15"; empty where NVML does not
	// say it.
	Driver string `json:"driver"`
	// MIG is "unsupported", "disabled", "enabled" (a parent that is split and
	// takes no jobs itself) or "slice".
	MIG string `json:"mig"`
	// ParentUUID is the physical GPU of a MIG slice, empty otherwise.
	ParentUUID string `json:"parent_uuid,omitempty"`

	// Telemetry, as it was at detection. A value the device does not report is
	// absent.
	TemperatureC       *uint32 `json:"temperature_celsius,omitempty"`
	PowerMilliwatts    *uint32 `json:"power_milliwatts,omitempty"`
	UtilizationPercent *uint32 `json:"utilization_percent,omitempty"`

	// Unhealthy says why the device takes no jobs (ECC, lost from the bus),
	// empty for a healthy one.
	Unhealthy string `json:"unhealthy,omitempty"`
}

// Inventory is what a detector found on this machine.
type Inventory struct {
	Devices []Device `json:"devices"`
	// Driver is the driver's version, empty where none was found.
	Driver string `json:"driver,omitempty"`
	// Reason says in one sentence why Devices is empty; empty otherwise.
	Reason string `json:"reason,omitempty"`
}

// Detector finds devices.
type Detector interface {
	// Detect never fails: a machine without a usable driver is an empty
	// Inventory with the Reason. It returns within ctx's deadline even when the
	// driver hangs or crashes.
	Detect(ctx context.Context) Inventory
}
