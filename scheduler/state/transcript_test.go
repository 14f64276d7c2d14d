package state

import (
	"crypto/ed25519"
	"crypto/sha256"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

var rewrite = flag.Bool("rewrite", false, "write what the transcripts in testdata answer now")

// TestTranscripts runs testdata/*.txt: blocks of commands, a line of dashes,
// what the state answered ("ok" once where it took all of them), and what they
// changed. Every command takes one
// second; "wait 5m" lets time pass. The commands are those of world.build.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			old, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			fresh := runTranscript(t, string(old))
			if *rewrite {
				if err := os.WriteFile(file, []byte(fresh), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if fresh != string(old) {
				t.Errorf("%s answers otherwise; if that is right, run with -rewrite\n%s", file, firstDifference(string(old), fresh))
			}
		})
	}
}

func firstDifference(want, got string) string {
	a, b := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range max(len(a), len(b)) {
		if i >= len(a) || i >= len(b) || a[i] != b[i] {
			return fmt.Sprintf("line %d:\nwant %s\ngot  %s", i+1,
				strings.Join(a[min(i, len(a)):min(i+6, len(a))], "\n     "), strings.Join(b[min(i, len(b)):min(i+6, len(b))], "\n     "))
		}
	}
	return ""
}

// runTranscript keeps comments and commands and writes the answers anew.
func runTranscript(t *testing.T, text string) string {
	w := newWorld(t)
	var out strings.Builder
	answering := false
	var block []string
	for line := range strings.SplitSeq(strings.TrimRight(text, "\n"), "\n") {
		switch {
		case line == "----":
			before := w.describe()
			var answers []string
			for _, command := range block {
				answers = append(answers, w.run(strings.Fields(command))...)
			}
			out.WriteString("----\n")
			if !slices.ContainsFunc(answers, func(a string) bool { return a != "ok" }) {
				answers = answers[:min(1, len(answers))]
			}
			after := w.describe()
			if w.brief {
				w.brief = false
				for k := range after {
					if strings.ContainsRune("4567", rune(k[0])) {
						before[k] = after[k]
					}
				}
			}
			for _, l := range append(answers, changes(before, after)...) {
				out.WriteString(l + "\n")
			}
			answering, block = true, nil
		case answering && line != "":
			// an old answer
		case line == "" || strings.HasPrefix(line, "#"):
			answering = false
			out.WriteString(line + "\n")
		default:
			block = append(block, line)
			out.WriteString(line + "\n")
		}
	}
	return out.String()
}

func changes(before, after map[string]string) (lines []string) {
	all := maps.Clone(before)
	maps.Copy(all, after)
	for _, k := range sortedKeys(all) {
		now, there := after[k]
		if !there {
			now = "gone"
			if k[0] == '9' {
				now = api.MicroUSD(0).String() // an account of zeros is not kept
			}
		}
		if before[k] != now {
			lines = append(lines, "  "+k[1:]+": "+now)
		}
	}
	return lines
}

// world is a state, and the names that a transcript calls things by.
type world struct {
	*replicas
	clock  int64
	ids    map[string]string // of workers and nodes, by name
	names  map[string]string // the reverse
	chains map[string][][]byte
	brief  bool // whole lives were run: tasks, attempts, checks and batches are not printed
}

func newWorld(t interface {
	Helper()
	Fatalf(string, ...any)
}) *world {
	return &world{replicas: newReplicas(t), clock: 1_000_000, ids: map[string]string{}, names: map[string]string{}, chains: map[string][][]byte{}}
}

// keyOf is a key pair that follows from a name.
func keyOf(name string) ed25519.PublicKey {
	seed := sha256.Sum256([]byte(name))
	return ed25519.NewKeyFromSeed(seed[:]).Public().(ed25519.PublicKey)
}

func (w *world) name(id string) string {
	if name := w.names[id]; name != "" {
		return name
	}
	return id
}

func (w *world) id(name string) string {
	if id := w.ids[name]; id != "" {
		return id
	}
	return name
}

// chainOf is a short hash chain of a node; generation tells its chains apart.
func chainOf(node string, generation int) [][]byte {
	v := sha256.Sum256(fmt.Appendf(nil, "%s %d", node, generation))
	chain := [][]byte{v[:]}
	for range 200 {
		next := sha256.Sum256(chain[0])
		chain = slices.Insert(chain, 0, next[:])
	}
	return chain
}

// args are the words of a command: positions and name=value.
type args struct {
	words []string
	named map[string]string
}

