package blob

import (
	"context"
	"io"
	"sync"
	"time"

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
		ctx: ctx, cancel: cancel,
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
	size, err := s.local.Put(ctx, digest, r, limit)
	if err != nil {
		return 0, err
	}
	return size, s.replicate(ctx, digest, size)
}

// replicate waits until need copies of a local blob are durable.
func (s *Replicated) replicate(ctx context.Context, digest api.Digest, size int64) error {
	s.mu.Lock()
	if _, ok := s.confirmed[digest]; ok || s.closed {
		closed := s.closed
		s.mu.Unlock()
		if closed {
			return api.Errorf(api.Unavailable, "blob %s: the scheduler is shutting down", digest)
		}
		return nil
	}
	peers := s.peers()
	s.copies.Add(len(peers))
	s.mu.Unlock()

	done := make(chan error, len(peers))
	for _, peer := range peers {
		go func() {
			defer s.copies.Done()
			done <- s.copyTo(peer, digest)
		}()
	}
	have, need := 1, s.need()
	var failures []error
	for range peers {
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

func (s *Replicated) confirm(digest api.Digest, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.confirmed) >= maxConfirmed {
		clear(s.confirmed) // they are confirmed again as they are asked for
	}
	s.confirmed[digest] = size
}

func (s *Replicated) copyTo(peer Store, digest api.Digest) error {
	ctx, cancel := context.WithTimeout(s.ctx, copyTimeout)
	defer cancel()
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
	return size, s.replicate(ctx, digest, size)
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
		return api.Errorf(api.Unavailable, "blob %s: the scheduler is shutting down", digest)
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
