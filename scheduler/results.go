package scheduler

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/outputs"
	"github.com/musternet/muster/verify"
)

// maxManifestBytes bounds a manifest: some 400,000 items.
const maxManifestBytes = 64 << 20

// result is a committed result, opened for reading item by item.
type result struct {
	archive blob.Reader
	items   map[uint64]*musterpb.ManifestItem
	limits  outputs.Limits
	value   func(index uint64) uint64
}

// openResult reads the manifest of a commit and opens its archive.
func (l *leader) openResult(ctx context.Context, a *musterpb.Attempt, limit int64) (*result, error) {
	manifest, err := l.manifest(ctx, a.Commit)
	if err != nil {
		return nil, err
	}
	archive, err := l.Blobs.Open(ctx, api.Digest(a.Commit.ArchiveDigest))
	if err != nil {
		return nil, fmt.Errorf("outputs of %s: %w", a.Id, err)
	}
	items := l.State.Job(a.Job).Spec.Items
	r := &result{
		archive: archive, items: map[uint64]*musterpb.ManifestItem{}, limits: limitsOf(limit),
		value: func(index uint64) uint64 { return jobspec.Value(items, index) },
	}
	for _, item := range manifest.Items {
		r.items[item.Index] = item
	}
	return r, nil
}

func (r *result) close() { r.archive.Close() }

// item reads the verified files of one item.
func (r *result) item(ctx context.Context, index uint64) ([]verify.File, error) {
	entry := r.items[index]
	if entry == nil {
		return nil, api.Errorf(api.Invalid, "item %d is not in the manifest", r.value(index))
	}
	files, err := outputs.OpenItem(ctx, r.archive, entry, r.limits)
	if err != nil {
		return nil, fmt.Errorf("item %d: %w", r.value(index), err)
	}
	out := make([]verify.File, len(files))
	for i, f := range files {
		out[i] = verify.File{Path: f.Path, Data: f.Data}
	}
	return out, nil
}

func (l *leader) manifest(ctx context.Context, c *musterpb.Commit) (*musterpb.Manifest, error) {
	r, err := l.Blobs.Open(ctx, api.Digest(c.ManifestDigest))
	if err != nil {
		return nil, fmt.Errorf("manifest of %s: %w", c.Attempt, err)
	}
	defer r.Close()
	if r.Size() > maxManifestBytes {
		return nil, api.Errorf(api.TooLarge, "manifest of %s has %d bytes, at most %d are allowed", c.Attempt, r.Size(), maxManifestBytes)
	}
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("manifest of %s: %w", c.Attempt, err)
	}
	m := &musterpb.Manifest{}
	if err := m.UnmarshalVT(data); err != nil {
		return nil, api.Errorf(api.Invalid, "manifest of %s can't be decoded: %w", c.Attempt, err)
	}
	return m, nil
}

// checkResult examines everything about a commit that can be examined without
// running it again: who signed it, whether the manifest is what was signed,
// whether every item is there, unbroken, decodable and within the limits. A
// refusal is the worker's fault; an error of kind api.Unavailable is ours.
func (l *leader) checkResult(ctx context.Context, a *musterpb.Attempt, c *musterpb.Commit) error {
	job, worker := l.State.Job(a.Job), l.State.Worker(a.Worker)
	if err := verify.CheckCommit(worker.PublicKey, c); err != nil {
		return err
	}
	m, err := l.manifest(ctx, c)
	if err != nil {
		return err
	}
	if m.Attempt != a.Id {
		return api.Errorf(api.Invalid, "the manifest is of attempt %q, not of %s", m.Attempt, a.Id)
	}
	if !bytes.Equal(verify.Root(m), c.Root) {
		return api.Errorf(api.Invalid, "the manifest does not have the Merkle root that was signed")
	}
	want := l.State.ItemsOf(a)
	if err := outputs.CheckManifest(m, want, c.ArchiveBytes); err != nil {
		return err
	}
	inputs := verify.InputDigest(job.Spec.Inputs)
	parameters := verify.ParametersDigest(job.Spec.Image.Digest, job.Spec.Command, job.Spec.Env)
	total := int64(0)
	for _, item := range m.Items {
		if !bytes.Equal(item.InputDigest, inputs) || !bytes.Equal(item.ParametersDigest, parameters) {
			return api.Errorf(api.Invalid, "item %d of the manifest was computed from other inputs or parameters", jobspec.Value(job.Spec.Items, item.Index))
		}
		if total += item.OutputBytes; item.OutputBytes < 0 || total > job.Spec.Resources.DiskBytes {
			return api.Errorf(api.TooLarge, "the outputs have more than %d bytes, which resources.disk allows", job.Spec.Resources.DiskBytes)
		}
	}
	return l.checkOutputs(ctx, job, c, m)
}

// checkOutputs reads every item of a result once.
func (l *leader) checkOutputs(ctx context.Context, job *musterpb.Job, c *musterpb.Commit, m *musterpb.Manifest) error {
	comparator, err := verify.ComparatorOf(job.Spec.Verify)
	if err != nil {
		return err
	}
	archive, err := l.Blobs.Open(ctx, api.Digest(c.ArchiveDigest))
	if err != nil {
		return fmt.Errorf("outputs: %w", err)
	}
	defer archive.Close()
	if archive.Size() != c.ArchiveBytes {
		return api.Errorf(api.Invalid, "the outputs have %d bytes, %d were signed", archive.Size(), c.ArchiveBytes)
	}
	r := &result{
		archive: archive, items: map[uint64]*musterpb.ManifestItem{}, limits: limitsOf(job.Spec.Resources.DiskBytes),
		value: func(index uint64) uint64 { return jobspec.Value(job.Spec.Items, index) },
	}
	for _, item := range m.Items {
		r.items[item.Index] = item
		files, err := r.item(ctx, item.Index)
		if err != nil {
			return err
		}
		if err := comparator.Validate(files); err != nil {
			return fmt.Errorf("output of item %d: %w", r.value(item.Index), err)
		}
	}
	return nil
}

// refusalBlame tells the worker's fault from ours.
func refusalBlame(err error) (blame musterpb.Blame, ours bool) {
	switch api.KindOf(err) {
	case api.Unavailable, api.Internal:
		return musterpb.Blame_BLAME_NETWORK, true
	}
	return musterpb.Blame_BLAME_WORKER, false
}

// maxItemFiles bounds the files of one item.
const maxItemFiles = 100_000

func limitsOf(bytes int64) outputs.Limits { return outputs.Limits{Bytes: bytes, Files: maxItemFiles} }
