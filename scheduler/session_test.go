package scheduler

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/outputs"
	"github.com/musternet/muster/scheduler/replica"
	"github.com/musternet/muster/scheduler/state"
	"github.com/musternet/muster/verify"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 30 * time.Second

// slowStore is a store that holds back Open while it is told to.
type slowStore struct {
	blob.Memory
	mu    sync.Mutex
	gate  chan struct{} // guarded by mu; nil: open
	fail  error         // guarded by mu
	waits chan struct{} // one for every Open that was held back
}

func (s *slowStore) Open(ctx context.Context, digest api.Digest) (blob.Reader, error) {
	s.mu.Lock()
	gate, fail := s.gate, s.fail
	s.mu.Unlock()
	if fail != nil {
		return nil, fail
	}
	if gate != nil {
		s.waits <- struct{}{}
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, api.Errorf(api.Unavailable, "gave up: %w", ctx.Err())
		}
	}
	return s.Memory.Open(ctx, digest)
}

func (s *slowStore) set(gate chan struct{}, fail error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gate, s.fail = gate, fail
}

// rig is a scheduler alone in its cluster, without its API.
type rig struct {
	t     *testing.T
	st    *state.State
	sched *Scheduler
	blobs *slowStore
	stop  func() // and wait

	mu   sync.Mutex
	logs bytes.Buffer // guarded by mu; warnings
}

// Write takes what is logged.
func (r *rig) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.logs.Write(p)
}

// warned reports whether a text was logged as a warning.
func (r *rig) warned(text string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Contains(r.logs.String(), text)
}

func newRig(t *testing.T, timing Timing) *rig {
	t.Helper()
	return newRigWith(t, timing, func(*slowStore) {})
}

// newRigWith prepares the blob store before the scheduler uses it.
func newRigWith(t *testing.T, timing Timing, prepare func(*slowStore)) *rig {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, st: state.New(), blobs: &slowStore{waits: make(chan struct{}, 1000)}}
	prepare(r.blobs)
	quiet := slog.New(slog.NewTextHandler(r, &slog.HandlerOptions{Level: slog.LevelWarn}))
	dir := t.TempDir()
	rep, err := replica.Open(replica.Config{
		ID: api.NodeIDOf(key.Public().(ed25519.PublicKey)), Dir: filepath.Join(dir, "raft"), Listen: "127.0.0.1:0", Bootstrap: true,
		ElectionTimeout: 100 * time.Millisecond, Logger: quiet,
	}, r.st)
	if err != nil {
		t.Fatal(err)
	}
	r.sched = New(Config{Key: key, Dir: dir, State: r.st, Replica: rep, Blobs: r.blobs, Timing: timing, Logger: quiet})
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- r.sched.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err := errors.Join(err, rep.Close()); err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Error("the scheduler does not stop")
		}
	})
	t.Cleanup(r.stop)
	r.eventually("the lead", func() bool { return r.sched.CheckRead() == nil })
	for _, account := range []string{"acme", "alice", "bob"} {
		r.propose(&musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: account}}})
	}
	r.propose(&musterpb.Command{Body: &musterpb.Command_Deposit{Deposit: &musterpb.Deposit{Account: "acme", AmountMicroUsd: 1e12}}})
	return r
}

func (r *rig) eventually(what string, condition func() bool) {
	r.t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-deadline:
			r.t.Fatalf("waited in vain for %s", what)
		}
	}
}

func (r *rig) propose(cmd *musterpb.Command) string {
	r.t.Helper()
	id, err := r.sched.Propose(r.t.Context(), cmd)
	if err != nil {
		r.t.Fatal(err)
	}
	return id
}

// submit submits a job of so many tasks with one item each.
func (r *rig) submit(tasks int) (job string) { return r.submitFor("acme", tasks) }

func (r *rig) submitFor(account string, tasks int) (job string) {
	return r.propose(&musterpb.Command{Body: &musterpb.Command_SubmitJob{SubmitJob: &musterpb.SubmitJob{
		Job: newID("job-"), Account: account, PermutationKey: make([]byte, 32), Spec: &musterpb.JobSpec{
			Name:  "job",
			Image: &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_WASM, Digest: string(api.DigestOf([]byte("image"))), SizeBytes: 5, Name: "p.wasm"},
			Items: &musterpb.Items{Count: uint64(tasks)}, Chunk: 1, TimeoutMs: 60_000, Retries: 10, MaxPriceMicroUsdPerHour: 1e6, BudgetMicroUsd: 1e9,
			Resources: &musterpb.Resources{MilliCpus: 100, MemoryBytes: 32 << 20, DiskBytes: 1 << 20}, Verify: &musterpb.Verify{Comparator: "exact"},
		},
	}}})
}

