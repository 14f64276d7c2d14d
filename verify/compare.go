package verify

import (
	"bytes"
	"fmt"
	"image"
	"image/color"
	"image/jpeg"
	"image/png"
	"path"
	"slices"
	"strings"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// File is one file of an item's output: its content or, where the comparator
// does not look into it, what stands for the content.
type File struct {
	Path string // slash-separated, relative to the item
	Data []byte
	// Digest and Size stand for the content of a file whose Data is left out.
	Digest api.Digest
	Size   int64
}

func (f File) digest() api.Digest {
	if f.Digest != "" {
		return f.Digest
	}
	return api.DigestOf(f.Data)
}

func (f File) size() int64 { return max(f.Size, int64(len(f.Data))) }

func (f File) equal(g File) bool {
	if f.Digest == "" && g.Digest == "" {
		return bytes.Equal(f.Data, g.Data)
	}
	return f.digest() == g.digest()
}

// Comparator judges outputs of one item. It is pure, and safe for concurrent
// use.
type Comparator interface {
	// LooksInto reports whether a file has to come with its content. For any
	// other the digest and the size will do, so that it never has to fit into
	// memory.
	LooksInto(path string) bool
	// Validate says whether an output can be judged at all: an error of kind
	// api.Invalid names the file and what is wrong with it.
	Validate(files []File) error
	// Compare says whether two valid outputs agree, and in words how they
	// differ.
	Compare(a, b []File) (match bool, detail string)
}

// Comparators are the names that a job may ask for.
var Comparators = []string{Exact, "image"}

// Exact is the comparator that wants the same bytes.
const Exact = "exact"

// ComparatorOf is the comparator of a job's policy.
func ComparatorOf(v *musterpb.Verify) (Comparator, error) {
	switch v.GetComparator() {
	case Exact:
		return exact{}, nil
	case "image":
		if v.FailPpm > PPM || v.FailSharePpm > PPM {
			return nil, api.Errorf(api.Invalid, "verify.fail_ppm %d, verify.fail_share_ppm %d: want at most %d, which is all", v.FailPpm, v.FailSharePpm, PPM)
		}
		return imageComparator{failPPM: v.FailPpm, failSharePPM: v.FailSharePpm}, nil
	}
	return nil, api.Errorf(api.Invalid, "verify.comparator %q: want one of %s", v.GetComparator(), strings.Join(Comparators, ", "))
}

// exact wants the same files with the same bytes.
type exact struct{}

func (exact) LooksInto(string) bool { return false }

func (exact) Validate(files []File) error {
	if len(files) == 0 {
		return api.Errorf(api.Invalid, "no output file")
	}
	return onePerPath(files)
}

func (exact) Compare(a, b []File) (bool, string) {
	a, b, detail := align(a, b)
	if detail != "" {
		return false, detail
	}
	for i := range a {
		if !a[i].equal(b[i]) {
			return false, fmt.Sprintf("%s differs: %d bytes %.19s…, %d bytes %.19s…", a[i].Path,
				a[i].size(), a[i].digest(), b[i].size(), b[i].digest())
		}
	}
	return true, ""
}

// imageComparator decodes pictures and counts the pixels that differ; other
// files are compared exactly. It looks at pixels and never at file hashes:
// encoders write metadata that differs between honest runs.
type imageComparator struct {
	failPPM      uint32 // of full scale: a channel that differs by more fails its pixel
	failSharePPM uint32 // share of failed pixels from which on pictures differ
}

const (
	// maxPixels bounds what is decoded: 8K video (7,680×4,320) fits twice, and a
	// picture takes at most 512 MiB at 16 bits a channel.
	maxPixels = 1 << 26
	// maxPixelsPerByte keeps a short file from having much memory set aside by
	// the size in its header alone. Deflate makes at most 1,032 bytes of one
	// (zlib's technical notes), a pixel takes at least one bit of them, and a
	// JPEG spends at least one bit on 64 pixels.
	maxPixelsPerByte = 1032 * 8
)

func (imageComparator) LooksInto(path string) bool { return isPicture(path) }

func (imageComparator) Validate(files []File) error {
	if err := onePerPath(files); err != nil {
		return err
	}
	pictures := 0
	for _, f := range files {
		if !isPicture(f.Path) {
			continue
		}
		if _, err := decode(f); err != nil {
			return err
		}
		pictures++
	}
	if pictures == 0 {
		return api.Errorf(api.Invalid, "no .png or .jpg file among the output files %s; use comparator exact for other formats", listPaths(files))
	}
	return nil
}

func (c imageComparator) Compare(a, b []File) (bool, string) {
	a, b, detail := align(a, b)
	if detail != "" {
		return false, detail
	}
	for i := range a {
		if !isPicture(a[i].Path) {
			if !a[i].equal(b[i]) {
				return false, a[i].Path + " differs"
			}
			continue
		}
		if bytes.Equal(a[i].Data, b[i].Data) {
			continue
		}
		if match, detail := c.comparePictures(a[i], b[i]); !match {
			return false, detail
		}
	}
	return true, ""
}

func (c imageComparator) comparePictures(a, b File) (bool, string) {
	ia, err := decode(a)
	if err != nil {
		return false, err.Error()
	}
	ib, err := decode(b)
	if err != nil {
		return false, err.Error()
	}
	size, sizeB := ia.Bounds().Size(), ib.Bounds().Size()
	if size != sizeB {
		return false, fmt.Sprintf("%s is %d×%d and %d×%d", a.Path, size.X, size.Y, sizeB.X, sizeB.Y)
	}
	limit := int32(int64(c.failPPM) * 0xffff / PPM)
	failed, total := int64(0), int64(size.X)*int64(size.Y)
	rowA, rowB := make([]color.NRGBA64, size.X), make([]color.NRGBA64, size.X)
	for y := range size.Y {
		readRow(ia, y, rowA)
		readRow(ib, y, rowB)
		for x, p := range rowA {
			if q := rowB[x]; apart(p.R, q.R, limit) || apart(p.G, q.G, limit) || apart(p.B, q.B, limit) || apart(p.A, q.A, limit) {
				failed++
			}
		}
	}
	if failed > 0 && failed*PPM >= total*int64(c.failSharePPM) {
		return false, fmt.Sprintf("%s: %d of %d pixels (%d.%02d%%) differ by more than %d ppm of full scale",
			a.Path, failed, total, failed*100/total, failed*10_000/total%100, c.failPPM)
	}
	return true, ""
}

func apart(x, y uint16, limit int32) bool {
	d := int32(x) - int32(y)
	return d > limit || -d > limit
}

// decode reads a picture. The decoder follows from the file's first bytes, and
// only from those: image.Decode would take any format that some other package
// of the program registered.
func decode(f File) (image.Image, error) {
	readConfig, read := jpeg.DecodeConfig, jpeg.Decode
	if bytes.HasPrefix(f.Data, []byte("\x89PNG")) {
		readConfig, read = png.DecodeConfig, png.Decode
	}
	config, err := readConfig(bytes.NewReader(f.Data))
	if err != nil {
		return nil, api.Errorf(api.Invalid, "%s (%d bytes) is not a readable PNG or JPEG picture: %w", f.Path, len(f.Data), err)
	}
	pixels := int64(config.Width) * int64(config.Height) // each below 2³¹
	switch {
	case config.Width <= 0 || config.Height <= 0 || pixels > maxPixels:
		return nil, api.Errorf(api.Invalid, "%s says it has %d×%d pixels; at most %d pixels are judged", f.Path, config.Width, config.Height, maxPixels)
	case pixels > int64(len(f.Data))*maxPixelsPerByte:
		return nil, api.Errorf(api.Invalid, "%s says it has %d×%d pixels, which do not fit its %d bytes: it is truncated or made up", f.Path, config.Width, config.Height, len(f.Data))
	}
	picture, err := read(bytes.NewReader(f.Data))
	if err != nil {
		return nil, api.Errorf(api.Invalid, "%s (%d bytes) is a broken picture: %w", f.Path, len(f.Data), err)
	}
	return picture, nil
}

// readRow reads row y, counted from the top, at 16 bits a channel. Colours are
// as the file has them, not multiplied by alpha: that would round, and hide
// what lies under transparent pixels.
func readRow(picture image.Image, y int, row []color.NRGBA64) {
	min := picture.Bounds().Min
	switch m := picture.(type) {
	case *image.NRGBA:
		for x := range row {
			row[x] = straight(m.NRGBAAt(min.X+x, min.Y+y))
		}
	case *image.NRGBA64:
		for x := range row {
			row[x] = m.NRGBA64At(min.X+x, min.Y+y)
		}
	case *image.Paletted:
		for x := range row {
			row[x] = straight(m.At(min.X+x, min.Y+y))
		}
	case image.RGBA64Image: // opaque: the decoders give alpha in the types above alone
		for x := range row {
			row[x] = color.NRGBA64(m.RGBA64At(min.X+x, min.Y+y))
		}
	default:
		for x := range row {
			row[x] = straight(picture.At(min.X+x, min.Y+y))
		}
	}
}

func straight(c color.Color) color.NRGBA64 {
	if n, ok := c.(color.NRGBA); ok {
		return color.NRGBA64{R: uint16(n.R) * 0x101, G: uint16(n.G) * 0x101, B: uint16(n.B) * 0x101, A: uint16(n.A) * 0x101}
	}
	return color.NRGBA64Model.Convert(c).(color.NRGBA64)
}

func isPicture(name string) bool {
	switch strings.ToLower(path.Ext(name)) {
	case ".png", ".jpg", ".jpeg":
		return true
	}
	return false
}

// onePerPath refuses two files with one path: which of them belongs to which
// of the other run's could not be said.
func onePerPath(files []File) error {
	seen := make(map[string]bool, len(files))
	for _, f := range files {
		if seen[f.Path] {
			return api.Errorf(api.Invalid, "two output files have the path %.200q", f.Path)
		}
		seen[f.Path] = true
	}
	return nil
}

// align returns the files of both in order of path, or says in detail that
// they do not have the same paths.
func align(a, b []File) (sortedA, sortedB []File, detail string) {
	byPath := func(x, y File) int { return strings.Compare(x.Path, y.Path) }
	sortedA, sortedB = slices.SortedStableFunc(slices.Values(a), byPath), slices.SortedStableFunc(slices.Values(b), byPath)
	samePath := func(x, y File) bool { return x.Path == y.Path }
	if !slices.EqualFunc(sortedA, sortedB, samePath) {
		return nil, nil, fmt.Sprintf("files differ: %s and %s", listPaths(sortedA), listPaths(sortedB))
	}
	return sortedA, sortedB, ""
}

// listPaths names the first files, in at most some hundred bytes.
func listPaths(files []File) string {
	const most, longest = 5, 60
	paths := make([]string, 0, most+1)
	for i, f := range files {
		if i == most {
			paths = append(paths, fmt.Sprintf("… %d in all", len(files)))
			break
		}
		paths = append(paths, fmt.Sprintf("%.*q", longest, f.Path))
	}
	return "[" + strings.Join(paths, " ") + "]"
}
