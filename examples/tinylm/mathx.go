package main

import "math"

// A completion is compared bit by bit with that of another machine, so nothing
// here may depend on the architecture. Products stand inside explicit
// conversions, which by the Go specification keeps a compiler from fusing x*y+z
// into one rounding, and the functions that package math implements in assembly
// on some machines are these instead. They are good to about 1e-15.

// number is the type that a network computes in: float32 when it is used,
// float64 where a test needs the digits.
type number interface{ float32 | float64 }

const (
	ln2High = 6.93147180369123816490e-01 // the upper bits of ln 2, then the rest
	ln2Low  = 1.90821492927058770002e-10
)

// exp is e^x.
func exp(x float64) float64 {
	switch {
	case x != x:
		return x
	case x > 709:
		return math.Inf(1)
	case x < -708:
		return 0
	}
	k := math.Floor(float64(x*math.Log2E) + 0.5)
	r := (x - float64(k*ln2High)) - float64(k*ln2Low)
	sum := 1.0
	for n := 13.0; n >= 1; n-- {
		sum = 1 + float64(float64(r*sum)/n)
	}
	return float64(sum * math.Float64frombits(uint64(int64(k)+1023)<<52))
}

// log is the natural logarithm of a positive, normal x.
func log(x float64) float64 {
	bits := math.Float64bits(x)
	k := float64(int64(bits>>52) - 1023)
	m := math.Float64frombits(bits&(1<<52-1) | 1023<<52)
	if m > math.Sqrt2 {
		m, k = m/2, k+1
	}
	s := (m - 1) / (m + 1)
	s2 := float64(s * s)
	sum := 0.0
	for n := 23.0; n >= 1; n -= 2 {
		sum = 1/n + float64(s2*sum)
	}
	return float64(2*float64(s*sum)) + float64(k*ln2Low) + float64(k*ln2High)
}

// sincos reduces x to within pi/4 and sums the Taylor series; good for |x| up
// to some thousands.
func sincos(x float64) (sin, cos float64) {
	const halfPiHigh, halfPiLow = 1.57079632673412561417e+00, 6.07710050650619224932e-11
	k := math.Floor(float64(x*(2/math.Pi)) + 0.5)
	r := (x - float64(k*halfPiHigh)) - float64(k*halfPiLow)
	r2 := float64(r * r)
	sin, cos = 1, 1
	for n := 17.0; n > 1; n -= 2 {
		sin = 1 - float64(float64(sin*r2)/float64(n*(n-1)))
		cos = 1 - float64(float64(cos*r2)/float64((n-1)*(n-2)))
	}
	sin = float64(sin * r)
	switch int64(k) & 3 {
	case 1:
		return cos, -sin
	case 2:
		return -sin, -cos
	case 3:
		return -cos, sin
	}
	return sin, cos
}

// mulT sets y, or with add adds to it, the product of x and the transpose of w:
//
//	y[r][c] = Σ_k x[r][k] · w[c][k]     x is rows×inner, w is cols×inner
//
// Each sum runs over k in order, whatever the block it is computed in, so a row
// comes out the same alone and in a batch.
func mulT[F number](y, x, w []F, rows, cols, inner int, add bool) {
	r := 0
	for ; r+2 <= rows; r += 2 {
		mulPair(y[r*cols:(r+2)*cols], x[r*inner:(r+2)*inner], w, cols, inner, add)
	}
	if r < rows {
		mulRow(y[r*cols:(r+1)*cols], x[r*inner:(r+1)*inner], w, cols, inner, add)
	}
}

