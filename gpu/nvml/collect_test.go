//go:build cgo && linux

package nvml

import (
	"fmt"
	"strings"
	"testing"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock"

	"github.com/musternet/muster/gpu"
)

// h100 answers everything; tests change what they are about.
func h100(index int) *mock.Device {
	return &mock.Device{
		GetUUIDFunc:                  func() (string, nvml.Return) { return fmt.Sprintf("GPU-%d", index), nvml.SUCCESS },
		GetNameFunc:                  func() (string, nvml.Return) { return "NVIDIA H100 80GB HBM3", nvml.SUCCESS },
		GetMemoryInfoFunc:            func() (nvml.Memory, nvml.Return) { return nvml.Memory{Total: 80 << 30}, nvml.SUCCESS },
		GetCudaComputeCapabilityFunc: func() (int, int, nvml.Return) { return 9, 0, nvml.SUCCESS },
		GetArchitectureFunc:          func() (nvml.DeviceArchitecture, nvml.Return) { return nvml.DEVICE_ARCH_HOPPER, nvml.SUCCESS },
		GetMigModeFunc:               func() (int, int, nvml.Return) { return 0, 0, nvml.SUCCESS },
		GetTemperatureFunc:           func(nvml.TemperatureSensors) (uint32, nvml.Return) { return 30, nvml.SUCCESS },
		GetPowerUsageFunc:            func() (uint32, nvml.Return) { return 68_000, nvml.SUCCESS },
		GetUtilizationRatesFunc:      func() (nvml.Utilization, nvml.Return) { return nvml.Utilization{Gpu: 0, Memory: 5}, nvml.SUCCESS },
		GetTotalEccErrorsFunc: func(kind nvml.MemoryErrorType, counter nvml.EccCounterType) (uint64, nvml.Return) {
			if kind == nvml.MEMORY_ERROR_TYPE_UNCORRECTED && counter == nvml.VOLATILE_ECC {
				return 0, nvml.SUCCESS
			}
			return 99, nvml.SUCCESS
		},
		GetRemappedRowsFunc: func() (int, int, bool, bool, nvml.Return) { return 1, 0, false, false, nvml.SUCCESS },
	}
}

// without makes a device answer ret to every question that it may refuse.
func without(d *mock.Device, ret nvml.Return) *mock.Device {
	d.GetMigModeFunc = func() (int, int, nvml.Return) { return 1, 1, ret }
	d.GetTemperatureFunc = func(nvml.TemperatureSensors) (uint32, nvml.Return) { return 1, ret }
	d.GetPowerUsageFunc = func() (uint32, nvml.Return) { return 1, ret }
	d.GetUtilizationRatesFunc = func() (nvml.Utilization, nvml.Return) { return nvml.Utilization{Gpu: 1}, ret }
	d.GetTotalEccErrorsFunc = func(nvml.MemoryErrorType, nvml.EccCounterType) (uint64, nvml.Return) { return 1, ret }
	d.GetRemappedRowsFunc = func() (int, int, bool, bool, nvml.Return) { return 1, 1, true, true, ret }
	return d
}

func driver(devices ...*mock.Device) *mock.Interface {
	return &mock.Interface{
		InitFunc:                   func() nvml.Return { return nvml.SUCCESS },
		SystemGetDriverVersionFunc: func() (string, nvml.Return) { return "550.54.15", nvml.SUCCESS },
		DeviceGetCountFunc:         func() (int, nvml.Return) { return len(devices), nvml.SUCCESS },
		DeviceGetHandleByIndexFunc: func(i int) (nvml.Device, nvml.Return) { return devices[i], nvml.SUCCESS },
		ExtensionsFunc: func() nvml.ExtendedInterface {
			return &mock.ExtendedInterface{LookupSymbolFunc: func(string) error { return nil }}
		},
	}
}

func TestCollectHealthy(t *testing.T) {
	inv := collect(driver(h100(0), h100(1)))
	if len(inv.Devices) != 2 || inv.Driver != "550.54.15" || inv.Reason != "" {
		t.Fatalf("found %+v", inv)
	}
	d := inv.Devices[1]
	if *d.TemperatureC != 30 || *d.PowerMilliwatts != 68_000 || *d.UtilizationPercent != 0 {
		t.Errorf("telemetry %d %d %d", *d.TemperatureC, *d.PowerMilliwatts, *d.UtilizationPercent)
	}
	d.TemperatureC, d.PowerMilliwatts, d.UtilizationPercent = nil, nil, nil
	want := gpu.Device{
		Index: 1, UUID: "GPU-1", Name: "NVIDIA H100 80GB HBM3", MemoryBytes: 80 << 30, ComputeCapability: "9.0",
		Architecture: "hopper", Driver: "550.54.15", MIG: "disabled",
	}
	if d != want {
		t.Errorf("found %+v, want %+v", d, want)
	}
}

