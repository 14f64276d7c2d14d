package state

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
)

// machine draws commands, sensible and not, for a small world. What has to hold
// after each of them is checked by replicas.apply.
type machine struct {
	*world
	archive  []*musterpb.SnapshotRecord // what was sealed
	attempts int
	jobs     int
	truths   map[string]int // by attempt: what its outputs are; results with the same agree
}

func newMachine(t *rapid.T) *machine {
	m := &machine{world: newWorld(t), truths: map[string]int{}}
	for _, line := range [][]string{
		{"account", "acme"}, {"account", "zeta"}, {"deposit", "acme", "20.00"}, {"deposit", "zeta", "3.00"},
		{"node", "n1"}, {"node", "n2"}, {"tip", "n1"},
	} {
		m.must(line...)
	}
	for i := range 7 {
		owner := fmt.Sprintf("owner%d", i)
		m.must("account", owner)
		m.must("worker", fmt.Sprintf("w%d", i), "owner="+owner, fmt.Sprintf("price=0.%d", i%5), "gpus=1")
	}
	m.must("worker", "w0b", "owner=owner0", "price=0.40", "gpus=2")
	return m
}

// do runs a line; refusals are fine.
func (m *machine) do(t *rapid.T, words ...string) {
	for _, answer := range m.run(words) {
		t.Log(words, "→", answer)
	}
}

// pick draws one of some IDs, or one that does not exist.
func pick(t *rapid.T, ids []string, what string) string {
	return rapid.SampledFrom(append(slices.Clone(ids), "nope")).Draw(t, what)
}

func (m *machine) attemptIDs(states ...musterpb.AttemptState) (ids []string) {
	for _, id := range attemptIDs(m.State) {
		if len(states) == 0 || slices.Contains(states, m.data.attempts.Get(id).State) {
			ids = append(ids, id)
		}
	}
	return ids
}

func (m *machine) openChecks() (ids []string) {
	for _, id := range keysOf(m.data.checks) {
		if c := m.check(id); c != nil && open(c) {
			ids = append(ids, id)
		}
	}
	return ids
}

func (m *machine) anyWorker(t *rapid.T) string { return pick(t, keysOf(m.data.workers), "worker") }

func (m *machine) newAttempt() string {
	m.attempts++
	return fmt.Sprintf("a%d", m.attempts)
}

const (
	placed    = musterpb.AttemptState_ATTEMPT_STATE_PLACED
	runs      = musterpb.AttemptState_ATTEMPT_STATE_RUNNING
	committed = musterpb.AttemptState_ATTEMPT_STATE_COMMITTED
	lost      = musterpb.AttemptState_ATTEMPT_STATE_LOST
)

// placeQueued places something that waits, somewhere.
func (m *machine) placeQueued(t *rapid.T) {
	work := m.Queued()
	if len(work) == 0 {
		return
	}
	w := rapid.SampledFrom(work).Draw(t, "work")
	args := []string{"place", m.newAttempt(), "worker=" + m.anyWorker(t)}
	if len(w.Checks) > 0 && (len(w.Requeued) == 0 && w.Next == w.End || rapid.Bool().Draw(t, "a check")) {
		args = append(args, "check="+rapid.SampledFrom(w.Checks).Draw(t, "check").Check.Id)
	} else {
		waiting := []uint32{}
		for _, task := range w.Requeued {
			waiting = append(waiting, task.Number)
		}
		for n := w.Next; n < min(w.End, w.Next+3); n++ {
			waiting = append(waiting, n)
		}
		args = append(args, "job="+w.Job.Id, fmt.Sprintf("task=%d", rapid.SampledFrom(waiting).Draw(t, "task")))
	}
	if w.Job.Spec.Resources.Gpus > 0 {
		args = append(args, fmt.Sprintf("devices=gpu-%d", rapid.IntRange(0, 1).Draw(t, "gpu")))
	}
	m.do(t, args...)
}

