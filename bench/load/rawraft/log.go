package rawraft

import (
	"errors"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
)

// ReadLog visits the commands that the log in dir still holds, by index, in
// (after, through]. It returns the first index that is there: what is before it
// was replaced by a snapshot. No other process may have the log open.
func ReadLog(dir string, after, through uint64, visit func(data []byte) error) (first uint64, err error) {
	log, err := wal.Open(dir)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	if first, err = log.FirstIndex(); err != nil {
		return 0, err
	}
	last, err := log.LastIndex()
	if err != nil {
		return 0, err
	}
	first = max(first, after+1)
	for i := first; i <= min(last, through); i++ {
		var entry raft.Log
		if err := log.GetLog(i, &entry); err != nil {
			return 0, err
		}
		if entry.Type != raft.LogCommand {
			continue
		}
		if err := visit(entry.Data); err != nil {
			return 0, err
		}
	}
	return first, nil
}
