package docker

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	dcontainer "github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/system"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/container"
)

func goodInfo() system.Info {
	return system.Info{
		ServerVersion: "28.5.2", OSType: "linux", Architecture: "x86_64",
		MemoryLimit: true, SwapLimit: true, PidsLimit: true, CPUCfsQuota: true, CgroupVersion: "2",
		SecurityOptions: []string{"name=apparmor", "name=seccomp,profile=builtin", "name=cgroupns"},
		Runtimes:        map[string]system.RuntimeWithStatus{"runc": {}, "runsc": {}},
		InitCommit:      system.Commit{ID: "de40ad0"},
	}
}

func TestJudge(t *testing.T) {
	for _, test := range []struct {
		name    string
		adjust  func(*system.Info)
		runtime string
		user    bool   // the worker is not root
		refused string // part of the error, empty for none
		check   func(Engine) bool
	}{
		{name: "good", check: func(e Engine) bool { return e.init && e.Platform == "linux/amd64" && len(e.Warnings) == 0 }},
		{name: "arm", adjust: func(i *system.Info) { i.Architecture = "aarch64" }, check: func(e Engine) bool { return e.Platform == "linux/arm64" }},
		{name: "no init", adjust: func(i *system.Info) { i.InitCommit.ID = "N/A" }, check: func(e Engine) bool { return !e.init }},
		{name: "Debian's init", adjust: func(i *system.Info) { i.InitCommit.ID = "" }, check: func(e Engine) bool { return e.init }},
		{name: "rootless", user: true, adjust: func(i *system.Info) { i.SecurityOptions = append(i.SecurityOptions, "name=rootless") }, check: func(e Engine) bool { return e.rootless }},
		{name: "remapped", adjust: func(i *system.Info) { i.SecurityOptions = append(i.SecurityOptions, "name=userns") }, check: func(e Engine) bool { return e.remapped }},
		{name: "remapped, not root", user: true, adjust: func(i *system.Info) { i.SecurityOptions = append(i.SecurityOptions, "name=userns") }, refused: "userns-remap"},
		{name: "windows", adjust: func(i *system.Info) { i.OSType = "windows" }, refused: "windows"},
		{name: "no memory limit", adjust: func(i *system.Info) { i.MemoryLimit = false }, refused: "cannot limit memory"},
		{name: "no PID limit", adjust: func(i *system.Info) { i.PidsLimit = false }, refused: "cannot limit memory and processes"},
		{name: "no seccomp", adjust: func(i *system.Info) { i.SecurityOptions = nil }, refused: "seccomp"},
		{name: "seccomp unconfined", adjust: func(i *system.Info) { i.SecurityOptions = []string{"name=seccomp,profile=unconfined"} }, refused: "seccomp"},
		{name: "no seccomp, gVisor", runtime: "runsc", adjust: func(i *system.Info) { i.SecurityOptions = nil }, check: func(Engine) bool { return true }},
		{name: "runtime missing", runtime: "kata", refused: `no runtime "kata" (it has runc, runsc)`},
		{name: "no swap accounting", adjust: func(i *system.Info) { i.SwapLimit, i.CgroupVersion = false, "1" }, check: func(e Engine) bool { return len(e.Warnings) == 1 }},
	} {
		t.Run(test.name, func(t *testing.T) {
			info := goodInfo()
			if test.adjust != nil {
				test.adjust(&info)
			}
			got, err := judge(info, test.runtime, !test.user)
			if test.refused != "" {
				if api.KindOf(err) != api.Unsupported || !strings.Contains(err.Error(), test.refused) {
					t.Errorf("error %v, want kind unsupported and %q", err, test.refused)
				}
			} else if err != nil || !test.check(got) {
				t.Errorf("engine %+v, error %v", got, err)
			}
		})
	}
}

func TestIdentify(t *testing.T) {
	root, user := identity{0, 0}, identity{1000, 100}
	for _, test := range []struct {
		engine Engine
		self   identity
		want   identity
	}{
		{Engine{}, root, nobody},
		{Engine{remapped: true}, root, nobody},
		{Engine{}, user, user},
		{Engine{rootless: true}, user, root},
	} {
		if got := identify(test.engine, test.self); got != test.want {
			t.Errorf("identify(%+v, %v) = %v, want %v", test.engine, test.self, got, test.want)
		}
	}
}

