package node_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/outputs"
	"github.com/musternet/muster/cmd/muster/node"
	"github.com/musternet/muster/scheduler"
	"github.com/musternet/muster/verify"
)

// quick is short enough for a test to wait for, and long enough for a busy
// machine under the race detector.
var quick = scheduler.Timing{
	LeaseTTL: 2 * time.Second, ReconnectGrace: 700 * time.Millisecond, RevealTimeout: time.Second,
	BatchInterval: 20 * time.Millisecond, DisputePatience: 5 * time.Second, Handshake: time.Second,
	SealAfter: 100 * time.Millisecond, SegmentGrace: time.Second, // so that tests ask about sealed jobs, too
}

const patience = 60 * time.Second

// lab is a cluster in this process, with accounts whose keys the test knows.
type lab struct {
	t     *testing.T
	nodes []*labNode
	admin *client.Client
	http  *http.Client
	image *musterpb.Image

	mu      sync.Mutex
	keys    map[string]string         // guarded by mu; by account
	clients map[string]*client.Client // guarded by mu; by account
}

// labNode is one scheduler of a lab.
type labNode struct {
	config node.Scheduler
	info   node.Info
	cancel context.CancelFunc
	done   chan error
}

func newLab(t *testing.T, schedulers int) *lab {
	t.Helper()
	l := &lab{t: t, http: &http.Client{Transport: client.NewTransport()}, keys: map[string]string{}, clients: map[string]*client.Client{}}
	t.Cleanup(l.http.CloseIdleConnections)
	for i := range schedulers {
		n := &labNode{config: node.Scheduler{
			Dir: filepath.Join(t.TempDir(), "node"), Listen: "127.0.0.1:0", RaftListen: "127.0.0.1:0",
			ElectionTimeout: 500 * time.Millisecond, Timing: quick, Logger: logger(t).With("scheduler", i+1),
		}}
		if i > 0 {
			n.config.Join, n.config.Key = []string{l.nodes[0].info.Address}, l.keys[node.AdminAccount]
		}
		l.nodes = append(l.nodes, n)
		t.Cleanup(func() { n.stop(t) })
		n.start(t)
		if i == 0 {
			l.keys[node.AdminAccount] = n.info.AdminKey
		}
	}
	l.admin = l.client(node.AdminAccount)
	l.fix()
	deposit := &musterpb.DepositRequest{Id: client.NewID(), Account: l.account("customer"), AmountMicroUsd: int64(10_000 * api.Dollars)}
	if _, err := l.admin.Deposit(t.Context(), connect.NewRequest(deposit)); err != nil {
		t.Fatal(err)
	}
	module := []byte("\x00asm\x01\x00\x00\x00")
	l.image = &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_WASM, Digest: string(l.put("customer", module)), SizeBytes: int64(len(module)), Name: "program.wasm"}
	return l
}

// fix makes the nodes keep the addresses that they got over a restart.
func (l *lab) fix() {
	status := l.status()
	for _, n := range l.nodes {
		for _, s := range status.Nodes {
			if s.Id == string(n.info.ID) {
				n.config.Listen, n.config.RaftListen = s.ApiAddress, s.RaftAddress
			}
		}
	}
}

func (n *labNode) start(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ready := make(chan node.Info, 1)
	n.config.Ready = func(i node.Info) { ready <- i }
	n.cancel, n.done = cancel, make(chan error, 1)
	go func() { n.done <- n.config.Run(ctx) }()
	select {
	case n.info = <-ready:
	case err := <-n.done:
		n.done <- err
		t.Fatalf("a scheduler ended: %v", err)
	case <-time.After(patience):
		t.Fatal("a scheduler is not ready")
	}
}

func (n *labNode) stop(t *testing.T) {
	n.cancel()
	select {
	case err := <-n.done:
		if err != nil {
			t.Errorf("a scheduler ended with %v", err)
		}
		n.done <- nil
	case <-time.After(patience):
		t.Error("a scheduler does not stop")
	}
}

func (l *lab) addresses() []string {
	var list []string
	for _, n := range l.nodes {
		list = append(list, n.info.Address)
	}
	return list
}

// leader is the node that leads.
func (l *lab) leader() *labNode {
	var found *labNode
	eventually(l.t, "a leader", func() bool {
		status := l.status()
		for _, n := range l.nodes {
			if status.Leader == string(n.info.ID) {
				found = n
			}
		}
		return found != nil
	})
	return found
}

// account is the name of an account, which is made if need be.
func (l *lab) account(name string) string {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.keys[name] == "" {
		resp, err := l.admin.CreateAccount(l.t.Context(), connect.NewRequest(&musterpb.CreateAccountRequest{Account: name}))
		if err != nil {
			l.t.Fatal(err)
		}
		l.keys[name] = resp.Msg.Key
	}
	return name
}

