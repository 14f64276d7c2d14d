// Raytrace is a path tracer that renders frames of a scene file, one directory
// per frame. It is an example of a job for muster: an item is a frame, and the
// picture of a frame depends on the scene and the flags alone, so that two
// honest machines agree on it.
//
//	raytrace --scene scene.json --frames 1,3,7-9 --width 320 --height 180 --samples 16 --out /out
//
// leaves /out/1/frame.png, /out/3/frame.png and so on: 16-bit PNG.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/musternet/muster/examples/internal/items"
)

// Bounds on a picture: what still renders in a container of modest memory.
const (
	maxSide    = 16384
	maxPixels  = 64 << 20
	maxSamples = 1 << 16
)

// Exit codes: 2 tells that the command line is wrong and a retry is useless.
const (
	exitFailure = 1
	exitUsage   = 2
)

func main() { os.Exit(run(os.Args[1:], os.Stderr)) }

type flags struct {
	options
	scene, frames, out string
}

func run(args []string, stderr io.Writer) int {
	f, err := parseFlags(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(stderr, "raytrace:", err)
		return exitUsage
	}
	s, err := loadScene(f.scene)
	if err != nil {
		fmt.Fprintln(stderr, "raytrace:", err)
		return exitFailure
	}
	frames, err := items.Parse(f.frames, 1, s.Frames)
	if err != nil {
		fmt.Fprintf(stderr, "raytrace: --frames %q: %v\n", f.frames, err)
		return exitUsage
	}
	for _, frame := range frames {
		start := time.Now()
		if err := writeFrame(f.out, frame, render(s.build(frame), frame, f.options)); err != nil {
			fmt.Fprintf(stderr, "raytrace: frame %d: %v\n", frame, err)
			return exitFailure
		}
		fmt.Fprintf(stderr, "frame %d: %dx%d, %d samples, %.2f s\n", frame, f.width, f.height, f.samples, time.Since(start).Seconds())
	}
	return 0
}

func parseFlags(args []string, stderr io.Writer) (flags, error) {
	var f flags
	set := flag.NewFlagSet("raytrace", flag.ContinueOnError)
	set.SetOutput(stderr)
	set.StringVar(&f.scene, "scene", "", "scene `file` (JSON)")
	set.StringVar(&f.frames, "frames", "", "frames to render: a `list` such as 1,3,7-9")
	frame := set.Int("frame", 0, "one frame to render, instead of --frames")
	set.IntVar(&f.width, "width", 320, "width in pixels")
	set.IntVar(&f.height, "height", 180, "height in pixels")
	set.IntVar(&f.samples, "samples", 16, "paths per pixel")
	set.Uint64Var(&f.seed, "seed", 1, "seed of the random numbers")
	set.StringVar(&f.out, "out", "/out", "`directory` for the frames")
	if err := set.Parse(args); err != nil {
		return f, err
	}
	if set.NArg() > 0 {
		return f, fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	given := make(map[string]bool)
	set.Visit(func(one *flag.Flag) { given[one.Name] = true })
	switch {
	case f.scene == "":
		return f, errors.New("--scene is missing")
	case given["frame"] == given["frames"]:
		return f, errors.New("give either --frame or --frames")
	case f.width < 1 || f.width > maxSide:
		return f, fmt.Errorf("--width %d: want 1 to %d", f.width, maxSide)
	case f.height < 1 || f.height > maxSide:
		return f, fmt.Errorf("--height %d: want 1 to %d", f.height, maxSide)
	case f.width*f.height > maxPixels:
		return f, fmt.Errorf("--width %d --height %d: want at most %d pixels", f.width, f.height, maxPixels)
	case f.samples < 1 || f.samples > maxSamples:
		return f, fmt.Errorf("--samples %d: want 1 to %d", f.samples, maxSamples)
	}
	if given["frame"] {
		f.frames = strconv.Itoa(*frame)
	}
	return f, nil
}
