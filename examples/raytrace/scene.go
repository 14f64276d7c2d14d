package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
)

// Bounds on what a scene file may hold, so that a mistaken or hostile one is an
// error and not a machine out of memory.
const (
	maxSceneBytes = 4 << 20
	maxFrames     = 1_000_000
	maxObjects    = 4096
	maxTriangles  = 1 << 16
	maxMaterials  = 1024
	maxKeys       = 4096
	maxBounces    = 64
	maxValue      = 1e6 // any coordinate, radius or colour
)

// sceneFile is the scene as its JSON file spells it. Lengths are in scene
// units, angles in degrees, colours linear red, green and blue.
type sceneFile struct {
	// Frames is the number of frames; they are numbered from 1.
	Frames    int                     `json:"frames"`
	Bounces   int                     `json:"bounces"`  // most surfaces on one path; 0 means 8
	Exposure  float64                 `json:"exposure"` // multiplies the light before tone mapping; 0 means 1
	Sky       skySpec                 `json:"sky"`
	Sun       *sunSpec                `json:"sun"`
	Camera    cameraSpec              `json:"camera"`
	Materials map[string]materialSpec `json:"materials"`
	Objects   []objectSpec            `json:"objects"`
}

type skySpec struct {
	Horizon triple  `json:"horizon"`
	Zenith  triple  `json:"zenith"`
	Ground  triple  `json:"ground"`
	Haze    float64 `json:"haze"` // 1/distance at which half a surface is lost in the horizon's colour
}

type sunSpec struct {
	Direction triple  `json:"direction"` // towards the sun
	Angle     float64 `json:"angle"`     // half the width of the disk
	Color     triple  `json:"color"`     // light on a surface that faces it
	Glow      triple  `json:"glow"`      // halo in the sky around it
}

type cameraSpec struct {
	FOV      float64     `json:"fov"`      // vertical
	Aperture float64     `json:"aperture"` // radius of the lens; 0 keeps everything sharp
	Keys     []cameraKey `json:"keys"`
}

type cameraKey struct {
	Frame float64 `json:"frame"`
	From  triple  `json:"from"`
	At    triple  `json:"at"`
	Focus float64 `json:"focus"` // distance that is sharp; 0 means that of At
}

type materialSpec struct {
	Type      string       `json:"type"` // diffuse, coated, metal, glass or light
	Color     triple       `json:"color"`
	Roughness float64      `json:"roughness"` // metal and coated: 0 mirrors, 1 blurs
	Index     float64      `json:"index"`     // glass: refractive index; 0 means 1.5
	Checker   *checkerSpec `json:"checker"`   // diffuse and coated
}

type checkerSpec struct {
	Color triple  `json:"color"`
	Size  float64 `json:"size"`
}

// objectSpec has exactly one shape.
type objectSpec struct {
	Material string      `json:"material"`
	Sphere   *sphereSpec `json:"sphere"`
	Plane    *planeSpec  `json:"plane"`
	Box      *boxSpec    `json:"box"`
	Mesh     *meshSpec   `json:"mesh"`
	Motion   []motionKey `json:"motion"`
}

type sphereSpec struct {
	Center triple  `json:"center"`
	Radius float64 `json:"radius"`
}

type planeSpec struct {
	Point  triple `json:"point"`
	Normal triple `json:"normal"`
}

type boxSpec struct {
	Center triple  `json:"center"`
	Size   triple  `json:"size"`
	Turn   float64 `json:"turn"` // around the vertical axis
}

type meshSpec struct {
	Vertices []triple `json:"vertices"`
	Faces    [][]int  `json:"faces"` // three vertices each, counted from 0
}

type motionKey struct {
	Frame float64 `json:"frame"`
	Move  triple  `json:"move"`
}

// triple is three numbers; encoding/json alone would take two or four.
type triple vec

func (t *triple) UnmarshalJSON(b []byte) error {
	var list []float64
	if err := json.Unmarshal(b, &list); err != nil || len(list) != 3 {
		return fmt.Errorf("%s: want three numbers such as [0, 1.5, -2]", b[:min(len(b), 80)])
	}
	*t = triple{list[0], list[1], list[2]}
	return nil
}

func loadScene(path string) (*sceneFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSceneBytes+1))
	if err != nil {
		return nil, err
	}
	s, err := parseScene(b)
	if err != nil {
		return nil, fmt.Errorf("scene %s: %w", path, err)
	}
	return s, nil
}

