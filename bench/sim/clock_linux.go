package main

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// lockClock makes cpuTime that of the caller, until the function that it returns
// is called.
func lockClock() (unlock func()) {
	runtime.LockOSThread()
	return runtime.UnlockOSThread
}

// cpuTime is how long this thread has run: other programs, and the collector's
// own threads, do not count.
func cpuTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		panic(err) // this clock is always there
	}
	return time.Duration(t.Nano())
}
