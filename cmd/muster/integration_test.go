package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/server"
	"github.com/musternet/muster/container/image"
	"github.com/musternet/muster/scheduler/ledger"
	"github.com/musternet/muster/scheduler/state"
)

// cluster is a network of real processes on loopback.
type cluster struct {
	t          *testing.T
	ctx        context.Context
	dir        string
	addresses  []string // of the API
	raft       []string
	schedulers []*process
	workers    map[string]*process
	keys       map[string]string // of the owners
	admin      string
	client     *client.Client
}

// startCluster starts n schedulers. The test has until the deadline.
func startCluster(t *testing.T, n int, deadline time.Duration) *cluster {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	t.Cleanup(cancel)
	c := &cluster{
		t: t, ctx: ctx, dir: t.TempDir(), addresses: freeAddresses(t, n), raft: freeAddresses(t, n), schedulers: make([]*process, n),
		workers: map[string]*process{}, keys: map[string]string{},
	}
	t.Cleanup(c.stop)
	for i := range n {
		c.startScheduler(i)
		c.check(c.schedulers[i].waitReady())
		if i == 0 {
			key, err := os.ReadFile(filepath.Join(c.dir, "scheduler-0", "admin.key"))
			c.check(err)
			c.admin = strings.TrimSpace(string(key))
		}
	}
	var err error
	c.client, err = client.New(client.Config{Addresses: c.addresses, Key: c.admin, Patience: 30 * time.Second})
	c.check(err)
	_, err = c.client.Deposit(ctx, connect.NewRequest(&musterpb.DepositRequest{Id: client.NewID(), Account: "admin", AmountMicroUsd: int64(100 * api.Dollars)}))
	c.check(err)
	return c
}

// freeAddresses are addresses on loopback that nobody listened on a moment ago.
// A scheduler keeps its address over a restart, so the system can't choose.
func freeAddresses(t *testing.T, n int) []string {
	t.Helper()
	var list []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		list = append(list, l.Addr().String())
	}
	return list
}

