package blob

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"gocloud.dev/blob/fileblob"

	"github.com/musternet/muster/api"
)

// fakeS3 is as much of S3 as is used here, in path style. It keeps to what the
// documentation says of checksums: a request that carries one must match it, and
// one that was signed with it must carry it.
type fakeS3 struct {
	t *testing.T

	mu      sync.Mutex // guards everything below
	objects map[string][]byte
	signed  map[string]int // requests by URL, by method
	own     map[string]int // requests of schedulers, by method
	down    bool           // for URLs
}

func newFakeS3(t *testing.T) (*fakeS3, *httptest.Server) {
	f := &fakeS3{t: t, objects: map[string][]byte{}, signed: map[string]int{}, own: map[string]int{}}
	server := httptest.NewServer(f)
	t.Cleanup(server.Close)
	return f, server
}

func (f *fakeS3) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	query := r.URL.Query()
	if query.Has("X-Amz-Signature") {
		f.signed[r.Method]++
		for name := range r.Header {
			if strings.HasPrefix(name, "Muster-") || name == "Authorization" {
				f.t.Errorf("%s of a URL carries %s", r.Method, name)
			}
		}
		if f.down {
			http.Error(w, "down", http.StatusServiceUnavailable)
			return
		}
	} else {
		f.own[r.Method]++
		if !strings.HasPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 ") {
			http.Error(w, "who?", http.StatusForbidden)
			return
		}
	}
	switch r.Method {
	case http.MethodPut:
		f.put(w, r, query)
	case http.MethodGet, http.MethodHead:
		content, ok := f.objects[r.URL.Path]
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		w.Header().Set("ETag", `"x"`)
		http.ServeContent(w, r, "", time.Unix(1, 0), bytes.NewReader(content))
	case http.MethodDelete:
		delete(f.objects, r.URL.Path)
		w.WriteHeader(http.StatusNoContent)
	default:
		http.Error(w, "what?", http.StatusNotImplemented)
	}
}

func (f *fakeS3) put(w http.ResponseWriter, r *http.Request, query url.Values) {
	content, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if strings.Contains(query.Get("X-Amz-SignedHeaders"), "x-amz-checksum-sha256") && r.Header.Get(checksumHeader) == "" {
		http.Error(w, "SignatureDoesNotMatch", http.StatusForbidden)
		return
	}
	if strings.HasPrefix(r.Header.Get("Content-Encoding"), "aws-chunked") || strings.HasPrefix(r.Header.Get("X-Amz-Content-Sha256"), "STREAMING-") {
		content = unchunk(f.t, content)
	}
	sum := sha256.Sum256(content)
	if want := r.Header.Get(checksumHeader); want != "" && want != base64.StdEncoding.EncodeToString(sum[:]) {
		http.Error(w, "BadDigest", http.StatusBadRequest)
		return
	}
	f.objects[r.URL.Path] = content
	w.Header().Set("ETag", `"x"`)
}

// unchunk takes AWS's chunks apart: a length in hex, an optional signature, the
// bytes.
func unchunk(t *testing.T, b []byte) (content []byte) {
	for {
		line, rest, ok := bytes.Cut(b, []byte("\r\n"))
		size, _, _ := strings.Cut(string(line), ";")
		n, err := strconv.ParseInt(size, 16, 64)
		if !ok || err != nil || n > int64(len(rest)) {
			t.Errorf("chunk %q: %v", line, err)
			return nil
		}
		if n == 0 {
			return content
		}
		content, b = append(content, rest[:n]...), rest[n+2:]
	}
}

func (f *fakeS3) counts() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := fmt.Sprintf("signed %v, objects %d", f.signed, len(f.objects))
	clear(f.signed)
	return s
}

// s3Store is a customer's store before a scheduler before S3; moved counts the
// bytes of bodies that pass through the scheduler.
func s3Store(t *testing.T, s3URL, mode string) (customer *HTTP, bucket *Bucket, moved *int64) {
	t.Setenv("AWS_ACCESS_KEY_ID", "id")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	store, closeStore, err := OpenURL(t.Context(), "s3://bucket?region=us-east-1&use_path_style=true&endpoint="+url.QueryEscape(s3URL)+mode)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeStore() })
	h := Handler(store, allow, 1<<30)
	moved = new(int64)
	customer = serve(t, HTTPConfig{Authorization: func(context.Context) (string, error) { return "Bearer key", nil }},
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != "Bearer key" {
				t.Error("a scheduler was asked without the key")
			}
			r.Body = &counted{r.Body, moved}
			h.ServeHTTP(&countedWriter{w, moved}, r)
		}))
	return customer, store.(*Bucket), moved
}

