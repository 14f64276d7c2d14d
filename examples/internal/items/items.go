// Package items reads the lists of item numbers that muster puts in the place
// of {items} in a job's command.
package items

import (
	"fmt"
	"strconv"
	"strings"
)

// Max bounds how many numbers one list may name.
const Max = 1 << 20

// Parse reads a list such as "1,3,7-9" of numbers between first and last, both
// included, and returns them in the order given. A number named twice is an
// error: an item is produced once.
func Parse(list string, first, last int) ([]int, error) {
	var numbers []int
	seen := make(map[int]bool)
	for part := range strings.SplitSeq(list, ",") {
		part = strings.TrimSpace(part)
		from, to, isRange := strings.Cut(part, "-")
		lo, err := number(part, from, first, last)
		if err != nil {
			return nil, err
		}
		hi := lo
		if isRange {
			if hi, err = number(part, to, first, last); err != nil {
				return nil, err
			}
		}
		if hi < lo {
			return nil, fmt.Errorf("%q: the range ends before it starts", part)
		}
		if len(numbers)+hi-lo+1 > Max {
			return nil, fmt.Errorf("the list names more than %d numbers", Max)
		}
		for n := lo; n <= hi; n++ {
			if seen[n] {
				return nil, fmt.Errorf("%d is named twice", n)
			}
			seen[n] = true
			numbers = append(numbers, n)
		}
	}
	return numbers, nil
}

func number(part, digits string, first, last int) (int, error) {
	n, err := strconv.Atoi(digits)
	if err != nil || strings.HasPrefix(digits, "+") {
		return 0, fmt.Errorf("%q: want a number or a range such as 7-9, separated by commas", part)
	}
	if n < first || n > last {
		return 0, fmt.Errorf("%d is out of range: want %d to %d", n, first, last)
	}
	return n, nil
}
