package blob

import (
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"github.com/musternet/muster/api"
)

// The protocol, one path per blob:
//
//	PUT  /blob/{digest}   stores the body; 200 with {"digest", "size"}
//	GET  /blob/{digest}   the bytes; Range works
//	HEAD /blob/{digest}   the size, as Content-Length
//
// A large blob is sent in parts that survive a broken connection, and before its
// digest is known (uploads.go):
//
//	POST   /blob/uploads       begins; Muster-Upload-Length tells how much comes;
//	                           201 with {"upload", "offset"}
//	PATCH  /blob/uploads/{id}  appends the body, which starts at
//	                           Muster-Upload-Offset; 200 with {"upload", "offset"}
//	HEAD   /blob/uploads/{id}  the Muster-Upload-Offset to go on from
//	DELETE /blob/uploads/{id}  gives it up
//	PUT    /blob/{digest}      with Muster-Upload and no body: stores what came
//
// Where the store is a bucket of an object store that can sign URLs, bytes need
// not pass through here (direct.go):
//
//	GET  /blob/{digest}   with Muster-Direct: 307 to the object store
//	POST /blob/{digest}   with Muster-Upload-Length: 200 with {"url", "header"} of
//	                      the PUT that stores the blob there
//
// An error is {"error": text, "kind": name} under the status of its kind.

// Path is the path under which a blob is served.
func Path(digest api.Digest) string { return pathPrefix + string(digest) }

const (
	pathPrefix  = "/blob/"
	uploadsPath = pathPrefix + "uploads"
)

// ReplicaHeader marks a request from one replica to another, which concerns
// what that one holds itself.
const ReplicaHeader = "Muster-Replica"

// The headers of uploads.
const (
	uploadHeader       = "Muster-Upload"
	uploadOffsetHeader = "Muster-Upload-Offset"
	uploadLengthHeader = "Muster-Upload-Length"
)

// directHeader says that the client follows a redirect to the object store.
const directHeader = "Muster-Direct"

// Caller is whoever a request is from. What one caller may have under way at the
// same time is bounded; a scheduler, Peer, is not.
type Caller struct {
	ID   string
	Peer bool
}

// Handler serves store under /blob/. Every request passes authorize first;
// limit bounds the bytes of one blob.
func Handler(store Store, authorize func(*http.Request) (Caller, error), limit int64) http.Handler {
	return &handler{
		store: store, authorize: authorize, limit: limit,
		uploads: newUploads(limit), traffic: newTraffic(), idle: maxIdle,
	}
}

type handler struct {
	store     Store
	authorize func(*http.Request) (Caller, error)
	limit     int64
	uploads   *uploads
	traffic   *traffic
	idle      time.Duration
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// The bytes are somebody else's: no browser may take them for a page.
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if err := h.serve(w, r); err != nil {
		if r.Context().Err() != nil {
			// A request's context is its connection's: if that ended and the client
			// still hears, its next request there would fail too.
			w.Header().Set("Connection", "close")
		}
		writeError(w, err)
	}
}

func (h *handler) serve(w http.ResponseWriter, r *http.Request) error {
	caller, err := h.authorize(r)
	if err != nil {
		return err
	}
	store := h.store
	if replicated, ok := store.(*Replicated); ok && r.Header.Get(ReplicaHeader) != "" {
		store = replicated.local
	}
	name, ok := strings.CutPrefix(r.URL.Path, pathPrefix)
	if !ok {
		return api.Errorf(api.NotFound, "no page %s; blobs are at %ssha256:…", r.URL.Path, pathPrefix)
	}
	if id, ok := strings.CutPrefix(r.URL.Path, uploadsPath); ok {
		return h.upload(w, r, store, caller, strings.TrimPrefix(id, "/"))
	}
	digest, err := api.ParseDigest(name)
	if err != nil {
		return err
	}
	switch r.Method {
	case http.MethodPut:
		return h.put(w, r, store, caller, digest)
	case http.MethodPost:
		return h.ticket(w, r, store, caller, digest)
	case http.MethodGet:
		return h.get(w, r, store, caller, digest)
	case http.MethodHead:
		return h.head(w, r, store, digest)
	}
	return refuseMethod(w, r, "GET, HEAD, POST, PUT", "GET, HEAD, POST or PUT")
}

