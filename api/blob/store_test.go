package blob

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"

	"go.uber.org/goleak"
	"gocloud.dev/blob/memblob"

	"github.com/musternet/muster/api"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if code == 0 && !queuedBytes.TryAcquire(maxQueuedBytes) {
			fmt.Println("the memory of some queue was not given back")
			code = 1
		}
		os.Exit(code)
	}))
}

func allow(*http.Request) (Caller, error) { return Caller{ID: "customer"}, nil }

func allowPeer(*http.Request) (Caller, error) { return Caller{ID: "node", Peer: true}, nil }

func newDir(t *testing.T) *Dir {
	t.Helper()
	d, err := NewDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func newBucket(t *testing.T) *Bucket {
	bucket := memblob.OpenBucket(nil)
	t.Cleanup(func() { bucket.Close() })
	b := NewBucket(bucket)
	b.delay = 0
	return b
}

// serve is the HTTP store in front of handlers.
func serve(t *testing.T, config HTTPConfig, handlers ...http.Handler) *HTTP {
	t.Helper()
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	var addresses []string
	for _, h := range handlers {
		server := httptest.NewServer(h)
		t.Cleanup(server.Close)
		addresses = append(addresses, server.URL+"/")
	}
	config.Client = &http.Client{Transport: transport}
	config.Addresses = func() []string { return addresses }
	h := NewHTTP(config)
	h.delay = 0
	return h
}

func replicated(t *testing.T, local Store, need int, peers ...Store) *Replicated {
	r := NewReplicated(local, func() []Store { return peers }, func() int { return need })
	t.Cleanup(func() { r.Close() })
	return r
}

// Every store keeps the same contract.
func TestContract(t *testing.T) {
	for name, make := range map[string]func(t *testing.T) Store{
		"dir":    func(t *testing.T) Store { return newDir(t) },
		"memory": func(t *testing.T) Store { return &Memory{} },
		"bucket": func(t *testing.T) Store { return newBucket(t) },
		"http":   func(t *testing.T) Store { return serve(t, HTTPConfig{}, Handler(newDir(t), allow, 1<<20)) },
		"replicated": func(t *testing.T) Store {
			return replicated(t, newDir(t), 2, &Memory{}, serve(t, HTTPConfig{Replica: true}, Handler(&Memory{}, allow, 1<<20)))
		},
	} {
		t.Run(name, func(t *testing.T) { testContract(t, make(t)) })
	}
}

func testContract(t *testing.T, store Store) {
	ctx := t.Context()
	for _, content := range []string{"", "hello", strings.Repeat("0123456789", 100)} {
		digest := api.DigestOf([]byte(content))
		if _, err := store.Stat(ctx, digest); api.KindOf(err) != api.NotFound {
			t.Fatalf("stat before: %v", err)
		}
		if _, err := store.Open(ctx, digest); api.KindOf(err) != api.NotFound {
			t.Fatalf("open before: %v", err)
		}
		// Wrong, too long and broken transfers leave nothing behind.
		if _, err := store.Put(ctx, digest, strings.NewReader(content+"x"), 1<<20); api.KindOf(err) != api.Invalid {
			t.Fatalf("wrong bytes: %v", err)
		}
		if _, err := store.Put(ctx, digest, strings.NewReader(content), int64(len(content))-1); api.KindOf(err) != api.TooLarge {
			t.Fatalf("over the limit: %v", err)
		}
		broken := errors.New("broken")
		if _, err := store.Put(ctx, digest, iotest.ErrReader(broken), 1<<20); !errors.Is(err, broken) {
			t.Fatalf("broken: %v", err)
		}
		if _, err := store.Stat(ctx, digest); api.KindOf(err) != api.NotFound {
			t.Fatalf("stat after failed puts: %v", err)
		}
		for range 2 {
			size, err := store.Put(ctx, digest, iotest.HalfReader(strings.NewReader(content)), int64(len(content)))
			if err != nil || size != int64(len(content)) {
				t.Fatalf("put: %d, %v", size, err)
			}
		}
		if size, err := store.Stat(ctx, digest); err != nil || size != int64(len(content)) {
			t.Fatalf("stat: %d, %v", size, err)
		}
		testReader(t, store, digest, content)
	}
	if _, err := store.Put(ctx, "sha256:x", strings.NewReader(""), 1); api.KindOf(err) != api.Invalid {
		t.Errorf("malformed digest: %v", err)
	}
	if _, err := store.Open(ctx, "../../etc/passwd"); api.KindOf(err) != api.Invalid {
		t.Errorf("malformed digest: %v", err)
	}
	digest := api.DigestOf([]byte("hello"))
	if _, remote := store.(*HTTP); remote {
		if err := store.Delete(ctx, digest); api.KindOf(err) != api.Unsupported {
			t.Errorf("delete from afar: %v", err)
		}
		return
	}
	for range 2 {
		if err := store.Delete(ctx, digest); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
	if _, replicas := store.(*Replicated); replicas {
		return // the peers still have it
	}
	if _, err := store.Stat(ctx, digest); api.KindOf(err) != api.NotFound {
		t.Errorf("stat after delete: %v", err)
	}
}

func testReader(t *testing.T, store Store, digest api.Digest, content string) {
	t.Helper()
	r, err := store.Open(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if r.Size() != int64(len(content)) {
		t.Errorf("size %d", r.Size())
	}
	if err := iotest.TestReader(r, []byte(content)); err != nil {
		t.Errorf("%d bytes: %v", len(content), err)
	}
	dst := filepath.Join(t.TempDir(), "x")
	if n, err := Fetch(t.Context(), store, digest, dst, int64(len(content))); err != nil || n != int64(len(content)) {
		t.Fatalf("fetch: %d, %v", n, err)
	}
	if b, err := os.ReadFile(dst); err != nil || string(b) != content {
		t.Errorf("fetched %d bytes, %v", len(b), err)
	}
	if content != "" {
		if _, err := Fetch(t.Context(), store, digest, dst+"2", int64(len(content))-1); api.KindOf(err) != api.TooLarge {
			t.Errorf("fetch over the limit: %v", err)
		}
		if _, err := os.Stat(dst + "2"); err == nil {
			t.Error("a fetch that failed left a file")
		}
	}
}

func TestDirSurvivesRestart(t *testing.T) {
	path := t.TempDir()
	d, err := NewDir(path)
	if err != nil {
		t.Fatal(err)
	}
	digest := api.DigestOf([]byte("a"))
	if _, err := d.Put(t.Context(), digest, strings.NewReader("a"), 1); err != nil {
		t.Fatal(err)
	}
	// A process that crashed a moment ago left a blob half there.
	half := filepath.Join(path, "tmp", "put-1")
	if err := os.WriteFile(half, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err = NewDir(path)
	if err != nil {
		t.Fatal(err)
	}
	if size, err := d.Stat(t.Context(), digest); err != nil || size != 1 {
		t.Errorf("%d, %v", size, err)
	}
	if _, err := os.Stat(half); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the unfinished blob is still there: %v", err)
	}
}

func TestDirNoticesRot(t *testing.T) {
	d := newDir(t)
	digest := api.DigestOf([]byte("good"))
	if _, err := d.Put(t.Context(), digest, strings.NewReader("good"), 4); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.file(digest), []byte("baad"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Fetch(t.Context(), d, digest, filepath.Join(t.TempDir(), "x"), 4); api.KindOf(err) != api.Invalid {
		t.Errorf("%v", err)
	}
	// Over HTTP too, while it is read.
	remote := serve(t, HTTPConfig{}, Handler(d, allow, 100))
	r, err := remote.Open(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadAll(r); err == nil || !strings.Contains(err.Error(), "other bytes") {
		t.Errorf("%v", err)
	}
}

func TestFullDisk(t *testing.T) {
	err := diskError("/data", &os.PathError{Op: "write", Path: "/data/x", Err: syscall.ENOSPC})
	if api.KindOf(err) != api.Unavailable || !strings.HasPrefix(err.Error(), "the disk of /data is full; free some space") {
		t.Errorf("%v", err)
	}
}

func TestMemoryFails(t *testing.T) {
	lost := errors.New("lost")
	m := &Memory{Lose: func(op string, _ api.Digest) error {
		if op == "put" {
			return lost
		}
		return nil
	}}
	digest := api.DigestOf([]byte("a"))
	if _, err := m.Put(t.Context(), digest, strings.NewReader("a"), 1); !errors.Is(err, lost) {
		t.Errorf("%v", err)
	}
	if _, err := m.Stat(t.Context(), digest); err != nil {
		t.Errorf("lost answer: %v", err)
	}
	m.Fail = func(string, api.Digest) error { return lost }
	if _, err := m.Stat(t.Context(), digest); !errors.Is(err, lost) {
		t.Errorf("%v", err)
	}
}

func TestOpenURL(t *testing.T) {
	for url, want := range map[string]string{
		"file://" + t.TempDir(): "",
		"mem://":                "",
		"s3://bucket?region=eu-west-1&use_path_style=true": "",
		"file://relative/x": `blob store "file://relative/x": want file:/// and an absolute path`,
		"ftp://x":           `blob store "ftp://x": want file:///…, s3://… or mem://`,
		"s3://bucket?region=eu-west-1&no_such_parameter=1": `unknown query parameter`,
	} {
		_, closeStore, err := OpenURL(t.Context(), url)
		if err == nil {
			if err := closeStore(); err != nil {
				t.Error(err)
			}
		}
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v; want %q", url, err, want)
		}
	}
}

func TestHandlerStatuses(t *testing.T) {
	d := newDir(t)
	digest := api.DigestOf([]byte("hello"))
	deny := false
	h := Handler(d, func(*http.Request) (Caller, error) {
		if deny {
			return Caller{}, api.Errorf(api.Unauthenticated, "who are you?")
		}
		return Caller{ID: "you"}, nil
	}, 5)
	do := func(method, path, body string, header ...string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(method, path, strings.NewReader(body))
		for i := 0; i < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w
	}
	for _, test := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"GET", Path(digest), "", 404, `{"error":"blob ` + string(digest) + ` is not stored here","kind":"not found"}`},
		{"GET", "/blob/x", "", 400, `{"error":"digest \"x\": want sha256: and 64 lower-case hex digits","kind":"invalid"}`},
		{"GET", "/other", "", 404, `{"error":"no page /other; blobs are at /blob/sha256:…","kind":"not found"}`},
		{"PUT", Path(digest), "hello!", 413, `{"error":"blob ` + string(digest) + `: 6 bytes, more than the limit of 5","kind":"too large"}`},
		{"PUT", Path(digest), "hallo", 400, ""},
		{"PUT", Path(digest), "hello", 200, `{"digest":"` + string(digest) + `","size":5}`},
		{"GET", Path(digest), "", 200, "hello"},
		{"HEAD", Path(digest), "", 200, ""},
		{"DELETE", Path(digest), "", 405, `{"error":"method DELETE: want GET, HEAD, POST or PUT","kind":"invalid"}`},
	} {
		w := do(test.method, test.path, test.body)
		got := strings.TrimSpace(w.Body.String())
		if w.Code != test.status || test.want != "" && got != test.want {
			t.Errorf("%s %s: %d %s", test.method, test.path, w.Code, got)
		}
	}
	if w := do("GET", Path(digest), "", "Range", "bytes=1-3"); w.Code != 206 || w.Body.String() != "ell" {
		t.Errorf("range: %d %s", w.Code, w.Body)
	}
	if w := do("HEAD", Path(digest), ""); w.Header().Get("Content-Length") != "5" || w.Header().Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("head: %v", w.Header())
	}
	// A body of unknown length is cut off at the limit.
	r := httptest.NewRequest("PUT", Path(api.DigestOf([]byte("123456"))), io.MultiReader(strings.NewReader("123456")))
	r.ContentLength = -1
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != 413 || !strings.Contains(w.Body.String(), "limit of 5 bytes") {
		t.Errorf("stream over the limit: %d %s", w.Code, w.Body)
	}
	deny = true
	if w := do("GET", Path(digest), ""); w.Code != 401 {
		t.Errorf("unauthenticated: %d", w.Code)
	}
}

// cutting answers GET requests with at most n bytes of what was asked for.
func cutting(h http.Handler, n int, gets *atomic.Int32) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			gets.Add(1)
			w = &cut{w, n}
		}
		h.ServeHTTP(w, r)
	})
}