func (l *lab) client(account string) *client.Client {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.clients[account]; c != nil {
		return c
	}
	c, err := client.New(client.Config{Addresses: l.addresses(), Key: l.keys[account], Patience: patience})
	if err != nil {
		l.t.Fatal(err)
	}
	l.clients[account] = c
	return c
}

func (l *lab) put(account string, data []byte) api.Digest {
	l.t.Helper()
	digest := api.DigestOf(data)
	if _, err := l.client(account).Blobs().Put(l.t.Context(), digest, bytes.NewReader(data), int64(len(data))); err != nil {
		l.t.Fatal(err)
	}
	return digest
}

func (l *lab) status() *musterpb.ClusterStatusResponse {
	l.t.Helper()
	resp, err := l.client(node.AdminAccount).ClusterStatus(l.t.Context(), connect.NewRequest(&musterpb.ClusterStatusRequest{}))
	if err != nil {
		l.t.Fatal(err)
	}
	return resp.Msg
}

// submit submits a job of the customer's; change may adapt the specification.
func (l *lab) submit(change func(*musterpb.JobSpec)) string {
	l.t.Helper()
	spec := &musterpb.JobSpec{
		Name: "job", Image: l.image, Command: []string{"program", "{items}"}, Items: &musterpb.Items{Count: 4}, Chunk: 4,
		Resources: &musterpb.Resources{MilliCpus: 100, MemoryBytes: 32 << 20, DiskBytes: 1 << 20}, TimeoutMs: 600_000, Retries: 50,
		MaxPriceMicroUsdPerHour: int64(api.Dollars), BudgetMicroUsd: int64(100 * api.Dollars),
		Verify: &musterpb.Verify{Comparator: "exact", RatePpm: 30_000},
	}
	if change != nil {
		change(spec)
	}
	resp, err := l.client("customer").SubmitJob(l.t.Context(), connect.NewRequest(&musterpb.SubmitJobRequest{Id: client.NewID(), Spec: spec}))
	if err != nil {
		l.t.Fatal(err)
	}
	return resp.Msg.Job
}

func (l *lab) job(id string) *musterpb.GetJobResponse {
	l.t.Helper()
	resp, err := l.client("customer").GetJob(l.t.Context(), connect.NewRequest(&musterpb.GetJobRequest{Job: id, Detail: true}))
	if err != nil {
		l.t.Fatal(err)
	}
	return resp.Msg
}

func (l *lab) attempt(job, id string) *musterpb.Attempt {
	l.t.Helper()
	for _, a := range l.job(job).Attempts {
		if a.Id == id {
			return a
		}
	}
	l.t.Fatalf("job %s has no attempt %s", job, id)
	return nil
}

func (l *lab) cancel(job string) {
	l.t.Helper()
	if _, err := l.client("customer").CancelJob(l.t.Context(), connect.NewRequest(&musterpb.CancelJobRequest{Job: job})); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) waitVerified(job string) {
	l.t.Helper()
	eventually(l.t, "job "+job+" to be verified", func() bool {
		j := l.job(job).Job
		if j.State == musterpb.JobState_JOB_STATE_FAILED {
			l.t.Fatalf("job %s failed: %s", job, j.Reason)
		}
		return j.State == musterpb.JobState_JOB_STATE_VERIFIED
	})
}

// settled checks that the book is balanced and that nothing is held for the
// attempts of a job.
func (l *lab) settled(job string) {
	l.t.Helper()
	if sum := l.status().LedgerSumMicroUsd; sum != 0 {
		l.t.Errorf("the sum over all accounts is %d", sum)
	}
	attempts := map[string]bool{}
	for _, a := range l.job(job).Attempts {
		attempts[a.Id] = true
	}
	held := map[uint64]string{}
	for after, more := uint64(0), true; more; {
		resp, err := l.admin.ListTransfers(l.t.Context(), connect.NewRequest(&musterpb.ListTransfersRequest{All: true, After: after}))
		if err != nil {
			l.t.Fatal(err)
		}
		for _, t := range resp.Msg.Transfers {
			after = t.Id
			switch {
			case t.Kind == musterpb.TransferKind_TRANSFER_KIND_HOLD && attempts[t.Ref]:
				held[t.Id] = t.Ref
			case t.Pending != 0:
				delete(held, t.Pending)
			}
		}
		more = resp.Msg.More
	}
	if len(held) > 0 || l.job(job).Job.LiveAttempts > 0 {
		l.t.Errorf("job %s: still held after its attempts ended: %v, %d attempts live", job, held, l.job(job).Job.LiveAttempts)
	}
}

