package state

import (
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
)

// maxDeposit keeps every sum of balances far from overflow.
const maxDeposit = 1_000_000_000 * api.Dollars

func (s *State) createCluster(c *musterpb.CreateCluster) (string, error) {
	if s.cluster != "" {
		return "", api.Errorf(api.Conflict, "this cluster is %s already", s.cluster)
	}
	if c.Cluster == "" {
		return "", api.Errorf(api.Invalid, "a cluster needs an ID")
	}
	s.cluster = c.Cluster
	return c.Cluster, nil
}

// CheckAccountName wants 1 to 64 of a-z, 0-9, '-', '_' and '.', not starting
// with punctuation.
func CheckAccountName(name string) error {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789"
	if len(name) < 1 || len(name) > 64 || strings.Trim(name, letters+"-_.") != "" || !strings.ContainsRune(letters, rune(name[0])) {
		return api.Errorf(api.Invalid, "account name %q: want 1 to 64 of a-z, 0-9, '-', '_' and '.', starting with a letter or digit", name)
	}
	return nil
}

func (s *State) createAccount(c *musterpb.CreateAccount) (string, error) {
	if err := CheckAccountName(c.Account); err != nil {
		return "", err
	}
	if s.accounts.Get(c.Account) != nil {
		return "", api.Errorf(api.Conflict, "account %q exists already", c.Account)
	}
	account := &musterpb.Account{Id: c.Account, CreatedUnixMs: s.now}
	s.accounts.Set(c.Account, account)
	s.indexAccount(account)
	return c.Account, nil
}

func (s *State) createKey(c *musterpb.CreateKey) (string, error) {
	if s.accounts.Get(c.Account) == nil {
		return "", api.Errorf(api.NotFound, "account %q does not exist", c.Account)
	}
	if len(c.Hash) != sha256.Size {
		return "", api.Errorf(api.Invalid, "key hash of %d bytes, want %d", len(c.Hash), sha256.Size)
	}
	if c.Role == musterpb.Role_ROLE_UNSPECIFIED || musterpb.Role_name[int32(c.Role)] == "" {
		return "", api.Errorf(api.Invalid, "role %d is not known", c.Role)
	}
	if s.keys.Get(string(c.Hash)) != nil {
		return "", api.Errorf(api.Conflict, "that key exists already")
	}
	s.keys.Set(string(c.Hash), &musterpb.Key{Hash: c.Hash, Account: c.Account, Role: c.Role, CreatedUnixMs: s.now})
	return "", nil
}

func (s *State) deposit(c *musterpb.Deposit) (string, error) {
	return s.deposits(&musterpb.Deposits{Deposits: []*musterpb.Deposit{c}})
}

// MaxDeposits bounds how many deposits are taken together.
const MaxDeposits = 8192

// deposits takes all deposits or none.
func (s *State) deposits(c *musterpb.Deposits) (string, error) {
	if n := len(c.Deposits); n == 0 || n > MaxDeposits {
		return "", api.Errorf(api.Invalid, "%d deposits: want 1 to %d at a time", n, MaxDeposits)
	}
	which := func(i int) string { // of several
		if len(c.Deposits) == 1 {
			return ""
		}
		return fmt.Sprintf("deposit %d: ", i+1)
	}
	var total api.MicroUSD
	payments := make([]ledger.Payment, len(c.Deposits))
	for i, d := range c.Deposits {
		x, amount := s.index.accounts[d.Account], api.MicroUSD(d.AmountMicroUsd)
		switch {
		case x == nil:
			return "", api.Errorf(api.NotFound, "%saccount %q does not exist", which(i), d.Account)
		case amount <= 0 || amount > maxDeposit:
			return "", api.Errorf(api.Invalid, "%samount %s for account %s: want more than zero and at most %s", which(i), amount, d.Account, maxDeposit)
		}
		if total += amount; total > maxDeposit {
			return "", api.Errorf(api.Invalid, "deposits of more than %s: enter at most that much at a time", maxDeposit)
		}
		payments[i] = ledger.Payment{Account: x.money, Amount: amount, Memo: d.Memo}
	}
	return "", s.ledger.Deposit(s.now, "deposit", payments)
}

