package main

import (
	"fmt"
	"testing"
)

// BenchmarkDecision is a decision of the cost measurement.
func BenchmarkDecision(b *testing.B) {
	for _, workers := range quick.sizes {
		b.Run(fmt.Sprintf("pack/workers=%d", workers), func(b *testing.B) { benchmarkDecision(b, load{workers: workers}) })
	}
	b.Run("spread/workers=5000", func(b *testing.B) { benchmarkDecision(b, load{workers: 5000, prefer: spread}) })
	b.Run("checked/workers=5000", func(b *testing.B) { benchmarkDecision(b, load{workers: 5000, checked: true}) })
}

func benchmarkDecision(b *testing.B, l load) {
	lockClock()
	l.decisions, l.queued = max(b.N, 5000), 1_000_000
	c := measureCost(1, l)
	b.ReportMetric(c.engineNS, "engine-ns/op")
	b.ReportMetric(c.wholeNS, "whole-ns/op")
}
