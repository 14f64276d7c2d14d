package state

import "iter"

// queue holds IDs in the order in which they came, each once, with a number.
// Any of them can leave at once. The zero value is empty.
type queue struct {
	ids     []string // "" is one that left
	entries map[string]queued
}

type queued struct{ at, n int }

// get is the number of an ID, 0 for one that is not there.
func (q *queue) get(id string) int { return q.entries[id].n }

func (q *queue) len() int { return len(q.entries) }

// set gives an ID a number; 0 takes it out.
func (q *queue) set(id string, n int) {
	e, there := q.entries[id]
	switch {
	case n > 0 && there:
		q.entries[id] = queued{e.at, n}
	case n > 0:
		if q.entries == nil {
			q.entries = map[string]queued{}
		}
		q.entries[id] = queued{len(q.ids), n}
		q.ids = append(q.ids, id)
	case there:
		delete(q.entries, id)
		if q.ids[e.at] = ""; len(q.ids) > 2*len(q.entries) {
			q.compact()
		}
	}
}

// compact closes the gaps, once they are half of it.
func (q *queue) compact() {
	if len(q.entries) == 0 {
		*q = queue{}
		return
	}
	ids := make([]string, 0, 2*len(q.entries))
	for id := range q.all() {
		q.entries[id] = queued{len(ids), q.entries[id].n}
		ids = append(ids, id)
	}
	q.ids = ids
}

// all are the IDs, in order.
func (q *queue) all() iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, id := range q.ids {
			if id != "" && !yield(id) {
				return
			}
		}
	}
}
