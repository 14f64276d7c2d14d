package server_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/musterpb/musterpbconnect"
	"github.com/musternet/muster/api/server"
	"github.com/musternet/muster/scheduler/archive"
)

// clock is what the commands of these tests are stamped with.
const clock = 1_700_000_000_000

func (b *bench) worker(owner string) string {
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		b.t.Fatal(err)
	}
	return b.apply(&musterpb.Command{TimeUnixMs: clock, Body: &musterpb.Command_RegisterWorker{RegisterWorker: &musterpb.RegisterWorker{Worker: &musterpb.Worker{
		Id: string(api.WorkerIDOf(public)), PublicKey: public, Owner: owner, PriceMicroUsdPerHour: 3600,
		Capacity: &musterpb.Capacity{MilliCpus: 1 << 40, MemoryBytes: 1 << 50, DiskBytes: 1 << 50, Runtimes: []string{"wasm"}, Platform: "linux/amd64"},
	}}}})
}

func (b *bench) submit(key string, tasks int) string {
	b.t.Helper()
	spec := b.spec()
	spec.Items, spec.Chunk, spec.BudgetMicroUsd, spec.MaxPriceMicroUsdPerHour = &musterpb.Items{Count: uint64(tasks)}, 1, 1e8, 1e5
	resp, err := b.client(key, 0).SubmitJob(b.t.Context(), connect.NewRequest(&musterpb.SubmitJobRequest{Id: client.NewID(), Spec: spec}))
	if err != nil {
		b.t.Fatal(err)
	}
	return resp.Msg.Job
}

// run places an attempt of a task, or of a check, and commits its result.
func (b *bench) run(job string, task uint32, check, worker string) {
	b.t.Helper()
	b.attempts++
	id := fmt.Sprintf("att-%016x", b.attempts)
	now := time.Now().UnixMilli()
	b.apply(&musterpb.Command{TimeUnixMs: now, Body: &musterpb.Command_PlaceAttempt{PlaceAttempt: &musterpb.PlaceAttempt{Attempt: id, Job: job, Task: task, Check: check, Worker: worker}}})
	b.apply(&musterpb.Command{TimeUnixMs: now + 5, Body: &musterpb.Command_StartAttempt{StartAttempt: &musterpb.StartAttempt{Attempt: id}}})
	if b.attempts%7 == 3 && check == "" { // it fails, and another takes its place
		b.apply(&musterpb.Command{TimeUnixMs: now + 9, Body: &musterpb.Command_EndAttempt{EndAttempt: &musterpb.EndAttempt{
			Attempt: id, State: musterpb.AttemptState_ATTEMPT_STATE_LOST, Reason: "silent", Blame: musterpb.Blame_BLAME_NETWORK, LogDigest: string(api.DigestOf([]byte(id))),
		}}})
		b.run(job, task, check, worker)
		return
	}
	b.apply(&musterpb.Command{TimeUnixMs: now + 1000, Body: &musterpb.Command_CommitResult{CommitResult: &musterpb.CommitResult{Commit: &musterpb.Commit{
		Attempt: id, Root: []byte(id), ManifestDigest: string(api.DigestOf([]byte(id + "m"))), ArchiveDigest: string(api.DigestOf([]byte(id + "a"))),
		ArchiveBytes: 100, OutputBytes: 200, LogDigest: string(api.DigestOf([]byte(id + "l"))), Leaves: 1,
	}}}})
}

