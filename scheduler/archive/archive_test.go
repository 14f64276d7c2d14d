package archive

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
)

// history is a made-up past, and the model that the archive is compared with.
type history struct {
	store     blob.Memory
	segments  []*musterpb.Segment
	jobs      []Job
	transfers []*musterpb.SealedTransfer
	batches   []*musterpb.Batch
}

func (h *history) Segments() []*musterpb.Segment { return slices.Clone(h.segments) }

// tb is what testing.T, testing.F and rapid.T have in common.
type tb interface {
	Helper()
	Context() context.Context
	Fatal(...any)
	Fatalf(string, ...any)
}

func hexOf(r *rand.Rand, n int) string {
	var b strings.Builder
	for range n {
		fmt.Fprintf(&b, "%02x", r.IntN(256))
	}
	return b.String()
}

func bytesOf(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.IntN(256))
	}
	return b
}

// Job is a job with everything that belongs to it, task by task.
type Job struct {
	Job      *musterpb.Job
	Tasks    []*musterpb.Task
	Attempts []*musterpb.Attempt
	Checks   []*musterpb.Check
}

func (j *Job) write(w *Writer) error {
	if err := w.Job(j.Job); err != nil {
		return err
	}
	attempts, checks := j.Attempts, j.Checks
	for _, t := range j.Tasks {
		if err := w.Task(t); err != nil {
			return err
		}
		ids := map[string]bool{}
		for ; len(attempts) > 0 && attempts[0].Task == t.Number; attempts = attempts[1:] {
			ids[attempts[0].Id] = true
			if err := w.Attempt(attempts[0]); err != nil {
				return err
			}
		}
		for ; len(checks) > 0 && ids[checks[0].Target]; checks = checks[1:] {
			if err := w.Check(checks[0]); err != nil {
				return err
			}
		}
	}
	return nil
}

// makeJob makes a job with so many tasks, or a few less; some attempts are
// checks, and some tasks need more than one.
func makeJob(r *rand.Rand, sequence uint64, account string, n int) Job {
	j := Job{Job: &musterpb.Job{
		Id: "job-" + hexOf(r, 5), Account: account, Sequence: sequence, State: musterpb.JobState_JOB_STATE_VERIFIED,
		SubmittedUnixMs: 1_700_000_000_000 + int64(sequence), EndedUnixMs: 1_700_000_001_000 + int64(sequence), Settled: true,
		PermutationKey: bytesOf(r, 32), Items: uint64(n), Tasks: uint32(n),
		Spec: &musterpb.JobSpec{Name: "frames", Image: &musterpb.Image{Ref: "registry.example/render@sha256:" + strings.Repeat("ab", 32)}, Command: []string{"render"}},
	}}
	for len(j.Attempts) < n {
		a := makeAttempt(r, j.Job.Id, uint32(len(j.Tasks)))
		t := &musterpb.Task{Job: j.Job.Id, Number: uint32(len(j.Tasks)), State: musterpb.TaskState_TASK_STATE_VERIFIED, Attempts: []string{a.Id}, Result: a.Id}
		j.Attempts = append(j.Attempts, a)
		if r.IntN(10) == 0 {
			again := makeAttempt(r, j.Job.Id, t.Number)
			j.Attempts = append(j.Attempts, again)
			t.Attempts, t.Result = append(t.Attempts, again.Id), again.Id
			a.State, a.Commit, a.Reason = musterpb.AttemptState_ATTEMPT_STATE_LOST, nil, "silent"
		}
		if r.IntN(30) == 0 {
			run := makeAttempt(r, j.Job.Id, t.Number)
			check := &musterpb.Check{Id: "chk-" + t.Result[4:], Job: j.Job.Id, Target: t.Result, Runs: []string{run.Id}, OpenedUnixMs: int64(r.IntN(5)), Verdict: musterpb.Verdict_VERDICT_SUCCESS}
			run.Check = check.Id
			j.Attempts, j.Checks = append(j.Attempts, run), append(j.Checks, check)
		}
		if r.IntN(50) == 0 {
			t.Result, t.State = "", musterpb.TaskState_TASK_STATE_QUEUED
		}
		j.Tasks = append(j.Tasks, t)
	}
	return j
}

