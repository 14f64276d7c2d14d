// Package archive keeps finished work in immutable segments: compressed files
// in the blob store that hold jobs with all that belongs to them, transfers and
// batches. A Writer makes a segment, Merge makes one of several neighbours, and
// an Archive answers from those that the replicated state names.
//
// DESIGN.md describes the file and says why it is as it is.
package archive

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/musterpb"
)

// Source is the state that says which segments there are.
type Source interface {
	// Segments are the segments as they follow each other: a segment's transfers
	// and batches come after those of the one before. What a job was in the state
	// before it is in a segment, and never in neither.
	Segments() []*musterpb.Segment
}

// Bounds of one page of a job's attempts. The task whose attempts reach one of
// them is the page's last.
const (
	PageAttempts = 5000
	PageBytes    = 4 << 20
)

// DefaultCache is enough for the footers and the job tables of a hundred
// segments, and the frames in use.
const DefaultCache = 64 << 20

// searchers is how many segments are asked for a job at once: that matters
// where the blob store is far away.
const searchers = 8

// Archive answers from sealed segments. All methods are safe for concurrent
// use. Their errors have the kind api.NotFound for a job that no segment has; an
// *Unreadable has the kind api.Unavailable where the blob store can't be reached
// or lacks the segment, and api.Internal for one that is damaged.
type Archive struct {
	store  blob.Store
	source Source
	cache  *cache
}

// New makes an archive that keeps at most cacheBytes of what it read.
func New(store blob.Store, source Source, cacheBytes int64) *Archive {
	return &Archive{store: store, source: source, cache: newCache(cacheBytes)}
}

// maxRereads is how often a call starts again because segments were merged,
// and the old ones deleted, while it read.
const maxRereads = 5

// each calls f with the segments, and again when one is missing that has been
// merged since.
func (a *Archive) each(ctx context.Context, f func([]*musterpb.Segment) error) error {
	for reread := 0; ; reread++ {
		segments := a.source.Segments()
		err := f(segments)
		if !errors.Is(err, errMissing) || reread == maxRereads || ctx.Err() != nil || slices.EqualFunc(segments, a.source.Segments(), same) {
			return err
		}
	}
}

func same(a, b *musterpb.Segment) bool { return a.Digest == b.Digest }

// in reads one segment.
func (a *Archive) in(ctx context.Context, seg *musterpb.Segment, f func(*segment) error) error {
	s := &segment{ctx: ctx, store: a.store, cache: a.cache, digest: seg.Digest, size: seg.Bytes}
	defer s.close()
	return s.fail(f(s))
}

// errFound ends a search.
var errFound = errors.New("found")

// find looks a job up and calls f with it and its segment. The newest segments
// are asked first.
func (a *Archive) find(ctx context.Context, id string, f func(*segment, *found) error) error {
	return a.each(ctx, func(segments []*musterpb.Segment) error {
		var mu sync.Mutex // guards hit and failed
		var hit *musterpb.Segment
		var failed error
		g, searching := errgroup.WithContext(ctx)
		g.SetLimit(searchers)
		for _, seg := range slices.Backward(segments) {
			if searching.Err() != nil {
				break
			}
			g.Go(func() error {
				has := false
				err := a.in(searching, seg, func(s *segment) error {
					job, err := s.job(id)
					has = job != nil
					return err
				})
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err != nil && searching.Err() == nil:
					failed = err // another may have the job all the same
				case has:
					hit = seg
					return errFound
				}
				return nil
			})
		}
		_ = g.Wait() // errFound, or nil
		switch {
		case hit != nil:
			return a.in(ctx, hit, func(s *segment) error {
				job, err := s.job(id) // from the cache
				if err != nil || job == nil {
					return cmp.Or(err, errorf("job %s was there a moment ago", id))
				}
				return f(s, job)
			})
		case ctx.Err() != nil:
			return api.Errorf(api.Unavailable, "looking for job %s: %w", id, ctx.Err())
		case failed != nil:
			return failed
		}
		return api.Errorf(api.NotFound, "job %q is not known", id)
	})
}

// Job is a sealed job.
func (a *Archive) Job(ctx context.Context, id string) (job *musterpb.Job, err error) {
	err = a.find(ctx, id, func(_ *segment, found *found) error {
		job = found.Job
		return nil
	})
	return job, err
}

