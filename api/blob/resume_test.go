package blob

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/musternet/muster/api"
)

// cutter is a listener whose connections break after a number of bytes in either
// direction; zero is never.
type cutter struct {
	net.Listener
	after func() int
}

func (c *cutter) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if n := c.after(); n > 0 {
		left := new(atomic.Int64)
		left.Store(int64(n))
		conn = &cutConn{conn, left}
	}
	return conn, nil
}

type cutConn struct {
	net.Conn
	left *atomic.Int64
}

func (c *cutConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	return c.count(n, err)
}

func (c *cutConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p[:min(int64(len(p)), max(1, c.left.Load()))])
	if err == nil && n < len(p) {
		c.Close()
		return n, io.ErrClosedPipe
	}
	return c.count(n, err)
}

func (c *cutConn) count(n int, err error) (int, error) {
	if c.left.Add(int64(-n)) < 0 {
		c.Close()
	}
	return n, err
}

func random(n int, seed byte) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// cutOff is the HTTP store behind a line that breaks all the time.
func cutOff(t testing.TB, h http.Handler, after func() int) (store *HTTP, closeAll func()) {
	server := httptest.NewUnstartedServer(h)
	server.Listener = &cutter{server.Listener, after}
	server.Start()
	transport := &http.Transport{}
	store = NewHTTP(HTTPConfig{Client: &http.Client{Transport: transport}, Addresses: func() []string { return []string{server.URL} }})
	// Five tries must not pass before the server has found out that the connection
	// of the one before is gone: 75 ms in all.
	store.delay = 5 * time.Millisecond
	return store, func() {
		transport.CloseIdleConnections()
		server.CloseClientConnections()
		server.Close()
	}
}

// A blob arrives whole however often the line breaks and wherever it does, in
// both directions, and no byte that arrived is sent again in vain.
func TestTransfersSurviveCutsProperty(t *testing.T) {
	const size = minParts + 12345
	content := random(size, 1)
	digest := api.DigestOf(content)
	path := filepath.Join(t.TempDir(), "source")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(rt *rapid.T) {
		// The last entry repeats. Every connection brings some bytes at least, or
		// giving up would be right.
		cuts := rapid.SliceOfN(rapid.IntRange(2<<10, size), 1, 8).Draw(rt, "cuts")
		cuts = append(cuts, rapid.IntRange(size/2, 2*size).Draw(rt, "last"))
		var connections atomic.Int32
		after := func() int { return cuts[min(int(connections.Add(1)), len(cuts))-1] }
		m := &Memory{}
		store, closeAll := cutOff(t, Handler(m, allow, 1<<30), after)
		defer closeAll()
		got, n, err := PutFile(t.Context(), store, path)
		if err != nil || got != digest || n != size {
			rt.Fatalf("put: %s %d %v", got, n, err)
		}
		dst := filepath.Join(t.TempDir(), "x")
		for try := 0; ; try++ {
			n, err = Fetch(t.Context(), store, digest, dst, size)
			if err == nil {
				break
			}
			if api.KindOf(err) != api.Unavailable || try == 10 {
				rt.Fatalf("fetch: %v", err)
			}
		}
		if b, err := os.ReadFile(dst); err != nil || n != size || !bytes.Equal(b, content) {
			rt.Fatalf("fetched %d bytes, %v", n, err)
		}
		if _, err := os.Stat(PartOf(dst)); err == nil {
			rt.Fatal("the part is still there")
		}
	})
}

