package blob

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/musternet/muster/api"
)

// Cache keeps unpacked blobs on the disk of one process, each a file or a
// directory under the digest of the blob that it was made from, and removes the
// least recently used ones to stay below a size. It survives restarts.
type Cache struct {
	dir      string
	maxBytes int64

	mu      sync.Mutex // guards everything below, and entries' fields
	entries map[api.Digest]*cached
	bytes   int64  // of the entries that are ready
	uses    uint64 // orders entries by last use
	temps   uint64 // names what is being removed
}

// cached is one entry: being fetched until ready is closed, then usable unless
// err is set.
type cached struct {
	ready chan struct{}
	err   error
	bytes int64
	pins  int    // callers that use it
	used  uint64 // Cache.uses at its last use
}

// OpenCache opens the cache in dir, makes it if needed, and removes what an
// earlier process left unfinished.
func OpenCache(dir string, maxBytes int64) (*Cache, error) {
	c := &Cache{dir: dir, maxBytes: maxBytes, entries: make(map[api.Digest]*cached)}
	for _, d := range []string{c.tmp(), filepath.Join(dir, "sha256")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, diskError(dir, err)
		}
	}
	if err := c.tidy(); err != nil {
		return nil, diskError(dir, err)
	}
	if err := c.load(); err != nil {
		return nil, err
	}
	c.mu.Lock()
	victims := c.evict()
	c.mu.Unlock()
	return c, c.remove(victims)
}

func (c *Cache) tmp() string { return filepath.Join(c.dir, "tmp") }

func (c *Cache) path(digest api.Digest) string { return filepath.Join(c.dir, "sha256", digest.Hex()) }

// partExpires is how long the beginning of a blob is kept for a transfer that
// goes on.
const partExpires = 24 * time.Hour

// tidy removes what an earlier process left unfinished, but for the beginnings
// of blobs.
func (c *Cache) tidy() error {
	entries, err := os.ReadDir(c.tmp())
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if strings.HasSuffix(entry.Name(), partSuffix) && entry.Type().IsRegular() {
			continue
		}
		if err := removeAll(filepath.Join(c.tmp(), entry.Name())); err != nil {
			return err
		}
	}
	return c.trimParts()
}

