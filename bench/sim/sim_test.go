package main

import (
	"fmt"
	"testing"
)

// BenchmarkDecision is a decision of the cost measurement.
func BenchmarkDecision(b *testing.B) {
	for _, workers := range quick.sizes {
		b.Run(fmt.Sprintf("workers=%d", workers), func(b *testing.B) {
			lockClock()
			c := measureCost(1, load{workers: workers, decisions: max(b.N, 5000), queued: 1_000_000})
			b.ReportMetric(c.engineNS, "engine-ns/op")
			b.ReportMetric(c.wholeNS, "whole-ns/op")
		})
	}
}
