package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/jobspec"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/outputs"
	"github.com/musternet/muster/container/image"
	"github.com/musternet/muster/scheduler/state"
)

func newSubmit(g *globals) *cobra.Command {
	var wait bool
	var out, imageFile, account string
	cmd := &cobra.Command{
		Use:   "submit JOB.yaml",
		Short: "Upload a job's image and inputs, and submit it",
		Long: `Submit reads a job file (docs/job.md), uploads its image and inputs by digest,
holds the budget, and prints the job's ID.

With --wait it shows the progress and ends with the job: exit code 0 when every
item was verified, 1 when the job failed or was cancelled. With --out it also
downloads the results.`,
		Example: `  muster submit job.yaml
  muster submit examples/raytrace/job.yaml --wait --out frames
  muster submit job.yaml --output json | jq -r .id`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			if out != "" {
				if err := checkOut(out); err != nil {
					return err
				}
			}
			spec, err := prepare(cmd.Context(), c, args[0], imageFile, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			resp, err := c.SubmitJob(cmd.Context(), connect.NewRequest(&musterpb.SubmitJobRequest{Id: client.NewID(), Spec: spec, Account: account}))
			if err != nil {
				return fmt.Errorf("submitting %s: %w", args[0], api.FromConnect(err))
			}
			id := resp.Msg.Job
			if !wait && out == "" {
				return g.print(cmd.OutOrStdout(), map[string]string{"id": id}, func(w *tabwriter.Writer) { row(w, id) })
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "submitted %s\n", id)
			return waitAndFetch(cmd, g, c, id, out)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&wait, "wait", false, "show progress and end with the job")
	f.StringVar(&out, "out", "", "directory for the results; waits for them")
	f.StringVar(&imageFile, "image", "", "use this image in place of the job file's")
	f.StringVar(&account, "account", "", "account that pays (admins only)")
	return cmd
}

// maxUploads bounds the inputs that are uploaded at the same time.
const maxUploads = 4

// prepare turns a job file into a specification with everything uploaded.
func prepare(ctx context.Context, c *client.Client, path, imageFile string, progress io.Writer) (*musterpb.JobSpec, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, usagef("job file: %w", err)
	}
	file, err := jobspec.Parse(text, path)
	if err != nil {
		return nil, err
	}
	if imageFile != "" {
		file.ImagePath, file.ImageName = imageFile, filepath.Base(imageFile)
	}
	// Everything is looked at before the first byte is sent.
	for _, in := range file.LocalInputs {
		if _, err := os.Stat(in.Path); err != nil {
			return nil, api.Errorf(api.Invalid, "%s: inputs: %w", path, err)
		}
	}
	spec := file.Spec
	if err := state.CheckBudget(spec); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if file.LinesPath != "" {
		if spec.Items.Count, err = outputs.CountLines(file.LinesPath); err != nil {
			return nil, fmt.Errorf("%s: items.lines: %w", path, err)
		}
	}
	if spec.Image, err = prepareImage(ctx, c, file, progress); err != nil {
		return nil, fmt.Errorf("%s: image: %w", path, err)
	}
	uploads, uploadCtx := errgroup.WithContext(ctx)
	uploads.SetLimit(maxUploads)
	for i, in := range file.LocalInputs {
		uploads.Go(func() error {
			if err := uploadInput(uploadCtx, c, in, spec.Inputs[i]); err != nil {
				return fmt.Errorf("%s: input %s: %w", path, in.Path, err)
			}
			return nil
		})
	}
	if err := uploads.Wait(); err != nil {
		return nil, err
	}
	if err := jobspec.Validate(spec); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return spec, nil
}