// Fetch goes on from what an earlier one left, and starts anew when that proves
// wrong.
func TestFetchGoesOn(t *testing.T) {
	content := random(3<<20, 2)
	digest := api.DigestOf(content)
	m := &Memory{}
	if _, err := m.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); err != nil {
		t.Fatal(err)
	}
	var ranges []string
	broken := true
	h := Handler(m, allow, NoLimit)
	store := serve(t, HTTPConfig{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			ranges = append(ranges, r.Header.Get("Range"))
			if broken && len(ranges) > 1 {
				writeError(w, api.Errorf(api.Unavailable, "down"))
				return
			} else if broken {
				w = &cut{w, 2 << 20}
			}
		}
		h.ServeHTTP(w, r)
	}))
	dst := filepath.Join(t.TempDir(), "x")
	if _, err := Fetch(t.Context(), store, digest, dst, NoLimit); api.KindOf(err) != api.Unavailable {
		t.Fatal(err)
	}
	info, err := os.Stat(PartOf(dst))
	if err != nil || info.Size() < minPart {
		t.Fatalf("%v %v", info, err)
	}
	broken, ranges = false, nil
	if n, err := Fetch(t.Context(), store, digest, dst, NoLimit); err != nil || n != int64(len(content)) {
		t.Fatal(n, err)
	}
	if want := fmt.Sprintf("bytes=%d-", info.Size()); len(ranges) != 1 || ranges[0] != want {
		t.Errorf("asked for %q; want %s", ranges, want)
	}
	// Something else lies where the part would be.
	for _, wrong := range [][]byte{random(2<<20, 3), random(4<<20, 3), content[:len(content)-1], content} {
		if err := os.WriteFile(PartOf(dst), wrong, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Fetch(t.Context(), store, digest, dst, NoLimit); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(dst); err != nil || !bytes.Equal(b, content) {
			t.Fatal(err)
		}
	}
	// Little is not kept, and neither is what is wrong.
	if err := m.Delete(t.Context(), digest); err != nil {
		t.Fatal(err)
	}
	m.blobs[digest] = random(2<<20, 4)
	if _, err := Fetch(t.Context(), store, digest, dst+"2", NoLimit); api.KindOf(err) != api.Invalid {
		t.Error(err)
	}
	if _, err := os.Stat(PartOf(dst + "2")); err == nil {
		t.Error("wrong bytes were kept")
	}
}

// holds checks that a store returns content under its digest.
func holds(t *testing.T, store Store, content []byte) {
	t.Helper()
	r, err := store.Open(t.Context(), api.DigestOf(content))
	if err != nil {
		t.Error(err)
		return
	}
	defer r.Close()
	if b, err := io.ReadAll(r); err != nil || !bytes.Equal(b, content) {
		t.Errorf("%d bytes in place of %d: %v", len(b), len(content), err)
	}
}

// A file that the store has already is not sent to its end.
func TestPutFileStopsWhenTheBlobIsThere(t *testing.T) {
	content := random(minParts, 5)
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	m := &Memory{}
	if _, err := m.Put(t.Context(), api.DigestOf(content), bytes.NewReader(content), NoLimit); err != nil {
		t.Fatal(err)
	}
	h := Handler(m, allow, NoLimit)
	slow := make(chan struct{})
	store := serve(t, HTTPConfig{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPatch {
			<-slow
			return
		}
		h.ServeHTTP(w, r)
	}))
	defer close(slow)
	store.idle = time.Hour
	if digest, n, err := PutFile(t.Context(), store, path); err != nil || digest != api.DigestOf(content) || n != int64(len(content)) {
		t.Errorf("%s %d %v", digest, n, err)
	}
}

// A commit that is lost on the way does not cost the blob that was sent; it goes
// again on another connection than one whose request the server gave up.
func TestCommitIsLost(t *testing.T) {
	content := random(minParts, 27)
	m := &Memory{}
	h := Handler(m, allow, NoLimit)
	var commits []string // the connections
	var begun atomic.Int32
	store := serve(t, HTTPConfig{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			begun.Add(1)
		}
		if r.Header.Get(uploadHeader) != "" {
			if commits = append(commits, r.RemoteAddr); len(commits) == 1 {
				ended, cancel := context.WithCancel(r.Context())
				cancel()
				r = r.WithContext(ended)
				h.(*handler).authorize = func(*http.Request) (Caller, error) {
					return Caller{}, api.Errorf(api.Unavailable, "lost")
				}
				defer func() { h.(*handler).authorize = allow }()
			}
		}
		h.ServeHTTP(w, r)
	}))
	if _, err := store.Put(t.Context(), api.DigestOf(content), bytes.NewReader(content), NoLimit); err != nil {
		t.Fatal(err)
	}
	if len(commits) != 2 || commits[0] == commits[1] || begun.Load() != 1 {
		t.Errorf("commits over %v, %d uploads", commits, begun.Load())
	}
	holds(t, m, content)
}

// A store that takes no parts gets the whole file.
func TestPutFileWithoutParts(t *testing.T) {
	content := random(minParts+1, 6)
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	store := serve(t, HTTPConfig{}, Handler(newBucket(t), allow, NoLimit))
	digest, n, err := PutFile(t.Context(), store, path)
	if err != nil || digest != api.DigestOf(content) || n != int64(len(content)) {
		t.Fatalf("%s %d %v", digest, n, err)
	}
	holds(t, store, content)
}

func TestPutFileErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, random(minParts, 7), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, test := range []struct {
		name  string
		ctx   context.Context
		limit int64
		kind  api.Kind
		want  string
	}{
		{"too large", t.Context(), minParts - 1, api.TooLarge, "8388608 bytes, more than the limit of 8388607"},
		{"cancelled", ctx, NoLimit, api.Unavailable, "context canceled"},
	} {
		store := serve(t, HTTPConfig{}, Handler(newDir(t), allow, test.limit))
		_, _, err := PutFile(test.ctx, store, path)
		if api.KindOf(err) != test.kind || !strings.Contains(fmt.Sprint(err), test.want) || !strings.HasPrefix(err.Error(), path) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

// lanes is a customer's store in front of three schedulers, each with its own
// Dir.
func lanes(t *testing.T, wrap func(i int, h http.Handler) http.Handler) (customer *HTTP, dirs [3]*Dir, stores [3]*Replicated) {
	var handlers, local [3]http.Handler
	var clients [3]*HTTP
	for i := range dirs {
		dirs[i] = newDir(t)
		local[i] = wrap(i, Handler(dirs[i], allowPeer, NoLimit))
		clients[i] = serve(t, HTTPConfig{Replica: true}, local[i])
	}
	for i := range dirs {
		stores[i] = replicated(t, dirs[i], 2, clients[(i+1)%3], clients[(i+2)%3])
		handlers[i] = Handler(stores[i], allow, 1<<30)
	}
	return serve(t, HTTPConfig{}, handlers[0]), dirs, stores
}

// A large blob reaches the replicas while it comes in: none of them asks for it
// afterwards.
func TestReplicasGetTheStream(t *testing.T) {
	var wholes atomic.Int32
	customer, dirs, stores := lanes(t, func(_ int, h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPut && r.Header.Get(uploadHeader) == "" {
				wholes.Add(1)
			}
			h.ServeHTTP(w, r)
		})
	})
	for i, size := range []int{minTee, minTee + 1, 3*pieceBytes + minTee + 7, minParts + 99} {
		content := random(size, byte(i))
		digest := api.DigestOf(content)
		if n, err := customer.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); err != nil || n != int64(size) {
			t.Fatal(n, err)
		}
		stores[0].copies.Wait() // the third copy is made after the answer
		for i, dir := range dirs {
			if n, err := dir.Stat(t.Context(), digest); err != nil || n != int64(size) {
				t.Errorf("scheduler %d: %d, %v", i, n, err)
			}
		}
		holds(t, customer, content)
	}
	if n := wholes.Load(); n > 0 {
		t.Errorf("%d blobs were copied as a whole", n)
	}
	noLeftovers(t, dirs[:]...)
}

func noLeftovers(t *testing.T, dirs ...*Dir) {
	t.Helper()
	for i, dir := range dirs {
		if tmp, err := os.ReadDir(filepath.Join(dir.path, "tmp")); err != nil || len(tmp) != 0 {
			t.Errorf("scheduler %d: left over: %v %v", i, tmp, err)
		}
	}
}

// One replica that is stuck, or fails in the middle of a stream, delays nobody
// and gets its copy afterwards if it can.
func TestReplicaThatIsStuck(t *testing.T) {
	release := make(chan struct{})
	var first sync.Once
	customer, dirs, stores := lanes(t, func(i int, h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if i == 1 && r.Method == http.MethodPatch {
				<-release
				first.Do(func() { panic(http.ErrAbortHandler) })
			}
			h.ServeHTTP(w, r)
		})
	})
	content := random(3*maxQueued*pieceBytes, 8)
	digest := api.DigestOf(content)
	if _, err := customer.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); err != nil {
		t.Fatal(err)
	}
	if _, err := dirs[2].Stat(t.Context(), digest); err != nil {
		t.Error(err)
	}
	close(release)
	stores[0].copies.Wait()
	if _, err := dirs[1].Stat(t.Context(), digest); err != nil {
		t.Errorf("the slow replica has no copy: %v", err)
	}
}

// Uploads for whose queues there is no memory, or not enough, are copied once
// they are here, and give back what they had.
func TestQueuesAreBounded(t *testing.T) {
	for _, left := range []int64{0, pieceBytes, minTee - 1, minTee} {
		t.Run(fmt.Sprint(left), func(t *testing.T) { testQueuesAreBounded(t, left) })
	}
}

