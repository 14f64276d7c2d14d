package container

import (
	"fmt"
	"io"
	"sync"
)

// MaxLogBytes is how much of a run's output reaches Spec.Logs.
const MaxLogBytes = 16 << 20

// Log passes a program's output on to Spec.Logs up to a bound, then one line
// that says it was cut. It never reports an error: a program must not fail, nor
// block, because its log has nowhere to go. Safe for concurrent use, so that
// stdout and stderr may share one.
type Log struct {
	mu    sync.Mutex // guards the fields below, and calls to w
	w     io.Writer  // nil once nothing more is to be written
	left  int
	limit int
	atEOL bool
}

// NewLog bounds w, which may be nil, to limit bytes.
func NewLog(w io.Writer, limit int) *Log {
	return &Log{w: w, left: limit, limit: limit, atEOL: true}
}

// Write implements io.Writer; it always reports success.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.w == nil || len(p) == 0 {
		return len(p), nil
	}
	keep := p[:min(len(p), l.left)]
	l.put(keep)
	if len(keep) < len(p) {
		l.line("output cut here: only the first %d bytes are kept", l.limit)
		l.w = nil
	}
	return len(p), nil
}

// Note adds one line in muster's own name, such as why a run was stopped.
func (l *Log) Note(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.line(format, args...)
}

// Close makes every later Write vanish. It does not close the writer below.
func (l *Log) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.w = nil
}

func (l *Log) put(p []byte) {
	if len(p) == 0 {
		return
	}
	l.left -= len(p)
	l.atEOL = p[len(p)-1] == '\n'
	if _, err := l.w.Write(p); err != nil {
		l.w = nil
	}
}

// line writes muster's own words; they do not count against the bound.
func (l *Log) line(format string, args ...any) {
	if l.w == nil {
		return
	}
	lead := ""
	if !l.atEOL {
		lead = "\n"
	}
	l.atEOL = true
	if _, err := fmt.Fprintf(l.w, lead+"muster: "+format+"\n", args...); err != nil {
		l.w = nil
	}
}
