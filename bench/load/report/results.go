package report

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
)

// Results are the figures of a run. They are safe for concurrent use.
type Results struct {
	mu      sync.Mutex
	values  map[string]float64   // guarded by mu
	reasons map[string]string    // guarded by mu; why a key has no value
	samples map[string][]float64 // guarded by mu; distributions, in ms, for the charts
}

// New makes empty results.
func New() *Results {
	return &Results{values: map[string]float64{}, reasons: map[string]string{}, samples: map[string][]float64{}}
}

// Set notes a figure; the key must be one of Keys.
func (r *Results) Set(key string, value float64) {
	if !known(key) {
		panic("report: " + key + " is not one of Keys")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.values[key] = value
}

// Get is a figure, if there is one.
func (r *Results) Get(key string) (float64, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.values[key]
	return v, ok
}

// Missing notes why keys have no value; one that has keeps it.
func (r *Results) Missing(why string, keys ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, key := range keys {
		r.reasons[key] = why
	}
}

// Distribution notes the p50, the p99 and, where such a key is known, the max of
// durations in milliseconds below a prefix of keys, and keeps them for the
// charts.
func (r *Results) Distribution(prefix string, ms []float64) {
	if len(ms) == 0 {
		return
	}
	for suffix, q := range map[string]float64{"_p50": 0.5, "_p99": 0.99, "_max": 1} {
		if known(prefix + suffix) {
			r.Set(prefix+suffix, Quantile(ms, q))
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.samples[prefix] = quantiles(ms)
}

// Quantile is the smallest value that a share q of the values does not exceed.
func Quantile(values []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(max(int(q*float64(len(sorted))+0.999999)-1, 0), len(sorted)-1)]
}

// quantiles are the 0th to the 100th percentile.
func quantiles(values []float64) []float64 {
	list := make([]float64, 101)
	for i := range list {
		list[i] = Quantile(values, float64(i)/100)
	}
	return list
}

func known(key string) bool {
	return slices.ContainsFunc(Keys, func(k Key) bool { return k.Name == key })
}

// Merge takes the figures of another program's flat JSON object. Values that are
// no numbers, and keys that are not known here, are kept out; it returns those.
func (r *Results) Merge(text []byte) (unknown []string, err error) {
	var flat map[string]any
	if err := json.Unmarshal(text, &flat); err != nil {
		return nil, fmt.Errorf("merging results: %w", err)
	}
	for _, key := range slices.Sorted(maps.Keys(flat)) {
		if v, ok := flat[key].(float64); ok && known(key) {
			r.Set(key, v)
		} else if flat[key] != nil && !strings.HasSuffix(key, whySuffix) {
			unknown = append(unknown, key)
		} else if why, ok := flat[key].(string); ok {
			r.Missing(why, strings.TrimSuffix(key, whySuffix))
		}
	}
	return unknown, nil
}

// whySuffix is appended to a key whose value is null, for the reason.
const whySuffix = "_why"

// notRun is the reason of a key that no measurement touched.
const notRun = "not part of this run"

// Why says why a key has no value.
func (r *Results) Why(key string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.reason(key)
}

func (r *Results) reason(key string) string {
	if why := r.reasons[key]; why != "" {
		return why
	}
	return notRun
}

// JSON is one flat object with every key of Keys: a number, or null and beside
// it KEY_why.
func (r *Results) JSON() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	b.WriteString("{\n")
	for i, k := range Keys {
		if i > 0 {
			b.WriteString(",\n")
		}
		if v, ok := r.values[k.Name]; ok {
			fmt.Fprintf(&b, "  %q: %s", k.Name, number(v))
			continue
		}
		why, _ := json.Marshal(r.reason(k.Name)) // a string always can be
		fmt.Fprintf(&b, "  %q: null,\n  %q: %s", k.Name, k.Name+whySuffix, why)
	}
	b.WriteString("\n}\n")
	return []byte(b.String())
}

// number is a figure with four significant digits at least.
func number(v float64) string {
	if v >= 1000 || v <= -1000 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.4g", v)
}

// Samples are the distributions for the charts, as JSON.
func (r *Results) Samples() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	text, _ := json.MarshalIndent(r.samples, "", " ") // numbers always can be
	return append(text, '\n')
}