func TestCollectNothing(t *testing.T) {
	refuse := func(ret nvml.Return) func(*mock.Interface) {
		return func(l *mock.Interface) { l.InitFunc = func() nvml.Return { return ret } }
	}
	for _, c := range []struct {
		name   string
		change func(*mock.Interface)
		say    string
		driver string
	}{
		{"no devices", func(l *mock.Interface) { l.DeviceGetCountFunc = func() (int, nvml.Return) { return 0, nvml.SUCCESS } }, "has no device", "550.54.15"},
		{"too many", func(l *mock.Interface) { l.DeviceGetCountFunc = func() (int, nvml.Return) { return 257, nvml.SUCCESS } }, "257 GPUs; at most 256", "550.54.15"},
		{"no count", func(l *mock.Interface) {
			l.DeviceGetCountFunc = func() (int, nvml.Return) { return 0, nvml.ERROR_UNKNOWN }
		}, "NVML failed: nvmlDeviceGetCount says ERROR_UNKNOWN (999)", "550.54.15"},
		{"version mismatch", refuse(nvml.ERROR_LIB_RM_VERSION_MISMATCH), "reboot, or reload the driver", ""},
		{"not loaded", refuse(nvml.ERROR_DRIVER_NOT_LOADED), "modprobe nvidia", ""},
		{"permission", refuse(nvml.ERROR_NO_PERMISSION), "no permission to use the GPUs", ""},
		{"cgroup", refuse(nvml.ERROR_OPERATING_SYSTEM), "no permission to use the GPUs", ""},
		{"other", refuse(nvml.ERROR_MEMORY), "NVML failed: nvmlInit says ERROR_MEMORY (20)", ""},
		{"no device permitted", func(l *mock.Interface) {
			l.DeviceGetHandleByIndexFunc = func(int) (nvml.Device, nvml.Return) { return nil, nvml.ERROR_NO_PERMISSION }
		}, "no permission to use the GPUs: each of the GPUs was refused", "550.54.15"},
	} {
		t.Run(c.name, func(t *testing.T) {
			lib := driver(h100(0))
			c.change(lib)
			if inv := collect(lib); len(inv.Devices) > 0 || !strings.Contains(inv.Reason, c.say) || inv.Driver != c.driver {
				t.Errorf("found %+v, want driver %q and a reason with %q", inv, c.driver, c.say)
			}
		})
	}
}

func TestCollectPermittedOnly(t *testing.T) {
	lib := driver(h100(0), h100(1), h100(2))
	handle := lib.DeviceGetHandleByIndexFunc
	lib.DeviceGetHandleByIndexFunc = func(i int) (nvml.Device, nvml.Return) {
		if i != 1 {
			return nil, nvml.ERROR_NO_PERMISSION
		}
		return handle(i)
	}
	if inv := collect(lib); len(inv.Devices) != 1 || inv.Devices[0].Index != 1 || inv.Reason != "" {
		t.Errorf("found %+v", inv)
	}
}

