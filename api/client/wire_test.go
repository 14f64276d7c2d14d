package client

import (
	"bytes"
	"fmt"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/musternet/muster/api/musterpb"
)

func TestCodec(t *testing.T) {
	for _, m := range []proto.Message{
		&musterpb.Heartbeat{}, &musterpb.Reports{Started: []string{"att-1", "att-2"}, Blobs: [][]byte{{1}, {}}},
		&musterpb.Commit{Attempt: "att-1", Path: [][]byte{make([]byte, 32)}, Leaf: 3}, wrapperspb.String("other messages work as well"),
	} {
		want, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		for _, dst := range [][]byte{nil, []byte("before"), append(make([]byte, 0, 1000), "before"...)} {
			got, err := codec{}.MarshalAppend(dst, m)
			if err != nil || !bytes.Equal(got, append(bytes.Clone(dst), want...)) {
				t.Errorf("%T after %q is %x, %v; want %x", m, dst, got, err, want)
			}
		}
		back := m.ProtoReflect().New().Interface()
		if h, ok := back.(*musterpb.Reports); ok {
			h.Started = []string{"from the last use"}
		}
		if err := (codec{}).Unmarshal(want, back); err != nil || !proto.Equal(back, m) {
			t.Errorf("%T came back as %v, %v", m, back, err)
		}
	}
	if _, err := (codec{}).Marshal("text"); err == nil {
		t.Error("a string was encoded")
	}
	if err := (codec{}).Unmarshal(nil, "text"); err == nil {
		t.Error("a string was decoded into")
	}
	if err := (codec{}).Unmarshal([]byte{0xff}, &musterpb.Reports{}); err == nil {
		t.Error("half a message was decoded")
	}
}

// A small message may not take much memory once it is decoded.
func TestCodecBoundsFields(t *testing.T) {
	large := &musterpb.Reports{Commits: make([]*musterpb.Commit, maxFields)}
	for i := range large.Commits {
		large.Commits[i] = &musterpb.Commit{}
	}
	for _, m := range []*musterpb.WorkerMessage{
		{Message: &musterpb.WorkerMessage_Reports{Reports: large}},
		{Message: &musterpb.WorkerMessage_Reports{Reports: &musterpb.Reports{Commits: []*musterpb.Commit{{Path: make([][]byte, maxFields)}}}}},
		{Message: &musterpb.WorkerMessage_Heartbeat{Heartbeat: &musterpb.Heartbeat{Running: make([]string, maxFields)}}},
	} {
		data, err := m.MarshalVT()
		if err != nil {
			t.Fatal(err)
		}
		if err := (codec{}).Unmarshal(data, &musterpb.WorkerMessage{}); err == nil {
			t.Errorf("%d bytes with more than %d fields were decoded", len(data), maxFields)
		}
	}
	// What workers really send at most is taken: compressed outputs look like fields, too.
	full := &musterpb.Reports{}
	for range 256 {
		full.Commits = append(full.Commits, &musterpb.Commit{Attempt: "att-1", Path: make([][]byte, 8), Root: make([]byte, 32), Signature: make([]byte, 64)})
		full.Blobs = append(full.Blobs, make([]byte, 4<<10), bytes.Repeat([]byte{0x0a, 0x02, 1, 2}, 100))
	}
	data, err := (codec{}).Marshal(&musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Reports{Reports: full}})
	if err != nil {
		t.Fatal(err)
	}
	if err := (codec{}).Unmarshal(data, &musterpb.WorkerMessage{}); err != nil {
		t.Errorf("a full message: %v", err)
	}
}

// BenchmarkCodec is a worker's report of 20 small results, each way, with the
// codec of sessions and with connect's own way.
func BenchmarkCodec(b *testing.B) {
	list := &musterpb.Reports{}
	for i := range 20 {
		list.Started = append(list.Started, fmt.Sprintf("att-%016x", i))
		list.Blobs = append(list.Blobs, make([]byte, 600))
	}
	reports := &musterpb.WorkerMessage{Message: &musterpb.WorkerMessage_Reports{Reports: list}}
	data, err := codec{}.Marshal(reports)
	if err != nil {
		b.Fatal(err)
	}
	var buffer []byte // connect uses its buffers again
	for name, f := range map[string]func() error{
		"marshal":   func() (err error) { buffer, err = codec{}.MarshalAppend(buffer[:0], reports); return err },
		"unmarshal": func() error { return codec{}.Unmarshal(data, &musterpb.WorkerMessage{}) },
		"reflected-marshal": func() (err error) {
			buffer, err = proto.MarshalOptions{}.MarshalAppend(buffer[:0], reports)
			return err
		},
		"reflected-unmarshal": func() error { return proto.Unmarshal(data, &musterpb.WorkerMessage{}) },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				if err := f(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