// mulPair does two rows with four columns at a time: eight sums in registers,
// which hide the latency of addition and halve the loads.
func mulPair[F number](y, x, w []F, cols, inner int, add bool) {
	y0, y1 := y[:cols], y[cols:2*cols]
	x0 := x[:inner]
	x1 := x[inner:][:len(x0)]
	c := 0
	for ; c+4 <= cols; c += 4 {
		w0 := w[c*inner:][:len(x0)]
		w1 := w[(c+1)*inner:][:len(x0)]
		w2 := w[(c+2)*inner:][:len(x0)]
		w3 := w[(c+3)*inner:][:len(x0)]
		var a0, a1, a2, a3, b0, b1, b2, b3 F
		if add {
			a0, a1, a2, a3 = y0[c], y0[c+1], y0[c+2], y0[c+3]
			b0, b1, b2, b3 = y1[c], y1[c+1], y1[c+2], y1[c+3]
		}
		for k, a := range x0 {
			b := x1[k]
			v := w0[k]
			a0 += F(a * v)
			b0 += F(b * v)
			v = w1[k]
			a1 += F(a * v)
			b1 += F(b * v)
			v = w2[k]
			a2 += F(a * v)
			b2 += F(b * v)
			v = w3[k]
			a3 += F(a * v)
			b3 += F(b * v)
		}
		y0[c], y0[c+1], y0[c+2], y0[c+3] = a0, a1, a2, a3
		y1[c], y1[c+1], y1[c+2], y1[c+3] = b0, b1, b2, b3
	}
	for ; c < cols; c++ {
		column := w[c*inner : (c+1)*inner]
		y0[c] = dot(x0, column, start(y0[c], add))
		y1[c] = dot(x1, column, start(y1[c], add))
	}
}

func mulRow[F number](y, x, w []F, cols, inner int, add bool) {
	x = x[:inner]
	c := 0
	for ; c+4 <= cols; c += 4 {
		w0 := w[c*inner:][:len(x)]
		w1 := w[(c+1)*inner:][:len(x)]
		w2 := w[(c+2)*inner:][:len(x)]
		w3 := w[(c+3)*inner:][:len(x)]
		var a0, a1, a2, a3 F
		if add {
			a0, a1, a2, a3 = y[c], y[c+1], y[c+2], y[c+3]
		}
		for k, a := range x {
			a0 += F(a * w0[k])
			a1 += F(a * w1[k])
			a2 += F(a * w2[k])
			a3 += F(a * w3[k])
		}
		y[c], y[c+1], y[c+2], y[c+3] = a0, a1, a2, a3
	}
	for ; c < cols; c++ {
		y[c] = dot(x, w[c*inner:(c+1)*inner], start(y[c], add))
	}
}

func start[F number](y F, add bool) F {
	if add {
		return y
	}
	return 0
}

// dot adds the dot product of a and b to sum.
func dot[F number](a, b []F, sum F) F {
	b = b[:len(a)]
	for i, v := range a {
		sum += F(v * b[i])
	}
	return sum
}

// transposed writes the transpose of the rows×cols matrix a to t.
func transposed[F number](t, a []F, rows, cols int) []F {
	t = t[:rows*cols]
	for r := range rows {
		for c, v := range a[r*cols : (r+1)*cols] {
			t[c*rows+r] = v
		}
	}
	return t
}

// softmax turns scores into shares that sum to 1, in place.
func softmax[F number](scores []F) {
	most := scores[0]
	for _, s := range scores[1:] {
		most = max(most, s)
	}
	sum := 0.0
	for i, s := range scores {
		e := exp(float64(s - most))
		scores[i] = F(e)
		sum += e
	}
	for i := range scores {
		scores[i] = F(float64(scores[i]) / sum)
	}
}

// random is SplitMix64.
type random struct{ state uint64 }

func (r *random) bits() uint64 {
	r.state += 0x9e3779b97f4a7c15
	z := r.state
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// below is uniform in [0, n), up to a bias of n/2^64.
func (r *random) below(n int) int { return int(r.bits() % uint64(n)) }

// normal is close to the standard normal distribution: twelve uniform numbers
// have a variance of 1.
func (r *random) normal() float64 {
	sum := -6.0
	for range 12 {
		sum += float64(float64(r.bits()>>11) * 0x1p-53)
	}
	return sum
}
