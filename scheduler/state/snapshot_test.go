package state

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/musternet/muster/api/musterpb"
)

// lived is a world in which something of every kind is stored and much is
// under way.
func lived(t testing.TB) *world {
	w := newWorld(t)
	for _, line := range [][]string{
		{"cluster", "c1", "id=1"}, {"account", "acme"}, {"account", "bob"}, {"account", "carol"}, {"account", "dave"}, {"key", "acme"},
		{"deposit", "acme", "50.00"}, {"node", "n1"}, {"node", "n2"}, {"tip", "n1"}, {"tip", "n2"},
		{"worker", "w1", "owner=bob"}, {"worker", "w2", "owner=carol"}, {"worker", "w3", "owner=dave", "gpus=2"},
		{"submit", "j1", "items=8", "chunk=2"}, {"submit", "j2", "gpus=1"}, {"submit", "j3"}, {"cancel", "j3"},
	} {
		w.must(line...)
	}
	w.life(parseArgs([]string{"j1"}))
	for _, line := range [][]string{
		{"place", "a1", "job=j1", "task=1", "worker=w1"}, {"commit", "a1"}, {"close"}, {"reveal", "n1"}, {"reveal", "n2"},
		{"place", "c1", "check=chk-a1", "worker=w2"}, {"commit", "c1"}, {"compare", "chk-a1", "mismatch"}, {"place", "c2", "check=chk-a1", "worker=w3"},
		{"place", "a2", "job=j1", "task=2", "worker=w1"}, {"lost", "a2"}, {"place", "g1", "job=j2", "worker=w3", "devices=gpu-1"},
		{"place", "a3", "job=j1", "task=3", "worker=w1"}, {"commit", "a3"}, {"close"}, {"reveal", "n2"},
		{"place", "a4", "job=j1", "task=2", "worker=w2"}, {"commit", "a4"},
	} {
		w.must(line...)
	}
	return w
}

