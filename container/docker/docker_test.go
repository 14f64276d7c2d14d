package docker

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	dcontainer "github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/client"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"go.uber.org/goleak"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/container"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(buildRoot)
		os.Exit(code)
	}))
}

const skipVariable = "MUSTER_SKIP_DOCKER"

// engine returns a Runtime on the machine's engine with an owner of its own,
// and checks at the end of the test that nothing of it is left.
func engine(t testing.TB, adjust ...func(*Options)) *Runtime {
	t.Helper()
	if os.Getenv(skipVariable) == "1" {
		t.Skipf("%s=1: NOT TESTED: running jobs in a real Docker engine", skipVariable)
	}
	opts := Options{Owner: fmt.Sprintf("test-%s-%d", t.Name(), time.Now().UnixNano()), StopGrace: time.Second}
	for _, f := range adjust {
		f(&opts)
	}
	r, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Probe(t.Context()); err != nil {
		r.Close()
		t.Fatalf("%v\n\nthis test needs a Docker engine: run deploy/dev/docker-engine.sh, or set %s=1 to leave it out", err, skipVariable)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		if left := containers(t, r); len(left) > 0 {
			t.Errorf("containers left behind: %v", left)
		}
		if _, err := r.Sweep(ctx); err != nil {
			t.Error(err)
		}
		forgetAll(t, r)
		r.Close()
	})
	return r
}

func containers(t testing.TB, r *Runtime) []string {
	t.Helper()
	found, err := r.client.ContainerList(context.Background(), dcontainer.ListOptions{All: true, Filters: filters.NewArgs(filters.Arg("label", labelOwner+"="+r.opts.Owner))})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range found {
		names = append(names, c.ID)
	}
	return names
}

func forgetAll(t testing.TB, r *Runtime) {
	t.Helper()
	for _, path := range []string{probeArchive(t).Archive, ociArchive(t).Archive} {
		if err := r.Forget(context.Background(), imageOf(t, path)); err != nil {
			t.Error(err)
		}
	}
}

// The probe program and the images around it are built once per test binary.
var (
	probeArchive = built(func(t testing.TB, dir string) container.Image {
		path := filepath.Join(dir, "probe.tar")
		// The tag is one that an owner may well have; loading must not touch it.
		tag, err := name.NewTag("docker.io/library/ubuntu:latest")
		must(t, err)
		must(t, tarball.WriteToFile(path, tag, probeImage(t, dir, runtime.GOARCH)))
		return imageOf(t, path)
	})
	ociArchive = built(func(t testing.TB, dir string) container.Image {
		// Two platforms, of which one runs here.
		other := "arm64"
		if runtime.GOARCH == other {
			other = "amd64"
		}
		index := mutate.AppendManifests(empty.Index,
			mutate.IndexAddendum{Add: probeImage(t, dir, other)},
			mutate.IndexAddendum{Add: probeImage(t, dir, runtime.GOARCH)})
		index = mutate.IndexMediaType(index, types.OCIImageIndex)
		return imageOf(t, ociTar(t, dir, "oci", index))
	})
	foreignArchive = built(func(t testing.TB, dir string) container.Image {
		path := filepath.Join(dir, "foreign.tar")
		tag, err := name.NewTag("muster.test/foreign:latest")
		must(t, err)
		must(t, tarball.WriteToFile(path, tag, probeImage(t, dir, "riscv64")))
		return imageOf(t, path)
	})
)

func built(build func(t testing.TB, dir string) container.Image) func(testing.TB) container.Image {
	var once sync.Once
	var image container.Image
	return func(t testing.TB) container.Image {
		once.Do(func() { image = build(t, buildDir(t)) })
		if image.Digest == "" {
			t.Fatal("building the test image failed earlier")
		}
		return image
	}
}

// buildRoot outlives single tests; TestMain removes it.
var buildRoot string

