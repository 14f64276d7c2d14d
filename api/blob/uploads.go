package blob

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/musternet/muster/api"
)

// Bounds of the unfinished uploads of one caller. They live in the memory and
// on the disk of the scheduler that they were begun at, and end with it.
const (
	maxUploads    = 64
	uploadExpires = time.Hour // without a byte
)

// uploads are the blobs that come in parts.
type uploads struct {
	limit int64 // of one blob; twice that for a caller's unfinished ones

	mu       sync.Mutex // guards sessions and their fields that say so
	sessions map[string]*session
}

// session is one upload.
type session struct {
	id     string
	caller Caller
	size   int64 // as announced
	turn   chan struct{}
	staged staged // belongs to whoever has the turn
	// Guarded by uploads.mu:
	expiry    *time.Timer
	interrupt func() // ends the request that has the turn; nil for none
	ended     bool
}

func newUploads(limit int64) *uploads {
	return &uploads{limit: limit, sessions: make(map[string]*session)}
}

// upload serves everything below uploadsPath.
func (h *handler) upload(w http.ResponseWriter, r *http.Request, store Store, caller Caller, id string) error {
	if id == "" {
		if r.Method != http.MethodPost {
			return refuseMethod(w, r, "POST", "POST")
		}
		size, err := announced(r.Header.Get(uploadLengthHeader), caller, h.limit)
		if err != nil {
			return err
		}
		at, ok := store.(stager)
		if !ok {
			return api.Errorf(api.Unsupported, "this store takes no blob in parts; PUT it as a whole")
		}
		s, err := h.uploads.begin(r.Context(), at, caller, size)
		if err != nil {
			return err
		}
		if r.Context().Err() != nil {
			h.uploads.drop(s) // nobody will hear its name
		}
		return writeUpload(w, http.StatusCreated, s.id, 0)
	}
	switch r.Method {
	case http.MethodPatch:
		return h.append(w, r, caller, id)
	case http.MethodHead:
		s, err := h.uploads.take(r.Context(), caller, id, nil)
		if err != nil {
			return err
		}
		defer h.uploads.release(s)
		w.Header().Set(uploadOffsetHeader, strconv.FormatInt(s.staged.length(), 10))
		return nil
	case http.MethodDelete:
		s, err := h.uploads.take(r.Context(), caller, id, nil)
		if err == nil {
			h.uploads.end(s)
			h.uploads.release(s)
		}
		return err
	}
	return refuseMethod(w, r, "DELETE, HEAD, PATCH", "DELETE, HEAD or PATCH")
}

// announced is the size that a caller says it will send. A scheduler that
// passes on a stream need not know it.
func announced(text string, caller Caller, limit int64) (int64, error) {
	if text == "" && caller.Peer {
		return limit, nil
	}
	size, err := strconv.ParseInt(text, 10, 64)
	if err != nil || size < 0 {
		return 0, api.Errorf(api.Invalid, "%s %q: want the number of bytes that will be sent", uploadLengthHeader, text)
	}
	if size > limit {
		return 0, api.Errorf(api.TooLarge, "%d bytes, more than the limit of %d", size, limit)
	}
	return size, nil
}

func writeUpload(w http.ResponseWriter, status int, id string, offset int64) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(uploadBody{id, offset})
	return nil
}

type uploadBody struct {
	Upload string `json:"upload"`
	Offset int64  `json:"offset"`
}

func (h *handler) append(w http.ResponseWriter, r *http.Request, caller Caller, id string) error {
	offset, err := strconv.ParseInt(r.Header.Get(uploadOffsetHeader), 10, 64)
	if err != nil {
		return api.Errorf(api.Invalid, "%s %q: want the offset of the body in the blob", uploadOffsetHeader, r.Header.Get(uploadOffsetHeader))
	}
	done, err := h.traffic.enter(r.Context(), caller)
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	control := http.NewResponseController(w)
	s, err := h.uploads.take(ctx, caller, id, func() {
		cancel()
		_ = control.SetReadDeadline(time.Now()) // whoever waits for bytes waits no longer
	})
	if err != nil {
		return err
	}
	defer h.uploads.release(s)
	if have := s.staged.length(); offset != have {
		return api.Errorf(api.Conflict, "upload %s: the body starts at %d, and %d bytes are here; go on from there", id, offset, have)
	}
	in := newIntake(ctx, h.body(w, r.WithContext(ctx)), s.size)
	if err := s.staged.append(in); err != nil {
		if in.failed == nil || api.KindOf(err) == api.TooLarge {
			h.uploads.end(s) // some of what was read is not here
		}
		return err
	}
	return writeUpload(w, http.StatusOK, id, s.staged.length())
}

