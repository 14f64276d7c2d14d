package main

import "math"

// Every product that feeds a sum in this program stands inside an explicit
// float64(): the Go specification lets a compiler fuse x*y+z into one rounding,
// except across such a conversion. With it, and with no function of package
// math beyond Sqrt and other exactly rounded ones, a frame is the same bits on
// every architecture.

type vec struct{ x, y, z float64 }

func (a vec) add(b vec) vec { return vec{a.x + b.x, a.y + b.y, a.z + b.z} }
func (a vec) sub(b vec) vec { return vec{a.x - b.x, a.y - b.y, a.z - b.z} }
func (a vec) neg() vec      { return vec{-a.x, -a.y, -a.z} }

func (a vec) mul(b vec) vec {
	return vec{float64(a.x * b.x), float64(a.y * b.y), float64(a.z * b.z)}
}

func (a vec) scale(k float64) vec {
	return vec{float64(a.x * k), float64(a.y * k), float64(a.z * k)}
}

func (a vec) dot(b vec) float64 {
	return float64(a.x*b.x) + float64(a.y*b.y) + float64(a.z*b.z)
}

func (a vec) cross(b vec) vec {
	return vec{
		float64(a.y*b.z) - float64(a.z*b.y),
		float64(a.z*b.x) - float64(a.x*b.z),
		float64(a.x*b.y) - float64(a.y*b.x),
	}
}

func (a vec) length() float64 { return math.Sqrt(a.dot(a)) }

// unit is a scaled to length 1; a must not be zero.
func (a vec) unit() vec { return a.scale(1 / a.length()) }

func (a vec) max() float64 { return max(a.x, a.y, a.z) }

func (a vec) min(b vec) vec  { return vec{min(a.x, b.x), min(a.y, b.y), min(a.z, b.z)} }
func (a vec) most(b vec) vec { return vec{max(a.x, b.x), max(a.y, b.y), max(a.z, b.z)} }

func (a vec) axis(i int) float64 {
	switch i {
	case 0:
		return a.x
	case 1:
		return a.y
	}
	return a.z
}

// mix goes from a (k = 0) to b (k = 1).
func mix(a, b vec, k float64) vec { return a.scale(1 - k).add(b.scale(k)) }

// reflect mirrors d at a surface with normal n.
func reflect(d, n vec) vec { return d.sub(n.scale(2 * d.dot(n))) }

// basis returns two directions that make an orthonormal basis with n (Duff et
// al., "Building an Orthonormal Basis, Revisited", JCGT 2017).
func basis(n vec) (vec, vec) {
	sign := 1.0
	if n.z < 0 {
		sign = -1
	}
	a := -1 / (sign + n.z)
	b := float64(float64(n.x*n.y) * a)
	return vec{1 + float64(sign*float64(float64(n.x*n.x)*a)), float64(sign * b), float64(-sign * n.x)},
		vec{b, sign + float64(float64(n.y*n.y)*a), -n.y}
}

// sincosDegrees is exact to about 1e-15 and the same bits everywhere, which
// math.Sincos does not promise.
func sincosDegrees(degrees float64) (sin, cos float64) {
	quarter := math.Floor(degrees/90 + 0.5)
	sin, cos = sincosEighth((degrees - float64(quarter*90)) * (math.Pi / 180))
	switch int(math.Mod(quarter, 4)+4) % 4 {
	case 1:
		sin, cos = cos, -sin
	case 2:
		sin, cos = -sin, -cos
	case 3:
		sin, cos = -cos, sin
	}
	return sin, cos
}

// sincosEighth sums the Taylor series for |x| up to pi/4, where eight terms
// reach the last bits of a float64.
func sincosEighth(x float64) (sin, cos float64) {
	x2 := float64(x * x)
	s, c := sinTerms[7], cosTerms[7]
	for k := 6; k >= 0; k-- {
		s = sinTerms[k] + float64(s*x2)
		c = cosTerms[k] + float64(c*x2)
	}
	return float64(s * x), c
}

var (
	sinTerms = [8]float64{1, -1. / 6, 1. / 120, -1. / 5040, 1. / 362880, -1. / 39916800, 1. / 6227020800, -1. / 1307674368000}
	cosTerms = [8]float64{1, -1. / 2, 1. / 24, -1. / 720, 1. / 40320, -1. / 3628800, 1. / 479001600, -1. / 87178291200}
)

