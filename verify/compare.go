package verify

import (
	"bytes"
	"fmt"
	"image"
	"image/draw"
	_ "image/jpeg" // decoders of the image comparator
	_ "image/png"
	"path"
	"slices"
	"strings"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// File is one file of an item's output.
type File struct {
	Path string // slash-separated, relative to the item
	Data []byte
}

// Comparator judges outputs of one item. It is pure, and safe for concurrent
// use.
type Comparator interface {
	// Validate says whether an output can be judged at all: an error of kind
	// api.Invalid names the file and what is wrong with it.
	Validate(files []File) error
	// Compare says whether two valid outputs agree, and in words how they
	// differ.
	Compare(a, b []File) (match bool, detail string)
}

// Comparators are the names that a job may ask for.
var Comparators = []string{"exact", "image"}

// ComparatorOf is the comparator of a job's policy.
func ComparatorOf(v *musterpb.Verify) (Comparator, error) {
	switch v.GetComparator() {
	case "exact":
		return exact{}, nil
	case "image":
		return imageComparator{failPPM: v.FailPpm, failSharePPM: v.FailSharePpm}, nil
	}
	return nil, api.Errorf(api.Invalid, "verify.comparator %q: want one of %s", v.GetComparator(), strings.Join(Comparators, ", "))
}

// exact wants the same files with the same bytes.
type exact struct{}

func (exact) Validate(files []File) error {
	if len(files) == 0 {
		return api.Errorf(api.Invalid, "no output file")
	}
	return nil
}

func (exact) Compare(a, b []File) (bool, string) {
	if detail := comparePaths(a, b); detail != "" {
		return false, detail
	}
	for i := range a {
		if !bytes.Equal(a[i].Data, b[i].Data) {
			return false, fmt.Sprintf("%s differs: %d bytes %.19s…, %d bytes %.19s…", a[i].Path,
				len(a[i].Data), api.DigestOf(a[i].Data), len(b[i].Data), api.DigestOf(b[i].Data))
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

// maxPixels bounds what is decoded: an 8-byte header can promise any size.
const maxPixels = 1 << 27

func (imageComparator) Validate(files []File) error {
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
		names := make([]string, 0, len(files))
		for _, f := range files[:min(len(files), 5)] {
			names = append(names, f.Path)
		}
		return api.Errorf(api.Invalid, "no .png or .jpg file among %d output files %v; use comparator exact for other formats", len(files), names)
	}
	return nil
}

func (c imageComparator) Compare(a, b []File) (bool, string) {
	if detail := comparePaths(a, b); detail != "" {
		return false, detail
	}
	for i := range a {
		if !isPicture(a[i].Path) {
			if !bytes.Equal(a[i].Data, b[i].Data) {
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
	if ia.Rect != ib.Rect {
		return false, fmt.Sprintf("%s is %d×%d and %d×%d", a.Path, ia.Rect.Dx(), ia.Rect.Dy(), ib.Rect.Dx(), ib.Rect.Dy())
	}
	limit := int64(c.failPPM) * 0xffff / PPM
	failed, total := int64(0), int64(ia.Rect.Dx())*int64(ia.Rect.Dy())
	for p := 0; p < len(ia.Pix); p += 8 {
		for ch := 0; ch < 8; ch += 2 {
			x := int64(ia.Pix[p+ch])<<8 | int64(ia.Pix[p+ch+1])
			y := int64(ib.Pix[p+ch])<<8 | int64(ib.Pix[p+ch+1])
			if d := x - y; d > limit || -d > limit {
				failed++
				break
			}
		}
	}
	if failed*PPM > total*int64(c.failSharePPM) {
		return false, fmt.Sprintf("%s: %d of %d pixels (%d.%02d%%) differ by more than %d ppm of full scale",
			a.Path, failed, total, failed*100/total, failed*10_000/total%100, c.failPPM)
	}
	return true, ""
}

// decode reads a picture into 16 bits a channel, not premultiplied, so that
// no step of the comparison rounds.
func decode(f File) (*image.NRGBA64, error) {
	config, _, err := image.DecodeConfig(bytes.NewReader(f.Data))
	if err != nil {
		return nil, api.Errorf(api.Invalid, "%s (%d bytes) is not a readable picture: %w", f.Path, len(f.Data), err)
	}
	if config.Width <= 0 || config.Height <= 0 || int64(config.Width)*int64(config.Height) > maxPixels {
		return nil, api.Errorf(api.Invalid, "%s says it has %d×%d pixels; at most %d pixels are judged", f.Path, config.Width, config.Height, maxPixels)
	}
	picture, format, err := image.Decode(bytes.NewReader(f.Data))
	if err != nil {
		return nil, api.Errorf(api.Invalid, "%s (%d bytes) is a broken picture: %w", f.Path, len(f.Data), err)
	}
	if format == "png" && !pngEnds(f.Data) {
		return nil, api.Errorf(api.Invalid, "%s (%d bytes) is a truncated PNG: it has no IEND chunk", f.Path, len(f.Data))
	}
	size := picture.Bounds().Size()
	out := image.NewNRGBA64(image.Rectangle{Max: size})
	draw.Draw(out, out.Rect, picture, picture.Bounds().Min, draw.Src)
	return out, nil
}

// pngEnds reports whether the file ends with its last chunk; Go's decoder
// stops after the pixels and would not miss it.
func pngEnds(data []byte) bool {
	return bytes.HasSuffix(data, []byte("\x00\x00\x00\x00IEND\xaeB`\x82"))
}

func isPicture(name string) bool {
	switch strings.ToLower(path.Ext(name)) {
	case ".png", ".jpg", ".jpeg":
		return true
	}
	return false
}

func comparePaths(a, b []File) string {
	byPath := func(x, y File) int { return strings.Compare(x.Path, y.Path) }
	slices.SortFunc(a, byPath)
	slices.SortFunc(b, byPath)
	names := func(files []File) (list []string) {
		for _, f := range files {
			list = append(list, f.Path)
		}
		return list
	}
	if na, nb := names(a), names(b); !slices.Equal(na, nb) {
		return fmt.Sprintf("files differ: %.200q and %.200q", na, nb)
	}
	return ""
}
