package jobspec

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

func ranges(t *testing.T, s string) *musterpb.Items {
	t.Helper()
	r, err := parseRanges(s)
	if err != nil {
		t.Fatal(err)
	}
	return &musterpb.Items{Ranges: r}
}

func TestItems(t *testing.T) {
	for _, test := range []struct {
		items  string
		values []uint64
	}{
		{"7", []uint64{7}},
		{"1-4", []uint64{1, 2, 3, 4}},
		{"1-8x3", []uint64{1, 4, 7}},
		{"10-11, 1-2", []uint64{10, 11, 1, 2}},
		{"0-6x2,1-7x2", []uint64{0, 2, 4, 6, 1, 3, 5, 7}},
		{"5-6x100,6", []uint64{5, 6}},
	} {
		items := ranges(t, test.items)
		n, err := Count(items)
		if err != nil {
			t.Errorf("%s: %v", test.items, err)
			continue
		}
		var values []uint64
		for i := range n {
			values = append(values, Value(items, i))
		}
		if !slices.Equal(values, test.values) {
			t.Errorf("%s: %v, want %v", test.items, values, test.values)
		}
	}
	if v := Value(&musterpb.Items{Count: 5}, 3); v != 3 {
		t.Errorf("counted item 3 has the value %d", v)
	}
}

func TestItemErrors(t *testing.T) {
	for _, test := range []struct {
		items *musterpb.Items
		want  string
	}{
		{nil, `items.count "0": a job has at least one item`},
		{&musterpb.Items{LinesPath: "x"}, `items.lines "0": a job has at least one item`},
		{&musterpb.Items{Count: 10_000_001}, `items.count "10000001": more than 10000000 items; split the job`},
		{&musterpb.Items{Count: 1, Ranges: []*musterpb.ItemRange{{Last: 1, Step: 1}}}, `items: ranges exclude count and lines; keep one of them`},
		{&musterpb.Items{Ranges: []*musterpb.ItemRange{nil}}, `items.range "0x0": the step is 0; write 1 or more`},
		{ranges(t, "10-1"), `items.range "10-1": the range is reversed; write 1-10`},
		{ranges(t, "1-5,4-9"), `items.range "4-9": 4 is also in "1-5"; name every item once`},
		{ranges(t, "1-9x2,2-9x3"), `items.range "2-9x3": 5 is also in "1-9x2"; name every item once`},
		{ranges(t, "3,3"), `items.range "3": 3 is also in "3"; name every item once`},
		{ranges(t, "0-10000000"), `items.range "0-10000000": more than 10000000 items in all; split the job`},
		{ranges(t, "0-9999999,10000000"), `items.range "10000000": more than 10000000 items in all; split the job`},
		{ranges(t, "9007199254740992"), `items.range "9007199254740992": item values and steps are at most 9007199254740991`},
	} {
		_, err := Count(test.items)
		if err == nil || err.Error() != test.want || api.KindOf(err) != api.Invalid {
			t.Errorf("%v: %v\nwant %s", test.items, err, test.want)
		}
	}
}

// Overlaps are found by arithmetic; here they are found by trying.
func TestOverlapProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		items := &musterpb.Items{}
		seen, twice := map[uint64]bool{}, false
		for range rapid.IntRange(1, 4).Draw(t, "ranges") {
			r := &musterpb.ItemRange{First: rapid.Uint64Range(0, 60).Draw(t, "first"), Step: rapid.Uint64Range(1, 15).Draw(t, "step")}
			r.Last = r.First + rapid.Uint64Range(0, 60).Draw(t, "span")
			items.Ranges = append(items.Ranges, r)
			for v := r.First; v <= r.Last; v += r.Step {
				twice = twice || seen[v]
				seen[v] = true
			}
		}
		n, err := Count(items)
		if twice != (err != nil) {
			t.Fatalf("overlap %v, error %v", twice, err)
		}
		if err != nil {
			return
		}
		if n != uint64(len(seen)) {
			t.Fatalf("count %d, want %d", n, len(seen))
		}
		for i := range n {
			delete(seen, Value(items, i))
		}
		if len(seen) > 0 {
			t.Fatalf("values %v were not given", seen)
		}
	})
}