// rawWorker speaks the session protocol by hand.
type rawWorker struct {
	*lab
	account  string
	key      ed25519.PrivateKey
	id       string
	price    int64
	welcome  *musterpb.Welcome
	messages chan *musterpb.SchedulerMessage
	ended    chan error // why the stream ended
	cancel   context.CancelFunc

	mu      sync.Mutex // guards what follows, and sending
	stream  *connect.BidiStreamForClient[musterpb.WorkerMessage, musterpb.SchedulerMessage]
	running []string
	mute    bool // no heartbeats
}

func newKey(t *testing.T) ed25519.PrivateKey {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// worker is a worker that is not connected yet.
func (l *lab) worker(account string) *rawWorker {
	key := newKey(l.t)
	return &rawWorker{lab: l, account: l.account(account), key: key, id: string(api.WorkerIDOf(key.Public().(ed25519.PublicKey))), price: 200_000}
}

func (w *rawWorker) hello() *musterpb.WorkerMessage {
	return &musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Hello{Hello: &musterpb.WorkerHello{
		PublicKey: w.key.Public().(ed25519.PublicKey), Name: w.account, PriceMicroUsdPerHour: w.price,
		Capacity: &musterpb.Capacity{MilliCpus: 64_000, MemoryBytes: 1 << 40, DiskBytes: 1 << 40, Runtimes: []string{"wasm"}, Platform: "linux/amd64"},
	}}}
}

func (w *rawWorker) proof(nonce []byte) *musterpb.WorkerMessage {
	return &musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Proof{Proof: &musterpb.WorkerProof{
		Signature: ed25519.Sign(w.key, api.ChallengeText(nonce)), Running: slices.Clone(w.running),
	}}}
}

// dial opens a stream to the leader, and says nothing on it yet.
func (w *rawWorker) dial() {
	ctx, cancel := context.WithCancel(w.t.Context())
	w.t.Cleanup(cancel)
	w.cancel = cancel
	w.stream = client.Session(ctx, w.http, w.leader().info.Address, w.keys[w.account])
}

// connect runs the handshake and keeps the session alive from then on.
func (w *rawWorker) connect() *rawWorker {
	w.t.Helper()
	w.dial()
	m := w.exchange(w.hello())
	m = w.exchange(w.proof(m.GetChallenge().GetNonce()))
	w.welcome = m.GetWelcome()
	if w.welcome == nil {
		w.t.Fatalf("in place of a welcome: %v", m)
	}
	w.messages, w.ended = make(chan *musterpb.SchedulerMessage, 1000), make(chan error, 1)
	go func(stream *connect.BidiStreamForClient[musterpb.WorkerMessage, musterpb.SchedulerMessage], messages chan<- *musterpb.SchedulerMessage, ended chan<- error) {
		for {
			m, err := stream.Receive()
			if err != nil {
				ended <- err
				close(messages)
				return
			}
			for _, one := range split(m) {
				messages <- one
			}
		}
	}(w.stream, w.messages, w.ended)
	go w.beat(w.stream)
	return w
}

func (w *rawWorker) exchange(m *musterpb.WorkerMessage) *musterpb.SchedulerMessage {
	w.t.Helper()
	if err := w.stream.Send(m); err != nil {
		w.t.Fatal(err)
	}
	answer, err := w.stream.Receive()
	if err != nil {
		w.t.Fatal(err)
	}
	return answer
}

// beat sends heartbeats until its stream is replaced or broken.
func (w *rawWorker) beat(stream *connect.BidiStreamForClient[musterpb.WorkerMessage, musterpb.SchedulerMessage]) {
	tick := time.NewTicker(quick.LeaseTTL / 8)
	defer tick.Stop()
	for range tick.C {
		w.mu.Lock()
		over := w.stream != stream
		if !over && !w.mute {
			h := &musterpb.Heartbeat{Running: slices.Clone(w.running)}
			over = stream.Send(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Heartbeat{Heartbeat: h}}) != nil
		}
		w.mu.Unlock()
		if over {
			return
		}
	}
}

func (w *rawWorker) setMute(mute bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mute = mute
}

// leave breaks the connection.
func (w *rawWorker) leave() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cancel()
	_ = w.stream.CloseRequest() // the transport may wait for more of it
	w.stream = nil
}

func (w *rawWorker) send(m *musterpb.WorkerMessage) {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.stream.Send(m); err != nil {
		w.t.Fatal(err)
	}
}

// next is the next message that pick takes; the others are dropped.
func next[T any](w *rawWorker, what string, pick func(*musterpb.SchedulerMessage) *T) *T {
	w.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case m, open := <-w.messages:
			if !open {
				w.t.Fatalf("the session ended before there was %s: %v", what, <-w.ended)
			}
			if v := pick(m); v != nil {
				return v
			}
		case <-timeout:
			w.t.Fatalf("no %s came", what)
		}
	}
}

