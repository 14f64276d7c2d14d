//go:build cgo && linux

package nvml

import (
	"fmt"
	"strings"

	"github.com/NVIDIA/go-nvml/pkg/dl"
	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/musternet/muster/gpu"
)

// unsupported is empty: this build can load NVML.
const unsupported = ""

// required are the functions without which no device can be described; they
// are in every driver since 2014 (R340). go-nvml calls through lazily bound symbols,
// and a call to one that the library lacks ends the process, so that they are
// looked up first.
var required = []string{
	"nvmlInit_v2", "nvmlErrorString", "nvmlSystemGetDriverVersion", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2",
	"nvmlDeviceGetUUID", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCudaComputeCapability",
}

// probe loads a library and asks it for the devices. It runs in the child, and
// may not return.
func probe(library string) gpu.Inventory {
	handle := dl.New(library, dl.RTLD_LAZY|dl.RTLD_GLOBAL)
	if err := handle.Open(); err != nil {
		return gpu.Inventory{Reason: openReason(library, err)}
	}
	for _, symbol := range required {
		if handle.Lookup(symbol) != nil {
			return gpu.Inventory{Reason: fmt.Sprintf("%s has no function %s: it is no NVML, or that of a driver older than R340; update the NVIDIA driver", library, symbol)}
		}
	}
	// Nothing is shut down or closed: the process ends after this, and a broken
	// driver has one call less to hang in.
	return collect(nvml.New(nvml.WithLibraryPath(library)))
}

// openReason says why the loader refused a library; the texts are glibc's and
// musl's.
func openReason(library string, err error) string {
	said := err.Error()
	switch {
	case strings.Contains(said, library) && strings.Contains(said, "No such file or directory"):
		return fmt.Sprintf("no NVIDIA driver was found: there is no library %s; install the driver, or name its library in %s", library, LibraryEnv)
	case strings.Contains(said, "Permission denied"):
		return fmt.Sprintf("no permission to load the NVIDIA library: %s", said)
	}
	return fmt.Sprintf("the NVIDIA library could not be loaded: %s", said)
}

// startReason says why NVML did not start, or what it refused.
func startReason(what string, ret nvml.Return) string {
	switch ret {
	case nvml.ERROR_LIB_RM_VERSION_MISMATCH:
		return "the NVIDIA driver in the kernel and its library have different versions, as after an update: reboot, or reload the driver's kernel modules"
	case nvml.ERROR_DRIVER_NOT_LOADED:
		return "the NVIDIA driver is installed but not loaded: load its kernel module with modprobe nvidia, or reboot"
	case nvml.ERROR_NO_PERMISSION, nvml.ERROR_OPERATING_SYSTEM:
		return fmt.Sprintf("no permission to use the GPUs: %s was refused (%v); check the access to /dev/nvidia* and the container's or service's device rules", what, ret)
	}
	return fmt.Sprintf("NVML failed: %s says %v (%d)", what, ret, int32(ret))
}
