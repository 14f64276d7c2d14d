// Package state is what the schedulers replicate: accounts, workers, jobs,
// attempts, checks, batches and the ledger, and the one function that changes
// them, Apply.
//
// Apply is deterministic. It reads no clock, draws no randomness, does no I/O
// and never lets the order of a map decide: what is timed or random is in the
// command. Values are replaced and never changed once they are in a map, so
// that readers may keep what they were given and a snapshot is a copy of maps.
package state

import (
	"maps"
	"slices"
	"sync"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
)

// FeePPM is the network's share of every payment.
const FeePPM = 50_000

// maxAnswered bounds how many client-chosen command IDs are remembered; a
// repeat that comes later than that many commands is not recognised any more.
const maxAnswered = 1 << 16

// State is the replicated state of one scheduler. All methods are safe for
// concurrent use; Apply excludes everything else, reads run together.
type State struct {
	mu sync.RWMutex // guards every field below
	data

	changed chan struct{} // closed, and replaced, when a command was applied
}

// data is what a snapshot holds.
type data struct {
	cluster     string
	now         int64 // of the newest command; never goes back
	jobSequence uint64
	epoch       uint64   // of the newest batch
	openBatch   []string // attempts that were committed since
	accounts    map[string]*musterpb.Account
	keys        map[string]*musterpb.Key // by hash
	nodes       map[string]*musterpb.Node
	workers     map[string]*musterpb.Worker
	jobs        map[string]*musterpb.Job
	tasks       map[taskKey]*musterpb.Task // those that were ever placed
	attempts    map[string]*musterpb.Attempt
	checks      map[string]*musterpb.Check
	batches     map[uint64]*musterpb.Batch
	records     map[recordKey]*musterpb.Record
	answered    map[string]*musterpb.Answer
	answerOrder []string
	ledger      *ledger.Ledger

	// Derived from the above; rebuilt by Restore.
	liveJobs     map[string]struct{}            // not settled
	openChecks   map[string]struct{}            // without a verdict
	liveByWorker map[string]map[string]struct{} // attempts that may be running
	byJob        map[string][]string            // attempts of a job, in order
	due          map[string]int                 // by job: results to come, or there, whose check has no run yet
}

type taskKey struct {
	job    string
	number uint32
}

type recordKey struct{ owner, class, application string }

// New is the empty state.
func New() *State {
	return &State{data: newData(), changed: make(chan struct{})}
}

func newData() data {
	return data{
		accounts: map[string]*musterpb.Account{}, keys: map[string]*musterpb.Key{}, nodes: map[string]*musterpb.Node{},
		workers: map[string]*musterpb.Worker{}, jobs: map[string]*musterpb.Job{}, tasks: map[taskKey]*musterpb.Task{},
		attempts: map[string]*musterpb.Attempt{}, checks: map[string]*musterpb.Check{}, batches: map[uint64]*musterpb.Batch{},
		records: map[recordKey]*musterpb.Record{}, answered: map[string]*musterpb.Answer{}, ledger: ledger.New(),
		liveJobs: map[string]struct{}{}, openChecks: map[string]struct{}{}, liveByWorker: map[string]map[string]struct{}{},
		byJob: map[string][]string{}, due: map[string]int{},
	}
}

// Apply carries out one command and answers it. A refused command changes
// nothing. It panics on a command that this version does not know, unless that
// is marked ignorable: a node that skipped it would silently diverge.
func (s *State) Apply(cmd *musterpb.Command) *musterpb.Answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	if cmd.Id != "" {
		if first, ok := s.answered[cmd.Id]; ok {
			return first
		}
	}
	s.now = max(s.now, cmd.TimeUnixMs)
	id, err := s.dispatch(cmd)
	answer := &musterpb.Answer{Id: id}
	if err != nil {
		answer = &musterpb.Answer{ErrorKind: uint32(api.KindOf(err)) + 1, Error: err.Error()}
	}
	if cmd.Id != "" {
		s.remember(cmd.Id, answer)
	}
	close(s.changed)
	s.changed = make(chan struct{})
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
	}
	if cmd.Ignorable {
		return "", nil
	}
	panic("the log holds a command that this version of muster does not know: upgrade this scheduler before it can go on")
}

func (s *State) remember(id string, answer *musterpb.Answer) {
	s.answered[id] = answer
	s.answerOrder = append(s.answerOrder, id)
	if len(s.answerOrder) > maxAnswered {
		delete(s.answered, s.answerOrder[0])
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
