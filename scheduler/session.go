package scheduler

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

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
	maxCached  = 4096     // digests that a worker may report
	maxRunning = 4096     // attempts that a worker may state
	maxHello   = 64 << 10 // bytes of what is replicated of a worker
	maxReason  = 1000     // bytes of what is replicated of a worker's words
)

// session is one connected worker. Only its own goroutines touch the stream.
type session struct {
	worker string
	owner  string
	outbox *outbox
	done   chan struct{} // closed by close
	once   sync.Once

	mu      sync.Mutex
	digests map[string]bool // guarded by mu; what the worker's cache holds
	version uint64          // guarded by mu; of digests: when they changed last, so that no two sessions share one
	heard   time.Time       // guarded by mu; of the newest heartbeat

	wasHeard bool // guarded by the leader's mu; what placement was told last
}

func (s *session) close() { s.once.Do(func() { close(s.done) }) }

// tell queues orders. A worker that does not read until the bound is hit loses
// its session; on the next one it is told everything again.
func (s *session) tell(orders func(*outbox)) {
	if !s.outbox.add(orders) {
		s.close()
	}
}

func (s *session) assign(a ...assignment) {
	s.tell(func(o *outbox) { o.assign = append(o.assign, a...) })
}

// closed reports whether close was called. Its goroutines may take a while to
// notice, where the stream does not take what is being sent.
func (s *session) closed() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// heardWithin reports whether a heartbeat came within d. A session that is
// silent gets no new work, though its stream may look sound.
func (s *session) heardWithin(d time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.heard) < d
}

func (s *session) cached(digest string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.digests[digest]
}

func (s *session) cacheVersion() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.version
}

// Serve runs a worker's session until the worker leaves, ctx ends, or this
// node stops leading. owner is the account of the key that the worker showed.
func (s *Scheduler) Serve(ctx context.Context, owner string, stream Stream) error {
	l, err := s.leading()
	if err != nil {
		return err
	}
	in := make(inbox)
	over := make(chan struct{})
	defer close(over)
	go in.fill(stream, over)
	hello, running, err := l.greet(ctx, stream, in)
	if err != nil {
		return err
	}
	id, err := l.register(ctx, owner, hello)
	if err != nil {
		return err
	}
	sess := &session{
		worker: id, owner: owner, outbox: newOutbox(), done: make(chan struct{}), digests: map[string]bool{}, version: uint64(time.Now().UnixNano()),
		heard: time.Now(), wasHeard: true,
	}
	welcome, err := l.attach(sess, running)
	if err != nil {
		return err
	}
	defer l.detach(sess)
	// A worker takes no assignment for an answer to its handshake.
	if err := stream.Send(&musterpb.SchedulerMessage{Message: &musterpb.SchedulerMessage_Welcome{Welcome: welcome}}); err != nil {
		return err
	}
	return l.serve(ctx, sess, stream, in)
}

// inbox brings a stream's messages to whoever waits for one. Sending is left to
// the goroutine of Serve: a stream must not be written to once Serve returned.
type inbox chan received

type received struct {
	message *musterpb.WorkerMessage
	err     error // the last one; nothing follows
}

// fill receives until the stream ends, which returning from Serve makes it do.
func (in inbox) fill(stream Stream, over <-chan struct{}) {
	for {
		m, err := stream.Receive()
		select {
		case in <- received{m, err}:
		case <-over:
			return
		}
		if err != nil {
			return
		}
	}
}

// greet shakes hands, for as long as that may take.
func (l *leader) greet(ctx context.Context, stream Stream, in inbox) (hello *musterpb.WorkerHello, running []string, err error) {
	timer := time.NewTimer(l.Timing.Handshake)
	defer timer.Stop()
	return shakeHands(stream, func() (*musterpb.WorkerMessage, error) {
		select {
		case r := <-in:
			return r.message, r.err
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-l.ctx.Done():
			return nil, api.Errorf(api.Unavailable, "this scheduler does not lead the cluster any more")
		case <-timer.C:
			return nil, api.Errorf(api.Unavailable, "the worker did not say who it is within %s", l.Timing.Handshake)
		}
	})
}

