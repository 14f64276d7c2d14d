package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/zstd"
	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/outputs"
	"github.com/musternet/muster/scheduler/state"
)

func newJob(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "job", Short: "Look at jobs, follow them, and get their results"}
	cmd.AddCommand(
		newJobList(g), newJobShow(g), newJobWatch(g), newJobCancel(g), newJobFund(g), newJobLogs(g), newJobResults(g), newJobExplain(g),
	)
	return cmd
}

// withJob is a command with one job as its argument.
func withJob(g *globals, use, short, example string, run func(cmd *cobra.Command, c *client.Client, id string) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Example: example, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			return run(cmd, c, args[0])
		},
	}
}

func newJobList(g *globals) *cobra.Command {
	var limit uint32
	cmd := &cobra.Command{
		Use: "list", Short: "List jobs, newest first", Example: "  muster job list\n  muster job list --output json --limit 10", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			views, err := listJobs(cmd.Context(), c, limit)
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), views, func(w *tabwriter.Writer) {
				row(w, "JOB", "NAME", "STATE", "ITEMS", "VERIFIED", "ATTEMPTS", "CHECKS", "CAUGHT", "COST", "SUBMITTED")
				for _, v := range views {
					row(w, v.ID, v.Name, v.State, v.Items, v.ItemsVerified, v.Attempts, v.Checks, v.Caught, money(v.CostMicroUSD), v.Submitted.Format(time.DateTime))
				}
			})
		},
	}
	cmd.Flags().Uint32Var(&limit, "limit", 100, "at most so many jobs; 0 is all")
	return cmd
}

// jobsPerCall is as many as a scheduler lists at once.
const jobsPerCall = 1000

// listJobs lists up to so many jobs, and all for 0.
func listJobs(ctx context.Context, c *client.Client, limit uint32) ([]jobView, error) {
	if limit == 0 {
		limit = math.MaxUint32
	}
	views := []jobView{}
	for before := uint64(0); limit > 0; {
		want := min(limit, jobsPerCall)
		resp, err := c.ListJobs(ctx, connect.NewRequest(&musterpb.ListJobsRequest{Limit: want, Before: before}))
		if err != nil {
			return nil, err
		}
		for _, j := range resp.Msg.Jobs {
			views = append(views, viewJob(&musterpb.GetJobResponse{Job: j}))
			before = j.Sequence
		}
		if uint32(len(resp.Msg.Jobs)) < want {
			break
		}
		limit -= want
	}
	return views, nil
}

func newJobShow(g *globals) *cobra.Command {
	return withJob(g, "show JOB", "Show a job with its attempts, checks and verdicts", "  muster job show job-k3v9d2m1qa\n  muster job show job-k3v9d2m1qa --output json",
		func(cmd *cobra.Command, c *client.Client, id string) error {
			job, err := c.Detail(cmd.Context(), id)
			if err != nil {
				return err
			}
			v := viewJob(job)
			return g.print(cmd.OutOrStdout(), v, func(w *tabwriter.Writer) { printJob(w, v) })
		})
}

func printJob(w *tabwriter.Writer, v jobView) {
	row(w, "job", v.ID+"  "+v.Name)
	row(w, "state", v.State)
	if v.Reason != "" {
		row(w, "reason", v.Reason)
	}
	row(w, "items", fmt.Sprintf("%d of %d verified, %d committed", v.ItemsVerified, v.Items, v.ItemsCommitted))
	row(w, "attempts", fmt.Sprintf("%d, and %d checks of %d items; %d results proved wrong", v.Attempts, v.Checks, v.CheckedItems, v.Caught))
	row(w, "cost", fmt.Sprintf("%s of %s", money(v.CostMicroUSD), money(v.BudgetMicroUSD)))
	if len(v.AttemptList) > 0 {
		row(w)
		row(w, "ATTEMPT", "KIND", "TASK", "WORKER", "OWNER", "STATE", "PAID", "MS", "REASON")
		for _, a := range v.AttemptList {
			row(w, a.ID, a.Kind, a.Task, a.Worker, a.Owner, a.State, money(a.PaidMicroUSD), a.Milliseconds, a.Reason)
		}
	}
	if len(v.CheckList) > 0 {
		row(w)
		row(w, "CHECK", "OF", "ITEMS", "RUNS", "VERDICT", "REASON")
		for _, c := range v.CheckList {
			row(w, c.ID, c.Target, c.Items, len(c.Runs), c.Verdict, strings.TrimSpace(c.Reason+" "+c.Relaxed))
		}
	}
}