// registerNode makes a scheduler known, or changes its addresses. What it has
// in the committee stays.
func (s *State) registerNode(c *musterpb.RegisterNode) (string, error) {
	n := c.Node
	if len(n.GetPublicKey()) != ed25519.PublicKeySize || string(api.NodeIDOf(n.PublicKey)) != n.Id {
		return "", api.Errorf(api.Invalid, "scheduler %q: the ID does not belong to the public key", n.GetId())
	}
	if n.ApiAddress == "" || n.RaftAddress == "" {
		return "", api.Errorf(api.Invalid, "scheduler %s: both addresses are needed", n.Id)
	}
	fresh := &musterpb.Node{Id: n.Id, PublicKey: n.PublicKey, ApiAddress: n.ApiAddress, RaftAddress: n.RaftAddress}
	if old := s.nodes[n.Id]; old != nil {
		fresh.Tip, fresh.Reveals, fresh.LeftReason = old.Tip, old.Reveals, old.LeftReason
	}
	s.nodes[n.Id] = fresh
	return n.Id, nil
}

// registerTip enters a scheduler into the committee with a new chain. Only
// batches that are closed later ask it for a reveal.
func (s *State) registerTip(c *musterpb.RegisterTip) (string, error) {
	old := s.nodes[c.Node]
	if old == nil {
		return "", api.Errorf(api.NotFound, "scheduler %s is not registered", c.Node)
	}
	if len(c.Tip) != sha256.Size {
		return "", api.Errorf(api.Invalid, "tip of %d bytes, want %d", len(c.Tip), sha256.Size)
	}
	if b := s.batches.Get(s.epoch); b != nil && !b.Drawn {
		// A new chain now would let the node choose its reveal after it saw the others.
		return "", api.Errorf(api.Unavailable, "epoch %d is being drawn: register again after it", s.epoch)
	}
	fresh := old.CloneVT()
	fresh.Tip, fresh.Reveals, fresh.LeftReason = c.Tip, 0, ""
	s.nodes[c.Node] = fresh
	return "", nil
}

// cpuLevels are the levels of the x86-64 psABI; empty is another architecture's
// baseline. A worker may not make up a class of its own, where nobody could
// check it.
var cpuLevels = []string{"", "x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4"}

func (s *State) registerWorker(c *musterpb.RegisterWorker) (string, error) {
	w := c.Worker
	if len(w.GetPublicKey()) != ed25519.PublicKeySize || string(api.WorkerIDOf(w.PublicKey)) != w.Id {
		return "", api.Errorf(api.Invalid, "worker %q: the ID does not belong to the public key", w.GetId())
	}
	if s.accounts.Get(w.Owner) == nil {
		return "", api.Errorf(api.NotFound, "worker %s: account %q does not exist", w.Id, w.Owner)
	}
	if w.PriceMicroUsdPerHour < 0 || api.MicroUSD(w.PriceMicroUsdPerHour) > 10_000*api.Dollars {
		return "", api.Errorf(api.Invalid, "worker %s asks %s per hour: want $0 to $10000", w.Id, api.MicroUSD(w.PriceMicroUsdPerHour))
	}
	if err := checkCapacity(w); err != nil {
		return "", err
	}
	if level := w.Capacity.GetCpuLevel(); !slices.Contains(cpuLevels, level) {
		return "", api.Errorf(api.Invalid, "worker %s has CPU level %.20q: want one of %q", w.Id, level, cpuLevels)
	}
	fresh := &musterpb.Worker{JoinedUnixMs: s.now}
	if old := s.workers.Get(w.Id); old != nil {
		if old.Owner != w.Owner {
			return "", api.Errorf(api.Denied, "worker %s belongs to account %q; give this machine a new identity to move it", w.Id, old.Owner)
		}
		fresh = copyWorker(old)
	}
	fresh.Id, fresh.PublicKey, fresh.Owner, fresh.Name = w.Id, w.PublicKey, w.Owner, w.Name
	fresh.Capacity, fresh.PriceMicroUsdPerHour, fresh.AllowNetwork = w.Capacity, w.PriceMicroUsdPerHour, w.AllowNetwork
	s.workers.Set(w.Id, fresh)
	s.indexWorker(fresh)
	return w.Id, nil
}

