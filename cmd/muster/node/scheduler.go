// Package node puts the parts of muster together: a scheduler, a worker, and a
// whole network in one process. The command line and the tests start the same.
package node

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/server"
	"github.com/musternet/muster/scheduler"
	"github.com/musternet/muster/scheduler/archive"
	"github.com/musternet/muster/scheduler/replica"
	"github.com/musternet/muster/scheduler/state"
)

// Scheduler is what one scheduler process needs to know.
type Scheduler struct {
	Dir           string
	Listen        string // API address, host:port
	Advertise     string // API address that others dial; empty is Listen's
	RaftListen    string
	RaftAdvertise string
	Join          []string // API addresses of a cluster; empty starts a new one
	Key           string   // admin key of that cluster
	Blobs         string   // URL of a shared blob store; empty keeps blobs on the schedulers
	// ElectionTimeout is how long a silent leader is followed.
	ElectionTimeout time.Duration
	Timing          scheduler.Timing
	// Debug is a loopback address for profiles and metrics; empty serves none.
	Debug  string
	Logger *slog.Logger
	// Ready is called once, when this scheduler is a member of its cluster.
	Ready func(Info)
}

// Info is what a scheduler that is ready knows of itself.
type Info struct {
	ID      api.NodeID
	Address string // API
	// AdminKey is the first admin's key, on the node that started the cluster.
	AdminKey string
}

// Run runs the scheduler until ctx ends.
func (c Scheduler) Run(ctx context.Context) (err error) {
	if len(c.Join) > 0 && c.Key == "" && !hasData(c.Dir) {
		return api.Errorf(api.Invalid, "joining %v needs an admin's key of that cluster: set --key or MUSTER_KEY", c.Join)
	}
	key, err := identity(filepath.Join(c.Dir, "node.key"))
	if err != nil {
		return err
	}
	unlock, err := lock(c.Dir)
	if err != nil {
		return err
	}
	defer unlock()
	listener, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return fmt.Errorf("listening on %s: %w", c.Listen, err)
	}
	defer listener.Close() // closed by the server already, when that ran
	var debug net.Listener
	if c.Debug != "" {
		if debug, err = listenDebug(c.Debug); err != nil {
			return err
		}
		defer debug.Close()
	}
	c.Advertise = advertised(c.Advertise, listener.Addr())
	if c.RaftAdvertise == "" {
		c.RaftAdvertise = sameHost(c.Advertise, c.RaftListen)
	}

	st := state.New()
	id := api.NodeIDOf(key.Public().(ed25519.PublicKey))
	rep, err := replica.Open(replica.Config{
		ID: id, Dir: filepath.Join(c.Dir, "raft"), Listen: c.RaftListen, Advertise: c.RaftAdvertise,
		Bootstrap: len(c.Join) == 0, ElectionTimeout: c.ElectionTimeout, Logger: c.Logger,
	}, st)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rep.Close()) }()

	peers := server.NewPeers(key)
	all, local, closeBlobs, err := c.blobs(ctx, id, st, peers)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeBlobs()) }()
	sched := scheduler.New(scheduler.Config{
		Key: key, Dir: c.Dir, State: st, Replica: rep, Blobs: all, Peers: peers, Timing: c.Timing, Logger: c.Logger,
	})
	srv := server.New(server.Config{
		State: st, Scheduler: sched, Cluster: cluster{sched}, History: archive.New(all, st, archive.DefaultCache),
		Blobs: all, Local: local, Logger: c.Logger,
	})

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return sched.Run(ctx) })
	g.Go(func() error { return srv.Serve(ctx, listener) })
	if debug != nil {
		g.Go(func() error { return serveDebug(ctx, debug) })
	}
	g.Go(func() error {
		me := &musterpb.Node{Id: string(id), PublicKey: key.Public().(ed25519.PublicKey), ApiAddress: c.Advertise, RaftAddress: rep.Address()}
		err := c.enter(ctx, sched, peers, me)
		if ctx.Err() != nil {
			return nil
		}
		return err
	})
	return g.Wait()
}

// cluster adapts a scheduler to what the API's streams and peers need.
type cluster struct{ *scheduler.Scheduler }

var _ server.Cluster = cluster{}

func (c cluster) Session(ctx context.Context, owner string, s *connect.BidiStream[musterpb.WorkerMessage, musterpb.SchedulerMessage]) error {
	return c.Serve(ctx, owner, s)
}
func (c cluster) Term() uint64    { return c.Replica.Term() }
func (c cluster) Applied() uint64 { return c.Replica.Applied() }

