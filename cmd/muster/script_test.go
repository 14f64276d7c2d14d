package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/container/image"
)

// TestScripts runs the command line as people do. The commands beside those of
// testscript are in the map; prog.wasm in $WORK is testdata/prog.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",

		Setup: func(env *testscript.Env) error {
			wasm, err := program()
			if err != nil {
				return err
			}
			env.Setenv("HOME", env.WorkDir)
			env.Values["processes"] = map[string]*process{}
			return os.Link(wasm, filepath.Join(env.WorkDir, "prog.wasm"))
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"network":  scriptNetwork,
			"start":    scriptStart,
			"stop":     scriptStop,
			"code":     scriptCode,
			"until":    scriptUntil,
			"with":     scriptWith,
			"let":      scriptLet,
			"want":     scriptWant,
			"sum":      scriptSum,
			"keys":     scriptKeys,
			"fill":     scriptFill,
			"registry": scriptRegistry,
			"foreign":  scriptForeign,
			"native":   scriptNative,
		},
	})
}

// network gives the script an account with $10 in the shared network: its
// commands find it through MUSTER_ADDR and MUSTER_KEY; ADMIN_KEY and ACCOUNT
// are there too.
func scriptNetwork(ts *testscript.TestScript, _ bool, _ []string) {
	p, err := shared()
	ts.Check(err)
	config, err := os.ReadFile(filepath.Join(scratch, "net", "client.yaml"))
	ts.Check(err)
	_, key, _ := strings.Cut(string(config), "key: ")
	admin, account := strings.TrimSpace(key), "of-"+ts.Name()
	ts.Setenv("MUSTER_ADDR", p.field("addr"))
	ts.Setenv("MUSTER_KEY", admin)
	ts.Check(ts.Exec("muster", "account", "create", account))
	own := strings.TrimSpace(ts.ReadFile("stdout"))
	ts.Check(ts.Exec("muster", "account", "deposit", account, "10"))
	ts.Setenv("MUSTER_KEY", own)
	ts.Setenv("ADMIN_KEY", admin)
	ts.Setenv("ACCOUNT", account)
}

func processes(ts *testscript.TestScript) map[string]*process {
	return ts.Value("processes").(map[string]*process)
}

// start NAME ARGS… starts muster in the background and waits until it is ready.
func scriptStart(ts *testscript.TestScript, _ bool, args []string) {
	p, err := start(ts.MkAbs("."), []string{"HOME=" + ts.Getenv("HOME"), "MUSTER_DIR=" + ts.Getenv("MUSTER_DIR")}, args[1:]...)
	ts.Check(err)
	processes(ts)[args[0]] = p
	ts.Defer(p.kill)
	ts.Check(p.waitReady())
	fmt.Fprintln(ts.Stdout(), p.field(""))
}

// stop NAME interrupts a process and wants exit code 0.
func scriptStop(ts *testscript.TestScript, _ bool, args []string) {
	p := processes(ts)[args[0]]
	ts.Check(p.interrupt())
	fmt.Fprint(ts.Stdout(), p.text())
}

// code N COMMAND… wants an exit code.
func scriptCode(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	var exit *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// until TEXT COMMAND… repeats a command until its output has the text.
func scriptUntil(ts *testscript.TestScript, _ bool, args []string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := poll(ctx, func() (bool, error) {
		err := ts.Exec(args[1], args[2:]...)
		return strings.Contains(ts.ReadFile("stdout"), args[0]), err
	})
	if err != nil {
		ts.Fatalf("waiting for %q: %v", args[0], err)
	}
}

// with FILE OLD NEW [OLD NEW…] is job.yaml with some text replaced.
func scriptWith(ts *testscript.TestScript, _ bool, args []string) {
	text := ts.ReadFile("job.yaml")
	for i := 1; i+1 < len(args); i += 2 {
		if !strings.Contains(text, args[i]) {
			ts.Fatalf("job.yaml has no %q", args[i])
		}
		text = strings.ReplaceAll(text, args[i], args[i+1])
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(text), 0o644))
}

// value is what a path such as 0.attempt_list.2.state leads to in the JSON that
// the last command printed.
func value(ts *testscript.TestScript, path string) any {
	var v any
	dec := json.NewDecoder(strings.NewReader(ts.ReadFile("stdout")))
	dec.UseNumber()
	ts.Check(dec.Decode(&v))
	if _, err := dec.Token(); err != io.EOF {
		ts.Fatalf("more than one JSON value was printed")
	}
	if path == "." {
		return v
	}
	for part := range strings.SplitSeq(path, ".") {
		switch at := v.(type) {
		case map[string]any:
			inner, ok := at[part]
			if !ok {
				ts.Fatalf("%s: there is no %q", path, part)
			}
			v = inner
		case []any:
			if part == "len" {
				return json.Number(strconv.Itoa(len(at)))
			}
			n, err := strconv.Atoi(part)
			if err != nil || n >= len(at) {
				ts.Fatalf("%s: no %q in a list of %d", path, part, len(at))
			}
			v = at[n]
		default:
			ts.Fatalf("%s: %q is within %v", path, part, v)
		}
	}
	return v
}

