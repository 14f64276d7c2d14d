package nvml

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/musternet/muster/gpu"
)

func TestMaybeProbeLeavesOthersAlone(t *testing.T) {
	for _, args := range [][]string{nil, {}, {"worker"}, {"worker", probeArg}, {""}} {
		if MaybeProbe(args) {
			t.Errorf("%q was handled as a probe", args)
		}
	}
}

func TestRunProbeRefuses(t *testing.T) {
	for _, args := range [][]string{nil, {"libx.so"}, {"libx.so", "soon"}, {"libx.so", "1s", "more"}} {
		var out bytes.Buffer
		if err := runProbe(args, &out); err == nil || out.Len() > 0 {
			t.Errorf("%q: error %v, output %q", args, err, out.String())
		}
	}
}

func TestReadAnswer(t *testing.T) {
	for _, c := range []struct{ answer, say string }{
		{``, "unreadable (0 bytes"},
		{`{"devices":`, "unreadable (11 bytes"},
		{`{"devices": 3}`, "unreadable"},
		{`null`, "neither devices nor a reason"},
		{`{}`, "neither devices nor a reason"},
		{`{"reason":"driver not loaded","driver":"1"}`, "driver not loaded"},
	} {
		if inv := readAnswer([]byte(c.answer)); len(inv.Devices) > 0 || !strings.Contains(inv.Reason, c.say) {
			t.Errorf("%q: %+v, want a reason with %q", c.answer, inv, c.say)
		}
	}
	inv := readAnswer([]byte(`{"devices":[{"uuid":"GPU-1"}],"driver":"550.1","reason":"left over"}`))
	if len(inv.Devices) != 1 || inv.Devices[0].UUID != "GPU-1" || inv.Driver != "550.1" || inv.Reason != "" {
		t.Errorf("read %+v", inv)
	}
}

func FuzzReadAnswer(f *testing.F) {
	f.Add([]byte(`{"devices":[{"index":0,"uuid":"GPU-1","temperature_celsius":40}],"driver":"550.1"}`))
	f.Add([]byte(`{"reason":"none"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if inv := readAnswer(data); (len(inv.Devices) == 0) != (inv.Reason != "") {
			t.Fatalf("%q: %d devices and reason %q", data, len(inv.Devices), inv.Reason)
		}
	})
}

func TestExitReason(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("needs a POSIX shell")
	}
	for _, c := range []struct{ script, say string }{
		{"kill -SEGV $$", "SIGSEGV (segmentation fault)"},
		{"kill -KILL $$", "SIGKILL (killed)"},
		{"kill -USR1 $$", "signal 10"},
		{"echo 'SIGSEGV: segmentation violation' >&2; echo 'PC=0x0' >&2; exit 2", "SIGSEGV (segmentation violation)"},
		{"echo 'fatal error: unexpected signal' >&2; echo '[signal SIGBUS: bus error code=2]' >&2; exit 2", "SIGBUS (bus error code)"},
		{"echo 'muster: symbol lookup error: undefined symbol: nvmlX' >&2; exit 127", `exit status 127 and said "muster: symbol lookup error: undefined symbol: nvmlX"`},
		{"exit 2", "exit status 2 and said nothing"},
	} {
		cmd := exec.Command("sh", "-c", c.script)
		stderr := &limited{max: maxStderrBytes, discard: true}
		cmd.Stderr = stderr
		err := cmd.Run()
		if runtime.GOOS != "linux" && strings.HasPrefix(c.say, "signal") {
			continue // numbers differ
		}
		if got := exitReason(err, stderr.data); !strings.Contains(got, c.say) || strings.Contains(got, "\n") {
			t.Errorf("%s: %q, want %q", c.script, got, c.say)
		}
	}
	if got := exitReason(errors.New("pipe broke"), nil); !strings.Contains(got, "pipe broke") {
		t.Errorf("an error that is no exit: %q", got)
	}
}

func TestLimited(t *testing.T) {
	strict, lax := &limited{max: 4}, &limited{max: 4, discard: true}
	if n, err := strict.Write([]byte("abcd")); n != 4 || err != nil || strict.over {
		t.Errorf("up to the bound: %d, %v", n, err)
	}
	if n, err := strict.Write([]byte("e")); n != 0 || !errors.Is(err, errTooMuch) || !strict.over || string(strict.data) != "abcd" {
		t.Errorf("past the bound: %d, %v, kept %q", n, err, strict.data)
	}
	if n, err := lax.Write([]byte("abcdef")); n != 6 || err != nil || string(lax.data) != "abcd" {
		t.Errorf("past a bound that discards: %d, %v, kept %q", n, err, lax.data)
	}
}

func TestNewChoosesTheLibrary(t *testing.T) {
	t.Setenv(LibraryEnv, "")
	if d := New(Options{}).(*detector); d.library != defaultLibrary || d.timeout != DefaultTimeout {
		t.Errorf("by default %s and %v", d.library, d.timeout)
	}
	t.Setenv(LibraryEnv, "/env/lib.so")
	if d := New(Options{}).(*detector); d.library != "/env/lib.so" {
		t.Errorf("with the environment's: %s", d.library)
	}
	if d := New(Options{Library: "/opt/lib.so", Timeout: time.Minute}).(*detector); d.library != "/opt/lib.so" || d.timeout != time.Minute {
		t.Errorf("with options: %s and %v", d.library, d.timeout)
	}
}

// A program whose main does not call MaybeProbe must not start itself for ever.
func TestNoProbeInsideAProbe(t *testing.T) {
	if unsupported != "" {
		t.Skip("this build does not start probes: " + unsupported)
	}
	t.Setenv(probeEnv, "1")
	if inv := New(Options{}).Detect(context.Background()); !strings.Contains(inv.Reason, "MaybeProbe") {
		t.Errorf("found %+v", inv)
	}
}

var _ gpu.Detector = (*detector)(nil)
