package place

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// Explain says how many workers fail which constraint of a job's next task,
// or of a check when run is given. It takes nothing from the workers.
func Explain(nowUnixMS int64, workers []*Worker, job *musterpb.Job, run *state.WantedRun) *musterpb.ExplainJobResponse {
	out := &musterpb.ExplainJobResponse{Workers: uint32(len(workers))}
	if run != nil && run.Unpaid != "" {
		out.Summary = run.Unpaid
		return out
	}
	type count struct {
		*reason
		workers uint32
	}
	counts := map[string]*count{} // the words for many tell reasons apart
	for _, w := range workers {
		r := reject(nowUnixMS, job, run, w)
		if r == nil {
			out.Eligible++
			continue
		}
		c := counts[r.many]
		if c == nil {
			c = &count{reason: r}
			counts[r.many] = c
		}
		c.workers++
	}
	for _, c := range counts {
		out.Reasons = append(out.Reasons, &musterpb.ExplainReason{Workers: c.workers, Text: c.words(c.workers)})
	}
	slices.SortFunc(out.Reasons, func(a, b *musterpb.ExplainReason) int {
		return cmp.Or(cmp.Compare(b.Workers, a.Workers), cmp.Compare(a.Text, b.Text))
	})
	out.Summary = summary(out)
	return out
}

// Possible reports whether any worker could take a run of a check, now or once
// what it is busy with is over.
func Possible(workers []*Worker, job *musterpb.Job, run *state.WantedRun) bool {
	return run.Unpaid == "" && slices.ContainsFunc(workers, func(w *Worker) bool {
		return rejectJob(job, w) == nil && rejectChecker(job.Spec, run, w) == nil
	})
}

func summary(e *musterpb.ExplainJobResponse) string {
	if e.Workers == 0 {
		return "no worker has joined this network"
	}
	var parts []string
	if e.Eligible > 0 {
		parts = append(parts, fmt.Sprintf("%d can take it now", e.Eligible))
	}
	for _, r := range e.Reasons {
		parts = append(parts, fmt.Sprintf("%d %s", r.Workers, r.Text))
	}
	noun := "workers"
	if e.Workers == 1 {
		noun = "worker"
	}
	return fmt.Sprintf("%d %s: %s", e.Workers, noun, strings.Join(parts, ", "))
}
