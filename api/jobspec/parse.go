package jobspec

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// The defaults of a job file.
const (
	DefaultChunk       = 1
	DefaultMilliCPUs   = 1000
	DefaultMemoryBytes = 1 << 30
	DefaultDiskBytes   = 1 << 30
	DefaultTimeout     = time.Hour
	DefaultRetries     = 3
	DefaultRatePPM     = 36_000
	DefaultFailPPM     = 1_000  // image comparator: verify.fail
	DefaultFailShare   = 10_000 // image comparator: verify.fail_percent, in ppm
)

// File is a job file as it was read. What only the customer's machine knows is
// beside the specification: the client uploads it and fills in the digests.
type File struct {
	// Spec lacks the digests and sizes of image and inputs, Input.Directory and
	// Input.Executable, and the count of items that are lines.
	Spec *musterpb.JobSpec
	// LocalInputs are the files behind Spec.Inputs, in the same order.
	LocalInputs []LocalInput
	// ImageName is the image as written: a registry reference unless ImagePath
	// is set.
	ImageName string
	// ImagePath is the local file of an image that travels with the job.
	ImagePath string
	// LinesPath is the local file whose lines are the items; empty for others.
	LinesPath string
}

// LocalInput is an input before its upload.
type LocalInput struct {
	Path string // on this machine; relative paths start at the job file
	To   string // below /in
}

// Parse reads a job file. Filename is for messages, and local paths in the file
// are relative to its directory. The error is of kind api.Invalid and has one
// line per problem: file:line:column, field, value, and the way out.
func Parse(data []byte, filename string) (*File, error) {
	d := &decoder{filename: filename, places: make(map[string]place)}
	if len(data) > MaxFileBytes {
		return nil, api.Errorf(api.Invalid, "%s: %d bytes; a job file has at most %d", filename, len(data), MaxFileBytes)
	}
	root, err := d.load(string(data))
	if err != nil {
		return nil, err
	}
	file := d.file(root)
	if len(d.messages) == 0 {
		for _, p := range check(file.Spec, true) {
			d.report(p)
		}
	}
	if len(d.messages) > 0 {
		return nil, api.Errorf(api.Invalid, "%s", joinProblems(d.messages))
	}
	return file, nil
}

// place is where a field stands, and its value as written where it is a scalar.
type place struct {
	line, column int
	text         string
}

type decoder struct {
	filename string
	messages []string
	places   map[string]place
}

// node is a value of the document and the path of the field that it is.
type node struct {
	ast.Node
	path string
}

// maxNesting bounds brackets within brackets. The deepest field of a job file
// lies three deep; the YAML parser slows down with the square of the depth.
const maxNesting = 16

// load parses the document and refuses the parts of YAML that a job file does
// not need: whatever makes one text mean another elsewhere in the file.
func (d *decoder) load(text string) (node, error) {
	tokens := lexer.Tokenize(text)
	depth, line, dashes := 0, 0, 0
	for _, t := range tokens {
		switch t.Type {
		case token.AnchorType, token.AliasType, token.MergeKeyType:
			return node{}, d.errorAt(t, "anchors and aliases are not supported; write the value out")
		case token.TagType, token.DirectiveType, token.MappingKeyType:
			return node{}, d.errorAt(t, "YAML tags, directives and complex keys are not supported; remove it, or put the text into quotes")
		case token.SequenceStartType, token.MappingStartType:
			depth++
		case token.SequenceEndType, token.MappingEndType:
			depth--
		case token.SequenceEntryType:
			if t.Position.Line != line {
				line, dashes = t.Position.Line, 0
			}
			dashes++
		}
		if depth > maxNesting || dashes > maxNesting {
			return node{}, d.errorAt(t, "nested too deep; put the text into quotes if it is not meant as YAML")
		}
	}
	doc, err := parser.Parse(tokens, 0)
	if err != nil {
		var syntax yaml.Error
		if errors.As(err, &syntax) && syntax.GetToken() != nil {
			return node{}, d.errorAt(syntax.GetToken(), syntax.GetMessage())
		}
		return node{}, api.Errorf(api.Invalid, "%s: %w", d.filename, err)
	}
	if len(doc.Docs) == 0 || doc.Docs[0].Body == nil {
		return node{}, api.Errorf(api.Invalid, "%s: the file is empty; docs/job.md shows an example", d.filename)
	}
	if len(doc.Docs) > 1 {
		return node{}, api.Errorf(api.Invalid, "%s: %d YAML documents; a file holds one job", d.filename, len(doc.Docs))
	}
	return node{Node: doc.Docs[0].Body}, nil
}

