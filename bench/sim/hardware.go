package main

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// model is a kind of machine that people own.
type model struct {
	gpu, architecture, capability string
	vramGB                        uint64
	sizes                         []int // GPUs of a machine
	priceMicroUSDPerHour          int64
	share                         int // of all machines, in percent
}

// models are about what GPU markets list: many single consumer cards, and few
// large machines with most of the memory.
var models = []model{
	{"NVIDIA GeForce RTX 3060", "Ampere", "8.6", 12, []int{1, 1, 2}, 60_000, 22},
	{"NVIDIA GeForce RTX 3090", "Ampere", "8.6", 24, []int{1, 2, 4}, 180_000, 16},
	{"NVIDIA GeForce RTX 4090", "Ada", "8.9", 24, []int{1, 1, 2, 4, 8}, 350_000, 28},
	{"NVIDIA L4", "Ada", "8.9", 24, []int{1, 2, 4}, 300_000, 10},
	{"NVIDIA A100-SXM4-80GB", "Ampere", "8.0", 80, []int{4, 8, 8}, 1_100_000, 14},
	{"NVIDIA H100 80GB HBM3", "Hopper", "9.0", 80, []int{8}, 2_200_000, 10},
}

// drivers are the branches in use; results of different ones are not compared.
var drivers = []string{"550.163", "570.133", "570.172", "575.57"}

// machine makes the n-th worker. Owners have one machine, several, or a farm.
func machine(rng *rand.Rand, n int) *musterpb.Worker {
	m, roll := models[0], rng.IntN(100)
	for _, m = range models {
		if roll -= m.share; roll < 0 {
			break
		}
	}
	gpus := m.sizes[rng.IntN(len(m.sizes))]
	driver := drivers[rng.IntN(len(drivers))]
	var number [32]byte
	binary.BigEndian.PutUint64(number[:], uint64(n))
	key := sha256.Sum256(number[:]) // nobody signs anything here
	w := &musterpb.Worker{
		Id: string(api.WorkerIDOf(key[:])), PublicKey: key[:], Name: fmt.Sprintf("machine-%d", n),
		PriceMicroUsdPerHour: m.priceMicroUSDPerHour * int64(80+rng.IntN(40)) / 100, AllowNetwork: rng.IntN(2) == 0,
		Capacity: &musterpb.Capacity{
			MilliCpus: int64(gpus) * 8000, MemoryBytes: int64(gpus) * 48 << 30, DiskBytes: 2 << 40,
			Runtimes: []string{"docker", "wasm"}, Platform: "linux/amd64", CpuLevel: "x86-64-v3",
		},
	}
	for i := range gpus {
		w.Capacity.Devices = append(w.Capacity.Devices, &musterpb.Device{
			Index: uint32(i), Uuid: fmt.Sprintf("GPU-%d-%d", n, i), Name: m.gpu, MemoryBytes: m.vramGB * 1_000_000_000,
			ComputeCapability: m.capability, Architecture: m.architecture, Driver: driver,
		})
	}
	return w
}

// ownerOf spreads machines over owners: of every hundred, ten are of one owner
// each, ninety of the ten owners of a dozen groups.
func ownerOf(n int) string {
	if group, place := n/100, n%100; place >= 10 {
		return fmt.Sprintf("farm-%d-%d", group, place%10)
	}
	return fmt.Sprintf("home-%d", n)
}
