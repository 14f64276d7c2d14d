package client

import (
	"testing"
	"time"
)

// A worker finds the new leader soon after an election, and does not storm a
// cluster that stays away.
func TestRedialPauses(t *testing.T) {
	for range 100 {
		var wait, total time.Duration
		for range 8 {
			last := wait
			if wait = Redial(wait); wait < minRedial/2 || wait > 2*last+2*minRedial {
				t.Fatalf("a pause of %s after one of %s", wait, last)
			}
			total += wait
		}
		if total < 500*time.Millisecond || total > 10*time.Second {
			t.Fatalf("8 pauses take %s", total)
		}
		for range 30 {
			wait = Redial(wait)
		}
		if wait > MaxRedial || wait < MaxRedial/2 {
			t.Fatalf("the longest pause is %s", wait)
		}
	}
}