func testQueuesAreBounded(t *testing.T, left int64) {
	if !queuedBytes.TryAcquire(maxQueuedBytes - left) {
		t.Fatal("somebody has the memory")
	}
	defer queuedBytes.Release(maxQueuedBytes - left)
	release := make(chan struct{})
	defer close(release)
	var streams atomic.Int32
	customer, dirs, stores := lanes(t, func(i int, h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPatch {
				streams.Add(1)
				<-release // so that pieces pile up
			}
			h.ServeHTTP(w, r)
		})
	})
	content := random(4<<20, 26)
	digest := api.DigestOf(content)
	if _, err := customer.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); err != nil {
		t.Error(err)
	}
	stores[0].copies.Wait()
	for i, dir := range dirs {
		if n, err := dir.Stat(t.Context(), digest); err != nil || n != int64(len(content)) {
			t.Errorf("scheduler %d: %d, %v", i, n, err)
		}
	}
	if n := streams.Load(); left < minTee && n > 0 {
		t.Errorf("%d streams without memory", n)
	}
	if !queuedBytes.TryAcquire(left) {
		t.Error("not all was given back")
	} else {
		queuedBytes.Release(left)
	}
}

// Memory is kept for an upload only while bytes come.
func TestIdleUploadKeepsNoMemory(t *testing.T) {
	both := replicated(t, newDir(t), 2, newDir(t))
	content := random(2*minTee, 25)
	s, err := both.stage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.discard()
	for _, part := range [][]byte{content[:minTee/2], content[minTee/2:]} {
		if err := s.append(newIntake(t.Context(), bytes.NewReader(part), NoLimit)); err != nil {
			t.Fatal(err)
		}
		if !queuedBytes.TryAcquire(maxQueuedBytes) {
			t.Fatal("an idle upload keeps memory")
		}
		queuedBytes.Release(maxQueuedBytes)
	}
	if err := s.commit(t.Context(), api.DigestOf(content)); err != nil {
		t.Fatal(err)
	}
	holds(t, both, content)
}

// Without a majority a large blob is not stored, and wrong bytes are stored
// nowhere.
func TestReplicatedStreamsFail(t *testing.T) {
	down := true
	customer, dirs, stores := lanes(t, func(i int, h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if down && i > 0 {
				writeError(w, api.Errorf(api.Unavailable, "down"))
				return
			}
			h.ServeHTTP(w, r)
		})
	})
	content := random(minParts, 9)
	digest := api.DigestOf(content)
	_, err := customer.Put(t.Context(), digest, bytes.NewReader(content), NoLimit)
	if api.KindOf(err) != api.Unavailable || !strings.Contains(err.Error(), "1 of the 2 schedulers") {
		t.Errorf("%v", err)
	}
	down = false
	wrong := api.DigestOf([]byte("x"))
	if _, err := customer.Put(t.Context(), wrong, bytes.NewReader(content), NoLimit); api.KindOf(err) != api.Invalid {
		t.Errorf("%v", err)
	}
	if _, err := customer.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); err != nil {
		t.Error(err)
	}
	stores[0].copies.Wait()
	for i, dir := range dirs {
		if _, err := dir.Stat(t.Context(), wrong); api.KindOf(err) != api.NotFound {
			t.Errorf("scheduler %d: %v", i, err)
		}
	}
	noLeftovers(t, dirs[0]) // a peer that was given up while it began keeps a name for an hour
}

// client talks to a Handler about uploads.
type client struct {
	t testing.TB
	h http.Handler
}

func (c client) do(method, path string, body io.Reader, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, body)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	c.h.ServeHTTP(w, r)
	return w
}

func (c client) begin(length int) string {
	c.t.Helper()
	w := c.do("POST", uploadsPath, nil, uploadLengthHeader, fmt.Sprint(length))
	_, rest, _ := strings.Cut(w.Body.String(), `{"upload":"`)
	id, _, ok := strings.Cut(rest, `","offset":0}`)
	if w.Code != 201 || !ok || !isUploadID(id) {
		c.t.Fatalf("%d %s", w.Code, w.Body)
	}
	return uploadsPath + "/" + id
}

