// Package muster is the root of a scheduler for GPU jobs on machines that
// belong to other people. It holds no code; this is a reader's guide.
//
// docs/architecture.md has the whole picture on a few pages. In the code,
// follow a job, in this order:
//
//   - api/server takes a customer's call, checks the key, and passes it on to
//     the scheduler that leads.
//   - scheduler is what the leader does: loops that read committed state and
//     propose commands.
//   - scheduler/replica, with Propose: a command becomes part of a Raft log
//     entry, together with those that wait beside it.
//   - scheduler/state, with Apply: the one function that changes what is
//     replicated; deterministic.
//   - scheduler/place decides, purely, which worker gets which attempt.
//   - worker runs an attempt on an owner's machine, and signs what came out.
//   - verify says which items are run again, whether two outputs agree, and
//     what follows.
//   - scheduler/ledger moves the money: hold, then post or void.
//
// The contracts between them are api (IDs, errors), proto/muster/v1 (every
// message and command), api/jobspec (what a job is), api/blob and api/outputs
// (what travels), container and gpu (what a worker has). cmd/muster/node puts
// the parts together.
//
// Imports point down a fixed list of floors, and arch_test.go says which. A
// DESIGN.md beside a package says why it is as it is.
package muster
