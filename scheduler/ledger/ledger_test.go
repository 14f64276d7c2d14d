package ledger_test

import (
	"testing"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/scheduler/ledger"
	"pgregory.net/rapid"
)

func deposit(t interface {
	Helper()
	Fatal(...any)
}, l *ledger.Ledger, account string, amount api.MicroUSD) {
	t.Helper()
	if err := l.Move(ledger.Entry{Debit: ledger.External, Credit: account, Amount: amount}); err != nil {
		t.Fatal(err)
	}
}

func TestHoldPostVoid(t *testing.T) {
	l := ledger.New()
	deposit(t, l, "account:acme", 100)
	hold, err := l.Hold(ledger.Entry{Debit: "account:acme", Credit: "account:bob", Amount: 60})
	if err != nil {
		t.Fatal(err)
	}
	if a := l.Account("account:acme"); a.Balance != 100 || a.Available() != 40 {
		t.Errorf("after the hold: %+v", a)
	}
	if _, err := l.Hold(ledger.Entry{Debit: "account:acme", Credit: "account:bob", Amount: 41}); api.KindOf(err) != api.Exhausted {
		t.Errorf("holding more than is available: %v", err)
	}
	if err := l.Post(hold, 0, 61, 0, ""); api.KindOf(err) != api.Conflict {
		t.Errorf("posting more than was held: %v", err)
	}
	if err := l.Post(hold, 0, 40, 2, ""); err != nil {
		t.Fatal(err)
	}
	for account, want := range map[string]api.MicroUSD{"account:acme": 60, "account:bob": 38, ledger.Network: 2, ledger.External: -100} {
		if a := l.Account(account); a.Balance != want || a.Held != 0 || a.Expected != 0 {
			t.Errorf("%s after the post: %+v, want %s", account, a, want)
		}
	}
	if err := l.Post(hold, 0, 1, 0, ""); api.KindOf(err) != api.Conflict {
		t.Errorf("posting twice: %v", err)
	}
	if err := l.Void(hold, 0, ""); api.KindOf(err) != api.Conflict {
		t.Errorf("voiding what was posted: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	l := ledger.New()
	deposit(t, l, "a", 10)
	for name, e := range map[string]ledger.Entry{
		"negative": {Debit: "a", Credit: "b", Amount: -1},
		"zero":     {Debit: "a", Credit: "b"},
		"self":     {Debit: "a", Credit: "a", Amount: 1},
		"nameless": {Debit: "a", Amount: 1},
		"overdraw": {Debit: "a", Credit: "b", Amount: 11},
		"unknown":  {Debit: "nobody", Credit: "b", Amount: 1},
	} {
		if err := l.Move(e); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if l.Account("a").Balance != 10 || l.Account("b").Balance != 0 {
		t.Error("a refused transfer changed a balance")
	}
}

// Whatever is asked of it, the book stays balanced, nobody but the outside
// world is overdrawn, and replaying the transfers gives the same balances.
func TestProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := ledger.New()
		deposit(t, l, "a", 2000)
		deposit(t, l, ledger.Network, 2000)
		accounts := []string{"a", "b", "c", ledger.Network, ledger.External}
		account := rapid.SampledFrom(accounts)
		amount := rapid.Map(rapid.Int64Range(-5, 1000), func(n int64) api.MicroUSD { return api.MicroUSD(n) })
		var holds []uint64
		t.Repeat(map[string]func(*rapid.T){
			"move": func(t *rapid.T) {
				_ = l.Move(ledger.Entry{Debit: account.Draw(t, "debit"), Credit: account.Draw(t, "credit"), Amount: amount.Draw(t, "amount")})
			},
			"hold": func(t *rapid.T) {
				if id, err := l.Hold(ledger.Entry{Debit: account.Draw(t, "debit"), Credit: account.Draw(t, "credit"), Amount: amount.Draw(t, "amount")}); err == nil {
					holds = append(holds, id)
				}
			},
			"post": func(t *rapid.T) {
				if len(holds) > 0 {
					_ = l.Post(rapid.SampledFrom(holds).Draw(t, "hold"), 0, amount.Draw(t, "amount"), amount.Draw(t, "fee"), "")
				}
			},
			"void": func(t *rapid.T) {
				if len(holds) > 0 {
					_ = l.Void(rapid.SampledFrom(holds).Draw(t, "hold"), 0, "")
				}
			},
			"": func(t *rapid.T) {
				if sum := l.Sum(); sum != 0 {
					t.Fatalf("sum is %s", sum)
				}
				for _, name := range l.Accounts() {
					a := l.Account(name)
					if a.Held < 0 || a.Expected < 0 || (name != ledger.External && a.Available() < 0) {
						t.Fatalf("%s: %+v", name, a)
					}
				}
			},
		})
		replayed := ledger.New()
		all, _ := l.Transfers("", 0, 1<<30)
		var legs api.MicroUSD
		for _, tr := range all {
			if err := replayed.Replay(tr); err != nil {
				t.Fatal(err)
			}
			for _, leg := range ledger.Legs(tr) {
				legs += leg.Amount
			}
		}
		if legs != 0 {
			t.Fatalf("the legs of all transfers sum to %s", legs)
		}
		for _, name := range l.Accounts() {
			if l.Account(name) != replayed.Account(name) {
				t.Fatalf("%s: %+v, replayed %+v", name, l.Account(name), replayed.Account(name))
			}
		}
	})
}

func TestTransfersPages(t *testing.T) {
	l := ledger.New()
	for range 5 {
		deposit(t, l, "a", 1)
		deposit(t, l, "b", 1)
	}
	var got []uint64
	after, more := uint64(0), true
	for more {
		page, m := l.Transfers("b", after, 2)
		for _, tr := range page {
			got = append(got, tr.Id)
			after = tr.Id
		}
		more = m
	}
	if len(got) != 5 || got[0] != 2 || got[4] != 10 {
		t.Errorf("pages of b: %v", got)
	}
	if page, more := l.Transfers("", 8, 5); len(page) != 2 || more {
		t.Errorf("last page of all: %d transfers, more %v", len(page), more)
	}
}