// Bounds of what a worker may say of itself.
const (
	maxWorkerName = 100
	maxDevices    = 256
	maxRuntimes   = 16
)

func checkCapacity(w *musterpb.Worker) error {
	c := w.Capacity
	switch {
	case c == nil:
		return api.Errorf(api.Invalid, "worker %s states no capacity", w.Id)
	case c.MilliCpus < 0 || c.MemoryBytes < 0 || c.DiskBytes < 0:
		return api.Errorf(api.Invalid, "worker %s has a negative capacity: %d milli-CPUs, %d bytes of memory, %d of disk", w.Id, c.MilliCpus, c.MemoryBytes, c.DiskBytes)
	case len(w.Name) > maxWorkerName || len(c.Devices) > maxDevices || len(c.Runtimes) > maxRuntimes:
		return api.Errorf(api.TooLarge, "worker %s: a name of %d bytes, %d devices and %d runtimes; at most %d, %d and %d are allowed",
			w.Id, len(w.Name), len(c.Devices), len(c.Runtimes), maxWorkerName, maxDevices, maxRuntimes)
	}
	seen := map[string]bool{}
	for _, d := range c.Devices {
		if d.Uuid == "" || seen[d.Uuid] {
			return api.Errorf(api.Invalid, "worker %s: device %q is there twice, or has no UUID", w.Id, d.Uuid)
		}
		seen[d.Uuid] = true
	}
	return nil
}

func (s *State) drainWorker(c *musterpb.DrainWorker) (string, error) {
	if s.workers.Get(c.Worker) == nil {
		return "", api.Errorf(api.NotFound, "worker %q is not known", c.Worker)
	}
	s.editWorker(c.Worker).Draining = c.Draining
	return c.Worker, nil
}

// editWorker is a stored worker that may be changed until the next entry.
func (s *State) editWorker(id string) *musterpb.Worker {
	w, x := s.workers.Get(id), s.index.workers[id]
	if x.made != s.entry {
		w = copyWorker(w)
		s.workers.Set(id, w)
		x.made = s.entry
		s.tellWorker(id, x)
	}
	return w
}

// failedWorker counts a failure of a worker and makes it wait.
func (s *State) failedWorker(id string, caught bool) {
	w := s.editWorker(id)
	w.Failed++
	if caught {
		w.Caught++
	}
	s.restWorker(id)
}

// restWorker makes a worker wait that could not finish an attempt: 2 s after
// the first, doubling up to 5 minutes.
func (s *State) restWorker(id string) {
	w := s.editWorker(id)
	w.FailuresInARow++
	w.BackoffUntilUnixMs = s.now + min(int64(1000)<<min(w.FailuresInARow, 20), 300_000)
}

func (s *State) finishedWorker(id string) {
	w := s.editWorker(id)
	w.Finished++
	w.FailuresInARow, w.BackoffUntilUnixMs = 0, 0
}

func (s *State) changeRecord(owner, class, application string, passed bool) {
	key := recordKey{owner, class, application}
	fresh := &musterpb.Record{Owner: owner, Class: class, Application: application}
	if old := s.records.Get(key); old != nil {
		fresh = old.CloneVT()
	}
	if passed {
		fresh.Passed++
	} else {
		fresh.Passed = 0
		fresh.Offences++
	}
	s.records.Set(key, fresh)
}
