package main

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/cmd/muster/node"
	"github.com/musternet/muster/gpu/nvml"
	"github.com/musternet/muster/scheduler"
)

// schedulerGC is GOGC for a scheduler: what it keeps is small beside what it
// makes and drops, so that collecting less often costs little memory.
const schedulerGC = 400

func newScheduler(g *globals) *cobra.Command {
	var c node.Scheduler
	var config, raftListen string
	var join []string
	cmd := &cobra.Command{
		Use: "scheduler", Short: "Run a scheduler", Args: cobra.NoArgs,
		Long: `Scheduler runs one scheduler. The first one starts a new cluster and leaves an
admin's key in DATA/admin.key and DATA/client.yaml; the others join it with that
key. Three or five make a cluster that survives the loss of one or two.

Every flag can also be set by the environment (MUSTER_LISTEN for --listen) or in
the YAML file --config (listen: …). Stop a scheduler with Ctrl-C or SIGTERM.

Traffic is not encrypted in this version: keep the addresses on a private
network or on loopback.`,
		Example: `  muster scheduler --data s1 --listen 10.0.0.1:7070
  muster scheduler --data s2 --listen 10.0.0.2:7070 --join 10.0.0.1:7070 --key "$(cat admin.key)"
  muster scheduler --config /etc/muster/scheduler.yaml`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := fromFile(cmd, config); err != nil {
				return err
			}
			if c.RaftListen = raftListen; c.RaftListen == "" {
				var err error
				if c.RaftListen, err = nextPort(c.Listen); err != nil {
					return err
				}
			}
			c.Join, c.Key, c.Logger = join, g.key, g.logger(slog.LevelInfo)
			c.Ready = func(info node.Info) {
				if info.AdminKey != "" {
					if err := node.WriteClientConfig(c.Dir, []string{info.Address}, info.AdminKey); err != nil {
						c.Logger.Warn("client.yaml could not be written", "err", err)
					}
				}
				fmt.Fprintf(cmd.OutOrStdout(), "ready scheduler=%s api=%s\n", info.ID, info.Address)
			}
			if os.Getenv("GOGC") == "" {
				debug.SetGCPercent(schedulerGC)
			}
			return c.Run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.StringVar(&config, "config", os.Getenv("MUSTER_CONFIG"), "YAML file with the settings below")
	f.StringVar(&c.Dir, "data", "muster-scheduler", "data directory")
	f.StringVar(&c.Listen, "listen", "127.0.0.1:7070", "address of the API")
	f.StringVar(&c.Advertise, "advertise", "", "address of the API as others dial it (default: --listen)")
	f.StringVar(&raftListen, "raft-listen", "", "address for the other schedulers (default: --listen with the next port)")
	f.StringVar(&c.RaftAdvertise, "raft-advertise", "", "the same as the others dial it (default: --raft-listen)")
	f.StringSliceVar(&join, "join", nil, "API addresses of the cluster to join")
	f.StringVar(&c.Blobs, "blobs", "", "URL of a shared blob store, such as s3://bucket?region=eu-central-1 (default: on the schedulers, replicated)")
	f.DurationVar(&c.ElectionTimeout, "election-timeout", 350*time.Millisecond, "how long a silent leader is followed")
	f.DurationVar(&c.Timing.LeaseTTL, "lease-ttl", scheduler.DefaultLeaseTTL, "how long a worker may be silent before its work is placed elsewhere")
	f.DurationVar(&c.Timing.ReconnectGrace, "reconnect-grace", scheduler.DefaultReconnectGrace, "the same once its connection broke")
	f.DurationVar(&c.Timing.RevealTimeout, "reveal-timeout", scheduler.DefaultRevealTimeout, "how long a draw waits for the other schedulers")
	f.StringVar(&c.Debug, "debug-listen", "", "loopback address for profiles (/debug/pprof/) and metrics (/debug/vars), such as 127.0.0.1:6060 (default: off)")
	f.DurationVar(&c.Timing.SealAfter, "seal-after", scheduler.DefaultSealAfter, "how long a job stays in memory after it ended")
	f.DurationVar(&c.Timing.DisputePatience, "dispute-patience", scheduler.DefaultDisputePatience, "how long a dispute waits for a further owner")
	return cmd
}

func nextPort(listen string) (string, error) {
	host, port, err := net.SplitHostPort(listen)
	n, atoi := strconv.Atoi(port)
	if err != nil || atoi != nil || n < 0 || n > 65534 {
		return "", usagef("--listen %q: want host:port", listen)
	}
	if n > 0 {
		n++
	}
	return net.JoinHostPort(host, strconv.Itoa(n)), nil
}

func newWorker(g *globals) *cobra.Command {
	c := node.Worker{}
	var config, price, memory, disk, cache string
	var cpus float64
	var join []string
	cmd := &cobra.Command{
		Use: "worker", Short: "Run a worker on this machine, or look at the network's workers", Args: cobra.NoArgs,
		Long: `Worker offers this machine to the network: it detects the GPUs, runs jobs in
containers, and is paid for results that pass inspection. It only dials out, so
there is nothing to configure on a router.

Every flag can also be set by the environment (MUSTER_PRICE for --price) or in
the YAML file --config (price: "0.40").`,
		Example: `  muster worker --join scheduler.example:7070 --key "$OWNER_KEY" --price 0.40
  muster worker --config /etc/muster/worker.yaml
  muster worker list`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := fromFile(cmd, config); err != nil {
				return err
			}
			if c.Join = join; len(join) == 0 {
				c.Join = splitList(g.addr)
			}
			if len(c.Join) == 0 {
				return usagef("--join: name the API address of a scheduler (or set MUSTER_JOIN)")
			}
			var err error
			if c.Price, err = api.ParseDollars(price); err != nil {
				return usagef("--price: %w", err)
			}
			for _, size := range []struct {
				flag, text string
				to         *int64
			}{{"memory", memory, &c.MemoryBytes}, {"disk", disk, &c.DiskBytes}, {"cache", cache, &c.CacheBytes}} {
				if size.text == "" {
					continue
				}
				if *size.to, err = jobspec.ParseSize(size.text); err != nil {
					return usagef("--%s %q: %w", size.flag, size.text, err)
				}
			}
			c.MilliCPUs, c.Key, c.Logger, c.Detector = int64(cpus*1000), g.key, g.logger(slog.LevelInfo), nvml.New(nvml.Options{})
			c.Ready = func(id string) { fmt.Fprintf(cmd.OutOrStdout(), "ready worker=%s\n", id) }
			return c.Run(cmd.Context())
		},
	}
	host, err := os.Hostname()
	if err != nil {
		host = "worker"
	}
	f := cmd.Flags()
	f.StringVar(&config, "config", os.Getenv("MUSTER_CONFIG"), "YAML file with the settings below")
	f.StringVar(&c.Dir, "data", "muster-worker", "data directory: identity, caches, running attempts")
	f.StringVar(&c.Name, "name", host, "name for people")
	f.StringSliceVar(&join, "join", nil, "API address of a scheduler; it tells the others'")
	f.StringVar(&price, "price", "0.20", "dollars per hour of one GPU, or of a job without GPUs")
	f.StringVar(&c.Runtime, "runtime", "auto", "auto, docker (must be there) or wasm (no containers)")
	f.StringVar(&c.OCIRuntime, "oci-runtime", "", "the engine's runtime for containers, such as runsc")
	f.StringVar(&c.DockerNetwork, "docker-network", "bridge", "the engine's network for jobs that may use one")
	f.BoolVar(&c.Network, "allow-network", false, "run jobs that want network access; they then reach whatever the engine's network does, your own LAN included, unless --docker-network names another")
	f.Float64Var(&cpus, "cpus", 0, "CPUs for jobs (default: all)")
	f.StringVar(&memory, "memory", "", "memory for jobs, such as 24GB (default: three quarters)")
	f.StringVar(&disk, "disk", "", "disk for running jobs' outputs (default: half of what is free)")
	f.StringVar(&cache, "cache", "50GB", "disk for cached images and inputs")
	f.StringSliceVar(&c.Cheat, "cheat", nil, "cheat, to watch it being caught: "+node.CheatKinds())
	cmd.AddCommand(newWorkerList(g), newWorkerShow(g), newWorkerDrain(g))
	return cmd
}

