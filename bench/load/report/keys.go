// Package report holds what was measured: every key with its unit and meaning,
// the targets, and how they are shown.
package report

import (
	"fmt"
	"slices"
	"strings"
)

// Key is one figure of results.json.
type Key struct {
	Name    string
	Unit    string
	Meaning string
	// Target is what is to be reached: at least, or where AtMost is set, at most.
	// 0 is no target.
	Target, Aim float64
	AtMost      bool
	// Samples is the key that says of how many samples this one is; empty where
	// there are many.
	Samples string
}

// Keys are all figures, those with targets first.
var Keys = append([]Key{
	{Name: "lifecycle_tasks_per_s", Unit: "tasks/s", Target: 10_000, Aim: 20_000, Meaning: "whole lives of tasks: submitted in jobs of 1,000 items, placed, run at once, committed, drawn at 3%, settled"},
	{Name: "lifecycle_share_of_raw_raft", Unit: "ratio", Target: 0.2, Aim: 0.4, Meaning: "lifecycle_commands_per_s over raw_raft_commands_per_s"},
	{Name: "single_jobs_placed_per_s", Unit: "jobs/s", Target: 4_000, Aim: 9_000, Meaning: "jobs of one item, submitted by 256 clients that each wait until their job is at a worker"},
	{Name: "transfers_share_of_raw_raft", Unit: "ratio", Target: 0.1, Aim: 0.3, Meaning: "transfers_per_s over what raw Raft carries in commands of the same bytes"},
	{Name: "failover_ms_p50", Unit: "ms", Target: 1_000, AtMost: true, Samples: "failover_kills", Meaning: "leader killed with -9 until a worker has the first attempt that the next leader placed"},
	{Name: "failover_ms_max", Unit: "ms", Target: 3_000, AtMost: true, Samples: "failover_kills", Meaning: "the same, the slowest"},
	{Name: "spread_over_pack", Unit: "ratio", Target: 2, AtMost: true, Meaning: "cost of a placement with spread and affinity over plain packing, 5,000 workers (bench/sim)"},
	{Name: "start_overhead_ms_p50", Unit: "ms", Target: 20, AtMost: true, Samples: "docker_starts", Meaning: "submit until the container is started, over plain create and start through Docker's API in the same run; median less median"},
	{Name: "start_overhead_ms_p99", Unit: "ms", Target: 60, AtMost: true, Samples: "docker_starts", Meaning: "the same, 99th percentile less 99th percentile"},
	{Name: "start_instant_ms_p50", Unit: "ms", Target: 5, AtMost: true, Samples: "start_instant_starts", Meaning: "submit until a simulated worker starts, on an idle network"},
	{Name: "start_instant_ms_p99", Unit: "ms", Target: 20, AtMost: true, Samples: "start_instant_starts", Meaning: "the same, 99th percentile"},
	{Name: "cost_growth_1m", Unit: "ratio", Target: 1.2, AtMost: true, Meaning: "schedulers' CPU per task of jobs of 1,000 items while 1,000,000 items wait in a job that no worker can run, over that while 10,000 do"},
	{Name: "heap_bytes_per_queued_item", Unit: "B", Target: 16, AtMost: true, Meaning: "leader's heap per item of a job of 1,000,000 that was never placed"},
	{Name: "heap_bytes_per_live_attempt", Unit: "B", Target: 1_500, AtMost: true, Meaning: "leader's heap per running attempt, with its task, hold and lease"},
	{Name: "heap_bytes_per_idle_worker", Unit: "B", Target: 100_000, AtMost: true, Meaning: "leader's heap per connected worker without work"},
	{Name: "heap_growth_finished", Unit: "ratio", Target: 1.1, AtMost: true, Meaning: "leader's heap after 1,000,000 finished tasks, or at least 500,000 where time ends before that (heap_growth_finished_tasks), over that after 10,000; everything is sealed, which the schedulers of this measurement do after 1 s"},
	{Name: "snapshot_pause_ms", Unit: "ms", Target: 25, AtMost: true, Meaning: "by how much a snapshot of 1,000,000 live objects (500,000 tasks and their attempts) holds Apply up, the worst of 5: taking it, and what the slowest of 10 entries of 400 commands on random tasks after it takes more than the median entry before it"},
	{Name: "restart_s", Unit: "s", Target: 10, AtMost: true, Meaning: "start of a scheduler with 1,000,000 live tasks on its disk until it answers a linearizable read"},
	{Name: "place_growth_10k", Unit: "ratio", Target: 2, AtMost: true, Meaning: "cost of a placement decision with 10,000 workers over that with 100 (bench/sim)"},
	{Name: "blob_share_of_copy", Unit: "ratio", Target: 0.8, Meaning: "rate of 1 GiB from the submitter through one scheduler to a worker's disk over a plain HTTP copy that makes the same two hops, each with SHA-256 and fsync"},

	{Name: "lifecycle_commands_per_s", Unit: "commands/s", Meaning: "commands in the log while lifecycle_tasks_per_s was measured"},
	{Name: "lifecycle_commands_per_entry", Unit: "commands", Meaning: "grouping: commands in a log entry"},
	{Name: "lifecycle_command_bytes", Unit: "B", Meaning: "mean size of a command in the log"},
	{Name: "lifecycle_log_bytes_per_task", Unit: "B", Meaning: "log written per settled task"},
	{Name: "lifecycle_cpu_us_per_task", Unit: "µs", Meaning: "CPU per settled task of all processes together"},
	{Name: "lifecycle_cpu_us_per_task_leader", Unit: "µs", Meaning: "of the leader"},
	{Name: "lifecycle_cpu_us_per_task_followers", Unit: "µs", Meaning: "of the other schedulers together"},
	{Name: "lifecycle_cpu_us_per_task_generator", Unit: "µs", Meaning: "of the load generator with its simulated workers"},
	{Name: "lifecycle_heap_bytes_leader", Unit: "B", Meaning: "leader's heap at the end of the measurement, garbage included"},
	{Name: "lifecycle_rss_bytes_leader", Unit: "B", Meaning: "leader's resident memory at the end of the measurement"},
	{Name: "lifecycle_rss_bytes_follower", Unit: "B", Meaning: "the largest follower's"},
	{Name: "lifecycle_checks_per_task", Unit: "ratio", Meaning: "check runs per task, warm-up left out"},
	{Name: "generator_heap_bytes_per_worker", Unit: "B", Meaning: "load generator's heap per simulated worker"},
	{Name: "raw_raft_commands_per_s", Unit: "commands/s", Meaning: "the limit: raw Raft, commands of lifecycle_command_bytes, grouped, 256 clients"},
	{Name: "raw_raft_commands_per_entry", Unit: "commands", Meaning: "grouping there"},
	{Name: "single_jobs_ms_p50", Unit: "ms", Meaning: "submit until the job is at a worker, under that load"},
	{Name: "single_jobs_ms_p99", Unit: "ms", Meaning: "the same, 99th percentile"},
	{Name: "single_jobs_share_of_raw_raft", Unit: "ratio", Meaning: "three commands a job (submitted, placed, started) of single_jobs_placed_per_s over raw_raft_commands_per_s"},
	{Name: "transfers_per_s", Unit: "transfers/s", Meaning: "deposits through DepositMany, 8,000 in a command, 16 clients"},
	{Name: "raw_raft_transfers_per_s", Unit: "transfers/s", Meaning: "the limit: raw Raft, commands of the same bytes, 16 clients"},
	{Name: "failover_kills", Unit: "kills", Meaning: "how many leaders were killed"},
	{Name: "start_instant_starts", Unit: "starts", Meaning: "how many starts start_instant_ms is of"},
	{Name: "docker_starts", Unit: "starts", Meaning: "how many starts start_overhead_ms is of, and as many plain ones"},
	{Name: "docker_start_ms_p50", Unit: "ms", Meaning: "submit until the container is started"},
	{Name: "docker_start_ms_p99", Unit: "ms", Meaning: "the same, 99th percentile"},
	{Name: "docker_plain_ms_p50", Unit: "ms", Meaning: "plain create and start through the API"},
	{Name: "docker_plain_ms_p99", Unit: "ms", Meaning: "the same, 99th percentile"},
	{Name: "cost_us_per_task_10k", Unit: "µs", Meaning: "schedulers' CPU per task while 10,000 items wait that no worker can run"},
	{Name: "cost_us_per_task_1m", Unit: "µs", Meaning: "the same while 1,000,000 do"},
	{Name: "heap_growth_finished_tasks", Unit: "tasks", Meaning: "tasks that had finished when heap_growth_finished was taken; below 500,000 that has no value"},
	{Name: "heap_bytes_finished_10k", Unit: "B", Meaning: "leader's heap after 10,000 finished tasks"},
	{Name: "heap_bytes_finished_1m", Unit: "B", Meaning: "leader's heap after heap_growth_finished_tasks of them"},
	{Name: "snapshot_pause_ms_1m_tasks", Unit: "ms", Meaning: "snapshot_pause_ms with 1,000,000 live tasks and as many attempts"},
	{Name: "blob_mib_per_s", Unit: "MiB/s", Meaning: "1 GiB from the submitter through a scheduler to a worker's disk"},
	{Name: "blob_copy_mib_per_s", Unit: "MiB/s", Meaning: "the plain copy that it is compared with"},
}, slices.Concat(stageKeys(), simKeys())...)

