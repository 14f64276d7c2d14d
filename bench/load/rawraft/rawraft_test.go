package rawraft

import (
	"path/filepath"
	"testing"
	"time"
)

// The limit is measured on a real cluster, whose log holds what was counted.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	r, err := Run(t.Context(), Config{Dir: dir, Nodes: 3, Clients: 32, CommandBytes: 100, Duration: 300 * time.Millisecond, ElectionTimeout: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if r.CommandsPerSecond <= 0 || r.CommandsPerEntry < 1 {
		t.Errorf("%+v", r)
	}
	bytes, entries := 0, 0
	if _, err := ReadLog(filepath.Join(dir, "0"), 0, 1<<60, func(data []byte) error {
		bytes, entries = bytes+len(data), entries+1
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if entries == 0 || bytes%100 != 0 || bytes/100 < entries {
		t.Errorf("the log holds %d bytes in %d entries", bytes, entries)
	}
}
