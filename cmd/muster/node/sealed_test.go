package node_test

import (
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/server"
)

// Sealed jobs are at every scheduler, and after all of them were restarted.
func TestSealedJobsOutliveRestarts(t *testing.T) {
	t.Parallel()
	l := newLab(t, 3)
	l.worker("owner-1").connect().work()
	l.worker("owner-2").connect().work()
	var jobs []*musterpb.GetJobResponse
	for range 3 {
		id := l.submit(nil)
		l.waitVerified(id)
		jobs = append(jobs, l.job(id))
	}
	transfers := l.transfers()
	eventually(t, "the jobs to be sealed", func() bool { return l.status().SealedJobs == 3 })

	same := func(when string) {
		t.Helper()
		for _, want := range jobs {
			for i, n := range l.nodes {
				c, err := client.New(client.Config{Addresses: []string{n.info.Address}, Key: l.keys["customer"]})
				if err != nil {
					t.Fatal(err)
				}
				req := connect.NewRequest(&musterpb.GetJobRequest{Job: want.Job.Id, Detail: true})
				req.Header().Set(server.HeaderRead, "stale") // each answers for itself
				got, err := c.GetJob(t.Context(), req)
				if err != nil || !proto.Equal(got.Msg, want) {
					t.Errorf("%s scheduler %d answers %v (%v) where the answer was %v", when, i+1, got, err, want)
				}
			}
		}
		if now := l.transfers(); len(now) != len(transfers) {
			t.Errorf("%s there are %d transfers, there were %d", when, len(now), len(transfers))
		}
	}
	same("once they are sealed,")
	for _, n := range l.nodes {
		n.stop(t)
		n.start(t)
	}
	l.leader()
	same("after each was restarted,")
}

// transfers are all there are.
func (l *lab) transfers() (list []*musterpb.Transfer) {
	l.t.Helper()
	for after, more := uint64(0), true; more; {
		resp, err := l.admin.ListTransfers(l.t.Context(), connect.NewRequest(&musterpb.ListTransfersRequest{All: true, After: after}))
		if err != nil {
			l.t.Fatal(err)
		}
		for _, t := range resp.Msg.Transfers {
			after = t.Id
			list = append(list, t)
		}
		more = resp.Msg.More
	}
	return list
}
