package jobspec

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"slices"

	"github.com/musternet/muster/api/musterpb"
)

// feistelRounds is what NIST SP 800-38G settled on for format-preserving
// encryption of small domains (FF1).
const feistelRounds = 10

// Permutation is a keyed pseudo-random bijection on [0, n): without the key the
// order of a job's items cannot be told from a random one, which is what makes
// the items of a check look like those of any other task.
//
// It is the generalized Feistel network of Black and Rogaway ("Ciphers with
// Arbitrary Finite Domains", CT-RSA 2002) on [0,a)×[0,b) with a·b just above
// n, and walks the cycle when it leaves [0, n). The round function is
// SipHash-2-4 under a key of its own per round. Which item is at which position
// is part of every job's record: the algorithm must never change.
type Permutation struct {
	n, a, b uint64
	keys    [feistelRounds][2]uint64
}

// NewPermutation is the permutation of [0, n) under key; n is at most 2^62.
func NewPermutation(key []byte, n uint64) *Permutation {
	p := &Permutation{n: n}
	// a = ⌈√n⌉ and b = ⌈n/a⌉, so that a·b is at most n + √n: walking is rare.
	p.a = max(1, uint64(math.Sqrt(float64(n))))
	for p.a > 1 && (p.a-1)*(p.a-1) >= n {
		p.a--
	}
	for p.a*p.a < n {
		p.a++
	}
	p.b = max(1, (n+p.a-1)/p.a)
	for round := 0; round < feistelRounds; round += 2 { // one HMAC yields two keys
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte("muster item permutation v1"))
		var tail [9]byte
		binary.BigEndian.PutUint64(tail[:], n)
		tail[8] = byte(round)
		mac.Write(tail[:])
		sum := mac.Sum(nil)
		for i := range 2 {
			p.keys[round+i] = [2]uint64{
				binary.LittleEndian.Uint64(sum[16*i:]),
				binary.LittleEndian.Uint64(sum[16*i+8:]),
			}
		}
	}
	return p
}

// At is the index at position i, which is below n.
func (p *Permutation) At(i uint64) uint64 {
	if i >= p.n {
		panic(fmt.Sprintf("jobspec: position %d of a permutation of %d", i, p.n))
	}
	for {
		if i = p.encrypt(i); i < p.n {
			return i
		}
	}
}

func (p *Permutation) encrypt(x uint64) uint64 {
	l, r := x%p.a, x/p.a
	for round := 0; round < feistelRounds; round += 2 {
		l = addMod(l, sipHash(p.keys[round], r)%p.a, p.a)
		r = addMod(r, sipHash(p.keys[round+1], l)%p.b, p.b)
	}
	return r*p.a + l
}

func addMod(x, y, m uint64) uint64 {
	if x += y; x >= m {
		x -= m
	}
	return x
}

// sipHash is SipHash-2-4 of the eight little-endian bytes of m (Aumasson and
// Bernstein, "SipHash: a fast short-input PRF", INDOCRYPT 2012).
func sipHash(key [2]uint64, m uint64) uint64 {
	v0, v1 := key[0]^0x736f6d6570736575, key[1]^0x646f72616e646f6d
	v2, v3 := key[0]^0x6c7967656e657261, key[1]^0x7465646279746573
	round := func() {
		v0 += v1
		v1 = bits.RotateLeft64(v1, 13) ^ v0
		v0 = bits.RotateLeft64(v0, 32)
		v2 += v3
		v3 = bits.RotateLeft64(v3, 16) ^ v2
		v0 += v3
		v3 = bits.RotateLeft64(v3, 21) ^ v0
		v2 += v1
		v1 = bits.RotateLeft64(v1, 17) ^ v2
		v2 = bits.RotateLeft64(v2, 32)
	}
	const length = 8 << 56 // of the message, in the last block's top byte
	for _, block := range [2]uint64{m, length} {
		v3 ^= block
		round()
		round()
		v0 ^= block
	}
	v2 ^= 0xff
	round()
	round()
	round()
	round()
	return v0 ^ v1 ^ v2 ^ v3
}

// Tasks is the number of tasks that count items make, chunk by chunk.
func Tasks(count uint64, chunk uint32) uint32 {
	if chunk == 0 {
		return 0
	}
	return uint32((count + uint64(chunk) - 1) / uint64(chunk))
}

// TaskItems is the ascending item indexes of a task: those at the positions
// [task·chunk, (task+1)·chunk) of the permutation under key. The specification
// has passed Validate; a task that the job does not have has no items.
func TaskItems(spec *musterpb.JobSpec, key []byte, task uint32) []uint64 {
	return OrderOf(spec, key).AppendTaskItems(nil, spec.GetChunk(), task)
}

// OrderOf is the order of a job's items, for who needs several of its tasks: to
// set it up costs more than a small task's items.
func OrderOf(spec *musterpb.JobSpec, key []byte) *Permutation {
	return NewPermutation(key, size(spec.GetItems()))
}

// AppendTaskItems appends the ascending item indexes of a task of so many items.
func (p *Permutation) AppendTaskItems(indexes []uint64, chunk, task uint32) []uint64 {
	first := uint64(task) * uint64(chunk)
	last := min(first+uint64(chunk), p.n)
	if first >= last {
		return indexes
	}
	from := len(indexes)
	indexes = slices.Grow(indexes, int(last-first))
	for i := first; i < last; i++ {
		indexes = append(indexes, p.At(i))
	}
	slices.Sort(indexes[from:])
	return indexes
}
