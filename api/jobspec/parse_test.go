package jobspec

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

const minimal = `name: hello
image: docker.io/library/alpine:3.22
price: {max_per_gpu_hour: 0.40, budget: 2}
`

func TestParseDefaults(t *testing.T) {
	f, err := Parse([]byte(minimal), "job.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want := &musterpb.JobSpec{
		Name:      "hello",
		Image:     &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_REGISTRY, Name: "docker.io/library/alpine:3.22"},
		Items:     &musterpb.Items{Count: 1},
		Chunk:     1,
		Resources: &musterpb.Resources{MilliCpus: 1000, MemoryBytes: 1 << 30, DiskBytes: 1 << 30},
		TimeoutMs: time.Hour.Milliseconds(),
		Retries:   3, MaxPriceMicroUsdPerHour: 400_000, BudgetMicroUsd: 2_000_000,
		Verify: &musterpb.Verify{Comparator: "exact", RatePpm: 36_000},
	}
	if !proto.Equal(f.Spec, want) {
		t.Errorf("%v\nwant %v", f.Spec, want)
	}
}

func TestParseEverything(t *testing.T) {
	f, err := Parse([]byte(`# a job
name: render shot 12
image: ./blender.tar
command:
  - blender
  - -b
  - /in/scene/main.blend
  - "{first}"
  - |
    two
    lines
env:
  B: 1.10
  A: true
inputs:
  - /data/z.bin
  - ./scene/
  - {path: ../shared/tex, to: assets/tex}
items:
  range: 1-240x2, 300
chunk: 10
resources:
  gpus: 2
  gpu: [RTX 4090, "A100"]
  min_vram: 24GB
  min_compute_capability: 8.0
  cpus: 1.5
  memory: 16GiB
  disk: 1000000
timeout: 1h30m
retries: 0
price:
  max_per_gpu_hour: $0.400001
  budget: "25"
verify: {comparator: image, rate: 0.1, fail: 0.004, fail_percent: 0.5, same_owner: true}
outputs: files
network: yes
priority: -5
placement:
  spread: owner
  prefer:
    - {gpu: rtx 4090, weight: 50}
    - platform: linux/amd64
  avoid: [{owner: acme, weight: 1}, {worker: wrk-0123456789abcdef}]
`), filepath.Join("jobs", "shot.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	want := &musterpb.JobSpec{
		Name:    "render shot 12",
		Image:   &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_ARCHIVE, Name: "./blender.tar"},
		Command: []string{"blender", "-b", "/in/scene/main.blend", "{first}", "two\nlines\n"},
		Env:     []*musterpb.EnvVar{{Name: "A", Value: "true"}, {Name: "B", Value: "1.10"}},
		Inputs:  []*musterpb.Input{{Path: "assets/tex"}, {Path: "scene"}, {Path: "z.bin"}},
		Items:   &musterpb.Items{Ranges: []*musterpb.ItemRange{{First: 1, Last: 240, Step: 2}, {First: 300, Last: 300, Step: 1}}},
		Chunk:   10,
		Resources: &musterpb.Resources{
			Gpus: 2, GpuModels: []string{"RTX 4090", "A100"}, MinVramBytes: 24e9, MinComputeCapability: "8.0",
			MilliCpus: 1500, MemoryBytes: 16 << 30, DiskBytes: 1e6,
		},
		TimeoutMs: 5400_000, MaxPriceMicroUsdPerHour: 400_001, BudgetMicroUsd: 25_000_000,
		Verify:  &musterpb.Verify{Comparator: "image", RatePpm: 100_000, FailPpm: 4000, FailSharePpm: 5000, SameOwner: true},
		Network: true, Priority: -5,
		Placement: &musterpb.Placement{Spread: musterpb.Spread_SPREAD_OWNER, Affinities: []*musterpb.Affinity{
			{Attribute: "gpu", Value: "rtx 4090", Weight: 50}, {Attribute: "platform", Value: "linux/amd64", Weight: 100},
			{Attribute: "owner", Value: "acme", Weight: -1}, {Attribute: "worker", Value: "wrk-0123456789abcdef", Weight: -100},
		}},
	}
	if !proto.Equal(f.Spec, want) {
		t.Errorf("%v\nwant %v", f.Spec, want)
	}
	local := []LocalInput{{"shared/tex", "assets/tex"}, {"jobs/scene", "scene"}, {"/data/z.bin", "z.bin"}}
	if fmt.Sprint(f.LocalInputs) != fmt.Sprint(local) || f.ImagePath != "jobs/blender.tar" || f.ImageName != "./blender.tar" {
		t.Errorf("%v %s", f.LocalInputs, f.ImagePath)
	}
}

