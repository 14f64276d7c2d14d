package outputs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"
	"pgregory.net/rapid"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

var generous = Limits{Bytes: 1 << 20, Files: 100}

const (
	files = musterpb.OutputMode_OUTPUT_MODE_FILES
	lines = musterpb.OutputMode_OUTPUT_MODE_LINES
)

func lay(t testing.TB, tree map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range tree {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// pack writes an archive and reads it back into memory.
func pack(t testing.TB, dir string, mode musterpb.OutputMode, items []Item, limits Limits) ([]*musterpb.ManifestItem, []byte, error) {
	t.Helper()
	dst := filepath.Join(t.TempDir(), "archive")
	manifest, summary, err := Write(t.Context(), dir, mode, items, dst, limits)
	if err != nil {
		if _, statErr := os.Stat(dst); statErr == nil {
			t.Errorf("a failed archive was left behind")
		}
		return nil, nil, err
	}
	b, err := os.ReadFile(dst)
	if err != nil {
		t.Fatal(err)
	}
	if summary.Digest != api.DigestOf(b) || summary.ArchiveBytes != int64(len(b)) {
		t.Errorf("summary %+v of %d bytes", summary, len(b))
	}
	var want []uint64
	total, n := int64(0), 0
	for i, item := range items {
		want = append(want, item.Index)
		total += manifest[i].OutputBytes
		n += int(manifest[i].Files)
	}
	if total != summary.OutputBytes || n != summary.Files {
		t.Errorf("summary %+v, manifest %d bytes %d files", summary, total, n)
	}
	if err := CheckManifest(&musterpb.Manifest{Items: manifest}, want, int64(len(b))); err != nil {
		t.Error(err)
	}
	return manifest, b, nil
}

func show(t testing.TB, archive []byte, mi *musterpb.ManifestItem) string {
	t.Helper()
	opened, err := OpenItem(t.Context(), bytes.NewReader(archive), mi, generous)
	if err != nil {
		t.Fatal(err)
	}
	var parts []string
	for _, f := range opened {
		parts = append(parts, f.Path+"="+string(f.Data))
	}
	return strings.Join(parts, " ")
}

func TestFiles(t *testing.T) {
	dir := lay(t, map[string]string{"7/b.png": "B", "7/a/x": "A", "9/y": "", "10/z": "Z", "log.txt": "not an item's"})
	manifest, archive, err := pack(t, dir, files, []Item{{Index: 0, Value: 7}, {Index: 2, Value: 9}, {Index: 3, Value: 10}}, generous)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"a/x=A b.png=B", "y=", "z=Z"} {
		if got := show(t, archive, manifest[i]); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	dst := filepath.Join(t.TempDir(), "7")
	if err := Extract(t.Context(), bytes.NewReader(archive), manifest[0], dst, generous); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dst, "a", "x")); err != nil || string(b) != "A" {
		t.Errorf("%q %v", b, err)
	}
	if err := Extract(t.Context(), bytes.NewReader(archive), manifest[0], dst, generous); api.KindOf(err) != api.Conflict {
		t.Errorf("%v", err)
	}
}

func TestSingleItem(t *testing.T) {
	for _, test := range []struct {
		tree map[string]string
		want string
	}{
		{map[string]string{"a": "1", "d/b": "2"}, "a=1 d/b=2"},
		{map[string]string{"7/a": "1", "b": "2"}, "a=1"},
		{map[string]string{"7": "1"}, "7=1"},
	} {
		manifest, archive, err := pack(t, lay(t, test.tree), files, []Item{{Value: 7}}, generous)
		if err != nil {
			t.Fatal(err)
		}
		if got := show(t, archive, manifest[0]); got != test.want {
			t.Errorf("%q, want %q", got, test.want)
		}
	}
}

