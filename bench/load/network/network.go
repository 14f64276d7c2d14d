// Package network runs a muster network of real scheduler processes on loopback
// for measurements: the built binary, real Raft over TCP, fsync on.
package network

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/server"
)

// Config says what network to start.
type Config struct {
	Binary     string // of muster
	Dir        string // fresh; of data and logs
	Schedulers int
	Flags      []string // more flags of muster scheduler
}

// Network is a running network. Its methods are not safe for concurrent use;
// Client is.
type Network struct {
	config     Config
	Addresses  []string // of the API
	raft       []string
	debug      []string
	Schedulers []*Process
	AdminKey   string
	Client     *client.Client   // with the admin's key
	single     []*client.Client // of one scheduler each, with the admin's key
	light      []*client.Client // the same with a key that sees less and costs less
}

// startWithin is how long a scheduler may take to be ready.
const startWithin = 60 * time.Second

// Start starts the schedulers and waits until all are members of the cluster
// and take part in its draws.
func Start(ctx context.Context, cfg Config) (_ *Network, err error) {
	n := &Network{config: cfg, Schedulers: make([]*Process, cfg.Schedulers)}
	addresses, err := freeAddresses(3 * cfg.Schedulers)
	if err != nil {
		return nil, err
	}
	n.Addresses, n.raft, n.debug = addresses[:cfg.Schedulers], addresses[cfg.Schedulers:2*cfg.Schedulers], addresses[2*cfg.Schedulers:]
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Stop())
		}
	}()
	for i := range cfg.Schedulers {
		if err := n.StartScheduler(ctx, i); err != nil {
			return nil, err
		}
		if i == 0 {
			key, err := os.ReadFile(filepath.Join(n.DataDir(0), "admin.key"))
			if err != nil {
				return nil, err
			}
			n.AdminKey = strings.TrimSpace(string(key))
		}
	}
	if n.Client, err = client.New(client.Config{Addresses: n.Addresses, Key: n.AdminKey, Patience: 30 * time.Second}); err != nil {
		return nil, err
	}
	if n.single, err = n.clients(n.AdminKey); err != nil {
		return nil, err
	}
	key, err := n.Account(ctx, "watcher")
	if err != nil {
		return nil, err
	}
	if n.light, err = n.clients(key); err != nil {
		return nil, err
	}
	return n, n.UntilCommittee(ctx)
}

// clients are clients of one scheduler each.
func (n *Network) clients(key string) (list []*client.Client, err error) {
	for _, a := range n.Addresses {
		c, err := client.New(client.Config{Addresses: []string{a}, Key: key, Patience: time.Second})
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	return list, nil
}

// freeAddresses are addresses on loopback that nobody listened on a moment ago:
// a scheduler keeps its address when it is started again.
func freeAddresses(n int) ([]string, error) {
	var list []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		list = append(list, l.Addr().String())
	}
	return list, nil
}

// DataDir is a scheduler's data directory.
func (n *Network) DataDir(i int) string {
	return filepath.Join(n.config.Dir, "scheduler-"+strconv.Itoa(i))
}

// StartScheduler starts a scheduler, for the first time or again, and waits
// until it is ready.
func (n *Network) StartScheduler(ctx context.Context, i int) error {
	args := []string{"scheduler", "--data", n.DataDir(i), "--listen", n.Addresses[i], "--raft-listen", n.raft[i], "--debug-listen", n.debug[i]}
	if i > 0 {
		args = append(args, "--join", n.Addresses[0], "--key", n.AdminKey)
	}
	p, err := StartProcess(n.config.Binary, n.DataDir(i)+".log", append(args, n.config.Flags...)...)
	if err != nil {
		return err
	}
	n.Schedulers[i] = p
	return p.WaitReady(ctx)
}

// UntilCommittee waits until every scheduler takes part in the draws: before
// that, everything is checked.
func (n *Network) UntilCommittee(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	return Poll(ctx, 20*time.Millisecond, func() (bool, error) {
		leader, err := n.Leader(ctx)
		if err != nil {
			return false, err
		}
		m, err := n.status(ctx, n.light[leader])
		if err != nil {
			return false, err
		}
		in := 0
		for _, node := range m.Nodes {
			if node.InCommittee {
				in++
			}
		}
		return in == len(n.Schedulers), nil
	})
}

// Leader is the number of the scheduler that leads, as most of all say; it waits
// for an election to end.
func (n *Network) Leader(ctx context.Context) (leader int, err error) {
	waiting, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	err = Poll(waiting, 10*time.Millisecond, func() (bool, error) {
		leader, err = n.leader(waiting)
		return err == nil, err
	})
	return leader, err
}

func (n *Network) leader(ctx context.Context) (int, error) {
	said := make([]int, len(n.Addresses))
	for i := range n.Addresses {
		m, err := n.status(ctx, n.light[i])
		if err != nil {
			continue
		}
		for _, node := range m.Nodes {
			if at := slices.Index(n.Addresses, node.ApiAddress); node.Leader && at >= 0 {
				said[at]++
			}
		}
	}
	for i, votes := range said {
		if 2*votes > len(said) {
			return i, nil
		}
	}
	return 0, api.Errorf(api.Unavailable, "nobody leads the cluster")
}

