// Command probe is the program that the tests of package docker run in a
// container: it reports what the sandbox looks like from inside, or misbehaves
// in one particular way.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Println("no command")
		os.Exit(2)
	}
	command, ok := commands[os.Args[1]]
	if !ok {
		fmt.Println("unknown command", os.Args[1])
		os.Exit(2)
	}
	if err := command(os.Args[2:]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

var commands = map[string]func(args []string) error{
	"report":      report,
	"exit":        exit,
	"both":        both,
	"allocate":    allocate,
	"oom-child":   oomChild,
	"ignore-term": ignoreTerm,
	"on-term":     onTerm,
	"fill":        fill,
	"fill-hidden": fillHidden,
	"fill-deep":   fillDeep,
	"hide":        hide,
	"links":       links,
	"chatter":     chatter,
	"spawn":       spawn,
	"wait":        wait,
}

// Report is what "report" writes to /out/report.json.
type Report struct {
	UID, GID   int
	Groups     []int
	Status     map[string]string // of /proc/self/status
	Interfaces []string
	Hostname   string
	Env        []string
	Args       []string
	Input      string
	Devices    []string
	Mounts     string            // /proc/self/mountinfo
	Writes     map[string]string // path → "" or the error of creating a file there
	CanExecTmp bool
	PID        int
}

func report([]string) error {
	r := Report{UID: os.Getuid(), GID: os.Getgid(), Status: map[string]string{}, Env: os.Environ(), Args: os.Args[1:], Writes: map[string]string{}, PID: os.Getpid()}
	r.Groups, _ = os.Getgroups()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(status)) {
		if name, value, ok := strings.Cut(line, ":"); ok {
			r.Status[name] = strings.TrimSpace(value)
		}
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		return err
	}
	for _, i := range interfaces {
		if i.Flags&net.FlagUp != 0 {
			r.Interfaces = append(r.Interfaces, i.Name)
		}
	}
	r.Hostname, _ = os.Hostname()
	input, _ := os.ReadFile("/in/input.txt")
	r.Input = string(input)
	r.Devices, _ = filepath.Glob("/dev/*")
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	r.Mounts = string(mounts)
	for _, dir := range []string{"/", "/etc", "/in", "/out", "/tmp", "/dev/shm", "/data"} {
		r.Writes[dir] = ""
		if err := os.WriteFile(filepath.Join(dir, "written"), []byte("x"), 0o600); err != nil {
			r.Writes[dir] = err.Error()
		}
	}
	if self, err := os.ReadFile("/probe"); err == nil && os.WriteFile("/tmp/probe", self, 0o700) == nil {
		r.CanExecTmp = exec.Command("/tmp/probe", "exit", "0").Run() == nil
	}
	raw, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile("/out/report.json", raw, 0o600)
}

func exit(args []string) error {
	code, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	os.Exit(code)
	return nil
}

func both([]string) error {
	fmt.Println("to stdout")
	fmt.Fprintln(os.Stderr, "to stderr")
	return nil
}

func allocate([]string) error {
	var kept [][]byte
	for {
		block := make([]byte, 1<<20)
		for i := 0; i < len(block); i += 4096 {
			block[i] = 1
		}
		kept = append(kept, block)
		_ = kept
	}
}

// oomChild loses a helper to the memory limit, and goes on.
func oomChild([]string) error {
	if err := exec.Command("/probe", "allocate").Run(); err == nil {
		return errors.New("the helper was not killed")
	}
	return nil
}

func ignoreTerm([]string) error {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT)
	return wait(nil)
}

func onTerm([]string) error {
	terms := make(chan os.Signal, 1)
	signal.Notify(terms, syscall.SIGTERM)
	fmt.Println("ready")
	<-terms
	return os.WriteFile("/out/checkpoint", []byte("saved"), 0o644)
}

func fill([]string) error {
	block := make([]byte, 1<<20)
	for i := 0; ; i++ {
		if err := os.WriteFile(fmt.Sprintf("/out/block-%d", i), block, 0o600); err != nil {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// fillHidden writes to a file that has no name any more.
func fillHidden([]string) error {
	signal.Ignore(syscall.SIGXFSZ)
	f, err := os.Create("/out/hidden")
	if err != nil {
		return err
	}
	if err := os.Remove("/out/hidden"); err != nil {
		return err
	}
	block := make([]byte, 1<<20)
	for written := 0; ; written += len(block) {
		if _, err := f.Write(block); err != nil {
			return os.WriteFile("/out/stopped-at", []byte(strconv.Itoa(written)), 0o600)
		}
	}
}

func fillDeep([]string) error {
	if err := os.Chdir("/out"); err != nil {
		return err
	}
	for {
		if err := os.Mkdir("d", 0o700); err != nil {
			return err
		}
		if err := os.Chdir("d"); err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// hide takes the permission away from a directory that it then fills.
func hide([]string) error {
	if err := os.Mkdir("/out/hidden", 0o700); err != nil {
		return err
	}
	f, err := os.Create("/out/hidden/file")
	if err != nil {
		return err
	}
	if err := f.Truncate(64 << 20); err != nil {
		return err
	}
	if err := os.Chmod("/out/hidden", 0); err != nil {
		return err
	}
	return wait(nil)
}

func links([]string) error {
	return errors.Join(
		os.Symlink("/", "/out/root"),
		os.Symlink("/proc", "/out/proc"),
		os.Symlink(".", "/out/self"),
		syscall.Mkfifo("/out/fifo", 0o600),
		os.WriteFile("/out/file", []byte("1234567"), 0o600),
	)
}

func chatter(args []string) error {
	limit, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	line := strings.Repeat("x", 1023) + "\n"
	for written := 0; written < limit; written += len(line) {
		if _, err := os.Stdout.WriteString(line); err != nil {
			return err
		}
	}
	return nil
}

// spawn starts processes until the kernel refuses, and says how many.
func spawn([]string) error {
	started := 0
	for started < 2000 {
		if err := exec.Command("/probe", "wait").Start(); err != nil {
			break
		}
		started++
	}
	return os.WriteFile("/out/started", []byte(strconv.Itoa(started)), 0o600)
}

func wait([]string) error {
	fmt.Println("waiting")
	for {
		time.Sleep(time.Hour)
	}
}