func buildDir(t testing.TB) string {
	if buildRoot == "" {
		var err error
		buildRoot, err = os.MkdirTemp("", "muster-docker-test-")
		must(t, err)
	}
	return buildRoot
}

func probeImage(t testing.TB, dir, arch string) v1.Image {
	t.Helper()
	binary := filepath.Join(dir, "probe")
	if _, err := os.Stat(binary); err != nil {
		build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", binary, "./testdata/probe")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build the probe: %v\n%s", err, out)
		}
	}
	program, err := os.ReadFile(binary)
	must(t, err)
	content := tarOf(t, map[string]string{
		"probe": string(program),
		// A hostile image: it says that nobody belongs to the group of root.
		"etc/passwd":     "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
		"etc/group":      "root:x:0:nobody\ndisk:x:6:nobody\nnogroup:x:65534:nobody\n",
		"data/packaged":  "in the image",
		"not-executable": "text",
	})
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil })
	must(t, err)
	image, err := mutate.AppendLayers(mutate.MediaType(empty.Image, types.OCIManifestSchema1), layer)
	must(t, err)
	image, err = mutate.ConfigFile(image, &v1.ConfigFile{
		OS: "linux", Architecture: arch,
		RootFS:  v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{diffID(t, layer)}},
		History: []v1.History{{CreatedBy: "test"}},
		Config: v1.Config{
			Entrypoint: []string{"/probe"},
			Cmd:        []string{"exit", "7"},
			Env:        []string{"FROM_IMAGE=yes", "NVIDIA_VISIBLE_DEVICES=all"},
			User:       "root",
			Volumes:    map[string]struct{}{"/data": {}},
			Labels:     map[string]string{labelOwner: "somebody else"},
		},
	})
	must(t, err)
	return image
}

func diffID(t testing.TB, layer v1.Layer) v1.Hash {
	id, err := layer.DiffID()
	must(t, err)
	return id
}

func ociTar(t testing.TB, dir, base string, index v1.ImageIndex) string {
	t.Helper()
	folder := filepath.Join(dir, base)
	_, err := layout.Write(folder, index)
	must(t, err)
	path := folder + ".tar"
	file, err := os.Create(path)
	must(t, err)
	w := tar.NewWriter(file)
	must(t, w.AddFS(os.DirFS(folder)))
	must(t, w.Close())
	must(t, file.Close())
	return path
}

func tarOf(t testing.TB, files map[string]string) []byte {
	t.Helper()
	var buffer bytes.Buffer
	w := tar.NewWriter(&buffer)
	// A directory without an entry of its own gets a mode that depends on the
	// engine's storage driver.
	must(t, w.WriteHeader(&tar.Header{Name: "data/", Mode: 0o755, Typeflag: tar.TypeDir}))
	for _, path := range slices.Sorted(maps.Keys(files)) {
		mode := int64(0o755)
		if path == "not-executable" {
			mode = 0o644
		}
		must(t, w.WriteHeader(&tar.Header{Name: path, Mode: mode, Size: int64(len(files[path])), Typeflag: tar.TypeReg}))
		_, err := w.Write([]byte(files[path]))
		must(t, err)
	}
	must(t, w.Close())
	return buffer.Bytes()
}