func parseArgs(words []string) args {
	a := args{named: map[string]string{}}
	for _, word := range words {
		if name, value, ok := strings.Cut(word, "="); ok && !strings.Contains(name, "!") {
			a.named[name] = value
		} else {
			a.words = append(a.words, word)
		}
	}
	return a
}

func (a args) word(i int) string {
	if i < len(a.words) {
		return a.words[i]
	}
	return ""
}

func (a args) get(name, def string) string {
	if v, ok := a.named[name]; ok {
		return v
	}
	return def
}

func (a args) int(name string, def int64) int64 {
	n, err := strconv.ParseInt(a.get(name, strconv.FormatInt(def, 10)), 10, 64)
	if err != nil {
		panic(err)
	}
	return n
}

func dollars(s string) int64 {
	m, err := api.ParseDollars(strings.TrimPrefix(s, "-"))
	if err != nil {
		panic(err)
	}
	if strings.HasPrefix(s, "-") {
		m = -m
	}
	return int64(m)
}

func duration(s string) int64 {
	d, err := time.ParseDuration(s)
	if err != nil {
		panic(err)
	}
	return d.Milliseconds()
}

// run carries out one line and answers what is worth printing.
func (w *world) run(words []string) []string {
	verb, a := words[0], parseArgs(words[1:])
	switch verb {
	case "wait":
		w.clock += duration(a.word(0))
		return nil
	case "queued":
		return w.queued()
	case "balance":
		return []string{strings.Join(strings.Fields(w.Balance(a.word(0)).String()), " ")}
	case "life":
		return w.life(a)
	}
	cmd := w.build(verb, a)
	if cmd == nil {
		return []string{"no such command: " + verb}
	}
	cmd.Id = a.get("id", "")
	return w.say(cmd)
}

func (w *world) say(cmd *musterpb.Command) []string {
	w.clock += 1000
	cmd.TimeUnixMs = w.clock
	answer := w.apply(cmd)
	if err := ErrorOf(answer); err != nil {
		return []string{"refused (" + api.KindOf(err).String() + "): " + w.rename(err.Error())}
	}
	return []string{"ok"}
}

// rename puts the names of a transcript for IDs that follow from keys.
func (w *world) rename(s string) string {
	for _, id := range sortedKeys(w.names) {
		s = strings.ReplaceAll(s, id, w.names[id])
	}
	return s
}

func (w *world) build(verb string, a args) *musterpb.Command {
	first := a.word(0)
	switch verb {
	case "cluster":
		return &musterpb.Command{Body: &musterpb.Command_CreateCluster{CreateCluster: &musterpb.CreateCluster{Cluster: first}}}
	case "account":
		return &musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: first}}}
	case "key":
		return createKey(first, a.get("text", "secret"), musterpb.Role(a.int("role", 2)))
	case "deposit":
		return deposit(first, dollars(a.word(1)))
	case "node":
		key := keyOf(first)
		id := string(api.NodeIDOf(key))
		w.ids[first], w.names[id] = id, first
		return &musterpb.Command{Body: &musterpb.Command_RegisterNode{RegisterNode: &musterpb.RegisterNode{Node: &musterpb.Node{
			Id: a.get("as", id), PublicKey: key, ApiAddress: "https://" + first, RaftAddress: a.get("raft", first+":7000"),
		}}}}
	case "tip":
		w.chains[first] = chainOf(first, int(a.int("generation", 0)))
		return registerTip(w.id(first), w.chains[first][0])
	case "worker":
		return w.worker(first, a)
	case "drain":
		return &musterpb.Command{Body: &musterpb.Command_DrainWorker{DrainWorker: &musterpb.DrainWorker{Worker: w.id(first), Draining: a.word(1) != "off"}}}
	case "submit":
		return submitJob(first, a)
	case "cancel":
		return &musterpb.Command{Body: &musterpb.Command_CancelJob{CancelJob: &musterpb.CancelJob{Job: first, Reason: "by the customer"}}}
	case "fund":
		return &musterpb.Command{Body: &musterpb.Command_FundJob{FundJob: &musterpb.FundJob{Job: first, AmountMicroUsd: dollars(a.word(1))}}}
	case "place":
		return w.place(first, a)
	case "start":
		return &musterpb.Command{Body: &musterpb.Command_StartAttempt{StartAttempt: &musterpb.StartAttempt{Attempt: first}}}
	case "commit":
		return commit(first, a.get("root", first))
	case "fail":
		return end(first, musterpb.AttemptState_ATTEMPT_STATE_FAILED, musterpb.Blame(musterpb.Blame_value["BLAME_"+strings.ToUpper(a.get("blame", "none"))]), int32(a.int("exit", 0)))
	case "lost":
		return end(first, musterpb.AttemptState_ATTEMPT_STATE_LOST, musterpb.Blame_BLAME_NETWORK, 0)
	case "stop":
		return end(first, musterpb.AttemptState_ATTEMPT_STATE_CANCELLED, musterpb.Blame_BLAME_NONE, 0)
	case "close":
		return w.closeCommand(a)
	case "reveal":
		return w.revealCommand(first, a)
	case "fail-closed":
		epoch := uint64(a.int("epoch", int64(w.Epoch())))
		return &musterpb.Command{Body: &musterpb.Command_FailBatchClosed{FailBatchClosed: &musterpb.FailBatchClosed{Epoch: epoch, Reason: "none within 2s"}}}
	case "compare":
		return w.compare(first, a.words[1:])
	case "seal":
		return w.sealCommand(a)
	case "merge":
		return w.mergeCommand(a)
	case "give-up":
		return &musterpb.Command{Body: &musterpb.Command_GiveUpCheck{GiveUpCheck: &musterpb.GiveUpCheck{Check: first, Reason: "no further owner could run it"}}}
	}
	return nil
}

