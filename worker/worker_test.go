package worker

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/musterpb/musterpbconnect"
	"github.com/musternet/muster/api/outputs"
	"github.com/musternet/muster/container"
	"github.com/musternet/muster/verify"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	patience = 30 * time.Second
	theKey   = "muster_alice_key"
)

// fakeScheduler is the schedulers' side: it takes one session after the other,
// and does what the test says.
type fakeScheduler struct {
	t        *testing.T
	url      string
	blobs    *blob.Memory
	down     chan struct{} // closed: ends every session
	sessions chan *fakeSession

	mu      sync.Mutex
	refuse  error    // guarded by mu; answers the next sessions
	keep    []string // guarded by mu; of the next welcome: all others stop
	noBlobs bool     // guarded by mu
}

// fakeSession is one session after its welcome.
type fakeSession struct {
	t       *testing.T
	hello   *musterpb.WorkerHello
	running []string // as the worker stated
	in      chan *musterpb.WorkerMessage
	out     chan *musterpb.SchedulerMessage
	end     chan error // ends the session with an error
	over    chan struct{}
}

func newFakeScheduler(t *testing.T) *fakeScheduler {
	f := &fakeScheduler{t: t, blobs: &blob.Memory{}, down: make(chan struct{}), sessions: make(chan *fakeSession, 16)}
	mux := http.NewServeMux()
	path, handler := musterpbconnect.NewSessionsHandler(f)
	mux.Handle(path, handler)
	blobs := blob.Handler(f.blobs, func(r *http.Request) (blob.Caller, error) {
		if r.Header.Get("Authorization") != "Bearer "+theKey {
			return blob.Caller{}, api.Errorf(api.Unauthenticated, "no key")
		}
		return blob.Caller{ID: "worker"}, nil
	}, 1<<30)
	mux.HandleFunc("/blob/", func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		gone := f.noBlobs
		f.mu.Unlock()
		if gone {
			http.Error(w, "gone", http.StatusServiceUnavailable)
			return
		}
		blobs.ServeHTTP(w, r)
	})
	srv := httptest.NewUnstartedServer(mux)
	srv.Config.Protocols = new(http.Protocols)
	srv.Config.Protocols.SetHTTP1(true)
	srv.Config.Protocols.SetUnencryptedHTTP2(true)
	srv.Start()
	f.url = srv.URL
	t.Cleanup(func() {
		close(f.down)
		srv.Close()
	})
	return f
}

// Session implements the Sessions service.
func (f *fakeScheduler) Session(ctx context.Context, stream *connect.BidiStream[musterpb.WorkerMessage, musterpb.SchedulerMessage]) error {
	f.mu.Lock()
	refuse := f.refuse
	f.mu.Unlock()
	if refuse != nil {
		return api.ToConnect(refuse)
	}
	if stream.RequestHeader().Get("Authorization") != "Bearer "+theKey {
		return connect.NewError(connect.CodeUnauthenticated, errors.New("the API key is not known to this cluster"))
	}
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	nonce := bytes.Repeat([]byte{7}, 32)
	if err := stream.Send(&musterpb.SchedulerMessage{Message: &musterpb.SchedulerMessage_Challenge{Challenge: &musterpb.Challenge{Nonce: nonce}}}); err != nil {
		return err
	}
	second, err := stream.Receive()
	if err != nil {
		return err
	}
	hello, proof := first.GetHello(), second.GetProof()
	if !ed25519.Verify(hello.GetPublicKey(), api.ChallengeText(nonce), proof.GetSignature()) {
		f.t.Error("the challenge is not signed")
	}
	welcome := &musterpb.Welcome{HeartbeatMs: 50, Schedulers: []string{strings.TrimPrefix(f.url, "http://")}}
	f.mu.Lock()
	for _, id := range proof.Running {
		if slices.Contains(f.keep, id) {
			welcome.Keep = append(welcome.Keep, id)
		} else {
			welcome.Stop = append(welcome.Stop, id)
		}
	}
	f.mu.Unlock()
	if err := stream.Send(&musterpb.SchedulerMessage{Message: &musterpb.SchedulerMessage_Welcome{Welcome: welcome}}); err != nil {
		return err
	}
	s := &fakeSession{
		t: f.t, hello: hello, running: proof.Running, in: make(chan *musterpb.WorkerMessage, 10_000), out: make(chan *musterpb.SchedulerMessage),
		end: make(chan error, 1), over: make(chan struct{}),
	}
	defer close(s.over)
	go func() {
		defer close(s.in)
		for {
			m, err := stream.Receive()
			if err != nil {
				return
			}
			for _, data := range m.GetReports().GetBlobs() {
				f.put(data) // as the schedulers do with what comes along
			}
			for _, one := range split(m) {
				s.in <- one
			}
		}
	}()
	f.sessions <- s
	for {
		select {
		case <-f.down:
			return nil
		case <-ctx.Done():
			return nil
		case err := <-s.end:
			return err
		case m := <-s.out:
			if err := stream.Send(m); err != nil {
				return err
			}
		}
	}
}