func imageOf(t testing.TB, path string) container.Image {
	t.Helper()
	raw, err := os.ReadFile(path)
	must(t, err)
	sum := sha256.Sum256(raw)
	return container.Image{Archive: path, Digest: "sha256:" + hex.EncodeToString(sum[:])}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// spec is a run of the probe with test-sized limits.
func spec(t testing.TB, command ...string) container.Spec {
	t.Helper()
	return container.Spec{
		ID:          "attempt-" + t.Name(),
		Image:       probeArchive(t),
		Command:     command,
		Outputs:     t.TempDir(),
		MemoryBytes: 64 << 20,
		OutputBytes: 8 << 20,
		Timeout:     time.Minute,
	}
}

func run(t *testing.T, r *Runtime, s container.Spec) container.Result {
	t.Helper()
	must(t, r.Ensure(t.Context(), s.Image))
	result, err := r.Run(t.Context(), s)
	must(t, err)
	return result
}

func expect(t *testing.T, got container.Result, reason container.Reason) {
	t.Helper()
	if got.Reason != reason {
		t.Fatalf("result %+v, want reason %s", got, reason)
	}
}

type report struct {
	UID, GID, PID int
	Groups        []int
	Status        map[string]string
	Interfaces    []string
	Hostname      string
	Env, Args     []string
	Input         string
	Devices       []string
	Mounts        string
	Writes        map[string]string
	CanExecTmp    bool
}

func readReport(t *testing.T, s container.Spec) report {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(s.Outputs, "report.json"))
	must(t, err)
	var r report
	must(t, json.Unmarshal(raw, &r))
	return r
}

func TestSandbox(t *testing.T) {
	r := engine(t)
	s := spec(t, "report", "--flag")
	s.Env = []string{"FROM_SPEC=1", "NVIDIA_VISIBLE_DEVICES=all"}
	s.Inputs = t.TempDir()
	must(t, os.Chmod(s.Inputs, 0o700)) // as os.MkdirTemp makes them
	must(t, os.WriteFile(filepath.Join(s.Inputs, "input.txt"), []byte("hello"), 0o644))
	before, err := os.Stat(s.Outputs)
	must(t, err)

	result := run(t, r, s)
	if !result.OK() || result.OutputBytes == 0 || result.Started.After(result.Ended) {
		t.Fatalf("result %+v", result)
	}
	got := readReport(t, s)

	if got.UID == 0 || os.Getuid() == 0 && (got.UID != 65534 || got.GID != 65534) {
		t.Errorf("runs as %d:%d", got.UID, got.GID)
	}
	if slices.ContainsFunc(got.Groups, func(g int) bool { return g != got.GID }) {
		t.Errorf("supplementary groups %v, want none", got.Groups)
	}
	for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		if got.Status[set] != "0000000000000000" {
			t.Errorf("%s = %s, want none", set, got.Status[set])
		}
	}
	if got.Status["NoNewPrivs"] != "1" || got.Status["Seccomp"] != "2" {
		t.Errorf("NoNewPrivs %s, Seccomp %s, want 1 and 2 (a filter)", got.Status["NoNewPrivs"], got.Status["Seccomp"])
	}
	if !slices.Equal(got.Interfaces, []string{"lo"}) {
		t.Errorf("network interfaces %v, want lo alone", got.Interfaces)
	}
	for dir, writable := range map[string]bool{"/": false, "/etc": false, "/in": false, "/out": true, "/tmp": true, "/dev/shm": true, "/data": true} {
		if (got.Writes[dir] == "") != writable {
			t.Errorf("writing to %s: %q, want writable %t", dir, got.Writes[dir], writable)
		}
	}
	if !got.CanExecTmp {
		t.Error("cannot execute from /tmp")
	}
	if got.Input != "hello" || got.Hostname != "muster" || !slices.Equal(got.Args, s.Command) {
		t.Errorf("input %q, hostname %q, arguments %q", got.Input, got.Hostname, got.Args)
	}
	for _, pair := range []string{"FROM_IMAGE=yes", "FROM_SPEC=1", "HOME=/tmp", "NVIDIA_VISIBLE_DEVICES=void"} {
		if !slices.Contains(got.Env, pair) {
			t.Errorf("environment %q lacks %s", got.Env, pair)
		}
	}
	for _, device := range got.Devices {
		if !slices.Contains([]string{"core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"}, filepath.Base(device)) {
			t.Errorf("device %s is visible", device)
		}
	}
	checkMounts(t, got.Mounts)

	after, err := os.Stat(s.Outputs)
	must(t, err)
	if after.Mode() != before.Mode() || owner(after) != owner(before) {
		t.Errorf("the outputs directory is %v of %d afterwards, was %v of %d", after.Mode(), owner(after), before.Mode(), owner(before))
	}
}

