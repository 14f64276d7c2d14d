package node

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/gpu"
	"github.com/musternet/muster/scheduler"
)

// Dev is a whole network in one process.
type Dev struct {
	Dir        string
	Listen     string // of the first scheduler; the others follow
	Schedulers int
	Workers    int
	Cheat      []string // the last worker cheats in these ways
	Runtime    string
	Detector   gpu.Detector
	SealAfter  time.Duration // 0 is the default
	Logger     *slog.Logger
	// Ready is called once the network takes jobs.
	Ready func(addresses []string, key string)
}

// DevTiming makes a network on one machine quick: everything is near.
var DevTiming = scheduler.Timing{
	LeaseTTL: 5 * time.Second, ReconnectGrace: 2 * time.Second, BatchInterval: 50 * time.Millisecond, DisputePatience: 10 * time.Second,
}

// devFile is what a dev network remembers between runs.
type devFile struct {
	API, Raft []string
	AdminKey  string
	OwnerKeys []string
}

// Run runs the network until ctx ends. The same directory continues the same
// network.
func (c Dev) Run(ctx context.Context) error {
	if c.Schedulers < 1 || c.Schedulers > 9 || c.Workers < 0 || c.Workers > 64 {
		return api.Errorf(api.Invalid, "%d schedulers and %d workers: want 1 to 9 and 0 to 64", c.Schedulers, c.Workers)
	}
	path := filepath.Join(c.Dir, "dev.json")
	file, err := c.load(path)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	if err := c.startSchedulers(ctx, g, file); err != nil {
		return err
	}
	g.Go(func() error {
		cl, err := client.New(client.Config{Addresses: file.API[:c.Schedulers], Key: file.AdminKey, Patience: 30 * time.Second})
		if err != nil {
			return err
		}
		if err := c.equip(ctx, cl, file); err != nil {
			return stopped(ctx, fmt.Errorf("setting up the network: %w", err))
		}
		if err := save(path, file); err != nil {
			return err
		}
		if err := WriteClientConfig(c.Dir, file.API[:c.Schedulers], file.AdminKey); err != nil {
			return err
		}
		for i := range c.Workers {
			g.Go(func() error { return stopped(ctx, c.worker(i, file).Run(ctx)) })
		}
		if err := c.waitForWorkers(ctx, cl); err != nil {
			return stopped(ctx, err)
		}
		if c.Ready != nil {
			c.Ready(file.API[:c.Schedulers], file.AdminKey)
		}
		return nil
	})
	return g.Wait()
}

// stopped takes the errors of an end that was asked for as a good end.
func stopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// startSchedulers starts the first scheduler, and the others once they can
// join it.
func (c Dev) startSchedulers(ctx context.Context, g *errgroup.Group, file *devFile) error {
	ready := make(chan Info, c.Schedulers)
	timing := DevTiming
	timing.SealAfter = c.SealAfter
	for i := range c.Schedulers {
		s := Scheduler{
			Dir: filepath.Join(c.Dir, "scheduler-"+strconv.Itoa(i+1)), Listen: file.API[i], RaftListen: file.Raft[i],
			Timing: timing, Logger: c.Logger.With("scheduler", i+1), Ready: func(info Info) { ready <- info }, Key: file.AdminKey,
		}
		if i > 0 {
			s.Join = file.API[:1]
		}
		failed := make(chan error, 1)
		g.Go(func() error {
			err := stopped(ctx, s.Run(ctx))
			failed <- err
			return err
		})
		// A cluster that exists needs a majority before anybody is ready.
		if hasData(filepath.Join(c.Dir, "scheduler-"+strconv.Itoa(c.Schedulers))) {
			continue
		}
		select {
		case info := <-ready:
			if info.AdminKey != "" {
				file.AdminKey = info.AdminKey
			}
		case err := <-failed:
			return err
		case <-ctx.Done():
			return nil
		}
	}
	return nil
}

// equip makes the owners' accounts and gives the admin money to spend. All of
// it may have happened in an earlier run.
func (c Dev) equip(ctx context.Context, cl *client.Client, file *devFile) error {
	deposit := &musterpb.DepositRequest{Id: "dev-first-deposit", Account: AdminAccount, AmountMicroUsd: int64(1000 * api.Dollars), Memo: "play money of muster dev"}
	if _, err := cl.Deposit(ctx, connect.NewRequest(deposit)); err != nil {
		return api.FromConnect(err)
	}
	for i := len(file.OwnerKeys); i < c.Workers; i++ {
		resp, err := cl.CreateAccount(ctx, connect.NewRequest(&musterpb.CreateAccountRequest{Account: "owner-" + strconv.Itoa(i+1)}))
		if err != nil {
			return api.FromConnect(err)
		}
		file.OwnerKeys = append(file.OwnerKeys, resp.Msg.Key)
	}
	return nil
}

