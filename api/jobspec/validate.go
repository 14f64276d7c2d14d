package jobspec

import (
	"cmp"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// The limits of a job. docs/job.md lists them for customers.
const (
	MaxFileBytes    = 1 << 20
	MaxSpecBytes    = 4 << 20 // encoded
	MaxNameBytes    = 100
	MaxCommandArgs  = 1024
	MaxCommandBytes = 128 << 10
	MaxEnv          = 256
	MaxEnvBytes     = 128 << 10 // names and values together
	MaxInputs       = 10_000
	MaxPathBytes    = 1024
	MaxChunk        = 10_000
	MaxGPUs         = 64
	MaxGPUModels    = 64
	MaxMilliCPUs    = 1024 * 1000
	MinMemoryBytes  = 16 << 20
	MaxMemoryBytes  = 64 << 40
	MaxDiskBytes    = 1 << 40
	MaxBlobBytes    = 1 << 40
	MaxTimeout      = 7 * 24 * time.Hour
	MaxRetries      = 100
	MaxPriority     = 100
	MaxPlatforms    = 64
	MaxAffinities   = 16
	MaxWeight       = 100 // of an affinity, of either sign

	maxPrice    = 1_000_000_000 * api.Dollars
	maxProblems = 20 // that one error names
)

// The comparators that a job can ask for.
const (
	ComparatorExact = "exact"
	ComparatorImage = "image"
)

// Validate checks a specification as it arrives at a scheduler: everything
// Parse checks in a job file, and that every image and input is pinned to a
// digest. The error is of kind api.Invalid and names each wrong field with its
// value.
func Validate(spec *musterpb.JobSpec) error {
	problems := check(spec, false)
	if len(problems) == 0 {
		return nil
	}
	var lines []string
	for _, p := range problems {
		lines = append(lines, p.String())
	}
	return api.Errorf(api.Invalid, "%s", joinProblems(lines))
}

func joinProblems(lines []string) string {
	if more := len(lines) - maxProblems; more > 0 {
		lines = append(lines[:maxProblems:maxProblems], fmt.Sprintf("and %d more problems", more))
	}
	return strings.Join(lines, "\n")
}

// problem is a broken rule. Field is where a job file has it.
type problem struct {
	field string
	value string // offending; as the message shows it, empty where there is none
	msg   string
}

func failure(field, value, format string, args ...any) *problem {
	return &problem{field, value, fmt.Sprintf(format, args...)}
}

func (p problem) String() string {
	s := p.field
	if p.value != "" {
		s += " " + p.value
	}
	return s + ": " + p.msg
}

// checker collects problems. Draft is a specification that was just read from a
// file: its image and inputs have no digests yet, its lines are not counted.
type checker struct {
	draft    bool
	problems []problem
}

func check(spec *musterpb.JobSpec, draft bool) []problem {
	c := &checker{draft: draft}
	if spec == nil {
		c.missing("spec")
		return c.problems
	}
	if n := spec.SizeVT(); n > MaxSpecBytes {
		c.failf("spec", "", "%d bytes; at most %d", n, MaxSpecBytes)
		return c.problems
	}
	c.name(spec.Name)
	c.image(spec.Image)
	c.command(spec)
	c.env(spec.Env)
	c.inputs(spec.Inputs)
	c.items(spec)
	c.resources(spec.Resources)
	c.wasm(spec)
	c.limits(spec)
	c.verify(spec.Verify)
	c.placement(spec.Placement, spec.Resources)
	return c.problems
}

// minWasmMilliCPUs bounds how many modules a worker runs side by side: nothing
// holds one to less than a core.
const minWasmMilliCPUs = 100

// wasm refuses what a WebAssembly module can't have.
func (c *checker) wasm(spec *musterpb.JobSpec) {
	if spec.Image.GetKind() != musterpb.ImageKind_IMAGE_KIND_WASM {
		return
	}
	r := spec.Resources
	if r.GetGpus() > 0 {
		c.failf("resources.gpus", strconv.Quote(strconv.FormatUint(uint64(r.Gpus), 10)), "a WebAssembly module has no GPUs; use a container image, or leave this out")
	}
	if spec.Network {
		c.failf("network", `"yes"`, "a WebAssembly module has no network; use a container image, or leave this out")
	}
	if cpus := r.GetMilliCpus(); r != nil && cpus < minWasmMilliCPUs {
		c.failf("resources.cpus", strconv.Quote(strconv.FormatFloat(float64(cpus)/1000, 'f', -1, 64)), "a WebAssembly module can keep a whole core busy; give it at least 0.1")
	}
}

func (c *checker) failf(field, value, format string, args ...any) {
	c.problems = append(c.problems, *failure(field, value, format, args...))
}

func (c *checker) missing(field string) { c.failf(field, "", "is required") }

// within checks a number against its bounds.
func within[N cmp.Ordered](c *checker, field string, n, least, most N, format func(N) string) {
	switch {
	case n < least:
		c.failf(field, quote(format(n)), "at least %s", format(least))
	case n > most:
		c.failf(field, quote(format(n)), "at most %s", format(most))
	}
}

func decimal[N int64 | uint32 | int32](n N) string { return strconv.FormatInt(int64(n), 10) }

func quote(s string) string { return strconv.Quote(shorten(s)) }

func (c *checker) name(name string) {
	switch {
	case name == "":
		c.missing("name")
	case len(name) > MaxNameBytes:
		c.failf("name", quote(name), "%d bytes; at most %d", len(name), MaxNameBytes)
	case !printable(name) || strings.TrimSpace(name) != name:
		c.failf("name", quote(name), "want printable characters without spaces around them")
	}
}

func printable(s string) bool {
	return utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

func (c *checker) image(image *musterpb.Image) {
	if image == nil || c.draft && image.Name == "" {
		c.missing("image")
		return
	}
	if len(image.Name) > MaxPathBytes || !printable(image.Name) {
		c.failf("image", quote(image.Name), "want at most %d printable characters", MaxPathBytes)
	}
	if c.draft {
		return
	}
	if len(image.Platforms) > MaxPlatforms {
		c.failf("image.platforms", "", "%d platforms; at most %d", len(image.Platforms), MaxPlatforms)
	}
	for _, p := range image.Platforms {
		if p == "" || len(p) > MaxNameBytes || !printable(p) {
			c.failf("image.platforms", quote(p), "want a platform such as linux/amd64")
		}
	}
	c.digest("image.digest", image.Digest)
	switch image.Kind {
	case musterpb.ImageKind_IMAGE_KIND_REGISTRY:
		name, found := strings.CutSuffix(image.Ref, "@"+image.Digest)
		if !found || name == "" || len(image.Ref) > MaxPathBytes || strings.ContainsFunc(image.Ref, unicode.IsSpace) || !printable(image.Ref) {
			c.failf("image.ref", quote(image.Ref), "want a reference pinned to the image's digest, host/name@%s", shorten(image.Digest))
		}
	case musterpb.ImageKind_IMAGE_KIND_ARCHIVE, musterpb.ImageKind_IMAGE_KIND_WASM:
		if image.Ref != "" {
			c.failf("image.ref", quote(image.Ref), "an uploaded image has no reference; leave it empty")
		}
		within(c, "image.size_bytes", image.SizeBytes, 1, MaxBlobBytes, decimal)
	default:
		c.failf("image.kind", quote(image.Kind.String()), "want a registry, archive or wasm image")
	}
}

func (c *checker) digest(field, digest string) {
	if _, err := api.ParseDigest(digest); err != nil {
		c.failf(field, quote(digest), "want sha256: and 64 lower-case hex digits")
	}
}

func (c *checker) command(spec *musterpb.JobSpec) {
	if n := len(spec.Command); n > MaxCommandArgs {
		c.failf("command", "", "%d arguments; at most %d", n, MaxCommandArgs)
		return
	}
	total := 0
	for i, arg := range spec.Command {
		total += len(arg)
		if strings.ContainsRune(arg, 0) || !utf8.ValidString(arg) {
			c.failf(fmt.Sprintf("command[%d]", i), quote(arg), "want UTF-8 text without zero bytes")
		}
	}
	if total > MaxCommandBytes {
		c.failf("command", "", "%d bytes in all; at most %d, so put long texts into an input", total, MaxCommandBytes)
	}
	if len(spec.Command) > 0 && spec.Command[0] == "" {
		c.failf("command[0]", `""`, "the program's name is empty")
	}
	if _, p := granularityOf(spec.Command); p != nil {
		c.problems = append(c.problems, *p)
	}
}

var envName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

func (c *checker) env(env []*musterpb.EnvVar) {
	if n := len(env); n > MaxEnv {
		c.failf("env", "", "%d variables; at most %d", n, MaxEnv)
		return
	}
	total, previous := 0, ""
	for i, v := range env {
		name := v.GetName()
		total += len(name) + len(v.GetValue())
		switch {
		case !envName.MatchString(name):
			c.failf("env", quote(name), "want a name of letters, digits and underscores that does not start with a digit")
		case i > 0 && name == previous:
			c.failf("env."+name, "", "is there twice")
		case i > 0 && name < previous:
			c.failf("env."+name, "", "comes after %s; sort the variables by name", previous)
		case strings.ContainsRune(v.GetValue(), 0) || !utf8.ValidString(v.GetValue()):
			c.failf("env."+name, quote(v.GetValue()), "want UTF-8 text without zero bytes")
		}
		previous = name
	}
	if total > MaxEnvBytes {
		c.failf("env", "", "%d bytes in all; at most %d, so put long texts into an input", total, MaxEnvBytes)
	}
}

func (c *checker) inputs(inputs []*musterpb.Input) {
	if n := len(inputs); n > MaxInputs {
		c.failf("inputs", "", "%d inputs; at most %d, so name their directory instead", n, MaxInputs)
		return
	}
	seen := make(map[string]bool, len(inputs))
	for i, in := range inputs {
		to := in.GetPath()
		field := "inputs"
		switch msg := checkTo(to); {
		case msg != "":
			c.failf(field, quote(to), "%s", msg)
		case seen[to]:
			c.failf(field, quote(to), "two inputs go to this path below /in; give one of them another with {path: …, to: …}")
		case i > 0 && to < inputs[i-1].GetPath():
			c.failf(field, quote(to), "comes after %q; sort the inputs by path", shorten(inputs[i-1].GetPath()))
		}
		seen[to] = true
		if c.draft {
			continue
		}
		c.digest(field+" "+quote(to)+" digest", in.GetDigest())
		within(c, field+" "+quote(to)+" size_bytes", in.GetSizeBytes(), 0, MaxBlobBytes, decimal)
		if in.GetDirectory() && in.GetExecutable() {
			c.failf(field, quote(to), "a directory is not executable; its files carry their own modes")
		}
	}
	for _, in := range inputs {
		to := in.GetPath()
		for dir := path.Dir(to); dir != "." && dir != "/"; dir = path.Dir(dir) {
			if seen[dir] {
				c.failf("inputs", quote(to), "lies inside of the input %q; give one of them another path with {path: …, to: …}", shorten(dir))
				break
			}
		}
	}
}

// checkTo is what is wrong with a path below /in; empty for nothing.
func checkTo(to string) string {
	switch {
	case to == "" || to == ".":
		return "names no file below /in; say where it goes with {path: …, to: name}"
	case len(to) > MaxPathBytes:
		return fmt.Sprintf("%d bytes; a path below /in has at most %d", len(to), MaxPathBytes)
	case !printable(to) || strings.Contains(to, `\`):
		return "a path below /in has printable characters and forward slashes only"
	case path.IsAbs(to):
		return "a path below /in is relative; drop the leading slash"
	case slices.Contains(strings.Split(to, "/"), ".."):
		return `a path below /in has no ".."`
	case path.Clean(to) != to:
		return fmt.Sprintf("write the path below /in as %q", path.Clean(to))
	}
	for name := range strings.SplitSeq(to, "/") {
		if len(name) > 255 {
			return fmt.Sprintf("the name %q has %d bytes; at most 255", shorten(name), len(name))
		}
	}
	return ""
}

func (c *checker) items(spec *musterpb.JobSpec) {
	items := spec.Items
	if items == nil {
		c.missing("items")
		return
	}
	if items.LinesPath != "" {
		c.lines(items.LinesPath, spec.Inputs)
	}
	within(c, "chunk", spec.Chunk, 1, MaxChunk, decimal)
	if c.draft && items.LinesPath != "" && items.Count == 0 && len(items.Ranges) == 0 {
		return // the client counts the lines when it reads them
	}
	count, p := countItems(items)
	if p != nil {
		c.problems = append(c.problems, *p)
		return
	}
	if spec.Chunk == 0 || spec.Chunk > MaxChunk {
		return
	}
	// Linux refuses an argument above this size, so no task may need one.
	largest := count - 1
	for _, r := range items.Ranges {
		largest = max(largest, r.Last)
	}
	digits := len(strconv.FormatUint(largest, 10))
	list := int(min(uint64(spec.Chunk), count))*(digits+1) - 1
	for i, arg := range spec.Command {
		uses := strings.Count(arg, "{items}")
		if n := len(arg) + uses*(list-len("{items}")); uses > 0 && n > maxArgBytes {
			c.failf(fmt.Sprintf("command[%d]", i), quote(arg), "up to %d bytes once {items} is filled in; at most %d, so lower chunk", n, maxArgBytes)
		}
	}
}

// lines checks that the file whose lines are the items is among the inputs.
func (c *checker) lines(lines string, inputs []*musterpb.Input) {
	if msg := checkTo(lines); msg != "" {
		c.failf("items.lines", quote(lines), "%s", msg)
		return
	}
	for _, in := range inputs {
		if in.GetPath() == lines && (c.draft || !in.GetDirectory()) {
			return
		}
		if strings.HasPrefix(lines, in.GetPath()+"/") && (c.draft || in.GetDirectory()) {
			return
		}
	}
	c.failf("items.lines", quote(lines), "is not a file among the inputs; add it to inputs")
}

var computeCapability = regexp.MustCompile(`^[1-9][0-9]?\.[0-9]$`)

func (c *checker) resources(r *musterpb.Resources) {
	if r == nil {
		c.missing("resources")
		return
	}
	within(c, "resources.gpus", r.Gpus, 0, MaxGPUs, decimal)
	within(c, "resources.min_vram", r.MinVramBytes, 0, MaxMemoryBytes, FormatSize)
	within(c, "resources.cpus", r.MilliCpus, 1, MaxMilliCPUs, formatMilli)
	within(c, "resources.memory", r.MemoryBytes, MinMemoryBytes, MaxMemoryBytes, FormatSize)
	within(c, "resources.disk", r.DiskBytes, 1, MaxDiskBytes, FormatSize)
	if n := len(r.GpuModels); n > MaxGPUModels {
		c.failf("resources.gpu_models", "", "%d models; at most %d", n, MaxGPUModels)
	}
	for _, m := range r.GpuModels {
		if m == "" || len(m) > MaxNameBytes || !printable(m) {
			c.failf("resources.gpu_models", quote(m), "want the name of a GPU model such as RTX 4090")
		}
	}
	if cc := r.MinComputeCapability; cc != "" && !computeCapability.MatchString(cc) {
		c.failf("resources.min_compute_capability", quote(cc), "want major and minor version such as 8.0")
	}
	if r.Gpus == 0 {
		for _, need := range []struct {
			field string
			set   bool
		}{
			{"resources.gpu_models", len(r.GpuModels) > 0},
			{"resources.min_vram", r.MinVramBytes > 0},
			{"resources.min_compute_capability", r.MinComputeCapability != ""},
		} {
			if need.set {
				c.failf(need.field, "", "the job asks for no GPU; add gpus: 1")
			}
		}
	}
}

func formatMilli(n int64) string {
	s := fmt.Sprintf("%d.%03d", n/1000, n%1000)
	return strings.TrimSuffix(strings.TrimRight(s, "0"), ".")
}

func formatMillis(n int64) string { return (time.Duration(n) * time.Millisecond).String() }

func (c *checker) limits(spec *musterpb.JobSpec) {
	// Comparing milliseconds, not durations: a wire value may overflow one.
	switch ms, most := spec.TimeoutMs, MaxTimeout.Milliseconds(); {
	case ms <= 0:
		c.failf("timeout", quote(decimal(ms)+"ms"), "at least 1ms")
	case ms > most:
		c.failf("timeout", quote(decimal(ms)+"ms"), "at most %s (7 days)", formatMillis(most))
	}
	within(c, "retries", spec.Retries, 0, MaxRetries, decimal)
	within(c, "priority", spec.Priority, -MaxPriority, MaxPriority, decimal)
	money := func(n int64) string { return api.MicroUSD(n).String() }
	within(c, "price.max_per_gpu_hour", spec.MaxPriceMicroUsdPerHour, 0, int64(maxPrice), money)
	within(c, "price.budget", spec.BudgetMicroUsd, 0, int64(maxPrice), money)
	if _, ok := musterpb.OutputMode_name[int32(spec.Outputs)]; !ok {
		c.failf("outputs", quote(spec.Outputs.String()), "want files or lines")
	}
}

func (c *checker) verify(v *musterpb.Verify) {
	if v == nil {
		c.missing("verify")
		return
	}
	if v.Comparator != ComparatorExact && v.Comparator != ComparatorImage {
		c.failf("verify.comparator", quote(v.Comparator), "want %s or %s", ComparatorExact, ComparatorImage)
	}
	millionths := func(n uint32) string { return formatMillionths(int64(n)) }
	within(c, "verify.rate", v.RatePpm, 0, 1e6, millionths)
	within(c, "verify.fail", v.FailPpm, 0, 1e6, millionths)
	within(c, "verify.fail_percent", v.FailSharePpm, 0, 1e6, func(n uint32) string { return formatMillionths(int64(n) * 100) })
}

func formatMillionths(n int64) string {
	s := fmt.Sprintf("%d.%06d", n/1e6, n%1e6)
	return strings.TrimSuffix(strings.TrimRight(s, "0"), ".")
}
