package blob

import (
	"context"
	"io"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/musternet/muster/api"
)

// copyTimeout bounds how long one copy to a peer may take.
const copyTimeout = 30 * time.Minute

// maxConfirmed bounds the digests that are remembered as replicated.
const maxConfirmed = 100_000

// Replicated keeps blobs on this machine and on its peers, so that a blob
// whose Put returned outlives the loss of any need-1 of them.
type Replicated struct {
	local Store
	peers func() []Store
	need  func() int

	ctx    context.Context // of the copies, which may outlive the call that started them
	cancel context.CancelFunc
	copies sync.WaitGroup
	turns  *semaphore.Weighted // of copies that read a blob from its beginning

	mu        sync.Mutex // guards confirmed, healing and closed
	confirmed map[api.Digest]int64
	healing   map[api.Digest]*healing
	closed    bool
}

var _ Store = (*Replicated)(nil)

// NewReplicated keeps blobs in local and in peers, which is asked for every
// call and does not hold local. Need is the number of copies, local included,
// that make a blob durable: the majority of the replicas. It is asked for every
// call, as the set of replicas may change. Peers must answer for
// themselves alone (HTTPConfig.Replica), or calls would go round in circles.
func NewReplicated(local Store, peers func() []Store, need func() int) *Replicated {
	ctx, cancel := context.WithCancel(context.Background())
	return &Replicated{
		local: local, peers: peers, need: need,
		ctx: ctx, cancel: cancel, turns: semaphore.NewWeighted(maxCopies),
		confirmed: make(map[api.Digest]int64),
		healing:   make(map[api.Digest]*healing),
	}
}

// Close stops the copies under way and waits for them. No call may follow.
func (s *Replicated) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.copies.Wait()
	return nil
}

// Put implements Store: it returns once need copies are durable, and goes on
// copying to the other peers.
func (s *Replicated) Put(ctx context.Context, digest api.Digest, r io.Reader, limit int64) (int64, error) {
	return putStaged(ctx, localFirst{s}, digest, newIntake(ctx, r, limit))
}

// localFirst is how Put asks for a blob that is there already: one that only
// this machine has is copied and not sent again.
type localFirst struct{ *Replicated }

func (s localFirst) Stat(ctx context.Context, digest api.Digest) (int64, error) {
	size, err := s.local.Stat(ctx, digest)
	if err != nil {
		return 0, err
	}
	return size, s.replicate(ctx, digest, size, s.copiers(digest), isHere)
}

// copier makes one copy; it runs under Replicated's context.
type copier func(ctx context.Context) error

// copiers are copies of a local blob to every peer.
func (s *Replicated) copiers(digest api.Digest) []copier {
	var all []copier
	for _, peer := range s.peers() {
		all = append(all, func(ctx context.Context) error { return s.copyTo(ctx, peer, digest) })
	}
	return all
}

// replicate waits until need copies of a blob are durable, the local one among
// them, which here makes meanwhile.
func (s *Replicated) replicate(ctx context.Context, digest api.Digest, size int64, copiers []copier, here func() error) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return shuttingDown(digest)
	}
	if _, ok := s.confirmed[digest]; ok {
		s.mu.Unlock()
		return here()
	}
	s.copies.Add(len(copiers))
	s.mu.Unlock()

	done := make(chan error, len(copiers))
	for _, make := range copiers {
		go func() {
			defer s.copies.Done()
			ctx, cancel := context.WithTimeout(s.ctx, copyTimeout)
			defer cancel()
			done <- make(ctx)
		}()
	}
	if err := here(); err != nil {
		return err
	}
	have, need := 1, s.need()
	var failures []error
	for range copiers {
		if have >= need {
			break
		}
		select {
		case err := <-done:
			if err != nil {
				failures = append(failures, err)
			} else {
				have++
			}
		case <-ctx.Done():
			return api.Errorf(api.Unavailable, "blob %s: the call ended with %d of %d copies: %w", digest, have, need, ctx.Err())
		}
	}
	if have < need {
		return api.Errorf(api.Unavailable, "blob %s: stored on %d of the %d schedulers that are needed; try again once more of them answer: %w",
			digest, have, need, joinErrors(api.Unavailable, failures))
	}
	s.confirm(digest, size)
	return nil
}

// isHere is for a blob that is stored locally already.
func isHere() error { return nil }

func shuttingDown(digest api.Digest) error {
	return api.Errorf(api.Unavailable, "blob %s: the scheduler is shutting down", digest)
}

