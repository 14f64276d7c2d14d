package verify

import (
	"bytes"
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"math/bits"
	"slices"
)

// Sampling, in parts per million so that every scheduler computes the same.
const (
	// PPM is certainty.
	PPM = 1_000_000
	// ProvenAfter is how many checks an owner must pass, per hardware class and
	// application, before anything but p = 1 applies.
	ProvenAfter = 20
	// FloorPPM is the least p of a proven owner.
	FloorPPM = 30_000
	// MinSampled is how many items are checked of a result that is checked at
	// all, so that the set-up of the re-run is spread.
	MinSampled = 4
)

// Rate is p, the chance that an item is checked, in parts per million.
// passed counts the checks that its owner has passed.
func Rate(passed uint64, policyPPM uint32) uint32 {
	if passed < ProvenAfter {
		return PPM
	}
	return min(max(policyPPM, FloorPPM), PPM)
}

// Seed combines the reveals of the whole committee, whatever order they came
// in. It is bound to the epoch and to the digest of the batch that was closed
// before the first reveal.
func Seed(epoch uint64, batchDigest []byte, reveals map[string][]byte) []byte {
	nodes := make([]string, 0, len(reveals))
	for node := range reveals {
		nodes = append(nodes, node)
	}
	slices.Sort(nodes)
	h := sha256.New()
	h.Write([]byte("muster seed v1\n"))
	h.Write(binary.BigEndian.AppendUint64(nil, epoch))
	writeBytes(h, batchDigest)
	for _, node := range nodes {
		writeBytes(h, []byte(node))
		writeBytes(h, reveals[node])
	}
	return h.Sum(nil)
}

// BatchDigest binds the commits of a batch: attempts and roots, in log order.
func BatchDigest(epoch uint64, attempts []string, roots [][]byte) []byte {
	h := sha256.New()
	h.Write([]byte("muster batch v1\n"))
	h.Write(binary.BigEndian.AppendUint64(nil, epoch))
	for i, attempt := range attempts {
		writeBytes(h, []byte(attempt))
		writeBytes(h, roots[i])
	}
	return h.Sum(nil)
}

// Lottery draws the items of all results of a batch from its seed. It is not safe
// for concurrent use.
type Lottery struct {
	mac  hash.Hash
	buf  []byte
	lots []lot
}

type lot struct{ u, item uint64 }

// NewLottery is the lottery of a seed.
func NewLottery(seed []byte) *Lottery { return &Lottery{mac: hmac.New(sha256.New, seed)} }

// lot is the item's number in the draw: u = HMAC(seed, attempt ‖ item ‖ root).
func (l *Lottery) lot(attempt string, item uint64, root []byte) uint64 {
	l.buf = binary.BigEndian.AppendUint64(l.buf[:0], uint64(len(attempt)))
	l.buf = append(l.buf, attempt...)
	l.buf = binary.BigEndian.AppendUint64(l.buf, item)
	l.buf = append(l.buf, root...)
	l.mac.Reset()
	l.mac.Write(l.buf)
	l.buf = l.mac.Sum(l.buf[:0])
	return binary.BigEndian.Uint64(l.buf)
}

// Draw picks the items of a committed result that are checked: those with
// u < p·2⁶⁴, and where there is one at all, the items with the lowest u up to
// MinSampled. The answer is ascending; empty means that nothing is checked.
func (l *Lottery) Draw(attempt string, items []uint64, root []byte, ratePPM uint32) []uint64 {
	if ratePPM >= PPM {
		return slices.Sorted(slices.Values(items))
	}
	// floor(p · 2⁶⁴); p < 1, so that it fits.
	threshold, _ := bits.Div64(uint64(ratePPM), 0, PPM)
	all, drawn := l.lots[:0], 0
	for _, item := range items {
		u := l.lot(attempt, item, root)
		if all = append(all, lot{u, item}); u < threshold {
			drawn++
		}
	}
	l.lots = all
	if drawn == 0 {
		return nil
	}
	slices.SortFunc(all, func(a, b lot) int {
		return cmp.Or(cmp.Compare(a.u, b.u), cmp.Compare(a.item, b.item))
	})
	picked := make([]uint64, max(drawn, min(MinSampled, len(all))))
	for i := range picked {
		picked[i] = all[i].item
	}
	slices.Sort(picked)
	return picked
}

// Draw is Lottery.Draw for one result.
func Draw(seed []byte, attempt string, items []uint64, root []byte, ratePPM uint32) []uint64 {
	return NewLottery(seed).Draw(attempt, items, root, ratePPM)
}

// Chain is a scheduler's hash chain h¹(secret) … hᴺ(secret). The tip hᴺ is
// registered; each reveal is the value before the one revealed last, and
// one SHA-256 verifies it.
type Chain struct{ values [][sha256.Size]byte }

// ChainLength is how many reveals one chain serves: 65,535, computed in about
// 10 ms and held in 2 MiB.
const ChainLength = 1 << 16

// NewChain computes the chain of a secret.
func NewChain(secret []byte) *Chain {
	c := &Chain{values: make([][sha256.Size]byte, ChainLength)}
	c.values[0] = sha256.Sum256(append([]byte("muster chain v1\n"), secret...))
	for i := 1; i < ChainLength; i++ {
		c.values[i] = sha256.Sum256(c.values[i-1][:])
	}
	return c
}

// Tip is the value to register.
func (c *Chain) Tip() []byte { return bytes.Clone(c.values[ChainLength-1][:]) }

// Reveal is the value after so many reveals were made from this chain; nil
// when the chain has run out, or when tip is not what the chain then is at.
func (c *Chain) Reveal(made uint64, tip []byte) []byte {
	if made >= ChainLength-1 {
		return nil
	}
	at := ChainLength - 1 - made
	if !bytes.Equal(c.values[at][:], tip) {
		return nil
	}
	return bytes.Clone(c.values[at-1][:])
}

// CheckReveal reports whether value is the next reveal of a chain at tip.
func CheckReveal(tip, value []byte) bool {
	if len(value) != sha256.Size {
		return false // whoever chose the tip could have hashed anything, of any size
	}
	sum := sha256.Sum256(value)
	return bytes.Equal(sum[:], tip)
}
