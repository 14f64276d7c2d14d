// Package musterpb holds the generated messages: RPC, replicated commands and
// snapshot records. The sources are in proto/muster/v1; "make generate" makes
// this package anew.
package musterpb
