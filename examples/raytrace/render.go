package main

import (
	"bufio"
	"errors"
	"image"
	"image/png"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
)

// options is what the flags say about every frame.
type options struct {
	width, height, samples int
	seed                   uint64
}

// render traces a frame. Rows are shared among the processors; a pixel depends
// on the scene, the seed, the frame's number and its place alone, so how they
// are shared cannot be seen in the result.
func render(w *world, frame int, o options) *image.NRGBA64 {
	img := image.NewNRGBA64(image.Rect(0, 0, o.width, o.height))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), o.height) {
		wg.Go(func() {
			for {
				y := int(next.Add(1)) - 1
				if y >= o.height {
					return
				}
				w.renderRow(img, frame, y, o)
			}
		})
	}
	wg.Wait()
	return img
}

func (w *world) renderRow(img *image.NRGBA64, frame, y int, o options) {
	height := float64(o.height)
	aspect := float64(o.width) / height
	for x := range o.width {
		s := newSampler(o.seed, frame, x, y, o.samples)
		var sum vec
		for n := range o.samples {
			s.begin(n)
			dx, dy := s.two()
			px := (float64(x) + 0.5 + tent(dx)) / float64(o.width)
			py := (float64(y) + 0.5 + tent(dy)) / height
			r := w.camera.ray(float64((float64(2*px)-1)*aspect), 1-float64(2*py), &s)
			sum = sum.add(bounded(w.radiance(r, &s), brightest))
		}
		c := sum.scale(w.exposure / float64(o.samples))
		row := img.Pix[img.PixOffset(x, y):]
		for i := range 3 {
			v := encode(c.axis(i))
			row[2*i], row[2*i+1] = byte(v>>8), byte(v)
		}
		row[6], row[7] = 0xff, 0xff
	}
}

// tent turns a uniform number into an offset of up to a pixel with a linear
// fall-off, which smooths edges without blurring them.
func tent(u float64) float64 {
	if u < 0.5 {
		return math.Sqrt(float64(2*u)) - 1
	}
	return 1 - math.Sqrt(float64(2*(1-u)))
}

// encode turns light into a 16-bit sRGB value: K. Narkowicz' fit of the ACES
// film curve, then the sRGB curve.
func encode(x float64) uint16 {
	if !(x > 0) {
		return 0
	}
	x = float64(x*(float64(2.51*x)+0.03)) / (float64(x*(float64(2.43*x)+0.59)) + 0.14)
	x = min(1, x)
	if x <= 0.0031308 {
		x = float64(12.92 * x)
	} else {
		x = float64(1.055*fiveTwelfths(x)) - 0.055
	}
	return uint16(float64(x*65535) + 0.5)
}

// fiveTwelfths is x^(5/12) for x in (0, 1]: the square roots are exactly
// rounded, and the cube root of x^(1/4) is Newton's method from a start that
// eight steps always bring to the last bits. math.Pow is not the same bits on
// every architecture.
func fiveTwelfths(x float64) float64 {
	q := math.Sqrt(math.Sqrt(x))
	r := float64(0.6*q) + 0.4
	for range 8 {
		r = float64((float64(2*r) + q/float64(r*r)) / 3)
	}
	r2 := float64(r * r)
	return float64(float64(r2*r2) * r)
}

// writeFrame leaves the picture at <out>/<frame>/frame.png. The name appears
// only once the file is complete.
func writeFrame(out string, frame int, img image.Image) (err error) {
	dir := filepath.Join(out, strconv.Itoa(frame))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	part := filepath.Join(dir, ".frame.png.part")
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			if gone := os.Remove(part); gone != nil && !errors.Is(gone, fs.ErrNotExist) {
				err = errors.Join(err, gone)
			}
		}
	}()
	b := bufio.NewWriterSize(f, 1<<16)
	if err := errors.Join(png.Encode(b, img), b.Flush(), f.Close()); err != nil {
		return err
	}
	return os.Rename(part, filepath.Join(dir, "frame.png"))
}