func (d *decoder) errorAt(t *token.Token, msg string) error {
	return api.Errorf(api.Invalid, "%s:%d:%d: %s", d.filename, t.Position.Line, max(1, t.Position.Column), msg)
}

// fail reports a problem at a node: its position, its field, its value if it is
// a scalar, and what to do.
func (d *decoder) fail(n node, format string, args ...any) {
	p := d.mark(n)
	value := ""
	if text, ok := scalarText(n.Node); ok {
		value = quote(text)
	}
	d.message(p, problem{n.path, value, fmt.Sprintf(format, args...)})
}

func (d *decoder) message(p place, problem problem) {
	if problem.field == "" {
		problem.field = "the file"
	}
	d.messages = append(d.messages, fmt.Sprintf("%s:%d:%d: %s", d.filename, p.line, p.column, problem))
}

// report gives a broken rule the place of the closest field around it that the
// file has, and the value as the file spells it.
func (d *decoder) report(p problem) {
	key := p.field
	if p.field == "inputs" || p.field == "env" || p.field == "resources.gpu_models" || p.field == "placement.prefer" || p.field == "placement.avoid" {
		key += " " + p.value // lists and maps: each entry has a place of its own
	}
	for {
		if at, ok := d.places[key]; ok {
			if key == p.field && at.text != "" && p.value != "" {
				p.value = quote(at.text)
			}
			d.message(at, p)
			return
		}
		cut := strings.LastIndexAny(key, ".[ ")
		if cut < 0 {
			d.message(place{line: 1, column: 1}, p)
			return
		}
		key = key[:cut]
	}
}

// mark remembers where the field of n stands.
func (d *decoder) mark(n node) place {
	t := n.GetToken()
	if m, ok := n.Node.(*ast.MappingNode); ok && len(m.Values) > 0 && !m.IsFlowStyle {
		t = m.Values[0].Key.GetToken() // a block mapping's own token is its first colon
	}
	p := place{line: t.Position.Line, column: max(1, t.Position.Column)}
	if text, ok := scalarText(n.Node); ok {
		p.text = text
	}
	d.places[n.path] = p
	return p
}

// scalarText is a scalar as the file spells it, without quotes: "0.40" stays
// "0.40", so that no number goes through a float.
func scalarText(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		return n.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, true
	}
	return "", false
}

func (d *decoder) scalar(n node) (string, bool) {
	d.mark(n)
	text, ok := scalarText(n.Node)
	switch {
	case ok:
		return text, true
	case n.Type() == ast.NullType:
		d.fail(n, "has no value; give it one or remove the field")
	default:
		d.fail(n, "want a single value, not a %s", describe(n))
	}
	return "", false
}

func describe(n node) string {
	switch n.Type() {
	case ast.SequenceType:
		return "list"
	case ast.MappingType, ast.MappingValueType:
		return "mapping"
	case ast.NullType:
		return "missing value"
	}
	return "single value"
}

// sequence is the elements of a list.
func (d *decoder) sequence(n node, want string) []node {
	d.mark(n)
	list, ok := n.Node.(*ast.SequenceNode)
	if !ok {
		d.fail(n, "want %s, not a %s", want, describe(n))
		return nil
	}
	var elements []node
	for i, v := range list.Values {
		e := node{v, fmt.Sprintf("%s[%d]", n.path, i)}
		d.mark(e)
		elements = append(elements, e)
	}
	return elements
}

