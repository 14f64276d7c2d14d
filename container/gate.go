package container

import (
	"context"
	"sync"
)

// Gate lets one caller at a time through per key, so that work for one image
// is done once and the others find it done. Unlike a shared flight, each caller
// works under its own context: one that gives up does not fail the rest.
// The zero Gate is ready.
type Gate struct {
	mu   sync.Mutex // guards keys and the counts in it
	keys map[string]*turn
}

type turn struct {
	free   chan struct{} // holds one token while nobody is inside
	wanted int           // callers inside or waiting
}

// Enter blocks until the caller is alone with key, or ctx is done. The caller
// calls leave exactly once.
func (g *Gate) Enter(ctx context.Context, key string) (leave func(), err error) {
	g.mu.Lock()
	t := g.keys[key]
	if t == nil {
		t = &turn{free: make(chan struct{}, 1)}
		t.free <- struct{}{}
		if g.keys == nil {
			g.keys = make(map[string]*turn)
		}
		g.keys[key] = t
	}
	t.wanted++
	g.mu.Unlock()

	select {
	case <-t.free:
		return func() { t.free <- struct{}{}; g.release(key, t) }, nil
	case <-ctx.Done():
		g.release(key, t)
		return nil, context.Cause(ctx)
	}
}

func (g *Gate) release(key string, t *turn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if t.wanted--; t.wanted == 0 {
		delete(g.keys, key)
	}
}
