package client

import (
	"math/rand/v2"
	"time"
)

// MaxRedial is the longest pause between two dials of a worker, minRedial the
// shortest after one at once.
const (
	minRedial = 50 * time.Millisecond
	MaxRedial = 5 * time.Second
)

// Redial is a worker's pause after one of the given length. It grows slowly,
// since an election is over within a second, and by chance, since all workers
// begin to dial at the same moment when a leader dies.
func Redial(wait time.Duration) time.Duration {
	next := max(wait+wait/2, minRedial)
	return min(next-next/4+rand.N(next/2), MaxRedial)
}
