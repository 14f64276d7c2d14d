package verify

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"image"
	"image/color"
	"image/draw"
	"image/jpeg"
	"image/png"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

func comparator(t testing.TB, v *musterpb.Verify) Comparator {
	t.Helper()
	c, err := ComparatorOf(v)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// blender is the setting measured for renders with a fixed seed: fail 0.001,
// failPercent 1.
func blender(t testing.TB) Comparator {
	return comparator(t, &musterpb.Verify{Comparator: "image", FailPpm: 1_000, FailSharePpm: 10_000})
}

// picture is noise of 16 bits a channel with every alpha, always the same.
func picture(w, h int) *image.NRGBA64 {
	r := rand.New(rand.NewPCG(1, 2))
	m := image.NewNRGBA64(image.Rect(0, 0, w, h))
	for i := range m.Pix {
		m.Pix[i] = byte(r.Uint32())
	}
	return m
}

// shift adds d to one channel of the first n pixels, in steps that spread them
// over the picture.
func shift(m *image.NRGBA64, n int, d uint16) *image.NRGBA64 {
	out := image.NewNRGBA64(m.Rect)
	copy(out.Pix, m.Pix)
	pixels := m.Rect.Dx() * m.Rect.Dy()
	for i := range n {
		p := (i * 7919 % pixels) * 8
		v := binary.BigEndian.Uint16(out.Pix[p:])
		if v > 0x8000 {
			v -= d
		} else {
			v += d
		}
		binary.BigEndian.PutUint16(out.Pix[p:], v)
	}
	return out
}

func pngOf(t testing.TB, m image.Image) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := png.Encode(&b, m); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func jpegOf(t testing.TB, m image.Image, quality int) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := jpeg.Encode(&b, m, &jpeg.Options{Quality: quality}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// chunk is a PNG chunk with its checksum.
func chunk(kind string, data []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(data)))
	b = append(append(b, kind...), data...)
	return binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b[4:]))
}

// afterHeader puts chunks after a PNG's IHDR.
func afterHeader(file []byte, chunks ...[]byte) []byte {
	const header = 8 + 12 + 13
	return slices.Concat(file[:header], slices.Concat(chunks...), file[header:])
}

func frame(data []byte) []File { return []File{{Path: "frame.png", Data: data}} }

func TestImageCompare(t *testing.T) {
	m := picture(100, 50) // 5,000 pixels: 1% is 50
	limit := uint16(0xffff / 1000)
	base := pngOf(t, m)
	small := picture(100, 49)
	for _, c := range []struct {
		name  string
		other []byte
		match bool
		say   string
	}{
		{"identical", base, true, ""},
		{"all pixels off by exactly the limit", pngOf(t, shift(m, 5000, limit)), true, ""},
		{"one pixel far off", pngOf(t, shift(m, 1, 0x7000)), true, ""},
		{"just under 1% over the limit", pngOf(t, shift(m, 49, limit+1)), true, ""},
		{"1% over the limit", pngOf(t, shift(m, 50, limit+1)), false, "50 of 5000 pixels (1.00%)"},
		{"40% over the limit", pngOf(t, shift(m, 2000, limit+1)), false, "2000 of 5000 pixels (40.00%)"},
		{"another size", pngOf(t, small), false, "100×50 and 100×49"},
		{"turned", pngOf(t, picture(50, 100)), false, "100×50 and 50×100"},
		{"another compression", func() []byte {
			var b bytes.Buffer
			if err := (&png.Encoder{CompressionLevel: png.NoCompression}).Encode(&b, m); err != nil {
				t.Fatal(err)
			}
			return b.Bytes()
		}(), true, ""},
		{"metadata", afterHeader(base, chunk("tEXt", []byte("RenderTime\x0000:07.21")), chunk("pHYs", []byte("\x00\x00\x0b\x13\x00\x00\x0b\x13\x01"))), true, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmp := blender(t)
			for _, f := range [][]byte{base, c.other} {
				if err := cmp.Validate(frame(f)); err != nil {
					t.Fatalf("Validate: %v", err)
				}
			}
			match, detail := cmp.Compare(frame(base), frame(c.other))
			back, _ := cmp.Compare(frame(c.other), frame(base))
			if match != c.match || back != match {
				t.Fatalf("match %v, the other way round %v, want %v (%s)", match, back, c.match, detail)
			}
			if match != (detail == "") || !strings.Contains(detail, c.say) || (!match && !strings.Contains(detail, "frame.png")) {
				t.Errorf("detail %q, want one with the file and %q", detail, c.say)
			}
		})
	}
}