// pipe is a worker's stream without a network.
type pipe struct {
	*rig
	key    ed25519.PrivateKey
	id     string
	up     chan *musterpb.WorkerMessage
	down   chan *musterpb.SchedulerMessage
	broken chan struct{}
	hangUp func() // and wait for Serve
	served chan error
}

var _ Stream = (*pipe)(nil)

func (p *pipe) Send(m *musterpb.SchedulerMessage) error {
	for _, one := range split(m) {
		select {
		case p.down <- one:
		case <-p.broken:
			return io.ErrClosedPipe
		}
	}
	return nil
}

// split makes messages of one order each.
func split(m *musterpb.SchedulerMessage) []*musterpb.SchedulerMessage {
	o := m.GetOrders()
	if o == nil {
		return []*musterpb.SchedulerMessage{m}
	}
	var list []*musterpb.SchedulerMessage
	one := func(o *musterpb.Orders) {
		list = append(list, &musterpb.SchedulerMessage{Message: &musterpb.SchedulerMessage_Orders{Orders: o}})
	}
	for _, a := range o.Assign {
		if a.Like > 0 {
			like := o.Assign[a.Like-1].CloneVT()
			like.Attempt, like.Indexes, like.Devices, like.PriceMicroUsdPerHour = a.Attempt, a.Indexes, a.Devices, a.PriceMicroUsdPerHour
			a = like
		}
		one(&musterpb.Orders{Assign: []*musterpb.Assignment{a}})
	}
	for _, s := range o.Stop {
		one(&musterpb.Orders{Stop: []*musterpb.Stop{s}})
	}
	for _, oc := range o.Outcomes {
		one(&musterpb.Orders{Outcomes: []*musterpb.Outcome{oc}})
	}
	return list
}

// assignmentIn and outcomeIn are what a message of one order holds, or nil.
func assignmentIn(m *musterpb.SchedulerMessage) *musterpb.Assignment {
	if list := m.GetOrders().GetAssign(); len(list) > 0 {
		return list[0]
	}
	return nil
}

func outcomeIn(m *musterpb.SchedulerMessage) *musterpb.Outcome {
	if list := m.GetOrders().GetOutcomes(); len(list) > 0 {
		return list[0]
	}
	return nil
}

func reported(r *musterpb.Reports) *musterpb.WorkerMessage {
	return &musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Reports{Reports: r}}
}

func (p *pipe) Receive() (*musterpb.WorkerMessage, error) {
	select {
	case m := <-p.up:
		return m, nil
	case <-p.broken:
		return nil, io.EOF
	}
}

// connect runs a session of a worker of owner, who runs what is named.
func (r *rig) connect(owner string, key ed25519.PrivateKey, running ...string) *pipe {
	r.t.Helper()
	p := &pipe{
		rig: r, key: key, id: string(api.WorkerIDOf(key.Public().(ed25519.PublicKey))), up: make(chan *musterpb.WorkerMessage),
		down: make(chan *musterpb.SchedulerMessage, 1000), broken: make(chan struct{}), served: make(chan error, 1),
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.t.Context()))
	go func() { p.served <- r.sched.Serve(ctx, owner, p) }()
	p.hangUp = sync.OnceFunc(func() {
		cancel()
		close(p.broken)
		<-p.served
	})
	r.t.Cleanup(p.hangUp)
	p.say(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Hello{Hello: &musterpb.WorkerHello{
		PublicKey: key.Public().(ed25519.PublicKey), Name: owner, PriceMicroUsdPerHour: 1000,
		Capacity: &musterpb.Capacity{MilliCpus: 64_000, MemoryBytes: 1 << 40, DiskBytes: 1 << 40, Runtimes: []string{"wasm"}, Platform: "linux/amd64"},
	}}})
	nonce := p.next("challenge").GetChallenge().GetNonce()
	p.say(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Proof{Proof: &musterpb.WorkerProof{Signature: ed25519.Sign(key, api.ChallengeText(nonce)), Running: running}}})
	if m := p.next("welcome"); m.GetWelcome() == nil {
		r.t.Fatalf("the first answer is %v", m)
	}
	return p
}

func (p *pipe) say(m *musterpb.WorkerMessage) {
	p.t.Helper()
	select {
	case p.up <- m:
	case <-time.After(patience):
		p.t.Fatal("the scheduler does not read")
	}
}