func TestGPUs(t *testing.T) {
	gpus := []string{"GPU-1", "GPU-2"}
	for _, test := range []struct {
		name    string
		gpus    []string
		cdi     []string
		driver  string
		ids     []string
		visible string
	}{
		{name: "none", visible: "void"},
		{name: "none, with CDI", cdi: []string{"nvidia.com/gpu=GPU-1"}, visible: "void"},
		{name: "by driver", gpus: gpus, ids: gpus, visible: "GPU-1,GPU-2"},
		{name: "one unknown to CDI", gpus: gpus, cdi: []string{"nvidia.com/gpu=GPU-1", "nvidia.com/gpu=all"}, ids: gpus, visible: "GPU-1,GPU-2"},
		{name: "by CDI", gpus: gpus, cdi: []string{"nvidia.com/gpu=GPU-2", "nvidia.com/gpu=GPU-1"}, driver: "cdi",
			ids: []string{"nvidia.com/gpu=GPU-1", "nvidia.com/gpu=GPU-2"}, visible: "void"},
	} {
		t.Run(test.name, func(t *testing.T) {
			spec := container.Spec{GPUs: test.gpus, Env: []string{"NVIDIA_VISIBLE_DEVICES=all"}}
			engine := Engine{cdiDevices: test.cdi}
			requests := deviceRequests(test.gpus, engine)
			if len(test.gpus) == 0 && len(requests) > 0 {
				t.Errorf("requests %+v without GPUs", requests)
			}
			if len(test.gpus) > 0 && (len(requests) != 1 || requests[0].Driver != test.driver || requests[0].Count != 0 || !slices.Equal(requests[0].DeviceIDs, test.ids)) {
				t.Errorf("requests %+v", requests)
			}
			env := environment(spec, imageFacts{}, usesCDI(test.gpus, engine))
			if want := []string{"HOME=/tmp", "NVIDIA_VISIBLE_DEVICES=" + test.visible}; !slices.Equal(env, want) {
				t.Errorf("environment %q, want %q", env, want)
			}
		})
	}
}

func TestEnvironmentKeepsHome(t *testing.T) {
	for _, test := range []struct{ image, spec []string }{
		{image: []string{"HOME=/root"}},
		{spec: []string{"HOME=/work"}},
	} {
		env := environment(container.Spec{Env: test.spec}, imageFacts{env: test.image}, false)
		if slices.Contains(env, "HOME=/tmp") {
			t.Errorf("%+v: HOME is replaced: %q", test, env)
		}
	}
}

func TestHostConfig(t *testing.T) {
	spec := container.Spec{Outputs: "/o", MilliCPUs: 1500, MemoryBytes: 1, Network: true}
	got := hostConfig(spec, imageFacts{volumes: []string{"/data", "data/", "/out", "/tmp/", "/", "/../x"}}, Engine{}, nobody,
		Options{Network: "jobs", OCIRuntime: "runsc"})
	if got.Memory != minMemoryBytes || got.MemorySwap != got.Memory || got.NanoCPUs != 1_500_000_000 || *got.PidsLimit != container.DefaultPIDs {
		t.Errorf("limits %+v", got.Resources)
	}
	if got.NetworkMode != "jobs" || got.Runtime != "runsc" || got.Init != nil || got.AutoRemove || got.Privileged {
		t.Errorf("host config %+v", got)
	}
	var covered []string
	for target := range got.Tmpfs {
		covered = append(covered, target)
	}
	slices.Sort(covered)
	if want := []string{"/data", "/in", "/tmp", "/x"}; !slices.Equal(covered, want) {
		t.Errorf("tmpfs at %q, want %q", covered, want)
	}
	if got := hostConfig(container.Spec{}, imageFacts{}, Engine{init: true}, nobody, Options{}); got.Init == nil || !*got.Init || got.NetworkMode != "none" {
		t.Errorf("init %v, network %q", got.Init, got.NetworkMode)
	}
	var _ *dcontainer.HostConfig = got
}

