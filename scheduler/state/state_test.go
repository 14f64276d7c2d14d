package state

import (
	"strconv"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/musternet/muster/api/musterpb"
)

// A field that a copy forgot would vanish with the next command.
func TestCopiesCopyEveryField(t *testing.T) {
	testCopy(t, copyJob)
	testCopy(t, copyTask)
	testCopy(t, copyAttempt)
	testCopy(t, copyCheck)
	testCopy(t, copyBatch)
	testCopy(t, copyWorker)
}

func testCopy[M proto.Message](t *testing.T, copyOf func(M) M) {
	t.Helper()
	var none M
	full := none.ProtoReflect().New()
	fill(t, full)
	if fresh := copyOf(full.Interface().(M)); !proto.Equal(fresh, full.Interface()) {
		t.Errorf("copied %v\nof %v", fresh, full)
	}
}

// fill sets every field to something that is not its zero value.
func fill(t *testing.T, m protoreflect.Message) {
	t.Helper()
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if f.Message() != nil && !f.IsList() {
			m.Mutable(f) // that it is there is enough
			continue
		}
		var v protoreflect.Value
		switch f.Kind() {
		case protoreflect.MessageKind:
			v = m.NewField(f).List().NewElement()
		case protoreflect.StringKind:
			v = protoreflect.ValueOfString("x")
		case protoreflect.BytesKind:
			v = protoreflect.ValueOfBytes([]byte("x"))
		case protoreflect.BoolKind:
			v = protoreflect.ValueOfBool(true)
		case protoreflect.EnumKind:
			v = protoreflect.ValueOfEnum(1)
		case protoreflect.Int32Kind:
			v = protoreflect.ValueOfInt32(7)
		case protoreflect.Uint32Kind:
			v = protoreflect.ValueOfUint32(7)
		case protoreflect.Uint64Kind:
			v = protoreflect.ValueOfUint64(7)
		case protoreflect.Int64Kind:
			v = protoreflect.ValueOfInt64(7)
		default:
			t.Fatalf("field %s has kind %v: teach this test about it", f.Name(), f.Kind())
		}
		if f.IsList() {
			m.Mutable(f).List().Append(v)
		} else {
			m.Set(f, v)
		}
	}
}

func TestUnknownCommands(t *testing.T) {
	s := New()
	if answer := s.Apply(&musterpb.Command{Id: "x", Ignorable: true}); ErrorOf(answer) != nil {
		t.Errorf("an ignorable command: %v", answer)
	}
	defer func() {
		if recover() == nil {
			t.Error("an unknown command was skipped")
		}
	}()
	s.Apply(&musterpb.Command{})
}

// The newest answers are remembered, and all of the last minute.
func TestAnswersAreForgotten(t *testing.T) {
	s := New()
	at := int64(1000)
	apply := func(id, account string) string {
		return s.Apply(&musterpb.Command{Id: id, TimeUnixMs: at, Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: account}}}).Error
	}
	apply("first", "a")
	apply("second", "a")
	for i := range leastAnswered {
		s.Apply(&musterpb.Command{Id: strconv.Itoa(i), TimeUnixMs: at, Ignorable: true})
	}
	at += answeredForMS
	if s.Apply(&musterpb.Command{Id: "within the minute", TimeUnixMs: at, Ignorable: true}); apply("first", "a") != "" {
		t.Error("a repeat within a minute was taken for a new command")
	}
	at++
	s.Apply(&musterpb.Command{Id: "later", TimeUnixMs: at, Ignorable: true})
	if apply("first", "a") == "" {
		t.Error("a command is still remembered")
	}
	if n := s.answered.Len(); n != leastAnswered || len(s.answerOrder) != n {
		t.Errorf("%d answers are remembered, %d in order, want %d", n, len(s.answerOrder), leastAnswered)
	}
	// Memory is bounded, however fast they come.
	for i := range maxAnswered + 10 {
		s.Apply(&musterpb.Command{Id: "burst " + strconv.Itoa(i), TimeUnixMs: at, Ignorable: true})
	}
	if n := s.answered.Len(); n != maxAnswered || len(s.answerOrder) != n {
		t.Errorf("%d answers are remembered, %d in order, want %d", n, len(s.answerOrder), maxAnswered)
	}
}

func TestWorkersAreBounded(t *testing.T) {
	for name, spoil := range map[string]func(*musterpb.Worker){
		"no capacity":     func(w *musterpb.Worker) { w.Capacity = nil },
		"negative":        func(w *musterpb.Worker) { w.Capacity.MemoryBytes = -1 },
		"long name":       func(w *musterpb.Worker) { w.Name = strings.Repeat("x", maxWorkerName+1) },
		"many devices":    func(w *musterpb.Worker) { w.Capacity.Devices = make([]*musterpb.Device, maxDevices+1) },
		"many runtimes":   func(w *musterpb.Worker) { w.Capacity.Runtimes = make([]string, maxRuntimes+1) },
		"device twice":    func(w *musterpb.Worker) { w.Capacity.Devices[1].Uuid = w.Capacity.Devices[0].Uuid },
		"nameless device": func(w *musterpb.Worker) { w.Capacity.Devices[0].Uuid = "" },
	} {
		w := newWorld(t)
		w.must("account", "bob")
		cmd := w.build("worker", parseArgs([]string{"w1", "gpus=2"}))
		spoil(cmd.GetRegisterWorker().Worker)
		if err := ErrorOf(w.State.Apply(cmd)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// What a customer lets an owner check by itself earns that owner no trust for
// the jobs of others.
func TestApplication(t *testing.T) {
	job := func(account string, sameOwner bool, image *musterpb.Image) string {
		return Application(&musterpb.Job{Account: account, Spec: &musterpb.JobSpec{Image: image, Verify: &musterpb.Verify{SameOwner: sameOwner}}})
	}
	registry := &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_REGISTRY, Ref: "host/app@sha256:00", Name: "app"}
	archive := &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_ARCHIVE, Name: "mine.tar"}
	for got, want := range map[string]string{
		job("acme", false, registry): "host/app",
		job("acme", true, registry):  "acme/host/app",
		job("acme", false, archive):  "acme/mine.tar",
	} {
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
