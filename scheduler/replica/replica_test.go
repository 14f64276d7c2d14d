package replica

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	"go.uber.org/goleak"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	electionTimeout = 250 * time.Millisecond
	patience        = 30 * time.Second // with which a condition is waited for, on a busy machine
)

// node is a replica with its Run loop.
type node struct {
	*Replica
	id    api.NodeID
	cfg   Config
	state *state.State
	leads chan struct{} // receives one value whenever lead is called
	end   context.CancelFunc
	ended chan struct{}
}

// open starts a node; stop, or the end of the test, stops it.
func open(t testing.TB, cfg Config, lead func(context.Context)) *node {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
	}
	if cfg.Listen == "" {
		cfg.Listen = "127.0.0.1:0"
	}
	cfg.ElectionTimeout, cfg.Logger, cfg.segmentBytes = electionTimeout, slog.New(slog.DiscardHandler), cmp.Or(cfg.segmentBytes, 16<<10)
	n := &node{id: cfg.ID, state: state.New(), leads: make(chan struct{}, 100), ended: make(chan struct{})}
	var err error
	if n.Replica, err = Open(cfg, n.state); err != nil {
		t.Fatal(err)
	}
	cfg.Listen, cfg.Bootstrap = n.Address(), false // as it is when it is opened again
	n.cfg = cfg
	ctx, cancel := context.WithCancel(context.Background())
	n.end = cancel
	go func() {
		defer close(n.ended)
		if err := n.Run(ctx, func(ctx context.Context) {
			n.leads <- struct{}{}
			if lead != nil {
				lead(ctx)
			}
		}); err != nil {
			panic(err)
		}
	}()
	t.Cleanup(func() { n.stop(t) })
	return n
}

func (n *node) stop(t testing.TB) {
	t.Helper()
	n.end()
	<-n.ended
	if err := n.Close(); err != nil {
		t.Errorf("closing %s: %v", n.id, err)
	}
}

// crash stops a node as a killed process would: it hands over nothing.
func (n *node) crash(t testing.TB) {
	t.Helper()
	if err := n.raft.Shutdown().Error(); err != nil {
		t.Error(err)
	}
	n.stop(t)
}

// trio is a group of three with n[0] leading.
func trio(t testing.TB, snapshots Snapshots) (n [3]*node) {
	t.Helper()
	n[0] = open(t, Config{ID: "n0", Bootstrap: true, Snapshots: snapshots}, nil)
	receive(t, n[0].leads, "n0 to lead")
	for i := 1; i < 3; i++ {
		n[i] = open(t, Config{ID: api.NodeID(fmt.Sprint("n", i)), Snapshots: snapshots}, nil)
		if err := n[0].AddVoter(n[i].id, n[i].Address()); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

func receive[T any](t testing.TB, c <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(patience):
		t.Fatalf("waited %s in vain for %s", patience, what)
	}
	return v
}

// eventually waits for what nothing tells of.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited %s in vain for: %s", patience, what)
		}
	}
}

// has waits until a node has applied the making of an account.
func (n *node) has(t testing.TB, account string) {
	t.Helper()
	for deadline := time.After(patience); ; {
		changed := n.state.Changed()
		if n.state.HasAccount(account) {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("%s never heard of account %s", n.id, account)
		}
	}
}

func createAccount(name string) *musterpb.Command {
	return &musterpb.Command{Id: "create " + name, Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: name}}}
}

func (n *node) propose(cmd *musterpb.Command) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	answer, err := n.Propose(ctx, cmd)
	if err != nil {
		return err
	}
	return state.ErrorOf(answer)
}

func (n *node) create(t testing.TB, account string) {
	t.Helper()
	if err := n.propose(createAccount(account)); err != nil {
		t.Fatalf("creating %s through %s: %v", account, n.id, err)
	}
}

// leaderOf waits for one of the nodes to lead and be ready.
func leaderOf(t testing.TB, nodes ...*node) (leader *node) {
	t.Helper()
	eventually(t, "a leader", func() bool {
		for _, n := range nodes {
			if n.CheckRead() == nil {
				leader = n
				return true
			}
		}
		return false
	})
	return leader
}

