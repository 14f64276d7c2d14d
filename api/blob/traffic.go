package blob

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/musternet/muster/api"
)

// Bounds of the transfers of one caller: more wait for their turn, and yet more
// are refused.
const (
	maxTransfers        = 128
	maxWaitingTransfers = 2048
)

// maxIdle is how long a transfer may stand still. It is cut then, and goes on
// with a new connection where it stopped.
const maxIdle = time.Minute

// traffic bounds the transfers of each caller.
type traffic struct {
	mu      sync.Mutex // guards callers and what they count
	callers map[string]*callerTraffic
}

type callerTraffic struct {
	turns *semaphore.Weighted
	count int // running and waiting
}

func newTraffic() *traffic { return &traffic{callers: make(map[string]*callerTraffic)} }

// enter waits for the caller's turn, which done ends.
func (t *traffic) enter(ctx context.Context, caller Caller) (done func(), err error) {
	if caller.Peer {
		return func() {}, nil
	}
	t.mu.Lock()
	c := t.callers[caller.ID]
	if c == nil {
		c = &callerTraffic{turns: semaphore.NewWeighted(maxTransfers)}
		t.callers[caller.ID] = c
	}
	if c.count >= maxTransfers+maxWaitingTransfers {
		t.mu.Unlock()
		return nil, api.Errorf(api.Exhausted, "%d transfers of this key wait for their turn already; start fewer at the same time", maxWaitingTransfers)
	}
	c.count++
	t.mu.Unlock()
	if err := c.turns.Acquire(ctx, 1); err != nil {
		t.leave(caller, c)
		return nil, api.Errorf(api.Unavailable, "the transfer was given up while it waited for its turn: %w", err)
	}
	return func() { c.turns.Release(1); t.leave(caller, c) }, nil
}

func (t *traffic) leave(caller Caller, c *callerTraffic) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.count--; c.count == 0 {
		delete(t.callers, caller.ID)
	}
}

// body is the body of a request, cut when it stands still.
func (h *handler) body(w http.ResponseWriter, r *http.Request) io.Reader {
	return &pacedReader{ctx: r.Context(), r: r.Body, control: http.NewResponseController(w), idle: h.idle}
}

// pacedReader gives every read of a request's body a time.
type pacedReader struct {
	ctx     context.Context
	r       io.Reader
	control *http.ResponseController
	idle    time.Duration
	set     time.Time // when the deadline was set
}

func (p *pacedReader) Read(b []byte) (int, error) {
	if now := time.Now(); now.Sub(p.set) > p.idle/8 {
		// It fails only where the connection has no deadlines, as in tests.
		_ = p.control.SetReadDeadline(now.Add(p.idle))
		p.set = now
		// Whoever interrupts a request ends its context first and its reading
		// second; this is the other order, so none can be missed.
		if err := p.ctx.Err(); err != nil {
			return 0, api.Errorf(api.Unavailable, "the transfer was given up: %w", err)
		}
	}
	n, err := p.r.Read(b)
	switch {
	case err == io.EOF:
		_ = p.control.SetReadDeadline(time.Time{}) // the connection's next request has its own
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = api.Errorf(api.Unavailable, "no byte came for %s; go on where the transfer stopped", p.idle)
	case err != nil:
		err = api.Errorf(api.Unavailable, "the transfer broke off: %w", err)
	}
	return n, err
}

// pacedBytes is what may take maxIdle to send: 17 KB/s.
const pacedBytes = 1 << 20

// pacedWriter gives every part of an answer a time.
type pacedWriter struct {
	http.ResponseWriter
	control *http.ResponseController
	idle    time.Duration
}

// release leaves no deadline to the connection's next answer.
func (p *pacedWriter) release() { _ = p.control.SetWriteDeadline(time.Time{}) }

func (p *pacedWriter) allow() { _ = p.control.SetWriteDeadline(time.Now().Add(p.idle)) }

func (p *pacedWriter) Write(b []byte) (int, error) {
	p.allow()
	return p.ResponseWriter.Write(b)
}

// ReadFrom passes a file on part by part, so that the kernel can still send it
// without a copy in between.
func (p *pacedWriter) ReadFrom(r io.Reader) (int64, error) {
	limited, ok := r.(*io.LimitedReader)
	if !ok {
		limited = &io.LimitedReader{R: r, N: 1<<63 - 1}
	}
	var total int64
	for limited.N > 0 {
		p.allow()
		n, err := io.Copy(p.ResponseWriter, &io.LimitedReader{R: limited.R, N: min(limited.N, pacedBytes)})
		total += n
		limited.N -= n
		if err != nil || n == 0 {
			return total, err
		}
	}
	return total, nil
}
