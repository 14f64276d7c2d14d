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
	l.decisions, l.queued = max(b.N, 5000), 1_000_000
	c := measureCost(1, l)
	b.ReportMetric(c.engineNS, "engine-ns/op")
	b.ReportMetric(c.wholeNS, "whole-ns/op")
}

// The simulation follows from its seed, and shows what it is there to show.
func TestSimulation(t *testing.T) {
	c, again := measureContention(1, 40, 2), measureContention(1, 40, 2)
	if c.decisions != again.decisions || c.jain != again.jain || fmt.Sprint(c.waitS) != fmt.Sprint(again.waitS) {
		t.Errorf("%+v, and with the same seed %+v", c, again)
	}
	if c.jain < 0.9 || c.jain > 1 || c.used < 0.9 || c.used > 1 {
		t.Errorf("shares of equal customers have index %.3f, %.3f of the GPUs are used", c.jain, c.used)
	}
	if wait := c.waitS["gpu8"]; wait <= 0 || wait > 3600 {
		t.Errorf("a task of 8 GPUs waited for %.0f s", wait)
	}
	over, decisions := measureMakespan(1, 20, 400)
	if over < 1 || over > 3 || decisions < 300 {
		t.Errorf("%d decisions took %.2f times the lower bound", decisions, over)
	}
	for _, l := range []load{{workers: 50}, {workers: 50, prefer: spread}, {workers: 50, checked: true}} {
		l.decisions, l.queued = 500, 10_000
		if c := measureCost(1, l); c.decisions < 500 || c.queued < 9000 || c.engineNS <= 0 || c.wholeNS < c.engineNS {
			t.Errorf("%+v: %+v", l, c)
		}
	}
}