func createKey(account, text string, role musterpb.Role) *musterpb.Command {
	hash := sha256.Sum256([]byte(text))
	return &musterpb.Command{Body: &musterpb.Command_CreateKey{CreateKey: &musterpb.CreateKey{Account: account, Hash: hash[:], Role: role}}}
}

func deposit(account string, amount int64) *musterpb.Command {
	return &musterpb.Command{Body: &musterpb.Command_Deposit{Deposit: &musterpb.Deposit{Account: account, AmountMicroUsd: amount}}}
}

func registerTip(node string, tip []byte) *musterpb.Command {
	return &musterpb.Command{Body: &musterpb.Command_RegisterTip{RegisterTip: &musterpb.RegisterTip{Node: node, Tip: tip}}}
}

func commit(attempt, root string) *musterpb.Command {
	sum := sha256.Sum256([]byte(root))
	return &musterpb.Command{Body: &musterpb.Command_CommitResult{CommitResult: &musterpb.CommitResult{Commit: &musterpb.Commit{Attempt: attempt, Root: sum[:]}}}}
}

func end(attempt string, state musterpb.AttemptState, blame musterpb.Blame, exit int32) *musterpb.Command {
	return &musterpb.Command{Body: &musterpb.Command_EndAttempt{EndAttempt: &musterpb.EndAttempt{
		Attempt: attempt, State: state, Blame: blame, ExitCode: exit, Reason: fmt.Sprintf("%s, exit %d", strings.ToLower(strings.TrimPrefix(blame.String(), "BLAME_")), exit),
	}}}
}

func (w *world) worker(name string, a args) *musterpb.Command {
	key := keyOf(name)
	id := string(api.WorkerIDOf(key))
	w.ids[name], w.names[id] = id, name
	c := &musterpb.Capacity{MilliCpus: 8000, MemoryBytes: 32 << 30, DiskBytes: 100 << 30, Runtimes: []string{"docker"}, Platform: "linux/amd64"}
	for i := range a.int("gpus", 0) {
		c.Devices = append(c.Devices, &musterpb.Device{Index: uint32(i), Uuid: fmt.Sprintf("gpu-%d", i), MemoryBytes: 24 << 30, Architecture: "Ada", Driver: "570.1"})
	}
	return &musterpb.Command{Body: &musterpb.Command_RegisterWorker{RegisterWorker: &musterpb.RegisterWorker{Worker: &musterpb.Worker{
		Id: id, PublicKey: key, Owner: a.get("owner", "bob"), Name: name, Capacity: c, PriceMicroUsdPerHour: dollars(a.get("price", "0.20")),
	}}}}
}

