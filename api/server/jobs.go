package server

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// read makes the reads of a call linearizable, unless it asked for stale ones.
func (s *Server) read(req connect.AnyRequest) error {
	if req.Header().Get(HeaderRead) == "stale" {
		return nil
	}
	return s.Scheduler.CheckRead()
}

// SubmitJob implements Muster.
func (s *Server) SubmitJob(ctx context.Context, req *connect.Request[musterpb.SubmitJobRequest]) (*connect.Response[musterpb.SubmitJobResponse], error) {
	m := req.Msg
	account, err := accountFor(ctx, m.Account, true)
	if err != nil {
		return nil, err
	}
	if err := checkRequestID(m.Id); err != nil {
		return nil, err
	}
	if err := jobspec.Validate(m.Spec); err != nil {
		return nil, err
	}
	if err := s.checkBlobs(ctx, m.Spec); err != nil {
		return nil, err
	}
	if err := s.checkPlatforms(m.Spec); err != nil {
		return nil, err
	}
	key := make([]byte, 32)
	if _, err := rand.Read(key); err != nil {
		return nil, fmt.Errorf("making the permutation key: %w", err)
	}
	cmd := &musterpb.Command{Id: "submit " + account + " " + m.Id, Body: &musterpb.Command_SubmitJob{SubmitJob: &musterpb.SubmitJob{
		Job: "job-" + strings.ToLower(rand.Text()[:10]), Account: account, Spec: m.Spec, PermutationKey: key,
	}}}
	id, err := s.Scheduler.Propose(ctx, cmd)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&musterpb.SubmitJobResponse{Job: id}), nil
}

// checkRequestID wants an ID that tells a repeat from a new request.
func checkRequestID(id string) error {
	if len(id) < 8 || len(id) > 64 {
		return api.Errorf(api.Invalid, "request id %q: want 8 to 64 characters, new for every request and the same for a repeat", id)
	}
	return nil
}

// checkBlobs wants everything that a job refers to uploaded before it starts.
func (s *Server) checkBlobs(ctx context.Context, spec *musterpb.JobSpec) error {
	check := func(what, digest string, size int64) error {
		have, err := s.Blobs.Stat(ctx, api.Digest(digest))
		if api.KindOf(err) == api.NotFound {
			return api.Errorf(api.Invalid, "%s: blob %s is not uploaded", what, digest)
		} else if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if have != size {
			return api.Errorf(api.Invalid, "%s: blob %s has %d bytes, the job says %d", what, digest, have, size)
		}
		return nil
	}
	if spec.Image.Kind != musterpb.ImageKind_IMAGE_KIND_REGISTRY {
		if err := check("image "+spec.Image.Name, spec.Image.Digest, spec.Image.SizeBytes); err != nil {
			return err
		}
	}
	for _, in := range spec.Inputs {
		if err := check("input "+in.Path, in.Digest, in.SizeBytes); err != nil {
			return err
		}
	}
	return nil
}

// checkPlatforms refuses an image that none of the workers known here could
// ever run. With no worker at all, a job may wait for the first.
func (s *Server) checkPlatforms(spec *musterpb.JobSpec) error {
	if spec.Image.Kind == musterpb.ImageKind_IMAGE_KIND_WASM || len(spec.Image.Platforms) == 0 {
		return nil
	}
	runs := func(w *musterpb.Worker) bool {
		p := w.Capacity.GetPlatform()
		return slices.ContainsFunc(spec.Image.Platforms, func(want string) bool { return want == p || strings.HasPrefix(want, p+"/") })
	}
	if s.State.AnyWorker(runs) { // mostly the first: it costs nothing that there are many
		return nil
	}
	var have []string
	for _, w := range s.State.Workers() {
		if p := w.Capacity.GetPlatform(); !slices.Contains(have, p) {
			have = append(have, p)
		}
	}
	if len(have) == 0 {
		return nil
	}
	return api.Errorf(api.Unsupported, "image %s is for %s and no worker is: they run %s; build the image for one of these",
		spec.Image.Name, strings.Join(spec.Image.Platforms, ", "), strings.Join(have, ", "))
}

// GetJob implements Muster.
func (s *Server) GetJob(ctx context.Context, req *connect.Request[musterpb.GetJobRequest]) (*connect.Response[musterpb.GetJobResponse], error) {
	if err := s.read(req); err != nil {
		return nil, err
	}
	resp, err := s.getJob(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(resp), nil
}

func (s *Server) getJob(ctx context.Context, m *musterpb.GetJobRequest) (*musterpb.GetJobResponse, error) {
	job, err := s.job(ctx, m.Job, false)
	if err != nil {
		return nil, err
	}
	resp := &musterpb.GetJobResponse{Job: job}
	if m.Detail {
		resp.Attempts, resp.Checks, resp.NextTask, err = s.detail(ctx, job, m.AfterTask)
	}
	return resp, err
}

// ListJobs implements Muster.
func (s *Server) ListJobs(ctx context.Context, req *connect.Request[musterpb.ListJobsRequest]) (*connect.Response[musterpb.ListJobsResponse], error) {
	if err := s.read(req); err != nil {
		return nil, err
	}
	account := req.Msg.Account
	if account != "" || !isAdmin(ctx) {
		var err error
		if account, err = accountFor(ctx, account, false); err != nil {
			return nil, err
		}
	}
	limit := req.Msg.Limit
	if limit == 0 {
		limit = 100
	}
	jobs, err := s.jobs(ctx, account, req.Msg.Before, int(min(limit, 1000)))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&musterpb.ListJobsResponse{Jobs: jobs}), nil
}

