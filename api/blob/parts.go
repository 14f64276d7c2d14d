package blob

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/musternet/muster/api"
)

// maxCommits is how often a blob that was sent is committed if the connection
// breaks.
const maxCommits = 2

// putInParts sends length bytes of r from start on; digest, which may still be
// computed meanwhile, is asked for once they are there. A broken connection
// costs what was under way; another scheduler begins from the start. The error is
// of kind api.Unsupported where blobs are taken as a whole only.
func (h *HTTP) putInParts(ctx context.Context, r io.ReadSeeker, start, length int64, digest func(context.Context) (api.Digest, error)) error {
	return h.each(func(base string) (again bool, err error) {
		u, err := h.begin(ctx, base, length)
		if err != nil {
			return true, err
		}
		defer u.discard()
		if err := u.sendAll(r, start, length); err != nil {
			return true, err
		}
		d, err := digest(ctx)
		if err != nil {
			return false, err
		}
		var first error // if the session ended with it, the next only says so
		for tries := 1; ; tries++ {
			err = u.commit(ctx, d)
			if err == nil || api.KindOf(err) == api.Invalid {
				return false, err
			}
			// The answer may have been lost, and not the blob.
			if _, statErr := h.Stat(ctx, d); statErr == nil {
				return false, nil
			}
			if first == nil {
				first = err
			}
			// Or the request, which would cost all that was sent.
			if tries == maxCommits || api.KindOf(err) != api.Unavailable || pause(ctx, h.delay) != nil {
				return true, first
			}
		}
	})
}

// stage implements stager: other machines are what a Replicated's peers are.
func (h *HTTP) stage(ctx context.Context) (s staged, err error) {
	err = h.each(func(base string) (again bool, err error) {
		s, err = h.begin(ctx, base, -1)
		return true, err
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// upload is a session at the machine behind base.
type upload struct {
	h         *HTTP
	ctx       context.Context
	base, id  string
	size      int64
	committed bool
}

// begin begins an upload of length bytes, -1 for a peer that does not know.
func (h *HTTP) begin(ctx context.Context, base string, length int64) (*upload, error) {
	u := &upload{h: h, ctx: ctx, base: base}
	header := make(http.Header)
	if length >= 0 {
		header.Set(uploadLengthHeader, strconv.FormatInt(length, 10))
	}
	var answer uploadBody
	if err := u.call(ctx, http.MethodPost, base+uploadsPath, header, &answer); err != nil {
		return nil, err
	}
	if !isUploadID(answer.Upload) {
		return nil, api.Errorf(api.Unavailable, "%s named an upload %q", base, answer.Upload)
	}
	u.id = answer.Upload
	return u, nil
}

// isUploadID accepts what crypto/rand.Text makes, and nothing that would mean
// something in a URL.
func isUploadID(id string) bool {
	if len(id) == 0 || len(id) > 64 {
		return false
	}
	for _, c := range []byte(id) {
		if !('A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' || '0' <= c && c <= '9') {
			return false
		}
	}
	return true
}

// call makes a request without a body.
func (u *upload) call(ctx context.Context, method, url string, header http.Header, answer any) error {
	req, err := u.h.request(ctx, method, url, http.NoBody)
	if err != nil {
		return err
	}
	for name, values := range header {
		req.Header[name] = values
	}
	resp, err := u.h.do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if answer == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxErrorBytes)).Decode(answer); err != nil {
		return api.Errorf(api.Unavailable, "%s sent an answer that is cut short: %w", req.URL.Host, err)
	}
	return nil
}

func (u *upload) url() string { return u.base + uploadsPath + "/" + u.id }

func (u *upload) length() int64 { return u.size }

// append sends what in reads as one part.
func (u *upload) append(in *intake) error {
	header := http.Header{uploadOffsetHeader: {strconv.FormatInt(u.size, 10)}}
	var answer uploadBody
	if err := u.h.sendBody(in.ctx, http.MethodPatch, u.url(), header, in, -1, &answer); err != nil {
		return err
	}
	u.size = answer.Offset
	return nil
}

// sendAll sends the whole blob, in as many parts as connections last.
func (u *upload) sendAll(r io.ReadSeeker, start, length int64) error {
	delay, stalls := u.h.delay, 0
	for u.size < length {
		before := u.size
		if _, err := r.Seek(start+before, io.SeekStart); err != nil {
			return api.Errorf(api.Internal, "reading what is sent: %w", err)
		}
		in := newIntake(u.ctx, io.LimitReader(r, length-before), NoLimit)
		err := u.append(in)
		if err == nil && u.size == before {
			return api.Errorf(api.Invalid, "became shorter while it was read; try again")
		}
		if err == nil {
			continue
		}
		if kind := api.KindOf(err); in.failed != nil || kind != api.Unavailable && kind != api.Conflict {
			return err
		}
		if have, askErr := u.ask(); askErr != nil || have < 0 || have > length {
			return fmt.Errorf("%w; %w", err, orOther(askErr))
		} else if u.size = have; have > before {
			delay, stalls = u.h.delay, 0
			continue
		}
		if stalls++; stalls == maxStalls {
			return err
		}
		if err := pause(u.ctx, delay); err != nil {
			return err
		}
		delay *= 2
	}
	return nil
}

func orOther(err error) error {
	if err == nil {
		err = api.Errorf(api.Unavailable, "the scheduler says that it has other bytes")
	}
	return err
}

// ask returns how much has arrived.
func (u *upload) ask() (have int64, err error) {
	delay := u.h.delay
	for stalls := 1; ; stalls++ {
		req, err := u.h.request(u.ctx, http.MethodHead, u.url(), nil)
		if err != nil {
			return 0, err
		}
		resp, err := u.h.do(req)
		if err == nil {
			resp.Body.Close()
			have, err = strconv.ParseInt(resp.Header.Get(uploadOffsetHeader), 10, 64)
			if err != nil {
				return 0, api.Errorf(api.Unavailable, "upload %s: the scheduler does not say how much it has", u.id)
			}
			return have, nil
		}
		if stalls == maxStalls || api.KindOf(err) != api.Unavailable {
			return 0, gone(err)
		}
		if err := pause(u.ctx, delay); err != nil {
			return 0, err
		}
		delay *= 2
	}
}

// gone makes an upload that its scheduler lost a reason to try another one, or
// the same again.
func gone(err error) error {
	if api.KindOf(err) == api.NotFound {
		return api.Errorf(api.Unavailable, "%w", err)
	}
	return err
}

// pause waits, unless ctx ends first.
func pause(ctx context.Context, delay time.Duration) error {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return api.Errorf(api.Unavailable, "the transfer was given up: %w", ctx.Err())
	}
}