func submitJob(id string, a args) *musterpb.Command {
	digest := string(api.DigestOf([]byte("image")))
	items := uint64(a.int("items", 1))
	key := sha256.Sum256([]byte("permutation of " + id))
	return &musterpb.Command{Body: &musterpb.Command_SubmitJob{SubmitJob: &musterpb.SubmitJob{
		Job: id, Account: a.get("account", "acme"), PermutationKey: key[:],
		Spec: &musterpb.JobSpec{
			Name: id, Image: &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_REGISTRY, Ref: "host/app@" + digest, Digest: digest, Name: "host/app"},
			Items: &musterpb.Items{Count: items}, Chunk: uint32(a.int("chunk", 1)),
			Resources: &musterpb.Resources{MilliCpus: 1000, MemoryBytes: 1 << 30, DiskBytes: 1 << 30, Gpus: uint32(a.int("gpus", 0))},
			TimeoutMs: duration(a.get("timeout", "1h")), Retries: uint32(a.int("retries", 2)),
			MaxPriceMicroUsdPerHour: dollars(a.get("price", "0.40")), BudgetMicroUsd: dollars(a.get("budget", "4.00")),
			Verify: &musterpb.Verify{Comparator: "exact", RatePpm: uint32(a.int("rate", 30_000)), SameOwner: a.get("same_owner", "") == "yes"},
		},
	}}}
}

func (w *world) place(id string, a args) *musterpb.Command {
	cmd := &musterpb.PlaceAttempt{
		Attempt: id, Job: a.get("job", ""), Task: uint32(a.int("task", 0)), Check: a.get("check", ""), Worker: w.id(a.get("worker", "")),
		Class: a.get("class", "cpu/linux/amd64"), Relaxed: a.get("relaxed", ""),
	}
	if check := w.Check(cmd.Check); check != nil {
		cmd.Job = a.get("job", check.Job)
		if _, given := a.named["task"]; !given {
			cmd.Task = w.Attempt(check.Target).Task
		}
	}
	if d := a.get("devices", ""); d != "" {
		cmd.Devices = strings.Split(d, ",")
	}
	return &musterpb.Command{Body: &musterpb.Command_PlaceAttempt{PlaceAttempt: cmd}}
}

func (w *world) closeCommand(a args) *musterpb.Command {
	waiting, _, epoch, digest := w.Committed()
	n := int(a.int("attempts", int64(waiting)))
	if n > 0 && n < waiting {
		digest = w.batchDigest(epoch, w.openBatch[:n])
	}
	return &musterpb.Command{Body: &musterpb.Command_CloseBatch{CloseBatch: &musterpb.CloseBatch{
		Epoch: uint64(a.int("epoch", int64(epoch))), Digest: append(digest, a.get("damage", "")...), Attempts: uint32(n),
	}}}
}

func (w *world) revealCommand(node string, a args) *musterpb.Command {
	r := &musterpb.Reveal{Node: w.id(node), Epoch: uint64(a.int("epoch", int64(w.Epoch())))}
	if n := w.Node(r.Node); n != nil && len(w.chains[node]) > 0 {
		r.Value = w.chains[node][n.Reveals+1+uint64(a.int("skip", 0))]
	}
	return &musterpb.Command{Body: &musterpb.Command_Reveal{Reveal: &musterpb.RevealValue{Reveal: r}}}
}

// sealCommand seals what the state finds sealable, with what the words change
// of it.
func (w *world) sealCommand(a args) *musterpb.Command {
	seal := w.Sealable(int(a.int("limit", 1000))).Seal
	if jobs, given := a.named["jobs"]; given {
		seal.Jobs = strings.FieldsFunc(jobs, func(r rune) bool { return r == ',' })
	}
	segment := seal.Segment
	segment.Jobs = uint64(a.int("count", int64(len(seal.Jobs))))
	seal.ThroughTransfer = uint64(a.int("transfer", int64(seal.ThroughTransfer)))
	seal.ThroughEpoch = uint64(a.int("epoch", int64(seal.ThroughEpoch)))
	segment.LastTransfer, segment.LastEpoch = seal.ThroughTransfer, seal.ThroughEpoch
	if w.sealedEpoch < seal.ThroughEpoch {
		segment.FirstEpoch = w.sealedEpoch + 1
	}
	segment.Digest, segment.Bytes = segmentDigest(a.word(0)), a.int("bytes", 100)
	return &musterpb.Command{Body: &musterpb.Command_Seal{Seal: seal}}
}

// segmentDigest is the digest of a segment that a transcript calls by a name.
func segmentDigest(name string) string {
	if name == "nothing" {
		return "sha256:nothing"
	}
	return string(api.DigestOf([]byte(name)))
}

