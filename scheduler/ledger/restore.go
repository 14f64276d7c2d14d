package ledger

import (
	"fmt"
	"iter"
	"maps"
	"slices"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// Records are what a snapshot holds of the book: its accounts by name, the open
// holds that are sealed by ID, then the transfers that are not, in order.
func (l *Ledger) Records() (accounts iter.Seq[*musterpb.LedgerAccount], transfers iter.Seq[*musterpb.Transfer]) {
	accounts = func(yield func(*musterpb.LedgerAccount) bool) {
		for _, name := range l.Accounts() {
			a := l.accounts.Get(name)
			if !yield(&musterpb.LedgerAccount{
				Name: name, BalanceMicroUsd: int64(a.Balance), HeldMicroUsd: int64(a.Held), ExpectedMicroUsd: int64(a.Expected),
				DepositedMicroUsd: int64(a.Deposited), EarnedMicroUsd: int64(a.Earned), SpentMicroUsd: int64(a.Spent),
			}) {
				return
			}
		}
	}
	transfers = func(yield func(*musterpb.Transfer) bool) {
		var holds []uint64
		for id := range l.open.Keys() {
			if id <= l.sealed {
				holds = append(holds, id)
			}
		}
		slices.Sort(holds)
		for _, id := range holds {
			if !yield(l.open.Get(id)) {
				return
			}
		}
		for _, t := range l.tail {
			if !yield(t) {
				return
			}
		}
	}
	return accounts, transfers
}

// Restoring is a book that is read back from its records.
type Restoring struct {
	ledger Ledger
	newest uint64 // of the sealed holds so far
}

// Restore begins to read back a book whose transfers up to sealed are kept
// elsewhere.
func Restore(sealed uint64) *Restoring {
	r := &Restoring{ledger: *New()}
	r.ledger.sealed = sealed
	return r
}

// Account takes an account.
func (r *Restoring) Account(a *musterpb.LedgerAccount) error {
	fresh := Account{
		Balance: api.MicroUSD(a.BalanceMicroUsd), Held: api.MicroUSD(a.HeldMicroUsd), Expected: api.MicroUSD(a.ExpectedMicroUsd),
		Deposited: api.MicroUSD(a.DepositedMicroUsd), Earned: api.MicroUSD(a.EarnedMicroUsd), Spent: api.MicroUSD(a.SpentMicroUsd),
	}
	if _, twice := r.ledger.accounts.Find(a.Name); twice || a.Name == "" || fresh == (Account{}) {
		return fmt.Errorf("ledger: account %q is there twice, or empty", a.Name)
	}
	r.ledger.accounts.Set(a.Name, fresh)
	return nil
}

// Transfer takes a transfer: first those holds that are open and sealed, then
// all that are not sealed.
func (r *Restoring) Transfer(t *musterpb.Transfer) error {
	l := &r.ledger
	hold := t.Kind == musterpb.TransferKind_TRANSFER_KIND_HOLD
	if t.AmountMicroUsd < 0 || api.MicroUSD(t.AmountMicroUsd) > maxMoney || t.Debit == t.Credit || t.Debit == "" || t.Credit == "" {
		return fmt.Errorf("ledger: transfer %d moves %s from %q to %q", t.Id, api.MicroUSD(t.AmountMicroUsd), t.Debit, t.Credit)
	}
	if t.Id <= l.sealed {
		if !hold || t.Id <= r.newest || len(l.tail) > 0 {
			return fmt.Errorf("ledger: transfer %d is out of order, or sealed and no hold", t.Id)
		}
		r.newest = t.Id
		l.open.Set(t.Id, t)
		return nil
	}
	if want := l.Last() + 1; t.Id != want {
		return fmt.Errorf("ledger: transfer %d where %d is next", t.Id, want)
	}
	switch t.Kind {
	case musterpb.TransferKind_TRANSFER_KIND_MOVE:
	case musterpb.TransferKind_TRANSFER_KIND_HOLD:
		l.open.Set(t.Id, t)
	case musterpb.TransferKind_TRANSFER_KIND_POST, musterpb.TransferKind_TRANSFER_KIND_VOID:
		if err := r.end(t); err != nil {
			return err
		}
	default:
		return fmt.Errorf("ledger: transfer %d has kind %v", t.Id, t.Kind)
	}
	l.tail = append(l.tail, t)
	return nil
}

// end takes the end of a hold. A hold that was sealed and has ended since is not
// in the records any more.
func (r *Restoring) end(t *musterpb.Transfer) error {
	h := r.ledger.open.Get(t.Pending)
	if sealed := t.Pending <= r.ledger.sealed; sealed && h == nil {
		return nil
	} else if sealed || h == nil || t.AmountMicroUsd > h.AmountMicroUsd || t.Debit != h.Debit || t.Credit != h.Credit {
		return fmt.Errorf("ledger: transfer %d does not fit hold %d", t.Id, t.Pending)
	}
	r.ledger.open.Delete(t.Pending)
	return nil
}

// Finish is the book, once it was found to be balanced: the accounts sum to
// zero, and what they hold and expect is what the open holds say.
func (r *Restoring) Finish() (*Ledger, error) {
	l := &r.ledger
	reserved := map[string]Account{}
	add := func(name string, held, expected int64) error {
		a := reserved[name]
		a.Held += api.MicroUSD(held)
		a.Expected += api.MicroUSD(expected)
		if reserved[name] = a; max(a.Held, a.Expected) > maxMoney {
			return fmt.Errorf("ledger: account %s holds or expects more than %s", name, maxMoney)
		}
		return nil
	}
	for h := range l.open.Values() {
		if err := add(h.Debit, h.AmountMicroUsd, 0); err != nil {
			return nil, err
		}
		if err := add(h.Credit, 0, h.AmountMicroUsd); err != nil {
			return nil, err
		}
	}
	var inside api.MicroUSD
	for name, a := range l.accounts.All() {
		if want := reserved[name]; a.Held != want.Held || a.Expected != want.Expected {
			return nil, fmt.Errorf("ledger: account %s holds %s and expects %s, the open holds say %s and %s", name, a.Held, a.Expected, want.Held, want.Expected)
		}
		delete(reserved, name)
		if name == External {
			continue
		}
		if a.Balance < 0 || a.Available() < 0 || min(a.Deposited, a.Earned, a.Spent) < 0 || a.Balance > maxMoney-inside {
			return nil, fmt.Errorf("ledger: account %s has impossible money: %+v", name, a)
		}
		inside += a.Balance
	}
	for _, name := range slices.Sorted(maps.Keys(reserved)) {
		return nil, fmt.Errorf("ledger: account %s has open holds and is missing", name)
	}
	if outside := l.accounts.Get(External).Balance; outside != -inside {
		return nil, fmt.Errorf("ledger: %s is inside and %s outside: the book is not balanced", inside, outside)
	}
	return l, nil
}
