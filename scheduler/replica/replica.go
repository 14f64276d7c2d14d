// Package replica replicates commands with Raft: Propose on the leader, Apply
// on every scheduler. It is the only importer of hashicorp/raft.
//
// Throughput comes from group commit: commands that wait together travel as
// one log entry, are written to disk once, and are answered one by one.
package replica

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// Bounds of one log entry, and of what may wait for one.
const (
	maxEntryCommands = 4096
	maxEntryBytes    = 1 << 20
	maxQueued        = 65536
	maxInFlight      = 8 // entries that were given to Raft and not answered
)

// LogCache is how many entries stay in memory for followers that lag a little;
// under load one has hundreds of kilobytes.
const LogCache = 128

// Config is what a replica needs to know.
type Config struct {
	ID     api.NodeID
	Dir    string // of the log and the snapshots
	Listen string // TCP address of the Raft transport
	// Advertise is the address that the others dial; empty is Listen's.
	Advertise string
	// Bootstrap starts a new cluster of this one node where Dir holds none.
	Bootstrap bool
	// ElectionTimeout is how long a silent leader is followed; 0 is one second.
	ElectionTimeout time.Duration
	// Snapshots says when the log is replaced by a snapshot.
	Snapshots Snapshots
	Logger    *slog.Logger

	segmentBytes int // of the log's files; 0 is the log's own default, 64 MiB
}

// Snapshots says when the log is replaced by a snapshot; a field that is 0 has
// its default.
type Snapshots struct {
	Threshold uint64        // entries since the last one; 16,384
	Interval  time.Duration // how often that is looked at; about 2 min
	Trailing  uint64        // entries that are kept for followers that lag; 10,240
}

// Replica is one member of the Raft group. All methods are safe for
// concurrent use.
type Replica struct {
	raft      *raft.Raft
	transport *raft.NetworkTransport
	log       *wal.WAL
	state     *state.State
	logger    *slog.Logger
	queue     chan *proposal
	inFlight  chan flight
	reads     chan chan error // who waits for a confirmation of the lead
	done      chan struct{}   // closed by Close
	closing   sync.Once
	closeErr  error // set under closing
	wg        sync.WaitGroup
	clock     clock
	observer  *raft.Observer
	elections bell
	ready     atomic.Uint64 // the term that this node leads, having applied all that came before; 0 is none
}

// proposal is commands that were proposed together.
type proposal struct {
	cmds   []*musterpb.Command
	answer chan result // buffered: the answering side never blocks
}

type result struct {
	answers []*musterpb.Answer
	err     error
}

type flight struct {
	batch    []*proposal
	commands int
	future   raft.ApplyFuture
}

