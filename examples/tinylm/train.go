package main

import "math"

// example is one line of the corpus. The loss counts the tokens of the answer
// and the end after it; the question is given.
type example struct{ prompt, answer string }

// tokens are what the network reads and, for each, what it should say next;
// -1 where that does not count.
func (e example) tokens() (read []byte, next []int) {
	read = append(append([]byte{begin}, e.prompt...), e.answer...)
	next = make([]int, len(read))
	for i := range next {
		switch at := i + 1; {
		case at <= len(e.prompt):
			next[i] = -1
		case at < len(read):
			next[i] = int(read[at])
		default:
			next[i] = int(end)
		}
	}
	return read, next
}

// trainer computes the loss of a batch and its gradient by every weight.
type trainer[F number] struct {
	w, grad *weights[F]
	angles  rotary[F]
	layers  []activations[F]

	tokens   []byte
	next     []int
	position []int
	starts   []int // where each example begins, and the end of the last

	x, dx, dh     []F // rows × Dim
	final         []F // rows × Dim: the last norm of x
	finalInverse  []F
	dq, dk, dv    []F
	dmixed        []F
	dact, dgate   []F // rows × Hidden
	dup           []F
	dscores       []F
	left, right   []F // for transposes
	counted       []int
	picked, dpick []F // counted rows × Dim
	logits        []F // counted rows × Vocab
}

// activations are what the backward pass needs of a layer's forward pass.
type activations[F number] struct {
	in, h1, q, k, v, mixed []F
	inverse1, inverse2     []F
	shares                 []F // attention, example by example, head by head
	middle, h2             []F
	gate, up, act          []F
}

func newTrainer[F number](w *weights[F]) *trainer[F] {
	return &trainer[F]{
		w: w, grad: newWeights[F](w.config), angles: newRotary[F](w.config),
		layers: make([]activations[F], w.Layers),
	}
}

// sized returns a slice of n values, reusing old when it is large enough.
func sized[F any](old []F, n int) []F {
	if cap(old) < n {
		return make([]F, n)
	}
	return old[:n]
}

// load lays the examples end to end.
func (t *trainer[F]) load(batch []example) {
	t.tokens, t.next, t.position, t.starts, t.counted = t.tokens[:0], t.next[:0], t.position[:0], t.starts[:0], t.counted[:0]
	shares := 0
	for _, e := range batch {
		read, next := e.tokens()
		t.starts = append(t.starts, len(t.tokens))
		for i := range read {
			if next[i] >= 0 {
				t.counted = append(t.counted, len(t.tokens)+i)
			}
			t.position = append(t.position, i)
		}
		t.tokens, t.next = append(t.tokens, read...), append(t.next, next...)
		shares += len(read) * len(read)
	}
	t.starts = append(t.starts, len(t.tokens))
	rows, c := len(t.tokens), t.w.config
	for _, s := range []*[]F{&t.x, &t.dx, &t.dh, &t.final, &t.dq, &t.dmixed} {
		*s = sized(*s, rows*c.Dim)
	}
	for _, s := range []*[]F{&t.dact, &t.dgate, &t.dup} {
		*s = sized(*s, rows*c.Hidden)
	}
	t.dk, t.dv = sized(t.dk, rows*c.kvDim()), sized(t.dv, rows*c.kvDim())
	t.finalInverse = sized(t.finalInverse, rows)
	t.dscores = sized(t.dscores, c.Context)
	widest := max(c.Dim, c.Hidden, c.Vocab)
	t.left = sized(t.left, max(rows, widest)*widest)
	t.right = sized(t.right, max(rows, widest)*widest)
	t.picked, t.dpick = sized(t.picked, len(t.counted)*c.Dim), sized(t.dpick, len(t.counted)*c.Dim)
	t.logits = sized(t.logits, len(t.counted)*c.Vocab)
	for i := range t.layers {
		a := &t.layers[i]
		for _, s := range []*[]F{&a.in, &a.h1, &a.q, &a.mixed, &a.middle, &a.h2} {
			*s = sized(*s, rows*c.Dim)
		}
		for _, s := range []*[]F{&a.gate, &a.up, &a.act} {
			*s = sized(*s, rows*c.Hidden)
		}
		a.k, a.v = sized(a.k, rows*c.kvDim()), sized(a.v, rows*c.kvDim())
		a.inverse1, a.inverse2 = sized(a.inverse1, rows), sized(a.inverse2, rows)
		a.shares = sized(a.shares, shares*c.Heads)
	}
}