func (m *machine) actions() map[string]func(*rapid.T) {
	chance := func(t *rapid.T, percent int, what string) bool {
		return rapid.IntRange(1, 100).Draw(t, what) <= percent
	}
	return map[string]func(*rapid.T){
		"submit": func(t *rapid.T) {
			if len(m.index.jobs) >= 4 {
				return
			}
			m.jobs++
			m.do(t, "submit", fmt.Sprintf("j%d", m.jobs), "account="+rapid.SampledFrom([]string{"acme", "zeta"}).Draw(t, "account"),
				fmt.Sprintf("items=%d", rapid.IntRange(1, 5).Draw(t, "items")), fmt.Sprintf("chunk=%d", rapid.IntRange(1, 3).Draw(t, "chunk")),
				rapid.SampledFrom([]string{"budget=0.80", "budget=1.30", "budget=4.00", "budget=19.00"}).Draw(t, "budget"),
				fmt.Sprintf("gpus=%d", rapid.IntRange(0, 1).Draw(t, "gpus")), fmt.Sprintf("retries=%d", rapid.IntRange(0, 2).Draw(t, "retries")),
				rapid.SampledFrom([]string{"same_owner=yes", "same_owner=no"}).Draw(t, "same owner"),
				rapid.SampledFrom([]string{"timeout=1h", "timeout=10m"}).Draw(t, "timeout"))
		},
		"place":  m.placeQueued,
		"place2": m.placeQueued,
		"place3": m.placeQueued,
		"place at random": func(t *rapid.T) {
			m.do(t, "place", pick(t, append(m.attemptIDs(), m.newAttempt()), "attempt"), "job="+pick(t, keysOf(m.data.jobs), "job"),
				fmt.Sprintf("task=%d", rapid.IntRange(0, 5).Draw(t, "task")), "worker="+m.anyWorker(t),
				"check="+rapid.SampledFrom(append(keysOf(m.data.checks), "", "", "nope")).Draw(t, "check"))
		},
		"start": func(t *rapid.T) { m.do(t, "start", pick(t, m.attemptIDs(placed), "attempt")) },
		"commit": func(t *rapid.T) {
			m.clock += int64(rapid.IntRange(0, 3_000_000).Draw(t, "ms"))
			m.do(t, "commit", pick(t, m.attemptIDs(placed, runs, lost), "attempt"))
		},
		"commit2":           func(t *rapid.T) { m.do(t, "commit", pick(t, m.attemptIDs(placed, runs), "attempt")) },
		"commit any":        func(t *rapid.T) { m.do(t, "commit", pick(t, m.attemptIDs(), "attempt"), "root="+pick(t, nil, "root")) },
		"lost":              func(t *rapid.T) { m.do(t, "lost", pick(t, m.attemptIDs(placed, runs), "attempt")) },
		"stop":              func(t *rapid.T) { m.do(t, "stop", pick(t, m.attemptIDs(placed, runs), "attempt")) },
		"lost, late result": func(t *rapid.T) { m.do(t, "commit", pick(t, m.attemptIDs(lost), "attempt")) },
		"fail": func(t *rapid.T) {
			m.do(t, "fail", pick(t, m.attemptIDs(placed, runs), "attempt"), fmt.Sprintf("exit=%d", rapid.IntRange(1, 2).Draw(t, "exit")),
				"blame="+rapid.SampledFrom([]string{"none", "worker", "job", "network"}).Draw(t, "blame"))
		},
		"close": func(t *rapid.T) {
			if waiting, _, _, _ := m.Committed(); waiting > 0 && chance(t, 30, "only some") {
				m.do(t, "close", fmt.Sprintf("attempts=%d", rapid.IntRange(0, waiting+1).Draw(t, "attempts")))
				return
			}
			m.do(t, "close")
		},
		"reveal":      func(t *rapid.T) { m.do(t, "reveal", pick(t, []string{"n1", "n2"}, "node")) },
		"reveal2":     func(t *rapid.T) { m.do(t, "reveal", pick(t, m.Drawing().GetCommittee(), "node")) },
		"fail-closed": func(t *rapid.T) { m.do(t, "fail-closed") },
		"tip": func(t *rapid.T) {
			node := rapid.SampledFrom([]string{"n1", "n2"}).Draw(t, "node")
			if m.Drawing() == nil { // otherwise the harness would forget the chain that counts
				m.do(t, "tip", node, fmt.Sprintf("generation=%d", rapid.IntRange(0, 9).Draw(t, "generation")))
			}
		},
		"compare": func(t *rapid.T) {
			if list := m.ToCompare(); len(list) > 0 {
				m.compareSome(t, rapid.SampledFrom(list).Draw(t, "check"))
			}
		},
		"examine":  m.examine,
		"examine2": m.examine,
		"give up": func(t *rapid.T) {
			if chance(t, 20, "give up") {
				m.do(t, "give-up", pick(t, m.openChecks(), "check"))
			}
		},
		"cancel": func(t *rapid.T) {
			if chance(t, 20, "cancel") {
				m.do(t, "cancel", pick(t, keysOf(m.data.jobs), "job"))
			}
		},
		"fund": func(t *rapid.T) {
			m.do(t, "fund", pick(t, keysOf(m.data.jobs), "job"), rapid.SampledFrom([]string{"-1", "0", "0.10", "1", "500"}).Draw(t, "amount"))
		},
		"seal": m.seal,
		"seal at random": func(t *rapid.T) {
			if chance(t, 20, "seal") {
				m.do(t, "seal", fmt.Sprint("segment ", m.clock), "jobs="+pick(t, keysOf(m.data.jobs), "job"),
					fmt.Sprintf("transfer=%d", rapid.IntRange(0, 99).Draw(t, "transfer")), fmt.Sprintf("epoch=%d", rapid.IntRange(0, 9).Draw(t, "epoch")))
			}
		},
		"merge": func(t *rapid.T) {
			if n := len(m.segments); n > 1 {
				at := rapid.IntRange(0, n-2).Draw(t, "segment")
				cmd := &musterpb.MergeSegments{Segment: sumOf(m.segments[at : at+2]), Replaced: []string{m.segments[at].Digest, m.segments[at+1].Digest}}
				cmd.Segment.Digest, cmd.Segment.Bytes = segmentDigest(fmt.Sprint("merged ", m.clock)), 1
				m.say(&musterpb.Command{Body: &musterpb.Command_MergeSegments{MergeSegments: cmd}})
			}
		},
		"drain": func(t *rapid.T) {
			m.do(t, "drain", m.anyWorker(t), rapid.SampledFrom([]string{"on", "off", "off"}).Draw(t, "how"))
		},
		"repeat": func(t *rapid.T) {
			if len(m.answerOrder) > 0 {
				m.do(t, "deposit", "acme", "1.00", "id="+rapid.SampledFrom(m.answerOrder).Draw(t, "id"))
			}
			m.do(t, "deposit", "zeta", "0.01", fmt.Sprintf("id=d%d", m.clock))
		},
	}
}