// parseScene decodes and checks a scene. What it accepts, build can build.
func parseScene(b []byte) (*sceneFile, error) {
	if len(b) > maxSceneBytes {
		return nil, fmt.Errorf("more than %d bytes", maxSceneBytes)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var s sceneFile
	if err := d.Decode(&s); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("something follows the scene's closing brace")
	}
	if s.Bounces == 0 {
		s.Bounces = 8
	}
	if s.Exposure == 0 {
		s.Exposure = 1
	}
	if err := s.check(); err != nil {
		return nil, err
	}
	return &s, nil
}

func (s *sceneFile) check() error {
	var c checker
	c.within("frames", float64(s.Frames), 1, maxFrames)
	c.within("bounces", float64(s.Bounces), 1, maxBounces)
	c.within("exposure", s.Exposure, 1e-6, maxValue)
	c.color("sky.horizon", s.Sky.Horizon)
	c.color("sky.zenith", s.Sky.Zenith)
	c.color("sky.ground", s.Sky.Ground)
	c.within("sky.haze", s.Sky.Haze, 0, 1)
	if s.Sun != nil {
		c.direction("sun.direction", s.Sun.Direction)
		c.within("sun.angle", s.Sun.Angle, 0.01, 45)
		c.color("sun.color", s.Sun.Color)
		c.color("sun.glow", s.Sun.Glow)
	}
	s.Camera.check(&c)
	if len(s.Materials) > maxMaterials {
		c.fail("materials", "%d are too many: want at most %d", len(s.Materials), maxMaterials)
	}
	for name, m := range s.Materials {
		m.check(&c, fmt.Sprintf("materials.%s", name))
	}
	s.checkObjects(&c)
	return c.err
}

func (s *cameraSpec) check(c *checker) {
	c.within("camera.fov", s.FOV, 1, 150)
	c.within("camera.aperture", s.Aperture, 0, 100)
	if n := len(s.Keys); n < 1 || n > maxKeys {
		c.fail("camera.keys", "%d keys: want 1 to %d", n, maxKeys)
	}
	for i, k := range s.Keys {
		at := fmt.Sprintf("camera.keys[%d]", i)
		c.point(at+".from", k.From)
		c.point(at+".at", k.At)
		c.within(at+".focus", k.Focus, 0, maxValue)
		view := vec(k.At).sub(vec(k.From))
		if side := (vec{view.x, 0, view.z}).length(); side < 1e-6 {
			c.fail(at, "the camera looks straight up or down, or at itself")
		}
		c.keyOrder(at, i, k.Frame, func(j int) float64 { return s.Keys[j].Frame })
	}
}

func (m materialSpec) check(c *checker, at string) {
	if _, ok := materialKinds[m.Type]; !ok {
		c.fail(at+".type", "%q: want diffuse, coated, metal, glass or light", m.Type)
	}
	c.color(at+".color", m.Color)
	if m.Type != "light" && vec(m.Color).max() > 1 {
		c.fail(at+".color", "%v: only a light may be above 1", m.Color)
	}
	c.within(at+".roughness", m.Roughness, 0, 1)
	if m.Index != 0 {
		c.within(at+".index", m.Index, 1, 4)
	}
	if m.Checker != nil {
		c.color(at+".checker.color", m.Checker.Color)
		c.within(at+".checker.size", m.Checker.Size, 1e-3, maxValue)
		if vec(m.Checker.Color).max() > 1 {
			c.fail(at+".checker.color", "%v: want at most 1", m.Checker.Color)
		}
	}
}

