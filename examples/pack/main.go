// Pack puts a static Linux binary into an image archive that a job can name:
//
//	go run ./examples/pack --out build/raytrace.tar build/raytrace
//
// Further files go in with --file, which may be repeated:
//
//	go run ./examples/pack --file /models/w.bin=weights.bin --out build/m.tar build/m
package main

import (
	"flag"
	"fmt"
	"os"
	"strings"

	"github.com/musternet/muster/container/image"
)

func main() {
	out := flag.String("out", "", "archive to write, a .tar `file`")
	name := flag.String("name", "", "`name` of the program in the image (default: that of the binary)")
	files := make(map[string]string)
	flag.Func("file", "add a file: `path-in-image=path`", func(pair string) error {
		target, source, ok := strings.Cut(pair, "=")
		if !ok || target == "" || source == "" {
			return fmt.Errorf("want path-in-image=path")
		}
		files[target] = source
		return nil
	})
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: pack --out FILE.tar [--name NAME] [--file PATH=FILE]… BINARY")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 1 || *out == "" {
		flag.Usage()
		os.Exit(2)
	}
	info, err := image.Pack(flag.Arg(0), *out, image.Options{Name: *name, Files: files})
	if err != nil {
		fmt.Fprintln(os.Stderr, "pack:", err)
		os.Exit(1)
	}
	fmt.Printf("%s: %s, %d bytes, %s\n", *out, strings.Join(info.Platforms, " "), info.Bytes, info.Digest)
}
