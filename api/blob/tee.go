package blob

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/musternet/muster/api"
)

// minTee is the size from which a blob is sent on to the peers while it comes
// in. A smaller one is copied once it is here: that is one request in place of
// three, and it is still in memory.
const minTee = 1 << 20

// maxQueued bounds the pieces that wait for one peer: 4 MiB.
const maxQueued = 16

// maxQueuedBytes bounds what all uploads of the process keep in memory for their
// peers: 32 of them whose two peers are as far behind as they may be.
const maxQueuedBytes = 256 << 20

// queuedBytes counts that memory. Nobody waits for it: a blob that gets none is
// read again from the disk for the peers, once it is there.
var queuedBytes = semaphore.NewWeighted(maxQueuedBytes)

// stage stages a blob here and, once it proves large, at the peers too.
func (s *Replicated) stage(ctx context.Context) (staged, error) {
	local, ok := s.local.(stager)
	if !ok {
		return nil, api.Errorf(api.Unsupported, "this store takes no blob in parts")
	}
	here, err := local.stage(ctx)
	if err != nil {
		return nil, err
	}
	return &tee{store: s, here: here}, nil
}

// tee is a blob that is staged on several machines.
type tee struct {
	store *Replicated
	here  staged
	first []byte // what has not been sent on yet, counted in queuedBytes; nil once there are sinks
	whole bool   // nothing is sent on: the peers get the whole blob afterwards
	sinks []*sink
	room  chan struct{} // capacity 1: some sink took a piece, or broke
}

func (t *tee) length() int64 { return t.here.length() }

func (t *tee) append(in *intake) error {
	in.tap = func(p []byte) error { return t.send(in.ctx, p) }
	defer func() {
		in.tap = nil
		if t.sinks == nil {
			// An upload that nobody goes on with must not keep memory for an hour.
			t.sendNothing()
		}
	}()
	return t.here.append(in)
}

func (t *tee) sendNothing() {
	t.whole = true
	t.dropFirst()
}

// send passes on what is written here.
func (t *tee) send(ctx context.Context, p []byte) error {
	if t.whole {
		return nil
	}
	if t.sinks == nil {
		if !queuedBytes.TryAcquire(int64(len(p))) {
			t.sendNothing()
			return nil
		}
		if t.first = append(t.first, p...); len(t.first) < minTee {
			return nil
		}
		p = t.first
		defer t.dropFirst()
		if err := t.open(); err != nil {
			return err
		}
	}
	for len(p) > 0 {
		n := min(len(p), pieceBytes)
		if err := t.queue(ctx, p[:n]); err != nil {
			t.lose() // what was not queued will not be again
			return err
		}
		p = p[n:]
	}
	return nil
}

func (t *tee) dropFirst() {
	queuedBytes.Release(int64(len(t.first)))
	t.first = nil
}

func (t *tee) lose() {
	for _, k := range t.sinks {
		k.lose()
	}
}

// open starts a stream to every peer that can take one.
func (t *tee) open() error {
	s := t.store
	peers := s.peers()
	t.sinks, t.room = make([]*sink, 0, len(peers)), make(chan struct{}, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return api.Errorf(api.Unavailable, "the scheduler is shutting down")
	}
	for _, peer := range peers {
		k := &sink{peer: peer, room: t.room, patience: patience, pieces: make(chan filled, maxQueued), done: make(chan struct{})}
		k.ctx, k.cancel = context.WithTimeout(s.ctx, copyTimeout)
		t.sinks = append(t.sinks, k)
		s.copies.Go(k.run)
	}
	return nil
}

// How long a sender waits for peers that are behind: for one that it could do
// without, in the whole transfer; and for the majority, each time. Who is still
// behind then gets its copy afterwards.
const (
	patience       = time.Second
	patienceNeeded = 10 * time.Second
)

// queue gives p to every peer that keeps up.
func (t *tee) queue(ctx context.Context, p []byte) error {
	need := t.store.need()
	behind := make([]*sink, 0, len(t.sinks))
	for _, k := range t.sinks {
		if !k.lost {
			behind = append(behind, k)
		}
	}
	deadline := time.Time{} // set once somebody is waited for
	for keepUp := 1; ; {
		waiting := behind[:0]
		for _, k := range behind {
			switch {
			case k.ctx.Err() != nil:
				k.lose()
			case k.full():
				waiting = append(waiting, k)
			case k.offer(p):
				keepUp++
			default:
				k.lose() // for want of memory
			}
		}
		if behind = waiting; len(behind) == 0 {
			return nil
		}
		now := time.Now()
		if deadline.IsZero() {
			deadline = now.Add(patienceNeeded)
		}
		wait := deadline.Sub(now)
		if keepUp >= need {
			wait = behind[0].patience
		}
		if wait <= 0 {
			behind[0].lose()
			continue
		}
		timer := time.NewTimer(wait)
		select {
		case <-t.room:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return api.Errorf(api.Unavailable, "the transfer was given up: %w", ctx.Err())
		}
		for _, k := range behind {
			k.patience -= time.Since(now)
		}
	}
}

