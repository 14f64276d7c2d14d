package nvml

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// The test binary is the probe's child too, as muster's own binary is.
func TestMain(m *testing.M) {
	if MaybeProbe(os.Args[1:]) {
		return
	}
	goleak.VerifyTestMain(m)
}
