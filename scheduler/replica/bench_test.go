package replica

import (
	"fmt"
	"testing"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// lives are the three commands that each of n tasks costs.
func lives(n int) *musterpb.Entry {
	e := &musterpb.Entry{}
	for i := range n {
		id, digest := fmt.Sprintf("att-%016x", i), string(api.DigestOf([]byte{byte(i)}))
		e.Commands = append(e.Commands,
			&musterpb.Command{Id: id + "-place", TimeUnixMs: 1_700_000_000_000, Body: &musterpb.Command_PlaceAttempt{PlaceAttempt: &musterpb.PlaceAttempt{
				Attempt: id, Job: "job-0123456789abcdef", Task: uint32(i), Worker: "wrk-0123456789abcdef0123456789abcdef", Class: "cpu/linux/amd64/x86-64-v3",
			}}},
			&musterpb.Command{TimeUnixMs: 1_700_000_000_000, Body: &musterpb.Command_StartAttempt{StartAttempt: &musterpb.StartAttempt{Attempt: id}}},
			&musterpb.Command{TimeUnixMs: 1_700_000_000_000, Body: &musterpb.Command_CommitResult{CommitResult: &musterpb.CommitResult{Commit: &musterpb.Commit{
				Attempt: id, Root: make([]byte, 32), ManifestDigest: digest, ArchiveDigest: digest, LogDigest: digest,
				ArchiveBytes: 300, OutputBytes: 100, Leaves: 20, Signature: make([]byte, 64),
			}}}})
	}
	return e
}

// BenchmarkEntry is what the log's encoding costs a command: written once, by the
// leader, and read on every node.
func BenchmarkEntry(b *testing.B) {
	for _, tasks := range []int{1, 133} { // a lone task, and a busy leader's 400 commands
		entry := lives(tasks)
		data, err := entry.MarshalVT()
		if err != nil {
			b.Fatal(err)
		}
		perCommand := func(b *testing.B) {
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(entry.Commands)), "ns/command")
		}
		b.Run(fmt.Sprintf("marshal-%d", len(entry.Commands)), func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				if _, err := entry.MarshalVT(); err != nil {
					b.Fatal(err)
				}
			}
			perCommand(b)
		})
		b.Run(fmt.Sprintf("unmarshal-%d", len(entry.Commands)), func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				var e musterpb.Entry
				if err := e.UnmarshalVT(data); err != nil {
					b.Fatal(err)
				}
			}
			perCommand(b)
		})
	}
}