func TestImageShareOfZero(t *testing.T) {
	strict := comparator(t, &musterpb.Verify{Comparator: "image"})
	m := picture(10, 10)
	if match, detail := strict.Compare(frame(pngOf(t, m)), frame(afterHeader(pngOf(t, m), chunk("tEXt", []byte("a\x00b"))))); !match {
		t.Errorf("the same pixels differ: %s", detail)
	}
	if match, _ := strict.Compare(frame(pngOf(t, m)), frame(pngOf(t, shift(m, 1, 1)))); match {
		t.Error("one step of 65,536 in one pixel passes where nothing may differ")
	}
}

// Alpha is a channel like the others, and colour counts where it is 0 too.
func TestImageAlpha(t *testing.T) {
	strict := comparator(t, &musterpb.Verify{Comparator: "image"})
	one := func(c color.NRGBA64) []File {
		m := image.NewNRGBA64(image.Rect(0, 0, 1, 1))
		m.SetNRGBA64(0, 0, c)
		return frame(pngOf(t, m))
	}
	base := color.NRGBA64{R: 0x1234, G: 0x5678, B: 0x9abc, A: 1}
	other := base
	other.A = 2
	if match, _ := strict.Compare(one(base), one(other)); match {
		t.Error("another alpha passes")
	}
	for _, alpha := range []uint16{0, 1, 0x00ff, 0x8000, 0xfffe, 0xffff} {
		base.A = alpha
		other := base
		other.G++
		if match, _ := strict.Compare(one(base), one(other)); match {
			t.Errorf("another colour passes under alpha %#04x", alpha)
		}
		if match, detail := strict.Compare(one(base), one(base)); !match {
			t.Errorf("the same colour differs under alpha %#04x: %s", alpha, detail)
		}
	}
}

// The same colours in every form that a PNG has for them.
func TestImageForms(t *testing.T) {
	palette := color.Palette{color.NRGBA{0, 0, 0, 255}, color.NRGBA{255, 255, 255, 255}, color.NRGBA{128, 128, 128, 255}, color.NRGBA{17, 17, 17, 255}}
	at := image.Rect(0, 0, 16, 16)
	paletted := image.NewPaletted(at, palette)
	for i := range paletted.Pix {
		paletted.Pix[i] = uint8(i*7) % uint8(len(palette))
	}
	copyTo := func(m draw.Image) image.Image { draw.Draw(m, at, paletted, image.Point{}, draw.Src); return m }
	forms := map[string]image.Image{
		"paletted":      paletted,
		"gray":          copyTo(image.NewGray(at)),
		"gray 16":       copyTo(image.NewGray16(at)),
		"rgb 8":         copyTo(image.NewRGBA(at)),
		"rgb 16":        copyTo(image.NewRGBA64(at)),
		"with alpha 8":  copyTo(image.NewNRGBA(at)),
		"with alpha 16": copyTo(image.NewNRGBA64(at)),
	}
	strict := comparator(t, &musterpb.Verify{Comparator: "image"})
	for a, x := range forms {
		for b, y := range forms {
			if match, detail := strict.Compare(frame(pngOf(t, x)), frame(pngOf(t, y))); !match {
				t.Errorf("%s and %s: %s", a, b, detail)
			}
		}
	}
	// Transparency in the palette, with a colour under alpha 0.
	transparent := image.NewPaletted(at, color.Palette{color.NRGBA{10, 20, 30, 0}, color.NRGBA{200, 100, 50, 77}})
	straightForm := image.NewNRGBA(at)
	for i := range transparent.Pix {
		transparent.Pix[i] = uint8(i % 2)
		straightForm.SetNRGBA(i%16, i/16, transparent.Palette[i%2].(color.NRGBA))
	}
	if match, detail := strict.Compare(frame(pngOf(t, transparent)), frame(pngOf(t, straightForm))); !match {
		t.Errorf("paletted and not, with alpha: %s", detail)
	}
}

