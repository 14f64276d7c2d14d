// Package table is a map that can be copied while it is in use: a copy costs
// the same however much is in there, and a write that comes later copies the
// small part that it touches.
package table

import (
	"iter"
	"maps"
	"math/bits"
)

const (
	// whole is how many entries a Map has before it is divided.
	whole = 1 << 10
	// shards is how many parts it is divided into. With a million entries the first
	// write to a part after a copy costs a tenth of a millisecond.
	shards = 1 << 10
)

// Map is a map from K to V. Like Go's own it is not safe for concurrent use, and
// its order is random. The zero value can't be used; see New.
type Map[K comparable, V any] struct {
	hash   func(K) uint64
	shards []shard[K, V] // one, or as many as the constant says
	len    int
	round  uint64 // how often the map was copied
}

// shard is one part. It belongs to this map alone if it was made in its round;
// otherwise a copy may share it.
type shard[K comparable, V any] struct {
	entries map[K]V
	round   uint64
}

// New is an empty map; hash spreads its keys over the parts.
func New[K comparable, V any](hash func(K) uint64) *Map[K, V] {
	return &Map[K, V]{hash: hash, shards: make([]shard[K, V], 1)}
}

// of is the part of a key.
func (m *Map[K, V]) of(k K) *shard[K, V] {
	if len(m.shards) == 1 {
		return &m.shards[0]
	}
	return &m.shards[m.hash(k)%shards]
}

// Get is the value of a key, or the zero value.
func (m *Map[K, V]) Get(k K) V { return m.of(k).entries[k] }

// Find is Get that says whether the key is there.
func (m *Map[K, V]) Find(k K) (V, bool) {
	v, ok := m.of(k).entries[k]
	return v, ok
}

// Len is the number of keys.
func (m *Map[K, V]) Len() int { return m.len }

// Set gives a key its value.
func (m *Map[K, V]) Set(k K, v V) {
	own := m.own(k)
	before := len(own)
	own[k] = v
	if m.len += len(own) - before; m.len > whole && len(m.shards) == 1 {
		m.divide()
	}
}

// Delete removes a key, if it is there.
func (m *Map[K, V]) Delete(k K) {
	if _, ok := m.Find(k); !ok {
		return
	}
	delete(m.own(k), k)
	m.len--
}

// own is the part of a key, once no copy of the map shares it.
func (m *Map[K, V]) own(k K) map[K]V {
	s := m.of(k)
	if s.round != m.round || s.entries == nil {
		if s.entries = maps.Clone(s.entries); s.entries == nil {
			s.entries = map[K]V{}
		}
		s.round = m.round
	}
	return s.entries
}

// divide makes parts of a map that has become large. It stays divided.
func (m *Map[K, V]) divide() {
	all := m.shards[0].entries
	m.shards, m.len = make([]shard[K, V], shards), 0
	for k, v := range all {
		m.Set(k, v)
	}
}

// Copy is a map with the same content. Neither sees what is written to the
// other. It may be read while this one is written.
func (m *Map[K, V]) Copy() *Map[K, V] {
	m.round++
	fresh := *m
	fresh.shards = append([]shard[K, V](nil), m.shards...)
	return &fresh
}

// All are the entries, in no order. The map must not be written meanwhile.
func (m *Map[K, V]) All() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		for i := range m.shards {
			for k, v := range m.shards[i].entries {
				if !yield(k, v) {
					return
				}
			}
		}
	}
}

// Keys are the keys, in no order.
func (m *Map[K, V]) Keys() iter.Seq[K] {
	return func(yield func(K) bool) {
		for k := range m.All() {
			if !yield(k) {
				return
			}
		}
	}
}

// Values are the values, in no order.
func (m *Map[K, V]) Values() iter.Seq[V] {
	return func(yield func(V) bool) {
		for _, v := range m.All() {
			if !yield(v) {
				return
			}
		}
	}
}

// The constants of wyhash (Wang Yi, public domain).
const (
	secret0 = 0xa0761d6478bd642f
	secret1 = 0xe7037ed1a0b428db
)

// HashString spreads strings. Whoever chooses them may make them collide; that
// costs time when a part is copied, and nothing else.
func HashString(s string) uint64 {
	h := uint64(len(s)) ^ secret0
	for ; len(s) >= 8; s = s[8:] {
		h = HashUint64(h ^ (uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24 |
			uint64(s[4])<<32 | uint64(s[5])<<40 | uint64(s[6])<<48 | uint64(s[7])<<56))
	}
	tail := uint64(0)
	for i := range len(s) {
		tail = tail<<8 | uint64(s[i])
	}
	return HashUint64(h ^ tail)
}

// HashUint64 spreads numbers.
func HashUint64(n uint64) uint64 {
	hi, lo := bits.Mul64(n^secret0, secret1)
	return hi ^ lo
}
