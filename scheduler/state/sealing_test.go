package state

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/musternet/muster/api/musterpb"
)

// sealAll seals all that is sealable.
func (l *lives) sealAll() {
	l.t.Helper()
	for {
		found := l.Sealable(1000)
		if len(found.Seal.Jobs) == 0 && found.Transfers == 0 && found.Batches == 0 {
			return
		}
		found.Seal.Segment.Digest, found.Seal.Segment.Bytes = segmentDigest(fmt.Sprint(l.now)), 1
		l.apply(&musterpb.Command{Body: &musterpb.Command_Seal{Seal: found.Seal}})
	}
}

// An epoch goes when all of its results, and all before it, have their verdict.
func TestSealableEpochs(t *testing.T) {
	l := newLives(t, 100)
	var first []string
	for i := range 12 {
		ids, placed, started, committed := l.next(1)
		l.apply(placed...)
		l.apply(started...)
		l.apply(committed...)
		closed, reveal := l.closing()
		l.apply(closed)
		l.apply(reveal())
		if i == 2 {
			first = ids
		} else {
			l.check(ids)
		}
	}
	if got := l.Sealable(1000).Seal.ThroughEpoch; got != 2 {
		t.Errorf("epoch 3 has an open check, and epochs up to %d can go", got)
	}
	l.check(first)
	if got := l.Sealable(1000).Seal.ThroughEpoch; got != 12-keptBatches {
		t.Errorf("everything is decided, and epochs up to %d can go", got)
	}
	l.sealAll()
	if list := l.Batches(0, 100); len(list) != keptBatches || list[0].Epoch != 12-keptBatches+1 {
		t.Errorf("%d batches are left, from %d on", len(list), list[0].Epoch)
	}
}

// A job that is sealed is gone at once for everybody, and from memory a little
// at a time.
func TestSweep(t *testing.T) {
	const tasks = 3000
	l := newLives(t, tasks)
	l.sweeper = 0
	l.live(tasks)
	if !l.Job("j1").Settled {
		t.Fatal("the job is not settled")
	}
	l.sealAll()
	if l.Job("j1") != nil || l.Task("j1", 7) != nil || l.Attempt("att-0000000000000007") != nil || l.Check(checkID("att-0000000000000007")) != nil || len(l.Attempts("j1")) != 0 {
		t.Error("the sealed job can be seen")
	}
	if l.attempts.Len() != 2*tasks || l.tasks.Len() != tasks || l.checks.Len() != tasks {
		t.Errorf("%d attempts, %d tasks and %d checks are left", l.attempts.Len(), l.tasks.Len(), l.checks.Len())
	}
	restored := New()
	if err := restored.Restore(bytes.NewReader(encode(t, l.Snapshot()))); err != nil {
		t.Fatal(err)
	}
	same := func(when string) {
		t.Helper()
		if !bytes.Equal(restored.Snapshot().Hash(), l.Snapshot().Hash()) {
			t.Errorf("%s, a restored state differs", when)
		}
	}
	same("with the rest of a sealed job")
	l.sweeper = tasks / 2
	tick := &musterpb.Command{Body: &musterpb.Command_DrainWorker{DrainWorker: &musterpb.DrainWorker{Worker: l.worker[0], Draining: false}}}
	l.apply(tick)
	restored.Apply(tick)
	if l.tasks.Len() != tasks/2 || l.attempts.Len() != tasks || l.checks.Len() != tasks/2 {
		t.Errorf("after an entry %d tasks, %d attempts and %d checks are left", l.tasks.Len(), l.attempts.Len(), l.checks.Len())
	}
	same("in between")

	// The ID comes again, and an attempt's of what is left: nothing of the old job
	// may come back, or take the new away.
	submit := submitJob("j1", parseArgs([]string{"items=2", "budget=100"}))
	place := placement(fmt.Sprintf("att-%016x", tasks-1), "j1", 0, "", l.worker[0])
	for _, cmd := range []*musterpb.Command{submit, place, tick, tick, tick} {
		l.apply(cmd)
		if err := ErrorOf(restored.Apply(cmd)); err != nil {
			t.Fatal(err)
		}
	}
	same("with the ID in use again")
	if l.tasks.Len() != 1 || l.attempts.Len() != 1 || l.checks.Len() != 0 || l.dropped.Len() != 0 {
		t.Errorf("in the end %d tasks, %d attempts, %d checks and %d sealed jobs are left", l.tasks.Len(), l.attempts.Len(), l.checks.Len(), l.dropped.Len())
	}
}