// A picture saved with 8 bits a channel is up to 1/510 away from its 16 bits,
// which is more than the measured setting allows: both have to use one depth.
func TestImageDepths(t *testing.T) {
	m := picture(64, 64)
	eight := image.NewNRGBA(m.Rect)
	for i := range eight.Pix {
		v := uint32(binary.BigEndian.Uint16(m.Pix[2*i:]))
		eight.Pix[i] = uint8((v*255 + 0x7fff) / 0xffff)
	}
	a, b := frame(pngOf(t, m)), frame(pngOf(t, eight))
	if match, _ := blender(t).Compare(a, b); match {
		t.Error("8 and 16 bits match within 0.001")
	}
	coarse := comparator(t, &musterpb.Verify{Comparator: "image", FailPpm: 1_000_000 / 500})
	if match, detail := coarse.Compare(a, b); !match {
		t.Errorf("8 and 16 bits differ within 1/500: %s", detail)
	}
}

func TestImageJPEG(t *testing.T) {
	m := image.NewRGBA(image.Rect(0, 0, 64, 48))
	for i := range m.Pix {
		m.Pix[i] = byte(i / 64)
	}
	good, coarse := jpegOf(t, m, 90), jpegOf(t, m, 20)
	c := blender(t)
	files := func(data []byte) []File { return []File{{Path: "1/Frame.JPG", Data: data}} }
	withComment := slices.Concat(good[:2], []byte("\xff\xfe\x00\x06made"), good[2:])
	if match, detail := c.Compare(files(good), files(withComment)); !match {
		t.Errorf("a comment makes a difference: %s", detail)
	}
	if match, _ := c.Compare(files(good), files(coarse)); match {
		t.Error("quality 90 and quality 20 match")
	}
	gray := image.NewGray(m.Rect)
	draw.Draw(gray, gray.Rect, m, image.Point{}, draw.Src)
	if err := c.Validate(files(jpegOf(t, gray, 90))); err != nil {
		t.Errorf("a gray JPEG: %v", err)
	}
	for cut := range len(good) {
		if err := c.Validate(files(good[:cut])); api.KindOf(err) != api.Invalid || !strings.Contains(err.Error(), "1/Frame.JPG") {
			t.Fatalf("cut to %d of %d bytes: %v", cut, len(good), err)
		}
	}
}

func TestTruncatedPNG(t *testing.T) {
	for name, m := range map[string]image.Image{"noise": picture(20, 20), "one colour": image.NewGray(image.Rect(0, 0, 300, 300))} {
		good := pngOf(t, m)
		for cut := range len(good) {
			err := blender(t).Validate(frame(good[:cut]))
			if api.KindOf(err) != api.Invalid || !strings.Contains(err.Error(), "frame.png") {
				t.Fatalf("%s cut to %d of %d bytes: %v", name, cut, len(good), err)
			}
		}
		if match, detail := blender(t).Compare(frame(good), frame(good[:len(good)/2])); match || detail == "" {
			t.Errorf("%s: a whole and a broken picture match (%q)", name, detail)
		}
		if err := blender(t).Validate(frame(append(bytes.Clone(good), "trailing bytes"...))); err != nil {
			t.Errorf("%s with bytes after its end: %v", name, err)
		}
		for i := range good {
			bad := bytes.Clone(good)
			bad[i] ^= 0x10
			if err := blender(t).Validate(frame(bad)); err == nil {
				t.Fatalf("%s with byte %d of %d changed is taken", name, i, len(good))
			}
		}
	}
}

