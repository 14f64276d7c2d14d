package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/outputs"
	"github.com/musternet/muster/container"
	"github.com/musternet/muster/verify"
)

// run is one attempt on this worker.
type run struct {
	assignment *musterpb.Assignment
	cancel     context.CancelFunc
	log        *tail
	// started and report are guarded by the worker's mu.
	started bool
	report  *report // how it ended; nil while it runs
}

// Exit codes that stand for what is not the program's own exit, as shells use
// them. The same job fails with the same code on every owner's machine.
const (
	exitTimeout    = 124
	exitBadOutputs = 65 // EX_DATAERR
	exitBadInputs  = 66 // EX_NOINPUT
	exitBadImage   = 126
	exitKilled     = 137
)

// failure is an attempt without a result, and whose fault that is.
type failure struct {
	blame musterpb.Blame
	code  int32
	err   error
}

func (f *failure) Error() string { return f.err.Error() }

func jobFault(code int32, format string, args ...any) error {
	return &failure{musterpb.Blame_BLAME_JOB, code, fmt.Errorf(format, args...)}
}

// execute runs an attempt from its assignment to the report of its end.
// Nothing of it stays on this machine but the cache.
func (w *Worker) execute(ctx context.Context, r *run) *report {
	a := r.assignment
	dir := filepath.Join(w.attemptsDir(), a.Attempt)
	defer func() {
		if err := removeTree(dir); err != nil {
			w.Logger.Warn("a directory could not be removed", "dir", dir, "err", err)
		}
	}()
	result, err := w.produce(ctx, r, dir)
	log := w.packLog(filepath.Join(dir, "log"))
	if err == nil {
		result.commit.LogDigest = w.addLog(ctx, result, log)
		return result
	}
	failed := &musterpb.AttemptFailed{Attempt: a.Attempt, Reason: err.Error(), Blame: musterpb.Blame_BLAME_WORKER, LogDigest: w.uploadLog(ctx, log), Cancelled: ctx.Err() != nil}
	var f *failure
	if errors.As(err, &f) {
		failed.Blame, failed.ExitCode = f.blame, f.code
	}
	w.Logger.Info("attempt failed", "attempt", a.Attempt, "err", err)
	return &report{failed: failed}
}

// produce runs the program and packs what it left.
func (w *Worker) produce(ctx context.Context, r *run, dir string) (*report, error) {
	a := r.assignment
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("attempt directory: %w", err)
	}
	rt, image, release, err := w.image(ctx, a.Image)
	if err != nil {
		return nil, err
	}
	defer release()
	inputs := filepath.Join(dir, "in")
	releaseInputs, err := w.inputs(ctx, a.Inputs, inputs)
	defer releaseInputs()
	if err != nil {
		return nil, err
	}
	out := filepath.Join(dir, "out")
	if err := w.runAll(ctx, r, rt, image, inputs, out, dir); err != nil {
		return nil, err
	}
	return w.pack(ctx, a, inputs, out, dir)
}

// image makes the job's image ready to run.
func (w *Worker) image(ctx context.Context, m *musterpb.Image) (container.Runtime, container.Image, func(), error) {
	name := "docker"
	if m.Kind == musterpb.ImageKind_IMAGE_KIND_WASM {
		name = "wasm"
	}
	rt := w.Runtimes[name]
	if rt == nil {
		return nil, container.Image{}, nil, fmt.Errorf("this worker does not have the runtime %s", name)
	}
	image, release := container.Image{Ref: m.Ref, Digest: m.Digest}, func() {}
	if m.Kind != musterpb.ImageKind_IMAGE_KIND_REGISTRY {
		path, done, err := w.fetch(ctx, m.Digest, m.SizeBytes)
		if err != nil {
			return nil, image, nil, fmt.Errorf("image %s: %w", m.Name, err)
		}
		image.Ref, image.Archive, release = "", path, done
	}
	unpin, err := w.images.use(ctx, name, image, m.SizeBytes)
	if err != nil {
		release()
		return nil, image, nil, err
	}
	releaseBlob := release
	release = func() { unpin(); releaseBlob() }
	if err := rt.Ensure(ctx, image); err != nil {
		release()
		switch api.KindOf(err) {
		case api.NotFound, api.Unsupported, api.Invalid:
			return nil, image, nil, jobFault(exitBadImage, "image %s: %w", m.Name, err)
		}
		return nil, image, nil, fmt.Errorf("image %s: %w", m.Name, err)
	}
	return rt, image, release, nil
}

// fetch gets a blob into the cache.
func (w *Worker) fetch(ctx context.Context, digest string, size int64) (path string, release func(), err error) {
	path, release, err = w.cache.Get(ctx, api.Digest(digest), func(dst string) error {
		err := w.patiently(ctx, func() error {
			_, err := blob.Fetch(ctx, w.blobs, api.Digest(digest), dst, size)
			return err
		})
		if err != nil {
			return err
		}
		return os.Chmod(dst, 0o555)
	})
	return path, release, ours(err)
}