func newJobWatch(g *globals) *cobra.Command {
	return withJob(g, "watch JOB", "Show a job's progress until it ends", "  muster job watch job-k3v9d2m1qa\n  muster job watch job-k3v9d2m1qa --output json   # a line per change",
		func(cmd *cobra.Command, c *client.Client, id string) error {
			job, err := watch(cmd.Context(), g, c, id, cmd.OutOrStdout())
			if err != nil {
				return err
			}
			return jobError(job)
		})
}

func newJobCancel(g *globals) *cobra.Command {
	return withJob(g, "cancel JOB", "Stop a job; finished work is still judged and paid, the rest of the budget comes back", "  muster job cancel job-k3v9d2m1qa",
		func(cmd *cobra.Command, c *client.Client, id string) error {
			_, err := c.CancelJob(cmd.Context(), connect.NewRequest(&musterpb.CancelJobRequest{Job: id}))
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), map[string]string{"id": id, "state": "cancelled"}, func(w *tabwriter.Writer) { row(w, id+" cancelled") })
		})
}

func newJobFund(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "fund JOB AMOUNT", Short: "Add to the budget of a job that still runs or is paused", Example: "  muster job fund job-k3v9d2m1qa 5.00", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			amount, err := api.ParseDollars(args[1])
			if err != nil {
				return &usageError{err}
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			_, err = c.FundJob(cmd.Context(), connect.NewRequest(&musterpb.FundJobRequest{Id: client.NewID(), Job: args[0], AmountMicroUsd: int64(amount)}))
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), map[string]any{"id": args[0], "added_micro_usd": amount}, func(w *tabwriter.Writer) { row(w, amount.String()+" added to the budget of "+args[0]) })
		},
	}
	return cmd
}

func newJobLogs(g *globals) *cobra.Command {
	var attempt string
	cmd := withJob(g, "logs JOB", "Print what a job's program wrote to stdout and stderr", "  muster job logs job-k3v9d2m1qa\n  muster job logs job-k3v9d2m1qa --attempt att-0123456789abcdef",
		func(cmd *cobra.Command, c *client.Client, id string) error {
			var logs []*musterpb.AttemptLog
			for after, more := uint32(0), true; more; more = after > 0 {
				resp, err := c.GetLogs(cmd.Context(), connect.NewRequest(&musterpb.GetLogsRequest{Job: id, Attempt: attempt, AfterTask: after}))
				if err != nil {
					return err
				}
				logs, after = append(logs, resp.Msg.Logs...), resp.Msg.NextTask
			}
			return printLogs(cmd, g, c, logs)
		})
	cmd.Flags().StringVar(&attempt, "attempt", "", "only this attempt's")
	return cmd
}

type logView struct {
	Attempt string `json:"attempt"`
	Task    uint32 `json:"task"`
	Worker  string `json:"worker"`
	State   string `json:"state"`
	Text    string `json:"text"`
}

