package worker

import (
	"slices"
	"sync"
	"time"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/verify"
)

// Bounds of what waits to be said; what does not fit is said again at a later
// heartbeat or in the next session.
const (
	maxNews         = 4096
	maxReports      = 256 // ended attempts in one message
	maxReportsBytes = 1 << 20
)

// news gathers what there is to say of the attempts. While the schedulers have
// not answered the last small results, further ones wait for maxHold at most, so
// that what a busy scheduler can't take yet is said, and signed, together; an
// idle one answers at once, and nothing waits. Large results, which take long to
// examine, are said at once and have nobody wait.
type news struct {
	mu      sync.Mutex
	started []string            // guarded by mu
	ended   []*report           // guarded by mu
	open    map[string]struct{} // guarded by mu; attempts whose small result was said and not answered
	last    time.Time           // guarded by mu; when one was said
	later   *time.Timer         // guarded by mu; rings wake when what is held has waited enough; nil: none does
	wake    chan struct{}       // capacity 1: there is something
}

// maxHold is how long a small result waits for the answer to the ones before.
const maxHold = time.Second

// report is how an attempt ended: with a result or with a failure.
type report struct {
	commit *musterpb.Commit
	blobs  [][]byte // of the commit, small enough to travel along
	failed *musterpb.AttemptFailed
}

// small reports whether a result travels with its report.
func (r *report) small() bool { return r.commit != nil && r.blobs != nil }

func (r *report) size() (n int) {
	for _, data := range r.blobs {
		n += len(data)
	}
	return n
}

func newNews() *news { return &news{open: map[string]struct{}{}, wake: make(chan struct{}, 1)} }

// sayStarted says that an attempt began.
func (n *news) sayStarted(attempt string) {
	n.say(func() { n.started = append(n.started, attempt) })
}

// sayEnded says how an attempt ended.
func (n *news) sayEnded(r *report) {
	n.say(func() { n.ended = append(n.ended, r) })
}

func (n *news) say(add func()) {
	n.mu.Lock()
	if len(n.started)+len(n.ended) < maxNews {
		add()
	}
	n.mu.Unlock()
	n.ring()
}

func (n *news) ring() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// answered notes that the schedulers know how an attempt ended, or do not want
// to.
func (n *news) answered(attempt string) {
	n.mu.Lock()
	delete(n.open, attempt)
	ready := len(n.open) == 0 && len(n.ended) > 0
	n.mu.Unlock()
	if ready {
		n.ring()
	}
}

// begin begins a session: what was said in the one before may be lost.
func (n *news) begin() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.open)
}

// holds reports whether results wait for an answer; mu is held.
func (n *news) holds() bool {
	if len(n.open) == 0 || len(n.ended) == 0 || slices.ContainsFunc(n.ended, func(r *report) bool { return !r.small() }) {
		return false
	}
	left := maxHold - time.Since(n.last)
	if left <= 0 {
		return false
	}
	if n.later == nil {
		n.later = time.AfterFunc(left, func() {
			n.mu.Lock()
			n.later = nil
			n.mu.Unlock()
			n.ring()
		})
	}
	return true
}

// take is the next message, nil when there is nothing to say. sign signs the
// commits that travel together.
func (n *news) take(sign func(...*musterpb.Commit)) *musterpb.WorkerMessage {
	n.mu.Lock()
	started := n.started
	hold, size, ended := n.holds(), 0, 0
	for !hold && ended < len(n.ended) && ended < maxReports && (ended == 0 || size+n.ended[ended].size() <= maxReportsBytes) {
		size += n.ended[ended].size()
		ended++
	}
	list := n.ended[:ended:ended]
	n.started, n.ended = nil, n.ended[ended:]
	for _, r := range list {
		if r.small() {
			n.open[r.commit.Attempt] = struct{}{}
			n.last = time.Now()
		}
	}
	n.mu.Unlock()
	if len(started)+len(list) == 0 {
		return nil
	}
	m := &musterpb.Reports{Started: distinct(started)}
	said := map[*report]bool{}
	for _, r := range list {
		if said[r] {
			continue // it was said, and then again since nobody had answered yet
		}
		said[r] = true
		if r.failed != nil {
			m.Failed = append(m.Failed, r.failed)
			continue
		}
		m.Commits = append(m.Commits, r.commit)
		m.Blobs = append(m.Blobs, r.blobs...)
	}
	sign(m.Commits...)
	return &musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Reports{Reports: m}}
}

// distinct drops repeats.
func distinct(list []string) []string {
	seen := make(map[string]bool, len(list))
	return slices.DeleteFunc(list, func(s string) bool {
		again := seen[s]
		seen[s] = true
		return again
	})
}

func (w *Worker) sign(commits ...*musterpb.Commit) { verify.SignCommits(w.Key, commits...) }
