// Package jobspec holds the rules of a job: how its file is read, what a valid
// specification is, which items it has, how the items are cut into tasks, and
// which commands a set of items turns into.
//
// Client, scheduler and worker derive the same answers from the same
// specification, so everything here is pure and its results never change
// between releases: a task's items are never stored, they are computed again.
package jobspec
