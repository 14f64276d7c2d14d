package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain makes this binary the program too: called as muster, it is muster.
// So the processes of a test with the race detector have it as well.
func TestMain(m *testing.M) {
	testscript.Main(suite{m}, map[string]func(){"muster": main})
}

// scratch holds what is made once for all tests.
var scratch string

type suite struct{ *testing.M }

func (s suite) Run() int {
	for _, pair := range os.Environ() {
		if name, _, _ := strings.Cut(pair, "="); strings.HasPrefix(name, "MUSTER_") && name != skipDocker {
			os.Unsetenv(name) // the tests' networks, not the tester's
		}
	}
	var err error
	if scratch, err = os.MkdirTemp("", "muster-test-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(scratch)
	code := s.M.Run()
	if err := stopShared(); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL: the scripts' network:", err)
		code = 1
	}
	return code
}

// patience bounds every wait. It is long: the tests may share two cores with
// others, under the race detector.
const patience = 2 * time.Minute

// program builds the jobs' program for WebAssembly, image for Linux.
var (
	program = sync.OnceValues(func() (string, error) { return build("prog.wasm", "wasip1", "wasm", "./testdata/prog") })
	native  = sync.OnceValues(func() (string, error) { return build("prog", "linux", runtime.GOARCH, "./testdata/prog") })
)

func build(name, goos, goarch, pkg string) (string, error) {
	out := filepath.Join(scratch, name)
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "GOOS="+goos, "GOARCH="+goarch, "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", pkg, err, text)
	}
	return out, nil
}

// process is a muster process that says when it is ready.
type process struct {
	cmd   *exec.Cmd
	ready chan struct{}
	done  chan struct{}

	mu   sync.Mutex
	log  bytes.Buffer // guarded by mu; stdout and stderr
	line string       // guarded by mu; the ready line
	err  error        // written before done is closed
}

// start starts muster in dir. env is added to this process's own.
func start(dir string, env []string, args ...string) (*process, error) {
	path, err := exec.LookPath("muster")
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.Command(path, args...), ready: make(chan struct{}), done: make(chan struct{})}
	p.cmd.Dir, p.cmd.Env, p.cmd.Stderr = dir, append(os.Environ(), env...), writerFunc(p.write)
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		p.read(stdout)
		p.err = p.cmd.Wait()
	}()
	return p, nil
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func (p *process) write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(b)
}

func (p *process) read(stdout io.Reader) {
	for s := bufio.NewScanner(stdout); s.Scan(); {
		_, _ = p.write(append(s.Bytes(), '\n'))
		if strings.HasPrefix(s.Text(), "ready ") && p.field("") == "" {
			p.mu.Lock()
			p.line = s.Text()
			p.mu.Unlock()
			close(p.ready)
		}
	}
}

// waitReady waits for the ready line.
func (p *process) waitReady() error {
	select {
	case <-p.ready:
		return nil
	case <-p.done:
		return fmt.Errorf("muster %s ended before it was ready: %w\n%s", p.cmd.Args[1], p.err, p.text())
	case <-time.After(patience):
		return fmt.Errorf("muster %s is not ready after %s\n%s", p.cmd.Args[1], patience, p.text())
	}
}

// field is a value of the ready line, such as api=…; with an empty name it is
// the line.
func (p *process) field(name string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if name == "" {
		return p.line
	}
	for f := range strings.FieldsSeq(p.line) {
		if v, ok := strings.CutPrefix(f, name+"="); ok {
			return v
		}
	}
	return ""
}

func (p *process) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// broken is an error where the process had a defect that it may have survived.
func (p *process) broken() error {
	if text := p.text(); strings.Contains(text, "DATA RACE") || strings.Contains(text, "panic") {
		return fmt.Errorf("muster %s is broken:\n%s", p.cmd.Args[1], text)
	}
	return nil
}

// interrupt is Ctrl-C; it wants a clean end with exit code 0.
func (p *process) interrupt() error {
	if err := p.cmd.Process.Signal(os.Interrupt); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
	case <-time.After(patience):
		p.kill()
		return fmt.Errorf("muster %s did not stop within %s of an interrupt\n%s", p.cmd.Args[1], patience, p.text())
	}
	if p.err != nil {
		return fmt.Errorf("muster %s after an interrupt: %w\n%s", p.cmd.Args[1], p.err, p.text())
	}
	return nil
}

// kill is kill -9, and waits until the process is gone.
func (p *process) kill() {
	_ = p.cmd.Process.Signal(syscall.SIGKILL)
	<-p.done
}

// poll waits until what f reports is true.
func poll(ctx context.Context, f func() (bool, error)) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := f()
		if ok && err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// shared is a network that the scripts share, each with an account of its own.
var shared = sync.OnceValues(func() (*process, error) {
	p, err := start(scratch, nil, "dev", "--dir", filepath.Join(scratch, "net"), "--listen", "127.0.0.1:0", "--runtime", "wasm")
	if err != nil {
		return nil, err
	}
	sharedProcess = p
	return p, p.waitReady()
})

var sharedProcess *process

func stopShared() error {
	if sharedProcess == nil {
		return nil
	}
	return errors.Join(sharedProcess.interrupt(), sharedProcess.broken())
}

// skipDocker set to 1 skips what needs a container engine.
const skipDocker = "MUSTER_SKIP_DOCKER"