// hash mixes the coordinates of a pixel into the seed of its random numbers
// (the finalizer of SplitMix64 after each word).
func hash(words ...uint64) uint64 {
	h := uint64(0x6d75737465720001)
	for _, w := range words {
		h = scramble(h + 0x9e3779b97f4a7c15 + w)
	}
	return h
}

func scramble(z uint64) uint64 {
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// plannedPairs is how many of a path's first decisions are spread evenly over
// the samples of a pixel; later ones are plain random.
const plannedPairs = 8

// sampler yields the random numbers of one pixel. Its state comes from the
// seed, the frame and the pixel alone, so the order in which pixels are
// rendered cannot matter.
//
// The first pairs of each sample follow the R2 sequence (M. Roberts, "The
// Unreasonable Effectiveness of Quasirandom Sequences"), shifted per pixel and
// walked in another order per pair so that the pairs do not follow each other.
type sampler struct {
	state   uint64
	samples uint32
	sample  uint32
	pair    int
	shift   [plannedPairs][2]uint64
	key     [plannedPairs]uint32
}

func newSampler(seed uint64, frame, x, y, samples int) sampler {
	s := sampler{state: hash(seed, uint64(frame), uint64(x), uint64(y)), samples: uint32(samples)}
	for i := range s.shift {
		s.shift[i] = [2]uint64{s.bits(), s.bits()}
		s.key[i] = uint32(s.bits())
	}
	return s
}

// begin starts sample n of the pixel.
func (s *sampler) begin(n int) { s.sample, s.pair = uint32(n), 0 }

func (s *sampler) bits() uint64 {
	s.state += 0x9e3779b97f4a7c15
	return scramble(s.state)
}

func unitFloat(bits uint64) float64 { return float64(float64(bits>>11) * 0x1p-53) }

// one is a uniform number in [0, 1).
func (s *sampler) one() float64 { return unitFloat(s.bits()) }

// two is a uniform point in the unit square.
func (s *sampler) two() (float64, float64) {
	if s.pair >= plannedPairs {
		return s.one(), s.one()
	}
	// The steps are 1/p and 1/p² of the plastic number p, as fractions of 2^64.
	i := uint64(permute(s.sample, s.samples, s.key[s.pair]))
	u := s.shift[s.pair][0] + i*0xc13fa9a902a6328f
	v := s.shift[s.pair][1] + i*0x91e10da5c79e7b1c
	s.pair++
	return unitFloat(u), unitFloat(v)
}

// permute maps i to its place in a permutation of 0…n-1 chosen by key (A.
// Kensler, "Correlated Multi-Jittered Sampling", Pixar 2013).
func permute(i, n, key uint32) uint32 {
	w := n - 1
	w |= w >> 1
	w |= w >> 2
	w |= w >> 4
	w |= w >> 8
	w |= w >> 16
	for {
		i ^= key
		i *= 0xe170893d
		i ^= key >> 16
		i ^= (i & w) >> 4
		i ^= key >> 8
		i *= 0x0929eb3f
		i ^= key >> 23
		i ^= (i & w) >> 1
		i *= 1 | key>>27
		i *= 0x6935fa69
		i ^= (i & w) >> 11
		i *= 0x74dcb303
		i ^= (i & w) >> 2
		i *= 0x9e501cc3
		i ^= (i & w) >> 2
		i *= 0xc860a3df
		i &= w
		i ^= i >> 5
		if i < n {
			return (i + key) % n
		}
	}
}

// disk maps the unit square to the unit disk, keeping neighbours neighbours
// (Shirley and Chiu's concentric map).
func disk(u, v float64) (float64, float64) {
	a, b := float64(2*u)-1, float64(2*v)-1
	if a == 0 && b == 0 {
		return 0, 0
	}
	if math.Abs(a) > math.Abs(b) {
		sin, cos := sincosEighth(float64(b/a) * (math.Pi / 4))
		return float64(a * cos), float64(a * sin)
	}
	sin, cos := sincosEighth(float64(a/b) * (math.Pi / 4))
	return float64(b * sin), float64(b * cos)
}

// sphere maps the unit square to directions around the origin (Archimedes'
// projection of the disk).
func sphere(u, v float64) vec {
	x, y := disk(u, v)
	r2 := float64(x*x) + float64(y*y)
	k := float64(2 * math.Sqrt(max(0, 1-r2)))
	return vec{float64(x * k), float64(y * k), 1 - float64(2*r2)}
}