const (
	// watchInterval is how often a watch looks at its job. It does not wait for
	// changes of the state: those come by the thousand, and are rarely about the job.
	watchInterval = 100 * time.Millisecond
	// watchConfirm is how often a watch of a job that does not change makes sure
	// that this node still leads: its client would wait at the wrong one for ever.
	watchConfirm = 2 * time.Second
)

// WatchJob implements Muster: the job now, and again whenever it changed, until
// it is settled. With detail, that is the first page of it.
func (s *Server) WatchJob(ctx context.Context, req *connect.Request[musterpb.GetJobRequest], stream *connect.ServerStream[musterpb.GetJobResponse]) error {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	var last *musterpb.Job
	var confirmed time.Time
	var applied <-chan struct{}
	for {
		// An attempt may change and its job not.
		changed := s.State.Job(req.Msg.Job) != last || req.Msg.Detail && closed(applied)
		if last == nil || changed || time.Since(confirmed) > watchConfirm {
			applied = s.State.Changed()
			if err := s.read(req); err != nil {
				return err
			}
			confirmed = time.Now()
			resp, err := s.getJob(ctx, req.Msg)
			if err != nil {
				return err
			}
			job := resp.Job
			if job != last || changed {
				if last != nil && job.Spec == last.Spec {
					resp.Job = withoutSpec(job)
				}
				if err := stream.Send(resp); err != nil {
					return err
				}
			}
			if last = job; job.Settled {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// withoutSpec is a job without what can have megabytes and was sent before. It
// shares the rest with the job.
func withoutSpec(job *musterpb.Job) *musterpb.Job {
	out := &musterpb.Job{}
	job.ProtoReflect().Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if name := field.Name(); name != "spec" && name != "permutation_key" {
			out.ProtoReflect().Set(field, v)
		}
		return true
	})
	return out
}

// CancelJob implements Muster.
func (s *Server) CancelJob(ctx context.Context, req *connect.Request[musterpb.CancelJobRequest]) (*connect.Response[musterpb.CancelJobResponse], error) {
	if _, err := s.job(ctx, req.Msg.Job, true); err != nil {
		return nil, err
	}
	cmd := &musterpb.CancelJob{Job: req.Msg.Job, Reason: "cancelled by " + caller(ctx).Account}
	_, err := s.Scheduler.Propose(ctx, &musterpb.Command{Body: &musterpb.Command_CancelJob{CancelJob: cmd}})
	if job := s.sealedMeanwhile(ctx, req.Msg.Job, err); job.GetState() == musterpb.JobState_JOB_STATE_CANCELLED {
		err = nil
	} else if job != nil {
		err = endedAlready(job)
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&musterpb.CancelJobResponse{}), nil
}

// sealedMeanwhile is the job that a command was about which the state did not
// know any more, nil where that was not the trouble.
func (s *Server) sealedMeanwhile(ctx context.Context, id string, refused error) *musterpb.Job {
	if refused == nil || api.KindOf(refused) != api.NotFound {
		return nil
	}
	job, err := s.History.Job(ctx, id)
	if err != nil {
		return nil
	}
	return job
}

// endedAlready is what the state says of a job that has ended.
func endedAlready(job *musterpb.Job) error {
	return api.Errorf(api.Conflict, "job %s is %s already", job.Id, state.StateName(job.State))
}

// FundJob implements Muster.
func (s *Server) FundJob(ctx context.Context, req *connect.Request[musterpb.FundJobRequest]) (*connect.Response[musterpb.FundJobResponse], error) {
	job, err := s.job(ctx, req.Msg.Job, true)
	if err != nil {
		return nil, err
	}
	if err := checkRequestID(req.Msg.Id); err != nil {
		return nil, err
	}
	cmd := &musterpb.Command{Id: "fund " + job.Account + " " + req.Msg.Id, Body: &musterpb.Command_FundJob{FundJob: &musterpb.FundJob{
		Job: job.Id, AmountMicroUsd: req.Msg.AmountMicroUsd,
	}}}
	// A sealed job is proposed like any other: this may repeat a request that was
	// answered while the job was live.
	_, err = s.Scheduler.Propose(ctx, cmd)
	if sealed := s.sealedMeanwhile(ctx, job.Id, err); sealed != nil {
		err = endedAlready(sealed)
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&musterpb.FundJobResponse{}), nil
}

// ExplainJob implements Muster.
func (s *Server) ExplainJob(ctx context.Context, req *connect.Request[musterpb.GetJobRequest]) (*connect.Response[musterpb.ExplainJobResponse], error) {
	if err := s.Scheduler.CheckRead(); err != nil {
		return nil, err
	}
	job, err := s.job(ctx, req.Msg.Job, false)
	if err != nil {
		return nil, err
	}
	out, err := s.Scheduler.Explain(req.Msg.Job)
	if sealed := s.sealedMeanwhile(ctx, job.Id, err); sealed != nil {
		out, err = &musterpb.ExplainJobResponse{Workers: uint32(len(s.State.Workers())), Summary: "the job is " + state.StateName(sealed.State)}, nil
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

// maxResults bounds one page of results.
const maxResults = 1000

// maxScanned bounds the tasks that are looked at for a page, which may be empty.
const maxScanned = 100_000

// GetResults implements Muster.
func (s *Server) GetResults(ctx context.Context, req *connect.Request[musterpb.GetResultsRequest]) (*connect.Response[musterpb.GetResultsResponse], error) {
	if err := s.read(req); err != nil {
		return nil, err
	}
	job, err := s.job(ctx, req.Msg.Job, false)
	if err != nil {
		return nil, err
	}
	out, err := results(job, req.Msg, s.liveTasks(job))
	if s.State.Job(job.Id) == nil {
		out, err = results(job, req.Msg, s.sealedTasks(ctx, job))
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

// results is a page of a job's results.
func results(job *musterpb.Job, m *musterpb.GetResultsRequest, task taskOf) (*musterpb.GetResultsResponse, error) {
	out := &musterpb.GetResultsResponse{}
	for n := m.AfterTask; n < job.Tasks; n++ {
		if len(out.Results) == maxResults || n-m.AfterTask == maxScanned {
			out.NextTask = n
			break
		}
		t, a, err := task(n)
		if err != nil {
			return nil, err
		}
		verified := t.GetState() == musterpb.TaskState_TASK_STATE_VERIFIED
		if a == nil || !verified && (!m.Provisional || t.State != musterpb.TaskState_TASK_STATE_PROVISIONAL) {
			continue
		}
		out.Results = append(out.Results, &musterpb.TaskResult{
			Task: n, Attempt: a.Id, ManifestDigest: a.Commit.ManifestDigest, ArchiveDigest: a.Commit.ArchiveDigest, Verified: verified,
			Stored: a.Stored, ArchiveBytes: a.Commit.ArchiveBytes,
		})
	}
	return out, nil
}

// GetLogs implements Muster.
func (s *Server) GetLogs(ctx context.Context, req *connect.Request[musterpb.GetLogsRequest]) (*connect.Response[musterpb.GetLogsResponse], error) {
	if err := s.read(req); err != nil {
		return nil, err
	}
	job, err := s.job(ctx, req.Msg.Job, false)
	if err != nil {
		return nil, err
	}
	out := &musterpb.GetLogsResponse{}
	if req.Msg.Attempt != "" {
		a, err := s.attempt(ctx, job, req.Msg.Attempt)
		if err != nil {
			return nil, err
		}
		out.Logs = append(out.Logs, s.log(a))
		return connect.NewResponse(out), nil
	}
	attempts, _, next, err := s.detail(ctx, job, req.Msg.AfterTask)
	if err != nil {
		return nil, err
	}
	for _, a := range attempts {
		if a.Check != "" {
			continue // a check is nothing that the customer runs
		}
		if log := s.log(a); log.LogDigest != "" || len(log.Tail) > 0 {
			out.Logs = append(out.Logs, log)
		}
	}
	out.NextTask = next
	return connect.NewResponse(out), nil
}

// attempt is an attempt of a job that is no check, in the state or sealed.
func (s *Server) attempt(ctx context.Context, job *musterpb.Job, id string) (*musterpb.Attempt, error) {
	wanted := func(a *musterpb.Attempt) bool { return a.GetId() == id && a.Job == job.Id && a.Check == "" }
	if a := s.State.Attempt(id); wanted(a) {
		return a, nil
	}
	for from, more := uint32(0), s.State.Job(job.Id) == nil; more; more = from > 0 {
		attempts, _, next, err := s.History.Attempts(ctx, job.Id, from)
		if err != nil {
			return nil, err
		}
		if i := slices.IndexFunc(attempts, wanted); i >= 0 {
			return attempts[i], nil
		}
		from = next
	}
	return nil, api.Errorf(api.NotFound, "job %s has no attempt %q", job.Id, id)
}

func (s *Server) log(a *musterpb.Attempt) *musterpb.AttemptLog {
	return &musterpb.AttemptLog{Attempt: a.Id, Task: a.Task, Worker: a.Worker, State: a.State, LogDigest: a.LogDigest, Stored: a.Stored, Tail: s.Scheduler.LogTail(a.Id)}
}