type cut struct {
	http.ResponseWriter
	left int
}

func (c *cut) Write(p []byte) (int, error) {
	if len(p) > c.left {
		c.ResponseWriter.Write(p[:c.left])
		c.left = 0
		panic(http.ErrAbortHandler)
	}
	c.left -= len(p)
	return c.ResponseWriter.Write(p)
}

func TestHTTPResumes(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 10_000)
	digest := api.DigestOf(content)
	m := &Memory{}
	if _, err := m.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); err != nil {
		t.Fatal(err)
	}
	var gets atomic.Int32
	store := serve(t, HTTPConfig{}, cutting(Handler(m, allow, NoLimit), 30_000, &gets))
	dst := filepath.Join(t.TempDir(), "x")
	if _, err := Fetch(t.Context(), store, digest, dst, NoLimit); err != nil {
		t.Fatal(err)
	}
	if n := gets.Load(); n < 5 || n > 7 {
		t.Errorf("%d requests for 160000 bytes, 30000 at a time", n)
	}
	r, err := store.Open(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	part := make([]byte, 100_000)
	if _, err := r.ReadAt(part, 7); err != nil || !bytes.Equal(part, content[7:100_007]) {
		t.Errorf("ReadAt: %v", err)
	}
}

func TestHTTPGivesUp(t *testing.T) {
	content := []byte("hello")
	m := &Memory{}
	if _, err := m.Put(t.Context(), api.DigestOf(content), bytes.NewReader(content), NoLimit); err != nil {
		t.Fatal(err)
	}
	var gets atomic.Int32
	store := serve(t, HTTPConfig{}, cutting(Handler(m, allow, NoLimit), 0, &gets))
	_, err := Fetch(t.Context(), store, api.DigestOf(content), filepath.Join(t.TempDir(), "x"), NoLimit)
	// The transport may repeat a request on a connection that it had kept.
	if n := gets.Load(); api.KindOf(err) != api.Unavailable || n < maxStalls || n > 2*maxStalls {
		t.Errorf("%v after %d requests", err, gets.Load())
	}
}