func makeAttempt(r *rand.Rand, job string, task uint32) *musterpb.Attempt {
	id := "att-" + hexOf(r, 8)
	worker := r.IntN(1000)
	return &musterpb.Attempt{
		Id: id, Job: job, Task: task, Worker: fmt.Sprintf("wrk-%016x", worker), Owner: fmt.Sprintf("owner-%d", worker), Class: "cpu x86-64-v3",
		State: musterpb.AttemptState_ATTEMPT_STATE_VERIFIED, PriceMicroUsdPerHour: 3600, HoldMicroUsd: 60, Payer: "job:" + job, PaidMicroUsd: 7,
		PlacedUnixMs: 1_700_000_000_000, StartedUnixMs: 1_700_000_000_004, CommittedUnixMs: 1_700_000_000_304, EndedUnixMs: 1_700_000_000_900, Batch: 17, Hold: 1234,
		Commit: &musterpb.Commit{
			Attempt: id, Root: bytesOf(r, 32), ManifestDigest: "sha256:" + hexOf(r, 32), ArchiveDigest: "sha256:" + hexOf(r, 32),
			ArchiveBytes: 4096, OutputBytes: 9000, Signature: bytesOf(r, 64), Leaf: 1, Leaves: 2, Path: [][]byte{bytesOf(r, 32)},
		},
		Stored: &musterpb.Stored{Bundle: "sha256:" + strings.Repeat("cd", 32), ManifestBytes: 200, ArchiveOffset: 200},
	}
}

// live adds work to the history and returns what a segment with it holds.
type content struct {
	jobs      []Job
	transfers []*musterpb.SealedTransfer
	batches   []*musterpb.Batch
}

func (h *history) add(t tb, c content) *musterpb.Segment {
	t.Helper()
	var b bytes.Buffer
	seg := writeTo(t, &b, c)
	h.put(t, seg, b.Bytes())
	h.segments = append(h.segments, seg)
	h.jobs, h.transfers, h.batches = append(h.jobs, c.jobs...), append(h.transfers, c.transfers...), append(h.batches, c.batches...)
	return seg
}

func writeTo(t tb, b *bytes.Buffer, c content) *musterpb.Segment {
	t.Helper()
	w := NewWriter(b)
	for _, j := range c.jobs {
		must(t, j.write(w))
	}
	for _, x := range c.transfers {
		must(t, w.Transfer(x.Transfer, x.Account))
	}
	for _, x := range c.batches {
		must(t, w.Batch(x))
	}
	seg, err := w.Close()
	must(t, err)
	return seg
}

func (h *history) put(t tb, seg *musterpb.Segment, data []byte) {
	t.Helper()
	if n, err := h.store.Put(t.Context(), api.Digest(seg.Digest), bytes.NewReader(data), blob.NoLimit); err != nil || n != seg.Bytes {
		t.Fatalf("put %d bytes of %d: %v", n, seg.Bytes, err)
	}
}

