package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/gpu"
	"github.com/musternet/muster/gpu/nvml"
)

func listWorkers(ctx context.Context, c *client.Client, worker string) ([]workerView, error) {
	resp, err := c.ListWorkers(ctx, connect.NewRequest(&musterpb.ListWorkersRequest{Worker: worker}))
	if err != nil {
		return nil, err
	}
	views := []workerView{}
	for _, s := range resp.Msg.Workers {
		views = append(views, viewWorker(s))
	}
	return views, nil
}

func newWorkerList(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the workers of the network: what they offer, at what price", Example: "  muster worker list", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			views, err := listWorkers(cmd.Context(), c, "")
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), views, func(w *tabwriter.Writer) {
				row(w, "WORKER", "NAME", "OWNER", "STATE", "GPUS", "CPUS", "RUNTIMES", "PRICE/H", "RUNNING", "GOOD", "FAILED", "CAUGHT")
				for _, v := range views {
					row(w, v.ID, v.Name, v.Owner, v.State, gpuSummary(v), float64(v.MilliCPUs)/1000, strings.Join(v.Runtimes, ","), money(v.PriceMicroPerHour),
						len(v.Running), v.Finished, v.Failed, v.Caught)
				}
			})
		},
	}
}

func gpuSummary(v workerView) string {
	if len(v.GPUs) == 0 {
		return "-"
	}
	return fmt.Sprintf("%d× %s", len(v.GPUs), v.GPUs[0].Name)
}

func newWorkerShow(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "show WORKER", Short: "Show one worker with its record", Example: "  muster worker show wrk-0123456789abcdef\n  muster worker show worker-1", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			views, err := listWorkers(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), views, func(w *tabwriter.Writer) {
				for _, v := range views {
					printWorker(w, v)
				}
			})
		},
	}
}

func printWorker(w *tabwriter.Writer, v workerView) {
	row(w, "worker", v.ID+"  "+v.Name)
	row(w, "owner", v.Owner)
	row(w, "state", v.State)
	row(w, "asks", money(v.PriceMicroPerHour)+" per hour")
	row(w, "runs", strings.Join(v.Runtimes, ", ")+" on "+v.Platform)
	row(w, "offers", fmt.Sprintf("%.1f CPUs, %.1f GiB memory, %.1f GiB disk", float64(v.MilliCPUs)/1000, float64(v.MemoryBytes)/(1<<30), float64(v.DiskBytes)/(1<<30)))
	for _, d := range v.GPUs {
		row(w, "gpu", strings.TrimSpace(fmt.Sprintf("%s, %.0f GiB, %s %s", d.Name, float64(d.MemoryBytes)/(1<<30), d.UUID, d.Unhealthy)))
	}
	if v.NoGPUReason != "" {
		row(w, "no gpu", v.NoGPUReason)
	}
	row(w, "attempts", fmt.Sprintf("%d good, %d failed, %d caught, %d running", v.Finished, v.Failed, v.Caught, len(v.Running)))
	row(w, "owner earned", money(v.EarnedMicroUSD))
	for _, r := range v.Records {
		row(w, "record", fmt.Sprintf("%s on %s: %d checks passed, %d offences", r.Application, r.Class, r.Passed, r.Offences))
	}
}

func newWorkerDrain(g *globals) *cobra.Command {
	var resume bool
	cmd := &cobra.Command{
		Use: "drain WORKER", Short: "Give a worker no new work; what runs goes on", Example: "  muster worker drain worker-1\n  muster worker drain worker-1 --resume", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			views, err := listWorkers(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			if len(views) > 1 {
				return usagef("%d workers are named %q; use the ID of one", len(views), args[0])
			}
			if _, err := c.DrainWorker(cmd.Context(), connect.NewRequest(&musterpb.DrainWorkerRequest{Worker: views[0].ID, Resume: resume})); err != nil {
				return err
			}
			what := map[bool]string{false: "draining", true: "working"}[resume]
			return g.print(cmd.OutOrStdout(), map[string]string{"id": views[0].ID, "state": what}, func(w *tabwriter.Writer) { row(w, views[0].ID+" "+what) })
		},
	}
	cmd.Flags().BoolVar(&resume, "resume", false, "give it work again")
	return cmd
}

func newAccount(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "account", Short: "Balances, deposits, and every cent that moved"}
	cmd.AddCommand(newAccountShow(g), newAccountDeposit(g), newAccountTransfers(g), newAccountCreate(g))
	return cmd
}

