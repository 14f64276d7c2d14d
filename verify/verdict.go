package verify

import (
	"slices"

	"github.com/musternet/muster/api/musterpb"
)

// The rule of section "verdicts": a match accepts; a mismatch draws further
// owners until enough agree.
const (
	// Quorum is how many runs must agree once there was a mismatch.
	Quorum = 3
	// MaxRuns bounds the runs of one dispute, the target's own included.
	MaxRuns = 6
)

// Decision is what follows from the comparisons made so far.
type Decision struct {
	Verdict musterpb.Verdict
	// Right and Wrong are the runs on either side of a settled dispute.
	Right, Wrong []string
	// MoreRuns is how many further owners have to run the items before anything
	// can be said; only with AWAITING_DATA.
	MoreRuns int
}

// Decide looks at the target and its committed check runs, in order, and at
// which pairs of them agree. Agreement need not be transitive (a tolerance is
// not an equivalence), so a camp is the runs that agree with one of them, and
// the largest camp wins.
func Decide(target string, runs []string, comparisons []*musterpb.Comparison) Decision {
	all := append([]string{target}, runs...)
	if len(runs) == 0 {
		return Decision{Verdict: musterpb.Verdict_VERDICT_AWAITING_DATA, MoreRuns: 1}
	}
	agree := func(a, b string) bool {
		return a == b || slices.ContainsFunc(comparisons, func(c *musterpb.Comparison) bool {
			return c.Match && ((c.A == a && c.B == b) || (c.A == b && c.B == a))
		})
	}
	if len(runs) == 1 && agree(target, runs[0]) {
		return Decision{Verdict: musterpb.Verdict_VERDICT_SUCCESS, Right: all}
	}
	var best []string
	for _, centre := range all {
		var camp []string
		for _, run := range all {
			if agree(centre, run) {
				camp = append(camp, run)
			}
		}
		if len(camp) > len(best) {
			best = camp
		}
	}
	if len(best) >= Quorum {
		wrong := slices.DeleteFunc(slices.Clone(all), func(run string) bool { return slices.Contains(best, run) })
		verdict := musterpb.Verdict_VERDICT_FAILURE
		if slices.Contains(best, target) {
			verdict = musterpb.Verdict_VERDICT_SUCCESS
		}
		return Decision{Verdict: verdict, Right: best, Wrong: wrong}
	}
	if len(all) >= MaxRuns {
		return Decision{Verdict: musterpb.Verdict_VERDICT_INCONCLUSIVE}
	}
	return Decision{Verdict: musterpb.Verdict_VERDICT_AWAITING_DATA, MoreRuns: min(Quorum-len(best), MaxRuns-len(all))}
}

// MissingPairs lists the pairs of runs, the target included, that were not
// compared yet.
func MissingPairs(target string, runs []string, comparisons []*musterpb.Comparison) [][2]string {
	all := append([]string{target}, runs...)
	var missing [][2]string
	for i, a := range all {
		for _, b := range all[i+1:] {
			if !slices.ContainsFunc(comparisons, func(c *musterpb.Comparison) bool { return c.A == a && c.B == b }) {
				missing = append(missing, [2]string{a, b})
			}
		}
	}
	return missing
}