// commit makes the blob durable here and on enough peers. Those whose stream
// broke off are sent the whole blob.
func (t *tee) commit(ctx context.Context, digest api.Digest) error {
	if t.store.isConfirmed(digest) {
		t.giveUp()
		return t.here.commit(ctx, digest)
	}
	for _, k := range t.sinks {
		k.finish()
	}
	stored := make(chan struct{}) // closed once here.commit has returned localErr
	var localErr error
	copiers := t.copiers(digest, func(ctx context.Context) error {
		select {
		case <-stored:
			return localErr
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	return t.store.replicate(ctx, digest, t.length(), copiers, func() error {
		defer close(stored)
		if localErr = t.here.commit(ctx, digest); localErr != nil {
			for _, k := range t.sinks {
				k.cancel()
			}
		}
		return localErr
	})
}

// copiers finish what was streamed; stored waits for the local copy.
func (t *tee) copiers(digest api.Digest, stored copier) []copier {
	if t.sinks == nil {
		all := t.store.copiers(digest)
		for i, whole := range all {
			all[i] = func(ctx context.Context) error {
				if err := stored(ctx); err != nil {
					return err
				}
				return whole(ctx)
			}
		}
		return all
	}
	var all []copier
	for _, k := range t.sinks {
		all = append(all, func(ctx context.Context) error {
			if err := k.commit(ctx, digest); err == nil {
				return nil
			}
			if err := stored(ctx); err != nil {
				return err
			}
			return t.store.copyTo(ctx, k.peer, digest)
		})
	}
	return all
}

func (t *tee) discard() {
	t.here.discard()
	t.giveUp()
}

func (t *tee) giveUp() {
	for _, k := range t.sinks {
		k.giveUp()
	}
}

// sink streams a blob to one peer. Only run and commit touch staged; everything
// else is the tee's caller's.
type sink struct {
	peer   Store
	ctx    context.Context
	cancel context.CancelFunc
	pieces chan filled
	room   chan struct{} // the tee's
	lost   bool          // the stream is not fed any more
	// patience is how long the peer may still be waited for without need.
	patience time.Duration
	once     sync.Once

	// Set by run, to be read once done is closed.
	done   chan struct{}
	staged staged
	err    error
}

var errBehind = errors.New("the peer could not keep up")

// run sends pieces until there are no more.
func (k *sink) run() {
	defer k.drain()
	defer close(k.done)
	if k.err = k.stream(); k.err == nil {
		return
	}
	k.cancel()
	k.tell() // whoever waits for room must not
	if k.staged != nil {
		k.staged.discard()
	}
}

func (k *sink) stream() (err error) {
	at, ok := k.peer.(stager)
	if !ok {
		return errors.New("the peer takes no blob in parts")
	}
	if k.staged, err = at.stage(k.ctx); err != nil {
		return err
	}
	queued := &pieceReader{k: k}
	defer queued.next()
	if err := k.staged.append(newIntake(k.ctx, queued, NoLimit)); err != nil {
		return err
	}
	return k.ctx.Err()
}

// drain gives back what nobody will send. It is called twice, once the stream is
// over and once the queue is closed, so that the later call finds it all.
func (k *sink) drain() {
	for {
		select {
		case f, open := <-k.pieces:
			if !open {
				return
			}
			f.giveBack()
		default:
			return
		}
	}
}

// full says that the peer is behind. It does not become true by itself, since
// nobody but the tee's caller sends.
func (k *sink) full() bool { return len(k.pieces) == cap(k.pieces) }

// offer queues a copy of p, or says that there is no memory for it.
func (k *sink) offer(p []byte) bool {
	if !queuedBytes.TryAcquire(pieceBytes) {
		return false
	}
	k.pieces <- fill(p)
	return true
}

func fill(p []byte) filled {
	piece := pieces.Get().(*[pieceBytes]byte)
	return filled{piece, copy(piece[:], p)}
}

// giveBack ends the use of a piece that was queued.
func (f filled) giveBack() {
	pieces.Put(f.piece)
	queuedBytes.Release(pieceBytes)
}

// tell says that it is worth offering again.
func (k *sink) tell() {
	select {
	case k.room <- struct{}{}:
	default:
	}
}

// lose ends a stream that cannot become the whole blob.
func (k *sink) lose() {
	k.lost = true
	k.cancel()
	k.finish()
}

// finish says that no more pieces come.
func (k *sink) finish() { k.once.Do(k.closeQueue) }

func (k *sink) closeQueue() {
	close(k.pieces)
	select {
	case <-k.done:
		k.drain() // what came after the stream was over
	default:
	}
}

// commit stores what was streamed.
func (k *sink) commit(ctx context.Context, digest api.Digest) error {
	select {
	case <-k.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	switch {
	case k.lost:
		return errBehind
	case k.err != nil:
		return k.err
	}
	defer k.cancel()
	defer k.staged.discard()
	return k.staged.commit(ctx, digest)
}

// giveUp ends the stream of a blob that is not to be stored. Once a commit has
// begun it does nothing: peers are served after its caller has gone.
func (k *sink) giveUp() {
	k.once.Do(func() {
		k.lost = true
		k.cancel()
		k.closeQueue()
	})
}

// pieceReader reads a sink's queue.
type pieceReader struct {
	k    *sink
	last filled
	at   int
}

func (r *pieceReader) Read(p []byte) (int, error) {
	if r.at == r.last.n {
		r.next()
		select {
		case f, open := <-r.k.pieces:
			if !open {
				if r.k.ctx.Err() != nil {
					return 0, api.Errorf(api.Unavailable, "the stream was given up: %w", r.k.ctx.Err())
				}
				return 0, io.EOF
			}
			r.last = f
			r.k.tell()
		case <-r.k.ctx.Done():
			return 0, api.Errorf(api.Unavailable, "the stream was given up: %w", r.k.ctx.Err())
		}
	}
	n := copy(p, r.last.piece[r.at:r.last.n])
	r.at += n
	return n, nil
}

// next is done with the piece that is read.
func (r *pieceReader) next() {
	if r.last.piece != nil {
		r.last.giveBack()
		r.last, r.at = filled{}, 0
	}
}
