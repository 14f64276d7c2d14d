package scheduler

import (
	"context"
	"crypto/ed25519"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/archive"
	"github.com/musternet/muster/scheduler/ledger"
)

// quickSeals are for tests that wait for them.
var quickSeals = Timing{SealAfter: 20 * time.Millisecond, SegmentGrace: 100 * time.Millisecond}

// machine registers a worker of an owner that never connects.
func (r *rig) machine(owner string) string {
	key := newKey(r.t).Public().(ed25519.PublicKey)
	return r.propose(&musterpb.Command{Body: &musterpb.Command_RegisterWorker{RegisterWorker: &musterpb.RegisterWorker{Worker: &musterpb.Worker{
		Id: string(api.WorkerIDOf(key)), PublicKey: key, Owner: owner, PriceMicroUsdPerHour: 1000,
		Capacity: &musterpb.Capacity{MilliCpus: 1 << 40, MemoryBytes: 1 << 50, DiskBytes: 1 << 50, Runtimes: []string{"wasm"}, Platform: "linux/amd64"},
	}}}})
}

// past is a job as it was when it ended, with what belongs to it.
type past struct {
	job      *musterpb.Job
	attempts []*musterpb.Attempt
	tasks    []*musterpb.Task
}

// end submits a job, places so many of its tasks, and cancels it. What it
// returns was read before: nothing may be sealed while it goes on.
func (r *rig) end(worker string, attempts int) past {
	r.t.Helper()
	id := r.submit(attempts + 3)
	for n := range attempts {
		r.propose(&musterpb.Command{Body: &musterpb.Command_PlaceAttempt{PlaceAttempt: &musterpb.PlaceAttempt{
			Attempt: newID("att-"), Job: id, Task: uint32(n), Worker: worker,
		}}})
	}
	r.propose(&musterpb.Command{Body: &musterpb.Command_CancelJob{CancelJob: &musterpb.CancelJob{Job: id, Reason: "cancelled by acme"}}})
	p := past{job: r.st.Job(id), attempts: r.st.Attempts(id)}
	for n := range attempts {
		p.tasks = append(p.tasks, r.st.Task(id, uint32(n)))
	}
	if p.job == nil || !p.job.Settled || len(p.attempts) != attempts || r.st.Job(id) == nil {
		r.t.Fatalf("the test was too slow: job %s was sealed before it was read, or is not settled: %v", id, p.job)
	}
	return p
}

// found checks that the archive has a job as it was.
func (p past) found(t *testing.T, a *archive.Archive) {
	t.Helper()
	job, err := a.Job(t.Context(), p.job.Id)
	if err != nil || !proto.Equal(job, p.job) {
		t.Errorf("the archive has %v (%v) where the state had %v", job, err, p.job)
	}
	attempts, _, _, err := a.Attempts(t.Context(), p.job.Id, 0)
	if err != nil || !slices.EqualFunc(attempts, p.attempts, func(a, b *musterpb.Attempt) bool { return proto.Equal(a, b) }) {
		t.Errorf("job %s: the archive has the attempts %v (%v) where the state had %v", p.job.Id, attempts, err, p.attempts)
	}
	tasks, _, err := a.Results(t.Context(), p.job.Id, 0, 1000)
	if err != nil || !slices.EqualFunc(tasks, p.tasks, func(a, b *musterpb.Task) bool { return proto.Equal(a, b) }) {
		t.Errorf("job %s: the archive has the tasks %v (%v) where the state had %v", p.job.Id, tasks, err, p.tasks)
	}
}

func (r *rig) sealed(id string) {
	r.t.Helper()
	r.eventually("job "+id+" to be sealed", func() bool { return r.st.Job(id) == nil })
}

// transfers are all there ever were, sealed and not.
func (r *rig) transfers(a *archive.Archive, account string) []*musterpb.Transfer {
	r.t.Helper()
	list, through, err := a.Transfers(r.t.Context(), account, 0, math.MaxInt)
	if err != nil {
		r.t.Fatal(err)
	}
	rest, _ := r.st.Transfers(account, through, 1<<20)
	return append(list, rest...)
}