// let NAME PATH sets a variable from the JSON that was printed.
func scriptLet(ts *testscript.TestScript, _ bool, args []string) {
	ts.Setenv(args[0], fmt.Sprint(value(ts, args[1])))
}

// want PATH VALUE compares a value of the JSON that was printed.
func scriptWant(ts *testscript.TestScript, neg bool, args []string) {
	if got := fmt.Sprint(value(ts, args[0])); (got == args[1]) == neg {
		ts.Fatalf("%s is %q", args[0], got)
	}
}

// sum FIELD VALUE adds up a field of the list that was printed.
func scriptSum(ts *testscript.TestScript, neg bool, args []string) {
	var list []map[string]any
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &list))
	var sum int64
	for _, v := range list {
		sum += int64(v[args[0]].(float64))
	}
	if got := strconv.FormatInt(sum, 10); (got == args[1]) == neg {
		ts.Fatalf("the sum of %s is %s", args[0], got)
	}
}

// keys PATH KEY… wants exactly these keys: scripts depend on them.
func scriptKeys(ts *testscript.TestScript, _ bool, args []string) {
	object, ok := value(ts, args[0]).(map[string]any)
	if !ok {
		ts.Fatalf("%s is no object", args[0])
	}
	var got []string
	for k := range object {
		got = append(got, k)
	}
	slices.Sort(got)
	want := slices.Sorted(slices.Values(args[1:]))
	if !slices.Equal(got, want) {
		ts.Fatalf("keys %v\nwant %v", got, want)
	}
}

// fill FILE BYTES writes a YAML comment of a size.
func scriptFill(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), append([]byte("# "), bytes.Repeat([]byte("x"), n-2)...), 0o644))
}

// registry starts an empty registry on loopback and sets REGISTRY.
func scriptRegistry(ts *testscript.TestScript, _ bool, _ []string) {
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	ts.Defer(s.Close)
	ts.Setenv("REGISTRY", strings.TrimPrefix(s.URL, "http://"))
}

// foreign FILE PLATFORM writes an image archive for another platform.
func scriptForeign(ts *testscript.TestScript, _ bool, args []string) {
	img, err := image.Scratch(image.Options{Binary: ts.MkAbs("prog.wasm"), Name: "prog", Platform: args[1]})
	ts.Check(err)
	f, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	defer f.Close()
	ts.Check(image.WriteArchive(f, "prog:latest", img))
}

// native FILE is the program for this machine.
func scriptNative(ts *testscript.TestScript, _ bool, args []string) {
	path, err := native()
	ts.Check(err)
	ts.Check(os.Link(path, ts.MkAbs(args[0])))
}

// TestHelp wants every command explained in the same manner.
func TestHelp(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		t.Run(strings.ReplaceAll(cmd.CommandPath(), " ", "_"), func(t *testing.T) {
			if first := []rune(cmd.Short)[0]; !unicode.IsUpper(first) && first != '-' || strings.HasSuffix(cmd.Short, ".") {
				t.Errorf("Short is %q: want a capital letter first and no full stop", cmd.Short)
			}
			if cmd.HasSubCommands() && cmd.Example == "" {
				return // a heading
			}
			for line := range strings.Lines(cmd.Example) {
				if !strings.HasPrefix(line, "  ") || strings.Contains(line, "\t") {
					t.Errorf("example %q: want two spaces before it", line)
				}
			}
			if !strings.Contains(cmd.Example, cmd.CommandPath()) {
				t.Errorf("the examples do not show %q:\n%s", cmd.CommandPath(), cmd.Example)
			}
			var help bytes.Buffer
			cmd.SetOut(&help)
			if err := cmd.Help(); err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{"Usage:\n  " + cmd.CommandPath(), "Examples:\n", "--output"} {
				if !strings.Contains(help.String(), want) {
					t.Errorf("the help has no %q:\n%s", want, help.String())
				}
			}
		})
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	root := newRoot()
	for _, cmd := range root.Commands() {
		walk(cmd)
	}
}

// TestRequestOverTheLimit sends more than the API takes; the command line can't.
func TestRequestOverTheLimit(t *testing.T) {
	p, err := shared()
	if err != nil {
		t.Fatal(err)
	}
	address, _, _ := strings.Cut(p.field("addr"), ",")
	config, err := os.ReadFile(filepath.Join(scratch, "net", "client.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	_, key, _ := strings.Cut(string(config), "key: ")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	body := `{"id":"` + strings.Repeat("x", 9<<20) + `"}`
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, client.BaseURL(address)+"/muster.v1.Muster/SubmitJob", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(key))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "larger than configured max") {
		t.Errorf("answered %s %s", resp.Status, text)
	}
}
