package outputs

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// Build and Write agree on every item and on every byte of the archive: where
// the outputs came from shows nowhere.
func TestBuildIsWriteInMemory(t *testing.T) {
	parent := t.TempDir()
	name := rapid.StringMatching(`[a-c](/[d-f]{1,2}){0,2}\.[xy]`)
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(parent, "x")
		if err != nil {
			rt.Fatal(err)
		}
		defer os.RemoveAll(dir)
		var items []Item
		var inMemory []ItemFiles
		for i := range rapid.IntRange(1, 4).Draw(rt, "items") {
			item := Item{Index: uint64(i), Value: uint64(i * 10)}
			with := ItemFiles{Item: item}
			for name, content := range rapid.MapOfN(name, rapid.String(), 1, 4).Draw(rt, "tree") {
				path := filepath.Join(dir, "out", fmt.Sprint(item.Value), name)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					rt.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
					rt.Fatal(err)
				}
				with.Files = append(with.Files, File{name, []byte(content)})
			}
			items, inMemory = append(items, item), append(inMemory, with)
		}
		dst := filepath.Join(dir, "archive")
		want, wantSummary, err := Write(t.Context(), filepath.Join(dir, "out"), files, items, dst, generous)
		if err != nil {
			rt.Fatal(err)
		}
		wantArchive, err := os.ReadFile(dst)
		if err != nil {
			rt.Fatal(err)
		}
		archive, got, summary, err := Build(inMemory, generous)
		if err != nil {
			rt.Fatal(err)
		}
		if !bytes.Equal(archive, wantArchive) || summary != wantSummary || summary.Digest != api.DigestOf(archive) {
			rt.Fatalf("%d bytes, %+v; want %d, %+v", len(archive), summary, len(wantArchive), wantSummary)
		}
		if !slices.EqualFunc(got, want, func(a, b *musterpb.ManifestItem) bool { return a.EqualVT(b) }) {
			rt.Fatalf("%v; want %v", got, want)
		}
	})
}

func TestBuildRefuses(t *testing.T) {
	item := func(names ...string) ItemFiles {
		it := ItemFiles{Item: Item{Index: 1, Value: 7}}
		for _, n := range names {
			it.Files = append(it.Files, File{n, []byte("x")})
		}
		return it
	}
	large := item("a", "b")
	large.Files[1].Data = make([]byte, 1<<20)
	many := item()
	for i := range 101 {
		many.Files = append(many.Files, File{Path: fmt.Sprint(i)})
	}
	for _, test := range []struct {
		items []ItemFiles
		want  string
	}{
		{[]ItemFiles{item()}, "item 7: has no files"},
		{[]ItemFiles{item("a", "../b")}, "item 7: ../b is not a plain relative path"},
		{[]ItemFiles{item("a\n")}, `item 7: "a\n" has a name with control characters, a backslash or broken UTF-8`},
		{[]ItemFiles{item("a", "b", "a")}, "item 7: has a file twice"},
		{[]ItemFiles{item("a/b/c", "a.b", "a")}, "item 7: a/b/c lies below a file"},
		{[]ItemFiles{item("ok"), large}, "item 7: b takes the outputs above the limit of 1048576 bytes"},
		{[]ItemFiles{many}, "item 7: has more than the limit of 100 files"},
	} {
		archive, manifest, _, err := Build(test.items, generous)
		if api.KindOf(err) != api.Invalid || err == nil || err.Error() != test.want || archive != nil || manifest != nil {
			t.Errorf("%v; want %s", err, test.want)
		}
	}
}

// An item on either side of the size up to which it is packed in one piece comes
// back, from memory and from disk.
func TestBothSidesOfSmall(t *testing.T) {
	content := make([]byte, 2*maxSmall)
	rand.NewChaCha8([32]byte{}).Read(content)
	limits := Limits{Bytes: 1 << 20, Files: 1}
	for _, size := range []int{0, 1, maxSmall - 2*tarOverhead - 1, maxSmall - 2*tarOverhead, maxSmall - 2*tarOverhead + 1, maxSmall, 2 * maxSmall} {
		archive, manifest, _, err := Build([]ItemFiles{{Files: []File{{"x", content[:size]}}}}, limits)
		if err != nil {
			t.Fatal(err)
		}
		opened, err := OpenItem(t.Context(), bytes.NewReader(archive), manifest[0], limits)
		if err != nil || !bytes.Equal(opened[0].Data, content[:size]) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

// What comes out of a pool remembers nothing of its last use, be that one cut
// short.
func TestPooledCodersForget(t *testing.T) {
	big := make([]byte, 2*maxSmall)
	rand.NewChaCha8([32]byte{1}).Read(big)
	items := []ItemFiles{
		{Item: Item{Index: 0}, Files: []File{{"x", big}}},
		{Item: Item{Index: 1}, Files: []File{{"x", []byte("small")}}},
	}
	archive, manifest, first, err := Build(items, generous)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		for _, mi := range manifest {
			cut := mi.CloneVT()
			cut.Length -= 3
			if _, err := OpenItem(t.Context(), bytes.NewReader(archive), cut, generous); api.KindOf(err) != api.Invalid {
				t.Fatal(err)
			}
			stop := io.ErrClosedPipe
			if err := WalkItem(t.Context(), bytes.NewReader(archive), mi, generous, func(string, int64, io.Reader) error { return stop }); err != stop {
				t.Fatal(err)
			}
			if _, err := OpenItem(t.Context(), bytes.NewReader(archive), mi, generous); err != nil {
				t.Fatal(err)
			}
		}
		if _, _, again, err := Build(items, generous); err != nil || again != first {
			t.Fatalf("%+v, %v; want %+v", again, err, first)
		}
	}
}

// tiny is a task of items with 20 bytes each, as a scheduler sees thousands of a
// second.
func tiny(n int) []ItemFiles {
	items := make([]ItemFiles, n)
	for i := range items {
		items[i] = ItemFiles{Item: Item{Index: uint64(i)}, Files: []File{{LineFile, []byte(strings.Repeat("0123456789", 2))}}}
	}
	return items
}

func BenchmarkBuildTinyItem(b *testing.B) {
	b.ReportAllocs()
	items := tiny(1000)
	for done := 0; done < b.N; done += len(items) {
		if _, _, _, err := Build(items[:min(len(items), b.N-done)], generous); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBuildOneTinyItem(b *testing.B) {
	b.ReportAllocs()
	items := tiny(1)
	for b.Loop() {
		if _, _, _, err := Build(items, generous); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWalkTinyItem(b *testing.B) {
	b.ReportAllocs()
	archive, manifest, _, err := Build(tiny(1000), generous)
	if err != nil {
		b.Fatal(err)
	}
	r := bytes.NewReader(archive)
	visit := func(string, int64, io.Reader) error { return nil }
	for i := 0; b.Loop(); i++ {
		if err := WalkItem(b.Context(), r, manifest[i%len(manifest)], generous, visit); err != nil {
			b.Fatal(err)
		}
	}
}