// seal takes out what is finished, and keeps it as an archive would.
func (m *machine) seal(t *rapid.T) {
	found := m.Sealable(rapid.IntRange(1, 20).Draw(t, "limit"))
	if len(found.Seal.Jobs) == 0 && found.Transfers == 0 && found.Batches == 0 {
		return
	}
	found.Seal.Segment.Digest, found.Seal.Segment.Bytes = segmentDigest(fmt.Sprint("segment ", m.clock)), 1
	content := slices.Collect(m.SealContent(found.Seal))
	if got := m.say(&musterpb.Command{Body: &musterpb.Command_Seal{Seal: found.Seal}}); got[0] != "ok" {
		t.Fatalf("what is sealable was not sealed: %v", got)
	}
	m.archive = append(m.archive, content...)
}

// checkArchive finds everything that ever was in the archive or in the state,
// once.
func (m *machine) checkArchive(t *rapid.T) {
	seen := map[string]int{}
	count := func(r *musterpb.SnapshotRecord) {
		switch v := r.Record.(type) {
		case *musterpb.SnapshotRecord_Job:
			seen["job "+v.Job.Id]++
			seen["attempts"] += int(v.Job.Attempts + v.Job.Checks)
			seen["tasks"] += int(v.Job.NextTask)
		case *musterpb.SnapshotRecord_Task:
			seen["tasks"]--
		case *musterpb.SnapshotRecord_Attempt:
			seen["attempts"]--
			seen["attempt "+v.Attempt.Id]++
		case *musterpb.SnapshotRecord_Check:
			seen["check "+v.Check.Id]++
		case *musterpb.SnapshotRecord_Transfer:
			seen[fmt.Sprint("transfer ", v.Transfer.Id)]++
		case *musterpb.SnapshotRecord_Batch:
			seen[fmt.Sprint("batch ", v.Batch.Epoch)]++
		}
	}
	for _, r := range m.archive {
		count(r)
	}
	for r := range m.SealContent(&musterpb.Seal{Jobs: keysOf(m.data.jobs), ThroughTransfer: m.ledger.Last(), ThroughEpoch: m.epoch}) {
		count(r)
	}
	if seen["attempts"] != 0 || seen["tasks"] != 0 {
		t.Fatalf("%d attempts and %d tasks more than the jobs say are neither here nor in the archive", seen["attempts"], seen["tasks"])
	}
	delete(seen, "attempts")
	delete(seen, "tasks")
	for n := range m.ledger.Last() {
		seen[fmt.Sprint("transfer ", n+1)] += 0
	}
	for n := range m.epoch {
		seen[fmt.Sprint("batch ", n+1)] += 0
	}
	for what, n := range seen {
		if n != 1 {
			t.Fatalf("%s is there %d times", what, n)
		}
	}
}

