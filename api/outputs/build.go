package outputs

import (
	"context"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// ItemFiles is an item with its output.
type ItemFiles struct {
	Item
	Files []File // at least one; in any order
}

// Build packs outputs that are in memory into an archive as Write does, in the
// order of items, which is that of their index. What Write refuses is refused
// here too, with an error of kind api.Invalid that names item and file. It keeps
// nothing of items.
func Build(items []ItemFiles, limits Limits) (archive []byte, manifest []*musterpb.ManifestItem, summary Summary, err error) {
	w := newWriter(context.Background(), (*sliceWriter)(&archive), nil, limits)
	defer w.close()
	var sources []source
	for _, item := range items {
		sources, err = w.inMemory(item, sources[:0])
		if err == nil {
			err = w.frame(item.Item, sources)
		}
		if err != nil {
			return nil, nil, Summary{}, err
		}
	}
	return archive, w.manifest, w.summary(), nil
}

// inMemory appends the files of an item to sources, checked.
func (w *writer) inMemory(item ItemFiles, sources []source) ([]source, error) {
	if len(item.Files) == 0 {
		return nil, api.Errorf(api.Invalid, "item %d: has no files", item.Value)
	}
	if len(item.Files) > w.limits.Files {
		return nil, api.Errorf(api.Invalid, "item %d: has more than the limit of %d files", item.Value, w.limits.Files)
	}
	var names nameSet // one file alone cannot be in the way of another
	if len(item.Files) > 1 {
		names = make(nameSet, len(item.Files))
	}
	total := int64(0)
	for _, f := range item.Files {
		if problem := checkPath(f.Path); problem != "" {
			return nil, api.Errorf(api.Invalid, "item %d: %s %s", item.Value, shorten(f.Path), problem)
		}
		if names != nil {
			names[f.Path] = true
		}
		if !w.claim(&total, int64(len(f.Data))) {
			return nil, api.Errorf(api.Invalid, "item %d: %s takes the outputs above the limit of %d bytes", item.Value, shorten(f.Path), w.limits.Bytes)
		}
		sources = append(sources, source{path: f.Path, shown: f.Path, size: int64(len(f.Data)), data: f.Data})
	}
	if names != nil {
		if problem := names.problem(item.Files); problem != "" {
			return nil, api.Errorf(api.Invalid, "item %d: %s", item.Value, problem)
		}
	}
	return sources, nil
}

// nameSet holds the paths of an item's files.
type nameSet map[string]bool

// parent is a file of the set that p lies below, or "".
func (s nameSet) parent(p string) string {
	for i := len(p) - 1; i > 0; i-- {
		if p[i] == '/' && s[p[:i]] {
			return p[:i]
		}
	}
	return ""
}

// problem is what no directory could hold of files; empty for nothing.
func (s nameSet) problem(files []File) string {
	if len(s) < len(files) {
		return "has a file twice"
	}
	for _, f := range files {
		if parent := s.parent(f.Path); parent != "" {
			return shorten(f.Path) + " lies below a file"
		}
	}
	return ""
}
