package state

import "github.com/musternet/muster/api/musterpb"

// Copies of stored values that may be changed field by field. What a field
// refers to is shared and must be replaced, not changed; to lists one may
// append, since nobody looks behind the length that they were given. Most of a
// value never changes, and what its steps cost is what they copy.

func copyJob(j *musterpb.Job) *musterpb.Job {
	return &musterpb.Job{
		Id: j.Id, Account: j.Account, Spec: j.Spec, State: j.State, Reason: j.Reason,
		SubmittedUnixMs: j.SubmittedUnixMs, EndedUnixMs: j.EndedUnixMs, PermutationKey: j.PermutationKey, Sequence: j.Sequence,
		Items: j.Items, Tasks: j.Tasks, NextTask: j.NextTask, Requeued: j.Requeued, TasksVerified: j.TasksVerified,
		ItemsCommitted: j.ItemsCommitted, ItemsVerified: j.ItemsVerified, Attempts: j.Attempts, Checks: j.Checks,
		CheckedItems: j.CheckedItems, Caught: j.Caught, SpentMicroUsd: j.SpentMicroUsd, LiveAttempts: j.LiveAttempts,
		OpenChecks: j.OpenChecks, Settled: j.Settled, SettledTransfer: j.SettledTransfer,
	}
}

func copyTask(t *musterpb.Task) *musterpb.Task {
	return &musterpb.Task{
		Job: t.Job, Number: t.Number, State: t.State, Attempts: t.Attempts, Result: t.Result, Failures: t.Failures,
		AvoidOwners: t.AvoidOwners, LastExitCode: t.LastExitCode, LastExitOwners: t.LastExitOwners, Losses: t.Losses,
	}
}

func copyAttempt(a *musterpb.Attempt) *musterpb.Attempt {
	return &musterpb.Attempt{
		Id: a.Id, Job: a.Job, Task: a.Task, Check: a.Check, Worker: a.Worker, Owner: a.Owner, Class: a.Class,
		Devices: a.Devices, Items: a.Items, State: a.State, PriceMicroUsdPerHour: a.PriceMicroUsdPerHour,
		HoldMicroUsd: a.HoldMicroUsd, Payer: a.Payer, PaidMicroUsd: a.PaidMicroUsd, PlacedUnixMs: a.PlacedUnixMs,
		StartedUnixMs: a.StartedUnixMs, CommittedUnixMs: a.CommittedUnixMs, EndedUnixMs: a.EndedUnixMs, Commit: a.Commit,
		Reason: a.Reason, Blame: a.Blame, ExitCode: a.ExitCode, LogDigest: a.LogDigest, Batch: a.Batch, Hold: a.Hold,
		Stored: a.Stored,
	}
}

func copyCheck(c *musterpb.Check) *musterpb.Check {
	return &musterpb.Check{
		Id: c.Id, Job: c.Job, Target: c.Target, Items: c.Items, Runs: c.Runs, Comparisons: c.Comparisons, Verdict: c.Verdict,
		Reason: c.Reason, OpenedUnixMs: c.OpenedUnixMs, FailedRuns: c.FailedRuns, Relaxed: c.Relaxed, ClosedUnixMs: c.ClosedUnixMs,
	}
}

func copyBatch(b *musterpb.Batch) *musterpb.Batch {
	return &musterpb.Batch{
		Epoch: b.Epoch, Digest: b.Digest, Attempts: b.Attempts, Committee: b.Committee, Reveals: b.Reveals,
		ClosedUnixMs: b.ClosedUnixMs, Seed: b.Seed, FailedClosed: b.FailedClosed, Drawn: b.Drawn,
	}
}

func copyWorker(w *musterpb.Worker) *musterpb.Worker {
	return &musterpb.Worker{
		Id: w.Id, PublicKey: w.PublicKey, Owner: w.Owner, Name: w.Name, Capacity: w.Capacity,
		PriceMicroUsdPerHour: w.PriceMicroUsdPerHour, AllowNetwork: w.AllowNetwork, Draining: w.Draining,
		JoinedUnixMs: w.JoinedUnixMs, Finished: w.Finished, Failed: w.Failed, Caught: w.Caught,
		FailuresInARow: w.FailuresInARow, BackoffUntilUnixMs: w.BackoffUntilUnixMs,
	}
}