// Open recovers the log in cfg.Dir, applies it to st, and joins the group.
func Open(cfg Config, st *state.State) (_ *Replica, err error) {
	if err := os.MkdirAll(filepath.Join(cfg.Dir, "wal"), 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	r := &Replica{
		state: st, logger: cfg.Logger, queue: make(chan *proposal, maxQueued),
		inFlight: make(chan flight, maxInFlight), reads: make(chan chan error), done: make(chan struct{}),
	}
	defer func() {
		if err != nil {
			r.closeStores()
		}
	}()
	hlog := hclog.New(&hclog.LoggerOptions{Name: "raft", Level: hclog.Warn, Output: logWriter{cfg.Logger}, DisableTime: true})
	if r.log, err = wal.Open(filepath.Join(cfg.Dir, "wal"), wal.WithLogger(hlog), wal.WithSegmentSize(cmp.Or(cfg.segmentBytes, wal.DefaultSegmentSize))); err != nil {
		return nil, fmt.Errorf("opening the log in %s: %w", cfg.Dir, err)
	}
	cache, err := raft.NewLogCache(LogCache, r.log)
	if err != nil {
		return nil, err
	}
	snapshots, err := raft.NewFileSnapshotStoreWithLogger(cfg.Dir, 2, hlog)
	if err != nil {
		return nil, fmt.Errorf("opening the snapshots in %s: %w", cfg.Dir, err)
	}
	if r.transport, err = openTransport(cfg, hlog); err != nil {
		return nil, err
	}
	conf := raftConfig(cfg, hlog)
	if cfg.Bootstrap {
		has, err := raft.HasExistingState(cache, r.log, snapshots)
		if err != nil {
			return nil, err
		}
		if !has {
			servers := raft.Configuration{Servers: []raft.Server{{ID: conf.LocalID, Address: r.transport.LocalAddr()}}}
			if err := raft.BootstrapCluster(conf, cache, r.log, snapshots, r.transport, servers); err != nil {
				return nil, fmt.Errorf("starting a new cluster: %w", err)
			}
		}
	}
	if r.raft, err = raft.NewRaft(conf, (*fsm)(st), cache, r.log, snapshots, r.transport); err != nil {
		return nil, fmt.Errorf("starting raft: %w", err)
	}
	r.watchElections()
	r.wg.Go(r.group)
	r.wg.Go(r.answer)
	r.wg.Go(r.verify)
	return r, nil
}

func openTransport(cfg Config, hlog hclog.Logger) (*raft.NetworkTransport, error) {
	var advertise net.Addr
	if cfg.Advertise != "" {
		addr, err := net.ResolveTCPAddr("tcp", cfg.Advertise)
		if err != nil {
			return nil, api.Errorf(api.Invalid, "raft address %q: %w", cfg.Advertise, err)
		}
		advertise = addr
	}
	t, err := raft.NewTCPTransportWithLogger(cfg.Listen, advertise, 4, 10*time.Second, hlog)
	if err != nil {
		return nil, fmt.Errorf("listening for raft on %s: %w", cfg.Listen, err)
	}
	return t, nil
}

func raftConfig(cfg Config, hlog hclog.Logger) *raft.Config {
	c := RaftConfig(cmp.Or(cfg.ElectionTimeout, time.Second))
	c.LocalID = raft.ServerID(cfg.ID)
	c.Logger = hlog
	c.SnapshotThreshold = cmp.Or(cfg.Snapshots.Threshold, 16384)
	c.SnapshotInterval = cmp.Or(cfg.Snapshots.Interval, c.SnapshotInterval)
	c.TrailingLogs = cmp.Or(cfg.Snapshots.Trailing, c.TrailingLogs)
	return c
}

// RaftConfig is how Raft is set up, but for what differs between nodes. The
// measurement of bare Raft (bench/load/rawraft) uses it too. BatchApplyCh stays
// off: Raft forgets the futures in that channel when it shuts down.
func RaftConfig(electionTimeout time.Duration) *raft.Config {
	c := raft.DefaultConfig()
	// As long as its followers wait, so that a busy machine deposes nobody.
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = electionTimeout, electionTimeout, electionTimeout
	// How late an idle follower learns of a commit: it has to reveal soon.
	c.CommitTimeout = 10 * time.Millisecond
	c.MaxAppendEntries = 256
	return c
}

// Propose replicates a command and returns what Apply answered. The command
// belongs to the replica from then on. An error means that this node could not
// say what became of it: it does not lead, or lost the lead meanwhile; a client
// that repeats the command under the same ID gets the one answer.
func (r *Replica) Propose(ctx context.Context, cmd *musterpb.Command) (*musterpb.Answer, error) {
	answers, err := r.ProposeAll(ctx, []*musterpb.Command{cmd})
	if err != nil {
		return nil, err
	}
	return answers[0], nil
}

// MaxTogether bounds how many commands one ProposeAll may carry.
const MaxTogether = maxEntryCommands

// ProposeAll is Propose for commands that are at hand together: they are applied
// one right after the other, in order, and each has its own answer. An error is
// one for all of them.
func (r *Replica) ProposeAll(ctx context.Context, cmds []*musterpb.Command) ([]*musterpb.Answer, error) {
	if len(cmds) == 0 {
		return nil, nil
	}
	if len(cmds) > MaxTogether {
		return nil, api.Errorf(api.TooLarge, "%d commands at once: at most %d are taken", len(cmds), MaxTogether)
	}
	p := &proposal{cmds: cmds, answer: make(chan result, 1)}
	select {
	case r.queue <- p:
	default:
		return nil, api.Errorf(api.Unavailable, "%d proposals are waiting: the scheduler is overloaded, try again", maxQueued)
	}
	select {
	case res := <-p.answer:
		return res.answers, res.err
	case <-ctx.Done():
		return nil, api.Errorf(api.Unavailable, "waiting for the schedulers to agree: %w", ctx.Err())
	case <-r.done:
		return nil, errStopped
	}
}

var errStopped = &api.Error{Kind: api.Unavailable, Msg: "this scheduler is stopping"}

// group drains the queue into log entries. It does not wait for one to be
// committed before it hands over the next, so the disk and the network stay
// busy while commands gather.
func (r *Replica) group() {
	defer close(r.inFlight)
	for {
		select {
		case p := <-r.queue:
			batch, entry := r.gather(p)
			data, err := entry.MarshalVT()
			if err != nil {
				answerAll(batch, fmt.Errorf("encoding a log entry: %w", err))
				continue
			}
			select {
			case r.inFlight <- flight{batch, len(entry.Commands), r.raft.Apply(data, 10*time.Second)}:
			case <-r.done:
				return
			}
		case <-r.done:
			return
		}
	}
}

// gather takes what else is waiting, as far as it fits into one entry.
func (r *Replica) gather(first *proposal) ([]*proposal, *musterpb.Entry) {
	now := r.clock.now()
	entry, batch, size := &musterpb.Entry{}, []*proposal(nil), 0
	for p := first; ; {
		for _, cmd := range p.cmds {
			cmd.TimeUnixMs = now
			size += cmd.SizeVT()
		}
		entry.Commands = append(entry.Commands, p.cmds...)
		batch = append(batch, p)
		if len(entry.Commands) >= maxEntryCommands || size >= maxEntryBytes {
			return batch, entry
		}
		select {
		case p = <-r.queue:
		default:
			return batch, entry
		}
	}
}

func (r *Replica) answer() {
	for f := range r.inFlight {
		if err := f.future.Error(); err != nil {
			answerAll(f.batch, notLeading(err))
			continue
		}
		answers, ok := f.future.Response().([]*musterpb.Answer)
		if !ok || len(answers) != f.commands {
			answerAll(f.batch, fmt.Errorf("raft answered %T for %d commands", f.future.Response(), f.commands))
			continue
		}
		for _, p := range f.batch {
			p.answer <- result{answers: answers[:len(p.cmds):len(p.cmds)]}
			answers = answers[len(p.cmds):]
		}
	}
}

func answerAll(batch []*proposal, err error) {
	for _, p := range batch {
		p.answer <- result{err: err}
	}
}

func notLeading(err error) error {
	return api.Errorf(api.Unavailable, "this scheduler does not lead the cluster (any more): %w", err)
}

// Run calls lead whenever this node has become the leader and has applied
// everything that was committed before. lead's context ends when the
// leadership does, and Run waits for lead to return before it goes on.
//
// Raft's LeaderCh holds one value and replaces it when it was not received yet.
// So a loss that was followed by a new election of this node may show as one
// more true, and a term that was over at once as a false only. Run takes every
// true for a new term, whatever it was doing, and so misses nothing.
func (r *Replica) Run(ctx context.Context, lead func(context.Context)) error {
	var stop func()
	depose := func() {
		r.ready.Store(0)
		if stop != nil {
			stop()
			stop = nil
		}
	}
	defer depose()
	for {
		select {
		case <-ctx.Done():
			return nil
		case leading := <-r.raft.LeaderCh():
			depose()
			if !leading {
				continue
			}
			term, ok := r.catchUp(ctx)
			if !ok {
				continue
			}
			r.clock.set(r.state.Now())
			r.ready.Store(term)
			stop = start(ctx, lead)
		}
	}
}

// catchUp waits until this leader has applied everything that its predecessors
// committed. It gives up when the lead is lost, of which LeaderCh tells next,
// and for no other reason: nothing would start the leader's loops then.
func (r *Replica) catchUp(ctx context.Context) (term uint64, ok bool) {
	for r.raft.State() == raft.Leader {
		term = r.raft.CurrentTerm()
		err := r.raft.Barrier(10 * time.Second).Error()
		if err == nil {
			return term, r.raft.CurrentTerm() == term
		}
		r.logger.Warn("a new leader is not ready yet", "term", term, "err", err)
		select {
		case <-ctx.Done():
			return 0, false
		case <-time.After(10 * time.Millisecond):
		}
	}
	return 0, false
}

// start runs f beside the caller; the answer ends it and waits for it.
func start(ctx context.Context, f func(context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(ctx)
	}()
	return func() {
		cancel()
		<-done
	}
}

// CheckRead makes a read that follows linearizable: it confirms with a majority
// that this node leads. What this leader acknowledged is applied before it
// answers, and what its predecessors did was applied before it became ready.
//
// Raft counts a follower's reply that was under way already. A follower that
// replied elects nobody else for an election time-out, so that is as good as
// long as a reply travels for less than that.
func (r *Replica) CheckRead() error {
	term := r.ready.Load()
	if term == 0 {
		return notLeading(raft.ErrNotLeader)
	}
	confirmed := make(chan error, 1)
	select {
	case r.reads <- confirmed:
	case <-r.done:
		return errStopped
	}
	if err := <-confirmed; err != nil {
		return notLeading(err)
	}
	// The lead may have been lost and won again, and Run not have heard of it:
	// then this node may not have applied yet what another leader did meanwhile.
	if r.raft.CurrentTerm() != term {
		return notLeading(raft.ErrLeadershipLost)
	}
	return nil
}

// verify confirms the lead once for all reads that wait.
func (r *Replica) verify() {
	for {
		select {
		case first := <-r.reads:
			waiting := []chan error{first}
			for more := true; more; {
				select {
				case next := <-r.reads:
					waiting = append(waiting, next)
				default:
					more = false
				}
			}
			err := r.raft.VerifyLeader().Error()
			for _, w := range waiting {
				w <- err
			}
		case <-r.done:
			return
		}
	}
}

// Now is the cluster's time in milliseconds since 1970, as commands proposed
// here are stamped. It means something on the leader only.
func (r *Replica) Now() int64 { return r.clock.now() }

// Leading reports whether this node leads and is ready to.
func (r *Replica) Leading() bool { return r.ready.Load() != 0 }

// Leader is the leader that this node knows of; empty during an election.
func (r *Replica) Leader() api.NodeID {
	_, id := r.raft.LeaderWithID()
	return api.NodeID(id)
}

// bell wakes whoever waits, again and again.
type bell struct {
	mu   sync.Mutex
	next chan struct{} // guarded by mu; closed and dropped by ring; nil: nobody waits
}

func (b *bell) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next == nil {
		b.next = make(chan struct{})
	}
	return b.next
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next != nil {
		close(b.next)
		b.next = nil
	}
}