// begin makes a session.
func (u *uploads) begin(ctx context.Context, at stager, caller Caller, size int64) (*session, error) {
	s := &session{id: rand.Text(), caller: caller, size: size, turn: make(chan struct{}, 1)}
	if err := u.admit(s); err != nil {
		return nil, err
	}
	var err error
	if s.staged, err = at.stage(ctx); err != nil {
		u.forget(s)
		return nil, err
	}
	u.mu.Lock()
	s.expiry = time.AfterFunc(uploadExpires, func() { u.drop(s) })
	u.mu.Unlock()
	u.release(s)
	return s, nil
}

// admit counts the session among its caller's; it has the turn then.
func (u *uploads) admit(s *session) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	count, total := 1, s.size
	for _, other := range u.sessions {
		if other.caller == s.caller {
			count++
			total += other.size
		}
	}
	if !s.caller.Peer && (count > maxUploads || total < 0 || total/2 > u.limit) {
		return api.Errorf(api.Exhausted, "this key has %d unfinished uploads of %d bytes together; finish or delete some, or wait until they expire after %s",
			count-1, total-s.size, uploadExpires)
	}
	s.turn <- struct{}{}
	u.sessions[s.id] = s
	return nil
}

// take gives the session's turn to a request. It interrupts the request that has
// it: a client that asks again has lost its connection, which this side may not
// have noticed. Interrupt is called for the same reason; nil for a request that
// does not wait for bytes.
func (u *uploads) take(ctx context.Context, caller Caller, id string, interrupt func()) (*session, error) {
	u.mu.Lock()
	s := u.sessions[id]
	if s == nil || s.caller != caller {
		u.mu.Unlock()
		return nil, noUpload(id)
	}
	if s.interrupt != nil {
		s.interrupt()
	}
	u.mu.Unlock()
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, api.Errorf(api.Unavailable, "upload %s: the call ended while another one had it: %w", id, ctx.Err())
	}
	u.mu.Lock()
	ended := s.ended
	s.interrupt = interrupt
	u.mu.Unlock()
	if ended {
		<-s.turn
		return nil, noUpload(id)
	}
	return s, nil
}

func noUpload(id string) error {
	return api.Errorf(api.NotFound, "there is no upload %s (any more); begin a new one", id)
}

// release ends a request's turn.
func (u *uploads) release(s *session) {
	u.mu.Lock()
	s.interrupt = nil
	if !s.ended {
		s.expiry.Reset(uploadExpires)
	}
	u.mu.Unlock()
	<-s.turn
}

// end forgets a session; the caller has its turn.
func (u *uploads) end(s *session) {
	u.forget(s)
	s.staged.discard()
}

func (u *uploads) forget(s *session) {
	u.mu.Lock()
	defer u.mu.Unlock()
	s.ended = true
	if s.expiry != nil {
		s.expiry.Stop()
	}
	delete(u.sessions, s.id)
}

// drop ends a session that nobody uses.
func (u *uploads) drop(s *session) {
	select {
	case s.turn <- struct{}{}:
		u.mu.Lock()
		ended := s.ended
		u.mu.Unlock()
		if !ended {
			u.end(s)
		}
		<-s.turn
	default: // somebody does; release starts the time again
	}
}

// commit stores what came as a blob, and ends the session either way: whoever
// fails begins a new one.
func (u *uploads) commit(ctx context.Context, caller Caller, id string, digest api.Digest) (int64, error) {
	s, err := u.take(ctx, caller, id, nil)
	if err != nil {
		return 0, err
	}
	defer u.release(s)
	defer u.end(s)
	size := s.staged.length()
	return size, s.staged.commit(ctx, digest)
}
