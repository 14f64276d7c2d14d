package scheduler

import (
	"context"
	"crypto/ed25519"
	"errors"
	"strings"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/outputs"
	"github.com/musternet/muster/scheduler/state"
	"github.com/musternet/muster/verify"
)

// offer is a result that a worker offers, on its way into the log.
type offer struct {
	worker         string
	commit         *musterpb.Commit
	receivedUnixMS int64
	signed         error // what is wrong with the signature
	// What came along with the report; nil where it is a blob of its own.
	manifest, archive, log []byte
}

// inline reports whether the result came along, so that it is examined from
// memory and stored with others.
func (o *offer) inline() bool { return o.manifest != nil && o.archive != nil }

// whole reports whether nothing of an inline result has to be looked for: a
// large log is uploaded by itself.
func (o *offer) whole() bool { return o.commit.LogDigest == "" || o.log != nil }

// reports handles what a worker says of its attempts.
func (l *leader) reports(sess *session, r *musterpb.Reports) {
	received := l.Replica.Now()
	l.starts(sess.worker, r, received)
	l.results(sess.worker, r, received)
	for _, f := range r.Failed {
		if a := l.own(sess.worker, f.Attempt); a == nil || !live(a) {
			l.outcome(sess.worker, f.Attempt, nil)
		} else {
			l.beside(a.Id, func() { l.failed(sess.worker, f) })
		}
	}
}

// starts enters into the log that a worker began; from then on time is billed.
// That of an attempt whose result came along is entered with the result.
func (l *leader) starts(worker string, r *musterpb.Reports, receivedUnixMS int64) {
	var done map[string]bool
	if len(r.Commits) > 0 {
		done = make(map[string]bool, len(r.Commits))
		for _, c := range r.Commits {
			done[c.Attempt] = true
		}
	}
	var cmds []*musterpb.Command
	for _, id := range r.Started {
		if a := l.own(worker, id); a != nil && a.State == musterpb.AttemptState_ATTEMPT_STATE_PLACED && !done[id] {
			if done == nil {
				done = map[string]bool{}
			}
			done[id] = true // each once, however often it is said
			cmds = append(cmds, startOf(id, receivedUnixMS))
		}
	}
	l.proposeBeside(cmds)
}

func startOf(attempt string, receivedUnixMS int64) *musterpb.Command {
	return &musterpb.Command{Body: &musterpb.Command_StartAttempt{StartAttempt: &musterpb.StartAttempt{Attempt: attempt, ReceivedUnixMs: receivedUnixMS}}}
}

// proposeBeside proposes commands whose answers nobody waits for.
func (l *leader) proposeBeside(cmds []*musterpb.Command) {
	for len(cmds) > 0 {
		var group []*musterpb.Command
		group, cmds = cut(cmds, maxTogether)
		l.goBeside(func() {
			if _, err := l.Replica.ProposeAll(l.ctx, group); err != nil {
				l.Logger.Debug("commands were not taken", "commands", len(group), "err", err)
			}
		})
	}
}

// maxAtOnce bounds the outputs, unpacked, that are examined while the worker's
// next message waits.
const maxAtOnce = 1 << 20

// maxTogether bounds the commands of one proposal of the leader's own.
const maxTogether = 1024

// results examines what came along at once, on the session's own goroutine, and
// leaves the rest to the examiners.
func (l *leader) results(worker string, r *musterpb.Reports, receivedUnixMS int64) {
	if len(r.Commits) == 0 {
		return
	}
	select {
	case l.cores <- struct{}{}:
	case <-l.ctx.Done():
		return
	}
	good := l.examineSmall(worker, r, receivedUnixMS)
	<-l.cores
	l.bundles.add(good)
}

