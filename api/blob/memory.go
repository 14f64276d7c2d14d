package blob

import (
	"bytes"
	"context"
	"crypto/sha256"
	"hash"
	"io"
	"sync"

	"github.com/musternet/muster/api"
)

// Memory is a store for tests, and for schedulers whose data may be lost. Its
// zero value is empty and ready.
type Memory struct {
	// Fail, if set, is asked before every operation ("put", "open", "stat",
	// "delete"); an error is returned in place of doing it.
	Fail func(op string, digest api.Digest) error
	// Lose, if set, is asked after every operation that worked; an error is
	// returned although the effect stays, like an answer lost on the way.
	Lose func(op string, digest api.Digest) error

	mu    sync.Mutex // guards blobs
	blobs map[api.Digest][]byte
}

var _ Store = (*Memory)(nil)

func (m *Memory) do(op string, digest api.Digest, f func() error) error {
	if err := checkDigest(digest); err != nil {
		return err
	}
	if m.Fail != nil {
		if err := m.Fail(op, digest); err != nil {
			return err
		}
	}
	if err := f(); err != nil {
		return err
	}
	if m.Lose != nil {
		return m.Lose(op, digest)
	}
	return nil
}

// Put implements Store.
func (m *Memory) Put(ctx context.Context, digest api.Digest, r io.Reader, limit int64) (size int64, err error) {
	err = m.do("put", digest, func() error {
		size, err = putStaged(ctx, memoryStager{m}, digest, newIntake(ctx, r, limit))
		return err
	})
	return size, err
}

func (m *Memory) stage(context.Context) (staged, error) {
	return &stagedMemory{m: m, sum: sha256.New(), ask: true}, nil
}

// memoryStager stages for Put, which asks Fail and Lose itself.
type memoryStager struct{ m *Memory }

func (s memoryStager) stage(context.Context) (staged, error) {
	return &stagedMemory{m: s.m, sum: sha256.New()}, nil
}

func (s memoryStager) Stat(_ context.Context, digest api.Digest) (int64, error) {
	b, err := s.m.get(digest)
	return int64(len(b)), err
}

// stagedMemory is an unfinished blob of a Memory.
type stagedMemory struct {
	m   *Memory
	b   bytes.Buffer
	sum hash.Hash
	ask bool // Fail and Lose
}

func (s *stagedMemory) append(in *intake) error {
	in.sum, in.size = s.sum, int64(s.b.Len())
	return in.copyTo(&s.b)
}

func (s *stagedMemory) length() int64 { return int64(s.b.Len()) }

func (s *stagedMemory) commit(_ context.Context, digest api.Digest) error {
	put := func() error {
		if err := verifySum(digest, s.sum, s.length()); err != nil {
			return err
		}
		s.m.mu.Lock()
		defer s.m.mu.Unlock()
		if s.m.blobs == nil {
			s.m.blobs = make(map[api.Digest][]byte)
		}
		s.m.blobs[digest] = s.b.Bytes()
		return nil
	}
	if !s.ask {
		return put()
	}
	return s.m.do("put", digest, put)
}

func (s *stagedMemory) discard() {}

func (m *Memory) get(digest api.Digest) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.blobs[digest]
	if !ok {
		return nil, notFound(digest)
	}
	return b, nil
}

// Open implements Store.
func (m *Memory) Open(ctx context.Context, digest api.Digest) (r Reader, err error) {
	err = m.do("open", digest, func() error {
		b, err := m.get(digest)
		r = memoryReader{bytes.NewReader(b)}
		return err
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

type memoryReader struct{ *bytes.Reader }

func (memoryReader) Close() error { return nil }

// Stat implements Store.
func (m *Memory) Stat(ctx context.Context, digest api.Digest) (size int64, err error) {
	err = m.do("stat", digest, func() error {
		b, err := m.get(digest)
		size = int64(len(b))
		return err
	})
	return size, err
}

// Delete implements Store.
func (m *Memory) Delete(ctx context.Context, digest api.Digest) error {
	return m.do("delete", digest, func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.blobs, digest)
		return nil
	})
}

// Len is the number of blobs.
func (m *Memory) Len() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.blobs)
}