// entry is a key of a mapping and its value.
type entry struct {
	key   string
	at    *token.Token
	value node
}

func (d *decoder) entries(n node) []entry {
	d.mark(n)
	m, ok := n.Node.(ast.MapNode)
	if !ok || n.Type() == ast.NullType {
		d.fail(n, "want fields (name: value), not a %s", describe(n))
		return nil
	}
	var entries []entry
	for it := m.MapRange(); it.Next(); {
		t := it.Key().GetToken()
		e := entry{key: t.Value, at: t, value: node{it.Value(), t.Value}}
		if n.path != "" {
			e.value.path = n.path + "." + t.Value
		}
		entries = append(entries, e)
	}
	return entries
}

// fields hands each field of a mapping to its reader and refuses the others.
func (d *decoder) fields(n node, readers map[string]func(node)) {
	for _, e := range d.entries(n) {
		read, ok := readers[e.key]
		if !ok {
			at := place{line: e.at.Position.Line, column: max(1, e.at.Position.Column)}
			d.message(at, problem{shorten(e.value.path), "", "unknown field; " + suggest(e.key, readers)})
			continue
		}
		read(e.value)
	}
}

// suggest names the field that was probably meant, or else all of them.
func suggest(key string, readers map[string]func(node)) string {
	names := make([]string, 0, len(readers))
	for name := range readers {
		names = append(names, name)
	}
	slices.Sort(names)
	best, closest := "", 3
	for _, name := range names {
		if dist := distance(strings.ToLower(key), name); dist < closest && dist < len(name) {
			best, closest = name, dist
		}
	}
	if best != "" {
		return fmt.Sprintf("did you mean %q?", best)
	}
	return "the fields here are " + strings.Join(names, ", ")
}

// distance is the Levenshtein distance of two short words.
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// file reads the top level.
func (d *decoder) file(root node) *File {
	spec := &musterpb.JobSpec{
		Image:     &musterpb.Image{},
		Items:     &musterpb.Items{Count: 1},
		Chunk:     DefaultChunk,
		TimeoutMs: DefaultTimeout.Milliseconds(),
		Retries:   DefaultRetries,
		Resources: &musterpb.Resources{
			MilliCpus:   DefaultMilliCPUs,
			MemoryBytes: DefaultMemoryBytes,
			DiskBytes:   DefaultDiskBytes,
		},
		Verify: &musterpb.Verify{Comparator: ComparatorExact, RatePpm: DefaultRatePPM},
	}
	f := &File{Spec: spec}
	var lines node
	d.fields(root, map[string]func(node){
		"name":      func(n node) { spec.Name, _ = d.scalar(n) },
		"image":     func(n node) { d.image(n, f) },
		"command":   func(n node) { spec.Command = d.command(n) },
		"env":       func(n node) { spec.Env = d.env(n) },
		"inputs":    func(n node) { d.inputs(n, f) },
		"items":     func(n node) { lines = d.items(n, spec) },
		"chunk":     func(n node) { spec.Chunk = uint32(d.whole(n, 1<<32-1)) },
		"resources": func(n node) { d.resources(n, spec.Resources) },
		"timeout":   func(n node) { spec.TimeoutMs = d.duration(n) },
		"retries":   func(n node) { spec.Retries = uint32(d.whole(n, 1<<32-1)) },
		"price":     func(n node) { d.price(n, spec) },
		"verify":    func(n node) { d.verify(n, spec.Verify) },
		"outputs": func(n node) {
			spec.Outputs = musterpb.OutputMode(d.choice(n, "files", "lines"))
		},
		"placement": func(n node) { d.placement(n, spec) },
		"network":   func(n node) { spec.Network = d.choice(n, "none", "yes") == 1 },
		"priority":  func(n node) { spec.Priority = int32(d.signed(n)) },
	})
	if lines.Node != nil {
		d.lines(lines, f)
	}
	slices.SortStableFunc(f.LocalInputs, func(a, b LocalInput) int { return cmp.Compare(a.To, b.To) })
	for _, in := range f.LocalInputs {
		spec.Inputs = append(spec.Inputs, &musterpb.Input{Path: in.To})
	}
	if _, ok := root.Node.(ast.MapNode); ok {
		for _, field := range []string{"name", "image", "price"} {
			d.require(field)
		}
	}
	return f
}