// Jobs lists sealed jobs of an account, or all with an empty name, newest
// first, that were submitted before the one with the given sequence; at most
// limit of them.
func (a *Archive) Jobs(ctx context.Context, account string, before uint64, limit int) (list []*musterpb.Job, err error) {
	err = a.each(ctx, func(segments []*musterpb.Segment) error {
		list = nil
		ranges, err := a.sequences(ctx, segments)
		if err != nil {
			return err
		}
		for _, r := range ranges { // the newest submissions first
			if r.first >= before {
				continue
			}
			if len(list) == limit && (limit == 0 || list[limit-1].Sequence > r.last) {
				break
			}
			err := a.in(ctx, r.segment, func(s *segment) error {
				page, err := s.jobs(account, before, limit)
				list = append(list, page...)
				return err
			})
			if err != nil {
				return err
			}
			slices.SortFunc(list, func(a, b *musterpb.Job) int { return cmp.Compare(b.Sequence, a.Sequence) })
			list = list[:min(limit, len(list))]
		}
		return nil
	})
	return list, err
}

type sequenceRange struct {
	segment     *musterpb.Segment
	first, last uint64
}

// sequences are the segments that have jobs, by their newest submission.
func (a *Archive) sequences(ctx context.Context, segments []*musterpb.Segment) (list []sequenceRange, err error) {
	for _, seg := range segments {
		if seg.Jobs == 0 {
			continue
		}
		err := a.in(ctx, seg, func(s *segment) error {
			f, err := s.footer()
			if err == nil {
				list = append(list, sequenceRange{seg, f.FirstSequence, f.LastSequence})
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	slices.SortFunc(list, func(a, b sequenceRange) int { return cmp.Compare(b.last, a.last) })
	return list, nil
}

// Attempts lists the attempts and checks of a sealed job's tasks from a number
// on, task by task, as far as a page goes. Next is the first task of the next
// page, 0 when that was all.
func (a *Archive) Attempts(ctx context.Context, id string, from uint32) (list []*musterpb.Attempt, checks []*musterpb.Check, next uint32, err error) {
	err = a.find(ctx, id, func(s *segment, job *found) error {
		list, next = nil, 0
		bytes := 0
		err := s.attempts(job, from, func(attempt *musterpb.Attempt) bool {
			if (len(list) >= PageAttempts || bytes >= PageBytes) && attempt.Task != list[len(list)-1].Task {
				next = attempt.Task
				return false
			}
			bytes += attempt.SizeVT()
			list = append(list, attempt)
			return true
		})
		if err != nil {
			return err
		}
		checks, err = s.checks(job, from, next)
		return err
	})
	return list, checks, next, err
}

// Results lists up to limit tasks of a sealed job from a number on, each with
// the attempt that is its result, nil for a task that has none.
func (a *Archive) Results(ctx context.Context, id string, from uint32, limit int) (tasks []*musterpb.Task, results []*musterpb.Attempt, err error) {
	err = a.find(ctx, id, func(s *segment, job *found) (err error) {
		if tasks, err = s.tasks(job, from, limit); err != nil {
			return err
		}
		results = make([]*musterpb.Attempt, len(tasks))
		i := 0 // the task that comes next
		err = s.attempts(job, from, func(attempt *musterpb.Attempt) bool {
			for i < len(tasks) && tasks[i].Number < attempt.Task {
				i++
			}
			if i < len(tasks) && tasks[i].Number == attempt.Task && tasks[i].Result == attempt.Id {
				results[i] = attempt
			}
			return i < len(tasks)
		})
		if err != nil {
			return err
		}
		for i, task := range tasks {
			if task.Result != "" && results[i] == nil {
				return errorf("attempt %s, the result of task %d of job %s, is not in it", task.Result, task.Number, id)
			}
		}
		return nil
	})
	return tasks, results, err
}

// Transfers lists sealed transfers after an ID, of one account and its jobs or,
// with an empty name, of all; at most limit of them. Through is the newest
// transfer that is sealed: fewer than limit means that the list has all up to
// there.
func (a *Archive) Transfers(ctx context.Context, account string, after uint64, limit int) (list []*musterpb.Transfer, through uint64, err error) {
	err = a.each(ctx, func(segments []*musterpb.Segment) error {
		list, through = nil, 0
		for _, seg := range segments {
			through = max(through, seg.LastTransfer)
			if seg.LastTransfer <= after || len(list) >= limit {
				continue
			}
			err := a.in(ctx, seg, func(s *segment) error {
				page, err := s.transfers(account, after, limit-len(list))
				list = append(list, page...)
				return err
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	return list, through, err
}

// Batches lists sealed batches after an epoch, at most limit of them. Through
// is the newest batch that is sealed.
func (a *Archive) Batches(ctx context.Context, after uint64, limit int) (list []*musterpb.Batch, through uint64, err error) {
	err = a.each(ctx, func(segments []*musterpb.Segment) error {
		list, through = nil, 0
		for _, seg := range segments {
			through = max(through, seg.LastEpoch)
			if seg.LastEpoch <= after || len(list) >= limit {
				continue
			}
			err := a.in(ctx, seg, func(s *segment) error {
				page, err := s.batches(after, limit-len(list))
				list = append(list, page...)
				return err
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	return list, through, err
}
