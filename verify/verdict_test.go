package verify

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/musternet/muster/api/musterpb"
)

const (
	success      = musterpb.Verdict_VERDICT_SUCCESS
	failure      = musterpb.Verdict_VERDICT_FAILURE
	inconclusive = musterpb.Verdict_VERDICT_INCONCLUSIVE
	awaiting     = musterpb.Verdict_VERDICT_AWAITING_DATA
)

// compareAll compares every pair of runs; two agree where same says so.
func compareAll(runs []string, same func(a, b string) bool) (list []*musterpb.Comparison) {
	for i, a := range runs {
		for _, b := range runs[i+1:] {
			list = append(list, &musterpb.Comparison{A: a, B: b, Match: same(a, b)})
		}
	}
	return list
}

// A row names each run with the answer it gave, the target first: runs with
// the same letter agree. Further pairs that agree are named apart.
func TestDecide(t *testing.T) {
	for _, c := range []struct {
		answers, pairs string // "aab", "02 12": runs by position
		verdict        musterpb.Verdict
		more           int
		wrong          string // positions
	}{
		{answers: "a", verdict: awaiting, more: 1},
		{answers: "aa", verdict: success},
		{answers: "ab", verdict: awaiting, more: 2},
		{answers: "aaa", verdict: success},
		{answers: "aab", verdict: awaiting, more: 1},
		{answers: "abb", verdict: awaiting, more: 1},
		{answers: "abc", verdict: awaiting, more: 2},
		{answers: "abaa", verdict: success, wrong: "1"},
		{answers: "abbb", verdict: failure, wrong: "0"},
		{answers: "abab", verdict: awaiting, more: 1},
		{answers: "abcd", verdict: awaiting, more: 2},
		{answers: "ababa", verdict: success, wrong: "13"},
		{answers: "ababb", verdict: failure, wrong: "02"},
		{answers: "ababc", verdict: awaiting, more: 1},
		{answers: "abcde", verdict: inconclusive}, // one more cannot make three
		{answers: "ababcc", verdict: inconclusive},
		{answers: "ababcd", verdict: inconclusive},
		{answers: "ababca", verdict: success, wrong: "134"},
		{answers: "ababab", verdict: inconclusive}, // three against three

		// Tolerances: 1 lies between 0 and 2, and agrees with both.
		{answers: "abc", pairs: "01 12", verdict: awaiting, more: 1},
		// The middle one alone does not carry the target past the honest.
		{answers: "abcc", pairs: "01 12 13", verdict: failure, wrong: "0"},
		// Agreement with most of the camp is enough, to either side.
		{answers: "abcd", pairs: "01 02 12 13 23", verdict: success},
		// Two camps of three that share a run and say different things.
		{answers: "aabcc", pairs: "02 12 23 24", verdict: awaiting, more: 1},
		{answers: "aabccd", pairs: "02 12 23 24", verdict: inconclusive},
	} {
		t.Run(c.answers+" "+c.pairs, func(t *testing.T) {
			var all []string
			for i := range c.answers {
				all = append(all, fmt.Sprintf("att-%d", i))
			}
			position := func(run string) int { return slices.Index(all, run) }
			d := Decide(all[0], all[1:], compareAll(all, func(a, b string) bool {
				i, j := position(a), position(b)
				return c.answers[i] == c.answers[j] || strings.Contains(c.pairs, fmt.Sprintf("%d%d", i, j))
			}))
			var wrong string
			for _, run := range d.Wrong {
				wrong += fmt.Sprint(position(run))
			}
			if d.Verdict != c.verdict || d.MoreRuns != c.more || wrong != c.wrong {
				t.Errorf("%v, %d more, wrong %q; want %v, %d more, wrong %q", d.Verdict, d.MoreRuns, wrong, c.verdict, c.more, c.wrong)
			}
		})
	}
}