// SimSizes are the numbers of workers with which bench/sim measures decisions.
var SimSizes = []int{100, 1000, 10_000, 50_000}

// simWaits are the kinds of jobs whose waiting bench/sim watches: GPUs of an
// attempt, and what they must be.
var simWaits = []string{"gpu1", "gpu1-24gb", "gpu1-4090", "gpu1-80gb", "gpu2", "gpu4", "gpu8"}

func simKeys() []Key {
	list := []Key{
		{Name: "sim_decisions_per_s", Unit: "decisions/s", Meaning: "bench/sim: placements per second, decided and applied, of the largest network"},
		{Name: "sim_queued_items", Unit: "items", Meaning: "bench/sim: items that wait meanwhile"},
		{Name: "sim_pack_ns", Unit: "ns", Meaning: "bench/sim: cost of a decision that packs, 5,000 workers"},
		{Name: "sim_spread_ns", Unit: "ns", Meaning: "bench/sim: the same with spread and affinity"},
		{Name: "sim_checked_ns", Unit: "ns", Meaning: "bench/sim: the same where every result is checked, so that every second decision draws a checker"},
		{Name: "sim_jain", Unit: "ratio", Meaning: "bench/sim: fairness between accounts that want the same (Jain index; 1 is even)"},
		{Name: "sim_gpu_used_share", Unit: "ratio", Meaning: "bench/sim: share of the GPUs' time that is used while work waits"},
		{Name: "sim_makespan_over_bound", Unit: "ratio", Meaning: "bench/sim: time until a fixed amount of work is done over a lower bound of it"},
	}
	for _, n := range SimSizes {
		list = append(list, Key{Name: fmt.Sprintf("sim_decision_ns_%d", n), Unit: "ns", Meaning: fmt.Sprintf("bench/sim: cost of a decision with %d workers", n)})
	}
	for _, kind := range simWaits {
		list = append(list, Key{Name: "sim_longest_wait_s_" + kind, Unit: "s", Meaning: "bench/sim: longest time in which no attempt of that kind was placed while some waited, in virtual time"})
	}
	return list
}