func TestHTTPFailover(t *testing.T) {
	content := bytes.Repeat([]byte("x"), 200_000)
	digest := api.DigestOf(content)
	m := &Memory{}
	down := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.CopyN(io.Discard, r.Body, 100_000)
		writeError(w, api.Errorf(api.Unavailable, "no leader"))
	})
	var asked atomic.Int32
	count := func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			h.ServeHTTP(w, r)
		})
	}
	store := serve(t, HTTPConfig{Authorization: func(context.Context) (string, error) { return "Bearer k", nil }},
		count(down), Handler(m, func(r *http.Request) (Caller, error) {
			if r.Header.Get("Authorization") != "Bearer k" {
				return Caller{}, api.Errorf(api.Denied, "wrong key")
			}
			return Caller{ID: "k"}, nil
		}, NoLimit))
	if size, err := store.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); err != nil || size != 200_000 {
		t.Fatalf("%d, %v", size, err)
	}
	before := asked.Load()
	if _, err := store.Stat(t.Context(), digest); err != nil || asked.Load() != before {
		t.Errorf("the address that is down was asked again: %v", err)
	}
	// Where every address fails, the error names them all.
	all := serve(t, HTTPConfig{}, down, down)
	if _, err := all.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); api.KindOf(err) != api.Unavailable || strings.Count(err.Error(), "no leader") != 2 {
		t.Errorf("%v", err)
	}
	none := NewHTTP(HTTPConfig{Addresses: func() []string { return nil }})
	if _, err := none.Stat(t.Context(), digest); api.KindOf(err) != api.Unavailable {
		t.Errorf("%v", err)
	}
}

