package wasm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/container"
)

// shared is where the guest is built, and compiled by one Runtime for all
// tests: it takes seconds.
var shared struct {
	once  sync.Once
	dir   string
	image container.Image
}

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(shared.dir)
		os.Exit(code)
	}))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// guest returns a Runtime that has the guest program ready.
func guest(t testing.TB) (*Runtime, container.Image) {
	t.Helper()
	shared.once.Do(func() {
		var err error
		shared.dir, err = os.MkdirTemp("", "muster-wasm-test-")
		must(t, err)
		path := filepath.Join(shared.dir, "guest.wasm")
		build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "./testdata/guest")
		build.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build the guest: %v\n%s", err, out)
		}
		shared.image = imageOf(t, path)
	})
	if shared.image.Digest == "" {
		t.Fatal("building the guest failed earlier")
	}
	r, err := New(Options{Dir: filepath.Join(shared.dir, "runtime")})
	must(t, err)
	began := time.Now()
	must(t, r.Ensure(t.Context(), shared.image))
	if took := time.Since(began); took > 100*time.Millisecond {
		t.Logf("compiling the guest took %v", took)
	}
	return r, shared.image
}

func imageOf(t testing.TB, path string) container.Image {
	t.Helper()
	raw, err := os.ReadFile(path)
	must(t, err)
	sum := sha256.Sum256(raw)
	return container.Image{Archive: path, Digest: "sha256:" + hex.EncodeToString(sum[:])}
}

func spec(t testing.TB, command ...string) container.Spec {
	t.Helper()
	_, image := guest(t)
	return container.Spec{
		ID: "attempt-" + t.Name(), Image: image, Command: command, Outputs: t.TempDir(),
		MemoryBytes: 64 << 20, OutputBytes: 8 << 20, Timeout: time.Minute,
	}
}

// run runs a spec and returns its result with its log.
func run(t testing.TB, s container.Spec) (container.Result, string) {
	t.Helper()
	r, _ := guest(t)
	var logs bytes.Buffer
	s.Logs = &logs
	result, err := r.Run(t.Context(), s)
	if err != nil {
		t.Fatalf("%v\nlogs: %s", err, logs.String())
	}
	if left, err := os.ReadDir(r.runsDir()); err != nil || len(left) > 0 {
		t.Errorf("scratch directories left: %v, %v", left, err)
	}
	return result, logs.String()
}

func TestHowRunsEnd(t *testing.T) {
	short := func(s *container.Spec) { s.Timeout = 300 * time.Millisecond }
	for _, test := range []struct {
		name     string
		command  []string
		adjust   func(*container.Spec)
		reason   container.Reason
		exitCode int
		logs     string
	}{
		{name: "success", command: []string{"exit", "0"}, reason: container.Exited},
		{name: "failure", command: []string{"exit", "42"}, reason: container.Exited, exitCode: 42},
		{name: "panic", command: []string{"panic"}, reason: container.Exited, exitCode: 2, logs: "on purpose"},
		{name: "out of memory", command: []string{"allocate"}, reason: container.OutOfMemory, exitCode: 2, logs: "out of memory"},
		{name: "starts too large", command: []string{"exit", "0"}, adjust: func(s *container.Spec) { s.MemoryBytes = 1 << 16 }, reason: container.OutOfMemory, exitCode: exitTrap},
		{name: "timeout, busy", command: []string{"spin"}, adjust: short, reason: container.TimedOut, exitCode: exitTrap, logs: "time limit"},
		{name: "timeout, asleep", command: []string{"sleep"}, adjust: short, reason: container.TimedOut, exitCode: exitTrap, logs: "time limit"},
		{name: "outputs too large", command: []string{"fill", "/out"}, reason: container.OutputTooLarge, exitCode: exitTrap, logs: "more than 8388608 bytes"},
		{name: "scratch too large", command: []string{"fill", "/tmp"}, reason: container.OutputTooLarge, exitCode: exitTrap, logs: "more than 33554432 bytes"},
		{name: "exits as if stopped", command: []string{"exit", "-1"}, reason: container.Exited, exitCode: 1<<32 - 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := spec(t, test.command...)
			if test.adjust != nil {
				test.adjust(&s)
			}
			result, logs := run(t, s)
			if result.Reason != test.reason || result.ExitCode != test.exitCode || !strings.Contains(logs, test.logs) {
				t.Errorf("result %+v, want %s with code %d and logs with %q; logs:\n%s", result, test.reason, test.exitCode, test.logs, logs)
			}
		})
	}
}

