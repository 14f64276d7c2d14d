package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/musternet/muster/api"
)

func writeTemp(t testing.TB, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// smallOptions make an image with a binary of n bytes and one more file.
func smallOptions(t testing.TB, n int, platform string) Options {
	t.Helper()
	return Options{
		Binary:   writeTemp(t, "prog", bytes.Repeat([]byte("x"), n)),
		Files:    map[string]string{"/models/tiny/w.bin": writeTemp(t, "w", []byte("weights"))},
		Env:      []string{"LANG=C"},
		Platform: platform,
	}
}

func smallImage(t testing.TB, n int, platform string) v1.Image {
	t.Helper()
	img, err := Scratch(smallOptions(t, n, platform))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func archiveBytes(t testing.TB, img v1.Image) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := WriteArchive(&b, "muster/prog:packed", img); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// consistent compares the layers of an image with the digests that its
// configuration gives them.
func consistent(img v1.Image) error {
	config, err := img.ConfigFile()
	if err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	for i, layer := range layers {
		content, err := layer.Uncompressed()
		if err != nil {
			return err
		}
		hash, _, err := v1.SHA256(content)
		if err := errors.Join(err, content.Close()); err != nil {
			return err
		}
		if i >= len(config.RootFS.DiffIDs) || config.RootFS.DiffIDs[i] != hash {
			return fmt.Errorf("layer %d is %s, the configuration says %v", i, hash, config.RootFS.DiffIDs)
		}
	}
	return nil
}

func TestScratchIsDeterministicAndValid(t *testing.T) {
	for _, size := range []int{1, 511, 512, 513, 100_000} {
		first, second := smallImage(t, size, "linux/amd64"), smallImage(t, size, "linux/amd64")
		if err := consistent(first); err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if !bytes.Equal(archiveBytes(t, first), archiveBytes(t, second)) {
			t.Errorf("%d bytes: two archives of the same files differ", size)
		}
	}
}

func TestScratchDigestStays(t *testing.T) {
	const want = "sha256:1ab42e792a4ea825e534b2810f60bf46f4b987be53258aabefff4ed1acd3439a"
	if got := string(api.DigestOf(archiveBytes(t, smallImage(t, 1000, "linux/amd64")))); got != want {
		t.Errorf("the archive of a fixed image has digest\n%s, want\n%s", got, want)
	}
}

func TestScratchLayer(t *testing.T) {
	layers, err := smallImage(t, 700, "linux/arm64").Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("%d layers, %v", len(layers), err)
	}
	content, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close()
	var got []string
	r := tar.NewReader(content)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprintf("%s %o %d", h.Name, h.Mode, h.Size))
	}
	want := []string{"in/ 755 0", "models/ 755 0", "models/tiny/ 755 0", "models/tiny/w.bin 644 7", "out/ 755 0", "prog 755 700", "tmp/ 1777 0"}
	if !slices.Equal(got, want) {
		t.Errorf("layer\n%q, want\n%q", got, want)
	}
}

func TestScratchRefuses(t *testing.T) {
	file := writeTemp(t, "f", []byte("x"))
	for _, c := range []struct {
		change  func(*Options)
		problem string
	}{
		{func(o *Options) { o.Platform = "" }, `platform ""`},
		{func(o *Options) { o.Platform = "linux" }, `platform "linux"`},
		{func(o *Options) { o.Platform = "a/b/c/d" }, `platform "a/b/c/d"`},
		{func(o *Options) { o.Name = "a/b" }, `name "a/b"`},
		{func(o *Options) { o.Name = ".." }, `name ".."`},
		{func(o *Options) { o.Env = []string{"X"} }, `environment "X"`},
		{func(o *Options) { o.Binary = filepath.Dir(file) }, "not a regular file"},
		{func(o *Options) { o.Binary = file + ".none" }, "no such file"},
		{func(o *Options) { o.Files = map[string]string{"/prog": file} }, "/prog would be in the image twice"},
		{func(o *Options) { o.Files = map[string]string{"/": file} }, `file "/"`},
		{func(o *Options) { o.Files = map[string]string{"/a/": file} }, `file "/a/"`},
		{func(o *Options) { o.Files = map[string]string{"/prog/x": file} }, "both as a file and as a directory"},
		{func(o *Options) { o.Files = map[string]string{"/a/b": file, "/a": file} }, "/a would be in the image"},
	} {
		o := smallOptions(t, 3, "linux/amd64")
		c.change(&o)
		if _, err := Scratch(o); err == nil || !strings.Contains(err.Error(), c.problem) {
			t.Errorf("error %v; want one with %q", err, c.problem)
		}
	}
}

