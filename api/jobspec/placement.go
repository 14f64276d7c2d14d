package jobspec

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"

	"github.com/musternet/muster/api/musterpb"
)

// The attributes of a worker that a job can prefer or avoid.
const (
	AttributeOwner    = "owner"    // the owner's account
	AttributeWorker   = "worker"   // its ID or its name
	AttributeGPU      = "gpu"      // a part of a GPU's name, in any case
	AttributePlatform = "platform" // as in linux/amd64
)

var attributes = []string{AttributeGPU, AttributeOwner, AttributePlatform, AttributeWorker}

// defaultWeight is that of an entry that gives none.
const defaultWeight = MaxWeight

// placement reads where a job would rather run. Avoiding is preferring with a
// negative weight.
func (d *decoder) placement(n node, spec *musterpb.JobSpec) {
	p := &musterpb.Placement{}
	spec.Placement = p
	d.fields(n, map[string]func(node){
		"spread": func(n node) { p.Spread = musterpb.Spread(d.choice(n, "none", "worker", "owner")) },
		"prefer": func(n node) { p.Affinities = append(p.Affinities, d.affinities(n, 1)...) },
		"avoid":  func(n node) { p.Affinities = append(p.Affinities, d.affinities(n, -1)...) },
	})
}

func (d *decoder) affinities(n node, sign int32) (list []*musterpb.Affinity) {
	for _, e := range d.sequence(n, "a list such as [{gpu: RTX 4090}]") {
		if a := d.affinity(e, sign); a != nil {
			d.places[listOf(a)+" "+quote(affinityText(a))] = d.places[e.path]
			list = append(list, a)
		}
	}
	return list
}

// affinity reads one entry, nil where it has a problem.
func (d *decoder) affinity(n node, sign int32) *musterpb.Affinity {
	const want = "want one of gpu, owner, platform and worker, and a weight if you like: {gpu: RTX 4090, weight: 50}"
	if _, ok := n.Node.(ast.MapNode); !ok {
		d.fail(n, want)
		return nil
	}
	a, given, ok := &musterpb.Affinity{Weight: defaultWeight}, 0, true
	readers := map[string]func(node){
		"weight": func(n node) {
			text, isScalar := d.scalar(n)
			weight, err := strconv.ParseUint(text, 10, 32)
			if ok = ok && isScalar; isScalar && (err != nil || weight < 1 || weight > MaxWeight) {
				d.fail(n, "want a whole number, 1 to %d; prefer and avoid say which way", MaxWeight)
				ok = false
			}
			a.Weight = int32(weight)
		},
	}
	for _, name := range attributes {
		readers[name] = func(n node) {
			value, isScalar := d.scalar(n)
			a.Attribute, a.Value, ok = name, value, ok && isScalar
			given++
		}
	}
	before := len(d.messages)
	d.fields(n, readers)
	if given != 1 && len(d.messages) == before {
		d.fail(n, want)
	}
	if a.Weight *= sign; given != 1 || !ok {
		return nil
	}
	return a
}

// affinityText is an affinity as a job file has it.
func affinityText(a *musterpb.Affinity) string { return a.GetAttribute() + ": " + a.GetValue() }

// listOf is the field that an affinity stands in.
func listOf(a *musterpb.Affinity) string {
	if a.GetWeight() < 0 {
		return "placement.avoid"
	}
	return "placement.prefer"
}

// placement checks preferences. None of them can keep a job from running, but
// one that could never fit anything is a mistake that is better said.
func (c *checker) placement(p *musterpb.Placement, r *musterpb.Resources) {
	if p == nil {
		return
	}
	if _, ok := musterpb.Spread_name[int32(p.Spread)]; !ok {
		c.failf("placement.spread", quote(p.Spread.String()), "want none, worker or owner")
	}
	if n := len(p.Affinities); n > MaxAffinities {
		c.failf("placement", "", "%d entries in prefer and avoid; at most %d together", n, MaxAffinities)
		return
	}
	seen := map[string]bool{}
	for _, a := range p.Affinities {
		text := affinityText(a)
		if msg := checkAffinity(a, r); msg != "" {
			c.failf(listOf(a), quote(text), "%s", msg)
		} else if seen[text] {
			c.failf(listOf(a), quote(text), "is there twice; give it one weight")
		}
		seen[text] = true
	}
}

func checkAffinity(a *musterpb.Affinity, r *musterpb.Resources) string {
	value := a.GetValue()
	switch {
	case !slices.Contains(attributes, a.GetAttribute()):
		return "want one of " + strings.Join(attributes, ", ")
	case value == "" || len(value) > MaxNameBytes || !printable(value) || strings.TrimSpace(value) != value:
		return fmt.Sprintf("want 1 to %d printable bytes without spaces around them", MaxNameBytes)
	case a.Weight == 0 || a.Weight < -MaxWeight || a.Weight > MaxWeight:
		return fmt.Sprintf("weight %d: want -%d to %d, and not 0", a.Weight, MaxWeight, MaxWeight)
	case a.Attribute == AttributeGPU && r.GetGpus() == 0:
		return "the job asks for no GPU; add gpus: 1"
	case a.Attribute == AttributePlatform && !strings.Contains(value, "/"):
		return "want a platform such as linux/amd64"
	}
	return ""
}
