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
// An error is {"error": text, "kind": name} under the status of its kind.

// Path is the path under which a blob is served.
func Path(digest api.Digest) string { return pathPrefix + string(digest) }

const pathPrefix = "/blob/"

// ReplicaHeader marks a request from one replica to another, which concerns
// what that one holds itself.
const ReplicaHeader = "Muster-Replica"

// Handler serves store under /blob/. Every request passes authorize first;
// limit bounds the bytes of one blob.
func Handler(store Store, authorize func(*http.Request) error, limit int64) http.Handler {
	return &handler{store: store, authorize: authorize, limit: limit}
}

type handler struct {
	store     Store
	authorize func(*http.Request) error
	limit     int64
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// The bytes are somebody else's: no browser may take them for a page.
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if err := h.authorize(r); err != nil {
		writeError(w, err)
		return
	}
	name, ok := strings.CutPrefix(r.URL.Path, pathPrefix)
	if !ok {
		writeError(w, api.Errorf(api.NotFound, "no page %s; blobs are at %ssha256:…", r.URL.Path, pathPrefix))
		return
	}
	digest, err := api.ParseDigest(name)
	if err != nil {
		writeError(w, err)
		return
	}
	store := h.store
	if replicated, ok := store.(*Replicated); ok && r.Header.Get(ReplicaHeader) != "" {
		store = replicated.local
	}
	switch r.Method {
	case http.MethodPut:
		h.put(w, r, store, digest)
	case http.MethodGet:
		h.get(w, r, store, digest)
	case http.MethodHead:
		h.head(w, r, store, digest)
	default:
		w.Header().Set("Allow", "GET, HEAD, PUT")
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusMethodNotAllowed)
		json.NewEncoder(w).Encode(errorBody{"method " + r.Method + ": want GET, HEAD or PUT", api.Invalid.String()})
	}
}

func (h *handler) put(w http.ResponseWriter, r *http.Request, store Store, digest api.Digest) {
	if r.ContentLength > h.limit {
		writeError(w, api.Errorf(api.TooLarge, "blob %s: %d bytes, more than the limit of %d", digest, r.ContentLength, h.limit))
		return
	}
	size, err := store.Put(r.Context(), digest, r.Body, h.limit)
	if err != nil {
		writeError(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(struct {
		Digest api.Digest `json:"digest"`
		Size   int64      `json:"size"`
	}{digest, size})
}

func (h *handler) get(w http.ResponseWriter, r *http.Request, store Store, digest api.Digest) {
	blob, err := store.Open(r.Context(), digest)
	if err != nil {
		writeError(w, err)
		return
	}
	defer blob.Close()
	setHeaders(w, digest)
	http.ServeContent(w, r, "", time.Time{}, blob)
}

func (h *handler) head(w http.ResponseWriter, r *http.Request, store Store, digest api.Digest) {
	size, err := store.Stat(r.Context(), digest)
	if err != nil {
		writeError(w, err)
		return
	}
	setHeaders(w, digest)
	w.Header().Set("Accept-Ranges", "bytes")
	setLength(w.Header(), size)
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
