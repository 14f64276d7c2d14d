package state

import "github.com/musternet/muster/api/musterpb"

// Detail is what belongs to one task of a job: its attempts, each followed by
// the runs of its check, and the checks. It is how a job is read that may have a
// million attempts, without keeping Apply waiting.
func (s *State) Detail(job string, number uint32) (attempts []*musterpb.Attempt, checks []*musterpb.Check) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if task := s.tasks.Get(taskKey{job, number}); task != nil && !s.isDropped(job) {
		attempts, checks = s.appendOf(nil, nil, task)
	}
	return attempts, checks
}
