package blob

import (
	"bytes"
	"io"
	"testing"

	"github.com/musternet/muster/api"
)

func TestSections(t *testing.T) {
	store, ctx := &Memory{}, t.Context()
	data := []byte("one result, and another")
	digest := api.DigestOf(data)
	if _, err := store.Put(ctx, digest, bytes.NewReader(data), NoLimit); err != nil {
		t.Fatal(err)
	}
	r, err := OpenSection(ctx, store, digest, 4, 6)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || string(got) != "result" || r.Size() != 6 {
		t.Errorf("read %q of %d, %v", got, r.Size(), err)
	}
	got, err := ReadSection(ctx, store, digest, 16, 7, api.DigestOf([]byte("another")))
	if err != nil || string(got) != "another" {
		t.Errorf("read %q, %v", got, err)
	}
	if _, err := ReadSection(ctx, store, digest, 15, 7, api.DigestOf([]byte("another"))); api.KindOf(err) != api.Internal {
		t.Errorf("bytes with another digest: %v", err)
	}
	for _, part := range [][2]int64{{-1, 2}, {0, -1}, {0, 24}, {23, 1}, {1 << 62, 1 << 62}} {
		if _, err := OpenSection(ctx, store, digest, part[0], part[1]); api.KindOf(err) != api.Invalid {
			t.Errorf("%d bytes at %d: %v", part[1], part[0], err)
		}
	}
	if _, err := OpenSection(ctx, store, api.DigestOf(nil), 0, 0); api.KindOf(err) != api.NotFound {
		t.Errorf("a blob that is not there: %v", err)
	}
}
