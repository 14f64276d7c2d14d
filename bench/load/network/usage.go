package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/musternet/muster/cmd/muster/node"
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

// Vars is what a scheduler says of its memory; with collect, after it has
// collected its garbage.
func (n *Network) Vars(ctx context.Context, i int, collect bool) (node.Vars, error) {
	var v node.Vars
	path := "/debug/vars"
	if collect {
		path += "?gc=1"
	}
	err := n.get(ctx, i, path, func(r io.Reader) error { return json.NewDecoder(r).Decode(&v) })
	return v, err
}

// Profile writes a CPU profile of so many seconds, and then a heap profile, of
// one scheduler.
func (n *Network) Profile(ctx context.Context, i, seconds int, cpu, heap string) error {
	return errors.Join(
		n.get(ctx, i, "/debug/pprof/profile?seconds="+strconv.Itoa(seconds), func(r io.Reader) error { return save(cpu, r) }),
		n.HeapProfile(ctx, i, heap),
	)
}

// HeapProfile writes a heap profile of one scheduler.
func (n *Network) HeapProfile(ctx context.Context, i int, path string) error {
	return n.get(ctx, i, "/debug/pprof/heap", func(r io.Reader) error { return save(path, r) })
}

func (n *Network) get(ctx context.Context, i int, path string, read func(io.Reader) error) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+n.debug[i]+path, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("scheduler %d answers %s with %s", i, path, resp.Status)
	}
	return read(resp.Body)
}

func save(path string, r io.Reader) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