// examineSmall examines what came along, and returns what is right of it.
func (l *leader) examineSmall(worker string, r *musterpb.Reports, receivedUnixMS int64) (good []*offer) {
	offers := l.offersOf(worker, r, receivedUnixMS)
	var small []*offer
	for _, o := range offers {
		job := l.jobOf(o.commit.Attempt)
		if job == nil {
			continue // sealed meanwhile
		}
		if o.inline() && o.whole() && o.commit.OutputBytes <= maxAtOnce && job.Spec.Verify.GetComparator() == verify.Exact {
			small = append(small, o)
			continue
		}
		l.examine(job.Account, o.commit.Attempt, func(ctx context.Context) (func(), error) { return l.commit(ctx, o), nil })
	}
	for _, o := range l.reserve(small) {
		a := l.State.Attempt(o.commit.Attempt)
		if err := l.checkInline(l.ctx, a, o); err != nil {
			l.goBeside(func() {
				defer l.release([]*offer{o})
				l.refuse(o, err, false)
			})
			continue
		}
		good = append(good, o)
	}
	return good
}

// offersOf are the results in a report that are not answered already.
func (l *leader) offersOf(worker string, r *musterpb.Reports, receivedUnixMS int64) []*offer {
	var open []*musterpb.Commit
	for _, c := range r.Commits {
		if !l.answered(worker, c) {
			open = append(open, verify.KnownFields(c)) // what nobody signed is not replicated
		}
	}
	if len(open) == 0 {
		return nil // nothing is computed for a worker that only repeats itself
	}
	came := make(map[string][]byte, len(r.Blobs))
	for _, data := range r.Blobs {
		if len(data) <= outputs.MaxInline {
			came[string(api.DigestOf(data))] = data
		}
	}
	offers := make([]*offer, len(open))
	for i, err := range verify.CheckCommits(l.keyOf(worker), open) {
		c := open[i]
		offers[i] = &offer{
			worker: worker, commit: c, receivedUnixMS: receivedUnixMS, signed: err,
			manifest: came[c.ManifestDigest], archive: came[c.ArchiveDigest], log: came[c.LogDigest],
		}
	}
	return offers
}

func (l *leader) keyOf(worker string) ed25519.PublicKey { return l.State.Worker(worker).GetPublicKey() }

