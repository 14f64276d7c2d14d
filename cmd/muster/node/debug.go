package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime"
	"runtime/metrics"
	"time"

	"github.com/musternet/muster/api"
)

// Vars is what /debug/vars says of a process.
type Vars struct {
	HeapBytes    uint64  `json:"heap_bytes"`      // of live objects and of garbage that was not swept yet
	HeapSysBytes uint64  `json:"heap_sys_bytes"`  // of memory kept for the heap
	Goroutines   uint64  `json:"goroutines"`      //
	Collections  uint64  `json:"gc_cycles"`       // since the start
	GCCPUSeconds float64 `json:"gc_cpu_seconds"`  // estimated
	Allocated    uint64  `json:"allocated_bytes"` // since the start
}

func readVars() Vars {
	samples := []metrics.Sample{
		{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/unused:bytes"}, {Name: "/sched/goroutines:goroutines"},
		{Name: "/gc/cycles/total:gc-cycles"}, {Name: "/cpu/classes/gc/total:cpu-seconds"}, {Name: "/gc/heap/allocs:bytes"},
	}
	metrics.Read(samples)
	n := func(i int) uint64 { return samples[i].Value.Uint64() }
	return Vars{HeapBytes: n(0), HeapSysBytes: n(0) + n(1), Goroutines: n(2), Collections: n(3), GCCPUSeconds: samples[4].Value.Float64(), Allocated: n(5)}
}

// listenDebug listens for profiles and metrics, which tell a stranger too much:
// on loopback only.
func listenDebug(address string) (net.Listener, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, api.Errorf(api.Invalid, "debug address %q: want host:port", address)
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return nil, api.Errorf(api.Invalid, "debug address %q: only loopback is allowed, such as 127.0.0.1:6060; profiles show what a process holds", address)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listening for --debug-listen on %s: %w", address, err)
	}
	return l, nil
}

// debugHandler serves net/http/pprof below /debug/pprof/, and Vars as JSON at
// /debug/vars; with ?gc=1 garbage is collected first.
func debugHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("/debug/vars", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("gc") == "1" {
			runtime.GC()
			runtime.GC() // what the first one found to be finalized
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(readVars()) // a reader that left
	})
	return mux
}

// serveDebug answers on l until ctx ends.
func serveDebug(ctx context.Context, l net.Listener) error {
	srv := &http.Server{Handler: debugHandler(), ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
