package blob

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/musternet/muster/api"
)

// HTTP is the store behind the Handler of one or more machines that hold the
// same blobs. A call goes to the address that answered last; if that cannot be
// reached or is unavailable, to the others in turn.
type HTTP struct {
	config HTTPConfig
	client *http.Client
	last   atomic.Uint32 // position of the address that answered last
	delay  time.Duration
	idle   time.Duration // how long a transfer may stand still

	// Until when not to try the object store itself, in Unix nanoseconds.
	noGets, noPuts atomic.Int64
}

// HTTPConfig says where the machines are and how to talk to them.
type HTTPConfig struct {
	// Addresses returns base URLs such as "https://host:7070", the preferred
	// one first. It is asked for every call.
	Addresses func() []string
	// Authorization returns the Authorization header; nil or "" for none.
	Authorization func(ctx context.Context) (string, error)
	// Client carries the requests; nil is http.DefaultClient. It needs no
	// overall timeout: the context of a call ends it.
	Client *http.Client
	// Replica marks the calls as those of a fellow replica, which concern only
	// what the other machine itself holds.
	Replica bool
}

var _ Store = (*HTTP)(nil)

// NewHTTP is the store behind the addresses. It does not call them yet.
func NewHTTP(config HTTPConfig) *HTTP {
	if config.Client == nil {
		config.Client = http.DefaultClient
	}
	// A redirect is followed by hand, without what the schedulers alone may see.
	client := *config.Client
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &HTTP{config: config, client: &client, delay: retryDelay, idle: maxIdle}
}

// maxErrorBytes bounds the body of an error answer.
const maxErrorBytes = 64 << 10

// Bounds of how a blob is sent.
const (
	// maxUnasked is what is sent without asking whether it is there already:
	// asking would cost as much.
	maxUnasked = 16 << 10
	// minParts is the size from which a blob is sent in parts, which survive a
	// broken connection.
	minParts = 8 << 20
)

// Put implements Store. Unless the blob is tiny, it sends nothing if the blob is
// there already. If r is an io.Seeker a transfer that breaks goes on, here or at
// the other addresses.
func (h *HTTP) Put(ctx context.Context, digest api.Digest, r io.Reader, limit int64) (int64, error) {
	start, length, err := extent(r)
	if err != nil {
		return 0, err
	}
	if length > limit {
		return 0, api.Errorf(api.TooLarge, "blob %s: %d bytes, more than the limit of %d", digest, length, limit)
	}
	if length < 0 || length > maxUnasked {
		if size, err := h.Stat(ctx, digest); err == nil {
			return size, nil
		} else if kind := api.KindOf(err); kind != api.NotFound && kind != api.Unavailable {
			return 0, err
		}
	}
	if length >= minParts {
		known := func(context.Context) (api.Digest, error) { return digest, nil }
		err := h.putInParts(ctx, r.(io.ReadSeeker), start, length, known)
		if api.KindOf(err) != api.Unsupported {
			return length, err
		}
	}
	if length >= minDirect {
		if err := h.putDirect(ctx, digest, r.(io.ReadSeeker), start, length); err == nil {
			return length, nil
		}
		if _, err := r.(io.Seeker).Seek(start, io.SeekStart); err != nil {
			return 0, api.Errorf(api.Internal, "blob %s: %w", digest, err)
		}
	}
	return h.putWhole(ctx, digest, r, start, length, limit)
}

// putWhole sends a blob in one request.
func (h *HTTP) putWhole(ctx context.Context, digest api.Digest, r io.Reader, start, length, limit int64) (size int64, err error) {
	sent := false
	err = h.each(func(base string) (again bool, err error) {
		if sent {
			if _, err := r.(io.Seeker).Seek(start, io.SeekStart); err != nil {
				return false, api.Errorf(api.Internal, "blob %s: %w", digest, err)
			}
		}
		sent = true
		size, err = h.send(ctx, base, digest, newIntake(ctx, r, limit), length)
		return length >= 0, err
	})
	return size, err
}

// extent is where r stands and how much follows; length -1 if it cannot seek.
func extent(r io.Reader) (start, length int64, err error) {
	seeker, ok := r.(io.Seeker)
	if !ok {
		return 0, -1, nil
	}
	if start, err = seeker.Seek(0, io.SeekCurrent); err != nil {
		return 0, -1, nil // a pipe in a file's clothes
	}
	end, err := seeker.Seek(0, io.SeekEnd)
	if err == nil {
		_, err = seeker.Seek(start, io.SeekStart)
	}
	if err != nil {
		return 0, 0, api.Errorf(api.Internal, "blob: %w", err)
	}
	return start, end - start, nil
}

