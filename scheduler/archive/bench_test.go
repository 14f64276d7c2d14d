package archive

import (
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/musternet/muster/api/musterpb"
)

// lives is a history of about n tasks in jobs of a size, ready to be written.
func lives(n, perJob int) (c content, tasks int) {
	r := rand.New(rand.NewPCG(1, 1))
	var transfer uint64
	for sequence := uint64(1); tasks < n; sequence++ {
		j := makeJob(r, sequence, accountNames[r.IntN(2)], perJob)
		c.jobs, c.transfers = append(c.jobs, j), append(c.transfers, transfersOf(r, &transfer, j)...)
		tasks += len(j.Tasks)
	}
	return c, tasks
}

// BenchmarkSeal is the cost of sealing a task: marshalling, compressing,
// hashing, and what leads to it.
func BenchmarkSeal(b *testing.B) {
	for _, perJob := range []int{1, 1000} {
		b.Run(fmt.Sprintf("jobs-of-%d", perJob), func(b *testing.B) {
			c, tasks := lives(20_000, perJob)
			b.ReportAllocs()
			size := int64(0)
			for b.Loop() {
				w := NewWriter(io.Discard)
				for _, j := range c.jobs {
					must(b, j.write(w))
				}
				for _, x := range c.transfers {
					must(b, w.Transfer(x.Transfer, x.Account))
				}
				seg, err := w.Close()
				must(b, err)
				size = seg.Bytes
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*tasks), "ns/task")
			b.ReportMetric(float64(size)/float64(tasks), "B/task")
		})
	}
}

func BenchmarkMerge(b *testing.B) {
	h := &history{}
	tasks := 0
	for i := range fanIn {
		c, n := lives(5000, 1)
		for j := range c.jobs {
			c.jobs[j].Job.Sequence = uint64(tasks + j + 1)
		}
		for j := range c.transfers {
			c.transfers[j].Transfer.Id += uint64(i) * 1_000_000
		}
		h.add(b, c)
		tasks += n
	}
	b.ReportAllocs()
	for b.Loop() {
		_, err := Merge(b.Context(), &h.store, h.segments, io.Discard)
		must(b, err)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*tasks), "ns/task")
}

// BenchmarkLookup finds a job in one of many segments, with and without a cache.
func BenchmarkLookup(b *testing.B) {
	h := &history{}
	r := rand.New(rand.NewPCG(2, 2))
	sequence := uint64(0)
	for range 64 {
		var c content
		for range 500 {
			sequence++
			c.jobs = append(c.jobs, makeJob(r, sequence, "acme", 1))
		}
		h.add(b, c)
	}
	for name, cacheBytes := range map[string]int64{"cold": 0, "warm": DefaultCache} {
		b.Run(name, func(b *testing.B) {
			a := New(&h.store, h, cacheBytes)
			var job *musterpb.Job
			for b.Loop() {
				want := h.jobs[r.IntN(len(h.jobs))].Job.Id
				var err error
				job, err = a.Job(b.Context(), want)
				must(b, err)
			}
			_ = job
		})
	}
}
