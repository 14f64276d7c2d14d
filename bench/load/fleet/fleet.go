// Package fleet simulates workers: real sessions over real connections, with
// identities, heartbeats, manifests, archives and signatures, and a runtime that
// ends at once or after a given time. What it leaves out is what a machine does
// for itself: images, caches, containers and the disk.
package fleet

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/verify"
)

// PriceMicroUSDPerHour is what every worker asks.
const PriceMicroUSDPerHour = 100_000

// Config says what fleet to simulate.
type Config struct {
	Addresses []string // of schedulers
	Keys      []string // API keys, one per owner; workers are dealt out to them
	Workers   int
	Slots     int // attempts of one CPU that a worker takes at once
	// Watch hears of what happens, if not nil; it must be quick, and is called
	// from many goroutines.
	Watch Watcher
}

// Watcher hears what workers see. Job is the argument that Command gave the
// attempt's job; times are nanoseconds since the fleet began.
type Watcher interface {
	// Assigned is an attempt that a worker got, and starts now.
	Assigned(job int, attempt string, at int64)
	// Answered is the answer to a result; assigned is when its attempt came.
	Answered(job int, accepted bool, reason string, assigned, at int64)
}

// Fleet is a set of simulated workers.
type Fleet struct {
	Config
	workers []*worker
	began   time.Time
	// runtime is how long a program runs, in nanoseconds.
	runtime   atomic.Int64
	connected atomic.Int64
	refused   atomic.Int64 // results
	cancel    context.CancelFunc
	group     *errgroup.Group
}

// Start starts the workers and waits until all have a session.
func Start(ctx context.Context, cfg Config) (*Fleet, error) {
	f := &Fleet{Config: cfg, began: time.Now()}
	ctx, f.cancel = context.WithCancel(ctx)
	f.group, ctx = errgroup.WithContext(ctx)
	for i := range cfg.Workers {
		w, err := newWorker(f, i)
		if err != nil {
			return nil, errors.Join(err, f.Stop())
		}
		f.workers = append(f.workers, w)
		f.group.Go(func() error { return w.run(ctx) })
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for f.connected.Load() < int64(cfg.Workers) {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%d of %d workers have a session: %w", f.connected.Load(), cfg.Workers, errors.Join(ctx.Err(), f.Stop()))
		case <-tick.C:
		}
	}
	return f, nil
}

// SetRuntime says how long programs run from now on; 0 is no time at all.
func (f *Fleet) SetRuntime(d time.Duration) { f.runtime.Store(int64(d)) }

// Connected counts the workers that have a session.
func (f *Fleet) Connected() int { return int(f.connected.Load()) }

// Refused counts the results that the schedulers refused.
func (f *Fleet) Refused() int { return int(f.refused.Load()) }

// Now is the time on the fleet's clock, in nanoseconds.
func (f *Fleet) Now() int64 { return int64(time.Since(f.began)) }