// finish runs and checks whatever waits, until every job is settled.
func (b *bench) finish(worker, checker string) {
	b.t.Helper()
	for b.st.LiveJobs() > 0 {
		for _, w := range b.st.Queued() {
			for _, t := range w.Requeued {
				b.run(w.Job.Id, t.Number, "", worker)
			}
			for n := w.Next; n < w.End; n++ {
				b.run(w.Job.Id, n, "", worker)
			}
			for _, c := range w.Checks {
				b.run(w.Job.Id, b.st.Attempt(c.Check.Target).Task, c.Check.Id, checker)
			}
		}
		if n, free, epoch, digest := b.st.Committed(); n > 0 && free {
			b.apply(&musterpb.Command{Body: &musterpb.Command_CloseBatch{CloseBatch: &musterpb.CloseBatch{Epoch: epoch, Digest: digest, Attempts: uint32(n)}}})
		}
		for _, c := range b.st.ToCompare() {
			record := &musterpb.RecordComparisons{Check: c.Check.Id}
			for _, pair := range c.Pairs {
				record.Comparisons = append(record.Comparisons, &musterpb.Comparison{A: pair[0], B: pair[1], Match: true})
			}
			b.apply(&musterpb.Command{Body: &musterpb.Command_RecordComparisons{RecordComparisons: record}})
		}
	}
}

// seal seals what is finished.
func (b *bench) seal() *musterpb.Segment {
	b.t.Helper()
	seal := b.st.Sealable(1 << 20).Seal
	var data bytes.Buffer
	segment, err := archive.Write(b.t.Context(), &data, b.st.SealContent(seal), func(job string) string { return b.st.Job(job).GetAccount() })
	if err != nil {
		b.t.Fatal(err)
	}
	seal.Segment = segment
	b.apply(&musterpb.Command{Body: &musterpb.Command_Seal{Seal: seal}})
	if _, err := b.blobs.Put(b.t.Context(), api.Digest(segment.Digest), &data, blob.NoLimit); err != nil {
		b.t.Fatal(err)
	}
	return segment
}

// answers collects what the API says, in the order that it was asked.
type answers struct {
	*bench
	text strings.Builder
	key  string
}

func ask[Req any, Resp any, M interface {
	*Resp
	proto.Message
}](a *answers, what string, f func(context.Context, *connect.Request[Req]) (*connect.Response[Resp], error), req *Req) M {
	resp, err := f(a.t.Context(), connect.NewRequest(req))
	fmt.Fprintf(&a.text, "\n== %s: %s\n", a.key, what)
	if err != nil {
		fmt.Fprintln(&a.text, api.FromConnect(err))
		return new(Resp)
	}
	text, err := protojson.MarshalOptions{Multiline: false}.Marshal(M(resp.Msg))
	if err != nil {
		a.t.Fatal(err)
	}
	a.text.Write(bytes.ReplaceAll(text, []byte(`": "`), []byte(`":"`))) // protojson varies its spaces on purpose
	return resp.Msg
}

