package main

import "testing"

// The committed code is what the tools make of the files in proto.
func TestGeneratedCodeIsCurrent(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the code generators; run without -short")
	}
	if err := run(true); err != nil {
		t.Error(err)
	}
}
