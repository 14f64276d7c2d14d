// Package wasm runs jobs that are WebAssembly command modules (WASI preview 1)
// inside the worker's own process: no daemon, no image, and the same bytes out
// for the same bytes in on every machine. It is the only importer of wazero.
// DESIGN.md beside this file says what a module sees, and why.
package wasm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/tetratelabs/wazero"
	wasmapi "github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/container"
)

// MaxModuleBytes bounds a module: all of it, and its machine code, is held in
// memory while it runs.
const MaxModuleBytes = 64 << 20

// Options configure a Runtime.
type Options struct {
	// Dir is where modules, their machine code, and the scratch directories of
	// live runs are kept. Nobody but this worker may write there: the machine
	// code is executed as it is found. Required.
	Dir string
}

// Runtime implements container.Runtime with wazero.
type Runtime struct {
	dir     string
	modules container.Gate // one compilation per digest at a time

	mu   sync.Mutex        // guards live
	live map[string]string // run ID → its scratch directory
}

var _ container.Runtime = (*Runtime)(nil)

// New prepares a Runtime. It touches no file.
func New(opts Options) (*Runtime, error) {
	if opts.Dir == "" {
		return nil, api.Errorf(api.Invalid, "wasm: Options.Dir is empty; it must name a directory of this worker")
	}
	return &Runtime{dir: opts.Dir, live: make(map[string]string)}, nil
}

// Name implements container.Runtime.
func (r *Runtime) Name() string { return "wasm" }

// The layout below Options.Dir. A module's directory appears by a rename, so
// one that exists is complete.
func (r *Runtime) modulesDir() string { return filepath.Join(r.dir, "modules") }
func (r *Runtime) runsDir() string    { return filepath.Join(r.dir, "runs") }

func (r *Runtime) moduleDir(digest string) (string, error) {
	hexDigest, ok := strings.CutPrefix(digest, "sha256:")
	if raw, err := hex.DecodeString(hexDigest); !ok || err != nil || len(raw) != sha256.Size {
		return "", api.Errorf(api.Unsupported, "wasm: module digest %q is not sha256:<64 hex digits>", digest)
	}
	return filepath.Join(r.modulesDir(), strings.ToLower(hexDigest)), nil
}

func modulePath(moduleDir string) string { return filepath.Join(moduleDir, "module.wasm") }
func codeDir(moduleDir string) string    { return filepath.Join(moduleDir, "code") }

// Ensure implements container.Runtime. Compiling takes seconds per megabyte of
// module on a slow core and cannot be interrupted; it is done once per digest.
func (r *Runtime) Ensure(ctx context.Context, image container.Image) error {
	dir, err := r.moduleDir(image.Digest)
	if err != nil {
		return err
	}
	leave, err := r.modules.Enter(ctx, dir)
	if err != nil {
		return err
	}
	defer leave()
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if image.Archive == "" {
		return api.Errorf(api.Unsupported, "wasm: image %s is a registry reference (%s); a WebAssembly module travels as a file", image.Digest, image.Ref)
	}
	binary, err := readModule(image)
	if err != nil {
		return err
	}
	return r.install(ctx, dir, binary)
}

func readModule(image container.Image) ([]byte, error) {
	file, err := os.Open(image.Archive)
	if err != nil {
		return nil, fmt.Errorf("wasm: open module: %w", err)
	}
	defer file.Close()
	binary, err := io.ReadAll(io.LimitReader(file, MaxModuleBytes+1))
	if err != nil {
		return nil, fmt.Errorf("wasm: read module: %w", err)
	}
	if len(binary) > MaxModuleBytes {
		return nil, api.Errorf(api.Unsupported, "wasm: module %s has more than %d bytes", image.Digest, MaxModuleBytes)
	}
	sum := sha256.Sum256(binary)
	if got := "sha256:" + hex.EncodeToString(sum[:]); got != image.Digest {
		return nil, fmt.Errorf("wasm: module %s is %s, not %s; remove it and fetch it again", image.Archive, got, image.Digest)
	}
	return binary, nil
}

