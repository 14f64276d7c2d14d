// Package state is what the schedulers replicate: accounts, workers, jobs,
// attempts, checks, batches and the ledger, and the one function that changes
// them, Apply.
//
// Apply is deterministic. It reads no clock, draws no randomness, does no I/O
// and never lets the order of a map decide: what is timed or random is in the
// command. Values are replaced and never changed once anybody could have seen
// them, so that readers may keep what they were given and a snapshot is a copy
// of tables.
package state

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
	"github.com/musternet/muster/scheduler/table"
)

// FeePPM is the network's share of every payment.
const FeePPM = 50_000

// How long answers to client-chosen command IDs are remembered: the newest
// always, and all for several times as long as a client goes on repeating a
// command that was not answered, as far as memory is given for it. A later repeat
// is a new command.
const (
	leastAnswered = 1 << 16
	maxAnswered   = 1 << 20
	answeredForMS = 60_000
)

// State is the replicated state of one scheduler. All methods are safe for
// concurrent use; Apply excludes everything else, reads run together.
type State struct {
	mu sync.RWMutex // guards every field below but watched
	data
	index   index
	journal journal
	entry   uint64  // counts log entries: a value that this one made may be changed by it again, since nobody saw it
	sweeps  []sweep // sealed jobs that are not all gone yet; the oldest first
	sweeper int     // how many of their tasks go with every entry

	changed chan struct{} // closed, and replaced, when commands were applied and somebody waits
	watched atomic.Bool   // somebody has the channel
}

// data is what a snapshot holds.
type data struct {
	cluster     string
	now         int64 // of the newest command; never goes back
	jobSequence uint64
	epoch       uint64   // of the newest batch
	sealedEpoch uint64   // batches up to this one are sealed
	openBatch   []string // attempts that were committed since
	accounts    *table.Map[string, *musterpb.Account]
	keys        *table.Map[string, *musterpb.Key] // by hash
	nodes       map[string]*musterpb.Node
	workers     *table.Map[string, *musterpb.Worker]
	jobs        *table.Map[string, *musterpb.Job]
	tasks       *table.Map[taskKey, *musterpb.Task] // those that were ever placed
	attempts    *table.Map[string, *musterpb.Attempt]
	checks      *table.Map[string, *musterpb.Check]
	batches     *table.Map[uint64, *musterpb.Batch]
	records     *table.Map[recordKey, *musterpb.Record]
	answered    *table.Map[string, *musterpb.Answered]
	answerOrder []string
	segments    []*musterpb.Segment
	ledger      *ledger.Ledger

	dropped *table.Map[string, struct{}] // sealed jobs of which something is left; nobody sees that
}

type taskKey struct {
	job    string
	number uint32
}

func (k taskKey) hash() uint64 { return table.HashUint64(table.HashString(k.job) + uint64(k.number)) }

type recordKey struct{ owner, class, application string }

func (k recordKey) hash() uint64 { return table.HashString(k.owner) + table.HashString(k.application) }

// New is the empty state.
func New() *State {
	s := &State{data: newData(), index: newIndex(), sweeper: sweepPerEntry, changed: make(chan struct{})}
	s.journal.forget()
	return s
}

func newData() data {
	return data{
		accounts: table.New[string, *musterpb.Account](table.HashString), keys: table.New[string, *musterpb.Key](table.HashString),
		nodes: map[string]*musterpb.Node{}, workers: table.New[string, *musterpb.Worker](table.HashString),
		jobs: table.New[string, *musterpb.Job](table.HashString), tasks: table.New[taskKey, *musterpb.Task](taskKey.hash),
		attempts: table.New[string, *musterpb.Attempt](table.HashString), checks: table.New[string, *musterpb.Check](table.HashString),
		batches: table.New[uint64, *musterpb.Batch](table.HashUint64), records: table.New[recordKey, *musterpb.Record](recordKey.hash),
		answered: table.New[string, *musterpb.Answered](table.HashString), ledger: ledger.New(),
		dropped: table.New[string, struct{}](table.HashString),
	}
}

// copy is the same data, which may be read while this one goes on.
func (d *data) copy() data {
	c := *d
	c.openBatch, c.answerOrder, c.segments = slices.Clip(d.openBatch), slices.Clip(d.answerOrder), slices.Clip(d.segments)
	c.accounts, c.keys, c.nodes, c.workers = d.accounts.Copy(), d.keys.Copy(), maps.Clone(d.nodes), d.workers.Copy()
	c.jobs, c.tasks, c.attempts, c.checks = d.jobs.Copy(), d.tasks.Copy(), d.attempts.Copy(), d.checks.Copy()
	c.batches, c.records, c.answered, c.ledger = d.batches.Copy(), d.records.Copy(), d.answered.Copy(), d.ledger.Copy()
	c.dropped = d.dropped.Copy()
	return c
}

// Apply carries out one command and answers it. A refused command changes
// nothing. It panics on a command that this version does not know, unless that
// is marked ignorable: a node that skipped it would silently diverge.
func (s *State) Apply(cmd *musterpb.Command) *musterpb.Answer {
	return s.ApplyAll([]*musterpb.Command{cmd})[0]
}