func (f *fakeScheduler) session() *fakeSession {
	f.t.Helper()
	select {
	case s := <-f.sessions:
		return s
	case <-time.After(patience):
		f.t.Fatal("no worker connects")
		return nil
	}
}

func (f *fakeScheduler) put(data []byte) string {
	f.t.Helper()
	digest := api.DigestOf(data)
	if _, err := f.blobs.Put(f.t.Context(), digest, bytes.NewReader(data), blob.NoLimit); err != nil {
		f.t.Fatal(err)
	}
	return string(digest)
}

func (f *fakeScheduler) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// awaited is the next message that pick takes.
func awaited[T any](s *fakeSession, what string, pick func(*musterpb.WorkerMessage) *T) *T {
	s.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case m, open := <-s.in:
			if !open {
				s.t.Fatalf("the worker left before there was %s", what)
			}
			if v := pick(m); v != nil {
				return v
			}
		case <-timeout:
			s.t.Fatalf("no %s came", what)
		}
	}
}

func (s *fakeSession) send(m *musterpb.SchedulerMessage) {
	s.t.Helper()
	select {
	case s.out <- m:
	case <-time.After(patience):
		s.t.Fatal("the session does not take messages")
	}
}

func (s *fakeSession) assign(a *musterpb.Assignment) {
	s.t.Helper()
	s.send(ordered(&musterpb.Orders{Assign: []*musterpb.Assignment{a}}))
}

func (s *fakeSession) accept(attempt string) {
	s.t.Helper()
	s.send(ordered(&musterpb.Orders{Outcomes: []*musterpb.Outcome{{Attempt: attempt, Accepted: true}}}))
}

func (s *fakeSession) committed() *musterpb.Commit {
	s.t.Helper()
	return awaited(s, "commit", func(m *musterpb.WorkerMessage) *musterpb.Commit {
		if f := failureIn(m); f != nil {
			s.t.Fatalf("the attempt failed: %v", f)
		}
		return commitIn(m)
	})
}

func (s *fakeSession) failed() *musterpb.AttemptFailed {
	s.t.Helper()
	return awaited(s, "failure", func(m *musterpb.WorkerMessage) *musterpb.AttemptFailed {
		if c := commitIn(m); c != nil {
			s.t.Fatalf("the attempt was committed: %v", c)
		}
		return failureIn(m)
	})
}

// idle waits until the worker states that it runs nothing.
func (s *fakeSession) idle() {
	s.t.Helper()
	awaited(s, "heartbeat of an idle worker", func(m *musterpb.WorkerMessage) *musterpb.Heartbeat {
		if h := m.GetHeartbeat(); h != nil && len(h.Running) == 0 {
			return h
		}
		return nil
	})
}

// testWorker is a worker that runs until the test ends.
type testWorker struct {
	*Worker
	fake *container.Fake
	stop func() error // and wait
}

func newTestWorker(t *testing.T, f *fakeScheduler, onRun func(context.Context, container.Spec) (container.Result, error)) *testWorker {
	t.Helper()
	w := &testWorker{fake: &container.Fake{OnRun: onRun}}
	w.Worker = New(testConfig(t, f, w.fake))
	w.start(t)
	return w
}

func testConfig(t *testing.T, f *fakeScheduler, fake *container.Fake) Config {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return Config{
		Key: key, Name: "test", Dir: t.TempDir(), Schedulers: []string{strings.TrimPrefix(f.url, "http://")}, APIKey: theKey,
		Runtimes: map[string]container.Runtime{"wasm": fake, "docker": fake}, CacheBytes: 1 << 30, DiskBytes: 1 << 30, BlobPatience: 300 * time.Millisecond,
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
}

func (w *testWorker) start(t *testing.T) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	w.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(patience):
			return errors.New("the worker does not stop")
		}
	})
	t.Cleanup(func() {
		if err := w.stop(); err != nil {
			t.Errorf("the worker ended with %v", err)
		}
		if n := w.fake.Live(); n > 0 {
			t.Errorf("%d runs are left", n)
		}
	})
}

// attemptDirs are the directories of attempts that are on disk.
func (w *testWorker) attemptDirs(t *testing.T) []string {
	entries, err := os.ReadDir(w.attemptsDir())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// assignment is an attempt at items 0 to 3 of a small program.
func (f *fakeScheduler) assignment(id string, command ...string) *musterpb.Assignment {
	module := []byte("\x00asm\x01\x00\x00\x00")
	return &musterpb.Assignment{
		Attempt: id, Command: command,
		Image:     &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_WASM, Digest: f.put(module), SizeBytes: int64(len(module)), Name: "program.wasm"},
		Items:     &musterpb.Items{Ranges: []*musterpb.ItemRange{{First: 10, Last: 19, Step: 1}}},
		Indexes:   []uint64{0, 1, 2, 5},
		Resources: &musterpb.Resources{MilliCpus: 100, MemoryBytes: 32 << 20, DiskBytes: 1 << 20}, TimeoutMs: 60_000,
	}
}