func TestUploadStatuses(t *testing.T) {
	d := newDir(t)
	caller := Caller{ID: "a"}
	c := client{t, Handler(d, func(*http.Request) (Caller, error) { return caller, nil }, 10)}
	up := c.begin(5)
	id := up[len(uploadsPath)+1:]
	for _, test := range []struct {
		method, path, body string
		header             []string
		status             int
		want               string
	}{
		{"POST", uploadsPath, "", nil, 400, `Muster-Upload-Length \"\": want the number of bytes that will be sent`},
		{"POST", uploadsPath, "", []string{uploadLengthHeader, "11"}, 413, `11 bytes, more than the limit of 10`},
		{"POST", uploadsPath, "", []string{uploadLengthHeader, "-1"}, 400, `want the number`},
		{"GET", uploadsPath, "", nil, 405, `method GET: want POST`},
		{"GET", up, "", nil, 405, `method GET: want DELETE, HEAD or PATCH`},
		{"PATCH", up, "he", nil, 400, `Muster-Upload-Offset \"\": want the offset of the body in the blob`},
		{"PATCH", up, "he", []string{uploadOffsetHeader, "0"}, 200, `{"upload":"` + id + `","offset":2}`},
		{"PATCH", up, "he", []string{uploadOffsetHeader, "0"}, 409, `the body starts at 0, and 2 bytes are here; go on from there`},
		{"HEAD", up, "", nil, 200, ""},
		{"PATCH", up, "llo", []string{uploadOffsetHeader, "2"}, 200, `{"upload":"` + id + `","offset":5}`},
		{"PUT", Path(api.DigestOf([]byte("hallo"))), "", []string{uploadHeader, id}, 400, `send them again`},
		{"HEAD", up, "", nil, 404, ""},
		{"PUT", Path(api.DigestOf([]byte("hello"))), "", []string{uploadHeader, id}, 404, `there is no upload ` + id + ` (any more); begin a new one`},
	} {
		w := c.do(test.method, test.path, strings.NewReader(test.body), test.header...)
		if w.Code != test.status || !strings.Contains(w.Body.String(), test.want) {
			t.Errorf("%s %s: %d %s; want %d %s", test.method, test.path, w.Code, w.Body, test.status, test.want)
		}
	}
	// More than announced ends an upload; so does its owner.
	up = c.begin(2)
	if w := c.do("PATCH", up, strings.NewReader("abc"), uploadOffsetHeader, "0"); w.Code != 413 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if w := c.do("HEAD", up, nil); w.Code != 404 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	up = c.begin(2)
	if w := c.do("HEAD", up, nil); w.Code != 200 || w.Header().Get(uploadOffsetHeader) != "0" {
		t.Errorf("%d %v", w.Code, w.Header())
	}
	caller = Caller{ID: "b"}
	if w := c.do("DELETE", up, nil); w.Code != 404 {
		t.Errorf("another caller's upload: %d", w.Code)
	}
	caller = Caller{ID: "a"}
	if w := c.do("DELETE", up, nil); w.Code != 200 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if w := c.do("DELETE", up, nil); w.Code != 404 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	// What nobody finished is bounded, by number and by bytes.
	for _, size := range []int{0, 10} {
		var refused *httptest.ResponseRecorder
		var begun []string
		for range maxUploads + 1 {
			refused = c.do("POST", uploadsPath, nil, uploadLengthHeader, fmt.Sprint(size))
			if refused.Code != 201 {
				break
			}
			begun = append(begun, uploadsPath+"/"+strings.Split(refused.Body.String(), `"`)[3])
		}
		if want := map[int]int{0: maxUploads, 10: 2}[size]; len(begun) != want || refused.Code != 429 {
			t.Errorf("%d uploads of %d bytes, then %d %s", len(begun), size, refused.Code, refused.Body)
		}
		caller = Caller{ID: "b"}
		c.do("DELETE", c.begin(10), nil) // others are not concerned
		caller = Caller{ID: "a"}
		for _, up := range begun {
			if w := c.do("DELETE", up, nil); w.Code != 200 {
				t.Fatal(w.Code)
			}
		}
	}
	noLeftovers(t, d)
}

