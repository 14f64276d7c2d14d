package replica

import (
	"sync/atomic"
	"time"
)

// clock is the time that commands are stamped with, and that the leader's loops
// compare with. It starts where the state is, or at this machine's clock where
// that is ahead, and goes on at the pace of time itself: a new leader whose
// clock is behind its predecessor's would otherwise stamp the same moment again
// and again, and work done then would cost nothing.
type clock struct{ anchor atomic.Pointer[anchor] }

type anchor struct {
	unixMS int64
	at     time.Time // with its monotonic reading
}

// set anchors the clock to the newest time that the state has seen.
func (c *clock) set(stateUnixMS int64) {
	at := time.Now()
	c.anchor.Store(&anchor{max(stateUnixMS, at.UnixMilli()), at})
}

// now is the time in milliseconds since 1970.
func (c *clock) now() int64 {
	if a := c.anchor.Load(); a != nil {
		return a.unixMS + time.Since(a.at).Milliseconds()
	}
	return time.Now().UnixMilli()
}
