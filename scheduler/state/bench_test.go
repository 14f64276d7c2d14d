package state

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/musternet/muster/api/musterpb"
)

// lives is a state with a customer's job of many tasks, and owners' workers, for
// benchmarks: commands are built beforehand, and applied in entries.
type lives struct {
	*State
	t      testing.TB
	now    int64
	node   string
	chain  [][]byte
	worker []string // of different owners
	task   int
}

func newLives(t testing.TB, items int) *lives {
	w := newWorld(t)
	l := &lives{State: New(), t: t}
	for _, line := range [][]string{
		{"account", "acme"}, {"account", "bob"}, {"account", "carol"}, {"deposit", "acme", "900000000"},
		{"worker", "w1", "owner=bob"}, {"worker", "w2", "owner=carol"}, {"node", "n1"},
		{"submit", "j1", fmt.Sprintf("items=%d", items), "budget=900000000"},
	} {
		l.apply(w.build(line[0], parseArgs(line[1:])))
	}
	l.node, l.worker = w.id("n1"), []string{w.id("w1"), w.id("w2")}
	return l
}

// apply applies commands in one entry; all are taken.
func (l *lives) apply(cmds ...*musterpb.Command) {
	l.t.Helper()
	l.now++
	for _, cmd := range cmds {
		cmd.TimeUnixMs = l.now
	}
	for i, answer := range l.ApplyAll(cmds) {
		if err := ErrorOf(answer); err != nil {
			l.t.Fatalf("%v: %v", cmds[i], err)
		}
	}
}

func placement(attempt, job string, task int, check, worker string) *musterpb.Command {
	return &musterpb.Command{Body: &musterpb.Command_PlaceAttempt{PlaceAttempt: &musterpb.PlaceAttempt{
		Attempt: attempt, Job: job, Task: uint32(task), Check: check, Worker: worker, Class: "cpu/linux/amd64",
	}}}
}

func start(attempt string) *musterpb.Command {
	return &musterpb.Command{Body: &musterpb.Command_StartAttempt{StartAttempt: &musterpb.StartAttempt{Attempt: attempt}}}
}

// result is a commit with all that a real one has.
func result(attempt string) *musterpb.Command {
	cmd := commit(attempt, attempt)
	c := cmd.GetCommitResult().Commit
	c.ManifestDigest, c.ArchiveDigest, c.LogDigest = fmt.Sprintf("sha256:%064x", 1), fmt.Sprintf("sha256:%064x", 2), fmt.Sprintf("sha256:%064x", 3)
	c.ArchiveBytes, c.OutputBytes, c.Signature, c.Leaves = 100, 200, make([]byte, 64), 4
	c.Path = [][]byte{make([]byte, 32), make([]byte, 32)}
	return cmd
}

// place makes the commands that place and start the next n tasks, and that bring
// their results.
func (l *lives) next(n int) (ids []string, placed, started, committed []*musterpb.Command) {
	for range n {
		id := fmt.Sprintf("att-%016x", l.task)
		ids = append(ids, id)
		placed, started, committed = append(placed, placement(id, "j1", l.task, "", l.worker[0])), append(started, start(id)), append(committed, result(id))
		l.task++
	}
	return ids, placed, started, committed
}

// closing makes the command that closes the batch, and what draws it.
func (l *lives) closing() (closed *musterpb.Command, reveal func() *musterpb.Command) {
	if len(l.chain) < 2 {
		l.chain = chainOf("n1", int(l.now))
		l.apply(registerTip(l.node, l.chain[0]))
	}
	waiting, _, epoch, digest := l.Committed()
	l.chain = l.chain[1:]
	value := l.chain[0]
	return &musterpb.Command{Body: &musterpb.Command_CloseBatch{CloseBatch: &musterpb.CloseBatch{Epoch: epoch, Digest: digest, Attempts: uint32(waiting)}}},
		func() *musterpb.Command {
			return &musterpb.Command{Body: &musterpb.Command_Reveal{Reveal: &musterpb.RevealValue{Reveal: &musterpb.Reveal{Node: l.node, Epoch: epoch, Value: value}}}}
		}
}

