package outputs

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/musternet/muster/api"
)

// lineReader reads lines of at most MaxLineBytes. A last line without a line
// break counts.
type lineReader struct {
	name   string // for messages
	r      *bufio.Reader
	number uint64 // of the last line, from 1
	offset int64  // behind it
	buf    []byte
}

func newLineReader(name string, r io.Reader) *lineReader {
	return &lineReader{name: name, r: bufio.NewReaderSize(r, 256<<10)}
}

// next returns the next line without its line break, valid until the next call,
// and where it starts; io.EOF after the last one.
func (l *lineReader) next() (line []byte, start int64, err error) {
	start = l.offset
	l.buf = l.buf[:0]
	l.number++
	for {
		part, err := l.r.ReadSlice('\n')
		l.offset += int64(len(part))
		if err == nil && len(l.buf) == 0 {
			return l.trim(part, start)
		}
		l.buf = append(l.buf, part...)
		if len(l.buf) > MaxLineBytes+2 {
			return l.trim(l.buf, start)
		}
		switch {
		case err == nil, err == io.EOF && len(l.buf) > 0:
			return l.trim(l.buf, start)
		case err != bufio.ErrBufferFull:
			return nil, start, err // io.EOF too
		}
	}
}

func (l *lineReader) trim(line []byte, start int64) ([]byte, int64, error) {
	line = bytes.TrimSuffix(line, []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) > MaxLineBytes {
		return nil, start, api.Errorf(api.Invalid, "%s: line %d has more than %d bytes", l.name, l.number, MaxLineBytes)
	}
	return line, start, nil
}

// CountLines counts the lines of an input whose lines are a job's items. An
// empty line is an error: it would be an item with nothing to do.
func CountLines(path string) (uint64, error) {
	n := uint64(0)
	err := scan(path, func(uint64, []byte) (bool, error) {
		n++
		return true, nil
	})
	return n, err
}

// CustomIDs returns the custom_id of the lines with these ascending indexes in
// an input; empty for a line that is no JSON object or has none.
func CustomIDs(path string, indexes []uint64) ([]string, error) {
	ids := make([]string, 0, len(indexes))
	err := scan(path, func(index uint64, line []byte) (bool, error) {
		if len(ids) < len(indexes) && index == indexes[len(ids)] {
			id, _ := customID(line)
			ids = append(ids, id)
		}
		return len(ids) < len(indexes), nil
	})
	if err != nil {
		return nil, err
	}
	if len(ids) < len(indexes) {
		return nil, api.Errorf(api.Invalid, "%s: has no line %d", path, indexes[len(ids)]+1)
	}
	return ids, nil
}

func customID(line []byte) (id string, ok bool) {
	var object map[string]json.RawMessage
	if json.Unmarshal(line, &object) != nil {
		return "", false
	}
	err := json.Unmarshal(object["custom_id"], &id)
	return id, err == nil && id != ""
}

// scan calls f with the lines of a file and their indexes until it says false.
func scan(path string, f func(index uint64, line []byte) (more bool, err error)) error {
	file, err := os.Open(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return api.Errorf(api.NotFound, "%s: there is no such file", path)
		}
		return api.Errorf(api.Invalid, "%w", err)
	}
	defer file.Close()
	lines := newLineReader(path, file)
	for index := uint64(0); ; index++ {
		line, _, err := lines.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return machineError(err)
		}
		if len(bytes.TrimSpace(line)) == 0 {
			return api.Errorf(api.Invalid, "%s: line %d is empty; every line is an item, so remove it", path, lines.number)
		}
		if more, err := f(index, line); err != nil || !more {
			return err
		}
	}
}

// position is where a line of ResultsFile lies.
type position struct {
	offset int64
	length int64
	number uint64 // 0: not found yet
}

// lines packs each item's line of ResultsFile.
func (w *writer) lines(items []Item) error {
	if len(items) == 0 {
		return nil
	}
	info, err := w.root.Lstat(ResultsFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return refused(items[0], ResultsFile, "is missing; the program writes one line per item into it%s", w.present())
	case err != nil:
		return machineError(err)
	case !info.Mode().IsRegular():
		return refused(items[0], ResultsFile, "is a %s; write a file", typeName(info.Mode()))
	case info.Size() > w.limits.Bytes:
		return refused(items[0], ResultsFile, "takes the outputs above the limit of %d bytes; ask for more with resources.disk", w.limits.Bytes)
	}
	f, err := w.root.Open(ResultsFile)
	if err != nil {
		return machineError(err)
	}
	defer f.Close()
	found, err := matchLines(&ctxReader{w.ctx, f}, items)
	if err != nil {
		return machineError(err)
	}
	for i, item := range items {
		at := found[i]
		line := source{
			path: LineFile, shown: shownPath(ResultsFile), size: at.length,
			open: func() (io.ReadCloser, error) {
				return io.NopCloser(io.NewSectionReader(f, at.offset, at.length)), nil
			},
		}
		if err := w.frame(item, []source{line}); err != nil {
			return err
		}
	}
	return nil
}