// everything asks all there is to ask about some jobs.
func (b *bench) everything(jobs []string, node int) string {
	a := &answers{bench: b}
	for _, a.key = range []string{"acme", "reader", "evil", "admin"} {
		c := b.client(a.key, node)
		about := append(slices.Clone(jobs), "job-unknown")
		if a.key == "reader" || a.key == "admin" {
			about = about[:2] // who may see one may see the others, and one of them is large
		}
		for _, job := range about {
			ask(a, "show "+job, c.GetJob, &musterpb.GetJobRequest{Job: job})
			for n, more := uint32(0), true; more; {
				page := ask(a, fmt.Sprint("detail of ", job, " from ", n), c.GetJob, &musterpb.GetJobRequest{Job: job, Detail: true, AfterTask: n})
				n = page.NextTask
				more = n > 0
			}
			for _, provisional := range []bool{false, true} {
				for n, more := uint32(0), true; more; {
					page := ask(a, fmt.Sprint("results of ", job, " from ", n), c.GetResults, &musterpb.GetResultsRequest{Job: job, AfterTask: n, Provisional: provisional})
					n = page.NextTask
					more = n > 0
				}
			}
			logs := ask(a, "logs of "+job, c.GetLogs, &musterpb.GetLogsRequest{Job: job})
			for i, l := range logs.Logs {
				if i%50 == 0 {
					ask(a, "log of "+l.Attempt, c.GetLogs, &musterpb.GetLogsRequest{Job: job, Attempt: l.Attempt})
				}
			}
			ask(a, "log of another's attempt", c.GetLogs, &musterpb.GetLogsRequest{Job: job, Attempt: "att-x"})
			ask(a, "cancel "+job, c.CancelJob, &musterpb.CancelJobRequest{Job: job})
			ask(a, "fund "+job, c.FundJob, &musterpb.FundJobRequest{Id: client.NewID(), Job: job, AmountMicroUsd: 5})
			stream, err := c.WatchJob(b.t.Context(), connect.NewRequest(&musterpb.GetJobRequest{Job: job}))
			for err == nil && stream.Receive() {
				fmt.Fprintf(&a.text, "\n== watch %s: %v %d %v", job, stream.Msg().Job.State, stream.Msg().Job.Attempts, stream.Msg().Job.Spec != nil)
			}
			if err == nil {
				fmt.Fprintln(&a.text, api.FromConnect(stream.Err()))
				stream.Close()
			}
		}
		for _, account := range []string{"", "acme", "evil"} {
			ask(a, "jobs of "+account, c.ListJobs, &musterpb.ListJobsRequest{Account: account})
			ask(a, "newest of "+account, c.ListJobs, &musterpb.ListJobsRequest{Account: account, Limit: 2})
			ask(a, "jobs before the third of "+account, c.ListJobs, &musterpb.ListJobsRequest{Account: account, Before: 3})
			ask(a, "balance of "+account, c.GetAccount, &musterpb.GetAccountRequest{Account: account})
			for after, more := uint64(0), true; more; {
				page := ask(a, fmt.Sprint("transfers of ", account, " after ", after), c.ListTransfers, &musterpb.ListTransfersRequest{Account: account, After: after})
				for _, t := range page.Transfers {
					after = t.Id
				}
				more = page.More
			}
		}
		ask(a, "every transfer", c.ListTransfers, &musterpb.ListTransfersRequest{All: true})
		ask(a, "every balance", c.GetAccount, &musterpb.GetAccountRequest{Account: "*"})
	}
	return a.text.String()
}

// Nobody can tell from an answer whether what it is about was sealed.
func TestSealedAnswersAreTheSame(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.apply(&musterpb.Command{Body: &musterpb.Command_Deposit{Deposit: &musterpb.Deposit{Account: "evil", AmountMicroUsd: 1e9}}})
	for _, owner := range []string{"owner-1", "owner-2"} {
		b.apply(&musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: owner}}})
	}
	worker, checker := b.worker("owner-1"), b.worker("owner-2")
	jobs := []string{b.job, b.submit("acme", 30), b.submit("evil", 3), b.submit("acme", 1)}
	cancelled := b.submit("acme", 1500)
	for n := range uint32(1010) { // more than a page of results
		b.run(cancelled, n, "", worker)
	}
	if err := call(t.Context(), b.client("acme", 0).CancelJob, &musterpb.CancelJobRequest{Job: cancelled}); err != nil {
		t.Fatal(err)
	}
	b.finish(worker, checker)
	jobs = append(jobs, cancelled)
	first := b.everything(jobs, 0)
	if again := b.everything(jobs, 0); again != first {
		diff(t, "asking twice", first, again)
	}
	b.seal()
	for _, job := range jobs {
		if b.st.Job(job) != nil {
			t.Fatalf("job %s was not sealed", job)
		}
	}
	diff(t, "after sealing", first, b.everything(jobs, 0))

	// What came since is beside what was sealed, and leaves no gap when it is
	// sealed, too. A follower answers the same.
	jobs = append(jobs, b.submit("acme", 5), b.submit("evil", 1))
	b.finish(worker, checker)
	second := b.everything(jobs, 0)
	diff(t, "through a follower", second, b.everything(jobs, 1))
	b.seal()
	diff(t, "after sealing again", second, b.everything(jobs, 0))
}