func TestEnvironment(t *testing.T) {
	s := spec(t, "env", "a b", "c")
	s.Env = []string{"NAME=value=1", "OTHER="}
	result, logs := run(t, s)
	if want := "to stderr\n[main env a b c] [NAME=value=1 OTHER=]\n"; !result.OK() || logs != want {
		t.Errorf("result %+v, logs %q, want %q", result, logs, want)
	}
}

// inputs is a directory with traps in it, and a secret beside it.
func inputs(t *testing.T) (dir, secret string) {
	t.Helper()
	base := t.TempDir()
	dir, outside := filepath.Join(base, "in"), filepath.Join(base, "outside")
	must(t, os.MkdirAll(filepath.Join(dir, "a"), 0o700))
	must(t, os.Mkdir(outside, 0o700))
	secret = filepath.Join(outside, "secret.txt")
	must(t, os.WriteFile(secret, []byte("SECRET"), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "a", "input.txt"), []byte("hello"), 0o600))
	must(t, os.Symlink("input.txt", filepath.Join(dir, "a", "link-inside")))
	must(t, os.Symlink(secret, filepath.Join(dir, "link-to-secret")))
	must(t, os.Symlink("../outside", filepath.Join(dir, "link-to-dir")))
	must(t, syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	return dir, secret
}

func TestInputsAndOutputs(t *testing.T) {
	s := spec(t, "copy")
	s.Inputs, _ = inputs(t)
	result, logs := run(t, s)
	if !result.OK() || result.OutputBytes != 5 {
		t.Fatalf("result %+v, logs %s", result, logs)
	}
	got, err := os.ReadFile(filepath.Join(s.Outputs, "item", "result"))
	if err != nil || string(got) != "HELLO" {
		t.Errorf("output %q, %v", got, err)
	}
}

func TestNoWayOut(t *testing.T) {
	dir, secret := inputs(t)
	s := spec(t, "escape", secret)
	s.Inputs = dir
	result, logs := run(t, s)
	if !result.OK() {
		t.Errorf("result %+v: %s", result, logs)
	}
	for _, d := range []string{s.Outputs, filepath.Dir(secret)} {
		must(t, filepath.WalkDir(d, func(path string, entry fs.DirEntry, err error) error {
			if path != d && path != secret {
				t.Errorf("the program made %s", path)
			}
			return err
		}))
	}
}

func TestOpenFilesAreBounded(t *testing.T) {
	result, logs := run(t, spec(t, "files"))
	if !result.OK() || !strings.HasPrefix(logs, "opened 25") {
		t.Errorf("result %+v, logs %s", result, logs)
	}
}

func TestRunsAreIdentical(t *testing.T) {
	var first string
	for i := range 3 {
		s := spec(t, "identity")
		s.ID = fmt.Sprint("other-", i)
		_, logs := run(t, s)
		if first == "" {
			first = logs
			if !strings.HasPrefix(logs, "1640995200 ") || !strings.Contains(logs, "\na 1640995200 0\nm 1640995200 0\nz ") && !strings.Contains(logs, "a 1640995200 0\nm 1640995200 0\nz ") {
				t.Errorf("logs %s", logs)
			}
		} else if logs != first {
			t.Errorf("run %d differs:\n%s\n%s", i, first, logs)
		}
	}
}

func TestLogsAreCut(t *testing.T) {
	result, logs := run(t, spec(t, "chatter", fmt.Sprint(container.MaxLogBytes+1<<20)))
	if !result.OK() || len(logs) > container.MaxLogBytes+200 || !strings.HasSuffix(logs, "bytes are kept\n") {
		t.Errorf("result %+v, %d bytes of logs", result, len(logs))
	}
}

type signalWriter struct {
	once  sync.Once
	ready chan struct{}
}

func (w *signalWriter) Write(p []byte) (int, error) {
	w.once.Do(func() { close(w.ready) })
	return len(p), nil
}

func TestCancel(t *testing.T) {
	r, _ := guest(t)
	for _, command := range []string{"spin", "sleep"} {
		t.Run(command, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			started := &signalWriter{ready: make(chan struct{})}
			s := spec(t, command)
			s.Logs = started
			go func() {
				<-started.ready
				cancel()
			}()
			result, err := r.Run(ctx, s)
			if err != nil || result.Reason != container.Cancelled {
				t.Errorf("result %+v, %v", result, err)
			}
		})
	}
	t.Run("before it starts", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		result, err := r.Run(ctx, spec(t, "spin"))
		if err != nil || result.Reason != container.Cancelled {
			t.Errorf("result %+v, %v", result, err)
		}
	})
}