// LeaderChanged is closed when this node next learns of another leader, or of
// none.
func (r *Replica) LeaderChanged() <-chan struct{} { return r.elections.wait() }

func (r *Replica) watchElections() {
	seen := make(chan raft.Observation, 16)
	r.observer = raft.NewObserver(seen, false, func(o *raft.Observation) bool {
		_, ok := o.Data.(raft.LeaderObservation)
		return ok
	})
	r.raft.RegisterObserver(r.observer)
	r.wg.Go(func() {
		for {
			select {
			case <-seen:
				r.elections.ring()
			case <-r.done:
				r.raft.DeregisterObserver(r.observer)
				return
			}
		}
	})
}

// Address is the Raft address that the others dial.
func (r *Replica) Address() string { return string(r.transport.LocalAddr()) }

// Term and Applied are where this node is.
func (r *Replica) Term() uint64    { return r.raft.CurrentTerm() }
func (r *Replica) Applied() uint64 { return r.raft.AppliedIndex() }

// HasPeers reports whether this node is part of a group, alone or not.
func (r *Replica) HasPeers() bool {
	return len(r.raft.GetConfiguration().Configuration().Servers) > 0
}

// AddVoter takes a node into the group; only the leader can.
func (r *Replica) AddVoter(id api.NodeID, address string) error {
	if err := r.raft.AddVoter(raft.ServerID(id), raft.ServerAddress(address), 0, 10*time.Second).Error(); err != nil {
		if errors.Is(err, raft.ErrNotLeader) || errors.Is(err, raft.ErrLeadershipLost) {
			return notLeading(err)
		}
		return fmt.Errorf("adding scheduler %s: %w", id, err)
	}
	return nil
}

