package main

import (
	"cmp"
	"math"
	"slices"
)

type ray struct{ from, dir vec }

func (r ray) at(t float64) vec { return r.from.add(r.dir.scale(t)) }

// near is the distance below which a ray ignores what it meets: the surface
// that it just left.
const near = 1e-5

type shapeKind uint8

const (
	sphereShape shapeKind = iota
	planeShape
	boxShape
	triangleShape
)

// shape is one surface. The fields mean, by kind:
//
//	sphere    at = centre, radius
//	plane     at = a point, u = unit normal
//	box       at = centre, u = half its size, v = (sin, cos) of its turn
//	triangle  at = a corner, u and v = the edges from it
type shape struct {
	kind     shapeKind
	material int32
	radius   float64
	at, u, v vec
}

// hit returns the nearest distance above near at which r meets s, or +Inf.
func (s *shape) hit(r ray) float64 {
	switch s.kind {
	case sphereShape:
		return s.hitSphere(r)
	case planeShape:
		slope := r.dir.dot(s.u)
		if math.Abs(slope) < 1e-12 {
			return math.Inf(1)
		}
		return ahead(s.at.sub(r.from).dot(s.u) / slope)
	case boxShape:
		local := ray{s.local(r.from.sub(s.at)), s.local(r.dir)}
		inverse := vec{1 / local.dir.x, 1 / local.dir.y, 1 / local.dir.z}
		enter, leave := slabs(local.from, inverse, s.u.neg(), s.u)
		if enter > leave {
			return math.Inf(1)
		}
		if enter > near {
			return enter
		}
		return ahead(leave)
	default:
		return s.hitTriangle(r)
	}
}

func ahead(t float64) float64 {
	if t > near {
		return t
	}
	return math.Inf(1)
}

func (s *shape) hitSphere(r ray) float64 {
	to := s.at.sub(r.from)
	middle := to.dot(r.dir)
	// The squared distance from the centre to the ray, computed from the foot of
	// the perpendicular, keeps its digits for a small sphere far away.
	off := to.sub(r.dir.scale(middle))
	half := float64(s.radius*s.radius) - off.dot(off)
	if half < 0 {
		return math.Inf(1)
	}
	half = math.Sqrt(half)
	if middle-half > near {
		return middle - half
	}
	return ahead(middle + half)
}

// hitTriangle is Möller and Trumbore's test.
func (s *shape) hitTriangle(r ray) float64 {
	p := r.dir.cross(s.v)
	det := s.u.dot(p)
	if math.Abs(det) < 1e-14 {
		return math.Inf(1)
	}
	to := r.from.sub(s.at)
	a := to.dot(p) / det
	if a < 0 || a > 1 {
		return math.Inf(1)
	}
	q := to.cross(s.u)
	b := r.dir.dot(q) / det
	if b < 0 || a+b > 1 {
		return math.Inf(1)
	}
	return ahead(s.v.dot(q) / det)
}

// local turns a direction into the axes of a box; world turns it back.
func (s *shape) local(d vec) vec {
	return vec{float64(s.v.y*d.x) - float64(s.v.x*d.z), d.y, float64(s.v.x*d.x) + float64(s.v.y*d.z)}
}

func (s *shape) world(d vec) vec {
	return vec{float64(s.v.y*d.x) + float64(s.v.x*d.z), d.y, float64(s.v.y*d.z) - float64(s.v.x*d.x)}
}

// normal is the outward unit normal at a point of the surface.
func (s *shape) normal(p vec) vec {
	switch s.kind {
	case sphereShape:
		return p.sub(s.at).scale(1 / s.radius)
	case planeShape:
		return s.u
	case boxShape:
		d := s.local(p.sub(s.at))
		x, y, z := math.Abs(d.x)/s.u.x, math.Abs(d.y)/s.u.y, math.Abs(d.z)/s.u.z
		n := vec{z: math.Copysign(1, d.z)}
		if x >= y && x >= z {
			n = vec{x: math.Copysign(1, d.x)}
		} else if y >= z {
			n = vec{y: math.Copysign(1, d.y)}
		}
		return s.world(n)
	default:
		return s.u.cross(s.v).unit()
	}
}

// bounds is the box around a shape; a plane has none.
func (s *shape) bounds() (low, high vec) {
	switch s.kind {
	case sphereShape:
		r := vec{s.radius, s.radius, s.radius}
		return s.at.sub(r), s.at.add(r)
	case boxShape:
		sin, cos := math.Abs(s.v.x), math.Abs(s.v.y)
		half := vec{
			float64(cos*s.u.x) + float64(sin*s.u.z) + near,
			s.u.y + near,
			float64(sin*s.u.x) + float64(cos*s.u.z) + near,
		}
		return s.at.sub(half), s.at.add(half)
	default:
		b, c, pad := s.at.add(s.u), s.at.add(s.v), vec{near, near, near}
		return s.at.min(b).min(c).sub(pad), s.at.most(b).most(c).add(pad)
	}
}

// slabs returns where a ray enters and leaves a box; enter > leave is a miss.
func slabs(from, inverse, low, high vec) (enter, leave float64) {
	ax, bx := float64((low.x-from.x)*inverse.x), float64((high.x-from.x)*inverse.x)
	ay, by := float64((low.y-from.y)*inverse.y), float64((high.y-from.y)*inverse.y)
	az, bz := float64((low.z-from.z)*inverse.z), float64((high.z-from.z)*inverse.z)
	if ax > bx {
		ax, bx = bx, ax
	}
	if ay > by {
		ay, by = by, ay
	}
	if az > bz {
		az, bz = bz, az
	}
	enter, leave = ax, bx
	if ay > enter {
		enter = ay
	}
	if az > enter {
		enter = az
	}
	if by < leave {
		leave = by
	}
	if bz < leave {
		leave = bz
	}
	return enter, leave
}

