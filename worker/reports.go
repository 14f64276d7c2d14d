package worker

import (
	"slices"
	"sync"

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

// news gathers what there is to say of the attempts while the stream is busy:
// nothing waits on an idle one, and what waits on a busy one is said, and signed,
// together.
type news struct {
	mu      sync.Mutex
	started []string      // guarded by mu
	ended   []*report     // guarded by mu
	wake    chan struct{} // capacity 1: there is something
}

// report is how an attempt ended: with a result or with a failure.
type report struct {
	commit *musterpb.Commit
	blobs  [][]byte // of the commit, small enough to travel along
	failed *musterpb.AttemptFailed
}

func (r *report) size() (n int) {
	for _, data := range r.blobs {
		n += len(data)
	}
	return n
}

func newNews() *news { return &news{wake: make(chan struct{}, 1)} }

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
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// take is the next message, nil when there is nothing to say. sign signs the
// commits that travel together.
func (n *news) take(sign func(...*musterpb.Commit)) *musterpb.WorkerMessage {
	n.mu.Lock()
	started := n.started
	size, ended := 0, 0
	for ended < len(n.ended) && ended < maxReports && (ended == 0 || size+n.ended[ended].size() <= maxReportsBytes) {
		size += n.ended[ended].size()
		ended++
	}
	list := n.ended[:ended:ended]
	n.started, n.ended = nil, n.ended[ended:]
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
