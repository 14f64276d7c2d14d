package main

import "math"

type materialKind uint8

const (
	diffuse materialKind = iota
	coated               // diffuse under a thin clear coat
	metal
	glass
	light
)

var materialKinds = map[string]materialKind{
	"diffuse": diffuse, "coated": coated, "metal": metal, "glass": glass, "light": light,
}

type material struct {
	kind      materialKind
	color     vec
	roughness float64
	index     float64
	checker   float64 // size of a square; 0 for a plain colour
	second    vec
}

// at is the colour of the material at a point.
func (m *material) at(p vec) vec {
	if m.checker > 0 {
		squares := math.Floor(p.x/m.checker) + math.Floor(p.z/m.checker)
		if math.Mod(squares, 2) != 0 {
			return m.second
		}
	}
	return m.color
}

// sun is a distant disk of light.
type sun struct {
	direction vec
	cos       float64 // of half its width
	oneLess   float64 // 1 - cos, without the lost digits
	light     vec     // on a surface that faces it
	glow      vec
}

type camera struct {
	from, forward, right, up vec
	tangent                  float64 // of half the field of view
	lens, focus              float64
}

// world is one frame, ready to be traced. It is only read while it is.
type world struct {
	bounces   int
	exposure  float64
	horizon   vec
	zenith    vec
	ground    vec
	haze      float64
	sun       *sun
	camera    camera
	materials []material

	tree   hierarchy
	planes []shape
	lamps  []shape // the spheres that shine

	pending []shape
}

func (w *world) add(shapes []shape) {
	for _, s := range shapes {
		switch {
		case s.kind == planeShape:
			w.planes = append(w.planes, s)
		default:
			w.pending = append(w.pending, s)
			if w.isLamp(&s) {
				w.lamps = append(w.lamps, s)
			}
		}
	}
}

func (w *world) finish() { w.tree, w.pending = newHierarchy(w.pending), nil }

// isLamp reports whether s is a light that surfaces look for; other shining
// shapes light what a bounce happens to find.
func (w *world) isLamp(s *shape) bool {
	return s.kind == sphereShape && w.materials[s.material].kind == light
}

func (w *world) nearest(r ray, limit float64) (float64, *shape) {
	limit, found := w.tree.nearest(r, limit)
	for i := range w.planes {
		if t := w.planes[i].hit(r); t < limit {
			limit, found = t, &w.planes[i]
		}
	}
	return limit, found
}

// glassShadow is what a glass body lets through of the light behind it. Glass
// is taken as flat for shadows: it tints them and casts no caustics, which at a
// few samples per pixel would be noise.
const glassShadow = 0.82

// reaching is the share of light that arrives from distance limit along r.
func (w *world) reaching(r ray, limit float64) vec {
	share := vec{1, 1, 1}
	shadow := func(s *shape) bool {
		if s.hit(r) >= limit {
			return true
		}
		m := &w.materials[s.material]
		share = share.mul(m.color).scale(glassShadow)
		return m.kind == glass
	}
	for i := range w.planes {
		if !shadow(&w.planes[i]) {
			return vec{}
		}
	}
	walk := w.tree.walk(r)
	for leaf := walk.next(limit); leaf != nil; leaf = walk.next(limit) {
		for i := range leaf {
			if !shadow(&leaf[i]) {
				return vec{}
			}
		}
	}
	return share
}

// sky is the light from direction d. The disk of the sun is left out where
// surfaces have counted it already.
func (w *world) sky(d vec, withSun bool) vec {
	if d.y < 0 {
		return mix(w.horizon, w.ground, min(1, float64(-6*d.y)))
	}
	c := mix(w.horizon, w.zenith, math.Sqrt(d.y))
	if w.sun == nil {
		return c
	}
	cos := max(0, d.dot(w.sun.direction))
	k := float64(cos * cos)
	k = float64(k * k)
	wide := float64(k * k)
	k = float64(wide * wide)
	narrow := float64(k * k)
	narrow = float64(narrow * narrow)
	c = c.add(w.sun.glow.scale(float64(0.35*wide) + float64(0.65*narrow)))
	if withSun && cos > w.sun.cos {
		c = c.add(w.sun.light.scale(1 / float64(2*w.sun.oneLess)))
	}
	return c
}

