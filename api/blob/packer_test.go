package blob

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"pgregory.net/rapid"
)

// Whatever is stored and whatever compressed, one decoder reads it all.
func TestPackerProperty(t *testing.T) {
	noise := random(3*maxRawBlock, 60)
	rapid.Check(t, func(t *rapid.T) {
		var packed, want bytes.Buffer
		p, err := newPacker(&packed)
		if err != nil {
			t.Fatal(err)
		}
		for range rapid.IntRange(0, 6).Draw(t, "stretches") {
			size := rapid.OneOf(rapid.IntRange(1, 2000), rapid.SampledFrom([]int{maxRawBlock - 1, maxRawBlock, maxRawBlock + 1, 3 * maxRawBlock})).Draw(t, "size")
			if rapid.Bool().Draw(t, "stored") {
				if err := p.store(int64(size)); err != nil {
					t.Fatal(err)
				}
			}
			want.Write(noise[:size])
			for rest := noise[:size]; len(rest) > 0; {
				n := rapid.IntRange(1, len(rest)).Draw(t, "piece")
				if m, err := p.Write(rest[:n]); m != n || err != nil {
					t.Fatal(m, err)
				}
				rest = rest[n:]
			}
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		z, err := zstd.NewReader(&packed, zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			t.Fatal(err)
		}
		defer z.Close()
		if got, err := io.ReadAll(z); err != nil || !bytes.Equal(got, want.Bytes()) {
			t.Fatalf("%d bytes in place of %d: %v", len(got), want.Len(), err)
		}
	})
}

// Noise is stored, text is compressed, and both come back.
func TestDirOfMixedFiles(t *testing.T) {
	text := bytes.Repeat([]byte("muster turns other people's GPUs into one computer. "), 20_000)
	dir := t.TempDir()
	files := map[string][]byte{
		"frame.jpg": random(1<<20, 61), "notes.txt": text, "small.png": random(1000, 62),
		"head-is-text": append(bytes.Clone(text), random(100_000, 63)...),
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p, err := newPacker(io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"frame.jpg": true, "notes.txt": false, "small.png": false, "head-is-text": false} {
		if got := p.incompressible(bytes.NewReader(files[name]), int64(len(files[name]))); got != want {
			t.Errorf("%s: stored %t", name, got)
		}
	}
	var first bytes.Buffer
	if err := WriteDir(t.Context(), &first, dir); err != nil {
		t.Fatal(err)
	}
	now := time.Now().Add(time.Hour)
	os.Chtimes(filepath.Join(dir, "notes.txt"), now, now)
	var second bytes.Buffer
	if err := WriteDir(t.Context(), &second, dir); err != nil || !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Errorf("the archive differs: %v", err)
	}
	if n := first.Len(); n < 1<<20 || n > 1<<20+120_000 {
		t.Errorf("%d bytes", n)
	}
	dst := t.TempDir()
	if err := ExtractDir(&first, dst, Limits{Bytes: 8 << 20, Files: 10}); err != nil {
		t.Fatal(err)
	}
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(dst, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

// BenchmarkWriteDir packs a file of noise and one of text.
func BenchmarkWriteDir(b *testing.B) {
	for name, content := range map[string][]byte{
		"noise": random(32<<20, 64),
		"text":  bytes.Repeat([]byte("muster turns other people's GPUs into one computer. "), 32<<20/52),
	} {
		dir := b.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "x"), content, 0o644); err != nil {
			b.Fatal(err)
		}
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(content)))
			for b.Loop() {
				if err := WriteDir(b.Context(), io.Discard, dir); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