// writeItems plays a program that is told the values of its items.
func writeItems(spec container.Spec, values ...string) (container.Result, error) {
	for _, v := range values {
		if err := os.MkdirAll(filepath.Join(spec.Outputs, v), 0o755); err != nil {
			return container.Result{}, err
		}
		if err := os.WriteFile(filepath.Join(spec.Outputs, v, "out.txt"), []byte("item "+v), 0o644); err != nil {
			return container.Result{}, err
		}
	}
	return container.Result{}, nil
}

func itemsArgument(_ context.Context, spec container.Spec) (container.Result, error) {
	return writeItems(spec, strings.Split(spec.Command[len(spec.Command)-1], ",")...)
}

// contents checks a commit as a scheduler does, and returns the files.
func (f *fakeScheduler) contents(w *testWorker, a *musterpb.Assignment, c *musterpb.Commit) map[string]string {
	f.t.Helper()
	if err := verify.CheckCommit(w.Key.Public().(ed25519.PublicKey), c); err != nil {
		f.t.Fatal(err)
	}
	data := f.get(c.ManifestDigest)
	m := &musterpb.Manifest{}
	if err := m.UnmarshalVT(data); err != nil {
		f.t.Fatal(err)
	}
	if m.Attempt != a.Attempt || !bytes.Equal(verify.Root(m), c.Root) {
		f.t.Errorf("the manifest is of %q, or its root is another", m.Attempt)
	}
	if err := outputs.CheckManifest(m, a.Indexes, c.ArchiveBytes); err != nil {
		f.t.Error(err)
	}
	archive := bytes.NewReader(f.get(c.ArchiveDigest))
	files, total := map[string]string{}, int64(0)
	for _, item := range m.Items {
		if !bytes.Equal(item.InputDigest, verify.InputDigest(a.Inputs)) || !bytes.Equal(item.ParametersDigest, verify.ParametersDigest(a.Image.Digest, a.Command, a.Env)) {
			f.t.Errorf("item %d was computed from something else", item.Index)
		}
		list, err := outputs.OpenItem(f.t.Context(), archive, item, outputs.Limits{Bytes: 1 << 20, Files: 100})
		if err != nil {
			f.t.Fatal(err)
		}
		for _, file := range list {
			files[fmt.Sprintf("%d/%s", item.Index, file.Path)] = string(file.Data)
		}
		total += item.OutputBytes
	}
	if total != c.OutputBytes {
		f.t.Errorf("%d bytes of outputs, %d were signed", total, c.OutputBytes)
	}
	return files
}

func (f *fakeScheduler) get(digest string) []byte {
	f.t.Helper()
	r, err := f.blobs.Open(f.t.Context(), api.Digest(digest))
	if err != nil {
		f.t.Fatal(err)
	}
	data, err := io.ReadAll(r)
	if err != nil {
		f.t.Fatal(err)
	}
	return data
}

func (f *fakeScheduler) log(digest string) string {
	f.t.Helper()
	d, err := zstd.NewReader(bytes.NewReader(f.get(digest)))
	if err != nil {
		f.t.Fatal(err)
	}
	defer d.Close()
	text, err := io.ReadAll(d)
	if err != nil {
		f.t.Fatal(err)
	}
	return string(text)
}