// checkMounts looks at mount options as the kernel reports them inside.
func checkMounts(t *testing.T, mountinfo string) {
	t.Helper()
	want := map[string][]string{
		"/":     {"ro"},
		"/in":   {"ro"},
		"/out":  {"rw"},
		"/tmp":  {"rw", "nosuid", "nodev", "size=32768k"},
		"/data": {"rw", "nosuid", "nodev", "size=32768k"},
	}
	for line := range strings.Lines(mountinfo) {
		fields := strings.Fields(line)
		for _, option := range want[fields[4]] {
			if !slices.Contains(strings.Split(fields[5]+","+fields[len(fields)-1], ","), option) {
				t.Errorf("mount %s lacks %s: %s", fields[4], option, line)
			}
		}
		if fields[4] == "/tmp" && strings.Contains(fields[5], "noexec") {
			t.Errorf("/tmp is noexec: %s", line)
		}
		delete(want, fields[4])
	}
	for target := range want {
		t.Errorf("no mount at %s", target)
	}
}

func TestEmptyInput(t *testing.T) {
	r := engine(t)
	s := spec(t, "report")
	if result := run(t, r, s); !result.OK() {
		t.Fatalf("result %+v", result)
	}
	if got := readReport(t, s); got.Writes["/in"] == "" {
		t.Error("the empty /in is writable")
	}
}

func TestNetwork(t *testing.T) {
	r := engine(t)
	if _, err := r.client.NetworkInspect(t.Context(), r.opts.Network, network.InspectOptions{}); cerrdefs.IsNotFound(err) {
		t.Skipf("NOT TESTED: jobs with a network; this engine has no network %q", r.opts.Network)
	}
	s := spec(t, "report")
	s.Network = true
	if result := run(t, r, s); !result.OK() {
		t.Fatalf("result %+v", result)
	}
	if got := readReport(t, s); len(got.Interfaces) != 2 {
		t.Errorf("network interfaces %v, want lo and one more", got.Interfaces)
	}
}

func TestHowRunsEnd(t *testing.T) {
	r := engine(t)
	for _, test := range []struct {
		name     string
		command  []string
		adjust   func(*container.Spec)
		reason   container.Reason
		exitCode int // -1: any
	}{
		{name: "success", command: []string{"exit", "0"}, reason: container.Exited},
		{name: "failure", command: []string{"exit", "42"}, reason: container.Exited, exitCode: 42},
		{name: "exit-137-of-its-own", command: []string{"exit", "137"}, reason: container.OutOfMemory, exitCode: 137}, // see verdict
		{name: "exit-143-of-its-own", command: []string{"exit", "143"}, reason: container.Exited, exitCode: 143},
		{name: "image's-own-command", reason: container.Exited, exitCode: 7},
		{name: "out-of-memory", command: []string{"allocate"}, reason: container.OutOfMemory, exitCode: 137},
		{name: "helper-out-of-memory", command: []string{"oom-child"}, reason: container.Exited},
		{name: "timeout", command: []string{"ignore-term"}, adjust: func(s *container.Spec) { s.Timeout = time.Second }, reason: container.TimedOut, exitCode: -1},
		{name: "output-too-large", command: []string{"fill"}, reason: container.OutputTooLarge, exitCode: -1},
		{name: "sparse-file-in-a-closed-directory", command: []string{"hide"}, adjust: func(s *container.Spec) { s.MemoryBytes, s.OutputBytes = 256<<20, 63<<20 }, reason: container.OutputTooLarge, exitCode: -1},
		{name: "too-deep", command: []string{"fill-deep"}, reason: container.OutputTooLarge, exitCode: -1},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := spec(t, test.command...)
			if test.adjust != nil {
				test.adjust(&s)
			}
			result := run(t, r, s)
			if result.Reason != test.reason || test.exitCode >= 0 && result.ExitCode != test.exitCode {
				t.Errorf("result %+v, want %s with code %d", result, test.reason, test.exitCode)
			}
		})
	}
}