func TestBlameImage(t *testing.T) {
	r, err := New(Options{Owner: "x"})
	must(t, err)
	defer r.Close()
	for words, want := range map[string]api.Kind{
		"no matching manifest for linux/amd64 in the manifest list entries":                                 api.Unsupported,
		"manifest for x@sha256:1 not found: manifest unknown: manifest unknown":                             api.NotFound,
		"pull access denied for x, repository does not exist or may require 'docker login'":                 api.NotFound,
		"write /var/lib/docker/tmp/x: no space left on device":                                              api.Unavailable,
		"Get https://registry.test/v2/: dial tcp: lookup registry.test: no such host":                       api.Unavailable,
		"toomanyrequests: You have reached your pull rate limit":                                            api.Unavailable,
		"invalid diffID for layer 0: expected \"sha256:1\", got \"sha256:2\"":                               api.Unsupported,
		"something that no one has seen before":                                                             api.Internal,
		"failed to register layer: Error processing tar file(exit status 1): unexpected EOF while reading":  api.Unsupported,
		"received unexpected HTTP status: 500 Internal Server Error while asking for the manifest's digest": api.Internal,
	} {
		if got := api.KindOf(r.blameImage("load", engineMessage(words))); got != want {
			t.Errorf("%q: kind %v, want %v", words, got, want)
		}
	}
}

func TestReadProgress(t *testing.T) {
	for body, want := range map[string]string{
		"": "",
		`{"status":"Pulling"}` + "\n" + `{"status":"Done"}`:            "",
		`{"status":"Pulling"}{"errorDetail":{},"error":"disk broken"}`: "disk broken",
		`{"status":`: "unexpected EOF",
		"<html>":     "invalid character",
	} {
		err := readProgress(strings.NewReader(body))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: error %v, want %q", body, err, want)
		}
	}
}

// archiveOf makes a docker-save tar: names and contents in turn, links as "->target".
func archiveOf(t testing.TB, pairs ...string) []byte {
	t.Helper()
	var buffer bytes.Buffer
	w := tar.NewWriter(&buffer)
	for i := 0; i < len(pairs); i += 2 {
		header := &tar.Header{Name: pairs[i], Mode: 0o644, Typeflag: tar.TypeReg, Size: int64(len(pairs[i+1]))}
		if target, ok := strings.CutPrefix(pairs[i+1], "->"); ok {
			header.Typeflag, header.Size, header.Linkname = tar.TypeSymlink, 0, target
			must(t, w.WriteHeader(header))
			continue
		}
		must(t, w.WriteHeader(header))
		_, err := w.Write([]byte(pairs[i+1]))
		must(t, err)
	}
	must(t, w.Close())
	return buffer.Bytes()
}

const amd64Config = `{"os":"linux","architecture":"amd64"}`

func TestArchive(t *testing.T) {
	digest := func(c string) string { return "sha256:" + strings.Repeat(c, 64) }
	blob := func(c string) string { return "blobs/sha256/" + strings.Repeat(c, 64) }
	ociManifest := `{"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"` + digest("c") + `"},"layers":[{"digest":"` + digest("d") + `"}]}`
	for _, test := range []struct {
		name  string
		bytes []byte
		says  string // part of the error, empty for none
	}{
		{"docker save", archiveOf(t, "manifest.json", `[{"Config":"c.json","Layers":["l/layer.tar"]}]`, "c.json", amd64Config, "l/layer.tar", "layer"), ""},
		{"layer twice, one a link", archiveOf(t, "manifest.json", `[{"Config":"c.json","Layers":["a/layer.tar","b/layer.tar"]}]`, "c.json", amd64Config, "a/layer.tar", "layer", "b/layer.tar", "->../a/layer.tar"), ""},
		{"OCI layout", archiveOf(t, "index.json", `{"manifests":[{"digest":"`+digest("a")+`"}]}`, blob("a"), ociManifest, blob("c"), amd64Config, blob("d"), "layer"), ""},
		{"OCI index in an index, with attestation", archiveOf(t, "index.json", `{"manifests":[{"digest":"`+digest("b")+`"}]}`,
			blob("b"), `{"manifests":[{"digest":"`+digest("a")+`"},{"digest":"`+digest("e")+`","platform":{"os":"unknown"}},{"digest":"`+digest("f")+`"}]}`,
			blob("a"), ociManifest, blob("c"), amd64Config, blob("d"), "layer"), ""},
		{"empty", nil, "holds no files"},
		{"not a tar", bytes.Repeat([]byte("hello "), 200), "not a tar"},
		{"compressed", []byte("\x1f\x8b\x08\x00\x00"), "decompress"},
		{"some other tar", archiveOf(t, "README", "hi"), "neither manifest.json"},
		{"other platform", archiveOf(t, "manifest.json", `[{"Config":"c.json"}]`, "c.json", `{"os":"windows","architecture":"amd64"}`), "windows/amd64"},
		{"two images", archiveOf(t, "manifest.json", `[{"Config":"c.json"},{"Config":"c.json"}]`, "c.json", amd64Config), "save exactly one"},
		{"broken JSON", archiveOf(t, "manifest.json", `[{`), "manifest.json"},
		{"layer missing", archiveOf(t, "manifest.json", `[{"Config":"c.json","Layers":["l"]}]`, "c.json", amd64Config), `lacks layer "l"`},
		{"config missing", archiveOf(t, "manifest.json", `[{"Config":"../../etc/passwd"}]`), "lacks"},
		{"link loop", archiveOf(t, "manifest.json", `[{"Config":"a"}]`, "a", "->b", "b", "->a"), `lacks "a"`},
		{"index that holds itself", archiveOf(t, "index.json", `{"manifests":[{"digest":"`+digest("a")+`"}]}`, blob("a"), `{"manifests":[{"digest":"`+digest("a")+`"}]}`), "it is for"},
		{"digest that is a path", archiveOf(t, "index.json", `{"manifests":[{"digest":"sha256:../../../etc/passwd"}]}`), "not a sha256 digest"},
		{"huge metadata", archiveOf(t, "manifest.json", strings.Repeat(" ", maxMetadataBytes+1)), "at most"},
	} {
		t.Run(test.name, func(t *testing.T) {
			out, err := rewrite(test.bytes)
			if test.says != "" {
				if api.KindOf(err) != api.Unsupported || !strings.Contains(err.Error(), test.says) {
					t.Errorf("error %v, want kind unsupported and %q", err, test.says)
				}
				return
			}
			must(t, err)
			checkRewritten(t, out)
		})
	}
}