func newAccountShow(g *globals) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use: "show [ACCOUNT]", Short: "Show a balance: what is there, held, earned and spent", Args: cobra.MaximumNArgs(1),
		Example: "  muster account show\n  muster account show owner-1\n  muster account show --all",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			account := strings.Join(args, "")
			if all {
				account = "*"
			}
			resp, err := c.GetAccount(cmd.Context(), connect.NewRequest(&musterpb.GetAccountRequest{Account: account}))
			if err != nil {
				return err
			}
			views := []balanceView{}
			for _, b := range resp.Msg.Balances {
				views = append(views, viewBalance(b))
			}
			return g.print(cmd.OutOrStdout(), views, func(w *tabwriter.Writer) {
				row(w, "ACCOUNT", "BALANCE", "IN JOBS", "PENDING", "DEPOSITED", "EARNED", "SPENT")
				for _, v := range views {
					row(w, v.Account, money(v.BalanceMicroUSD), money(v.InJobsMicroUSD), money(v.PendingMicroUSD), money(v.DepositedMicroUSD), money(v.EarnedMicroUSD), money(v.SpentMicroUSD))
				}
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every account, with the network's and the outside world's (admins only)")
	return cmd
}

func newAccountDeposit(g *globals) *cobra.Command {
	var memo string
	cmd := &cobra.Command{
		Use: "deposit ACCOUNT AMOUNT", Short: "Enter money that was received outside (admins only)", Example: "  muster account deposit acme 100.00 --memo 'invoice 17'", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			amount, err := api.ParseDollars(args[1])
			if err != nil {
				return &usageError{err}
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			resp, err := c.Deposit(cmd.Context(), connect.NewRequest(&musterpb.DepositRequest{Id: client.NewID(), Account: args[0], AmountMicroUsd: int64(amount), Memo: memo}))
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), map[string]any{"account": args[0], "balance_micro_usd": resp.Msg.BalanceMicroUsd}, func(w *tabwriter.Writer) {
				row(w, args[0]+" now has "+money(resp.Msg.BalanceMicroUsd))
			})
		},
	}
	cmd.Flags().StringVar(&memo, "memo", "deposit", "what the money is for")
	return cmd
}

func newAccountTransfers(g *globals) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use: "transfers [ACCOUNT]", Short: "List every transfer, with what it was for", Args: cobra.MaximumNArgs(1),
		Long: `Transfers lists both sides of every transfer: the account that lost and the one
that gained. Holds and voids move nothing: they reserve money and free it.
The amounts of any set of transfers add up to zero.`,
		Example: "  muster account transfers\n  muster account transfers owner-1\n  muster account transfers --all --output json | jq '[.[].amount_micro_usd] | add'",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			entries := []entryView{}
			request := &musterpb.ListTransfersRequest{Account: strings.Join(args, ""), All: all}
			for more := true; more; {
				resp, err := c.ListTransfers(cmd.Context(), connect.NewRequest(request))
				if err != nil {
					return err
				}
				for _, t := range resp.Msg.Transfers {
					entries = append(entries, viewTransfer(t)...)
					request.After = t.Id
				}
				more = resp.Msg.More
			}
			return g.print(cmd.OutOrStdout(), entries, func(w *tabwriter.Writer) {
				row(w, "TRANSFER", "TIME", "KIND", "ACCOUNT", "AMOUNT", "RESERVED", "FOR", "MEMO")
				for _, e := range entries {
					reserved := ""
					if e.ReservedMicro != 0 {
						reserved = money(e.ReservedMicro)
					}
					row(w, e.Transfer, e.Time.Format(time.DateTime), e.Kind, e.Account, money(e.AmountMicroUSD), reserved, e.Ref, e.Memo)
				}
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "of every account (admins only)")
	return cmd
}

func newAccountCreate(g *globals) *cobra.Command {
	var role string
	cmd := &cobra.Command{
		Use: "create ACCOUNT", Short: "Make an account, or one more key for it (admins only)", Args: cobra.ExactArgs(1),
		Long:    "Create prints an API key. It is shown once: only its hash is kept.",
		Example: "  muster account create acme\n  muster account create acme --role reader",
		RunE: func(cmd *cobra.Command, args []string) error {
			roles := map[string]musterpb.Role{
				"customer": musterpb.Role_ROLE_CUSTOMER, "reader": musterpb.Role_ROLE_READER, "admin": musterpb.Role_ROLE_ADMIN,
			}
			r, ok := roles[role]
			if !ok {
				return usagef("--role %q: want customer (submits jobs, runs workers), reader or admin", role)
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			resp, err := c.CreateAccount(cmd.Context(), connect.NewRequest(&musterpb.CreateAccountRequest{Account: args[0], Role: r}))
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), map[string]string{"account": args[0], "key": resp.Msg.Key}, func(w *tabwriter.Writer) { row(w, resp.Msg.Key) })
		},
	}
	cmd.Flags().StringVar(&role, "role", "customer", "customer, reader or admin")
	return cmd
}

func newCluster(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "cluster", Short: "The schedulers"}
	cmd.AddCommand(&cobra.Command{
		Use: "status", Short: "Show the schedulers, who leads, and whether the books balance", Example: "  muster cluster status\n  muster cluster status --output json", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			resp, err := c.ClusterStatus(cmd.Context(), connect.NewRequest(&musterpb.ClusterStatusRequest{}))
			if err != nil {
				return err
			}
			v := viewCluster(resp.Msg)
			return g.print(cmd.OutOrStdout(), v, func(w *tabwriter.Writer) { printCluster(w, v) })
		},
	})
	return cmd
}