func TestSingleNodeRestarts(t *testing.T) {
	n := open(t, Config{ID: "n0", Bootstrap: true}, nil)
	receive(t, n.leads, "the first lead")
	if !n.Leading() || n.Leader() != "n0" || !n.HasPeers() || n.Term() == 0 {
		t.Errorf("leading %v, leader %q, peers %v, term %d", n.Leading(), n.Leader(), n.HasPeers(), n.Term())
	}
	for i := range 20 {
		n.create(t, fmt.Sprint("a", i))
	}
	if err := n.propose(createAccount("Wrong Name")); api.KindOf(err) != api.Invalid {
		t.Errorf("a refusal arrives as %v", err)
	}
	if err := n.CheckRead(); err != nil {
		t.Error(err)
	}
	before := n.state.Snapshot().Hash()
	n.stop(t)

	// Bootstrap is asked for again, as a service's fixed command line does.
	n.cfg.Bootstrap = true
	again := open(t, n.cfg, nil)
	receive(t, again.leads, "the lead after a restart")
	if !bytes.Equal(again.state.Snapshot().Hash(), before) {
		t.Error("the state is not what it was before the restart")
	}
	if err := again.propose(createAccount("a7")); err != nil {
		t.Errorf("a command that was answered before the restart, repeated: %v", err)
	}
	again.create(t, "after")
}