// MergeSamples takes what Samples made.
func (r *Results) MergeSamples(text []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return json.Unmarshal(text, &r.samples)
}

// row is a target with its value, as people read it.
type row struct{ key, value, target, ratio, verdict string }

func (r *Results) rows() []row {
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []row
	for _, k := range Keys {
		if k.Target == 0 {
			continue
		}
		out := row{key: k.Name, target: k.sign() + " " + number(k.Target) + unit(k.Unit)}
		if k.Aim > 0 {
			out.target += " (aim " + number(k.Aim) + ")"
		}
		v, ok := r.values[k.Name]
		switch {
		case !ok:
			out.value, out.ratio, out.verdict = "-", "-", "not measured: "+r.reason(k.Name)
		case k.met(v):
			out.verdict = "met"
		default:
			out.verdict = "MISSED"
		}
		if ok {
			out.value, out.ratio = number(v)+unit(k.Unit), fmt.Sprintf("%.2f", v/k.Target)
			if n, ok := r.values[k.Samples]; ok && n < manySamples {
				out.value += " (of " + number(n) + ")"
			}
		}
		list = append(list, out)
	}
	return list
}

// manySamples are so many that a row of the table does not tell how many.
const manySamples = 1000

func (k Key) sign() string {
	if k.AtMost {
		return "≤"
	}
	return "≥"
}

func (k Key) met(v float64) bool {
	if k.AtMost {
		return v <= k.Target
	}
	return v >= k.Target
}

func unit(u string) string {
	if u == "ratio" {
		return ""
	}
	return " " + u
}

// Table prints every target with its value, how much of the target that is, and
// whether it is met.
func (r *Results) Table(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "target\tmeasured\twanted\tmeasured/wanted\t")
	for _, row := range r.rows() {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", row.key, row.value, row.target, row.ratio, row.verdict)
	}
	t.Flush()
}

// Markdown prints the table of targets, and behind it every other figure.
func (r *Results) Markdown(w io.Writer) {
	fmt.Fprint(w, "| key | measured | target | measured/target | |\n|---|---|---|---|---|\n")
	for _, row := range r.rows() {
		fmt.Fprintf(w, "| `%s` | %s | %s | %s | %s |\n", row.key, row.value, row.target, row.ratio, row.verdict)
	}
	fmt.Fprint(w, "\n| key | measured | what |\n|---|---|---|\n")
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range Keys {
		if v, ok := r.values[k.Name]; ok && k.Target == 0 {
			fmt.Fprintf(w, "| `%s` | %s%s | %s |\n", k.Name, number(v), unit(k.Unit), k.Meaning)
		}
	}
}

// WriteFiles writes results.json and samples.json into dir.
func (r *Results) WriteFiles(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(dir+"/results.json", r.JSON(), 0o644); err != nil {
		return err
	}
	return os.WriteFile(dir+"/samples.json", r.Samples(), 0o644)
}

// Benchmark is the figures in the format of Go's benchmarks, which benchstat
// reads: one line per key, with its unit.
func (r *Results) Benchmark() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	for _, k := range Keys {
		if v, ok := r.values[k.Name]; ok {
			fmt.Fprintf(&b, "BenchmarkLoad/%s 1 %g %s\n", k.Name, v, benchUnit(k.Unit))
		}
	}
	return []byte(b.String())
}

// benchUnit is a unit as benchstat knows it.
func benchUnit(u string) string {
	switch u {
	case "µs":
		return "µs/op"
	case "ms":
		return "ms/op"
	case "s":
		return "s/op"
	}
	return u
}
