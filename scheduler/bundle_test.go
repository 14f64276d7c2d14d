package scheduler

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/outputs"
	"github.com/musternet/muster/verify"
)

// inlined makes honest results that travel with their report.
func (p *pipe) inlined(work ...*musterpb.Assignment) *musterpb.Reports {
	p.t.Helper()
	r := &musterpb.Reports{}
	for _, a := range work {
		var items []outputs.ItemFiles
		for _, index := range a.Indexes {
			items = append(items, outputs.ItemFiles{Item: outputs.Item{Index: index, Value: index}, Files: []outputs.File{{Path: "x", Data: fmt.Append(nil, index)}}})
		}
		archive, entries, summary, err := outputs.Build(items, outputs.Limits{Bytes: 1 << 20, Files: 10})
		if err != nil {
			p.t.Fatal(err)
		}
		for _, e := range entries {
			e.InputDigest, e.ParametersDigest = verify.InputDigest(a.Inputs), verify.ParametersDigest(a.Image.Digest, a.Command, a.Env)
		}
		m := &musterpb.Manifest{Attempt: a.Attempt, Items: entries}
		data, err := m.MarshalVT()
		if err != nil {
			p.t.Fatal(err)
		}
		log := []byte("what " + a.Attempt + " said")
		r.Blobs = append(r.Blobs, data, archive, log)
		r.Commits = append(r.Commits, &musterpb.Commit{
			Attempt: a.Attempt, Root: verify.Root(m), ManifestDigest: string(api.DigestOf(data)), ArchiveDigest: string(summary.Digest),
			ArchiveBytes: summary.ArchiveBytes, OutputBytes: summary.OutputBytes, LogDigest: string(api.DigestOf(log)),
		})
		r.Started = append(r.Started, a.Attempt)
	}
	verify.SignCommits(p.key, r.Commits...)
	return r
}

func (p *pipe) assignedAll(n int) (work []*musterpb.Assignment) {
	for range n {
		work = append(work, p.assigned())
	}
	return work
}

// accepted wants all attempts accepted, in any order.
func (p *pipe) accepted(work []*musterpb.Assignment) {
	p.t.Helper()
	missing := map[string]bool{}
	for _, a := range work {
		missing[a.Attempt] = true
	}
	for len(missing) > 0 {
		if o := outcomeIn(p.next("outcome")); missing[o.GetAttempt()] {
			if delete(missing, o.Attempt); !o.Accepted {
				p.t.Errorf("%v", o)
			}
		}
	}
}

// stored reads a result's three parts back from its bundle.
func (r *rig) stored(attempt string) (bundle string) {
	r.t.Helper()
	a := r.st.Attempt(attempt)
	if a.Stored == nil {
		r.t.Fatalf("%s is not in a bundle", attempt)
	}
	manifest, err := blob.OpenManifest(r.t.Context(), r.blobs, a.Commit.ManifestDigest, a.Stored)
	if err != nil {
		r.t.Fatal(err)
	}
	data, _ := io.ReadAll(manifest)
	m := &musterpb.Manifest{}
	if err := m.UnmarshalVT(data); err != nil || m.Attempt != attempt {
		r.t.Fatalf("the manifest of %s is %v, %v", attempt, m, err)
	}
	archive, err := blob.OpenArchive(r.t.Context(), r.blobs, a.Commit.ArchiveDigest, a.Commit.ArchiveBytes, a.Stored)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, item := range m.Items {
		files, err := outputs.OpenItem(r.t.Context(), archive, item, outputs.Limits{Bytes: 1 << 20, Files: 10})
		if err != nil || string(files[0].Data) != fmt.Sprint(item.Index) {
			r.t.Errorf("item %d of %s: %v, %v", item.Index, attempt, files, err)
		}
	}
	log, err := blob.OpenLog(r.t.Context(), r.blobs, a.LogDigest, a.Stored)
	if err != nil {
		r.t.Fatal(err)
	}
	if text, _ := io.ReadAll(log); string(text) != "what "+attempt+" said" {
		r.t.Errorf("the log of %s is %q", attempt, text)
	}
	return a.Stored.Bundle
}

