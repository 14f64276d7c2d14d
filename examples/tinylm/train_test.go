package main

import (
	"math"
	"testing"
)

var tinyConfig = config{Vocab: 256, Dim: 12, Layers: 2, Heads: 3, KVHeads: 1, Hidden: 10, Context: 16}

// The gradient is compared with what the loss does when a weight is moved.
func TestGradient(t *testing.T) {
	for _, c := range []config{tinyConfig, {Vocab: 256, Dim: 8, Layers: 1, Heads: 2, KVHeads: 2, Hidden: 6, Context: 16}} {
		w := newWeights[float64](c)
		w.initialize(5)
		r := &random{state: 9}
		for i := range w.all { // move the gains away from 1
			w.all[i] += 0.1 * r.normal()
		}
		tr := newTrainer(w)
		batch := []example{{"2+3=", "5"}, {"abca", "bc"}, {"", "z"}}
		tr.loss(batch)
		grad := append([]float64(nil), tr.grad.all...)
		embedded := make(map[int]bool)
		for _, token := range "2+3=5abcz\n\x00" {
			for k := range c.Dim {
				embedded[int(token)*c.Dim+k] = true
			}
		}
		checked := 0
		for i := range w.all {
			if i < len(w.embed) && !embedded[i] && i%37 != 0 {
				continue
			}
			const h = 1e-5
			old := w.all[i]
			w.all[i] = old + h
			up := tr.loss(batch)
			w.all[i] = old - h
			down := tr.loss(batch)
			w.all[i] = old
			want := (up - down) / (2 * h)
			if diff := math.Abs(grad[i] - want); diff > 1e-7+1e-5*math.Abs(want) {
				t.Fatalf("weight %d of %d: gradient %v, the loss says %v", i, len(w.all), grad[i], want)
			}
			checked++
		}
		t.Logf("%d weights checked", checked)
	}
}