func (p *pipe) next(what string) *musterpb.SchedulerMessage {
	p.t.Helper()
	select {
	case m := <-p.down:
		return m
	case err := <-p.served:
		p.served <- err
		p.t.Fatalf("the session ended before the %s: %v", what, err)
	case <-time.After(patience):
		p.t.Fatalf("no %s came", what)
	}
	return nil
}

func (p *pipe) assigned() *musterpb.Assignment {
	p.t.Helper()
	for {
		if a := assignmentIn(p.next("assignment")); a != nil {
			return a
		}
	}
}

func (p *pipe) outcome(attempt string) *musterpb.Outcome {
	p.t.Helper()
	for {
		if o := outcomeIn(p.next("outcome")); o.GetAttempt() == attempt {
			return o
		}
	}
}

func (p *pipe) start(a *musterpb.Assignment) {
	p.t.Helper()
	p.say(reported(&musterpb.Reports{Started: []string{a.Attempt}}))
}

func (p *pipe) offer(c *musterpb.Commit) {
	p.t.Helper()
	p.say(reported(&musterpb.Reports{Commits: []*musterpb.Commit{c}}))
}

// result makes, stores and signs an honest result.
func (p *pipe) result(a *musterpb.Assignment) *musterpb.Commit {
	p.t.Helper()
	dir := p.t.TempDir()
	var items []outputs.Item
	for _, index := range a.Indexes {
		items = append(items, outputs.Item{Index: index, Value: index})
		at := filepath.Join(dir, "out", strconv.FormatUint(index, 10))
		if err := errors.Join(os.MkdirAll(at, 0o755), os.WriteFile(filepath.Join(at, "x"), fmt.Append(nil, index), 0o644)); err != nil {
			p.t.Fatal(err)
		}
	}
	archive := filepath.Join(dir, "archive")
	entries, summary, err := outputs.Write(p.t.Context(), filepath.Join(dir, "out"), a.Outputs, items, archive, outputs.Limits{Bytes: 1 << 20, Files: 10})
	if err != nil {
		p.t.Fatal(err)
	}
	for _, e := range entries {
		e.InputDigest, e.ParametersDigest = verify.InputDigest(a.Inputs), verify.ParametersDigest(a.Image.Digest, a.Command, a.Env)
	}
	m := &musterpb.Manifest{Attempt: a.Attempt, Items: entries}
	data, err := m.MarshalVT()
	if err != nil {
		p.t.Fatal(err)
	}
	if _, _, err := blob.PutFile(p.t.Context(), p.blobs, archive); err != nil {
		p.t.Fatal(err)
	}
	if _, err := p.blobs.Put(p.t.Context(), api.DigestOf(data), bytes.NewReader(data), blob.NoLimit); err != nil {
		p.t.Fatal(err)
	}
	c := &musterpb.Commit{
		Attempt: a.Attempt, Root: verify.Root(m), ManifestDigest: string(api.DigestOf(data)), ArchiveDigest: string(summary.Digest),
		ArchiveBytes: summary.ArchiveBytes, OutputBytes: summary.OutputBytes,
	}
	verify.SignCommits(p.key, c)
	return c
}

