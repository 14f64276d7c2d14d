package worker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/musternet/muster/container"
)

// registryImageBytes is what an image from a registry is counted as: the worker
// does not learn how much of it is shared with others.
const registryImageBytes = 4 << 30

// images bounds what the runtimes keep on this machine. It remembers, over
// restarts, which images were made ready and when they were used last, and
// makes the runtimes forget the oldest above the limit.
type images struct {
	path   string
	limit  int64
	forget func(ctx context.Context, runtime string, image container.Image) error

	mu      sync.Mutex // guards entries and saved; held while an image is forgotten, so that nobody starts to use it then
	entries []*imageEntry
	saved   []byte // what the file holds
}

// imageEntry is one image in a runtime; the list is in order of last use.
type imageEntry struct {
	Runtime, Ref, Digest string
	Bytes                int64
	pins                 int // attempts that use it
}

func openImages(path string, limit int64, forget func(context.Context, string, container.Image) error) (*images, error) {
	s := &images{path: path, limit: limit, forget: forget}
	text, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return s, nil
	case err != nil:
		return nil, fmt.Errorf("list of images: %w", err)
	}
	if err := json.Unmarshal(text, &s.entries); err != nil {
		return nil, fmt.Errorf("list of images %s is damaged: %w; remove it, and unused images from the container engine by hand", path, err)
	}
	return s, nil
}

// use marks an image as in use until release is called, and makes room: images
// that nobody uses go, the longest unused first, until the rest fits. An image
// that can't be forgotten now is tried again next time.
func (s *images) use(ctx context.Context, runtime string, image container.Image, size int64) (release func(), err error) {
	if image.Ref != "" {
		size = registryImageBytes
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	mine := &imageEntry{Runtime: runtime, Ref: image.Ref, Digest: image.Digest, Bytes: size}
	var kept []*imageEntry
	total := size
	for _, e := range s.entries {
		if e.Runtime == runtime && e.Digest == image.Digest {
			mine = e // the pointer that other attempts release
			continue
		}
		kept = append(kept, e)
		total += e.Bytes
	}
	mine.pins++
	s.entries = append(s.evict(ctx, kept, total), mine)
	if err := s.save(); err != nil {
		mine.pins--
		return nil, err
	}
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		mine.pins--
	}), nil
}

func (s *images) evict(ctx context.Context, entries []*imageEntry, total int64) (rest []*imageEntry) {
	for _, e := range entries {
		if total > s.limit && e.pins == 0 && s.forget(ctx, e.Runtime, container.Image{Ref: e.Ref, Digest: e.Digest}) == nil {
			total -= e.Bytes
			continue
		}
		rest = append(rest, e)
	}
	return rest
}

func (s *images) save() error {
	text, err := json.Marshal(s.entries)
	if err != nil {
		return fmt.Errorf("list of images: %w", err)
	}
	if bytes.Equal(text, s.saved) {
		return nil
	}
	if err := os.WriteFile(s.path+".new", text, 0o600); err != nil {
		return fmt.Errorf("list of images: %w", err)
	}
	if err := os.Rename(s.path+".new", s.path); err != nil {
		return fmt.Errorf("list of images: %w", err)
	}
	s.saved = text
	return nil
}
