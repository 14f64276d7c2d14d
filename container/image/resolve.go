package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/musternet/muster/api"
)

// Resolve pins a registry reference ("python:3.13", "host/name@sha256:…") to
// the digest that it stands for now, and says which platforms are behind it,
// sorted: "linux/amd64". It uses the logins of this machine's docker
// configuration, and plain HTTP for a registry on this machine alone.
//
// Errors have a kind: Invalid for a malformed reference, NotFound,
// Unauthenticated and Denied as the registry says, Exhausted for its rate limit,
// Unsupported for what is no runnable image, Unavailable when it did not answer.
func Resolve(ctx context.Context, ref string) (pinned string, platforms []string, err error) {
	parsed, err := name.ParseReference(ref)
	if err != nil {
		return "", nil, api.Errorf(api.Invalid, "image %q is not a reference: %w", ref, err)
	}
	found, err := remote.Get(parsed,
		remote.WithContext(ctx),
		remote.WithAuthFromKeychain(authn.DefaultKeychain),
		remote.WithTransport(boundedTransport{remote.DefaultTransport}),
		remote.WithUserAgent("muster"),
	)
	if err != nil {
		return "", nil, registryError(ref, err)
	}
	switch {
	case found.MediaType.IsIndex():
		platforms, err = indexPlatforms(found)
	case found.MediaType.IsImage():
		platforms, err = imagePlatform(found)
	default:
		err = api.Errorf(api.Unsupported, "%s is of type %s, which no runtime here takes: rebuild it with a current builder", ref, found.MediaType)
	}
	if err != nil {
		return "", nil, registryError(ref, err)
	}
	if len(platforms) == 0 {
		return "", nil, api.Errorf(api.Unsupported, "%s names no platform to run on", ref)
	}
	slices.Sort(platforms)
	return parsed.Context().Digest(found.Digest.String()).Name(), slices.Compact(platforms), nil
}

func indexPlatforms(found *remote.Descriptor) ([]string, error) {
	index, err := found.ImageIndex()
	if err != nil {
		return nil, err
	}
	list, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	if len(list.Manifests) > maxManifests {
		return nil, api.Errorf(api.TooLarge, "the index has %d images: want at most %d", len(list.Manifests), maxManifests)
	}
	var platforms []string
	for _, d := range list.Manifests {
		if p := d.Platform; p != nil && p.OS != "" && p.Architecture != "" && !attached(d) {
			platforms = append(platforms, platformName(p.OS, p.Architecture, p.Variant))
		}
	}
	return platforms, nil
}

func imagePlatform(found *remote.Descriptor) ([]string, error) {
	img, err := found.Image()
	if err != nil {
		return nil, err
	}
	m, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	if !m.Config.MediaType.IsConfig() {
		return nil, api.Errorf(api.Unsupported, "its configuration is of type %s: an artifact, not an image", m.Config.MediaType)
	}
	var c *v1.ConfigFile
	if c, err = img.ConfigFile(); err != nil {
		return nil, err
	}
	if c.OS == "" || c.Architecture == "" {
		return nil, nil
	}
	return []string{platformName(c.OS, c.Architecture, c.Variant)}, nil
}

// registryError gives an error of a registry, or of the way to it, its kind.
func registryError(ref string, err error) error {
	var known *api.Error
	if errors.As(err, &known) {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	var answer *transport.Error
	if !errors.As(err, &answer) {
		return api.Errorf(api.Unavailable, "image %s: the registry did not answer as one: %w", ref, err)
	}
	switch answer.StatusCode {
	case http.StatusNotFound:
		return api.Errorf(api.NotFound, "image %s: the registry has no such image: %w", ref, err)
	case http.StatusUnauthorized:
		return api.Errorf(api.Unauthenticated, "image %s: it does not exist, or it needs a login: %w", ref, err)
	case http.StatusForbidden:
		return api.Errorf(api.Denied, "image %s: the registry denies access: %w", ref, err)
	case http.StatusTooManyRequests:
		return api.Errorf(api.Exhausted, "image %s: the registry's rate limit is used up: %w", ref, err)
	}
	return api.Errorf(api.Unavailable, "image %s: the registry answered %d: %w", ref, answer.StatusCode, err)
}

// boundedTransport ends an answer that is longer than any manifest or
// configuration: a registry is somebody else's machine.
type boundedTransport struct{ next http.RoundTripper }

func (t boundedTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := t.next.RoundTrip(r)
	if err == nil {
		answer.Body = &boundedBody{ReadCloser: answer.Body, left: maxDocumentBytes}
	}
	return answer, err
}

type boundedBody struct {
	io.ReadCloser
	left int64
}

func (b *boundedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, api.Errorf(api.TooLarge, "the registry sent more than %d bytes", maxDocumentBytes)
	}
	return n, err
}