func (s *Replicated) isConfirmed(digest api.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.confirmed[digest]
	return ok
}

func (s *Replicated) confirm(digest api.Digest, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.confirmed) >= maxConfirmed {
		clear(s.confirmed) // they are confirmed again as they are asked for
	}
	s.confirmed[digest] = size
}

// maxCopies bounds the copies to and from peers that run at the same time.
const maxCopies = 16

func (s *Replicated) copyTo(ctx context.Context, peer Store, digest api.Digest) error {
	if err := s.turns.Acquire(ctx, 1); err != nil {
		return api.Errorf(api.Unavailable, "blob %s: too many copies are under way: %w", digest, err)
	}
	defer s.turns.Release(1)
	r, err := s.local.Open(ctx, digest)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = peer.Put(ctx, digest, r, NoLimit)
	return err
}

// Open implements Store. A blob that only a peer holds is copied here first; if
// this machine cannot take it, the peer's copy is read.
func (s *Replicated) Open(ctx context.Context, digest api.Digest) (Reader, error) {
	r, err := s.local.Open(ctx, digest)
	if api.KindOf(err) != api.NotFound {
		return r, err
	}
	if err = s.heal(ctx, digest); err == nil {
		return s.local.Open(ctx, digest)
	}
	if api.KindOf(err) != api.NotFound {
		for _, peer := range s.peers() {
			if r, peerErr := peer.Open(ctx, digest); peerErr == nil {
				return r, nil
			}
		}
	}
	return nil, err
}

// Stat implements Store. A blob with too few copies gets them first.
func (s *Replicated) Stat(ctx context.Context, digest api.Digest) (int64, error) {
	s.mu.Lock()
	size, ok := s.confirmed[digest]
	s.mu.Unlock()
	if ok {
		return size, nil
	}
	size, err := s.local.Stat(ctx, digest)
	if api.KindOf(err) == api.NotFound {
		if err := s.heal(ctx, digest); err != nil {
			return 0, err
		}
		size, err = s.local.Stat(ctx, digest)
	}
	if err != nil {
		return 0, err
	}
	return size, s.replicate(ctx, digest, size, s.copiers(digest), isHere)
}

// healing is one copy from a peer that any number of calls wait for.
type healing struct {
	done chan struct{}
	err  error // once done is closed
}

// heal copies a blob from the first peer that has it.
func (s *Replicated) heal(ctx context.Context, digest api.Digest) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return shuttingDown(digest)
	}
	h, ok := s.healing[digest]
	if !ok {
		h = &healing{done: make(chan struct{})}
		s.healing[digest] = h
		s.copies.Add(1)
		go func() {
			defer s.copies.Done()
			h.err = s.copyFromPeer(digest)
			s.mu.Lock()
			delete(s.healing, digest)
			s.mu.Unlock()
			close(h.done)
		}()
	}
	s.mu.Unlock()
	select {
	case <-h.done:
		return h.err
	case <-ctx.Done():
		return api.Errorf(api.Unavailable, "blob %s: the call ended while it was copied here: %w", digest, ctx.Err())
	}
}

func (s *Replicated) copyFromPeer(digest api.Digest) error {
	ctx, cancel := context.WithTimeout(s.ctx, copyTimeout)
	defer cancel()
	if err := s.turns.Acquire(ctx, 1); err != nil {
		return api.Errorf(api.Unavailable, "blob %s: too many copies are under way: %w", digest, err)
	}
	defer s.turns.Release(1)
	var failures []error
	for _, peer := range s.peers() {
		err := func() error {
			r, err := peer.Open(ctx, digest)
			if err != nil {
				return err
			}
			defer r.Close()
			_, err = s.local.Put(ctx, digest, r, NoLimit)
			return err
		}()
		if err == nil {
			return nil
		}
		if api.KindOf(err) != api.NotFound {
			failures = append(failures, err)
		}
	}
	if len(failures) == 0 {
		return notFound(digest)
	}
	// A peer that did not answer may hold it: that is no "not found".
	return api.Errorf(api.Unavailable, "blob %s is not here, and not every other scheduler answered: %w", digest, joinErrors(api.Unavailable, failures))
}

// Delete implements Store for this machine's copy alone: every replica decides
// from the same committed state what is garbage, so nobody deletes from afar.
func (s *Replicated) Delete(ctx context.Context, digest api.Digest) error {
	s.mu.Lock()
	delete(s.confirmed, digest)
	s.mu.Unlock()
	return s.local.Delete(ctx, digest)
}
