package server_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/musterpb/musterpbconnect"
	"github.com/musternet/muster/api/server"
	"github.com/musternet/muster/scheduler/archive"
	"github.com/musternet/muster/scheduler/state"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeScheduler applies commands where it leads, without replicating them.
type fakeScheduler struct {
	id api.NodeID
	st *state.State

	mu      sync.Mutex
	leader  api.NodeID // guarded by mu
	address string     // guarded by mu; of the leader
	joined  []*musterpb.Node
}

var (
	_ server.Scheduler = (*fakeScheduler)(nil)
	_ server.Cluster   = (*fakeScheduler)(nil)
)

func (f *fakeScheduler) ID() api.NodeID { return f.id }

func (f *fakeScheduler) AwaitLeader(context.Context) (api.NodeID, string) { return f.Leader() }

func (f *fakeScheduler) Leader() (api.NodeID, string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.leader, f.address
}

func (f *fakeScheduler) follow(leader api.NodeID, address string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.leader, f.address = leader, address
}

func (f *fakeScheduler) CheckRead() error {
	if leader, _ := f.Leader(); leader != f.id {
		return api.Errorf(api.Unavailable, "not the leader")
	}
	return nil
}

func (f *fakeScheduler) Propose(_ context.Context, cmd *musterpb.Command) (string, error) {
	if err := f.CheckRead(); err != nil {
		return "", err
	}
	cmd.TimeUnixMs = time.Now().UnixMilli()
	answer := f.st.Apply(cmd)
	return answer.Id, state.ErrorOf(answer)
}

func (f *fakeScheduler) Explain(job string) (*musterpb.ExplainJobResponse, error) {
	if f.st.Job(job) == nil {
		return nil, api.Errorf(api.NotFound, "job %q is not known", job)
	}
	return &musterpb.ExplainJobResponse{Summary: "explained " + job}, nil
}
func (f *fakeScheduler) Connected() map[string]bool { return nil }
func (f *fakeScheduler) LogTail(string) []byte      { return nil }
func (f *fakeScheduler) Term() uint64               { return 1 }
func (f *fakeScheduler) Applied() uint64            { return 1 }

func (f *fakeScheduler) Join(_ context.Context, node *musterpb.Node) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.joined = append(f.joined, node)
	return nil
}

func (f *fakeScheduler) ProposeForNode(context.Context, *musterpb.ProposeRequest) (*musterpb.Answer, error) {
	return &musterpb.Answer{Id: "proposed by " + string(f.id)}, nil
}

func (f *fakeScheduler) Session(_ context.Context, owner string, s *connect.BidiStream[musterpb.WorkerMessage, musterpb.SchedulerMessage]) error {
	return s.Send(&musterpb.SchedulerMessage{Message: &musterpb.SchedulerMessage_Welcome{Welcome: &musterpb.Welcome{Worker: owner}}})
}

