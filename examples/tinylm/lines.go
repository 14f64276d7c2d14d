package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
)

// Bounds on a prompts file.
const (
	maxPromptsBytes = 64 << 20
	maxIDBytes      = 256
)

// prompt is one line of a prompts file.
type prompt struct {
	CustomID  string `json:"custom_id"`
	Prompt    string `json:"prompt"`
	MaxTokens *int   `json:"max_tokens,omitempty"`
}

// result is one line of results.jsonl. Tokens are all that were chosen, in
// order; when the finish reason is "stop", the last is the end of the line,
// which the completion leaves out. LogProbs are theirs, Top2 those of the best
// token not chosen each time: how close the call was.
type result struct {
	CustomID     string    `json:"custom_id"`
	Completion   string    `json:"completion"`
	Tokens       []int     `json:"tokens"`
	LogProbs     []rounded `json:"logprobs"`
	Top2         []rounded `json:"top2"`
	FinishReason string    `json:"finish_reason"`
}

// rounded is written with six decimals.
type rounded float64

func (r rounded) MarshalJSON() ([]byte, error) {
	if math.IsNaN(float64(r)) || math.IsInf(float64(r), 0) {
		return nil, fmt.Errorf("log-probability %v", float64(r))
	}
	return fmt.Appendf(nil, "%.6f", float64(r)), nil
}

// splitLines cuts a prompts file into lines. A blank line keeps its number;
// those at the end of the file do not count.
func splitLines(b []byte) [][]byte {
	b = bytes.TrimRight(b, " \t\r\n")
	if len(b) == 0 {
		return nil
	}
	return bytes.Split(b, []byte("\n"))
}

// parsePrompt reads one line; most is the number of tokens to write where the
// line does not say. The prompt must leave room for an answer in the context.
func parsePrompt(line []byte, most, context int) (prompt, error) {
	var p prompt
	if len(bytes.TrimSpace(line)) == 0 {
		return p, errors.New("blank: want a JSON object")
	}
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		return p, err
	}
	if _, err := d.Token(); err != io.EOF {
		return p, errors.New("something follows the closing brace")
	}
	if p.CustomID == "" || len(p.CustomID) > maxIDBytes {
		return p, fmt.Errorf("custom_id %.40q: want 1 to %d bytes", p.CustomID, maxIDBytes)
	}
	if p.MaxTokens == nil {
		p.MaxTokens = &most
	}
	if *p.MaxTokens < 1 || *p.MaxTokens > context {
		return p, fmt.Errorf("%s: max_tokens %d: want 1 to %d", p.CustomID, *p.MaxTokens, context)
	}
	if longest := context - 1; len(p.Prompt) > longest {
		return p, fmt.Errorf("%s: the prompt has %d bytes: want at most %d", p.CustomID, len(p.Prompt), longest)
	}
	return p, nil
}

// answer completes the lines with these numbers, in this order.
func answer(w *weights[float32], lines [][]byte, numbers []int, most int) ([]result, error) {
	prompts := make([]prompt, len(numbers))
	line := make(map[string]int, len(numbers))
	for i, n := range numbers {
		p, err := parsePrompt(lines[n], most, w.Context)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if other, taken := line[p.CustomID]; taken {
			return nil, fmt.Errorf("lines %d and %d have the same custom_id %q", other, n, p.CustomID)
		}
		prompts[i], line[p.CustomID] = p, n
	}
	s := newSession(w)
	results := make([]result, len(prompts))
	for i, p := range prompts {
		c := s.complete([]byte(p.Prompt), *p.MaxTokens)
		r := result{CustomID: p.CustomID, Completion: string(c.text), Tokens: c.tokens, FinishReason: c.finish}
		for k := range c.tokens {
			r.LogProbs, r.Top2 = append(r.LogProbs, rounded(c.logprobs[k])), append(r.Top2, rounded(c.second[k]))
		}
		results[i] = r
	}
	return results, nil
}

// encodeLines writes one JSON value per line.
func encodeLines[T any](values []T) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	for _, v := range values {
		if err := e.Encode(v); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), nil
}

// writeWhole makes the file appear only once it is complete.
func writeWhole(path string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	part := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".part")
	err := os.WriteFile(part, b, 0o644)
	if err == nil {
		err = os.Rename(part, path)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(part))
	}
	return nil
}
