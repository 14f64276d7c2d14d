package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

func published32(t testing.TB) *weights[float32] {
	t.Helper()
	w, err := loadWeights("")
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// The weights in the repository are what the recipe yields, to the bit; on an
// architecture where that was never tried, to the loss.
func TestRetrain(t *testing.T) {
	if testing.Short() || raceDetector {
		t.Skip("trains for about a minute")
	}
	last := 0.0
	w := train(published, trainingSet(), func(step int, loss float64) {
		if step > published.steps-100 {
			last += loss / 100
		}
	})
	if runtime.GOARCH != "amd64" {
		if last > 0.05 {
			t.Errorf("the loss over the last 100 steps is %.4f: want less than 0.05", last)
		}
		return
	}
	if got, want := sha256.Sum256(encodeWeights(w)), sha256.Sum256(trainedWeights); got != want {
		t.Errorf("training yields weights with digest\n%x, weights.bin has\n%x", got, want)
	}
}

func TestTrainingIsDeterministicAndSeeded(t *testing.T) {
	r := published
	r.config = tinyConfig
	r.Context, r.steps, r.warmup, r.batch = 64, 6, 2, 4
	digest := func(seed uint64) string {
		r.seed = seed
		w := train(r, trainingSet(), func(int, float64) {})
		return fmt.Sprintf("%x", sha256.Sum256(encodeWeights(w)))
	}
	first := digest(3)
	if digest(3) != first {
		t.Error("the same recipe made other weights")
	}
	if digest(4) == first {
		t.Error("another seed made the same weights")
	}
}

// The network knows what it was shown, and some of what it was not.
func TestAccuracy(t *testing.T) {
	topics, results := grade(published32(t))
	shown, held := accuracy{}, accuracy{}
	for _, topic := range topics {
		sum := &shown
		if strings.HasSuffix(topic, "(held back)") {
			sum = &held
		}
		sum.right += results[topic].right
		sum.asked += results[topic].asked
	}
	t.Logf("shown %+v, held back %+v", shown, held)
	if 100*shown.right < 99*shown.asked {
		t.Errorf("%d of %d facts of the corpus answered right: want 99%%", shown.right, shown.asked)
	}
	if 3*held.right < held.asked {
		t.Errorf("%d of %d facts held back answered right: want a third", held.right, held.asked)
	}
}

// Token by token with a cache, the network says what it says to a whole batch.
func TestCacheAgreesWithBatch(t *testing.T) {
	w := published32(t)
	tr := newTrainer(w)
	batch := []example{{"The capital of Peru?", " Lima."}, {"3+4?", " 7."}}
	tr.load(batch)
	tr.forward()
	row := 0
	for _, e := range batch {
		s := newSession(w)
		read, _ := e.tokens()
		for _, token := range read {
			s.feed(token, true)
			for i, v := range tr.final[row*w.Dim : (row+1)*w.Dim] {
				if s.h[i] != v {
					t.Fatalf("row %d, value %d: %v with the cache, %v in the batch", row, i, s.h[i], v)
				}
			}
			row++
		}
	}
}

func TestPromptsFile(t *testing.T) {
	want, err := promptsFile()
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("prompts.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("prompts.jsonl is not what `tinylm prompts` writes")
	}
	if lines := splitLines(got); len(lines) != promptCount {
		t.Errorf("%d prompts: want %d", len(lines), promptCount)
	}
}

func runOK(t *testing.T, args ...string) []byte {
	t.Helper()
	out := t.TempDir()
	var stdout, stderr bytes.Buffer
	if code := run(append([]string{"run", "--out", out}, args...), &stdout, &stderr); code != 0 {
		t.Fatalf("exit code %d: %s", code, &stderr)
	}
	b, err := os.ReadFile(filepath.Join(out, "results.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	if names, err := os.ReadDir(out); err != nil || len(names) != 1 {
		t.Errorf("the output holds %v (%v): want results.jsonl alone", names, err)
	}
	return b
}

// An item's line is the same in whatever set it is asked for, and this digest
// holds on every architecture.
func TestRunGolden(t *testing.T) {
	const want = "7a38041c0def76438062cdea962f2f471459073316580497ecb4d10c27d18ac8"
	all := runOK(t, "--prompts", "prompts.jsonl")
	if got := fmt.Sprintf("%x", sha256.Sum256(all)); got != want {
		t.Errorf("results.jsonl has digest\n%s, want\n%s", got, want)
	}
	lines := splitLines(all)
	if len(lines) != promptCount {
		t.Fatalf("%d results: want %d", len(lines), promptCount)
	}
	some := splitLines(runOK(t, "--prompts", "prompts.jsonl", "--items", "150,3,7-8"))
	for i, n := range []int{150, 3, 7, 8} {
		if !bytes.Equal(some[i], lines[n]) {
			t.Errorf("item %d is\n%s alone,\n%s among all", n, some[i], lines[n])
		}
	}
}

func TestRunAnswers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "p.jsonl")
	text := `{"custom_id":"a","prompt":"The capital of France?"}
{"custom_id":"b","prompt":"Spell cat?","max_tokens":3}

{"custom_id":"é","prompt":""}
`
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	var got []result
	for _, line := range splitLines(runOK(t, "--prompts", path, "--items", "0,1,3", "--max-tokens", "9")) {
		var r struct {
			result
			LogProbs []float64 `json:"logprobs"`
			Top2     []float64 `json:"top2"`
		}
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatal(err)
		}
		if len(r.LogProbs) != len(r.Tokens) || len(r.Top2) != len(r.Tokens) {
			t.Errorf("%s: %d tokens, %d and %d log-probabilities", line, len(r.Tokens), len(r.LogProbs), len(r.Top2))
		}
		for i := range r.LogProbs {
			if r.LogProbs[i] > 0 || r.Top2[i] > r.LogProbs[i] {
				t.Errorf("%s: log-probabilities %v and %v", line, r.LogProbs[i], r.Top2[i])
			}
		}
		got = append(got, r.result)
	}
	if got[0].Completion != " Paris." || got[0].FinishReason != "stop" || len(got[0].Tokens) != 8 || got[0].Tokens[7] != int(end) {
		t.Errorf("%+v", got[0])
	}
	if got[1].Completion != " c-" || got[1].FinishReason != "length" || len(got[1].Tokens) != 3 {
		t.Errorf("%+v", got[1])
	}
	if got[2].CustomID != "é" || len(got[2].Tokens) == 0 {
		t.Errorf("%+v", got[2])
	}
}

