package scheduler

import (
	"sync"

	"github.com/musternet/muster/api/musterpb"
)

// Bounds of what a worker is told.
const (
	maxOutbox       = 16384   // orders that wait for a slow worker
	maxMessage      = 512     // orders in one message
	maxMessageBytes = 1 << 20 // of its assignments; one alone may have more
)

// outbox gathers orders while the stream is busy with the ones before, so that
// nothing waits on an idle stream and many travel as one message on a busy one.
type outbox struct {
	mu       sync.Mutex
	assign   []assignment        // guarded by mu
	stop     []*musterpb.Stop    // guarded by mu
	outcomes []*musterpb.Outcome // guarded by mu
	wake     chan struct{}       // capacity 1: there are orders
}

// assignment is what a worker learns of an attempt; what is the same for all
// attempts of a job is in the job's specification.
type assignment struct {
	spec    *musterpb.JobSpec
	attempt *musterpb.Attempt
	indexes []uint64
}

func newOutbox() *outbox { return &outbox{wake: make(chan struct{}, 1)} }

// add calls f, which may append orders, and reports whether they fit.
func (o *outbox) add(f func(*outbox)) bool {
	o.mu.Lock()
	f(o)
	n := len(o.assign) + len(o.stop) + len(o.outcomes)
	o.mu.Unlock()
	select {
	case o.wake <- struct{}{}:
	default:
	}
	return n <= maxOutbox
}

// take is the next message, nil when there is none. Stops and outcomes come
// first: they make room at the worker.
func (o *outbox) take() *musterpb.SchedulerMessage {
	o.mu.Lock()
	defer o.mu.Unlock()
	m := &musterpb.Orders{}
	m.Stop, o.stop = cut(o.stop, maxMessage)
	m.Outcomes, o.outcomes = cut(o.outcomes, maxMessage-len(m.Stop))
	var told int
	m.Assign, told = assignments(o.assign[:min(len(o.assign), maxMessage-len(m.Stop)-len(m.Outcomes))])
	_, o.assign = cut(o.assign, told)
	if len(m.Stop)+len(m.Outcomes)+len(m.Assign) == 0 {
		return nil
	}
	return &musterpb.SchedulerMessage{Message: &musterpb.SchedulerMessage_Orders{Orders: m}}
}

// cut takes up to n from the front of a list. What is left of a list that was
// emptied is not kept: most workers have nothing waiting most of the time.
func cut[T any](list []T, n int) (front, rest []T) {
	if len(list) <= n {
		return list, nil
	}
	return list[:n:n], list[n:]
}

// assignments makes a message's part of a list, telling each specification once,
// and returns how much of the list that is.
func assignments(list []assignment) (out []*musterpb.Assignment, told int) {
	if len(list) == 0 {
		return nil, 0
	}
	out = make([]*musterpb.Assignment, 0, len(list))
	position := map[*musterpb.JobSpec]uint32{} // 1 + that of its first assignment
	size := 0
	for _, a := range list {
		next := &musterpb.Assignment{
			Attempt: a.attempt.Id, Indexes: a.indexes, Devices: a.attempt.Devices, PriceMicroUsdPerHour: a.attempt.PriceMicroUsdPerHour, Like: position[a.spec],
		}
		if next.Like == 0 {
			position[a.spec] = uint32(len(out)) + 1
			next.Image, next.Command, next.Env, next.Inputs, next.Items = a.spec.Image, a.spec.Command, a.spec.Env, a.spec.Inputs, a.spec.Items
			next.Resources, next.TimeoutMs, next.Outputs, next.Network = a.spec.Resources, a.spec.TimeoutMs, a.spec.Outputs, a.spec.Network
		}
		if size += next.SizeVT(); size > maxMessageBytes && len(out) > 0 {
			break
		}
		out = append(out, next)
	}
	return out, len(out)
}