// Stages are the stages of a task's life, in order.
var Stages = []string{"submit", "place", "start", "commit", "draw", "verdict", "post"}

// stageMeanings say where a stage begins and ends, and what its rate counts.
var stageMeanings = map[string][2]string{
	"submit":  {"items submitted", "the call that submits a job of 1,000 items"},
	"place":   {"attempts placed", "a job's submission until its first attempt is at a worker"},
	"start":   {"starts in the log", "placement until the start that the leader heard of, by its clock (ms)"},
	"commit":  {"results in the log", "assignment at the worker until the answer to its result"},
	"draw":    {"results drawn", "a result's commit until its batch was drawn, by checks opened (ms clock)"},
	"verdict": {"checks decided", "a check's opening until its verdict (ms clock)"},
	"post":    {"attempts paid", "a result's commit until its payment (ms clock)"},
}

func stageKeys() []Key {
	var list []Key
	for _, stage := range Stages {
		m := stageMeanings[stage]
		list = append(list,
			Key{Name: "stage_" + stage + "_per_s", Unit: "1/s", Meaning: m[0]},
			Key{Name: "stage_" + stage + "_ms_p50", Unit: "ms", Meaning: m[1]},
			Key{Name: "stage_" + stage + "_ms_p99", Unit: "ms", Meaning: "the same, 99th percentile"},
			Key{Name: "stage_" + stage + "_ms_max", Unit: "ms", Meaning: "the same, the slowest"})
		if stage != "post" { // no command carries payments
			list = append(list, Key{Name: "stage_" + stage + "_log_bytes", Unit: "B", Meaning: "log that this stage's commands take per settled task"})
		}
	}
	return list
}

// KeyTable is the table of all keys, as Markdown.
func KeyTable() string {
	var b strings.Builder
	b.WriteString("| key | unit | target | meaning |\n|---|---|---|---|\n")
	for _, k := range Keys {
		target := ""
		if k.Target > 0 {
			target = k.sign() + " " + number(k.Target)
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", k.Name, k.Unit, target, k.Meaning)
	}
	return b.String()
}