// register makes a worker known, or what changed of it.
func (l *leader) register(ctx context.Context, owner string, hello *musterpb.WorkerHello) (id string, err error) {
	worker := &musterpb.Worker{
		Id: string(api.WorkerIDOf(hello.PublicKey)), PublicKey: hello.PublicKey, Owner: owner, Name: hello.Name, Capacity: hello.Capacity,
		PriceMicroUsdPerHour: hello.PriceMicroUsdPerHour, AllowNetwork: hello.AllowNetwork,
	}
	if old := l.State.Worker(worker.Id); old != nil && old.Owner == owner && old.Name == worker.Name && old.Capacity.EqualVT(worker.Capacity) &&
		old.PriceMicroUsdPerHour == worker.PriceMicroUsdPerHour && old.AllowNetwork == worker.AllowNetwork {
		return worker.Id, nil // a worker that often dials again does not fill the log
	}
	return l.Propose(ctx, &musterpb.Command{Body: &musterpb.Command_RegisterWorker{RegisterWorker: &musterpb.RegisterWorker{Worker: worker}}})
}

// shakeHands proves that the worker holds the key that it shows.
func shakeHands(stream Stream, receive func() (*musterpb.WorkerMessage, error)) (*musterpb.WorkerHello, []string, error) {
	first, err := receive()
	if err != nil {
		return nil, nil, err
	}
	hello := first.GetHello()
	if len(hello.GetPublicKey()) != ed25519.PublicKeySize {
		return nil, nil, api.Errorf(api.Invalid, "a session starts with the worker's hello and its public key")
	}
	if err := checkHello(hello); err != nil {
		return nil, nil, err
	}
	nonce := make([]byte, 32)
	if _, err := rand.Read(nonce); err != nil {
		return nil, nil, fmt.Errorf("making a challenge: %w", err)
	}
	if err := stream.Send(&musterpb.SchedulerMessage{Message: &musterpb.SchedulerMessage_Challenge{Challenge: &musterpb.Challenge{Nonce: nonce}}}); err != nil {
		return nil, nil, err
	}
	second, err := receive()
	if err != nil {
		return nil, nil, err
	}
	proof := second.GetProof()
	if !ed25519.Verify(hello.PublicKey, api.ChallengeText(nonce), proof.GetSignature()) {
		return nil, nil, api.Errorf(api.Unauthenticated, "worker %s: the challenge is not signed by its key", api.WorkerIDOf(hello.PublicKey))
	}
	if len(proof.Running) > maxRunning {
		return nil, nil, api.Errorf(api.Invalid, "worker %s states %d running attempts, at most %d are taken", api.WorkerIDOf(hello.PublicKey), len(proof.Running), maxRunning)
	}
	return hello, proof.Running, nil
}

// checkHello bounds what every scheduler keeps of a worker, and wants its
// devices to be told apart.
func checkHello(hello *musterpb.WorkerHello) error {
	id := api.WorkerIDOf(hello.PublicKey)
	if n := hello.SizeVT(); n > maxHello {
		return api.Errorf(api.Invalid, "worker %s describes itself with %d bytes, at most %d are taken", id, n, maxHello)
	}
	if _, err := proto.Marshal(hello); err != nil { // the session's codec takes any text
		return api.Errorf(api.Invalid, "worker %s describes itself with text that is no UTF-8: %w", id, err)
	}
	seen := map[string]bool{}
	for _, d := range hello.Capacity.GetDevices() {
		if d.Uuid == "" || seen[d.Uuid] {
			return api.Errorf(api.Invalid, "worker %s lists device %q twice or without a UUID", id, d.Uuid)
		}
		seen[d.Uuid] = true
	}
	return nil
}