// node is a box in the hierarchy: a leaf with shapes[first:first+count], or,
// with count 0, a branch whose children are the next node and node first, lower
// and higher along the axis.
type node struct {
	low, high    vec
	first, count int32
	axis         int
}

const (
	leafShapes = 2
	// Below carefulDepth the tree is cut for speed, from there on in halves, so
	// that it ends before maxDepth whatever the scene: 2^20 shapes are more than
	// maxObjects + maxTriangles.
	carefulDepth = 24
	maxDepth     = carefulDepth + 20
)

// hierarchy finds the shapes near a ray without asking all of them.
type hierarchy struct {
	shapes []shape
	nodes  []node
}

func newHierarchy(shapes []shape) hierarchy {
	h := hierarchy{shapes: shapes}
	if len(shapes) > 0 {
		h.split(0, len(shapes), 0)
	}
	return h
}

// split makes the node of shapes[from:to] and those below it. The sorts are
// stable, so the tree depends on the scene alone.
func (h *hierarchy) split(from, to, depth int) {
	part := h.shapes[from:to]
	low, high := surround(part)
	at := len(h.nodes)
	h.nodes = append(h.nodes, node{low: low, high: high, first: int32(from), count: int32(len(part))})
	if len(part) <= leafShapes {
		return
	}
	axis, left := longest(high.sub(low)), len(part)/2
	if depth < carefulDepth {
		axis, left = bestCut(part)
	}
	sortAlong(part, axis)
	h.split(from, from+left, depth+1)
	second := int32(len(h.nodes))
	h.split(from+left, to, depth+1)
	h.nodes[at].first, h.nodes[at].count, h.nodes[at].axis = second, 0, axis
}

func surround(part []shape) (low, high vec) {
	low, high = part[0].bounds()
	for i := range part[1:] {
		l, u := part[i+1].bounds()
		low, high = low.min(l), high.most(u)
	}
	return low, high
}

func longest(size vec) int {
	axis := 0
	for i := 1; i < 3; i++ {
		if size.axis(i) > size.axis(axis) {
			axis = i
		}
	}
	return axis
}

func sortAlong(part []shape, axis int) {
	slices.SortStableFunc(part, func(a, b shape) int {
		al, ah := a.bounds()
		bl, bh := b.bounds()
		return cmp.Compare(al.axis(axis)+ah.axis(axis), bl.axis(axis)+bh.axis(axis))
	})
}

// bestCut is the axis, and the number of shapes on its low side, for which a
// random ray is expected to meet the fewest shapes: their number weighted by
// the surface of the box around them.
func bestCut(part []shape) (axis, left int) {
	best := math.Inf(1)
	axis, left = 0, len(part)/2
	costs := make([]float64, len(part))
	for a := range 3 {
		sortAlong(part, a)
		low, high := part[0].bounds()
		for i := 1; i < len(part); i++ {
			costs[i] = float64(area(high.sub(low)) * float64(i))
			l, u := part[i].bounds()
			low, high = low.min(l), high.most(u)
		}
		low, high = part[len(part)-1].bounds()
		for i := len(part) - 1; i > 0; i-- {
			l, u := part[i].bounds()
			low, high = low.min(l), high.most(u)
			if cost := costs[i] + float64(area(high.sub(low))*float64(len(part)-i)); cost < best {
				best, axis, left = cost, a, i
			}
		}
	}
	return axis, left
}

func area(size vec) float64 {
	return float64(size.x*size.y) + float64(size.y*size.z) + float64(size.z*size.x)
}

// nearest is the first shape that r meets before limit, and where; without one
// it returns limit and nil.
func (h *hierarchy) nearest(r ray, limit float64) (float64, *shape) {
	var found *shape
	w := h.walk(r)
	for leaf := w.next(limit); leaf != nil; leaf = w.next(limit) {
		for i := range leaf {
			if t := leaf[i].hit(r); t < limit {
				limit, found = t, &leaf[i]
			}
		}
	}
	return limit, found
}

// walk starts a visit of the leaves near a ray, roughly from near to far.
func (h *hierarchy) walk(r ray) walk {
	w := walk{h: h, from: r.from, inverse: vec{1 / r.dir.x, 1 / r.dir.y, 1 / r.dir.z}}
	w.back = [3]bool{r.dir.x < 0, r.dir.y < 0, r.dir.z < 0}
	if len(h.nodes) > 0 {
		w.depth = 1
	}
	return w
}

type walk struct {
	h             *hierarchy
	from, inverse vec
	back          [3]bool
	depth         int
	stack         [maxDepth]int32
}

// next is the next leaf that the ray may enter before limit, nil at the end.
func (w *walk) next(limit float64) []shape {
	for w.depth > 0 {
		w.depth--
		i := w.stack[w.depth]
		n := &w.h.nodes[i]
		enter, leave := slabs(w.from, w.inverse, n.low, n.high)
		if enter > leave || leave < near || enter > limit {
			continue
		}
		if n.count > 0 {
			return w.h.shapes[n.first : n.first+n.count]
		}
		first, second := i+1, n.first
		if w.back[n.axis] {
			first, second = second, first
		}
		w.stack[w.depth], w.stack[w.depth+1] = second, first
		w.depth += 2
	}
	return nil
}
