package items

import (
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		list    string
		want    []int
		problem string
	}{
		{list: "1", want: []int{1}},
		{list: "1,3,7-9", want: []int{1, 3, 7, 8, 9}},
		{list: "9, 2", want: []int{9, 2}},
		{list: "4-4", want: []int{4}},
		{list: "", problem: `"": want a number`},
		{list: "1,,2", problem: `"": want a number`},
		{list: "x", problem: `"x": want a number`},
		{list: "+3", problem: `"+3": want a number`},
		{list: "1-2-3", problem: `"1-2-3": want a number`},
		{list: "-3", problem: `"-3": want a number`},
		{list: "0", problem: "0 is out of range: want 1 to 10"},
		{list: "8-11", problem: "11 is out of range: want 1 to 10"},
		{list: "5-2", problem: `"5-2": the range ends before it starts`},
		{list: "1-3,2", problem: "2 is named twice"},
		{list: "99999999999999999999", problem: "want a number"},
	} {
		got, err := Parse(c.list, 1, 10)
		if c.problem == "" {
			if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("Parse(%q) = %v, %v; want %v", c.list, got, err, c.want)
			}
		} else if err == nil || !strings.Contains(err.Error(), c.problem) {
			t.Errorf("Parse(%q): error %v; want one with %q", c.list, err, c.problem)
		}
	}
	if _, err := Parse("0-2000000", 0, 1<<30); err == nil {
		t.Error("a list of two million numbers was accepted")
	}
}

func FuzzParse(f *testing.F) {
	f.Add("1,3,7-9")
	f.Add("-1-")
	f.Fuzz(func(t *testing.T, list string) {
		numbers, err := Parse(list, 1, 1000)
		if err != nil {
			return
		}
		if len(numbers) == 0 || slices.Min(numbers) < 1 || slices.Max(numbers) > 1000 {
			t.Errorf("Parse(%q) = %v", list, numbers)
		}
	})
}