// The longest prompt leaves room for one token, and the context ends the rest.
func TestCompletionEndsWithTheContext(t *testing.T) {
	w := newWeights[float32](tinyConfig)
	w.initialize(1)
	s := newSession(w)
	c := s.complete(bytes.Repeat([]byte("x"), tinyConfig.Context-1), 10)
	if len(c.tokens) != 1 || c.finish == "" {
		t.Errorf("%+v", c)
	}
	c = s.complete([]byte("x"), 1000)
	if c.finish != "stop" && len(c.tokens) != tinyConfig.Context-1 {
		t.Errorf("%d tokens, %s", len(c.tokens), c.finish)
	}
}

func TestRunRefuses(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	blocked := file("blocked", "")
	long := strings.Repeat("x", 128)
	for _, c := range []struct {
		args    string
		code    int
		problem string
	}{
		{"", exitUsage, "want a command"},
		{"walk", exitUsage, `unknown command "walk"`},
		{"--help", 0, "usage:"},
		{"run --help", 0, "-prompts"},
		{"run", exitUsage, "--prompts is missing"},
		{"run --speed 3", exitUsage, "-speed"},
		{"run --prompts prompts.jsonl x", exitUsage, `"x"`},
		{"run --prompts prompts.jsonl --items 200", exitUsage, "200 is out of range: want 0 to 199"},
		{"run --prompts prompts.jsonl --items 1,1", exitUsage, "1 is named twice"},
		{"run --prompts prompts.jsonl --max-tokens 0", exitUsage, "--max-tokens 0"},
		{"run --prompts prompts.jsonl --max-tokens 999", exitUsage, "--max-tokens 999: want 1 to 128"},
		{"run --prompts prompts.jsonl --items 1 --out " + blocked, exitFailure, "blocked"},
		{"run --prompts " + dir + "/none", exitFailure, "none"},
		{"run --prompts " + file("empty", "\n"), exitFailure, "has no lines"},
		{"run --prompts " + file("json", "{}\n]\n") + " --items 1", exitFailure, "line 1: invalid"},
		{"run --prompts " + file("blank", "{}\n\n{}\n") + " --items 1", exitFailure, "line 1: blank"},
		{"run --prompts " + file("id", `{"prompt":"x"}`), exitFailure, "line 0: custom_id"},
		{"run --prompts " + file("field", `{"custom_id":"a","promt":"x"}`), exitFailure, `unknown field "promt"`},
		{"run --prompts " + file("two", `{"custom_id":"a"} {}`), exitFailure, "follows the closing brace"},
		{"run --prompts " + file("twice", "{\"custom_id\":\"a\"}\n{\"custom_id\":\"a\"}"), exitFailure, `lines 0 and 1 have the same custom_id "a"`},
		{"run --prompts " + file("tokens", `{"custom_id":"a","max_tokens":0}`), exitFailure, "a: max_tokens 0: want 1 to 128"},
		{"run --prompts " + file("long", `{"custom_id":"a","prompt":"`+long+`"}`), exitFailure, "a: the prompt has 128 bytes: want at most 127"},
		{"run --prompts prompts.jsonl --weights " + file("w", "tiny"), exitFailure, "not a weights file"},
		{"grade --weights " + dir + "/none", exitFailure, "none"},
		{"train", exitUsage, "--out is missing"},
		{"train --out x --steps 3", exitUsage, "--steps 3"},
	} {
		var stdout, stderr bytes.Buffer
		code := run(strings.Fields(c.args), &stdout, &stderr)
		if code != c.code || !strings.Contains(stderr.String(), c.problem) {
			t.Errorf("tinylm %s: exit code %d, %q; want %d and %q", c.args, code, stderr.String(), c.code, c.problem)
		}
	}
}