func must(t tb, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// merge merges what Mergeable picks, or the given neighbours.
func (h *history) merge(t tb, from, to int) {
	t.Helper()
	var b bytes.Buffer
	seg, err := Merge(t.Context(), &h.store, h.segments[from:to], &b)
	must(t, err)
	h.put(t, seg, b.Bytes())
	for _, old := range h.segments[from:to] {
		must(t, h.store.Delete(t.Context(), api.Digest(old.Digest)))
	}
	h.segments = slices.Replace(slices.Clone(h.segments), from, to, seg)
}

// check compares every answer of the archive with the model.
func (h *history) check(t tb, a *Archive, accounts []string, limit int) {
	t.Helper()
	ctx := t.Context()
	for _, j := range h.jobs {
		got, err := a.Job(ctx, j.Job.Id)
		must(t, err)
		equal(t, "job", []*musterpb.Job{got}, []*musterpb.Job{j.Job})
		h.checkAttempts(t, a, j)
		h.checkResults(t, a, j, limit)
	}
	if _, err := a.Job(ctx, "job-never"); api.KindOf(err) != api.NotFound {
		t.Fatalf("an unknown job: %v", err)
	}
	for _, account := range append([]string{""}, accounts...) {
		h.checkJobs(t, a, account, limit)
		h.checkTransfers(t, a, account, limit)
	}
	h.checkBatches(t, a, limit)
}

func (h *history) checkAttempts(t tb, a *Archive, j Job) {
	t.Helper()
	var attempts []*musterpb.Attempt
	var checks []*musterpb.Check
	for next, more := uint32(0), true; more; more = next > 0 {
		list, c, n, err := a.Attempts(t.Context(), j.Job.Id, next)
		must(t, err)
		if n > 0 && (n <= next || len(list) < PageAttempts) {
			t.Fatalf("%d attempts from task %d on, and the next page at %d", len(list), next, n)
		}
		for _, check := range c {
			if !slices.ContainsFunc(list, func(a *musterpb.Attempt) bool { return a.Id == check.Target }) {
				t.Fatalf("check %s is not on the page of its target %s", check.Id, check.Target)
			}
		}
		attempts, checks, next = append(attempts, list...), append(checks, c...), n
	}
	equal(t, "attempts", attempts, j.Attempts)
	equal(t, "checks", checks, j.Checks)
}

func (h *history) checkResults(t tb, a *Archive, j Job, limit int) {
	t.Helper()
	from := uint32(0)
	var tasks []*musterpb.Task
	for {
		list, results, err := a.Results(t.Context(), j.Job.Id, from, limit)
		must(t, err)
		for i, task := range list {
			if results[i].GetId() != task.Result {
				t.Fatalf("task %d with the result %q came with attempt %q", task.Number, task.Result, results[i].GetId())
			}
		}
		tasks = append(tasks, list...)
		if len(list) < limit {
			break
		}
		from = list[len(list)-1].Number + 1
	}
	equal(t, "tasks", tasks, j.Tasks)
}

func (h *history) checkJobs(t tb, a *Archive, account string, limit int) {
	t.Helper()
	var want, got []*musterpb.Job
	for _, j := range h.jobs {
		if account == "" || j.Job.Account == account {
			want = append(want, j.Job)
		}
	}
	slices.SortFunc(want, func(a, b *musterpb.Job) int { return cmp.Compare(b.Sequence, a.Sequence) })
	for before := uint64(math.MaxUint64); ; before = got[len(got)-1].Sequence {
		page, err := a.Jobs(t.Context(), account, before, limit)
		must(t, err)
		got = append(got, page...)
		if len(page) < limit {
			break
		}
	}
	equal(t, "jobs of "+account, got, want)
}

func (h *history) checkTransfers(t tb, a *Archive, account string, limit int) {
	t.Helper()
	var want, got []*musterpb.Transfer
	for _, x := range h.transfers {
		if account == "" || slices.Contains(ownersOf(x), account) {
			want = append(want, x.Transfer)
		}
	}
	for after := uint64(0); ; after = got[len(got)-1].Id {
		page, through, err := a.Transfers(t.Context(), account, after, limit)
		must(t, err)
		got = append(got, page...)
		if n := len(h.transfers); n > 0 && through != h.transfers[n-1].Transfer.Id {
			t.Fatalf("transfers are sealed up to %d, the archive says %d", h.transfers[n-1].Transfer.Id, through)
		}
		if len(page) < limit {
			break
		}
	}
	equal(t, "transfers of "+account, got, want)
}

func (h *history) checkBatches(t tb, a *Archive, limit int) {
	t.Helper()
	var got []*musterpb.Batch
	for after := uint64(0); ; after = got[len(got)-1].Epoch {
		page, _, err := a.Batches(t.Context(), after, limit)
		must(t, err)
		got = append(got, page...)
		if len(page) < limit {
			break
		}
	}
	equal(t, "batches", got, h.batches)
}

func equal[M proto.Message](t tb, what string, got, want []M) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d came back, %d are right", what, len(got), len(want))
	}
	for i := range got {
		if !proto.Equal(got[i], want[i]) {
			t.Fatalf("%s: number %d is\n%v\nwhere this is right:\n%v", what, i, got[i], want[i])
		}
	}
}

var accountNames = []string{"acme", "bolt", "owner-1", "owner-17", "nobody"}

