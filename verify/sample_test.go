package verify

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestRate(t *testing.T) {
	for _, c := range []struct {
		passed       uint64
		policy, want uint32
	}{
		{0, 0, PPM}, {ProvenAfter - 1, 50_000, PPM},
		{ProvenAfter, 0, FloorPPM}, {ProvenAfter, FloorPPM - 1, FloorPPM}, {ProvenAfter, 50_000, 50_000},
		{ProvenAfter, PPM, PPM}, {math.MaxUint64, math.MaxUint32, PPM},
	} {
		if got := Rate(c.passed, c.policy); got != c.want {
			t.Errorf("Rate(%d, %d) = %d, want %d", c.passed, c.policy, got, c.want)
		}
	}
}

func itemsUpTo(n uint64) []uint64 {
	items := make([]uint64, n)
	for i := range items {
		items[i] = uint64(i)
	}
	return items
}

func seedOf(n int) []byte {
	sum := sha256.Sum256(binary.BigEndian.AppendUint64(nil, uint64(n)))
	return sum[:]
}

func TestDrawProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		items := rapid.SliceOfNDistinct(rapid.Uint64(), 0, 60, rapid.ID).Draw(t, "items")
		seed := rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "seed")
		root := rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "root")
		rate := rapid.OneOf(rapid.Just(uint32(0)), rapid.Just(uint32(FloorPPM)), rapid.Uint32Range(0, PPM+5)).Draw(t, "rate")
		before := slices.Clone(items)
		picked := Draw(seed, "att-1", items, root, rate)
		if !slices.Equal(items, before) {
			t.Fatal("Draw changed its argument")
		}
		if !slices.IsSorted(picked) || len(slices.Compact(slices.Clone(picked))) != len(picked) {
			t.Fatalf("not ascending and distinct: %v", picked)
		}
		for _, p := range picked {
			if !slices.Contains(items, p) {
				t.Fatalf("%d is no item", p)
			}
		}
		if n := len(picked); n > 0 && n < min(MinSampled, len(items)) {
			t.Fatalf("%d of %d items checked, fewer than %d", n, len(items), MinSampled)
		}
		switch {
		case rate == 0 && len(picked) != 0:
			t.Fatal("checked at rate 0")
		case rate >= PPM && len(picked) != len(items):
			t.Fatalf("%d of %d items checked at rate 1", len(picked), len(items))
		}
		shuffled := rapid.Permutation(items).Draw(t, "shuffled")
		if again := Draw(seed, "att-1", shuffled, root, rate); !slices.Equal(again, picked) {
			t.Fatalf("%v drawn from one order of the items, %v from another", picked, again)
		}
		// A higher rate checks at least the same items.
		if more := Draw(seed, "att-1", items, root, rate+1+rate/2); len(more) < len(picked) {
			t.Fatalf("%d items at %d ppm, %d at a higher rate", len(picked), rate, len(more))
		}
	})
}

func TestDrawIsBoundToItsInputs(t *testing.T) {
	items, root := itemsUpTo(1000), seedOf(-1)
	base := Draw(seedOf(1), "att-1", items, root, 100_000)
	for name, other := range map[string][]uint64{
		"seed":    Draw(seedOf(2), "att-1", items, root, 100_000),
		"attempt": Draw(seedOf(1), "att-2", items, root, 100_000),
		"root":    Draw(seedOf(1), "att-1", items, seedOf(-2), 100_000),
	} {
		if slices.Equal(base, other) {
			t.Errorf("another %s drew the same items", name)
		}
	}
}

// The share of items checked has to be p. Large item sets keep MinSampled, which
// can only raise the share, out of the count.
func TestDrawRate(t *testing.T) {
	const seeds, perDraw = 150, 1000
	items, root := itemsUpTo(perDraw), seedOf(-1)
	for _, rate := range []uint32{FloorPPM, 100_000, 500_000, 999_000} {
		checked := 0
		for s := range seeds {
			checked += len(Draw(seedOf(s), fmt.Sprintf("att-%d", s), items, root, rate))
		}
		p, n := float64(rate)/PPM, float64(seeds*perDraw)
		if z := (float64(checked) - p*n) / math.Sqrt(n*p*(1-p)); math.Abs(z) > 4 {
			t.Errorf("rate %d ppm: %d of %.0f items checked, %.1f standard deviations off", rate, checked, n, z)
		}
	}
}

// A result of few items is checked with chance 1-(1-p)^n, and every item is as
// likely as any other, also among those that fill up to MinSampled.
func TestDrawSmallResults(t *testing.T) {
	const seeds, n, p = 20_000, 10, float64(FloorPPM) / PPM
	items, root, results, perItem := itemsUpTo(n), seedOf(-1), 0, [n]int{}
	for s := range seeds {
		picked := Draw(seedOf(s), "att-1", items, root, FloorPPM)
		if len(picked) > 0 {
			results++
		}
		for _, item := range picked {
			perItem[item]++
		}
	}
	pResult := 1 - math.Pow(1-p, n)
	if z := (float64(results) - seeds*pResult) / math.Sqrt(seeds*pResult*(1-pResult)); math.Abs(z) > 4 {
		t.Errorf("%d of %d results checked, %.1f standard deviations off", results, seeds, z)
	}
	total := 0
	for _, c := range perItem {
		total += c
	}
	mean := float64(total) / n
	for item, c := range perItem {
		if z := (float64(c) - mean) / math.Sqrt(mean); math.Abs(z) > 4 {
			t.Errorf("item %d checked %d times, the mean is %.0f", item, c, mean)
		}
	}
}