// The pauses between two tries to reach the blob store.
const (
	firstBlobRetry = 200 * time.Millisecond
	maxBlobRetry   = 15 * time.Second
)

// patiently repeats f while the blob store can't be reached, until ctx ends or
// its patience does.
func (w *Worker) patiently(ctx context.Context, f func() error) error {
	deadline := time.Now().Add(w.BlobPatience)
	for wait := firstBlobRetry; ; wait = min(2*wait, maxBlobRetry) {
		err := f()
		if api.KindOf(err) != api.Unavailable || isLocal(err) || time.Now().Add(wait).After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(wait):
		}
	}
}

// isLocal reports whether an error is of this machine's own disk.
func isLocal(err error) bool {
	var path *fs.PathError
	var link *os.LinkError
	return errors.As(err, &path) || errors.As(err, &link)
}

// ours blames the network for a blob that can't be had or stored, unless this
// machine's own disk is at fault, or the blame is known already.
func ours(err error) error {
	var f *failure
	if err == nil || errors.As(err, &f) || isLocal(err) {
		return err
	}
	return &failure{musterpb.Blame_BLAME_NETWORK, 0, err}
}

// maxFetches bounds the inputs of one attempt that are fetched at the same time.
const maxFetches = 4

// inputs lays out the job's inputs below dst, which is shown as /in. Files are
// hard links into the cache, or copies where that can't be.
func (w *Worker) inputs(ctx context.Context, list []*musterpb.Input, dst string) (release func(), err error) {
	paths, releases := make([]string, len(list)), make([]func(), len(list))
	release = func() {
		for _, f := range releases {
			if f != nil {
				f()
			}
		}
	}
	if err := os.MkdirAll(dst, 0o755); err != nil {
		return release, fmt.Errorf("inputs: %w", err)
	}
	fetching, fetchCtx := errgroup.WithContext(ctx)
	fetching.SetLimit(maxFetches)
	for i, in := range list {
		fetching.Go(func() (err error) {
			if paths[i], releases[i], err = w.input(fetchCtx, in); err != nil {
				return fmt.Errorf("input %s: %w", in.Path, err)
			}
			return nil
		})
	}
	if err := fetching.Wait(); err != nil {
		return release, err
	}
	for i, in := range list {
		if err := link(paths[i], filepath.Join(dst, filepath.FromSlash(in.Path))); err != nil {
			return release, fmt.Errorf("input %s: %w", in.Path, err)
		}
	}
	return release, nil
}

// input gets one input into the cache.
func (w *Worker) input(ctx context.Context, in *musterpb.Input) (path string, release func(), err error) {
	if !in.Directory {
		return w.fetch(ctx, in.Digest, in.SizeBytes)
	}
	path, release, err = w.cache.Get(ctx, api.Digest(in.Digest), func(tree string) error { return w.fetchTree(ctx, in, tree) })
	return path, release, ours(err)
}

// maxTreeFiles bounds the files of an input directory; its bytes are bounded by
// the disk that the owner gave.
const maxTreeFiles = 1_000_000

func (w *Worker) fetchTree(ctx context.Context, in *musterpb.Input, tree string) error {
	archive := tree + ".archive"
	defer os.Remove(archive)
	err := w.patiently(ctx, func() error {
		_, err := blob.Fetch(ctx, w.blobs, api.Digest(in.Digest), archive, in.SizeBytes)
		return err
	})
	if err != nil {
		return err
	}
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	err = blob.ExtractDir(f, tree, blob.Limits{Bytes: w.DiskBytes, Files: maxTreeFiles})
	switch {
	case err == nil:
		return nil
	case api.KindOf(err) == api.Invalid:
		return jobFault(exitBadInputs, "%w", err)
	case api.KindOf(err) == api.TooLarge: // for this machine; others may have room
		return &failure{musterpb.Blame_BLAME_WORKER, 0, err}
	}
	return err
}

// link shows a file or a tree of the cache at dst.
func link(src, dst string) error {
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	return filepath.WalkDir(src, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		to := filepath.Join(dst, rel)
		if d.IsDir() {
			return os.MkdirAll(to, 0o755)
		}
		if os.Link(path, to) == nil {
			return nil
		}
		return copyFile(path, to)
	})
}