func (s *sceneFile) checkObjects(c *checker) {
	if n := len(s.Objects); n < 1 || n > maxObjects {
		c.fail("objects", "%d objects: want 1 to %d", n, maxObjects)
		return
	}
	triangles := 0
	for i, o := range s.Objects {
		at := fmt.Sprintf("objects[%d]", i)
		if _, ok := s.Materials[o.Material]; !ok {
			c.fail(at+".material", "%q: no such material", o.Material)
		}
		shapes := 0
		if o.Sphere != nil {
			shapes++
			c.point(at+".sphere.center", o.Sphere.Center)
			c.within(at+".sphere.radius", o.Sphere.Radius, 1e-4, maxValue)
		}
		if o.Plane != nil {
			shapes++
			c.point(at+".plane.point", o.Plane.Point)
			c.direction(at+".plane.normal", o.Plane.Normal)
		}
		if o.Box != nil {
			shapes++
			c.point(at+".box.center", o.Box.Center)
			c.within(at+".box.turn", o.Box.Turn, -maxValue, maxValue)
			for axis := range 3 {
				c.within(at+".box.size", vec(o.Box.Size).axis(axis), 1e-4, maxValue)
			}
		}
		if o.Mesh != nil {
			shapes++
			triangles += len(o.Mesh.Faces)
			o.Mesh.check(c, at+".mesh")
		}
		if shapes != 1 {
			c.fail(at, "%d shapes: want exactly one of sphere, plane, box and mesh", shapes)
		}
		if len(o.Motion) > maxKeys {
			c.fail(at+".motion", "%d keys: want at most %d", len(o.Motion), maxKeys)
		}
		for j, k := range o.Motion {
			key := fmt.Sprintf("%s.motion[%d]", at, j)
			c.point(key+".move", k.Move)
			c.keyOrder(key, j, k.Frame, func(n int) float64 { return o.Motion[n].Frame })
		}
	}
	if triangles > maxTriangles {
		c.fail("objects", "%d triangles: want at most %d", triangles, maxTriangles)
	}
}

func (m *meshSpec) check(c *checker, at string) {
	for i, v := range m.Vertices {
		c.point(fmt.Sprintf("%s.vertices[%d]", at, i), v)
	}
	for i, face := range m.Faces {
		if len(face) != 3 {
			c.fail(fmt.Sprintf("%s.faces[%d]", at, i), "%d corners: want 3", len(face))
		}
		for _, v := range face {
			if v < 0 || v >= len(m.Vertices) {
				c.fail(fmt.Sprintf("%s.faces[%d]", at, i), "vertex %d: there are %d", v, len(m.Vertices))
			}
		}
	}
	if len(m.Faces) == 0 {
		c.fail(at, "no faces")
	}
}

// checker keeps the first thing found wrong, so that the checks read as a list.
type checker struct{ err error }

func (c *checker) fail(at, format string, args ...any) {
	if c.err == nil {
		c.err = fmt.Errorf("%s: %s", at, fmt.Sprintf(format, args...))
	}
}

func (c *checker) within(at string, v, low, high float64) {
	if !(v >= low && v <= high) {
		c.fail(at, "%v: want %v to %v", v, low, high)
	}
}

func (c *checker) point(at string, t triple) {
	for axis := range 3 {
		c.within(at, vec(t).axis(axis), -maxValue, maxValue)
	}
}

func (c *checker) color(at string, t triple) {
	for axis := range 3 {
		c.within(at, vec(t).axis(axis), 0, maxValue)
	}
}

func (c *checker) direction(at string, t triple) {
	c.point(at, t)
	if vec(t).length() < 1e-6 {
		c.fail(at, "%v has no direction", t)
	}
}

func (c *checker) keyOrder(at string, i int, frame float64, frameOf func(int) float64) {
	c.within(at+".frame", frame, -maxFrames, maxFrames)
	if i > 0 && frame < frameOf(i-1)+1e-3 {
		c.fail(at+".frame", "%v: want keys in the order of their frames, each once", frame)
	}
}

// spline passes through value(i) at key i's frame, with the speed at a key
// taken from its neighbours (a cubic Hermite curve), and rests before the first
// and after the last key.
func spline(n int, frameOf func(int) float64, value func(int) vec, frame float64) vec {
	if n == 0 {
		return vec{}
	}
	if frame <= frameOf(0) {
		return value(0)
	}
	if frame >= frameOf(n-1) {
		return value(n - 1)
	}
	i := 0
	for frame >= frameOf(i+1) {
		i++
	}
	speed := func(k int) vec {
		before, after := max(k-1, 0), min(k+1, n-1)
		return value(after).sub(value(before)).scale(1 / (frameOf(after) - frameOf(before)))
	}
	width := frameOf(i+1) - frameOf(i)
	t := (frame - frameOf(i)) / width
	t2 := float64(t * t)
	t3 := float64(t2 * t)
	end := float64(3*t2) - float64(2*t3)
	return mix(value(i), value(i+1), end).
		add(speed(i).scale(float64((t3 - float64(2*t2) + t) * width))).
		add(speed(i + 1).scale(float64((t3 - t2) * width)))
}