func TestOneLiveRunPerID(t *testing.T) {
	r, _ := guest(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	started := &signalWriter{ready: make(chan struct{})}
	first := spec(t, "sleep")
	first.Logs = started
	done := make(chan error, 1)
	go func() {
		_, err := r.Run(ctx, first)
		done <- err
	}()
	<-started.ready
	if _, err := r.Run(ctx, spec(t, "exit", "0")); api.KindOf(err) != api.Invalid {
		t.Errorf("a second live run of one ID: error %v", err)
	}
	if swept, err := r.Sweep(ctx); swept != 0 || err != nil {
		t.Errorf("sweep took %d live runs (%v)", swept, err)
	}
	cancel()
	must(t, <-done)
}

func TestSweep(t *testing.T) {
	r, err := New(Options{Dir: t.TempDir()})
	must(t, err)
	if n, err := r.Sweep(t.Context()); n != 0 || err != nil {
		t.Errorf("sweeping nothing: %d, %v", n, err)
	}
	must(t, os.MkdirAll(filepath.Join(r.runsDir(), "run-1", "tmp", "deep"), 0o700))
	must(t, os.MkdirAll(filepath.Join(r.runsDir(), "run-2"), 0o700))
	must(t, os.MkdirAll(filepath.Join(r.modulesDir(), ".partial-1"), 0o700))
	n, err := r.Sweep(t.Context())
	must(t, err)
	runs, err := os.ReadDir(r.runsDir())
	must(t, err)
	modules, err := os.ReadDir(r.modulesDir())
	must(t, err)
	if n != 2 || len(runs)+len(modules) != 0 {
		t.Errorf("swept %d, left %v and %v", n, runs, modules)
	}
}

func TestCompilesOncePerDigest(t *testing.T) {
	_, image := guest(t)
	r, err := New(Options{Dir: filepath.Join(shared.dir, "runtime")})
	must(t, err)
	image.Archive = "/nonexistent" // found after a restart, without the file
	began := time.Now()
	must(t, r.Ensure(t.Context(), image))
	ensured := time.Now()
	s := spec(t, "exit", "0")
	s.Image = image
	_, err = r.Run(t.Context(), s)
	must(t, err)
	t.Logf("ensure again %v, run from the cache %v", ensured.Sub(began), time.Since(ensured))
}

// A module without any code, as a base for broken ones.
var (
	header    = []byte("\x00asm\x01\x00\x00\x00")
	typeVoid  = section(1, 1, 0x60, 0, 0) // () → ()
	oneFunc   = section(3, 1, 0)
	onePage   = section(5, 1, 0, 1)
	emptyBody = section(10, 1, 2, 0, 0x0b)
	trapBody  = section(10, 1, 3, 0, 0x00, 0x0b)
)

func section(id byte, content ...byte) []byte {
	return append([]byte{id, byte(len(content))}, content...)
}

func exports(names ...string) []byte {
	content := []byte{byte(len(names))}
	for _, name := range names {
		kind := byte(0)
		if name == "memory" {
			kind = 2
		}
		content = append(append(append(content, byte(len(name))), name...), kind, 0)
	}
	return section(7, content...)
}

func module(sections ...[]byte) []byte {
	return slices.Concat(append([][]byte{header}, sections...)...)
}

func importOf(moduleName, name string) []byte {
	content := append([]byte{1, byte(len(moduleName))}, moduleName...)
	content = append(append(append(content, byte(len(name))), name...), 0, 0)
	return section(2, content...)
}

func TestModulesThatAreRefused(t *testing.T) {
	for name, test := range map[string]struct {
		module []byte
		says   string
	}{
		"empty file":     {nil, "not a WebAssembly module"},
		"not wasm":       {[]byte("#!/bin/sh\necho hello\n"), "not a WebAssembly module"},
		"cut off":        {module(typeVoid)[:10], "not a WebAssembly module"},
		"no _start":      {module(typeVoid, oneFunc, onePage, exports("memory"), emptyBody), "_start"},
		"no memory":      {module(typeVoid, oneFunc, exports("_start"), emptyBody), "exports no memory"},
		"foreign import": {module(typeVoid, importOf("env", "system"), oneFunc, onePage, exports("_start", "memory"), emptyBody), "env.system"},
		"unknown WASI":   {module(typeVoid, importOf("wasi_snapshot_preview1", "fd_steal"), oneFunc, onePage, exports("_start", "memory"), emptyBody), "fd_steal"},
		"many tables":    {module(typeVoid, oneFunc, section(4, 2, 0x70, 0, 1, 0x70, 0, 1), onePage, exports("_start", "memory"), emptyBody), "2 tables"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "m.wasm")
			must(t, os.WriteFile(path, test.module, 0o600))
			r, err := New(Options{Dir: t.TempDir()})
			must(t, err)
			err = r.Ensure(t.Context(), imageOf(t, path))
			if api.KindOf(err) != api.Unsupported || !strings.Contains(err.Error(), test.says) {
				t.Errorf("error %v, want kind unsupported and %q", err, test.says)
			}
			if left, _ := os.ReadDir(r.modulesDir()); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestTrap(t *testing.T) {
	path := filepath.Join(t.TempDir(), "trap.wasm")
	must(t, os.WriteFile(path, module(typeVoid, oneFunc, onePage, exports("_start", "memory"), trapBody), 0o600))
	r, err := New(Options{Dir: t.TempDir()})
	must(t, err)
	image := imageOf(t, path)
	must(t, r.Ensure(t.Context(), image))
	var logs bytes.Buffer
	s := container.Spec{ID: "trap", Image: image, Outputs: t.TempDir(), Timeout: time.Minute, Logs: &logs}
	result, err := r.Run(t.Context(), s)
	if err != nil || result.Reason != container.Exited || result.ExitCode != exitTrap || !strings.Contains(logs.String(), "unreachable") {
		t.Errorf("result %+v, %v, logs %q", result, err, logs.String())
	}
	must(t, r.Forget(t.Context(), image))
	must(t, r.Forget(t.Context(), image))
	s.Outputs = t.TempDir()
	if _, err := r.Run(t.Context(), s); err == nil {
		t.Error("a forgotten module was run")
	}
}

func TestRefusals(t *testing.T) {
	r, image := guest(t)
	for name, test := range map[string]struct {
		spoil func(*container.Spec)
		kind  api.Kind
	}{
		"GPU":        {func(s *container.Spec) { s.GPUs = []string{"GPU-1"} }, api.Unsupported},
		"network":    {func(s *container.Spec) { s.Network = true }, api.Unsupported},
		"no timeout": {func(s *container.Spec) { s.Timeout = 0 }, api.Invalid},
		"digest":     {func(s *container.Spec) { s.Image.Digest = "../../x" }, api.Unsupported},
	} {
		s := spec(t, "exit", "0")
		test.spoil(&s)
		if _, err := r.Run(t.Context(), s); api.KindOf(err) != test.kind || err == nil {
			t.Errorf("%s: error %v, want kind %v", name, err, test.kind)
		}
	}
	image.Digest = "sha256:" + strings.Repeat("0", 64)
	if err := r.Ensure(t.Context(), image); err == nil || api.KindOf(err) != api.Internal {
		t.Errorf("a file that is not the digest's: %v, want an error that blames this machine", err)
	}
	if err := r.Ensure(t.Context(), container.Image{Ref: "x@" + image.Digest, Digest: image.Digest}); api.KindOf(err) != api.Unsupported {
		t.Errorf("a registry reference: %v", err)
	}
	if _, err := New(Options{}); api.KindOf(err) != api.Invalid {
		t.Errorf("no directory: %v", err)
	}
}

func TestParallelRuns(t *testing.T) {
	r, _ := guest(t)
	var group sync.WaitGroup
	for i := range 6 {
		s := spec(t, "exit", fmt.Sprint(i))
		s.ID += fmt.Sprint(i)
		group.Go(func() {
			result, err := r.Run(t.Context(), s)
			if err != nil || result.ExitCode != i {
				t.Errorf("run %d: %+v, %v", i, result, err)
			}
		})
	}
	group.Wait()
}

func FuzzCheckTables(f *testing.F) {
	f.Add(module(typeVoid, oneFunc, section(4, 2, 0x70, 0, 1, 0x70, 0, 1)))
	f.Add([]byte("\x00asm\x01\x00\x00\x00\x04\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"))
	f.Fuzz(func(t *testing.T, data []byte) { _ = checkTables(data) })
}