func copyFile(src, dst string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o555)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// runAll runs the job's command as often as its placeholders ask for, and
// gathers the outputs in out. The time-out is for all of it.
func (w *Worker) runAll(ctx context.Context, r *run, rt container.Runtime, image container.Image, inputs, out, dir string) error {
	a := r.assignment
	invocations, err := jobspec.Commands(a.Command, a.Items, a.Indexes)
	if err != nil {
		return jobFault(exitBadImage, "command: %w", err)
	}
	logFile, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	defer logFile.Close()
	logs := container.NewLog(io.MultiWriter(logFile, r.log), container.MaxLogBytes) // of all runs together
	// Of several runs the first one's start counts: what lies between two is the
	// attempt's own doing.
	started := sync.OnceFunc(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		r.started = true
		w.news.sayStarted(a.Attempt)
	})
	deadline := time.Now().Add(time.Duration(a.TimeoutMs) * time.Millisecond)
	left := a.Resources.DiskBytes
	for i, inv := range invocations {
		target := out
		if len(invocations) > 1 {
			target = filepath.Join(dir, "out-"+strconv.Itoa(i))
		}
		if err := os.Mkdir(target, 0o755); err != nil {
			return fmt.Errorf("outputs: %w", err)
		}
		spec := container.Spec{
			ID: a.Attempt, Image: image, Command: inv.Command, Inputs: inputs, Outputs: target, GPUs: a.Devices,
			MilliCPUs: a.Resources.MilliCpus, MemoryBytes: a.Resources.MemoryBytes, OutputBytes: left,
			Timeout: time.Until(deadline), Network: a.Network && w.AllowNetwork, Logs: logs,
			Started: started,
		}
		for _, e := range a.Env {
			spec.Env = append(spec.Env, e.Name+"="+e.Value)
		}
		if spec.Timeout <= 0 {
			return jobFault(exitTimeout, "the attempt took longer than its time-out of %s", time.Duration(a.TimeoutMs)*time.Millisecond)
		}
		res, err := rt.Run(ctx, spec)
		if err != nil {
			return err
		}
		if err := runFailure(res, a); err != nil {
			return err
		}
		left = max(left-res.OutputBytes, 1)
		if target != out {
			if err := gather(out, target, inv, a); err != nil {
				return err
			}
		}
	}
	return nil
}

// runFailure is what an unsuccessful run means; nil for a good one.
func runFailure(res container.Result, a *musterpb.Assignment) error {
	switch {
	case res.OK():
		return nil
	case res.Reason == container.OutOfMemory:
		return jobFault(exitKilled, "out of memory: the program wanted more than the %s of resources.memory", jobspec.FormatSize(a.Resources.MemoryBytes))
	case res.Reason == container.TimedOut:
		return jobFault(exitTimeout, "the attempt took longer than its time-out of %s", time.Duration(a.TimeoutMs)*time.Millisecond)
	case res.Reason == container.OutputTooLarge:
		return jobFault(exitBadOutputs, "the program wrote more than the %s of resources.disk to /out", jobspec.FormatSize(a.Resources.DiskBytes))
	case res.Reason == container.Cancelled:
		return &failure{musterpb.Blame_BLAME_NETWORK, 0, errors.New("the attempt was stopped")}
	}
	return jobFault(int32(res.ExitCode), "the program ended with exit code %d; muster job logs shows what it said", res.ExitCode)
}

// gather moves the outputs of one of several runs to where the archive is made
// from.
func gather(out, from string, inv jobspec.Invocation, a *musterpb.Assignment) error {
	if err := os.MkdirAll(out, 0o755); err != nil {
		return fmt.Errorf("outputs: %w", err)
	}
	if a.Outputs == musterpb.OutputMode_OUTPUT_MODE_LINES {
		return appendFile(filepath.Join(out, outputs.ResultsFile), filepath.Join(from, outputs.ResultsFile))
	}
	for _, index := range inv.Indexes {
		name := strconv.FormatUint(jobspec.Value(a.Items, index), 10)
		src := filepath.Join(from, name)
		info, err := os.Lstat(src)
		switch {
		case err == nil && info.IsDir():
		case len(inv.Indexes) == 1:
			src = from // a run for one item may leave its files in /out itself
		default:
			continue // missing: the archive's error names the item
		}
		if err := os.Rename(src, filepath.Join(out, name)); err != nil {
			return fmt.Errorf("outputs: %w", err)
		}
	}
	return nil
}

// appendFile appends a run's lines; a run that left none is found when the
// archive is made.
func appendFile(dst, src string) error {
	info, err := os.Lstat(src)
	if err != nil || !info.Mode().IsRegular() {
		return nil
	}
	in, err := os.Open(src)
	if err != nil {
		return fmt.Errorf("outputs: %w", err)
	}
	defer in.Close()
	f, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("outputs: %w", err)
	}
	_, err = io.Copy(f, in)
	if err == nil && info.Size() > 0 {
		_, err = f.Write([]byte("\n"))
	}
	return errors.Join(err, f.Close())
}