// A large job comes page by page, and the pages are the same once it is sealed:
// it may be between two of them.
func TestPagesOfALargeJob(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.apply(&musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: "owner-1"}}})
	worker, job := b.worker("owner-1"), b.submit("acme", 20_000)
	for n := range uint32(archive.PageAttempts + 2000) {
		b.run(job, n, "", worker)
	}
	if err := call(t.Context(), b.client("acme", 0).CancelJob, &musterpb.CancelJobRequest{Job: job}); err != nil {
		t.Fatal(err)
	}
	b.finish(worker, b.worker("acme"))
	c := b.client("acme", 0)
	type page struct {
		job  *musterpb.GetJobResponse
		logs *musterpb.GetLogsResponse
	}
	read := func(from uint32) page {
		t.Helper()
		got, err := c.GetJob(t.Context(), connect.NewRequest(&musterpb.GetJobRequest{Job: job, Detail: true, AfterTask: from}))
		if err != nil {
			t.Fatal(err)
		}
		logs, err := c.GetLogs(t.Context(), connect.NewRequest(&musterpb.GetLogsRequest{Job: job, AfterTask: from}))
		if err != nil {
			t.Fatal(err)
		}
		return page{got.Msg, logs.Msg}
	}
	var pages []page
	attempts := 0
	for from, more := uint32(0), true; more; {
		p := read(from)
		attempts += len(p.job.Attempts)
		if len(p.job.Attempts) == 0 || proto.Size(p.job) > 2*archive.PageBytes {
			t.Fatalf("a page from task %d on has %d attempts and %d bytes", from, len(p.job.Attempts), proto.Size(p.job))
		}
		pages, from = append(pages, p), p.job.NextTask
		more = from > 0
	}
	if all := b.st.Attempts(job); len(pages) < 2 || attempts != len(all) {
		t.Fatalf("%d attempts on %d pages, of %d", attempts, len(pages), len(all))
	}
	b.seal()
	from := uint32(0)
	for _, want := range pages {
		got := read(from)
		if !proto.Equal(got.job, want.job) || !proto.Equal(got.logs, want.logs) {
			t.Errorf("the page from task %d on is another once the job is sealed: %d attempts and %d", from, len(got.job.Attempts), len(want.job.Attempts))
		}
		from = want.job.NextTask
	}
}

// diff reports the first lines that differ.
func diff(t *testing.T, what, before, after string) {
	t.Helper()
	a, b := strings.Split(before, "\n"), strings.Split(after, "\n")
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			question := ""
			for j := i; j >= 0 && question == ""; j-- {
				if strings.HasPrefix(a[j], "== ") {
					question = a[j]
				}
			}
			from := 0
			for from < min(len(a[i]), len(b[i])) && a[i][from] == b[i][from] {
				from++
			}
			from = max(0, from-100)
			t.Fatalf("%s: %s\nwas …%.600s\nis  …%.600s", what, question, a[i][from:], b[i][from:])
		}
	}
	if len(a) != len(b) {
		t.Fatalf("%s: %d lines where there were %d", what, len(b), len(a))
	}
	if len(a) < 100 {
		t.Fatalf("only %d lines were compared", len(a))
	}
}

