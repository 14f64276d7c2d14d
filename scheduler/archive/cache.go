package archive

import (
	"container/list"
	"sync"
)

// cache keeps what was read of segments: the least recently used goes once all
// of it is larger than max bytes. It is safe for concurrent use.
type cache struct {
	max int64

	mu    sync.Mutex // guards everything below
	items map[cacheKey]*list.Element
	order list.List // of *cached; the newest in front
	bytes int64
}

// cacheKey names a part of a segment.
type cacheKey struct {
	digest string
	part   part
	kind   kind
	number uint64
}

// part is what a key names; the rest of the key depends on it.
type part uint8

const (
	partFooter part = iota
	partList        // of the frames of a kind
	partFrame       // of a kind
	partPage        // of the table of job IDs
)

type cached struct {
	key   cacheKey
	value any
	bytes int64
}

// cacheOverhead is what an entry costs beside its value.
const cacheOverhead = 256

func newCache(maxBytes int64) *cache {
	return &cache{max: maxBytes, items: map[cacheKey]*list.Element{}}
}

func (c *cache) get(key cacheKey) (any, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.items[key]
	if !ok {
		return nil, false
	}
	c.order.MoveToFront(e)
	return e.Value.(*cached).value, true
}

// put keeps a value that must not be changed any more. One that would push out
// most of the others is not kept.
func (c *cache) put(key cacheKey, value any, bytes int64) {
	bytes += cacheOverhead
	if bytes > c.max/4 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.items[key]; ok {
		return // another reader was faster
	}
	c.items[key] = c.order.PushFront(&cached{key, value, bytes})
	for c.bytes += bytes; c.bytes > c.max; {
		old := c.order.Remove(c.order.Back()).(*cached)
		delete(c.items, old.key)
		c.bytes -= old.bytes
	}
}