// bench is two schedulers, of which the first leads, with accounts acme and
// evil that have all kinds of keys.
type bench struct {
	t              *testing.T
	st             *state.State
	leader, second *fakeScheduler
	addresses      [2]string
	blobs, local   *blob.Memory
	keys           map[string]string
	http           *http.Client
	job            string // of acme
	attempts       int    // made so far
	nodeKey        ed25519.PrivateKey
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, st: state.New(), blobs: &blob.Memory{}, local: &blob.Memory{}, keys: map[string]string{}, http: &http.Client{Transport: client.NewTransport()}}
	t.Cleanup(b.http.CloseIdleConnections)
	var nodes [2]*musterpb.Node
	for i, f := range []**fakeScheduler{&b.leader, &b.second} {
		public, private, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		b.nodeKey = private // the second's
		*f = &fakeScheduler{id: api.NodeIDOf(public), st: b.st}
		nodes[i] = &musterpb.Node{Id: string((*f).id), PublicKey: public, RaftAddress: "r"}
		b.addresses[i] = b.serve(*f)
		nodes[i].ApiAddress = b.addresses[i]
	}
	b.leader.follow(b.leader.id, b.addresses[0])
	b.second.follow(b.leader.id, b.addresses[0])
	b.apply(&musterpb.Command{Body: &musterpb.Command_CreateCluster{CreateCluster: &musterpb.CreateCluster{Cluster: "mst-test"}}})
	for _, n := range nodes {
		b.apply(&musterpb.Command{Body: &musterpb.Command_RegisterNode{RegisterNode: &musterpb.RegisterNode{Node: n}}})
	}
	for account, roles := range map[string]map[string]musterpb.Role{
		"admin": {"admin": musterpb.Role_ROLE_ADMIN},
		"acme":  {"acme": musterpb.Role_ROLE_CUSTOMER, "reader": musterpb.Role_ROLE_READER},
		"evil":  {"evil": musterpb.Role_ROLE_CUSTOMER},
	} {
		b.apply(&musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: account}}})
		for name, role := range roles {
			key, hash := server.NewKey(account)
			b.keys[name] = key
			b.apply(&musterpb.Command{Body: &musterpb.Command_CreateKey{CreateKey: &musterpb.CreateKey{Account: account, Hash: hash, Role: role}}})
		}
	}
	b.apply(&musterpb.Command{Body: &musterpb.Command_Deposit{Deposit: &musterpb.Deposit{Account: "acme", AmountMicroUsd: 1e9}}})
	resp, err := b.client("acme", 0).SubmitJob(t.Context(), connect.NewRequest(&musterpb.SubmitJobRequest{Id: "first-job", Spec: b.spec()}))
	if err != nil {
		t.Fatal(err)
	}
	b.job = resp.Msg.Job
	return b
}

func (b *bench) serve(f *fakeScheduler) (address string) {
	srv := server.New(server.Config{
		State: b.st, Scheduler: f, Cluster: f, History: archive.New(b.blobs, b.st, archive.DefaultCache),
		Blobs: b.blobs, Local: b.local, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.t.Context()))
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, l) }()
	b.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Error(err)
		}
	})
	return l.Addr().String()
}

func (b *bench) apply(cmd *musterpb.Command) string {
	b.t.Helper()
	answer := b.st.Apply(cmd)
	if err := state.ErrorOf(answer); err != nil {
		b.t.Fatal(err)
	}
	return answer.Id
}

func (b *bench) spec() *musterpb.JobSpec {
	module := []byte("\x00asm")
	if _, err := b.blobs.Put(b.t.Context(), api.DigestOf(module), bytes.NewReader(module), 100); err != nil {
		b.t.Fatal(err)
	}
	return &musterpb.JobSpec{
		Name: "job", Image: &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_WASM, Digest: string(api.DigestOf(module)), SizeBytes: 4, Name: "p.wasm"},
		Items: &musterpb.Items{Count: 4}, Chunk: 4, TimeoutMs: 60_000, MaxPriceMicroUsdPerHour: 1e6, BudgetMicroUsd: 1e6,
		Resources: &musterpb.Resources{MilliCpus: 100, MemoryBytes: 32 << 20, DiskBytes: 1 << 20}, Verify: &musterpb.Verify{Comparator: "exact"},
	}
}

// client calls one of the schedulers, and does not fail over.
func (b *bench) client(key string, node int) musterpbconnect.MusterClient {
	return musterpbconnect.NewMusterClient(b.http, "http://"+b.addresses[node], client.Bearer(b.keys[key]))
}

func call[Req, Resp any](ctx context.Context, f func(context.Context, *connect.Request[Req]) (*connect.Response[Resp], error), req *Req) error {
	_, err := f(ctx, connect.NewRequest(req))
	return api.FromConnect(err)
}

func (b *bench) want(what string, err error, kind api.Kind, text string) {
	b.t.Helper()
	if err == nil || api.KindOf(err) != kind || !strings.Contains(err.Error(), text) {
		b.t.Errorf("%s: %v (%v); want %v: %s", what, err, api.KindOf(err), kind, text)
	}
}

