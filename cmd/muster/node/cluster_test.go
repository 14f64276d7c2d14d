package node_test

import (
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/server"
	"github.com/musternet/muster/cmd/muster/node"
	"github.com/musternet/muster/container"
	"github.com/musternet/muster/scheduler"
	"github.com/musternet/muster/verify"
	"github.com/musternet/muster/worker"
)

// realWorker runs the worker package itself on a fake runtime.
func (l *lab) realWorker(account string, price api.MicroUSD, fake *container.Fake) *worker.Worker {
	l.t.Helper()
	account = l.account(account)
	w := worker.New(worker.Config{
		Key: newKey(l.t), Name: account, Dir: l.t.TempDir(), Schedulers: l.addresses(), APIKey: l.keys[account], PricePerHour: price,
		Runtimes: map[string]container.Runtime{"wasm": fake}, MilliCPUs: 64_000, MemoryBytes: 1 << 40, DiskBytes: 1 << 40, CacheBytes: 1 << 30,
		Logger: logger(l.t).With("worker", account),
	})
	ctx, cancel := context.WithCancel(context.WithoutCancel(l.t.Context()))
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	l.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			l.t.Errorf("worker %s ended with %v", account, err)
		}
	})
	return w
}

// answers plays the program: it answers each of the items that it is given.
func answers(spec container.Spec) (container.Result, error) {
	for value := range strings.SplitSeq(spec.Command[len(spec.Command)-1], ",") {
		dir := filepath.Join(spec.Outputs, value)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return container.Result{}, err
		}
		if err := os.WriteFile(filepath.Join(dir, "out.txt"), []byte("the answer to "+value), 0o644); err != nil {
			return container.Result{}, err
		}
	}
	return container.Result{}, nil
}

// What runs survives the leader: the workers find the next one, say what they
// run, and go on.
func TestLeaderFailover(t *testing.T) {
	t.Parallel()
	l := newLab(t, 3)
	release := make(chan struct{})
	var once sync.Once
	free := func() { once.Do(func() { close(release) }) }
	t.Cleanup(free)
	fake := func() *container.Fake {
		return &container.Fake{OnRun: func(ctx context.Context, spec container.Spec) (container.Result, error) {
			select {
			case <-release:
			case <-ctx.Done():
			}
			return answers(spec)
		}}
	}
	alice, bob := fake(), fake()
	l.realWorker("alice", 100_000, alice)
	l.realWorker("bob", 200_000, bob)
	eventually(t, "two workers", func() bool { return l.status().WorkersConnected == 2 })
	job := l.submit(func(s *musterpb.JobSpec) { s.Items.Count, s.Chunk = 12, 4 })
	running := func() (ids []string) {
		for _, a := range l.job(job).Attempts {
			if a.State == musterpb.AttemptState_ATTEMPT_STATE_RUNNING {
				ids = append(ids, a.Id)
			}
		}
		return ids
	}
	eventually(t, "three attempts to run", func() bool { return len(running()) == 3 })
	before := running()

	old := l.leader()
	old.stop(t)
	var next *labNode
	eventually(t, "another leader", func() bool { next = l.leader(); return next != old })
	eventually(t, "the workers to find it", func() bool { return l.status().WorkersConnected == 2 })
	began := time.Now()
	eventually(t, "a whole lease and more", func() bool { return time.Since(began) > quick.LeaseTTL*3/2 })
	if after := running(); !slices.Equal(after, before) {
		t.Errorf("before the leader stopped %v ran, now %v", before, after)
	}
	free()
	l.waitVerified(job)
	l.settled(job)
	if n := alice.Started() + bob.Started(); n != 6 { // three tasks and a check of each
		t.Errorf("%d runs", n)
	}
	old.start(t)
	l.waitVerified(l.submit(nil))
}