// Stop disconnects the workers and waits for them.
func (f *Fleet) Stop() error {
	f.cancel()
	if err := f.group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

type stream = connect.BidiStreamForClient[musterpb.WorkerMessage, musterpb.SchedulerMessage]

// worker is one simulated worker.
type worker struct {
	fleet     *Fleet
	name      string
	key       ed25519.PrivateKey
	apiKey    string
	addresses []string // the best first; only run's goroutine uses them
	http      *http.Client

	mu     sync.Mutex
	stream *stream         // guarded by mu, which also orders what is sent; nil without a session
	runs   map[string]*run // guarded by mu; attempts without an answer
	ready  []work          // guarded by mu; produced, and not reported yet
	open   map[string]bool // guarded by mu; reported in this session, and not answered
	hold   *time.Timer     // guarded by mu; reports what is ready though nothing was answered; nil: nothing waits
	beats  int             // guarded by mu
	beat   *time.Timer     // guarded by mu
}

// run is one attempt on a worker.
type run struct {
	job      int
	assigned int64
	result   *result // nil while it runs
}

func newWorker(f *Fleet, i int) (*worker, error) {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	return &worker{
		fleet: f, name: fmt.Sprintf("worker-%d", i), key: key, apiKey: f.Keys[i%len(f.Keys)], addresses: append([]string(nil), f.Addresses...),
		http: &http.Client{Transport: client.NewTransport()}, runs: map[string]*run{}, open: map[string]bool{},
	}, nil
}

// maxRedirect is that of real workers.
const maxRedirect = 200 * time.Millisecond

var errRedirected = errors.New("another scheduler leads")

// run keeps a session until ctx ends.
func (w *worker) run(ctx context.Context) error {
	defer w.http.CloseIdleConnections()
	for wait := time.Duration(0); ; wait = client.Redial(wait) {
		began := time.Now()
		err := w.session(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if k := api.KindOf(err); connect.IsWireError(err) && (k == api.Denied || k == api.Unauthenticated || k == api.Invalid) {
			return fmt.Errorf("%s is refused: %w", w.name, err)
		}
		if time.Since(began) > client.MaxRedial {
			wait = 0
		}
		if errors.Is(err, errRedirected) {
			wait = min(wait, maxRedirect)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// session is one session, until it ends.
func (w *worker) session(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	address := w.addresses[0]
	s := client.Session(ctx, w.http, address, w.apiKey)
	context.AfterFunc(ctx, func() { _ = s.CloseRequest() })
	welcome, err := w.shakeHands(s)
	if err != nil {
		if ce := (*connect.Error)(nil); errors.As(err, &ce) {
			if leader := ce.Meta().Get(client.HeaderLeader); leader != "" && leader != address {
				w.prefer(leader)
				return errRedirected
			}
		}
		w.addresses = append(w.addresses[1:], address)
		return err
	}
	w.begin(s, welcome)
	w.fleet.connected.Add(1)
	defer w.fleet.connected.Add(-1)
	defer w.end()
	for {
		m, err := s.Receive()
		if err != nil {
			return err
		}
		if o := m.GetOrders(); o != nil {
			w.receive(o)
		}
	}
}

func (w *worker) prefer(address string) {
	list := []string{address}
	for _, a := range w.addresses {
		if a != address {
			list = append(list, a)
		}
	}
	w.addresses = list
}

func (w *worker) shakeHands(s *stream) (*musterpb.Welcome, error) {
	hello := &musterpb.WorkerHello{
		PublicKey: w.key.Public().(ed25519.PublicKey), Name: w.name, PriceMicroUsdPerHour: PriceMicroUSDPerHour,
		Capacity: &musterpb.Capacity{
			MilliCpus: int64(w.fleet.Slots) * 1000, MemoryBytes: int64(w.fleet.Slots) << 30, DiskBytes: int64(w.fleet.Slots) << 30,
			NoGpuReason: "simulated", Runtimes: []string{"docker"}, Platform: "linux/amd64", CpuLevel: "x86-64-v3",
		},
	}
	if err := s.Send(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Hello{Hello: hello}}); err != nil {
		if _, received := s.Receive(); received != nil {
			return nil, received
		}
		return nil, err
	}
	m, err := s.Receive()
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	proof := &musterpb.WorkerProof{Signature: ed25519.Sign(w.key, api.ChallengeText(m.GetChallenge().GetNonce())), Running: w.running()}
	w.mu.Unlock()
	if err := s.Send(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Proof{Proof: proof}}); err != nil {
		return nil, err
	}
	if m, err = s.Receive(); err != nil {
		return nil, err
	}
	if m.GetWelcome() == nil {
		return nil, api.Errorf(api.Internal, "the scheduler did not answer the handshake")
	}
	return m.GetWelcome(), nil
}

// running lists the attempts without an answer; mu is held.
func (w *worker) running() []string {
	ids := make([]string, 0, len(w.runs))
	for id := range w.runs {
		ids = append(ids, id)
	}
	return ids
}

// begin starts a session: what the schedulers gave up is dropped, what they
// did not answer is said again.
func (w *worker) begin(s *stream, welcome *musterpb.Welcome) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range welcome.Stop {
		delete(w.runs, id)
	}
	w.stream = s
	w.ready = nil
	clear(w.open)
	w.sayAgain()
	every := time.Duration(welcome.HeartbeatMs) * time.Millisecond
	w.beat = time.AfterFunc(every, func() { w.heartbeat(s, every) })
}

// end ends a session.
func (w *worker) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.beat.Stop()
	w.stream = nil
}

// heartbeat renews the leases, and repeats now and then what has no answer.
func (w *worker) heartbeat(s *stream, every time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stream != s {
		return
	}
	w.send(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Heartbeat{Heartbeat: &musterpb.Heartbeat{Running: w.running(), Full: w.beats == 0}}})
	if w.beats++; w.beats%10 == 0 {
		w.sayAgain()
	}
	w.beat.Reset(every)
}

// send sends a message; mu is held. Where it fails the receiver learns why.
func (w *worker) send(m *musterpb.WorkerMessage) {
	if w.stream != nil {
		_ = w.stream.Send(m)
	}
}

