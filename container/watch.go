package container

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/musternet/muster/api"
)

// What a directory that a program fills may hold beside bytes. Without these
// bounds a program could make the walk that measures it arbitrarily slow, or
// use up the disk's inodes with empty files.
const (
	MaxEntries = 1_000_000
	MaxDepth   = 128
)

// How often a directory is measured while a program fills it, and the free
// space, in bytes, that its disk must keep whatever the limits allow: files
// that were unlinked while open are in no directory, and only this sees them.
const (
	watchInterval    = 250 * time.Millisecond
	MinDiskFreeBytes = 256 << 20
)

// ErrTooLarge is wrapped by the errors of Measure that say a bound was passed.
var ErrTooLarge = errors.New("too large")

// Measure adds up the sizes of the regular files below dir. It follows no
// link, leaves the tree by no name however it changes underneath, and stops
// with an error that wraps ErrTooLarge once the sum is above limitBytes or the
// tree is above MaxEntries or MaxDepth. The sum is returned in every case.
func Measure(dir string, limitBytes int64) (int64, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	m := measurement{limit: limitBytes}
	err = m.walk(root, 1)
	return m.bytes, err
}

type measurement struct {
	limit   int64
	bytes   int64
	entries int
}

// walk measures what root holds. Each level is opened relative to the one
// above, so that a directory swapped for a link cannot lead out of the tree and
// a deep path costs no more per step than a shallow one.
func (m *measurement) walk(root *os.Root, depth int) error {
	if depth > MaxDepth {
		return fmt.Errorf("directories nested more than %d deep: %w", MaxDepth, ErrTooLarge)
	}
	dir, err := root.Open(".")
	if err != nil {
		return vanished(err)
	}
	defer dir.Close()
	for {
		entries, err := dir.ReadDir(256)
		for _, entry := range entries {
			if err := m.add(root, entry, depth); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return vanished(err)
		}
	}
}

func (m *measurement) add(root *os.Root, entry fs.DirEntry, depth int) error {
	if m.entries++; m.entries > MaxEntries {
		return fmt.Errorf("more than %d files: %w", MaxEntries, ErrTooLarge)
	}
	switch {
	case entry.IsDir():
		return m.descend(root, entry.Name(), depth)
	case entry.Type().IsRegular():
		info, err := root.Lstat(entry.Name())
		if err != nil {
			return vanished(err)
		}
		if m.bytes += info.Size(); m.bytes > m.limit {
			return fmt.Errorf("more than %d bytes: %w", m.limit, ErrTooLarge)
		}
	}
	return nil
}

func (m *measurement) descend(root *os.Root, name string, depth int) error {
	sub, err := openDir(root, name)
	if err != nil {
		return vanished(err)
	}
	defer sub.Close()
	return m.walk(sub, depth+1)
}

// openDir opens a directory even where a program that runs as this user took
// the permission away, which would hide what it writes there.
func openDir(root *os.Root, name string) (*os.Root, error) {
	sub, err := root.OpenRoot(name)
	if errors.Is(err, fs.ErrPermission) && root.Chmod(name, 0o700) == nil {
		sub, err = root.OpenRoot(name)
	}
	return sub, err
}

// vanished forgives what a program does to its own tree while it is walked:
// removing entries, or putting something else in their place.
func vanished(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || isNotDir(err) || escapes(err) {
		return nil
	}
	return err
}

// escapes reports whether a directory became a link that leads out, between the
// time when it was listed and the time when it was opened. os.Root refuses that
// with an error that has no name to compare with.
func escapes(err error) bool {
	var path *fs.PathError
	return errors.As(err, &path) && path.Err.Error() == "path escapes from parent"
}

// Quota is a directory and what it may hold.
type Quota struct {
	Dir        string
	LimitBytes int64
}

// Watch measures the directories until one is over its quota, their disk is
// nearly full, or ctx is done. It returns nil when ctx ends it, an error that
// wraps ErrTooLarge for the first case, and one of kind api.Unavailable for the
// second. Walking takes at most about a tenth of one core; the free space of the
// disk is asked for between walks, too.
func Watch(ctx context.Context, quotas ...Quota) error {
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	var nextWalk time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		begun := time.Now()
		walk := !begun.Before(nextWalk)
		for _, q := range quotas {
			if walk {
				if _, err := Measure(q.Dir, q.LimitBytes); err != nil {
					return err
				}
			}
			if err := q.checkDisk(); err != nil {
				return err
			}
		}
		if walk {
			nextWalk = time.Now().Add(10 * time.Since(begun))
		}
	}
}

func (q Quota) checkDisk() error {
	if free, known := diskFree(q.Dir); known && free < MinDiskFreeBytes {
		return api.Errorf(api.Unavailable, "the disk of %s has %d bytes left; %d are kept free, so the run was stopped",
			q.Dir, free, int64(MinDiskFreeBytes))
	}
	return nil
}

// Settle fills in what /out holds once nothing writes to it any more. A program
// that ended by itself with too much there is OutputTooLarge.
func Settle(result Result, spec Spec, logs *Log) (Result, error) {
	var err error
	result.OutputBytes, err = Measure(spec.Outputs, spec.OutputLimit())
	if errors.Is(err, ErrTooLarge) {
		if result.Reason == Exited {
			logs.Note("outputs: %v", err)
			result.Reason = OutputTooLarge
		}
		return result, nil
	}
	if err != nil {
		return Result{}, fmt.Errorf("run %s: measure outputs: %w", spec.ID, err)
	}
	return result, nil
}
