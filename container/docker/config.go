package docker

import (
	"fmt"
	"path"
	"slices"
	"strings"

	dcontainer "github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/mount"

	"github.com/musternet/muster/container"
)

// minMemoryBytes is the least that engines accept.
const minMemoryBytes = 6 << 20

// imageFacts is what matters of an image's own configuration.
type imageFacts struct {
	id      string // the engine's: what is run is what these facts are of
	env     []string
	volumes []string
}

// identity is the user that a program runs as.
type identity struct {
	uid, gid int
}

// nobody is the unprivileged user where the worker is root.
var nobody = identity{65534, 65534}

// identify picks the user for programs: never root on the host. A process
// that is not root uses its own user, so that outputs belong to it.
func identify(engine Engine, self identity) identity {
	switch {
	case engine.rootless:
		return identity{0, 0} // in a rootless engine this is the engine's own, unprivileged user
	case self.uid == 0:
		return nobody
	}
	return self
}

// config says what to run: the image's entrypoint with the spec's command.
func config(spec container.Spec, facts imageFacts, user identity, owner string, cdi bool) *dcontainer.Config {
	return &dcontainer.Config{
		Image:       facts.id,
		Cmd:         spec.Command,
		Env:         environment(spec, facts, cdi),
		User:        fmt.Sprintf("%d:%d", user.uid, user.gid),
		Hostname:    "muster",
		Healthcheck: &dcontainer.HealthConfig{Test: []string{"NONE"}},
		Labels:      map[string]string{labelOwner: owner, labelRun: spec.ID},
	}
}

// environment is the spec's, with GPUs decided here: under an engine whose
// default runtime is NVIDIA's, a variable is all it takes to see every GPU.
func environment(spec container.Spec, facts imageFacts, cdi bool) []string {
	var env []string
	home := slices.ContainsFunc(facts.env, func(pair string) bool { return strings.HasPrefix(pair, "HOME=") })
	for _, pair := range spec.Env {
		name, _, _ := strings.Cut(pair, "=")
		if name == "NVIDIA_VISIBLE_DEVICES" {
			continue
		}
		home = home || name == "HOME"
		env = append(env, pair)
	}
	if !home {
		// The rootfs is read-only, and most frameworks insist on a cache below HOME.
		env = append(env, "HOME="+container.TempDir)
	}
	visible := "void"
	if len(spec.GPUs) > 0 && !cdi {
		visible = strings.Join(spec.GPUs, ",")
	}
	return append(env, "NVIDIA_VISIBLE_DEVICES="+visible)
}

// hostConfig is the sandbox.
func hostConfig(spec container.Spec, facts imageFacts, engine Engine, user identity, opts Options) *dcontainer.HostConfig {
	memoryBytes := max(spec.Memory(), minMemoryBytes)
	scratchBytes := memoryBytes / 2
	pids := spec.PIDLimit()
	host := &dcontainer.HostConfig{
		NetworkMode:    "none",
		ReadonlyRootfs: true,
		CapDrop:        []string{"ALL"},
		SecurityOpt:    []string{"no-new-privileges:true"},
		IpcMode:        dcontainer.IPCModePrivate,
		CgroupnsMode:   dcontainer.CgroupnsModePrivate,
		// Output goes to the attached stream only; the engine's default would
		// let a program fill the disk with its log.
		LogConfig: dcontainer.LogConfig{Type: "none"},
		Runtime:   opts.OCIRuntime,
		// When the host itself runs out of memory, jobs go before the worker.
		OomScoreAdj: 500,
		ShmSize:     scratchBytes, // charged to the memory limit, like the tmpfs below
		Tmpfs:       map[string]string{container.TempDir: scratch(scratchBytes, user)},
		Mounts:      []mount.Mount{bind(spec.Outputs, container.OutputDir, false)},
		Resources: dcontainer.Resources{
			Memory:         memoryBytes,
			MemorySwap:     memoryBytes, // memory and swap together: no swap
			NanoCPUs:       spec.MilliCPUs * 1_000_000,
			PidsLimit:      &pids,
			DeviceRequests: deviceRequests(spec.GPUs, engine),
			Ulimits: []*dcontainer.Ulimit{
				// The host's core_pattern would take core dumps out of the container.
				{Name: "core", Soft: 0, Hard: 0},
				fileSizeLimit(max(spec.OutputLimit(), scratchBytes)),
			},
		},
	}
	if engine.init {
		host.Init = &engine.init
	}
	if spec.Network {
		host.NetworkMode = dcontainer.NetworkMode(opts.Network)
	}
	if spec.Inputs != "" {
		host.Mounts = append(host.Mounts, bind(spec.Inputs, container.InputDir, true))
	} else {
		host.Tmpfs[container.InputDir] = "ro,nosuid,nodev,noexec,size=4096,mode=0555"
	}
	coverVolumes(host, facts.volumes, scratch(scratchBytes, user))
	return host
}

// scratch is a tmpfs that the program's user owns: runc gives it the mode of
// the image's directory, whatever mode is asked for, and that may be 0755.
func scratch(sizeBytes int64, user identity) string {
	return fmt.Sprintf("rw,exec,nosuid,nodev,size=%d,mode=1777,uid=%d,gid=%d", sizeBytes, user.uid, user.gid)
}

func bind(source, target string, readOnly bool) mount.Mount {
	return mount.Mount{
		Type: mount.TypeBind, Source: source, Target: target, ReadOnly: readOnly,
		// Mounts below the source would come along writable.
		BindOptions: &mount.BindOptions{Propagation: mount.PropagationRPrivate, NonRecursive: true},
	}
}

// fileSizeLimit stops one file between two measurements of /out. The slack
// makes a file that ran into it measurably too large.
func fileSizeLimit(bytes int64) *dcontainer.Ulimit {
	const slackBytes = 1 << 20
	return &dcontainer.Ulimit{Name: "fsize", Soft: bytes + slackBytes, Hard: bytes + slackBytes}
}

// coverVolumes puts a bounded tmpfs where the image declares a volume. The
// engine would otherwise make a directory on the host's disk there: writable,
// without any limit.
func coverVolumes(host *dcontainer.HostConfig, volumes []string, tmpfs string) {
	taken := []string{"/", container.InputDir, container.OutputDir, container.TempDir}
	for _, volume := range volumes {
		if target := path.Clean("/" + volume); !slices.Contains(taken, target) {
			host.Tmpfs[target] = tmpfs
		}
	}
}

// cdiName is how the Container Device Interface calls an NVIDIA GPU.
func cdiName(uuid string) string { return "nvidia.com/gpu=" + uuid }

// usesCDI reports whether the engine knows every one of the GPUs through CDI.
func usesCDI(gpus []string, engine Engine) bool {
	if len(gpus) == 0 {
		return false
	}
	for _, uuid := range gpus {
		if !slices.Contains(engine.cdiDevices, cdiName(uuid)) {
			return false
		}
	}
	return true
}

func deviceRequests(gpus []string, engine Engine) []dcontainer.DeviceRequest {
	if len(gpus) == 0 {
		return nil
	}
	if usesCDI(gpus, engine) {
		var names []string
		for _, uuid := range gpus {
			names = append(names, cdiName(uuid))
		}
		return []dcontainer.DeviceRequest{{Driver: "cdi", DeviceIDs: names}}
	}
	return []dcontainer.DeviceRequest{{
		DeviceIDs: gpus,
		// graphics brings OptiX and Vulkan, video brings NVENC; renderers need both.
		Capabilities: [][]string{{"gpu", "compute", "utility", "graphics", "video"}},
	}}
}