// maxItemFiles bounds the files of one item.
const maxItemFiles = 100_000

// pack makes the archive and the manifest. Small ones travel with the report,
// others are uploaded here.
func (w *Worker) pack(ctx context.Context, a *musterpb.Assignment, inputs, out, dir string) (*report, error) {
	items := make([]outputs.Item, len(a.Indexes))
	for i, index := range a.Indexes {
		items[i] = outputs.Item{Index: index, Value: jobspec.Value(a.Items, index)}
	}
	if a.Items.LinesPath != "" && a.Outputs == musterpb.OutputMode_OUTPUT_MODE_LINES {
		ids, err := outputs.CustomIDs(filepath.Join(inputs, filepath.FromSlash(a.Items.LinesPath)), a.Indexes)
		switch kind := api.KindOf(err); {
		case err != nil && (kind == api.Invalid || kind == api.NotFound):
			return nil, jobFault(exitBadInputs, "items: %w", err)
		case err != nil:
			return nil, err
		}
		for i := range items {
			items[i].CustomID = ids[i]
		}
	}
	archive := filepath.Join(dir, "archive")
	entries, summary, err := outputs.Write(ctx, out, a.Outputs, items, archive, outputs.Limits{Bytes: a.Resources.DiskBytes, Files: maxItemFiles})
	switch {
	case api.KindOf(err) == api.Invalid || api.KindOf(err) == api.TooLarge:
		return nil, jobFault(exitBadOutputs, "outputs: %w", err)
	case err != nil:
		return nil, err
	}
	inputDigest := verify.InputDigest(a.Inputs)
	parameters := verify.ParametersDigest(a.Image.Digest, a.Command, a.Env)
	for _, e := range entries {
		e.InputDigest, e.ParametersDigest = inputDigest, parameters
	}
	manifest := &musterpb.Manifest{Attempt: a.Attempt, Items: entries}
	data, err := manifest.MarshalVT()
	if err != nil {
		return nil, fmt.Errorf("encoding the manifest: %w", err)
	}
	digest := api.DigestOf(data)
	result := &report{commit: &musterpb.Commit{
		Attempt: a.Attempt, Root: verify.Root(manifest), ManifestDigest: string(digest), ArchiveDigest: string(summary.Digest),
		ArchiveBytes: summary.ArchiveBytes, OutputBytes: summary.OutputBytes,
	}}
	if len(data) <= outputs.MaxInline && summary.ArchiveBytes <= outputs.MaxInline {
		small, err := os.ReadFile(archive)
		if err != nil {
			return nil, fmt.Errorf("outputs: %w", err)
		}
		result.blobs = [][]byte{data, small}
		return result, nil
	}
	err = w.patiently(ctx, func() error {
		if _, _, err := blob.PutFile(ctx, w.blobs, archive); err != nil {
			return fmt.Errorf("uploading the outputs: %w", err)
		}
		if _, err := w.blobs.Put(ctx, digest, bytes.NewReader(data), int64(len(data))); err != nil {
			return fmt.Errorf("uploading the manifest: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, ours(err)
	}
	return result, nil
}

// packLog compresses what the program said; nil for nothing.
func (w *Worker) packLog(path string) []byte {
	data, err := os.ReadFile(path) // at most container.MaxLogBytes
	if err != nil || len(data) == 0 {
		return nil
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil
	}
	return enc.EncodeAll(data, nil)
}

// addLog lets a small log travel with a small result, and uploads any other.
func (w *Worker) addLog(ctx context.Context, r *report, packed []byte) string {
	if len(packed) == 0 || len(packed) > outputs.MaxInline || r.blobs == nil {
		return w.uploadLog(ctx, packed)
	}
	r.blobs = append(r.blobs, packed)
	return string(api.DigestOf(packed))
}

// uploadLog uploads a compressed log. One that can't be uploaded costs nobody a
// result.
func (w *Worker) uploadLog(ctx context.Context, packed []byte) string {
	if len(packed) == 0 || ctx.Err() != nil {
		return ""
	}
	digest := api.DigestOf(packed)
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if _, err := w.blobs.Put(ctx, digest, bytes.NewReader(packed), int64(len(packed))); err != nil {
		w.Logger.Warn("a log could not be uploaded", "err", err)
		return ""
	}
	return string(digest)
}

// tail keeps the newest output of a program for the heartbeats.
type tail struct {
	mu  sync.Mutex
	buf []byte // guarded by mu; not yet taken
}

func newTail() *tail { return &tail{} }

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - maxTail; over > 0 {
		t.buf = slices.Clone(t.buf[over:])
	}
	return len(p), nil
}

// take returns what was written last, at most maxTail bytes, and only once.
func (t *tail) take() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := t.buf
	t.buf = nil
	return out
}