func FuzzRanges(f *testing.F) {
	f.Add("1-240x2,300,400-410")
	f.Add("9007199254740991-9007199254740991x9007199254740991,0")
	f.Fuzz(func(t *testing.T, s string) {
		r, err := parseRanges(s)
		if err != nil {
			return
		}
		items := &musterpb.Items{Ranges: r}
		if n, err := Count(items); err == nil {
			Value(items, n-1)
		}
	})
}

// The vectors are those of the SipHash reference implementation for messages
// 00 01 … 07 under the key 00 01 … 0f.
func TestSipHash(t *testing.T) {
	key := [2]uint64{0x0706050403020100, 0x0f0e0d0c0b0a0908}
	if got := sipHash(key, 0x0706050403020100); got != 0x93f5f5799a932462 {
		t.Errorf("%#x", got)
	}
}

func TestPermutationProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		key := rapid.SliceOf(rapid.Byte()).Draw(t, "key")
		n := rapid.Uint64Range(1, 3000).Draw(t, "n")
		p := NewPermutation(key, n)
		seen := make([]bool, n)
		for i := range n {
			at := p.At(i)
			if at >= n || seen[at] {
				t.Fatalf("position %d of %d: %d", i, n, at)
			}
			seen[at] = true
		}
	})
}

// A change of this test's numbers breaks every job that is under way.
func TestPermutationIsStable(t *testing.T) {
	var got []uint64
	p := NewPermutation([]byte("key"), 10)
	for i := range uint64(10) {
		got = append(got, p.At(i))
	}
	big := NewPermutation([]byte("key"), MaxItems)
	got = append(got, big.At(0), big.At(MaxItems-1))
	want := []uint64{2, 6, 4, 7, 3, 8, 9, 1, 0, 5, 880253, 841592}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if other := NewPermutation([]byte("kez"), MaxItems).At(0); other == big.At(0) {
		t.Error("another key gives the same permutation")
	}
}

// Where an item lands must not depend on where it was: a χ² test of the cells
// of a small permutation over many keys.
func TestPermutationIsEven(t *testing.T) {
	const n, keys = 8, 8000
	var cells [n][n]float64
	for k := range keys {
		p := NewPermutation([]byte(strconv.Itoa(k)), n)
		for i := range uint64(n) {
			cells[i][p.At(i)]++
		}
	}
	chi2 := 0.0
	for _, row := range cells {
		for _, c := range row {
			chi2 += (c - keys/n) * (c - keys/n) / (keys / n)
		}
	}
	if chi2 > 90 { // 49 degrees of freedom; 90 is passed once in 3000
		t.Errorf("χ² = %.1f", chi2)
	}
}

func TestTaskItemsCoverTheJob(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		spec := &musterpb.JobSpec{
			Items: &musterpb.Items{Count: rapid.Uint64Range(1, 500).Draw(t, "count")},
			Chunk: rapid.Uint32Range(1, 60).Draw(t, "chunk"),
		}
		seen := map[uint64]bool{}
		tasks := Tasks(spec.Items.Count, spec.Chunk)
		for task := range tasks {
			items := TaskItems(spec, []byte("key"), task)
			if len(items) == 0 || !slices.IsSorted(items) || len(items) > int(spec.Chunk) {
				t.Fatalf("task %d of %d: %v", task, tasks, items)
			}
			for _, i := range items {
				if seen[i] {
					t.Fatalf("item %d is in two tasks", i)
				}
				seen[i] = true
			}
		}
		if len(seen) != int(spec.Items.Count) {
			t.Fatalf("%d of %d items are in tasks", len(seen), spec.Items.Count)
		}
		if items := TaskItems(spec, []byte("key"), tasks); items != nil {
			t.Fatalf("a task too many: %v", items)
		}
	})
}

func BenchmarkPermutationAt(b *testing.B) {
	p := NewPermutation([]byte("key"), MaxItems)
	for i := range b.N {
		p.At(uint64(i) % MaxItems)
	}
}

func BenchmarkTaskItems(b *testing.B) {
	spec := &musterpb.JobSpec{Items: &musterpb.Items{Count: MaxItems}, Chunk: 1}
	for i := range b.N {
		TaskItems(spec, []byte("key"), uint32(i)%MaxItems)
	}
}

