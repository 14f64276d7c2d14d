package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"image/draw"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
)

// summary is summary.json.
type summary struct {
	Runtime        string           `json:"runtime"`
	Jobs           int              `json:"jobs"`
	Items          uint64           `json:"items"`
	Attempts       uint64           `json:"attempts"`
	Checks         uint64           `json:"checks"`
	CheatsCaught   int              `json:"cheats_caught"`
	HonestRejected int              `json:"honest_rejected"`
	LeaderKilled   bool             `json:"leader_killed"`
	PaidMicroUSD   map[string]int64 `json:"paid_micro_usd"`
	LedgerSum      int64            `json:"ledger_sum_micro_usd"`
	Seconds        float64          `json:"seconds"`
}

func rejected(a *musterpb.Attempt) bool {
	return a.State == musterpb.AttemptState_ATTEMPT_STATE_REJECTED
}

// conclude downloads the results, draws the conclusions, and checks them.
func (d *demo) conclude(ctx context.Context, render, text string) error {
	s := &summary{Runtime: d.runtime, LeaderKilled: d.leaderKilled, PaidMicroUSD: map[string]int64{}}
	cheated := map[string]int64{} // paid for attempts of the cheater that were proved wrong
	for _, id := range []string{render, text} {
		detail, err := d.net.detail(ctx, id)
		if err != nil {
			return err
		}
		if detail.Job.State != musterpb.JobState_JOB_STATE_VERIFIED {
			return fmt.Errorf("job %s is not verified: %s", id, detail.Job.Reason)
		}
		s.Jobs++
		s.Items += detail.Job.ItemsVerified
		s.Attempts += detail.Job.Attempts
		s.Checks += detail.Job.Checks
		for _, a := range detail.Attempts {
			switch {
			case rejected(a) && d.net.name(a.Worker) == fmt.Sprintf("worker-%d", cheater):
				s.CheatsCaught++
				cheated[a.Id] = 0
			case rejected(a):
				s.HonestRejected++
			}
		}
	}
	transfers, err := d.net.transfers(ctx)
	if err != nil {
		return err
	}
	paidTwice := d.account(s, transfers, cheated)
	status, err := d.net.status(ctx)
	if err != nil {
		return err
	}
	if err := d.fetch(ctx, render, text); err != nil {
		return err
	}
	wrong := d.compareWithOwnRun(ctx)
	s.Seconds = time.Since(d.started).Seconds()
	d.print(s)

	var lies []error
	claim := func(ok bool, format string, args ...any) {
		if !ok {
			lies = append(lies, fmt.Errorf(format, args...))
		}
	}
	claim(s.Items == frames+lines, "%d items were verified, not %d", s.Items, frames+lines)
	claim(s.CheatsCaught > 0, "the cheater was not caught")
	claim(s.HonestRejected == 0, "%d honest results were rejected", s.HonestRejected)
	claim(s.LeaderKilled, "no leader was killed")
	claim(s.LedgerSum == 0 && status.LedgerSumMicroUsd == 0, "the ledger sums to %d and %d", s.LedgerSum, status.LedgerSumMicroUsd)
	claim(len(paidTwice) == 0, "attempts were paid twice: %v", paidTwice)
	for id, paid := range cheated {
		claim(paid == 0, "attempt %s was proved wrong and still paid %d", id, paid)
	}
	claim(wrong == nil, "the results are not what this machine computes itself: %v", wrong)
	if err := errors.Join(lies...); err != nil {
		return err
	}
	encoded, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(d.dir, "summary.json"), append(encoded, '\n'), 0o644)
}

// account adds up what the ledger says, and lists attempts that were paid more
// than once.
func (d *demo) account(s *summary, transfers []*musterpb.Transfer, cheated map[string]int64) (paidTwice []string) {
	posts := map[string]int{}
	for i := 1; i <= workers; i++ {
		s.PaidMicroUSD[fmt.Sprintf("owner-%d", i)] = 0
	}
	for _, t := range transfers {
		for _, leg := range ledger.Legs(t) {
			s.LedgerSum += int64(leg.Amount)
		}
		if t.Kind != musterpb.TransferKind_TRANSFER_KIND_POST {
			continue
		}
		if owner, ok := strings.CutPrefix(t.Credit, "account:"); ok {
			s.PaidMicroUSD[owner] += t.AmountMicroUsd
		}
		if posts[t.Ref]++; posts[t.Ref] == 2 {
			paidTwice = append(paidTwice, t.Ref)
		}
		if _, ok := cheated[t.Ref]; ok {
			cheated[t.Ref] += t.AmountMicroUsd
		}
	}
	return paidTwice
}

