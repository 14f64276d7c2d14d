package scheduler

import (
	"context"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/archive"
)

// What is finished stays in memory until one of these is reached. The oldest
// goes first.
const (
	// sealPressure is how many finished attempts and jobs may be there, however
	// young.
	sealPressure = 50_000
	// sealAttempts is about how many attempts go into one segment, or a single
	// job that has more.
	sealAttempts = 20_000
	// sealTransfers and sealBatches are how many may be there while no job ends.
	sealTransfers = 50_000
	sealBatches   = 4096
	// sealTransfersAfter is how long transfers of jobs that go on stay, in times of
	// Timing.SealAfter.
	sealTransfersAfter = 10
	// sealLeast is how long a job stays after it ended whatever else: somebody who
	// was about to use it is through with it by then.
	sealLeast = time.Second
)

// sealLoop seals what is finished and merges small segments into larger ones.
// While the blob store fails, everything stays in memory.
func (l *leader) sealLoop(ctx context.Context) {
	dir := filepath.Join(l.Dir, "sealing")
	_ = os.RemoveAll(dir) // what an earlier term left; making it again says what is wrong
	every := min(time.Second, l.Timing.SealAfter/2)
	done := make(chan struct{})
	go func() {
		defer close(done)
		since := map[string]time.Time{}
		l.sealRepeatedly(ctx, "merging sealed segments", every, func(ctx context.Context) (bool, error) { return l.mergeOnce(ctx, dir, since) })
	}()
	l.sealRepeatedly(ctx, "sealing finished work", every, func(ctx context.Context) (bool, error) { return l.sealOnce(ctx, dir) })
	<-done
}

// maxSealPause is the longest wait between two tries at a store that fails.
const maxSealPause = time.Minute

// sealRepeatedly calls f until the leadership ends: at once again while there is
// more to do, and less and less often while it fails.
func (l *leader) sealRepeatedly(ctx context.Context, what string, every time.Duration, f func(context.Context) (more bool, err error)) {
	pause := every
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		more, err := f(ctx)
		switch {
		case err != nil && ctx.Err() == nil:
			pause = min(2*max(pause, time.Second), maxSealPause)
			l.Logger.Warn(what+" failed; it stays as it is and is tried again", "in", pause, "err", err)
		case more:
			pause = 0
		default:
			pause = every
		}
		timer.Reset(pause)
	}
}

// sealOnce seals what is due into one segment. The segment is durable before
// anything leaves the state.
func (l *leader) sealOnce(ctx context.Context, dir string) (more bool, err error) {
	seal := l.dueForSealing()
	if seal == nil {
		return false, nil
	}
	began := time.Now()
	stored, segment, err := l.storeSegment(ctx, dir, func(w io.Writer) (*musterpb.Segment, error) { return l.writeSegment(ctx, seal, w) })
	if err != nil || !stored {
		return false, err
	}
	seal.Segment = segment
	if err := l.name(ctx, segment, &musterpb.Command{Body: &musterpb.Command_Seal{Seal: seal}}); err != nil {
		return false, err
	}
	l.Logger.Debug("finished work was sealed", "segment", segment.Digest, "bytes", segment.Bytes, "jobs", segment.Jobs,
		"through_transfer", seal.ThroughTransfer, "through_epoch", seal.ThroughEpoch, "in", time.Since(began).Round(time.Millisecond))
	return true, nil
}

// dueForSealing is the command for what should leave the state now, nil for
// nothing.
func (l *leader) dueForSealing() *musterpb.Seal {
	now := l.Replica.Now()
	found := l.State.Sealable(sealPressure)
	pressed := found.Attempts+uint64(len(found.Seal.Jobs)) >= sealPressure
	if found.Attempts > sealAttempts || len(found.Seal.Jobs) > sealAttempts {
		found = l.State.Sealable(sealAttempts)
	}
	seal := found.Seal
	if n := sealAttempts; len(seal.Jobs) > n {
		seal.Jobs = seal.Jobs[:n]
	}
	// By age, half as old is enough to go along: else there would be a segment for
	// every job.
	due := pressed || len(seal.Jobs) > 0 && l.endedFor(seal.Jobs[0], now) >= l.Timing.SealAfter
	least := l.Timing.SealAfter / 2
	if pressed {
		least = min(least, sealLeast)
	}
	busy := l.busyJobs()
	seal.Jobs = slices.DeleteFunc(seal.Jobs, func(id string) bool { return !due || busy[id] || l.endedFor(id, now) < least })
	if len(seal.Jobs) > 0 || found.Transfers >= sealTransfers || found.Batches >= sealBatches || l.transfersWaited(now) {
		return seal
	}
	return nil
}

// endedFor is how long ago a job ended.
func (l *leader) endedFor(job string, now int64) time.Duration {
	j := l.State.Job(job)
	if j == nil {
		return 0
	}
	return time.Duration(now-j.EndedUnixMs) * time.Millisecond
}

// transfersWaited reports whether the oldest transfer that is not sealed is old
// enough to be sealed although no job was.
func (l *leader) transfersWaited(now int64) bool {
	oldest, _ := l.State.Transfers("", 0, 1)
	return len(oldest) > 0 && time.Duration(now-oldest[0].TimeUnixMs)*time.Millisecond >= sealTransfersAfter*l.Timing.SealAfter
}