func printLogs(cmd *cobra.Command, g *globals, c *client.Client, logs []*musterpb.AttemptLog) error {
	views := []logView{}
	for _, l := range logs {
		text, err := logText(cmd.Context(), c, l)
		if err != nil {
			return fmt.Errorf("log of %s: %w", l.Attempt, err)
		}
		views = append(views, logView{Attempt: l.Attempt, Task: l.Task, Worker: l.Worker, State: state.StateName(l.State), Text: text})
	}
	if g.output == "json" {
		return g.print(cmd.OutOrStdout(), views, nil)
	}
	for _, v := range views {
		fmt.Fprintf(cmd.OutOrStdout(), "== %s · task %d · %s · %s\n%s", v.Attempt, v.Task, v.Worker, v.State, v.Text)
		if v.Text != "" && !strings.HasSuffix(v.Text, "\n") {
			fmt.Fprintln(cmd.OutOrStdout())
		}
	}
	return nil
}

// maxLogBytes bounds a log once it is unpacked.
const maxLogBytes = 64 << 20

func logText(ctx context.Context, c *client.Client, l *musterpb.AttemptLog) (string, error) {
	if l.LogDigest == "" {
		return string(l.Tail), nil
	}
	r, err := blob.OpenLog(ctx, c.Blobs(), l.LogDigest, l.Stored)
	if err != nil {
		return "", err
	}
	defer r.Close()
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return "", err
	}
	defer z.Close()
	text, err := io.ReadAll(io.LimitReader(z, maxLogBytes))
	return string(text), err
}

func newJobResults(g *globals) *cobra.Command {
	var out string
	var provisional bool
	cmd := withJob(g, "results JOB", "Download the verified results of a job", "  muster job results job-k3v9d2m1qa --out frames\n  muster job results job-k3v9d2m1qa --out frames --provisional",
		func(cmd *cobra.Command, c *client.Client, id string) error {
			if err := checkOut(out); err != nil {
				return err
			}
			n, err := fetchResults(cmd.Context(), c, id, out, provisional)
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), map[string]any{"id": id, "items": n, "out": out}, func(w *tabwriter.Writer) { row(w, fmt.Sprintf("%d items in %s", n, out)) })
		})
	cmd.Flags().StringVar(&out, "out", "results", "directory, new or empty")
	cmd.Flags().BoolVar(&provisional, "provisional", false, "also results that are not judged yet")
	return cmd
}

func newJobExplain(g *globals) *cobra.Command {
	return withJob(g, "explain JOB", "Say why a job waits: how many workers fail which constraint", "  muster job explain job-k3v9d2m1qa",
		func(cmd *cobra.Command, c *client.Client, id string) error {
			resp, err := c.ExplainJob(cmd.Context(), connect.NewRequest(&musterpb.GetJobRequest{Job: id}))
			if err != nil {
				return err
			}
			type reason struct {
				Workers uint32 `json:"workers"`
				Text    string `json:"text"`
			}
			v := struct {
				Summary  string   `json:"summary"`
				Workers  uint32   `json:"workers"`
				Eligible uint32   `json:"eligible"`
				Reasons  []reason `json:"reasons"`
			}{resp.Msg.Summary, resp.Msg.Workers, resp.Msg.Eligible, []reason{}}
			for _, r := range resp.Msg.Reasons {
				v.Reasons = append(v.Reasons, reason{r.Workers, r.Text})
			}
			return g.print(cmd.OutOrStdout(), v, func(w *tabwriter.Writer) { row(w, v.Summary) })
		})
}