// A header may promise any size; the memory for it must not be set aside.
func TestPictureBombs(t *testing.T) {
	header := func(w, h uint32) []byte {
		ihdr := binary.BigEndian.AppendUint32(nil, w)
		ihdr = append(binary.BigEndian.AppendUint32(ihdr, h), 16, 6, 0, 0, 0)
		return slices.Concat([]byte("\x89PNG\r\n\x1a\n"), chunk("IHDR", ihdr), chunk("IDAT", []byte("x\x9c")), chunk("IEND", nil))
	}
	jpegBomb := jpegOf(t, image.NewGray(image.Rect(0, 0, 8, 8)), 50)
	sof := bytes.Index(jpegBomb, []byte{0xff, 0xc0})
	copy(jpegBomb[sof+5:], []byte{0xff, 0xff, 0x03, 0xff})
	for name, c := range map[string]struct {
		data []byte
		say  string
	}{
		"4 G × 4 G":               {header(1<<31-1, 1<<31-1), ""},
		"65,535 × 65,535":         {header(65_535, 65_535), "at most 67108864 pixels"},
		"within the limit, short": {header(8_000, 8_000), "do not fit its"},
		"no width":                {header(0, 10), ""},
		"JPEG":                    {jpegBomb, "do not fit its"},
	} {
		t.Run(name, func(t *testing.T) {
			start, allocated := time.Now(), testing.AllocsPerRun(1, func() {
				err := blender(t).Validate(frame(c.data))
				if api.KindOf(err) != api.Invalid || !strings.Contains(err.Error(), "frame.png") || !strings.Contains(err.Error(), c.say) {
					t.Errorf("error %v, want one of kind invalid with the file and %q", err, c.say)
				}
			})
			if took := time.Since(start); took > time.Second || allocated > 1000 {
				t.Errorf("refused after %v and %.0f allocations", took, allocated)
			}
		})
	}
}

// The most that deflate can do is not called a bomb.
func TestLargeFlatPictureIsJudged(t *testing.T) {
	m := image.NewPaletted(image.Rect(0, 0, 8_000, 4_000), color.Palette{color.Black, color.White}) // 1 bit a pixel
	var b bytes.Buffer
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&b, m); err != nil {
		t.Fatal(err)
	}
	if err := blender(t).Validate(frame(b.Bytes())); err != nil {
		t.Errorf("%d pixels in %d bytes: %v", 8_000*4_000, b.Len(), err)
	}
}

func TestImageValidate(t *testing.T) {
	good := pngOf(t, picture(4, 4))
	for _, c := range []struct {
		say   string
		files []File
	}{
		{"no .png or .jpg file", nil},
		{`"depth.exr"`, []File{{Path: "depth.exr", Data: []byte("v/1")}}},
		{"6 in all", []File{{Path: "a"}, {Path: "b"}, {Path: "c"}, {Path: "d"}, {Path: "e"}, {Path: "f"}}},
		{"b.png (0 bytes)", []File{{Path: "a.png", Data: good}, {Path: "b.png", Data: nil}}},
		{"b.jpeg (4 bytes)", []File{{Path: "a.png", Data: good}, {Path: "b.jpeg", Data: []byte("GIF8")}}},
		{`two output files have the path "a.png"`, []File{{Path: "a.png", Data: good}, {Path: "a.png", Data: good}}},
	} {
		if err := blender(t).Validate(c.files); api.KindOf(err) != api.Invalid || !strings.Contains(err.Error(), c.say) {
			t.Errorf("error %v, want one of kind invalid with %q", err, c.say)
		}
	}
	if err := blender(t).Validate([]File{{Path: "a.PNG", Data: good}, {Path: "log.txt", Data: nil}}); err != nil {
		t.Errorf("a picture and another file: %v", err)
	}
}

func TestExact(t *testing.T) {
	c := comparator(t, &musterpb.Verify{Comparator: "exact"})
	if err := c.Validate(nil); api.KindOf(err) != api.Invalid {
		t.Errorf("no file: %v", err)
	}
	if err := c.Validate([]File{{Path: "a"}, {Path: "a"}}); api.KindOf(err) != api.Invalid {
		t.Errorf("one path twice: %v", err)
	}
	if err := c.Validate([]File{{Path: "empty"}}); err != nil {
		t.Errorf("an empty file: %v", err)
	}
	ab := []File{{Path: "a", Data: []byte("1")}, {Path: "b", Data: []byte("2")}}
	for _, o := range []struct {
		say   string
		files []File
	}{
		{"", []File{{Path: "b", Data: []byte("2")}, {Path: "a", Data: []byte("1")}}},
		{"b differs: 1 bytes sha256:d4735e3a265e…, 1 bytes sha256:4e07408562be…", []File{{Path: "a", Data: []byte("1")}, {Path: "b", Data: []byte("3")}}},
		{`files differ: ["a" "b"] and ["a"]`, ab[:1]},
		{`files differ: ["a" "b"] and ["a" "c"]`, []File{{Path: "a", Data: []byte("1")}, {Path: "c", Data: []byte("2")}}},
		{"files differ", nil},
	} {
		if match, detail := c.Compare(ab, o.files); match != (o.say == "") || !strings.HasPrefix(detail, o.say) {
			t.Errorf("match %v, detail %q, want %q", match, detail, o.say)
		}
	}
}

