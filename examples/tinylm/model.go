package main

import (
	"fmt"
	"math"
)

// config is the shape of a network, in the words of the Llama papers.
type config struct {
	Vocab   int // tokens: the 256 bytes
	Dim     int // width of the residual stream
	Layers  int
	Heads   int // query heads
	KVHeads int // key and value heads, each shared by Heads/KVHeads query heads
	Hidden  int // width inside the feed-forward blocks
	Context int // most tokens in a sequence
}

// ropeTheta is the base of the rotary position angles, rmsEpsilon keeps a row
// of zeros from dividing by zero; both as in Llama.
const (
	ropeTheta  = 10000
	rmsEpsilon = 1e-5
)

func (c config) headDim() int { return c.Dim / c.Heads }
func (c config) kvDim() int   { return c.KVHeads * c.headDim() }

// check bounds what a weights file can ask for.
func (c config) check() error {
	for _, f := range []struct {
		name       string
		value, max int
	}{
		{"vocab", c.Vocab, 256}, {"dim", c.Dim, 1024}, {"layers", c.Layers, 32}, {"heads", c.Heads, 64},
		{"kv heads", c.KVHeads, 64}, {"hidden", c.Hidden, 4096}, {"context", c.Context, 4096},
	} {
		if f.value < 1 || f.value > f.max {
			return fmt.Errorf("%s %d: want 1 to %d", f.name, f.value, f.max)
		}
	}
	switch {
	case c.Dim%c.Heads != 0 || c.headDim()%2 != 0:
		return fmt.Errorf("dim %d: want an even multiple of %d heads", c.Dim, c.Heads)
	case c.Heads%c.KVHeads != 0:
		return fmt.Errorf("%d heads: want a multiple of %d kv heads", c.Heads, c.KVHeads)
	}
	return nil
}

// weights are the parameters of a network, or anything of the same shape. The
// matrices are views of one slice, row by row, each row the weights of one
// output.
type weights[F number] struct {
	config
	all    []F
	embed  []F // Vocab × Dim; also the output layer
	layers []layer[F]
	norm   []F // Dim
}

type layer[F number] struct {
	attnNorm []F // Dim
	wq       []F // Dim × Dim
	wk, wv   []F // kvDim × Dim
	wo       []F // Dim × Dim
	ffnNorm  []F // Dim
	w1, w3   []F // Hidden × Dim: the gate and what it lets through
	w2       []F // Dim × Hidden
}

func (c config) parameters() int {
	perLayer := 2*c.Dim + 2*c.Dim*c.Dim + 2*c.kvDim()*c.Dim + 3*c.Hidden*c.Dim
	return c.Vocab*c.Dim + c.Layers*perLayer + c.Dim
}

func newWeights[F number](c config) *weights[F] {
	w := &weights[F]{config: c, all: make([]F, c.parameters())}
	rest := w.all
	take := func(n int) []F {
		part := rest[:n:n]
		rest = rest[n:]
		return part
	}
	w.embed = take(c.Vocab * c.Dim)
	for range c.Layers {
		w.layers = append(w.layers, layer[F]{
			attnNorm: take(c.Dim),
			wq:       take(c.Dim * c.Dim), wk: take(c.kvDim() * c.Dim), wv: take(c.kvDim() * c.Dim), wo: take(c.Dim * c.Dim),
			ffnNorm: take(c.Dim),
			w1:      take(c.Hidden * c.Dim), w3: take(c.Hidden * c.Dim), w2: take(c.Dim * c.Hidden),
		})
	}
	w.norm = take(c.Dim)
	return w
}

// initialize draws the weights of an untrained network.
func (w *weights[F]) initialize(seed uint64) {
	r := &random{state: seed}
	fill := func(part []F, scale float64) {
		for i := range part {
			part[i] = F(float64(r.normal() * scale))
		}
	}
	ones := func(part []F) {
		for i := range part {
			part[i] = 1
		}
	}
	in := 1 / math.Sqrt(float64(w.Dim))
	// What is added to the residual stream starts smaller the more layers add.
	out := in / math.Sqrt(float64(2*w.Layers))
	fill(w.embed, 0.05)
	for _, l := range w.layers {
		ones(l.attnNorm)
		fill(l.wq, in)
		fill(l.wk, in)
		fill(l.wv, in)
		fill(l.wo, out)
		ones(l.ffnNorm)
		fill(l.w1, in)
		fill(l.w3, in)
		fill(l.w2, out*math.Sqrt(float64(w.Dim)/float64(w.Hidden)))
	}
	ones(w.norm)
}

// rotary holds the cosines and sines of the position angles.
type rotary[F number] struct {
	half     int // of the width of a head
	cos, sin []F // position × half
}

func newRotary[F number](c config) rotary[F] {
	r := rotary[F]{half: c.headDim() / 2}
	step := log(ropeTheta) / float64(r.half)
	for position := range c.Context {
		for i := range r.half {
			sin, cos := sincos(float64(float64(position) * exp(float64(-step*float64(i)))))
			r.cos, r.sin = append(r.cos, F(cos)), append(r.sin, F(sin))
		}
	}
	return r
}

// turn rotates each pair of neighbours in the heads of one row by the angles of
// its position, backwards for gradients.
func (r rotary[F]) turn(row []F, position int, back bool) {
	cos := r.cos[position*r.half : (position+1)*r.half]
	sin := r.sin[position*r.half : (position+1)*r.half]
	for head := 0; head < len(row); head += 2 * r.half {
		for i, c := range cos {
			s := sin[i]
			if back {
				s = -s
			}
			pair := row[head+2*i : head+2*i+2]
			pair[0], pair[1] = F(pair[0]*c)-F(pair[1]*s), F(pair[0]*s)+F(pair[1]*c)
		}
	}
}

// rmsNorm scales a row to a mean square of 1 and by the gains, and returns the
// factor it used.
func rmsNorm[F number](y, x, gain []F) F {
	sum := dot(x, x, 0)
	inverse := F(1 / math.Sqrt(float64(sum)/float64(len(x))+rmsEpsilon))
	for i, v := range x {
		y[i] = F(F(v*inverse) * gain[i])
	}
	return inverse
}

// silu is x times its logistic function, which it returns too.
func silu[F number](x F) (y, logistic F) {
	logistic = F(1 / (1 + exp(-float64(x))))
	return F(x * logistic), logistic
}

// attend mixes the value rows by how well their keys fit the query: one head,
// for the last of len(scores) positions. Keys and values of position s start at
// s*stride.
func attend[F number](out, scores, q, keys, values []F, stride int) {
	width := len(q)
	scale := F(1 / math.Sqrt(float64(width)))
	for s := range scores {
		scores[s] = F(dot(q, keys[s*stride:s*stride+width], 0) * scale)
	}
	softmax(scores)
	clear(out)
	for s, share := range scores {
		for i, v := range values[s*stride : s*stride+width] {
			out[i] += F(share * v)
		}
	}
}

func addTo[F number](y, x []F) {
	x = x[:len(y)]
	for i := range y {
		y[i] += x[i]
	}
}
