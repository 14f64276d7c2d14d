package server

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"strings"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// NewKey makes an API key for an account: "muster_<account>_<random>". Only its
// hash is kept.
func NewKey(account string) (key string, hash []byte) {
	key = "muster_" + account + "_" + rand.Text()
	return key, HashKey(key)
}

// HashKey is what is stored of a key. Keys have 130 random bits, so that a
// plain hash can't be reversed by guessing.
func HashKey(key string) []byte {
	sum := sha256.Sum256([]byte(key))
	return sum[:]
}

type keyContext struct{}

// authenticated lets in holders of an API key, and puts the key into the
// request's context.
func (s *Server) authenticated(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key, err := s.authenticate(r.Header.Get("Authorization"))
		if err != nil {
			writeError(w, r, err)
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), keyContext{}, key)))
	})
}

func (s *Server) authenticate(header string) (*musterpb.Key, error) {
	text, ok := strings.CutPrefix(header, "Bearer ")
	if !ok || text == "" {
		return nil, api.Errorf(api.Unauthenticated, "no API key: set MUSTER_KEY, or point --dir at a directory with a client.yaml")
	}
	key := s.State.Key(HashKey(text))
	if key != nil {
		return key, nil
	}
	// A scheduler that was away may not have heard of the newest keys.
	if s.State.Cluster() == "" || s.Scheduler.CheckRead() != nil {
		return nil, api.Errorf(api.Unavailable, "this scheduler can't tell for its cluster whether the API key is known; ask another one, or later")
	}
	return nil, api.Errorf(api.Unauthenticated, "the API key %.12s… is not known to this cluster", text)
}

// caller is the key that a call was made with.
func caller(ctx context.Context) *musterpb.Key {
	key, _ := ctx.Value(keyContext{}).(*musterpb.Key)
	if key == nil {
		return &musterpb.Key{} // of no account and no role: may do nothing
	}
	return key
}

func isAdmin(ctx context.Context) bool { return caller(ctx).Role == musterpb.Role_ROLE_ADMIN }

// adminsOnly refuses everybody else.
func adminsOnly(ctx context.Context, what string) error {
	if !isAdmin(ctx) {
		return api.Errorf(api.Denied, "only an admin key may %s", what)
	}
	return nil
}

// accountFor is the account that a call is about: the key's own, or for admins
// the one that they name.
func accountFor(ctx context.Context, named string, write bool) (string, error) {
	key := caller(ctx)
	if write && key.Role == musterpb.Role_ROLE_READER {
		return "", api.Errorf(api.Denied, "a reader key may not change anything")
	}
	if named == "" || named == key.Account {
		return key.Account, nil
	}
	if key.Role != musterpb.Role_ROLE_ADMIN {
		return "", api.Errorf(api.Denied, "this key is of account %q and may not act for %q", key.Account, named)
	}
	return named, nil
}

// job is a job that the caller may see, or change with write, sealed or not.
// What belongs to others looks as if it did not exist.
func (s *Server) job(ctx context.Context, id string, write bool) (*musterpb.Job, error) {
	job := s.State.Job(id)
	if job == nil {
		var err error
		if job, err = s.History.Job(ctx, id); err != nil && api.KindOf(err) != api.NotFound {
			return nil, err
		}
	}
	if job == nil || (job.Account != caller(ctx).Account && !isAdmin(ctx)) {
		return nil, api.Errorf(api.NotFound, "job %q is not known; muster job list shows yours", id)
	}
	if write && caller(ctx).Role == musterpb.Role_ROLE_READER {
		return nil, api.Errorf(api.Denied, "a reader key may not change anything")
	}
	return job, nil
}

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

func decode(s string) []byte {
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		return nil // no signature has this form
	}
	return b
}