func TestOutOfMemoryIsAlwaysRecognised(t *testing.T) {
	r := engine(t)
	for i := range 20 {
		s := spec(t, "allocate")
		s.Outputs = t.TempDir()
		s.ID += strconv.Itoa(i)
		expect(t, run(t, r, s), container.OutOfMemory)
	}
}

func TestHiddenFileIsBounded(t *testing.T) {
	r := engine(t)
	s := spec(t, "fill-hidden")
	if result := run(t, r, s); !result.OK() {
		t.Fatalf("result %+v", result)
	}
	raw, err := os.ReadFile(filepath.Join(s.Outputs, "stopped-at"))
	must(t, err)
	stopped, err := strconv.Atoi(string(raw))
	must(t, err)
	if limit := 33 << 20; stopped > limit {
		t.Errorf("an unlinked file grew to %d bytes, want at most %d", stopped, limit)
	}
}

func TestLinksAreNotFollowed(t *testing.T) {
	r := engine(t)
	s := spec(t, "links")
	result := run(t, r, s)
	if !result.OK() || result.OutputBytes != 7 {
		t.Errorf("result %+v, want the 7 bytes of the one regular file", result)
	}
}

func TestProcessLimit(t *testing.T) {
	r := engine(t)
	s := spec(t, "spawn")
	s.PIDs = 40
	s.MemoryBytes = 512 << 20
	if result := run(t, r, s); !result.OK() {
		t.Fatalf("result %+v", result)
	}
	raw, err := os.ReadFile(filepath.Join(s.Outputs, "started"))
	must(t, err)
	if started, err := strconv.Atoi(string(raw)); err != nil || started == 0 || started >= 40 {
		t.Errorf("%s processes were started under a limit of 40", raw)
	}
}

func TestLogs(t *testing.T) {
	r := engine(t)
	t.Run("both streams", func(t *testing.T) {
		var logs bytes.Buffer
		s := spec(t, "both")
		s.Logs = &logs
		run(t, r, s)
		if got := logs.String(); !strings.Contains(got, "to stdout\n") || !strings.Contains(got, "to stderr\n") {
			t.Errorf("logs %q", got)
		}
	})
	t.Run("cut", func(t *testing.T) {
		var logs bytes.Buffer
		s := spec(t, "chatter", strconv.Itoa(container.MaxLogBytes+5<<20))
		s.Logs = &logs
		if result := run(t, r, s); !result.OK() {
			t.Errorf("result %+v: a program must not fail because its log is full", result)
		}
		if logs.Len() < container.MaxLogBytes || logs.Len() > container.MaxLogBytes+200 || !strings.HasSuffix(logs.String(), "bytes are kept\n") {
			t.Errorf("%d bytes of logs, ending in %q", logs.Len(), logs.Bytes()[max(0, logs.Len()-80):])
		}
	})
	t.Run("none wanted", func(t *testing.T) {
		if result := run(t, r, spec(t, "both")); !result.OK() {
			t.Errorf("result %+v", result)
		}
	})
}

// signalWriter closes ready when the program has written anything.
type signalWriter struct {
	once  sync.Once
	ready chan struct{}
}

func (w *signalWriter) Write(p []byte) (int, error) {
	w.once.Do(func() { close(w.ready) })
	return len(p), nil
}