func (u *upload) commit(ctx context.Context, digest api.Digest) error {
	if err := checkDigest(digest); err != nil {
		return err
	}
	var answer struct {
		Size int64 `json:"size"`
	}
	err := u.call(ctx, http.MethodPut, u.base+Path(digest), http.Header{uploadHeader: {u.id}}, &answer)
	u.committed = err == nil
	return gone(err)
}

// discardWithin bounds telling a machine that its part of a blob can go. It
// finds out by itself in an hour.
const discardWithin = 2 * time.Second

func (u *upload) discard() {
	if u.committed {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(u.ctx), discardWithin)
	defer cancel()
	_ = u.call(ctx, http.MethodDelete, u.url(), nil, nil)
}

// putFile sends a file while it is hashed, so that nobody waits for the one to
// begin the other. If the blob turns out to be there already once the digest is
// known, sending ends. The digest comes with an error of kind api.Unsupported too.
func (h *HTTP) putFile(ctx context.Context, f *os.File, size int64) (api.Digest, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sending, stopSending := context.WithCancel(ctx)
	defer stopSending()
	hashed := make(chan struct{})
	var digest api.Digest
	var hashErr error
	there := false
	go func() {
		defer close(hashed)
		if digest, hashErr = digestOf(ctx, io.NewSectionReader(f, 0, size)); hashErr != nil {
			stopSending()
			return
		}
		if _, err := h.Stat(sending, digest); err == nil {
			there = true
			stopSending()
		}
	}()
	err := h.putInParts(sending, io.NewSectionReader(f, 0, size), 0, size, func(ctx context.Context) (api.Digest, error) {
		<-hashed
		return digest, hashErr
	})
	if err != nil && api.KindOf(err) != api.Unsupported {
		cancel() // nobody needs the digest
	}
	<-hashed
	switch {
	case err == nil || there:
		return digest, nil
	case hashErr != nil && !errors.Is(hashErr, context.Canceled):
		return "", hashErr
	}
	return digest, err
}
