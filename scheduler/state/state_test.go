package state

import (
	"strconv"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/musternet/muster/api/musterpb"
)

// A field that copyJob forgot would vanish with the next command.
func TestCopyJobCopiesEveryField(t *testing.T) {
	job := &musterpb.Job{}
	fields := job.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		v := job.ProtoReflect().NewField(f)
		switch {
		case f.IsList():
			v.List().Append(protoreflect.ValueOfUint32(7))
		case f.Kind() == protoreflect.StringKind:
			v = protoreflect.ValueOfString("x")
		case f.Kind() == protoreflect.BytesKind:
			v = protoreflect.ValueOfBytes([]byte("x"))
		case f.Kind() == protoreflect.BoolKind:
			v = protoreflect.ValueOfBool(true)
		case f.Kind() == protoreflect.EnumKind:
			v = protoreflect.ValueOfEnum(1)
		case f.Kind() == protoreflect.Uint32Kind:
			v = protoreflect.ValueOfUint32(7)
		case f.Kind() == protoreflect.Uint64Kind:
			v = protoreflect.ValueOfUint64(7)
		case f.Kind() == protoreflect.Int64Kind:
			v = protoreflect.ValueOfInt64(7)
		}
		job.ProtoReflect().Set(f, v)
	}
	fresh := copyJob(job)
	if !fresh.EqualVT(job) {
		t.Fatalf("copied %v\nof %v", fresh, job)
	}
	if fresh.Requeued[0]++; job.Requeued[0] != 7 {
		t.Error("the copy shares the requeued tasks")
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

// Only so many answers are remembered, the newest.
func TestAnswersAreForgotten(t *testing.T) {
	s := New()
	apply := func(id, account string) string {
		return s.Apply(&musterpb.Command{Id: id, Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: account}}}).Error
	}
	apply("first", "a")
	apply("second", "a")
	for i := range maxAnswered - 2 {
		s.Apply(&musterpb.Command{Id: strconv.Itoa(i), Ignorable: true})
	}
	if err := apply("first", "a"); err != "" {
		t.Errorf("a repeat of the oldest command: %s", err)
	}
	s.Apply(&musterpb.Command{Id: "one more", Ignorable: true})
	if err := apply("first", "a"); err == "" {
		t.Error("a command is still remembered")
	}
	if n := len(s.answered); n != maxAnswered || len(s.answerOrder) != n {
		t.Errorf("%d answers are remembered, %d in order", n, len(s.answerOrder))
	}
}