// rewrite does to an archive what Ensure does on its way to the engine.
func rewrite(archive []byte) ([]byte, error) {
	contents, err := readArchive(bytes.NewReader(archive), int64(len(archive)))
	if err != nil {
		return nil, err
	}
	image, err := contents.image("linux/amd64")
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = contents.writeTo(&out, image, "muster/x:y")
	return out.Bytes(), err
}

func checkRewritten(t *testing.T, archive []byte) {
	t.Helper()
	files := map[string]string{}
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		content, err := io.ReadAll(r)
		must(t, err)
		files[header.Name] = string(content)
	}
	var manifests []dockerManifest
	must(t, json.Unmarshal([]byte(files["manifest.json"]), &manifests))
	if len(manifests) != 1 || !slices.Equal(manifests[0].RepoTags, []string{"muster/x:y"}) || files[manifests[0].Config] != amd64Config || len(manifests[0].Layers) == 0 {
		t.Errorf("manifest %+v", manifests)
	}
	for _, layer := range manifests[0].Layers {
		if files[layer] != "layer" {
			t.Errorf("layer %s holds %q", layer, files[layer])
		}
	}
}

func FuzzArchive(f *testing.F) {
	f.Add(archiveOf(f, "manifest.json", `[{"Config":"c.json","Layers":["l"]}]`, "c.json", amd64Config, "l", "layer"))
	f.Add(archiveOf(f, "index.json", `{"manifests":[{"digest":"sha256:`+strings.Repeat("a", 64)+`"}]}`, "blobs/sha256/"+strings.Repeat("a", 64), "{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		out, err := rewrite(data)
		if err == nil {
			if _, err := rewrite(out); err != nil {
				t.Errorf("what was written cannot be read: %v", err)
			}
		}
	})
}

func TestTag(t *testing.T) {
	one, err := New(Options{Owner: "one"})
	must(t, err)
	defer one.Close()
	image := container.Image{Digest: "sha256:" + strings.Repeat("a", 64)}
	tag, err := one.tag(image)
	if err != nil || !strings.HasPrefix(tag, "muster/") || !strings.HasSuffix(tag, ":"+strings.Repeat("a", 64)) {
		t.Errorf("tag %q, %v", tag, err)
	}
	for _, digest := range []string{"", "sha256:", "md5:" + strings.Repeat("a", 64), "sha256:" + strings.Repeat("A", 64), "sha256:" + strings.Repeat("a", 63) + "/"} {
		if _, err := one.tag(container.Image{Digest: digest}); api.KindOf(err) != api.Unsupported {
			t.Errorf("digest %q: error %v", digest, err)
		}
	}
}