func TestAuthentication(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for name, header := range map[string]string{
		"none": "", "no scheme": b.keys["acme"], "another scheme": "Basic " + b.keys["acme"], "empty": "Bearer ", "unknown": "Bearer muster_acme_AAAA",
		"case": "Bearer " + strings.ToLower(b.keys["acme"]), "node": server.NodeAuthorization(b.second.id, b.nodeKey, time.Now()),
	} {
		for i := range b.addresses {
			req := connect.NewRequest(&musterpb.GetAccountRequest{})
			if header != "" {
				req.Header().Set("Authorization", header)
			}
			_, err := musterpbconnect.NewMusterClient(b.http, "http://"+b.addresses[i]).GetAccount(t.Context(), req)
			b.want(fmt.Sprintf("%s at %d", name, i), api.FromConnect(err), api.Unauthenticated, "API key")
		}
	}
	if err := call(t.Context(), b.client("acme", 0).GetAccount, &musterpb.GetAccountRequest{}); err != nil {
		t.Error(err)
	}
}

// A scheduler that does not lead can't know that a key is wrong.
func TestUnknownKeyAtAFollower(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.keys["new"] = "muster_new_key"
	s := client.Session(t.Context(), b.http, b.addresses[1], b.keys["new"])
	_ = s.Send(nil) // the answer says what is wrong
	_, err := s.Receive()
	b.want("a session", api.FromConnect(err), api.Unavailable, "can't tell for its cluster")
	req := connect.NewRequest(&musterpb.GetAccountRequest{})
	req.Header().Set(server.HeaderRead, "stale")
	_, err = b.client("new", 1).GetAccount(t.Context(), req)
	b.want("a stale read", api.FromConnect(err), api.Unavailable, "can't tell for its cluster")
}