// check ends the test at an error, with what the processes said.
func (c *cluster) check(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// stop ends all processes that still run, and shows their logs after a failure.
func (c *cluster) stop() {
	all := map[string]*process{}
	for i, p := range c.schedulers {
		all["scheduler "+strconv.Itoa(i)] = p
	}
	for name, p := range c.workers {
		all["worker "+name] = p
	}
	for name, p := range all {
		if p == nil {
			continue
		}
		p.kill()
		if err := p.broken(); err != nil {
			c.t.Error(err)
		} else if c.t.Failed() {
			c.t.Logf("%s said:\n%s", name, p.text())
		}
	}
}

func (c *cluster) startScheduler(i int) {
	args := []string{
		"scheduler", "--data", filepath.Join(c.dir, "scheduler-"+strconv.Itoa(i)), "--listen", c.addresses[i], "--raft-listen", c.raft[i],
		"--lease-ttl", "4s", "--reconnect-grace", "2s",
	}
	if i > 0 {
		args = append(args, "--join", c.addresses[0], "--key", c.admin)
	}
	p, err := start(c.dir, nil, args...)
	c.check(err)
	c.schedulers[i] = p
}

// startWorker starts a worker of an owner of the same name, whose account is
// made on the way.
func (c *cluster) startWorker(name string, args ...string) {
	if c.keys[name] == "" {
		resp, err := c.client.CreateAccount(c.ctx, connect.NewRequest(&musterpb.CreateAccountRequest{Account: name}))
		c.check(err)
		c.keys[name] = resp.Msg.Key
	}
	args = append([]string{
		"worker", "--data", filepath.Join(c.dir, name), "--name", name, "--join", strings.Join(c.addresses, ","),
		"--key", c.keys[name], "--cpus", "2", "--memory", "2GiB", "--disk", "1GiB",
	}, args...)
	p, err := start(c.dir, nil, args...)
	c.check(err)
	c.workers[name] = p
	c.check(p.waitReady())
}

// until waits for a condition, and says what was awaited when it does not come.
func (c *cluster) until(what string, f func() (bool, error)) {
	c.t.Helper()
	if err := poll(c.ctx, f); err != nil {
		c.t.Fatalf("waiting until %s: %v", what, err)
	}
}

// muster runs a command and returns what it printed.
func (c *cluster) muster(args ...string) string {
	c.t.Helper()
	cmd := exec.CommandContext(c.ctx, "muster", args...)
	cmd.Env = append(os.Environ(), "MUSTER_ADDR="+strings.Join(c.addresses, ","), "MUSTER_KEY="+c.admin)
	cmd.Dir = c.dir
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		c.t.Fatalf("muster %s: %v\n%s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}

// submit writes a job file and submits it.
func (c *cluster) submit(text string) string {
	c.t.Helper()
	path := filepath.Join(c.dir, client.NewID()+".yaml")
	c.check(os.WriteFile(path, []byte(text), 0o600))
	return strings.TrimSpace(c.muster("submit", path))
}

func (c *cluster) job(id string) *musterpb.GetJobResponse {
	c.t.Helper()
	resp, err := c.client.GetJob(c.ctx, connect.NewRequest(&musterpb.GetJobRequest{Job: id, Detail: true}))
	c.check(err)
	return resp.Msg
}

// waitVerified waits until a job is settled, and wants it verified.
func (c *cluster) waitVerified(id string) {
	c.t.Helper()
	c.until("job "+id+" is settled", func() (bool, error) { return c.job(id).Job.Settled, nil })
	if job := c.job(id).Job; job.State != musterpb.JobState_JOB_STATE_VERIFIED {
		c.t.Fatalf("job %s is %s: %s", id, state.StateName(job.State), job.Reason)
	}
}

// checkResults downloads a job's results and wants every item once, and right.
func (c *cluster) checkResults(id string, items int) {
	c.t.Helper()
	out := filepath.Join(c.dir, "out-"+id)
	c.muster("job", "results", id, "--out", out)
	entries, err := os.ReadDir(out)
	c.check(err)
	if len(entries) != items {
		c.t.Errorf("%d items, want %d", len(entries), items)
	}
	for i := range items {
		text, err := os.ReadFile(filepath.Join(out, strconv.Itoa(i), "out.txt"))
		if want := fmt.Sprintf("item %d\n", i); err != nil || string(text) != want {
			c.t.Errorf("item %d is %q, %v", i, text, err)
		}
	}
}

// checkMoney wants every verified attempt of a job paid once, nobody else paid,
// one verified work attempt per task, and books that balance.
func (c *cluster) checkMoney(id string) {
	c.t.Helper()
	posts := map[string]int{}
	sum := api.MicroUSD(0)
	request := &musterpb.ListTransfersRequest{All: true}
	for more := true; more; {
		resp, err := c.client.ListTransfers(c.ctx, connect.NewRequest(request))
		c.check(err)
		for _, t := range resp.Msg.Transfers {
			request.After = t.Id
			for _, leg := range ledger.Legs(t) {
				sum += leg.Amount
			}
			if t.Kind == musterpb.TransferKind_TRANSFER_KIND_POST {
				posts[t.Ref]++
			}
		}
		more = resp.Msg.More
	}
	if sum != 0 {
		c.t.Errorf("the legs of all transfers add up to %s", sum)
	}
	job := c.job(id)
	verified := map[uint32]int{}
	for _, a := range job.Attempts {
		right := a.State == musterpb.AttemptState_ATTEMPT_STATE_VERIFIED
		if right && a.Check == "" {
			verified[a.Task]++
		}
		if n := posts[a.Id]; n > 1 || n == 1 != (right && a.PaidMicroUsd > 0) {
			c.t.Errorf("attempt %s is %s, has earned %d and was posted %d times", a.Id, state.StateName(a.State), a.PaidMicroUsd, n)
		}
	}
	for n := range job.Job.Tasks {
		if verified[n] != 1 {
			c.t.Errorf("task %d has %d verified attempts", n, verified[n])
		}
	}
	if status := c.status(c.client, nil); status.LedgerSumMicroUsd != 0 {
		c.t.Errorf("the ledger's sum is %d", status.LedgerSumMicroUsd)
	}
}

func (c *cluster) status(cl *client.Client, header map[string]string) *musterpb.ClusterStatusResponse {
	req := connect.NewRequest(&musterpb.ClusterStatusRequest{})
	for k, v := range header {
		req.Header().Set(k, v)
	}
	resp, err := cl.ClusterStatus(c.ctx, req)
	c.check(err)
	return resp.Msg
}

// leader is the index of the scheduler that leads, as the command line says.
func (c *cluster) leader() int {
	c.t.Helper()
	var v clusterView
	c.check(json.Unmarshal([]byte(c.muster("cluster", "status", "--output", "json")), &v))
	for _, n := range v.Nodes {
		if n.Leader {
			return slices.Index(c.addresses, n.API)
		}
	}
	c.t.Fatalf("nobody leads: %+v", v)
	return -1
}

// untilSame waits until every scheduler, asked itself, has applied as much and
// has the same state, and all of them take part in the draws.
func (c *cluster) untilSame() {
	c.t.Helper()
	var nodes []*client.Client
	for _, address := range c.addresses {
		cl, err := client.New(client.Config{Addresses: []string{address}, Key: c.admin})
		c.check(err)
		nodes = append(nodes, cl)
	}
	var last []string
	defer func() { c.t.Log(strings.Join(last, "; ")) }()
	c.until("all schedulers have the same state", func() (bool, error) {
		last = nil
		committee := true
		var seen []string
		for _, cl := range nodes {
			m := c.status(cl, map[string]string{server.HeaderRead: "stale"})
			text := fmt.Sprintf("applied %d, state %.16s", m.AppliedIndex, hex.EncodeToString(m.StateHash))
			last = append(last, text)
			if !slices.Contains(seen, text) {
				seen = append(seen, text)
			}
			for _, n := range m.Nodes {
				committee = committee && n.InCommittee
			}
		}
		return len(seen) == 1 && committee, nil
	})
}

// tasks is a job of n items, each a task that sleeps for some time.
func tasks(t *testing.T, n int, sleep time.Duration) string {
	t.Helper()
	wasm, err := program()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf(`name: many
image: %s
command: [--sleep, %s, --items, "{items}"]
items: {count: %d}
resources: {cpus: 1, memory: 128MiB, disk: 10MiB}
timeout: 1m
price: {max_per_gpu_hour: 1, budget: 20}
`, wasm, sleep, n)
}

// TestLeaderKilled is the first row of the failure table, and the third.
func TestLeaderKilled(t *testing.T) {
	c := startCluster(t, 3, 4*time.Minute)
	c.startWorker("owner-a", "--runtime", "wasm")
	c.startWorker("owner-b", "--runtime", "wasm")

	items := 200
	if testing.Short() {
		items = 100
	}
	id := c.submit(tasks(t, items, 0))
	c.until("a quarter of the job is verified", func() (bool, error) { return c.job(id).Job.ItemsVerified >= uint64(items/4), nil })
	killed := c.leader()
	c.schedulers[killed].kill()
	if job := c.job(id).Job; job.Settled {
		t.Error("the job was over before the leader was killed: it proves nothing")
	}
	c.waitVerified(id)
	if now := c.leader(); now == killed {
		t.Errorf("scheduler %d still leads", now)
	}
	c.checkResults(id, items)
	c.checkMoney(id)

	c.startScheduler(killed)
	c.check(c.schedulers[killed].waitReady())
	c.untilSame()
	if t.Failed() || testing.Short() {
		return
	}

	// Every scheduler at once: the state comes back from disk, and what ran is
	// not lost.
	const more = 60
	again := c.submit(tasks(t, more, 200*time.Millisecond))
	c.until("some of the second job is verified", func() (bool, error) { return c.job(again).Job.ItemsVerified >= more/6, nil })
	for _, p := range c.schedulers {
		p.kill()
	}
	for i := range c.schedulers {
		c.startScheduler(i)
	}
	for _, p := range c.schedulers {
		c.check(p.waitReady())
	}
	if job := c.job(id).Job; job.State != musterpb.JobState_JOB_STATE_VERIFIED || job.ItemsVerified != uint64(items) {
		t.Errorf("the first job came back as %s with %d items", state.StateName(job.State), job.ItemsVerified)
	}
	if job := c.job(again).Job; job.Settled {
		t.Error("the second job was over before the schedulers were killed: it proves nothing")
	}
	c.waitVerified(again)
	c.checkResults(again, more)
	c.checkMoney(again)
	c.checkMoney(id)
	c.untilSame()
}

// TestCheaterIsCaught has four workers, one of which renders with fewer samples
// than it was told.
func TestCheaterIsCaught(t *testing.T) {
	if testing.Short() {
		t.Skip("renders for some time")
	}
	wasm, err := build("raytrace.wasm", "wasip1", "wasm", "../../examples/raytrace")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	p, err := start(dir, nil, "dev", "--dir", filepath.Join(dir, "net"), "--listen", "127.0.0.1:0", "--runtime", "wasm", "--schedulers", "1", "--cheat", "fewer-samples")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	c := &cluster{t: t, ctx: ctx, dir: dir, schedulers: []*process{p}}
	defer c.stop()
	c.check(p.waitReady())
	config, err := os.ReadFile(filepath.Join(dir, "net", "client.yaml"))
	c.check(err)
	_, key, _ := strings.Cut(string(config), "key: ")
	c.addresses, c.admin = []string{p.field("addr")}, strings.TrimSpace(key)
	c.client, err = client.New(client.Config{Addresses: c.addresses, Key: c.admin})
	c.check(err)
	scene, err := filepath.Abs("../../examples/raytrace/scene.json")
	c.check(err)

	id := c.submit(fmt.Sprintf(`name: frames
image: %s
command: ["--scene", "/in/scene.json", "--frames", "{items}", "--width", "32", "--height", "18", "--samples", "8", "--out", "/out"]
inputs: [%s]
items: {range: 1-16}
timeout: 1m
price: {max_per_gpu_hour: 1, budget: 5}
verify: {comparator: image}
`, wasm, scene))
	c.waitVerified(id)
	c.checkMoney(id)
	job := c.job(id)
	if job.Job.Caught == 0 {
		t.Errorf("nobody was caught in %d attempts", len(job.Attempts))
	}
	for _, a := range job.Attempts {
		switch rejected := a.State == musterpb.AttemptState_ATTEMPT_STATE_REJECTED; {
		case rejected && a.Owner != "owner-4":
			t.Errorf("honest %s was taken for a cheater: %s", a.Owner, a.Reason)
		case rejected && a.PaidMicroUsd != 0:
			t.Errorf("the cheater was paid %d for attempt %s", a.PaidMicroUsd, a.Id)
		case !rejected && a.Owner == "owner-4" && a.State == musterpb.AttemptState_ATTEMPT_STATE_VERIFIED:
			t.Errorf("a result of the cheater passed: attempt %s", a.Id)
		}
	}
	var workers []workerView
	c.check(json.Unmarshal([]byte(c.muster("worker", "list", "--output", "json")), &workers))
	for _, w := range workers {
		if caught := w.Caught > 0; caught != (w.Name == "worker-4") {
			t.Errorf("%s is listed with %d caught", w.Name, w.Caught)
		}
	}
	if text := c.muster("job", "show", id); !strings.Contains(text, "a spot-check proved it wrong: item ") && !strings.Contains(text, "result differs from what other owners computed") {
		t.Errorf("the job does not say what was wrong:\n%s", text)
	}
	frames := filepath.Join(dir, "frames")
	c.muster("job", "results", id, "--out", frames)
	entries, err := os.ReadDir(frames)
	c.check(err)
	if len(entries) != 16 {
		t.Errorf("%d frames, want 16", len(entries))
	}
}

// TestDockerWorkerKilled runs an image in a real engine and kills a worker
// while its containers run.
func TestDockerWorkerKilled(t *testing.T) {
	switch {
	case os.Getenv(skipDocker) == "1":
		t.Skipf("%s=1: NOT TESTED: jobs in a real container engine, and what a killed worker leaves there", skipDocker)
	case testing.Short():
		t.Skip("starts containers")
	}
	binary, err := native()
	if err != nil {
		t.Fatal(err)
	}
	c := startCluster(t, 1, 3*time.Minute)
	archive := filepath.Join(c.dir, "prog.tar")
	_, err = image.Pack(binary, archive, image.Options{})
	c.check(err)
	owners := []string{"owner-a", "owner-b"}
	for _, name := range owners {
		c.startWorker(name, "--runtime", "docker")
	}
	defer c.removeContainers()

	const items = 8
	id := c.submit(fmt.Sprintf(`name: contained
image: %s
command: [--sleep, 1s, --items, "{items}"]
items: {count: %d}
resources: {cpus: 1, memory: 128MiB, disk: 10MiB}
timeout: 1m
price: {max_per_gpu_hour: 1, budget: 5}
`, archive, items))
	c.until("containers of owner-a run", func() (bool, error) {
		ids, err := containers("net.muster.owner", "running")
		return len(ids) > 0 && c.runs(id, "owner-a"), err
	})
	c.workers["owner-a"].kill()
	c.startWorker("owner-a", "--runtime", "docker")
	c.waitVerified(id)
	c.checkResults(id, items)
	c.checkMoney(id)
	if lost := c.attempts(id, musterpb.AttemptState_ATTEMPT_STATE_LOST, "owner-a"); lost == 0 {
		t.Error("no attempt of the killed worker was lost: it proves nothing")
	}

	for _, name := range owners {
		c.check(c.workers[name].interrupt())
		left, err := os.ReadDir(filepath.Join(c.dir, name, "attempts"))
		c.check(err)
		if len(left) > 0 {
			t.Errorf("%s left the attempt directories %v", name, left)
		}
	}
	if left := c.containers(); len(left) > 0 {
		t.Errorf("containers are left: %v", left)
	}
}

func (c *cluster) attempts(id string, st musterpb.AttemptState, owner string) int {
	n := 0
	for _, a := range c.job(id).Attempts {
		if a.State == st && a.Owner == owner {
			n++
		}
	}
	return n
}

// runs reports whether an attempt of the owner is under way.
func (c *cluster) runs(id, owner string) bool {
	return c.attempts(id, musterpb.AttemptState_ATTEMPT_STATE_RUNNING, owner) > 0
}

// containers are the engine's containers of this cluster's attempts: their
// inputs and outputs lie below its directory.
func (c *cluster) containers() []string {
	c.t.Helper()
	ids, err := containers("net.muster.owner", "")
	c.check(err)
	var own []string
	for _, id := range ids {
		mounts, err := exec.CommandContext(c.ctx, "docker", "inspect", "--format", "{{json .Mounts}}{{json .HostConfig.Binds}}", id).Output()
		if err == nil && strings.Contains(string(mounts), c.dir) {
			own = append(own, id)
		}
	}
	return own
}

// containers lists by label, and by status where that is not empty.
func containers(label, status string) ([]string, error) {
	args := []string{"ps", "-a", "-q", "--no-trunc", "--filter", "label=" + label}
	if status != "" {
		args = append(args, "--filter", "status="+status)
	}
	out, err := exec.Command("docker", args...).Output()
	return strings.Fields(string(out)), err
}

// removeContainers is for a test that failed on the way.
func (c *cluster) removeContainers() {
	for _, id := range c.containers() {
		_ = exec.Command("docker", "rm", "-f", id).Run()
	}
}
