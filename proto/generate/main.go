// Command generate makes api/musterpb from the files in proto, with the pinned
// tools of tools/go.mod. With --check it makes it elsewhere and reports what
// differs.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

func main() {
	check := flag.Bool("check", false, "compare with what is committed, and change nothing")
	flag.Parse()
	if err := run(*check); err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		os.Exit(1)
	}
}

func run(check bool) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	bin, err := os.MkdirTemp("", "muster-tools-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(bin)
	// The tools call one another by name.
	build := exec.Command("go", "build", "-o", bin,
		"github.com/bufbuild/buf/cmd/buf", "google.golang.org/protobuf/cmd/protoc-gen-go",
		"github.com/planetscale/vtprotobuf/cmd/protoc-gen-go-vtproto", "connectrpc.com/connect/cmd/protoc-gen-connect-go")
	build.Dir, build.Stderr = filepath.Join(root, "tools"), os.Stderr
	if err := build.Run(); err != nil {
		return fmt.Errorf("building the tools: %w", err)
	}
	out := root
	if check {
		if out, err = os.MkdirTemp("", "muster-generated-*"); err != nil {
			return err
		}
		defer os.RemoveAll(out)
	}
	for _, args := range [][]string{{"lint"}, {"generate", "--output", out}} {
		cmd := exec.Command(filepath.Join(bin, "buf"), args...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = filepath.Join(root, "proto"), os.Stdout, os.Stderr
		cmd.Env = append(os.Environ(), "PATH="+bin+string(os.PathListSeparator)+os.Getenv("PATH"))
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("buf %s: %w", args[0], err)
		}
	}
	if !check {
		return nil
	}
	return compare(filepath.Join(out, "api", "musterpb"), filepath.Join(root, "api", "musterpb"))
}

func compare(fresh, committed string) error {
	var differ []string
	err := filepath.WalkDir(fresh, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(fresh, path)
		if err != nil {
			return err
		}
		want, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if have, err := os.ReadFile(filepath.Join(committed, rel)); err != nil || !bytes.Equal(have, want) {
			differ = append(differ, rel)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if len(differ) > 0 {
		return fmt.Errorf("api/musterpb is not what proto makes: %s; run: make generate", strings.Join(differ, ", "))
	}
	return nil
}

func moduleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOMOD: %w", err)
	}
	return filepath.Dir(strings.TrimSpace(string(out))), nil
}
