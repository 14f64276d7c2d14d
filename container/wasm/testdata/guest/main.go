// Command guest is the WebAssembly program of the tests: each of its commands
// does one thing that a job might, or should not.
package main

import (
	crand "crypto/rand"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Println("no command")
		os.Exit(2)
	}
	if err := commands[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

var commands = map[string]func(args []string) error{
	"exit": func(args []string) error {
		code, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		os.Exit(code)
		return nil
	},
	"env": func([]string) error {
		fmt.Fprintln(os.Stderr, "to stderr")
		fmt.Println(os.Args, os.Environ())
		return nil
	},
	"copy": func([]string) error {
		data, err := os.ReadFile("/in/a/input.txt")
		if err != nil {
			return err
		}
		if err := os.WriteFile("/tmp/scratch", data, 0o600); err != nil {
			return err
		}
		if data, err = os.ReadFile("/tmp/scratch"); err != nil {
			return err
		}
		if err := os.Mkdir("/out/item", 0o700); err != nil {
			return err
		}
		return os.WriteFile("/out/item/result", []byte(strings.ToUpper(string(data))), 0o600)
	},
	"allocate": func(args []string) error {
		var kept [][]byte
		for {
			block := make([]byte, 1<<20)
			block[0] = 1
			kept = append(kept, block)
			_ = kept
		}
	},
	"spin": func([]string) error {
		fmt.Println("ready")
		for i := 0; ; i++ {
		}
	},
	"sleep": func([]string) error { fmt.Println("ready"); time.Sleep(time.Hour); return nil },
	"panic": func([]string) error { panic("on purpose") },
	"fill":  func(args []string) error { return fill(args[0]) },
	"chatter": func(args []string) error {
		limit, err := strconv.Atoi(args[0])
		line := strings.Repeat("x", 4095) + "\n"
		for written := 0; written < limit; written += len(line) {
			fmt.Print(line)
		}
		return err
	},
	"escape":   escape,
	"files":    files,
	"identity": identity,
}

func fill(dir string) error {
	block := make([]byte, 1<<20)
	for i := 0; ; i++ {
		if err := os.WriteFile(fmt.Sprintf("%s/%d", dir, i), block, 0o600); err != nil {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// escape tries every way out, with the host's path of a secret as argument,
// and fails with what it could reach.
func escape(args []string) error {
	secret := args[0]
	var reached []string
	try := func(how string, err error) {
		if err == nil {
			reached = append(reached, how)
		}
	}
	read := func(path string) error {
		data, err := os.ReadFile(path)
		if err == nil && !strings.Contains(string(data), "SECRET") {
			return errors.New("not the secret")
		}
		return err
	}
	up := strings.Repeat("../", 20)
	try("absolute", read(secret))
	for _, mount := range []string{"/in", "/out", "/tmp"} {
		try(mount+" dot-dot", read(mount+"/"+up+secret))
		try(mount+" relative link", errors.Join(os.Symlink(up+secret, mount+"/relative"), read(mount+"/relative")))
		try(mount+" absolute link", errors.Join(os.Symlink(secret, mount+"/absolute"), read(mount+"/absolute")))
		try(mount+" hard link", os.Link("/in/link-to-secret", mount+"/hard"))
		try(mount+" any symlink", os.Symlink("x", mount+"/any"))
	}
	// The host put these into /in.
	try("link in the inputs", read("/in/link-to-secret"))
	try("directory link in the inputs", read("/in/link-to-dir/secret.txt"))
	try("write through a link", os.WriteFile("/in/link-to-dir/written", nil, 0o600))
	try("stat through a link", stat("/in/link-to-dir/secret.txt"))
	try("list through a link", list("/in/link-to-dir"))
	try("write to the inputs", os.WriteFile("/in/written", nil, 0o600))
	try("append to an input", appendTo("/in/a/input.txt"))
	try("remove an input", os.Remove("/in/a/input.txt"))
	try("rename an input", os.Rename("/in/a/input.txt", "/in/a/other"))
	try("make a directory in the inputs", os.Mkdir("/in/new", 0o700))
	try("move an input out", os.Rename("/in/a/input.txt", "/out/stolen"))
	try("FIFO", read("/in/fifo"))
	if len(reached) > 0 {
		return fmt.Errorf("reached: %s", strings.Join(reached, "; "))
	}
	return read2("/in/a/link-inside")
}

func stat(path string) error { _, err := os.Stat(path); return err }
func list(path string) error { _, err := os.ReadDir(path); return err }

func appendTo(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString("x")
	return errors.Join(err, f.Close())
}

// read2 reads a link that stays inside, which must work.
func read2(path string) error { _, err := os.ReadFile(path); return err }

// files opens files until it is refused.
func files([]string) error {
	var open []*os.File
	for i := range 10_000 {
		f, err := os.Create(fmt.Sprintf("/tmp/%d", i))
		if err != nil {
			fmt.Println("opened", len(open))
			return nil
		}
		open = append(open, f)
	}
	return errors.New("no limit")
}

// identity prints all that could differ between two runs.
func identity([]string) error {
	secret := make([]byte, 16)
	if _, err := crand.Read(secret); err != nil {
		return err
	}
	order := map[int]int{}
	for i := range 20 {
		order[i] = i
	}
	fmt.Println(time.Now().Unix(), secret, rand.Int(), order)
	for k := range order {
		fmt.Print(k, " ")
	}
	for _, name := range []string{"z", "a", "m"} {
		if err := os.WriteFile("/out/"+name, nil, 0o600); err != nil {
			return err
		}
	}
	dir, err := os.Open("/out")
	if err != nil {
		return err
	}
	defer dir.Close()
	for {
		entries, err := dir.Readdir(2)
		for _, e := range entries {
			fmt.Println(e.Name(), e.ModTime().Unix(), e.Size())
		}
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
	}
	return filepath.WalkDir("/in", func(path string, _ os.DirEntry, err error) error {
		fmt.Println(path, err)
		return nil
	})
}
