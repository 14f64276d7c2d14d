package nvml

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"syscall"
	"time"
)

// exitHung is the child's exit code when it noticed by itself that it hangs;
// timeout(1) has the same.
const exitHung = 124

func timeoutReason(ctx context.Context, limit time.Duration) string {
	if errors.Is(ctx.Err(), context.Canceled) {
		return "looking for GPUs was cancelled before NVML answered"
	}
	return fmt.Sprintf("the NVIDIA driver hangs: NVML did not answer within %v", max(limit, 0).Round(time.Millisecond))
}

// goSignal is how the Go runtime reports a signal that C code got, before it
// exits with status 2.
var goSignal = regexp.MustCompile(`(?m)^(?:\[signal )?(SIG[A-Z0-9]+): ([a-z /-]+)`)

// exitReason says how a child ended that did not end well.
func exitReason(err error, stderr []byte) string {
	const crashed = "the NVIDIA driver's library is broken: it crashed the NVML probe with %s; install the driver again"
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return fmt.Sprintf("the NVML probe's answer could not be read: %v", err)
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return fmt.Sprintf(crashed, signalName(status.Signal()))
	}
	if m := goSignal.FindSubmatch(stderr); m != nil && exit.ExitCode() == 2 {
		return fmt.Sprintf(crashed, fmt.Sprintf("%s (%s)", m[1], bytes.TrimSpace(m[2])))
	}
	said := "and said nothing"
	if line, _, _ := bytes.Cut(bytes.TrimSpace(stderr), []byte("\n")); len(line) > 0 {
		said = fmt.Sprintf("and said %.200q", line)
	}
	return fmt.Sprintf("the NVML probe ended with exit status %d %s", exit.ExitCode(), said)
}

var signalNames = map[syscall.Signal]string{
	syscall.SIGABRT: "SIGABRT", syscall.SIGBUS: "SIGBUS", syscall.SIGFPE: "SIGFPE", syscall.SIGILL: "SIGILL",
	syscall.SIGKILL: "SIGKILL", syscall.SIGSEGV: "SIGSEGV", syscall.SIGTERM: "SIGTERM", syscall.SIGTRAP: "SIGTRAP",
}

func signalName(s syscall.Signal) string {
	name := signalNames[s]
	if name == "" {
		name = fmt.Sprintf("signal %d", int(s))
	}
	return fmt.Sprintf("%s (%v)", name, s)
}