func newKey(t *testing.T) ed25519.PrivateKey {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (r *rig) state(attempt string) musterpb.AttemptState {
	return r.st.Attempt(attempt).State
}

const (
	running   = musterpb.AttemptState_ATTEMPT_STATE_RUNNING
	committed = musterpb.AttemptState_ATTEMPT_STATE_COMMITTED
)

// A store that answers late holds up the examinations, and nothing else.
func TestSlowStore(t *testing.T) {
	r := newRig(t, Timing{BatchInterval: time.Hour, LeaseTTL: time.Minute})
	p := r.connect("alice", newKey(t))
	r.submit(maxExaminers + 4)
	var work []*musterpb.Assignment
	for range maxExaminers + 4 {
		work = append(work, p.assigned())
	}
	gate := make(chan struct{})
	r.blobs.set(gate, nil)
	commits := map[string]*musterpb.Commit{}
	for _, a := range work[:maxExaminers+2] {
		p.start(a)
		commits[a.Attempt] = p.result(a)
		for range 3 { // repeats, while the first is examined or waits
			p.offer(commits[a.Attempt])
		}
	}
	for range maxAccountExaminers { // all are of one account
		<-r.blobs.waits
	}
	for _, a := range work[maxExaminers+2:] {
		p.start(a)
	}
	r.eventually("the starts", func() bool {
		return !slices.ContainsFunc(work, func(a *musterpb.Assignment) bool { return r.state(a.Attempt) != running })
	})
	last := work[len(work)-1].Attempt
	p.say(reported(&musterpb.Reports{Failed: []*musterpb.AttemptFailed{&musterpb.AttemptFailed{Attempt: last, Reason: "no", Blame: musterpb.Blame_BLAME_WORKER}}}))
	p.outcome(last)
	r.blobs.set(nil, nil)
	close(gate)
	for range len(commits) {
		o := outcomeIn(p.next("outcome"))
		if !o.GetAccepted() || commits[o.GetAttempt()] == nil {
			t.Errorf("%v", o)
		}
		delete(commits, o.GetAttempt())
	}
	if len(commits) > 0 {
		t.Errorf("no answer for %v", commits)
	}
}

// While blobs are out of reach nothing is decided; then it goes on.
func TestStoreOutOfReach(t *testing.T) {
	r := newRig(t, Timing{BatchInterval: time.Hour, LeaseTTL: time.Minute})
	p := r.connect("alice", newKey(t))
	r.submit(1)
	a := p.assigned()
	c := p.result(a)
	r.blobs.set(nil, api.Errorf(api.Unavailable, "the store is away"))
	p.start(a)
	p.offer(c)
	leader, err := r.sched.leading()
	if err != nil {
		t.Fatal(err)
	}
	r.eventually("the examination", func() bool { return r.state(a.Attempt) == running && !leader.examined(a.Attempt) })
	if got := r.st.Attempt(a.Attempt); got.State != running {
		t.Fatalf("the attempt is %v: %s", got.State, got.Reason)
	}
	r.blobs.set(nil, nil)
	r.eventually("the result to be taken", func() bool {
		p.offer(c)
		return r.state(a.Attempt) == committed
	})
	if o := p.outcome(a.Attempt); !o.Accepted {
		t.Error(o)
	}
}

// The answer to a result that is examined while its worker dials again reaches
// the new session.
func TestReconnectDuringExamination(t *testing.T) {
	r := newRig(t, Timing{BatchInterval: time.Hour, LeaseTTL: time.Minute})
	key := newKey(t)
	p := r.connect("alice", key)
	r.submit(1)
	a := p.assigned()
	c := p.result(a)
	p.start(a)
	r.eventually("the start", func() bool { return r.state(a.Attempt) == running })
	gate := make(chan struct{})
	r.blobs.set(gate, nil)
	p.offer(c)
	<-r.blobs.waits
	p.hangUp()
	again := r.connect("alice", key, a.Attempt)
	r.blobs.set(nil, nil)
	close(gate)
	if o := again.outcome(a.Attempt); !o.Accepted {
		t.Error(o)
	}
	if r.state(a.Attempt) != committed {
		t.Errorf("the attempt is %v", r.state(a.Attempt))
	}
}

// The end of the leadership does not wait for a store, nor for a worker.
func TestStopDuringExamination(t *testing.T) {
	r := newRig(t, Timing{LeaseTTL: time.Minute})
	p := r.connect("alice", newKey(t))
	r.submit(1)
	a := p.assigned()
	c := p.result(a)
	r.blobs.set(make(chan struct{}), nil)
	p.offer(c)
	<-r.blobs.waits
	began := time.Now()
	r.stop()
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("stopping took %s", took)
	}
	if err := <-p.served; api.KindOf(err) != api.Unavailable {
		t.Errorf("the session ended with %v", err)
	}
	p.served <- nil
	if s := r.state(a.Attempt); s != running {
		t.Errorf("the attempt is %v: giving an examination up decides nothing", s)
	}
	if err := r.sched.Serve(t.Context(), "alice", p); api.KindOf(err) != api.Unavailable {
		t.Errorf("a session without a leader: %v", err)
	}
}

// A worker that does not read loses its session, and the scheduler no memory.
func TestWorkerThatDoesNotRead(t *testing.T) {
	r := newRig(t, Timing{LeaseTTL: time.Minute})
	p := r.connect("alice", newKey(t))
	nothing := reported(&musterpb.Reports{Commits: []*musterpb.Commit{{Attempt: "att-none"}}})
	r.eventually("the session to be given up", func() bool { // an answer each, and nobody reads
		for range 1000 {
			select {
			case p.up <- nothing:
			case <-time.After(10 * time.Millisecond): // it does not listen any more
				return len(r.sched.Connected()) == 0
			}
		}
		return false
	})
	r.submit(1)
	bob := r.connect("bob", newKey(t))
	if a := bob.assigned(); r.st.Attempt(a.Attempt).Worker != bob.id {
		t.Errorf("placed on %s", r.st.Attempt(a.Attempt).Worker)
	}
	for {
		select {
		case <-p.down:
			continue
		case err := <-p.served:
			if api.KindOf(err) != api.Unavailable {
				t.Errorf("the session ended with %v", err)
			}
		}
		break
	}
	p.served <- nil
}