// A command that is repeated after its job was sealed gets its first answer.
func TestRepeatAfterSealing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for _, owner := range []string{"owner-1", "owner-2"} {
		b.apply(&musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: owner}}})
	}
	spec := b.spec()
	resp, err := b.client("acme", 0).SubmitJob(t.Context(), connect.NewRequest(&musterpb.SubmitJobRequest{Id: "the-request", Spec: spec}))
	if err != nil {
		t.Fatal(err)
	}
	job := resp.Msg.Job
	fund := &musterpb.FundJobRequest{Id: "more-money", Job: job, AmountMicroUsd: 1000}
	if err := call(t.Context(), b.client("acme", 0).FundJob, fund); err != nil {
		t.Fatal(err)
	}
	b.finish(b.worker("owner-1"), b.worker("owner-2"))
	b.seal()
	if err := call(t.Context(), b.client("acme", 0).FundJob, fund); err != nil {
		t.Errorf("the same request again: %v", err)
	}
	b.want("another", call(t.Context(), b.client("acme", 0).FundJob, &musterpb.FundJobRequest{Id: "yet-more-money", Job: job, AmountMicroUsd: 1}), api.Conflict, "is verified already")
	again, err := b.client("acme", 0).SubmitJob(t.Context(), connect.NewRequest(&musterpb.SubmitJobRequest{Id: "the-request", Spec: spec}))
	if err != nil || again.Msg.Job != job {
		t.Errorf("submitting again: %v, %v; want %s", again, err, job)
	}
}

// History that can't be read is an error, and not an answer without it.
func TestUnreadableHistory(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for _, owner := range []string{"owner-1", "owner-2"} {
		b.apply(&musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: owner}}})
	}
	b.finish(b.worker("owner-1"), b.worker("owner-2"))
	segment := b.seal()
	if err := b.blobs.Delete(t.Context(), api.Digest(segment.Digest)); err != nil {
		t.Fatal(err)
	}
	c, admin := b.client("acme", 0), b.client("admin", 0)
	for what, err := range map[string]error{
		"show":      call(t.Context(), c.GetJob, &musterpb.GetJobRequest{Job: b.job}),
		"list":      call(t.Context(), c.ListJobs, &musterpb.ListJobsRequest{}),
		"transfers": call(t.Context(), c.ListTransfers, &musterpb.ListTransfersRequest{}),
		"cancel":    call(t.Context(), c.CancelJob, &musterpb.CancelJobRequest{Job: b.job}),
	} {
		b.want(what, err, api.Unavailable, "sealed work can't be read now")
		if strings.Contains(err.Error(), "sha256:") {
			t.Errorf("%s: a customer is told the name of a segment, which holds everybody's work: %v", what, err)
		}
	}
	stream, err := c.WatchJob(t.Context(), connect.NewRequest(&musterpb.GetJobRequest{Job: b.job}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if stream.Receive() {
		t.Errorf("a watch of a job that can't be read got %v", stream.Msg())
	}
	b.want("watch", stream.Err(), api.Unavailable, "sealed work can't be read now")
	b.want("an admin", call(t.Context(), admin.GetJob, &musterpb.GetJobRequest{Job: b.job}), api.Unavailable, segment.Digest)
	if err := call(t.Context(), c.GetAccount, &musterpb.GetAccountRequest{}); err != nil {
		t.Errorf("a balance needs no history: %v", err)
	}
}

// What a customer is not told is in the log.
func TestUnreadableHistoryIsLogged(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for _, owner := range []string{"owner-1", "owner-2"} {
		b.apply(&musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: owner}}})
	}
	b.finish(b.worker("owner-1"), b.worker("owner-2"))
	segment := b.seal()
	if err := b.blobs.Delete(t.Context(), api.Digest(segment.Digest)); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	handler := server.New(server.Config{
		State: b.st, Scheduler: b.leader, Cluster: b.leader, History: archive.New(b.blobs, b.st, archive.DefaultCache),
		Blobs: b.blobs, Local: b.local, Logger: slog.New(slog.NewTextHandler(&log, nil)),
	}).Handler()
	req := httptest.NewRequestWithContext(t.Context(), "POST", musterpbconnect.MusterGetJobProcedure, strings.NewReader(`{"job": "`+b.job+`"}`))
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+b.keys["acme"])
	resp := httptest.NewRecorder()
	handler.ServeHTTP(resp, req)
	if resp.Code != http.StatusServiceUnavailable || strings.Contains(resp.Body.String(), "sha256:") {
		t.Errorf("status %d: %s", resp.Code, resp.Body)
	}
	if !strings.Contains(log.String(), "sealed work could not be read") || !strings.Contains(log.String(), segment.Digest) {
		t.Errorf("the log says %q", log.String())
	}
}

