//go:build cgo && linux

package nvml

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/musternet/muster/gpu"
)

// buildLibrary compiles testdata/fakenvml.c, the whole path to the driver being
// real but for the driver.
func buildLibrary(t *testing.T, flags ...string) string {
	t.Helper()
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skipf("NOT TESTED: the fake NVML library cannot be built: %v", err)
	}
	library := filepath.Join(t.TempDir(), "libfakenvml.so")
	args := append([]string{"-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", library, "testdata/fakenvml.c"}, flags...)
	if out, err := exec.Command(gcc, args...).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	return library
}

func detect(t *testing.T, o Options) gpu.Inventory {
	t.Helper()
	inv := New(o).Detect(t.Context())
	if (len(inv.Devices) == 0) != (inv.Reason != "") {
		t.Fatalf("%d devices and reason %q", len(inv.Devices), inv.Reason)
	}
	if strings.Contains(inv.Reason, "\n") || len(inv.Reason) > 500 {
		t.Errorf("a reason that is more than a sentence: %q", inv.Reason)
	}
	return inv
}

func TestFakeLibrary(t *testing.T) {
	t.Setenv("FAKENVML", "ok")
	inv := detect(t, Options{Library: buildLibrary(t)})
	if inv.Driver != "550.54.15" || len(inv.Devices) != 4 {
		t.Fatalf("found %+v", inv)
	}
	whole, split, slice := inv.Devices[0], inv.Devices[1], inv.Devices[3]
	if whole.Index != 0 || whole.UUID != "GPU-00000000-0000-0000-0000-000000000000" || whole.Name != "NVIDIA Fake H100" || whole.MemoryBytes != 80<<30 ||
		whole.ComputeCapability != "9.0" || whole.Architecture != "hopper" || whole.Driver != "550.54.15" || whole.MIG != "disabled" || whole.Unhealthy != "" {
		t.Errorf("first GPU: %+v", whole)
	}
	if *whole.TemperatureC != 41 || *whole.PowerMilliwatts != 71500 || *whole.UtilizationPercent != 7 {
		t.Errorf("its telemetry: %d °C, %d mW, %d%%", *whole.TemperatureC, *whole.PowerMilliwatts, *whole.UtilizationPercent)
	}
	if split.MIG != "enabled" || split.UtilizationPercent != nil || split.TemperatureC == nil {
		t.Errorf("split GPU: %+v", split)
	}
	if slice.MIG != "slice" || slice.Index != 1 || slice.ParentUUID != split.UUID || slice.UUID != "MIG-00000000-0000-0000-0000-000000000002" ||
		slice.MemoryBytes != 12<<30 || slice.Architecture != "hopper" || slice.ComputeCapability != "9.0" || slice.TemperatureC != nil || slice.PowerMilliwatts != nil {
		t.Errorf("slice: %+v", slice)
	}
}

func TestFakeLibraryFromEnvironment(t *testing.T) {
	t.Setenv("FAKENVML", "ok")
	t.Setenv(LibraryEnv, buildLibrary(t))
	if inv := detect(t, Options{}); len(inv.Devices) != 4 {
		t.Errorf("found %+v", inv)
	}
}

// Whatever the library does, the program that asks goes on and says why it has
// no GPU.
func TestFakeLibraryFails(t *testing.T) {
	library := buildLibrary(t)
	for _, c := range []struct{ mode, say string }{
		{"none", "has no device"},
		{"mismatch", "different versions, as after an update: reboot, or reload the driver's kernel modules"},
		{"unloaded", "installed but not loaded"},
		{"denied", "no permission to use the GPUs: nvmlInit was refused (Insufficient Permissions)"},
		{"segv", "crashed the NVML probe with SIGSEGV"},
		{"raise", "crashed the NVML probe with SIGSEGV"},
		{"abort", "crashed the NVML probe with SIGABRT"},
		{"exit", `exit status 3 and said "fakenvml: cannot go on"`},
		{"garbage", `unreadable (30 bytes that begin with "<html>not an inventory</html>`},
		{"flood", "more than 1048576 bytes"},
		{"absurd", "4000000000 GPUs; at most 256"},
	} {
		t.Run(c.mode, func(t *testing.T) {
			t.Setenv("FAKENVML", c.mode)
			if inv := detect(t, Options{Library: library}); len(inv.Devices) > 0 || !strings.Contains(inv.Reason, c.say) {
				t.Errorf("found %+v, want no device and a reason with %q", inv, c.say)
			}
		})
	}
	t.Run("lost", func(t *testing.T) {
		t.Setenv("FAKENVML", "lost")
		inv := detect(t, Options{Library: library})
		if len(inv.Devices) != 2 || inv.Devices[0].Unhealthy != "" || !strings.Contains(inv.Devices[1].Unhealthy, "fallen off the bus") || inv.Devices[1].Index != 1 {
			t.Errorf("found %+v", inv)
		}
	})
	t.Run("unclean", func(t *testing.T) {
		t.Setenv("FAKENVML", "unclean")
		if inv := detect(t, Options{Library: library}); len(inv.Devices) == 0 || inv.Devices[0].Name != "NVIDIA[31m Fake" {
			t.Errorf("found %+v", inv)
		}
	})
}

