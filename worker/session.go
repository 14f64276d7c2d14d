package worker

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
)

// handshakeWithin is how long a scheduler may take to answer.
const handshakeWithin = 15 * time.Second

type stream = connect.BidiStreamForClient[musterpb.WorkerMessage, musterpb.SchedulerMessage]

// connect dials the scheduler that is most likely to lead and runs one session
// with it. It returns why that ended.
func (w *Worker) connect(ctx context.Context) error {
	var receiver sync.WaitGroup
	defer receiver.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the stream, and with it the receiver
	address := w.addresses()[0]
	s := client.Session(ctx, w.http, address, w.APIKey)
	// The transport notices the end of ctx only where it does not wait for more of
	// the request.
	context.AfterFunc(ctx, func() { _ = s.CloseRequest() })
	silent := time.AfterFunc(handshakeWithin, cancel)
	welcome, err := w.shakeHands(s)
	if !silent.Stop() {
		err = api.Errorf(api.Unavailable, "the scheduler did not answer within %s", handshakeWithin)
	}
	if err != nil {
		var ce *connect.Error
		if leader := ""; errors.As(err, &ce) {
			if leader = ce.Meta().Get(client.HeaderLeader); leader != "" && leader != address {
				w.prefer(leader)
				return errRedirected
			}
		}
		// Only a scheduler's own word counts: a stream that breaks has codes too.
		if k := api.KindOf(err); connect.IsWireError(err) && (k == api.Denied || k == api.Unauthenticated || k == api.Invalid) {
			return &refusal{fmt.Errorf("%s: %w", address, api.FromConnect(err))}
		}
		w.demote(address)
		return fmt.Errorf("%s: %w", address, api.FromConnect(err))
	}
	w.learn(welcome.Schedulers)
	w.Logger.Info("connected", "scheduler", address, "worker", w.id)
	return w.serve(ctx, s, welcome, &receiver)
}

// shakeHands proves the worker's identity and says what it runs.
func (w *Worker) shakeHands(s *stream) (*musterpb.Welcome, error) {
	send := func(m *musterpb.WorkerMessage) error {
		err := s.Send(m)
		if errors.Is(err, io.EOF) {
			_, err = s.Receive() // the server's own error
		}
		return err
	}
	if err := send(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Hello{Hello: w.hello()}}); err != nil {
		return nil, err
	}
	m, err := s.Receive()
	if err != nil {
		return nil, err
	}
	nonce := m.GetChallenge().GetNonce()
	if len(nonce) < 16 {
		return nil, api.Errorf(api.Internal, "the scheduler's challenge has %d bytes", len(nonce))
	}
	proof := &musterpb.WorkerProof{Signature: ed25519.Sign(w.Key, api.ChallengeText(nonce)), Running: w.running()}
	if err := send(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Proof{Proof: proof}}); err != nil {
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

// serve is one session: heartbeats and reports out, assignments in.
func (w *Worker) serve(ctx context.Context, s *stream, welcome *musterpb.Welcome, receiver *sync.WaitGroup) error {
	for _, id := range welcome.Stop {
		w.forget(id, "the schedulers do not want it any more")
	}
	w.news.begin()
	w.reportAgain()
	received := make(chan error, 1)
	receiver.Go(func() {
		for {
			m, err := s.Receive()
			if err != nil {
				received <- err
				return
			}
			w.receive(m)
		}
	})
	beat := time.NewTicker(max(time.Duration(welcome.HeartbeatMs)*time.Millisecond, 50*time.Millisecond))
	defer beat.Stop()
	full := true // the first heartbeat lists the whole cache
	for n := 0; ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-received:
			if errors.Is(err, io.EOF) {
				err = errSilent
			}
			return api.FromConnect(err)
		case <-w.restate:
			return errInventory
		case <-w.news.wake:
			for m := w.news.take(w.sign); m != nil; m = w.news.take(w.sign) {
				if err := s.Send(m); err != nil {
					return fmt.Errorf("sending: %w", err)
				}
			}
		case <-beat.C:
			if err := s.Send(w.heartbeat(full)); err != nil {
				return fmt.Errorf("sending a heartbeat: %w", err)
			}
			full = false
			if n++; n%10 == 0 {
				full = true
				w.reportAgain()
			}
		}
	}
}

