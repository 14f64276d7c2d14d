package main

import (
	"testing"

	"github.com/spf13/cobra"
)

// The configuration files that operators install name settings that exist.
func TestDeployedConfigurationIsValid(t *testing.T) {
	g := &globals{}
	for path, make := range map[string]func(*globals) *cobra.Command{
		"../../deploy/config/scheduler.yaml": newScheduler,
		"../../deploy/config/worker.yaml":    newWorker,
	} {
		if err := fromFile(make(g), path); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// Flags come before the environment, and the environment before the file.
func TestConfigurationPrecedence(t *testing.T) {
	t.Setenv("MUSTER_PRICE", "0.50")
	t.Setenv("MUSTER_NAME", "from-environment")
	cmd := newWorker(&globals{})
	if err := cmd.Flags().Set("name", "from-flag"); err != nil {
		t.Fatal(err)
	}
	if err := fromFile(cmd, "../../deploy/config/worker.yaml"); err != nil {
		t.Fatal(err)
	}
	for flag, want := range map[string]string{"name": "from-flag", "price": "0.50", "runtime": "docker"} {
		if got := cmd.Flags().Lookup(flag).Value.String(); got != want {
			t.Errorf("--%s is %q, want %q", flag, got, want)
		}
	}
}
