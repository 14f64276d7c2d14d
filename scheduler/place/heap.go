package place

// heap is a binary heap whose items know where they are, so that one of them
// can be moved or taken out.
type heap[T any] struct {
	items []T
	less  func(a, b T) bool
	moved func(item T, at int) // at is -1 for an item that left
}

func (h *heap[T]) push(item T) {
	h.items = append(h.items, item)
	h.moved(item, len(h.items)-1)
	h.up(len(h.items) - 1)
}

// remove takes out the item at a place.
func (h *heap[T]) remove(at int) {
	item, last := h.items[at], len(h.items)-1
	h.items[at] = h.items[last]
	var none T
	h.items[last] = none
	h.items = h.items[:last]
	if at < last {
		h.moved(h.items[at], at)
		h.fix(at)
	}
	h.moved(item, -1)
}

// fix restores the order after the item at a place has changed.
func (h *heap[T]) fix(at int) {
	if !h.up(at) {
		h.down(at)
	}
}

func (h *heap[T]) up(at int) (changed bool) {
	for at > 0 {
		parent := (at - 1) / 2
		if !h.less(h.items[at], h.items[parent]) {
			break
		}
		h.swap(at, parent)
		at, changed = parent, true
	}
	return changed
}

func (h *heap[T]) down(at int) {
	for {
		least := at
		for child := 2*at + 1; child <= 2*at+2 && child < len(h.items); child++ {
			if h.less(h.items[child], h.items[least]) {
				least = child
			}
		}
		if least == at {
			return
		}
		h.swap(at, least)
		at = least
	}
}

func (h *heap[T]) swap(a, b int) {
	h.items[a], h.items[b] = h.items[b], h.items[a]
	h.moved(h.items[a], a)
	h.moved(h.items[b], b)
}
