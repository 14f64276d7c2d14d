package server

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
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
	workers := s.State.Workers()
	if spec.Image.Kind == musterpb.ImageKind_IMAGE_KIND_WASM || len(spec.Image.Platforms) == 0 || len(workers) == 0 {
		return nil
	}
	var have []string
	for _, w := range workers {
		p := w.Capacity.GetPlatform()
		if slices.ContainsFunc(spec.Image.Platforms, func(want string) bool { return want == p || strings.HasPrefix(want, p+"/") }) {
			return nil
		}
		if !slices.Contains(have, p) {
			have = append(have, p)
		}
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
		resp.Attempts, resp.Checks = s.State.Attempts(job.Id), s.State.Checks(job.Id)
	}
	return resp, nil
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
	return connect.NewResponse(&musterpb.ListJobsResponse{Jobs: s.State.Jobs(account, int(min(limit, 1000)))}), nil
}

// watchInterval is the least time between two messages of a watch.
const watchInterval = 100 * time.Millisecond

// WatchJob implements Muster: the job now, and again whenever it changed, until
// it is settled.
func (s *Server) WatchJob(ctx context.Context, req *connect.Request[musterpb.GetJobRequest], stream *connect.ServerStream[musterpb.GetJobResponse]) error {
	var last *musterpb.Job
	for {
		changed := s.State.Changed()
		if err := s.read(req); err != nil {
			return err
		}
		resp, err := s.getJob(ctx, req.Msg)
		if err != nil {
			return err
		}
		if resp.Job != last || req.Msg.Detail {
			if err := stream.Send(resp); err != nil {
				return err
			}
			last = resp.Job
		}
		if resp.Job.Settled {
			return nil
		}
		pause := time.NewTimer(watchInterval)
		select {
		case <-ctx.Done():
			pause.Stop()
			return ctx.Err()
		case <-pause.C:
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// CancelJob implements Muster.
func (s *Server) CancelJob(ctx context.Context, req *connect.Request[musterpb.CancelJobRequest]) (*connect.Response[musterpb.CancelJobResponse], error) {
	if _, err := s.job(ctx, req.Msg.Job, true); err != nil {
		return nil, err
	}
	cmd := &musterpb.CancelJob{Job: req.Msg.Job, Reason: "cancelled by " + caller(ctx).Account}
	if _, err := s.Scheduler.Propose(ctx, &musterpb.Command{Body: &musterpb.Command_CancelJob{CancelJob: cmd}}); err != nil {
		return nil, err
	}
	return connect.NewResponse(&musterpb.CancelJobResponse{}), nil
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
	if _, err := s.Scheduler.Propose(ctx, cmd); err != nil {
		return nil, err
	}
	return connect.NewResponse(&musterpb.FundJobResponse{}), nil
}

// ExplainJob implements Muster.
func (s *Server) ExplainJob(ctx context.Context, req *connect.Request[musterpb.GetJobRequest]) (*connect.Response[musterpb.ExplainJobResponse], error) {
	if err := s.Scheduler.CheckRead(); err != nil {
		return nil, err
	}
	if _, err := s.job(ctx, req.Msg.Job, false); err != nil {
		return nil, err
	}
	out, err := s.Scheduler.Explain(req.Msg.Job)
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
	out := &musterpb.GetResultsResponse{}
	for n := req.Msg.AfterTask; n < job.Tasks; n++ {
		if len(out.Results) == maxResults || n-req.Msg.AfterTask == maxScanned {
			out.NextTask = n
			break
		}
		task := s.State.Task(job.Id, n)
		verified := task.GetState() == musterpb.TaskState_TASK_STATE_VERIFIED
		if !verified && (!req.Msg.Provisional || task.GetState() != musterpb.TaskState_TASK_STATE_PROVISIONAL) {
			continue
		}
		a := s.State.Attempt(task.Result)
		out.Results = append(out.Results, &musterpb.TaskResult{
			Task: n, Attempt: a.Id, ManifestDigest: a.Commit.ManifestDigest, ArchiveDigest: a.Commit.ArchiveDigest, ArchiveBytes: a.Commit.ArchiveBytes, Stored: a.Stored, Verified: verified,
		})
	}
	return connect.NewResponse(out), nil
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
	for _, a := range s.State.Attempts(job.Id) {
		if (req.Msg.Attempt != "" && a.Id != req.Msg.Attempt) || a.Check != "" {
			continue // a check is nothing that the customer runs
		}
		log := &musterpb.AttemptLog{Attempt: a.Id, Task: a.Task, Worker: a.Worker, State: a.State, LogDigest: a.LogDigest, Stored: a.Stored, Tail: s.Scheduler.LogTail(a.Id)}
		if req.Msg.Attempt != "" || log.LogDigest != "" || len(log.Tail) > 0 {
			out.Logs = append(out.Logs, log)
		}
	}
	if req.Msg.Attempt != "" && len(out.Logs) == 0 {
		return nil, api.Errorf(api.NotFound, "job %s has no attempt %q", job.Id, req.Msg.Attempt)
	}
	return connect.NewResponse(out), nil
}
