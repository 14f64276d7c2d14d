package blob

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/musternet/muster/api"
)

// minDirect is the size from which a client asks for a way past the schedulers.
const minDirect = 1 << 20

// directPause is how long a client leaves an object store alone that it could
// not talk to, as behind a firewall, or that the cluster does not have.
const directPause = 10 * time.Minute

func (h *HTTP) wantsDirect(until *atomic.Int64) bool {
	return !h.config.Replica && time.Now().UnixNano() >= until.Load()
}

func (h *HTTP) notDirect(until *atomic.Int64) { until.Store(time.Now().Add(directPause).UnixNano()) }

// follow repeats a request for bytes at the URL that a scheduler sent it to. The
// object store learns nothing that is meant for schedulers: no key, no header
// but the range.
func (h *HTTP) follow(from *http.Request, redirect *http.Response) (*http.Response, error) {
	target, err := url.Parse(redirect.Header.Get("Location"))
	if err != nil || target.Host == "" || target.Scheme != "https" && target.Scheme != "http" {
		return nil, api.Errorf(api.Unavailable, "%s sent the request on to %q", from.URL.Host, redirect.Header.Get("Location"))
	}
	req, err := http.NewRequestWithContext(from.Context(), http.MethodGet, target.String(), nil)
	if err != nil {
		return nil, api.Errorf(api.Unavailable, "%w", err)
	}
	req.Header.Set("Accept-Encoding", "identity")
	if r := from.Header.Get("Range"); r != "" {
		req.Header.Set("Range", r)
	}
	resp, err := h.client.Do(req)
	if err != nil {
		return nil, api.Errorf(api.Unavailable, "the object store at %s: %w", target.Host, withoutURL(err))
	}
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusPartialContent {
		resp.Body.Close()
		return nil, api.Errorf(api.Unavailable, "the object store at %s answered %s", target.Host, resp.Status)
	}
	return resp, nil
}

// withoutURL keeps a signed URL, which is a key for a while, out of messages.
func withoutURL(err error) error {
	if e, ok := err.(*url.Error); ok {
		return e.Err
	}
	return err
}

// putDirect puts a blob into the object store behind the schedulers. An error
// says that it is better sent through them.
func (h *HTTP) putDirect(ctx context.Context, digest api.Digest, r io.ReadSeeker, start, length int64) error {
	if length > maxSignedPut || !h.wantsDirect(&h.noPuts) {
		return errNotDirect // what is too large says nothing about the next blob
	}
	var t ticket
	err := h.each(func(base string) (again bool, err error) {
		t, err = h.ticket(ctx, base, digest, length)
		return true, err
	})
	if err == nil {
		err = h.redeem(ctx, t, r, start, length)
	}
	if err == nil {
		// The schedulers have the last word on whether it is there.
		_, err = h.Stat(ctx, digest)
	}
	if err != nil && ctx.Err() == nil {
		h.notDirect(&h.noPuts)
	}
	return err
}

func (h *HTTP) ticket(ctx context.Context, base string, digest api.Digest, length int64) (t ticket, err error) {
	req, err := h.request(ctx, http.MethodPost, base+Path(digest), http.NoBody)
	if err != nil {
		return t, err
	}
	req.Header.Set(uploadLengthHeader, strconv.FormatInt(length, 10))
	resp, err := h.do(req)
	if err != nil {
		return t, err
	}
	defer resp.Body.Close()
	return decodeTicket(io.LimitReader(resp.Body, maxErrorBytes))
}

// decodeTicket reads a ticket. The scheduler names the place and the checksum;
// no other header of ours is its business.
func decodeTicket(r io.Reader) (t ticket, err error) {
	if err := json.NewDecoder(r).Decode(&t); err != nil {
		return t, api.Errorf(api.Unavailable, "a scheduler's answer is cut short: %w", err)
	}
	u, err := url.Parse(t.URL)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return ticket{}, api.Errorf(api.Unsupported, "a scheduler named a place for blobs that is no URL")
	}
	for name := range t.Header {
		if http.CanonicalHeaderKey(name) != checksumHeader || len(t.Header) > 1 {
			return ticket{}, api.Errorf(api.Unsupported, "a scheduler asks for the header %q, which this client does not know", name)
		}
	}
	return t, nil
}

// redeem sends length bytes of r to where a ticket says.
func (h *HTTP) redeem(ctx context.Context, t ticket, r io.ReadSeeker, start, length int64) error {
	if _, err := r.Seek(start, io.SeekStart); err != nil {
		return api.Errorf(api.Internal, "reading what is sent: %w", err)
	}
	ctx, watch := watchTransfer(ctx, h.idle)
	defer watch.stop()
	body := &body{in: newIntake(ctx, io.LimitReader(r, length), NoLimit), watch: watch}
	defer body.end()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, t.URL, body)
	if err != nil {
		return api.Errorf(api.Unavailable, "%w", withoutURL(err))
	}
	for name, value := range t.Header {
		req.Header.Set(name, value)
	}
	req.ContentLength = length
	resp, err := h.client.Do(req)
	if err != nil {
		return watch.explain(api.Errorf(api.Unavailable, "the object store at %s: %w", req.URL.Host, withoutURL(err)))
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusCreated {
		return api.Errorf(api.Unavailable, "the object store at %s answered %s", req.URL.Host, resp.Status)
	}
	return nil
}