// loss runs the network over the batch and returns the mean loss of the counted
// tokens, in nats. The gradient is left in t.grad.
func (t *trainer[F]) loss(batch []example) float64 {
	t.load(batch)
	t.forward()
	loss := t.output()
	t.backward()
	return loss
}

func (t *trainer[F]) rows() int { return len(t.tokens) }

func (t *trainer[F]) normRows(y, inverse, x, gain []F) {
	d := t.w.Dim
	for r := range t.rows() {
		inverse[r] = rmsNorm(y[r*d:(r+1)*d], x[r*d:(r+1)*d], gain)
	}
}

func (t *trainer[F]) forward() {
	w, rows, d, kv, f := t.w, t.rows(), t.w.Dim, t.w.kvDim(), t.w.Hidden
	for r, token := range t.tokens {
		copy(t.x[r*d:(r+1)*d], w.embed[int(token)*d:])
	}
	for n := range w.layers {
		l, a := &w.layers[n], &t.layers[n]
		copy(a.in, t.x)
		t.normRows(a.h1, a.inverse1, a.in, l.attnNorm)
		mulT(a.q, a.h1, l.wq, rows, d, d, false)
		mulT(a.k, a.h1, l.wk, rows, kv, d, false)
		mulT(a.v, a.h1, l.wv, rows, kv, d, false)
		for r, position := range t.position {
			t.angles.turn(a.q[r*d:(r+1)*d], position, false)
			t.angles.turn(a.k[r*kv:(r+1)*kv], position, false)
		}
		t.eachHead(a, func(q, k, mixed, shares []F, _, key, length int) {
			width := w.headDim()
			v := a.v[key:]
			for s := range length {
				attend(mixed[s*d:s*d+width], shares[s*length:s*length+s+1], q[s*d:s*d+width], k, v, kv)
			}
		})
		mulT(t.x, a.mixed, l.wo, rows, d, d, true)
		copy(a.middle, t.x)
		t.normRows(a.h2, a.inverse2, a.middle, l.ffnNorm)
		mulT(a.gate, a.h2, l.w1, rows, f, d, false)
		mulT(a.up, a.h2, l.w3, rows, f, d, false)
		for i, g := range a.gate {
			y, _ := silu(g)
			a.act[i] = F(y * a.up[i])
		}
		mulT(t.x, a.act, l.w2, rows, d, f, true)
	}
	t.normRows(t.final, t.finalInverse, t.x, w.norm)
}

// eachHead calls do for every head of every example with views that start at
// its first row: q and mixed with a stride of Dim, k with a stride of kvDim, and
// the attention shares, length × length. query and key are the offsets of q in
// a.q and of k in a.k.
func (t *trainer[F]) eachHead(a *activations[F], do func(q, k, mixed, shares []F, query, key, length int)) {
	w, at := t.w, 0
	for e := range len(t.starts) - 1 {
		length := t.starts[e+1] - t.starts[e]
		for head := range w.Heads {
			query := t.starts[e]*w.Dim + head*w.headDim()
			key := t.starts[e]*w.kvDim() + head/(w.Heads/w.KVHeads)*w.headDim()
			do(a.q[query:], a.k[key:], a.mixed[query:], a.shares[at:at+length*length], query, key, length)
			at += length * length
		}
	}
}

// output computes the loss and puts its gradient by the last norm into dh.
func (t *trainer[F]) output() float64 {
	w, d := t.w, t.w.Dim
	clear(t.grad.all)
	for i, r := range t.counted {
		copy(t.picked[i*d:(i+1)*d], t.final[r*d:(r+1)*d])
	}
	n := len(t.counted)
	mulT(t.logits, t.picked, w.embed, n, w.Vocab, d, false)
	loss := 0.0
	for i, r := range t.counted {
		row := t.logits[i*w.Vocab : (i+1)*w.Vocab]
		softmax(row)
		loss -= log(max(float64(row[t.next[r]]), 1e-30))
		row[t.next[r]]--
		for j := range row {
			row[j] /= F(n)
		}
	}
	t.through(t.dpick, t.grad.embed, t.logits, t.picked, w.embed, n, w.Vocab, d, false)
	clear(t.dh)
	for i, r := range t.counted {
		copy(t.dh[r*d:(r+1)*d], t.dpick[i*d:(i+1)*d])
	}
	return loss / float64(n)
}