func TestSealing(t *testing.T) {
	f := &failing{fail: api.Errorf(api.Unavailable, "not yet")} // nothing is sealed before the test has read it
	r := newRigWith(t, Timing{SealAfter: 100 * time.Millisecond}, func(s *slowStore) { s.Fail = f.ask })
	a := archive.New(r.blobs, r.st, archive.DefaultCache)
	worker := r.machine("alice")
	goes := r.submit(5) // goes on all the while
	var jobs []past
	for i := range 4 {
		jobs = append(jobs, r.end(worker, i))
	}
	before, balance := r.transfers(a, ""), r.st.Balance("acme")
	own := r.transfers(a, "acme")
	f.set(nil)
	for _, p := range jobs {
		r.sealed(p.job.Id)
		p.found(t, a)
	}
	if r.st.Job(goes) == nil {
		t.Error("a job that goes on was sealed")
	}
	if now := r.st.Balance("acme"); !proto.Equal(now, balance) {
		t.Errorf("the balance was %v and is %v", balance, now)
	}
	for account, want := range map[string][]*musterpb.Transfer{"": before, "acme": own} {
		if got := r.transfers(a, account); !slices.EqualFunc(got, want, func(a, b *musterpb.Transfer) bool { return proto.Equal(a, b) }) {
			t.Errorf("transfers of %q: %d where there were %d", account, len(got), len(want))
		}
	}
	if sum := r.st.LedgerSum(); sum != 0 {
		t.Errorf("the book has the sum %s", sum)
	}
	entries, err := os.ReadDir(filepath.Join(r.sched.Dir, "sealing"))
	if err != nil || len(entries) > 0 {
		t.Errorf("files are left: %v (%v)", entries, err)
	}
	// Transfers of jobs that go on leave, too, by and by.
	r.propose(&musterpb.Command{Body: &musterpb.Command_FundJob{FundJob: &musterpb.FundJob{Job: goes, AmountMicroUsd: 7}}})
	r.eventually("the transfers of a live job", func() bool {
		rest, _ := r.st.Transfers("", 0, 10)
		return len(rest) == 0
	})
	list := r.transfers(a, "acme")
	if last := list[len(list)-1]; last.AmountMicroUsd != 7 || last.Credit != ledger.OfJob(goes) {
		t.Errorf("the newest transfer of acme is %v", last)
	}
}

// failing is a store whose Put fails, before or after it worked.
type failing struct {
	mu   sync.Mutex
	fail error // guarded by mu
}

func (f *failing) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = err
}

func (f *failing) ask(op string, _ api.Digest) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if op == "put" {
		return f.fail
	}
	return nil
}

// While nothing can be stored nothing leaves the state, and what could not be
// stored is later.
func TestSealingToAFailingStore(t *testing.T) {
	for _, test := range []struct {
		name string
		into func(*slowStore, *failing)
	}{
		{"refused", func(s *slowStore, f *failing) { s.Fail = f.ask }},
		{"stored, but nobody was told", func(s *slowStore, f *failing) { s.Lose = f.ask }},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := &failing{fail: api.Errorf(api.Unavailable, "the disk is full")}
			r := newRigWith(t, Timing{SealAfter: 20 * time.Millisecond}, func(s *slowStore) { test.into(s, f) })
			a := archive.New(r.blobs, r.st, 0)
			p := r.end(r.machine("alice"), 2)
			r.eventually("a seal that failed", func() bool { return r.warned("sealing finished work failed") })
			if r.st.Job(p.job.Id) == nil || len(r.st.Segments()) > 0 {
				t.Error("a job left the state although nothing was stored")
			}
			f.set(nil)
			r.sealed(p.job.Id)
			p.found(t, a)
		})
	}
}

func TestMergingSegments(t *testing.T) {
	r := newRig(t, quickSeals)
	a := archive.New(r.blobs, r.st, archive.DefaultCache)
	worker := r.machine("alice")
	var jobs []past
	merged := func() bool {
		return slices.ContainsFunc(r.st.Segments(), func(s *musterpb.Segment) bool { return s.Level > 0 })
	}
	for !merged() {
		if len(jobs) > 100 {
			t.Fatalf("nothing was merged of %d segments", len(r.st.Segments()))
		}
		id := r.submit(1)
		r.propose(&musterpb.Command{Body: &musterpb.Command_PlaceAttempt{PlaceAttempt: &musterpb.PlaceAttempt{Attempt: newID("att-"), Job: id, Worker: worker}}})
		r.propose(&musterpb.Command{Body: &musterpb.Command_CancelJob{CancelJob: &musterpb.CancelJob{Job: id}}})
		jobs = append(jobs, past{job: &musterpb.Job{Id: id}})
		r.sealed(id)
	}
	for _, p := range jobs {
		if _, err := a.Job(t.Context(), p.job.Id); err != nil {
			t.Error(err)
		}
	}
	r.eventually("the replaced segments to be deleted", func() bool { return r.blobs.Len() == len(r.st.Segments()) })
	for _, p := range jobs {
		if list, _, _, err := a.Attempts(t.Context(), p.job.Id, 0); err != nil || len(list) != 1 {
			t.Errorf("%d attempts of job %s: %v", len(list), p.job.Id, err)
		}
	}
}