type counted struct {
	io.ReadCloser
	n *int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	*c.n += int64(n)
	return n, err
}

type countedWriter struct {
	http.ResponseWriter
	n *int64
}

func (c *countedWriter) Unwrap() http.ResponseWriter { return c.ResponseWriter }

func (c *countedWriter) Write(p []byte) (int, error) {
	*c.n += int64(len(p))
	return c.ResponseWriter.Write(p)
}

// Large blobs go to S3 and come from there without passing through a scheduler.
func TestDirect(t *testing.T) {
	f, server := newFakeS3(t)
	customer, bucket, moved := s3Store(t, server.URL, "&direct=on")
	for i, size := range []int{minDirect, minParts + 3} {
		content := random(size, byte(20+i))
		digest := api.DigestOf(content)
		if n, err := customer.Put(t.Context(), digest, bytes.NewReader(content), NoLimit); err != nil || n != int64(size) {
			t.Fatal(n, err)
		}
		if got, want := f.counts(), fmt.Sprintf("signed map[PUT:1], objects %d", i+1); got != want {
			t.Errorf("%s; want %s", got, want)
		}
		holds(t, customer, content)
		if got, want := f.counts(), fmt.Sprintf("signed map[GET:1], objects %d", i+1); got != want {
			t.Errorf("%s; want %s", got, want)
		}
		part := make([]byte, 100)
		r, err := customer.Open(t.Context(), digest)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.ReadAt(part, 777); err != nil || !bytes.Equal(part, content[777:877]) {
			t.Errorf("a range: %v", err)
		}
		r.Close()
		f.counts()
		holds(t, bucket, content)
	}
	if *moved > 10_000 {
		t.Errorf("%d bytes passed through the scheduler", *moved)
	}
	// What is small is not worth two more requests.
	if _, err := customer.Put(t.Context(), api.DigestOf([]byte("small")), strings.NewReader("small"), NoLimit); err != nil {
		t.Error(err)
	}
	if got, want := f.counts(), "signed map[], objects 3"; got != want {
		t.Errorf("%s; want %s", got, want)
	}
	if _, err := customer.Open(t.Context(), api.DigestOf([]byte("missing"))); api.KindOf(err) != api.NotFound {
		t.Error(err)
	}
}