func (h *HTTP) send(ctx context.Context, base string, digest api.Digest, in *intake, length int64) (int64, error) {
	if err := checkDigest(digest); err != nil {
		return 0, err
	}
	var answer struct {
		Size int64 `json:"size"`
	}
	err := h.sendBody(ctx, http.MethodPut, base+Path(digest), nil, in, length, &answer)
	if err != nil {
		return 0, fmt.Errorf("blob %s: %w", digest, err)
	}
	return answer.Size, nil
}

// sendBody sends what in reads, length bytes or an unknown number for -1, and
// decodes the answer.
func (h *HTTP) sendBody(ctx context.Context, method, url string, header http.Header, in *intake, length int64, answer any) error {
	ctx, watch := watchTransfer(ctx, h.idle)
	defer watch.stop()
	body := &body{in: in, watch: watch}
	// The transport may read on after the answer is there: no later than this
	// may it touch r, which is the caller's again.
	defer body.end()
	req, err := h.request(ctx, method, url, body)
	if err != nil {
		return err
	}
	for name, values := range header {
		req.Header[name] = values
	}
	req.ContentLength = length
	if length == 0 {
		req.Body = http.NoBody
	}
	resp, err := h.do(req)
	if err != nil {
		body.end()
		if in.failed != nil {
			return in.failed
		}
		return watch.explain(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxErrorBytes)).Decode(answer); err != nil {
		return api.Errorf(api.Unavailable, "%s sent an answer that is cut short: %w", req.URL.Host, err)
	}
	return nil
}

// body is a request's body that can be taken away from the transport.
type body struct {
	watch *watch

	mu    sync.Mutex // guards ended, and in while it is read
	in    *intake
	ended bool
}

func (b *body) Read(p []byte) (int, error) {
	return b.read(p, b.in.read)
}

// WriteTo sends large pieces where the transport lets it.
func (b *body) WriteTo(w io.Writer) (total int64, err error) {
	piece := pieces.Get().(*[pieceBytes]byte)
	defer pieces.Put(piece)
	for err == nil {
		var n int
		n, err = b.read(piece[:], b.in.fill)
		if n > 0 {
			written, writeErr := w.Write(piece[:n])
			total += int64(written)
			if writeErr != nil {
				return total, writeErr
			}
		}
	}
	if err == io.EOF {
		err = nil
	}
	return total, err
}

func (b *body) read(p []byte, read func([]byte) (int, error)) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended {
		return 0, errors.New("the request is over")
	}
	b.watch.pause() // a slow source is no stalled connection
	n, err := read(p)
	if err == nil {
		b.watch.begin()
	}
	return n, err
}

func (b *body) Close() error { return nil }

func (b *body) end() {
	b.mu.Lock()
	b.ended = true
	b.mu.Unlock()
}

// Open implements Store.
func (h *HTTP) Open(ctx context.Context, digest api.Digest) (Reader, error) {
	size, err := h.Stat(ctx, digest)
	if err != nil {
		return nil, err
	}
	open := func(ctx context.Context, offset, length int64) (body io.ReadCloser, err error) {
		err = h.each(func(base string) (again bool, err error) {
			body, err = h.openRange(ctx, base, digest, offset, length)
			return true, err
		})
		return body, err
	}
	return newRanged(ctx, digest, size, h.delay, open), nil
}

func (h *HTTP) openRange(ctx context.Context, base string, digest api.Digest, offset, length int64) (io.ReadCloser, error) {
	if err := checkDigest(digest); err != nil {
		return nil, err
	}
	ctx, watch := watchTransfer(ctx, h.idle)
	body, err := h.openWatched(ctx, base, digest, offset, length)
	if err != nil {
		watch.stop()
		return nil, err
	}
	return &watchedBody{body, watch}, nil
}

func (h *HTTP) openWatched(ctx context.Context, base string, digest api.Digest, offset, length int64) (io.ReadCloser, error) {
	req, err := h.request(ctx, http.MethodGet, base+Path(digest), nil)
	if err != nil {
		return nil, err
	}
	if h.wantsDirect(&h.noGets) {
		req.Header.Set(directHeader, "1")
	}
	if offset > 0 || length >= 0 {
		end := ""
		if length >= 0 {
			end = strconv.FormatInt(offset+length-1, 10)
		}
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%s", offset, end))
	}
	resp, err := h.do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusTemporaryRedirect {
		resp.Body.Close()
		if resp, err = h.follow(req, resp); err != nil {
			h.notDirect(&h.noGets)
			return nil, err // Unavailable: the next try goes through the scheduler
		}
	}
	if req.Header.Get("Range") != "" && resp.StatusCode != http.StatusPartialContent {
		// A proxy that ignores ranges sends everything.
		if _, err := io.CopyN(io.Discard, resp.Body, offset); err != nil {
			resp.Body.Close()
			return nil, brokenOff(err)
		}
	} else if from := fmt.Sprintf("bytes %d-", offset); req.Header.Get("Range") != "" && !strings.HasPrefix(resp.Header.Get("Content-Range"), from) {
		resp.Body.Close()
		return nil, api.Errorf(api.Unavailable, "blob %s: %s sent the range %q in place of %q", digest, base, resp.Header.Get("Content-Range"), from)
	}
	return resp.Body, nil
}

