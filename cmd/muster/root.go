package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/client"
)

// version is set by the build.
var version = "dev"

// globals are the flags of every command.
type globals struct {
	dir, addr, key, output string
	verbose                bool
}

const rootLong = `muster turns other people's GPUs into one dependable computer.

Customers submit jobs, owners run workers, and every result is spot-checked on
another owner's machine before anybody is paid.

A first try, with a whole network in one process:

  muster dev                                    # in one terminal
  muster submit examples/raytrace/job.yaml --wait --out frames

Commands find the cluster through --addr and --key, MUSTER_ADDR and MUSTER_KEY,
or client.yaml in --dir (MUSTER_DIR, default ~/.muster).

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no scheduler reached.`

func newRoot() *cobra.Command {
	g := &globals{}
	root := &cobra.Command{
		Use: "muster", Short: "Run GPU jobs on other people's machines, and be sure of the results", Long: rootLong,
		SilenceUsage: true, SilenceErrors: true, Version: version,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if g.output != "table" && g.output != "json" {
				return usagef("--output %q: want table or json", g.output)
			}
			return nil
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	f := root.PersistentFlags()
	f.StringVar(&g.dir, "dir", envOr("MUSTER_DIR", defaultDir()), "directory with client.yaml")
	f.StringVar(&g.addr, "addr", os.Getenv("MUSTER_ADDR"), "API addresses of schedulers, separated by commas")
	f.StringVar(&g.key, "key", os.Getenv("MUSTER_KEY"), "API key")
	f.StringVarP(&g.output, "output", "o", "table", "how to print: table or json")
	f.BoolVarP(&g.verbose, "verbose", "v", false, "log what happens inside")
	f.Lookup("key").DefValue = "" // a secret is not for the help text
	root.AddCommand(
		newSubmit(g), newJob(g), newWorker(g), newAccount(g), newCluster(g), newGPU(g), newImage(g), newScheduler(g), newDev(g),
	)
	strictArgs(root)
	return root
}

// strictArgs makes wrong arguments a usage error, everywhere.
func strictArgs(cmd *cobra.Command) {
	cmd.DisableFlagsInUseLine, cmd.SuggestionsMinimumDistance = true, 2
	if cmd.HasSubCommands() {
		cmd.Args = knownCommand
		if cmd.RunE == nil {
			cmd.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
		}
	} else if check := cmd.Args; check != nil {
		cmd.Args = func(c *cobra.Command, args []string) error {
			if check(c, args) != nil {
				return usagef("wrong number of arguments, %d; want: %s", len(args), c.UseLine())
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		strictArgs(sub)
	}
}

// knownCommand refuses a command that does not exist.
func knownCommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	suggestion := ""
	if s := c.SuggestionsFor(args[0]); len(s) > 0 {
		suggestion = fmt.Sprintf("; did you mean %q?", c.CommandPath()+" "+s[0])
	}
	return usagef("unknown command %q%s", c.CommandPath()+" "+args[0], suggestion)
}

func envOr(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

func defaultDir() string {
	home, err := os.UserHomeDir()
	if err != nil {
		return ".muster"
	}
	return filepath.Join(home, ".muster")
}

// logger writes to stderr; quiet unless asked.
func (g *globals) logger(level slog.Level) *slog.Logger {
	if g.verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

// clientFile is client.yaml.
type clientFile struct {
	Addresses []string `yaml:"addresses"`
	Key       string   `yaml:"key"`
}

// client connects to the cluster that the flags, the environment or client.yaml
// name, in this order.
func (g *globals) client() (*client.Client, error) {
	file, err := g.clientFile()
	if err != nil {
		return nil, err
	}
	return client.New(client.Config{Addresses: file.Addresses, Key: file.Key})
}

func (g *globals) clientFile() (clientFile, error) {
	var file clientFile
	path := filepath.Join(g.dir, "client.yaml")
	if g.addr == "" || g.key == "" {
		text, err := os.ReadFile(path)
		switch {
		case err == nil:
			if err := yaml.UnmarshalWithOptions(text, &file, yaml.DisallowUnknownField()); err != nil {
				return file, usagef("%s: %s", path, yaml.FormatError(err, false, false))
			}
		case !errors.Is(err, fs.ErrNotExist):
			return file, fmt.Errorf("reading the client configuration: %w", err)
		}
	}
	if g.addr != "" {
		file.Addresses = splitList(g.addr)
	}
	if g.key != "" {
		file.Key = g.key
	}
	if len(file.Addresses) == 0 {
		return file, api.Errorf(api.Unavailable, "no cluster is configured: there is no %s; set --addr and --key (MUSTER_ADDR, MUSTER_KEY), point --dir at a directory with client.yaml, or start one with: muster dev", path)
	}
	if file.Key == "" {
		return file, usagef("no API key: set --key or MUSTER_KEY, or add key: to %s", path)
	}
	return file, nil
}

func splitList(s string) []string {
	var list []string
	for part := range strings.SplitSeq(s, ",") {
		if part = strings.TrimSpace(part); part != "" {
			list = append(list, part)
		}
	}
	return list
}

// fromFile fills the flags that were not given: from the environment
// (MUSTER_LISTEN for --listen), then from a YAML file with the flags' names as
// keys.
func fromFile(cmd *cobra.Command, path string) error {
	values := map[string]any{}
	if path != "" {
		text, err := os.ReadFile(path)
		if err != nil {
			return usagef("--config: %w", err)
		}
		if err := yaml.Unmarshal(text, &values); err != nil {
			return usagef("%s: %s", path, yaml.FormatError(err, false, false))
		}
	}
	for name := range values {
		if f := cmd.Flags().Lookup(name); f == nil || name == "config" {
			return usagef("%s: unknown setting %q; the settings are the flags of %s", path, name, cmd.CommandPath())
		}
	}
	for _, f := range visited(cmd.Flags().VisitAll) {
		if f.Changed {
			continue
		}
		from, value := "MUSTER_"+strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_")), ""
		if env := os.Getenv(from); env != "" && f.Name != "dir" {
			value = env
		} else if v, ok := values[f.Name]; ok {
			from, value = path+": "+f.Name, settingText(v)
		} else {
			continue
		}
		if err := cmd.Flags().Set(f.Name, value); err != nil {
			return usagef("%s: %q: %w", from, value, err)
		}
	}
	return nil
}

// visited lists what a visitor visits. It spares naming the type of a flag, and
// with it a direct requirement.
func visited[T any](visit func(func(*T))) (all []*T) {
	visit(func(v *T) { all = append(all, v) })
	return all
}

// settingText is a YAML value as a flag's text; a list becomes commas.
func settingText(v any) string {
	if list, ok := v.([]any); ok {
		parts := make([]string, len(list))
		for i, e := range list {
			parts[i] = fmt.Sprint(e)
		}
		return strings.Join(parts, ",")
	}
	return fmt.Sprint(v)
}

// print writes v as JSON, or a table by calling table.
func (g *globals) print(w io.Writer, v any, table func(*tabwriter.Writer)) error {
	if g.output == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		return enc.Encode(v)
	}
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	table(tw)
	return tw.Flush()
}

func row(w io.Writer, cells ...any) {
	for i, c := range cells {
		if i > 0 {
			fmt.Fprint(w, "\t")
		}
		fmt.Fprint(w, c)
	}
	fmt.Fprintln(w)
}
