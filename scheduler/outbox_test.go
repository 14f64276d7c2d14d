package scheduler

import (
	"fmt"
	"strings"
	"testing"

	"github.com/musternet/muster/api/musterpb"
)

func attemptNo(i int) *musterpb.Attempt { return &musterpb.Attempt{Id: fmt.Sprintf("att-%d", i)} }

func TestOutboxGathers(t *testing.T) {
	o := newOutbox()
	if m := o.take(); m != nil {
		t.Errorf("an empty outbox holds %v", m)
	}
	first, second := &musterpb.JobSpec{Name: "a", Command: []string{"first"}}, &musterpb.JobSpec{Name: "b", Command: []string{"second"}}
	for i, spec := range []*musterpb.JobSpec{first, second, first, second} {
		if !o.add(func(o *outbox) { o.assign = append(o.assign, assignment{spec, attemptNo(i), []uint64{uint64(i)}}) }) {
			t.Fatal("an order did not fit")
		}
	}
	o.add(func(o *outbox) { o.stop = append(o.stop, &musterpb.Stop{Attempt: "att-9"}) })
	o.add(func(o *outbox) { o.outcomes = append(o.outcomes, &musterpb.Outcome{Attempt: "att-8"}) })
	select {
	case <-o.wake:
	default:
		t.Error("nobody was woken")
	}
	m := o.take().GetOrders()
	if len(m.GetAssign()) != 4 || len(m.Stop) != 1 || len(m.Outcomes) != 1 {
		t.Fatalf("took %v; want all orders in one message", m)
	}
	for i, want := range []uint32{0, 0, 1, 2} {
		a := m.Assign[i]
		if a.Like != want || a.Attempt != fmt.Sprintf("att-%d", i) || a.Indexes[0] != uint64(i) || (len(a.Command) > 0) != (want == 0) {
			t.Errorf("assignment %d is %v; want one like %d", i, a, want)
		}
	}
	if m := o.take(); m != nil {
		t.Errorf("%v was told twice", m)
	}
}

func TestOutboxBounds(t *testing.T) {
	o := newOutbox()
	for i := range maxOutbox {
		if !o.add(func(o *outbox) { o.outcomes = append(o.outcomes, &musterpb.Outcome{Attempt: fmt.Sprint(i)}) }) {
			t.Fatalf("outcome %d did not fit", i)
		}
	}
	if o.add(func(o *outbox) { o.outcomes = append(o.outcomes, &musterpb.Outcome{}) }) {
		t.Error("more than the bound fit")
	}
	next := 0
	for m := o.take(); m != nil; m = o.take() {
		if n := len(m.GetOrders().Outcomes); n > maxMessage {
			t.Fatalf("a message of %d orders", n)
		}
		for _, outcome := range m.GetOrders().Outcomes {
			if next < maxOutbox && outcome.Attempt != fmt.Sprint(next) {
				t.Fatalf("outcome %s in the place of %d", outcome.Attempt, next)
			}
			next++
		}
	}
	if next != maxOutbox+1 {
		t.Errorf("%d outcomes were told", next)
	}
}

// Specifications may have megabytes; a message stays small, and none is lost.
func TestOutboxMessageBytes(t *testing.T) {
	o := newOutbox()
	const n = 10
	for i := range n {
		spec := &musterpb.JobSpec{Command: []string{strings.Repeat("x", maxMessageBytes/3)}}
		o.add(func(o *outbox) { o.assign = append(o.assign, assignment{spec: spec, attempt: attemptNo(i)}) })
	}
	huge := &musterpb.JobSpec{Command: []string{strings.Repeat("x", 2*maxMessageBytes)}}
	o.add(func(o *outbox) { o.assign = append(o.assign, assignment{spec: huge, attempt: attemptNo(n)}) })
	told := 0
	for m := o.take(); m != nil; m = o.take() {
		list := m.GetOrders().Assign
		if size := m.SizeVT(); size > maxMessageBytes && len(list) > 1 {
			t.Errorf("a message of %d assignments has %d bytes", len(list), size)
		}
		for _, a := range list {
			if a.Attempt != attemptNo(told).Id || len(a.Command) == 0 {
				t.Errorf("assignment %v in the place of %d", a.Attempt, told)
			}
			told++
		}
	}
	if told != n+1 {
		t.Errorf("%d of %d assignments were told", told, n+1)
	}
}
