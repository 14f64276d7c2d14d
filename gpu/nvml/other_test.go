//go:build !cgo || !linux

package nvml

import (
	"bytes"
	"context"
	"strings"
	"testing"
)

func TestBuiltWithoutCgo(t *testing.T) {
	inv := New(Options{}).Detect(context.Background())
	if len(inv.Devices) > 0 || !strings.Contains(inv.Reason, "without cgo") || !strings.Contains(inv.Reason, "CPU worker") {
		t.Errorf("found %+v", inv)
	}
	var out bytes.Buffer
	if err := runProbe([]string{"libx.so", "1s"}, &out); err != nil || !strings.Contains(readAnswer(out.Bytes()).Reason, "without cgo") {
		t.Errorf("probe: %v, %s", err, out.String())
	}
}

func TestFakeLibrary(t *testing.T) {
	t.Skip("NOT TESTED: loading a library needs cgo on Linux, and this test binary was built without")
}
