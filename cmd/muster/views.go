package main

import (
	"time"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
	"github.com/musternet/muster/scheduler/state"
)

// The JSON forms of what the commands print. Their names are stable: scripts
// depend on them.

type jobView struct {
	ID             string        `json:"id"`
	Name           string        `json:"name"`
	Account        string        `json:"account"`
	State          string        `json:"state"`
	Reason         string        `json:"reason,omitempty"`
	Items          uint64        `json:"items"`
	ItemsCommitted uint64        `json:"items_committed"`
	ItemsVerified  uint64        `json:"items_verified"`
	Tasks          uint32        `json:"tasks"`
	TasksVerified  uint32        `json:"tasks_verified"`
	Attempts       uint64        `json:"attempts"`
	Checks         uint64        `json:"checks"`
	CheckedItems   uint64        `json:"checked_items"`
	Caught         uint64        `json:"caught"`
	CostMicroUSD   int64         `json:"cost_micro_usd"`
	BudgetMicroUSD int64         `json:"budget_micro_usd"`
	Submitted      time.Time     `json:"submitted"`
	Ended          *time.Time    `json:"ended,omitempty"`
	Settled        bool          `json:"settled"`
	AttemptList    []attemptView `json:"attempt_list,omitempty"`
	CheckList      []checkView   `json:"check_list,omitempty"`
}

type attemptView struct {
	ID           string `json:"id"`
	Kind         string `json:"kind"` // "work" or "check"
	Task         uint32 `json:"task"`
	Worker       string `json:"worker"`
	Owner        string `json:"owner"`
	Class        string `json:"class"`
	State        string `json:"state"`
	Reason       string `json:"reason,omitempty"`
	ExitCode     int32  `json:"exit_code"`
	PaidMicroUSD int64  `json:"paid_micro_usd"`
	Milliseconds int64  `json:"milliseconds"` // from start to commit
}

type checkView struct {
	ID      string   `json:"id"`
	Target  string   `json:"target"`
	Items   int      `json:"items"`
	Runs    []string `json:"runs"`
	Verdict string   `json:"verdict"`
	Reason  string   `json:"reason,omitempty"`
	Relaxed string   `json:"relaxed,omitempty"`
}

func viewJob(r *musterpb.GetJobResponse) jobView {
	j := r.Job
	v := jobView{
		ID: j.Id, Name: j.Spec.GetName(), Account: j.Account, State: state.StateName(j.State), Reason: j.Reason, Items: j.Items,
		ItemsCommitted: j.ItemsCommitted, ItemsVerified: j.ItemsVerified, Tasks: j.Tasks, TasksVerified: j.TasksVerified,
		Attempts: j.Attempts, Checks: j.Checks, CheckedItems: j.CheckedItems, Caught: j.Caught, CostMicroUSD: j.SpentMicroUsd,
		BudgetMicroUSD: j.Spec.GetBudgetMicroUsd(), Submitted: time.UnixMilli(j.SubmittedUnixMs).UTC(), Settled: j.Settled,
	}
	if j.EndedUnixMs > 0 {
		ended := time.UnixMilli(j.EndedUnixMs).UTC()
		v.Ended = &ended
	}
	for _, a := range r.Attempts {
		av := attemptView{
			ID: a.Id, Kind: "work", Task: a.Task, Worker: a.Worker, Owner: a.Owner, Class: a.Class, State: state.StateName(a.State),
			Reason: a.Reason, ExitCode: a.ExitCode, PaidMicroUSD: a.PaidMicroUsd,
		}
		if a.Check != "" {
			av.Kind = "check"
		}
		if a.CommittedUnixMs > 0 {
			av.Milliseconds = max(a.CommittedUnixMs-a.StartedUnixMs, 0)
		}
		v.AttemptList = append(v.AttemptList, av)
	}
	for _, c := range r.Checks {
		v.CheckList = append(v.CheckList, checkView{
			ID: c.Id, Target: c.Target, Items: len(c.Items), Runs: c.Runs, Verdict: verdictName(c.Verdict), Reason: c.Reason, Relaxed: c.Relaxed,
		})
	}
	return v
}

func verdictName(v musterpb.Verdict) string {
	switch v {
	case musterpb.Verdict_VERDICT_SUCCESS:
		return "SUCCESS"
	case musterpb.Verdict_VERDICT_FAILURE:
		return "FAILURE"
	case musterpb.Verdict_VERDICT_INCONCLUSIVE:
		return "INCONCLUSIVE"
	}
	return "AWAITING_DATA"
}

