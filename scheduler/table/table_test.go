package table

import (
	"fmt"
	"maps"
	"testing"

	"pgregory.net/rapid"
)

// A map and its copies behave as Go maps do, and none sees another's writes.
func TestCopies(t *testing.T) {
	type pair struct {
		got  *Map[string, int]
		want map[string]int
	}
	rapid.Check(t, func(t *rapid.T) {
		all := []pair{{New[string, int](HashString), map[string]int{}}}
		draw := func() (pair, string) {
			return rapid.SampledFrom(all).Draw(t, "map"), fmt.Sprint("key-", rapid.IntRange(0, 30).Draw(t, "key"))
		}
		t.Repeat(map[string]func(*rapid.T){
			"set": func(t *rapid.T) {
				p, k := draw()
				v := rapid.Int().Draw(t, "value")
				p.got.Set(k, v)
				p.want[k] = v
			},
			"set many": func(t *rapid.T) {
				p, _ := draw()
				for i := range rapid.SampledFrom([]int{10, whole + 1}).Draw(t, "keys") {
					key := fmt.Sprint("key-", i)
					p.got.Set(key, i)
					p.want[key] = i
				}
			},
			"delete": func(*rapid.T) {
				p, k := draw()
				p.got.Delete(k)
				delete(p.want, k)
			},
			"copy": func(*rapid.T) {
				if p, _ := draw(); len(all) < 6 {
					all = append(all, pair{p.got.Copy(), maps.Clone(p.want)})
				}
			},
			"": func(t *rapid.T) {
				for i, p := range all {
					if got := maps.Collect(p.got.All()); !maps.Equal(got, p.want) || p.got.Len() != len(p.want) {
						t.Fatalf("map %d has %d entries, %v, want %v", i, p.got.Len(), got, p.want)
					}
					for k := range 31 {
						key := fmt.Sprint("key-", k)
						v, ok := p.got.Find(key)
						if want, has := p.want[key]; v != want || ok != has || p.got.Get(key) != want {
							t.Fatalf("map %d: %s is %d (%v), want %d (%v)", i, key, v, ok, want, has)
						}
					}
				}
			},
		})
	})
}

// A copy is read while the map goes on; the race detector watches.
func TestReadWhileWriting(t *testing.T) {
	m := New[uint64, int](HashUint64)
	for i := range 10_000 {
		m.Set(uint64(i), i)
	}
	frozen := m.Copy()
	sums := make(chan int)
	go func() {
		sum := 0
		for _, v := range frozen.All() {
			sum += v
		}
		sums <- sum
	}()
	for i := range 10_000 {
		m.Set(uint64(i), -1)
		m.Delete(uint64(i + 1))
	}
	if sum := <-sums; sum != 9_999*10_000/2 {
		t.Errorf("the copy changed: its values sum to %d", sum)
	}
}

// Keys that differ in little are spread evenly, or a copy would stall its first
// writer for long.
func TestSpread(t *testing.T) {
	for name, hash := range map[string]func(int) uint64{
		"numbers": func(i int) uint64 { return HashUint64(uint64(i)) },
		"decimal": func(i int) uint64 { return HashString(fmt.Sprint("att-", i)) },
		"hex":     func(i int) uint64 { return HashString(fmt.Sprintf("%016x", i)) },
		"short":   func(i int) uint64 { return HashString(string([]byte{byte(i), byte(i >> 8), byte(i >> 16)})) },
	} {
		counts := make([]int, shards)
		for i := range 100 * shards {
			counts[hash(i)%shards]++
		}
		for i, n := range counts {
			if n > 200 {
				t.Errorf("%s: part %d has %d of %d keys, the mean is 100", name, i, n, 100*shards)
			}
		}
	}
}

// The time of the first write to every part after a copy: what a snapshot of a
// million values costs its writers in all.
func BenchmarkFirstWrites(b *testing.B) {
	m := New[string, *int](HashString)
	v := 0
	for i := range 1_000_000 {
		m.Set(fmt.Sprintf("att-%016x", i), &v)
	}
	for b.Loop() {
		m.Copy()
		for i := 0; i < 1_000_000; i += 97 {
			m.Set(fmt.Sprintf("att-%016x", i), &v)
		}
	}
}

func BenchmarkCopy(b *testing.B) {
	m := New[string, *int](HashString)
	for b.Loop() {
		m.Copy()
	}
}

func BenchmarkSetGet(b *testing.B) {
	m := New[string, int](HashString)
	keys := make([]string, 100_000)
	for i := range keys {
		keys[i] = fmt.Sprintf("att-%016x", i)
	}
	i := 0
	for b.Loop() {
		k := keys[i%len(keys)]
		m.Set(k, m.Get(k)+1)
		i += 7919
	}
}