// What a device or a driver does not have is absent, and never 0.
func TestCollectAbsentValues(t *testing.T) {
	optional := []string{
		"nvmlDeviceGetArchitecture", "nvmlDeviceGetMigMode", "nvmlDeviceGetTemperature", "nvmlDeviceGetPowerUsage",
		"nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetRemappedRows",
	}
	old := driver(without(h100(0), nvml.SUCCESS)) // every answer would make it unhealthy
	old.ExtensionsFunc = func() nvml.ExtendedInterface {
		return &mock.ExtendedInterface{LookupSymbolFunc: func(symbol string) error {
			for _, o := range optional {
				if o == symbol {
					return fmt.Errorf("no %s", symbol)
				}
			}
			return nil
		}}
	}
	for name, lib := range map[string]*mock.Interface{
		"unsupported by the device": driver(without(h100(0), nvml.ERROR_NOT_SUPPORTED)),
		"unknown error":             driver(without(h100(0), nvml.ERROR_UNKNOWN)),
		"old driver":                old,
	} {
		inv := collect(lib)
		if len(inv.Devices) != 1 {
			t.Fatalf("%s: found %+v", name, inv)
		}
		d := inv.Devices[0]
		if d.TemperatureC != nil || d.PowerMilliwatts != nil || d.UtilizationPercent != nil || d.MIG != "unsupported" || d.Unhealthy != "" {
			t.Errorf("%s: %+v", name, d)
		}
		if want := map[bool]string{true: "unknown", false: "hopper"}[name == "old driver"]; d.Architecture != want {
			t.Errorf("%s: architecture %q, want %q", name, d.Architecture, want)
		}
	}
	newer := h100(0)
	newer.GetArchitectureFunc = func() (nvml.DeviceArchitecture, nvml.Return) { return 77, nvml.SUCCESS }
	newer.GetMemoryInfoFunc = func() (nvml.Memory, nvml.Return) { return nvml.Memory{}, nvml.ERROR_NOT_SUPPORTED }
	nameless := driver(newer)
	nameless.SystemGetDriverVersionFunc = func() (string, nvml.Return) { return "x", nvml.ERROR_UNKNOWN }
	inv := collect(nameless)
	if d := inv.Devices[0]; d.Architecture != "unknown" || d.MemoryBytes != 0 || d.Unhealthy != "" || d.Driver != "" || inv.Driver != "" {
		t.Errorf("a newer GPU with unified memory: %+v", d)
	}
}

func TestCollectHealth(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*mock.Device)
		say    string
	}{
		{"ECC", func(d *mock.Device) {
			d.GetTotalEccErrorsFunc = func(nvml.MemoryErrorType, nvml.EccCounterType) (uint64, nvml.Return) { return 2, nvml.SUCCESS }
		}, "2 uncorrectable memory errors"},
		{"remap pending", func(d *mock.Device) {
			d.GetRemappedRowsFunc = func() (int, int, bool, bool, nvml.Return) { return 0, 1, true, false, nvml.SUCCESS }
		}, "waits to be remapped"},
		{"remap failed", func(d *mock.Device) {
			d.GetRemappedRowsFunc = func() (int, int, bool, bool, nvml.Return) { return 0, 9, true, true, nvml.SUCCESS }
		}, "replaced"},
		{"lost at once", func(d *mock.Device) {
			d.GetUUIDFunc = func() (string, nvml.Return) { return "", nvml.ERROR_GPU_IS_LOST }
		}, "fallen off the bus"},
		{"lost while asked", func(d *mock.Device) {
			d.GetPowerUsageFunc = func() (uint32, nvml.Return) { return 0, nvml.ERROR_GPU_IS_LOST }
		}, "fallen off the bus"},
		{"reset required", func(d *mock.Device) {
			d.GetTemperatureFunc = func(nvml.TemperatureSensors) (uint32, nvml.Return) { return 0, nvml.ERROR_RESET_REQUIRED }
		}, "needs a reset"},
		{"no UUID", func(d *mock.Device) {
			d.GetUUIDFunc = func() (string, nvml.Return) { return "", nvml.ERROR_UNKNOWN }
		}, "NVML does not give its UUID: ERROR_UNKNOWN"},
		{"no memory", func(d *mock.Device) {
			d.GetMemoryInfoFunc = func() (nvml.Memory, nvml.Return) { return nvml.Memory{}, nvml.ERROR_UNKNOWN }
		}, "NVML does not give its memory"},
		{"no compute capability", func(d *mock.Device) {
			d.GetCudaComputeCapabilityFunc = func() (int, int, nvml.Return) { return 0, 0, nvml.ERROR_UNKNOWN }
		}, "NVML does not give its compute capability"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bad := h100(0)
			c.change(bad)
			inv := collect(driver(bad, h100(1)))
			if len(inv.Devices) != 2 || inv.Devices[1].Unhealthy != "" || !strings.Contains(inv.Devices[0].Unhealthy, c.say) {
				t.Errorf("found %+v, want the first unhealthy with %q", inv, c.say)
			}
		})
	}
}