// The committee draws from everybody's reveals. Without one of them everything
// is checked, and who did not reveal leaves until it comes back.
func TestCommittee(t *testing.T) {
	t.Parallel()
	l := newLab(t, 3)
	members := func() (in, out []*musterpb.NodeStatus) {
		for _, n := range l.status().Nodes {
			if n.InCommittee {
				in = append(in, n)
			} else {
				out = append(out, n)
			}
		}
		return in, out
	}
	eventually(t, "a committee of three", func() bool { in, _ := members(); return len(in) == 3 })
	if r := l.status().Randomness; !strings.Contains(r, "a committee draws") {
		t.Error(r)
	}
	honestly := func() *container.Fake {
		return &container.Fake{OnRun: func(_ context.Context, spec container.Spec) (container.Result, error) { return answers(spec) }}
	}
	l.realWorker("bob", 200_000, honestly())
	alice := l.realWorker("alice", 100_000, honestly())
	eventually(t, "two workers", func() bool { return l.status().WorkersConnected == 2 })

	passed := func() uint64 {
		resp, err := l.admin.ListWorkers(t.Context(), connect.NewRequest(&musterpb.ListWorkersRequest{Worker: alice.ID()}))
		if err != nil {
			t.Fatal(err)
		}
		if r := resp.Msg.Workers[0].Records; len(r) > 0 {
			return r[0].Passed
		}
		return 0
	}
	for passed() < verify.ProvenAfter {
		l.waitVerified(l.submit(func(s *musterpb.JobSpec) { s.Items.Count, s.Chunk = 20, 1 }))
	}

	// checked is how many of a hundred items of alice's were drawn.
	checked := func() (items int) {
		for {
			job := l.submit(func(s *musterpb.JobSpec) { s.Items.Count, s.Chunk = 100, 100 })
			l.waitVerified(job)
			got := l.job(job)
			if got.Attempts[0].Worker != alice.ID() {
				continue
			}
			for _, c := range got.Checks {
				items += len(c.Items)
			}
			return items
		}
	}
	if n := checked(); n > 50 {
		t.Errorf("with all reveals %d of 100 items were checked; about 3 are expected of a proven owner", n)
	}
	if in, _ := members(); len(in) != 3 {
		t.Errorf("%d in the committee after draws with all reveals", len(in))
	}

	var follower *labNode
	leader := l.leader()
	for _, n := range l.nodes {
		if n != leader {
			follower = n
		}
	}
	follower.stop(t)
	if n := checked(); n != 100 {
		t.Errorf("without one reveal %d of 100 items were checked", n)
	}
	in, out := members()
	if len(in) != 2 || len(out) != 1 || out[0].Id != string(follower.info.ID) || !strings.Contains(out[0].Note, "no reveal for epoch") {
		t.Errorf("in the committee: %v; out: %v", in, out)
	}
	if n := checked(); n > 50 {
		t.Errorf("with the committee of two %d of 100 items were checked", n)
	}
	follower.start(t)
	eventually(t, "the node to enter the committee again", func() bool { in, _ := members(); return len(in) == 3 })
	if n := checked(); n > 50 {
		t.Errorf("with all three again %d of 100 items were checked", n)
	}
}

// A key that a follower has not heard of yet is no reason to refuse it.
func TestNewKeysWorkEverywhere(t *testing.T) {
	t.Parallel()
	l := newLab(t, 3)
	leader := l.leader()
	for i := range 20 {
		key := l.keys[l.account(fmt.Sprintf("account-%d", i))]
		for _, n := range l.nodes {
			if n == leader {
				continue
			}
			c, err := client.New(client.Config{Addresses: []string{n.info.Address}, Key: key})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.GetAccount(t.Context(), connect.NewRequest(&musterpb.GetAccountRequest{})); err != nil {
				t.Errorf("the new key of account %d at a follower: %v", i, err)
			}
			stale := connect.NewRequest(&musterpb.GetAccountRequest{})
			stale.Header().Set("Muster-Read", "stale")
			if _, err := c.GetAccount(t.Context(), stale); err != nil {
				t.Errorf("a stale read: %v", err)
			}
		}
	}
	for _, n := range l.nodes { // the answer is final wherever it is asked
		c, err := client.New(client.Config{Addresses: []string{n.info.Address}, Key: "muster_admin_" + strings.Repeat("A", 26)})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		_, err = c.GetAccount(t.Context(), connect.NewRequest(&musterpb.GetAccountRequest{}))
		if api.KindOf(err) != api.Unauthenticated || time.Since(began) > 10*time.Second {
			t.Errorf("a made-up key: %v after %s", err, time.Since(began))
		}
	}
}