func TestScratchNoticesChangedFiles(t *testing.T) {
	o := smallOptions(t, 5000, "linux/amd64")
	img, err := Scratch(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(o.Binary, 10); err != nil {
		t.Fatal(err)
	}
	if err := WriteArchive(io.Discard, "prog", img); err == nil || !strings.Contains(err.Error(), "shrank") {
		t.Errorf("error %v; want one that says the file shrank", err)
	}
}

func TestInspectDockerSave(t *testing.T) {
	b := archiveBytes(t, smallImage(t, 300, "linux/amd64"))
	info, err := Inspect(writeTemp(t, "a.tar", b))
	if err != nil {
		t.Fatal(err)
	}
	if info.Format != DockerSave || !slices.Equal(info.Platforms, []string{"linux/amd64"}) ||
		!slices.Equal(info.Entrypoint, []string{"/prog"}) || !slices.Equal(info.Env, []string{"LANG=C"}) ||
		len(info.Tags) != 1 || info.Digest != api.DigestOf(b) || info.Bytes != int64(len(b)) {
		t.Errorf("%+v", info)
	}
}

// layoutTar is an OCI layout with one image per platform under a nested index,
// as builders write it.
func layoutTar(t testing.TB, skip func(name string) bool, platforms ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	var index v1.ImageIndex = empty.Index
	for i, p := range platforms {
		platform, err := v1.ParsePlatform(p)
		if err != nil {
			t.Fatal(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: smallImage(t, 100*(i+1), p), Descriptor: v1.Descriptor{Platform: platform},
		})
	}
	root, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := root.AppendIndex(index, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "prog:1"})); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil || skip != nil && skip(name) {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		_, err = w.Write(nil)
		return errors.Join(err, w.WriteHeader(&tar.Header{Name: "./" + name, Mode: 0o644, Size: int64(len(b))}), writeAll(w, b))
	})
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func writeAll(w io.Writer, b []byte) error {
	_, err := w.Write(b)
	return err
}

func TestInspectOCILayout(t *testing.T) {
	b := layoutTar(t, nil, "linux/arm64/v8", "linux/amd64", "linux/arm/v7")
	info, err := Inspect(writeTemp(t, "a.tar", b))
	if err != nil {
		t.Fatal(err)
	}
	if info.Format != OCILayout || !slices.Equal(info.Platforms, []string{"linux/amd64", "linux/arm/v7", "linux/arm64"}) ||
		!slices.Equal(info.Tags, []string{"prog:1"}) || !slices.Equal(info.Entrypoint, []string{"/prog"}) {
		t.Errorf("%+v", info)
	}
}

// An engine that holds one platform of an image saves the index of all.
func TestInspectLeavesOutPlatformsThatAreNotThere(t *testing.T) {
	digest, err := smallImage(t, 200, "linux/arm64").Digest()
	if err != nil {
		t.Fatal(err)
	}
	without := func(name string) bool { return strings.HasSuffix(name, digest.Hex) }
	info, err := Inspect(writeTemp(t, "a.tar", layoutTar(t, without, "linux/amd64", "linux/arm64")))
	if err != nil || !slices.Equal(info.Platforms, []string{"linux/amd64"}) {
		t.Errorf("%v, %v: want linux/amd64 alone", info.Platforms, err)
	}
	digest, err = smallImage(t, 100, "linux/arm64").Digest()
	if err != nil {
		t.Fatal(err)
	}
	if _, err = Inspect(writeTemp(t, "a.tar", layoutTar(t, without, "linux/arm64"))); err == nil || !strings.Contains(err.Error(), digest.Hex) {
		t.Errorf("error %v; want one that names the missing manifest", err)
	}
}

