package replica

import (
	"io"

	"github.com/hashicorp/raft"

	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
)

// fsm adapts the state to Raft. Raft calls Apply and Snapshot from one
// goroutine, and Persist beside Apply.
type fsm state.State

var _ raft.FSM = (*fsm)(nil)

func (f *fsm) Apply(log *raft.Log) any {
	entry := &musterpb.Entry{}
	if err := entry.UnmarshalVT(log.Data); err != nil {
		panic("muster: the log holds an entry that can't be read: " + err.Error())
	}
	return (*state.State)(f).ApplyAll(entry.Commands)
}

func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	return snapshot{(*state.State)(f).Snapshot()}, nil
}

func (f *fsm) Restore(r io.ReadCloser) error {
	defer r.Close()
	return (*state.State)(f).Restore(r)
}

type snapshot struct{ *state.Snapshot }

func (s snapshot) Persist(sink raft.SnapshotSink) error {
	if err := s.Write(sink); err != nil {
		sink.Cancel()
		return err
	}
	return sink.Close()
}

func (snapshot) Release() {}