func TestAccountsAreSeparate(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx := t.Context()
	worker := &musterpb.Worker{PublicKey: make([]byte, ed25519.PublicKeySize), Owner: "acme", Name: "w", Capacity: &musterpb.Capacity{}}
	worker.Id = string(api.WorkerIDOf(worker.PublicKey))
	b.apply(&musterpb.Command{Body: &musterpb.Command_RegisterWorker{RegisterWorker: &musterpb.RegisterWorker{Worker: worker}}})
	evil := b.client("evil", 0)
	notFound := fmt.Sprintf("job %q is not known", b.job)
	for what, err := range map[string]error{
		"get":     call(ctx, evil.GetJob, &musterpb.GetJobRequest{Job: b.job}),
		"cancel":  call(ctx, evil.CancelJob, &musterpb.CancelJobRequest{Job: b.job}),
		"fund":    call(ctx, evil.FundJob, &musterpb.FundJobRequest{Job: b.job, Id: "12345678", AmountMicroUsd: 1}),
		"explain": call(ctx, evil.ExplainJob, &musterpb.GetJobRequest{Job: b.job}),
		"results": call(ctx, evil.GetResults, &musterpb.GetResultsRequest{Job: b.job}),
		"logs":    call(ctx, evil.GetLogs, &musterpb.GetLogsRequest{Job: b.job}),
	} {
		b.want(what, err, api.NotFound, notFound)
	}
	stream, err := evil.WatchJob(ctx, connect.NewRequest(&musterpb.GetJobRequest{Job: b.job}))
	if err != nil {
		t.Fatal(err)
	}
	if stream.Receive() {
		t.Error("another account's job is watched")
	}
	b.want("watch", api.FromConnect(stream.Err()), api.NotFound, notFound)
	stream.Close()
	for what, err := range map[string]error{
		"submit":          call(ctx, evil.SubmitJob, &musterpb.SubmitJobRequest{Id: "12345678", Account: "acme", Spec: b.spec()}),
		"list":            call(ctx, evil.ListJobs, &musterpb.ListJobsRequest{Account: "acme"}),
		"drain":           call(ctx, evil.DrainWorker, &musterpb.DrainWorkerRequest{Worker: worker.Id}),
		"transfers":       call(ctx, evil.ListTransfers, &musterpb.ListTransfersRequest{Account: "acme"}),
		"all transfers":   call(ctx, evil.ListTransfers, &musterpb.ListTransfersRequest{All: true}),
		"account":         call(ctx, evil.GetAccount, &musterpb.GetAccountRequest{Account: "acme"}),
		"all accounts":    call(ctx, evil.GetAccount, &musterpb.GetAccountRequest{Account: "*"}),
		"create account":  call(ctx, evil.CreateAccount, &musterpb.CreateAccountRequest{Account: "acme", Role: musterpb.Role_ROLE_ADMIN}),
		"deposit":         call(ctx, evil.Deposit, &musterpb.DepositRequest{Id: "12345678", AmountMicroUsd: 1e12}),
		"reader submits":  call(ctx, b.client("reader", 0).SubmitJob, &musterpb.SubmitJobRequest{Id: "12345678", Spec: b.spec()}),
		"reader cancels":  call(ctx, b.client("reader", 0).CancelJob, &musterpb.CancelJobRequest{Job: b.job}),
		"reader funds":    call(ctx, b.client("reader", 0).FundJob, &musterpb.FundJobRequest{Job: b.job, Id: "12345678", AmountMicroUsd: 1}),
		"reader drains":   call(ctx, b.client("reader", 0).DrainWorker, &musterpb.DrainWorkerRequest{Worker: worker.Id}),
		"reader's worker": sessionError(b, "reader"),
	} {
		b.want(what, err, api.Denied, "")
	}
	list, err := evil.ListJobs(ctx, connect.NewRequest(&musterpb.ListJobsRequest{}))
	if err != nil || len(list.Msg.Jobs) != 0 {
		t.Errorf("evil's jobs: %v, %v", list, err)
	}
	workers, err := evil.ListWorkers(ctx, connect.NewRequest(&musterpb.ListWorkersRequest{}))
	if err != nil || len(workers.Msg.Workers) != 1 || workers.Msg.Workers[0].Records != nil || workers.Msg.Workers[0].EarnedMicroUsd != 0 {
		t.Errorf("others' records are shown: %v, %v", workers, err)
	}
	for what, err := range map[string]error{
		"own job":      call(ctx, b.client("acme", 0).GetJob, &musterpb.GetJobRequest{Job: b.job}),
		"reader reads": call(ctx, b.client("reader", 0).GetJob, &musterpb.GetJobRequest{Job: b.job}),
		"admin reads":  call(ctx, b.client("admin", 0).GetJob, &musterpb.GetJobRequest{Job: b.job}),
		"own worker":   call(ctx, b.client("acme", 0).DrainWorker, &musterpb.DrainWorkerRequest{Worker: worker.Id}),
		"admin's":      call(ctx, b.client("admin", 0).ListTransfers, &musterpb.ListTransfersRequest{All: true}),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func sessionError(b *bench, key string) error {
	s := client.Session(b.t.Context(), b.http, b.addresses[0], b.keys[key])
	_ = s.Send(nil) // the answer says what is wrong
	_, err := s.Receive()
	return api.FromConnect(err)
}

// A repeat of a request is answered like the first, and does nothing.
func TestRepeatedSubmission(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	resp, err := b.client("acme", 1).SubmitJob(t.Context(), connect.NewRequest(&musterpb.SubmitJobRequest{Id: "first-job", Spec: b.spec()}))
	if err != nil || resp.Msg.Job != b.job {
		t.Errorf("%v, %v; want %s again", resp, err, b.job)
	}
	b.want("a short ID", call(t.Context(), b.client("acme", 0).SubmitJob, &musterpb.SubmitJobRequest{Id: "x", Spec: b.spec()}), api.Invalid, "8 to 64 characters")
	spec := b.spec()
	spec.Image.Digest = string(api.DigestOf([]byte("elsewhere")))
	b.want("an image that is not there", call(t.Context(), b.client("acme", 0).SubmitJob, &musterpb.SubmitJobRequest{Id: "12345678", Spec: spec}), api.Invalid, "is not uploaded")
	spec = b.spec()
	spec.Image.SizeBytes = 5
	b.want("an image of another size", call(t.Context(), b.client("acme", 0).SubmitJob, &musterpb.SubmitJobRequest{Id: "12345678", Spec: spec}), api.Invalid, "has 4 bytes, the job says 5")
}

func TestForwarding(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx := t.Context()
	second := b.client("acme", 1)
	if err := call(ctx, second.FundJob, &musterpb.FundJobRequest{Job: b.job, Id: "12345678", AmountMicroUsd: 1000}); err != nil {
		t.Errorf("a write at a follower: %v", err)
	}
	resp, err := second.ExplainJob(ctx, connect.NewRequest(&musterpb.GetJobRequest{Job: b.job}))
	if err != nil || resp.Msg.Summary != "explained "+b.job {
		t.Errorf("%v, %v", resp, err)
	}
	b.want("an error of the leader's", call(ctx, second.GetJob, &musterpb.GetJobRequest{Job: "job-none"}), api.NotFound, `job "job-none" is not known`)

	// A stream arrives message by message while the job goes on.
	stream, err := second.WatchJob(ctx, connect.NewRequest(&musterpb.GetJobRequest{Job: b.job}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if !stream.Receive() || stream.Msg().Job.State != musterpb.JobState_JOB_STATE_QUEUED {
		t.Fatalf("%v, %v", stream.Msg(), stream.Err())
	}
	if err := call(ctx, second.CancelJob, &musterpb.CancelJobRequest{Job: b.job}); err != nil {
		t.Fatal(err)
	}
	if !stream.Receive() || stream.Msg().Job.State != musterpb.JobState_JOB_STATE_CANCELLED {
		t.Errorf("%v, %v", stream.Msg(), stream.Err())
	}
	if stream.Receive() || stream.Err() != nil {
		t.Errorf("the watch of a settled job goes on: %v", stream.Err())
	}

	stale := connect.NewRequest(&musterpb.GetJobRequest{Job: b.job})
	stale.Header().Set(server.HeaderRead, "stale")
	b.second.follow("", "")
	if _, err := second.GetJob(ctx, stale); err != nil {
		t.Errorf("a stale read without a leader: %v", err)
	}
	b.want("a read without a leader", call(ctx, second.GetJob, &musterpb.GetJobRequest{Job: b.job}), api.Unavailable, "electing a leader")
	b.second.follow("sch-gone", deadAddress(t))
	b.want("a leader that is gone", call(ctx, second.GetJob, &musterpb.GetJobRequest{Job: b.job}), api.Unavailable, "does not answer")
}

// Two schedulers that take each other for the leader do not send a call in
// circles.
func TestForwardingLoop(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.leader.follow(b.second.id, b.addresses[1])
	b.second.follow(b.leader.id, b.addresses[0])
	began := time.Now()
	b.want("a loop", call(t.Context(), b.client("acme", 0).GetJob, &musterpb.GetJobRequest{Job: b.job}), api.Unavailable, "electing a leader")
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
}

func deadAddress(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestRequestTooLarge(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	large := &musterpb.DepositRequest{Id: "12345678", Account: "acme", AmountMicroUsd: 1, Memo: strings.Repeat("x", server.MaxRequestBytes)}
	for i := range b.addresses {
		// The leader's decoder and a follower that passes the call on each say it.
		err := call(t.Context(), b.client("admin", i).Deposit, large)
		if k := api.KindOf(err); (k != api.Exhausted && k != api.TooLarge) || !strings.Contains(err.Error(), strconv.Itoa(server.MaxRequestBytes)) {
			t.Errorf("at %d: %v", i, err)
		}
	}
	if got := b.st.Balance("acme").DepositedMicroUsd; got != 1e9 {
		t.Errorf("deposited %d", got)
	}
}

func TestSessionRedirect(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	s := client.Session(t.Context(), b.http, b.addresses[1], b.keys["acme"])
	_ = s.Send(nil) // the answer says where to go
	_, err := s.Receive()
	var ce *connect.Error
	if ce, _ = err.(*connect.Error); ce == nil || ce.Code() != connect.CodeUnavailable || ce.Meta().Get(client.HeaderLeader) != b.addresses[0] {
		t.Errorf("%v", err)
	}
	s = client.Session(t.Context(), b.http, b.addresses[0], b.keys["acme"])
	_ = s.Send(nil)
	if m, err := s.Receive(); err != nil || m.GetWelcome().GetWorker() != "acme" {
		t.Errorf("%v, %v: the session is not that of the key's account", m, err)
	}
	_ = s.CloseRequest()
}

func (b *bench) blob(method string, node int, header http.Header, body string) (status int, text string) {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), method, "http://"+b.addresses[node]+blob.Path(api.DigestOf([]byte("hello"))), strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	req.Header = header
	resp, err := b.http.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(data)
}

func TestBlobs(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	other, stranger, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	header := func(authorization string, replica bool) http.Header {
		h := http.Header{"Authorization": {authorization}}
		if replica {
			h.Set(blob.ReplicaHeader, "1")
		}
		return h
	}
	node := func(at time.Time) string { return server.NodeAuthorization(b.second.id, b.nodeKey, at) }
	for _, test := range []struct {
		name    string
		method  string
		header  http.Header
		replica bool
		status  int
		want    string
	}{
		{"no key", "PUT", http.Header{}, false, 401, "no API key"},
		{"reader uploads", "PUT", header("Bearer "+b.keys["reader"], false), false, 403, "a reader key may not upload"},
		{"customer asks one node", "GET", header("Bearer "+b.keys["acme"], true), false, 403, "only schedulers may ask for the copy of one node"},
		{"admin asks one node", "GET", header("Bearer "+b.keys["admin"], true), false, 403, "only schedulers"},
		{"customer", "PUT", header("Bearer "+b.keys["acme"], false), false, 200, `"size":5`},
		{"reader reads", "GET", header("Bearer "+b.keys["reader"], false), false, 200, "hello"},
		{"node: own copy is another store", "GET", header(node(now), true), true, 404, "not stored here"},
		{"node uploads", "PUT", header(node(now), true), true, 200, `"size":5`},
		{"node", "GET", header(node(now), true), true, 200, "hello"},
		{"node 4 minutes behind", "GET", header(node(now.Add(-4*time.Minute)), true), true, 200, "hello"},
		{"node 6 minutes behind", "GET", header(node(now.Add(-6*time.Minute)), true), true, 401, "the clocks of scheduler"},
		{"node 6 minutes ahead", "GET", header(node(now.Add(6*time.Minute)), true), true, 401, "the clocks of scheduler"},
		{"not a member", "GET", header(server.NodeAuthorization(api.NodeIDOf(other), stranger, now), true), true, 401, "is not part of this cluster"},
		{"member's name, stranger's key", "GET", header(server.NodeAuthorization(b.second.id, stranger, now), true), true, 401, "its signature is wrong"},
		{"malformed", "GET", header("Muster-Node x", true), true, 401, "malformed scheduler authorization"},
		{"time changed", "GET", header(strings.Replace(node(now), fmt.Sprint(now.Unix()), fmt.Sprint(now.Unix()+1), 1), true), true, 401, "its signature is wrong"},
		{"no number", "GET", header("Muster-Node "+string(b.second.id)+" now AAAA", true), true, 401, "its signature is wrong"},
	} {
		body := ""
		if test.method == "PUT" {
			body = "hello"
		}
		status, text := b.blob(test.method, 0, test.header, body)
		if status != test.status || !strings.Contains(text, test.want) {
			t.Errorf("%s: %d %s; want %d %s", test.name, status, text, test.status, test.want)
		}
	}
	if status, text := b.blob("PUT", 0, header("Bearer "+b.keys["acme"], false), "forged"); status != 200 && status != 400 {
		t.Errorf("forged content: %d %s", status, text)
	}
	if status, text := b.blob("GET", 0, header("Bearer "+b.keys["acme"], false), ""); text != "hello" {
		t.Errorf("%d %q after an upload of other bytes", status, text)
	}
}

func TestJoin(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	node := &musterpb.Node{Id: string(api.NodeIDOf(public)), PublicKey: public, ApiAddress: "a:1", RaftAddress: "r:1"}
	for i, address := range b.addresses { // a follower passes it on
		cluster, err := server.NewPeers(private).Join(t.Context(), address, b.keys["admin"], node)
		if err != nil || cluster != "mst-test" || len(b.leader.joined) != i+1 {
			t.Errorf("at %d: %q, %v, %d joined", i, cluster, err, len(b.leader.joined))
		}
		b.want("no admin", joinError(t, private, address, b.keys["acme"], node), api.Denied, "only an admin key")
		b.want("no key", joinError(t, private, address, "", node), api.Unauthenticated, "no API key")
		b.want("another's node", joinError(t, b.nodeKey, address, b.keys["admin"], node), api.Denied, "is not signed by its key")
		b.want("no node", joinError(t, private, address, b.keys["admin"], nil), api.Denied, "is not signed by its key")
	}
	if len(b.second.joined) != 0 {
		t.Error("a follower took a node in by itself")
	}
}

func joinError(t *testing.T, key ed25519.PrivateKey, address, adminKey string, node *musterpb.Node) error {
	_, err := server.NewPeers(key).Join(t.Context(), address, adminKey, node)
	return err
}

// What is closed after Serve is not in use any more.
func TestServeWaitsForItsCalls(t *testing.T) {
	t.Parallel()
	entered, leave := make(chan struct{}), make(chan struct{})
	st := state.New()
	f := &fakeScheduler{id: "sch-1", leader: "sch-1", st: st}
	blobs := &blob.Memory{Fail: func(string, api.Digest) error {
		close(entered)
		<-leave
		return nil
	}}
	b := &bench{t: t}
	b.st = st
	b.apply(&musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: "acme"}}})
	key, hash := server.NewKey("acme")
	b.apply(&musterpb.Command{Body: &musterpb.Command_CreateKey{CreateKey: &musterpb.CreateKey{Account: "acme", Hash: hash, Role: musterpb.Role_ROLE_CUSTOMER}}})
	srv := server.New(server.Config{State: st, Scheduler: f, Cluster: f, Blobs: blobs, Local: blobs, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, l) }()
	h := &http.Client{Transport: client.NewTransport()}
	defer h.CloseIdleConnections()
	go func() {
		_, _ = client.Blobs(h, key, func() []string { return []string{l.Addr().String()} }).Stat(t.Context(), api.DigestOf(nil))
	}()
	<-entered
	cancel()
	select {
	case err := <-done:
		t.Errorf("Serve returned %v while a call is answered", err)
	case <-time.After(200 * time.Millisecond): // long enough to be wrong in
	}
	close(leave)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Every call that is known needs a key, whoever adds one.
func TestEveryProcedureNeedsAKey(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	srv := httptest.NewServer(server.New(server.Config{State: b.st, Scheduler: b.leader, Cluster: b.leader, Blobs: b.blobs, Local: b.local, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))}).Handler())
	defer srv.Close()
	methods := musterpb.File_muster_v1_service_proto.Services().ByName("Muster").Methods()
	for i := range methods.Len() {
		path := "/muster.v1.Muster/" + string(methods.Get(i).Name())
		kind := "application/json"
		if methods.Get(i).IsStreamingServer() {
			continue // answers in its stream: TestAccountsAreSeparate
		}
		resp, err := http.Post(srv.URL+path, kind, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s without a key: %s", path, resp.Status)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}