// truth is what an attempt put out, drawn when it matters first. Most are right.
func (m *machine) truth(t *rapid.T, attempt string) int {
	if _, ok := m.truths[attempt]; !ok {
		m.truths[attempt] = rapid.SampledFrom([]int{0, 0, 0, 0, 1, 2}).Draw(t, "outputs of "+attempt)
	}
	return m.truths[attempt]
}

// examine brings a check one round further: the runs that it wants, on workers
// that may take them, and the comparison.
func (m *machine) examine(t *rapid.T) {
	var wanted []WantedRun
	for _, w := range m.Queued() {
		wanted = append(wanted, w.Checks...)
	}
	if len(wanted) == 0 {
		return
	}
	run := rapid.SampledFrom(wanted).Draw(t, "check")
	for _, worker := range rapid.Permutation(keysOf(m.data.workers)).Draw(t, "workers") {
		if x := m.index.jobs[run.Check.Job]; x == nil || x.wanted.get(run.Check.Id) == 0 {
			break
		}
		id := m.newAttempt()
		args := []string{"place", id, "check=" + run.Check.Id, "worker=" + worker}
		if m.Job(run.Check.Job).Spec.Resources.Gpus > 0 {
			args = append(args, "devices=gpu-0")
		}
		m.do(t, args...)
		m.do(t, "commit", id)
	}
	for _, c := range m.ToCompare() {
		m.compareSome(t, c)
	}
}

func (m *machine) compareSome(t *rapid.T, c Comparable) {
	words := []string{"compare", c.Check.Id}
	for _, p := range c.Pairs {
		sign := "!~"
		if m.truth(t, p[0]) == m.truth(t, p[1]) {
			sign = "~"
		}
		words = append(words, p[0]+sign+p[1])
	}
	if rapid.IntRange(0, 9).Draw(t, "spoil") == 0 {
		words = append(words, rapid.SampledFrom([]string{"a1~a2", words[len(words)-1]}).Draw(t, "by"))
	}
	m.do(t, words...)
}

// settle drives everything to its end, as the leader's loops would after a
// cancellation of all jobs.
func (m *machine) settle(t *rapid.T) {
	for _, id := range sortedKeys(m.index.jobs) {
		m.do(t, "cancel", id)
	}
	for round := 0; len(m.index.jobs) > 0; round++ {
		if round > 100 {
			t.Fatalf("these jobs never settle: %v", sortedKeys(m.index.jobs))
		}
		for _, a := range m.LiveAttempts() {
			m.do(t, "lost", a.Id)
		}
		if m.Drawing() != nil {
			m.do(t, "fail-closed")
		}
		m.do(t, "close")
		for _, c := range m.ToCompare() {
			m.compareSome(t, c)
		}
		for _, w := range m.Queued() {
			for _, c := range w.Checks {
				m.do(t, "give-up", c.Check.Id)
			}
		}
	}
}

// Whatever is asked of it and in whatever order, everything that has to hold
// does, and in the end every job settles and no money is left in between.
func TestRandomLives(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newMachine(t)
		t.Repeat(m.actions())
		m.settle(t)
		m.checkArchive(t)
		for _, name := range m.ledger.Accounts() {
			if a := m.ledger.Account(name); a.Held != 0 || a.Expected != 0 || (len(name) > 4 && name[:4] == "job:" && a.Balance != 0) {
				t.Fatalf("all jobs are settled and %s has %+v", name, a)
			}
		}
		if ids := m.openChecks(); len(ids) != 0 || m.CountLive() != 0 || len(m.index.undecided) != 0 {
			t.Fatalf("all jobs are settled and there are checks without a verdict: %v, %d live attempts, undecided results: %v", ids, m.CountLive(), m.index.undecided)
		}
	})
}

// A job that pauses for want of money goes on, or ends, when everything under
// way ended and its owner funds it: no event that it waits for stays away.
func TestPausedJobsGoOn(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newMachine(t)
		t.Repeat(m.actions())
		m.must("deposit", "acme", "100000")
		m.must("deposit", "zeta", "100000")
		for _, id := range sortedKeys(m.index.jobs) {
			if !Ended(m.Job(id).State) {
				m.must("fund", id, "1000")
				if m.Job(id).State == musterpb.JobState_JOB_STATE_PAUSED {
					t.Fatalf("job %s was funded with %s and is paused", id, m.ledger.Account(ledger.OfJob(id)).Available())
				}
			}
		}
		for _, w := range m.Queued() {
			for _, c := range w.Checks {
				if c.Unpaid != "" && !Ended(w.Job.State) {
					t.Fatalf("job %s was funded and %s", w.Job.Id, c.Unpaid)
				}
			}
		}
	})
}