// A client that lost its connection takes the upload over from the request that
// still waits for bytes.
func TestUploadIsTakenOver(t *testing.T) {
	d := newDir(t)
	server := httptest.NewServer(Handler(d, allow, 1<<20))
	defer server.Close()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	store := NewHTTP(HTTPConfig{Client: &http.Client{Transport: transport}, Addresses: func() []string { return []string{server.URL} }})
	u, err := store.begin(t.Context(), server.URL, 10)
	if err != nil {
		t.Fatal(err)
	}
	defer u.discard()
	pr, pw := io.Pipe()
	first := make(chan error, 1)
	go func() { first <- u.append(newIntake(t.Context(), pr, NoLimit)) }()
	if _, err := pw.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	second := *u
	have := int64(0)
	for have < 5 { // the five bytes may still be on their way when the first is interrupted
		if have, err = second.ask(); err != nil {
			t.Fatal(err)
		}
		if have == 0 {
			second.size = 0
			if err := second.append(newIntake(t.Context(), strings.NewReader("hello"), NoLimit)); err != nil {
				t.Fatal(err)
			}
		}
	}
	pw.CloseWithError(errors.New("gone"))
	if err := <-first; err == nil {
		t.Error("the first request did not notice")
	}
	second.size = have
	if err := second.append(newIntake(t.Context(), strings.NewReader("world"), NoLimit)); err != nil {
		t.Fatal(err)
	}
	digest := api.DigestOf([]byte("helloworld"))
	if err := second.commit(t.Context(), digest); err != nil {
		t.Fatal(err)
	}
	testReader(t, store, digest, "helloworld")
}

// A transfer that stands still is cut, by either side.
func TestStalledTransfers(t *testing.T) {
	content := random(4<<20, 10)
	digest := api.DigestOf(content)
	m := &Memory{}
	if _, err := m.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); err != nil {
		t.Fatal(err)
	}
	const idle = 50 * time.Millisecond
	h := Handler(m, allow, NoLimit)
	h.(*handler).idle = idle
	server := httptest.NewServer(h)
	defer server.Close()
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// The client sends too little …
	fmt.Fprintf(conn, "PUT %s HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc", Path(api.DigestOf([]byte("abc"))))
	conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	answer, err := io.ReadAll(conn)
	if err != nil || !strings.Contains(string(answer), "no byte came for 50ms; go on where the transfer stopped") {
		t.Errorf("%s %v", answer, err)
	}
	// … or takes nothing.
	if conn, err = net.Dial("tcp", server.Listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	opened := make(chan struct{}, 1)
	h.(*handler).store = opening{m, opened}
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", Path(digest))
	select {
	case <-opened: // the transfer counts by then
	case <-time.After(20 * time.Second):
		t.Fatal("the blob was not opened")
	}
	h.(*handler).traffic.await(t, 0)

	// The server sends nothing, or takes nothing.
	stuck := make(chan struct{})
	store := serve(t, HTTPConfig{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodHead:
			w.Header().Set("Content-Length", "4194304")
			return
		case http.MethodGet:
			w.Header().Set("Content-Length", "4194304")
			w.(http.Flusher).Flush()
		case http.MethodPost:
			writeUpload(w, http.StatusCreated, "x", 0)
			return
		}
		select {
		case <-r.Context().Done():
		case <-stuck:
		}
	}))
	defer close(stuck)
	store.idle = idle
	if _, err := Fetch(t.Context(), store, digest, filepath.Join(t.TempDir(), "x"), NoLimit); api.KindOf(err) != api.Unavailable || !strings.Contains(err.Error(), "not a byte moved for 50ms") {
		t.Errorf("%v", err)
	}
	endless := newIntake(t.Context(), endlessZeros{}, NoLimit)
	if err := store.sendBody(t.Context(), http.MethodPatch, store.config.Addresses()[0]+"x", nil, endless, -1, nil); api.KindOf(err) != api.Unavailable || !strings.Contains(err.Error(), "not a byte moved for 50ms") {
		t.Errorf("%v", err)
	}
}

// opening is a store that says when a blob is opened.
type opening struct {
	Store
	opened chan<- struct{}
}

func (o opening) Open(ctx context.Context, digest api.Digest) (Reader, error) {
	o.opened <- struct{}{}
	return o.Store.Open(ctx, digest)
}

type endlessZeros struct{}

func (endlessZeros) Read(p []byte) (int, error) { return len(p), nil }

// await waits until n transfers of the one caller are under way.
func (tr *traffic) await(t *testing.T, n int) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; {
		tr.mu.Lock()
		count := 0
		for _, c := range tr.callers {
			count += c.count
		}
		tr.mu.Unlock()
		if count == n {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d transfers; want %d", count, n)
		}
		runtime.Gosched()
	}
}