// trimParts keeps the beginnings of blobs that are worth going on with: the
// newest, up to half the size of the cache. Those of entries that are being
// filled stay.
func (c *Cache) trimParts() error {
	entries, err := os.ReadDir(c.tmp())
	if err != nil {
		return err
	}
	var parts []fs.FileInfo
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), partSuffix) || c.knows(entry.Name()) {
			continue
		}
		info, err := entry.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // complete meanwhile
		} else if err != nil {
			return err
		}
		parts = append(parts, info)
	}
	slices.SortFunc(parts, func(a, b fs.FileInfo) int { return b.ModTime().Compare(a.ModTime()) })
	left := c.maxBytes / 2
	for _, part := range parts {
		if left -= part.Size(); left >= 0 && time.Since(part.ModTime()) < partExpires {
			continue
		}
		if err := os.Remove(filepath.Join(c.tmp(), part.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// knows reports whether a temporary file is that of an entry.
func (c *Cache) knows(name string) bool {
	hex, _, _ := strings.Cut(name, ".")
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entries[api.Digest("sha256:"+hex)] != nil
}

// load takes up the entries on disk. Their modification time is that of their
// last use.
func (c *Cache) load() error {
	names, err := os.ReadDir(filepath.Join(c.dir, "sha256"))
	if err != nil {
		return diskError(c.dir, err)
	}
	type found struct {
		digest api.Digest
		used   time.Time
	}
	var all []found
	for _, entry := range names {
		digest, err := api.ParseDigest("sha256:" + entry.Name())
		if err != nil {
			continue // not ours
		}
		info, err := entry.Info()
		if err != nil {
			return diskError(c.dir, err)
		}
		all = append(all, found{digest, info.ModTime()})
	}
	slices.SortFunc(all, func(a, b found) int { return a.used.Compare(b.used) })
	for _, f := range all {
		n, err := diskUsage(c.path(f.digest), false)
		if err != nil {
			return diskError(c.dir, err)
		}
		c.uses++
		entry := &cached{ready: make(chan struct{}), bytes: n, used: c.uses}
		close(entry.ready)
		c.entries[f.digest] = entry
		c.bytes += n
	}
	return nil
}

// Get returns the path of the entry for digest, and makes the entry with fetch
// if there is none: fetch creates dst as a file or a directory and answers for
// its content. A Fetch to dst, or to a name that begins with it and a dot, goes
// on where an earlier one broke off, also one of an earlier process. Concurrent calls for one digest fetch it once. The entry stays
// until release is called, which the caller does exactly once; entries in use
// can take the cache above its size. Nobody writes below path.
func (c *Cache) Get(ctx context.Context, digest api.Digest, fetch func(dst string) error) (path string, release func(), err error) {
	if err := checkDigest(digest); err != nil {
		return "", nil, err
	}
	for {
		entry, mine := c.pin(digest)
		if mine {
			c.fill(digest, entry, fetch)
		}
		select {
		case <-entry.ready:
		case <-ctx.Done():
			c.unpin(entry)
			return "", nil, api.Errorf(api.Unavailable, "blob %s: the call ended while it was fetched: %w", digest, ctx.Err())
		}
		if entry.err == nil {
			c.touch(digest)
			return c.path(digest), sync.OnceFunc(func() { c.unpin(entry) }), nil
		}
		c.unpin(entry)
		// Another caller's context is no reason for this one to fail.
		if mine || !errors.Is(entry.err, context.Canceled) && !errors.Is(entry.err, context.DeadlineExceeded) {
			return "", nil, entry.err
		}
	}
}

// pin finds the entry of a digest or makes a new one, which is then the
// caller's to fill.
func (c *Cache) pin(digest api.Digest) (entry *cached, mine bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	entry, ok := c.entries[digest]
	if !ok {
		entry = &cached{ready: make(chan struct{})}
		c.entries[digest] = entry
	}
	c.uses++
	entry.used = c.uses
	entry.pins++
	return entry, !ok
}

func (c *Cache) unpin(entry *cached) {
	c.mu.Lock()
	entry.pins--
	victims := c.evict()
	c.mu.Unlock()
	// What cannot be removed now is removed when the cache is opened again.
	_ = c.remove(victims)
}

// fill runs fetch and publishes its outcome.
func (c *Cache) fill(digest api.Digest, entry *cached, fetch func(dst string) error) {
	// The name is the same each time, so that a fetch which broke off is found
	// again. Nobody else fills this entry.
	tmp := filepath.Join(c.tmp(), digest.Hex())
	_ = removeAll(tmp)
	n, err := int64(0), error(nil)
	// A fetch that panics must not leave the others waiting forever.
	defer func() {
		if v := recover(); v != nil {
			c.publish(digest, entry, 0, api.Errorf(api.Internal, "blob %s: fetching it panicked: %v", digest, v))
			panic(v)
		}
	}()
	if err = fetch(tmp); err == nil {
		// Nobody knows an entry here; what may lie there could not be removed.
		_ = removeAll(c.path(digest))
		if n, err = diskUsage(tmp, true); err == nil {
			if err = os.Rename(tmp, c.path(digest)); err == nil {
				err = syncDir(filepath.Dir(c.path(digest)))
			}
		}
		err = diskError(c.dir, err)
	}
	if err != nil {
		_ = removeAll(tmp)
	}
	c.publish(digest, entry, n, err)
}

func (c *Cache) publish(digest api.Digest, entry *cached, n int64, err error) {
	c.mu.Lock()
	if err != nil {
		entry.err = err
		delete(c.entries, digest)
	} else {
		entry.bytes = n
		c.bytes += n
	}
	close(entry.ready)
	victims := c.evict()
	c.mu.Unlock()
	_ = c.remove(victims)
	if err != nil {
		_ = c.trimParts()
	}
}

// evict takes the least recently used entries out of the cache until it fits
// its size, moves them away, and returns their new paths. The caller holds mu.
func (c *Cache) evict() []string {
	var victims []string
	for c.bytes > c.maxBytes {
		oldest := api.Digest("")
		for digest, entry := range c.entries {
			if entry.pins == 0 && (oldest == "" || entry.used < c.entries[oldest].used) {
				oldest = digest
			}
		}
		if oldest == "" {
			break
		}
		c.temps++
		away := filepath.Join(c.tmp(), strconv.FormatUint(c.temps, 10))
		if err := os.Rename(c.path(oldest), away); err == nil {
			victims = append(victims, away)
		}
		c.bytes -= c.entries[oldest].bytes
		delete(c.entries, oldest)
	}
	return victims
}

func (c *Cache) remove(paths []string) error {
	var errs []error
	for _, p := range paths {
		errs = append(errs, removeAll(p))
	}
	return diskError(c.dir, errors.Join(errs...))
}

// touch keeps the order of use across restarts; it matters little if it fails.
func (c *Cache) touch(digest api.Digest) {
	now := time.Now()
	_ = os.Chtimes(c.path(digest), now, now)
}

// Digests returns the digests of the entries that are ready, sorted.
func (c *Cache) Digests() []api.Digest {
	c.mu.Lock()
	defer c.mu.Unlock()
	var digests []api.Digest
	for digest, entry := range c.entries {
		select {
		case <-entry.ready:
			digests = append(digests, digest)
		default:
		}
	}
	slices.Sort(digests)
	return digests
}

// Bytes returns what the entries that are ready take.
func (c *Cache) Bytes() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bytes
}

// diskUsage is the size of the files at and below path. With sync it makes them
// durable too: an entry is trusted after a restart, so it may not be half there.
func diskUsage(path string, sync bool) (int64, error) {
	var total int64
	err := filepath.WalkDir(path, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		if info.Mode().IsRegular() {
			total += info.Size()
		}
		if !sync || !info.Mode().IsRegular() && !info.IsDir() {
			return nil
		}
		return syncFile(name)
	})
	return total, err
}

func syncFile(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// removeAll removes a tree even where a job's modes deny it.
func removeAll(path string) error {
	err := os.RemoveAll(path)
	if err == nil {
		return nil
	}
	_ = filepath.WalkDir(path, func(name string, entry fs.DirEntry, err error) error {
		if entry != nil && entry.IsDir() {
			return os.Chmod(name, 0o755)
		}
		return nil
	})
	return os.RemoveAll(path)
}
