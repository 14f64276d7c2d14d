package jobspec

import (
	"cmp"
	"fmt"
	"math/bits"
	"slices"
	"strconv"
	"strings"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// MaxItems bounds the items of one job.
const MaxItems = 10_000_000

// maxRanges bounds the ranges that a job's items are written as.
const maxRanges = 1000

// maxValue is the largest item value: the largest whole number that every JSON
// reader keeps exactly.
const maxValue = 1<<53 - 1

// Count is the number of items, once they are checked: exactly one of ranges
// and count says what they are, no two ranges share a value, and there are
// between one and MaxItems of them. The lines of an input count as count.
func Count(items *musterpb.Items) (uint64, error) {
	n, p := countItems(items)
	if p != nil {
		return 0, api.Errorf(api.Invalid, "%s", p)
	}
	return n, nil
}

func countItems(items *musterpb.Items) (uint64, *problem) {
	ranges := items.GetRanges()
	switch {
	case len(ranges) == 0:
		return checkCount(items)
	case items.GetCount() != 0 || items.GetLinesPath() != "":
		return 0, failure("items", "", "ranges exclude count and lines; keep one of them")
	case len(ranges) > maxRanges:
		return 0, failure("items.range", "", "%d ranges; at most %d, so use steps or fewer pieces", len(ranges), maxRanges)
	}
	var total uint64
	for _, r := range ranges {
		if p := checkRange(r); p != nil {
			return 0, p
		}
		n := rangeLen(r)
		if n > MaxItems-total {
			return 0, failure("items.range", quote(formatRange(r)), "more than %d items in all; split the job", MaxItems)
		}
		total += n
	}
	return total, checkOverlap(ranges)
}

func checkCount(items *musterpb.Items) (uint64, *problem) {
	n, field := items.GetCount(), "items.count"
	if items.GetLinesPath() != "" {
		field = "items.lines"
	}
	switch {
	case n == 0:
		return 0, failure(field, `"0"`, "a job has at least one item")
	case n > MaxItems:
		return 0, failure(field, quote(strconv.FormatUint(n, 10)), "more than %d items; split the job", MaxItems)
	}
	return n, nil
}

func checkRange(r *musterpb.ItemRange) *problem {
	switch {
	case r.GetStep() == 0:
		return failure("items.range", quote(formatRange(r)), "the step is 0; write 1 or more")
	case r.GetFirst() > r.GetLast():
		turned := &musterpb.ItemRange{First: r.Last, Last: r.First, Step: r.Step}
		return failure("items.range", quote(formatRange(r)), "the range is reversed; write %s", formatRange(turned))
	case max(r.GetLast(), r.GetStep()) > maxValue:
		return failure("items.range", quote(formatRange(r)), "item values and steps are at most %d", uint64(maxValue))
	case rangeLen(r) > MaxItems:
		return failure("items.range", quote(formatRange(r)), "more than %d items in all; split the job", MaxItems)
	}
	return nil
}

// checkOverlap finds a value that two ranges share. Ordered by first value,
// only ranges that have not ended yet can share one with the next.
func checkOverlap(ranges []*musterpb.ItemRange) *problem {
	sorted := slices.Clone(ranges)
	slices.SortStableFunc(sorted, func(a, b *musterpb.ItemRange) int { return cmp.Compare(a.First, b.First) })
	var open []*musterpb.ItemRange
	for _, r := range sorted {
		open = slices.DeleteFunc(open, func(o *musterpb.ItemRange) bool { return o.Last < r.First })
		for _, o := range open {
			if v, ok := commonValue(o, r); ok {
				return failure("items.range", quote(formatRange(r)), "%d is also in %q; name every item once", v, formatRange(o))
			}
		}
		open = append(open, r)
	}
	return nil
}

// commonValue is the smallest value of both a and b, where a starts no later
// than b: the solution of b.First + b.Step·y ≡ a.First (mod a.Step).
func commonValue(a, b *musterpb.ItemRange) (uint64, bool) {
	// All numbers are below 2^53, so the signed arithmetic cannot overflow.
	g, inverse := gcdInverse(int64(b.Step), int64(a.Step))
	d := int64(b.First - a.First)
	if d%g != 0 {
		return 0, false
	}
	m := uint64(int64(a.Step) / g)
	hi, lo := bits.Mul64((m-uint64(d/g)%m)%m, uint64(inverse)%m)
	y := bits.Rem64(hi, lo, m)
	end := min(a.Last, b.Last)
	if b.First > end || y > (end-b.First)/b.Step {
		return 0, false
	}
	return b.First + b.Step*y, true
}

// gcdInverse is g = gcd(x, m) and the inverse of x/g modulo m/g, in [0, m/g).
func gcdInverse(x, m int64) (g, inverse int64) {
	r0, r1, s0, s1 := x, m, int64(1), int64(0)
	for r1 != 0 {
		q := r0 / r1
		r0, r1 = r1, r0-q*r1
		s0, s1 = s1, s0-q*s1
	}
	m /= r0
	return r0, (s0%m + m) % m
}

func rangeLen(r *musterpb.ItemRange) uint64 { return (r.Last-r.First)/r.Step + 1 }

// size is Count without its checks.
func size(items *musterpb.Items) uint64 {
	if len(items.GetRanges()) == 0 {
		return items.GetCount()
	}
	var n uint64
	for _, r := range items.GetRanges() {
		n += rangeLen(r)
	}
	return n
}

// Value is the value of the item with this index, which is below Count: ranges
// follow each other in the order they are written, and for counted items and
// lines the value is the index.
func Value(items *musterpb.Items, index uint64) uint64 {
	ranges := items.GetRanges()
	if len(ranges) == 0 {
		return index
	}
	rest := index
	for _, r := range ranges {
		n := rangeLen(r)
		if rest < n {
			return r.First + rest*r.Step
		}
		rest -= n
	}
	panic(fmt.Sprintf("jobspec: item index %d is out of range", index))
}

// formatRange is the range as a job file spells it.
func formatRange(r *musterpb.ItemRange) string {
	s := strconv.FormatUint(r.GetFirst(), 10)
	if r.GetFirst() != r.GetLast() {
		s += "-" + strconv.FormatUint(r.GetLast(), 10)
	}
	if r.GetStep() != 1 {
		s += "x" + strconv.FormatUint(r.GetStep(), 10)
	}
	return s
}

// parseRanges reads "1-240x2,300,400-410". The values themselves are checked
// by Count.
func parseRanges(s string) ([]*musterpb.ItemRange, error) {
	var ranges []*musterpb.ItemRange
	for piece := range strings.SplitSeq(s, ",") {
		piece = strings.TrimSpace(piece)
		span, step, stepped := strings.Cut(piece, "x")
		first, last, spanned := strings.Cut(span, "-")
		if !spanned {
			last = first
		}
		if !stepped {
			step = "1"
		}
		r := &musterpb.ItemRange{}
		var errs [3]error
		r.First, errs[0] = parseNumber(first)
		r.Last, errs[1] = parseNumber(last)
		r.Step, errs[2] = parseNumber(step)
		for _, err := range errs {
			if err != nil {
				return nil, fmt.Errorf("%q %w; write it like 1-240, 1-240x2 or 300", piece, err)
			}
		}
		if ranges = append(ranges, r); len(ranges) > maxRanges {
			return nil, fmt.Errorf("more than %d ranges; use steps or fewer pieces", maxRanges)
		}
	}
	return ranges, nil
}

func parseNumber(s string) (uint64, error) {
	s = strings.TrimSpace(s)
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, fmt.Errorf("is not a range of whole numbers")
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("is too large a number")
	}
	return n, nil
}