// settle runs the dispute as a scheduler does: as many further runs as are
// asked for, in the order of queue, until there is a verdict.
func settle(t interface{ Fatalf(string, ...any) }, queue []string, same func(a, b string) bool) (d Decision, used int) {
	used = 1
	for {
		d = Decide(queue[0], queue[1:used], compareAll(queue[:used], same))
		if d.Verdict != awaiting {
			return d, used
		}
		if d.MoreRuns < 1 {
			t.Fatalf("%d runs: nothing more is wanted, and there is no verdict", used)
		}
		if used += d.MoreRuns; used > MaxRuns {
			t.Fatalf("%d runs asked for, at most %d are allowed", used, MaxRuns)
		}
	}
}

func permutations(list []string) (all [][]string) {
	if len(list) <= 1 {
		return [][]string{slices.Clone(list)}
	}
	for i := range list {
		rest := slices.Concat(list[:i], list[i+1:])
		for _, p := range permutations(rest) {
			all = append(all, append([]string{list[i]}, p...))
		}
	}
	return all
}

func TestOneCheaterNeverWins(t *testing.T) {
	same := func(a, b string) bool { return (a == "cheat") == (b == "cheat") }
	for _, queue := range permutations([]string{"cheat", "h1", "h2", "h3", "h4", "h5"}) {
		d, used := settle(t, queue, same)
		cheated := slices.Contains(queue[:used], "cheat")
		switch {
		case queue[0] == "cheat" && d.Verdict != failure, queue[0] != "cheat" && d.Verdict != success:
			t.Fatalf("%v: %v", queue, d.Verdict)
		case cheated && !slices.Equal(d.Wrong, []string{"cheat"}), !cheated && len(d.Wrong) > 0:
			t.Fatalf("%v: wrong %v", queue, d.Wrong)
		case !cheated && used != 2:
			t.Fatalf("%v: %d runs where all agree", queue, used)
		}
	}
}

// One cheater that lies within tolerance of some of the honest runs, and an
// honest target or checker: no honest run is ever called wrong.
func TestTolerantCheaterHarmsNobody(t *testing.T) {
	honest := []string{"h1", "h2", "h3", "h4", "h5"}
	for near := range uint(1 << len(honest)) {
		same := func(a, b string) bool {
			if b == "cheat" {
				a, b = b, a
			}
			return a != "cheat" || a == b || near>>slices.Index(honest, b)&1 == 1
		}
		for _, queue := range permutations(append([]string{"cheat"}, honest...)) {
			d, _ := settle(t, queue, same)
			for _, run := range d.Wrong {
				if run != "cheat" {
					t.Fatalf("cheater within tolerance of %05b, %v: %s is called wrong", near, queue, run)
				}
			}
			if queue[0] != "cheat" && d.Verdict != success {
				t.Fatalf("cheater within tolerance of %05b, %v: %v for an honest target", near, queue, d.Verdict)
			}
			if queue[0] == "cheat" && near == 0 && d.Verdict != failure {
				t.Fatalf("%v: %v for a cheater", queue, d.Verdict)
			}
		}
	}
}

func TestTwoCampsCanBeInconclusive(t *testing.T) {
	d, used := settle(t, []string{"a1", "b1", "a2", "b2", "c1", "c2"}, func(a, b string) bool { return a[0] == b[0] })
	if d.Verdict != inconclusive || used != MaxRuns {
		t.Errorf("%v after %d runs, want inconclusive after %d", d.Verdict, used, MaxRuns)
	}
	if len(d.Right)+len(d.Wrong) > 0 {
		t.Errorf("an inconclusive dispute names %v right and %v wrong", d.Right, d.Wrong)
	}
}