func refuseMethod(w http.ResponseWriter, r *http.Request, allow, want string) error {
	w.Header().Set("Allow", allow)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusMethodNotAllowed)
	json.NewEncoder(w).Encode(errorBody{"method " + r.Method + ": want " + want, api.Invalid.String()})
	return nil
}

func (h *handler) put(w http.ResponseWriter, r *http.Request, store Store, caller Caller, digest api.Digest) error {
	if id := r.Header.Get(uploadHeader); id != "" {
		size, err := h.uploads.commit(r.Context(), caller, id, digest)
		if err != nil {
			return err
		}
		return writeStored(w, digest, size)
	}
	if r.ContentLength > h.limit {
		return api.Errorf(api.TooLarge, "blob %s: %d bytes, more than the limit of %d", digest, r.ContentLength, h.limit)
	}
	done, err := h.traffic.enter(r.Context(), caller)
	if err != nil {
		return err
	}
	defer done()
	size, err := store.Put(r.Context(), digest, h.body(w, r), h.limit)
	if err != nil {
		return err
	}
	return writeStored(w, digest, size)
}

func writeStored(w http.ResponseWriter, digest api.Digest, size int64) error {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(struct {
		Digest api.Digest `json:"digest"`
		Size   int64      `json:"size"`
	}{digest, size})
	return nil
}

func (h *handler) get(w http.ResponseWriter, r *http.Request, store Store, caller Caller, digest api.Digest) error {
	if bucket, ok := store.(*Bucket); ok && r.Header.Get(directHeader) != "" {
		signed, err := bucket.signGet(r.Context(), digest)
		if err == nil {
			w.Header().Set("Cache-Control", "no-store")
			w.Header().Set("Location", signed)
			w.WriteHeader(http.StatusTemporaryRedirect)
			return nil
		}
		if api.KindOf(err) != api.Unsupported {
			return err
		}
	}
	done, err := h.traffic.enter(r.Context(), caller)
	if err != nil {
		return err
	}
	defer done()
	blob, err := store.Open(r.Context(), digest)
	if err != nil {
		return err
	}
	defer blob.Close()
	setHeaders(w, digest)
	paced := &pacedWriter{w, http.NewResponseController(w), h.idle}
	defer paced.release()
	http.ServeContent(paced, r, "", time.Time{}, blob)
	return nil
}

// ticket answers with where to put a blob.
func (h *handler) ticket(w http.ResponseWriter, r *http.Request, store Store, caller Caller, digest api.Digest) error {
	size, err := announced(r.Header.Get(uploadLengthHeader), Caller{ID: caller.ID}, h.limit)
	if err != nil {
		return err
	}
	bucket, ok := store.(*Bucket)
	if !ok {
		return errNotDirect
	}
	t, err := bucket.signPut(r.Context(), digest, size)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	json.NewEncoder(w).Encode(t)
	return nil
}

func (h *handler) head(w http.ResponseWriter, r *http.Request, store Store, digest api.Digest) error {
	size, err := store.Stat(r.Context(), digest)
	if err != nil {
		return err
	}
	setHeaders(w, digest)
	w.Header().Set("Accept-Ranges", "bytes")
	setLength(w.Header(), size)
	return nil
}

func setHeaders(w http.ResponseWriter, digest api.Digest) {
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("ETag", `"`+digest.Hex()+`"`)
	w.Header().Set("Cache-Control", "private, max-age=31536000, immutable")
}

type errorBody struct {
	Error string `json:"error"`
	Kind  string `json:"kind"`
}

func writeError(w http.ResponseWriter, err error) {
	kind := api.KindOf(err)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(kind.HTTP())
	json.NewEncoder(w).Encode(errorBody{err.Error(), kind.String()})
}