func TestResultsInOneReport(t *testing.T) {
	r := newRig(t, Timing{BatchInterval: time.Hour, LeaseTTL: time.Minute})
	p := r.connect("alice", newKey(t))
	r.submit(5)
	work := p.assignedAll(5)
	report := p.inlined(work...)
	report.Blobs[3*2+1][4] ^= 1 // the third's outputs are not what it signed
	p.say(reported(report))
	for i, a := range work {
		if i == 2 {
			continue
		}
		if o := p.outcome(a.Attempt); !o.Accepted {
			t.Errorf("attempt %d: %v", i, o)
		}
		got := r.st.Attempt(a.Attempt)
		if got.State != committed || got.StartedUnixMs < got.PlacedUnixMs || got.CommittedUnixMs < got.StartedUnixMs {
			t.Errorf("attempt %d is %v", i, got)
		}
		r.stored(a.Attempt)
	}
	// What did not come along is looked for in the store, and is not there.
	r.eventually("the end of the third", func() bool { return r.state(work[2].Attempt) == musterpb.AttemptState_ATTEMPT_STATE_FAILED })
	if got := r.st.Attempt(work[2].Attempt); got.Blame != musterpb.Blame_BLAME_WORKER || !strings.Contains(got.Reason, "was not uploaded") {
		t.Errorf("the third ended with %v: %s", got.Blame, got.Reason)
	}
	// A repeat is answered, signed with others or alone.
	again := p.inlined(work[0])
	p.say(reported(again))
	if o := p.outcome(work[0].Attempt); !o.Accepted {
		t.Errorf("a repeat: %v", o)
	}
}

func TestInlineResultIsExamined(t *testing.T) {
	r := newRig(t, Timing{BatchInterval: time.Hour, LeaseTTL: time.Minute})
	p := r.connect("alice", newKey(t))
	r.submit(3)
	work := p.assignedAll(3)
	for i, test := range []struct {
		change func(*musterpb.Reports)
		want   string
	}{
		{func(r *musterpb.Reports) { r.Commits[0].Signature = make([]byte, 64) }, "not by the worker"},
		{func(r *musterpb.Reports) {
			r.Commits[0].Root = make([]byte, 32)
			verify.SignCommits(p.key, r.Commits...)
		}, "Merkle root"},
		{func(r *musterpb.Reports) { r.Commits[0].OutputBytes++; verify.SignCommits(p.key, r.Commits...) }, "were signed"},
	} {
		report := p.inlined(work[i])
		test.change(report)
		p.say(reported(report))
		if o := p.outcome(work[i].Attempt); o.Accepted || !strings.Contains(o.Reason, test.want) {
			t.Errorf("%v; want a refusal with %q", o, test.want)
		}
		if got := r.st.Attempt(work[i].Attempt); got.LogDigest != "" {
			log, err := blob.OpenLog(t.Context(), r.blobs, got.LogDigest, got.Stored)
			if err != nil {
				t.Fatalf("the log of a refused result: %v", err)
			}
			log.Close()
		} else if i > 0 { // the first was not signed, so nothing of it is believed
			t.Error("the log of a refused result is gone")
		}
		if got := r.st.Attempt(work[i].Attempt); got.State != musterpb.AttemptState_ATTEMPT_STATE_FAILED || got.Blame != musterpb.Blame_BLAME_WORKER {
			t.Errorf("the attempt is %v, blamed on %v", got.State, got.Blame)
		}
	}
}

