// Command reason prints what GPU detection finds, or why it finds nothing.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/musternet/muster/gpu/nvml"
)

func main() {
	if nvml.MaybeProbe(os.Args[1:]) {
		return
	}
	inv := nvml.New(nvml.Options{}).Detect(context.Background())
	for _, d := range inv.Devices {
		fmt.Printf("%d %s %s %d bytes\n", d.Index, d.UUID, d.Name, d.MemoryBytes)
	}
	if inv.Reason != "" {
		fmt.Println(inv.Reason)
	}
}
