package worker

import (
	"crypto/ed25519"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/verify"
)

func TestNewsTravelTogether(t *testing.T) {
	n := newNews()
	var signed []int
	sign := func(commits ...*musterpb.Commit) { signed = append(signed, len(commits)) }
	if m := n.take(sign); m != nil {
		t.Errorf("there is nothing to say, and it says %v", m)
	}
	for i := range 3 {
		n.sayStarted(fmt.Sprint(i))
		n.sayEnded(&report{commit: &musterpb.Commit{Attempt: fmt.Sprint(i)}, blobs: [][]byte{{byte(i)}}})
	}
	n.sayEnded(&report{failed: &musterpb.AttemptFailed{Attempt: "3"}})
	select {
	case <-n.wake:
	default:
		t.Error("nobody was woken")
	}
	signed = nil
	r := n.take(sign).GetReports()
	if len(r.GetStarted()) != 3 || len(r.Commits) != 3 || len(r.Blobs) != 3 || len(r.Failed) != 1 || len(signed) != 1 || signed[0] != 3 {
		t.Errorf("%v, signed %v; want all of it in one message with one signature", r, signed)
	}
	if m := n.take(sign); m != nil {
		t.Errorf("%v is said twice", m)
	}
}

// Results that end while the ones before are not answered wait for the answer,
// and not for longer than they may.
func TestResultsWaitForTheAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNews()
		sign := func(...*musterpb.Commit) {}
		end := func(attempt string) {
			n.sayEnded(&report{commit: &musterpb.Commit{Attempt: attempt}, blobs: [][]byte{{1}}})
		}
		said := func() (ids []string) {
			for _, c := range n.take(sign).GetReports().GetCommits() {
				ids = append(ids, c.Attempt)
			}
			return ids
		}
		end("1")
		if got := said(); !slices.Equal(got, []string{"1"}) {
			t.Errorf("at first it says %v", got)
		}
		end("2")
		end("3")
		n.sayStarted("4")
		if m := n.take(sign).GetReports(); len(m.GetCommits()) > 0 || len(m.Started) != 1 {
			t.Errorf("before the answer it says %v; want the start alone", m)
		}
		n.answered("1")
		<-n.wake
		if got := said(); !slices.Equal(got, []string{"2", "3"}) {
			t.Errorf("after the answer it says %v", got)
		}
		end("5")
		n.answered("2")
		if got := said(); got != nil {
			t.Errorf("after half of the answer it says %v", got)
		}
		for len(n.wake) > 0 {
			<-n.wake
		}
		began := time.Now()
		<-n.wake // by itself
		if got := said(); !slices.Equal(got, []string{"5"}) || time.Since(began) > maxHold {
			t.Errorf("after %s it says %v", time.Since(began), got)
		}
		end("6")
		n.sayEnded(&report{commit: &musterpb.Commit{Attempt: "large"}}) // uploaded: it waits for nobody
		if got := said(); !slices.Equal(got, []string{"6", "large"}) {
			t.Errorf("with a large result it says %v", got)
		}
		end("7")
		n.begin() // another session: nobody will answer what the last one took
		if got := said(); !slices.Equal(got, []string{"7"}) {
			t.Errorf("in a new session it says %v", got)
		}
	})
}

// A report that waits is said again when a session begins: once in a message,
// under a signature that holds.
func TestReportSaidTwice(t *testing.T) {
	public, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	n := newNews()
	var list []*report
	for i := range 3 {
		digest := string(api.DigestOf([]byte{byte(i)}))
		list = append(list, &report{commit: &musterpb.Commit{Attempt: fmt.Sprint(i), Root: make([]byte, 32), ManifestDigest: digest, ArchiveDigest: digest}})
	}
	for range 2 {
		for _, r := range list {
			n.sayStarted(r.commit.Attempt)
			n.sayEnded(r)
		}
	}
	m := n.take(func(c ...*musterpb.Commit) { verify.SignCommits(key, c...) }).GetReports()
	if len(m.GetCommits()) != 3 || len(m.Started) != 3 {
		t.Errorf("%d commits and %d starts, want 3", len(m.Commits), len(m.Started))
	}
	for _, err := range verify.CheckCommits(public, m.Commits) {
		if err != nil {
			t.Error(err)
		}
	}
}

func TestNewsAreBounded(t *testing.T) {
	n := newNews()
	sign := func(...*musterpb.Commit) {}
	for i := range 5 {
		n.sayEnded(&report{commit: &musterpb.Commit{Attempt: fmt.Sprint(i)}, blobs: [][]byte{make([]byte, maxReportsBytes/2)}})
	}
	n.sayEnded(&report{commit: &musterpb.Commit{Attempt: "5"}, blobs: [][]byte{make([]byte, 2*maxReportsBytes)}})
	next := 0
	for m := n.take(sign); m != nil; m = n.take(sign) {
		n.begin() // as if all were answered
		commits := m.GetReports().Commits
		if size := m.SizeVT(); size > maxReportsBytes+1000 && len(commits) > 1 {
			t.Errorf("a message of %d results has %d bytes", len(commits), size)
		}
		for _, c := range commits {
			if c.Attempt != fmt.Sprint(next) {
				t.Errorf("result %s in the place of %d", c.Attempt, next)
			}
			next++
		}
	}
	if next != 6 {
		t.Errorf("%d of 6 results were said", next)
	}
	for i := range maxNews + 10 {
		n.sayStarted(fmt.Sprint(i))
	}
	if got := len(n.take(sign).GetReports().Started); got != maxNews {
		t.Errorf("%d starts waited, at most %d may", got, maxNews)
	}
}