// through is the backward pass of y = x·wᵀ: it sets, or adds to, dx and adds to
// dw. Both are the same kind of product, of transposes.
func (t *trainer[F]) through(dx, dw, dy, x, w []F, rows, cols, inner int, add bool) {
	mulT(dx, dy, transposed(t.right, w, cols, inner), rows, inner, cols, add)
	mulT(dw, transposed(t.left, dy, rows, cols), transposed(t.right, x, rows, inner), cols, inner, rows, true)
}

// normBack adds to dx the gradient of rmsNorm by its input, and to dgain that by
// its gains.
func (t *trainer[F]) normBack(dx, dgain, dy, x, gain, inverse []F) {
	d := t.w.Dim
	for r := range t.rows() {
		dyr, xr, dxr := dy[r*d:(r+1)*d], x[r*d:(r+1)*d], dx[r*d:(r+1)*d]
		inv := inverse[r]
		var sum F
		for i, v := range dyr {
			dgain[i] += F(F(v*xr[i]) * inv)
			sum += F(F(v*gain[i]) * xr[i])
		}
		sum = F(F(sum*F(inv*F(inv*inv))) / F(d))
		for i, v := range dyr {
			dxr[i] += F(F(v*gain[i])*inv) - F(xr[i]*sum)
		}
	}
}

func (t *trainer[F]) backward() {
	w, g, rows, d, kv, f := t.w, t.grad, t.rows(), t.w.Dim, t.w.kvDim(), t.w.Hidden
	clear(t.dx)
	t.normBack(t.dx, g.norm, t.dh, t.x, w.norm, t.finalInverse)
	for n := w.Layers - 1; n >= 0; n-- {
		l, dl, a := &w.layers[n], &g.layers[n], &t.layers[n]

		t.through(t.dact, dl.w2, t.dx, a.act, l.w2, rows, d, f, false)
		for i, v := range t.dact {
			y, s := silu(a.gate[i])
			t.dup[i] = F(v * y)
			slope := F(s * (1 + F(a.gate[i]*(1-s))))
			t.dgate[i] = F(F(v*a.up[i]) * slope)
		}
		t.through(t.dh, dl.w1, t.dgate, a.h2, l.w1, rows, f, d, false)
		t.through(t.dh, dl.w3, t.dup, a.h2, l.w3, rows, f, d, true)
		t.normBack(t.dx, dl.ffnNorm, t.dh, a.middle, l.ffnNorm, a.inverse2)

		t.through(t.dmixed, dl.wo, t.dx, a.mixed, l.wo, rows, d, d, false)
		t.attentionBack(a)
		for r, position := range t.position {
			t.angles.turn(t.dq[r*d:(r+1)*d], position, true)
			t.angles.turn(t.dk[r*kv:(r+1)*kv], position, true)
		}
		t.through(t.dh, dl.wq, t.dq, a.h1, l.wq, rows, d, d, false)
		t.through(t.dh, dl.wk, t.dk, a.h1, l.wk, rows, kv, d, true)
		t.through(t.dh, dl.wv, t.dv, a.h1, l.wv, rows, kv, d, true)
		t.normBack(t.dx, dl.attnNorm, t.dh, a.in, l.attnNorm, a.inverse1)
	}
	for r, token := range t.tokens {
		addTo(g.embed[int(token)*d:(int(token)+1)*d], t.dx[r*d:(r+1)*d])
	}
}

// attentionBack turns dmixed into dq, dk and dv.
func (t *trainer[F]) attentionBack(a *activations[F]) {
	d, kv, width := t.w.Dim, t.w.kvDim(), t.w.headDim()
	scale := F(1 / math.Sqrt(float64(width)))
	clear(t.dq)
	clear(t.dk)
	clear(t.dv)
	t.eachHead(a, func(q, k, _, shares []F, query, key, length int) {
		for row := range length {
			dout := t.dmixed[query+row*d : query+row*d+width]
			share := shares[row*length : row*length+row+1]
			dscore := t.dscores[:row+1]
			var mean F
			for s := range share {
				at := key + s*kv
				dscore[s] = dot(dout, a.v[at:at+width], 0)
				mean += F(share[s] * dscore[s])
				dv := t.dv[at : at+width]
				for i, v := range dout {
					dv[i] += F(share[s] * v)
				}
			}
			qr, dq := q[row*d:row*d+width], t.dq[query+row*d:query+row*d+width]
			for s := range share {
				slope := F(F(share[s]*(dscore[s]-mean)) * scale)
				kr, dk := k[s*kv:s*kv+width], t.dk[key+s*kv:key+s*kv+width]
				for i := range kr {
					dq[i] += F(slope * kr[i])
					dk[i] += F(slope * qr[i])
				}
			}
		}
	})
}