func TestAttempt(t *testing.T) {
	f := newFakeScheduler(t)
	input := []byte("scene")
	tree := t.TempDir()
	if err := os.WriteFile(filepath.Join(tree, "a.txt"), []byte("in a tree"), 0o644); err != nil {
		t.Fatal(err)
	}
	var packed bytes.Buffer
	if err := blob.WriteDir(t.Context(), &packed, tree); err != nil {
		t.Fatal(err)
	}
	var got container.Spec
	var read string
	w := newTestWorker(t, f, func(ctx context.Context, spec container.Spec) (container.Result, error) {
		got = spec
		for _, name := range []string{"data/scene.txt", "tree/a.txt"} {
			data, err := os.ReadFile(filepath.Join(spec.Inputs, name))
			if err != nil {
				return container.Result{}, err
			}
			read += string(data) + ";"
		}
		fmt.Fprintln(spec.Logs, "rendering")
		return itemsArgument(ctx, spec)
	})
	s := f.session()
	if s.hello.Name != "test" || !slices.Equal(s.hello.Capacity.Runtimes, []string{"docker", "wasm"}) || len(s.running) > 0 {
		t.Errorf("hello: %v, running %v", s.hello, s.running)
	}
	a := f.assignment("att-1", "render", "--items", "{items}")
	a.Env = []*musterpb.EnvVar{{Name: "QUALITY", Value: "high"}}
	a.Inputs = []*musterpb.Input{
		{Path: "data/scene.txt", Digest: f.put(input), SizeBytes: int64(len(input))},
		{Path: "tree", Digest: f.put(packed.Bytes()), SizeBytes: int64(packed.Len()), Directory: true},
	}
	a.Network = true // this owner does not allow it
	s.assign(a)
	awaited(s, "start", startIn)
	c := s.committed()
	want := map[string]string{"0/out.txt": "item 10", "1/out.txt": "item 11", "2/out.txt": "item 12", "5/out.txt": "item 15"}
	if files := f.contents(w, a, c); fmt.Sprint(files) != fmt.Sprint(want) {
		t.Errorf("%v; want %v", files, want)
	}
	if got.ID != "att-1" || !slices.Equal(got.Command, []string{"render", "--items", "10,11,12,15"}) || !slices.Equal(got.Env, []string{"QUALITY=high"}) ||
		got.MemoryBytes != 32<<20 || got.OutputBytes != 1<<20 || got.Network || got.Timeout <= 0 || got.Timeout > time.Minute {
		t.Errorf("ran %+v", got)
	}
	if read != "scene;in a tree;" {
		t.Errorf("the inputs were %q", read)
	}
	if text := f.log(c.LogDigest); text != "rendering\n" {
		t.Errorf("the log is %q", text)
	}
	// The report is kept and repeated until it is answered.
	if h := awaited(s, "heartbeat", (*musterpb.WorkerMessage).GetHeartbeat); !slices.Equal(h.Running, []string{"att-1"}) {
		t.Errorf("states %v before the outcome", h.Running)
	}
	if again := s.committed(); !again.EqualVT(c) {
		t.Error("the repeated report is another")
	}
	s.accept("att-1")
	s.idle()
	if dirs := w.attemptDirs(t); len(dirs) > 0 {
		t.Errorf("left on disk: %v", dirs)
	}
	h := awaited(s, "full heartbeat", func(m *musterpb.WorkerMessage) *musterpb.Heartbeat {
		if h := m.GetHeartbeat(); h.GetFull() {
			return h
		}
		return nil
	})
	if len(h.Cached) != 3 || !slices.Contains(h.Cached, a.Image.Digest) {
		t.Errorf("cached: %v", h.Cached)
	}
}

// However often a command runs for its items, their outputs end in one archive.
func TestInvocations(t *testing.T) {
	f := newFakeScheduler(t)
	var mu sync.Mutex
	var ran []string
	w := newTestWorker(t, f, func(_ context.Context, spec container.Spec) (container.Result, error) {
		mu.Lock()
		ran = append(ran, strings.Join(spec.Command, " "))
		mu.Unlock()
		switch spec.Command[0] {
		case "item": // leaves its files in /out itself
			return container.Result{}, os.WriteFile(filepath.Join(spec.Outputs, "out.txt"), []byte("item "+spec.Command[1]), 0o644)
		case "item-dir":
			return writeItems(spec, spec.Command[1])
		}
		var values []string
		var first, last int
		if _, err := fmt.Sscan(spec.Command[1]+" "+spec.Command[2], &first, &last); err != nil {
			return container.Result{}, err
		}
		for v := first; v <= last; v++ {
			values = append(values, fmt.Sprint(v))
		}
		return writeItems(spec, values...)
	})
	s := f.session()
	for i, test := range []struct {
		command []string
		want    []string
	}{
		{[]string{"item", "{item}"}, []string{"item 10", "item 11", "item 12", "item 15"}},
		{[]string{"item-dir", "{item}"}, []string{"item-dir 10", "item-dir 11", "item-dir 12", "item-dir 15"}},
		{[]string{"span", "{first}", "{last}"}, []string{"span 10 12", "span 15 15"}},
	} {
		mu.Lock()
		ran = nil
		mu.Unlock()
		a := f.assignment(fmt.Sprintf("att-%d", i), test.command...)
		s.assign(a)
		c := s.committed()
		want := map[string]string{"0/out.txt": "item 10", "1/out.txt": "item 11", "2/out.txt": "item 12", "5/out.txt": "item 15"}
		if files := f.contents(w, a, c); fmt.Sprint(files) != fmt.Sprint(want) {
			t.Errorf("%v: %v", test.command, files)
		}
		if !slices.Equal(ran, test.want) {
			t.Errorf("%v ran %q; want %q", test.command, ran, test.want)
		}
		s.accept(a.Attempt)
	}
}