// waitAndFetch follows a job to its end and downloads its results.
func waitAndFetch(cmd *cobra.Command, g *globals, c *client.Client, id, out string) error {
	job, err := watch(cmd.Context(), g, c, id, cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	if out != "" {
		n, err := fetchResults(cmd.Context(), c, id, out, false)
		if err != nil {
			return err
		}
		fmt.Fprintf(cmd.ErrOrStderr(), "%d items in %s\n", n, out)
	}
	v := viewJob(&musterpb.GetJobResponse{Job: job})
	if err := g.print(cmd.OutOrStdout(), v, func(w *tabwriter.Writer) { printJob(w, v) }); err != nil {
		return err
	}
	return jobError(job)
}

func jobError(job *musterpb.Job) error {
	if job.State == musterpb.JobState_JOB_STATE_VERIFIED {
		return nil
	}
	what := map[musterpb.JobState]string{musterpb.JobState_JOB_STATE_FAILED: "failed", musterpb.JobState_JOB_STATE_CANCELLED: "was cancelled"}[job.State]
	return api.Errorf(api.Conflict, "job %s %s: %s", job.Id, what, job.Reason)
}

// watch shows progress until the job is settled. A broken stream is dialled
// again: a leader may change on the way.
func watch(ctx context.Context, g *globals, c *client.Client, id string, w io.Writer) (*musterpb.Job, error) {
	show := newProgress(w, g.output == "json")
	defer show.end()
	var last *musterpb.Job
	for failures := 0; ; {
		stream, err := c.WatchJob(ctx, connect.NewRequest(&musterpb.GetJobRequest{Job: id}))
		if err == nil {
			for stream.Receive() {
				failures = 0
				last = client.Watched(last, stream.Msg().Job)
				show.update(last)
			}
			err = stream.Err()
			stream.Close()
		}
		switch {
		case last != nil && last.Settled:
			return last, nil
		case ctx.Err() != nil:
			return nil, fmt.Errorf("no longer watching; the job goes on: muster job watch %s", id)
		case err != nil && api.KindOf(err) != api.Unavailable && api.KindOf(err) != api.Internal:
			return nil, err
		}
		if failures++; failures > 40 {
			return nil, api.Errorf(api.Unavailable, "watching %s: %w", id, api.FromConnect(err))
		}
		select {
		case <-ctx.Done():
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// progress shows a job's counts: bars on a terminal, lines elsewhere.
type progress struct {
	w        io.Writer
	json     bool
	bars     *mpb.Progress
	run, ok  *mpb.Bar
	current  *musterpb.Job
	lastLine time.Time
	lastText string
}

func newProgress(w io.Writer, asJSON bool) *progress {
	p := &progress{w: w, json: asJSON}
	if f, ok := w.(*os.File); ok && !asJSON {
		if info, err := f.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			p.bars = mpb.New(mpb.WithOutput(f), mpb.WithWidth(40))
		}
	}
	return p
}

func (p *progress) update(job *musterpb.Job) {
	p.current = job
	switch {
	case p.json:
		v := viewJob(&musterpb.GetJobResponse{Job: job})
		fmt.Fprintf(p.w, `{"id":%q,"state":%q,"items":%d,"items_committed":%d,"items_verified":%d,"attempts":%d,"checks":%d,"caught":%d,"cost_micro_usd":%d}`+"\n",
			v.ID, v.State, v.Items, v.ItemsCommitted, v.ItemsVerified, v.Attempts, v.Checks, v.Caught, v.CostMicroUSD)
	case p.bars != nil:
		if p.run == nil {
			bar := func(name string) *mpb.Bar {
				return p.bars.AddBar(int64(job.Items),
					mpb.PrependDecorators(decor.Name(name, decor.WCSyncWidthR), decor.CountersNoUnit(" %d/%d", decor.WCSyncWidth)),
					mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return p.text() })))
			}
			p.run, p.ok = bar("computed"), bar("verified")
		}
		p.run.SetCurrent(int64(job.ItemsCommitted))
		p.ok.SetCurrent(int64(job.ItemsVerified))
	default:
		text := fmt.Sprintf("%d/%d computed, %d verified, %s", job.ItemsCommitted, job.Items, job.ItemsVerified, p.text())
		if text != p.lastText && (time.Since(p.lastLine) > 2*time.Second || job.Settled) {
			fmt.Fprintln(p.w, text)
			p.lastLine, p.lastText = time.Now(), text
		}
	}
}

func (p *progress) text() string {
	job := p.current
	text := fmt.Sprintf("%s, %d checks, %s", state.StateName(job.State), job.Checks, money(job.SpentMicroUsd))
	if job.Caught > 0 {
		text += fmt.Sprintf(", %d caught", job.Caught)
	}
	return text
}