func TestHandOver(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("NOT TESTED: giving directories to another user; it takes root")
	}
	for _, engine := range []Engine{{}, {remapped: true}} {
		spec := container.Spec{Inputs: t.TempDir(), Outputs: t.TempDir()}
		must(t, os.Chmod(spec.Inputs, 0o700))
		must(t, os.Chmod(spec.Outputs, 0o700))
		restore, err := handOver(spec, engine, nobody)
		must(t, err)
		in, err := os.Stat(spec.Inputs)
		must(t, err)
		out, err := os.Stat(spec.Outputs)
		must(t, err)
		if in.Mode().Perm() != 0o755 || owner(out) != 65534 && out.Mode().Perm() != 0o777 {
			t.Errorf("%+v: inputs %v, outputs %v of %d", engine, in.Mode(), out.Mode(), owner(out))
		}
		must(t, restore())
		if out, err = os.Stat(spec.Outputs); err != nil || out.Mode().Perm() != 0o700 || owner(out) != 0 {
			t.Errorf("%+v: restored to %v of %d, %v", engine, out.Mode(), owner(out), err)
		}
	}
}

func TestEnsureWithoutArchive(t *testing.T) {
	r := engine(t)
	image := container.Image{Archive: filepath.Join(t.TempDir(), runtime.GOOS), Digest: "sha256:" + strings.Repeat("c", 64)}
	if err := r.Ensure(context.Background(), image); !errors.Is(err, os.ErrNotExist) || api.KindOf(err) != api.Internal {
		t.Errorf("error %v, want one that blames this machine", err)
	}
}

// clockedEngine is as much of an engine as says how a container ended. Its clock
// is not this machine's.
type clockedEngine struct {
	state  dcontainer.State
	killed time.Time // by its clock, through it; zero for not
}

func (e *clockedEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Api-Version", "1.47")
	w.Header().Set("Content-Type", "application/json")
	switch {
	case strings.HasSuffix(r.URL.Path, "/_ping"):
	case strings.HasSuffix(r.URL.Path, "/containers/c/json"):
		json.NewEncoder(w).Encode(map[string]any{"Id": "c", "State": e.state})
	case strings.HasSuffix(r.URL.Path, "/events"):
		at := e.killed.UnixNano()
		if !e.killed.IsZero() && stampNanos(r, "since") <= at && at <= stampNanos(r, "until") {
			json.NewEncoder(w).Encode(map[string]any{"Type": "container", "Action": "kill", "Actor": map[string]any{"Attributes": map[string]string{"signal": "9"}}})
		}
	default:
		http.NotFound(w, r)
	}
}

func stampNanos(r *http.Request, name string) int64 {
	seconds, nanos, _ := strings.Cut(r.URL.Query().Get(name), ".")
	s, _ := strconv.ParseInt(seconds, 10, 64)
	n, _ := strconv.ParseInt(nanos, 10, 64)
	return s*1e9 + n
}

// A kill through the engine is nobody's want of memory, whatever the engine's
// clock shows: in a virtual machine it may be behind by hours, or ahead.
func TestVerdictByTheEnginesClock(t *testing.T) {
	for _, behind := range []time.Duration{0, 3 * time.Hour, -3 * time.Hour} {
		finished := time.Now().Add(-behind)
		started := finished.Add(-time.Minute)
		for _, test := range []struct {
			name              string
			killed            time.Time
			started, finished string
			reason            container.Reason // empty for the error says
			says              string
		}{
			{"killed", finished.Add(-time.Millisecond), stamp(started), stamp(finished), "", "somebody else stopped container c (signal 9)"},
			{"told late", finished.Add(killEventDelay / 2), stamp(started), stamp(finished), "", "somebody else stopped"},
			{"out of memory", time.Time{}, stamp(started), stamp(finished), container.OutOfMemory, ""},
			{"no times", finished, "yesterday", "", "", "does not say when container c ran"},
		} {
			e := &clockedEngine{dcontainer.State{ExitCode: exitKilled, StartedAt: test.started, FinishedAt: test.finished}, test.killed}
			server := httptest.NewServer(e)
			r, err := New(Options{Owner: "x", Host: "tcp://" + server.Listener.Addr().String()})
			must(t, err)
			result, err := r.verdict(t.Context(), "c", container.Exited)
			if test.says != "" && (api.KindOf(err) != api.Unavailable || !strings.Contains(err.Error(), test.says)) {
				t.Errorf("%s, clock behind by %s: %+v, %v; want %q", test.name, behind, result, err, test.says)
			}
			if test.says == "" && (err != nil || result.Reason != test.reason) {
				t.Errorf("%s, clock behind by %s: %+v, %v; want %s", test.name, behind, result, err, test.reason)
			}
			r.Close()
			server.Close()
		}
	}
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }
