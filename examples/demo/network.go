package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
)

// network is the processes of the demo, and a client to them.
type network struct {
	bin, logs string
	dir       string // data of all processes; removed at the end
	processes []*process
	addresses []string
	client    *client.Client // with the admin's key
	keys      map[string]string
	names     map[string]string // of workers, by ID
	told      map[string]bool   // attempts whose rejection was shown
}

type process struct {
	name string
	cmd  *exec.Cmd
	log  *os.File
	done chan error // the result of Wait
	dead bool       // killed on purpose
}

// start starts the schedulers and the workers, and waits until all are ready.
func (n *network) start(ctx context.Context, runtime string, say func(string, ...any)) (err error) {
	n.keys, n.names, n.told = map[string]string{}, map[string]string{}, map[string]bool{}
	if n.dir, err = os.MkdirTemp("", "muster-demo-*"); err != nil {
		return err
	}
	if err := n.startSchedulers(ctx); err != nil {
		return err
	}
	say("%d schedulers replicate one state: %s", schedulers, strings.Join(n.addresses, ", "))
	for _, account := range []string{renderOwner, textOwner} {
		if err := n.account(ctx, account, 20*api.Dollars); err != nil {
			return err
		}
	}
	for i := 1; i <= workers; i++ {
		owner := fmt.Sprintf("owner-%d", i)
		if err := n.account(ctx, owner, 0); err != nil {
			return err
		}
		args := []string{
			"worker", "--data", filepath.Join(n.dir, fmt.Sprintf("worker-%d", i)), "--name", fmt.Sprintf("worker-%d", i), "--join", n.addresses[i%schedulers],
			"--price", "0.20", "--cpus", "1", "--memory", "2GB", "--disk", "1GB", "--cache", "1GB", "--runtime", runtime,
		}
		if i == cheater {
			args = append(args, "--cheat", cheats)
		}
		p, err := n.spawn(fmt.Sprintf("worker-%d", i), n.keys[owner], args...)
		if err != nil {
			return err
		}
		ready, err := n.waitReady(ctx, p)
		if err != nil {
			return err
		}
		n.names[field(ready, "worker")] = p.name
	}
	if err := n.waitConnected(ctx); err != nil {
		return err
	}
	say("%d workers of %d owners are connected; worker-%d will cheat (%s)", workers, workers, cheater, cheats)
	return nil
}

func (n *network) startSchedulers(ctx context.Context) error {
	ports, err := freePorts(2 * schedulers)
	if err != nil {
		return err
	}
	adminKey := ""
	for i := range schedulers {
		data := filepath.Join(n.dir, fmt.Sprintf("scheduler-%d", i+1))
		args := []string{
			"scheduler", "--data", data, "--listen", ports[2*i], "--raft-listen", ports[2*i+1],
			"--lease-ttl", "6s", "--reconnect-grace", "3s", "--reveal-timeout", "1500ms",
		}
		if i > 0 {
			args = append(args, "--join", ports[0])
		}
		p, err := n.spawn(fmt.Sprintf("scheduler-%d", i+1), adminKey, args...)
		if err != nil {
			return err
		}
		if _, err := n.waitReady(ctx, p); err != nil {
			return err
		}
		if i == 0 {
			text, err := os.ReadFile(filepath.Join(data, "admin.key"))
			if err != nil {
				return err
			}
			adminKey = strings.TrimSpace(string(text))
		}
		n.addresses = append(n.addresses, ports[2*i])
	}
	n.keys["admin"] = adminKey
	n.client, err = client.New(client.Config{Addresses: n.addresses, Key: adminKey, Patience: 30 * time.Second})
	return err
}

// freePorts finds loopback addresses that nobody listens on.
func freePorts(count int) ([]string, error) {
	var held []net.Listener
	defer func() {
		for _, l := range held {
			l.Close()
		}
	}()
	var list []string
	for range count {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		held = append(held, l)
		list = append(list, l.Addr().String())
	}
	return list, nil
}

// spawn starts a muster process with its output in a log file.
func (n *network) spawn(name, key string, args ...string) (*process, error) {
	log, err := os.Create(filepath.Join(n.logs, name+".log"))
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(n.bin, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "MUSTER_KEY="+key, "MUSTER_DIR="+n.dir, "MUSTER_ADDR=", "MUSTER_CONFIG=")
	// A Ctrl-C for the demo is not one for the processes: the demo stops them.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{name: name, cmd: cmd, log: log, done: make(chan error, 1)}
	go func() { p.done <- cmd.Wait() }()
	n.processes = append(n.processes, p)
	return p, nil
}

// waitReady waits for the process's ready line and returns it.
func (n *network) waitReady(ctx context.Context, p *process) (string, error) {
	deadline := time.Now().Add(60 * time.Second)
	for time.Now().Before(deadline) {
		text, err := os.ReadFile(p.log.Name())
		if err != nil {
			return "", err
		}
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, "ready ") {
				return line, nil
			}
		}
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case err := <-p.done:
			p.done <- err
			return "", fmt.Errorf("%s ended at once: %s", p.name, lastLine(text))
		case <-time.After(30 * time.Millisecond):
		}
	}
	return "", fmt.Errorf("%s was not ready within a minute", p.name)
}

func lastLine(text []byte) string {
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return lines[len(lines)-1]
}

func field(line, name string) string {
	for _, f := range strings.Fields(line) {
		if v, ok := strings.CutPrefix(f, name+"="); ok {
			return v
		}
	}
	return ""
}

func (n *network) waitConnected(ctx context.Context) error {
	for {
		status, err := n.status(ctx)
		if err != nil {
			return err
		}
		if status.WorkersConnected == workers {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d workers connected: %w", status.WorkersConnected, workers, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// account makes an account with a key, and gives it money.
func (n *network) account(ctx context.Context, name string, deposit api.MicroUSD) error {
	resp, err := n.client.CreateAccount(ctx, connect.NewRequest(&musterpb.CreateAccountRequest{Account: name}))
	if err != nil {
		return err
	}
	n.keys[name] = resp.Msg.Key
	if deposit == 0 {
		return nil
	}
	_, err = n.client.Deposit(ctx, connect.NewRequest(&musterpb.DepositRequest{Id: client.NewID(), Account: name, AmountMicroUsd: int64(deposit), Memo: "play money"}))
	return err
}

// command runs a muster command as a customer would.
func (n *network) command(ctx context.Context, account string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, n.bin, args...)
	cmd.Env = append(os.Environ(), "MUSTER_KEY="+n.keys[account], "MUSTER_ADDR="+strings.Join(n.addresses, ","))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("muster %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}

func (n *network) submit(ctx context.Context, account, job string) (id string, err error) {
	file := filepath.Join(n.dir, account+".yaml")
	if err := os.WriteFile(file, []byte(job), 0o644); err != nil {
		return "", err
	}
	out, err := n.command(ctx, account, "submit", file, "--output", "json")
	if err != nil {
		return "", err
	}
	var answer struct{ ID string }
	return answer.ID, errors.Join(json.Unmarshal(out, &answer))
}

func (n *network) job(ctx context.Context, id string) (*musterpb.Job, error) {
	resp, err := n.client.GetJob(ctx, connect.NewRequest(&musterpb.GetJobRequest{Job: id}))
	if err != nil {
		return nil, err
	}
	return resp.Msg.Job, nil
}

func (n *network) detail(ctx context.Context, id string) (*musterpb.GetJobResponse, error) {
	return n.client.Detail(ctx, id)
}

func (n *network) status(ctx context.Context) (*musterpb.ClusterStatusResponse, error) {
	resp, err := n.client.ClusterStatus(ctx, connect.NewRequest(&musterpb.ClusterStatusRequest{}))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

func (n *network) transfers(ctx context.Context) ([]*musterpb.Transfer, error) {
	var all []*musterpb.Transfer
	for request := (&musterpb.ListTransfersRequest{All: true}); ; {
		resp, err := n.client.ListTransfers(ctx, connect.NewRequest(request))
		if err != nil {
			return nil, err
		}
		all = append(all, resp.Msg.Transfers...)
		if !resp.Msg.More {
			return all, nil
		}
		request.After = all[len(all)-1].Id
	}
}

// killLeader kills the process of the scheduler that leads, with SIGKILL.
func (n *network) killLeader(ctx context.Context) (string, error) {
	status, err := n.status(ctx)
	if err != nil {
		return "", err
	}
	for _, node := range status.Nodes {
		if !node.Leader {
			continue
		}
		for i, address := range n.addresses {
			if address != node.ApiAddress {
				continue
			}
			p := n.processes[i]
			p.dead = true
			if err := p.cmd.Process.Kill(); err != nil {
				return "", err
			}
			<-p.done
			p.done <- nil
			return p.name, nil
		}
	}
	return "", errors.New("nobody leads")
}

// name is a worker's name.
func (n *network) name(worker string) string {
	if name := n.names[worker]; name != "" {
		return name
	}
	return worker
}

// stop ends every process, workers first, and removes their data. A process
// that ended by itself, or does not end, is an error.
func (n *network) stop() error {
	var errs []error
	for i := len(n.processes) - 1; i >= 0; i-- {
		p := n.processes[i]
		if p.dead {
			continue
		}
		_ = p.cmd.Process.Signal(syscall.SIGTERM) // fails only for one that ended, which Wait tells
		select {
		case err := <-p.done:
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", p.name, err))
			}
		case <-time.After(20 * time.Second):
			errs = append(errs, fmt.Errorf("%s did not stop within 20 seconds", p.name))
			_ = p.cmd.Process.Kill()
			<-p.done
		}
	}
	for _, p := range n.processes {
		p.log.Close()
	}
	return errors.Join(append(errs, os.RemoveAll(n.dir))...)
}