// busyJobs are jobs of which something is being examined. That may go on after
// they were settled, and reads the state.
func (l *leader) busyJobs() map[string]bool {
	l.mu.Lock()
	ids := slices.Collect(maps.Keys(l.busy))
	l.mu.Unlock()
	jobs := map[string]bool{}
	for _, id := range ids {
		if a := l.State.Attempt(id); a != nil {
			jobs[a.Job] = true
		} else if c := l.State.Check(id); c != nil {
			jobs[c.Job] = true
		}
	}
	return jobs
}

// writeSegment writes what a seal takes out of the state. It returns nil where
// another seal came first, and there is nothing to seal any more.
func (l *leader) writeSegment(ctx context.Context, seal *musterpb.Seal, out io.Writer) (*musterpb.Segment, error) {
	// A job does not leave before its transfers do, so its account is known.
	account := func(job string) string { return l.State.Job(job).GetAccount() }
	segment, err := archive.Write(ctx, out, l.State.SealContent(seal), account)
	if err != nil || segment.Jobs != uint64(len(seal.Jobs)) || segment.LastTransfer != seal.ThroughTransfer || segment.LastEpoch != seal.ThroughEpoch {
		return nil, err
	}
	return segment, nil
}

// storeSegment makes a durable blob of what write writes. Nothing is stored
// where that returns no segment.
func (l *leader) storeSegment(ctx context.Context, dir string, write func(io.Writer) (*musterpb.Segment, error)) (stored bool, _ *musterpb.Segment, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return false, nil, err
	}
	f, err := os.CreateTemp(dir, "segment-*")
	if err != nil {
		return false, nil, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	segment, err := write(f)
	if err != nil || segment == nil {
		return false, nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return false, nil, err
	}
	_, err = l.Blobs.Put(ctx, api.Digest(segment.Digest), f, blob.NoLimit)
	return err == nil, segment, err
}

// name proposes the command that makes the state name a segment. One that was
// refused is deleted again. Where it is not known what became of the command,
// the segment stays: the next leader may carry it out.
func (l *leader) name(ctx context.Context, segment *musterpb.Segment, cmd *musterpb.Command) error {
	_, err := l.Propose(ctx, cmd)
	named := slices.ContainsFunc(l.State.Segments(), func(s *musterpb.Segment) bool { return s.Digest == segment.Digest })
	if err != nil && api.KindOf(err) != api.Unavailable && !named {
		if err := l.Blobs.Delete(ctx, api.Digest(segment.Digest)); err != nil {
			l.Logger.Warn("a segment that nothing names could not be deleted", "segment", segment.Digest, "err", err)
		}
	}
	return err
}

// mergeOnce merges neighbours, if there are enough of them and every scheduler
// had the time to see them: each deletes for itself what was replaced, see
// dropReplaced. Since says when this one saw them first.
func (l *leader) mergeOnce(ctx context.Context, dir string, since map[string]time.Time) (more bool, err error) {
	began, segments := time.Now(), l.State.Segments()
	for _, s := range segments {
		if since[s.Digest].IsZero() {
			since[s.Digest] = began
		}
	}
	maps.DeleteFunc(since, func(digest string, _ time.Time) bool {
		return !slices.ContainsFunc(segments, func(s *musterpb.Segment) bool { return s.Digest == digest })
	})
	run := archive.Mergeable(segments)
	if run == nil || slices.ContainsFunc(run, func(s *musterpb.Segment) bool { return began.Sub(since[s.Digest]) < 10*l.dropEvery() }) {
		return false, nil
	}
	_, segment, err := l.storeSegment(ctx, dir, func(w io.Writer) (*musterpb.Segment, error) { return archive.Merge(ctx, l.Blobs, run, w) })
	if err != nil {
		return false, err
	}
	cmd := &musterpb.MergeSegments{Segment: segment}
	for _, s := range run {
		cmd.Replaced = append(cmd.Replaced, s.Digest)
	}
	if err := l.name(ctx, segment, &musterpb.Command{Body: &musterpb.Command_MergeSegments{MergeSegments: cmd}}); err != nil {
		return false, err
	}
	l.Logger.Debug("sealed segments were merged", "segment", segment.Digest, "of", len(run), "level", segment.Level, "bytes", segment.Bytes,
		"jobs", segment.Jobs, "in", time.Since(began).Round(time.Millisecond))
	return true, nil
}

// dropEvery is how often a scheduler looks for segments that were replaced.
func (s *Scheduler) dropEvery() time.Duration { return min(time.Second, s.Timing.SegmentGrace/10) }

// dropReplaced deletes this scheduler's copies of segments that were merged
// into others, once nobody can be reading them any more. It knows of those that
// it saw in the state itself: a copy that was replaced shortly before a restart
// stays.
func (s *Scheduler) dropReplaced(ctx context.Context) error {
	tick := time.NewTicker(s.dropEvery())
	defer tick.Stop()
	var known []*musterpb.Segment
	replaced := map[string]time.Time{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		current := s.State.Segments()
		named := make(map[string]bool, len(current))
		for _, segment := range current {
			named[segment.Digest] = true
		}
		for _, segment := range known {
			if !named[segment.Digest] && replaced[segment.Digest].IsZero() {
				replaced[segment.Digest] = time.Now()
			}
		}
		known = current
		for digest, since := range replaced {
			switch {
			case named[digest]:
				delete(replaced, digest)
			case time.Since(since) < s.Timing.SegmentGrace:
			default:
				if err := s.Blobs.Delete(ctx, api.Digest(digest)); err != nil {
					s.Logger.Debug("a segment that was replaced could not be deleted yet", "segment", digest, "err", err)
					continue
				}
				delete(replaced, digest)
			}
		}
	}
}