func encode(t testing.TB, s *Snapshot) []byte {
	var buf bytes.Buffer
	if err := s.Write(&buf); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// A byte that flipped, or a cut anywhere, is an error and the old state stays.
func TestRestoreDamaged(t *testing.T) {
	whole := encode(t, lived(t).Snapshot())
	s := New()
	s.Apply(deposit("nobody", 1))
	before := s.Snapshot().Hash()
	for i := range whole {
		damaged := slices.Clone(whole)
		damaged[i] ^= 1 << (i % 8)
		if err := s.Restore(bytes.NewReader(damaged)); err == nil {
			t.Fatalf("byte %d is damaged, and the snapshot was restored", i)
		}
		if err := s.Restore(bytes.NewReader(whole[:i])); err == nil {
			t.Fatalf("cut after %d bytes, and the snapshot was restored", i)
		}
	}
	if !bytes.Equal(s.Snapshot().Hash(), before) {
		t.Error("a failed restore changed the state")
	}
	if err := s.Restore(bytes.NewReader(whole)); err != nil {
		t.Error(err)
	}
}

// A snapshot in which one record is missing is refused even with the right
// checksum, or is one that Apply can go on from.
func TestRestoreIncomplete(t *testing.T) {
	w := lived(t)
	whole := records(t, encode(t, w.Snapshot()))
	refused := 0
	for i := range whole {
		s := New()
		if err := s.Restore(bytes.NewReader(reseal(slices.Delete(slices.Clone(whole), i, i+1)))); err != nil {
			refused++
			continue
		}
		useAll(s)
	}
	if refused < len(whole)/2 {
		t.Errorf("%d of %d incomplete snapshots were refused", refused, len(whole))
	}
}

// records splits a snapshot; the end is left out.
func records(t testing.TB, snapshot []byte) (list []*musterpb.SnapshotRecord) {
	in := &recordReader{r: bufio.NewReader(bytes.NewReader(snapshot)), sum: sha256.New()}
	for {
		r, err := in.next()
		if err != nil {
			t.Fatal(err)
		}
		if r.GetEnd() != nil {
			return list
		}
		list = append(list, r)
	}
}

// reseal closes records by the right count and checksum.
func reseal(list []*musterpb.SnapshotRecord) []byte {
	var out []byte
	for _, r := range list {
		out = append(binary.AppendUvarint(out, uint64(r.SizeVT())), must1(r.MarshalVT())...)
	}
	sum := sha256.Sum256(out)
	end := &musterpb.SnapshotRecord{Record: &musterpb.SnapshotRecord_End{End: &musterpb.SnapshotEnd{Records: uint64(len(list)), Sha256: sum[:]}}}
	return append(binary.AppendUvarint(out, uint64(end.SizeVT())), must1(end.MarshalVT())...)
}

func must1[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// useAll reads everything, as the leader's loops do.
func useAll(s *State) {
	s.Queued()
	s.Sealable(100)
	s.ToCompare()
	s.Committed()
	s.Drawing()
	s.Batches(0, 100)
	s.LiveAttempts()
	for _, job := range s.Jobs("", 100) {
		s.Attempts(job.Id)
		s.Checks(job.Id)
	}
	for _, a := range s.LiveAttempts() {
		s.Apply(end(a.Id, musterpb.AttemptState_ATTEMPT_STATE_LOST, 0, 0))
	}
}

// A snapshot is of the moment when it was taken, whatever is applied while it
// is written.
func TestSnapshotWhileApplying(t *testing.T) {
	w := lived(t)
	snapshot := w.State.Snapshot()
	want := encode(t, snapshot)
	done := make(chan []byte)
	go func() {
		var last []byte
		for range 20 {
			var buf bytes.Buffer
			if err := snapshot.Write(&buf); err != nil {
				panic(err)
			}
			last = buf.Bytes()
		}
		done <- last
	}()
	for i := range 2000 {
		w.State.Apply(&musterpb.Command{Id: fmt.Sprint("more ", i), Body: deposit("acme", 1).Body})
		id := fmt.Sprint("more-", i)
		w.State.Apply(w.build("place", parseArgs([]string{id, "job=j1", "task=2", "worker=w1"})))
		w.State.Apply(end(id, musterpb.AttemptState_ATTEMPT_STATE_LOST, 0, 0))
	}
	if got := <-done; !bytes.Equal(got, want) {
		t.Error("the snapshot changed while it was written")
	}
}

type failingWriter struct{ left int }

func (w *failingWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, io.ErrShortWrite
	}
	return len(p), nil
}

func TestSnapshotWriteError(t *testing.T) {
	s := lived(t).Snapshot()
	for left := range len(encode(t, s)) {
		if err := s.Write(&failingWriter{left}); err == nil {
			t.Fatalf("a disk with %d bytes left took the snapshot", left)
		}
	}
}

// FuzzRestore restores damaged snapshots. The first byte says whether the
// checksum is made right again, so that more than the checksum is tried.
func FuzzRestore(f *testing.F) {
	whole := encode(f, lived(f).Snapshot())
	f.Add(append([]byte{0}, whole...))
	f.Add(append([]byte{1}, whole...))
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) == 0 {
			return
		}
		snapshot := input[1:]
		if input[0] == 1 {
			snapshot = resealed(snapshot)
		}
		s := New()
		s.Apply(deposit("nobody", 1))
		before := s.Snapshot().Hash()
		if err := s.Restore(bytes.NewReader(snapshot)); err != nil {
			if !bytes.Equal(s.Snapshot().Hash(), before) {
				t.Error("a failed restore changed the state")
			}
			return
		}
		again := New()
		if err := again.Restore(bytes.NewReader(encode(t, s.Snapshot()))); err != nil {
			t.Fatalf("what was restored can't be restored again: %v", err)
		}
		if !bytes.Equal(again.Snapshot().Hash(), s.Snapshot().Hash()) {
			t.Error("a second restore gives another state")
		}
	})
}

// resealed keeps the records that can be read.
func resealed(snapshot []byte) []byte {
	in := &recordReader{r: bufio.NewReader(bytes.NewReader(snapshot)), sum: sha256.New()}
	var list []*musterpb.SnapshotRecord
	for {
		r, err := in.next()
		if err != nil || r.GetEnd() != nil {
			return reseal(list)
		}
		list = append(list, r)
	}
}