func (p *progress) end() {
	if p.run != nil {
		p.run.Abort(false)
		p.ok.Abort(false)
	}
	if p.bars != nil {
		p.bars.Wait()
	}
}

// checkOut wants a directory in which nothing can be overwritten.
func checkOut(dir string) error {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return usagef("--out: %w", err)
	case len(entries) > 0:
		return usagef("--out %s: the directory is not empty; choose another or remove it", dir)
	}
	return nil
}

// fetchResults downloads every item: a directory each, or one results.jsonl in
// order of the items.
func fetchResults(ctx context.Context, c *client.Client, id, out string, provisional bool) (items int, err error) {
	resp, err := c.GetJob(ctx, connect.NewRequest(&musterpb.GetJobRequest{Job: id}))
	if err != nil {
		return 0, err
	}
	job := resp.Msg.Job
	if err := os.MkdirAll(out, 0o755); err != nil {
		return 0, fmt.Errorf("--out: %w", err)
	}
	f := &fetcher{c: c, job: job, out: out, limits: outputs.Limits{Bytes: job.Spec.Resources.DiskBytes, Files: 100_000}, lines: map[uint64][]byte{}}
	for after := uint32(0); ; {
		page, err := c.GetResults(ctx, connect.NewRequest(&musterpb.GetResultsRequest{Job: id, Provisional: provisional, AfterTask: after}))
		if err != nil {
			return f.items, err
		}
		for _, r := range page.Msg.Results {
			if err := f.task(ctx, r); err != nil {
				return f.items, fmt.Errorf("results of task %d: %w", r.Task, err)
			}
		}
		if after = page.Msg.NextTask; after == 0 {
			break
		}
	}
	if job.Spec.Outputs == musterpb.OutputMode_OUTPUT_MODE_LINES {
		return f.items, f.writeLines()
	}
	return f.items, nil
}

type fetcher struct {
	c      *client.Client
	job    *musterpb.Job
	out    string
	limits outputs.Limits
	lines  map[uint64][]byte // by index
	items  int
}

func (f *fetcher) task(ctx context.Context, r *musterpb.TaskResult) error {
	m, err := f.manifest(ctx, r)
	if err != nil {
		return err
	}
	archive, err := blob.OpenArchive(ctx, f.c.Blobs(), r.ArchiveDigest, r.ArchiveBytes, r.Stored)
	if err != nil {
		return err
	}
	defer archive.Close()
	for _, item := range m.Items {
		f.items++
		if f.job.Spec.Outputs == musterpb.OutputMode_OUTPUT_MODE_LINES {
			files, err := outputs.OpenItem(ctx, archive, item, f.limits)
			if err != nil {
				return err
			}
			f.lines[item.Index] = files[0].Data
			continue
		}
		name := strconv.FormatUint(jobspec.Value(f.job.Spec.Items, item.Index), 10)
		if err := outputs.Extract(ctx, archive, item, filepath.Join(f.out, name), f.limits); err != nil {
			return err
		}
	}
	return nil
}

// maxManifestBytes bounds a manifest, as the schedulers do.
const maxManifestBytes = 64 << 20

func (f *fetcher) manifest(ctx context.Context, t *musterpb.TaskResult) (*musterpb.Manifest, error) {
	r, err := blob.OpenManifest(ctx, f.c.Blobs(), t.ManifestDigest, t.Stored)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxManifestBytes))
	if err != nil {
		return nil, err
	}
	m := &musterpb.Manifest{}
	return m, m.UnmarshalVT(data)
}

func (f *fetcher) writeLines() error {
	file, err := os.Create(filepath.Join(f.out, outputs.ResultsFile))
	if err != nil {
		return err
	}
	defer file.Close()
	for index := range f.job.Items {
		if line, ok := f.lines[index]; ok {
			if _, err := file.Write(append(line, '\n')); err != nil {
				return err
			}
		}
	}
	return file.Close()
}