func TestHTTPSkipsWhatIsThere(t *testing.T) {
	m := &Memory{}
	content := bytes.Repeat([]byte("a"), maxUnasked+1)
	digest := api.DigestOf(content)
	if _, err := m.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); err != nil {
		t.Fatal(err)
	}
	store := serve(t, HTTPConfig{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			t.Error("the blob was sent again")
		}
		Handler(m, allow, 1).ServeHTTP(w, r)
	}))
	if _, err := store.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); err != nil {
		t.Error(err)
	}
}

func unavailable(string, api.Digest) error { return api.Errorf(api.Unavailable, "down") }

func TestReplicated(t *testing.T) {
	ctx := t.Context()
	digest := api.DigestOf([]byte("a"))
	a, b, c := &Memory{}, &Memory{}, &Memory{}
	c.Fail = unavailable
	r := replicated(t, a, 2, b, c)
	if _, err := r.Put(ctx, digest, strings.NewReader("a"), 1); err != nil {
		t.Fatal(err)
	}
	if b.Len() != 1 {
		t.Error("no second copy")
	}
	// The second scheduler lost its disk: it heals on the next read.
	lost := &Memory{}
	other := replicated(t, lost, 2, a, c)
	testReader(t, other, digest, "a")
	if lost.Len() != 1 {
		t.Error("the local copy was not healed")
	}
	// No local space: the peer's copy is read.
	full := &Memory{Fail: func(op string, _ api.Digest) error {
		if op == "put" {
			return api.Errorf(api.Unavailable, "full")
		}
		return nil
	}}
	testReader(t, replicated(t, full, 2, a, c), digest, "a")
}

