package worker

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/musternet/muster/container"
)

func TestImagesAreBoundedByLastUse(t *testing.T) {
	ctx := t.Context()
	path := filepath.Join(t.TempDir(), "images.json")
	var gone []string
	var stuck string
	forget := func(_ context.Context, runtime string, image container.Image) error {
		if image.Digest == stuck {
			return errors.New("in use by somebody else")
		}
		gone = append(gone, runtime+" "+image.Digest)
		return nil
	}
	s, err := openImages(path, 100, forget)
	if err != nil {
		t.Fatal(err)
	}
	use := func(digest string, bytes int64) func() {
		t.Helper()
		release, err := s.use(ctx, "docker", container.Image{Digest: digest}, bytes)
		if err != nil {
			t.Fatal(err)
		}
		return release
	}
	expect := func(want ...string) {
		t.Helper()
		if !slices.Equal(gone, want) {
			t.Fatalf("forgotten: %q, want %q", gone, want)
		}
		gone = nil
	}

	a, b := use("a", 40), use("b", 40)
	a()
	a() // releasing twice releases once
	b()
	use("a", 40)() // a is newer than b now
	use("c", 40)()
	expect("docker b")

	hold := use("a", 40)
	again := use("a", 40)
	again()
	use("d", 90)()
	expect("docker c") // a is in use, though it is older
	hold()

	stuck = "a"
	use("e", 90)()
	expect("docker d")
	stuck = ""

	// Another process knows what this one left.
	if s, err = openImages(path, 100, forget); err != nil {
		t.Fatal(err)
	}
	use("f", 60)()
	expect("docker a", "docker e")

	if _, err := s.use(ctx, "docker", container.Image{Ref: "host/name@sha256:00", Digest: "g"}, 0); err != nil {
		t.Fatal(err)
	}
	expect("docker f") // an image from a registry counts as large

	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openImages(path, 100, forget); err == nil {
		t.Error("a damaged list is taken")
	}
}