func TestCancel(t *testing.T) {
	r := engine(t)
	for _, test := range []struct{ name, command string }{
		{"program that saves its work", "on-term"},
		{"program that ignores SIGTERM", "ignore-term"},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			started := &signalWriter{ready: make(chan struct{})}
			s := spec(t, test.command)
			s.Logs = started
			must(t, r.Ensure(ctx, s.Image))
			go func() {
				<-started.ready
				cancel()
			}()
			result, err := r.Run(ctx, s)
			must(t, err)
			expect(t, result, container.Cancelled)
			_, err = os.Stat(filepath.Join(s.Outputs, "checkpoint"))
			if saved := err == nil; saved != (test.command == "on-term") {
				t.Errorf("checkpoint saved: %t", saved)
			}
			if left := containers(t, r); len(left) > 0 {
				t.Errorf("containers left: %v", left)
			}
		})
	}
	t.Run("before it starts", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		result, err := r.Run(ctx, spec(t, "exit", "0"))
		must(t, err)
		expect(t, result, container.Cancelled)
	})
}

// The owner of the machine may stop a container by hand, which says nothing
// about the program.
func TestStoppedBySomebodyElse(t *testing.T) {
	r := engine(t)
	for _, signal := range []string{"SIGKILL", "SIGTERM"} {
		t.Run(signal, func(t *testing.T) {
			started := &signalWriter{ready: make(chan struct{})}
			s := spec(t, "wait")
			s.Logs = started
			must(t, r.Ensure(t.Context(), s.Image))
			killed := make(chan error, 1)
			go func() {
				<-started.ready
				killed <- r.client.ContainerKill(context.Background(), containers(t, r)[0], signal)
			}()
			result, err := r.Run(t.Context(), s)
			must(t, <-killed)
			if api.KindOf(err) != api.Unavailable {
				t.Errorf("result %+v, error %v; want kind unavailable", result, err)
			}
		})
	}
}

