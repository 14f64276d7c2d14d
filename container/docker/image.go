package docker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/client"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/container"
)

// Ensure implements container.Runtime.
func (r *Runtime) Ensure(ctx context.Context, img container.Image) error {
	tag, err := r.tag(img)
	if err != nil {
		return err
	}
	engine, err := r.known(ctx)
	if err != nil {
		return err
	}
	leave, err := r.images.Enter(ctx, tag)
	if err != nil {
		return err
	}
	defer leave()
	switch _, err := r.facts(ctx, tag); {
	case err == nil:
		return nil
	case !cerrdefs.IsNotFound(err):
		return r.fault("look for image "+img.Digest, err)
	}
	if img.Archive != "" {
		return r.load(ctx, img, tag, engine)
	}
	return r.fetch(ctx, img, tag, engine)
}

// maxFacts bounds the images that are remembered as present.
const maxFacts = 1000

// facts is what matters of a present image. The engine is asked once: what a tag
// of ours names does not change, and that somebody removed it shows when a
// container is made of it.
func (r *Runtime) facts(ctx context.Context, tag string) (imageFacts, error) {
	r.mu.Lock()
	facts, ok := r.present[tag]
	r.mu.Unlock()
	if ok {
		return facts, nil
	}
	found, err := r.client.ImageInspect(ctx, tag)
	if err != nil {
		return imageFacts{}, err
	}
	facts.id = found.ID
	if found.Config != nil {
		facts.env, facts.volumes = found.Config.Env, slices.Sorted(maps.Keys(found.Config.Volumes))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.present) >= maxFacts {
		clear(r.present)
	}
	r.present[tag] = facts
	return facts, nil
}

func (r *Runtime) forgetFacts(tag string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.present, tag)
}

// load gives the engine an image from an archive file.
func (r *Runtime) load(ctx context.Context, img container.Image, tag string, engine Engine) error {
	file, err := os.Open(img.Archive)
	if err != nil {
		return fmt.Errorf("docker: open image archive: %w", err)
	}
	defer file.Close()
	size, err := checkDigest(file, img.Digest)
	if err != nil {
		return err
	}
	contents, err := readArchive(file, size)
	if err != nil {
		return err
	}
	saved, err := contents.image(engine.Platform)
	if err != nil {
		return err
	}

	pipe, input := io.Pipe()
	written := make(chan error, 1)
	go func() {
		err := contents.writeTo(input, saved, tag)
		input.CloseWithError(err)
		written <- err
	}()
	err = r.sendArchive(ctx, pipe)
	pipe.CloseWithError(errors.New("the engine stopped reading"))
	writeErr := <-written
	if err != nil {
		return r.blameImage("load image "+img.Digest, errors.Join(err, writeErr))
	}
	if _, err := r.client.ImageInspect(ctx, tag); err != nil {
		return r.fault("look for image "+img.Digest+" after loading it", err)
	}
	return nil
}

func (r *Runtime) sendArchive(ctx context.Context, archive io.Reader) error {
	response, err := r.client.ImageLoad(ctx, archive, client.ImageLoadWithQuiet(true))
	if err != nil {
		return err
	}
	defer response.Body.Close()
	return readProgress(response.Body)
}

// checkDigest reads the whole file, because the digest is the key under which
// the image is kept: a wrong file would be run for every later job that names it.
func checkDigest(file *os.File, want string) (size int64, err error) {
	hash := sha256.New()
	if size, err = io.Copy(hash, file); err != nil {
		return 0, fmt.Errorf("docker: read image archive: %w", err)
	}
	if got := "sha256:" + hex.EncodeToString(hash.Sum(nil)); got != want {
		return 0, fmt.Errorf("docker: image archive %s is %s, not %s; remove it and fetch it again", file.Name(), got, want)
	}
	return size, nil
}

// fetch makes a registry image present under tag, pulling it if the engine does
// not have it.
func (r *Runtime) fetch(ctx context.Context, img container.Image, tag string, engine Engine) error {
	named, err := reference.ParseDockerRef(img.Ref)
	if err != nil {
		return api.Errorf(api.Unsupported, "docker: image reference %q: %w", img.Ref, err)
	}
	pinned, ok := named.(reference.Canonical)
	if !ok || pinned.Digest().String() != img.Digest {
		return api.Errorf(api.Unsupported, "docker: image reference %q is not pinned to its digest %s", img.Ref, img.Digest)
	}
	ref := pinned.String()
	if _, err := r.client.ImageInspect(ctx, ref); cerrdefs.IsNotFound(err) {
		if err := r.pull(ctx, ref); err != nil {
			return r.blameImage("pull "+ref, err)
		}
	} else if err != nil {
		return r.fault("look for image "+ref, err)
	}
	found, err := r.client.ImageInspect(ctx, ref)
	if err != nil {
		return r.fault("look for image "+ref+" after pulling it", err)
	}
	if platform := found.Os + "/" + found.Architecture; platform != engine.Platform {
		return api.Errorf(api.Unsupported, "docker: image %s is for %s; this engine runs %s", ref, platform, engine.Platform)
	}
	if err := r.client.ImageTag(ctx, found.ID, tag); err != nil {
		return r.fault("name image "+ref, err)
	}
	return nil
}

func (r *Runtime) pull(ctx context.Context, ref string) error {
	body, err := r.client.ImagePull(ctx, ref, image.PullOptions{})
	if err != nil {
		return err
	}
	defer body.Close()
	return readProgress(body)
}

// readProgress reads the engine's stream of progress messages to its end. A
// failure half-way is a message in it, not a status.
func readProgress(body io.Reader) error {
	decoder := json.NewDecoder(body)
	for {
		var message struct{ Error string }
		if err := decoder.Decode(&message); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read the engine's answer: %w", err)
		}
		if message.Error != "" {
			return engineMessage(message.Error)
		}
	}
}

// engineMessage is a failure that the engine reported in words only.
type engineMessage string

func (m engineMessage) Error() string { return string(m) }

// blameImage sorts failures of a load or pull into those of the image and those
// of this machine. The engine and the registries behind it have no codes for
// this, so their words decide; what is not recognised is this machine's.
func (r *Runtime) blameImage(action string, err error) error {
	if kind := api.KindOf(err); kind != api.Internal {
		return err
	}
	text := strings.ToLower(err.Error())
	says := func(words ...string) bool {
		return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(text, w) })
	}
	var reported engineMessage
	switch {
	case says("no matching manifest", "does not match the specified platform", "unsupported media type", "mediatype"):
		return api.Errorf(api.Unsupported, "docker: %s: %w", action, err)
	case says("no space left", "no such host", "connection refused", "i/o timeout", "tls handshake", "toomanyrequests"):
		return api.Errorf(api.Unavailable, "docker: %s: %w", action, err)
	case cerrdefs.IsNotFound(err),
		says("manifest unknown", "name unknown", "repository does not exist", "pull access denied", "not found"):
		return api.Errorf(api.NotFound, "docker: %s: %w", action, err)
	case errors.As(err, &reported) && says("invalid diffid", "invalid manifest", "layers mismatch", "invalid tar", "unexpected eof", "invalid character", "archive/tar"):
		return api.Errorf(api.Unsupported, "docker: %s: %w", action, err)
	}
	return r.fault(action, err)
}

// Forget implements container.Runtime. An image that the owner of the machine
// has under a name of their own stays.
func (r *Runtime) Forget(ctx context.Context, img container.Image) error {
	tag, err := r.tag(img)
	if err != nil {
		return err
	}
	leave, err := r.images.Enter(ctx, tag)
	if err != nil {
		return err
	}
	defer leave()
	r.forgetFacts(tag)
	found, err := r.client.ImageInspect(ctx, tag)
	if cerrdefs.IsNotFound(err) {
		return nil
	} else if err != nil {
		return r.fault("look for image "+img.Digest, err)
	}
	names := []string{tag}
	if len(found.RepoTags) == 1 {
		// What a pull by digest leaves keeps the layers on the disk.
		names = append(names, found.RepoDigests...)
	}
	for _, name := range names {
		_, err := r.client.ImageRemove(ctx, name, image.RemoveOptions{PruneChildren: true})
		if err != nil && !cerrdefs.IsNotFound(err) {
			return r.fault("remove image "+name, err)
		}
	}
	return nil
}