// mergeCommand merges the segments that the words name into the first of them.
func (w *world) mergeCommand(a args) *musterpb.Command {
	cmd := &musterpb.MergeSegments{}
	var replaced []*musterpb.Segment
	for _, name := range a.words[1:] {
		digest := segmentDigest(name)
		cmd.Replaced = append(cmd.Replaced, digest)
		for _, o := range w.Segments() {
			if o.Digest == digest {
				replaced = append(replaced, o)
			}
		}
	}
	cmd.Segment = sumOf(replaced)
	cmd.Segment.Digest, cmd.Segment.Bytes, cmd.Segment.Level = segmentDigest(a.word(0)), a.int("bytes", 100), 1
	cmd.Segment.Jobs += uint64(a.int("more", 0))
	return &musterpb.Command{Body: &musterpb.Command_MergeSegments{MergeSegments: cmd}}
}

// compare reads "ok" or "mismatch" for all pairs that are missing, or the
// pairs themselves: a~b agree, a!~b differ.
func (w *world) compare(check string, how []string) *musterpb.Command {
	cmd := &musterpb.RecordComparisons{Check: check}
	for _, word := range how {
		if word == "ok" || word == "mismatch" {
			for _, c := range w.ToCompare() {
				if c.Check.Id == check {
					for _, p := range c.Pairs {
						cmd.Comparisons = append(cmd.Comparisons, comparison(p[0], p[1], word == "ok"))
					}
				}
			}
			continue
		}
		if x, y, differ := strings.Cut(word, "!~"); differ {
			cmd.Comparisons = append(cmd.Comparisons, comparison(x, y, false))
		} else {
			x, y, _ := strings.Cut(word, "~")
			cmd.Comparisons = append(cmd.Comparisons, comparison(x, y, true))
		}
	}
	return &musterpb.Command{Body: &musterpb.Command_RecordComparisons{RecordComparisons: cmd}}
}

func comparison(a, b string, match bool) *musterpb.Comparison {
	c := &musterpb.Comparison{A: a, B: b, Match: match}
	if !match {
		c.Detail = fmt.Sprintf("item 0: %s and %s differ", a, b)
	}
	return c
}

// life runs the next n tasks of a job on one worker, each checked by another
// owner's and found right.
func (w *world) life(a args) []string {
	w.brief = true
	for range a.int("tasks", 1) {
		job := w.Job(a.word(0))
		id := fmt.Sprintf("%s-t%d", job.Id, job.NextTask)
		w.must("place", id, "job="+job.Id, fmt.Sprintf("task=%d", job.NextTask), "worker="+a.get("worker", "w1"))
		w.must("start", id)
		w.clock += duration(a.get("for", "6m"))
		w.must("commit", id)
		w.must("close")
		for _, n := range w.Drawing().GetCommittee() {
			w.must("reveal", w.name(n))
		}
		if check := w.Check(checkID(id)); check != nil {
			w.must("place", "chk-run-"+id, "check="+check.Id, "worker="+a.get("checker", "w2"))
			w.must("start", "chk-run-"+id)
			w.clock += duration(a.get("for", "6m"))
			w.must("commit", "chk-run-"+id)
			w.must("compare", check.Id, "ok")
		}
	}
	return nil
}

func (w *world) must(words ...string) {
	w.t.Helper()
	if got := w.run(words); len(got) != 1 || got[0] != "ok" {
		w.t.Fatalf("%v: %v", words, got)
	}
}

func (w *world) queued() (lines []string) {
	for _, work := range w.Queued() {
		line := "queued of " + work.Job.Id + ":"
		for _, t := range work.Requeued {
			line += fmt.Sprintf(" task %d", t.Number)
			if len(t.AvoidOwners) > 0 {
				line += fmt.Sprintf(" (not by %s)", strings.Join(t.AvoidOwners, ", "))
			}
		}
		for n := work.Next; n < work.End; n++ {
			line += fmt.Sprintf(" task %d", n)
		}
		for _, c := range work.Checks {
			line += fmt.Sprintf(" %s (%d runs", c.Check.Id, c.Runs)
			for _, p := range c.Parties {
				line += ", not by " + p.Owner
			}
			for _, owner := range c.Tried {
				line += ", tried by " + owner
			}
			if c.Unpaid != "" {
				line += ", " + c.Unpaid
			}
			line += ")"
		}
		lines = append(lines, line)
	}
	if lines == nil {
		lines = []string{"nothing is queued"}
	}
	return lines
}