// reserve takes the offers' attempts for this side to work on, and leaves out
// those that are being worked on already.
func (l *leader) reserve(offers []*offer) []*offer {
	if len(offers) == 0 {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	free := offers[:0]
	for _, o := range offers {
		if id := o.commit.Attempt; !l.busy[id] && !l.closed {
			l.busy[id] = true
			free = append(free, o)
		}
	}
	return free
}

// release gives the offers' attempts back.
func (l *leader) release(offers []*offer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, o := range offers {
		delete(l.busy, o.commit.Attempt)
	}
}

// commit examines a result, and returns what enters it into the log or refuses
// it. Where this side is at fault it does not answer: the worker offers the
// result again.
func (l *leader) commit(ctx context.Context, o *offer) (then func()) {
	if l.answered(o.worker, o.commit) {
		return func() {}
	}
	a := l.State.Attempt(o.commit.Attempt)
	if o.inline() {
		err := l.checkInline(ctx, a, o)
		if err == nil && !o.whole() {
			err = l.checkStored(ctx, o.commit.Attempt, "log", o.commit.LogDigest)
		}
		if err != nil {
			timedOut := errors.Is(ctx.Err(), context.DeadlineExceeded)
			return func() { l.refuse(o, err, timedOut) }
		}
		return func() { l.enter([]*offer{o}) }
	}
	if a.State == musterpb.AttemptState_ATTEMPT_STATE_PLACED {
		// Examining may take long, and the start should not wait for it.
		l.proposeBeside([]*musterpb.Command{startOf(a.Id, o.receivedUnixMS)})
	}
	if err := l.checkResult(ctx, a, o); err != nil {
		timedOut := errors.Is(ctx.Err(), context.DeadlineExceeded)
		return func() { l.refuse(o, err, timedOut) }
	}
	return func() { l.propose([]*offer{o}, make([]*musterpb.Stored, 1)) }
}

// propose enters examined results into the log, and answers the workers.
func (l *leader) propose(offers []*offer, stored []*musterpb.Stored) {
	for len(offers) > 0 {
		n := min(len(offers), maxTogether/2)
		l.proposeResults(offers[:n], stored[:n])
		offers, stored = offers[n:], stored[n:]
	}
}

func (l *leader) proposeResults(offers []*offer, stored []*musterpb.Stored) {
	cmds := make([]*musterpb.Command, 0, 2*len(offers))
	at := make([]int, len(offers)) // of each result's own command
	for i, o := range offers {
		if a := l.State.Attempt(o.commit.Attempt); a != nil && a.State == musterpb.AttemptState_ATTEMPT_STATE_PLACED {
			// A worker is paid from its start, and not from its placement: saying
			// nothing of the start may not be worth the time that it fetched.
			cmds = append(cmds, startOf(a.Id, o.receivedUnixMS))
		}
		at[i] = len(cmds)
		cmds = append(cmds, &musterpb.Command{Body: &musterpb.Command_CommitResult{CommitResult: &musterpb.CommitResult{
			Commit: o.commit, ReceivedUnixMs: o.receivedUnixMS, Stored: stored[i],
		}}})
	}
	answers, err := l.Replica.ProposeAll(l.ctx, cmds)
	if err != nil {
		l.Logger.Debug("results were not entered; their workers offer them again", "results", len(offers), "err", err)
		return
	}
	for i, o := range offers {
		switch err := state.ErrorOf(answers[at[i]]); {
		case err == nil || api.KindOf(err) == api.Conflict:
			l.outcome(o.worker, o.commit.Attempt, err)
		default:
			l.refuse(o, err, false)
		}
	}
}

// refuse ends an attempt whose result is not taken, unless this side is at fault.
func (l *leader) refuse(o *offer, err error, timedOut bool) {
	blame, ours := refusalBlame(err)
	if timedOut {
		err = api.Errorf(api.TooLarge, "examining the outputs took longer than %s; let a task produce less (chunk, resources.disk)", examineWithin)
		blame, ours = musterpb.Blame_BLAME_NETWORK, false // it may be the store that hangs
	}
	id := o.commit.Attempt
	if l.ctx.Err() != nil || (ours && api.KindOf(err) == api.Unavailable) {
		l.Logger.Warn("a result could not be examined; the worker offers it again", "attempt", id, "err", err)
		return
	}
	if a := l.State.Attempt(id); a != nil && a.State != musterpb.AttemptState_ATTEMPT_STATE_LOST {
		reason := clip("result refused: "+err.Error(), maxReason)
		cmd := &musterpb.EndAttempt{Attempt: id, State: musterpb.AttemptState_ATTEMPT_STATE_FAILED, Blame: blame, Reason: reason}
		if o.signed == nil && l.keepLog(o) {
			cmd.LogDigest = o.commit.LogDigest
		}
		if api.KindOf(l.end(l.ctx, cmd)) == api.Unavailable {
			return
		}
	}
	l.outcome(o.worker, id, err)
}

// keepLog stores the log of a refused result that came along, for the customer
// to read, and reports whether the log is stored.
func (l *leader) keepLog(o *offer) bool {
	if o.log == nil {
		return true // uploaded, or there is none
	}
	ctx, cancel := context.WithTimeout(l.ctx, storeWithin)
	defer cancel()
	_, err := l.Blobs.Put(ctx, api.Digest(o.commit.LogDigest), blob.Bytes(o.log), int64(len(o.log)))
	return err == nil
}

// enter stores results that came along, and enters them.
func (l *leader) enter(offers []*offer) {
	ctx, cancel := context.WithTimeout(l.ctx, storeWithin)
	defer cancel()
	stored, err := l.store(ctx, offers)
	if err != nil {
		l.Logger.Warn("results could not be stored; their workers offer them again", "results", len(offers), "err", err)
		return
	}
	l.propose(offers, stored)
}

// store writes results as one blob, a bundle.
func (l *leader) store(ctx context.Context, offers []*offer) ([]*musterpb.Stored, error) {
	size := 0
	for _, o := range offers {
		size += len(o.manifest) + len(o.archive) + len(o.log)
	}
	bundle, stored := make([]byte, 0, size), make([]*musterpb.Stored, len(offers))
	put := func(data []byte) (offset, length int64) {
		offset = int64(len(bundle))
		bundle = append(bundle, data...)
		return offset, int64(len(data))
	}
	for i, o := range offers {
		s := &musterpb.Stored{}
		s.ManifestOffset, s.ManifestBytes = put(o.manifest)
		s.ArchiveOffset, _ = put(o.archive)
		if len(o.log) > 0 {
			s.LogOffset, s.LogBytes = put(o.log)
		}
		stored[i] = s
	}
	digest := api.DigestOf(bundle)
	for _, s := range stored {
		s.Bundle = string(digest)
	}
	_, err := l.Blobs.Put(ctx, digest, blob.Bytes(bundle), int64(len(bundle)))
	return stored, err
}

// answered answers a commit for which nothing has to be examined: a repeat, or
// one that comes too late.
func (l *leader) answered(worker string, c *musterpb.Commit) bool {
	a := l.own(worker, c.Attempt)
	switch {
	case a == nil:
		l.outcome(worker, c.Attempt, api.Errorf(api.Denied, "attempt %.60q is not one of worker %s", c.Attempt, worker))
	case verify.SameResult(a.Commit, c):
		l.outcome(worker, c.Attempt, nil)
	case !l.mayContinue(worker, a.Id):
		l.outcome(worker, c.Attempt, l.tooLate(a))
	default:
		return false
	}
	return true
}

// tooLate says why a result of the attempt does not count any more.
func (l *leader) tooLate(a *musterpb.Attempt) error {
	if task := l.State.Task(a.Job, a.Task); a.Check == "" && task.GetResult() != "" && task.Result != a.Id {
		return api.Errorf(api.Conflict, "attempt %s comes too late: it is %s, and another attempt of its task was committed first", a.Id, state.StateName(a.State))
	}
	return api.Errorf(api.Conflict, "attempt %s is over: it is %s (%s)", a.Id, state.StateName(a.State), a.Reason)
}

// failed ends an attempt that the worker gave up.
func (l *leader) failed(worker string, f *musterpb.AttemptFailed) {
	end := &musterpb.EndAttempt{
		Attempt: f.Attempt, State: musterpb.AttemptState_ATTEMPT_STATE_FAILED, Reason: clip(f.Reason, maxReason), Blame: f.Blame, ExitCode: f.ExitCode,
	}
	if _, err := api.ParseDigest(f.LogDigest); err == nil {
		end.LogDigest = f.LogDigest
	}
	switch {
	case f.Cancelled:
		end.State, end.Blame, end.Blameless = musterpb.AttemptState_ATTEMPT_STATE_LOST, musterpb.Blame_BLAME_NETWORK, true
	case f.Blame == musterpb.Blame_BLAME_NETWORK:
		end.Blameless = true
	case f.Blame != musterpb.Blame_BLAME_JOB:
		end.Blame = musterpb.Blame_BLAME_WORKER // whoever fails is to blame, unless it says who else is
	}
	if api.KindOf(l.end(l.ctx, end)) != api.Unavailable {
		l.outcome(worker, f.Attempt, nil)
	}
}

// outcome tells a worker that it may forget an attempt. A worker that has no
// session just now asks again.
func (l *leader) outcome(worker, attempt string, err error) {
	o := &musterpb.Outcome{Attempt: attempt, Accepted: err == nil}
	if err != nil {
		o.Reason = clip(err.Error(), maxReason)
	}
	if s := l.session(worker); s != nil {
		s.tell(func(box *outbox) { box.outcomes = append(box.outcomes, o) })
	}
}

// clip shortens text, and keeps it UTF-8: it travels in messages that have to be.
func clip(s string, n int) string {
	if len(s) <= n {
		return strings.ToValidUTF8(s, "�")
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}