// attach makes the worker available and settles what it runs: attempts that
// are still its own go on, others stop, and what it should run and does not is
// handed out again or given up.
func (l *leader) attach(sess *session, running []string) (*musterpb.Welcome, error) {
	welcome := l.welcome(sess.worker, running)
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil, api.Errorf(api.Unavailable, "this scheduler does not lead the cluster any more")
	}
	if old := l.sessions[sess.worker]; old != nil {
		old.close() // the newer connection wins: the older one is a ghost of the network
	}
	l.sessions[sess.worker] = sess
	l.mu.Unlock()
	l.handOut(sess, running)
	l.Logger.Info("worker connected", "worker", sess.worker, "owner", sess.owner, "keeps", len(welcome.Keep), "stops", len(welcome.Stop))
	l.touch(sess.worker)
	return welcome, nil
}

// welcome answers a worker's handshake: which of its attempts go on.
func (l *leader) welcome(worker string, running []string) *musterpb.Welcome {
	welcome := &musterpb.Welcome{
		Worker: worker, LeaseTtlMs: l.Timing.LeaseTTL.Milliseconds(), HeartbeatMs: (l.Timing.LeaseTTL / 5).Milliseconds(),
	}
	for _, n := range l.State.Nodes() {
		welcome.Schedulers = append(welcome.Schedulers, n.ApiAddress)
	}
	for _, id := range running {
		if l.mayContinue(worker, id) {
			welcome.Keep = append(welcome.Keep, id)
			l.renew(id, worker)
		} else {
			welcome.Stop = append(welcome.Stop, id)
		}
	}
	return welcome
}

// handOut assigns again what the worker was to run and never got, and gives up
// what it lost.
func (l *leader) handOut(sess *session, running []string) {
	stated := map[string]bool{}
	for _, id := range running {
		stated[id] = true
	}
	for _, a := range l.State.LiveAttemptsOf(sess.worker) {
		if stated[a.Id] || l.examined(a.Id) {
			continue
		}
		if a.State == musterpb.AttemptState_ATTEMPT_STATE_PLACED {
			l.renew(a.Id, sess.worker)
			sess.assign(l.assignment(a))
			continue
		}
		// An error means that it is over already, or that the leadership is.
		_ = l.end(l.ctx, &musterpb.EndAttempt{
			Attempt: a.Id, State: musterpb.AttemptState_ATTEMPT_STATE_LOST, Blame: musterpb.Blame_BLAME_NETWORK,
			Reason: fmt.Sprintf("worker %s came back without it", a.Worker),
		})
	}
}

// session is the session of a worker, nil while it has none.
func (l *leader) session(worker string) *session {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open(worker)
}

// open is session for callers that hold mu.
func (l *leader) open(worker string) *session {
	if s := l.sessions[worker]; s != nil && !s.closed() {
		return s
	}
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
		if a.Check != "" {
			// Its result is refused, as that of work is when another came first.
			// Stopping it at once, and not work, would tell the two apart.
			check := l.State.Check(a.Check)
			verdict := check.GetVerdict()
			return check != nil && (verdict == musterpb.Verdict_VERDICT_UNSPECIFIED || verdict == musterpb.Verdict_VERDICT_AWAITING_DATA)
		}
		return job != nil && !state.Ended(job.State) && task.GetResult() == ""
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
	running := l.State.LiveAttemptsOf(sess.worker)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sessions[sess.worker] != sess {
		return
	}
	delete(l.sessions, sess.worker)
	l.touched[sess.worker] = struct{}{}
	grace := time.Now().Add(l.Timing.ReconnectGrace)
	for _, a := range running {
		if lease := l.leases[a.Id]; lease != nil && lease.deadline.After(grace) {
			lease.deadline = grace
		}
	}
	l.Logger.Info("worker disconnected", "worker", sess.worker)
}

