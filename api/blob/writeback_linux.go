package blob

import (
	"os"

	"golang.org/x/sys/unix"
)

// startWriteBack tells the kernel to write what is dirty of f and does not wait.
// It is advice: the sync that follows is what makes bytes durable.
func startWriteBack(f *os.File) {
	_ = unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE)
}