func TestThreeNodesAgree(t *testing.T) {
	n := trio(t, Snapshots{})
	const proposers, each = 64, 40
	before := n[0].Applied()
	var wg sync.WaitGroup
	var failed atomic.Int64
	for p := range proposers {
		wg.Go(func() {
			for i := range each {
				if err := n[0].propose(createAccount(fmt.Sprintf("a%d-%d", p, i))); err != nil {
					failed.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if failed.Load() > 0 {
		t.Errorf("%d proposals failed", failed.Load())
	}
	commands := uint64(proposers * each)
	if entries := n[0].Applied() - before; entries > commands/4 {
		t.Errorf("%d commands took %d entries: they were not grouped", commands, entries)
	} else {
		t.Logf("%d commands in %d entries", commands, entries)
	}
	n[0].create(t, "last")
	want := n[0].state.Snapshot().Hash()
	for _, f := range n[1:] {
		f.has(t, "last")
		if !bytes.Equal(f.state.Snapshot().Hash(), want) {
			t.Errorf("%s has another state than the leader", f.id)
		}
		if err := f.propose(createAccount("by-a-follower")); api.KindOf(err) != api.Unavailable {
			t.Errorf("proposing to a follower: %v", err)
		}
		if err := f.CheckRead(); api.KindOf(err) != api.Unavailable {
			t.Errorf("reading from a follower: %v", err)
		}
		if err := f.AddVoter("n9", "127.0.0.1:1"); api.KindOf(err) != api.Unavailable {
			t.Errorf("adding a voter through a follower: %v", err)
		}
		if f.Leader() != "n0" || f.Leading() {
			t.Errorf("%s follows %q and leads: %v", f.id, f.Leader(), f.Leading())
		}
	}
}

// Whatever was acknowledged is there after the leader has gone, in order or
// without a word, and another leads soon.
func TestLeaderGoes(t *testing.T) {
	for name, goes := range map[string]func(*node, testing.TB){"closed": (*node).stop, "killed": (*node).crash} {
		t.Run(name, func(t *testing.T) {
			n := trio(t, Snapshots{})
			var mu sync.Mutex
			acknowledged := map[string]bool{} // guarded by mu
			enough := make(chan struct{})
			var once sync.Once
			var wg sync.WaitGroup
			for p := range 16 {
				wg.Go(func() {
					for i := 0; ; i++ {
						name := fmt.Sprintf("a%d-%d", p, i)
						if n[0].propose(createAccount(name)) != nil {
							return
						}
						mu.Lock()
						acknowledged[name] = true
						if len(acknowledged) == 500 {
							once.Do(func() { close(enough) })
						}
						mu.Unlock()
					}
				})
			}
			receive(t, enough, "500 answers")
			from := time.Now()
			goes(n[0], t)
			next := leaderOf(t, n[1], n[2])
			took := time.Since(from)
			wg.Wait()
			t.Logf("%d commands were acknowledged, %s leads after %s", len(acknowledged), next.id, took.Round(time.Millisecond))
			if most := 20 * electionTimeout; took > most {
				t.Errorf("it took %s for another node to lead, more than %s", took, most)
			}
			for name := range acknowledged {
				if !next.state.HasAccount(name) {
					t.Fatalf("account %s was acknowledged and is lost", name)
				}
			}
			next.create(t, "goes-on")

			// The one that went comes back and catches up.
			back := open(t, n[0].cfg, nil)
			back.has(t, "goes-on")
		})
	}
}

// A leader that the others can't reach serves nothing as fresh, acknowledges
// nothing, and takes part again when they are back.
func TestPartitionedLeader(t *testing.T) {
	n := trio(t, Snapshots{})
	n[0].create(t, "before")
	n[1].stop(t)
	n[2].stop(t)
	from := time.Now()
	// A reply that was under way when the others stopped may count once.
	eventually(t, "a read to fail", func() bool { return n[0].CheckRead() != nil })
	if took := time.Since(from); took > 4*electionTimeout {
		t.Errorf("reads went on for %s without a majority", took)
	}
	for range 20 {
		if err := n[0].CheckRead(); api.KindOf(err) != api.Unavailable {
			t.Fatalf("a read without a majority: %v", err)
		}
	}
	if err := n[0].propose(createAccount("lonely")); api.KindOf(err) != api.Unavailable {
		t.Errorf("a proposal without a majority: %v", err)
	}
	eventually(t, "n0 to notice that it leads nobody", func() bool { return !n[0].Leading() })
	if err := n[0].CheckRead(); api.KindOf(err) != api.Unavailable {
		t.Errorf("a read after the lead was lost: %v", err)
	}
	back := open(t, n[1].cfg, nil)
	leader := leaderOf(t, n[0], back)
	leader.create(t, "after")
	n[0].has(t, "after")
	back.has(t, "after")
	if !n[0].state.HasAccount("before") || !back.state.HasAccount("before") {
		t.Error("what was acknowledged before the partition is lost")
	}
}

// A short log: a new node gets the snapshot and not the log, and a node that
// starts again reads its own.
func TestSnapshots(t *testing.T) {
	short := Snapshots{Threshold: 50, Interval: 20 * time.Millisecond, Trailing: 10}
	n := trio(t, short)
	for i := range 500 {
		n[0].create(t, fmt.Sprint("a", i))
	}
	// The log serves what it cut off as long as that shares a file with the rest.
	eventually(t, "a snapshot that replaces the start of the log", func() bool {
		return snapshotIndex(n[0]) > 100 && n[0].log.GetLog(1, &raft.Log{}) != nil
	})
	late := open(t, Config{ID: "late", Snapshots: short}, nil)
	if err := n[0].AddVoter(late.id, late.Address()); err != nil {
		t.Fatal(err)
	}
	n[0].create(t, "last")
	late.has(t, "last")
	if got, want := late.state.Snapshot().Hash(), n[0].state.Snapshot().Hash(); !bytes.Equal(got, want) {
		t.Error("the node that got a snapshot has another state")
	}
	if snapshotIndex(late) == 0 {
		t.Error("the late node was brought up from the log: the test shows nothing")
	}

	late.stop(t)
	again := open(t, late.cfg, nil)
	again.has(t, "last")
	n[0].create(t, "more")
	again.has(t, "more")
}

func snapshotIndex(n *node) uint64 {
	index, _ := strconv.ParseUint(n.raft.Stats()["last_snapshot_index"], 10, 64)
	return index
}

func TestAfterClose(t *testing.T) {
	n := open(t, Config{ID: "n0", Bootstrap: true}, nil)
	receive(t, n.leads, "the lead")
	n.stop(t)
	for range 100 { // whatever a select picks
		if err := n.propose(createAccount("late")); api.KindOf(err) != api.Unavailable {
			t.Fatalf("a proposal after Close: %v", err)
		}
		if err := n.CheckRead(); api.KindOf(err) != api.Unavailable {
			t.Fatalf("a read after Close: %v", err)
		}
	}
	if err := n.Close(); err != nil {
		t.Errorf("a second Close: %v", err)
	}
}

// Proposals and reads that are under way when a node closes come back.
func TestCloseWhileBusy(t *testing.T) {
	n := open(t, Config{ID: "n0", Bootstrap: true}, nil)
	receive(t, n.leads, "the lead")
	var wg sync.WaitGroup
	started := make(chan struct{}, 64)
	for p := range 32 {
		wg.Go(func() {
			for i := 0; n.propose(createAccount(fmt.Sprintf("a%d-%d", p, i))) == nil; i++ {
				if i == 0 {
					started <- struct{}{}
				}
			}
		})
		wg.Go(func() {
			for i := 0; n.CheckRead() == nil; i++ {
				if i == 0 {
					started <- struct{}{}
				}
			}
		})
	}
	for range 64 {
		receive(t, started, "all to be busy")
	}
	n.stop(t)
	wg.Wait()
}

func TestProposeAll(t *testing.T) {
	n := open(t, Config{ID: "alone", Bootstrap: true}, nil)
	receive(t, n.leads, "lead")
	again := createAccount("acme")
	again.Id = "another request"
	answers, err := n.ProposeAll(t.Context(), []*musterpb.Command{createAccount("acme"), again, createAccount("zeta")})
	if err != nil || len(answers) != 3 {
		t.Fatalf("%v, %v", answers, err)
	}
	if state.ErrorOf(answers[0]) != nil || api.KindOf(state.ErrorOf(answers[1])) != api.Conflict || state.ErrorOf(answers[2]) != nil {
		t.Errorf("answered %v: want each command's own answer, in order", answers)
	}
	if answers, err := n.ProposeAll(t.Context(), nil); answers != nil || err != nil {
		t.Errorf("nothing was proposed and answered %v, %v", answers, err)
	}
	if _, err := n.ProposeAll(t.Context(), make([]*musterpb.Command, MaxTogether+1)); api.KindOf(err) != api.TooLarge {
		t.Errorf("too many commands: %v", err)
	}
	// Groups of several proposers keep together and apart.
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			group := make([]*musterpb.Command, i%7+1)
			for k := range group {
				group[k] = createAccount(fmt.Sprintf("group-%d-%d", i, k))
			}
			answers, err := n.ProposeAll(t.Context(), group)
			if err != nil {
				t.Error(err)
				return
			}
			for k, a := range answers {
				if want := group[k].GetCreateAccount().Account; a.Id != want {
					t.Errorf("answer %d of group %d is that of %q, want %q", k, i, a.Id, want)
				}
			}
		})
	}
	wg.Wait()
}

func TestProposeGivesUp(t *testing.T) {
	n := open(t, Config{ID: "n0", Bootstrap: true}, nil)
	receive(t, n.leads, "the lead")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	// Either it was answered before anybody looked at ctx, or the error says so.
	if _, err := n.Propose(ctx, createAccount("a")); err != nil && api.KindOf(err) != api.Unavailable {
		t.Error(err)
	}
}

// The lead is lost and won again while Run is busy with ending the first: it
// starts lead again, and nothing is read in between.
func TestLeadLostAndWonAgain(t *testing.T) {
	release := make(chan struct{})
	var deposed atomic.Int64
	a := open(t, Config{ID: "n0", Bootstrap: true}, func(ctx context.Context) {
		<-ctx.Done()
		deposed.Add(1)
		<-release
	})
	receive(t, a.leads, "n0 to lead")
	b := open(t, Config{ID: "n1"}, nil)
	if err := a.AddVoter(b.id, b.Address()); err != nil {
		t.Fatal(err)
	}
	a.create(t, "one")
	first := a.Term()
	if err := a.raft.LeadershipTransferToServer("n1", raft.ServerAddress(b.Address())).Error(); err != nil {
		t.Fatal(err)
	}
	receive(t, b.leads, "n1 to lead")
	b.create(t, "two")
	if err := b.raft.LeadershipTransferToServer("n0", raft.ServerAddress(a.Address())).Error(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "n0 to win again", func() bool { return a.raft.State() == raft.Leader && a.Term() > first })
	if err := a.CheckRead(); api.KindOf(err) != api.Unavailable {
		t.Errorf("a read while the old lead is not ended: %v", err)
	}
	// Even where Run has not heard of it, the old term's readiness counts no more.
	a.ready.Store(first)
	if err := a.CheckRead(); api.KindOf(err) != api.Unavailable {
		t.Errorf("a read under the readiness of another term: %v", err)
	}
	a.ready.Store(0)
	close(release)
	receive(t, a.leads, "lead to be called again")
	if !a.state.HasAccount("two") {
		t.Error("n0 leads without having applied what n1 acknowledged")
	}
	eventually(t, "n0 to be ready", func() bool { return a.CheckRead() == nil })
	if deposed.Load() != 1 {
		t.Errorf("lead ended %d times", deposed.Load())
	}
}

// Two nodes that lead in turns, again and again: whoever is ready has its lead
// running, and every change of the lead ends in one that works.
func TestManyChangesOfTheLead(t *testing.T) {
	n := trio(t, Snapshots{})
	leader := n[0]
	for i := range 10 {
		leader.create(t, fmt.Sprint("a", i))
		if err := leader.raft.LeadershipTransfer().Error(); err != nil {
			t.Logf("transfer %d: %v", i, err) // then the old one goes on
		}
		leader = leaderOf(t, n[:]...)
		for k := range i {
			if !leader.state.HasAccount(fmt.Sprint("a", k)) {
				t.Fatalf("%s is ready without account a%d", leader.id, k)
			}
		}
	}
}

func TestOpenErrors(t *testing.T) {
	logger := slog.New(slog.DiscardHandler)
	for name, cfg := range map[string]Config{
		"directory": {ID: "n0", Dir: "/dev/null/x", Listen: "127.0.0.1:0", Logger: logger},
		"listen":    {ID: "n0", Dir: t.TempDir(), Listen: "127.0.0.1:99999", Logger: logger},
		"any":       {ID: "n0", Dir: t.TempDir(), Listen: "0.0.0.0:0", Logger: logger}, // nobody could dial that
		"advertise": {ID: "n0", Dir: t.TempDir(), Listen: "127.0.0.1:0", Advertise: "nowhere", Logger: logger},
	} {
		if r, err := Open(cfg, state.New()); err == nil {
			t.Errorf("%s: opened", name)
			r.Close()
		}
	}
}

// BenchmarkPropose is the rate of one node with its log on this disk.
func BenchmarkPropose(b *testing.B) {
	for _, proposers := range []int{1, 64, 512} {
		b.Run(fmt.Sprintf("proposers=%d", proposers), func(b *testing.B) {
			n := open(b, Config{ID: "n0", Bootstrap: true, segmentBytes: wal.DefaultSegmentSize}, nil)
			receive(b, n.leads, "the lead")
			n.create(b, "acme")
			before := n.Applied()
			b.ResetTimer()
			var next atomic.Int64
			var wg sync.WaitGroup
			for range proposers {
				wg.Go(func() {
					for next.Add(1) <= int64(b.N) {
						cmd := &musterpb.Command{Body: &musterpb.Command_Deposit{Deposit: &musterpb.Deposit{Account: "acme", AmountMicroUsd: 1}}}
						if err := n.propose(cmd); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commands/s")
			b.ReportMetric(float64(b.N)/float64(n.Applied()-before), "commands/entry")
		})
	}
}