// Lines of several runs are matched to their items by custom_id.
func TestLines(t *testing.T) {
	f := newFakeScheduler(t)
	w := newTestWorker(t, f, func(_ context.Context, spec container.Spec) (container.Result, error) {
		// The program answers without a line break at the end, which must not join two runs' lines.
		return container.Result{}, os.WriteFile(filepath.Join(spec.Outputs, "results.jsonl"), fmt.Appendf(nil, `{"custom_id":"q%s","answer":%s}`, spec.Command[1], spec.Command[1]), 0o644)
	})
	s := f.session()
	var lines []byte
	for i := range 6 {
		lines = fmt.Appendf(lines, "{\"custom_id\":\"q%d\",\"prompt\":\"?\"}\n", i)
	}
	a := f.assignment("att-1", "answer", "{item}")
	a.Items, a.Outputs, a.Indexes = &musterpb.Items{Count: 6, LinesPath: "in.jsonl"}, musterpb.OutputMode_OUTPUT_MODE_LINES, []uint64{1, 3, 4}
	a.Inputs = []*musterpb.Input{{Path: "in.jsonl", Digest: f.put(lines), SizeBytes: int64(len(lines))}}
	s.assign(a)
	files := f.contents(w, a, s.committed())
	want := map[string]string{"1/line.json": `{"custom_id":"q1","answer":1}`, "3/line.json": `{"custom_id":"q3","answer":3}`, "4/line.json": `{"custom_id":"q4","answer":4}`}
	if fmt.Sprint(files) != fmt.Sprint(want) {
		t.Errorf("%v; want %v", files, want)
	}
}

// Who is blamed for which failure, and with which code: the same job has to
// fail in the same way on every owner's machine.
func TestFailures(t *testing.T) {
	f := newFakeScheduler(t)
	var run func(container.Spec) (container.Result, error)
	var ensure error
	w := &testWorker{fake: &container.Fake{
		OnRun:    func(_ context.Context, spec container.Spec) (container.Result, error) { return run(spec) },
		OnEnsure: func(context.Context, container.Image) error { return ensure },
	}}
	w.Worker = New(testConfig(t, f, w.fake))
	w.start(t)
	s := f.session()
	result := func(reason container.Reason, code int) func(container.Spec) (container.Result, error) {
		return func(spec container.Spec) (container.Result, error) {
			fmt.Fprintln(spec.Logs, "last words")
			return container.Result{Reason: reason, ExitCode: code, OutputBytes: 1}, nil
		}
	}
	for i, test := range []struct {
		name   string
		run    func(container.Spec) (container.Result, error)
		ensure error
		change func(*musterpb.Assignment)
		blobs  bool // out of reach
		blame  musterpb.Blame
		code   int32
		want   string
	}{
		{name: "exit code", run: result(container.Exited, 42), blame: musterpb.Blame_BLAME_JOB, code: 42, want: "ended with exit code 42"},
		{name: "time-out", run: result(container.TimedOut, 0), blame: musterpb.Blame_BLAME_JOB, code: 124, want: "longer than its time-out of 1m0s"},
		{name: "memory", run: result(container.OutOfMemory, 0), blame: musterpb.Blame_BLAME_JOB, code: 137, want: "more than the 32MiB of resources.memory"},
		{name: "output", run: result(container.OutputTooLarge, 0), blame: musterpb.Blame_BLAME_JOB, code: 65, want: "more than the 1MiB of resources.disk"},
		{name: "no output", run: func(container.Spec) (container.Result, error) { return container.Result{OutputBytes: 1}, nil }, blame: musterpb.Blame_BLAME_JOB, code: 65, want: "item 10: /out/10 is missing"},
		{name: "image missing", ensure: api.Errorf(api.NotFound, "no such manifest"), blame: musterpb.Blame_BLAME_JOB, code: 126, want: "image program.wasm: no such manifest"},
		{name: "image of another platform", ensure: api.Errorf(api.Unsupported, "arm64"), blame: musterpb.Blame_BLAME_JOB, code: 126, want: "arm64"},
		{name: "engine broken", ensure: errors.New("engine is gone"), blame: musterpb.Blame_BLAME_WORKER, want: "engine is gone"},
		{name: "runtime broken", run: func(container.Spec) (container.Result, error) {
			return container.Result{}, errors.New("GPU fell off the bus")
		}, blame: musterpb.Blame_BLAME_WORKER, want: "GPU fell off the bus"},
		{name: "no such runtime", change: func(a *musterpb.Assignment) { a.Image.Kind = musterpb.ImageKind_IMAGE_KIND_WASM }, blame: musterpb.Blame_BLAME_WORKER, want: "does not have the runtime wasm"},
		{name: "input not stored", change: func(a *musterpb.Assignment) {
			a.Inputs = []*musterpb.Input{{Path: "x", Digest: string(api.DigestOf([]byte("nowhere"))), SizeBytes: 7}}
		}, blame: musterpb.Blame_BLAME_NETWORK, want: "input x: blob"},
		{name: "input archive damaged", change: func(a *musterpb.Assignment) {
			a.Inputs = []*musterpb.Input{{Path: "x", Digest: f.put([]byte("no archive")), SizeBytes: 10, Directory: true}}
		}, blame: musterpb.Blame_BLAME_JOB, code: 66, want: "the archive is damaged"},
		{name: "input lines too few", run: func(spec container.Spec) (container.Result, error) {
			return container.Result{}, os.WriteFile(filepath.Join(spec.Outputs, "results.jsonl"), []byte("{}\n"), 0o644)
		}, change: func(a *musterpb.Assignment) {
			a.Items, a.Outputs = &musterpb.Items{Count: 10, LinesPath: "x"}, musterpb.OutputMode_OUTPUT_MODE_LINES
			a.Inputs = []*musterpb.Input{{Path: "x", Digest: f.put([]byte("{}\n")), SizeBytes: 3}}
		}, blame: musterpb.Blame_BLAME_JOB, code: 66, want: "has no line 2"},
		{name: "blobs out of reach", blobs: true, change: func(a *musterpb.Assignment) {
			a.Inputs = []*musterpb.Input{{Path: "x", Digest: f.put([]byte("unreachable")), SizeBytes: 11}}
		}, blame: musterpb.Blame_BLAME_NETWORK, want: "503"},
		{name: "upload out of reach", run: func(spec container.Spec) (container.Result, error) {
			f.set(func() { f.noBlobs = true })
			large := make([]byte, 2*outputs.MaxInline)
			if _, err := rand.Read(large); err != nil {
				return container.Result{}, err
			}
			res, err := itemsArgument(context.Background(), spec)
			return res, errors.Join(err, os.WriteFile(filepath.Join(spec.Outputs, "10", "large"), large, 0o644))
		}, blame: musterpb.Blame_BLAME_NETWORK, want: "uploading the outputs"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s.t = t
			run, ensure = test.run, test.ensure
			if run == nil {
				run = func(spec container.Spec) (container.Result, error) { return itemsArgument(t.Context(), spec) }
			}
			f.set(func() { f.noBlobs = test.blobs })
			defer f.set(func() { f.noBlobs = false })
			a := f.assignment(fmt.Sprintf("att-%d", i), "program", "{items}")
			_ = w.fake.Forget(t.Context(), container.Image{Digest: a.Image.Digest})
			w.Runtimes["wasm"] = w.fake
			if test.change != nil {
				test.change(a)
			}
			if test.name == "no such runtime" {
				delete(w.Runtimes, "wasm")
			}
			s.assign(a)
			got := s.failed()
			if got.Attempt != a.Attempt || got.Blame != test.blame || got.ExitCode != test.code || !strings.Contains(got.Reason, test.want) || got.Cancelled {
				t.Errorf("%v; want %v, code %d: %s", got, test.blame, test.code, test.want)
			}
			if test.name == "exit code" {
				if text := f.log(got.LogDigest); text != "last words\n" {
					t.Errorf("the log is %q", text)
				}
			}
			s.accept(a.Attempt)
			s.idle()
			if dirs := w.attemptDirs(t); len(dirs) > 0 {
				t.Errorf("left on disk: %v", dirs)
			}
		})
	}
}

