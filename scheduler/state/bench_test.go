package state

import (
	"fmt"
	"io"
	"testing"

	"github.com/musternet/muster/api/musterpb"
)

// BenchmarkLife applies the commands of one task's whole life: placed, started,
// committed, drawn, checked by another owner, compared, paid. Batches hold 100
// results, as they do under load.
func BenchmarkLife(b *testing.B) {
	const perBatch = 100
	w := newWorld(b)
	s := w.State
	for _, line := range [][]string{
		{"account", "acme"}, {"account", "bob"}, {"account", "carol"}, {"deposit", "acme", "900000000"},
		{"worker", "w1", "owner=bob"}, {"worker", "w2", "owner=carol"}, {"node", "n1"}, {"submit", "j1", "items=10000000", "budget=900000000"},
	} {
		w.must(line...)
	}
	key := make([][]byte, 0)
	commands := 0
	apply := func(cmd *musterpb.Command) {
		commands++
		cmd.TimeUnixMs = int64(commands)
		if err := ErrorOf(s.Apply(cmd)); err != nil {
			b.Fatal(err)
		}
	}
	reveal := func() {
		if len(key) < 2 {
			key = chainOf("n1", commands)
			apply(registerTip(w.id("n1"), key[0]))
		}
	}
	task := 0
	for b.Loop() {
		ids := make([]string, perBatch)
		for i := range ids {
			ids[i] = fmt.Sprintf("%016x", task)
			apply(w.place(ids[i], parseArgs([]string{"job=j1", fmt.Sprintf("task=%d", task), "worker=w1"})))
			apply(&musterpb.Command{Body: &musterpb.Command_StartAttempt{StartAttempt: &musterpb.StartAttempt{Attempt: ids[i]}}})
			apply(commit(ids[i], ids[i]))
			task++
		}
		reveal()
		apply(w.closeCommand(parseArgs(nil)))
		key = key[1:]
		apply(&musterpb.Command{Body: &musterpb.Command_Reveal{Reveal: &musterpb.RevealValue{Reveal: &musterpb.Reveal{Node: w.id("n1"), Epoch: s.Epoch(), Value: key[0]}}}})
		for _, id := range ids {
			if s.Check(checkID(id)) == nil {
				continue // a proven owner is sampled
			}
			run := "r" + id
			apply(w.place(run, parseArgs([]string{"check=" + checkID(id), "worker=w2"})))
			apply(&musterpb.Command{Body: &musterpb.Command_StartAttempt{StartAttempt: &musterpb.StartAttempt{Attempt: run}}})
			apply(commit(run, run))
			apply(&musterpb.Command{Body: &musterpb.Command_RecordComparisons{RecordComparisons: &musterpb.RecordComparisons{
				Check: checkID(id), Comparisons: []*musterpb.Comparison{comparison(id, run, true)},
			}}})
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(task), "µs/task")
}

// manyAttempts is a state with n attempts, placed and lost.
func manyAttempts(b *testing.B, n int) *State {
	w := newWorld(b)
	for _, line := range [][]string{
		{"account", "acme"}, {"account", "bob"}, {"deposit", "acme", "900000000"}, {"worker", "w1", "owner=bob"},
		{"submit", "j1", "items=10000000", "budget=900000000"},
	} {
		w.must(line...)
	}
	for i := range n {
		if err := ErrorOf(w.State.Apply(w.place(fmt.Sprintf("%016x", i), parseArgs([]string{"job=j1", fmt.Sprintf("task=%d", i), "worker=w1"})))); err != nil {
			b.Fatal(err)
		}
	}
	return w.State
}

// BenchmarkSnapshot is how long Apply waits for a snapshot of 100,000 attempts.
func BenchmarkSnapshot(b *testing.B) {
	s := manyAttempts(b, 100_000)
	for b.Loop() {
		s.Snapshot()
	}
}

// BenchmarkWriteSnapshot is the writing of it, beside Apply.
func BenchmarkWriteSnapshot(b *testing.B) {
	snapshot := manyAttempts(b, 100_000).Snapshot()
	b.ReportMetric(float64(snapshot.attempts.Len()), "attempts")
	for b.Loop() {
		if err := snapshot.Write(io.Discard); err != nil {
			b.Fatal(err)
		}
	}
}