// recipe is everything besides the corpus that decides what training yields.
type recipe struct {
	config
	seed   uint64
	steps  int
	batch  int     // examples per step
	rate   float64 // peak learning rate; it rises over warmup steps, then falls to a twentieth
	warmup int
	decay  float64 // of matrices, not of gains and embeddings
	clip   float64 // most norm of a gradient
}

// The constants of AdamW.
const (
	adamMean    = 0.9
	adamSquare  = 0.98
	adamEpsilon = 1e-8
)

// train makes a network from the corpus. The same recipe and corpus give the
// same weights, to the bit. report is called after each step.
func train(r recipe, corpus []example, report func(step int, loss float64)) *weights[float32] {
	w := newWeights[float32](r.config)
	w.initialize(r.seed)
	t := newTrainer(w)
	order := &shuffler{random: random{state: r.seed + 1}, n: len(corpus)}
	adam := newAdam(w)
	batch := make([]example, r.batch)
	for step := range r.steps {
		for i := range batch {
			batch[i] = corpus[order.next()]
		}
		loss := t.loss(batch)
		adam.step(t.grad.all, r, step)
		report(step+1, loss)
	}
	return w
}

// shuffler walks through the corpus again and again, each time in a new order.
type shuffler struct {
	random
	n     int
	order []int
}

func (s *shuffler) next() int {
	if len(s.order) == 0 {
		for i := range s.n {
			s.order = append(s.order, i)
		}
		for i := s.n - 1; i > 0; i-- {
			j := s.below(i + 1)
			s.order[i], s.order[j] = s.order[j], s.order[i]
		}
	}
	i := s.order[0]
	s.order = s.order[1:]
	return i
}

// adam is AdamW (Loshchilov and Hutter, 2019) with a clipped gradient.
type adam struct {
	w            *weights[float32]
	decays       []bool
	mean, square []float32
	power1       float64 // adamMean and adamSquare to the power of the step
	power2       float64
}

func newAdam(w *weights[float32]) *adam {
	n := len(w.all)
	a := &adam{w: w, decays: make([]bool, n), mean: make([]float32, n), square: make([]float32, n), power1: 1, power2: 1}
	mask := newWeights[float32](w.config)
	for _, l := range mask.layers {
		for _, m := range [][]float32{l.wq, l.wk, l.wv, l.wo, l.w1, l.w2, l.w3} {
			for i := range m {
				m[i] = 1
			}
		}
	}
	for i, v := range mask.all {
		a.decays[i] = v == 1
	}
	return a
}

func (a *adam) step(grad []float32, r recipe, step int) {
	sum := 0.0
	for _, g := range grad {
		sum += float64(float64(g) * float64(g))
	}
	scale := min(1, r.clip/(math.Sqrt(sum)+1e-12))
	rate := r.rate * float64(step+1) / float64(r.warmup)
	if step >= r.warmup {
		rate = r.rate * (0.05 + float64(0.95*float64(r.steps-step)/float64(r.steps-r.warmup)))
	}
	a.power1, a.power2 = float64(a.power1*adamMean), float64(a.power2*adamSquare)
	fix1, fix2 := 1/(1-a.power1), 1/(1-a.power2)
	for i, v := range grad {
		g := float64(float64(v) * scale)
		m := float64(adamMean*float64(a.mean[i])) + float64((1-adamMean)*g)
		s := float64(adamSquare*float64(a.square[i])) + float64((1-adamSquare)*float64(g*g))
		a.mean[i], a.square[i] = float32(m), float32(s)
		move := float64(m*fix1) / (math.Sqrt(float64(s*fix2)) + adamEpsilon)
		if a.decays[i] {
			move += float64(r.decay * float64(a.w.all[i]))
		}
		a.w.all[i] = float32(float64(a.w.all[i]) - float64(rate*move))
	}
}
