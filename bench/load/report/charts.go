package report

import (
	"fmt"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
)

// Size of a chart.
const (
	chartWidth  = 18 * vg.Centimeter
	chartHeight = 10 * vg.Centimeter
)

var (
	blue   = color.RGBA{0x2b, 0x6c, 0xb0, 0xff}
	grey   = color.RGBA{0xa0, 0xae, 0xc0, 0xff}
	orange = color.RGBA{0xdd, 0x6b, 0x20, 0xff}
	green  = color.RGBA{0x2f, 0x85, 0x5a, 0xff}
	purple = color.RGBA{0x6b, 0x46, 0xc1, 0xff}
)

// Charts draws what was measured as SVG files in dir, and removes those of an
// earlier run that this one has no figures for.
func (r *Results) Charts(dir string) error {
	for name, draw := range map[string]func() (*plot.Plot, error){
		"stages.svg": r.stagesChart, "latency.svg": r.latencyChart, "limit.svg": r.limitChart, "growth.svg": r.growthChart, "cpu.svg": r.cpuChart,
		"placement.svg": r.placementChart,
	} {
		path := filepath.Join(dir, name)
		p, err := draw()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if p == nil {
			if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
				return err
			}
			continue
		}
		p.BackgroundColor = color.White
		p.Title.Padding = vg.Points(8)
		if err := p.Save(chartWidth, chartHeight, path); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// bar is one bar of a chart.
type bar struct {
	label string
	key   string
	color color.Color
}

// bars draws the figures that there are; nil when there is none.
func (r *Results) bars(title, y string, list []bar) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text, p.Y.Label.Text, p.Y.Min = title, y, 0
	var labels []string
	for _, b := range list {
		v, ok := r.Get(b.key)
		if !ok {
			continue
		}
		chart, err := plotter.NewBarChart(plotter.Values{v}, vg.Points(28))
		if err != nil {
			return nil, err
		}
		chart.XMin, chart.Color, chart.LineStyle.Width = float64(len(labels)), b.color, 0
		p.Add(chart)
		labels = append(labels, fmt.Sprintf("%s\n%s", b.label, number(v)))
	}
	if len(labels) == 0 {
		return nil, nil
	}
	p.NominalX(labels...)
	p.X.Min, p.X.Max = -0.6, float64(len(labels))-0.4
	return p, nil
}

// stagesChart is how many of each stage there were per second.
func (r *Results) stagesChart() (*plot.Plot, error) {
	var list []bar
	for _, s := range Stages {
		list = append(list, bar{s, "stage_" + s + "_per_s", blue})
	}
	return r.bars("Throughput by stage", "per second", list)
}

// cpuChart is what a task costs, by process.
func (r *Results) cpuChart() (*plot.Plot, error) {
	return r.bars("CPU per task", "µs", []bar{
		{"leader", "lifecycle_cpu_us_per_task_leader", blue}, {"followers", "lifecycle_cpu_us_per_task_followers", green},
		{"generator", "lifecycle_cpu_us_per_task_generator", grey}, {"all", "lifecycle_cpu_us_per_task", orange},
	})
}

// limitChart compares with raw Raft, which is 1.
func (r *Results) limitChart() (*plot.Plot, error) {
	label := func(what, key, limit string) string {
		v, _ := r.Get(key)
		of, _ := r.Get(limit)
		return fmt.Sprintf("%s:\n%s/s of %s/s", what, number(v), number(of))
	}
	p, err := r.bars("Share of what raw Raft does in the same run", "ratio", []bar{
		{label("commands of tasks' lives", "lifecycle_commands_per_s", "raw_raft_commands_per_s"), "lifecycle_share_of_raw_raft", blue},
		{label("transfers in the ledger", "transfers_per_s", "raw_raft_transfers_per_s"), "transfers_share_of_raw_raft", green},
	})
	if p != nil {
		p.Y.Max = 1
	}
	return p, err
}

// growthChart is what grows with work that waits, with history, and with the
// number of workers: ratios that stay near one.
func (r *Results) growthChart() (*plot.Plot, error) {
	return r.bars("Growth of cost: 1 is none", "ratio", []bar{
		{"CPU per task,\n1 M items wait\nover 10 k", "cost_growth_1m", blue}, {"heap,\n1 M finished\nover 10 k", "heap_growth_finished", green},
		{"placement,\n10 k workers\nover 100", "place_growth_10k", purple}, {"spread\nover pack", "spread_over_pack", orange},
	})
}

// latencyChart is the distribution of each stage's latency.
func (r *Results) latencyChart() (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = "Latency by stage, under full load", "ms", "share of all, %"
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	p.Y.Min, p.Y.Max = 0, 100
	p.Legend.Top, p.Legend.Left = true, true
	p.Add(plotter.NewGrid())
	r.mu.Lock()
	defer r.mu.Unlock()
	drawn := false
	for i, stage := range Stages {
		sample := r.samples["stage_"+stage+"_ms"]
		if len(sample) == 0 || slices.Max(sample) <= 0 {
			continue
		}
		points := make(plotter.XYs, len(sample))
		for q, ms := range sample {
			points[q] = plotter.XY{X: math.Max(ms, 0.01), Y: float64(q) * 100 / float64(len(sample)-1)}
		}
		line, err := plotter.NewLine(points)
		if err != nil {
			return nil, err
		}
		line.Color = []color.Color{blue, orange, green, purple, grey, color.Black, color.RGBA{0xc5, 0x30, 0x30, 0xff}}[i%7]
		line.Width = vg.Points(1.5)
		p.Add(line)
		p.Legend.Add(stage, line)
		drawn = true
	}
	if !drawn {
		return nil, nil
	}
	return p, nil
}

// placementChart is what a decision costs as the network grows.
func (r *Results) placementChart() (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = "Cost of a placement decision", "workers", "ns"
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	p.Y.Min = 0
	p.Add(plotter.NewGrid())
	var points plotter.XYs
	for _, n := range SimSizes {
		if v, ok := r.Get(fmt.Sprintf("sim_decision_ns_%d", n)); ok {
			points = append(points, plotter.XY{X: float64(n), Y: v})
		}
	}
	if len(points) < 2 {
		return nil, nil
	}
	line, dots, err := plotter.NewLinePoints(points)
	if err != nil {
		return nil, err
	}
	line.Color, dots.Color = blue, blue
	p.Add(line, dots)
	return p, nil
}
