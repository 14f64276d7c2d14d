package wasm

import (
	"sync/atomic"

	"github.com/tetratelabs/wazero/experimental"
)

const pageBytes = 64 << 10 // of WebAssembly

// memoryLimit gives a program its linear memory and refuses to grow it beyond
// a limit. wazero's own limit refuses too, but tells nobody; from here a
// program that failed after a refusal is known to have run out of memory.
type memoryLimit struct {
	bytes   uint64
	refused atomic.Bool
}

var _ experimental.MemoryAllocator = (*memoryLimit)(nil)

func newMemoryLimit(bytes int64) *memoryLimit {
	return &memoryLimit{bytes: uint64(bytes) / pageBytes * pageBytes}
}

// Allocate implements experimental.MemoryAllocator.
func (l *memoryLimit) Allocate(_, maximum uint64) experimental.LinearMemory {
	return &linearMemory{limit: l, reserved: reserve(min(maximum, l.bytes))}
}

// linearMemory is address space for all that the program may ever use, so that
// growing neither copies nor moves it.
type linearMemory struct {
	limit    *memoryLimit
	reserved []byte
}

// Reallocate implements experimental.LinearMemory.
func (m *linearMemory) Reallocate(size uint64) []byte {
	if size > uint64(len(m.reserved)) {
		m.limit.refused.Store(true)
		return nil
	}
	return m.reserved[:size:size]
}

// Free implements experimental.LinearMemory.
func (m *linearMemory) Free() {
	release(m.reserved)
	m.reserved = nil
}
