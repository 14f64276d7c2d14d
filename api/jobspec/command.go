package jobspec

import (
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// maxArgBytes is what Linux takes as one argument (MAX_ARG_STRLEN less the
// closing zero byte).
const maxArgBytes = 128<<10 - 1

// Invocation is one run of a job's command and the items that it produces.
type Invocation struct {
	Command []string
	Indexes []uint64 // ascending
}

// placeholder matches the five placeholders and nothing else, so that JSON in
// an argument needs no escapes.
var placeholder = regexp.MustCompile(`\{(items|first|last|item|index)\}`)

// granularity is how often a command runs for a set of items.
type granularity int

const (
	once    granularity = iota // no placeholder, or {items}
	perRun                     // {first}, {last}
	perItem                    // {item}, {index}
)

// granularityOf says how often command runs, and refuses a mixture: no number
// of runs could serve both.
func granularityOf(command []string) (granularity, *problem) {
	found, by := once, ""
	for _, arg := range command {
		for _, name := range placeholder.FindAllString(arg, -1) {
			g := once
			switch name {
			case "{first}", "{last}":
				g = perRun
			case "{item}", "{index}":
				g = perItem
			}
			if by != "" && g != found {
				return once, failure("command", "",
					"%s and %s exclude each other; use {items} (one run), {first} and {last} (a run per unbroken span) or {item} and {index} (a run per item)", by, name)
			}
			found, by = g, name
		}
	}
	return found, nil
}

// Commands are the runs of command that produce the items with these ascending
// indexes, with the placeholders filled in. The items have passed Count.
//
//	{items}          the values, separated by commas; the command runs once
//	{first} {last}   of an unbroken span; the command runs once per span
//	{item} {index}   value and index; the command runs once per item
//
// A span is a sequence of items whose indexes and values both go up by one, so
// that "from {first} to {last}" names exactly its items even in a job with
// steps or several ranges. A command without placeholders runs once.
func Commands(command []string, items *musterpb.Items, indexes []uint64) ([]Invocation, error) {
	count := size(items)
	for i, index := range indexes {
		if index >= count || i > 0 && indexes[i-1] >= index {
			return nil, api.Errorf(api.Invalid, "items: index %d is out of order, or not below %d", index, count)
		}
	}
	if len(indexes) == 0 {
		return nil, api.Errorf(api.Invalid, "items: a task without items")
	}
	g, p := granularityOf(command)
	if p != nil {
		return nil, api.Errorf(api.Invalid, "%s", p)
	}
	values := make([]uint64, len(indexes))
	for i, index := range indexes {
		values[i] = Value(items, index)
	}
	var runs []Invocation
	for start := 0; start < len(indexes); {
		end := start + 1
		for end < len(indexes) && joins(g, indexes, values, end) {
			end++
		}
		run, err := fill(command, indexes[start:end], values[start:end])
		if err != nil {
			return nil, err
		}
		runs = append(runs, run)
		start = end
	}
	return runs, nil
}

// joins reports whether the item at i belongs to the run of the one before.
func joins(g granularity, indexes, values []uint64, i int) bool {
	switch g {
	case perItem:
		return false
	case perRun:
		return indexes[i] == indexes[i-1]+1 && values[i] == values[i-1]+1
	}
	return true
}

func fill(command []string, indexes, values []uint64) (Invocation, error) {
	run := Invocation{Indexes: slices.Clone(indexes)}
	for i, arg := range command {
		filled := placeholder.ReplaceAllStringFunc(arg, func(name string) string {
			switch name {
			case "{items}":
				return join(values)
			case "{last}":
				return strconv.FormatUint(values[len(values)-1], 10)
			case "{index}":
				return strconv.FormatUint(indexes[0], 10)
			}
			return strconv.FormatUint(values[0], 10) // {first}, {item}
		})
		if len(filled) > maxArgBytes {
			return Invocation{}, api.Errorf(api.Invalid, "command[%d] %q: %d bytes once {items} is filled in; at most %d, so lower chunk", i, shorten(arg), len(filled), maxArgBytes)
		}
		run.Command = append(run.Command, filled)
	}
	return run, nil
}

func join(values []uint64) string {
	var b strings.Builder
	for i, v := range values {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(strconv.FormatUint(v, 10))
	}
	return b.String()
}

// shorten keeps a value readable in a message.
func shorten(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
