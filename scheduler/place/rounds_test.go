package place_test

import (
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/place"
	"github.com/musternet/muster/scheduler/state"
)

// rounds plays the leader: it plans from the state and applies what was planned.
type rounds struct {
	*state.State
	t        *rapid.T
	engine   *place.Engine
	now      int64
	attempts int
}

func (r *rounds) apply(cmd *musterpb.Command) error {
	cmd.TimeUnixMs = r.now
	return state.ErrorOf(r.Apply(cmd))
}

func (r *rounds) must(cmd *musterpb.Command) {
	if err := r.apply(cmd); err != nil {
		r.t.Fatalf("%v: %v", cmd, err)
	}
}

// round plans once and applies everything. The state must take what is planned,
// unless the money is short: a refusal would be planned again at once.
func (r *rounds) round() (accepted, refused int) {
	r.tell()
	for _, p := range r.engine.Plan(r.now, 100) {
		r.attempts++
		err := r.apply(&musterpb.Command{Body: &musterpb.Command_PlaceAttempt{PlaceAttempt: &musterpb.PlaceAttempt{
			Attempt: fmt.Sprintf("a%d", r.attempts), Job: p.Job.Id, Task: p.Task, Check: p.Check.GetId(), Worker: p.Worker,
			Class: p.Class, Devices: p.Devices, Relaxed: p.Relaxed,
		}}})
		paused := r.Job(p.Job.Id).State == musterpb.JobState_JOB_STATE_PAUSED
		switch {
		case err == nil:
			accepted++
		case paused && (api.KindOf(err) == api.Exhausted || p.Check == nil && api.KindOf(err) == api.Conflict):
			refused++
		case p.Check != nil && state.Ended(r.Job(p.Job.Id).State) && api.KindOf(err) == api.Exhausted:
			refused++ // what another check of this round has cost
		default:
			r.t.Fatalf("%s/%d %s on %s was planned and is refused: %v", p.Job.Id, p.Task, p.Check.GetId(), p.Worker, err)
		}
	}
	return accepted, refused
}

// tell tells the engine how everything is.
func (r *rounds) tell() {
	byID, usage := map[string]*place.Worker{}, int64(0)
	for _, w := range r.Workers() {
		byID[w.Id] = place.NewWorker(w, true, nil)
	}
	for _, a := range r.LiveAttempts() {
		job := r.Job(a.Job)
		byID[a.Worker].Take(job.Spec.Resources, a.Devices)
		usage += state.Units(job.Spec.Resources)
	}
	for _, w := range r.Workers() {
		r.engine.SetWorker(byID[w.Id])
	}
	for _, j := range r.Jobs("", 100) {
		if w, ok := r.WorkOf(j.Id); ok {
			r.engine.SetJob(w)
		} else {
			r.engine.RemoveJob(j.Id)
		}
	}
	r.engine.SetUsage("acme", usage)
}

func (r *rounds) register(i int) {
	t := r.t
	seed := sha256.Sum256(fmt.Append(nil, i))
	key := ed25519.NewKeyFromSeed(seed[:]).Public().(ed25519.PublicKey)
	w := &musterpb.Worker{
		Id: string(api.WorkerIDOf(key)), PublicKey: key, Owner: fmt.Sprintf("owner%d", i/2), PriceMicroUsdPerHour: int64(100_000 * rapid.IntRange(1, 4).Draw(t, "price")),
		Capacity: &musterpb.Capacity{MilliCpus: 4000, MemoryBytes: 8 << 30, DiskBytes: 10 << 30, Runtimes: []string{"docker", "wasm"}, Platform: "linux/amd64"},
	}
	for d := range rapid.IntRange(0, 3).Draw(t, "devices") {
		w.Capacity.Devices = append(w.Capacity.Devices, &musterpb.Device{
			Index: uint32(d), Uuid: fmt.Sprintf("gpu-%d", d), MemoryBytes: uint64(rapid.SampledFrom([]int{12, 24}).Draw(t, "VRAM")) << 30,
			Architecture: rapid.SampledFrom([]string{"Ada", "Ampere"}).Draw(t, "architecture"), Driver: "570.1",
		})
	}
	r.must(&musterpb.Command{Body: &musterpb.Command_RegisterWorker{RegisterWorker: &musterpb.RegisterWorker{Worker: w}}})
}

