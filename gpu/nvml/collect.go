//go:build cgo && linux

package nvml

import (
	"fmt"
	"strings"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/musternet/muster/gpu"
)

// maxDevices bounds what a library may claim to have. The largest machines have
// some dozens.
const maxDevices = 256

var architectures = map[nvml.DeviceArchitecture]string{
	nvml.DEVICE_ARCH_KEPLER: "kepler", nvml.DEVICE_ARCH_MAXWELL: "maxwell", nvml.DEVICE_ARCH_PASCAL: "pascal",
	nvml.DEVICE_ARCH_VOLTA: "volta", nvml.DEVICE_ARCH_TURING: "turing", nvml.DEVICE_ARCH_AMPERE: "ampere",
	nvml.DEVICE_ARCH_ADA: "ada", nvml.DEVICE_ARCH_HOPPER: "hopper", nvml.DEVICE_ARCH_BLACKWELL: "blackwell",
	nvml.DEVICE_ARCH_RUBIN: "rubin",
}

// collect asks a loaded library for everything that an Inventory holds.
func collect(lib nvml.Interface) gpu.Inventory {
	if ret := lib.Init(); ret != nvml.SUCCESS {
		return gpu.Inventory{Reason: startReason("nvmlInit", ret)}
	}
	var inv gpu.Inventory
	if driver, ret := lib.SystemGetDriverVersion(); ret == nvml.SUCCESS {
		inv.Driver = text(driver)
	}
	count, ret := lib.DeviceGetCount()
	switch {
	case ret != nvml.SUCCESS:
		inv.Reason = startReason("nvmlDeviceGetCount", ret)
		return inv
	case count == 0:
		inv.Reason = "the NVIDIA driver is loaded and has no device: no GPU is plugged in, powered, or visible to this container"
		return inv
	case count < 0 || count > maxDevices:
		inv.Reason = fmt.Sprintf("NVML says that this machine has %d GPUs; at most %d are believed", count, maxDevices)
		return inv
	}
	has := func(symbol string) bool { return lib.Extensions().LookupSymbol(symbol) == nil }
	refused := nvml.SUCCESS
	for i := range count {
		handle, ret := lib.DeviceGetHandleByIndex(i)
		switch ret {
		case nvml.SUCCESS:
			inv.Devices = append(inv.Devices, describe(handle, has, i, inv.Driver)...)
		case nvml.ERROR_NO_PERMISSION, nvml.ERROR_OPERATING_SYSTEM:
			refused = ret // somebody else's: a container sees the count of the whole machine
		default:
			inv.Devices = append(inv.Devices, gpu.Device{
				Index: i, Architecture: "unknown", Driver: inv.Driver, MIG: "unsupported", Unhealthy: faultOf(ret, "its handle"),
			})
		}
	}
	if len(inv.Devices) == 0 {
		inv.Reason = startReason("each of the GPUs", refused)
	}
	return inv
}

// describe gives a device and, after it, its MIG slices.
func describe(handle nvml.Device, has func(string) bool, index int, driver string) []gpu.Device {
	r := reader{has: has}
	d := gpu.Device{Index: index, Driver: driver, Architecture: "unknown", MIG: "unsupported"}
	r.identify(handle, &d)
	type version struct{ major, minor int }
	if v, ok := read(&r, "nvmlDeviceGetCudaComputeCapability", func() (version, nvml.Return) {
		major, minor, ret := handle.GetCudaComputeCapability()
		return version{major, minor}, ret
	}); ok {
		d.ComputeCapability = fmt.Sprintf("%d.%d", v.major, v.minor)
	} else {
		r.missing("its compute capability")
	}
	if a, ok := read(&r, "nvmlDeviceGetArchitecture", handle.GetArchitecture); ok && architectures[a] != "" {
		d.Architecture = architectures[a]
	}
	if mode, ok := read(&r, "nvmlDeviceGetMigMode", func() (int, nvml.Return) {
		current, _, ret := handle.GetMigMode()
		return current, ret
	}); ok {
		d.MIG = "disabled"
		if mode == nvml.DEVICE_MIG_ENABLE {
			d.MIG = "enabled"
		}
	}
	r.telemetry(handle, &d)
	r.checkMemory(handle)
	d.Unhealthy = r.fault
	all := []gpu.Device{d}
	if d.MIG == "enabled" && d.Unhealthy == "" {
		all = append(all, migSlices(handle, has, d)...)
	}
	return all
}

// migSlices describes the MIG slices of a device. What a slice has in common with
// the GPU it is cut from is taken from there.
func migSlices(handle nvml.Device, has func(string) bool, parent gpu.Device) (list []gpu.Device) {
	r := reader{has: has}
	most, ok := read(&r, "nvmlDeviceGetMaxMigDeviceCount", handle.GetMaxMigDeviceCount)
	if !ok || !has("nvmlDeviceGetMigDeviceHandleByIndex") {
		return nil
	}
	for i := range min(most, maxDevices) {
		slice, ret := handle.GetMigDeviceHandleByIndex(i)
		if ret != nvml.SUCCESS {
			continue // NOT_FOUND: the indices of slices have gaps
		}
		r := reader{has: has}
		d := gpu.Device{
			Index: parent.Index, ParentUUID: parent.UUID, MIG: "slice",
			ComputeCapability: parent.ComputeCapability, Architecture: parent.Architecture, Driver: parent.Driver,
		}
		r.identify(slice, &d)
		r.telemetry(slice, &d)
		d.Unhealthy = r.fault
		list = append(list, d)
	}
	return list
}