// require reports a field that the file lacks, at the mapping that lacks it.
func (d *decoder) require(field string) {
	if _, ok := d.places[field]; ok {
		return
	}
	parent, _, nested := strings.Cut(field, ".")
	if !nested {
		parent = ""
	}
	d.message(d.places[parent], problem{field, "", "is required"})
}

// local is a path of the file as one of this process.
func (d *decoder) local(p string) string {
	if filepath.IsAbs(p) {
		return filepath.Clean(p)
	}
	return filepath.Join(filepath.Dir(d.filename), filepath.FromSlash(p))
}

func (d *decoder) image(n node, f *File) {
	name, ok := d.scalar(n)
	if !ok {
		return
	}
	f.ImageName, f.Spec.Image.Name = name, name
	f.Spec.Image.Kind = musterpb.ImageKind_IMAGE_KIND_REGISTRY
	if isPath(name) {
		f.ImagePath = d.local(name)
		f.Spec.Image.Kind = musterpb.ImageKind_IMAGE_KIND_ARCHIVE
		if strings.HasSuffix(name, ".wasm") {
			f.Spec.Image.Kind = musterpb.ImageKind_IMAGE_KIND_WASM
		}
	}
}

// isPath tells a local file from a registry reference, which never starts with
// a dot or a slash and never ends like an archive.
func isPath(name string) bool {
	for _, prefix := range []string{"./", "../", "/"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	for _, suffix := range []string{".wasm", ".tar", ".tar.gz", ".tgz"} {
		if strings.HasSuffix(name, suffix) {
			return true
		}
	}
	return false
}

func (d *decoder) command(n node) []string {
	if text, ok := scalarText(n.Node); ok {
		quoted := strings.Fields(shorten(text))
		for i, word := range quoted {
			quoted[i] = strconv.Quote(word)
		}
		d.fail(n, "want a list with one element per argument, such as [%s]; there is no shell that would split it", strings.Join(quoted, ", "))
		return nil
	}
	var command []string
	for _, e := range d.sequence(n, "a list with one element per argument") {
		arg, _ := d.scalar(e)
		command = append(command, arg)
	}
	if list, ok := n.Node.(*ast.SequenceNode); ok && len(list.Values) == 0 {
		d.fail(n, "is empty; leave it out to run the image's own command")
	}
	return command
}

func (d *decoder) env(n node) []*musterpb.EnvVar {
	var env []*musterpb.EnvVar
	for _, e := range d.entries(n) {
		value, _ := d.scalar(e.value)
		d.places["env "+quote(e.key)] = place{line: e.at.Position.Line, column: max(1, e.at.Position.Column)}
		env = append(env, &musterpb.EnvVar{Name: e.key, Value: value})
	}
	slices.SortStableFunc(env, func(a, b *musterpb.EnvVar) int { return cmp.Compare(a.Name, b.Name) })
	return env
}

func (d *decoder) inputs(n node, f *File) {
	for _, e := range d.sequence(n, "a list of paths") {
		var p, to string
		ok := true
		if _, isMap := e.Node.(ast.MapNode); isMap {
			d.fields(e, map[string]func(node){
				"path": func(n node) { p, ok = d.scalar(n) },
				"to":   func(n node) { to, _ = d.scalar(n) },
			})
			if _, given := d.places[e.path+".path"]; !given {
				d.fail(e, "path is required")
				continue
			}
		} else {
			p, ok = d.scalar(e)
		}
		if ok {
			d.addInput(f, e, p, to)
		}
	}
}

// addInput takes up an input. Without a destination it keeps its own name.
func (d *decoder) addInput(f *File, n node, p, to string) LocalInput {
	if strings.ContainsRune(p, 0) || p == "" {
		d.fail(n, "names no file")
	}
	if to == "" {
		to = path.Base(path.Clean(filepath.ToSlash(p)))
		if to == "." || to == ".." || to == "/" {
			d.fail(n, "names no file below /in; say where it goes with {path: %s, to: name}", p)
		}
	}
	in := LocalInput{Path: d.local(p), To: to}
	f.LocalInputs = append(f.LocalInputs, in)
	d.places["inputs "+quote(to)] = d.mark(n)
	return in
}

// items reads what the items are and returns the node of lines, which need the
// inputs to be known.
func (d *decoder) items(n node, spec *musterpb.JobSpec) (lines node) {
	given := 0
	d.fields(n, map[string]func(node){
		"range": func(n node) {
			given++
			text, ok := d.scalar(n)
			if !ok {
				return
			}
			ranges, err := parseRanges(text)
			if err != nil {
				d.fail(n, "%v", err)
			}
			spec.Items = &musterpb.Items{Ranges: ranges}
		},
		"lines": func(n node) {
			given++
			lines = n
		},
		"count": func(n node) {
			given++
			spec.Items = &musterpb.Items{Count: d.whole(n, 1<<63)}
		},
	})
	if _, isMap := n.Node.(ast.MapNode); isMap && given != 1 {
		d.fail(n, "want exactly one of range, lines and count")
	}
	return lines
}

// lines finds the file whose lines are the items among the inputs, and adds it
// to them if it is not there.
func (d *decoder) lines(n node, f *File) {
	text, ok := d.scalar(n)
	if !ok {
		return
	}
	f.LinesPath = d.local(text)
	f.Spec.Items = &musterpb.Items{}
	for _, in := range f.LocalInputs {
		if rel, err := filepath.Rel(in.Path, f.LinesPath); err == nil && filepath.IsLocal(rel) {
			f.Spec.Items.LinesPath = path.Join(in.To, filepath.ToSlash(rel))
			return
		}
	}
	f.Spec.Items.LinesPath = d.addInput(f, n, text, "").To
}

func (d *decoder) resources(n node, r *musterpb.Resources) {
	models := func(n node) {
		if len(r.GpuModels) > 0 {
			d.fail(n, "gpu and gpu_models are the same field; keep one of them")
			return
		}
		if _, ok := scalarText(n.Node); ok {
			d.fail(n, "want a list of GPU models, such as [RTX 4090]")
			return
		}
		for _, e := range d.sequence(n, "a list of GPU models") {
			model, _ := d.scalar(e)
			d.places["resources.gpu_models "+quote(model)] = d.places[e.path]
			r.GpuModels = append(r.GpuModels, model)
		}
	}
	d.fields(n, map[string]func(node){
		"gpus":                   func(n node) { r.Gpus = uint32(d.whole(n, 1<<32-1)) },
		"gpu":                    models,
		"gpu_models":             models,
		"min_vram":               func(n node) { r.MinVramBytes = d.size(n) },
		"min_compute_capability": func(n node) { r.MinComputeCapability, _ = d.scalar(n) },
		"cpus": func(n node) {
			millionths := d.decimal(n)
			if millionths%1000 != 0 {
				d.fail(n, "at most 3 decimals (a thousandth of a core)")
			}
			r.MilliCpus = millionths / 1000
		},
		"memory": func(n node) { r.MemoryBytes = d.size(n) },
		"disk":   func(n node) { r.DiskBytes = d.size(n) },
	})
}

func (d *decoder) price(n node, spec *musterpb.JobSpec) {
	d.fields(n, map[string]func(node){
		"max_per_gpu_hour": func(n node) { spec.MaxPriceMicroUsdPerHour = d.dollars(n) },
		"budget":           func(n node) { spec.BudgetMicroUsd = d.dollars(n) },
	})
	if _, isMap := n.Node.(ast.MapNode); isMap {
		d.require("price.max_per_gpu_hour")
		d.require("price.budget")
	}
}

func (d *decoder) verify(n node, v *musterpb.Verify) {
	var image []node
	fail, share := int64(DefaultFailPPM), int64(DefaultFailShare)
	d.fields(n, map[string]func(node){
		"comparator": func(n node) {
			v.Comparator = []string{ComparatorExact, ComparatorImage}[d.choice(n, ComparatorExact, ComparatorImage)]
		},
		"rate":         func(n node) { v.RatePpm = d.millionths(n, 1) },
		"fail":         func(n node) { fail = int64(d.millionths(n, 1)); image = append(image, n) },
		"fail_percent": func(n node) { share = int64(d.millionths(n, 100)); image = append(image, n) },
		"same_owner":   func(n node) { v.SameOwner = d.choice(n, "false", "true") == 1 },
	})
	if v.Comparator == ComparatorImage {
		v.FailPpm, v.FailSharePpm = uint32(fail), uint32(share)
		return
	}
	for _, n := range image {
		d.fail(n, "only the image comparator has a tolerance; add comparator: image")
	}
}

// millionths reads a share of whole (1, or 100 for percent) as parts per
// million of it.
func (d *decoder) millionths(n node, whole int64) uint32 {
	v := d.decimal(n)
	switch {
	case v > whole*1e6:
		d.fail(n, "at most %d", whole)
		return 0
	case v%whole != 0:
		d.fail(n, "at most 4 decimals")
	}
	return uint32(v / whole)
}

func (d *decoder) whole(n node, most uint64) uint64 {
	text, ok := d.scalar(n)
	if !ok {
		return 0
	}
	v, err := strconv.ParseUint(text, 10, 64)
	if err != nil || v > most {
		d.fail(n, "want a whole number")
		return 0
	}
	return v
}

func (d *decoder) signed(n node) int64 {
	text, ok := d.scalar(n)
	if !ok {
		return 0
	}
	v, err := strconv.ParseInt(text, 10, 32)
	if err != nil {
		d.fail(n, "want a whole number, %d to %d", -MaxPriority, MaxPriority)
		return 0
	}
	return v
}

func (d *decoder) decimal(n node) int64 {
	text, ok := d.scalar(n)
	if !ok {
		return 0
	}
	v, err := parseDecimal(text)
	if err != nil {
		d.fail(n, "%v", err)
	}
	return v
}

func (d *decoder) size(n node) int64 {
	text, ok := d.scalar(n)
	if !ok {
		return 0
	}
	v, err := ParseSize(text)
	if err != nil {
		d.fail(n, "%v", err)
	}
	return v
}

func (d *decoder) dollars(n node) int64 {
	text, ok := d.scalar(n)
	if !ok {
		return 0
	}
	v, err := api.ParseDollars(text)
	if err != nil {
		_, reason, _ := strings.Cut(err.Error(), ": ")
		d.fail(n, "%s", reason)
	}
	return int64(v)
}

func (d *decoder) duration(n node) int64 {
	text, ok := d.scalar(n)
	if !ok {
		return 0
	}
	v, err := time.ParseDuration(text)
	if err != nil {
		d.fail(n, "want a duration with its unit, such as 90s, 45m or 1h30m")
	}
	return v.Milliseconds()
}

// choice is the position of the value among the words.
func (d *decoder) choice(n node, words ...string) int {
	text, ok := d.scalar(n)
	if !ok {
		return 0
	}
	i := slices.Index(words, text)
	if i < 0 {
		d.fail(n, "want %s", strings.Join(words, " or "))
		return 0
	}
	return i
}
