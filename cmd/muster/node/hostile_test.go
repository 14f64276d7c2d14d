package node_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"image"
	"image/png"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/verify"
)

// What a worker that lies in the handshake gets to hear.
func TestHandshakeRefusals(t *testing.T) {
	t.Parallel()
	l := newLab(t, 1)
	ended := func(w *rawWorker, kind api.Kind, want string) {
		t.Helper()
		_, err := w.stream.Receive()
		if err := api.FromConnect(err); api.KindOf(err) != kind || !strings.Contains(err.Error(), want) {
			t.Errorf("%v (%v); want %s (%v)", err, api.KindOf(err), want, kind)
		}
	}
	t.Run("signature by another key", func(t *testing.T) {
		w := l.worker("mallory")
		w.dial()
		nonce := w.exchange(w.hello()).GetChallenge().GetNonce()
		other := l.worker("mallory")
		w.send(other.proof(nonce))
		ended(w, api.Unauthenticated, "the challenge is not signed by its key")
	})
	t.Run("no hello", func(t *testing.T) {
		w := l.worker("mallory")
		w.dial()
		w.send(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Heartbeat{Heartbeat: &musterpb.Heartbeat{}}})
		ended(w, api.Invalid, "a session starts with the worker's hello")
	})
	t.Run("silence", func(t *testing.T) {
		w := l.worker("mallory")
		w.dial()
		if err := w.stream.Send(nil); err != nil { // headers only
			t.Fatal(err)
		}
		ended(w, api.Unavailable, "did not say who it is within 1s")
	})
	t.Run("silence after the hello", func(t *testing.T) {
		w := l.worker("mallory")
		w.dial()
		w.exchange(w.hello())
		ended(w, api.Unavailable, "did not say who it is within 1s")
	})
	t.Run("another account's worker", func(t *testing.T) {
		w := l.worker("alice").connect()
		w.leave()
		w.account = l.account("mallory")
		w.dial()
		w.send(w.proofOf(w.exchange(w.hello())))
		ended(w, api.Denied, `belongs to account "alice"`)
	})
	t.Run("a hello without an end", func(t *testing.T) {
		w := l.worker("mallory")
		w.dial()
		hello := w.hello()
		hello.GetHello().Name = strings.Repeat("x", 100_000)
		w.send(hello)
		ended(w, api.Invalid, "at most 65536 are taken")
	})
	t.Run("a device listed twice", func(t *testing.T) {
		w := l.worker("mallory")
		w.dial()
		hello := w.hello()
		d := &musterpb.Device{Uuid: "GPU-1", MemoryBytes: 1 << 30}
		hello.GetHello().Capacity.Devices = []*musterpb.Device{d, d}
		w.send(hello)
		ended(w, api.Invalid, `lists device "GPU-1" twice`)
	})
	t.Run("a name that is no text", func(t *testing.T) {
		w := l.worker("mallory")
		w.dial()
		hello := w.hello()
		hello.GetHello().Name = "\xff\xfe"
		w.send(hello)
		ended(w, api.Invalid, "no UTF-8")
	})
	t.Run("a reader's key", func(t *testing.T) {
		resp, err := l.admin.CreateAccount(t.Context(), connect.NewRequest(&musterpb.CreateAccountRequest{Account: "mallory", Role: musterpb.Role_ROLE_READER}))
		if err != nil {
			t.Fatal(err)
		}
		s := client.Session(t.Context(), l.http, l.nodes[0].info.Address, resp.Msg.Key)
		_ = s.Send(l.worker("mallory").hello()) // the answer says what is wrong
		if _, err := s.Receive(); connect.CodeOf(err) != connect.CodePermissionDenied {
			t.Errorf("a reader's session: %v", err)
		}
	})
}

func (w *rawWorker) proofOf(m *musterpb.SchedulerMessage) *musterpb.WorkerMessage {
	return w.proof(m.GetChallenge().GetNonce())
}

// tarOf is a tar of one file of zeros, cut after so many bytes of content.
func tarOf(name string, declared, content int64) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: declared, Mode: 0o644})
	_, _ = io.CopyN(w, zeros{}, content)
	_ = w.Flush() // fails for what is cut, on purpose
	return b.Bytes()
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// zeroFrames are zstd frames that unpack to n bytes of zeros, a multiple of 64 MiB.
func zeroFrames(t *testing.T, n int64) []byte {
	const each = 64 << 20
	return bytes.Repeat(pack(t, make([]byte, each)), int(n/each))
}

