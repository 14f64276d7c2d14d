// Package ledger is muster's double-entry book: integer micro-USD, moved
// between accounts at once (Move) or in two phases (Hold, then Post or Void).
//
// It is pure: no clock, no I/O, no randomness. Every method checks first and
// writes last, so a refused transfer changes nothing. What the balances are
// follows from the transfers alone, in order; Replay rebuilds them.
package ledger

import (
	"fmt"
	"slices"
	"strings"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// The accounts that are not a customer's, an owner's or a job's.
const (
	// External is the world outside: deposits come from it, so it alone may be
	// negative. Its balance is minus all the money inside.
	External = "external"
	// Network receives the fee and pays what nobody else should.
	Network = "network"
)

// Of is the ledger account of a person or company.
func Of(account string) string { return "account:" + account }

// OfJob is the ledger account that holds the budget of a job.
func OfJob(job string) string { return "job:" + job }

// Account is the money of one ledger account.
type Account struct {
	// Balance is what is there, held money included.
	Balance api.MicroUSD
	// Held is the part of Balance that is reserved and can't be spent.
	Held api.MicroUSD
	// Expected is the most that open holds may still bring.
	Expected api.MicroUSD
}

// Available is what can be spent or held.
func (a Account) Available() api.MicroUSD { return a.Balance - a.Held }

// Ledger is the book. It is not safe for concurrent use.
type Ledger struct {
	accounts  map[string]Account
	transfers []*musterpb.Transfer // in order of ID, never changed once there
	open      map[uint64]*musterpb.Transfer
	byAccount map[string][]uint64
}

// New is an empty book.
func New() *Ledger {
	return &Ledger{
		accounts:  map[string]Account{},
		open:      map[uint64]*musterpb.Transfer{},
		byAccount: map[string][]uint64{},
	}
}

// Entry is what the caller says of a transfer.
type Entry struct {
	TimeUnixMS    int64
	Debit, Credit string // from, to
	Amount        api.MicroUSD
	Ref           string // the job or the attempt that it is for
	Memo          string
}

// Account is the state of one account; one that was never used is zero.
func (l *Ledger) Account(name string) Account { return l.accounts[name] }

// Accounts lists the names of all accounts, sorted.
func (l *Ledger) Accounts() []string {
	names := make([]string, 0, len(l.accounts))
	for name := range l.accounts {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Sum is the sum of all balances: zero, or the book is broken.
func (l *Ledger) Sum() api.MicroUSD {
	var sum api.MicroUSD
	for _, a := range l.accounts {
		sum += a.Balance
	}
	return sum
}

// Move moves money at once.
func (l *Ledger) Move(e Entry) error {
	if err := l.check(e); err != nil {
		return err
	}
	l.append(transferOf(e, musterpb.TransferKind_TRANSFER_KIND_MOVE))
	return nil
}

// Hold reserves money of the debit account for the credit account, and
// returns the ID that Post or Void ends it with.
func (l *Ledger) Hold(e Entry) (uint64, error) {
	if err := l.check(e); err != nil {
		return 0, err
	}
	return l.append(transferOf(e, musterpb.TransferKind_TRANSFER_KIND_HOLD)), nil
}

// Post ends a hold: amount leaves the debit account, of which fee goes to
// Network and the rest to the hold's credit account; what the hold had
// reserved beyond amount is free again.
func (l *Ledger) Post(hold uint64, timeUnixMS int64, amount, fee api.MicroUSD, memo string) error {
	h, err := l.hold(hold)
	if err != nil {
		return err
	}
	if amount < 0 || amount > api.MicroUSD(h.AmountMicroUsd) {
		return api.Errorf(api.Conflict, "posting %s of hold %d: it reserved %s", amount, hold, api.MicroUSD(h.AmountMicroUsd))
	}
	if fee < 0 || fee > amount {
		return api.Errorf(api.Conflict, "posting hold %d: fee %s of %s", hold, fee, amount)
	}
	if h.Debit == Network {
		fee = 0 // the network takes no fee from itself
	}
	l.append(&musterpb.Transfer{
		TimeUnixMs: timeUnixMS, Kind: musterpb.TransferKind_TRANSFER_KIND_POST, Debit: h.Debit, Credit: h.Credit,
		AmountMicroUsd: int64(amount - fee), Ref: h.Ref, Memo: memo, Pending: hold,
	})
	if fee > 0 {
		l.append(transferOf(Entry{TimeUnixMS: timeUnixMS, Debit: h.Debit, Credit: Network, Amount: fee, Ref: h.Ref, Memo: "network fee"},
			musterpb.TransferKind_TRANSFER_KIND_MOVE))
	}
	return nil
}

// Void ends a hold and moves nothing.
func (l *Ledger) Void(hold uint64, timeUnixMS int64, memo string) error {
	h, err := l.hold(hold)
	if err != nil {
		return err
	}
	l.append(&musterpb.Transfer{
		TimeUnixMs: timeUnixMS, Kind: musterpb.TransferKind_TRANSFER_KIND_VOID, Debit: h.Debit, Credit: h.Credit,
		AmountMicroUsd: h.AmountMicroUsd, Ref: h.Ref, Memo: memo, Pending: hold,
	})
	return nil
}

// Open reports whether a hold has been neither posted nor voided.
func (l *Ledger) Open(hold uint64) bool { return l.open[hold] != nil }

// Transfers lists up to limit transfers with an ID greater than after, of one
// account or, with an empty name, of all. The values must not be changed.
func (l *Ledger) Transfers(account string, after uint64, limit int) (list []*musterpb.Transfer, more bool) {
	if account == "" {
		from := min(after, uint64(len(l.transfers)))
		to := min(from+uint64(limit), uint64(len(l.transfers)))
		return l.transfers[from:to:to], to < uint64(len(l.transfers))
	}
	ids := l.byAccount[account]
	from, found := slices.BinarySearch(ids, after)
	if found {
		from++
	}
	to := min(from+limit, len(ids))
	for _, id := range ids[from:to] {
		list = append(list, l.transfers[id-1])
	}
	return list, to < len(ids)
}

// AccountsUnder lists the accounts whose name starts with prefix, sorted.
func (l *Ledger) AccountsUnder(prefix string) []string {
	return slices.DeleteFunc(l.Accounts(), func(name string) bool { return !strings.HasPrefix(name, prefix) })
}

// Replay appends a transfer of a snapshot, with every check of the live path.
func (l *Ledger) Replay(t *musterpb.Transfer) error {
	if want := uint64(len(l.transfers)) + 1; t.Id != want {
		return fmt.Errorf("ledger: transfer %d where %d is next", t.Id, want)
	}
	switch t.Kind {
	case musterpb.TransferKind_TRANSFER_KIND_MOVE, musterpb.TransferKind_TRANSFER_KIND_HOLD:
		if err := l.check(Entry{Debit: t.Debit, Credit: t.Credit, Amount: api.MicroUSD(t.AmountMicroUsd)}); err != nil {
			return fmt.Errorf("ledger: transfer %d: %w", t.Id, err)
		}
	case musterpb.TransferKind_TRANSFER_KIND_POST, musterpb.TransferKind_TRANSFER_KIND_VOID:
		h, err := l.hold(t.Pending)
		if err != nil {
			return fmt.Errorf("ledger: transfer %d: %w", t.Id, err)
		}
		if t.AmountMicroUsd < 0 || t.AmountMicroUsd > h.AmountMicroUsd || t.Debit != h.Debit || t.Credit != h.Credit {
			return fmt.Errorf("ledger: transfer %d does not fit hold %d", t.Id, t.Pending)
		}
	default:
		return fmt.Errorf("ledger: transfer %d has kind %v", t.Id, t.Kind)
	}
	l.append(t)
	return nil
}

func (l *Ledger) check(e Entry) error {
	switch {
	case e.Amount <= 0:
		return api.Errorf(api.Invalid, "amount %s: want more than zero", e.Amount)
	case e.Debit == e.Credit:
		return api.Errorf(api.Invalid, "transfer from %s to itself", e.Debit)
	case e.Debit == "" || e.Credit == "":
		return api.Errorf(api.Invalid, "transfer from %q to %q: both need a name", e.Debit, e.Credit)
	}
	if have := l.accounts[e.Debit].Available(); e.Debit != External && have < e.Amount {
		return api.Errorf(api.Exhausted, "%s has %s available, %s is needed", e.Debit, have, e.Amount)
	}
	if e.Amount > maxMoney {
		return api.Errorf(api.Exhausted, "amount %s: the ledger holds at most %s", e.Amount, maxMoney)
	}
	if e.Debit == External {
		return l.HasRoomFor(e.Amount)
	}
	return nil
}

// maxMoney is all the money that can be inside, so that no sum overflows.
const maxMoney api.MicroUSD = 1 << 61

// HasRoomFor reports whether so much more money can come in.
func (l *Ledger) HasRoomFor(amount api.MicroUSD) error {
	if inside := -l.accounts[External].Balance; amount > maxMoney-inside {
		return api.Errorf(api.Exhausted, "%s more: the ledger holds %s, and at most %s", amount, inside, maxMoney)
	}
	return nil
}

func (l *Ledger) hold(id uint64) (*musterpb.Transfer, error) {
	if h := l.open[id]; h != nil {
		return h, nil
	}
	return nil, api.Errorf(api.Conflict, "hold %d is not open", id)
}

// append is the one place that changes balances.
func (l *Ledger) append(t *musterpb.Transfer) uint64 {
	t.Id = uint64(len(l.transfers)) + 1
	amount := api.MicroUSD(t.AmountMicroUsd)
	debit, credit := l.accounts[t.Debit], l.accounts[t.Credit]
	switch t.Kind {
	case musterpb.TransferKind_TRANSFER_KIND_MOVE:
		debit.Balance -= amount
		credit.Balance += amount
	case musterpb.TransferKind_TRANSFER_KIND_HOLD:
		debit.Held += amount
		credit.Expected += amount
		l.open[t.Id] = t
	case musterpb.TransferKind_TRANSFER_KIND_POST, musterpb.TransferKind_TRANSFER_KIND_VOID:
		held := api.MicroUSD(l.open[t.Pending].AmountMicroUsd)
		debit.Held -= held
		credit.Expected -= held
		if t.Kind == musterpb.TransferKind_TRANSFER_KIND_POST {
			debit.Balance -= amount
			credit.Balance += amount
		}
		delete(l.open, t.Pending)
	}
	l.accounts[t.Debit], l.accounts[t.Credit] = debit, credit
	l.transfers = append(l.transfers, t)
	l.byAccount[t.Debit] = append(l.byAccount[t.Debit], t.Id)
	l.byAccount[t.Credit] = append(l.byAccount[t.Credit], t.Id)
	return t.Id
}

func transferOf(e Entry, kind musterpb.TransferKind) *musterpb.Transfer {
	return &musterpb.Transfer{
		TimeUnixMs: e.TimeUnixMS, Kind: kind, Debit: e.Debit, Credit: e.Credit,
		AmountMicroUsd: int64(e.Amount), Ref: e.Ref, Memo: e.Memo,
	}
}

// Leg is one side of a transfer: money that arrived in, or left, an account.
type Leg struct {
	Account string
	Amount  api.MicroUSD // signed
}

// Legs are the two sides of t; a hold and a void move nothing.
func Legs(t *musterpb.Transfer) [2]Leg {
	amount := api.MicroUSD(t.AmountMicroUsd)
	if t.Kind == musterpb.TransferKind_TRANSFER_KIND_HOLD || t.Kind == musterpb.TransferKind_TRANSFER_KIND_VOID {
		amount = 0
	}
	return [2]Leg{{t.Debit, -amount}, {t.Credit, amount}}
}
