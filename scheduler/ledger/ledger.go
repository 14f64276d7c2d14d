// Package ledger is muster's double-entry book: integer micro-USD, moved
// between accounts at once (Move) or in two phases (Hold, then Post or Void).
//
// It is pure: no clock, no I/O, no randomness. Every method checks first and
// writes last, so a refused transfer changes nothing. The book keeps balances,
// the holds that are open, and the newest transfers; older ones are sealed
// elsewhere (see Seal), so that it does not grow with history.
package ledger

import (
	"slices"
	"strings"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/table"
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

// JobOf is the job whose budget an account holds, if it is one of those.
func JobOf(name string) (job string, ok bool) { return strings.CutPrefix(name, "job:") }

// Account is the money of one ledger account.
type Account struct {
	// Balance is what is there, held money included.
	Balance api.MicroUSD
	// Held is the part of Balance that is reserved and can't be spent.
	Held api.MicroUSD
	// Expected is the most that open holds may still bring.
	Expected api.MicroUSD
	// Deposited is all that ever came from outside, Earned all that posts and the
	// network brought, and Spent all that was reported to Spend.
	Deposited, Earned, Spent api.MicroUSD
}

// Available is what can be spent or held.
func (a Account) Available() api.MicroUSD { return a.Balance - a.Held }

// Ledger is the book. It is not safe for concurrent use.
type Ledger struct {
	accounts *table.Map[string, Account]            // none of zeros
	open     *table.Map[uint64, *musterpb.Transfer] // holds, sealed or not
	tail     []*musterpb.Transfer                   // from sealed+1 on, in order, never changed once there
	sealed   uint64
}

// New is an empty book.
func New() *Ledger {
	return &Ledger{
		accounts: table.New[string, Account](table.HashString), open: table.New[uint64, *musterpb.Transfer](table.HashUint64),
	}
}

// Copy is the same book, which may be read while this one goes on.
func (l *Ledger) Copy() *Ledger {
	return &Ledger{accounts: l.accounts.Copy(), open: l.open.Copy(), tail: l.tail[:len(l.tail):len(l.tail)], sealed: l.sealed}
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
func (l *Ledger) Account(name string) Account { return l.accounts.Get(name) }

// Accounts lists the names of all accounts that are not zero, sorted.
func (l *Ledger) Accounts() []string { return slices.Sorted(l.accounts.Keys()) }

// Sum is the sum of all balances: zero, or the book is broken.
func (l *Ledger) Sum() api.MicroUSD {
	var sum api.MicroUSD
	for a := range l.accounts.Values() {
		sum += a.Balance
	}
	return sum
}

// Move moves money at once.
func (l *Ledger) Move(e Entry) error {
	if err := l.check(e); err != nil {
		return err
	}
	l.move(transferOf(e, musterpb.TransferKind_TRANSFER_KIND_MOVE))
	return nil
}

// Payment is one of several deposits.
type Payment struct {
	Account string
	Amount  api.MicroUSD
	Memo    string
}

// Deposit takes money from outside, all payments or none of them.
func (l *Ledger) Deposit(timeUnixMS int64, ref string, payments []Payment) error {
	var total api.MicroUSD
	for _, p := range payments {
		if err := l.check(Entry{Debit: External, Credit: p.Account, Amount: p.Amount}); err != nil {
			return err
		}
		if p.Amount > maxMoney-total {
			return api.Errorf(api.Exhausted, "deposits of more than %s: the ledger holds at most that", maxMoney)
		}
		total += p.Amount
	}
	if err := l.hasRoomFor(total); err != nil {
		return err
	}
	block := make([]musterpb.Transfer, len(payments)) // they are sealed together, too
	for i, p := range payments {
		t := &block[i]
		t.TimeUnixMs, t.Kind, t.Debit, t.Credit = timeUnixMS, musterpb.TransferKind_TRANSFER_KIND_MOVE, External, p.Account
		t.AmountMicroUsd, t.Ref, t.Memo = int64(p.Amount), ref, p.Memo
		l.append(t)
		to := l.accounts.Get(p.Account)
		to.Balance += p.Amount
		to.Deposited += p.Amount
		l.accounts.Set(p.Account, to)
	}
	outside := l.accounts.Get(External)
	outside.Balance -= total
	l.set(External, outside)
	return nil
}

// Hold reserves money of the debit account for the credit account, and
// returns the ID that Post or Void ends it with.
func (l *Ledger) Hold(e Entry) (uint64, error) {
	if err := l.check(e); err != nil {
		return 0, err
	}
	t := transferOf(e, musterpb.TransferKind_TRANSFER_KIND_HOLD)
	l.append(t)
	l.open.Set(t.Id, t)
	l.reserve(t, e.Amount)
	return t.Id, nil
}

// reserve changes what is held and expected for a hold.
func (l *Ledger) reserve(hold *musterpb.Transfer, amount api.MicroUSD) {
	from, to := l.accounts.Get(hold.Debit), l.accounts.Get(hold.Credit)
	from.Held += amount
	to.Expected += amount
	l.set(hold.Debit, from)
	l.set(hold.Credit, to)
}

// Post ends a hold: amount leaves the debit account, of which fee goes to
// Network and the rest to the hold's credit account; what the hold had
// reserved beyond amount is free again. The network takes no fee from itself.
func (l *Ledger) Post(hold uint64, timeUnixMS int64, amount, fee api.MicroUSD, memo string) error {
	h, err := l.hold(hold)
	if err != nil {
		return err
	}
	held := api.MicroUSD(h.AmountMicroUsd)
	if amount < 0 || amount > held {
		return api.Errorf(api.Conflict, "posting %s of hold %d: it reserved %s", amount, hold, held)
	}
	if fee < 0 || fee > amount {
		return api.Errorf(api.Conflict, "posting hold %d: fee %s of %s", hold, fee, amount)
	}
	if h.Debit == Network {
		fee = 0
	}
	earned := amount - fee
	both := &[2]musterpb.Transfer{} // one allocation; they are sealed together, nearly always
	post := &both[0]
	post.TimeUnixMs, post.Kind, post.Debit, post.Credit = timeUnixMS, musterpb.TransferKind_TRANSFER_KIND_POST, h.Debit, h.Credit
	post.AmountMicroUsd, post.Ref, post.Memo, post.Pending = int64(earned), h.Ref, memo, hold
	l.append(post)
	l.open.Delete(hold)
	from, to := l.accounts.Get(h.Debit), l.accounts.Get(h.Credit)
	from.Held -= held
	from.Balance -= earned
	to.Expected -= held
	to.Balance += earned
	to.Earned += earned
	l.set(h.Debit, from)
	l.set(h.Credit, to)
	if fee == 0 {
		return nil
	}
	move := &both[1]
	move.TimeUnixMs, move.Kind, move.Debit, move.Credit = timeUnixMS, musterpb.TransferKind_TRANSFER_KIND_MOVE, h.Debit, Network
	move.AmountMicroUsd, move.Ref, move.Memo = int64(fee), h.Ref, "network fee"
	l.move(move)
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
	l.open.Delete(hold)
	l.reserve(h, -api.MicroUSD(h.AmountMicroUsd))
	return nil
}

// Spend counts what an account's jobs have paid, out of their own accounts. It
// moves nothing.
func (l *Ledger) Spend(account string, amount api.MicroUSD) {
	a := l.accounts.Get(account)
	a.Spent += amount
	l.set(account, a)
}

// Open reports whether a hold has been neither posted nor voided.
func (l *Ledger) Open(hold uint64) bool { return l.open.Get(hold) != nil }

// OpenHold is a hold that is open, nil for another ID; OpenHolds counts them.
func (l *Ledger) OpenHold(id uint64) *musterpb.Transfer { return l.open.Get(id) }

// OpenHolds is described at OpenHold.
func (l *Ledger) OpenHolds() int { return l.open.Len() }

// Last is the ID of the newest transfer, and Sealed that of the newest that is
// sealed; 0 is none.
func (l *Ledger) Last() uint64 { return l.sealed + uint64(len(l.tail)) }

// Sealed is described at Last.
func (l *Ledger) Sealed() uint64 { return l.sealed }

// Tail lists the transfers after an ID that are not sealed. The values must not
// be changed; the list stays as it is while the book goes on.
func (l *Ledger) Tail(after uint64) []*musterpb.Transfer {
	from := min(max(after, l.sealed)-l.sealed, uint64(len(l.tail)))
	return l.tail[from:len(l.tail):len(l.tail)]
}

// Seal forgets the transfers up to an ID: they are kept elsewhere. Holds among
// them that are open stay so.
func (l *Ledger) Seal(through uint64) error {
	if through < l.sealed || through > l.Last() {
		return api.Errorf(api.Conflict, "sealing transfers up to %d: %d are sealed, the newest is %d", through, l.sealed, l.Last())
	}
	l.tail = slices.Clone(l.tail[through-l.sealed:]) // a part of the old list would keep all of it
	l.sealed = through
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
	case e.Amount > maxMoney:
		return api.Errorf(api.Exhausted, "amount %s: the ledger holds at most %s", e.Amount, maxMoney)
	case e.Debit == External:
		return l.hasRoomFor(e.Amount)
	}
	if have := l.accounts.Get(e.Debit).Available(); have < e.Amount {
		return api.Errorf(api.Exhausted, "%s has %s available, %s is needed", e.Debit, have, e.Amount)
	}
	return nil
}

// maxMoney is all the money that can be inside, so that no sum overflows.
const maxMoney api.MicroUSD = 1 << 61

// hasRoomFor reports whether so much more money can come in.
func (l *Ledger) hasRoomFor(amount api.MicroUSD) error {
	if inside := -l.accounts.Get(External).Balance; amount > maxMoney-inside {
		return api.Errorf(api.Exhausted, "%s more: the ledger holds %s, and at most %s", amount, inside, maxMoney)
	}
	return nil
}

func (l *Ledger) hold(id uint64) (*musterpb.Transfer, error) {
	if h := l.open.Get(id); h != nil {
		return h, nil
	}
	return nil, api.Errorf(api.Conflict, "hold %d is not open", id)
}

// move appends a transfer that moves money at once, and moves it.
func (l *Ledger) move(t *musterpb.Transfer) {
	l.append(t)
	amount := api.MicroUSD(t.AmountMicroUsd)
	from, to := l.accounts.Get(t.Debit), l.accounts.Get(t.Credit)
	from.Balance -= amount
	to.Balance += amount
	switch t.Debit {
	case External:
		to.Deposited += amount
	case Network:
		to.Earned += amount
	}
	l.set(t.Debit, from)
	l.set(t.Credit, to)
}

// append numbers a transfer.
func (l *Ledger) append(t *musterpb.Transfer) {
	t.Id = l.Last() + 1
	l.tail = append(l.tail, t)
}

// set stores an account. One of zeros is as one that was never used, so that
// the accounts of jobs that are settled go.
func (l *Ledger) set(name string, a Account) {
	if a == (Account{}) {
		l.accounts.Delete(name)
	} else {
		l.accounts.Set(name, a)
	}
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