// check brings the checks of results to their end, all found right.
func (l *lives) check(ids []string) {
	for _, id := range ids {
		check := checkID(id)
		if l.Check(check) == nil {
			continue // a proven owner is sampled
		}
		run := "run-" + id
		target := l.Attempt(id)
		l.apply(placement(run, target.Job, int(target.Task), check, l.worker[1]))
		l.apply(start(run))
		l.apply(result(run))
		l.apply(&musterpb.Command{Body: &musterpb.Command_RecordComparisons{RecordComparisons: &musterpb.RecordComparisons{
			Check: check, Comparisons: []*musterpb.Comparison{comparison(id, run, true)},
		}}})
	}
}

// live runs n tasks from their placement to their verdict.
func (l *lives) live(n int) {
	ids, placed, started, committed := l.next(n)
	l.apply(placed...)
	l.apply(started...)
	l.apply(committed...)
	closed, reveal := l.closing()
	l.apply(closed)
	l.apply(reveal())
	l.check(ids)
}

// BenchmarkLife applies the commands of one task's whole life: placed, started,
// committed, drawn, paid, and where it is sampled its check by another owner.
// Entries hold 100 commands, and batches 100 results, as they do under load.
func BenchmarkLife(b *testing.B) {
	const together = 100
	l := newLives(b, 10_000_000)
	l.live(together) // the owner is proven
	sealed := 0
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		ids, placed, started, committed := l.next(together)
		b.StartTimer()
		l.apply(placed...)
		l.apply(started...)
		l.apply(committed...)
		b.StopTimer()
		closed, reveal := l.closing()
		draw := reveal()
		b.StartTimer()
		l.apply(closed)
		l.apply(draw)
		b.StopTimer()
		l.check(ids)
		if sealed++; sealed%100 == 0 { // of history, only what a job needs stays
			if err := l.ledger.Seal(l.ledger.Last()); err != nil {
				b.Fatal(err)
			}
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*together)/1000, "µs/task")
}

// BenchmarkCheckedLife is the same where every result is checked, with every
// step of the checks: without a committee, every batch fails closed.
func BenchmarkCheckedLife(b *testing.B) {
	const together = 100
	l := newLives(b, 10_000_000)
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		ids, placed, started, committed := l.next(together)
		b.StartTimer()
		l.apply(placed...)
		l.apply(started...)
		l.apply(committed...)
		waiting, _, epoch, digest := l.Committed()
		l.apply(&musterpb.Command{Body: &musterpb.Command_CloseBatch{CloseBatch: &musterpb.CloseBatch{Epoch: epoch, Digest: digest, Attempts: uint32(waiting)}}})
		l.check(ids)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*together)/1000, "µs/task")
}