// files makes a tar of name, content pairs.
func files(t testing.TB, pairs ...string) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for i := 0; i < len(pairs); i += 2 {
		h := &tar.Header{Name: pairs[i], Mode: 0o644, Size: int64(len(pairs[i+1])), Typeflag: tar.TypeReg}
		content := pairs[i+1]
		if target, link := strings.CutPrefix(content, "-> "); link {
			h.Typeflag, h.Linkname, h.Size, content = tar.TypeSymlink, target, 0, ""
		}
		if err := errors.Join(w.WriteHeader(h), writeAll(w, []byte(content))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

const (
	oneImage = `[{"Config":"c.json","Layers":["l.tar"]}]`
	oneConf  = `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["sha256:0000000000000000000000000000000000000000000000000000000000000000"]}}`
	version  = `{"imageLayoutVersion":"1.0.0"}`
)

func TestInspectRefuses(t *testing.T) {
	good := archiveBytes(t, smallImage(t, 300, "linux/amd64"))
	if _, err := inspect(bytes.NewReader(files(t, "manifest.json", oneImage, "c.json", oneConf, "l.tar", "-> x/../m.tar", "m.tar", "layer"))); err != nil {
		t.Errorf("an archive with a linked layer: %v", err)
	}
	many := make([]string, 0, 2*(maxEntries+1))
	for i := range maxEntries + 1 {
		many = append(many, fmt.Sprintf("f%d", i), "")
	}
	deep := func(hash, kind string) string {
		return fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":%q,"size":2,"digest":"sha256:%s"}]}`, kind, hash)
	}
	emptyObject := api.DigestOf([]byte("{}")).Hex()
	for _, c := range []struct {
		name    string
		b       []byte
		kind    api.Kind
		problem string
	}{
		{"empty", nil, api.Invalid, "empty"},
		{"text", []byte(strings.Repeat("hello world\n", 100)), api.Invalid, "not a tar archive"},
		{"gzip", []byte("\x1f\x8b\x08\x00rest"), api.Unsupported, "compressed (gzip)"},
		{"zstd", []byte("\x28\xb5\x2f\xfdrest"), api.Unsupported, "compressed (zstd)"},
		{"component", []byte("\x00asm\x0d\x00\x01\x00"), api.Unsupported, "0d000100"},
		{"short wasm", []byte("\x00asm"), api.Unsupported, "version bytes"},
		{"cut", good[:1500], api.Invalid, "tar archive"},
		{"other tar", files(t, "readme", "x"), api.Invalid, "neither a docker-save nor an OCI-layout"},
		{"manifest not json", files(t, "manifest.json", "]"), api.Invalid, `"manifest.json": invalid`},
		{"no images", files(t, "manifest.json", "[]"), api.Invalid, "0 images"},
		{"two images", files(t, "manifest.json", `[{},{}]`), api.Invalid, "2 images: a job runs exactly one"},
		{"no config", files(t, "manifest.json", oneImage), api.Invalid, `"c.json" is not in the archive`},
		{"config not json", files(t, "manifest.json", oneImage, "c.json", "x"), api.Invalid, "configuration"},
		{"config without platform", files(t, "manifest.json", oneImage, "c.json", "{}"), api.Invalid, `os "" and architecture ""`},
		{"layer missing", files(t, "manifest.json", oneImage, "c.json", oneConf), api.Invalid, `"l.tar" is not in the archive`},
		{"layer count", files(t, "manifest.json", `[{"Config":"c.json"}]`, "c.json", oneConf), api.Invalid, "lists 0 layers and the configuration 1"},
		{"link loop", files(t, "manifest.json", "-> manifest.json"), api.Invalid, "neither"},
		{"config digest", files(t, "manifest.json", strings.ReplaceAll(oneImage, "c.json", "sha256:"+strings.Repeat("0", 64)), "sha256:"+strings.Repeat("0", 64), oneConf), api.Invalid, "damaged"},
		{"large manifest", files(t, "manifest.json", strings.Repeat(" ", maxDocumentBytes+1)), api.TooLarge, "want at most"},
		{"many entries", files(t, many...), api.TooLarge, "entries"},
		{"no layout", files(t, "index.json", "{}"), api.Invalid, `"oci-layout" is not`},
		{"layout version", files(t, "index.json", "{}", "oci-layout", `{"imageLayoutVersion":"9"}`), api.Unsupported, `version "9"`},
		{"empty index", files(t, "index.json", `{"manifests":[]}`, "oci-layout", version), api.Invalid, "leads to no image"},
		{"bad digest in index", files(t, "index.json", `{"manifests":[{"digest":"md5:1"}]}`, "oci-layout", version), api.Invalid, `"index.json"`},
		{"damaged blob", files(t, "index.json", deep(emptyObject, "application/vnd.oci.image.manifest.v1+json"), "oci-layout", version,
			"blobs/sha256/"+emptyObject, "[]"), api.Invalid, "damaged"},
		{"blob missing", files(t, "index.json", deep(emptyObject, "application/vnd.oci.image.manifest.v1+json"), "oci-layout", version), api.Invalid, emptyObject},
		{"only artifacts", files(t, "index.json", deep(emptyObject, "application/vnd.oci.image.manifest.v1+json"), "oci-layout", version,
			"blobs/sha256/"+emptyObject, "{}"), api.Invalid, "leads to no image"},
		{"many manifests", files(t, "index.json", `{"manifests":[`+strings.Repeat(`{"annotations":{"vnd.docker.reference.type":"x"}},`, maxManifests)+`{}]}`, "oci-layout", version), api.TooLarge, "more than 64 images"},
	} {
		_, err := inspect(bytes.NewReader(c.b))
		if err == nil || api.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.problem) {
			t.Errorf("%s: error %v of kind %v; want %v and %q", c.name, err, api.KindOf(err), c.kind, c.problem)
		}
	}
}

func TestNestedIndexesEnd(t *testing.T) {
	const kind = "application/vnd.oci.image.index.v1+json"
	body, pairs := "{}", []string{"oci-layout", version}
	for range maxIndexDepth + 1 {
		hex := api.DigestOf([]byte(body)).Hex()
		pairs = append(pairs, "blobs/sha256/"+hex, body)
		body = fmt.Sprintf(`{"manifests":[{"mediaType":%q,"size":%d,"digest":"sha256:%s"}]}`, kind, len(body), hex)
	}
	_, err := inspect(bytes.NewReader(files(t, append(pairs, "index.json", body)...)))
	if err == nil || !strings.Contains(err.Error(), "nested") {
		t.Errorf("error %v; want one about nesting", err)
	}
}

func TestIsWasm(t *testing.T) {
	for content, want := range map[string]bool{"\x00asm\x01\x00\x00\x00more": true, "\x7fELF": false, "": false, "\x00as": false} {
		if got, err := IsWasm(writeTemp(t, "m", []byte(content))); got != want || err != nil {
			t.Errorf("%q: %v, %v", content, got, err)
		}
	}
	info, err := Inspect(writeTemp(t, "m.wasm", []byte("\x00asm\x01\x00\x00\x00")))
	if err != nil || info.Format != Wasm || !slices.Equal(info.Platforms, []string{WasmPlatform}) || info.Digest == "" {
		t.Errorf("%+v, %v", info, err)
	}
	if _, err := IsWasm(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v for a missing file", err)
	}
}

func FuzzInspect(f *testing.F) {
	f.Add(files(f, "manifest.json", oneImage, "c.json", oneConf, "l.tar", "layer"))
	f.Add(archiveBytes(f, smallImage(f, 10, "linux/amd64")))
	f.Add(layoutTar(f, nil, "linux/amd64"))
	f.Add([]byte("\x00asm\x01\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		info, err := inspect(bytes.NewReader(b))
		if err == nil && (len(info.Platforms) == 0 || info.Format == "") {
			t.Errorf("accepted as %+v", info)
		}
		if err != nil && api.KindOf(err) == api.Internal {
			t.Errorf("error without a kind: %v", err)
		}
	})
}

// buildGo builds a one-line program for a platform, without network or cgo.
func buildGo(t *testing.T, env ...string) string {
	t.Helper()
	dir := t.TempDir()
	source := filepath.Join(dir, "main.go")
	if err := os.WriteFile(source, []byte("package main\n\nfunc main() { println(\"hello\") }\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "Hello_World")
	build := exec.Command("go", "build", "-o", out, source)
	build.Env = append(os.Environ(), append([]string{"CGO_ENABLED=0", "GOFLAGS="}, env...)...)
	if b, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, b)
	}
	return out
}

func TestPack(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a program")
	}
	binary := buildGo(t, "GOOS=linux", "GOARCH=amd64")
	out := filepath.Join(t.TempDir(), "hello.tar")
	info, err := Pack(binary, out, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(info.Platforms, []string{"linux/amd64"}) || !slices.Equal(info.Entrypoint, []string{"/Hello_World"}) ||
		len(info.Tags) != 1 || !strings.HasSuffix(info.Tags[0], "muster/hello-world:packed") {
		t.Errorf("%+v", info)
	}
	again, err := Pack(binary, out, Options{})
	if err != nil || again.Digest != info.Digest {
		t.Errorf("packed again: %s, %v; want %s", again.Digest, err, info.Digest)
	}
	img, err := tarball.ImageFromPath(out, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := consistent(img); err != nil {
		t.Error(err)
	}
	if _, err := Pack(binary, out, Options{Platform: "linux/arm64"}); err == nil || !strings.Contains(err.Error(), "built for linux/amd64, not for linux/arm64") {
		t.Errorf("for another platform: %v", err)
	}
	if _, err := Pack(binary, filepath.Join(t.TempDir(), "none", "x.tar"), Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("into a missing directory: %v", err)
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(out), ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// elfFile is the smallest file with the given header that debug/elf takes.
func elfFile(kind, machine uint16, abi byte, interpreter string) []byte {
	b := make([]byte, 64+56)
	copy(b, "\x7fELF\x02\x01\x01")
	b[7] = abi
	put := func(at int, v uint64, n int) {
		for i := range n {
			b[at+i] = byte(v >> (8 * i))
		}
	}
	put(16, uint64(kind), 2)
	put(18, uint64(machine), 2)
	put(20, 1, 4)
	put(52, 64, 2) // size of this header
	if interpreter != "" {
		put(32, 64, 8) // program headers follow
		put(54, 56, 2)
		put(56, 1, 2)
		put(64, 3, 4) // PT_INTERP
		put(72, uint64(len(b)), 8)
		put(96, uint64(len(interpreter)+1), 8)
		b = append(b, interpreter+"\x00"...)
	}
	return b
}

func TestStaticPlatform(t *testing.T) {
	const exec, dyn, x86, arm64, sparc = 2, 3, 62, 183, 43
	for _, c := range []struct {
		name    string
		b       []byte
		want    string
		problem string
	}{
		{"amd64", elfFile(exec, x86, 0, ""), "linux/amd64", ""},
		{"arm64 static PIE", elfFile(dyn, arm64, 3, ""), "linux/arm64", ""},
		{"dynamic", elfFile(dyn, x86, 0, "/lib64/ld-linux-x86-64.so.2"), "", "dynamically linked (it needs /lib64/ld-linux-x86-64.so.2)"},
		{"object", elfFile(1, x86, 0, ""), "", "ET_REL, not a program"},
		{"freebsd", elfFile(exec, x86, 9, ""), "", "ELFOSABI_FREEBSD: build it for Linux"},
		{"sparc", elfFile(exec, sparc, 0, ""), "", "EM_SPARCV9, which no worker runs"},
		{"script", []byte("#!/bin/sh\n"), "", "not a Linux program"},
		{"empty", nil, "", "not a Linux program"},
		{"wasm", []byte("\x00asm\x01\x00\x00\x00"), "", "WebAssembly module: it needs no image"},
	} {
		got, err := staticPlatform(writeTemp(t, "b", c.b))
		if c.problem == "" && (err != nil || got != c.want) {
			t.Errorf("%s: %q, %v; want %q", c.name, got, err, c.want)
		}
		if c.problem != "" && (err == nil || !strings.Contains(err.Error(), c.problem)) {
			t.Errorf("%s: error %v; want one with %q", c.name, err, c.problem)
		}
	}
}

func FuzzStaticPlatform(f *testing.F) {
	f.Add(elfFile(2, 62, 0, ""))
	f.Add(elfFile(3, 62, 0, "/lib/ld.so"))
	path := filepath.Join(f.TempDir(), "b")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := staticPlatform(path); err == nil && !strings.HasPrefix(got, "linux/") {
			t.Errorf("accepted as %q", got)
		}
	})
}

func TestTagFor(t *testing.T) {
	for program, want := range map[string]string{"raytrace": "muster/raytrace:packed", "My App_2": "muster/my-app-2:packed", "é": "muster/job-0:packed"} {
		if got := tagFor(program); got != want {
			t.Errorf("%q: %q, want %q", program, got, want)
		}
		if err := WriteArchive(io.Discard, tagFor(program), smallImage(t, 1, "linux/amd64")); err != nil {
			t.Errorf("%q: %v", program, err)
		}
	}
	if err := WriteArchive(io.Discard, "Bad Name", smallImage(t, 1, "linux/amd64")); api.KindOf(err) != api.Invalid {
		t.Errorf("error %v for a bad name", err)
	}
}
