package report

import (
	"encoding/json"
	"errors"
	"os"
	"time"
)

// Machine is what a run's figures depend on beside the code.
type Machine struct {
	Commit      string  `json:"commit"` // with -dirty where files differ from it
	Date        string  `json:"date"`   // RFC 3339
	CPU         string  `json:"cpu"`
	Cores       int     `json:"cores"`
	MemoryBytes int64   `json:"memory_bytes"`
	Kernel      string  `json:"kernel"`
	FsyncMS     float64 `json:"fsync_ms_p50"` // append of 4 KiB, then fsync
	Go          string  `json:"go"`
	Set         string  `json:"set"` // "standard", "full", or what was measured alone
}

// Append adds a line with the machine and every figure to a file: what
// benchmarks were, over time.
func (r *Results) Append(path string, m Machine, now time.Time) error {
	m.Date = now.UTC().Format(time.RFC3339)
	r.mu.Lock()
	line, err := json.Marshal(struct {
		Machine
		Results map[string]float64 `json:"results"`
	}{m, r.values})
	r.mu.Unlock()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(line, '\n'))
	return errors.Join(err, f.Close())
}