// serve moves messages both ways until the first of them fails.
func (l *leader) serve(ctx context.Context, sess *session, stream Stream, in inbox) error {
	ended := make(chan error, 1)
	var receiver sync.WaitGroup
	defer receiver.Wait()
	defer sess.close()
	receiver.Go(func() { // beside the sender, which a slow worker holds up
		for {
			select {
			case r := <-in:
				if r.err != nil {
					ended <- r.err
					return
				}
				l.receive(sess, r.message)
			case <-sess.done:
				return
			}
		}
	})
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-ended:
			return err
		case <-sess.done:
			return api.Errorf(api.Unavailable, "the session was ended: this scheduler stopped leading, a newer session of the worker began, or it reads too slowly")
		case <-sess.outbox.wake:
			for m := sess.outbox.take(); m != nil && !sess.closed(); m = sess.outbox.take() {
				if err := stream.Send(m); err != nil {
					return err
				}
			}
		}
	}
}

// receive handles one message of a worker. What takes time runs beside it, so
// that heartbeats are never late, and only for attempts of the worker's own that
// are under way: a worker can't make this scheduler work for nothing.
func (l *leader) receive(sess *session, m *musterpb.WorkerMessage) {
	switch m := m.Message.(type) {
	case *musterpb.WorkerMessage_Heartbeat:
		l.heartbeat(sess, m.Heartbeat)
	case *musterpb.WorkerMessage_Reports:
		l.reports(sess, m.Reports)
	}
}

// live reports whether a worker may be busy with the attempt.
func live(a *musterpb.Attempt) bool {
	return a.State == musterpb.AttemptState_ATTEMPT_STATE_PLACED || a.State == musterpb.AttemptState_ATTEMPT_STATE_RUNNING
}

// own is an attempt of the worker, nil for any other.
func (l *leader) own(worker, id string) *musterpb.Attempt {
	if a := l.State.Attempt(id); a != nil && a.Worker == worker {
		return a
	}
	return nil
}

// jobOf is the job of an attempt, nil where either is gone: both may be sealed
// between two reads.
func (l *leader) jobOf(attempt string) *musterpb.Job {
	a := l.State.Attempt(attempt)
	if a == nil {
		return nil
	}
	return l.State.Job(a.Job)
}

func (l *leader) heartbeat(sess *session, h *musterpb.Heartbeat) {
	for _, id := range h.Running[:min(len(h.Running), maxRunning)] {
		if sess.closed() {
			return // it does not read what it is told
		}
		l.renew(id, sess.worker)
		if !l.mayContinue(sess.worker, id) && !l.examined(id) {
			reason := "it is not one of this worker's"
			if a := l.own(sess.worker, id); a != nil {
				reason = fmt.Sprintf("it is %s", state.StateName(a.State))
			}
			sess.tell(func(o *outbox) { o.stop = append(o.stop, &musterpb.Stop{Attempt: id, Reason: reason}) })
		}
	}
	l.keepTails(sess.worker, h.Logs)
	if sess.hear(h) {
		l.touch(sess.worker)
	}
}

// keepTails keeps the newest output of the worker's attempts: one tail of each in
// a heartbeat.
func (l *leader) keepTails(worker string, tails []*musterpb.LogTail) {
	if len(tails) == 0 {
		return
	}
	seen := make(map[string]bool, len(tails))
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, tail := range tails {
		lease := l.leases[tail.Attempt]
		if lease == nil || lease.worker != worker || seen[tail.Attempt] {
			continue
		}
		seen[tail.Attempt] = true
		lease.log = append(lease.log, tail.Data...)
		if over := len(lease.log) - maxLogTail; over > 0 {
			lease.log = slices.Clone(lease.log[over:])
		}
	}
}

// hear takes up what a heartbeat says of the worker, and reports whether its
// cache changed.
func (s *session) hear(h *musterpb.Heartbeat) (changed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heard = time.Now()
	before := s.digests
	if h.Full {
		s.digests = map[string]bool{}
	}
	for _, digest := range h.Cached {
		if _, err := api.ParseDigest(digest); err == nil && len(s.digests) < maxCached && !s.digests[digest] {
			s.digests[digest] = true
			changed = true
		}
	}
	if h.Full {
		changed = !maps.Equal(before, s.digests)
	}
	if changed {
		s.version = uint64(s.heard.UnixNano())
	}
	return changed
}

func (l *leader) examined(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.busy[id]
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
		if l.open(id) != nil {
			out[id] = true
		}
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
