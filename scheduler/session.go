package scheduler

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// Stream is a worker's connection.
type Stream interface {
	Send(*musterpb.SchedulerMessage) error
	Receive() (*musterpb.WorkerMessage, error)
}

// Bounds of a session.
const (
	maxOutbox       = 4096 // messages that wait for a slow worker
	maxCached       = 4096 // digests that a worker may report
	handshakeWithin = 15 * time.Second
)

// session is one connected worker. Only its own goroutines touch the stream.
type session struct {
	worker string
	owner  string
	outbox chan *musterpb.SchedulerMessage
	done   chan struct{} // closed by close
	once   sync.Once

	mu      sync.Mutex
	digests map[string]bool // guarded by mu; what the worker's cache holds
}

func (s *session) close() { s.once.Do(func() { close(s.done) }) }

// send queues a message. A worker that does not read until the bound is hit
// loses its session; on the next one it is told everything again.
func (s *session) send(m *musterpb.SchedulerMessage) {
	select {
	case s.outbox <- m:
	default:
		s.close()
	}
}

func (s *session) cached(digest string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.digests[digest]
}

// Serve runs a worker's session until the worker leaves, ctx ends, or this
// node stops leading. owner is the account of the key that the worker showed.
func (s *Scheduler) Serve(ctx context.Context, owner string, stream Stream) error {
	l, err := s.leading()
	if err != nil {
		return err
	}
	hello, running, err := shakeHands(stream)
	if err != nil {
		return err
	}
	id := string(api.WorkerIDOf(hello.PublicKey))
	worker := &musterpb.Worker{
		Id: id, PublicKey: hello.PublicKey, Owner: owner, Name: hello.Name, Capacity: hello.Capacity,
		PriceMicroUsdPerHour: hello.PriceMicroUsdPerHour, AllowNetwork: hello.AllowNetwork,
	}
	if _, err := s.Propose(ctx, &musterpb.Command{Body: &musterpb.Command_RegisterWorker{RegisterWorker: &musterpb.RegisterWorker{Worker: worker}}}); err != nil {
		return err
	}
	sess := &session{
		worker: id, owner: owner, outbox: make(chan *musterpb.SchedulerMessage, maxOutbox), done: make(chan struct{}), digests: map[string]bool{},
	}
	if err := l.attach(ctx, sess, running); err != nil {
		return err
	}
	defer l.detach(sess)
	return l.serve(ctx, sess, stream)
}

// shakeHands proves that the worker holds the key that it shows.
func shakeHands(stream Stream) (*musterpb.WorkerHello, []string, error) {
	first, err := stream.Receive()
	if err != nil {
		return nil, nil, err
	}
	hello := first.GetHello()
	if len(hello.GetPublicKey()) != ed25519.PublicKeySize {
		return nil, nil, api.Errorf(api.Invalid, "a session starts with the worker's hello and its public key")
	}
	nonce := make([]byte, 32)
	if _, err := rand.Read(nonce); err != nil {
		return nil, nil, fmt.Errorf("making a challenge: %w", err)
	}
	if err := stream.Send(&musterpb.SchedulerMessage{Message: &musterpb.SchedulerMessage_Challenge{Challenge: &musterpb.Challenge{Nonce: nonce}}}); err != nil {
		return nil, nil, err
	}
	second, err := stream.Receive()
	if err != nil {
		return nil, nil, err
	}
	proof := second.GetProof()
	if !ed25519.Verify(hello.PublicKey, api.ChallengeText(nonce), proof.GetSignature()) {
		return nil, nil, api.Errorf(api.Unauthenticated, "worker %s: the challenge is not signed by its key", api.WorkerIDOf(hello.PublicKey))
	}
	return hello, proof.Running, nil
}

