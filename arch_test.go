package muster_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/musternet/muster"

// floors are the packages, from the ground up. Imports point down only: a
// package may import packages of lower floors. A reader can then learn one floor after the other, and a
// change reaches only what is above it.
var floors = [][]string{
	{"api", "api/musterpb", "gpu"},
	{"container", "scheduler/table"}, // container's errors have the kinds of api
	{
		"api/blob", "api/jobspec", "api/outputs", "gpu/nvml", "container/docker", "container/wasm", "container/image",
		"verify", "scheduler/ledger", "examples/internal/items",
	},
	{"api/client", "scheduler/state"}, // a client reaches blobs, too
	{"scheduler/archive", "scheduler/place", "scheduler/replica", "worker", "worker/cheat"},
	{"scheduler", "api/server"},
	{"bench/load/fleet", "bench/load/rawraft", "bench/load/report", "bench/sim", "cmd/muster/node", "examples/raytrace", "examples/tinylm", "examples/pack", "proto/generate"},
	{"bench/load/network", "cmd/muster", "examples/demo", ""},
	{"bench/load"},
}

// onlyImporters are the packages that alone may use a library, so that it can
// be replaced, or mended, in one place.
var onlyImporters = map[string][]string{
	"github.com/NVIDIA/go-nvml":       {"gpu/nvml"},                                // a broken driver must not reach anybody else
	"github.com/docker/docker":        {"container/docker"},                        // the hardened profile is in one place
	"github.com/tetratelabs/wazero":   {"container/wasm"},                          // so is the sandbox
	"github.com/hashicorp/raft":       {"scheduler/replica", "bench/load/rawraft"}, // the latter measures it bare
	"github.com/hashicorp/raft-wal":   {"scheduler/replica", "bench/load/rawraft"},
	"github.com/hashicorp/memberlist": {"scheduler/members"},
	"gocloud.dev":                     {"api/blob"},
	"github.com/spf13/cobra":          {"cmd/muster"},
}

// pure packages decide and do not act: the same input gives the same output on
// every scheduler, and tests need no clock, disk or network.
var pure = []string{"verify", "scheduler/table", "scheduler/ledger", "scheduler/state", "scheduler/place"}

// impure is what a pure package must not import, and why.
var impure = map[string]string{
	"time": "clocks differ between schedulers; the command carries the time", "os": "no files or environment",
	"net": "no network", "net/http": "no network", "math/rand": "no randomness; the command carries it",
	"math/rand/v2": "no randomness; the command carries it", "crypto/rand": "no randomness; the command carries it",
	"log": "no side effects", "log/slog": "no side effects", "path/filepath": "it depends on the machine; use path",
}

// forbidden are single imports that would break a promise.
var forbidden = []struct{ from, to, why string }{
	{"worker", "scheduler", "a worker runs on other people's machines: it knows the protocol and nothing of the schedulers' inside"},
	{"scheduler", "worker", "a scheduler does not run jobs"},
	{"verify", "scheduler", "the rule can be read, simulated and replayed without a scheduler"},
}

func TestArchitecture(t *testing.T) {
	imports := importsByPackage(t)
	floorOf := map[string]int{}
	for n, list := range floors {
		for _, p := range list {
			floorOf[p] = n
		}
	}
	for pkg, list := range imports {
		from, ok := floorOf[pkg]
		if !ok {
			t.Errorf("package %q has no floor: add it to floors in arch_test.go, as low as its imports allow", pkg)
			continue
		}
		for _, imported := range list {
			if internal, ok := strings.CutPrefix(imported, module+"/"); ok {
				if to, known := floorOf[internal]; known && to >= from {
					t.Errorf("%s (floor %d) imports %s (floor %d): imports point down only", pkg, from, internal, to)
				}
				for _, f := range forbidden {
					if within(pkg, f.from) && within(internal, f.to) {
						t.Errorf("%s imports %s: %s", pkg, internal, f.why)
					}
				}
				continue
			}
			for library, allowed := range onlyImporters {
				if within(imported, library) && !slices.Contains(allowed, pkg) {
					t.Errorf("%s imports %s: only %s may", pkg, imported, strings.Join(allowed, ", "))
				}
			}
			if why := impure[imported]; why != "" && slices.Contains(pure, pkg) {
				t.Errorf("%s is pure and imports %s: %s", pkg, imported, why)
			}
		}
	}
	for p := range floorOf {
		if _, ok := imports[p]; !ok && p != "" {
			t.Errorf("floors in arch_test.go names %q, which does not exist", p)
		}
	}
}

// within reports whether a package is another or below it.
func within(pkg, parent string) bool { return pkg == parent || strings.HasPrefix(pkg, parent+"/") }

// importsByPackage reads the imports of every package of the module, tests left
// out: they may reach anywhere.
func importsByPackage(t *testing.T) map[string][]string {
	t.Helper()
	imports := map[string][]string{}
	err := filepath.WalkDir(".", func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			name := d.Name()
			if file != "." && (strings.HasPrefix(name, ".") || name == "testdata" || name == "tools" || name == "build" || name == "bin") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
			return nil
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		pkg := path.Clean(filepath.ToSlash(filepath.Dir(file)))
		if pkg == "." {
			pkg = ""
		}
		if within(pkg, "api/musterpb") {
			pkg = "api/musterpb" // its RPC half is generated into a folder of its own
		}
		for _, spec := range parsed.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if imported = strings.Replace(imported, "api/musterpb/musterpbconnect", "api/musterpb", 1); pkg != "api/musterpb" || !strings.HasPrefix(imported, module) {
				imports[pkg] = append(imports[pkg], imported)
			}
		}
		if imports[pkg] == nil {
			imports[pkg] = []string{}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return imports
}

// maxDirect bounds the product's direct requirements: each is code that its
// users run and that somebody has to watch.
const maxDirect = 25

func TestFewDependencies(t *testing.T) {
	text, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	direct := 0
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) == 2 && strings.HasPrefix(fields[1], "v") && strings.Contains(fields[0], ".") {
			direct++
		}
	}
	if direct > maxDirect {
		t.Errorf("go.mod has %d direct requirements, at most %d are wanted", direct, maxDirect)
	}
	if direct < 10 {
		t.Errorf("found %d direct requirements: this test no longer reads go.mod right", direct)
	}
}

// Every package says what it is for.
func TestPackageComments(t *testing.T) {
	for pkg := range importsByPackage(t) {
		if !hasPackageComment(t, pkg) {
			t.Errorf("package %q has no doc comment", pkg)
		}
	}
}

func hasPackageComment(t *testing.T, pkg string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(".", filepath.FromSlash(pkg), "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		if parsed.Doc != nil {
			return true
		}
	}
	return false
}
