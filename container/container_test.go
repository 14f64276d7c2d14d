package container

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/musternet/muster/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestSpecCheck(t *testing.T) {
	full := t.TempDir()
	must(t, os.WriteFile(filepath.Join(full, "old"), nil, 0o600))
	good := Spec{ID: "a", Outputs: t.TempDir(), Timeout: time.Second, Env: []string{"A=", "B=c=d"}, Command: []string{""}}
	must(t, good.Check())
	for name, spoil := range map[string]func(*Spec){
		"ID":                 func(s *Spec) { s.ID = "" },
		"timeout":            func(s *Spec) { s.Timeout = 0 },
		"negative timeout":   func(s *Spec) { s.Timeout = -1 },
		"limits below zero":  func(s *Spec) { s.MemoryBytes = -1 },
		"not NAME=value":     func(s *Spec) { s.Env = []string{"A"} },
		"nameless value":     func(s *Spec) { s.Env = []string{"=a"} },
		"NUL in environment": func(s *Spec) { s.Env = []string{"A=\x00"} },
		"NUL in argument":    func(s *Spec) { s.Command = []string{"a\x00b"} },
		"outputs missing":    func(s *Spec) { s.Outputs = filepath.Join(full, "none") },
		"outputs a file":     func(s *Spec) { s.Outputs = filepath.Join(full, "old") },
		"outputs not empty":  func(s *Spec) { s.Outputs = full },
		"outputs not named":  func(s *Spec) { s.Outputs = "" },
	} {
		s := good
		spoil(&s)
		if err := s.Check(); err == nil || api.KindOf(err) != api.Invalid {
			t.Errorf("%s: error %v, want kind invalid", name, err)
		}
	}
}

func TestSpecDefaults(t *testing.T) {
	var s Spec
	if s.Memory() != DefaultMemoryBytes || s.OutputLimit() != DefaultOutputBytes || s.PIDLimit() != DefaultPIDs {
		t.Errorf("zero values mean %d, %d, %d", s.Memory(), s.OutputLimit(), s.PIDLimit())
	}
	s = Spec{MemoryBytes: 1, OutputBytes: 2, PIDs: 3}
	if s.Memory() != 1 || s.OutputLimit() != 2 || s.PIDLimit() != 3 {
		t.Errorf("values are changed to %d, %d, %d", s.Memory(), s.OutputLimit(), s.PIDLimit())
	}
}

func TestLog(t *testing.T) {
	for _, test := range []struct {
		name   string
		limit  int
		writes []string
		note   string
		want   string
	}{
		{name: "all of it", limit: 10, writes: []string{"ab\n", "cd\n"}, want: "ab\ncd\n"},
		{name: "exactly", limit: 3, writes: []string{"abc"}, want: "abc"},
		{name: "cut in a line", limit: 4, writes: []string{"ab\n", "cdef\n", "gh\n"}, want: "ab\nc\nmuster: output cut here: only the first 4 bytes are kept\n"},
		{name: "cut at a line", limit: 3, writes: []string{"ab\n", "cd\n"}, want: "ab\nmuster: output cut here: only the first 3 bytes are kept\n"},
		{name: "note", limit: 10, writes: []string{"ab"}, note: "cancelled", want: "ab\nmuster: cancelled\n"},
		{name: "note alone", limit: 0, note: "cancelled", want: "muster: cancelled\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got bytes.Buffer
			log := NewLog(&got, test.limit)
			for _, w := range test.writes {
				if n, err := log.Write([]byte(w)); n != len(w) || err != nil {
					t.Errorf("Write(%q) = %d, %v", w, n, err)
				}
			}
			if test.note != "" {
				log.Note("%s", test.note)
			}
			log.Close()
			log.Note("never seen")
			if got.String() != test.want {
				t.Errorf("log %q, want %q", got.String(), test.want)
			}
		})
	}
	silent := NewLog(nil, 10)
	silent.Note("nowhere")
	if n, err := silent.Write([]byte("nowhere")); n != 7 || err != nil {
		t.Errorf("without a writer: %d, %v", n, err)
	}
}

type brokenWriter struct{ calls int }