// Any relation at all between up to eight runs.
func TestDecideProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		names := []string{"t", "r1", "r2", "r3", "r4", "r5", "r6", "r7"}[:rapid.IntRange(1, 8).Draw(t, "runs")]
		relation := map[string]bool{}
		for i, a := range names {
			for _, b := range names[i+1:] {
				relation[a+b] = rapid.Bool().Draw(t, a+b)
			}
		}
		same := func(a, b string) bool { return relation[a+b] || relation[b+a] }
		comparisons := compareAll(names, same)
		d := Decide(names[0], names[1:], comparisons)
		looked := names[:min(len(names), MaxRuns)]
		switch d.Verdict {
		case success, failure:
			if len(d.Right)+len(d.Wrong) != len(looked) {
				t.Fatalf("right %v and wrong %v are not all of %v", d.Right, d.Wrong, looked)
			}
			for _, run := range d.Right {
				if slices.Contains(d.Wrong, run) {
					t.Fatalf("%s is right and wrong", run)
				}
			}
			if (d.Verdict == success) != slices.Contains(d.Right, names[0]) {
				t.Fatalf("%v, and right are %v", d.Verdict, d.Right)
			}
			if len(looked) > 2 && !agreeingThree(d.Right, same) {
				t.Fatalf("%v without three that agree: right %v", d.Verdict, d.Right)
			}
		case inconclusive:
			if len(looked) < MaxRuns-1 {
				t.Fatalf("given up after %d runs", len(looked))
			}
		case awaiting:
			if d.MoreRuns < 1 || len(looked)+d.MoreRuns > MaxRuns {
				t.Fatalf("%d more after %d runs", d.MoreRuns, len(looked))
			}
		}
		// Neither the order of the comparisons nor the order inside one matters.
		for _, c := range comparisons {
			if rapid.Bool().Draw(t, "swap") {
				c.A, c.B = c.B, c.A
			}
		}
		again := Decide(names[0], names[1:], rapid.Permutation(comparisons).Draw(t, "order"))
		if again.Verdict != d.Verdict || !slices.Equal(again.Right, d.Right) || !slices.Equal(again.Wrong, d.Wrong) || again.MoreRuns != d.MoreRuns {
			t.Fatalf("%+v, and with the comparisons in another order %+v", d, again)
		}
	})
}

func agreeingThree(runs []string, same func(a, b string) bool) bool {
	for set := range uint(1 << len(runs)) {
		if bits.OnesCount(set) != Quorum {
			continue
		}
		all := true
		for i := range runs {
			for j := range i {
				if set>>i&1 == 1 && set>>j&1 == 1 && !same(runs[i], runs[j]) {
					all = false
				}
			}
		}
		if all {
			return true
		}
	}
	return false
}

// With plain equality the believed camp is the one that holds the majority of
// what was run, whatever the order of the runs.
func TestDisputesSettleProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var queue []string
		for i := range MaxRuns {
			queue = append(queue, fmt.Sprintf("%c%d", rapid.SampledFrom([]byte("aab")).Draw(t, "answer"), i))
		}
		d, used := settle(t, queue, func(a, b string) bool { return a[0] == b[0] })
		count := 0
		for _, run := range queue[:used] {
			if run[0] == queue[0][0] {
				count++
			}
		}
		switch d.Verdict {
		case success:
			if used > 2 && count < Quorum {
				t.Fatalf("%v: success with %d of %d", queue, count, used)
			}
		case failure:
			if count >= Quorum || used-count < Quorum {
				t.Fatalf("%v: failure with %d of %d", queue, count, used)
			}
		default:
			t.Fatalf("%v: two answers among %d runs give a quorum, not %v", queue, MaxRuns, d.Verdict)
		}
	})
}

func TestMissingPairs(t *testing.T) {
	comparisons := []*musterpb.Comparison{{A: "t", B: "r1"}, {A: "r2", B: "r1", Match: true}, {A: "t", B: "r9"}}
	got := MissingPairs("t", []string{"r1", "r2", "r3"}, comparisons)
	want := [][2]string{{"t", "r2"}, {"t", "r3"}, {"r1", "r3"}, {"r2", "r3"}}
	if !slices.Equal(got, want) {
		t.Errorf("missing %v, want %v", got, want)
	}
	if got := MissingPairs("t", nil, nil); got != nil {
		t.Errorf("a target alone misses %v", got)
	}
	if d := Decide("t", []string{"r1", "r2"}, comparisons); d.Verdict != awaiting || d.MoreRuns != 0 {
		t.Errorf("with a comparison missing: %v, %d more runs", d.Verdict, d.MoreRuns)
	}
}