func TestSeed(t *testing.T) {
	reveals := map[string][]byte{"sch-a": seedOf(1), "sch-b": seedOf(2), "sch-c": seedOf(3)}
	digest := BatchDigest(1, []string{"att-1"}, [][]byte{seedOf(9)})
	base := Seed(1, digest, reveals)
	for range 20 { // a map's order differs from one walk to the next
		if !bytes.Equal(base, Seed(1, digest, reveals)) {
			t.Fatal("the seed depends on the order of the reveals")
		}
	}
	distinct := map[string][]byte{
		"base":           base,
		"epoch":          Seed(2, digest, reveals),
		"digest":         Seed(1, seedOf(0), reveals),
		"one less":       Seed(1, digest, map[string][]byte{"sch-a": seedOf(1), "sch-b": seedOf(2)}),
		"one other":      Seed(1, digest, map[string][]byte{"sch-a": seedOf(1), "sch-b": seedOf(2), "sch-c": seedOf(4)}),
		"swapped owners": Seed(1, digest, map[string][]byte{"sch-a": seedOf(2), "sch-b": seedOf(1), "sch-c": seedOf(3)}),
		"no reveal":      Seed(1, digest, nil),
		"name and value": Seed(1, digest, map[string][]byte{"sch": append([]byte("-a"), seedOf(1)...)}),
	}
	for a, x := range distinct {
		for b, y := range distinct {
			if a != b && bytes.Equal(x, y) {
				t.Errorf("%s and %s have the same seed", a, b)
			}
		}
	}
}

func TestBatchDigest(t *testing.T) {
	base := BatchDigest(1, []string{"att-1", "att-2"}, [][]byte{seedOf(1), seedOf(2)})
	for name, other := range map[string][]byte{
		"epoch":    BatchDigest(2, []string{"att-1", "att-2"}, [][]byte{seedOf(1), seedOf(2)}),
		"order":    BatchDigest(1, []string{"att-2", "att-1"}, [][]byte{seedOf(2), seedOf(1)}),
		"roots":    BatchDigest(1, []string{"att-1", "att-2"}, [][]byte{seedOf(2), seedOf(1)}),
		"one less": BatchDigest(1, []string{"att-1"}, [][]byte{seedOf(1)}),
		"empty":    BatchDigest(1, nil, nil),
	} {
		if bytes.Equal(base, other) {
			t.Errorf("a change of %s does not change the digest", name)
		}
	}
}

func TestChain(t *testing.T) {
	c := NewChain([]byte("secret"))
	if !bytes.Equal(c.Tip(), NewChain([]byte("secret")).Tip()) || bytes.Equal(c.Tip(), NewChain([]byte("other")).Tip()) {
		t.Fatal("a tip has to follow from its secret and from nothing else")
	}
	tip := c.Tip()
	for made := range uint64(ChainLength - 1) {
		value := c.Reveal(made, tip)
		if !CheckReveal(tip, value) {
			t.Fatalf("reveal %d is not the one before its tip", made)
		}
		if CheckReveal(value, tip) || CheckReveal(tip, tip) {
			t.Fatalf("reveal %d can be made twice", made)
		}
		tip = value
	}
	if c.Reveal(ChainLength-1, tip) != nil || c.Reveal(math.MaxUint64, tip) != nil {
		t.Error("a chain that has run out still reveals")
	}
}

func TestChainRefuses(t *testing.T) {
	c := NewChain([]byte("secret"))
	tip := c.Tip()
	if c.Reveal(1, tip) != nil || c.Reveal(0, NewChain([]byte("other")).Tip()) != nil || c.Reveal(0, nil) != nil {
		t.Error("a chain reveals to a tip that it is not at")
	}
	value := c.Reveal(0, tip)
	value[0] ^= 1
	if CheckReveal(tip, value) || CheckReveal(tip, nil) || CheckReveal(nil, value) || CheckReveal(tip[:31], c.Reveal(0, tip)) {
		t.Error("a wrong reveal passes")
	}
	long := bytes.Repeat([]byte("x"), 1000)
	sum := sha256.Sum256(long)
	if CheckReveal(sum[:], long) {
		t.Error("a reveal of 1,000 bytes passes")
	}
	if v := c.Reveal(0, tip); !CheckReveal(tip, v) {
		t.Error("a caller's change of a reveal went into the chain")
	}
	tip[0] ^= 1
	if bytes.Equal(tip, c.Tip()) {
		t.Error("a caller's change of the tip went into the chain")
	}
}

func BenchmarkNewChain(b *testing.B) {
	for b.Loop() {
		NewChain([]byte("secret"))
	}
}

func BenchmarkDraw(b *testing.B) {
	items, root := itemsUpTo(1000), seedOf(-1)
	rand.New(rand.NewPCG(1, 2)).Shuffle(len(items), func(i, j int) { items[i], items[j] = items[j], items[i] })
	for b.Loop() {
		Draw(seedOf(1), "att-1", items, root, FloorPPM)
	}
}
