package image

import (
	"context"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/musternet/muster/api"
)

// noLogins keeps the tests away from the docker configuration of the machine.
func noLogins(t *testing.T) {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", t.TempDir())
}

func serve(t *testing.T, h http.Handler) (host string) {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func parse(t *testing.T, ref string) name.Reference {
	t.Helper()
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestResolve(t *testing.T) {
	noLogins(t)
	host := serve(t, registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	ctx := context.Background()

	single := smallImage(t, 400, "linux/amd64")
	if err := remote.Write(parse(t, host+"/acme/single:v1"), single); err != nil {
		t.Fatal(err)
	}
	digest, err := single.Digest()
	if err != nil {
		t.Fatal(err)
	}
	want := host + "/acme/single@" + digest.String()
	for _, ref := range []string{host + "/acme/single:v1", want} {
		pinned, platforms, err := Resolve(ctx, ref)
		if err != nil || pinned != want || !slices.Equal(platforms, []string{"linux/amd64"}) {
			t.Errorf("%s: %q %v %v; want %q", ref, pinned, platforms, err, want)
		}
	}

	var index v1.ImageIndex = empty.Index
	for i, p := range []string{"linux/arm64/v8", "linux/amd64", "unknown/unknown"} {
		platform, err := v1.ParsePlatform(p)
		if err != nil {
			t.Fatal(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: smallImage(t, 10+i, p), Descriptor: v1.Descriptor{Platform: platform}})
	}
	if err := remote.WriteIndex(parse(t, host+"/acme/multi:v1"), index); err != nil {
		t.Fatal(err)
	}
	pinned, platforms, err := Resolve(ctx, host+"/acme/multi:v1")
	if err != nil || !strings.HasPrefix(pinned, host+"/acme/multi@sha256:") || !slices.Equal(platforms, []string{"linux/amd64", "linux/arm64"}) {
		t.Errorf("%q %v %v", pinned, platforms, err)
	}

	if err := remote.Write(parse(t, host+"/acme/blank:v1"), empty.Image); err != nil {
		t.Fatal(err)
	}
	for ref, kind := range map[string]api.Kind{
		host + "/acme/single:v2":                              api.NotFound,
		host + "/acme/none:v1":                                api.NotFound,
		host + "/acme/none@sha256:" + strings.Repeat("0", 64): api.NotFound,
		host + "/acme/blank:v1":                               api.Unsupported,
		"":                                                    api.Invalid,
		"UPPER/case":                                          api.Invalid,
		host + "/acme/single@sha256:12":                       api.Invalid,
	} {
		if _, _, err := Resolve(ctx, ref); api.KindOf(err) != kind {
			t.Errorf("%q: error %v of kind %v; want %v", ref, err, api.KindOf(err), kind)
		}
	}
}

func TestResolveTellsRegistryErrorsApart(t *testing.T) {
	noLogins(t)
	for status, kind := range map[int]api.Kind{
		http.StatusUnauthorized:    api.Unauthenticated,
		http.StatusForbidden:       api.Denied,
		http.StatusTooManyRequests: api.Exhausted,
		http.StatusNotImplemented:  api.Unavailable,
	} {
		host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/v2/" {
				return
			}
			w.WriteHeader(status)
		}))
		if _, _, err := Resolve(context.Background(), host+"/a/b:c"); api.KindOf(err) != kind {
			t.Errorf("status %d: error %v of kind %v; want %v", status, err, api.KindOf(err), kind)
		}
	}
}

func TestResolveBoundsAnswers(t *testing.T) {
	noLogins(t)
	host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v2/" {
			return
		}
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		for range 3 {
			if _, err := w.Write(make([]byte, maxDocumentBytes/2)); err != nil {
				return
			}
		}
	}))
	if _, _, err := Resolve(context.Background(), host+"/a/b:c"); api.KindOf(err) != api.TooLarge {
		t.Errorf("error %v of kind %v; want %v", err, api.KindOf(err), api.TooLarge)
	}
}

func TestResolveStopsWithItsContext(t *testing.T) {
	noLogins(t)
	release := make(chan struct{})
	host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-release }))
	defer close(release)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, _, err := Resolve(ctx, host+"/a/b:c"); api.KindOf(err) != api.Unavailable {
		t.Errorf("error %v of kind %v; want %v", err, api.KindOf(err), api.Unavailable)
	}
}