// Stat implements Store.
func (h *HTTP) Stat(ctx context.Context, digest api.Digest) (size int64, err error) {
	if err := checkDigest(digest); err != nil {
		return 0, err
	}
	err = h.each(func(base string) (again bool, err error) {
		req, err := h.request(ctx, http.MethodHead, base+Path(digest), nil)
		if err != nil {
			return false, err
		}
		resp, err := h.do(req)
		if err != nil {
			return true, err
		}
		resp.Body.Close()
		if size = resp.ContentLength; size < 0 {
			return true, api.Errorf(api.Unavailable, "blob %s: %s does not say its size", digest, base)
		}
		return false, nil
	})
	return size, err
}

// Delete implements Store. Blobs are deleted by the machines that hold them,
// never from afar.
func (h *HTTP) Delete(ctx context.Context, digest api.Digest) error {
	return api.Errorf(api.Unsupported, "blob %s: only a scheduler deletes blobs", digest)
}

// each calls f with one address after the other, from the one that answered
// last, while f says that another may do better and fails for want of it.
func (h *HTTP) each(f func(base string) (again bool, err error)) error {
	addresses := h.config.Addresses()
	if len(addresses) == 0 {
		return api.Errorf(api.Unavailable, "no scheduler's address is known")
	}
	first := int(h.last.Load())
	var failures []error
	for i := range addresses {
		at := (first + i) % len(addresses)
		again, err := f(strings.TrimSuffix(addresses[at], "/"))
		if api.KindOf(err) != api.Unavailable {
			h.last.Store(uint32(at))
			return err
		}
		failures = append(failures, err)
		if !again {
			break
		}
	}
	return joinErrors(api.Unavailable, failures)
}

// joinErrors is one error of a kind for all of errs.
func joinErrors(kind api.Kind, errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	return api.Errorf(kind, "%w", errors.Join(errs...))
}

func (h *HTTP) request(ctx context.Context, method, url string, body io.Reader) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, api.Errorf(api.Invalid, "blob: %w", err)
	}
	// Ranges and lengths are those of the blob, so nothing may be compressed.
	req.Header.Set("Accept-Encoding", "identity")
	if h.config.Replica {
		req.Header.Set(ReplicaHeader, "1")
	}
	if h.config.Authorization != nil {
		value, err := h.config.Authorization(ctx)
		if err != nil {
			return nil, err
		}
		if value != "" {
			req.Header.Set("Authorization", value)
		}
	}
	return req, nil
}

// do returns an answer that is a success; whatever else came is an error with
// the kind that its status stands for.
func (h *HTTP) do(req *http.Request) (*http.Response, error) {
	resp, err := h.client.Do(req)
	if err != nil {
		return nil, api.Errorf(api.Unavailable, "%w", err)
	}
	switch resp.StatusCode {
	case http.StatusOK, http.StatusPartialContent, http.StatusCreated:
		return resp, nil
	case http.StatusTemporaryRedirect:
		if req.Header.Get(directHeader) != "" {
			return resp, nil
		}
	}
	defer resp.Body.Close()
	kind := api.KindOfHTTP(resp.StatusCode)
	if resp.StatusCode == http.StatusBadGateway || resp.StatusCode == http.StatusGatewayTimeout {
		kind = api.Unavailable // a proxy whose scheduler is gone
	}
	var answer errorBody
	err = json.NewDecoder(io.LimitReader(resp.Body, maxErrorBytes)).Decode(&answer)
	if err != nil || answer.Error == "" { // an answer to HEAD has no body
		name := strings.TrimPrefix(req.URL.Path, pathPrefix)
		return nil, api.Errorf(kind, "blob %s: %s answered %s", name, req.URL.Host, resp.Status)
	}
	return nil, api.Errorf(kind, "%s", answer.Error)
}

func setLength(header http.Header, size int64) {
	header.Set("Content-Length", strconv.FormatInt(size, 10))
}