// Two schedulers with one directory, and one that joins without a key.
func TestSchedulerRefusals(t *testing.T) {
	t.Parallel()
	l := newLab(t, 1)
	twin := l.nodes[0].config
	twin.Listen, twin.RaftListen = "127.0.0.1:0", "127.0.0.1:0"
	if err := twin.Run(t.Context()); api.KindOf(err) != api.Conflict {
		t.Errorf("a second scheduler in one directory: %v", err)
	}
	for key, kind := range map[string]api.Kind{"": api.Invalid, "muster_admin_none": api.Unauthenticated, l.keys[l.account("customer")]: api.Denied} {
		joining := node.Scheduler{
			Dir: filepath.Join(t.TempDir(), "node"), Listen: "127.0.0.1:0", RaftListen: "127.0.0.1:0", Join: l.addresses(), Key: key, Logger: logger(t),
		}
		if err := joining.Run(t.Context()); api.KindOf(err) != kind {
			t.Errorf("joining with key %.12q: %v; want %v", key, err, kind)
		}
	}
}

// A scheduler proposes its own tip and reveals, and nothing else: not another's,
// not twice, and no other command.
func TestPeerProposals(t *testing.T) {
	t.Parallel()
	l := newLab(t, 2)
	eventually(t, "a committee of two", func() bool { return strings.Contains(l.status().Randomness, "a committee draws") })
	leader := l.leader()
	node := l.nodes[0]
	if node == leader {
		node = l.nodes[1]
	}
	text, err := os.ReadFile(filepath.Join(node.config.Dir, "node.key"))
	if err != nil {
		t.Fatal(err)
	}
	seed, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	key := ed25519.NewKeyFromSeed(seed)
	id, other := string(node.info.ID), string(leader.info.ID)
	var secret []byte
	eventually(t, "the chain to be in use", func() bool {
		secret, err = os.ReadFile(filepath.Join(node.config.Dir, "chain"))
		return err == nil
	})
	inUse := &musterpb.Node{Tip: verify.NewChain(secret).Tip()}
	tip := func(of string) *musterpb.Command {
		return &musterpb.Command{Body: &musterpb.Command_RegisterTip{RegisterTip: &musterpb.RegisterTip{Node: of, Tip: make([]byte, 32)}}}
	}
	for _, test := range []struct {
		name    string
		claims  string
		command *musterpb.Command
		key     ed25519.PrivateKey
		want    string
	}{
		{"another's tip", id, tip(other), key, "may propose its own tip and reveals only"},
		{"under another's name", other, tip(other), key, "is not signed by scheduler " + other},
		{"by a stranger", "sch-0000000000000000", tip("sch-0000000000000000"), newKey(t), "is not part of this cluster"},
		{"a deposit", id, &musterpb.Command{Body: &musterpb.Command_Deposit{Deposit: &musterpb.Deposit{Account: "customer", AmountMicroUsd: 1}}}, key, "may propose its own tip and reveals only"},
		{"nothing", id, nil, key, "may propose its own tip and reveals only"},
		// Right when the node had no chain yet; by now it is an old one.
		{"an earlier proposal again", id, tip(id), key, "is not signed by scheduler " + id},
	} {
		at := inUse
		if test.name == "an earlier proposal again" {
			at = nil
		}
		r := &musterpb.ProposeRequest{Node: test.claims, Command: test.command}
		signed, err := scheduler.ProposalText(r, at)
		if err != nil {
			t.Fatal(err)
		}
		r.Signature = ed25519.Sign(test.key, signed)
		for _, n := range l.nodes { // a follower passes it on
			_, err := server.NewPeers(test.key).Propose(t.Context(), n.info.Address, r)
			if api.KindOf(err) != api.Denied || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s: %v", test.name, err)
			}
		}
	}
	if r := l.status().Randomness; !strings.Contains(r, "a committee draws") {
		t.Errorf("afterwards: %s", r)
	}
}
