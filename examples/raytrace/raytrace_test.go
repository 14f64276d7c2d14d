package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"image"
	"image/png"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

func exampleScene(t testing.TB) *sceneFile {
	t.Helper()
	s, err := loadScene("scene.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func digest(img *image.NRGBA64) string {
	sum := sha256.Sum256(img.Pix)
	return hex.EncodeToString(sum[:])
}

// The digest is of pixels, not of a file, so that a newer compressor in the
// standard library does not change it. It holds on every architecture.
func TestGoldenFrame(t *testing.T) {
	const want = "377bd70abb48afd9a55aea60184f9f7022a5357a8601470373fd07318f00a1ab"
	img := render(exampleScene(t).build(9), 9, options{width: 48, height: 27, samples: 4, seed: 1})
	if got := digest(img); got != want {
		t.Errorf("the pixels of frame 9 at 48x27 have digest\n%s, want\n%s", got, want)
	}
}

func TestFrameDoesNotDependOnScheduling(t *testing.T) {
	s := exampleScene(t)
	o := options{width: 40, height: 24, samples: 3, seed: 7}
	before := runtime.GOMAXPROCS(1)
	defer runtime.GOMAXPROCS(before)
	want := digest(render(s.build(3), 3, o))
	runtime.GOMAXPROCS(7)
	for range 3 {
		if got := digest(render(s.build(3), 3, o)); got != want {
			t.Fatal("seven processors made another picture than one")
		}
	}
}

func TestSeedFrameAndSamplesMatter(t *testing.T) {
	s := exampleScene(t)
	base := options{width: 24, height: 16, samples: 2, seed: 1}
	seed, samples := base, base
	seed.seed, samples.samples = 2, 3
	digests := map[string]string{
		digest(render(s.build(1), 1, base)):    "frame 1",
		digest(render(s.build(2), 2, base)):    "frame 2",
		digest(render(s.build(1), 1, seed)):    "seed 2",
		digest(render(s.build(1), 1, samples)): "3 samples",
	}
	if len(digests) != 4 {
		t.Errorf("pictures that should differ are the same; left are %v", digests)
	}
}

func TestRunWritesOneDirectoryPerFrame(t *testing.T) {
	out := t.TempDir()
	var stderr bytes.Buffer
	code := run([]string{"--scene", "scene.json", "--frames", "2,4-5", "--width", "16", "--height", "9", "--samples", "1", "--out", out}, &stderr)
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, &stderr)
	}
	files, err := filepath.Glob(filepath.Join(out, "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	hidden, err := filepath.Glob(filepath.Join(out, "*", ".*"))
	if err != nil || len(hidden) > 0 {
		t.Errorf("left behind: %v (%v)", hidden, err)
	}
	if len(files) != 3 {
		t.Fatalf("files %v: want three frames", files)
	}
	f, err := os.Open(filepath.Join(out, "4", "frame.png"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := png.Decode(f)
	if err != nil {
		t.Fatal(err)
	}
	if _, deep := img.(*image.RGBA64); !deep || img.Bounds().Dx() != 16 || img.Bounds().Dy() != 9 {
		t.Errorf("frame 4 is a %T of %v: want 16 bits per channel, 16x9", img, img.Bounds())
	}
}

func TestRunRefuses(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.json")
	if err := os.WriteFile(bad, []byte(`{"frames": 3, "colour": 1}`), 0o644); err != nil {
		t.Fatal(err)
	}
	blocked := filepath.Join(dir, "file")
	if err := os.WriteFile(blocked, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args    string
		code    int
		problem string
	}{
		{"--frame 1", exitUsage, "--scene is missing"},
		{"--scene scene.json", exitUsage, "either --frame or --frames"},
		{"--scene scene.json --frame 1 --frames 2", exitUsage, "either --frame or --frames"},
		{"--scene scene.json --frame 25", exitUsage, "25 is out of range: want 1 to 24"},
		{"--scene scene.json --frame 0", exitUsage, "0 is out of range"},
		{"--scene scene.json --frames 3-x", exitUsage, `"3-x"`},
		{"--scene scene.json --frame 1 --width 0", exitUsage, "--width 0: want 1 to"},
		{"--scene scene.json --frame 1 --height -4", exitUsage, "--height -4"},
		{"--scene scene.json --frame 1 --width 16000 --height 16000", exitUsage, "at most"},
		{"--scene scene.json --frame 1 --samples 0", exitUsage, "--samples 0"},
		{"--scene scene.json --frame 1 --seed x", exitUsage, `"x"`},
		{"--scene scene.json --frame 1 --fps 3", exitUsage, "-fps"},
		{"--scene scene.json --frame 1 extra", exitUsage, `"extra"`},
		{"--scene " + bad + " --frame 1", exitFailure, `unknown field "colour"`},
		{"--scene " + dir + "/none.json --frame 1", exitFailure, "none.json"},
		{"--scene scene.json --frame 1 --width 2 --height 2 --samples 1 --out " + blocked, exitFailure, "frame 1:"},
		{"--help", 0, "-samples"},
	} {
		var stderr bytes.Buffer
		code := run(strings.Fields(c.args), &stderr)
		if code != c.code || !strings.Contains(stderr.String(), c.problem) {
			t.Errorf("raytrace %s: exit code %d, %q; want %d and %q", c.args, code, stderr.String(), c.code, c.problem)
		}
	}
}

const tinyScene = `{"frames": 2, "camera": {"fov": 40, "keys": [{"frame": 1, "from": [0,1,5], "at": [0,1,0]}]},
"materials": {"m": {"type": "diffuse", "color": [1,1,1]}}, "objects": [{"material": "m", "sphere": {"center": [0,1,0], "radius": 1}}]}`

func TestParseSceneRefuses(t *testing.T) {
	if _, err := parseScene([]byte(tinyScene)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ from, to, problem string }{
		{`"frames": 2`, `"frames": 0`, "frames: 0: want 1 to"},
		{`"fov": 40`, `"fov": 4000`, "camera.fov: 4000"},
		{`"fov": 40`, `"fog": 40`, `unknown field "fog"`},
		{`"at": [0,1,0]`, `"at": [0,1]`, "[0,1]: want three numbers"},
		{`"at": [0,1,0]`, `"at": [0,9,5]`, "straight up"},
		{`"keys": [{`, `"keys": [{"frame": 1, "from": [0,1,5], "at": [0,1,0]}, {`, "camera.keys[1].frame: 1"},
		{`"type": "diffuse"`, `"type": "wood"`, `materials.m.type: "wood"`},
		{`"color": [1,1,1]`, `"color": [1,2,1]`, "only a light may be above 1"},
		{`"color": [1,1,1]`, `"color": [1,-1,1]`, "materials.m.color: -1"},
		{`"material": "m"`, `"material": "n"`, `objects[0].material: "n": no such material`},
		{`"radius": 1`, `"radius": 0`, "objects[0].sphere.radius: 0"},
		{`"radius": 1}`, `"radius": 1}, "plane": {"point": [0,0,0], "normal": [0,1,0]}`, "2 shapes"},
		{`"sphere": {"center": [0,1,0], "radius": 1}`, `"plane": {"point": [0,0,0], "normal": [0,0,0]}`, "no direction"},
		{`"sphere": {"center": [0,1,0], "radius": 1}`, `"mesh": {"vertices": [[0,0,0]], "faces": [[0,0,1]]}`, "vertex 1: there are 1"},
		{`"sphere": {"center": [0,1,0], "radius": 1}`, `"mesh": {"vertices": [[0,0,0]], "faces": [[0,0]]}`, "2 corners"},
		{`"radius": 1}}]}`, `"radius": 1}}]} {}`, "follows the scene"},
	} {
		text := strings.Replace(tinyScene, c.from, c.to, 1)
		if text == tinyScene {
			t.Errorf("%q is not in the scene", c.from)
		}
		if _, err := parseScene([]byte(text)); err == nil || !strings.Contains(err.Error(), c.problem) {
			t.Errorf("with %s: error %v; want one with %q", c.to, err, c.problem)
		}
	}
}

// Whatever the parser accepts must render to numbers.
func FuzzScene(f *testing.F) {
	f.Add([]byte(tinyScene))
	whole, err := os.ReadFile("scene.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add([]byte(strings.Replace(tinyScene, `"sphere": {"center": [0,1,0], "radius": 1}`,
		`"mesh": {"vertices": [[0,0,0],[1,0,0],[0,1,0]], "faces": [[0,1,2]]}, "motion": [{"frame": 1, "move": [0,0,0]}]`, 1)))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseScene(b)
		if err != nil || len(s.Objects) > 200 {
			return
		}
		w := s.build(min(2, s.Frames))
		for _, v := range []vec{w.camera.from, w.camera.forward, w.camera.right} {
			if math.IsNaN(v.dot(v)) || math.IsInf(v.dot(v), 0) {
				t.Fatalf("the camera is at %+v", w.camera)
			}
		}
		render(w, 1, options{width: 3, height: 2, samples: 1, seed: 1})
	})
}