// attach makes the worker available and settles what it runs: attempts that
// are still its own go on, others stop, and what it should run and does not is
// handed out again or given up.
func (l *leader) attach(ctx context.Context, sess *session, running []string) error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return api.Errorf(api.Unavailable, "this scheduler does not lead the cluster any more")
	}
	if old := l.sessions[sess.worker]; old != nil {
		old.close() // the newer connection wins: the older one is a ghost of the network
	}
	l.sessions[sess.worker] = sess
	l.mu.Unlock()

	welcome := &musterpb.Welcome{
		Worker: sess.worker, LeaseTtlMs: l.Timing.LeaseTTL.Milliseconds(), HeartbeatMs: (l.Timing.LeaseTTL / 5).Milliseconds(),
	}
	for _, n := range l.State.Nodes() {
		welcome.Schedulers = append(welcome.Schedulers, n.ApiAddress)
	}
	for _, id := range running {
		if l.mayContinue(sess.worker, id) {
			welcome.Keep = append(welcome.Keep, id)
			l.renew(id, sess.worker)
		} else {
			welcome.Stop = append(welcome.Stop, id)
		}
	}
	sess.send(&musterpb.SchedulerMessage{Message: &musterpb.SchedulerMessage_Welcome{Welcome: welcome}})
	for _, a := range l.State.LiveAttempts() {
		if a.Worker != sess.worker || slices.Contains(running, a.Id) {
			continue
		}
		if a.State == musterpb.AttemptState_ATTEMPT_STATE_PLACED {
			l.renew(a.Id, sess.worker)
			sess.send(&musterpb.SchedulerMessage{Message: &musterpb.SchedulerMessage_Assign{Assign: l.assignment(a)}})
			continue
		}
		l.end(ctx, &musterpb.EndAttempt{
			Attempt: a.Id, State: musterpb.AttemptState_ATTEMPT_STATE_LOST, Blame: musterpb.Blame_BLAME_NETWORK,
			Reason: fmt.Sprintf("worker %s came back without it", a.Worker),
		})
	}
	l.Logger.Info("worker connected", "worker", sess.worker, "owner", sess.owner, "keeps", len(welcome.Keep), "stops", len(welcome.Stop))
	l.nudge()
	return nil
}

// mayContinue reports whether a result of the attempt could still count.
func (l *leader) mayContinue(worker, id string) bool {
	a := l.State.Attempt(id)
	if a == nil || a.Worker != worker {
		return false
	}
	switch a.State {
	case musterpb.AttemptState_ATTEMPT_STATE_PLACED, musterpb.AttemptState_ATTEMPT_STATE_RUNNING:
		return true
	case musterpb.AttemptState_ATTEMPT_STATE_LOST:
		job, task := l.State.Job(a.Job), l.State.Task(a.Job, a.Task)
		return a.Check == "" && !state.Ended(job.State) && task.Result == ""
	}
	return false
}

func (l *leader) renew(id, worker string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if lease := l.leases[id]; lease != nil && lease.worker == worker {
		lease.deadline = time.Now().Add(l.Timing.LeaseTTL)
	}
}

// detach leaves a broken session's leases a short grace, so that a worker may
// dial again and lose nothing.
func (l *leader) detach(sess *session) {
	sess.close()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sessions[sess.worker] != sess {
		return
	}
	delete(l.sessions, sess.worker)
	grace := time.Now().Add(l.Timing.ReconnectGrace)
	for _, lease := range l.leases {
		if lease.worker == sess.worker && lease.deadline.After(grace) {
			lease.deadline = grace
		}
	}
	l.Logger.Info("worker disconnected", "worker", sess.worker)
}

// serve moves messages both ways until the first of them fails.
func (l *leader) serve(ctx context.Context, sess *session, stream Stream) error {
	received := make(chan error, 1)
	go func() {
		// Ends with the stream: returning from Serve closes it.
		for {
			m, err := stream.Receive()
			if err != nil {
				received <- err
				return
			}
			l.receive(ctx, sess, m)
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-received:
			return err
		case <-sess.done:
			return api.Errorf(api.Unavailable, "the session was ended: this scheduler stopped leading, a newer session of the worker began, or it reads too slowly")
		case m := <-sess.outbox:
			if err := stream.Send(m); err != nil {
				return err
			}
		}
	}
}

// receive handles one message of a worker. What takes time runs beside it, so
// that heartbeats are never late.
func (l *leader) receive(ctx context.Context, sess *session, m *musterpb.WorkerMessage) {
	switch m := m.Message.(type) {
	case *musterpb.WorkerMessage_Heartbeat:
		l.heartbeat(sess, m.Heartbeat)
	case *musterpb.WorkerMessage_Started:
		if a := l.own(sess, m.Started.Attempt); a == nil || a.State != musterpb.AttemptState_ATTEMPT_STATE_PLACED {
			return
		}
		l.examine(ctx, "start "+m.Started.Attempt, func() {
			if _, err := l.Propose(ctx, &musterpb.Command{Body: &musterpb.Command_StartAttempt{StartAttempt: &musterpb.StartAttempt{Attempt: m.Started.Attempt}}}); err != nil {
				l.Logger.Debug("a start was refused", "attempt", m.Started.Attempt, "err", err)
			}
		})
	case *musterpb.WorkerMessage_Commit:
		l.examine(ctx, m.Commit.Attempt, func() { l.commit(ctx, sess, m.Commit) })
	case *musterpb.WorkerMessage_Failed:
		l.examine(ctx, m.Failed.Attempt, func() { l.failed(ctx, sess, m.Failed) })
	}
}

// own is an attempt of the session's worker, nil for any other.
func (l *leader) own(sess *session, id string) *musterpb.Attempt {
	if a := l.State.Attempt(id); a != nil && a.Worker == sess.worker {
		return a
	}
	return nil
}