func pack(t *testing.T, data []byte) []byte {
	z, err := zstd.NewWriter(nil, zstd.WithWindowSize(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	return z.EncodeAll(data, nil)
}

func picture(t *testing.T) []byte {
	var b bytes.Buffer
	if err := png.Encode(&b, image.NewNRGBA(image.Rect(0, 0, 32, 32))); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Every result that is broken is refused with a reason, its attempt fails with
// that reason, nothing stays held, and the task waits for another worker.
func TestHostileResults(t *testing.T) {
	l := newLab(t, 1)
	one := func(s *musterpb.JobSpec) { s.Items.Count = 1 }
	big := func(s *musterpb.JobSpec) { one(s); s.Resources.DiskBytes = 1 << 36 }
	frames := func(s *musterpb.JobSpec) { s.Verify.Comparator = "image" }
	// replaced makes data the archive of the one item of a result.
	replaced := func(p *product, archive []byte, outputBytes int64) {
		p.archive = archive
		p.manifest.Items[0].Length, p.manifest.Items[0].OutputBytes = int64(len(archive)), outputBytes
		if outputBytes < 1<<20 {
			p.manifest.Items[0].Files = 100 // whose headers may take that much
		}
	}
	for _, test := range []struct {
		name   string
		spec   func(*musterpb.JobSpec)
		files  func(uint64) map[string][]byte
		before func(p *product)               // then the result is sealed
		after  func(w *rawWorker, p *product) // then it is uploaded
		want   string
	}{
		{name: "signed by another key", after: func(w *rawWorker, p *product) { verify.SignCommits(newKey(t), p.commit) }, want: "the signature is not by the worker that ran it"},
		{name: "no signature", after: func(w *rawWorker, p *product) { p.commit.Signature = nil }, want: "the signature is not by the worker that ran it"},
		{name: "changed after signing", after: func(w *rawWorker, p *product) { p.commit.OutputBytes++ }, want: "the signature is not by the worker that ran it"},
		{name: "no root", after: func(w *rawWorker, p *product) { p.commit.Root = nil; verify.SignCommits(w.key, p.commit) }, want: "the root has 0 bytes, want 32"},
		{name: "another root", after: func(w *rawWorker, p *product) { p.commit.Root = make([]byte, 32); verify.SignCommits(w.key, p.commit) }, want: "does not have the Merkle root that was signed"},
		{name: "manifest of another attempt", before: func(p *product) {}, after: func(w *rawWorker, p *product) {
			p.manifest.Attempt = "att-0000000000000000"
			p.commit.ManifestDigest = string(api.DigestOf(p.encoded()))
			verify.SignCommits(w.key, p.commit)
		}, want: `the manifest is of attempt "att-0000000000000000"`},
		{name: "item left out", before: func(p *product) { p.manifest.Items = p.manifest.Items[1:] }, want: "the manifest lists 3 items in place of 4"},
		{name: "item twice", before: func(p *product) { p.manifest.Items[1] = p.manifest.Items[0] }, want: "the manifest lists index 0 in place of 1"},
		{name: "item of another task", before: func(p *product) { p.manifest.Items[3].Index = 77 }, want: "the manifest lists index 77 in place of 3"},
		{name: "other parameters", before: func(p *product) { p.manifest.Items[0].ParametersDigest = make([]byte, 32) }, want: "was computed from other inputs or parameters"},
		{name: "manifest not uploaded", after: func(w *rawWorker, p *product) { p.skip = "manifest" }, want: "was not uploaded"},
		{name: "archive not uploaded", after: func(w *rawWorker, p *product) { p.skip = "archive" }, want: "was not uploaded"},
		{name: "garbage for a manifest", after: func(w *rawWorker, p *product) {
			garbage := bytes.Repeat([]byte{0xff}, 333)
			p.commit.ManifestDigest = string(w.put(w.account, garbage))
			verify.SignCommits(w.key, p.commit)
		}, want: "can't be decoded"},
		{name: "a manifest of nothing but empty items", spec: one, after: func(w *rawWorker, p *product) {
			bomb := bytes.Repeat([]byte{manifestItems<<3 | 2, 0}, 2000)
			p.commit.ManifestDigest = string(w.put(w.account, bomb))
			verify.SignCommits(w.key, p.commit)
		}, want: "the manifest lists 2000 items in place of 1"},
		{name: "a manifest of megabytes", spec: one, after: func(w *rawWorker, p *product) {
			bomb := bytes.Repeat([]byte{manifestItems<<3 | 2, 0}, 1<<20)
			p.commit.ManifestDigest = string(w.put(w.account, bomb))
			verify.SignCommits(w.key, p.commit)
		}, want: "at most 4352 are allowed for 1 items"},
		{name: "no digest at all", after: func(w *rawWorker, p *product) {
			p.commit.ArchiveDigest = "../../etc/passwd"
			verify.SignCommits(w.key, p.commit)
		}, want: "want sha256: and 64 lower-case hex digits"},
		{name: "archive cut short", after: func(w *rawWorker, p *product) {
			p.archive = p.archive[:len(p.archive)-20]
			p.commit.ArchiveDigest = string(api.DigestOf(p.archive))
			verify.SignCommits(w.key, p.commit)
		}, want: "were signed"},
		{name: "archive cut short, sizes lie too", before: func(p *product) {
			p.archive = p.archive[:len(p.archive)-20]
			p.manifest.Items[3].Length -= 20
		}, want: "item 3: index 3: the frame is damaged"},
		{name: "index outside of the archive", before: func(p *product) { p.manifest.Items[3].Length += 1 << 40 }, want: "does not fit the archive"},
		{name: "index before the archive", before: func(p *product) { p.manifest.Items[0].Offset = -1 << 40 }, want: "the frame starts at -1099511627776"},
		{name: "a byte of the archive changed", before: func(p *product) { p.archive[len(p.archive)/2] ^= 0x40 }, want: "index"},
		{name: "output bytes below zero", before: func(p *product) { p.manifest.Items[0].OutputBytes = -1 }, want: "-1 bytes in 1 files"},
		{name: "more than resources.disk", spec: func(s *musterpb.JobSpec) { s.Resources.DiskBytes = 40 }, want: "more than 40 bytes, which resources.disk allows"},
		{name: "10 GB of zeros behind a small declaration", spec: one, before: func(p *product) {
			replaced(p, append(pack(t, tarOf("out.txt", 10<<30, 0)), zeroFrames(t, 10<<30)...), 100)
		}, want: "holds more bytes than the manifest declares"},
		{name: "10 GB of zeros as padding", spec: one, before: func(p *product) {
			replaced(p, append(slices.Clone(p.archive), zeroFrames(t, 10<<30)...), p.manifest.Items[0].OutputBytes)
		}, want: "it unpacks to more than the manifest declares"},
		{name: "10 GB of zeros, declared", spec: one, before: func(p *product) {
			replaced(p, append(pack(t, tarOf("out.txt", 10<<30, 0)), zeroFrames(t, 10<<30)...), 10<<30)
		}, want: "more than 1048576 bytes, which resources.disk allows"},
		{name: "a GB of padding, declared and within the limits", spec: big, before: func(p *product) {
			replaced(p, append(slices.Clone(p.archive), zeroFrames(t, 1<<30)...), 1<<30)
		}, want: "the manifest declares 1073741824 in 1"},
		{name: "a GB of zeros with another digest", spec: big, before: func(p *product) {
			replaced(p, append(pack(t, tarOf("out.txt", 1<<30, 0)), append(zeroFrames(t, 1<<30), pack(t, make([]byte, 1024))...)...), 1<<30)
		}, want: "do not match the digest in the manifest"},
		{name: "megabytes that unpack to nothing", spec: one, before: func(p *product) {
			skippable := append([]byte{0x50, 0x2a, 0x4d, 0x18, 0x00, 0x00, 0x80, 0x00}, make([]byte, 8<<20)...)
			replaced(p, append(slices.Clone(p.archive), skippable...), p.manifest.Items[0].OutputBytes)
		}, want: "bytes packed"},
		{name: "picture cut short", spec: frames, files: func(v uint64) map[string][]byte {
			whole := picture(t)
			if v == 2 {
				whole = whole[:len(whole)-20]
			}
			return map[string][]byte{"frame.png": whole}
		}, want: "output of item 2: frame.png"},
		{name: "picture of 2 GB in a few bytes", spec: frames, files: func(uint64) map[string][]byte {
			bomb := picture(t)
			copy(bomb[16:], []byte{0, 0, 0x80, 0, 0, 0, 0x80, 0}) // IHDR: 32768×32768
			return map[string][]byte{"frame.png": bomb}
		}, want: "frame.png"},
		{name: "no picture", spec: frames, want: "no .png or .jpg file"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := l.worker("mallory").connect()
			defer w.leave()
			job := l.submit(test.spec)
			a := w.assigned()
			files := test.files
			if files == nil { // bytes that no other worker uploads
				files = func(v uint64) map[string][]byte {
					return map[string][]byte{"out.txt": fmt.Appendf(nil, "%s %d", test.name, v)}
				}
			}
			p := w.produce(a, files)
			if test.before != nil {
				test.before(p)
				p.seal(w)
			}
			if test.after != nil {
				test.after(w, p)
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			w.offer(p)
			o := w.outcome(a.Attempt)
			runtime.ReadMemStats(&after)
			if o.Accepted || !strings.Contains(o.Reason, test.want) {
				t.Errorf("accepted %v, %q; want a refusal: %s", o.Accepted, o.Reason, test.want)
			}
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 256<<20 {
				t.Errorf("refusing it took %d MiB", grown>>20)
			}
			got := l.attempt(job, a.Attempt)
			if got.State != musterpb.AttemptState_ATTEMPT_STATE_FAILED || got.Blame != musterpb.Blame_BLAME_WORKER || !strings.Contains(got.Reason, test.want) {
				t.Errorf("the attempt is %v, blame %v: %s", got.State, got.Blame, got.Reason)
			}
			l.settled(job)
			if j := l.job(job).Job; !slices.Equal(j.Requeued, []uint32{0}) {
				t.Errorf("task 0 does not wait for another worker: %v", j)
			}
			l.cancel(job)
		})
	}
	t.Run("the others go on", func(t *testing.T) {
		l.worker("alice").connect().work()
		l.worker("bob").connect().work()
		job := l.submit(nil)
		l.waitVerified(job)
		l.settled(job)
	})
}

const manifestItems = 2 // the number of the field Manifest.items

// Outputs of any size are examined without holding them in memory.
func TestLargeHonestResult(t *testing.T) {
	l := newLab(t, 1)
	const size = 256 << 20
	files := func(uint64) map[string][]byte { return map[string][]byte{"checkpoint": make([]byte, size)} }
	alice, bob := l.worker("alice").connect(), l.worker("bob")
	job := l.submit(func(s *musterpb.JobSpec) { s.Items.Count = 1; s.Resources.DiskBytes = 1 << 30 })
	first := alice.assigned()
	p := alice.produce(first, files)
	bob.connect()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	alice.offer(p)
	if o := alice.outcome(first.Attempt); !o.Accepted {
		t.Fatal(o.Reason)
	}
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > size/2 {
		t.Errorf("examining %d MiB of outputs took %d MiB", size>>20, grown>>20)
	}
	check := bob.assigned()
	p = bob.produce(check, func(v uint64) map[string][]byte { f := files(v); f["checkpoint"][size-1] = 1; return f })
	runtime.ReadMemStats(&before)
	bob.offer(p)
	if o := bob.outcome(check.Attempt); !o.Accepted {
		t.Fatal(o.Reason)
	}
	eventually(t, "the comparison", func() bool { return len(l.job(job).Checks[0].Comparisons) == 1 })
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > size/2 {
		t.Errorf("comparing %d MiB of outputs took %d MiB", size>>20, grown>>20)
	}
	if c := l.job(job).Checks[0].Comparisons[0]; c.Match || !strings.Contains(c.Detail, "checkpoint differs: 268435456 bytes sha256:") {
		t.Errorf("%v: %s", c.Match, c.Detail)
	}
}

// Whom an attempt belongs to, and whether it is under way, decides what a
// commit of it is worth.
func TestCommitsThatAreNotTheWorkersToMake(t *testing.T) {
	t.Parallel()
	l := newLab(t, 1)
	alice := l.worker("alice").connect()
	job := l.submit(nil)
	a := alice.assigned()
	mallory := l.worker("mallory").connect()

	p := mallory.produce(a, honest)
	mallory.offer(p)
	if o := mallory.outcome(a.Attempt); o.Accepted || !strings.Contains(o.Reason, "is not one of worker "+mallory.id) {
		t.Errorf("another worker's attempt: %v", o)
	}
	mallory.send(reported(&musterpb.Reports{Failed: []*musterpb.AttemptFailed{&musterpb.AttemptFailed{Attempt: a.Attempt, Reason: "sabotage", Blame: musterpb.Blame_BLAME_JOB, ExitCode: 1}}}))
	mallory.outcome(a.Attempt)
	mallory.send(reported(&musterpb.Reports{Commits: []*musterpb.Commit{&musterpb.Commit{Attempt: "att-none"}}}))
	if o := mallory.outcome("att-none"); o.Accepted {
		t.Error("an attempt that does not exist was committed")
	}
	if got := l.attempt(job, a.Attempt); got.Worker != alice.id || got.State > musterpb.AttemptState_ATTEMPT_STATE_RUNNING {
		t.Errorf("alice's attempt is %v (%s)", got.State, got.Reason)
	}
	p = alice.produce(a, honest)
	alice.offer(p)
	for i := range 3 { // a repeat gets the same answer
		if o := alice.outcome(a.Attempt); !o.Accepted {
			t.Errorf("commit %d: %v", i+1, o)
		}
		alice.send(reported(&musterpb.Reports{Commits: []*musterpb.Commit{p.commit}}))
	}
	other := alice.produce(a, func(uint64) map[string][]byte { return map[string][]byte{"other.txt": []byte("second thoughts")} })
	alice.outcome(a.Attempt)
	alice.offer(other)
	if o := alice.outcome(a.Attempt); o.Accepted || !strings.Contains(o.Reason, "is over") {
		t.Errorf("another result for a committed attempt: %v", o)
	}
	if got := l.attempt(job, a.Attempt); !proto.Equal(got.Commit, p.commit) {
		t.Error("the first commit did not stay")
	}

	second := l.submit(nil)
	cancelled := alice.assigned()
	l.cancel(second)
	alice.offer(alice.produce(cancelled, honest))
	if o := alice.outcome(cancelled.Attempt); o.Accepted || !strings.Contains(o.Reason, "it is cancelled") {
		t.Errorf("a cancelled attempt: %v", o)
	}
	l.settled(second)
}

// A worker's own words are bounded and harmless before they are replicated.
func TestHostileFailureReports(t *testing.T) {
	t.Parallel()
	l := newLab(t, 1)
	w := l.worker("mallory").connect()
	job := l.submit(nil)
	a := w.assigned()
	w.send(reported(&musterpb.Reports{Failed: []*musterpb.AttemptFailed{&musterpb.AttemptFailed{
		Attempt: a.Attempt, Reason: strings.Repeat("ä", 1<<20), Blame: musterpb.Blame(77), LogDigest: strings.Repeat("x", 1<<20),
	}}}))
	w.outcome(a.Attempt)
	got := l.attempt(job, a.Attempt)
	if got.State != musterpb.AttemptState_ATTEMPT_STATE_FAILED || got.Blame != musterpb.Blame_BLAME_WORKER || got.LogDigest != "" || len(got.Reason) > 1010 {
		t.Errorf("%v %v log %.20q reason of %d bytes", got.State, got.Blame, got.LogDigest, len(got.Reason))
	}
	l.settled(job)
}

// A flood of messages about nothing ends the flooder's session at most.
func TestFlood(t *testing.T) {
	l := newLab(t, 1)
	mallory := l.worker("mallory").connect()
	before := runtime.NumGoroutine()
	for range 20_000 {
		mallory.mu.Lock()
		err := mallory.stream.Send(reported(&musterpb.Reports{Commits: []*musterpb.Commit{&musterpb.Commit{Attempt: client.NewID()}}}))
		mallory.mu.Unlock()
		if err != nil {
			break
		}
	}
	if now := runtime.NumGoroutine(); now > before+1000 {
		t.Errorf("%d goroutines, %d before the flood", now, before)
	}
	l.worker("alice").connect().work()
	l.worker("bob").connect().work()
	l.waitVerified(l.submit(nil))
}

// The newer of two sessions of one identity wins, and loses nothing.
func TestTwoSessionsOfOneIdentity(t *testing.T) {
	t.Parallel()
	l := newLab(t, 1)
	w := l.worker("alice").connect()
	job := l.submit(nil)
	a := w.assigned()
	oldEnded := w.ended
	w.connect()
	select {
	case err := <-oldEnded:
		if connect.CodeOf(err) != connect.CodeUnavailable || !strings.Contains(err.Error(), "a newer session of the worker began") {
			t.Errorf("the older session ended with %v", err)
		}
	case <-time.After(patience):
		t.Fatal("the older session goes on")
	}
	if !slices.Equal(w.welcome.Keep, []string{a.Attempt}) {
		t.Errorf("the newer session keeps %v", w.welcome.Keep)
	}
	w.deliver(a)
	if got := l.attempt(job, a.Attempt); got.State < musterpb.AttemptState_ATTEMPT_STATE_COMMITTED {
		t.Errorf("the attempt is %v", got.State)
	}
}

// A worker that is silent loses its attempt to another. Its late result counts
// only while there is no other.
func TestLateResults(t *testing.T) {
	t.Parallel()
	t.Run("first", func(t *testing.T) {
		t.Parallel()
		l := newLab(t, 1)
		w := l.worker("alice").connect()
		defer w.leave()
		job := l.submit(nil)
		a := w.assigned()
		w.setMute(true)
		eventually(t, "the lease to end", func() bool {
			return l.attempt(job, a.Attempt).State == musterpb.AttemptState_ATTEMPT_STATE_LOST
		})
		if reason := l.attempt(job, a.Attempt).Reason; !strings.Contains(reason, "was not heard of for a whole lease") {
			t.Error(reason)
		}
		w.offer(w.produce(a, honest))
		if o := w.outcome(a.Attempt); !o.Accepted {
			t.Errorf("the first result was refused: %s", o.Reason)
		}
		if got := l.attempt(job, a.Attempt); got.State != musterpb.AttemptState_ATTEMPT_STATE_COMMITTED || got.Hold == 0 {
			t.Errorf("the attempt is %v", got.State)
		}
	})
	t.Run("second", func(t *testing.T) {
		t.Parallel()
		l := newLab(t, 1)
		w := l.worker("alice").connect()
		job := l.submit(nil)
		a := w.assigned()
		w.setMute(true)
		other := l.worker("bob").connect()
		b := other.assigned()
		if got := l.attempt(job, b.Attempt); got.Check != "" || got.Worker != other.id {
			t.Fatalf("in place of a second attempt: %v", got)
		}
		other.deliver(b)
		w.offer(w.produce(a, honest))
		if o := w.outcome(a.Attempt); o.Accepted || !strings.Contains(o.Reason, "another attempt of its task was committed first") {
			t.Errorf("the second result: %v", o)
		}
		if got := l.attempt(job, a.Attempt); got.State != musterpb.AttemptState_ATTEMPT_STATE_LOST || got.PaidMicroUsd != 0 {
			t.Errorf("the late attempt is %v", got.State)
		}
	})
}

// A broken stream leaves a short grace.
func TestReconnect(t *testing.T) {
	t.Parallel()
	l := newLab(t, 1)
	w := l.worker("alice").connect()
	job := l.submit(nil)
	a := w.assigned()
	eventually(t, "the start", func() bool {
		return l.attempt(job, a.Attempt).State == musterpb.AttemptState_ATTEMPT_STATE_RUNNING
	})
	w.leave()
	w.connect()
	if !slices.Equal(w.welcome.Keep, []string{a.Attempt}) || len(w.welcome.Stop) > 0 {
		t.Errorf("keeps %v, stops %v", w.welcome.Keep, w.welcome.Stop)
	}
	w.deliver(a)

	second := l.submit(nil)
	b := w.assigned()
	began := time.Now()
	w.leave()
	eventually(t, "the grace to end", func() bool {
		return l.attempt(second, b.Attempt).State == musterpb.AttemptState_ATTEMPT_STATE_LOST
	})
	if took := time.Since(began); took < quick.ReconnectGrace/2 {
		t.Errorf("lost after %s", took)
	}
	l.settled(second)
	l.cancel(second)
	w.connect() // states b, which is over
	if !slices.Equal(w.welcome.Stop, []string{b.Attempt}) {
		t.Errorf("stops %v", w.welcome.Stop)
	}
	w.forget(b.Attempt)

	third := l.submit(nil)
	c := w.assigned()
	eventually(t, "the start", func() bool {
		return l.attempt(third, c.Attempt).State == musterpb.AttemptState_ATTEMPT_STATE_RUNNING
	})
	w.leave()
	w.forget(c.Attempt) // a restart: it runs nothing
	w.connect()
	eventually(t, "the attempt to be given up", func() bool {
		got := l.attempt(third, c.Attempt)
		return got.State == musterpb.AttemptState_ATTEMPT_STATE_LOST && strings.Contains(got.Reason, "came back without it")
	})
}

// A stream that breaks while its result is examined ends neither.
func TestStreamBreaksDuringExamination(t *testing.T) {
	t.Parallel()
	l := newLab(t, 1)
	w := l.worker("alice").connect()
	job := l.submit(func(s *musterpb.JobSpec) { s.Items.Count = 1; s.Resources.DiskBytes = 1 << 30 })
	a := w.assigned()
	p := w.produce(a, func(uint64) map[string][]byte { return map[string][]byte{"large": make([]byte, 128<<20)} })
	w.offer(p)
	w.leave()
	w.connect()
	w.send(reported(&musterpb.Reports{Commits: []*musterpb.Commit{p.commit}}))
	if o := w.outcome(a.Attempt); !o.Accepted {
		t.Errorf("refused: %s", o.Reason)
	}
	if got := l.attempt(job, a.Attempt); got.State != musterpb.AttemptState_ATTEMPT_STATE_COMMITTED {
		t.Errorf("the attempt is %v: %s", got.State, got.Reason)
	}
}

// Nothing in an assignment tells a check from work.
func TestChecksLookLikeWork(t *testing.T) {
	t.Parallel()
	l := newLab(t, 1)
	alice := l.worker("alice").connect()
	job := l.submit(func(s *musterpb.JobSpec) {
		s.Env = []*musterpb.EnvVar{{Name: "A", Value: "b"}}
		s.Items.Count, s.Chunk = 8, 4
	})
	work := alice.assigned()
	spare := alice.assigned()
	bob := l.worker("bob").connect()
	alice.deliver(work)
	check := bob.assigned()
	if got := l.attempt(job, check.Attempt); got.Check == "" {
		t.Fatal("this is no check")
	}
	if len(check.Attempt) != len(work.Attempt) || check.Attempt[:4] != work.Attempt[:4] || !slices.IsSorted(check.Indexes) || len(check.Indexes) != len(spare.Indexes) {
		t.Errorf("%v and %v", work, check)
	}
	for _, a := range []*musterpb.Assignment{work, spare, check} {
		a.Attempt, a.Indexes = "", nil
	}
	if !proto.Equal(work, spare) || !proto.Equal(work, check) {
		t.Errorf("work: %v\ncheck: %v", work, check)
	}
}

// The archive of two honest workers for one item is the same: what makes the
// comparison by digest right.
func TestProductsAreDeterministic(t *testing.T) {
	t.Parallel()
	l := newLab(t, 1)
	a := &musterpb.Assignment{Attempt: "att-1", Items: &musterpb.Items{Count: 2}, Indexes: []uint64{0, 1}, Image: l.image, Resources: &musterpb.Resources{}}
	x, y := l.worker("alice").produce(a, honest), l.worker("bob").produce(a, honest)
	if sha256.Sum256(x.archive) != sha256.Sum256(y.archive) || !bytes.Equal(x.commit.Root, y.commit.Root) {
		t.Error("two archives of the same outputs differ")
	}
}
