//go:build unix

package wasm

import "golang.org/x/sys/unix"

// reserve maps zeroed memory that takes up RAM only where it is touched, and
// that the garbage collector neither scans nor counts. It returns nil if the
// system has no address space left.
func reserve(bytes uint64) []byte {
	if bytes == 0 {
		return nil
	}
	memory, err := unix.Mmap(-1, 0, int(bytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return nil
	}
	return memory
}

func release(memory []byte) {
	if memory != nil {
		// It fails only for memory that was not mapped by reserve.
		_ = unix.Munmap(memory)
	}
}