// install compiles a module into a directory of its own and moves that into place.
func (r *Runtime) install(ctx context.Context, dir string, binary []byte) (err error) {
	if err := os.MkdirAll(r.modulesDir(), 0o700); err != nil {
		return fmt.Errorf("wasm: %w", err)
	}
	partial, err := os.MkdirTemp(r.modulesDir(), ".partial-")
	if err != nil {
		return fmt.Errorf("wasm: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(partial)) }()
	if err := checkTables(binary); err != nil {
		return err
	}
	p, err := load(ctx, partial, binary)
	if err != nil {
		return api.Errorf(api.Unsupported, "wasm: not a WebAssembly module that runs here: %w", err)
	}
	err = errors.Join(p.check(ctx), p.close(ctx))
	if err != nil {
		return err
	}
	if err := os.WriteFile(modulePath(partial), binary, 0o600); err != nil {
		return fmt.Errorf("wasm: keep module: %w", err)
	}
	if err := os.Rename(partial, dir); err != nil {
		return fmt.Errorf("wasm: keep module: %w", err)
	}
	return nil
}

// program is a compiled module with a wazero runtime of its own. Nothing is
// shared between two programs but the machine code on disk, so that closing one
// cannot disturb another.
type program struct {
	cache    wazero.CompilationCache
	runtime  wazero.Runtime
	compiled wazero.CompiledModule
}

// openCache guards the version that wazero finds out and keeps, without a lock,
// when a cache is opened first.
var openCache sync.Mutex

// load compiles binary, or finds its machine code below moduleDir.
func load(ctx context.Context, moduleDir string, binary []byte) (*program, error) {
	openCache.Lock()
	cache, err := wazero.NewCompilationCacheWithDir(codeDir(moduleDir))
	openCache.Unlock()
	if err != nil {
		return nil, err
	}
	p := &program{cache: cache, runtime: wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfig().
		WithCompilationCache(cache).
		WithCloseOnContextDone(true))}
	if p.compiled, err = p.runtime.CompileModule(ctx, binary); err != nil {
		return nil, errors.Join(err, p.close(ctx))
	}
	return p, nil
}

func (p *program) close(ctx context.Context) error {
	return errors.Join(p.runtime.Close(ctx), p.cache.Close(ctx))
}

// check refuses a module that could not start, before anyone is paid to try.
func (p *program) check(ctx context.Context) error {
	if _, ok := p.compiled.ExportedFunctions()["_start"]; !ok {
		return api.Errorf(api.Unsupported, "wasm: the module exports no _start; build a WASI command (GOOS=wasip1, wasm32-wasip1), not a library")
	}
	if _, ok := p.compiled.ExportedMemories()["memory"]; !ok {
		return api.Errorf(api.Unsupported, "wasm: the module exports no memory, which WASI needs")
	}
	if len(p.compiled.ImportedMemories()) > 0 {
		return api.Errorf(api.Unsupported, "wasm: the module imports its memory; only memories of its own are supported")
	}
	host, err := wasi_snapshot_preview1.NewBuilder(p.runtime).Compile(ctx)
	if err != nil {
		return fmt.Errorf("wasm: %w", err)
	}
	defer host.Close(ctx)
	return checkImports(p.compiled.ImportedFunctions(), host.ExportedFunctions())
}

func checkImports(imports []wasmapi.FunctionDefinition, known map[string]wasmapi.FunctionDefinition) error {
	for _, f := range imports {
		module, name, _ := f.Import()
		if _, ok := known[name]; module != wasi_snapshot_preview1.ModuleName || !ok {
			return api.Errorf(api.Unsupported, "wasm: the module imports %s.%s; only %s is provided", module, name, wasi_snapshot_preview1.ModuleName)
		}
	}
	return nil
}

// Forget implements container.Runtime. Live runs of the module go on.
func (r *Runtime) Forget(ctx context.Context, image container.Image) error {
	dir, err := r.moduleDir(image.Digest)
	if err != nil {
		return err
	}
	leave, err := r.modules.Enter(ctx, dir)
	if err != nil {
		return err
	}
	defer leave()
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("wasm: forget module: %w", err)
	}
	return nil
}

// Sweep implements container.Runtime. Programs die with the process; what they
// can leave are scratch directories.
func (r *Runtime) Sweep(ctx context.Context) (int, error) {
	partials, err := filepath.Glob(filepath.Join(r.modulesDir(), ".partial-*"))
	if err != nil {
		return 0, fmt.Errorf("wasm: sweep: %w", err)
	}
	for _, partial := range partials {
		if err := os.RemoveAll(partial); err != nil {
			return 0, fmt.Errorf("wasm: sweep: %w", err)
		}
	}
	entries, err := os.ReadDir(r.runsDir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("wasm: sweep: %w", err)
	}
	removed := 0
	for _, entry := range entries {
		scratch := filepath.Join(r.runsDir(), entry.Name())
		if r.isLive(scratch) {
			continue
		}
		if err := os.RemoveAll(scratch); err != nil {
			return removed, fmt.Errorf("wasm: sweep: %w", err)
		}
		removed++
	}
	return removed, ctx.Err()
}

func (r *Runtime) isLive(scratch string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, live := range r.live {
		if live == scratch {
			return true
		}
	}
	return false
}

// enter makes the scratch directory of a run.
func (r *Runtime) enter(id string) (scratch string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, live := r.live[id]; live {
		return "", api.Errorf(api.Invalid, "wasm: a run with ID %s is live already", id)
	}
	if err := os.MkdirAll(r.runsDir(), 0o700); err != nil {
		return "", fmt.Errorf("wasm: %w", err)
	}
	if scratch, err = os.MkdirTemp(r.runsDir(), "run-"); err != nil {
		return "", fmt.Errorf("wasm: %w", err)
	}
	r.live[id] = scratch
	return scratch, nil
}

// leave removes it.
func (r *Runtime) leave(id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	scratch := r.live[id]
	delete(r.live, id)
	return os.RemoveAll(scratch)
}