// Results must never look different because of a release: customers and
// receipts compare them.
func TestItemDigestIsStable(t *testing.T) {
	manifest, _, err := pack(t, lay(t, map[string]string{"a": "1", "d/b": "2"}), files, []Item{{Value: 7}}, generous)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprintf("%x", manifest[0].OutputDigest), "445f775a87f3ac16f58bebcfc95a9997d6224a00952664c274a2fd8db9eb8a38"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// A file far larger than the compressor's window comes back too.
func TestLargeFile(t *testing.T) {
	content := make([]byte, 3*maxWindow+1)
	rand.NewChaCha8([32]byte{}).Read(content)
	limits := Limits{Bytes: int64(len(content)), Files: 1}
	manifest, archive, err := pack(t, lay(t, map[string]string{"x": string(content)}), files, []Item{{}}, limits)
	if err != nil {
		t.Fatal(err)
	}
	opened, err := OpenItem(t.Context(), bytes.NewReader(archive), manifest[0], limits)
	if err != nil || !bytes.Equal(opened[0].Data, content) {
		t.Error(err)
	}
}

// Moving a byte between two files, or between name and content, changes the
// digest.
func TestItemDigestsDiffer(t *testing.T) {
	seen := map[string]int{}
	for i, tree := range []map[string]string{
		{"a": "12", "b": ""}, {"a": "1", "b": "2"}, {"a": "", "b": "12"}, {"a": "12"}, {"a1": "2"}, {"a/b": "12"}, {"a\u200b": "12"},
	} {
		manifest, _, err := pack(t, lay(t, tree), files, []Item{{Value: 7}}, generous)
		if err != nil {
			t.Fatal(err)
		}
		digest := string(manifest[0].OutputDigest)
		if other, ok := seen[digest]; ok {
			t.Errorf("%d and %d have the same digest", i, other)
		}
		seen[digest] = i
	}
}

func TestFileErrors(t *testing.T) {
	special := func(make func(path string) error) string {
		dir := lay(t, map[string]string{"1/ok": "x", "2/ok": "x"})
		if err := make(filepath.Join(dir, "2", "odd")); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	linked := lay(t, map[string]string{"1/ok": "x"})
	if err := os.Symlink("1", filepath.Join(linked, "2")); err != nil {
		t.Fatal(err)
	}
	empty := lay(t, map[string]string{"1/ok": "x"})
	if err := os.MkdirAll(filepath.Join(empty, "2", "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat(strings.Repeat("d", 200)+"/", 6) + "x"
	many := map[string]string{"1/ok": "x"}
	for i := range 101 {
		many[fmt.Sprintf("2/%03d", i)] = ""
	}
	sparse := lay(t, map[string]string{"1/ok": "x", "2/big": ""})
	if err := os.Truncate(filepath.Join(sparse, "2", "big"), 1<<40); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ dir, want string }{
		{lay(t, map[string]string{"1/ok": "x", "0002/x": ""}), `item 2: /out/2 is missing; the program writes the files of an item into the directory named like its value; /out holds 0002, 1`},
		{t.TempDir(), `item 1: /out/1 is missing; the program writes the files of an item into the directory named like its value; /out is empty`},
		{lay(t, map[string]string{"1/ok": "x", "2": ""}), `item 2: /out/2 is a file; write the item's files into a directory of this name`},
		{linked, `item 2: /out/2 is a symbolic link; write the files themselves`},
		{empty, `item 2: /out/2 holds no files`},
		{special(func(p string) error { return os.Symlink("/etc/passwd", p) }), `item 2: /out/2/odd is a symbolic link; outputs are files and directories`},
		{special(func(p string) error { return syscall.Mkfifo(p, 0o600) }), `item 2: /out/2/odd is a named pipe; outputs are files and directories`},
		{lay(t, map[string]string{"1/ok": "x", "2/a\nb": ""}), `item 2: "/out/2/a\nb" has a name with control characters, a backslash or broken UTF-8`},
		{lay(t, map[string]string{"1/ok": "x", `2/a\b`: ""}), `item 2: /out/2/a\b has a name with control characters, a backslash or broken UTF-8`},
		{lay(t, map[string]string{"1/ok": "x", "2/" + long: ""}), `item 2: /out/2/` + long[:193] + `… has a path that is too long`},
		{lay(t, many), `item 2: /out/2 holds more than the limit of 100 files`},
		{lay(t, map[string]string{"1/a": strings.Repeat("x", 1<<19), "2/b": strings.Repeat("x", 1<<19+1)}), `item 2: /out/2/b takes the outputs above the limit of 1048576 bytes; ask for more with resources.disk`},
		{sparse, `item 2: /out/2/big takes the outputs above the limit of 1048576 bytes; ask for more with resources.disk`},
	} {
		_, _, err := pack(t, test.dir, files, []Item{{Index: 0, Value: 1}, {Index: 1, Value: 2}}, generous)
		if api.KindOf(err) != api.Invalid || err == nil || err.Error() != test.want {
			t.Errorf("%v\nwant %s", err, test.want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err := Write(ctx, lay(t, map[string]string{"x": "x"}), files, []Item{{Value: 1}}, filepath.Join(t.TempDir(), "a"), generous)
	if api.KindOf(err) != api.Unavailable || !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestLines(t *testing.T) {
	plain := []Item{{Index: 3, Value: 3}, {Index: 5, Value: 5}}
	ids := []Item{{Index: 3, Value: 3, CustomID: "a"}, {Index: 5, Value: 5, CustomID: "b"}, {Index: 6, Value: 6}}
	for _, test := range []struct {
		items   []Item
		results string
		want    []string
		err     string
	}{
		{plain, "{\"index\":5,\"x\":1}\n{\"index\": 3}\n", []string{`line.json={"index": 3}`, `line.json={"index":5,"x":1}`}, ""},
		{plain, "{\"index\":3}\r\n\n{\"index\":5}", []string{`line.json={"index":3}`, `line.json={"index":5}`}, ""},
		{ids, "{\"custom_id\":\"b\",\"index\":9}\n{\"index\":6}\n{\"custom_id\":\"a\"}\n", []string{`line.json={"custom_id":"a"}`, `line.json={"custom_id":"b","index":9}`, `line.json={"index":6}`}, ""},
		{plain, "{\"custom_id\":\"b\",\"index\":5}\n{\"index\":3}\n", []string{`line.json={"index":3}`, `line.json={"custom_id":"b","index":5}`}, ""},
		{plain, "{\"index\":3}\n", nil, `item 5: /out/results.jsonl has no line with its "index" (1 items lack one: 5)`},
		{plain, "", nil, `item 3: no line of /out/results.jsonl has the field "index" that tells which item it is of`},
		{plain, "{}\n{}\n", nil, `item 3: no line of /out/results.jsonl has the field "index" that tells which item it is of`},
		{ids, "{}\n", nil, `item 3: no line of /out/results.jsonl has the field "custom_id" or "index" that tells which item it is of`},
		{plain, "{\"index\":3}\n{\"index\":3}\n", nil, `/out/results.jsonl: line 2 is a second result of item 3; the first is line 1`},
		{plain, "{\"index\":4}\n", nil, `/out/results.jsonl: line 1 has the index 4, which is no item of this task`},
		{plain, "{\"index\":3.0}\n", nil, `/out/results.jsonl: line 1 has the index "3.0"; want the whole number of an item`},
		{plain, "{\"index\":\"3\"}\n", nil, `/out/results.jsonl: line 1 has the index "\"3\""; want the whole number of an item`},
		{ids, "{\"custom_id\":\"z\"}\n", nil, `/out/results.jsonl: line 1 has the custom_id "z", which is no item of this task`},
		{ids, "{\"custom_id\":7}\n", nil, `/out/results.jsonl: line 1 has the custom_id "7"; want a string`},
		{ids, "{\"custom_id\":\"a\"}\n{\"index\":3}\n", nil, `/out/results.jsonl: line 2 is a second result of item 3; the first is line 1`},
		{plain, "\n[1]\n", nil, `/out/results.jsonl: line 2 is not a JSON object: "[1]"`},
		{plain, "null\n", nil, `/out/results.jsonl: line 1 is not a JSON object: "null"`},
		{plain, "{\"index\":3", nil, `/out/results.jsonl: line 1 is not a JSON object: "{\"index\":3"`},
		{[]Item{{CustomID: "a"}, {Index: 1, Value: 1, CustomID: "a"}}, "{}", nil, `item 1: its input line has the custom_id "a" of item 0; every custom_id may be there once`},
	} {
		manifest, archive, err := pack(t, lay(t, map[string]string{ResultsFile: test.results}), lines, test.items, generous)
		if test.err != "" {
			if api.KindOf(err) != api.Invalid || err == nil || err.Error() != test.err {
				t.Errorf("%q: %v\nwant %s", test.results, err, test.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", test.results, err)
			continue
		}
		for i, want := range test.want {
			if got := show(t, archive, manifest[i]); got != want {
				t.Errorf("%q, want %q", got, want)
			}
		}
	}
	for _, test := range []struct {
		make func(dir string) error
		want string
	}{
		{func(dir string) error { return os.WriteFile(filepath.Join(dir, "out.json"), nil, 0o644) },
			`item 3: /out/results.jsonl is missing; the program writes one line per item into it; /out holds out.json`},
		{func(dir string) error { return os.Symlink("/etc/passwd", filepath.Join(dir, ResultsFile)) }, `item 3: /out/results.jsonl is a symbolic link; write a file`},
		{func(dir string) error { return os.Mkdir(filepath.Join(dir, ResultsFile), 0o755) }, `item 3: /out/results.jsonl is a directory; write a file`},
	} {
		dir := t.TempDir()
		if err := test.make(dir); err != nil {
			t.Fatal(err)
		}
		if _, _, err := pack(t, dir, lines, plain, generous); api.KindOf(err) != api.Invalid || err.Error() != test.want {
			t.Errorf("%v\nwant %s", err, test.want)
		}
	}
}

func TestLongLines(t *testing.T) {
	long := `{"index":0,"x":"` + strings.Repeat("y", MaxLineBytes) + "\"}\n"
	_, _, err := pack(t, lay(t, map[string]string{ResultsFile: long}), lines, []Item{{}}, Limits{Bytes: 1 << 30, Files: 1})
	if err == nil || err.Error() != "/out/results.jsonl: line 1 has more than 16777216 bytes" {
		t.Errorf("%v", err)
	}
	fits := `{"index":0,"x":"` + strings.Repeat("y", MaxLineBytes-18) + "\"}\n"
	if _, _, err := pack(t, lay(t, map[string]string{ResultsFile: fits}), lines, []Item{{}}, Limits{Bytes: 1 << 30, Files: 1}); err != nil {
		t.Errorf("%v", err)
	}
}

func TestInputLines(t *testing.T) {
	dir := lay(t, map[string]string{
		"p.jsonl":  "{\"custom_id\":\"a\"}\nplain text\r\n{\"custom_id\":5}\n{\"x\":1,\"custom_id\":\"d\"}",
		"hole":     "a\n\nb\n",
		"nothing":  "",
		"long":     strings.Repeat("x", MaxLineBytes+1),
		"trailing": "a\n\n",
	})
	p := filepath.Join(dir, "p.jsonl")
	if n, err := CountLines(p); err != nil || n != 4 {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := CountLines(filepath.Join(dir, "nothing")); err != nil || n != 0 {
		t.Errorf("%d, %v", n, err)
	}
	if ids, err := CustomIDs(p, []uint64{0, 1, 2, 3}); err != nil || !slices.Equal(ids, []string{"a", "", "", "d"}) {
		t.Errorf("%q, %v", ids, err)
	}
	if ids, err := CustomIDs(p, []uint64{3}); err != nil || !slices.Equal(ids, []string{"d"}) {
		t.Errorf("%q, %v", ids, err)
	}
	for name, want := range map[string]string{
		"hole":     ": line 2 is empty; every line is an item, so remove it",
		"trailing": ": line 2 is empty; every line is an item, so remove it",
		"long":     ": line 1 has more than 16777216 bytes",
		"none":     ": there is no such file",
	} {
		path := filepath.Join(dir, name)
		if _, err := CountLines(path); err == nil || err.Error() != path+want {
			t.Errorf("%v; want %s", err, want)
		}
	}
	if _, err := CustomIDs(p, []uint64{1, 4}); err == nil || err.Error() != p+": has no line 5" {
		t.Errorf("%v", err)
	}
}

// frame is a frame as a hostile worker might build it, and a manifest item that
// fits it.
func frame(t testing.TB, tail string, headers ...*tar.Header) ([]byte, *musterpb.ManifestItem) {
	var b bytes.Buffer
	z, _ := zstd.NewWriter(&b)
	w := tar.NewWriter(z)
	mi := &musterpb.ManifestItem{OutputDigest: make([]byte, 32)}
	for _, h := range headers {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			io.CopyN(w, zeros{}, h.Size)
			mi.OutputBytes += h.Size
		}
		mi.Files++
	}
	w.Close()
	io.WriteString(z, tail)
	z.Close()
	mi.Length = int64(b.Len())
	return b.Bytes(), mi
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestOpenItemRefuses(t *testing.T) {
	file := func(name string, size int64) *tar.Header {
		return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size}
	}
	for _, test := range []struct {
		name    string
		headers []*tar.Header
		tail    string
		change  func(mi *musterpb.ManifestItem)
		kind    api.Kind
		want    string
	}{
		{"digest", []*tar.Header{file("a", 1)}, "", nil, api.Invalid, "do not match the digest"},
		{"parent", []*tar.Header{file("../a", 1)}, "", nil, api.Invalid, "../a is not a plain relative path"},
		{"absolute", []*tar.Header{file("/a", 1)}, "", nil, api.Invalid, "/a is not a plain relative path"},
		{"link", []*tar.Header{{Typeflag: tar.TypeSymlink, Name: "a", Linkname: "/"}}, "", nil, api.Invalid, "a is not a file"},
		{"order", []*tar.Header{file("b", 1), file("a", 1)}, "", nil, api.Invalid, "a is out of order"},
		{"twice", []*tar.Header{file("a", 1), file("a", 1)}, "", nil, api.Invalid, "a is out of order"},
		{"below a file", []*tar.Header{file("a", 1), file("a.b", 1), file("a/b", 1)}, "", nil, api.Invalid, "a/b lies below a file"},
		{"more files", []*tar.Header{file("a", 1), file("b", 0)}, "", func(mi *musterpb.ManifestItem) { mi.Files = 1 }, api.Invalid, "more files than the manifest declares"},
		{"fewer files", []*tar.Header{file("a", 1)}, "", func(mi *musterpb.ManifestItem) { mi.Files = 2 }, api.Invalid, "1 bytes in 1 files; the manifest declares 1 in 2"},
		{"more bytes", []*tar.Header{file("a", 10)}, "", func(mi *musterpb.ManifestItem) { mi.OutputBytes = 9 }, api.Invalid, "more bytes than the manifest declares"},
		{"fewer bytes", []*tar.Header{file("a", 10)}, "", func(mi *musterpb.ManifestItem) { mi.OutputBytes = 11 }, api.Invalid, "holds 10 bytes"},
		{"tail", []*tar.Header{file("a", 1)}, "hidden", nil, api.Invalid, "bytes behind its end"},
		{"bomb", []*tar.Header{file("a", 1)}, strings.Repeat("\x00", 8<<20), nil, api.Invalid, "unpacks to more than the manifest declares"},
		{"declared bomb", []*tar.Header{file("a", 2<<20)}, "", nil, api.TooLarge, "the limits are 1048576 bytes and 100 files"},
		{"cut short", []*tar.Header{file("a", 1)}, "", func(mi *musterpb.ManifestItem) { mi.Length -= 5 }, api.Invalid, "the frame is damaged"},
		{"beyond the archive", []*tar.Header{file("a", 1)}, "", func(mi *musterpb.ManifestItem) { mi.Offset = 1 << 40 }, api.Invalid, "index 0"},
		{"negative", []*tar.Header{file("a", 1)}, "", func(mi *musterpb.ManifestItem) { mi.Offset = -1 }, api.Invalid, "negative size"},
	} {
		archive, mi := frame(t, test.tail, test.headers...)
		if test.change != nil {
			test.change(mi)
		}
		_, err := OpenItem(t.Context(), bytes.NewReader(archive), mi, generous)
		if api.KindOf(err) != test.kind || !strings.Contains(fmt.Sprint(err), test.want) {
			t.Errorf("%s: %v; want %s", test.name, err, test.want)
		}
		dst := filepath.Join(t.TempDir(), "x")
		if err := Extract(t.Context(), bytes.NewReader(archive), mi, dst, generous); err == nil {
			t.Errorf("%s: extracted", test.name)
		}
		if left, err := os.ReadDir(filepath.Dir(dst)); err != nil || len(left) > 0 {
			t.Errorf("%s: left %v, %v", test.name, left, err)
		}
	}
}

// A store that fails is not the worker's fault.
func TestOpenItemTellsTheStoresErrors(t *testing.T) {
	archive, mi := frame(t, "", &tar.Header{Typeflag: tar.TypeReg, Name: "a", Size: 1})
	_, err := OpenItem(t.Context(), failing{}, mi, generous)
	if api.KindOf(err) != api.Unavailable {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := OpenItem(ctx, bytes.NewReader(archive), mi, generous); api.KindOf(err) != api.Unavailable {
		t.Errorf("%v", err)
	}
	stop := errors.New("stop")
	err = WalkItem(t.Context(), bytes.NewReader(archive), mi, generous, func(string, int64, io.Reader) error { return stop })
	if err != stop {
		t.Errorf("%v", err)
	}
}

type failing struct{}

func (failing) ReadAt([]byte, int64) (int, error) { return 0, api.Errorf(api.Unavailable, "down") }

func TestCheckManifest(t *testing.T) {
	valid := func() *musterpb.Manifest {
		digest := make([]byte, 32)
		return &musterpb.Manifest{Items: []*musterpb.ManifestItem{
			{Index: 1, OutputDigest: digest, Offset: 0, Length: 10, OutputBytes: 5, Files: 1},
			{Index: 4, OutputDigest: digest, Offset: 10, Length: 7, OutputBytes: 0, Files: 2},
		}}
	}
	if err := CheckManifest(valid(), []uint64{1, 4}, 17); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		change func(*musterpb.Manifest)
		want   string
	}{
		{func(m *musterpb.Manifest) { m.Items = m.Items[:1] }, "the manifest lists 1 items in place of 2"},
		{func(m *musterpb.Manifest) { m.Items[1].Index = 3 }, "the manifest lists index 3 in place of 4"},
		{func(m *musterpb.Manifest) { m.Items[1] = nil }, "the manifest lists index 0 in place of 4"},
		{func(m *musterpb.Manifest) { m.Items[1].OutputDigest = nil }, "index 4: the output digest has 0 bytes; want 32"},
		{func(m *musterpb.Manifest) { m.Items[1].Offset = 9 }, "index 4: the frame starts at 9; the one before it ends at 10"},
		{func(m *musterpb.Manifest) { m.Items[1].Length = 8 }, "index 4: a frame of 8 bytes at 10 does not fit the archive of 17"},
		{func(m *musterpb.Manifest) { m.Items[1].Length = 1 << 62 }, "index 4: a frame of 4611686018427387904 bytes at 10 does not fit the archive of 17"},
		{func(m *musterpb.Manifest) { m.Items[1].Length = 6 }, "the frames end at 16; the archive has 17 bytes"},
		{func(m *musterpb.Manifest) { m.Items[0].Length = -1 }, "index 1: a frame of -1 bytes at 0 does not fit the archive of 17"},
		{func(m *musterpb.Manifest) { m.Items[0].OutputBytes = -1 }, "index 1: -1 bytes in 1 files"},
		{func(m *musterpb.Manifest) { m.Items[0].Files = 0 }, "index 1: 5 bytes in 0 files"},
	} {
		m := valid()
		test.change(m)
		if err := CheckManifest(m, []uint64{1, 4}, 17); api.KindOf(err) != api.Invalid || err == nil || err.Error() != test.want {
			t.Errorf("%v; want %s", err, test.want)
		}
	}
}

// What goes in comes out, byte for byte, and any changed byte of the archive is
// noticed or harmless.
func TestRoundTripProperty(t *testing.T) {
	parent := t.TempDir()
	name := rapid.StringMatching(`[a-c](/[d-f]{1,2}){0,2}\.[xy]`)
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(parent, "x")
		if err != nil {
			rt.Fatal(err)
		}
		defer os.RemoveAll(dir)
		out := filepath.Join(dir, "out")
		var items []Item
		var trees []map[string]string
		for i := range rapid.IntRange(1, 4).Draw(rt, "items") {
			tree := rapid.MapOfN(name, rapid.String(), 1, 4).Draw(rt, "tree")
			for name, content := range tree {
				path := filepath.Join(out, fmt.Sprint(i*10), name)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					rt.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
					rt.Fatal(err)
				}
			}
			items = append(items, Item{Index: uint64(i), Value: uint64(i * 10)})
			trees = append(trees, tree)
		}
		dst := filepath.Join(dir, "archive")
		manifest, _, err := Write(t.Context(), out, files, items, dst, generous)
		if err != nil {
			rt.Fatal(err)
		}
		archive, err := os.ReadFile(dst)
		if err != nil {
			rt.Fatal(err)
		}
		check := func() error {
			for i, mi := range manifest {
				opened, err := OpenItem(t.Context(), bytes.NewReader(archive), mi, generous)
				if err != nil {
					return err
				}
				if len(opened) != len(trees[i]) {
					rt.Fatalf("%d files, want %d", len(opened), len(trees[i]))
				}
				for _, f := range opened {
					if trees[i][f.Path] != string(f.Data) {
						rt.Fatalf("%s: %q, want %q", f.Path, f.Data, trees[i][f.Path])
					}
				}
			}
			return nil
		}
		if err := check(); err != nil {
			rt.Fatal(err)
		}
		at := rapid.IntRange(0, len(archive)-1).Draw(rt, "at")
		archive[at] ^= 1 << rapid.IntRange(0, 7).Draw(rt, "bit")
		if err := check(); err != nil && api.KindOf(err) != api.Invalid {
			rt.Fatal(err)
		}
	})
}

// FuzzOpenItem reads an archive of which everything is the attacker's, under a
// manifest that is his too.
func FuzzOpenItem(f *testing.F) {
	dir := lay(f, map[string]string{"0/a": "hello", "0/b/c": "", "1/x": strings.Repeat("x", 1000)})
	manifest, archive, err := pack(f, dir, files, []Item{{}, {Index: 1, Value: 1}}, generous)
	if err != nil {
		f.Fatal(err)
	}
	m, _ := (&musterpb.Manifest{Items: manifest}).MarshalVT()
	f.Add(m, archive)
	bad, mi := frame(f, "x", &tar.Header{Typeflag: tar.TypeReg, Name: "../a", Size: 1})
	m, _ = (&musterpb.Manifest{Items: []*musterpb.ManifestItem{mi}}).MarshalVT()
	f.Add(m, bad)
	limits := Limits{Bytes: 1 << 16, Files: 8}
	f.Fuzz(func(t *testing.T, encoded, archive []byte) {
		m := &musterpb.Manifest{}
		if m.UnmarshalVT(encoded) != nil {
			return
		}
		var want []uint64
		for _, mi := range m.Items {
			want = append(want, mi.GetIndex())
		}
		checked := CheckManifest(m, want, int64(len(archive))) == nil
		for _, mi := range m.Items {
			opened, err := OpenItem(t.Context(), bytes.NewReader(archive), mi, limits)
			if err != nil {
				if kind := api.KindOf(err); kind != api.Invalid && kind != api.TooLarge {
					t.Fatalf("%s: %v", kind, err)
				}
				continue
			}
			total := int64(0)
			for _, f := range opened {
				total += int64(len(f.Data))
			}
			if total != mi.OutputBytes || total > limits.Bytes || len(opened) != int(mi.Files) || checked && len(opened) == 0 {
				t.Fatalf("%d bytes in %d files under %v", total, len(opened), mi)
			}
		}
	})
}

func FuzzLines(f *testing.F) {
	f.Add([]byte("{\"index\":0}\n{\"custom_id\":\"b\"}\n"))
	f.Fuzz(func(t *testing.T, results []byte) {
		items := []Item{{Index: 0}, {Index: 1, Value: 1, CustomID: "b"}}
		found, err := matchLines(bytes.NewReader(results), items)
		if err != nil {
			if api.KindOf(err) != api.Invalid {
				t.Fatal(err)
			}
			return
		}
		for _, at := range found {
			if line := results[at.offset : at.offset+at.length]; len(line) == 0 || bytes.ContainsRune(line, '\n') {
				t.Fatalf("line %q", line)
			}
		}
	})
}