// Bounds on what one sample may find, in all and where light meets a second
// matt surface. A rarer, brighter one would be a white dot that no affordable
// number of samples averages away.
const (
	brightest       = 8
	brightestBounce = 1.2
)

func bounded(c vec, most float64) vec {
	if m := c.max(); m > most {
		return c.scale(most / m)
	}
	return c
}

// radiance is the light that comes back along r, from one random path.
func (w *world) radiance(r ray, s *sampler) vec {
	return w.follow(path{ray: r, weight: vec{1, 1, 1}, direct: true}, s)
}

// path is where a path of light, followed backwards from the camera, has got to.
type path struct {
	ray    ray
	weight vec // the share of what it finds that reaches the camera
	depth  int // surfaces met
	// direct says that those were mirrors and glass, so that lights it meets
	// were not counted by a surface that looked for them.
	direct bool
}

func (w *world) follow(p path, s *sampler) vec {
	var sum vec
	for ; p.depth < w.bounces; p.depth++ {
		t, body := w.nearest(p.ray, math.Inf(1))
		if body == nil {
			return sum.add(p.weight.mul(w.sky(p.ray.dir, p.direct)))
		}
		dir, at := p.ray.dir, p.ray.at(t)
		if p.direct && w.haze > 0 {
			clear := float64(w.haze * t)
			clear = 1 / (1 + float64(clear*clear))
			sum = sum.add(p.weight.mul(w.sky(vec{dir.x, max(dir.y, 0), dir.z}, false)).scale(1 - clear))
			p.weight = p.weight.scale(clear)
		}
		n := body.normal(at)
		inside := n.dot(dir) > 0
		if inside {
			n = n.neg()
		}
		m := &w.materials[body.material]
		switch m.kind {
		case light:
			if p.direct || body.kind != sphereShape {
				sum = sum.add(p.weight.mul(m.color))
			}
			return sum
		case metal:
			p.weight = p.weight.mul(mix(m.color, vec{1, 1, 1}, fresnel(-n.dot(dir))))
			p.ray = ray{at, blurred(reflect(dir, n), n, m.roughness, s)}
		case glass:
			p.weight = p.weight.mul(m.color)
			p.ray = ray{at, refracted(dir, n, m.index, inside, s)}
		default:
			gloss := 0.0
			if m.kind == coated {
				gloss = 0.04 + float64(0.96*fresnel(-n.dot(dir)))
			}
			if p.depth > 0 && s.one() < gloss {
				p.ray = ray{at, blurred(reflect(dir, n), n, m.roughness, s)}
				break
			}
			mirrored := p
			if p.depth == 0 {
				p.weight = p.weight.scale(1 - gloss)
			}
			p.weight = p.weight.mul(m.at(at))
			arriving := w.lit(at, n, s)
			if !p.direct {
				arriving = bounded(arriving, brightestBounce)
			}
			sum = sum.add(p.weight.mul(arriving))
			p.ray, p.direct = ray{at, scattered(n, s)}, false
			if mirrored.depth == 0 && gloss > 0 {
				// The coat of what the camera sees is followed every time, not by
				// chance: highlights would be speckles otherwise.
				mirrored.ray = ray{at, blurred(reflect(dir, n), n, m.roughness, s)}
				mirrored.weight, mirrored.depth = mirrored.weight.scale(gloss), 1
				sum = sum.add(w.follow(mirrored, s))
			}
		}
		if p.depth >= 3 {
			keep := min(0.95, p.weight.max())
			if s.one() >= keep {
				return sum
			}
			p.weight = p.weight.scale(1 / keep)
		}
	}
	return sum
}

// lit is the light that lamps and sun throw straight onto a white surface.
func (w *world) lit(p, n vec, s *sampler) vec {
	var sum vec
	if w.sun != nil {
		u, v := s.two()
		d := cone(w.sun.direction, w.sun.oneLess, u, v)
		if cos := n.dot(d); cos > 0 {
			sum = w.reaching(ray{p, d}, math.Inf(1)).mul(w.sun.light).scale(cos * (1 / math.Pi))
		}
	}
	if lamp, chance := w.pickLamp(p, s); lamp != nil {
		to := lamp.at.sub(p)
		far2 := to.dot(to)
		r2 := float64(lamp.radius * lamp.radius)
		if far2 <= float64(1.0001*r2) {
			return sum
		}
		ratio := r2 / far2
		oneLess := ratio / (1 + math.Sqrt(1-ratio))
		u, v := s.two()
		d := cone(to.unit(), oneLess, u, v)
		cos := n.dot(d)
		t := lamp.hit(ray{p, d})
		if cos <= 0 || math.IsInf(t, 1) {
			return sum
		}
		shine := w.materials[lamp.material].color.scale(float64(float64(2*oneLess)*cos) / chance)
		sum = sum.add(w.reaching(ray{p, d}, t-float64(t*1e-6)-near).mul(shine))
	}
	return sum
}

