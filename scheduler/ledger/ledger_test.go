package ledger_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
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

func TestNetworkPaysNoFee(t *testing.T) {
	l := ledger.New()
	deposit(t, l, ledger.Network, 100)
	hold, err := l.Hold(ledger.Entry{Debit: ledger.Network, Credit: "account:bob", Amount: 60})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Post(hold, 0, 40, 2, ""); err != nil {
		t.Fatal(err)
	}
	if bob, network := l.Account("account:bob"), l.Account(ledger.Network); bob.Balance != 40 || bob.Earned != 40 || network.Balance != 60 {
		t.Errorf("after the post: bob %+v, network %+v", bob, network)
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
// world is overdrawn, the transfers account for every balance, and a book that
// is read back, with more or less of it sealed, is the same.
func TestProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := ledger.New()
		var all []*musterpb.Transfer // sealed or not
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
			"deposit": func(t *rapid.T) {
				_ = l.Deposit(0, "deposit", []ledger.Payment{{Account: account.Draw(t, "one"), Amount: amount.Draw(t, "amount")}, {Account: account.Draw(t, "other"), Amount: 1}})
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
			"seal": func(t *rapid.T) {
				through := rapid.Uint64Range(0, l.Last()+1).Draw(t, "through")
				tail := l.Tail(0)
				sealed := l.Sealed()
				if err := l.Seal(through); (err == nil) != (through >= sealed && through <= sealed+uint64(len(tail))) {
					t.Fatalf("sealing up to %d of %d: %v", through, sealed+uint64(len(tail)), err)
				} else if err == nil {
					all = append(all, tail[:through-sealed]...)
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
		balances := map[string]api.MicroUSD{}
		for i, tr := range append(all, l.Tail(0)...) {
			if tr.Id != uint64(i)+1 {
				t.Fatalf("transfer %d is at place %d", tr.Id, i+1)
			}
			for _, leg := range ledger.Legs(tr) {
				balances[leg.Account] += leg.Amount
			}
		}
		again := must(restored(l, nil))
		for _, name := range accounts {
			if l.Account(name) != again.Account(name) || l.Account(name).Balance != balances[name] {
				t.Fatalf("%s: %+v, restored %+v, the transfers say %s", name, l.Account(name), again.Account(name), balances[name])
			}
		}
		for _, id := range holds {
			if l.Open(id) != again.Open(id) {
				t.Fatalf("hold %d is open: %v, restored: %v", id, l.Open(id), again.Open(id))
			}
		}
	})
}

// restored reads a book back from its records, which spoil may change before.
func restored(l *ledger.Ledger, spoil func(*[]*musterpb.LedgerAccount, *[]*musterpb.Transfer)) (*ledger.Ledger, error) {
	a, tr := l.Records()
	accounts, transfers := slices.Collect(a), []*musterpb.Transfer{}
	for t := range tr {
		transfers = append(transfers, t.CloneVT())
	}
	if spoil != nil {
		spoil(&accounts, &transfers)
	}
	r := ledger.Restore(l.Sealed())
	for _, a := range accounts {
		if err := r.Account(a); err != nil {
			return nil, err
		}
	}
	for _, t := range transfers {
		if err := r.Transfer(t); err != nil {
			return nil, err
		}
	}
	return r.Finish()
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// book has a sealed hold that is open, one that ended since, and an unsealed
// one of each.
func book(t *testing.T) *ledger.Ledger {
	l := ledger.New()
	deposit(t, l, "a", 1000)
	e := ledger.Entry{Debit: "a", Credit: "b", Amount: 10}
	first, second := must(l.Hold(e)), must(l.Hold(e))
	if err := l.Seal(l.Last()); err != nil {
		t.Fatal(err)
	}
	third, _ := must(l.Hold(e)), must(l.Hold(e))
	if err := l.Post(second, 0, 5, 1, ""); err != nil {
		t.Fatal(err)
	}
	if err := l.Void(third, 0, ""); err != nil {
		t.Fatal(err)
	}
	if !l.Open(first) || len(l.Tail(0)) != 5 {
		t.Fatalf("the book is not what this test needs: %v", l.Tail(0))
	}
	return l
}

func TestRestoreRefuses(t *testing.T) {
	if l, err := restored(book(t), nil); err != nil || l.Account("a") != book(t).Account("a") {
		t.Fatalf("the book as it is: %v", err)
	}
	type records = func(*[]*musterpb.LedgerAccount, *[]*musterpb.Transfer)
	account := func(change func(*musterpb.LedgerAccount)) records {
		return func(a *[]*musterpb.LedgerAccount, _ *[]*musterpb.Transfer) { change((*a)[0]) } // a
	}
	transfer := func(i int, change func(*musterpb.Transfer)) records {
		return func(_ *[]*musterpb.LedgerAccount, t *[]*musterpb.Transfer) { change((*t)[i]) } // 0 is sealed
	}
	for name, spoil := range map[string]records{
		"account missing":      func(a *[]*musterpb.LedgerAccount, _ *[]*musterpb.Transfer) { *a = (*a)[1:] },
		"account twice":        func(a *[]*musterpb.LedgerAccount, _ *[]*musterpb.Transfer) { *a = append(*a, (*a)[0]) },
		"nameless":             account(func(a *musterpb.LedgerAccount) { a.Name = "" }),
		"money made":           account(func(a *musterpb.LedgerAccount) { a.BalanceMicroUsd++ }),
		"held more":            account(func(a *musterpb.LedgerAccount) { a.HeldMicroUsd++ }),
		"expects":              account(func(a *musterpb.LedgerAccount) { a.ExpectedMicroUsd++ }),
		"overdrawn":            account(func(a *musterpb.LedgerAccount) { a.BalanceMicroUsd = -1 }),
		"negative total":       account(func(a *musterpb.LedgerAccount) { a.DepositedMicroUsd = -1 }),
		"sealed hold missing":  func(_ *[]*musterpb.LedgerAccount, t *[]*musterpb.Transfer) { *t = (*t)[1:] },
		"transfer missing":     func(_ *[]*musterpb.LedgerAccount, t *[]*musterpb.Transfer) { *t = slices.Delete(*t, 2, 3) },
		"sealed, and no hold":  transfer(0, func(t *musterpb.Transfer) { t.Kind = musterpb.TransferKind_TRANSFER_KIND_MOVE }),
		"negative":             transfer(1, func(t *musterpb.Transfer) { t.AmountMicroUsd = -1 }),
		"to itself":            transfer(1, func(t *musterpb.Transfer) { t.Credit = t.Debit }),
		"unknown kind":         transfer(1, func(t *musterpb.Transfer) { t.Kind = 9 }),
		"void of another hold": transfer(5, func(t *musterpb.Transfer) { t.Pending = 2 }),
		"void of no hold":      transfer(5, func(t *musterpb.Transfer) { t.Pending = 99 }),
		"void of more":         transfer(5, func(t *musterpb.Transfer) { t.AmountMicroUsd++ }),
		"sealed after unsealed": func(_ *[]*musterpb.LedgerAccount, t *[]*musterpb.Transfer) {
			*t = append((*t)[1:], (*t)[0])
		},
	} {
		if _, err := restored(book(t), spoil); err == nil {
			t.Errorf("%s: the book was taken", name)
		}
	}
}

// An account of zeros is none: the books of a million jobs that are settled
// take no room.
func TestEmptyAccountsGo(t *testing.T) {
	l := ledger.New()
	deposit(t, l, "a", 10)
	if err := l.Move(ledger.Entry{Debit: "a", Credit: "job:1", Amount: 10}); err != nil {
		t.Fatal(err)
	}
	if err := l.Move(ledger.Entry{Debit: "job:1", Credit: "a", Amount: 10}); err != nil {
		t.Fatal(err)
	}
	if got := l.Accounts(); !slices.Equal(got, []string{"a", ledger.External}) {
		t.Errorf("accounts: %q", got)
	}
}

func TestDepositsTogether(t *testing.T) {
	l := ledger.New()
	for name, payments := range map[string][]ledger.Payment{
		"zero":      {{Account: "a", Amount: 1}, {Account: "b"}},
		"negative":  {{Account: "a", Amount: 1}, {Account: "b", Amount: -1}},
		"too much":  {{Account: "a", Amount: 1 << 61}, {Account: "b", Amount: 1 << 61}, {Account: "c", Amount: 1 << 61}},
		"nameless":  {{Amount: 1}},
		"to itself": {{Account: ledger.External, Amount: 1}},
	} {
		if err := l.Deposit(0, "deposit", payments); err == nil || l.Last() != 0 || len(l.Accounts()) != 0 {
			t.Errorf("%s: %v, %d transfers", name, err, l.Last())
		}
	}
	if err := l.Deposit(7, "deposit", []ledger.Payment{{"a", 1, "x"}, {"b", 2, "y"}, {"a", 3, "z"}}); err != nil {
		t.Fatal(err)
	}
	if a := l.Account("a"); a.Balance != 4 || a.Deposited != 4 || l.Account(ledger.External).Balance != -6 || l.Last() != 3 {
		t.Errorf("after the deposits: %+v, %+v, %d transfers", a, l.Account(ledger.External), l.Last())
	}
}

func BenchmarkDeposits(b *testing.B) {
	payments := make([]ledger.Payment, 8000)
	for i := range payments {
		payments[i] = ledger.Payment{Account: fmt.Sprint("account:", i%100), Amount: 1}
	}
	l := ledger.New()
	for b.Loop() {
		if err := l.Deposit(0, "deposit", payments); err != nil {
			b.Fatal(err)
		}
		if err := l.Seal(l.Last()); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)*float64(len(payments))/b.Elapsed().Seconds(), "transfers/s")
}

// BenchmarkHoldPost is the money of one task: a hold, its post, the fee.
func BenchmarkHoldPost(b *testing.B) {
	l := ledger.New()
	if err := l.Move(ledger.Entry{Debit: ledger.External, Credit: "job:1", Amount: 1 << 60}); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		hold, err := l.Hold(ledger.Entry{Debit: "job:1", Credit: "account:bob", Amount: 100})
		if err != nil {
			b.Fatal(err)
		}
		if err := l.Post(hold, 0, 80, 4, ""); err != nil {
			b.Fatal(err)
		}
		if l.Last()%(1<<16) == 0 {
			must(0, l.Seal(l.Last()))
		}
	}
}