func tinyWeights() []byte {
	w := newWeights[float32](config{Vocab: 256, Dim: 2, Layers: 1, Heads: 1, KVHeads: 1, Hidden: 1, Context: 8})
	w.initialize(1)
	return encodeWeights(w)
}

// resealed makes a damaged file pass the checksum.
func resealed(b []byte) []byte {
	body := b[:len(b)-sha256.Size]
	sum := sha256.Sum256(body)
	return append(bytes.Clone(body), sum[:]...)
}

func TestDecodeWeightsRefuses(t *testing.T) {
	good := tinyWeights()
	if w, err := decodeWeights(good); err != nil || !bytes.Equal(encodeWeights(w), good) {
		t.Fatalf("a good file did not come back: %v", err)
	}
	change := func(at int, bytes_ ...byte) []byte {
		b := bytes.Clone(good)
		copy(b[at:], bytes_)
		return resealed(b)
	}
	for _, c := range []struct {
		name    string
		b       []byte
		problem string
	}{
		{"empty", nil, "not a weights file"},
		{"only magic", []byte(magic), "cut short"},
		{"magic", change(0, 'T'), "not a weights file"},
		{"vocab", change(8, 0, 0), "vocab 0"},
		{"dim", change(12, 0xff, 0xff, 0xff, 0xff), "dim 4294967295"},
		{"odd heads", change(12, 3), "even multiple"},
		{"kv heads", change(24, 2), "multiple of 2 kv heads"},
		{"hidden", change(28, 2), "its shape needs"},
		{"cut", good[:len(good)-1], "its shape needs"},
		{"flipped", append(bytes.Clone(good[:50]), append([]byte{good[50] ^ 1}, good[51:]...)...), "checksum"},
		{"nan", change(headerBytes, 0, 0, 0xc0, 0x7f), "weight 0 is NaN"},
		{"huge", change(headerBytes+4, 0, 0, 0, 0x7f), "weight 1 is"},
	} {
		if _, err := decodeWeights(c.b); err == nil || !strings.Contains(err.Error(), c.problem) {
			t.Errorf("%s: error %v; want one with %q", c.name, err, c.problem)
		}
	}
}