func TestReplicatedNeedsCopies(t *testing.T) {
	ctx := t.Context()
	digest := api.DigestOf([]byte("a"))
	a, b, c := &Memory{}, &Memory{Fail: unavailable}, &Memory{Fail: unavailable}
	r := replicated(t, a, 2, b, c)
	_, err := r.Put(ctx, digest, strings.NewReader("a"), 1)
	if api.KindOf(err) != api.Unavailable || !strings.Contains(err.Error(), "stored on 1 of the 2 schedulers that are needed") {
		t.Fatalf("%v", err)
	}
	// One copy is not "stored": a client that asks must send it again …
	if _, err := r.Stat(ctx, digest); api.KindOf(err) != api.Unavailable {
		t.Errorf("%v", err)
	}
	// … and asking makes the copies once that is possible.
	b.Fail = nil
	if size, err := r.Stat(ctx, digest); err != nil || size != 1 || b.Len() != 1 {
		t.Errorf("%d, %v", size, err)
	}
	// A peer that is down may hold what the others lack.
	if _, err := r.Open(ctx, api.DigestOf([]byte("b"))); api.KindOf(err) != api.Unavailable {
		t.Errorf("%v", err)
	}
	c.Fail = nil
	if _, err := r.Open(ctx, api.DigestOf([]byte("b"))); api.KindOf(err) != api.NotFound {
		t.Errorf("%v", err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Put(ctx, api.DigestOf([]byte("b")), strings.NewReader("b"), 1); api.KindOf(err) != api.Unavailable {
		t.Errorf("after Close: %v", err)
	}
}

// Three schedulers, each behind HTTP with the others as peers: requests between
// them do not go round in circles.
func TestReplicatedOverHTTP(t *testing.T) {
	const n = 3
	var handlers [n]http.Handler
	var clients [n]*HTTP
	var locals [n]*Memory
	for i := range n {
		clients[i] = serve(t, HTTPConfig{Replica: true}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handlers[i].ServeHTTP(w, r) }))
	}
	for i := range n {
		locals[i] = &Memory{}
		handlers[i] = Handler(replicated(t, locals[i], n, clients[(i+1)%n], clients[(i+2)%n]), allow, 1<<20)
	}
	digest := api.DigestOf([]byte("a"))
	customer := serve(t, HTTPConfig{}, handlers[:]...)
	if _, err := customer.Stat(t.Context(), digest); api.KindOf(err) != api.NotFound {
		t.Fatal(err)
	}
	if _, err := customer.Put(t.Context(), digest, strings.NewReader("a"), 1); err != nil {
		t.Fatal(err)
	}
	for i, m := range locals {
		if m.Len() != 1 {
			t.Errorf("scheduler %d has no copy", i)
		}
	}
	locals[0].Delete(t.Context(), digest)
	testReader(t, customer, digest, "a")
	if locals[0].Len() != 1 {
		t.Error("scheduler 0 was not healed")
	}
}

// Many callers at once, for the race detector and for goleak.
func TestConcurrentPuts(t *testing.T) {
	d := newDir(t)
	r := replicated(t, d, 2, newDir(t), newDir(t))
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			content := string(rune('a' + i%5))
			digest := api.DigestOf([]byte(content))
			if _, err := r.Put(t.Context(), digest, strings.NewReader(content), 1); err != nil {
				t.Error(err)
			}
			if _, err := r.Stat(t.Context(), digest); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if tmp, err := os.ReadDir(filepath.Join(d.path, "tmp")); err != nil || len(tmp) != 0 {
		t.Errorf("left over: %v %v", tmp, err)
	}
}

func TestPutFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := &Memory{}
	digest, size, err := PutFile(t.Context(), m, path)
	if err != nil || size != 5 || digest != api.DigestOf([]byte("hello")) || m.Len() != 1 {
		t.Errorf("%s %d %v", digest, size, err)
	}
	if _, _, err := PutFile(t.Context(), m, path+"x"); api.KindOf(err) != api.NotFound {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := PutFile(ctx, m, path); api.KindOf(err) != api.Unavailable {
		t.Errorf("%v", err)
	}
}