func (r *rounds) submit(i int) {
	t := r.t
	digest := string(api.DigestOf([]byte("image")))
	image := &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_REGISTRY, Ref: "host/app@" + digest, Digest: digest, Name: "app"}
	if rapid.IntRange(0, 3).Draw(t, "wasm") == 0 {
		image = &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_WASM, Digest: digest, Name: "app.wasm", SizeBytes: 1}
	}
	gpus := rapid.IntRange(0, 2).Draw(t, "GPUs")
	if image.Kind == musterpb.ImageKind_IMAGE_KIND_WASM {
		gpus = 0
	}
	r.must(&musterpb.Command{Body: &musterpb.Command_SubmitJob{SubmitJob: &musterpb.SubmitJob{
		Job: fmt.Sprintf("j%d", i), Account: "acme", PermutationKey: make([]byte, 16), Spec: &musterpb.JobSpec{
			Name: "job", Image: image, Items: &musterpb.Items{Count: uint64(rapid.IntRange(1, 6).Draw(t, "items"))}, Chunk: 1,
			Resources: &musterpb.Resources{MilliCpus: 1000, MemoryBytes: 1 << 30, DiskBytes: 1 << 30, Gpus: uint32(gpus)},
			TimeoutMs: 3_600_000, Retries: 3, MaxPriceMicroUsdPerHour: 300_000,
			BudgetMicroUsd: 300_000 * int64(max(gpus, 1)) * int64(rapid.IntRange(2, 7).Draw(t, "budget")),
			Verify:         &musterpb.Verify{Comparator: "exact", SameOwner: rapid.Bool().Draw(t, "same owner")},
		},
	}}})
}

// step lets one thing happen to what was placed.
func (r *rounds) step() {
	t := r.t
	r.now += int64(rapid.IntRange(0, 600_000).Draw(t, "ms"))
	for _, a := range r.LiveAttempts() { // some may be over by then, ended with their job
		end := &musterpb.EndAttempt{Attempt: a.Id, State: musterpb.AttemptState_ATTEMPT_STATE_FAILED, Reason: "x", ExitCode: int32(rapid.IntRange(1, 9).Draw(t, "exit"))}
		switch what := rapid.IntRange(0, 9).Draw(t, "what becomes of "+a.Id); {
		case what < 6:
			root := sha256.Sum256([]byte(a.Id))
			_ = r.apply(&musterpb.Command{Body: &musterpb.Command_CommitResult{CommitResult: &musterpb.CommitResult{Commit: &musterpb.Commit{Attempt: a.Id, Root: root[:]}}}})
			continue
		case what == 6:
			end.State = musterpb.AttemptState_ATTEMPT_STATE_LOST
		case what == 7:
			end.Blame = musterpb.Blame_BLAME_JOB
		case what == 8:
			end.Blame = musterpb.Blame_BLAME_WORKER
		default:
			continue
		}
		_ = r.apply(&musterpb.Command{Body: &musterpb.Command_EndAttempt{EndAttempt: end}})
	}
	if waiting, _, epoch, digest := r.Committed(); waiting > 0 {
		r.must(&musterpb.Command{Body: &musterpb.Command_CloseBatch{CloseBatch: &musterpb.CloseBatch{Epoch: epoch, Digest: digest, Attempts: uint32(waiting)}}})
	}
	for _, c := range r.ToCompare() {
		cmd := &musterpb.RecordComparisons{Check: c.Check.Id}
		for _, p := range c.Pairs {
			cmd.Comparisons = append(cmd.Comparisons, &musterpb.Comparison{A: p[0], B: p[1], Match: rapid.IntRange(0, 3).Draw(t, "match") > 0})
		}
		r.must(&musterpb.Command{Body: &musterpb.Command_RecordComparisons{RecordComparisons: cmd}})
	}
}

// The state takes whatever is planned, and planning comes to rest: without that,
// the leader would fill the log with refusals.
func TestPlansAreAccepted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := &rounds{State: state.New(), t: t, engine: place.NewEngine(nil), now: 1_000_000}
		account := func(id string) {
			r.must(&musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: &musterpb.CreateAccount{Account: id}}})
		}
		account("acme")
		r.must(&musterpb.Command{Body: &musterpb.Command_Deposit{Deposit: &musterpb.Deposit{Account: "acme", AmountMicroUsd: 1_000_000_000}}})
		workers := rapid.IntRange(2, 10).Draw(t, "workers")
		for i := range workers {
			if i%2 == 0 {
				account(fmt.Sprintf("owner%d", i/2))
			}
			r.register(i)
		}
		for i := range rapid.IntRange(1, 4).Draw(t, "jobs") {
			r.submit(i)
		}
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			for n := 0; ; n++ {
				accepted, refused := r.round()
				if accepted+refused == 0 {
					break
				}
				if n > 20 {
					t.Fatalf("planning does not come to rest: %d more were accepted, %d refused", accepted, refused)
				}
			}
			r.step()
		}
	})
}