func TestParseLines(t *testing.T) {
	for _, test := range []struct{ inputs, lines, path, local string }{
		{"", "data/p.jsonl", "p.jsonl", "data/p.jsonl"},
		{"inputs: [data/p.jsonl]\n", "data/p.jsonl", "p.jsonl", "data/p.jsonl"},
		{"inputs: [{path: data/p.jsonl, to: a/b}]\n", "./data/p.jsonl", "a/b", "data/p.jsonl"},
		{"inputs: [{path: data, to: a}]\n", "data/x/p.jsonl", "a/x/p.jsonl", "data/x/p.jsonl"},
	} {
		f, err := Parse([]byte(minimal+test.inputs+"items: {lines: "+test.lines+"}\noutputs: lines\n"), "job.yaml")
		if err != nil {
			t.Error(err)
			continue
		}
		if f.Spec.Items.LinesPath != test.path || f.LinesPath != test.local || len(f.Spec.Inputs) != 1 || len(f.LocalInputs) != 1 {
			t.Errorf("%+v: %v %s %v", test, f.Spec.Items, f.LinesPath, f.LocalInputs)
		}
	}
}

// The examples of the documentation are jobs.
func TestDocumentedExamples(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "job.md"))
	if err != nil {
		t.Fatal(err)
	}
	examples := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllSubmatch(doc, -1)
	if len(examples) != 2 {
		t.Errorf("%d examples", len(examples))
	}
	for _, example := range examples {
		if _, err := Parse(example[1], "job.yaml"); err != nil {
			t.Error(err)
		}
	}
}