// matcher assigns the lines of ResultsFile to items.
type matcher struct {
	items    []Item
	byID     map[string]int
	byIndex  map[uint64]int
	found    []position
	anyField bool // some line has a field to match it by
}

// matchLines returns the line of each item.
func matchLines(r io.Reader, items []Item) ([]position, error) {
	m := &matcher{
		items:   items,
		byID:    make(map[string]int),
		byIndex: make(map[uint64]int, len(items)),
		found:   make([]position, len(items)),
	}
	for i, item := range items {
		m.byIndex[item.Index] = i
		if item.CustomID == "" {
			continue
		}
		if other, twice := m.byID[item.CustomID]; twice {
			return nil, api.Errorf(api.Invalid, "item %d: its input line has the custom_id %s of item %d; every custom_id may be there once",
				item.Value, shortQuote(item.CustomID), items[other].Value)
		}
		m.byID[item.CustomID] = i
	}
	lines := newLineReader(shownPath(ResultsFile), r)
	for {
		line, start, err := lines.next()
		if err == io.EOF {
			return m.found, m.complete()
		}
		if err != nil {
			return nil, err
		}
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		if err := m.add(line, position{start, int64(len(line)), lines.number}); err != nil {
			return nil, err
		}
	}
}

func lineError(number uint64, format string, args ...any) error {
	return api.Errorf(api.Invalid, "%s: line %d "+format, append([]any{shownPath(ResultsFile), number}, args...)...)
}

// add finds the item of a line: by custom_id if the items have them and the
// line has one, by index otherwise.
func (m *matcher) add(line []byte, at position) error {
	var object map[string]json.RawMessage
	if err := json.Unmarshal(line, &object); err != nil || object == nil {
		return lineError(at.number, "is not a JSON object: %s", shortQuote(string(line[:min(len(line), 100)])))
	}
	rawID, hasID := object["custom_id"]
	rawIndex, hasIndex := object["index"]
	switch {
	case hasID && len(m.byID) > 0:
		m.anyField = true
		var id string
		if err := json.Unmarshal(rawID, &id); err != nil {
			return lineError(at.number, "has the custom_id %s; want a string", shortQuote(string(rawID)))
		}
		i, ok := m.byID[id]
		if !ok {
			return lineError(at.number, "has the custom_id %s, which is no item of this task", shortQuote(id))
		}
		return m.assign(i, at)
	case hasIndex:
		m.anyField = true
		index, err := strconv.ParseUint(string(rawIndex), 10, 64)
		if err != nil {
			return lineError(at.number, "has the index %s; want the whole number of an item", shortQuote(string(rawIndex)))
		}
		i, ok := m.byIndex[index]
		if !ok {
			return lineError(at.number, "has the index %d, which is no item of this task", index)
		}
		return m.assign(i, at)
	}
	return nil // one of complete's concerns
}

func (m *matcher) assign(i int, at position) error {
	if first := m.found[i].number; first != 0 {
		return lineError(at.number, "is a second result of item %d; the first is line %d", m.items[i].Value, first)
	}
	m.found[i] = at
	return nil
}

// complete checks that every item has its line.
func (m *matcher) complete() error {
	var missing []string
	for i, at := range m.found {
		if at.number == 0 {
			missing = append(missing, strconv.FormatUint(m.items[i].Value, 10))
		}
	}
	if len(missing) == 0 {
		return nil
	}
	if !m.anyField {
		return api.Errorf(api.Invalid, "item %s: no line of %s has the field %s that tells which item it is of",
			missing[0], shownPath(ResultsFile), m.wanted())
	}
	return api.Errorf(api.Invalid, "item %s: %s has no line with its %s (%d items lack one: %s)",
		missing[0], shownPath(ResultsFile), m.wanted(), len(missing), shorten(strings.Join(missing, ", ")))
}

func (m *matcher) wanted() string {
	if len(m.byID) > 0 {
		return `"custom_id" or "index"`
	}
	return `"index"`
}

func shortQuote(s string) string { return strconv.Quote(strings.TrimSuffix(shorten(s), "…")) }