// fetch downloads the results with the real command and draws the contact
// sheet.
func (d *demo) fetch(ctx context.Context, render, text string) error {
	if _, err := d.net.command(ctx, renderOwner, "job", "results", render, "--out", filepath.Join(d.dir, "frames")); err != nil {
		return err
	}
	if _, err := d.net.command(ctx, textOwner, "job", "results", text, "--out", filepath.Join(d.dir, "completions")); err != nil {
		return err
	}
	return contactSheet(filepath.Join(d.dir, "frames"), filepath.Join(d.dir, "contact-sheet.png"))
}

func framePath(dir string, n int) string {
	return filepath.Join(dir, strconv.Itoa(n), "frame.png")
}

// contactSheet puts all frames side by side, six in a row.
func contactSheet(dir, out string) error {
	const columns, gap = 6, 4
	var sheet *image.NRGBA
	for n := 1; n <= frames; n++ {
		f, err := os.Open(framePath(dir, n))
		if err != nil {
			return err
		}
		frame, err := png.Decode(f)
		f.Close()
		if err != nil {
			return fmt.Errorf("frame %d: %w", n, err)
		}
		w, h := frame.Bounds().Dx()+gap, frame.Bounds().Dy()+gap
		if sheet == nil {
			sheet = image.NewNRGBA(image.Rect(0, 0, columns*w+gap, (frames+columns-1)/columns*h+gap))
			draw.Draw(sheet, sheet.Rect, image.Black, image.Point{}, draw.Src)
		}
		at := image.Pt(gap+(n-1)%columns*w, gap+(n-1)/columns*h)
		draw.Draw(sheet, image.Rectangle{Min: at, Max: at.Add(frame.Bounds().Size())}, frame, frame.Bounds().Min, draw.Src)
	}
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	return errors.Join(png.Encode(f, sheet), f.Close())
}

// compareWithOwnRun computes three frames and all completions on this machine,
// outside of muster, and compares them bit by bit.
func (d *demo) compareWithOwnRun(ctx context.Context) error {
	own := filepath.Join(d.net.dir, "own")
	size := pictures[d.runtime]
	run := exec.CommandContext(ctx, filepath.Join(d.build, "raytrace"), "--scene", "examples/raytrace/scene.json", "--frames", "1,12,24",
		"--width", strconv.Itoa(size.width), "--height", strconv.Itoa(size.height), "--samples", strconv.Itoa(size.samples), "--out", own)
	if out, err := run.CombinedOutput(); err != nil {
		return fmt.Errorf("rendering: %w: %s", err, out)
	}
	for _, n := range []int{1, 12, 24} {
		if err := sameFile(framePath(own, n), framePath(filepath.Join(d.dir, "frames"), n)); err != nil {
			return err
		}
	}
	run = exec.CommandContext(ctx, filepath.Join(d.build, "tinylm"), "run", "--prompts", "examples/tinylm/prompts.jsonl", "--max-tokens", "32", "--out", own)
	if out, err := run.CombinedOutput(); err != nil {
		return fmt.Errorf("completing: %w: %s", err, out)
	}
	return sameFile(filepath.Join(own, "results.jsonl"), filepath.Join(d.dir, "completions", "results.jsonl"))
}

func sameFile(want, got string) error {
	w, err := os.ReadFile(want)
	if err != nil {
		return err
	}
	g, err := os.ReadFile(got)
	if err != nil {
		return err
	}
	if !bytes.Equal(w, g) {
		return fmt.Errorf("%s differs", got)
	}
	return nil
}

// print prints the summary table.
func (d *demo) print(s *summary) {
	w := tabwriter.NewWriter(d.out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w)
	row := func(name string, value any) { fmt.Fprintf(w, "  %s\t%v\n", name, value) }
	row("runtime", s.Runtime)
	row("jobs", s.Jobs)
	row("items verified", fmt.Sprintf("%d (%d frames, %d lines)", s.Items, frames, lines))
	row("attempts", s.Attempts)
	row("checks", fmt.Sprintf("%d re-runs on other owners' machines", s.Checks))
	row("caught", fmt.Sprintf("worker-%d, %d times; honest results rejected: %d", cheater, s.CheatsCaught, s.HonestRejected))
	row("leader killed", s.LeaderKilled)
	owners := make([]string, 0, len(s.PaidMicroUSD))
	for owner := range s.PaidMicroUSD {
		owners = append(owners, owner)
	}
	slices.Sort(owners)
	for _, owner := range owners {
		row("paid to "+owner, api.MicroUSD(s.PaidMicroUSD[owner]))
	}
	row("ledger sum", api.MicroUSD(s.LedgerSum))
	row("seconds", fmt.Sprintf("%.1f", s.Seconds))
	row("results", fmt.Sprintf("%s: contact-sheet.png, frames, completions, summary.json", d.dir))
	w.Flush()
}