type workerView struct {
	ID                string       `json:"id"`
	Name              string       `json:"name"`
	Owner             string       `json:"owner"`
	State             string       `json:"state"` // "connected", "draining", "offline"
	Runtimes          []string     `json:"runtimes"`
	Platform          string       `json:"platform"`
	GPUs              []deviceView `json:"gpus"`
	NoGPUReason       string       `json:"no_gpu_reason,omitempty"`
	MilliCPUs         int64        `json:"milli_cpus"`
	MemoryBytes       int64        `json:"memory_bytes"`
	DiskBytes         int64        `json:"disk_bytes"`
	PriceMicroPerHour int64        `json:"price_micro_usd_per_hour"`
	Running           []string     `json:"running"`
	Finished          uint64       `json:"finished"`
	Failed            uint64       `json:"failed"`
	Caught            uint64       `json:"caught"`
	EarnedMicroUSD    int64        `json:"owner_earned_micro_usd"`
	Records           []recordView `json:"records,omitempty"`
}

type recordView struct {
	Class       string `json:"class"`
	Application string `json:"application"`
	Passed      uint64 `json:"passed"`
	Offences    uint64 `json:"offences"`
}

type deviceView struct {
	UUID        string `json:"uuid"`
	Name        string `json:"name"`
	MemoryBytes uint64 `json:"memory_bytes"`
	Unhealthy   string `json:"unhealthy,omitempty"`
}

func viewWorker(s *musterpb.WorkerStatus) workerView {
	w, c := s.Worker, s.Worker.Capacity
	v := workerView{
		ID: w.Id, Name: w.Name, Owner: w.Owner, State: "connected", Runtimes: c.GetRuntimes(), Platform: c.GetPlatform(), GPUs: []deviceView{},
		NoGPUReason: c.GetNoGpuReason(), MilliCPUs: c.GetMilliCpus(), MemoryBytes: c.GetMemoryBytes(), DiskBytes: c.GetDiskBytes(),
		PriceMicroPerHour: w.PriceMicroUsdPerHour, Running: append([]string{}, s.Running...), Finished: w.Finished, Failed: w.Failed, Caught: w.Caught,
		EarnedMicroUSD: s.EarnedMicroUsd,
	}
	switch {
	case !s.Connected:
		v.State = "offline"
	case w.Draining:
		v.State = "draining"
	}
	for _, d := range c.GetDevices() {
		v.GPUs = append(v.GPUs, deviceView{UUID: d.Uuid, Name: d.Name, MemoryBytes: d.MemoryBytes, Unhealthy: d.Unhealthy})
	}
	for _, r := range s.Records {
		v.Records = append(v.Records, recordView{Class: r.Class, Application: r.Application, Passed: r.Passed, Offences: r.Offences})
	}
	return v
}

type balanceView struct {
	Account           string `json:"account"`
	BalanceMicroUSD   int64  `json:"balance_micro_usd"`
	InJobsMicroUSD    int64  `json:"in_jobs_micro_usd"`
	PendingMicroUSD   int64  `json:"pending_micro_usd"`
	DepositedMicroUSD int64  `json:"deposited_micro_usd"`
	EarnedMicroUSD    int64  `json:"earned_micro_usd"`
	SpentMicroUSD     int64  `json:"spent_micro_usd"`
}

func viewBalance(b *musterpb.Balance) balanceView {
	return balanceView{
		Account: b.Account, BalanceMicroUSD: b.BalanceMicroUsd, InJobsMicroUSD: b.InJobsMicroUsd, PendingMicroUSD: b.PendingMicroUsd,
		DepositedMicroUSD: b.DepositedMicroUsd, EarnedMicroUSD: b.EarnedMicroUsd, SpentMicroUSD: b.SpentMicroUsd,
	}
}

// entryView is one leg of a transfer: what one account lost or gained. The sum
// over the legs of any set of transfers is zero.
type entryView struct {
	Transfer       uint64    `json:"transfer"`
	Time           time.Time `json:"time"`
	Kind           string    `json:"kind"` // "move", "hold", "post", "void"
	Account        string    `json:"account"`
	AmountMicroUSD int64     `json:"amount_micro_usd"` // signed; 0 for what only reserves or frees
	ReservedMicro  int64     `json:"reserved_micro_usd,omitempty"`
	Ref            string    `json:"ref"`
	Memo           string    `json:"memo"`
}

func viewTransfer(t *musterpb.Transfer) []entryView {
	kind := map[musterpb.TransferKind]string{
		musterpb.TransferKind_TRANSFER_KIND_MOVE: "move", musterpb.TransferKind_TRANSFER_KIND_HOLD: "hold",
		musterpb.TransferKind_TRANSFER_KIND_POST: "post", musterpb.TransferKind_TRANSFER_KIND_VOID: "void",
	}[t.Kind]
	var entries []entryView
	for _, leg := range ledger.Legs(t) {
		e := entryView{
			Transfer: t.Id, Time: time.UnixMilli(t.TimeUnixMs).UTC(), Kind: kind, Account: leg.Account, AmountMicroUSD: int64(leg.Amount), Ref: t.Ref, Memo: t.Memo,
		}
		if leg.Amount == 0 {
			e.ReservedMicro = t.AmountMicroUsd
		}
		entries = append(entries, e)
	}
	return entries
}

func money(micro int64) string { return api.MicroUSD(micro).String() }
