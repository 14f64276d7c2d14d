package verify

import (
	"math/bits"
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
	// Right and Wrong are the runs on either side of a settled dispute; with
	// SUCCESS and FAILURE every run is in one of them.
	Right, Wrong []string
	// MoreRuns is how many further owners have to run the items before anything
	// can be said; only with AWAITING_DATA, where 0 means that comparisons are
	// missing.
	MoreRuns int
}

// Decide looks at the target and its committed check runs, in order, and at
// which pairs of them agree. Runs past MaxRuns are not looked at.
//
// A tolerance is not an equivalence: of three runs the middle one may agree
// with both others, which do not agree. So a camp is a set of runs that all
// agree with one another, the largest camp is believed once it has Quorum
// members, and a run outside it is right when it agrees with more than half of
// it. Where several camps are largest, only what all of them say is certain.
func Decide(target string, runs []string, comparisons []*musterpb.Comparison) Decision {
	runs = runs[:min(len(runs), MaxRuns-1)]
	all := append([]string{target}, runs...)
	if len(runs) == 0 {
		return Decision{Verdict: musterpb.Verdict_VERDICT_AWAITING_DATA, MoreRuns: 1}
	}
	if len(MissingPairs(target, runs, comparisons)) > 0 {
		return Decision{Verdict: musterpb.Verdict_VERDICT_AWAITING_DATA}
	}
	agrees := agreements(all, comparisons)
	if len(runs) == 1 && agrees[0] == 0b11 {
		return Decision{Verdict: musterpb.Verdict_VERDICT_SUCCESS, Right: all}
	}
	camps := largestCamps(agrees)
	size := bits.OnesCount(camps[0])
	if size >= Quorum {
		right, wrong := judge(agrees, camps)
		switch {
		case wrong&1 == 0:
			return Decision{Verdict: musterpb.Verdict_VERDICT_SUCCESS, Right: pick(all, right), Wrong: pick(all, wrong&^right)}
		case right&1 == 0:
			return Decision{Verdict: musterpb.Verdict_VERDICT_FAILURE, Right: pick(all, right), Wrong: pick(all, wrong&^right)}
		}
	}
	more := max(1, Quorum-size)
	if len(all)+more > MaxRuns {
		return Decision{Verdict: musterpb.Verdict_VERDICT_INCONCLUSIVE}
	}
	return Decision{Verdict: musterpb.Verdict_VERDICT_AWAITING_DATA, MoreRuns: more}
}

// Sets of runs are bit masks over their positions; there are MaxRuns at most.

// agreements gives, for each run, the set that it agrees with, itself included.
func agreements(all []string, comparisons []*musterpb.Comparison) []uint {
	agrees := make([]uint, len(all))
	for i := range all {
		agrees[i] = 1 << i
	}
	for _, c := range comparisons {
		a, b := slices.Index(all, c.A), slices.Index(all, c.B)
		if c.Match && a >= 0 && b >= 0 {
			agrees[a] |= 1 << b
			agrees[b] |= 1 << a
		}
	}
	return agrees
}

// largestCamps lists the largest sets of runs that all agree with one another.
func largestCamps(agrees []uint) (camps []uint) {
	for set := uint(1); set < 1<<len(agrees); set++ {
		isCamp := true
		for i, with := range agrees {
			isCamp = isCamp && (set>>i&1 == 0 || set&^with == 0)
		}
		if !isCamp || (camps != nil && bits.OnesCount(set) < bits.OnesCount(camps[0])) {
			continue
		}
		if camps != nil && bits.OnesCount(set) > bits.OnesCount(camps[0]) {
			camps = camps[:0]
		}
		camps = append(camps, set)
	}
	return camps
}

// judge gives the runs that some camp calls right, and those that some camp
// calls wrong.
func judge(agrees, camps []uint) (right, wrong uint) {
	for _, camp := range camps {
		for i, with := range agrees {
			if 2*bits.OnesCount(with&camp) > bits.OnesCount(camp) {
				right |= 1 << i
			} else {
				wrong |= 1 << i
			}
		}
	}
	return right, wrong
}

func pick(all []string, set uint) (picked []string) {
	for i, run := range all {
		if set>>i&1 == 1 {
			picked = append(picked, run)
		}
	}
	return picked
}

// MissingPairs lists the pairs of runs, the target included, that were not
// compared yet.
func MissingPairs(target string, runs []string, comparisons []*musterpb.Comparison) [][2]string {
	all := append([]string{target}, runs...)
	var missing [][2]string
	for i, a := range all {
		for _, b := range all[i+1:] {
			if !slices.ContainsFunc(comparisons, func(c *musterpb.Comparison) bool {
				return (c.A == a && c.B == b) || (c.A == b && c.B == a)
			}) {
				missing = append(missing, [2]string{a, b})
			}
		}
	}
	return missing
}