// manyLive is a state with n attempts that are running, 1,000 on each worker.
func manyLive(t testing.TB, n int) *lives {
	l := newLives(t, n)
	w := &world{replicas: &replicas{}, ids: map[string]string{}, names: map[string]string{}}
	for l.task < n {
		name := fmt.Sprint("worker-", l.task)
		l.apply(w.build("worker", parseArgs([]string{name})))
		l.worker[0] = w.id(name)
		_, placed, started, _ := l.next(min(1000, n-l.task))
		l.apply(placed...)
		l.apply(started...)
	}
	return l
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// decoded are commands as a log has them: nothing is shared between two.
func decoded(cmds []*musterpb.Command) []*musterpb.Command {
	fresh := make([]*musterpb.Command, len(cmds))
	for i, cmd := range cmds {
		fresh[i] = &musterpb.Command{}
		if err := fresh[i].UnmarshalVT(must1(cmd.MarshalVT())); err != nil {
			panic(err)
		}
	}
	return fresh
}

// BenchmarkHeap is what an attempt takes that is running, with its task and its
// hold, and what a task takes that is queued.
func BenchmarkHeap(b *testing.B) {
	const n = 200_000
	for b.Loop() {
		before := heap()
		l := newLives(b, n)
		b.ReportMetric(float64(heap()-before)/n, "B/queued")
		before = heap()
		for l.task < n {
			_, placed, started, _ := l.next(1000)
			l.apply(decoded(placed)...)
			l.apply(decoded(started)...)
		}
		b.ReportMetric(float64(heap()-before)/n, "B/attempt")
		runtime.KeepAlive(l)
	}
}

// BenchmarkSnapshot is how long Apply waits for a snapshot of a million live
// attempts, and what the slowest of the entries that follow takes.
func BenchmarkSnapshot(b *testing.B) {
	l := manyLive(b, 1_000_000)
	var pauses, entries []time.Duration
	for b.Loop() {
		from := time.Now()
		s := l.Snapshot()
		pauses = append(pauses, time.Since(from))
		b.StopTimer()
		for i := range 300 {
			cmd := end(fmt.Sprintf("att-%016x", (len(entries)*7919+i)%l.task), musterpb.AttemptState_ATTEMPT_STATE_FAILED, musterpb.Blame_BLAME_NETWORK, 0)
			from := time.Now()
			l.Apply(cmd)
			entries = append(entries, time.Since(from))
		}
		runtime.KeepAlive(s)
		b.StartTimer()
	}
	slices.Sort(pauses)
	slices.Sort(entries)
	b.ReportMetric(float64(pauses[len(pauses)*99/100].Microseconds())/1000, "ms/pause-p99")
	b.ReportMetric(float64(entries[len(entries)*99/100].Microseconds())/1000, "ms/entry-p99")
}

// BenchmarkWriteSnapshot is the writing of a snapshot, beside Apply.
func BenchmarkWriteSnapshot(b *testing.B) {
	snapshot := manyLive(b, 100_000).Snapshot()
	for b.Loop() {
		if err := snapshot.Write(io.Discard); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100_000, "ns/attempt")
}

// BenchmarkRestore is a restart from a snapshot of a million live attempts.
func BenchmarkRestore(b *testing.B) {
	whole := encode(b, manyLive(b, 1_000_000).Snapshot())
	b.SetBytes(int64(len(whole)))
	for b.Loop() {
		if err := New().Restore(bytes.NewReader(whole)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkDeposits is what commands of 8,000 transfers cost, sealed now and
// then as they are in a cluster.
func BenchmarkDeposits(b *testing.B) {
	const together = 8000
	l := newLives(b, 1)
	cmd := &musterpb.Deposits{}
	for i := range together {
		account := fmt.Sprintf("customer-%d", i%1000)
		if i < 1000 {
			l.apply(&musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: account}}})
		}
		cmd.Deposits = append(cmd.Deposits, &musterpb.Deposit{Account: account, AmountMicroUsd: 1, Memo: "benchmark"})
	}
	b.ReportAllocs()
	for b.Loop() {
		l.apply(&musterpb.Command{Body: &musterpb.Command_Deposits{Deposits: cmd}})
		if l.ledger.Last()-l.ledger.Sealed() > 1<<18 {
			if err := l.ledger.Seal(l.ledger.Last()); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(b.N*together)/b.Elapsed().Seconds(), "transfers/s")
}

// BenchmarkDraw draws a batch of 1,000 results of 4 items each.
func BenchmarkDraw(b *testing.B) {
	const together = 1000
	l := newLives(b, 10_000_000)
	l.live(100)
	for b.Loop() {
		b.StopTimer()
		ids, placed, started, committed := l.next(together)
		l.apply(placed...)
		l.apply(started...)
		l.apply(committed...)
		closed, reveal := l.closing()
		l.apply(closed)
		draw := reveal()
		b.StartTimer()
		l.apply(draw)
		b.StopTimer()
		l.check(ids)
		b.StartTimer()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*together)/1000, "µs/result")
}
