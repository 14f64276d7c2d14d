package cheat

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/container"
)

// bench runs a program on a cheating runtime, again and again.
type bench struct {
	t    *testing.T
	rt   container.Runtime
	runs int
}

func newBench(t *testing.T, program func(container.Spec) (container.Result, error), kinds ...string) *bench {
	t.Helper()
	fake := &container.Fake{OnRun: func(_ context.Context, spec container.Spec) (container.Result, error) { return program(spec) }}
	rt, err := Wrap(fake, t.TempDir(), kinds...)
	if err != nil {
		t.Fatal(err)
	}
	if rt.Name() != "fake" {
		t.Errorf("a cheating runtime calls itself %q", rt.Name())
	}
	return &bench{t: t, rt: rt}
}

// run returns the result, and the files that are left, by path.
func (b *bench) run(command ...string) (container.Result, map[string]string) {
	b.t.Helper()
	b.runs++
	image := container.Image{Digest: "sha256:x"}
	if err := b.rt.Ensure(b.t.Context(), image); err != nil {
		b.t.Fatal(err)
	}
	out := b.t.TempDir()
	res, err := b.rt.Run(b.t.Context(), container.Spec{ID: fmt.Sprintf("att-%d", b.runs), Image: image, Command: command, Outputs: out, Timeout: time.Minute})
	if err != nil {
		b.t.Fatal(err)
	}
	files := map[string]string{}
	err = filepath.WalkDir(out, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, _ := filepath.Rel(out, path)
		data, err := os.ReadFile(path)
		files[rel] = string(data)
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return res, files
}

func write(spec container.Spec, files map[string]string) (container.Result, error) {
	for name, text := range files {
		path := filepath.Join(spec.Outputs, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return container.Result{}, err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return container.Result{}, err
		}
	}
	return container.Result{}, nil
}

// render plays a renderer: the frames of its arguments, and a note beside them.
func render(spec container.Spec) (container.Result, error) {
	files := map[string]string{"notes.txt": "rendered"}
	for _, frame := range spec.Command[1:] {
		files[frame+"/frame.png"] = "frame " + frame
		files[frame+"/passes/depth.exr"] = "depth " + frame
	}
	return write(spec, files)
}

func TestFewerSamples(t *testing.T) {
	var ran []string
	b := newBench(t, func(spec container.Spec) (container.Result, error) {
		ran = spec.Command
		return write(spec, map[string]string{"frame.png": strings.Join(spec.Command, " ")})
	}, FewerSamples)
	for _, test := range []struct{ told, does string }{
		{"render --samples 128 --frame 7", "render --samples 96 --frame 7"},
		{"render --frame 128 --samples 2", "render --frame 128 --samples 1"},
		{"render --samples 1", "render --samples 1"},
		{"render --samples many", "render --samples many"},
		{"render --samples", "render --samples"},
		{"render --frame 128", "render --frame 128"},
	} {
		told := strings.Fields(test.told)
		before := slices.Clone(told)
		_, files := b.run(told...)
		if got := strings.Join(ran, " "); got != test.does || files["frame.png"] != test.does {
			t.Errorf("told %q, it ran %q", test.told, got)
		}
		if !slices.Equal(told, before) {
			t.Errorf("the caller's command became %q: the manifest would tell", told)
		}
	}
}

func TestStaleFrame(t *testing.T) {
	b := newBench(t, render, StaleFrame)
	_, first := b.run("render", "1")
	if first["1/frame.png"] != "frame 1" || first["1/passes/depth.exr"] != "depth 1" {
		t.Errorf("the first frame is %v", first)
	}
	_, later := b.run("render", "2", "3")
	want := map[string]string{
		"notes.txt": "rendered", "2/frame.png": "frame 1", "2/passes/depth.exr": "depth 1", "3/frame.png": "frame 1", "3/passes/depth.exr": "depth 1",
	}
	if fmt.Sprint(later) != fmt.Sprint(want) {
		t.Errorf("%v; want %v", later, want)
	}
}

// The first run may make several frames; one of them stays honest.
func TestStaleFrameWithinARun(t *testing.T) {
	b := newBench(t, render, StaleFrame)
	_, files := b.run("render", "1", "2", "3")
	for _, frame := range []string{"1", "2", "3"} {
		if files[frame+"/frame.png"] != "frame 1" {
			t.Errorf("frame %s is %q", frame, files[frame+"/frame.png"])
		}
	}
}

func TestMadeUpLine(t *testing.T) {
	b := newBench(t, func(spec container.Spec) (container.Result, error) {
		return write(spec, map[string]string{"results.jsonl": spec.Command[0], "other.jsonl": spec.Command[0]})
	}, MadeUpLine)
	lines := `{"custom_id":"a","completion":"Paris.","tokens":2}` + "\n" + `{"custom_id":"b","completion":"Rome."}` + "\n"
	_, files := b.run(lines)
	want := `{"completion":"yes.","custom_id":"a","tokens":2}` + "\n" + `{"custom_id":"b","completion":"Rome."}` + "\n"
	if files["results.jsonl"] != want || files["other.jsonl"] != lines {
		t.Errorf("%q", files)
	}
	for _, honest := range []string{"", "no JSON\n", `{"embedding":[1]}` + "\n", "[]\n"} {
		if _, files := b.run(honest); files["results.jsonl"] != honest {
			t.Errorf("%q became %q", honest, files["results.jsonl"])
		}
	}
}

// Each kind does what it says and nothing else; a runtime without any is honest.
func TestOthersStayHonest(t *testing.T) {
	line := `{"custom_id":"a","completion":"Paris."}` + "\n"
	program := func(spec container.Spec) (container.Result, error) {
		return write(spec, map[string]string{"1/frame.png": strings.Join(spec.Command, " "), "results.jsonl": line})
	}
	for _, kinds := range [][]string{nil, {FewerSamples}, {StaleFrame}, {MadeUpLine}} {
		b := newBench(t, program, kinds...)
		b.run("render", "--samples", "4")
		_, files := b.run("render", "--samples", "8")
		frame := map[string]string{FewerSamples: "render --samples 6", StaleFrame: "render --samples 4"}[strings.Join(kinds, "")]
		if frame == "" {
			frame = "render --samples 8"
		}
		if files["1/frame.png"] != frame || (files["results.jsonl"] == line) == slices.Contains(kinds, MadeUpLine) {
			t.Errorf("%v: %v", kinds, files)
		}
	}
	b := newBench(t, program, Kinds...)
	b.run("render", "--samples", "4")
	if _, files := b.run("render", "--samples", "8"); files["1/frame.png"] != "render --samples 3" || files["results.jsonl"] == line {
		t.Errorf("all kinds: %v", files)
	}
}

// A run that failed is reported as it is.
func TestFailedRunsAreLeftAlone(t *testing.T) {
	b := newBench(t, func(spec container.Spec) (container.Result, error) {
		if _, err := render(spec); err != nil {
			return container.Result{}, err
		}
		return container.Result{ExitCode: len(spec.Command) - 2}, nil
	}, StaleFrame)
	b.run("render", "1")
	res, files := b.run("render", "2", "3")
	if res.ExitCode != 1 || files["2/frame.png"] != "frame 2" {
		t.Errorf("%+v %v", res, files)
	}
}

func TestUnknownKind(t *testing.T) {
	if _, err := Wrap(&container.Fake{}, t.TempDir(), FewerSamples, "be-evil"); api.KindOf(err) != api.Invalid || !strings.Contains(err.Error(), `cheat "be-evil"`) {
		t.Errorf("%v", err)
	}
}