// describe is the state in one line per thing. The first byte of a key orders
// the kinds.
func (w *world) describe() map[string]string {
	s := w.Snapshot()
	d := map[string]string{}
	for _, n := range s.nodes {
		text := fmt.Sprintf("in the committee, %d reveals", n.Reveals)
		if len(n.Tip) == 0 {
			text = "not in the committee" + because(n.LeftReason)
		}
		d["1node "+w.name(n.Id)] = text
	}
	for wk := range s.workers.Values() {
		text := fmt.Sprintf("of %s, %s/h", wk.Owner, api.MicroUSD(wk.PriceMicroUsdPerHour))
		if wk.Finished > 0 {
			text += fmt.Sprintf(", finished %d", wk.Finished)
		}
		if wk.Failed > 0 {
			text += fmt.Sprintf(", failed %d", wk.Failed)
		}
		if wk.Caught > 0 {
			text += fmt.Sprintf(", caught %d", wk.Caught)
		}
		if wk.BackoffUntilUnixMs > w.clock {
			text += fmt.Sprintf(", waits %s", time.Duration(wk.BackoffUntilUnixMs-w.clock)*time.Millisecond)
		}
		if wk.Draining {
			text += ", draining"
		}
		d["2worker "+w.name(wk.Id)] = text
	}
	for j := range s.jobs.Values() {
		text := fmt.Sprintf("%s%s, %d/%d tasks placed, items %d committed %d verified of %d, %d live, %d checks open",
			StateName(j.State), because(j.Reason), j.NextTask, j.Tasks, j.ItemsCommitted, j.ItemsVerified, j.Items, j.LiveAttempts, j.OpenChecks)
		if len(j.Requeued) > 0 {
			text += fmt.Sprintf(", requeued %v", j.Requeued)
		}
		if j.Caught > 0 {
			text += fmt.Sprintf(", caught %d", j.Caught)
		}
		if j.SpentMicroUsd > 0 {
			text += fmt.Sprintf(", spent %s", api.MicroUSD(j.SpentMicroUsd))
		}
		if j.Settled {
			text += ", settled"
		}
		d["3job "+j.Id] = text
	}
	for t := range s.tasks.Values() {
		if s.isDropped(t.Job) {
			continue
		}
		text := StateName(t.State)
		if t.Result != "" {
			text += " by " + t.Result
		}
		if t.Failures > 0 {
			text += fmt.Sprintf(", %d failures", t.Failures)
		}
		if len(t.AvoidOwners) > 0 {
			text += ", not by " + strings.Join(t.AvoidOwners, ", ")
		}
		d[fmt.Sprintf("4task %s/%02d", t.Job, t.Number)] = text
	}
	for a := range s.attempts.Values() {
		if s.isDropped(a.Job) {
			continue
		}
		text := fmt.Sprintf("%s%s on %s", StateName(a.State), because(w.rename(a.Reason)), w.name(a.Worker))
		if a.Payer == "network" {
			text += ", at the network's expense"
		}
		if a.PaidMicroUsd > 0 {
			text += fmt.Sprintf(", paid %s", api.MicroUSD(a.PaidMicroUsd))
		}
		d["5attempt "+a.Id] = text
	}
	for c := range s.checks.Values() {
		if s.isDropped(c.Job) {
			continue
		}
		text := fmt.Sprintf("%s%s, %d items of %s", strings.TrimPrefix(c.Verdict.String(), "VERDICT_"), because(c.Reason), len(c.Items), c.Target)
		if len(c.Runs) > 0 {
			text += " by " + strings.Join(c.Runs, ", ")
		}
		if c.Relaxed != "" {
			text += "; relaxed: " + c.Relaxed
		}
		d["6check "+c.Id] = text
	}
	for b := range s.batches.Values() {
		text := fmt.Sprintf("%v, %d of %d reveals", b.Attempts, len(b.Reveals), len(b.Committee))
		if b.Drawn {
			text += ", drawn"
		}
		if b.FailedClosed {
			text += ", everything is checked"
		}
		d[fmt.Sprintf("7batch %d", b.Epoch)] = text
	}
	for i, o := range s.segments {
		name := o.Digest[:15]
		d[fmt.Sprintf("Asegment %d", i+1)] = fmt.Sprintf("%s, level %d: %s", name, o.Level, contentOf(o))
	}
	for k, r := range s.data.records.All() {
		d["8record "+k.owner] = fmt.Sprintf("%d passed, %d offences (%s)", r.Passed, r.Offences, k.class)
	}
	for _, name := range w.ledger.Accounts() {
		a := w.ledger.Account(name)
		text := a.Balance.String()
		if a.Held > 0 {
			text += fmt.Sprintf(", %s held", a.Held)
		}
		if a.Expected > 0 {
			text += fmt.Sprintf(", %s expected", a.Expected)
		}
		d["9money "+name] = text
	}
	return d
}