// reader asks one device. The first fault found is what makes it unhealthy; a
// device that is lost is not asked again.
type reader struct {
	has   func(symbol string) bool
	fault string
	gone  bool
	last  nvml.Return // of the latest question
}

// read asks one question. ok is false when the driver has no such function, or
// the device no such value.
func read[T any](r *reader, symbol string, ask func() (T, nvml.Return)) (value T, ok bool) {
	if r.gone {
		return value, false
	}
	if !r.has(symbol) {
		r.last = nvml.ERROR_FUNCTION_NOT_FOUND
		return value, false
	}
	value, r.last = ask()
	switch r.last {
	case nvml.SUCCESS:
		return value, true
	case nvml.ERROR_GPU_IS_LOST, nvml.ERROR_RESET_REQUIRED:
		r.gone = true
		r.fault = faultOf(r.last, "it")
	}
	var none T
	return none, false
}

// missing notes that a device does not give what no job can do without.
func (r *reader) missing(what string) {
	if r.fault == "" {
		r.fault = faultOf(r.last, what)
	}
}

func faultOf(ret nvml.Return, what string) string {
	switch ret {
	case nvml.ERROR_GPU_IS_LOST:
		return "the GPU has fallen off the bus: reboot, and check its power and seating"
	case nvml.ERROR_RESET_REQUIRED:
		return "the GPU needs a reset: nvidia-smi --gpu-reset, or reboot"
	case nvml.ERROR_INSUFFICIENT_POWER:
		return "the GPU's power cables are not attached"
	case nvml.ERROR_IRQ_ISSUE:
		return "the kernel has an interrupt problem with the GPU"
	}
	return fmt.Sprintf("NVML does not give %s: %v", what, ret)
}

func (r *reader) identify(handle nvml.Device, d *gpu.Device) {
	if uuid, ok := read(r, "nvmlDeviceGetUUID", handle.GetUUID); ok && uuid != "" {
		d.UUID = text(uuid)
	} else {
		r.missing("its UUID")
	}
	if name, ok := read(r, "nvmlDeviceGetName", handle.GetName); ok {
		d.Name = text(name)
	} else {
		r.missing("its name")
	}
	if memory, ok := read(r, "nvmlDeviceGetMemoryInfo", handle.GetMemoryInfo); ok {
		d.MemoryBytes = memory.Total
	} else if r.last != nvml.ERROR_NOT_SUPPORTED { // unified memory has no size of its own
		r.missing("its memory")
	}
}

func (r *reader) telemetry(handle nvml.Device, d *gpu.Device) {
	if v, ok := read(r, "nvmlDeviceGetTemperature", func() (uint32, nvml.Return) { return handle.GetTemperature(nvml.TEMPERATURE_GPU) }); ok {
		d.TemperatureC = &v
	}
	if v, ok := read(r, "nvmlDeviceGetPowerUsage", handle.GetPowerUsage); ok {
		d.PowerMilliwatts = &v
	}
	if v, ok := read(r, "nvmlDeviceGetUtilizationRates", handle.GetUtilizationRates); ok {
		d.UtilizationPercent = &v.Gpu
	}
}

// checkMemory finds memory that cannot be trusted. Wrong results cost their
// owner, so that a device with errors since its last reset takes no jobs.
func (r *reader) checkMemory(handle nvml.Device) {
	uncorrected, ok := read(r, "nvmlDeviceGetTotalEccErrors", func() (uint64, nvml.Return) {
		return handle.GetTotalEccErrors(nvml.MEMORY_ERROR_TYPE_UNCORRECTED, nvml.VOLATILE_ECC)
	})
	if ok && uncorrected > 0 && r.fault == "" {
		r.fault = fmt.Sprintf("%d uncorrectable memory errors (ECC) since the last reset: reset the GPU or reboot", uncorrected)
	}
	type rows struct{ pending, failed bool }
	remap, ok := read(r, "nvmlDeviceGetRemappedRows", func() (rows, nvml.Return) {
		_, _, pending, failed, ret := handle.GetRemappedRows()
		return rows{pending, failed}, ret
	})
	switch {
	case !ok || r.fault != "":
	case remap.failed:
		r.fault = "a memory row could not be remapped: the GPU has to be replaced"
	case remap.pending:
		r.fault = "a memory row waits to be remapped: reset the GPU or reboot"
	}
}

// text keeps what a broken driver says from breaking the JSON or a terminal.
func text(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f || c == '\ufffd' {
			return -1
		}
		return c
	}, s)
}