func TestCollectLostBeforeItsHandle(t *testing.T) {
	for ret, say := range map[nvml.Return]string{
		nvml.ERROR_GPU_IS_LOST: "fallen off the bus", nvml.ERROR_INSUFFICIENT_POWER: "power cables",
		nvml.ERROR_IRQ_ISSUE: "interrupt", nvml.ERROR_UNKNOWN: "NVML does not give its handle",
	} {
		lib := driver(h100(0), h100(1))
		handle := lib.DeviceGetHandleByIndexFunc
		lib.DeviceGetHandleByIndexFunc = func(i int) (nvml.Device, nvml.Return) {
			if i == 0 {
				return nil, ret
			}
			return handle(i)
		}
		inv := collect(lib)
		if len(inv.Devices) != 2 || !strings.Contains(inv.Devices[0].Unhealthy, say) || inv.Devices[1].Unhealthy != "" || inv.Devices[1].Index != 1 {
			t.Errorf("%v: found %+v", ret, inv)
		}
	}
}

// A device that is lost is not asked again: each question would wait for the
// driver's own time limit.
func TestLostDeviceIsLeftAlone(t *testing.T) {
	d := h100(0)
	d.GetUUIDFunc = func() (string, nvml.Return) { return "", nvml.ERROR_GPU_IS_LOST }
	collect(driver(d))
	if n := len(d.GetNameCalls()) + len(d.GetMemoryInfoCalls()) + len(d.GetPowerUsageCalls()) + len(d.GetMigModeCalls()); n > 0 {
		t.Errorf("%d further questions to a lost device", n)
	}
}

func TestCollectMIG(t *testing.T) {
	slice := func(n int) *mock.Device {
		d := without(h100(0), nvml.ERROR_NOT_SUPPORTED)
		d.GetUUIDFunc = func() (string, nvml.Return) { return fmt.Sprintf("MIG-%d", n), nvml.SUCCESS }
		d.GetNameFunc = func() (string, nvml.Return) { return "NVIDIA H100 80GB HBM3 MIG 1g.10gb", nvml.SUCCESS }
		d.GetMemoryInfoFunc = func() (nvml.Memory, nvml.Return) { return nvml.Memory{Total: 10 << 30}, nvml.SUCCESS }
		return d
	}
	split := h100(1)
	split.GetMigModeFunc = func() (int, int, nvml.Return) { return nvml.DEVICE_MIG_ENABLE, nvml.DEVICE_MIG_ENABLE, nvml.SUCCESS }
	split.GetMaxMigDeviceCountFunc = func() (int, nvml.Return) { return 7, nvml.SUCCESS }
	split.GetMigDeviceHandleByIndexFunc = func(i int) (nvml.Device, nvml.Return) {
		if i == 1 || i > 3 {
			return nil, nvml.ERROR_NOT_FOUND
		}
		return slice(i), nvml.SUCCESS
	}
	inv := collect(driver(h100(0), split, h100(2)))
	var got []string
	for _, d := range inv.Devices {
		got = append(got, fmt.Sprintf("%d %s %s %s %d %s %s", d.Index, d.UUID, d.MIG, d.ParentUUID, d.MemoryBytes>>30, d.ComputeCapability, d.Architecture))
	}
	want := []string{
		"0 GPU-0 disabled  80 9.0 hopper", "1 GPU-1 enabled  80 9.0 hopper",
		"1 MIG-0 slice GPU-1 10 9.0 hopper", "1 MIG-2 slice GPU-1 10 9.0 hopper", "1 MIG-3 slice GPU-1 10 9.0 hopper",
		"2 GPU-2 disabled  80 9.0 hopper",
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("found\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	// The slices of a GPU with bad memory are not offered.
	split.GetTotalEccErrorsFunc = func(nvml.MemoryErrorType, nvml.EccCounterType) (uint64, nvml.Return) { return 1, nvml.SUCCESS }
	if inv := collect(driver(split)); len(inv.Devices) != 1 || inv.Devices[0].Unhealthy == "" || inv.Devices[0].MIG != "enabled" {
		t.Errorf("a split GPU with bad memory: %+v", inv)
	}

	// Split, and no slice made yet.
	empty := h100(0)
	empty.GetMigModeFunc = split.GetMigModeFunc
	empty.GetMaxMigDeviceCountFunc = func() (int, nvml.Return) { return 0, nvml.ERROR_UNKNOWN }
	if inv := collect(driver(empty)); len(inv.Devices) != 1 || inv.Devices[0].MIG != "enabled" || inv.Devices[0].Unhealthy != "" {
		t.Errorf("split without slices: %+v", inv)
	}
}

func TestText(t *testing.T) {
	if got := text("GPU\x00-\x1b[31m1\xff\n é"); got != "GPU-[31m1 é" {
		t.Errorf("cleaned to %q", got)
	}
}