func (c Dev) worker(i int, file *devFile) Worker {
	name := "worker-" + strconv.Itoa(i+1)
	w := Worker{
		Dir: filepath.Join(c.Dir, name), Name: name, Join: file.API[:c.Schedulers], Key: file.OwnerKeys[i], Runtime: c.Runtime,
		Price: api.MicroUSD(200_000 + 10_000*int64(i)), Detector: c.Detector, Logger: c.Logger.With("worker", i+1), CacheBytes: 5 << 30,
		// The machine is shared out among the workers.
		MilliCPUs: 1000, MemoryBytes: max(machineMemory()/int64(c.Workers), 1<<30), DiskBytes: max(freeDisk(c.Dir)/int64(c.Workers), 1<<30),
	}
	if i == c.Workers-1 {
		w.Cheat = c.Cheat
	}
	return w
}

func (c Dev) waitForWorkers(ctx context.Context, cl *client.Client) error {
	for {
		resp, err := cl.ClusterStatus(ctx, connect.NewRequest(&musterpb.ClusterStatusRequest{}))
		if err == nil && int(resp.Msg.WorkersConnected) >= c.Workers {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// load reads what an earlier run left, and chooses ports where there is none.
func (c Dev) load(path string) (*devFile, error) {
	file := &devFile{}
	text, err := os.ReadFile(path)
	switch {
	case err == nil:
		if err := json.Unmarshal(text, file); err != nil {
			return nil, fmt.Errorf("%s: %w; remove the directory to start anew", path, err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	if len(file.API) > 0 && len(file.API) != c.Schedulers {
		return nil, api.Errorf(api.Invalid, "the network in %s has %d schedulers, not %d; start it with as many, or choose another --dir", c.Dir, len(file.API), c.Schedulers)
	}
	if file.AdminKey == "" { // an earlier run may have ended before it could say so
		if key, err := os.ReadFile(filepath.Join(c.Dir, "scheduler-1", "admin.key")); err == nil {
			file.AdminKey = strings.TrimSpace(string(key))
		}
	}
	if len(file.API) == 0 {
		host, port, err := net.SplitHostPort(c.Listen)
		if err != nil {
			return nil, api.Errorf(api.Invalid, "--listen %q: want host:port", c.Listen)
		}
		for i := range c.Schedulers {
			file.API = append(file.API, nthAddress(host, port, i))
			file.Raft = append(file.Raft, nthAddress(host, port, i+100))
		}
		if err := fixPorts(file); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("--dir: %w", err)
	}
	return file, save(path, file)
}

func nthAddress(host, port string, i int) string {
	if n, err := strconv.Atoi(port); err == nil && n > 0 {
		port = strconv.Itoa(n + i)
	}
	return net.JoinHostPort(host, port)
}

// fixPorts replaces port 0 by free ports: a scheduler must keep its address
// over a restart.
func fixPorts(file *devFile) error {
	var held []net.Listener // all at once, so that no two are the same
	defer func() {
		for _, l := range held {
			l.Close()
		}
	}()
	for _, list := range [][]string{file.API, file.Raft} {
		for i, address := range list {
			if !strings.HasSuffix(address, ":0") {
				continue
			}
			l, err := net.Listen("tcp", address)
			if err != nil {
				return fmt.Errorf("--listen: %w", err)
			}
			held = append(held, l)
			list[i] = l.Addr().String()
		}
	}
	return nil
}

func save(path string, file *devFile) error {
	text, err := json.MarshalIndent(file, "", "  ")
	if err != nil {
		return err
	}
	return replaceFile(path, text)
}

// replaceFile writes a file that only its owner reads, all or nothing.
func replaceFile(path string, text []byte) error {
	tmp := path + "." + rand.Text()
	if err := os.WriteFile(tmp, text, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// WriteClientConfig leaves client.yaml in dir, with which the other commands
// find a cluster.
func WriteClientConfig(dir string, addresses []string, key string) error {
	text := "# How muster's commands reach this cluster. The key is a secret.\naddresses:\n"
	for _, a := range addresses {
		text += "  - " + a + "\n"
	}
	text += "key: " + key + "\n"
	return replaceFile(filepath.Join(dir, "client.yaml"), []byte(text))
}