// receive handles one message. Nothing here waits.
func (w *Worker) receive(m *musterpb.SchedulerMessage) {
	orders := m.GetOrders()
	for _, a := range orders.GetAssign() {
		if a.Like > 0 {
			if a.Like > uint32(len(orders.Assign)) {
				w.Logger.Warn("an assignment makes no sense", "attempt", a.Attempt, "like", a.Like)
				continue
			}
			a = alike(orders.Assign[a.Like-1], a)
		}
		w.start(a)
	}
	for _, s := range orders.GetStop() {
		w.forget(s.Attempt, s.Reason)
		w.news.answered(s.Attempt)
	}
	for _, o := range orders.GetOutcomes() {
		if !o.Accepted {
			w.Logger.Warn("a result was refused", "attempt", o.Attempt, "reason", o.Reason)
		}
		w.forget(o.Attempt, "")
		w.news.answered(o.Attempt)
	}
}

// alike is an assignment that differs from a full one in what it says itself.
func alike(full, a *musterpb.Assignment) *musterpb.Assignment {
	return &musterpb.Assignment{
		Attempt: a.Attempt, Indexes: a.Indexes, Devices: a.Devices, PriceMicroUsdPerHour: a.PriceMicroUsdPerHour,
		Image: full.Image, Command: full.Command, Env: full.Env, Inputs: full.Inputs, Items: full.Items,
		Resources: full.Resources, TimeoutMs: full.TimeoutMs, Outputs: full.Outputs, Network: full.Network,
	}
}

// Bounds of a heartbeat: the log output of one attempt and of all together, and
// the digests of the cache.
const (
	maxTail   = 16 << 10
	maxTails  = 1 << 20
	maxCached = 4096
)

func (w *Worker) heartbeat(full bool) *musterpb.WorkerMessage {
	h := &musterpb.Heartbeat{Full: full}
	w.mu.Lock()
	tails := 0
	for id, r := range w.runs {
		h.Running = append(h.Running, id)
		if tails >= maxTails {
			continue // the others' output comes with the next heartbeat
		}
		if tail := r.log.take(); len(tail) > 0 {
			h.Logs = append(h.Logs, &musterpb.LogTail{Attempt: id, Data: tail})
			tails += len(tail)
		}
	}
	w.mu.Unlock()
	if full {
		digests := w.cache.Digests()
		for _, d := range digests[:min(len(digests), maxCached)] {
			h.Cached = append(h.Cached, string(d))
		}
	}
	return &musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Heartbeat{Heartbeat: h}}
}

// running lists every attempt whose end the schedulers have not confirmed.
func (w *Worker) running() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	ids := make([]string, 0, len(w.runs))
	for id := range w.runs {
		ids = append(ids, id)
	}
	return ids
}

// reportAgain repeats the reports that were not answered.
func (w *Worker) reportAgain() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.runs {
		if r.started { // first: time that nobody saw the start of is not paid
			w.news.sayStarted(r.assignment.Attempt)
		}
		if r.report != nil {
			w.news.sayEnded(r.report)
		}
	}
}

// start runs an assignment, unless it runs already.
func (w *Worker) start(a *musterpb.Assignment) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.runs[a.Attempt] != nil {
		return
	}
	if err := checkAssignment(a); err != nil {
		w.Logger.Warn("an assignment makes no sense", "attempt", a.Attempt, "err", err)
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &run{assignment: a, cancel: cancel, log: newTail()}
	w.runs[a.Attempt] = r
	w.attempts.Go(func() {
		defer cancel()
		report := w.execute(ctx, r)
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.runs[a.Attempt] == r { // nobody stopped it meanwhile
			r.report = report
			w.news.sayEnded(report)
		}
	})
}

// checkAssignment keeps a scheduler from naming files outside of the attempt's
// directory, and this worker from a message that lacks a part.
func checkAssignment(a *musterpb.Assignment) error {
	if a.Attempt == "." || !filepath.IsLocal(a.Attempt) || filepath.Base(a.Attempt) != a.Attempt {
		return api.Errorf(api.Invalid, "attempt %q is no name of a directory", a.Attempt)
	}
	if a.Image == nil || a.Items == nil || a.Resources == nil {
		return api.Errorf(api.Invalid, "image, items or resources are missing")
	}
	for _, in := range a.Inputs {
		if !filepath.IsLocal(filepath.FromSlash(in.Path)) {
			return api.Errorf(api.Invalid, "input %q is not below /in", in.Path)
		}
	}
	return nil
}

// forget stops an attempt, if it still runs, and drops it.
func (w *Worker) forget(id, reason string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if r := w.runs[id]; r != nil {
		if reason != "" {
			w.Logger.Info("attempt stopped", "attempt", id, "reason", reason)
		}
		r.cancel()
		delete(w.runs, id)
	}
}