// A ticket stores the bytes that it was given out for, and no others.
func TestTicketIsForOneBlob(t *testing.T) {
	f, server := newFakeS3(t)
	customer, bucket, _ := s3Store(t, server.URL, "&direct=on")
	content := random(minDirect, 30)
	digest := api.DigestOf(content)
	ticket, err := customer.ticket(t.Context(), customer.config.Addresses()[0][:len(customer.config.Addresses()[0])-1], digest, int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	other := random(minDirect, 31)
	if err := customer.redeem(t.Context(), ticket, bytes.NewReader(other), 0, int64(len(other))); err == nil {
		t.Error("other bytes were taken")
	}
	sum := sha256.Sum256(other)
	for _, header := range []map[string]string{nil, {checksumHeader: base64.StdEncoding.EncodeToString(sum[:])}} {
		forged := ticket
		forged.Header = header
		err := customer.redeem(t.Context(), forged, bytes.NewReader(other), 0, int64(len(other)))
		if header == nil && err == nil {
			t.Error("bytes without a checksum were taken")
		}
		// The fake does not compute signatures; S3 refuses the second for its own.
	}
	f.mu.Lock()
	clear(f.objects)
	f.mu.Unlock()
	if err := customer.redeem(t.Context(), ticket, bytes.NewReader(content), 0, int64(len(content))); err != nil {
		t.Error(err)
	}
	holds(t, bucket, content)
	u, err := url.Parse(ticket.URL)
	if err != nil || !signsChecksum(ticket.URL) || u.Query().Get("X-Amz-Expires") != "900" {
		t.Errorf("%s", ticket.URL)
	}
}

// Where the object store cannot be reached, or only schedulers may write, blobs
// pass through them.
func TestDirectFallsBack(t *testing.T) {
	for _, test := range []struct {
		mode string
		down bool
		want string
	}{
		{"&direct=on", true, "signed map[GET:1 PUT:1], objects 1"},
		{"", false, "signed map[GET:1], objects 1"},
		{"&direct=get", true, "signed map[GET:1], objects 1"},
		{"&direct=off", false, "signed map[], objects 1"},
	} {
		t.Run(test.mode, func(t *testing.T) {
			f, server := newFakeS3(t)
			f.down = test.down
			customer, _, _ := s3Store(t, server.URL, test.mode)
			content := random(minDirect, 40)
			if _, err := customer.Put(t.Context(), api.DigestOf(content), bytes.NewReader(content), NoLimit); err != nil {
				t.Fatal(err)
			}
			holds(t, customer, content)
			if got := f.counts(); got != test.want {
				t.Errorf("%s; want %s", got, test.want)
			}
			// Once was enough to find out.
			f.down = true
			holds(t, customer, content)
		})
	}
	if _, _, err := OpenURL(t.Context(), "s3://bucket?region=x&direct=maybe"); api.KindOf(err) != api.Invalid || !strings.Contains(err.Error(), "direct=maybe: want on, get or off") {
		t.Error(err)
	}
	for _, test := range []struct {
		url        string
		gets, puts bool
	}{
		{"s3://b", true, true},
		{"s3://b?region=x", true, true},
		{"s3://b?endpoint=http://minio:9000", true, false},
		{"s3://b?endpoint=http://minio:9000&direct=on", true, true},
		{"s3://b?direct=get", true, false},
		{"s3://b?direct=off", false, false},
	} {
		u, err := url.Parse(test.url)
		if err != nil {
			t.Fatal(err)
		}
		if gets, puts, err := direct(u); err != nil || gets != test.gets || puts != test.puts || u.Query().Has("direct") {
			t.Errorf("%s: %t %t %v", test.url, gets, puts, err)
		}
	}
}

// A blob that is too large for one request to S3 goes through the schedulers,
// and the next one does not.
func TestDirectOfTooLargeABlob(t *testing.T) {
	f, server := newFakeS3(t)
	customer, _, _ := s3Store(t, server.URL, "&direct=on")
	none := bytes.NewReader(nil) // it is not read
	if err := customer.putDirect(t.Context(), api.DigestOf([]byte("large")), none, 0, maxSignedPut+1); api.KindOf(err) != api.Unsupported {
		t.Error(err)
	}
	content := random(minDirect, 41)
	if _, err := customer.Put(t.Context(), api.DigestOf(content), bytes.NewReader(content), NoLimit); err != nil {
		t.Fatal(err)
	}
	if got, want := f.counts(), "signed map[PUT:1], objects 1"; got != want {
		t.Errorf("%s; want %s", got, want)
	}
}

// Signatures of a real signer are checked where the bytes are served.
func TestDirectWithRealSignatures(t *testing.T) {
	dir := t.TempDir()
	var signer *fileblob.URLSignerHMAC
	served := 0
	var plain *Bucket
	storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key, err := signer.KeyFromURL(r.Context(), r.URL)
		if err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		served++
		b, err := plain.bucket.ReadAll(r.Context(), key)
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}))
	defer storage.Close()
	base, err := url.Parse(storage.URL)
	if err != nil {
		t.Fatal(err)
	}
	signer = fileblob.NewURLSignerHMAC(base, []byte("secret"))
	bucket, err := fileblob.OpenBucket(dir, &fileblob.Options{URLSigner: signer})
	if err != nil {
		t.Fatal(err)
	}
	defer bucket.Close()
	plain = NewBucket(bucket)
	plain.signsGets, plain.signsPuts = true, true
	customer := serve(t, HTTPConfig{}, Handler(plain, allow, 1<<30))
	content := random(minDirect, 50)
	if _, err := customer.Put(t.Context(), api.DigestOf(content), bytes.NewReader(content), NoLimit); err != nil {
		t.Fatal(err) // without a checksum to sign, through the scheduler
	}
	holds(t, customer, content)
	if served != 1 {
		t.Errorf("served %d times", served)
	}
}

// What a scheduler answers may be anything.
func FuzzTicket(f *testing.F) {
	f.Add([]byte(`{"url":"https://s3.example/b/k?X-Amz-Signature=1","header":{"X-Amz-Checksum-Sha256":"x"}}`))
	f.Add([]byte(`{"url":"file:///etc/passwd"}`))
	f.Add([]byte(`{"url":"http://x","header":{"Authorization":"x"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		ticket, err := decodeTicket(bytes.NewReader(b))
		if err != nil {
			if kind := api.KindOf(err); kind != api.Unavailable && kind != api.Unsupported {
				t.Fatal(err)
			}
			return
		}
		u, err := url.Parse(ticket.URL)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || len(ticket.Header) > 1 {
			t.Fatalf("%+v", ticket)
		}
	})
}