// A segment that the state refuses is deleted again; one of which that is not
// known stays.
func TestRefusedSegment(t *testing.T) {
	r := newRig(t, Timing{SealAfter: time.Hour})
	l, err := r.sched.leading()
	if err != nil {
		t.Fatal(err)
	}
	store := func() *musterpb.Segment {
		_, segment, err := l.storeSegment(t.Context(), t.TempDir(), func(w io.Writer) (*musterpb.Segment, error) {
			return archive.NewWriter(w).Close()
		})
		if err != nil || r.blobs.Len() != 1 {
			t.Fatalf("storing: %v, %d blobs", err, r.blobs.Len())
		}
		return segment
	}
	segment := store()
	nothing := &musterpb.Command{Body: &musterpb.Command_Seal{Seal: &musterpb.Seal{Segment: segment}}}
	if err := l.name(t.Context(), segment, nothing); api.KindOf(err) != api.Invalid {
		t.Errorf("a segment of nothing: %v", err)
	}
	if r.blobs.Len() != 0 {
		t.Error("a segment that was refused is still there")
	}
	segment = store()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.name(ctx, segment, nothing); api.KindOf(err) != api.Unavailable {
		t.Errorf("without an answer: %v", err)
	}
	if r.blobs.Len() != 1 {
		t.Error("a segment was deleted that the state may come to name")
	}
	// What fails while it is written is not stored.
	failed := errors.New("no")
	if _, _, err := l.storeSegment(t.Context(), t.TempDir(), func(io.Writer) (*musterpb.Segment, error) { return nil, failed }); !errors.Is(err, failed) || r.blobs.Len() != 1 {
		t.Errorf("a segment that could not be written: %v, %d blobs", err, r.blobs.Len())
	}
}

// What is being examined keeps its job in memory, and others go without it.
func TestBusyJobsStay(t *testing.T) {
	r := newRig(t, Timing{SealAfter: 100 * time.Millisecond, SegmentGrace: time.Second})
	l, err := r.sched.leading()
	if err != nil {
		t.Fatal(err)
	}
	worker := r.machine("alice")
	id := r.submit(1)
	attempt := r.propose(&musterpb.Command{Body: &musterpb.Command_PlaceAttempt{PlaceAttempt: &musterpb.PlaceAttempt{Attempt: newID("att-"), Job: id, Worker: worker}}})
	l.mu.Lock()
	l.busy[attempt] = true
	l.mu.Unlock()
	r.propose(&musterpb.Command{Body: &musterpb.Command_CancelJob{CancelJob: &musterpb.CancelJob{Job: id}}})
	other := r.submit(1)
	r.propose(&musterpb.Command{Body: &musterpb.Command_CancelJob{CancelJob: &musterpb.CancelJob{Job: other}}})
	r.sealed(other)
	if r.st.Job(id) == nil {
		t.Error("a job was sealed while one of its results was examined")
	}
	l.mu.Lock()
	delete(l.busy, attempt)
	l.mu.Unlock()
	r.sealed(id)
}

// Too much at once does not wait to become old.
func TestSealingUnderPressure(t *testing.T) {
	r := newRig(t, Timing{SealAfter: time.Hour})
	const jobs = sealPressure + 1000
	spec := r.st.Job(r.submit(1)).Spec
	for range jobs / 1000 {
		var cmds []*musterpb.Command
		for range 1000 {
			id := newID("job-")
			cmds = append(cmds, &musterpb.Command{Body: &musterpb.Command_SubmitJob{SubmitJob: &musterpb.SubmitJob{
				Job: id, Account: "acme", Spec: spec, PermutationKey: make([]byte, 32),
			}}}, &musterpb.Command{Body: &musterpb.Command_CancelJob{CancelJob: &musterpb.CancelJob{Job: id}}})
		}
		if _, err := r.sched.Replica.ProposeAll(t.Context(), cmds); err != nil {
			t.Fatal(err)
		}
	}
	r.eventually("jobs to be sealed", func() bool { return len(r.st.Segments()) > 0 })
	var sealed uint64
	for _, s := range r.st.Segments() {
		if s.Jobs > sealAttempts {
			t.Errorf("a segment has %d jobs", s.Jobs)
		}
		sealed += s.Jobs
	}
	if live := len(r.st.Jobs("acme", 2*jobs)) - 1; sealed+uint64(live) != jobs { // the first goes on
		t.Errorf("%d jobs are sealed and %d are not, of %d", sealed, live, jobs)
	}
}
