package outputs

import (
	"archive/tar"
	"bytes"
	"testing"

	"pgregory.net/rapid"
)

// What is written by hand is what archive/tar writes, and is recognized.
func TestPlainIsTar(t *testing.T) {
	name := rapid.OneOf(
		rapid.StringMatching(`[ -~]{1,120}`),
		rapid.StringMatching(`[a-z]{95,105}`),
		rapid.StringN(1, 20, 200),
	)
	rapid.Check(t, func(t *rapid.T) {
		name := name.Draw(t, "name")
		size := rapid.OneOf(rapid.Int64Range(0, 2000), rapid.Int64Range(0, maxSize+10)).Draw(t, "size")
		if !isPlain(name, size) {
			return
		}
		var want bytes.Buffer
		if err := tar.NewWriter(&want).WriteHeader(fileHeader(name, size)); err != nil {
			t.Fatal(err)
		}
		got := appendPlain([]byte("before"), name, size)
		if !bytes.Equal(got, append([]byte("before"), want.Bytes()...)) {
			t.Fatalf("%q %d:\n%q\n%q", name, size, got[6:], want.Bytes())
		}
	})
	for _, ok := range []string{"a", "line.json", "frame 0001.png", string(bytes.Repeat([]byte("x"), 100))} {
		if !isPlain(ok, 1) {
			t.Errorf("%s is not plain", ok)
		}
	}
}

// parsePlain says what archive/tar says, or nothing.
func FuzzParsePlain(f *testing.F) {
	for _, files := range [][]plainFile{
		nil,
		{{"a", []byte("hello")}},
		{{"a", nil}, {"b/c", bytes.Repeat([]byte("x"), 512)}, {string(bytes.Repeat([]byte("n"), 100)), []byte{0}}},
	} {
		var b []byte
		for _, file := range files {
			b = appendPlain(b, file.name, int64(len(file.content)))
			b = append(append(b, file.content...), zeroBlocks[:padding(int64(len(file.content)))]...)
		}
		b = append(b, zeroBlocks[:]...)
		if got, ok := parsePlain(nil, b); !ok || len(got) != len(files) {
			f.Fatalf("%d files are not recognized: %v %v", len(files), got, ok)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		files, ok := parsePlain(nil, b)
		if !ok {
			return
		}
		r := tar.NewReader(bytes.NewReader(b))
		for _, file := range files {
			header, err := r.Next()
			if err != nil {
				t.Fatal(err)
			}
			content := new(bytes.Buffer)
			if _, err := content.ReadFrom(r); err != nil {
				t.Fatal(err)
			}
			if header.Typeflag != tar.TypeReg || header.Name != file.name || !bytes.Equal(content.Bytes(), file.content) {
				t.Fatalf("%q with %d bytes; archive/tar says %q with %d", file.name, len(file.content), header.Name, content.Len())
			}
		}
		if header, err := r.Next(); err == nil {
			t.Fatalf("archive/tar finds %q too", header.Name)
		}
	})
}
