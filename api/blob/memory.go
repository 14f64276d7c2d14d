package blob

import (
	"bytes"
	"context"
	"fmt"
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
		in := newIntake(ctx, r, limit)
		b, err := io.ReadAll(in)
		if err != nil {
			return fmt.Errorf("blob %s: %w", digest, err)
		}
		size = in.size
		if err := in.verify(digest); err != nil {
			return err
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.blobs == nil {
			m.blobs = make(map[api.Digest][]byte)
		}
		m.blobs[digest] = b
		return nil
	})
	return size, err
}

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
