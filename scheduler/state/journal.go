package state

// Changes are the IDs of what was touched, each once: made, changed, or taken
// away because it was sealed. A worker counts as touched when what runs on it
// changes, a job when one of its checks wants a run, or does not any more.
type Changes struct {
	// Reset says that the reader fell behind, or the state was restored: it has
	// to read everything again.
	Reset                           bool
	Workers, Jobs, Checks, Attempts []string
}

// maxChanges bounds how many changes are kept for readers.
const maxChanges = 1 << 18

type changeKind uint8

const (
	workerChanged changeKind = iota
	jobChanged
	checkChanged
	attemptChanged
)

type change struct {
	id   string
	kind changeKind
}

// journal is a ring of the newest changes, numbered from 1.
type journal struct {
	ring  []change // change n is at n % maxChanges, once there are as many
	last  uint64
	first uint64 // the oldest that a reader may still ask for
}

func (j *journal) add(kind changeKind, id string) {
	j.last++
	c := change{id, kind}
	if at := j.last % maxChanges; at < uint64(len(j.ring)) {
		j.ring[at] = c
	} else {
		j.ring = append(j.ring, c)
	}
	if j.last-j.first >= maxChanges {
		j.first = j.last - maxChanges + 1
	}
}

// forget makes every reader start anew.
func (j *journal) forget() {
	j.last = (j.last/maxChanges+2)*maxChanges - 1 // the next one is at 0
	j.ring, j.first = nil, j.last+1
}

// ChangesSince tells what was touched since the cursor that an earlier call
// returned; with 0, as nothing was read yet, it is a Reset. What changes after
// this call is told by the one with the new cursor.
func (s *State) ChangesSince(cursor uint64) (c Changes, next uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	j := &s.journal
	if cursor == 0 || cursor+1 < j.first || cursor > j.last {
		return Changes{Reset: true}, j.last
	}
	seen := make(map[change]struct{}, min(j.last-cursor, 1<<12))
	for n := cursor + 1; n <= j.last; n++ {
		what := j.ring[n%maxChanges]
		if _, again := seen[what]; again {
			continue
		}
		seen[what] = struct{}{}
		list := [...]*[]string{workerChanged: &c.Workers, jobChanged: &c.Jobs, checkChanged: &c.Checks, attemptChanged: &c.Attempts}[what.kind]
		*list = append(*list, what.id)
	}
	return c, j.last
}
