package replica

import (
	"testing"
	"testing/synctest"
	"time"
)

// A leader whose clock is behind goes on from its predecessor's time, at the
// pace of time; one whose clock is ahead uses its own.
func TestClockGoesOnFromTheState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, ahead := range []time.Duration{-time.Hour, 0, time.Hour} {
			var c clock
			state := time.Now().Add(ahead).UnixMilli()
			c.set(state)
			start := c.now()
			if want := max(state, time.Now().UnixMilli()); start != want {
				t.Errorf("a state %s ahead: the clock starts at %d, want %d", ahead, start, want)
			}
			time.Sleep(90 * time.Second) // virtual time
			if got := c.now() - start; got != 90_000 {
				t.Errorf("a state %s ahead: 90 seconds took %d ms", ahead, got)
			}
		}
	})
}