// transfersOf makes up what a job moved.
func transfersOf(r *rand.Rand, next *uint64, j Job) (list []*musterpb.SealedTransfer) {
	add := func(kind musterpb.TransferKind, debit, credit, ref string) {
		*next += 1
		list = append(list, &musterpb.SealedTransfer{Account: j.Job.Account, Transfer: &musterpb.Transfer{
			Id: *next, TimeUnixMs: 1_700_000_000_000, Kind: kind, Debit: debit, Credit: credit, AmountMicroUsd: int64(r.IntN(1000) + 1), Ref: ref,
		}})
	}
	own := ledger.OfJob(j.Job.Id)
	add(musterpb.TransferKind_TRANSFER_KIND_MOVE, ledger.Of(j.Job.Account), own, j.Job.Id)
	for _, a := range j.Attempts {
		add(musterpb.TransferKind_TRANSFER_KIND_HOLD, own, ledger.Of(a.Owner), a.Id)
		add(musterpb.TransferKind_TRANSFER_KIND_POST, own, ledger.Of(a.Owner), a.Id)
		add(musterpb.TransferKind_TRANSFER_KIND_MOVE, own, ledger.Network, a.Id)
	}
	return list
}

// Whatever was sealed, in whatever order segments were merged, every question
// gets the same answer.
func TestHistory(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 1))
		h := &history{}
		a := New(&h.store, h, int64(rapid.SampledFrom([]int{0, 20_000, DefaultCache}).Draw(rt, "cache")))
		sequences := r.Perm(200)
		var transfer, epoch uint64
		limit := rapid.SampledFrom([]int{1, 3, 50, 1000}).Draw(rt, "limit")
		for range rapid.IntRange(1, 6).Draw(rt, "steps") {
			if n := len(h.segments); n >= 2 && r.IntN(3) == 0 {
				from := r.IntN(n - 1)
				h.merge(rt, from, from+2+r.IntN(n-from-1))
				continue
			}
			var c content
			for range r.IntN(8) {
				n := 1
				if r.IntN(4) == 0 {
					n = r.IntN(60)
				}
				j := makeJob(r, uint64(sequences[0]+1), accountNames[r.IntN(2)], n)
				sequences = sequences[1:]
				c.jobs = append(c.jobs, j)
				if r.IntN(5) > 0 {
					c.transfers = append(c.transfers, transfersOf(r, &transfer, j)...)
				}
			}
			for range r.IntN(3) {
				epoch++
				c.batches = append(c.batches, &musterpb.Batch{Epoch: epoch, Digest: bytesOf(r, 32), Attempts: []string{"att-" + hexOf(r, 8)}, Drawn: true})
			}
			if len(c.jobs)+len(c.batches) > 0 { // nothing is ever sealed as a segment of its own
				h.add(rt, c)
			}
		}
		h.check(rt, a, accountNames, max(limit, 1))
	})
}

// Large jobs fill frames of their own, before and after small ones, and are
// read page by page.
func TestLargeJob(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	h := &history{}
	a := New(&h.store, h, DefaultCache)
	var transfer uint64
	var c content
	for i, n := range []int{1, 3, 12_000, 2, 600, 700, 1} {
		j := makeJob(r, uint64(i+1), "acme", n)
		c.jobs, c.transfers = append(c.jobs, j), append(c.transfers, transfersOf(r, &transfer, j)...)
	}
	h.add(t, c)
	h.add(t, content{jobs: []Job{makeJob(r, 100, "bolt", 6000)}})
	h.check(t, a, accountNames, 1000)
	h.merge(t, 0, 2)
	h.check(t, New(&h.store, h, DefaultCache), accountNames, 1000)

	// Tasks of which most were never placed: an ended job has those that were.
	sparse := makeJob(r, 200, "bolt", 9000)
	sparse.Tasks = slices.DeleteFunc(sparse.Tasks, func(t *musterpb.Task) bool { return t.Number%7 != 3 })
	sparse.Attempts = slices.DeleteFunc(sparse.Attempts, func(a *musterpb.Attempt) bool { return a.Task%7 != 3 })
	sparse.Checks = nil
	h.add(t, content{jobs: []Job{sparse}})
	h.checkResults(t, a, sparse, 100)
	for _, from := range []uint32{0, 3, 4, 5000, 8999, 1 << 31} {
		want := slices.IndexFunc(sparse.Tasks, func(t *musterpb.Task) bool { return t.Number >= from })
		list, _, err := a.Results(t.Context(), sparse.Job.Id, from, 1)
		must(t, err)
		if want < 0 && len(list) > 0 || want >= 0 && (len(list) != 1 || list[0].Number != sparse.Tasks[want].Number) {
			t.Errorf("from %d on: %v", from, list)
		}
	}
}