// blocking plays a program that runs until release is closed, or it is stopped.
func blocking(release <-chan struct{}) func(context.Context, container.Spec) (container.Result, error) {
	return func(ctx context.Context, spec container.Spec) (container.Result, error) {
		select {
		case <-release:
			return itemsArgument(ctx, spec)
		case <-ctx.Done():
			return container.Result{}, nil
		}
	}
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func TestStop(t *testing.T) {
	f := newFakeScheduler(t)
	w := newTestWorker(t, f, blocking(nil))
	s := f.session()
	s.assign(f.assignment("att-1", "program", "{items}"))
	s.assign(f.assignment("att-1", "program", "{items}")) // twice is once
	eventually(t, "the run", func() bool { return w.fake.Live() == 1 })
	s.send(ordered(&musterpb.Orders{Stop: []*musterpb.Stop{{Attempt: "att-1", Reason: "cancelled"}}}))
	s.idle()
	eventually(t, "the run to end", func() bool { return w.fake.Live() == 0 && len(w.attemptDirs(t)) == 0 })
	if n := w.fake.Started(); n != 1 {
		t.Errorf("%d runs", n)
	}
	if n := f.blobs.Len(); n != 1 { // the image
		t.Errorf("%d blobs are stored: a stopped attempt uploaded something", n)
	}
}

// An attempt's ID names a directory, and nothing outside of the worker's.
func TestAssignmentsThatMakeNoSense(t *testing.T) {
	f := newFakeScheduler(t)
	w := newTestWorker(t, f, itemsArgument)
	precious := filepath.Join(w.Dir, "precious")
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := f.session()
	for _, id := range []string{"", ".", "..", "../precious", "/etc", "a/b"} {
		s.assign(f.assignment(id, "program", "{items}"))
	}
	s.assign(&musterpb.Assignment{Attempt: "att-bare"})
	up := f.assignment("att-up", "program", "{items}")
	up.Inputs = []*musterpb.Input{{Path: "../../precious", Digest: f.put(nil)}}
	s.assign(up)
	s.assign(f.assignment("att-good", "program", "{items}"))
	if c := s.committed(); c.Attempt != "att-good" {
		t.Errorf("committed %q", c.Attempt)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Error(err)
	}
	if n := w.fake.Started(); n != 1 {
		t.Errorf("%d runs", n)
	}
}

// A worker that connects again states what it has, stops what is not wanted,
// and repeats what was not answered.
func TestReconnect(t *testing.T) {
	f := newFakeScheduler(t)
	release := make(chan struct{})
	w := newTestWorker(t, f, func(ctx context.Context, spec container.Spec) (container.Result, error) {
		if spec.ID == "att-quick" {
			return itemsArgument(ctx, spec)
		}
		return blocking(release)(ctx, spec)
	})
	s := f.session()
	for _, id := range []string{"att-keep", "att-drop", "att-quick"} {
		s.assign(f.assignment(id, "program", "{items}"))
	}
	first := s.committed()
	eventually(t, "two runs", func() bool { return w.fake.Live() == 2 })
	f.set(func() { f.keep = []string{"att-keep", "att-quick"} })
	s.end <- api.ToConnect(api.Errorf(api.Unavailable, "no longer leading"))
	s = f.session()
	slices.Sort(s.running)
	if !slices.Equal(s.running, []string{"att-drop", "att-keep", "att-quick"}) {
		t.Errorf("stated %v", s.running)
	}
	if again := s.committed(); !again.EqualVT(first) {
		t.Errorf("repeated %v", again)
	}
	s.accept("att-quick")
	eventually(t, "att-drop to stop", func() bool { return w.fake.Live() == 1 })
	close(release)
	if c := s.committed(); c.Attempt != "att-keep" {
		t.Errorf("committed %q", c.Attempt)
	}
	s.accept("att-keep")
	s.idle()
	if n := w.fake.Started(); n != 3 {
		t.Errorf("%d runs of 3 attempts", n)
	}
}

// A refused result is forgotten like an accepted one.
func TestRefusedResult(t *testing.T) {
	f := newFakeScheduler(t)
	newTestWorker(t, f, itemsArgument)
	s := f.session()
	s.assign(f.assignment("att-1", "program", "{items}"))
	s.committed()
	s.send(ordered(&musterpb.Orders{Outcomes: []*musterpb.Outcome{{Attempt: "att-1", Reason: "too late"}}}))
	s.idle()
}

// A scheduler that does not lead names the one that does.
func TestLeaderRedirect(t *testing.T) {
	leader, follower := newFakeScheduler(t), newFakeScheduler(t)
	redirect := connect.NewError(connect.CodeUnavailable, errors.New("another leads"))
	redirect.Meta().Set(client.HeaderLeader, strings.TrimPrefix(leader.url, "http://"))
	follower.set(func() { follower.refuse = redirect })
	newTestWorker(t, follower, itemsArgument)
	leader.session()
}

// A scheduler that is gone is passed over.
func TestSecondScheduler(t *testing.T) {
	f := newFakeScheduler(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	config := testConfig(t, f, &container.Fake{})
	config.Schedulers = []string{l.Addr().String(), config.Schedulers[0]}
	w := &testWorker{Worker: New(config), fake: &container.Fake{}}
	w.start(t)
	f.session()
}

func TestRefusedKey(t *testing.T) {
	f := newFakeScheduler(t)
	config := testConfig(t, f, &container.Fake{})
	config.APIKey = "muster_mallory_key"
	err := New(config).Run(t.Context())
	if api.KindOf(err) != api.Unauthenticated || !strings.Contains(err.Error(), "the schedulers refuse this worker") || !strings.Contains(err.Error(), "the API key is not known") {
		t.Errorf("%v", err)
	}
	config.Schedulers = nil
	if err := New(config).Run(t.Context()); api.KindOf(err) != api.Invalid {
		t.Errorf("no scheduler: %v", err)
	}
}

// What an earlier process left is gone before the first attempt, whatever the
// job did to it.
func TestCleanUpAtStart(t *testing.T) {
	f := newFakeScheduler(t)
	fake := &container.Fake{}
	fake.Leftovers.Store(3)
	config := testConfig(t, f, fake)
	locked := filepath.Join(config.Dir, "attempts", "att-old", "out", "locked")
	if err := os.MkdirAll(locked, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(filepath.Join(locked, "x"), nil, 0o600), os.Chmod(locked, 0)); err != nil {
		t.Fatal(err)
	}
	w := &testWorker{Worker: New(config), fake: fake}
	w.start(t)
	f.session()
	if dirs := w.attemptDirs(t); len(dirs) > 0 {
		t.Errorf("left: %v", dirs)
	}
	if fake.Leftovers.Load() != 0 {
		t.Error("the runtime was not swept")
	}
}

// Stopping the worker stops what runs and leaves nothing.
func TestShutdown(t *testing.T) {
	f := newFakeScheduler(t)
	w := newTestWorker(t, f, blocking(nil))
	s := f.session()
	for i := range 3 {
		s.assign(f.assignment(fmt.Sprintf("att-%d", i), "program", "{items}"))
	}
	eventually(t, "three runs", func() bool { return w.fake.Live() == 3 })
	if err := w.stop(); err != nil {
		t.Error(err)
	}
	if n := w.fake.Live(); n != 0 {
		t.Errorf("%d runs are left", n)
	}
	if dirs := w.attemptDirs(t); len(dirs) > 0 {
		t.Errorf("left on disk: %v", dirs)
	}
	select {
	case <-s.over:
	case <-time.After(patience):
		t.Error("the session goes on")
	}
}

// A scheduler that takes connections and never answers does not keep a worker
// from stopping.
func TestShutdownDuringHandshake(t *testing.T) {
	dialled := make(chan struct{}, 1)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		dialled <- struct{}{}
		<-r.Context().Done()
	}))
	srv.Config.Protocols = new(http.Protocols)
	srv.Config.Protocols.SetHTTP1(true)
	srv.Config.Protocols.SetUnencryptedHTTP2(true)
	srv.Start()
	defer srv.Close()
	config := testConfig(t, &fakeScheduler{url: srv.URL}, &container.Fake{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- New(config).Run(ctx) }()
	<-dialled
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("the worker hangs")
	}
}