func TestCommandThatCannotRun(t *testing.T) {
	r := engine(t)
	dir := t.TempDir()
	for _, test := range []struct {
		entrypoint string
		code       int
		says       string
	}{{"/nonexistent", 127, "/nonexistent"}, {"/not-executable", 126, "/not-executable"}, {"", 127, "no command"}} {
		t.Run(strings.TrimPrefix(test.entrypoint, "/")+".", func(t *testing.T) {
			image := probeImage(t, dir, runtime.GOARCH)
			configFile, err := image.ConfigFile()
			must(t, err)
			configFile.Config.Cmd, configFile.Config.Entrypoint = nil, nil
			if test.entrypoint != "" {
				configFile.Config.Entrypoint = []string{test.entrypoint}
			}
			image, err = mutate.ConfigFile(image, configFile)
			must(t, err)
			path := filepath.Join(t.TempDir(), "image.tar")
			tag, err := name.NewTag("muster.test/broken:latest")
			must(t, err)
			must(t, tarball.WriteToFile(path, tag, image))

			var logs bytes.Buffer
			s := spec(t)
			s.Image, s.Logs = imageOf(t, path), &logs
			s.Started = func() {
				if test.entrypoint == "" {
					t.Error("said to have started, without a command")
				}
			}
			defer r.Forget(context.Background(), s.Image)
			result := run(t, r, s)
			expect(t, result, container.Exited)
			if result.ExitCode != test.code || !strings.Contains(logs.String(), test.says) {
				t.Errorf("result %+v, logs %q; want code %d and the reason", result, logs.String(), test.code)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	r := engine(t)
	must(t, r.Ensure(t.Context(), probeArchive(t)))
	full := t.TempDir()
	must(t, os.WriteFile(filepath.Join(full, "old"), nil, 0o600))
	for name, spoil := range map[string]func(*container.Spec){
		"no timeout":         func(s *container.Spec) { s.Timeout = 0 },
		"no ID":              func(s *container.Spec) { s.ID = "" },
		"outputs not empty":  func(s *container.Spec) { s.Outputs = full },
		"outputs missing":    func(s *container.Spec) { s.Outputs = filepath.Join(full, "none") },
		"broken environment": func(s *container.Spec) { s.Env = []string{"NOVALUE"} },
	} {
		s := spec(t, "exit", "0")
		spoil(&s)
		if _, err := r.Run(t.Context(), s); api.KindOf(err) != api.Invalid {
			t.Errorf("%s: error %v, want kind invalid", name, err)
		}
	}
	s := spec(t, "exit", "0")
	s.GPUs = []string{"GPU-00000000-0000-0000-0000-000000000000"}
	if _, err := r.Run(t.Context(), s); err == nil {
		t.Error("a GPU that does not exist was given")
	}
	s = spec(t, "exit", "0")
	s.Image.Digest = "sha256:" + strings.Repeat("0", 64)
	if _, err := r.Run(t.Context(), s); err == nil {
		t.Error("an image that was not ensured was run")
	}
}

func TestSweep(t *testing.T) {
	r := engine(t)
	image := probeArchive(t)
	must(t, r.Ensure(t.Context(), image))
	tag, err := r.tag(image)
	must(t, err)
	leftBehind := func(owner string) string {
		created, err := r.client.ContainerCreate(t.Context(), &dcontainer.Config{
			Image: tag, Cmd: []string{"wait"}, Labels: map[string]string{labelOwner: owner, labelRun: "old"},
		}, &dcontainer.HostConfig{NetworkMode: "none"}, nil, nil, "")
		must(t, err)
		must(t, r.client.ContainerStart(t.Context(), created.ID, dcontainer.StartOptions{}))
		return created.ID
	}
	leftBehind(r.opts.Owner)
	leftBehind(r.opts.Owner)
	other := leftBehind(r.opts.Owner + "-other")
	defer r.remove(context.Background(), other)

	removed, err := r.Sweep(t.Context())
	must(t, err)
	if left := containers(t, r); removed != 2 || len(left) != 0 {
		t.Errorf("swept %d, left %v; want 2 and none", removed, left)
	}
	if _, err := r.client.ContainerInspect(t.Context(), other); err != nil {
		t.Errorf("another worker's container: %v", err)
	}
}

func TestImages(t *testing.T) {
	r := engine(t)
	ctx := t.Context()
	t.Run("OCI layout, one platform of two", func(t *testing.T) {
		s := spec(t, "exit", "0")
		s.Image = ociArchive(t)
		if result := run(t, r, s); !result.OK() {
			t.Errorf("result %+v", result)
		}
	})
	t.Run("wrong platform", func(t *testing.T) {
		err := r.Ensure(ctx, foreignArchive(t))
		if api.KindOf(err) != api.Unsupported || !strings.Contains(err.Error(), "linux/riscv64") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("archive's tags are not taken", func(t *testing.T) {
		before, beforeErr := r.client.ImageInspect(ctx, "ubuntu:latest")
		must(t, r.Ensure(ctx, probeArchive(t)))
		after, afterErr := r.client.ImageInspect(ctx, "ubuntu:latest")
		if before.ID != after.ID || (beforeErr == nil) != (afterErr == nil) {
			t.Errorf("ubuntu:latest was %s (%v), is %s (%v)", before.ID, beforeErr, after.ID, afterErr)
		}
	})
	t.Run("file that is not the digest's", func(t *testing.T) {
		image := foreignArchive(t)
		image.Digest = "sha256:" + strings.Repeat("1", 64)
		if err := r.Ensure(ctx, image); err == nil || api.KindOf(err) != api.Internal {
			t.Errorf("error %v, want one that blames this machine", err)
		}
	})
	t.Run("found after a restart, without the archive", func(t *testing.T) {
		must(t, r.Ensure(ctx, probeArchive(t)))
		again, err := New(r.opts)
		must(t, err)
		defer again.Close()
		image := probeArchive(t)
		image.Archive = filepath.Join(t.TempDir(), "gone")
		must(t, again.Ensure(ctx, image))
	})
	t.Run("forget is per owner", func(t *testing.T) {
		opts := r.opts
		opts.Owner += "-other"
		other, err := New(opts)
		must(t, err)
		defer other.Close()
		image := probeArchive(t)
		must(t, r.Ensure(ctx, image))
		must(t, other.Ensure(ctx, image))
		must(t, other.Forget(ctx, image))
		must(t, other.Forget(ctx, image))
		tag, err := other.tag(image)
		must(t, err)
		if _, err := r.client.ImageInspect(ctx, tag); !cerrdefs.IsNotFound(err) {
			t.Errorf("inspecting a forgotten image: %v", err)
		}
		s := spec(t, "exit", "0")
		if result, err := r.Run(ctx, s); err != nil || !result.OK() {
			t.Errorf("the first worker's image is gone: %+v, %v", result, err)
		}
	})
	t.Run("concurrent", func(t *testing.T) {
		var group sync.WaitGroup
		for range 8 {
			group.Go(func() {
				if err := r.Ensure(ctx, probeArchive(t)); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
	})
	t.Run("references", func(t *testing.T) {
		digest := "sha256:" + strings.Repeat("a", 64)
		for _, image := range []container.Image{
			{Ref: "localhost:1/x:latest", Digest: digest},
			{Ref: "localhost:1/x@sha256:" + strings.Repeat("b", 64), Digest: digest},
			{Ref: "UPPER@" + digest, Digest: digest},
			{Ref: "x@" + digest, Digest: "sha256:short"},
		} {
			if err := r.Ensure(ctx, image); api.KindOf(err) != api.Unsupported {
				t.Errorf("%+v: error %v, want kind unsupported", image, err)
			}
		}
		err := r.Ensure(ctx, container.Image{Ref: "localhost:1/x@" + digest, Digest: digest})
		if err == nil || api.KindOf(err) != api.Unavailable {
			t.Errorf("a registry that is down: %v, want kind unavailable", err)
		}
	})
}

func TestParallelRuns(t *testing.T) {
	r := engine(t)
	must(t, r.Ensure(t.Context(), probeArchive(t)))
	var group sync.WaitGroup
	for i := range 6 {
		s := spec(t, "exit", strconv.Itoa(i))
		s.ID += strconv.Itoa(i)
		group.Go(func() {
			result, err := r.Run(t.Context(), s)
			if err != nil || result.Reason != container.Exited || result.ExitCode != i {
				t.Errorf("run %d: %+v, %v", i, result, err)
			}
		})
	}
	group.Wait()
}

func TestOneLiveRunPerID(t *testing.T) {
	r := engine(t)
	must(t, r.Ensure(t.Context(), probeArchive(t)))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	started := &signalWriter{ready: make(chan struct{})}
	first := spec(t, "wait")
	first.Logs = started
	done := make(chan error, 1)
	go func() {
		_, err := r.Run(ctx, first)
		done <- err
	}()
	<-started.ready
	second := spec(t, "exit", "0")
	if _, err := r.Run(ctx, second); api.KindOf(err) != api.Invalid {
		t.Errorf("a second live run of one ID: error %v", err)
	}
	if swept, err := r.Sweep(ctx); swept != 0 || err != nil {
		t.Errorf("sweep took %d live runs (%v)", swept, err)
	}
	cancel()
	must(t, <-done)
}

func TestNoEngine(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "docker.sock")
	_, err := Probe(t.Context(), Options{Host: "unix://" + socket})
	if api.KindOf(err) != api.Unavailable || !strings.Contains(err.Error(), "no engine answers at unix://"+socket) {
		t.Errorf("error %v", err)
	}
	if !errors.Is(err, fs.ErrNotExist) && !client.IsErrConnectionFailed(err) {
		t.Errorf("the cause is lost: %v", err)
	}
	if _, err := New(Options{Owner: "x", Host: "nonsense"}); api.KindOf(err) != api.Invalid {
		t.Errorf("error %v", err)
	}
	if _, err := New(Options{}); api.KindOf(err) != api.Invalid {
		t.Errorf("error %v", err)
	}
}