// An attempt of another job has an ID of what is left of a sealed one.
func TestSweepOfIDInUse(t *testing.T) {
	l := newLives(t, 3)
	l.sweeper = 0
	l.live(3)
	l.sealAll()
	l.apply(submitJob("j2", parseArgs([]string{"items=1", "budget=100"})))
	l.apply(placement("att-0000000000000001", "j2", 0, "", l.worker[0]))
	l.apply(start("att-0000000000000001"))
	if a := l.Attempt("att-0000000000000001"); a == nil || a.Job != "j2" || l.attempts.Len() != 1 {
		t.Errorf("after the sweep the new attempt is %v, %d are left", a, l.attempts.Len())
	}
	if problems := broken(l.State); len(problems) > 0 {
		t.Error(problems)
	}
}

// What is finished takes no memory: only the accounts, the workers and the
// segments stay.
func TestHistoryTakesNoRoom(t *testing.T) {
	l := newLives(t, 1)
	records := func() int { return len(records(t, encode(t, l.Snapshot()))) }
	l.apply(deposit("acme", 100_000_000))
	jobOf := func(i int) {
		id := fmt.Sprintf("more-%d", i)
		l.apply(submitJob(id, parseArgs([]string{"items=1", "budget=1"})))
		attempt := "att-" + id
		l.apply(placement(attempt, id, 0, "", l.worker[0]), start(attempt), result(attempt))
		l.apply(&musterpb.Command{Body: &musterpb.Command_CancelJob{CancelJob: &musterpb.CancelJob{Job: id}}})
		closed, reveal := l.closing()
		l.apply(closed)
		l.apply(reveal())
		l.check([]string{attempt})
		l.sealAll()
	}
	l.chain = chainOf("n1", 0)
	l.apply(registerTip(l.node, l.chain[0]))
	for i := range 20 {
		jobOf(i)
	}
	before, segments := records(), len(l.segments)
	for i := range 50 {
		jobOf(20 + i)
	}
	if now := records() - (len(l.segments) - segments); now > before {
		t.Errorf("%d records after 20 jobs, %d after 70, new segments aside", before, now)
	}
}

// A reader that falls behind, or whose state was restored, reads everything
// again.
func TestChangesReset(t *testing.T) {
	l := newLives(t, 10)
	c, cursor := l.ChangesSince(0)
	if !c.Reset {
		t.Error("a reader that knows nothing is not told to read everything")
	}
	l.apply(placement("a1", "j1", 0, "", l.worker[0]))
	if c, _ = l.ChangesSince(cursor); c.Reset || fmt.Sprint(c.Jobs, c.Attempts, len(c.Workers), len(c.Checks)) != "[j1] [a1] 1 0" {
		t.Errorf("a placement changed %+v", c)
	}
	for range maxChanges + 10 {
		l.tell(attemptChanged, "x")
	}
	if c, _ = l.ChangesSince(cursor); !c.Reset {
		t.Error("changes were lost, and the reader is not told")
	}
	_, cursor = l.ChangesSince(0)
	for range maxChanges {
		l.tell(attemptChanged, "x")
	}
	if c, _ = l.ChangesSince(cursor); c.Reset || len(c.Attempts) != 1 {
		t.Errorf("as many changes as are kept: %+v", c)
	}
	_, cursor = l.ChangesSince(0)
	if err := l.Restore(bytes.NewReader(encode(t, l.Snapshot()))); err != nil {
		t.Fatal(err)
	}
	if c, cursor = l.ChangesSince(cursor); !c.Reset {
		t.Error("the state was restored, and the reader is not told")
	}
	if c, _ = l.ChangesSince(cursor); c.Reset {
		t.Error("the reader is told twice")
	}
	if c, _ = l.ChangesSince(cursor + 1000); !c.Reset {
		t.Error("a cursor from the future is taken")
	}
}