func (w *brokenWriter) Write([]byte) (int, error) { w.calls++; return 0, errors.New("broken") }

func TestLogSurvivesItsWriter(t *testing.T) {
	broken := &brokenWriter{}
	log := NewLog(broken, 100)
	for range 3 {
		if n, err := log.Write([]byte("abc")); n != 3 || err != nil {
			t.Errorf("Write = %d, %v", n, err)
		}
	}
	if broken.calls != 1 {
		t.Errorf("a broken writer was called %d times", broken.calls)
	}
}

func TestMeasure(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "a", "b"), 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "one"), make([]byte, 100), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "a", "b", "two"), make([]byte, 50), 0o600))
	must(t, os.Truncate(filepath.Join(dir, "one"), 1000)) // a hole counts: it is uploaded too
	must(t, os.Symlink("/", filepath.Join(dir, "root")))
	must(t, os.Symlink("..", filepath.Join(dir, "a", "loop")))
	must(t, os.Symlink("one", filepath.Join(dir, "same")))

	n, err := Measure(dir, 1050)
	if n != 1050 || err != nil {
		t.Errorf("measured %d, %v; want 1050", n, err)
	}
	if n, err := Measure(dir, 1049); !errors.Is(err, ErrTooLarge) || n <= 1049 {
		t.Errorf("over the limit: %d, %v", n, err)
	}
	if _, err := Measure(filepath.Join(dir, "none"), 1); err == nil {
		t.Error("measuring nothing succeeded")
	}
}

func TestMeasureDepth(t *testing.T) {
	dir := t.TempDir()
	deep := dir
	for range MaxDepth - 1 {
		deep = filepath.Join(deep, "d")
	}
	must(t, os.MkdirAll(deep, 0o700))
	if _, err := Measure(dir, 1); err != nil {
		t.Errorf("%d levels: %v", MaxDepth, err)
	}
	must(t, os.Mkdir(filepath.Join(deep, "d"), 0o700))
	if _, err := Measure(dir, 1); !errors.Is(err, ErrTooLarge) {
		t.Errorf("%d levels: %v", MaxDepth+1, err)
	}
}

// A tree that changes while it is measured must never be an error.
func TestMeasureWhileItChanges(t *testing.T) {
	dir := t.TempDir()
	stop := make(chan struct{})
	var group sync.WaitGroup
	group.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			path := filepath.Join(dir, fmt.Sprint(i%10))
			switch i % 3 {
			case 0:
				_ = os.MkdirAll(filepath.Join(path, "sub"), 0o700)
			case 1:
				_ = os.RemoveAll(path)
			case 2:
				_ = os.Symlink("/", path)
			}
		}
	})
	for range 300 {
		if n, err := Measure(dir, 0); n != 0 || err != nil {
			t.Errorf("measured %d, %v", n, err)
			break
		}
	}
	close(stop)
	group.Wait()
}

func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		small, big := t.TempDir(), t.TempDir()
		must(t, os.WriteFile(filepath.Join(small, "f"), make([]byte, 10), 0o600))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := Watch(ctx, Quota{small, 10}); err != nil {
			t.Errorf("within its quota: %v", err)
		}

		found := make(chan error, 1)
		go func() { found <- Watch(t.Context(), Quota{small, 10}, Quota{big, 10}) }()
		synctest.Wait()
		must(t, os.WriteFile(filepath.Join(big, "f"), make([]byte, 11), 0o600))
		if err := <-found; !errors.Is(err, ErrTooLarge) {
			t.Errorf("over its quota: %v", err)
		}
	})
}

func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var gate Gate
		leave, err := gate.Enter(t.Context(), "a")
		must(t, err)
		other, err := gate.Enter(t.Context(), "b") // another key does not wait
		must(t, err)
		other()

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := gate.Enter(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("waiting in vain: %v", err)
		}
		inside, most := 0, 0
		var group sync.WaitGroup
		for range 10 {
			group.Go(func() {
				leave, err := gate.Enter(t.Context(), "a")
				if err != nil {
					t.Error(err)
					return
				}
				inside++
				most = max(most, inside)
				time.Sleep(time.Second)
				inside--
				leave()
			})
		}
		synctest.Wait()
		leave()
		group.Wait()
		if most != 1 || len(gate.keys) != 0 {
			t.Errorf("%d were inside at once, %d keys are left", most, len(gate.keys))
		}
	})
}