func TestCompareKeepsItsArguments(t *testing.T) {
	data := pngOf(t, picture(4, 4))
	a := []File{{Path: "z.png", Data: data}, {Path: "a.png", Data: data}, {Path: "m.txt", Data: nil}}
	b := []File{{Path: "m.txt", Data: nil}, {Path: "z.png", Data: data}, {Path: "a.png", Data: data}}
	wasA, wasB := fmt.Sprint(a), fmt.Sprint(b)
	for _, c := range []Comparator{comparator(t, &musterpb.Verify{Comparator: "exact"}), blender(t)} {
		if match, detail := c.Compare(a, b); !match {
			t.Errorf("%T: %s", c, detail)
		}
		if fmt.Sprint(a) != wasA || fmt.Sprint(b) != wasB {
			t.Errorf("%T changed the order of its arguments", c)
		}
	}
}

func TestDetailIsBounded(t *testing.T) {
	var many []File
	for i := range 5000 {
		many = append(many, File{Path: fmt.Sprintf("%s%d", strings.Repeat("é", 300), i)})
	}
	for _, c := range []Comparator{comparator(t, &musterpb.Verify{Comparator: "exact"}), blender(t)} {
		if _, detail := c.Compare(many, many[1:]); len(detail) > 2000 {
			t.Errorf("%T: a detail of %d bytes", c, len(detail))
		}
	}
	if err := blender(t).Validate(many); len(err.Error()) > 2000 {
		t.Errorf("an error of %d bytes", len(err.Error()))
	}
}

func TestComparatorOf(t *testing.T) {
	for _, v := range []*musterpb.Verify{
		nil, {}, {Comparator: "Exact"}, {Comparator: "md5"},
		{Comparator: "image", FailPpm: PPM + 1}, {Comparator: "image", FailSharePpm: PPM + 1},
	} {
		if c, err := ComparatorOf(v); api.KindOf(err) != api.Invalid || c != nil {
			t.Errorf("%v: %v, %v; want an error of kind invalid", v, c, err)
		}
	}
	for _, name := range Comparators {
		comparator(t, &musterpb.Verify{Comparator: name})
	}
}

// FuzzImage feeds two files to the decoders: no input may bring the scheduler
// down, agreement is symmetric, and whatever is valid agrees with itself.
func FuzzImage(f *testing.F) {
	small := picture(5, 3)
	for _, seed := range [][]byte{
		nil, pngOf(f, small), pngOf(f, shift(small, 15, 9000)), jpegOf(f, small, 50), pngOf(f, small)[:60],
		pngOf(f, image.NewPaletted(image.Rect(0, 0, 3, 3), color.Palette{color.Black, color.Transparent})),
		pngOf(f, image.NewGray16(image.Rect(0, 0, 2, 2))),
	} {
		f.Add(seed, pngOf(f, small))
		f.Add(seed, seed)
	}
	c := blender(f)
	f.Fuzz(func(t *testing.T, a, b []byte) {
		fa, fb := frame(a), frame(b)
		errA, errB := c.Validate(fa), c.Validate(fb)
		for _, err := range []error{errA, errB} {
			if err != nil && api.KindOf(err) != api.Invalid {
				t.Fatalf("kind %v: %v", api.KindOf(err), err)
			}
		}
		match, detail := c.Compare(fa, fb)
		back, _ := c.Compare(fb, fa)
		if match != back || match != (detail == "") {
			t.Fatalf("match %v, the other way round %v, detail %q", match, back, detail)
		}
		if match && !bytes.Equal(a, b) && (errA != nil || errB != nil) {
			t.Fatalf("a file that is no picture matches: %v, %v", errA, errB)
		}
		if same, _ := c.Compare(fa, frame(bytes.Clone(a))); !same {
			t.Fatal("a file differs from itself")
		}
	})
}

func BenchmarkImageCompare4K(b *testing.B) {
	m := picture(3840, 2160)
	x, y := frame(pngOf(b, m)), frame(pngOf(b, shift(m, 100, 1)))
	c := blender(b)
	b.ReportAllocs()
	for b.Loop() {
		if match, detail := c.Compare(x, y); !match {
			b.Fatal(detail)
		}
	}
}