// build makes the world as it stands in one frame.
func (s *sceneFile) build(frame int) *world {
	w := &world{
		bounces:  s.Bounces,
		exposure: s.Exposure,
		horizon:  vec(s.Sky.Horizon),
		zenith:   vec(s.Sky.Zenith),
		ground:   vec(s.Sky.Ground),
		haze:     s.Sky.Haze,
		camera:   s.Camera.build(float64(frame)),
	}
	if s.Sun != nil {
		w.sun = s.Sun.build()
	}
	names := make([]string, 0, len(s.Materials))
	for name := range s.Materials {
		names = append(names, name)
	}
	slices.Sort(names)
	index := make(map[string]int32, len(names))
	for i, name := range names {
		index[name] = int32(i)
		w.materials = append(w.materials, s.Materials[name].build())
	}
	for i := range s.Objects {
		w.add(s.Objects[i].build(index[s.Objects[i].Material], float64(frame)))
	}
	w.finish()
	return w
}

func (s *sunSpec) build() *sun {
	_, cos := sincosDegrees(s.Angle)
	sin, _ := sincosDegrees(s.Angle / 2)
	return &sun{
		direction: vec(s.Direction).unit(),
		cos:       cos,
		oneLess:   float64(2 * float64(sin*sin)),
		light:     vec(s.Color),
		glow:      vec(s.Glow),
	}
}

func (s *cameraSpec) build(frame float64) camera {
	at := func(i int) float64 { return s.Keys[i].Frame }
	n := len(s.Keys)
	from := spline(n, at, func(i int) vec { return vec(s.Keys[i].From) }, frame)
	target := spline(n, at, func(i int) vec { return vec(s.Keys[i].At) }, frame)
	focus := spline(n, at, func(i int) vec {
		k := s.Keys[i]
		if k.Focus == 0 {
			return vec{x: vec(k.At).sub(vec(k.From)).length()}
		}
		return vec{x: k.Focus}
	}, frame).x
	view := target.sub(from)
	// Between two keys a camera can pass over its target; it then looks along z.
	if (vec{view.x, 0, view.z}).length() < 1e-6 {
		view.z += 1e-3
	}
	forward := view.unit()
	right := forward.cross(vec{y: 1}).unit()
	sin, cos := sincosDegrees(s.FOV / 2)
	return camera{
		from:    from,
		forward: forward,
		right:   right,
		up:      right.cross(forward),
		tangent: sin / cos,
		lens:    s.Aperture,
		focus:   max(focus, 1e-3),
	}
}

func (m materialSpec) build() material {
	out := material{
		kind:      materialKinds[m.Type],
		color:     vec(m.Color),
		roughness: m.Roughness,
		index:     m.Index,
	}
	if out.index == 0 {
		out.index = 1.5
	}
	if m.Checker != nil {
		out.checker, out.second = m.Checker.Size, vec(m.Checker.Color)
	}
	return out
}

func (o *objectSpec) build(material int32, frame float64) []shape {
	move := spline(len(o.Motion), func(i int) float64 { return o.Motion[i].Frame },
		func(i int) vec { return vec(o.Motion[i].Move) }, frame)
	switch {
	case o.Sphere != nil:
		return []shape{{kind: sphereShape, material: material, at: vec(o.Sphere.Center).add(move), radius: o.Sphere.Radius}}
	case o.Plane != nil:
		return []shape{{kind: planeShape, material: material, at: vec(o.Plane.Point).add(move), u: vec(o.Plane.Normal).unit()}}
	case o.Box != nil:
		sin, cos := sincosDegrees(o.Box.Turn)
		return []shape{{kind: boxShape, material: material, at: vec(o.Box.Center).add(move), u: vec(o.Box.Size).scale(0.5), v: vec{x: sin, y: cos}}}
	}
	var triangles []shape
	for _, face := range o.Mesh.Faces {
		a, b, c := vec(o.Mesh.Vertices[face[0]]), vec(o.Mesh.Vertices[face[1]]), vec(o.Mesh.Vertices[face[2]])
		u, v := b.sub(a), c.sub(a)
		if n := u.cross(v).length(); n > 1e-12 && !math.IsInf(n, 0) { // a triangle without area hides nothing
			triangles = append(triangles, shape{kind: triangleShape, material: material, at: a.add(move), u: u, v: v})
		}
	}
	return triangles
}