func TestFakeLibraryHangs(t *testing.T) {
	library := buildLibrary(t)
	for _, mode := range []string{"hang", "hangdev"} {
		t.Setenv("FAKENVML", mode)
		start := time.Now()
		inv := detect(t, Options{Library: library, Timeout: 400 * time.Millisecond})
		if !strings.Contains(inv.Reason, "did not answer within 400ms") {
			t.Errorf("%s: found %+v", mode, inv)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("%s: given up after %v", mode, took)
		}
	}
	t.Setenv("FAKENVML", "hang")
	ctx, cancel := context.WithTimeout(t.Context(), 800*time.Millisecond)
	defer cancel()
	inv := New(Options{Library: library}).Detect(ctx)
	if ctx.Err() != nil || !strings.Contains(inv.Reason, "did not answer within 5") {
		t.Errorf("with a deadline: %v, found %+v", ctx.Err(), inv)
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if inv := New(Options{Library: library}).Detect(ctx); !strings.Contains(inv.Reason, "cancelled") {
		t.Errorf("cancelled: found %+v", inv)
	}
}

// A process that waits in the kernel does not even end when it is killed.
func TestUnkillableProbe(t *testing.T) {
	library := buildLibrary(t)
	release, reaped := make(chan struct{}), make(chan struct{})
	d := New(Options{Library: library, Timeout: 100 * time.Millisecond}).(*detector)
	d.wait = func(cmd *exec.Cmd) error {
		<-release
		defer close(reaped)
		return cmd.Wait()
	}
	t.Setenv("FAKENVML", "hang")
	if inv := d.Detect(t.Context()); !strings.Contains(inv.Reason, "cannot be killed") {
		t.Errorf("first: %+v", inv)
	}
	if inv := d.Detect(t.Context()); !strings.Contains(inv.Reason, "killed and still there") {
		t.Errorf("while the first is there: %+v", inv)
	}
	close(release)
	<-reaped
	for d.stuck.Load() != 0 { // cleared right after Wait
		runtime.Gosched()
	}
	d.wait = (*exec.Cmd).Wait
	d.timeout = DefaultTimeout
	t.Setenv("FAKENVML", "ok")
	if inv := d.Detect(t.Context()); len(inv.Devices) == 0 {
		t.Errorf("afterwards: %+v", inv)
	}
}

func TestLibraryCannotBeLoaded(t *testing.T) {
	dir := t.TempDir()
	absent, text, closed := filepath.Join(dir, "libabsent.so"), filepath.Join(dir, "libtext.so"), filepath.Join(dir, "libclosed.so")
	for _, name := range []string{text, closed} {
		if err := os.WriteFile(name, []byte(strings.Repeat("not a library\n", 100)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(closed, 0); err != nil {
		t.Fatal(err)
	}
	for library, say := range map[string]string{
		absent:                  "no NVIDIA driver was found: there is no library " + absent + "; install the driver, or name its library in MUSTER_NVML_LIBRARY",
		"libmusterabsent.so.77": "there is no library libmusterabsent.so.77",
		text:                    "could not be loaded: " + text + ": invalid ELF header",
	} {
		if inv := detect(t, Options{Library: library}); !strings.Contains(inv.Reason, say) {
			t.Errorf("%s: found %+v, want a reason with %q", library, inv, say)
		}
	}
	if os.Geteuid() != 0 { // root may read everything
		if inv := detect(t, Options{Library: closed}); !strings.Contains(inv.Reason, "no permission to load") {
			t.Errorf("unreadable: found %+v", inv)
		}
	}
}

func TestLibraryLacksFunctions(t *testing.T) {
	t.Setenv("FAKENVML", "ok")
	inv := detect(t, Options{Library: buildLibrary(t, "-DWITHOUT_COUNT")})
	if !strings.Contains(inv.Reason, "has no function nvmlDeviceGetCount_v2") {
		t.Errorf("without a required function: %+v", inv)
	}
	inv = detect(t, Options{Library: buildLibrary(t, "-DOLD")})
	if len(inv.Devices) != 2 {
		t.Fatalf("an old driver: %+v", inv)
	}
	if d := inv.Devices[1]; d.Architecture != "unknown" || d.MIG != "unsupported" || d.Unhealthy != "" || d.TemperatureC == nil {
		t.Errorf("an old driver's GPU: %+v", d)
	}
}

// The C library is no NVML at all.
func TestAnotherLibrary(t *testing.T) {
	if inv := detect(t, Options{Library: "libc.so.6"}); !strings.Contains(inv.Reason, "nvmlInit_v2") && !strings.Contains(inv.Reason, "no library") {
		t.Errorf("found %+v", inv)
	}
}

// The same package built without cgo says so, in a program of its own.
func TestWithoutCgo(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a program")
	}
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Skipf("NOT TESTED: the build without cgo needs the go command: %v", err)
	}
	without := func(args ...string) string {
		cmd := exec.Command(goTool, args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("CGO_ENABLED=0 go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	without("vet", ".")
	program := filepath.Join(t.TempDir(), "reason")
	without("build", "-o", program, "./testdata/reason")
	out, err := exec.Command(program).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "built without cgo") || !strings.Contains(string(out), "CPU worker") {
		t.Errorf("it says %q, %v", out, err)
	}
	out, err = exec.Command(program, probeArg, "libx.so", "1s").Output()
	if err != nil || !strings.Contains(readAnswer(out).Reason, "built without cgo") {
		t.Errorf("as a probe it says %q, %v", out, err)
	}
}
