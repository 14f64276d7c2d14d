package fleet

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"strconv"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/outputs"
	"github.com/musternet/muster/verify"
)

// Command is the command of a job whose workers are simulated: they read from
// it which of the caller's jobs an attempt belongs to.
func Command(job int) []string { return []string{"simulated", strconv.Itoa(job), "{item}"} }

// jobOf is the number that Command was given, -1 in a command of another kind.
func jobOf(command []string) int {
	if len(command) != 3 {
		return -1
	}
	n, err := strconv.Atoi(command[1])
	if err != nil {
		return -1
	}
	return n
}

// work is an attempt to produce.
type work struct {
	attempt    string
	assignment *musterpb.Assignment
	run        *run
	started    bool // its start is reported with its result
}

// result is what an attempt produced, with its two blobs.
type result struct {
	commit            *musterpb.Commit
	manifest, archive []byte
	uploaded          bool // the blobs; else they travel with the report
}

func (r *result) appendTo(out *musterpb.Reports) {
	out.Commits = append(out.Commits, r.commit)
	if !r.uploaded {
		out.Blobs = append(out.Blobs, r.manifest, r.archive)
	}
}

// produce makes the outputs of attempts. An item's
// output is a line of text that follows from its job and index alone, so that
// checks agree.
func (w *worker) produce(list []work) ([]*result, error) {
	results := make([]*result, len(list))
	var inputs, parameters []byte
	var same *musterpb.Assignment // whose digests these are
	for i, todo := range list {
		a := todo.assignment
		if same == nil || same.Image != a.Image {
			inputs, parameters, same = verify.InputDigest(a.Inputs), verify.ParametersDigest(a.Image.GetDigest(), a.Command, a.Env), a
		}
		r, err := resultOf(a, inputs, parameters)
		if err != nil {
			return nil, err
		}
		results[i] = r
	}
	return results, nil
}

func resultOf(a *musterpb.Assignment, inputs, parameters []byte) (*result, error) {
	items := make([]outputs.ItemFiles, len(a.Indexes))
	var text []byte
	for i, index := range a.Indexes {
		value := jobspec.Value(a.Items, index)
		text = append(text[:0], parameters...)
		text = strconv.AppendUint(text, value, 10)
		sum := sha256.Sum256(text)
		line := make([]byte, 0, 2*sha256.Size+1)
		line = append(hex.AppendEncode(line, sum[:]), '\n')
		items[i] = outputs.ItemFiles{Item: outputs.Item{Index: index, Value: value}, Files: []outputs.File{{Path: "result", Data: line}}}
	}
	archive, entries, summary, err := outputs.Build(items, outputs.Limits{Bytes: a.Resources.DiskBytes, Files: len(items)})
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		e.InputDigest, e.ParametersDigest = inputs, parameters
	}
	manifest := &musterpb.Manifest{Attempt: a.Attempt, Items: entries}
	data, err := manifest.MarshalVT()
	if err != nil {
		return nil, err
	}
	return &result{
		manifest: data, archive: archive,
		commit: &musterpb.Commit{
			Attempt: a.Attempt, Root: verify.Root(manifest), ManifestDigest: string(api.DigestOf(data)), ArchiveDigest: string(summary.Digest),
			ArchiveBytes: summary.ArchiveBytes, OutputBytes: summary.OutputBytes,
		},
	}, nil
}

// upload uploads what is too large to travel with the commit.
func (w *worker) upload(results []*result) error {
	for _, r := range results {
		if len(r.manifest) <= outputs.MaxInline && len(r.archive) <= outputs.MaxInline {
			continue
		}
		store := client.Blobs(w.http, w.apiKey, func() []string { return w.fleet.Addresses })
		for _, data := range [][]byte{r.archive, r.manifest} {
			if _, err := store.Put(context.Background(), api.DigestOf(data), bytes.NewReader(data), int64(len(data))); err != nil {
				return err
			}
		}
		r.uploaded = true
	}
	return nil
}