// Close leaves in order: it hands the lead over where it can, stops Raft, and
// closes the log. Run has to have returned. Proposals that still wait are
// answered with an error, which leaves open what became of them.
func (r *Replica) Close() error {
	r.closing.Do(func() {
		if r.raft.State() == raft.Leader && len(r.raft.GetConfiguration().Configuration().Servers) > 1 {
			if err := r.raft.LeadershipTransfer().Error(); err != nil {
				r.logger.Debug("the lead could not be handed over", "err", err)
			}
		}
		close(r.done)
		// While Raft runs, it answers every future within a leader's lease; when it
		// is shut down, it forgets some.
		r.wg.Wait()
		r.closeErr = errors.Join(r.raft.Shutdown().Error(), r.closeStores())
	})
	return r.closeErr
}

func (r *Replica) closeStores() error {
	var errs []error
	if r.transport != nil {
		r.transport.CloseStreams() // connections to the others; Close ends the listener only
		errs = append(errs, r.transport.Close())
	}
	if r.log != nil {
		errs = append(errs, r.log.Close())
	}
	return errors.Join(errs...)
}

// logWriter passes Raft's own log lines on.
type logWriter struct{ logger *slog.Logger }

func (w logWriter) Write(line []byte) (int, error) {
	w.logger.Debug("raft", "line", string(line[:max(len(line)-1, 0)]))
	return len(line), nil
}