// sayAgain repeats reports that were not answered; mu is held.
func (w *worker) sayAgain() {
	out := &musterpb.Reports{}
	for id, r := range w.runs {
		out.Started = append(out.Started, id)
		if r.result != nil {
			r.result.appendTo(out)
		}
	}
	w.ready = nil // it is among them
	verify.SignCommits(w.key, out.Commits...)
	if len(out.Started) > 0 {
		w.send(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Reports{Reports: out}})
	}
}

// receive handles what the leader says.
func (w *worker) receive(o *musterpb.Orders) {
	now := w.fleet.Now()
	w.mu.Lock()
	for _, s := range o.Stop {
		delete(w.runs, s.Attempt)
		delete(w.open, s.Attempt)
	}
	for _, out := range o.Outcomes {
		r := w.runs[out.Attempt]
		if r == nil {
			continue
		}
		delete(w.runs, out.Attempt)
		delete(w.open, out.Attempt)
		if !out.Accepted {
			w.fleet.refused.Add(1)
		}
		if w.fleet.Watch != nil {
			w.fleet.Watch.Answered(r.job, out.Accepted, out.Reason, r.assigned, now)
		}
	}
	if len(w.open) == 0 {
		w.report()
	}
	work := w.accept(o.Assign, now)
	w.mu.Unlock()
	if len(work) == 0 {
		return
	}
	if d := time.Duration(w.fleet.runtime.Load()); d > 0 {
		w.mu.Lock()
		started := &musterpb.Reports{}
		for _, a := range work {
			started.Started = append(started.Started, a.attempt)
		}
		w.send(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Reports{Reports: started}})
		w.mu.Unlock()
		time.AfterFunc(d, func() { w.finish(work, false) })
		return
	}
	w.finish(work, true)
}

// accept takes on the assignments that are new; mu is held.
func (w *worker) accept(list []*musterpb.Assignment, now int64) []work {
	var todo []work
	for _, a := range list {
		if a.Like > 0 && int(a.Like) <= len(list) {
			full := list[a.Like-1]
			a.Image, a.Command, a.Env, a.Inputs, a.Items, a.Resources = full.Image, full.Command, full.Env, full.Inputs, full.Items, full.Resources
		}
		if w.runs[a.Attempt] != nil || len(a.Indexes) == 0 {
			continue
		}
		r := &run{job: jobOf(a.Command), assigned: now}
		w.runs[a.Attempt] = r
		todo = append(todo, work{attempt: a.Attempt, assignment: a, run: r})
		if w.fleet.Watch != nil {
			w.fleet.Watch.Assigned(r.job, a.Attempt, now)
		}
	}
	return todo
}

// finish produces the results of attempts that ended together, and reports
// them together.
func (w *worker) finish(list []work, started bool) {
	results, err := w.produce(list)
	if err != nil {
		w.fail(list, err)
		return
	}
	if err := w.upload(results); err != nil {
		w.fail(list, err)
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, todo := range list {
		todo.run.result, todo.started = results[i], started
		w.ready = append(w.ready, todo)
	}
	if len(w.open) == 0 {
		w.report()
	} else if w.hold == nil {
		w.hold = time.AfterFunc(maxHold, func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.hold = nil
			w.report()
		})
	}
}

// maxHold is how long results wait for the answer to the ones before, as those
// of real workers do.
const maxHold = time.Second

// report says what is ready, signed together; mu is held.
func (w *worker) report() {
	if len(w.ready) == 0 || w.stream == nil {
		return
	}
	out := &musterpb.Reports{Commits: make([]*musterpb.Commit, 0, len(w.ready))}
	for _, todo := range w.ready {
		if w.runs[todo.attempt] != todo.run {
			continue // stopped meanwhile
		}
		if todo.started {
			out.Started = append(out.Started, todo.attempt)
		}
		todo.run.result.appendTo(out)
		w.open[todo.attempt] = true
	}
	w.ready = nil
	verify.SignCommits(w.key, out.Commits...)
	if len(out.Commits) > 0 {
		w.send(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Reports{Reports: out}})
	}
}

// fail gives up attempts that could not be produced: the fleet's own fault.
func (w *worker) fail(list []work, err error) {
	out := &musterpb.Reports{}
	for _, todo := range list {
		out.Failed = append(out.Failed, &musterpb.AttemptFailed{Attempt: todo.attempt, Reason: err.Error(), Blame: musterpb.Blame_BLAME_NETWORK})
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.send(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Reports{Reports: out}})
}