func prepareImage(ctx context.Context, c *client.Client, file *jobspec.File, progress io.Writer) (*musterpb.Image, error) {
	if file.ImagePath == "" {
		pinned, platforms, err := image.Resolve(ctx, file.ImageName)
		if api.KindOf(err) == api.Unavailable {
			// To scripts, unavailable means the schedulers.
			return nil, api.Errorf(api.Internal, "%w", err)
		}
		if err != nil {
			return nil, err
		}
		_, digest, _ := strings.Cut(pinned, "@")
		return &musterpb.Image{Kind: musterpb.ImageKind_IMAGE_KIND_REGISTRY, Ref: pinned, Digest: digest, Platforms: platforms, Name: file.ImageName}, nil
	}
	info, err := image.Inspect(file.ImagePath)
	if err != nil {
		return nil, err
	}
	kind := musterpb.ImageKind_IMAGE_KIND_ARCHIVE
	if isWasm, err := image.IsWasm(file.ImagePath); err != nil {
		return nil, err
	} else if isWasm {
		kind = musterpb.ImageKind_IMAGE_KIND_WASM
	}
	fmt.Fprintf(progress, "uploading image %s (%d bytes)\n", filepath.Base(file.ImagePath), info.Bytes)
	digest, size, err := blob.PutFile(ctx, c.Blobs(), file.ImagePath)
	if err != nil {
		return nil, err
	}
	return &musterpb.Image{Kind: kind, Digest: string(digest), SizeBytes: size, Platforms: info.Platforms, Name: filepath.Base(file.ImagePath)}, nil
}

func uploadInput(ctx context.Context, c *client.Client, local jobspec.LocalInput, in *musterpb.Input) error {
	info, err := os.Stat(local.Path)
	if err != nil {
		return err
	}
	var digest api.Digest
	if info.IsDir() {
		in.Directory = true
		digest, in.SizeBytes, err = blob.PutDir(ctx, c.Blobs(), local.Path)
	} else {
		in.Executable = info.Mode()&0o111 != 0
		digest, in.SizeBytes, err = blob.PutFile(ctx, c.Blobs(), local.Path)
	}
	in.Digest = string(digest)
	return err
}

func newImage(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "Make and inspect job images without a container engine"}
	var out, name string
	var files []string
	pack := &cobra.Command{
		Use: "pack BINARY", Short: "Put a static Linux binary into an image archive that a job can name",
		Example: `  CGO_ENABLED=0 go build -o render ./render
  muster image pack render --out render.tar
  muster image pack render --out render.tar --file /assets/sky.hdr=sky.hdr`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			options := image.Options{Name: name, Files: map[string]string{}}
			for _, f := range files {
				inside, local, ok := strings.Cut(f, "=")
				if !ok {
					return usagef("--file %q: want PATH-IN-IMAGE=FILE", f)
				}
				options.Files[inside] = local
			}
			info, err := image.Pack(args[0], out, options)
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), info, func(w *tabwriter.Writer) { printImage(w, out, info) })
		},
	}
	pack.Flags().StringVar(&out, "out", "image.tar", "archive to write")
	pack.Flags().StringVar(&name, "name", "", "name in the image (default: the binary's)")
	pack.Flags().StringArrayVar(&files, "file", nil, "further file, as PATH-IN-IMAGE=FILE; may repeat")
	inspect := &cobra.Command{
		Use: "inspect FILE", Short: "Show what an image archive or a WebAssembly module is", Example: "  muster image inspect render.tar",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			info, err := image.Inspect(args[0])
			if err != nil {
				return err
			}
			return g.print(cmd.OutOrStdout(), info, func(w *tabwriter.Writer) { printImage(w, args[0], info) })
		},
	}
	cmd.AddCommand(pack, inspect)
	return cmd
}

func printImage(w io.Writer, path string, info image.Info) {
	row(w, "file", path)
	row(w, "format", info.Format)
	row(w, "digest", info.Digest)
	row(w, "bytes", info.Bytes)
	row(w, "platforms", strings.Join(info.Platforms, ", "))
	if len(info.Entrypoint) > 0 {
		row(w, "entrypoint", strings.Join(info.Entrypoint, " "))
	}
}