func TestCommands(t *testing.T) {
	items := ranges(t, "1-6x2,10-20") // 1 3 5 10 11 12 …
	for _, test := range []struct {
		command string
		indexes []uint64
		want    string
	}{
		{"run", []uint64{0, 1}, "run[0 1]"},
		{"", []uint64{0, 1}, "[0 1]"},
		{"run {items}", []uint64{0, 2, 3}, "run 1,5,10[0 2 3]"},
		{"a{items}b {items}", []uint64{4}, "a11b 11[4]"},
		{"run -s {first} -e {last}", []uint64{1, 2, 3, 4, 6}, "run -s 3 -e 3[1] run -s 5 -e 5[2] run -s 10 -e 11[3 4] run -s 13 -e 13[6]"},
		{"run {last}", []uint64{3, 4, 5}, "run 12[3 4 5]"},
		{"run {item}:{index}", []uint64{2, 3}, "run 5:2[2] run 10:3[3]"},
		{`run {"index":{index},"x":{}} {{item}} {Items}`, []uint64{3}, `run {"index":3,"x":{}} {10} {Items}[3]`},
	} {
		runs, err := Commands(strings.Fields(test.command), items, test.indexes)
		var got []string
		for _, run := range runs {
			got = append(got, strings.Join(run.Command, " ")+fmt.Sprint(run.Indexes))
		}
		if s := strings.Join(got, " "); err != nil || s != test.want {
			t.Errorf("%s %v:\n%s %v\nwant %s", test.command, test.indexes, s, err, test.want)
		}
	}
}

func TestCommandErrors(t *testing.T) {
	items := &musterpb.Items{Count: 100_000}
	all := make([]uint64, 50_000)
	for i := range all {
		all[i] = uint64(i)
	}
	mixed := "command: %s and %s exclude each other; use {items} (one run), {first} and {last} (a run per unbroken span) or {item} and {index} (a run per item)"
	for _, test := range []struct {
		command []string
		indexes []uint64
		want    string
	}{
		{[]string{"{items}", "{first}"}, []uint64{1}, fmt.Sprintf(mixed, "{items}", "{first}")},
		{[]string{"{item}-{items}"}, []uint64{1}, fmt.Sprintf(mixed, "{item}", "{items}")},
		{[]string{"{last}", "{index}"}, []uint64{1}, fmt.Sprintf(mixed, "{last}", "{index}")},
		{[]string{"x"}, nil, "items: a task without items"},
		{[]string{"x"}, []uint64{100_000}, "items: index 100000 is out of order, or not below 100000"},
		{[]string{"x"}, []uint64{2, 2}, "items: index 2 is out of order, or not below 100000"},
		{[]string{"x", "{items}"}, all, `command[1] "{items}": 288889 bytes once {items} is filled in; at most 131071, so lower chunk`},
	} {
		_, err := Commands(test.command, items, test.indexes)
		if err == nil || err.Error() != test.want {
			t.Errorf("%v: %v\nwant %s", test.command, err, test.want)
		}
	}
}

// Whatever the command, its runs produce exactly the items asked for.
func TestCommandsCoverTheItems(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		items := &musterpb.Items{Count: 200}
		indexes := rapid.SliceOfNDistinct(rapid.Uint64Range(0, 199), 1, 50, rapid.ID).Draw(t, "indexes")
		slices.Sort(indexes)
		arg := rapid.SampledFrom([]string{"x", "{items}", "{first}", "{first}{last}", "{item}", "{index}"}).Draw(t, "arg")
		runs, err := Commands([]string{arg}, items, indexes)
		if err != nil {
			t.Fatal(err)
		}
		var got []uint64
		for _, run := range runs {
			got = append(got, run.Indexes...)
		}
		if !slices.Equal(got, indexes) {
			t.Fatalf("%v, want %v", got, indexes)
		}
	})
}