// Whatever the decoder accepts must answer with numbers.
func FuzzDecodeWeights(f *testing.F) {
	f.Add(tinyWeights())
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		w, err := decodeWeights(b)
		if err != nil {
			if len(b) < sha256.Size || !bytes.HasPrefix(b, []byte(magic)) {
				return
			}
			if w, err = decodeWeights(resealed(b)); err != nil {
				return
			}
		}
		c := newSession(w).complete([]byte("x")[:min(1, w.Context-1)], 3)
		for _, v := range c.logprobs {
			if math.IsNaN(v) {
				t.Error("a log-probability is not a number")
			}
		}
	})
}

func FuzzParsePrompt(f *testing.F) {
	f.Add([]byte(`{"custom_id":"a","prompt":"2+2?","max_tokens":3}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		p, err := parsePrompt(line, 8, 32)
		if err == nil && (p.CustomID == "" || len(p.Prompt) > 31 || *p.MaxTokens < 1 || *p.MaxTokens > 32) {
			t.Errorf("accepted %+v", p)
		}
	})
}

func TestMathAgreesWithPackageMath(t *testing.T) {
	close := func(name string, x, got, want float64) {
		if math.Abs(got-want) > 2e-14*max(1, math.Abs(want)) {
			t.Errorf("%s(%v) = %v, want %v", name, x, got, want)
		}
	}
	for x := -40.0; x < 40; x += 0.37 {
		close("exp", x, exp(x)/math.Exp(x), 1)
		close("log", math.Exp(x), log(math.Exp(x)), x)
		sin, cos := sincos(7 * x)
		close("sin", 7*x, sin, math.Sin(7*x))
		close("cos", 7*x, cos, math.Cos(7*x))
	}
	if exp(1e9) != math.Inf(1) || exp(-1e9) != 0 || !math.IsNaN(exp(math.NaN())) {
		t.Error("exp of extreme values")
	}
}

func TestMulTRowsDoNotDependOnTheBatch(t *testing.T) {
	const rows, cols, inner = 5, 7, 9
	r := random{state: 4}
	x, w := make([]float32, rows*inner), make([]float32, cols*inner)
	for i := range x {
		x[i] = float32(r.normal())
	}
	for i := range w {
		w[i] = float32(r.normal())
	}
	all, one := make([]float32, rows*cols), make([]float32, cols)
	for _, add := range []bool{false, true} {
		for i := range all {
			all[i] = 0.5
		}
		mulT(all, x, w, rows, cols, inner, add)
		for row := range rows {
			for i := range one {
				one[i] = 0.5
			}
			mulT(one, x[row*inner:], w, 1, cols, inner, add)
			for i, v := range one {
				if all[row*cols+i] != v {
					t.Fatalf("row %d column %d: %v alone, %v in the batch", row, i, v, all[row*cols+i])
				}
			}
		}
	}
}

func BenchmarkComplete(b *testing.B) {
	s := newSession(published32(b))
	for b.Loop() {
		s.complete([]byte("The capital of France?"), 16)
	}
}