func fakeSpec(t *testing.T, f *Fake) Spec {
	t.Helper()
	image := Image{Digest: "sha256:1"}
	must(t, f.Ensure(t.Context(), image))
	return Spec{ID: t.Name(), Image: image, Outputs: t.TempDir(), Timeout: time.Minute}
}

func TestFakeDefaults(t *testing.T) {
	f := &Fake{}
	s := fakeSpec(t, f)
	result, err := f.Run(t.Context(), s)
	if err != nil || !result.OK() || f.Started() != 1 || f.Live() != 0 || f.Peak() != 1 {
		t.Errorf("result %+v, %v; started %d, live %d, peak %d", result, err, f.Started(), f.Live(), f.Peak())
	}
	must(t, f.Forget(t.Context(), s.Image))
	if _, err := f.Run(t.Context(), s); err == nil {
		t.Error("a forgotten image was run")
	}
	f.Leftovers.Store(3)
	for _, want := range []int{3, 0} {
		if n, err := f.Sweep(t.Context()); n != want || err != nil {
			t.Errorf("swept %d, %v; want %d", n, err, want)
		}
	}
}

func TestFakeScript(t *testing.T) {
	f := &Fake{OnRun: func(_ context.Context, s Spec) (Result, error) {
		fmt.Fprintln(s.Logs, "hello")
		return Result{ExitCode: 3}, os.WriteFile(filepath.Join(s.Outputs, "x"), make([]byte, 7), 0o600)
	}}
	s := fakeSpec(t, f)
	var logs strings.Builder
	s.Logs = &logs
	result, err := f.Run(t.Context(), s)
	if err != nil || result.Reason != Exited || result.ExitCode != 3 || result.OutputBytes != 7 || logs.String() != "hello\n" {
		t.Errorf("result %+v, %v, logs %q", result, err, logs.String())
	}
	s.Outputs, s.OutputBytes = t.TempDir(), 6
	if result, err := f.Run(t.Context(), s); err != nil || result.Reason != OutputTooLarge {
		t.Errorf("too much output: %+v, %v", result, err)
	}
	f.OnRun = func(context.Context, Spec) (Result, error) { return Result{}, errors.New("broken machine") }
	s.Outputs = t.TempDir()
	if _, err := f.Run(t.Context(), s); err == nil {
		t.Error("the script's error is lost")
	}
}

func TestFakeEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &Fake{OnRun: func(ctx context.Context, _ Spec) (Result, error) {
			<-ctx.Done()
			return Result{}, ctx.Err()
		}}
		s := fakeSpec(t, f)
		if result, err := f.Run(t.Context(), s); err != nil || result.Reason != TimedOut || result.Ended.Sub(result.Started) != s.Timeout {
			t.Errorf("out of time: %+v, %v", result, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, func() {
			if _, err := f.Run(t.Context(), s); f.Live() != 1 || api.KindOf(err) != api.Invalid {
				t.Errorf("a second live run of one ID: live %d, %v", f.Live(), err)
			}
			cancel()
		})
		if result, err := f.Run(ctx, s); err != nil || result.Reason != Cancelled {
			t.Errorf("cancelled: %+v, %v", result, err)
		}
	})
}

func TestFakeEnsure(t *testing.T) {
	asked := 0
	f := &Fake{OnEnsure: func(context.Context, Image) error {
		if asked++; asked == 1 {
			return api.Errorf(api.NotFound, "no such image")
		}
		return nil
	}}
	image := Image{Digest: "sha256:1"}
	if err := f.Ensure(t.Context(), image); api.KindOf(err) != api.NotFound {
		t.Errorf("error %v", err)
	}
	must(t, f.Ensure(t.Context(), image))
	must(t, f.Ensure(t.Context(), image))
	if asked != 2 {
		t.Errorf("asked %d times, want 2", asked)
	}
}
