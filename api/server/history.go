package server

import (
	"cmp"
	"context"
	"math"
	"slices"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/archive"
)

// History is the finished work that has left the state. What belongs to a job
// leaves it in one step: whoever finds a job in the state, reads what belongs to
// it and finds the job there again has read all of it; everybody else asks the
// history, which never changes.
type History interface {
	// Job is a sealed job, or an error of kind api.NotFound.
	Job(ctx context.Context, id string) (*musterpb.Job, error)
	// Jobs lists jobs of an account, or all with an empty name, newest first, that
	// were submitted before the one with a sequence.
	Jobs(ctx context.Context, account string, before uint64, limit int) ([]*musterpb.Job, error)
	// Attempts lists a page of a job's attempts and checks, from a task on.
	Attempts(ctx context.Context, job string, from uint32) (attempts []*musterpb.Attempt, checks []*musterpb.Check, next uint32, err error)
	// Results lists tasks of a job from a number on, each with its result.
	Results(ctx context.Context, job string, from uint32, limit int) ([]*musterpb.Task, []*musterpb.Attempt, error)
	// Transfers lists transfers after an ID; through is the newest that is sealed.
	Transfers(ctx context.Context, account string, after uint64, limit int) (list []*musterpb.Transfer, through uint64, err error)
}

var _ History = (*archive.Archive)(nil)

// noHistory is that of a cluster that seals nothing.
type noHistory struct{}

func (noHistory) Job(_ context.Context, id string) (*musterpb.Job, error) {
	return nil, api.Errorf(api.NotFound, "job %q is not known", id)
}

func (noHistory) Jobs(context.Context, string, uint64, int) ([]*musterpb.Job, error) { return nil, nil }

func (noHistory) Attempts(context.Context, string, uint32) ([]*musterpb.Attempt, []*musterpb.Check, uint32, error) {
	return nil, nil, 0, nil
}

func (noHistory) Results(context.Context, string, uint32, int) ([]*musterpb.Task, []*musterpb.Attempt, error) {
	return nil, nil, nil
}

func (noHistory) Transfers(context.Context, string, uint64, int) ([]*musterpb.Transfer, uint64, error) {
	return nil, 0, nil
}

// detail is a page of a job's attempts and checks.
func (s *Server) detail(ctx context.Context, job *musterpb.Job, from uint32) (attempts []*musterpb.Attempt, checks []*musterpb.Check, next uint32, err error) {
	attempts, checks, next = s.liveDetail(job, from)
	if s.State.Job(job.Id) == nil {
		attempts, checks, next, err = s.History.Attempts(ctx, job.Id, from)
	}
	client.InOrder(attempts, checks)
	return attempts, checks, next, err
}

// liveDetail cuts pages like the archive does, so that a job's pages stay the
// same when it is sealed between two of them.
func (s *Server) liveDetail(job *musterpb.Job, from uint32) (attempts []*musterpb.Attempt, checks []*musterpb.Check, next uint32) {
	bytes := 0
	for n := from; n < job.NextTask; n++ {
		if len(attempts) >= archive.PageAttempts || bytes >= archive.PageBytes {
			return attempts, checks, n
		}
		a, c := s.State.Detail(job.Id, n)
		for _, attempt := range a {
			bytes += attempt.SizeVT()
		}
		attempts, checks = append(attempts, a...), append(checks, c...)
	}
	return attempts, checks, 0
}

// jobs lists jobs, newest first: those in the state and those that were sealed.
// The state is asked first, so that what is sealed meanwhile is there twice and
// not missing.
func (s *Server) jobs(ctx context.Context, account string, before uint64, limit int) ([]*musterpb.Job, error) {
	var list []*musterpb.Job
	if before == 0 {
		before = math.MaxUint64
		list = slices.Clone(s.State.Jobs(account, limit))
	} else {
		list = slices.DeleteFunc(slices.Clone(s.State.Jobs(account, math.MaxInt)), func(j *musterpb.Job) bool { return j.Sequence >= before })
	}
	sealed, err := s.History.Jobs(ctx, account, before, limit)
	if err != nil {
		return nil, err
	}
	list = append(list, sealed...)
	slices.SortStableFunc(list, func(a, b *musterpb.Job) int { return cmp.Compare(b.Sequence, a.Sequence) })
	list = slices.CompactFunc(list, func(a, b *musterpb.Job) bool { return a.Sequence == b.Sequence })
	return list[:min(limit, len(list))], nil
}

// taskOf answers for the tasks of a job, asked for in order: the task, nil for
// one that was never placed, and its result, nil where it has none.
type taskOf func(number uint32) (*musterpb.Task, *musterpb.Attempt, error)

func (s *Server) liveTasks(job *musterpb.Job) taskOf {
	return func(number uint32) (*musterpb.Task, *musterpb.Attempt, error) {
		task := s.State.Task(job.Id, number)
		return task, s.State.Attempt(task.GetResult()), nil
	}
}

func (s *Server) sealedTasks(ctx context.Context, job *musterpb.Job) taskOf {
	var tasks []*musterpb.Task
	var results []*musterpb.Attempt
	loaded := uint32(0) // tasks before it were loaded
	return func(number uint32) (*musterpb.Task, *musterpb.Attempt, error) {
		for len(tasks) > 0 && tasks[0].Number < number {
			tasks, results = tasks[1:], results[1:]
		}
		if len(tasks) == 0 && number >= loaded {
			var err error
			if tasks, results, err = s.History.Results(ctx, job.Id, number, maxResults); err != nil {
				return nil, nil, err
			}
			loaded = job.Tasks
			if len(tasks) == maxResults {
				loaded = tasks[maxResults-1].Number + 1
			}
		}
		if len(tasks) == 0 || tasks[0].Number != number {
			return nil, nil, nil
		}
		return tasks[0], results[0], nil
	}
}

// maxSeals is how many seals may come between the two halves of a page.
const maxSeals = 10

// transfers lists a page of transfers: what is sealed, and what follows it in
// the state.
func (s *Server) transfers(ctx context.Context, account string, after uint64) (list []*musterpb.Transfer, more bool, err error) {
	for range maxSeals {
		list, through, err := s.History.Transfers(ctx, account, after, maxTransfers+1)
		if err != nil {
			return nil, false, err
		}
		if len(list) > maxTransfers {
			return list[:maxTransfers], true, nil
		}
		rest, more := s.State.Transfers(account, max(after, through), maxTransfers-len(list))
		// If more was sealed since, the state may have left out what came right
		// after the sealed ones.
		_, now, err := s.History.Transfers(ctx, account, math.MaxUint64, 0)
		if err != nil {
			return nil, false, err
		}
		if now == through {
			return append(list, rest...), more, nil
		}
	}
	return nil, false, api.Errorf(api.Unavailable, "transfers are sealed faster than they can be listed; try again")
}
