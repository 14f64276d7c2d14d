package scheduler

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/verify"
)

func open(t *testing.T, path string) *chains {
	t.Helper()
	c, err := openChains(path)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func tipOf(t *testing.T, c *chains) []byte {
	t.Helper()
	tip, err := c.tip()
	if err != nil {
		t.Fatal(err)
	}
	return tip
}

func revealOf(t *testing.T, c *chains, tip []byte, reveals uint64) []byte {
	t.Helper()
	value, err := c.reveal(&musterpb.Node{Tip: tip, Reveals: reveals})
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// A node that asks for a new chain, because it lags behind, can still reveal
// from the one that the cluster knows, before and after a restart.
func TestChainsOutliveARefusedRegistration(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node", "chain")
	c := open(t, path)
	if revealOf(t, c, nil, 0) != nil {
		t.Error("a reveal from no chain")
	}
	first := tipOf(t, c)
	if again := tipOf(t, c); !bytes.Equal(first, again) {
		t.Error("a chain that nobody has seen a value of was given up")
	}
	if c = open(t, path); !bytes.Equal(tipOf(t, c), first) {
		t.Error("the restart lost the chain that was being registered")
	}
	one := revealOf(t, c, first, 0)
	if !verify.CheckReveal(first, one) {
		t.Error("the first reveal does not hash to the tip")
	}

	second := tipOf(t, c) // refused by the leader
	if bytes.Equal(second, first) {
		t.Error("a chain that is in use is registered again")
	}
	for range 2 {
		two := revealOf(t, c, one, 1)
		if !verify.CheckReveal(one, two) {
			t.Error("the chain in use was lost for one that was refused")
		}
		c = open(t, path)
	}
	if value := revealOf(t, c, second, 0); !verify.CheckReveal(second, value) {
		t.Error("the second chain does not work once it is registered")
	}
	if revealOf(t, c, one, 1) != nil {
		t.Error("the first chain is still there")
	}
	if _, err := os.Stat(path + nextSuffix); err == nil {
		t.Error("the secret in use is still in the place of the next")
	}
}

func TestDamagedChainSecret(t *testing.T) {
	path := filepath.Join(t.TempDir(), "chain")
	if err := os.WriteFile(path, []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openChains(path); err == nil {
		t.Error("a damaged secret was taken")
	}
}

// What a node signs is worth nothing once its chain went on.
func TestProposalsCannotBeReplayed(t *testing.T) {
	r := &musterpb.ProposeRequest{Node: "sch-1", Command: &musterpb.Command{Body: &musterpb.Command_RegisterTip{RegisterTip: &musterpb.RegisterTip{Node: "sch-1", Tip: []byte("tip")}}}}
	seen := map[string]bool{}
	for _, node := range []*musterpb.Node{nil, {Tip: []byte("tip")}, {Tip: []byte("value"), Reveals: 1}, {Tip: []byte("tip"), Reveals: 1}} {
		text, err := ProposalText(r, node)
		if err != nil {
			t.Fatal(err)
		}
		if seen[string(text)] {
			t.Errorf("the same text at another place of the chain: %q", text)
		}
		seen[string(text)] = true
	}
}
