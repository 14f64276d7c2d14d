package network

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// Usage is what a process has used so far.
type Usage struct {
	CPU      time.Duration // user and system
	RSSBytes int64         // now
}

// clockTick is the unit of times in /proc on every Linux that Go runs on
// (USER_HZ).
const clockTick = 10 * time.Millisecond

// UsageOf reads what a process has used, in steps of 10 ms.
func UsageOf(pid int) (Usage, error) {
	var u Usage
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return u, err
	}
	// The name, in parentheses, may hold anything; utime is the 14th field.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 22 {
		return u, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields)+2)
	}
	for _, at := range []int{11, 12} {
		ticks, err := strconv.ParseInt(string(fields[at]), 10, 64)
		if err != nil {
			return u, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
		u.CPU += time.Duration(ticks) * clockTick
	}
	pages, err := strconv.ParseInt(string(fields[21]), 10, 64)
	if err != nil {
		return u, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	u.RSSBytes = pages * int64(os.Getpagesize())
	return u, nil
}

// Usages are those of all schedulers that run; one that does not has none.
func (n *Network) Usages() ([]Usage, error) {
	list := make([]Usage, len(n.Schedulers))
	for i, p := range n.Schedulers {
		if p == nil || !p.Running() {
			continue
		}
		var err error
		if list[i], err = UsageOf(p.PID()); err != nil {
			return nil, err
		}
	}
	return list, nil
}
