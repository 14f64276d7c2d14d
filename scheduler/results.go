package scheduler

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/outputs"
	"github.com/musternet/muster/verify"
)

// maxManifest bounds the manifest of so many items; one of them takes some 150
// bytes.
func maxManifest(items int) int64 { return 4096 + 256*int64(items) }

// maxLookedInto bounds what is held of one item for a comparator that looks
// into files.
const maxLookedInto = 512 << 20

// result is a committed result, opened for reading item by item.
type result struct {
	archive blob.Reader
	items   map[uint64]*musterpb.ManifestItem
	limits  outputs.Limits
	value   func(index uint64) uint64
}

// openResult reads the manifest of a commit and opens its archive.
func (l *leader) openResult(ctx context.Context, a *musterpb.Attempt, limit int64) (*result, error) {
	encoded, err := blob.OpenManifest(ctx, l.Blobs, a.Commit.ManifestDigest, a.Stored)
	if err != nil {
		return nil, fmt.Errorf("manifest of %s: %w", a.Id, err)
	}
	defer encoded.Close()
	manifest, err := readManifest(a.Commit, encoded, len(l.State.ItemsOf(a)))
	if err != nil {
		return nil, err
	}
	archive, err := blob.OpenArchive(ctx, l.Blobs, a.Commit.ArchiveDigest, a.Commit.ArchiveBytes, a.Stored)
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

// same reports whether two results hold the same bytes for an item.
func (r *result) same(o *result, index uint64) bool {
	a, b := r.items[index], o.items[index]
	return a != nil && b != nil && bytes.Equal(a.OutputDigest, b.OutputDigest)
}

// item reads the verified files of one item, with the content of those that the
// comparator looks into and the digests of the others.
func (r *result) item(ctx context.Context, index uint64, comparator verify.Comparator) ([]verify.File, error) {
	entry := r.items[index]
	if entry == nil {
		return nil, api.Errorf(api.Invalid, "item %d is not in the manifest", r.value(index))
	}
	var files []verify.File
	held := int64(0)
	err := outputs.WalkItem(ctx, r.archive, entry, r.limits, func(path string, size int64, content io.Reader) error {
		f := verify.File{Path: path}
		if !comparator.LooksInto(path) {
			sum := sha256.New()
			n, err := io.Copy(sum, content)
			f.Digest, f.Size = api.DigestFromSum(sum.Sum(nil)), n
			files = append(files, f)
			return err
		}
		if held += size; held > maxLookedInto {
			return api.Errorf(api.TooLarge, "%s takes the files that are compared by their content above %d bytes", path, maxLookedInto)
		}
		data, err := io.ReadAll(content)
		f.Data = data
		files = append(files, f)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("item %d: %w", r.value(index), err)
	}
	return files, nil
}

// readManifest reads the manifest of a commit, which is to list so many items. Its
// size and its items are counted before it is decoded: two bytes would do for an
// empty item that takes a hundred in memory.
func readManifest(c *musterpb.Commit, r blob.Reader, items int) (*musterpb.Manifest, error) {
	if most := maxManifest(items); r.Size() > most {
		return nil, api.Errorf(api.TooLarge, "manifest of %s has %d bytes, at most %d are allowed for %d items", c.Attempt, r.Size(), most, items)
	}
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("manifest of %s: %w", c.Attempt, err)
	}
	n, err := countItems(data)
	if err != nil {
		return nil, api.Errorf(api.Invalid, "manifest of %s can't be decoded: %w", c.Attempt, err)
	}
	if n != items {
		return nil, api.Errorf(api.Invalid, "the manifest lists %d items in place of %d", n, items)
	}
	m := &musterpb.Manifest{}
	if err := m.UnmarshalVT(data); err != nil {
		return nil, api.Errorf(api.Invalid, "manifest of %s can't be decoded: %w", c.Attempt, err)
	}
	return m, nil
}

// countItems counts the items of an encoded manifest without decoding them.
func countItems(data []byte) (n int, err error) {
	for len(data) > 0 {
		field, _, size := protowire.ConsumeField(data)
		if size < 0 {
			return 0, protowire.ParseError(size)
		}
		if field == manifestItems {
			n++
		}
		data = data[size:]
	}
	return n, nil
}

// manifestItems is the number of the field Manifest.items.
const manifestItems = 2

// checkResult examines everything about a commit that can be examined without
// running it again: who signed it, whether the manifest is what was signed,
// whether every item is there, unbroken, decodable and within the limits. A
// refusal is the worker's fault; an error of kind api.Unavailable is ours.
func (l *leader) checkResult(ctx context.Context, a *musterpb.Attempt, o *offer) error {
	if o.signed != nil {
		return o.signed
	}
	if err := l.checkDurable(ctx, o.commit); err != nil {
		return err
	}
	manifest, err := l.Blobs.Open(ctx, api.Digest(o.commit.ManifestDigest))
	if err != nil {
		return fmt.Errorf("manifest of %s: %w", a.Id, err)
	}
	defer manifest.Close()
	archive, err := l.Blobs.Open(ctx, api.Digest(o.commit.ArchiveDigest))
	if err != nil {
		return fmt.Errorf("outputs: %w", err)
	}
	defer archive.Close()
	return l.checkContent(ctx, a, o.commit, manifest, archive)
}

// checkInline is checkResult for a result that came along with its report.
func (l *leader) checkInline(ctx context.Context, a *musterpb.Attempt, o *offer) error {
	if o.signed != nil {
		return o.signed
	}
	return l.checkContent(ctx, a, o.commit, blob.Bytes(o.manifest), blob.Bytes(o.archive))
}

// checkContent compares a result's manifest with what was signed, and its
// outputs with the manifest.
func (l *leader) checkContent(ctx context.Context, a *musterpb.Attempt, c *musterpb.Commit, manifest, archive blob.Reader) error {
	job := l.State.Job(a.Job)
	want := l.State.ItemsOf(a)
	m, err := readManifest(c, manifest, len(want))
	if err != nil {
		return err
	}
	if m.Attempt != a.Id {
		return api.Errorf(api.Invalid, "the manifest is of attempt %.60q, not of %s", m.Attempt, a.Id)
	}
	if !bytes.Equal(verify.Root(m), c.Root) {
		return api.Errorf(api.Invalid, "the manifest does not have the Merkle root that was signed")
	}
	if err := outputs.CheckManifest(m, want, c.ArchiveBytes); err != nil {
		return err
	}
	if err := checkItems(job.Spec, m, c); err != nil {
		return err
	}
	return checkOutputs(ctx, job, c, m, archive)
}

// checkItems wants every item computed from the job's inputs, and their sizes
// within what the job allows and what was signed.
func checkItems(spec *musterpb.JobSpec, m *musterpb.Manifest, c *musterpb.Commit) error {
	inputs := verify.InputDigest(spec.Inputs)
	parameters := verify.ParametersDigest(spec.Image.Digest, spec.Command, spec.Env)
	total, overhead := int64(0), int64(0)
	for _, item := range m.Items {
		if !bytes.Equal(item.InputDigest, inputs) || !bytes.Equal(item.ParametersDigest, parameters) {
			return api.Errorf(api.Invalid, "item %d of the manifest was computed from other inputs or parameters", jobspec.Value(spec.Items, item.Index))
		}
		if total += item.OutputBytes; item.OutputBytes < 0 || total > spec.Resources.DiskBytes {
			return api.Errorf(api.TooLarge, "the outputs have more than %d bytes, which resources.disk allows", spec.Resources.DiskBytes)
		}
		overhead += (int64(item.Files) + 1) * fileOverhead
	}
	if total != c.OutputBytes {
		return api.Errorf(api.Invalid, "the manifest lists %d bytes of outputs, %d were signed", total, c.OutputBytes)
	}
	if most := total + total/100 + overhead; c.ArchiveBytes > most {
		return api.Errorf(api.TooLarge, "the outputs take %d bytes packed; %d bytes of outputs fit into %d", c.ArchiveBytes, total, most)
	}
	return nil
}

// checkDurable wants every blob of a commit stored as often as the store
// promises, whatever the worker was told when it uploaded them.
func (l *leader) checkDurable(ctx context.Context, c *musterpb.Commit) error {
	for _, b := range []struct{ what, digest string }{{"manifest", c.ManifestDigest}, {"outputs", c.ArchiveDigest}, {"log", c.LogDigest}} {
		if b.digest == "" {
			continue // only a log may be missing: a program that says nothing has none
		}
		if err := l.checkStored(ctx, c.Attempt, b.what, b.digest); err != nil {
			return err
		}
	}
	return nil
}

func (l *leader) checkStored(ctx context.Context, attempt, what, digest string) error {
	_, err := l.Blobs.Stat(ctx, api.Digest(digest))
	if api.KindOf(err) == api.NotFound {
		return api.Errorf(api.Invalid, "%s of %s: blob %s was not uploaded", what, attempt, digest)
	} else if err != nil {
		return fmt.Errorf("%s of %s: %w", what, attempt, err)
	}
	return nil
}

// fileOverhead is what packing may add to a file: tar headers and the frame.
const fileOverhead = 16 << 10

// checkOutputs reads every item of a result once.
func checkOutputs(ctx context.Context, job *musterpb.Job, c *musterpb.Commit, m *musterpb.Manifest, archive blob.Reader) error {
	comparator, err := verify.ComparatorOf(job.Spec.Verify)
	if err != nil {
		return err
	}
	if archive.Size() != c.ArchiveBytes {
		return api.Errorf(api.Invalid, "the outputs have %d bytes, %d were signed", archive.Size(), c.ArchiveBytes)
	}
	r := &result{
		archive: archive, items: map[uint64]*musterpb.ManifestItem{}, limits: limitsOf(job.Spec.Resources.DiskBytes),
		value: func(index uint64) uint64 { return jobspec.Value(job.Spec.Items, index) },
	}
	for _, item := range m.Items {
		r.items[item.Index] = item
		files, err := r.item(ctx, item.Index, comparator)
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