// ApplyAll carries out the commands of one log entry, in order, as Apply would
// one by one, and answers each. Readers see all of them or none.
func (s *State) ApplyAll(cmds []*musterpb.Command) []*musterpb.Answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.entry++
	answers, block := make([]*musterpb.Answer, len(cmds)), make([]musterpb.Answer, len(cmds))
	for i, cmd := range cmds {
		answers[i] = s.apply(cmd, &block[i])
	}
	s.sweep(s.sweeper)
	if s.watched.Load() {
		s.wake()
	}
	return answers
}

// wake tells everybody who waits for a change.
func (s *State) wake() {
	s.watched.Store(false)
	close(s.changed)
	s.changed = make(chan struct{})
}

// apply carries out one command and answers it in answer, or with the first
// answer to its ID.
func (s *State) apply(cmd *musterpb.Command, answer *musterpb.Answer) *musterpb.Answer {
	if cmd.Id != "" {
		if first := s.answered.Get(cmd.Id); first != nil {
			return first.Answer
		}
	}
	s.now = max(s.now, cmd.TimeUnixMs)
	id, err := s.dispatch(cmd)
	if err != nil {
		answer.ErrorKind, answer.Error = uint32(api.KindOf(err))+1, err.Error()
	} else {
		answer.Id = id
	}
	if cmd.Id != "" {
		// One of its own, or all answers to the entry would be remembered with it.
		s.remember(cmd.Id, &musterpb.Answer{Id: answer.Id, ErrorKind: answer.ErrorKind, Error: answer.Error})
	}
	return answer
}

func (s *State) dispatch(cmd *musterpb.Command) (id string, err error) {
	switch body := cmd.Body.(type) {
	case *musterpb.Command_CreateCluster:
		return s.createCluster(body.CreateCluster)
	case *musterpb.Command_CreateAccount:
		return s.createAccount(body.CreateAccount)
	case *musterpb.Command_CreateKey:
		return s.createKey(body.CreateKey)
	case *musterpb.Command_Deposit:
		return s.deposit(body.Deposit)
	case *musterpb.Command_Deposits:
		return s.deposits(body.Deposits)
	case *musterpb.Command_RegisterNode:
		return s.registerNode(body.RegisterNode)
	case *musterpb.Command_RegisterTip:
		return s.registerTip(body.RegisterTip)
	case *musterpb.Command_RegisterWorker:
		return s.registerWorker(body.RegisterWorker)
	case *musterpb.Command_DrainWorker:
		return s.drainWorker(body.DrainWorker)
	case *musterpb.Command_SubmitJob:
		return s.submitJob(body.SubmitJob)
	case *musterpb.Command_CancelJob:
		return s.cancelJob(body.CancelJob)
	case *musterpb.Command_FundJob:
		return s.fundJob(body.FundJob)
	case *musterpb.Command_PlaceAttempt:
		return s.placeAttempt(body.PlaceAttempt)
	case *musterpb.Command_StartAttempt:
		return s.startAttempt(body.StartAttempt)
	case *musterpb.Command_CommitResult:
		return s.commitResult(body.CommitResult)
	case *musterpb.Command_EndAttempt:
		return s.endAttempt(body.EndAttempt)
	case *musterpb.Command_CloseBatch:
		return s.closeBatch(body.CloseBatch)
	case *musterpb.Command_Reveal:
		return s.reveal(body.Reveal)
	case *musterpb.Command_FailBatchClosed:
		return s.failBatchClosed(body.FailBatchClosed)
	case *musterpb.Command_RecordComparisons:
		return s.recordComparisons(body.RecordComparisons)
	case *musterpb.Command_GiveUpCheck:
		return s.giveUpCheck(body.GiveUpCheck)
	case *musterpb.Command_Seal:
		return s.seal(body.Seal)
	case *musterpb.Command_MergeSegments:
		return s.mergeSegments(body.MergeSegments)
	}
	if cmd.Ignorable {
		return "", nil
	}
	panic("the log holds a command that this version of muster does not know: upgrade this scheduler before it can go on")
}

func (s *State) remember(id string, answer *musterpb.Answer) {
	s.answered.Set(id, &musterpb.Answered{Command: id, Answer: answer, TimeUnixMs: s.now})
	s.answerOrder = append(s.answerOrder, id)
	for n := len(s.answerOrder); n > leastAnswered; n-- {
		oldest := s.answered.Get(s.answerOrder[0])
		if n <= maxAnswered && s.now-oldest.TimeUnixMs <= answeredForMS {
			break
		}
		s.answered.Delete(oldest.Command)
		s.answerOrder = s.answerOrder[1:] // append moves it now and then, at a constant cost per command
	}
}

// ErrorOf is the error that an answer carries, nil for success.
func ErrorOf(a *musterpb.Answer) error {
	if a.GetErrorKind() == 0 {
		return nil
	}
	return &api.Error{Kind: api.Kind(a.ErrorKind - 1), Msg: a.Error}
}

// sortedKeys is for the few places where Apply walks a map.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// keysOf are the keys of a table, sorted.
func keysOf[V any](t *table.Map[string, V]) []string { return slices.Sorted(t.Keys()) }
