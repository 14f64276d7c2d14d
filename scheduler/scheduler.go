// Package scheduler runs one scheduler. Every scheduler replicates the state
// and takes part in drawing the samples; the one that leads also places
// attempts, watches leases, closes batches and compares results.
//
// The loops only read committed state and propose commands. What they keep for
// themselves (sessions, leases, log tails) is lost with the leader, and nothing
// that was promised depends on it.
package scheduler

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/replica"
	"github.com/musternet/muster/scheduler/state"
)

// Defaults of Timing.
const (
	DefaultLeaseTTL        = 15 * time.Second
	DefaultReconnectGrace  = 5 * time.Second
	DefaultRevealTimeout   = 2 * time.Second
	DefaultBatchInterval   = 100 * time.Millisecond
	DefaultDisputePatience = 10 * time.Minute
	DefaultTransferLimit   = time.Hour
	DefaultHandshake       = 15 * time.Second
	DefaultSealAfter       = 30 * time.Second
	DefaultSegmentGrace    = 5 * time.Minute
)

// Timing holds the delays of the leader's loops. The zero value of a field is
// its default.
type Timing struct {
	// LeaseTTL is how long a worker may be silent before its attempts are
	// placed elsewhere.
	LeaseTTL time.Duration
	// ReconnectGrace is what remains of its leases when a worker's stream
	// breaks.
	ReconnectGrace time.Duration
	// RevealTimeout is how long a batch waits for the committee.
	RevealTimeout time.Duration
	// BatchInterval is the least time between two batches.
	BatchInterval time.Duration
	// DisputePatience is how long a dispute waits for a further owner before it
	// is inconclusive.
	DisputePatience time.Duration
	// TransferLimit is how long a worker may take to fetch what an attempt needs,
	// and again how long to upload what came out.
	TransferLimit time.Duration
	// Handshake is how long a worker may take to say who it is.
	Handshake time.Duration
	// SealAfter is how long a job stays in memory after it ended; less when too
	// much is finished at once.
	SealAfter time.Duration
	// SegmentGrace is how long a sealed segment stays that was merged into
	// another, for those who still read it.
	SegmentGrace time.Duration
}

func (t Timing) withDefaults() Timing {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&t.LeaseTTL, DefaultLeaseTTL)
	def(&t.ReconnectGrace, DefaultReconnectGrace)
	def(&t.RevealTimeout, DefaultRevealTimeout)
	def(&t.BatchInterval, DefaultBatchInterval)
	def(&t.DisputePatience, DefaultDisputePatience)
	def(&t.TransferLimit, DefaultTransferLimit)
	def(&t.Handshake, DefaultHandshake)
	def(&t.SealAfter, DefaultSealAfter)
	def(&t.SegmentGrace, DefaultSegmentGrace)
	return t
}

// Config is what a scheduler is made of.
type Config struct {
	Key     ed25519.PrivateKey // the node's identity
	Dir     string
	State   *state.State
	Replica *replica.Replica
	Blobs   blob.Store
	Peers   Peers
	Timing  Timing
	Logger  *slog.Logger
}

// Peers reaches the other schedulers.
type Peers interface {
	// Propose asks the leader at an API address to propose what this node says
	// for itself.
	Propose(ctx context.Context, address string, request *musterpb.ProposeRequest) (*musterpb.Answer, error)
}

// Scheduler is one scheduler. All methods are safe for concurrent use.
type Scheduler struct {
	Config
	id api.NodeID

	mu     sync.Mutex
	leader *leader // guarded by mu; nil while another node leads
}

// New makes a scheduler; Run runs it.
func New(cfg Config) *Scheduler {
	cfg.Timing = cfg.Timing.withDefaults()
	return &Scheduler{Config: cfg, id: api.NodeIDOf(cfg.Key.Public().(ed25519.PublicKey))}
}

// ID is this node's identity.
func (s *Scheduler) ID() api.NodeID { return s.id }

// Run runs the scheduler until ctx ends.
func (s *Scheduler) Run(ctx context.Context) error {
	chains, err := openChains(filepath.Join(s.Dir, "chain"))
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.Replica.Run(ctx, s.lead) })
	g.Go(func() error { return s.takePartInDraws(ctx, chains) })
	g.Go(func() error { return s.dropReplaced(ctx) })
	return g.Wait()
}

// lead is the leader's life.
func (s *Scheduler) lead(ctx context.Context) {
	l := newLeader(ctx, s)
	s.mu.Lock()
	s.leader = l
	s.mu.Unlock()
	s.Logger.Info("leading the cluster", "node", s.id, "term", s.Replica.Term())
	l.run(ctx)
	s.mu.Lock()
	s.leader = nil
	s.mu.Unlock()
	s.Logger.Info("no longer leading", "node", s.id)
}

func (s *Scheduler) leading() (*leader, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leader == nil {
		return nil, api.Errorf(api.Unavailable, "this scheduler does not lead the cluster")
	}
	return s.leader, nil
}

// Propose replicates a command and returns its answer's ID, or the refusal.
func (s *Scheduler) Propose(ctx context.Context, cmd *musterpb.Command) (id string, err error) {
	answer, err := s.Replica.Propose(ctx, cmd)
	if err != nil {
		return "", err
	}
	return answer.Id, state.ErrorOf(answer)
}

// CheckRead makes the reads that follow linearizable; only a leader can.
func (s *Scheduler) CheckRead() error {
	if _, err := s.leading(); err != nil {
		return err
	}
	return s.Replica.CheckRead()
}

// Leader is the API address of the leader, empty during an election.
func (s *Scheduler) Leader() (id api.NodeID, address string) {
	id = s.Replica.Leader()
	if n := s.State.Node(string(id)); n != nil {
		address = n.ApiAddress
	}
	return id, address
}

// AwaitLeader is Leader, once there is one: during an election it waits, until
// ctx ends. Where this node is the leader it is ready to lead.
func (s *Scheduler) AwaitLeader(ctx context.Context) (id api.NodeID, address string) {
	for {
		changed := s.Replica.LeaderChanged()
		id, address = s.Leader()
		var soon <-chan time.Time
		if id != s.id {
			if address != "" {
				return id, address
			}
		} else if _, err := s.leading(); err == nil {
			return id, address
		} else {
			soon = time.After(5 * time.Millisecond) // it is about to be ready
		}
		select {
		case <-changed:
		case <-soon:
		case <-ctx.Done():
			return id, address
		}
	}
}

// Join takes a scheduler into the cluster.
func (s *Scheduler) Join(ctx context.Context, node *musterpb.Node) error {
	if _, err := s.leading(); err != nil {
		return err
	}
	if _, err := s.Propose(ctx, &musterpb.Command{Body: &musterpb.Command_RegisterNode{RegisterNode: &musterpb.RegisterNode{Node: node}}}); err != nil {
		return err
	}
	return s.Replica.AddVoter(api.NodeID(node.Id), node.RaftAddress)
}

// newID is a fresh ID with 64 random bits.
func newID(prefix string) string {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic(fmt.Sprintf("muster: the system has no randomness: %v", err))
	}
	return prefix + hex.EncodeToString(b[:])
}