// A segment holds every account's work: it is for schedulers and admins alone,
// also for whoever has learned its name.
func TestSegmentsAreNobodysBlobs(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for _, owner := range []string{"owner-1", "owner-2"} {
		b.apply(&musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: owner}}})
	}
	b.finish(b.worker("owner-1"), b.worker("owner-2"))
	segment := b.seal()
	other := api.DigestOf([]byte("another blob"))
	if _, err := b.blobs.Put(t.Context(), other, strings.NewReader("another blob"), blob.NoLimit); err != nil {
		t.Fatal(err)
	}
	node := server.NodeAuthorization(b.second.id, b.nodeKey, time.Now())
	for _, test := range []struct {
		who, method, authorization string
		digest                     api.Digest
		want                       int
	}{
		{"a customer", "GET", "Bearer " + b.keys["acme"], api.Digest(segment.Digest), 404},
		{"a customer", "HEAD", "Bearer " + b.keys["acme"], api.Digest(segment.Digest), 404},
		{"a customer", "POST", "Bearer " + b.keys["acme"], api.Digest(segment.Digest), 404},
		{"a reader", "GET", "Bearer " + b.keys["reader"], api.Digest(segment.Digest), 404},
		{"a customer, another blob", "GET", "Bearer " + b.keys["acme"], other, 200},
		{"an admin", "GET", "Bearer " + b.keys["admin"], api.Digest(segment.Digest), 200},
		{"a scheduler", "GET", node, api.Digest(segment.Digest), 200},
	} {
		req, err := http.NewRequestWithContext(t.Context(), test.method, "http://"+b.addresses[0]+blob.Path(test.digest), nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", test.authorization)
		resp, err := b.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != test.want {
			t.Errorf("%s, %s: status %d, want %d", test.who, test.method, resp.StatusCode, test.want)
		}
	}
}

// A watch sends the specification once, and again when it changed.
func TestWatchSendsTheSpecificationOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for _, owner := range []string{"owner-1", "owner-2"} {
		b.apply(&musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: owner}}})
	}
	worker, checker := b.worker("owner-1"), b.worker("owner-2")
	stream, err := b.client("acme", 0).WatchJob(t.Context(), connect.NewRequest(&musterpb.GetJobRequest{Job: b.job}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var last *musterpb.Job
	next := func() (with bool) {
		t.Helper()
		if !stream.Receive() {
			t.Fatalf("the watch ended: %v", stream.Err())
		}
		with = stream.Msg().Job.Spec != nil
		last = client.Watched(last, stream.Msg().Job)
		return with
	}
	if !next() {
		t.Error("the first message has no specification")
	}
	b.run(b.job, 0, "", worker)
	for last.ItemsCommitted == 0 {
		if next() {
			t.Error("the specification came twice")
		}
	}
	budget := last.Spec.BudgetMicroUsd
	if err := call(t.Context(), b.client("acme", 0).FundJob, &musterpb.FundJobRequest{Id: client.NewID(), Job: b.job, AmountMicroUsd: 1000}); err != nil {
		t.Fatal(err)
	}
	for last.Spec.BudgetMicroUsd == budget {
		next()
	}
	b.finish(worker, checker)
	b.seal() // before the watch looks again, as a rule
	for !last.Settled {
		next()
	}
	if last.Spec == nil || len(last.PermutationKey) == 0 || last.State != musterpb.JobState_JOB_STATE_VERIFIED {
		t.Errorf("at the end the client has %v", last)
	}
	if stream.Receive() || stream.Err() != nil {
		t.Errorf("after the end: %v, %v", stream.Msg(), stream.Err())
	}
}