// However much a program prints, heartbeats and the log stay small.
func TestLogsAreBounded(t *testing.T) {
	f := newFakeScheduler(t)
	release := make(chan struct{})
	defer close(release)
	w := newTestWorker(t, f, func(ctx context.Context, spec container.Spec) (container.Result, error) {
		line := append(bytes.Repeat([]byte("x"), 1023), '\n')
		for range 20 << 10 { // 20 MiB
			if _, err := spec.Logs.Write(line); err != nil {
				return container.Result{}, err
			}
		}
		return blocking(release)(ctx, spec)
	})
	s := f.session()
	s.assign(f.assignment("att-1", "program", "{items}"))
	tail := awaited(s, "log", func(m *musterpb.WorkerMessage) *musterpb.LogTail {
		if logs := m.GetHeartbeat().GetLogs(); len(logs) > 0 {
			return logs[0]
		}
		return nil
	})
	if tail.Attempt != "att-1" || len(tail.Data) > maxTail {
		t.Errorf("a tail of %d bytes", len(tail.Data))
	}
	info, err := os.Stat(filepath.Join(w.attemptsDir(), "att-1", "log"))
	if err != nil || info.Size() > container.MaxLogBytes+1000 {
		t.Errorf("the log has %d bytes, %v", info.Size(), err)
	}
}

