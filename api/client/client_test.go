package client_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/musterpb/musterpbconnect"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeMuster answers deposits and watches.
type fakeMuster struct {
	musterpbconnect.UnimplementedMusterHandler
	calls atomic.Int32
	fail  func(call int32) error

	mu    sync.Mutex
	memos []string // guarded by mu
	keys  []string // guarded by mu
}

func (f *fakeMuster) Deposit(_ context.Context, req *connect.Request[musterpb.DepositRequest]) (*connect.Response[musterpb.DepositResponse], error) {
	f.mu.Lock()
	f.memos, f.keys = append(f.memos, req.Msg.Memo), append(f.keys, req.Header().Get("Authorization"))
	f.mu.Unlock()
	if err := f.answer(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&musterpb.DepositResponse{BalanceMicroUsd: 7}), nil
}

func (f *fakeMuster) WatchJob(_ context.Context, req *connect.Request[musterpb.GetJobRequest], stream *connect.ServerStream[musterpb.GetJobResponse]) error {
	f.mu.Lock()
	f.keys = append(f.keys, req.Header().Get("Authorization"))
	f.mu.Unlock()
	return stream.Send(&musterpb.GetJobResponse{Job: &musterpb.Job{Id: req.Msg.Job}})
}

func (f *fakeMuster) answer() error {
	if n := f.calls.Add(1); f.fail != nil {
		return api.ToConnect(f.fail(n))
	}
	return nil
}

func serve(t *testing.T, f *fakeMuster) (address string) {
	_, handler := musterpbconnect.NewMusterHandler(f)
	return serveHTTP(t, handler)
}