// Status asks one scheduler, which answers from what it has applied itself. The
// state's hash costs it a pass over its state.
func (n *Network) Status(ctx context.Context, i int) (*musterpb.ClusterStatusResponse, error) {
	return n.status(ctx, n.single[i])
}

func (n *Network) status(ctx context.Context, c *client.Client) (*musterpb.ClusterStatusResponse, error) {
	req := connect.NewRequest(&musterpb.ClusterStatusRequest{})
	req.Header().Set(server.HeaderRead, "stale")
	resp, err := c.ClusterStatus(ctx, req)
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

// Progress is the index of the last log entry that a scheduler has applied, and
// the leader that it follows; empty for none.
func (n *Network) Progress(ctx context.Context, i int) (applied uint64, leader string, err error) {
	m, err := n.status(ctx, n.light[i])
	return m.GetAppliedIndex(), m.GetLeader(), err
}

// SealedJobs is how many jobs are in segments, as a scheduler has applied it.
func (n *Network) SealedJobs(ctx context.Context, i int) (uint64, error) {
	m, err := n.status(ctx, n.light[i])
	return m.GetSealedJobs(), err
}

// Account makes an account, or another key of one, and returns the key.
func (n *Network) Account(ctx context.Context, name string) (key string, err error) {
	resp, err := n.Client.CreateAccount(ctx, connect.NewRequest(&musterpb.CreateAccountRequest{Account: name}))
	if err != nil {
		return "", fmt.Errorf("account %s: %w", name, err)
	}
	return resp.Msg.Key, nil
}

// Deposit gives an account money.
func (n *Network) Deposit(ctx context.Context, account string, amount api.MicroUSD) error {
	_, err := n.Client.Deposit(ctx, connect.NewRequest(&musterpb.DepositRequest{Id: client.NewID(), Account: account, AmountMicroUsd: int64(amount)}))
	return err
}

// Stop ends the schedulers and waits for them.
func (n *Network) Stop() error {
	var g errgroup.Group
	for _, p := range n.Schedulers {
		if p != nil {
			g.Go(p.Stop)
		}
	}
	return g.Wait()
}

// Process is a muster process.
type Process struct {
	cmd   *exec.Cmd
	log   string // path
	ready chan struct{}
	done  chan struct{}
	once  sync.Once
	err   error // how it ended; written before done is closed
}

// StartProcess starts muster with a log of its own.
func StartProcess(binary, log string, args ...string) (*Process, error) {
	if err := os.MkdirAll(filepath.Dir(log), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd := exec.Command(binary, args...)
	for _, pair := range os.Environ() {
		if !strings.HasPrefix(pair, "MUSTER_") { // the network's own settings, not the caller's
			cmd.Env = append(cmd.Env, pair)
		}
	}
	cmd.Stderr = f
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", binary, err)
	}
	p := &Process{cmd: cmd, log: log, ready: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(p.done)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			if strings.HasPrefix(lines.Text(), "ready ") {
				p.once.Do(func() { close(p.ready) })
			}
		}
		p.err = cmd.Wait()
	}()
	return p, nil
}

// WaitReady waits until the process says that it is ready.
func (p *Process) WaitReady(ctx context.Context) error {
	select {
	case <-p.ready:
		return nil
	case <-p.done:
		return fmt.Errorf("muster %s ended before it was ready: %w\n%s", p.cmd.Args[1], p.err, p.tail())
	case <-time.After(startWithin):
		return fmt.Errorf("muster %s was not ready after %s\n%s", p.cmd.Args[1], startWithin, p.tail())
	case <-ctx.Done():
		return ctx.Err()
	}
}

// PID is the process's ID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Running reports whether the process has not ended.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Kill is kill -9; it waits until the process is gone.
func (p *Process) Kill() {
	_ = p.cmd.Process.Signal(syscall.SIGKILL)
	<-p.done
}

// Stop asks the process to end, and kills it when it takes too long.
func (p *Process) Stop() error {
	if !p.Running() {
		return nil
	}
	_ = p.cmd.Process.Signal(os.Interrupt)
	select {
	case <-p.done:
	case <-time.After(startWithin):
		_ = p.cmd.Process.Signal(syscall.SIGQUIT) // its log shows what it was doing
		select {
		case <-p.done:
		case <-time.After(5 * time.Second):
			p.Kill()
		}
		return fmt.Errorf("muster %s did not stop within %s\n%s", p.cmd.Args[1], startWithin, p.tail())
	}
	if p.err != nil {
		return fmt.Errorf("muster %s after an interrupt: %w\n%s", p.cmd.Args[1], p.err, p.tail())
	}
	return nil
}

// tail is the end of what the process said.
func (p *Process) tail() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-4096):])
}

// Poll waits until f reports true.
func Poll(ctx context.Context, every time.Duration, f func() (bool, error)) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		ok, err := f()
		if ok && err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// Node is a scheduler's identity, and the address of its Raft transport.
func (n *Network) Node(ctx context.Context, i int) (id api.NodeID, raft string, err error) {
	m, err := n.status(ctx, n.light[i])
	if err != nil {
		return "", "", err
	}
	for _, node := range m.Nodes {
		if node.ApiAddress == n.Addresses[i] {
			return api.NodeID(node.Id), node.RaftAddress, nil
		}
	}
	return "", "", api.Errorf(api.NotFound, "scheduler %d is not a member of its cluster", i)
}