// What a heartbeat may leave in the scheduler's memory is bounded.
func TestHeartbeatBounds(t *testing.T) {
	r := newRig(t, Timing{LeaseTTL: time.Minute})
	p := r.connect("alice", newKey(t))
	r.submit(1)
	a := p.assigned()
	digest := func(i int) string {
		sum := sha256.Sum256(fmt.Append(nil, i))
		return string(api.DigestFromSum(sum[:]))
	}
	for i := range 3 {
		h := &musterpb.Heartbeat{Running: []string{a.Attempt, "att-unknown"}, Cached: []string{string(make([]byte, 1<<20))}}
		for n := range maxCached {
			h.Cached = append(h.Cached, digest(i*maxCached+n))
		}
		h.Logs = []*musterpb.LogTail{{Attempt: a.Attempt, Data: bytes.Repeat([]byte{byte('a' + i)}, 1<<20)}, {Attempt: "att-unknown", Data: []byte("x")}}
		p.say(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Heartbeat{Heartbeat: h}})
	}
	r.eventually("the log", func() bool { return bytes.HasPrefix(r.sched.LogTail(a.Attempt), []byte("ccc")) })
	if n := len(r.sched.LogTail(a.Attempt)); n != maxLogTail {
		t.Errorf("a log of %d bytes is kept", n)
	}
	leader, err := r.sched.leading()
	if err != nil {
		t.Fatal(err)
	}
	s := leader.session(p.id)
	r.eventually("the digests", func() bool { return s.cached(digest(0)) })
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.digests) != maxCached {
		t.Errorf("%d digests are kept", len(s.digests))
	}
	for d := range s.digests {
		if len(d) > 100 {
			t.Errorf("a digest of %d bytes is kept", len(d))
		}
	}
}

func TestClip(t *testing.T) {
	for in, want := range map[string]string{"short": "short", "ääää": "ää…", "a\xffb": "a�b", "1234567": "12345…"} {
		if got := clip(in, 5); got != want {
			t.Errorf("clip(%q) = %q; want %q", in, got, want)
		}
	}
}

// A worker that keeps its lease and never delivers loses the attempt all the
// same, and so does one that says nothing of the start.
func TestOverdueAttemptsEnd(t *testing.T) {
	r := newRig(t, Timing{BatchInterval: time.Hour, LeaseTTL: time.Minute, TransferLimit: 300 * time.Millisecond})
	p := r.connect("alice", newKey(t))
	r.submit(1)
	a := p.assigned()
	r.eventually("the end", func() bool { return r.state(a.Attempt) == musterpb.AttemptState_ATTEMPT_STATE_FAILED })
	if got := r.st.Attempt(a.Attempt); got.Blame != musterpb.Blame_BLAME_WORKER || !strings.Contains(got.Reason, "neither delivered nor gave up") {
		t.Errorf("blame %v: %s", got.Blame, got.Reason)
	}
}

// What is paid is the time from when the start was heard of to when the result
// was, however long either waits to be written down.
func TestBilledTime(t *testing.T) {
	r := newRig(t, Timing{BatchInterval: time.Hour, LeaseTTL: time.Minute})
	p := r.connect("alice", newKey(t))
	r.submit(2)
	first, second := p.assigned(), p.assigned()
	p.start(first)
	r.eventually("the start", func() bool { return r.state(first.Attempt) == running })
	gate := make(chan struct{})
	c := p.result(first)
	r.blobs.set(gate, nil)
	before := time.Now().UnixMilli()
	p.offer(c)
	<-r.blobs.waits
	received := time.Now().UnixMilli()
	r.eventually("time to pass", func() bool { return time.Now().UnixMilli() > received+200 })
	r.blobs.set(nil, nil)
	close(gate)
	p.outcome(first.Attempt)
	if at := r.st.Attempt(first.Attempt).CommittedUnixMs; at < before-1 || at > received+100 {
		t.Errorf("committed at %d; it was offered between %d and %d", at, before, received)
	}
	// Without a start, nobody saw any time pass.
	p.offer(p.result(second))
	p.outcome(second.Attempt)
	if got := r.st.Attempt(second.Attempt); got.State != committed || got.StartedUnixMs == 0 || got.CommittedUnixMs-got.StartedUnixMs > 100 {
		t.Errorf("%v: started %d, committed %d", got.State, got.StartedUnixMs, got.CommittedUnixMs)
	}
}