// assigned waits for an assignment, and says that it was started.
func (w *rawWorker) assigned() *musterpb.Assignment {
	w.t.Helper()
	a := next(w, "assignment", assignmentIn)
	w.mu.Lock()
	w.running = append(w.running, a.Attempt)
	w.mu.Unlock()
	w.send(reported(&musterpb.Reports{Started: []string{a.Attempt}}))
	return a
}

func (w *rawWorker) forget(attempt string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.running = slices.DeleteFunc(w.running, func(id string) bool { return id == attempt })
}

// outcome waits for the answer to a report.
func (w *rawWorker) outcome(attempt string) *musterpb.Outcome {
	w.t.Helper()
	o := next(w, "outcome of "+attempt, func(m *musterpb.SchedulerMessage) *musterpb.Outcome {
		if o := outcomeIn(m); o.GetAttempt() == attempt {
			return o
		}
		return nil
	})
	w.forget(attempt)
	return o
}

// product is a result on its way to the scheduler.
type product struct {
	manifest *musterpb.Manifest
	archive  []byte
	commit   *musterpb.Commit
	skip     string // what is not uploaded: "manifest" or "archive"
}

// honest is what the right answer to an item is.
func honest(value uint64) map[string][]byte {
	return map[string][]byte{"out.txt": []byte("the answer to " + strconv.FormatUint(value, 10) + "\n")}
}

// produce makes the result of an assignment.
func (w *rawWorker) produce(a *musterpb.Assignment, files func(value uint64) map[string][]byte) *product {
	w.t.Helper()
	dir := w.t.TempDir()
	var items []outputs.Item
	for _, index := range a.Indexes {
		value := jobspec.Value(a.Items, index)
		items = append(items, outputs.Item{Index: index, Value: value})
		for name, data := range files(value) {
			path := filepath.Join(dir, "out", strconv.FormatUint(value, 10), name)
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	entries, _, err := outputs.Write(w.t.Context(), filepath.Join(dir, "out"), a.Outputs, items, filepath.Join(dir, "archive"), outputs.Limits{Bytes: 1 << 40, Files: 1000})
	if err != nil {
		w.t.Fatal(err)
	}
	archive, err := os.ReadFile(filepath.Join(dir, "archive"))
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		e.InputDigest, e.ParametersDigest = verify.InputDigest(a.Inputs), verify.ParametersDigest(a.Image.Digest, a.Command, a.Env)
	}
	p := &product{manifest: &musterpb.Manifest{Attempt: a.Attempt, Items: entries}, archive: archive}
	p.seal(w)
	return p
}

// seal fills in the commit and signs it.
func (p *product) seal(w *rawWorker) *product {
	total := int64(0)
	for _, item := range p.manifest.Items {
		total += item.OutputBytes
	}
	p.commit = &musterpb.Commit{
		Attempt: p.manifest.Attempt, Root: verify.Root(p.manifest), ManifestDigest: string(api.DigestOf(p.encoded())),
		ArchiveDigest: string(api.DigestOf(p.archive)), ArchiveBytes: int64(len(p.archive)), OutputBytes: total,
	}
	verify.SignCommits(w.key, p.commit)
	return p
}

func (p *product) encoded() []byte {
	data, err := p.manifest.MarshalVT()
	if err != nil {
		panic(err)
	}
	return data
}

// offer uploads a result and commits it.
func (w *rawWorker) offer(p *product) {
	w.t.Helper()
	if p.skip != "archive" {
		w.put(w.account, p.archive)
	}
	if p.skip != "manifest" {
		w.put(w.account, p.encoded())
	}
	w.send(reported(&musterpb.Reports{Commits: []*musterpb.Commit{p.commit}}))
}

// deliver produces an honest result and wants it accepted.
func (w *rawWorker) deliver(a *musterpb.Assignment) {
	w.t.Helper()
	w.offer(w.produce(a, honest))
	if o := w.outcome(a.Attempt); !o.Accepted {
		w.t.Fatalf("an honest result was refused: %s", o.Reason)
	}
}

// work delivers honest results for whatever comes, until the session ends.
func (w *rawWorker) work() *rawWorker {
	go func() {
		for m := range w.messages {
			a := assignmentIn(m)
			if a == nil {
				if o := outcomeIn(m); o != nil {
					w.forget(o.Attempt)
				}
				continue
			}
			w.mu.Lock()
			w.running = append(w.running, a.Attempt)
			w.mu.Unlock()
			if w.t.Context().Err() != nil {
				return
			}
			w.offer(w.produce(a, honest))
		}
	}()
	return w
}

// eventually polls until a condition holds.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// logger shows what the cluster says when a test fails.
func logger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelInfo}))
}

type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
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