// Transfers of one caller wait for their turn; those of others do not.
func TestTrafficIsBounded(t *testing.T) {
	tr := newTraffic()
	a := Caller{ID: "a"}
	var leave []func()
	for range maxTransfers {
		done, err := tr.enter(t.Context(), a)
		if err != nil {
			t.Fatal(err)
		}
		leave = append(leave, done)
	}
	for _, other := range []Caller{{ID: "b"}, {ID: "node", Peer: true}} {
		done, err := tr.enter(t.Context(), other)
		if err != nil {
			t.Fatal(err)
		}
		done()
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := tr.enter(ctx, a); api.KindOf(err) != api.Unavailable {
		t.Errorf("%v", err)
	}
	var wg sync.WaitGroup
	for range maxWaitingTransfers {
		wg.Go(func() {
			done, err := tr.enter(t.Context(), a)
			if err != nil {
				t.Error(err)
				return
			}
			done()
		})
	}
	tr.await(t, maxTransfers+maxWaitingTransfers)
	if _, err := tr.enter(t.Context(), a); api.KindOf(err) != api.Exhausted {
		t.Errorf("%v", err)
	}
	for _, done := range leave {
		done()
	}
	wg.Wait()
	if len(tr.callers) > 0 {
		t.Errorf("%d callers are remembered", len(tr.callers))
	}
}

// A fetch into the cache goes on after a restart; what nobody comes back for
// does not stay for ever.
func TestCacheKeepsParts(t *testing.T) {
	content := random(3<<20, 11)
	digest := api.DigestOf(content)
	m := &Memory{}
	if _, err := m.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); err != nil {
		t.Fatal(err)
	}
	down := errors.New("the line broke")
	dir := t.TempDir()
	var begun string
	fetch := func(store Store) func(string) error {
		return func(dst string) error {
			begun = dst
			_, err := Fetch(t.Context(), store, digest, dst, NoLimit)
			return err
		}
	}
	c, err := OpenCache(dir, 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.Get(t.Context(), digest, fetch(breaking{m, 2 << 20, api.Errorf(api.Unavailable, "%w", down)})); !errors.Is(err, down) {
		t.Fatal(err)
	}
	if info, err := os.Stat(PartOf(begun)); err != nil || info.Size() != 2<<20 {
		t.Fatalf("%v %v", info, err)
	}
	stale, large := filepath.Join(dir, "tmp", "stale"+partSuffix), filepath.Join(dir, "tmp", "large"+partSuffix)
	for _, name := range []string{stale, large, filepath.Join(dir, "tmp", "7")} {
		if err := os.WriteFile(name, random(3<<20, 12), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now()
	for name, age := range map[string]time.Duration{stale: partExpires + time.Minute, large: time.Hour} {
		if err := os.Chtimes(name, now.Add(-age), now.Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	if c, err = OpenCache(dir, 8<<20); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(filepath.Join(dir, "tmp"))
	if err != nil || len(left) != 1 || left[0].Name() != filepath.Base(PartOf(begun)) {
		t.Errorf("left: %v %v", left, err)
	}
	path, release, err := c.Get(t.Context(), digest, fetch(from{m, 2 << 20}))
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if b, err := os.ReadFile(path); err != nil || !bytes.Equal(b, content) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// breaking is a store whose readers break after some bytes.
type breaking struct {
	Store
	after int64
	err   error
}

func (b breaking) Open(ctx context.Context, digest api.Digest) (Reader, error) {
	r, err := b.Store.Open(ctx, digest)
	return &breakingReader{r, b.after, b.err}, err
}

type breakingReader struct {
	Reader
	left int64
	err  error
}

func (r *breakingReader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, r.err
	}
	n, err := r.Reader.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	return n, err
}

// from is a store that must not be asked for what comes before.
type from struct {
	Store
	offset int64
}

func (f from) Open(ctx context.Context, digest api.Digest) (Reader, error) {
	r, err := f.Store.Open(ctx, digest)
	return &fromReader{r, f.offset, 0}, err
}

type fromReader struct {
	Reader
	offset, at int64
}

func (r *fromReader) Seek(offset int64, whence int) (n int64, err error) {
	r.at, err = r.Reader.Seek(offset, whence)
	return r.at, err
}

func (r *fromReader) Read(p []byte) (int, error) {
	if r.at < r.offset {
		return 0, fmt.Errorf("read at %d", r.at)
	}
	return r.Reader.Read(p)
}