// Nothing is marked done without its bytes: while the store is out of reach there
// is no answer, and the worker's next offer is taken.
func TestBundleThatCannotBeStored(t *testing.T) {
	r := newRig(t, Timing{BatchInterval: time.Hour, LeaseTTL: time.Minute})
	p := r.connect("alice", newKey(t))
	r.submit(2)
	work := p.assignedAll(2)
	tried := make(chan struct{}, 10)
	var reachable atomic.Bool
	r.blobs.Fail = func(op string, _ api.Digest) error {
		if op == "put" && !reachable.Load() {
			tried <- struct{}{}
			return api.Errorf(api.Unavailable, "%w", errors.New("out of reach"))
		}
		return nil
	}
	p.say(reported(p.inlined(work...)))
	<-tried
	l, err := r.sched.leading()
	if err != nil {
		t.Fatal(err)
	}
	r.eventually("the attempts to be free again", func() bool { return !l.examined(work[0].Attempt) && !l.examined(work[1].Attempt) })
	for _, a := range work {
		if s := r.state(a.Attempt); s == committed {
			t.Errorf("%s is %v without its bytes", a.Attempt, s)
		}
	}
	reachable.Store(true)
	p.say(reported(p.inlined(work...)))
	p.accepted(work)
	for _, a := range work {
		r.stored(a.Attempt)
	}
}

// Whoever may read a result can read its bundle, so no two accounts share one.
func TestBundlesKeepAccountsApart(t *testing.T) {
	r := newRig(t, Timing{BatchInterval: time.Hour, LeaseTTL: time.Minute})
	r.propose(&musterpb.Command{Body: &musterpb.Command_Deposit{Deposit: &musterpb.Deposit{Account: "bob", AmountMicroUsd: 1e12}}})
	p := r.connect("alice", newKey(t))
	r.submitFor("acme", 2)
	work := p.assignedAll(2)
	r.submitFor("bob", 2)
	work = append(work, p.assignedAll(2)...)
	p.say(reported(p.inlined(work...)))
	p.accepted(work)
	bundles := map[string]string{} // bundle → account
	for _, a := range work {
		account := r.st.Job(r.st.Attempt(a.Attempt).Job).Account
		bundle := r.stored(a.Attempt)
		if other, ok := bundles[bundle]; ok && other != account {
			t.Errorf("%s and %s share a bundle", account, other)
		}
		bundles[bundle] = account
	}
	if len(bundles) != 2 {
		t.Errorf("4 results of one report are in %d bundles, want one for each account", len(bundles))
	}
}

// A program that says much has its log uploaded by itself; its small result
// travels all the same.
func TestInlineResultWithItsLogUploaded(t *testing.T) {
	r := newRig(t, Timing{BatchInterval: time.Hour, LeaseTTL: time.Minute})
	p := r.connect("alice", newKey(t))
	r.submit(2)
	work := p.assignedAll(2)
	for i, a := range work {
		report := p.inlined(a)
		log := []byte("what " + a.Attempt + " said")
		report.Blobs = report.Blobs[:2]
		if i == 0 {
			if _, err := r.blobs.Put(t.Context(), api.DigestOf(log), blob.Bytes(log), int64(len(log))); err != nil {
				t.Fatal(err)
			}
		}
		p.say(reported(report))
		if o := p.outcome(a.Attempt); o.Accepted != (i == 0) || i == 1 && !strings.Contains(o.Reason, "log of "+a.Attempt) {
			t.Errorf("attempt %d: %v", i, o)
		}
	}
	r.stored(work[0].Attempt)
}

// However often a start is said, it is entered once.
func TestStartSaidOften(t *testing.T) {
	r := newRig(t, Timing{BatchInterval: time.Hour, LeaseTTL: time.Minute})
	p := r.connect("alice", newKey(t))
	r.submit(1)
	a := p.assigned()
	before := r.sched.Replica.Applied()
	p.say(reported(&musterpb.Reports{Started: slices.Repeat([]string{a.Attempt}, 10_000)}))
	r.eventually("the start", func() bool { return r.state(a.Attempt) == running })
	if n := r.sched.Replica.Applied() - before; n > 3 {
		t.Errorf("%d log entries for one start", n)
	}
}