func TestSincosDegrees(t *testing.T) {
	for d := -720.0; d <= 720; d += 7.3 {
		sin, cos := sincosDegrees(d)
		wantSin, wantCos := math.Sincos(d * math.Pi / 180)
		if math.Abs(sin-wantSin) > 1e-14 || math.Abs(cos-wantCos) > 1e-14 {
			t.Errorf("%v degrees: %v, %v; want %v, %v", d, sin, cos, wantSin, wantCos)
		}
	}
}

func TestFiveTwelfths(t *testing.T) {
	for _, x := range []float64{0.0031309, 0.01, 0.2, 0.5, 0.999, 1} {
		if got, want := fiveTwelfths(x), math.Pow(x, 5.0/12); math.Abs(got-want) > 1e-14 {
			t.Errorf("%v^(5/12) = %v, want %v", x, got, want)
		}
	}
}

func TestPermute(t *testing.T) {
	for n := uint32(1); n < 70; n++ {
		seen := make(map[uint32]bool)
		for i := range n {
			seen[permute(i, n, 0xabcdef*n)] = true
		}
		if len(seen) != int(n) {
			t.Errorf("a permutation of %d has %d values", n, len(seen))
		}
	}
}

// The tree must find what asking every shape finds.
func TestHierarchyAgreesWithSearch(t *testing.T) {
	w := exampleScene(t).build(6)
	s := newSampler(3, 0, 0, 0, 1)
	for range 3000 {
		r := ray{sphere(s.one(), s.one()).scale(float64(6 * s.one())).add(vec{y: 2}), sphere(s.one(), s.one())}
		want := math.Inf(1)
		for i := range w.tree.shapes {
			want = min(want, w.tree.shapes[i].hit(r))
		}
		if got, _ := w.tree.nearest(r, math.Inf(1)); got != want {
			t.Fatalf("ray %+v: the tree finds a shape at %v, search at %v", r, got, want)
		}
	}
}

func BenchmarkFrame(b *testing.B) {
	w := exampleScene(b).build(5)
	for b.Loop() {
		render(w, 5, options{width: 160, height: 90, samples: 16, seed: 1})
	}
}
