//go:build !cgo || !linux

package nvml

import "github.com/musternet/muster/gpu"

// unsupported is why this build finds no GPU.
const unsupported = "this binary was built without cgo, or not for Linux, and cannot load NVML: it runs as a CPU worker; use a release built with cgo for GPU work"

func probe(string) gpu.Inventory { return gpu.Inventory{Reason: unsupported} }