func TestHeartbeatIsBounded(t *testing.T) {
	f := newFakeScheduler(t)
	w := New(testConfig(t, f, &container.Fake{}))
	cache, err := blob.OpenCache(filepath.Join(w.Dir, "cache"), 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	w.cache = cache
	for i := range 300 {
		r := &run{log: newTail()}
		_, _ = r.log.Write(make([]byte, 100_000)) // a tail takes everything
		w.runs[fmt.Sprintf("att-%d", i)] = r
	}
	seen := 0
	for range 300 {
		m := w.heartbeat(true)
		if n := m.SizeVT(); n > 2<<20 {
			t.Fatalf("a heartbeat of %d bytes", n)
		}
		if len(m.GetHeartbeat().Running) != 300 {
			t.Fatal("a heartbeat leaves attempts out")
		}
		seen += len(m.GetHeartbeat().Logs)
		if seen == 300 {
			return
		}
	}
	t.Errorf("%d of 300 logs were ever sent", seen)
}

func ordered(o *musterpb.Orders) *musterpb.SchedulerMessage {
	return &musterpb.SchedulerMessage{Message: &musterpb.SchedulerMessage_Orders{Orders: o}}
}

// split makes messages of one report each.
func split(m *musterpb.WorkerMessage) []*musterpb.WorkerMessage {
	r := m.GetReports()
	if r == nil {
		return []*musterpb.WorkerMessage{m}
	}
	var list []*musterpb.WorkerMessage
	for _, id := range r.Started {
		list = append(list, reported(&musterpb.Reports{Started: []string{id}}))
	}
	for _, c := range r.Commits {
		list = append(list, reported(&musterpb.Reports{Commits: []*musterpb.Commit{c}, Blobs: r.Blobs}))
	}
	for _, f := range r.Failed {
		list = append(list, reported(&musterpb.Reports{Failed: []*musterpb.AttemptFailed{f}}))
	}
	return list
}

// startIn, commitIn and failureIn are what a message of one report holds, or nil.
func startIn(m *musterpb.WorkerMessage) *string {
	if list := m.GetReports().GetStarted(); len(list) > 0 {
		return &list[0]
	}
	return nil
}

func commitIn(m *musterpb.WorkerMessage) *musterpb.Commit {
	if list := m.GetReports().GetCommits(); len(list) > 0 {
		return list[0]
	}
	return nil
}

func failureIn(m *musterpb.WorkerMessage) *musterpb.AttemptFailed {
	if list := m.GetReports().GetFailed(); len(list) > 0 {
		return list[0]
	}
	return nil
}

func reported(r *musterpb.Reports) *musterpb.WorkerMessage {
	return &musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Reports{Reports: r}}
}