func TestParseErrors(t *testing.T) {
	rest := "image: a\nprice: {max_per_gpu_hour: 1, budget: 1}\n"
	for _, test := range []struct{ file, want string }{
		{"", `job.yaml: the file is empty; docs/job.md shows an example`},
		{"# nothing\n", `job.yaml: the file is empty; docs/job.md shows an example`},
		{"- a\n", `job.yaml:1:1: the file: want fields (name: value), not a list`},
		{"name", `job.yaml:1:1: the file "name": want fields (name: value), not a single value`},
		{"name: x\nimage: a\n", `job.yaml:1:1: price: is required`},
		{"name: x\nimage: a\nprice: {budget: 1}\n", `job.yaml:3:8: price.max_per_gpu_hour: is required`},
		{rest, `job.yaml:1:1: name: is required`},
		{"name: x\n" + rest + "itmes: {count: 1}\n", `job.yaml:4:1: itmes: unknown field; did you mean "items"?`},
		{"name: x\n" + rest + "resources:\n  gpu_count: 1\n", `job.yaml:5:3: resources.gpu_count: unknown field; the fields here are cpus, disk, gpu, gpu_models, gpus, memory, min_compute_capability, min_vram`},
		{"name: x\n" + rest + "verify: {compartor: image}\n", `job.yaml:4:10: verify.compartor: unknown field; did you mean "comparator"?`},
		{"name: x\n" + rest + "items:\n  range: 10-1\n", `job.yaml:5:10: items.range "10-1": the range is reversed; write 1-10`},
		{"name: x\n" + rest + "items: {range: 1..10}\n", `job.yaml:4:16: items.range "1..10": "1..10" is not a range of whole numbers; write it like 1-240, 1-240x2 or 300`},
		{"name: x\n" + rest + "items: {range: 1-10, count: 2}\n", `job.yaml:4:8: items: want exactly one of range, lines and count`},
		{"name: x\n" + rest + "items: {}\n", `job.yaml:4:8: items: want exactly one of range, lines and count`},
		{"name: x\n" + rest + "items: {count: 0}\n", `job.yaml:4:16: items.count "0": a job has at least one item`},
		{"name: x\n" + rest + "items: {count: -1}\n", `job.yaml:4:16: items.count "-1": want a whole number`},
		{"name: x\n" + rest + "command: python run.py\n", `job.yaml:4:10: command "python run.py": want a list with one element per argument, such as ["python", "run.py"]; there is no shell that would split it`},
		{"name: x\n" + rest + "command: []\n", `job.yaml:4:10: command: is empty; leave it out to run the image's own command`},
		{"name: x\n" + rest + "command: [a, [b]]\n", `job.yaml:4:14: command[1]: want a single value, not a list`},
		{"name: x\n" + rest + "command: [a, \"{item} {items}\"]\n", `job.yaml:4:10: command: {item} and {items} exclude each other; use {items} (one run), {first} and {last} (a run per unbroken span) or {item} and {index} (a run per item)`},
		{"name: x\n" + rest + "env:\n  A: ~\n", `job.yaml:5:6: env.A: has no value; give it one or remove the field`},
		{"name: x\n" + rest + "env:\n  A-B: 1\n", `job.yaml:5:3: env "A-B": want a name of letters, digits and underscores that does not start with a digit`},
		{"name: x\n" + rest + "env: [A=1]\n", `job.yaml:4:6: env: want fields (name: value), not a list`},
		{"name: x\n" + rest + "inputs: a\n", `job.yaml:4:9: inputs "a": want a list of paths, not a single value`},
		{"name: x\n" + rest + "inputs: [.]\n", `job.yaml:4:10: inputs[0] ".": names no file below /in; say where it goes with {path: ., to: name}`},
		{"name: x\n" + rest + "inputs: [{to: a}]\n", `job.yaml:4:10: inputs[0]: path is required`},
		{"name: x\n" + rest + "inputs:\n  - a/b\n  - c/b\n", `job.yaml:6:5: inputs "b": two inputs go to this path below /in; give one of them another with {path: …, to: …}`},
		{"name: x\n" + rest + "inputs:\n  - {path: a, to: ../b}\n", `job.yaml:5:5: inputs "../b": a path below /in has no ".."`},
		{"name: x\n" + rest + "chunk: 0\n", `job.yaml:4:8: chunk "0": at least 1`},
		{"name: x\n" + rest + "chunk: 1.5\n", `job.yaml:4:8: chunk "1.5": want a whole number`},
		{"name: x\n" + rest + "timeout: 90\n", `job.yaml:4:10: timeout "90": want a duration with its unit, such as 90s, 45m or 1h30m`},
		{"name: x\n" + rest + "timeout: 200h\n", `job.yaml:4:10: timeout "200h": at most 168h0m0s (7 days)`},
		{"name: x\n" + rest + "timeout: -1s\n", `job.yaml:4:10: timeout "-1s": at least 1ms`},
		{"name: x\n" + rest + "retries: 1000\n", `job.yaml:4:10: retries "1000": at most 100`},
		{"name: x\n" + rest + "priority: 101\n", `job.yaml:4:11: priority "101": at most 100`},
		{"name: x\n" + rest + "outputs: dir\n", `job.yaml:4:10: outputs "dir": want files or lines`},
		{"name: x\n" + rest + "network: true\n", `job.yaml:4:10: network "true": want none or yes`},
		{"name: x\n" + rest + "resources: {disk: 2TiB}\n", `job.yaml:4:19: resources.disk "2TiB": at most 1TiB`},
		{"name: x\n" + rest + "resources: {memory: 24G}\n", `job.yaml:4:21: resources.memory "24G": want a size such as 24GB (10^9 bytes each), 24GiB (2^30 bytes each) or a whole number of bytes`},
		{"name: x\n" + rest + "resources: {cpus: 0}\n", `job.yaml:4:19: resources.cpus "0": at least 0.001`},
		{"name: x\n" + rest + "resources: {cpus: 0.00001}\n", `job.yaml:4:19: resources.cpus "0.00001": at most 3 decimals (a thousandth of a core)`},
		{"name: x\n" + rest + "resources: {gpus: 1, gpu: [A], gpu_models: [B]}\n", `job.yaml:4:44: resources.gpu_models: gpu and gpu_models are the same field; keep one of them`},
		{"name: x\n" + rest + "resources: {gpus: 1, gpu: A100}\n", `job.yaml:4:27: resources.gpu "A100": want a list of GPU models, such as [RTX 4090]`},
		{"name: x\n" + rest + "resources: {min_vram: 8GB}\n", `job.yaml:4:23: resources.min_vram: the job asks for no GPU; add gpus: 1`},
		{"name: x\n" + rest + "resources: {gpus: 1, min_compute_capability: eight}\n", `job.yaml:4:46: resources.min_compute_capability "eight": want major and minor version such as 8.0`},
		{"name: x\n" + rest + "verify: {fail: 0.1}\n", `job.yaml:4:16: verify.fail "0.1": only the image comparator has a tolerance; add comparator: image`},
		{"name: x\n" + rest + "verify: {rate: 3.6%}\n", `job.yaml:4:16: verify.rate "3.6%": want a decimal number such as 0.05`},
		{"name: x\n" + rest + "verify: {rate: 2}\n", `job.yaml:4:16: verify.rate "2": at most 1`},
		{"name: x\n" + rest + "verify: {comparator: image, fail_percent: 0.00001}\n", `job.yaml:4:43: verify.fail_percent "0.00001": at most 4 decimals`},
		{"name: x\n" + rest + "placement: spread\n", `job.yaml:4:12: placement "spread": want fields (name: value), not a single value`},
		{"name: x\n" + rest + "placement: {spread: wide}\n", `job.yaml:4:21: placement.spread "wide": want none or worker or owner`},
		{"name: x\n" + rest + "placement: {prefers: []}\n", `job.yaml:4:13: placement.prefers: unknown field; did you mean "prefer"?`},
		{"name: x\n" + rest + "placement: {prefer: acme}\n", `job.yaml:4:21: placement.prefer "acme": want a list such as [{gpu: RTX 4090}], not a single value`},
		{"name: x\n" + rest + "placement: {prefer: [acme]}\n", `job.yaml:4:22: placement.prefer[0] "acme": want one of gpu, owner, platform and worker, and a weight if you like: {gpu: RTX 4090, weight: 50}`},
		{"name: x\n" + rest + "placement: {prefer: [{owner: a, worker: b}]}\n", `job.yaml:4:22: placement.prefer[0]: want one of gpu, owner, platform and worker, and a weight if you like: {gpu: RTX 4090, weight: 50}`},
		{"name: x\n" + rest + "placement: {avoid: [{weight: 2}]}\n", `job.yaml:4:21: placement.avoid[0]: want one of gpu, owner, platform and worker, and a weight if you like: {gpu: RTX 4090, weight: 50}`},
		{"name: x\n" + rest + "placement: {avoid: [{onwer: a}]}\n", `job.yaml:4:22: placement.avoid[0].onwer: unknown field; did you mean "owner"?`},
		{"name: x\n" + rest + "placement: {avoid: [{owner: [a]}]}\n", `job.yaml:4:29: placement.avoid[0].owner: want a single value, not a list`},
		{"name: x\n" + rest + "placement: {avoid: [{owner: a, weight: -5}]}\n", `job.yaml:4:40: placement.avoid[0].weight "-5": want a whole number, 1 to 100; prefer and avoid say which way`},
		{"name: x\n" + rest + "placement: {prefer: [{owner: a, weight: 101}]}\n", `job.yaml:4:41: placement.prefer[0].weight "101": want a whole number, 1 to 100; prefer and avoid say which way`},
		{"name: x\n" + rest + "placement:\n  prefer:\n    - owner: a\n    - gpu: L4\n", `job.yaml:7:7: placement.prefer "gpu: L4": the job asks for no GPU; add gpus: 1`},
		{"name: x\n" + rest + "placement: {prefer: [{owner: a}], avoid: [{owner: a}]}\n", `job.yaml:4:43: placement.avoid "owner: a": is there twice; give it one weight`},
		{"name: x\n" + rest + "placement: {prefer: [{platform: arm64}]}\n", `job.yaml:4:22: placement.prefer "platform: arm64": want a platform such as linux/amd64`},
		{"name: x\n" + rest + "placement: {prefer: [{owner: ''}]}\n", `job.yaml:4:22: placement.prefer "owner: ": want 1 to 100 printable bytes without spaces around them`},
		{"name: x\n" + rest + "placement: {prefer: [" + strings.Repeat("{owner: a},", 17) + "]}\n", `job.yaml:4:12: placement: 17 entries in prefer and avoid; at most 16 together`},
		{"name: x\nimage: a\nprice: {max_per_gpu_hour: 1e-3, budget: -1}\n", `job.yaml:3:27: price.max_per_gpu_hour "1e-3": want dollars such as 12 or 0.40` + "\n" + `job.yaml:3:41: price.budget "-1": want dollars such as 12 or 0.40`},
		{"name: x\nname: y\n", `job.yaml:2:1: mapping key "name" already defined at [1:1]`},
		{"name: [x\n", `job.yaml:1:7: sequence end token ']' not found`},
		{"a: &x 1\nb: *x\n", `job.yaml:1:4: anchors and aliases are not supported; write the value out`},
		{"a: !!str 1\n", `job.yaml:1:4: YAML tags, directives and complex keys are not supported; remove it, or put the text into quotes`},
		{"name: x\n---\nname: y\n", `job.yaml: 2 YAML documents; a file holds one job`},
		{"name: " + strings.Repeat("[", 1<<19), `job.yaml:1:23: nested too deep; put the text into quotes if it is not meant as YAML`},
		{"name:\n  " + strings.Repeat("- ", 1<<19-8), `job.yaml:2:35: nested too deep; put the text into quotes if it is not meant as YAML`},
		{strings.Repeat("x", MaxFileBytes+1), `job.yaml: 1048577 bytes; a job file has at most 1048576`},
	} {
		_, err := Parse([]byte(test.file), "job.yaml")
		file := shorten(test.file)
		if err == nil || err.Error() != test.want || api.KindOf(err) != api.Invalid {
			t.Errorf("%s\n%v\nwant\n%s", file, err, test.want)
		}
	}
}