func newDev(g *globals) *cobra.Command {
	c := node.Dev{}
	cmd := &cobra.Command{
		Use: "dev", Short: "Run a whole network in this process, for a first try", Args: cobra.NoArgs,
		Long: `Dev runs schedulers with real replication over loopback, and workers that
belong to different owners. It leaves client.yaml in --dir, so that the other
commands find it, and play money in the account "admin".

The same directory continues the same network; remove it to start anew.`,
		Example: `  muster dev
  muster dev --workers 5 --cheat fewer-samples
  muster dev --runtime wasm --dir /tmp/net --listen 127.0.0.1:0`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c.Dir, c.Logger, c.Detector = g.dir, g.logger(slog.LevelWarn), nvml.New(nvml.Options{})
			c.Ready = func(addresses []string, _ string) {
				fmt.Fprintf(cmd.OutOrStdout(), "ready addr=%s workers=%d config=%s\n", strings.Join(addresses, ","), c.Workers, filepath.Join(c.Dir, "client.yaml"))
			}
			return c.Run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.IntVar(&c.Schedulers, "schedulers", 3, "how many schedulers, 1 to 9")
	f.IntVar(&c.Workers, "workers", 4, "how many workers, each of another owner")
	f.StringSliceVar(&c.Cheat, "cheat", nil, "the last worker cheats: "+node.CheatKinds())
	f.StringVar(&c.Runtime, "runtime", "auto", "auto, docker (must be there) or wasm (no containers)")
	f.StringVar(&c.Listen, "listen", "127.0.0.1:7070", "API address of the first scheduler; the others follow")
	f.DurationVar(&c.SealAfter, "seal-after", scheduler.DefaultSealAfter, "how long a job stays in memory after it ended")
	return cmd
}