// Equal input gives equal bytes, and the digest is theirs.
func TestDeterministic(t *testing.T) {
	write := func() *musterpb.Segment {
		r := rand.New(rand.NewPCG(3, 4))
		var c content
		var transfer uint64
		for i := range 300 {
			n := i % 40
			if i == 7 {
				n = 3000 // its attempts and its tasks fill several frames
			}
			j := makeJob(r, uint64(i+1), accountNames[i%3], n)
			c.jobs, c.transfers = append(c.jobs, j), append(c.transfers, transfersOf(r, &transfer, j)...)
		}
		return writeTo(t, &bytes.Buffer{}, c)
	}
	a, b := write(), write()
	if a.Digest != b.Digest {
		t.Errorf("the same content gave %s and %s", a.Digest, b.Digest)
	}
	if a.Jobs != 300 || a.FirstTransfer != 1 || a.LastTransfer == 0 || a.FirstEndedUnixMs != 1_700_000_001_001 || a.LastEndedUnixMs != 1_700_000_001_300 {
		t.Errorf("the segment says of itself: %v", a)
	}
}

// What can't be right is refused before it is sealed.
func TestWriterRefuses(t *testing.T) {
	for name, write := range map[string]func(*Writer) error{
		"a job without a sequence": func(w *Writer) error { return w.Job(&musterpb.Job{Id: "job-1"}) },
		"a job without an ID":      func(w *Writer) error { return w.Job(&musterpb.Job{Sequence: 1}) },
		"a task before its job":    func(w *Writer) error { return w.Task(&musterpb.Task{Job: "job-1"}) },
		"a task of another job": func(w *Writer) error {
			_ = w.Job(&musterpb.Job{Id: "job-1", Sequence: 1})
			return w.Task(&musterpb.Task{Job: "job-2"})
		},
		"tasks out of order": func(w *Writer) error {
			_ = w.Job(&musterpb.Job{Id: "job-1", Sequence: 1})
			_ = w.Task(&musterpb.Task{Job: "job-1", Number: 4})
			return w.Task(&musterpb.Task{Job: "job-1", Number: 4})
		},
		"an attempt before its task": func(w *Writer) error {
			_ = w.Job(&musterpb.Job{Id: "job-1", Sequence: 1})
			return w.Attempt(&musterpb.Attempt{Job: "job-1"})
		},
		"an attempt of another task": func(w *Writer) error {
			_ = w.Job(&musterpb.Job{Id: "job-1", Sequence: 1})
			_ = w.Task(&musterpb.Task{Job: "job-1", Number: 4})
			return w.Attempt(&musterpb.Attempt{Job: "job-1", Task: 5})
		},
		"a check before its task": func(w *Writer) error {
			_ = w.Job(&musterpb.Job{Id: "job-1", Sequence: 1})
			return w.Check(&musterpb.Check{Job: "job-1"})
		},
		"transfers out of order": func(w *Writer) error {
			_ = w.Transfer(&musterpb.Transfer{Id: 2}, "")
			return w.Transfer(&musterpb.Transfer{Id: 2}, "")
		},
		"batches out of order": func(w *Writer) error {
			_ = w.Batch(&musterpb.Batch{Epoch: 2})
			return w.Batch(&musterpb.Batch{Epoch: 1})
		},
		"two jobs with the same number": func(w *Writer) error {
			_ = w.Job(&musterpb.Job{Id: "job-1", Sequence: 1})
			_ = w.Job(&musterpb.Job{Id: "job-2", Sequence: 1})
			_, err := w.Close()
			return err
		},
	} {
		if err := write(NewWriter(&bytes.Buffer{})); err == nil {
			t.Errorf("%s was sealed", name)
		}
	}
	if seg, err := NewWriter(full{}).Close(); err == nil {
		t.Errorf("a full disk sealed %v", seg)
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("no space left on device") }

// A page of job IDs that would overflow gets more neighbours.
func TestPages(t *testing.T) {
	var list []hashed
	for i := range 20_000 {
		h := uint64(i) << 20 // all in what would be the first pages
		if i%2 == 0 {
			h = hashOf(fmt.Sprint("job-", i))
		}
		list = append(list, hashed{h, place{uint32(i), 7}})
	}
	_, pages, err := appendPages(nil, slices.Clone(list))
	if err == nil {
		t.Fatalf("10,000 hashes that differ in their lower half went into %d pages", pages)
	}
	list = slices.DeleteFunc(list, func(h hashed) bool { return h.frame%2 == 1 })
	list = append(list, hashed{hash: 1 << 60, place: place{frame: 1}}, hashed{hash: 1 << 60, place: place{frame: 2}})
	b, pages, err := appendPages(nil, slices.Clone(list))
	if err != nil || uint64(len(b)) != pages*pageBytes {
		t.Fatalf("%d bytes in %d pages: %v", len(b), pages, err)
	}
	for _, want := range list {
		page := b[pageOf(want.hash, pages)*pageBytes:][:pageBytes]
		must(t, checkPage(page))
		has := false
		entriesOf(page, func(h hashed) { has = has || h == want })
		if !has {
			t.Fatalf("%v is not in its page", want)
		}
	}
}

// segmentsOf makes segments of a level for Mergeable; a size in MiB each.
func segmentsOf(levels ...[2]int) (list []*musterpb.Segment) {
	for i, l := range levels {
		list = append(list, &musterpb.Segment{Digest: fmt.Sprint(i), Level: uint32(l[0]), Bytes: int64(l[1]) << 20})
	}
	return list
}

func TestMergeable(t *testing.T) {
	repeat := func(n int, l [2]int) [][2]int { return slices.Repeat([][2]int{l}, n) }
	for _, test := range []struct {
		name string
		have []*musterpb.Segment
		want string
	}{
		{"none", nil, "[]"},
		{"too few", segmentsOf(repeat(7, [2]int{0, 1})...), "[]"},
		{"eight neighbours", segmentsOf(repeat(9, [2]int{0, 1})...), "[0 1 2 3 4 5 6 7]"},
		{"of the lowest level", segmentsOf(append(repeat(8, [2]int{1, 8}), repeat(8, [2]int{0, 1})...)...), "[8 9 10 11 12 13 14 15]"},
		{"not across another level", segmentsOf(append(append(repeat(4, [2]int{0, 1}), [2]int{1, 8}), repeat(4, [2]int{0, 1})...)...), "[]"},
		{"only as many as fit", segmentsOf(repeat(8, [2]int{2, 100})...), "[0 1]"},
		{"full ones stay", segmentsOf(repeat(8, [2]int{3, 200})...), "[]"},
		{"those behind a full one", segmentsOf(append([][2]int{{0, 400}}, repeat(8, [2]int{0, 2})...)...), "[1 2 3 4 5 6 7 8]"},
	} {
		got := []string{}
		for _, s := range Mergeable(test.have) {
			got = append(got, s.Digest)
		}
		if fmt.Sprint(got) != test.want {
			t.Errorf("%s: %v, want %s", test.name, got, test.want)
		}
	}
}

// However long it goes on, few segments are left to ask.
func TestLevels(t *testing.T) {
	var list []*musterpb.Segment
	copied := int64(0)
	for i := range 5000 {
		list = append(list, &musterpb.Segment{Digest: fmt.Sprint(i), Bytes: 1 << 20})
		for {
			run := Mergeable(list)
			if run == nil {
				break
			}
			at := slices.Index(list, run[0])
			out := &musterpb.Segment{Digest: run[0].Digest, Level: run[0].Level + 1}
			for _, s := range run {
				out.Bytes += s.Bytes
			}
			copied += out.Bytes
			list = slices.Replace(list, at, at+len(run), out)
		}
	}
	if full := 5000 / 256; len(list) > full+4*fanIn {
		t.Errorf("%d segments are left of 5000 MiB", len(list))
	}
	if perByte := float64(copied) / (5000 << 20); perByte > 4 {
		t.Errorf("every byte was copied %.1f times", perByte)
	}
}

// A reader whose segments are merged, and deleted, while it reads starts again.
func TestMergedWhileReading(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	h := &history{}
	var jobs []Job
	for i := range 4 {
		j := makeJob(r, uint64(i+1), "acme", 3)
		jobs = append(jobs, j)
		h.add(t, content{jobs: []Job{j}})
	}
	old := &stale{history: h, once: h.Segments()}
	a := New(&h.store, old, 0)
	h.merge(t, 0, 4)
	for _, j := range jobs {
		old.asked = false
		got, err := a.Job(t.Context(), j.Job.Id)
		must(t, err)
		equal(t, "job", []*musterpb.Job{got}, []*musterpb.Job{j.Job})
	}
	// One that the state still names is an error, and no answer.
	must(t, h.store.Delete(t.Context(), api.Digest(h.segments[0].Digest)))
	for _, id := range []string{jobs[0].Job.Id, "job-unknown"} {
		if _, err := a.Job(t.Context(), id); api.KindOf(err) != api.Unavailable || !strings.Contains(err.Error(), h.segments[0].Digest) {
			t.Errorf("with the segment gone: %v", err)
		}
	}
}

// stale answers once with segments that are no more.
type stale struct {
	*history
	once  []*musterpb.Segment
	asked bool
}

func (s *stale) Segments() []*musterpb.Segment {
	if !s.asked {
		s.asked = true
		return s.once
	}
	return s.history.Segments()
}

// A store that can't be reached is no damage, and a context that ends is not either.
func TestUnavailable(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 10))
	h := &history{}
	j := makeJob(r, 1, "acme", 3)
	h.add(t, content{jobs: []Job{j}})
	a := New(&h.store, h, 0)
	h.store.Fail = func(string, api.Digest) error { return api.Errorf(api.Unavailable, "the disk of a store is full") }
	if _, err := a.Job(t.Context(), j.Job.Id); api.KindOf(err) != api.Unavailable {
		t.Errorf("a store that fails: %v", err)
	}
	h.store.Fail = nil
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.Job(ctx, j.Job.Id); api.KindOf(err) != api.Unavailable {
		t.Errorf("a call that was given up: %v", err)
	}
	if _, err := a.Job(t.Context(), j.Job.Id); err != nil {
		t.Errorf("once it is back: %v", err)
	}
}

