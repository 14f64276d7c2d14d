//go:build unix

package container

import (
	"errors"

	"golang.org/x/sys/unix"
)

// diskFree is what an unprivileged user may still write to dir's file system.
func diskFree(dir string) (bytes int64, known bool) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, false
	}
	return int64(uint64(st.Bavail) * uint64(st.Bsize)), true
}

func isNotDir(err error) bool {
	return errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}