func serveHTTP(t *testing.T, handler http.Handler) (address string) {
	srv := httptest.NewUnstartedServer(handler)
	srv.Config.Protocols = new(http.Protocols)
	srv.Config.Protocols.SetHTTP1(true)
	srv.Config.Protocols.SetUnencryptedHTTP2(true)
	srv.Start()
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// dead is an address that nobody listens at.
func dead(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func newClient(t *testing.T, patience time.Duration, addresses ...string) *client.Client {
	t.Helper()
	c, err := client.New(client.Config{Addresses: addresses, Key: "muster_acme_KEY", Patience: patience})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func deposit(t *testing.T, c *client.Client, memo string) error {
	resp, err := c.Deposit(t.Context(), connect.NewRequest(&musterpb.DepositRequest{Memo: memo}))
	if err == nil && resp.Msg.BalanceMicroUsd != 7 {
		t.Errorf("answered %v", resp.Msg)
	}
	return api.FromConnect(err)
}

func unavailable(n int32) func(int32) error {
	return func(call int32) error {
		if call <= n {
			return api.Errorf(api.Unavailable, "the schedulers are electing a leader")
		}
		return nil
	}
}

func TestKeyAndBody(t *testing.T) {
	f := &fakeMuster{}
	address := serve(t, f)
	for _, a := range []string{address, "http://" + address, "http://" + address + "/"} {
		if err := deposit(t, newClient(t, time.Second, a), "hello"); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
	c := newClient(t, time.Second, address)
	stream, err := c.WatchJob(t.Context(), connect.NewRequest(&musterpb.GetJobRequest{Job: "job-1"}))
	if err != nil {
		t.Fatal(err)
	}
	if !stream.Receive() || stream.Msg().Job.Id != "job-1" || stream.Receive() || stream.Err() != nil {
		t.Errorf("watched %v, %v", stream.Msg(), stream.Err())
	}
	stream.Close()
	for _, key := range f.keys {
		if key != "Bearer muster_acme_KEY" {
			t.Errorf("the key was sent as %q", key)
		}
	}
	if len(f.keys) != 4 || f.memos[0] != "hello" {
		t.Errorf("%d calls, %q", len(f.keys), f.memos)
	}
}

func TestFirstAddressDead(t *testing.T) {
	f := &fakeMuster{}
	c := newClient(t, 10*time.Second, dead(t), dead(t), serve(t, f))
	began := time.Now()
	for range 20 {
		if err := deposit(t, c, "m"); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("20 calls took %s: the dead are asked first every time", took)
	}
}

// A scheduler that can't answer now is passed over, and the body goes out whole
// each time.
func TestUnavailableThenOK(t *testing.T) {
	first, second := &fakeMuster{fail: unavailable(2)}, &fakeMuster{fail: unavailable(2)}
	c := newClient(t, 30*time.Second, serve(t, first), serve(t, second))
	memo := strings.Repeat("body ", 100_000)
	if err := deposit(t, c, memo); err != nil {
		t.Fatal(err)
	}
	if n := first.calls.Load() + second.calls.Load(); n != 5 {
		t.Errorf("%d calls; want two refusals each and an answer", n)
	}
	for _, got := range append(first.memos, second.memos...) {
		if got != memo {
			t.Errorf("a body of %d bytes arrived as %d", len(memo), len(got))
		}
	}
}

// An answer that is final is not asked for twice.
func TestFinalAnswers(t *testing.T) {
	for _, kind := range []api.Kind{api.Invalid, api.NotFound, api.Conflict, api.Unauthenticated, api.Denied, api.Exhausted, api.Internal} {
		f := &fakeMuster{fail: func(int32) error { return api.Errorf(kind, "no") }}
		c := newClient(t, 10*time.Second, serve(t, f), serve(t, f))
		if err := deposit(t, c, ""); api.KindOf(err) != kind || err.Error() != "no" {
			t.Errorf("%v: %v (%v)", kind, err, api.KindOf(err))
		}
		if n := f.calls.Load(); n != 1 {
			t.Errorf("%v: %d calls", kind, n)
		}
	}
}

func TestNobodyAnswers(t *testing.T) {
	f := &fakeMuster{fail: func(int32) error { return api.Errorf(api.Unavailable, "electing") }}
	address := serve(t, f)
	const patience = 300 * time.Millisecond
	for _, addresses := range [][]string{{dead(t)}, {dead(t), dead(t)}, {address}, {dead(t), address}} {
		began := time.Now()
		err := deposit(t, newClient(t, patience, addresses...), "")
		if api.KindOf(err) != api.Unavailable || !strings.Contains(fmt.Sprint(err), "no scheduler answers at "+strings.Join(addresses, ", ")) {
			t.Errorf("%v: %v (%v)", addresses, err, api.KindOf(err))
		}
		if took := time.Since(began); took > patience+3*time.Second {
			t.Errorf("%v: took %s", addresses, took)
		}
	}
}

// A call that the caller gives up ends at once, in whatever phase it is.
func TestContextEnds(t *testing.T) {
	arrived := make(chan struct{}, 1)
	hang := serveHTTP(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		<-r.Context().Done()
	}))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := newClient(t, time.Minute, hang).Deposit(ctx, connect.NewRequest(&musterpb.DepositRequest{}))
		done <- err
	}()
	<-arrived
	cancel()
	if err := <-done; connect.CodeOf(err) != connect.CodeCanceled {
		t.Errorf("a call that hangs: %v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err := newClient(t, time.Minute, dead(t)).Deposit(ctx, connect.NewRequest(&musterpb.DepositRequest{}))
	if connect.CodeOf(err) != connect.CodeDeadlineExceeded || time.Since(began) > 5*time.Second {
		t.Errorf("a call that waits for a scheduler: %v after %s", err, time.Since(began))
	}
}

func TestTooLarge(t *testing.T) {
	f := &fakeMuster{}
	err := deposit(t, newClient(t, time.Second, serve(t, f)), strings.Repeat("x", 9<<20))
	if api.KindOf(err) != api.TooLarge || f.calls.Load() != 0 {
		t.Errorf("%v, %d calls", err, f.calls.Load())
	}
}

func TestNoAddress(t *testing.T) {
	if _, err := client.New(client.Config{Key: "k"}); api.KindOf(err) != api.Invalid {
		t.Errorf("%v", err)
	}
}

// The blob store of a client knows every scheduler, too.
func TestBlobs(t *testing.T) {
	var key atomic.Value
	blobs := serveHTTP(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key.Store(r.Header.Get("Authorization"))
		w.Header().Set("Content-Length", "5")
	}))
	size, err := newClient(t, time.Second, dead(t), blobs).Blobs().Stat(t.Context(), api.DigestOf([]byte("hello")))
	if err != nil || size != 5 || key.Load() != "Bearer muster_acme_KEY" {
		t.Errorf("%d, %v, key %v", size, err, key.Load())
	}
}