type clusterView struct {
	Cluster          string     `json:"cluster"`
	Leader           string     `json:"leader"`
	Term             uint64     `json:"term"`
	AppliedIndex     uint64     `json:"applied_index"`
	Nodes            []nodeView `json:"nodes"`
	WorkersConnected uint32     `json:"workers_connected"`
	JobsLive         uint32     `json:"jobs_live"`
	AttemptsLive     uint32     `json:"attempts_live"`
	Epoch            uint64     `json:"epoch"`
	Randomness       string     `json:"randomness"`
	LedgerSum        int64      `json:"ledger_sum_micro_usd"`
	StateHash        string     `json:"state_hash"`
	Segments         uint32     `json:"segments"` // of sealed work
	SealedBytes      int64      `json:"sealed_bytes"`
	SealedJobs       uint64     `json:"sealed_jobs"`
}

type nodeView struct {
	ID          string `json:"id"`
	API         string `json:"api"`
	Raft        string `json:"raft"`
	Leader      bool   `json:"leader"`
	InCommittee bool   `json:"in_committee"`
	Note        string `json:"note,omitempty"`
}

func viewCluster(m *musterpb.ClusterStatusResponse) clusterView {
	v := clusterView{
		Cluster: m.Cluster, Leader: m.Leader, Term: m.Term, AppliedIndex: m.AppliedIndex, Nodes: []nodeView{}, WorkersConnected: m.WorkersConnected,
		JobsLive: m.JobsLive, AttemptsLive: m.AttemptsLive, Epoch: m.Epoch, Randomness: m.Randomness, LedgerSum: m.LedgerSumMicroUsd,
		StateHash: hex.EncodeToString(m.StateHash), Segments: m.Segments, SealedBytes: m.SealedBytes, SealedJobs: m.SealedJobs,
	}
	for _, n := range m.Nodes {
		v.Nodes = append(v.Nodes, nodeView{ID: n.Id, API: n.ApiAddress, Raft: n.RaftAddress, Leader: n.Leader, InCommittee: n.InCommittee, Note: n.Note})
	}
	return v
}

func printCluster(w *tabwriter.Writer, v clusterView) {
	row(w, "cluster", v.Cluster)
	row(w, "live", fmt.Sprintf("%d workers, %d jobs, %d attempts", v.WorkersConnected, v.JobsLive, v.AttemptsLive))
	row(w, "sealed", fmt.Sprintf("%d jobs in %d segments, %.1f MiB", v.SealedJobs, v.Segments, float64(v.SealedBytes)/(1<<20)))
	row(w, "samples", v.Randomness+fmt.Sprintf(" (epoch %d)", v.Epoch))
	row(w, "ledger sum", money(v.LedgerSum))
	row(w, "log", fmt.Sprintf("term %d, applied %d", v.Term, v.AppliedIndex))
	row(w)
	row(w, "SCHEDULER", "API", "RAFT", "ROLE", "COMMITTEE", "NOTE")
	for _, n := range v.Nodes {
		role := "follower"
		if n.Leader {
			role = "leader"
		}
		row(w, n.ID, n.API, n.Raft, role, map[bool]string{true: "in", false: "out"}[n.InCommittee], n.Note)
	}
}

func newGPU(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "gpu", Short: "This machine's GPUs"}
	cmd.AddCommand(&cobra.Command{
		Use: "list", Short: "List this machine's GPUs as muster sees them, or say why there are none", Args: cobra.NoArgs,
		Long:    "List asks the NVIDIA driver through NVML. MUSTER_NVML_LIBRARY names another library file.",
		Example: "  muster gpu list\n  muster gpu list --output json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			inv := nvml.New(nvml.Options{}).Detect(cmd.Context())
			if inv.Devices == nil {
				inv.Devices = []gpu.Device{}
			}
			return g.print(cmd.OutOrStdout(), inv, func(w *tabwriter.Writer) {
				if len(inv.Devices) == 0 {
					row(w, "no GPU: "+inv.Reason)
					return
				}
				row(w, "INDEX", "NAME", "MEMORY", "CAPABILITY", "DRIVER", "MIG", "TEMP", "POWER", "USE", "UUID")
				for _, d := range inv.Devices {
					row(w, d.Index, d.Name, fmt.Sprintf("%.0f GiB", float64(d.MemoryBytes)/(1<<30)), d.ComputeCapability, d.Driver, d.MIG,
						optional(d.TemperatureC, "%d °C", 1), optional(d.PowerMilliwatts, "%d W", 1000), optional(d.UtilizationPercent, "%d%%", 1), d.UUID)
				}
			})
		},
	})
	return cmd
}

func optional(v *uint32, format string, unit uint32) string {
	if v == nil {
		return "-"
	}
	return fmt.Sprintf(format, *v/unit)
}