func TestParseReportsEveryProblem(t *testing.T) {
	_, err := Parse([]byte(strings.Repeat(" ", 0)+"name: x\nimage: a\nprice: {max_per_gpu_hour: 1, budget: 1}\n"+
		"chunk: a\nretries: b\ntimeout: c\n"), "job.yaml")
	if err == nil || strings.Count(err.Error(), "\n") != 2 {
		t.Errorf("%v", err)
	}
	var many strings.Builder
	for i := range 100 {
		fmt.Fprintf(&many, "unknown_%d: 1\n", i)
	}
	_, err = Parse([]byte(many.String()), "job.yaml")
	if err == nil || !strings.HasSuffix(err.Error(), "and 83 more problems") {
		t.Errorf("%v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(minimal)
	f.Add(minimal + "items:\n  range: 1-10x2,50\ncommand: [a, \"{item}\"]\ninputs: [a, {path: b, to: c}]\n")
	f.Add(minimal + "verify: {comparator: image, fail: 0.1}\nresources: {gpus: 1, min_vram: 8GB}\nenv: {A: |\n  x\n}\n")
	f.Add(minimal + "placement:\n  spread: worker\n  prefer: [{gpu: L4, weight: 1}]\n  avoid: [{owner: a}, {platform: linux/arm64}, {worker: b}]\nresources: {gpus: 1}\n")
	f.Add("? a\n: b\n")
	f.Add("a: &x [*x]\n<<: {b: c}\n")
	f.Fuzz(func(t *testing.T, text string) {
		file, err := Parse([]byte(text), "job.yaml")
		if err != nil {
			if api.KindOf(err) != api.Invalid || !strings.HasPrefix(err.Error(), "job.yaml:") {
				t.Fatalf("%v", err)
			}
			return
		}
		if len(file.LocalInputs) != len(file.Spec.Inputs) {
			t.Fatal("inputs are not parallel")
		}
	})
}