func (l *leader) heartbeat(sess *session, h *musterpb.Heartbeat) {
	for _, id := range h.Running {
		l.renew(id, sess.worker)
		if !l.mayContinue(sess.worker, id) && !l.examined(id) {
			reason := "it is not known to the schedulers"
			if a := l.State.Attempt(id); a != nil {
				reason = fmt.Sprintf("it is %s", state.StateName(a.State))
			}
			sess.send(&musterpb.SchedulerMessage{Message: &musterpb.SchedulerMessage_Stop{Stop: &musterpb.Stop{Attempt: id, Reason: reason}}})
		}
	}
	l.mu.Lock()
	for _, tail := range h.Logs {
		if lease := l.leases[tail.Attempt]; lease != nil && lease.worker == sess.worker {
			lease.log = append(lease.log, tail.Data...)
			lease.log = slices.Clone(lease.log[max(0, len(lease.log)-maxLogTail):])
		}
	}
	l.mu.Unlock()
	sess.mu.Lock()
	defer sess.mu.Unlock()
	if h.Full {
		sess.digests = map[string]bool{}
	}
	for _, digest := range h.Cached {
		if len(sess.digests) < maxCached {
			sess.digests[digest] = true
		}
	}
}

func (l *leader) examined(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.busy[id]
}

// commit examines a result and enters it into the log.
func (l *leader) commit(ctx context.Context, sess *session, c *musterpb.Commit) {
	a := l.own(sess, c.Attempt)
	if a == nil {
		sess.outcome(c.Attempt, api.Errorf(api.Denied, "attempt %q is not one of worker %s", c.Attempt, sess.worker))
		return
	}
	if a.Commit != nil && a.Commit.EqualVT(c) {
		sess.outcome(c.Attempt, nil)
		return
	}
	if !l.mayContinue(sess.worker, a.Id) {
		sess.outcome(c.Attempt, api.Errorf(api.Conflict, "attempt %s is over: it is %s (%s)", a.Id, state.StateName(a.State), a.Reason))
		return
	}
	err := l.checkResult(ctx, a, c)
	if err == nil {
		_, err = l.Propose(ctx, &musterpb.Command{Body: &musterpb.Command_CommitResult{CommitResult: &musterpb.CommitResult{Commit: c}}})
		if err == nil || api.KindOf(err) == api.Conflict {
			sess.outcome(c.Attempt, err)
			return
		}
	}
	blame, ours := refusalBlame(err)
	if ours && ctx.Err() == nil && api.KindOf(err) == api.Unavailable {
		l.Logger.Warn("a result could not be examined; the worker offers it again", "attempt", a.Id, "err", err)
		return
	}
	if a.State == musterpb.AttemptState_ATTEMPT_STATE_LOST {
		sess.outcome(c.Attempt, err)
		return
	}
	l.end(ctx, &musterpb.EndAttempt{
		Attempt: a.Id, State: musterpb.AttemptState_ATTEMPT_STATE_FAILED, Blame: blame, Reason: "result refused: " + err.Error(), LogDigest: c.LogDigest,
	})
	sess.outcome(c.Attempt, err)
}

// failed ends an attempt that the worker gave up.
func (l *leader) failed(ctx context.Context, sess *session, f *musterpb.AttemptFailed) {
	if l.own(sess, f.Attempt) != nil {
		end := &musterpb.EndAttempt{
			Attempt: f.Attempt, State: musterpb.AttemptState_ATTEMPT_STATE_FAILED, Reason: clip(f.Reason, 1000),
			Blame: f.Blame, ExitCode: f.ExitCode, LogDigest: f.LogDigest,
		}
		if f.Cancelled {
			end.State, end.Blame = musterpb.AttemptState_ATTEMPT_STATE_LOST, musterpb.Blame_BLAME_NETWORK
		}
		l.end(ctx, end)
	}
	sess.outcome(f.Attempt, nil)
}

// outcome tells the worker that it may forget the attempt.
func (s *session) outcome(attempt string, err error) {
	o := &musterpb.Outcome{Attempt: attempt, Accepted: err == nil}
	if err != nil {
		o.Reason = err.Error()
	}
	s.send(&musterpb.SchedulerMessage{Message: &musterpb.SchedulerMessage_Outcome{Outcome: o}})
}

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:n] + "…"
}

// Connected reports which workers have a session.
func (s *Scheduler) Connected() map[string]bool {
	l, err := s.leading()
	if err != nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[string]bool{}
	for id := range l.sessions {
		out[id] = true
	}
	return out
}

// LogTail is the newest output of a running attempt, as far as it was reported.
func (s *Scheduler) LogTail(attempt string) []byte {
	l, err := s.leading()
	if err != nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if lease := l.leases[attempt]; lease != nil {
		return slices.Clone(lease.log)
	}
	return nil
}
