// Command prog is the program of the tests' jobs: its flags make it do what
// jobs do, and what they should not.
package main

import (
	"bufio"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

var (
	items = flag.String("items", "", "values of the items, separated by commas")
	first = flag.Uint64("first", 0, "first item of a span")
	last  = flag.Uint64("last", 0, "last item of a span")
	item  = flag.String("item", "", "value of one item, which is written to /out itself")
	lines = flag.String("lines", "", "prompts whose custom_id go into results.jsonl; \"-\" writes the index")
	skip  = flag.String("skip", "", "item that gets no output")
	exit  = flag.Int("exit", 0, "exit code")
	sleep = flag.Duration("sleep", 0, "time before anything is written")
	big   = flag.Int("big", 0, "bytes to write per item")
	eat   = flag.Int("eat", 0, "megabytes of memory to use")
	flaky = flag.String("flaky", "", "item that differs on every run")
)

var eaten [][]byte

func main() {
	flag.Parse()
	fmt.Println("working on", *items+*item)
	time.Sleep(*sleep)
	for range *eat {
		block := make([]byte, 1<<20)
		for i := range block {
			block[i] = 1
		}
		eaten = append(eaten, block)
	}
	if *exit != 0 {
		fmt.Fprintln(os.Stderr, "ending on purpose")
		os.Exit(*exit)
	}
	if err := write(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func write() error {
	if *item != "" {
		return leave("/out", *item)
	}
	values := strings.Split(*items, ",")
	if *items == "" {
		values = nil
		for n := *first; n <= *last; n++ {
			values = append(values, strconv.FormatUint(n, 10))
		}
	}
	if *lines != "" {
		return results(values)
	}
	for _, v := range values {
		if v == *skip {
			continue
		}
		if err := leave("/out/"+v, v); err != nil {
			return err
		}
	}
	return nil
}

// leave writes the output of one item.
func leave(dir, value string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text := "item " + value + "\n" + strings.Repeat("x", *big)
	if value == *flaky {
		text += time.Now().String()
	}
	return os.WriteFile(filepath.Join(dir, "out.txt"), []byte(text), 0o644)
}

// results writes a line per item, the last one first.
func results(values []string) error {
	out, err := os.Create("/out/results.jsonl")
	if err != nil {
		return err
	}
	defer out.Close()
	var ids []string
	if *lines != "-" {
		in, err := os.Open(*lines)
		if err != nil {
			return err
		}
		defer in.Close()
		for s := bufio.NewScanner(in); s.Scan(); {
			_, rest, _ := strings.Cut(s.Text(), `"custom_id":"`)
			id, _, _ := strings.Cut(rest, `"`)
			ids = append(ids, id)
		}
	}
	for i := len(values) - 1; i >= 0; i-- {
		if values[i] == *skip {
			continue
		}
		key := `"index":` + values[i]
		if ids != nil {
			n, err := strconv.Atoi(values[i])
			if err != nil {
				return err
			}
			key = `"custom_id":"` + ids[n] + `"`
		}
		if _, err := fmt.Fprintf(out, "{%s,\"answer\":\"item %s\"}\n", key, values[i]); err != nil {
			return err
		}
	}
	return out.Close()
}