// blobs opens the store that everybody uses, and what this node itself holds.
func (c Scheduler) blobs(ctx context.Context, id api.NodeID, st *state.State, peers *server.Peers) (all, local blob.Store, closer func() error, err error) {
	if c.Blobs != "" {
		shared, closer, err := blob.OpenURL(ctx, c.Blobs)
		return shared, shared, closer, err
	}
	dir, err := blob.NewDir(filepath.Join(c.Dir, "blobs"))
	if err != nil {
		return nil, nil, nil, err
	}
	others := func() []blob.Store {
		var list []blob.Store
		for _, n := range st.Nodes() {
			if n.Id != string(id) {
				list = append(list, peers.Blobs(n.ApiAddress))
			}
		}
		return list
	}
	replicated := blob.NewReplicated(dir, others, func() int { return len(st.Nodes())/2 + 1 })
	return replicated, dir, replicated.Close, nil
}

// enter makes this node a member: it starts the cluster, or asks to join one,
// and says its addresses again when they changed.
func (c Scheduler) enter(ctx context.Context, s *scheduler.Scheduler, peers *server.Peers, me *musterpb.Node) error {
	info := Info{ID: s.ID(), Address: c.Advertise}
	for first := true; ; first = false {
		if !first {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-s.State.Changed():
			case <-time.After(300 * time.Millisecond):
			}
		}
		known := s.State.Node(me.Id)
		switch {
		case known != nil && known.ApiAddress == me.ApiAddress && known.RaftAddress == me.RaftAddress && s.State.Cluster() != "" && s.Replica.Leader() != "":
			if c.Ready != nil {
				c.Ready(info)
			}
			c.Logger.Info("ready", "node", s.ID(), "api", c.Advertise, "raft", me.RaftAddress, "cluster", s.State.Cluster())
			return nil
		case s.Replica.Leading() && s.State.Cluster() == "":
			key, err := c.found(ctx, s)
			if err != nil {
				return err
			}
			info.AdminKey = key
			fallthrough
		case s.Replica.Leading():
			if err := s.Join(ctx, me); err != nil && api.KindOf(err) != api.Unavailable {
				return fmt.Errorf("registering this scheduler: %w", err)
			}
		default:
			if err := c.join(ctx, s, peers, me); err != nil {
				return err
			}
		}
	}
}

// join asks each of the addresses to take this node in. A refusal is final; a
// cluster that does not answer may do so later.
func (c Scheduler) join(ctx context.Context, s *scheduler.Scheduler, peers *server.Peers, me *musterpb.Node) error {
	if c.Key == "" {
		return nil // it was a member before, and only waits for a leader
	}
	for _, address := range c.Join {
		attempt, cancel := context.WithTimeout(ctx, 15*time.Second)
		_, err := peers.Join(attempt, address, c.Key, me)
		cancel()
		switch api.KindOf(err) {
		case api.Denied, api.Unauthenticated, api.Invalid:
			if err != nil {
				return fmt.Errorf("joining %s: %w", address, err)
			}
		}
		if err == nil {
			return nil
		}
		c.Logger.Debug("could not join yet", "address", address, "err", err)
	}
	return nil
}

// AdminAccount is the account of a new cluster's first key.
const AdminAccount = "admin"

// found starts the state of a new cluster: its name, and a first admin whose
// key is kept in admin.key.
func (c Scheduler) found(ctx context.Context, s *scheduler.Scheduler) (adminKey string, err error) {
	path := filepath.Join(c.Dir, "admin.key")
	adminKey, hash := server.NewKey(AdminAccount)
	if err := os.WriteFile(path, []byte(adminKey+"\n"), 0o600); err != nil {
		return "", fmt.Errorf("keeping the admin key: %w", err)
	}
	for _, cmd := range []*musterpb.Command{
		{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: AdminAccount}}},
		{Body: &musterpb.Command_CreateKey{CreateKey: &musterpb.CreateKey{Account: AdminAccount, Hash: hash, Role: musterpb.Role_ROLE_ADMIN}}},
		{Body: &musterpb.Command_CreateCluster{CreateCluster: &musterpb.CreateCluster{Cluster: "mst-" + client.NewID()[:10]}}},
	} {
		// An account that exists is left from a start that broke off.
		if _, err := s.Propose(ctx, cmd); err != nil && api.KindOf(err) != api.Conflict {
			return "", fmt.Errorf("starting the cluster: %w", err)
		}
	}
	c.Logger.Info("a new cluster was started; its admin key is in "+path, "cluster", s.State.Cluster())
	return adminKey, nil
}