// Every changed byte is found, or changes nothing that anybody reads.
func TestDamage(t *testing.T) {
	r := rand.New(rand.NewPCG(11, 12))
	var transfer uint64
	var c content
	for i := range 20 {
		j := makeJob(r, uint64(i+1), accountNames[i%2], i)
		c.jobs, c.transfers = append(c.jobs, j), append(c.transfers, transfersOf(r, &transfer, j)...)
	}
	c.batches = []*musterpb.Batch{{Epoch: 1, Digest: []byte("x")}}
	var b bytes.Buffer
	seg := writeTo(t, &b, c)
	good := b.Bytes()
	found := 0
	for range 400 {
		bad := slices.Clone(good)
		at := r.IntN(len(bad))
		bad[at] ^= byte(1 + r.IntN(255))
		if err := readAll(t, seg, bad, c.jobs); err != nil {
			found++
			if api.KindOf(err) != api.Internal || !strings.Contains(err.Error(), seg.Digest) {
				t.Fatalf("byte %d: %v", at, err)
			}
		}
	}
	// Only the magic at the start and the padding of pages are not looked at.
	if found < 300 {
		t.Errorf("of 400 changed bytes, %d were found", found)
	}
	for _, n := range []int{0, 1, trailerBytes, len(good) / 2, len(good) - 1} {
		if err := readAll(t, seg, good[:n], c.jobs); api.KindOf(err) != api.Internal || err == nil {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
	must(t, readAll(t, seg, good, c.jobs))
}

// unverified is a store of one blob whose bytes may be anything.
type unverified struct {
	blob.Memory
	data []byte
}

type plain struct{ *bytes.Reader }

func (plain) Close() error { return nil }

func (s *unverified) Open(context.Context, api.Digest) (blob.Reader, error) {
	return plain{bytes.NewReader(s.data)}, nil
}

type oneSegment []*musterpb.Segment

func (s oneSegment) Segments() []*musterpb.Segment { return s }

// readAll asks for everything that a segment can answer, merging included, and
// returns the first error; wrong answers fail the test.
func readAll(t tb, seg *musterpb.Segment, data []byte, jobs []Job) (first error) {
	store := &unverified{data: data}
	a := New(store, oneSegment{seg}, DefaultCache)
	ctx := t.Context()
	note := func(err error) {
		if err != nil && first == nil {
			first = err
		}
	}
	for _, j := range jobs {
		job, err := a.Job(ctx, j.Job.Id)
		if note(err); err != nil {
			continue
		}
		equal(t, "job", []*musterpb.Job{job}, []*musterpb.Job{j.Job})
		list, checks, _, err := a.Attempts(ctx, j.Job.Id, 0)
		if note(err); err == nil {
			equal(t, "attempts", list, j.Attempts)
			equal(t, "checks", checks, j.Checks)
		}
		tasks, _, err := a.Results(ctx, j.Job.Id, 0, 1000)
		if note(err); err == nil {
			equal(t, "tasks", tasks, j.Tasks)
		}
	}
	for _, account := range []string{"", "acme"} {
		_, err := a.Jobs(ctx, account, math.MaxUint64, 1000)
		note(err)
		_, _, err = a.Transfers(ctx, account, 0, 1000)
		note(err)
	}
	_, _, err := a.Batches(ctx, 0, 10)
	note(err)
	other := writeTo(t, &bytes.Buffer{}, content{})
	_, err = Merge(ctx, store, []*musterpb.Segment{seg, {Digest: other.Digest, Bytes: int64(len(data))}}, &bytes.Buffer{})
	if err != nil && strings.Contains(err.Error(), "comes after") {
		err = nil // the same segment twice: it got as far as the second
	}
	note(err)
	return first
}

// FuzzSegment reads anything as a segment.
func FuzzSegment(f *testing.F) {
	r := rand.New(rand.NewPCG(13, 14))
	var transfer uint64
	j := makeJob(r, 1, "acme", 3)
	for _, c := range []content{{}, {jobs: []Job{j}}, {jobs: []Job{j}, transfers: transfersOf(r, &transfer, j), batches: []*musterpb.Batch{{Epoch: 1}}}} {
		var b bytes.Buffer
		writeTo(f, &b, c)
		f.Add(b.Bytes())
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		store := &unverified{data: data}
		seg := &musterpb.Segment{Digest: string(api.DigestOf(data)), Bytes: int64(len(data)), Jobs: 1, LastTransfer: 1 << 40, LastEpoch: 1 << 40}
		a := New(store, oneSegment{seg}, 1<<20)
		for _, id := range []string{j.Job.Id, ""} {
			_, _ = a.Job(t.Context(), id)
			_, _, _, _ = a.Attempts(t.Context(), id, 1)
			_, _, _ = a.Results(t.Context(), id, 0, 100)
		}
		_, _ = a.Jobs(t.Context(), "acme", math.MaxUint64, 100)
		_, _ = a.Jobs(t.Context(), "", math.MaxUint64, 100)
		_, _, _ = a.Transfers(t.Context(), "acme", 0, 100)
		_, _, _ = a.Batches(t.Context(), 0, 100)
		_, _ = Merge(t.Context(), store, []*musterpb.Segment{seg, seg}, &bytes.Buffer{})
	})
}

// FuzzRecords goes behind the checksums: whatever the lists and the frames of a
// segment say, reading them ends.
func FuzzRecords(f *testing.F) {
	f.Add([]byte{1, 2, 3}, uint32(0), uint32(0), uint64(3), uint32(1))
	f.Fuzz(func(t *testing.T, raw []byte, offset, frame uint32, records uint64, frames uint32) {
		s := &segment{ctx: t.Context(), cache: newCache(1 << 30), digest: "x", size: 1 << 20}
		list := &musterpb.SealedFrames{}
		for k := range kinds {
			for i := range 3 {
				s.cache.put(cacheKey{digest: "x", part: partFrame, kind: k, number: uint64(i)}, raw, 1)
				appendFrame(list, heads, frameOf(raw, records, uint64(i)))
				list.Second = append(list.Second, records)
			}
			s.cache.put(cacheKey{digest: "x", part: partList, kind: k}, list, 1)
			list = &musterpb.SealedFrames{}
		}
		run := &musterpb.SealedRun{Frame: frame, Offset: offset, Frames: frames, Records: records}
		job := &found{SealedJob: &musterpb.SealedJob{Attempts: run, Checks: run, Tasks: run}}
		_ = s.attempts(job, 1, func(*musterpb.Attempt) bool { return true })
		_, _ = s.checks(job, 1, 5)
		_, _ = s.tasks(job, 1, 5)
		_, _ = s.jobAt(place{frame, offset})
		_, _ = s.jobs("acme", math.MaxUint64, 10)
		_, _ = s.jobs("", math.MaxUint64, 10)
		_, _ = s.transfers("acme", 0, 10)
		_, _ = s.transfers("", 0, 10)
		_, _ = s.batches(0, 10)
	})
}

func frameOf(raw []byte, records, first uint64) frame {
	return frame{raw: uint32(len(raw)), records: min(records, uint64(len(raw))), first: first}
}