// pickLamp draws one lamp, the likelier the more light it could send to p.
func (w *world) pickLamp(p vec, s *sampler) (lamp *shape, chance float64) {
	if len(w.lamps) == 0 {
		return nil, 0
	}
	power := func(l *shape) float64 {
		to := l.at.sub(p)
		return float64(w.materials[l.material].color.max()*float64(l.radius*l.radius))/to.dot(to) + 1e-12
	}
	total := 0.0
	for i := range w.lamps {
		total += power(&w.lamps[i])
	}
	pick := float64(s.one() * total)
	for i := range w.lamps {
		share := power(&w.lamps[i])
		pick -= share
		if pick < 0 || i == len(w.lamps)-1 {
			return &w.lamps[i], share / total
		}
	}
	return nil, 0
}

// fresnel is Schlick's fifth power: how much of the rest a surface reflects at
// a grazing angle.
func fresnel(cos float64) float64 {
	k := min(1, max(0, 1-cos))
	k2 := float64(k * k)
	return float64(float64(k2*k2) * k)
}

// blurred spreads a mirrored direction over a ball of the given radius.
func blurred(d, n vec, roughness float64, s *sampler) vec {
	if roughness == 0 {
		return d
	}
	u, v := s.two()
	spread := d.add(sphere(u, v).scale(roughness))
	if spread.dot(n) <= 1e-6 { // below the surface: mirror it back up
		spread = d
	}
	return spread.unit()
}

// refracted passes through or mirrors at the surface of glass, by chance.
func refracted(d, n vec, index float64, inside bool, s *sampler) vec {
	ratio := 1 / index
	if inside {
		ratio = index
	}
	cos := min(1, -n.dot(d))
	bent := 1 - float64(float64(ratio*ratio)*(1-float64(cos*cos)))
	edge := (1 - ratio) / (1 + ratio)
	edge = float64(edge * edge)
	if inside {
		cos = math.Sqrt(max(0, bent))
	}
	if bent <= 0 || s.one() < edge+float64((1-edge)*fresnel(cos)) {
		return reflect(d, n)
	}
	cos = -n.dot(d)
	return d.scale(ratio).add(n.scale(float64(ratio*cos) - math.Sqrt(bent))).unit()
}

// scattered is a direction above the surface, by the cosine law.
func scattered(n vec, s *sampler) vec {
	x, y := disk(s.two())
	a, b := basis(n)
	z := math.Sqrt(max(1e-9, 1-float64(x*x)-float64(y*y)))
	return a.scale(x).add(b.scale(y)).add(n.scale(z)).unit()
}

// cone is a direction within the cone around axis whose cosine is 1-oneLess.
func cone(axis vec, oneLess, u, v float64) vec {
	x, y := disk(u, v)
	r2 := float64(x*x) + float64(y*y)
	k := math.Sqrt(float64(oneLess * (2 - float64(r2*oneLess))))
	a, b := basis(axis)
	return a.scale(float64(x * k)).add(b.scale(float64(y * k))).add(axis.scale(1 - float64(r2*oneLess))).unit()
}

// ray through the point (x, y) of the picture: x from -aspect to aspect, y from
// -1 to 1 upwards.
func (c *camera) ray(x, y float64, s *sampler) ray {
	d := c.forward.add(c.right.scale(float64(x * c.tangent))).add(c.up.scale(float64(y * c.tangent)))
	u, v := s.two()
	if c.lens == 0 {
		return ray{c.from, d.unit()}
	}
	lx, ly := disk(u, v)
	shift := c.right.scale(float64(lx * c.lens)).add(c.up.scale(float64(ly * c.lens)))
	return ray{c.from.add(shift), d.scale(c.focus).sub(shift).unit()}
}
