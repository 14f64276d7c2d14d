//go:build !linux

package main

import "time"

var began = time.Now()

func lockClock() (unlock func()) { return func() {} }

// cpuTime is wall time, where there is no clock of the thread.
func cpuTime() time.Duration { return time.Since(began) }