func TestQuantities(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "1024": 1024, "24GB": 24e9, "24GiB": 24 << 30, "1.5 gib": 3 << 29, "0.5KB": 500,
		"1TiB": 1 << 40, "7B": 7, "2000000000000": 2e12,
	} {
		if got, err := ParseSize(s); err != nil || got != want {
			t.Errorf("%s: %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "GB", "24G", "1.5", "-1", "1e9", "0x10", "1.2345678GB", "9999999999999TiB", "24GBps", "1..2GB"} {
		if got, err := ParseSize(s); err == nil {
			t.Errorf("%q: %d", s, got)
		}
	}
	for s, want := range map[string]int64{"0.036": 36_000, "1": 1_000_000, "0.000001": 1, "2.50": 2_500_000} {
		if got, err := parseDecimal(s); err != nil || got != want {
			t.Errorf("%s: %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", ".", "1.", ".5", "-1", "1e3", "0.0000001", "99999999999999999999", "NaN"} {
		if got, err := parseDecimal(s); err == nil {
			t.Errorf("%q: %d", s, got)
		}
	}
	for n, want := range map[int64]string{0: "0B", 1 << 30: "1GiB", 24e9: "24GB", 1500: "1500B", 3 << 20: "3MiB"} {
		if got := FormatSize(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

func TestValidate(t *testing.T) {
	digest := string(api.DigestOf(nil))
	valid := func() *musterpb.JobSpec {
		return &musterpb.JobSpec{
			Name:    "render",
			Image:   &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_REGISTRY, Ref: "host/blender@" + digest, Digest: digest, Platforms: []string{"linux/amd64"}, Name: "host/blender:4"},
			Command: []string{"blender", "{item}"},
			Env:     []*musterpb.EnvVar{{Name: "A", Value: "1"}, {Name: "B"}},
			Inputs:  []*musterpb.Input{{Path: "scene", Digest: digest, Directory: true}, {Path: "x.jsonl", Digest: digest, SizeBytes: 1}},
			Items:   &musterpb.Items{Count: 3},
			Chunk:   1,
			Resources: &musterpb.Resources{
				Gpus: 1, GpuModels: []string{"RTX 4090"}, MinVramBytes: 24e9, MinComputeCapability: "8.0",
				MilliCpus: 1000, MemoryBytes: 1 << 30, DiskBytes: 1 << 30,
			},
			TimeoutMs: 1000, MaxPriceMicroUsdPerHour: 1, BudgetMicroUsd: 1,
			Verify: &musterpb.Verify{Comparator: "exact"},
		}
	}
	if err := Validate(valid()); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		change func(*musterpb.JobSpec)
		want   string
	}{
		{func(s *musterpb.JobSpec) { s.Name = "" }, `name: is required`},
		{func(s *musterpb.JobSpec) { s.Name = "a\nb" }, `name "a\nb": want printable characters without spaces around them`},
		{func(s *musterpb.JobSpec) { s.Image = nil }, `image: is required`},
		{func(s *musterpb.JobSpec) { s.Image.Kind = 9 }, `image.kind "9": want a registry, archive or wasm image`},
		{func(s *musterpb.JobSpec) { s.Image.Ref = "host/blender:4" }, `image.ref "host/blender:4": want a reference pinned to the image's digest, host/name@` + digest},
		{func(s *musterpb.JobSpec) {
			*s.Image = musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_WASM, Digest: digest, SizeBytes: 1, Name: "app.wasm"}
			s.Resources = &musterpb.Resources{Gpus: 1, MilliCpus: 1, MemoryBytes: 1 << 30, DiskBytes: 1 << 30}
			s.Network = true
		}, `resources.gpus "1": a WebAssembly module has no GPUs; use a container image, or leave this out` + "\n" +
			`network "yes": a WebAssembly module has no network; use a container image, or leave this out` + "\n" +
			`resources.cpus "0.001": a WebAssembly module can keep a whole core busy; give it at least 0.1`},
		{func(s *musterpb.JobSpec) {
			s.Image.Kind, s.Resources.Gpus, s.Network = musterpb.ImageKind_IMAGE_KIND_WASM, 0, false
			s.Resources.GpuModels, s.Resources.MinVramBytes, s.Resources.MinComputeCapability = nil, 0, ""
		},
			`image.ref "host/blender@` + digest[:67] + `…": an uploaded image has no reference; leave it empty` + "\n" + `image.size_bytes "0": at least 1`},
		{func(s *musterpb.JobSpec) { s.Inputs[1].Digest = "sha256:AA" }, `inputs "x.jsonl" digest "sha256:AA": want sha256: and 64 lower-case hex digits`},
		{func(s *musterpb.JobSpec) { s.Inputs[1].SizeBytes = -1 }, `inputs "x.jsonl" size_bytes "-1": at least 0`},
		{func(s *musterpb.JobSpec) { s.Inputs[0].Path = "y" }, `inputs "x.jsonl": comes after "y"; sort the inputs by path`},
		{func(s *musterpb.JobSpec) { s.Inputs[0].Path = "../a" }, `inputs "../a": a path below /in has no ".."`},
		{func(s *musterpb.JobSpec) { s.Inputs[0].Path = "/a" }, `inputs "/a": a path below /in is relative; drop the leading slash`},
		{func(s *musterpb.JobSpec) { s.Inputs[0].Path = "a//b" }, `inputs "a//b": write the path below /in as "a/b"`},
		{func(s *musterpb.JobSpec) { s.Inputs[0].Path = `a\b` }, `inputs "a\\b": a path below /in has printable characters and forward slashes only`},
		{func(s *musterpb.JobSpec) { s.Inputs[1].Path = "scene" }, `inputs "scene": two inputs go to this path below /in; give one of them another with {path: …, to: …}`},
		{func(s *musterpb.JobSpec) { s.Inputs[1].Path = "scene/tex/a.png" }, `inputs "scene/tex/a.png": lies inside of the input "scene"; give one of them another path with {path: …, to: …}`},
		{func(s *musterpb.JobSpec) { s.Inputs[0].Executable = true }, `inputs "scene": a directory is not executable; its files carry their own modes`},
		{func(s *musterpb.JobSpec) { s.Env[1].Name = "1A" }, `env "1A": want a name of letters, digits and underscores that does not start with a digit`},
		{func(s *musterpb.JobSpec) { s.Env[1].Name = "A" }, `env.A: is there twice`},
		{func(s *musterpb.JobSpec) { s.Env[0].Name = "C" }, `env.B: comes after C; sort the variables by name`},
		{func(s *musterpb.JobSpec) { s.Items.LinesPath = "x.jsonl" }, ``},
		{func(s *musterpb.JobSpec) { s.Items.LinesPath = "scene/p.jsonl" }, ``},
		{func(s *musterpb.JobSpec) { s.Items.LinesPath = "scene" }, `items.lines "scene": is not a file among the inputs; add it to inputs`},
		{func(s *musterpb.JobSpec) { s.Items.LinesPath = "x.jsonl"; s.Items.Count = 0 }, `items.lines "0": a job has at least one item`},
		{func(s *musterpb.JobSpec) { s.Chunk = 10_001 }, `chunk "10001": at most 10000`},
		{func(s *musterpb.JobSpec) {
			s.Chunk, s.Command = 10_000, []string{"x", "--frames={items}"}
			s.Items = &musterpb.Items{Ranges: []*musterpb.ItemRange{{First: 1e15, Last: 1e15 + 1e6, Step: 1}}}
		}, `command[1] "--frames={items}": up to 170008 bytes once {items} is filled in; at most 131071, so lower chunk`},
		{func(s *musterpb.JobSpec) { s.Command = []string{"", "a\x00"} }, `command[1] "a\x00": want UTF-8 text without zero bytes` + "\n" + `command[0] "": the program's name is empty`},
		{func(s *musterpb.JobSpec) { s.Resources = nil }, `resources: is required`},
		{func(s *musterpb.JobSpec) { s.Resources.Gpus = 0 }, `resources.gpu_models: the job asks for no GPU; add gpus: 1` + "\n" +
			`resources.min_vram: the job asks for no GPU; add gpus: 1` + "\n" + `resources.min_compute_capability: the job asks for no GPU; add gpus: 1`},
		{func(s *musterpb.JobSpec) { s.Resources.DiskBytes = 2 << 40 }, `resources.disk "2TiB": at most 1TiB`},
		{func(s *musterpb.JobSpec) { s.Resources.MemoryBytes = 1 }, `resources.memory "1B": at least 16MiB`},
		{func(s *musterpb.JobSpec) { s.Resources.MinComputeCapability = "8" }, `resources.min_compute_capability "8": want major and minor version such as 8.0`},
		{func(s *musterpb.JobSpec) { s.TimeoutMs = 1 << 62 }, `timeout "4611686018427387904ms": at most 168h0m0s (7 days)`},
		{func(s *musterpb.JobSpec) { s.Retries = 101 }, `retries "101": at most 100`},
		{func(s *musterpb.JobSpec) { s.Priority = -101 }, `priority "-101": at least -100`},
		{func(s *musterpb.JobSpec) { s.BudgetMicroUsd = -1 }, `price.budget "-$0.000001": at least $0.00`},
		{func(s *musterpb.JobSpec) { s.Verify.Comparator = "magic" }, `verify.comparator "magic": want exact or image`},
		{func(s *musterpb.JobSpec) { s.Verify.RatePpm = 1_000_001 }, `verify.rate "1.000001": at most 1`},
		{func(s *musterpb.JobSpec) { s.Verify = nil }, `verify: is required`},
		{func(s *musterpb.JobSpec) { s.Placement = &musterpb.Placement{} }, ``},
		{func(s *musterpb.JobSpec) { s.Placement = &musterpb.Placement{Spread: 3} }, `placement.spread "3": want none, worker or owner`},
		{func(s *musterpb.JobSpec) {
			s.Placement = &musterpb.Placement{Affinities: []*musterpb.Affinity{{Attribute: "gpu", Value: "L4", Weight: 1}, nil, {Attribute: "color", Value: "red", Weight: -1},
				{Attribute: "owner", Value: "a"}, {Attribute: "owner", Value: "b", Weight: 101}, {Attribute: "worker", Value: "a\n", Weight: -101}}}
		}, `placement.prefer ": ": want one of gpu, owner, platform, worker` + "\n" + `placement.avoid "color: red": want one of gpu, owner, platform, worker` + "\n" +
			`placement.prefer "owner: a": weight 0: want -100 to 100, and not 0` + "\n" + `placement.prefer "owner: b": weight 101: want -100 to 100, and not 0` + "\n" +
			`placement.avoid "worker: a\n": want 1 to 100 printable bytes without spaces around them`},
		{func(s *musterpb.JobSpec) { s.Outputs = 7 }, `outputs "7": want files or lines`},
		{func(s *musterpb.JobSpec) { s.Command = make([]string, 1025) }, `command: 1025 arguments; at most 1024`},
		{func(s *musterpb.JobSpec) { s.Inputs = make([]*musterpb.Input, 10_001) }, `inputs: 10001 inputs; at most 10000, so name their directory instead`},
	} {
		spec := valid()
		test.change(spec)
		err := Validate(spec)
		got := ""
		if err != nil {
			got = err.Error()
			if api.KindOf(err) != api.Invalid {
				t.Errorf("%s: kind %s", got, api.KindOf(err))
			}
		}
		if got != test.want {
			t.Errorf("%s\nwant %s", got, test.want)
		}
	}
	if err := Validate(nil); err == nil {
		t.Error("nil is valid")
	}
}

// A specification comes off the wire, so no field may make Validate panic.
func FuzzValidate(f *testing.F) {
	file, err := Parse([]byte("name: x\nimage: a\ninputs: [a]\nenv: {A: 1}\nprice: {max_per_gpu_hour: 1, budget: 2}\nitems: {range: 1-3}\n"), "job.yaml")
	if err != nil {
		f.Fatal(err)
	}
	b, _ := file.Spec.MarshalVT()
	f.Add(b)
	file.Spec.Placement = &musterpb.Placement{Spread: musterpb.Spread_SPREAD_WORKER, Affinities: []*musterpb.Affinity{{Attribute: "owner", Value: "a", Weight: -7}}}
	b, _ = file.Spec.MarshalVT()
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		spec := &musterpb.JobSpec{}
		if spec.UnmarshalVT(b) != nil || Validate(spec) != nil {
			return
		}
		n, err := Count(spec.Items)
		if err != nil {
			t.Fatal(err)
		}
		indexes := TaskItems(spec, []byte("key"), Tasks(n, spec.Chunk)-1)
		if _, err := Commands(spec.Command, spec.Items, indexes); err != nil {
			t.Fatalf("a valid job has no commands: %v", err)
		}
	})
}

func TestValueMatchesTheSlowWay(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	items := ranges(t, "100-200x7,1-50,1000")
	n, err := Count(items)
	if err != nil {
		t.Fatal(err)
	}
	var all []uint64
	for _, r := range items.Ranges {
		for v := r.First; v <= r.Last; v += r.Step {
			all = append(all, v)
		}
	}
	for range 100 {
		i := rng.Uint64N(n)
		if got := Value(items, i); got != all[i] {
			t.Errorf("item %d: %d, want %d", i, got, all[i])
		}
	}
}
