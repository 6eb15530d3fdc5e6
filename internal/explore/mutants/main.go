// Mutants seeds faults in the files that the scenarios cover, one at a time, and
// runs the scenarios: each must be found. It prints the table of docs/interleavings.md.
//
//	go run ./internal/explore/mutants [-one-in N] [NAME...]
//
// With -one-in it takes only every Nth of these faults, and begins with a different one each
// day.
//
// A fault is a change after which the code still looks right: a second look is left out, two
// loads are in the other order, or a store takes the place of a compare-and-swap. The product
// files are not changed (package overlay). The scenario that the table names for a fault is
// tried first, and the others only if that one no longer finds the fault.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"verve/internal/explore/overlay"
)

// table is the page that lists the faults and the scenarios that found them.
const table = "docs/interleavings.md"

// mutant is one fault. The folder of its file has the scenarios that must find it.
type mutant struct {
	name, file string
	edits      []overlay.Edit
}

// fault makes a mutant from pairs of texts: a text that the file contains exactly once, and its
// replacement.
func fault(file, name string, texts ...string) mutant {
	m := mutant{name: name, file: file}
	for pair := range slices.Chunk(texts, 2) {
		m.edits = append(m.edits, overlay.Edit{File: file, Old: pair[0], New: pair[1]})
	}
	return m
}

// found is how a fault was found.
type found struct {
	scenario, schedules, bound string
	err                        error
}

func main() {
	began := time.Now()
	oneIn := flag.Int64("one-in", 1, "take every `N`th fault, another one each day")
	flag.Parse()
	wanted := slices.Clone(mutants)
	if names := flag.Args(); len(names) > 0 {
		wanted = slices.DeleteFunc(wanted, func(m mutant) bool { return !slices.Contains(names, m.name) })
	}
	today, n := began.Unix()/(24*60*60), int64(-1)
	wanted = slices.DeleteFunc(wanted, func(mutant) bool { n++; return (n+today)%max(*oneIn, 1) != 0 })
	if len(wanted) == 0 {
		fmt.Fprintln(os.Stderr, "no fault has such a name")
		os.Exit(2)
	}
	page, err := os.ReadFile(table)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	// One mutant is compiled while the scenarios of another one run.
	results := make([]chan found, len(wanted))
	for i := range results {
		results[i] = make(chan found, 1)
	}
	var hunters sync.WaitGroup
	next := make(chan int)
	for range max(2, runtime.GOMAXPROCS(0)) {
		hunters.Go(func() {
			for i := range next {
				results[i] <- hunt(wanted[i], firstOf(string(page), wanted[i].name))
			}
		})
	}
	go func() {
		for i := range wanted {
			next <- i
		}
		close(next)
	}()
	survived := 0
	fmt.Println("| fault | file | found by | schedules until then | preemptions |")
	fmt.Println("|---|---|---|---|---|")
	for i, m := range wanted {
		f := <-results[i]
		if f.err != nil {
			survived++
			f.scenario = "**" + f.err.Error() + "**"
		}
		fmt.Printf("| %s | `%s` | %s | %s | %s |\n", m.name, m.file, f.scenario, f.schedules, f.bound)
	}
	hunters.Wait()
	fmt.Fprintf(os.Stderr, "%d faults, %d of them not found, in %v\n", len(wanted), survived, time.Since(began).Round(time.Second))
	if survived > 0 {
		os.Exit(1)
	}
}

var (
	failure = regexp.MustCompile(`(?m)failed at schedule (\d+), with (\w+)`)
	failed  = regexp.MustCompile(`(?m)^ *--- FAIL: (TestInterleavings\S*)`)
)

// firstOf returns a regular expression for the scenario that the page names for a fault; empty
// if it names none.
func firstOf(page, name string) string {
	for line := range strings.Lines(page) {
		if cells := strings.Split(line, " | "); len(cells) == 5 && cells[0] == "| "+name {
			return "^TestInterleavings" + strings.ReplaceAll(cells[2], "/", "$/^") + "$"
		}
	}
	return ""
}

// hunt runs the scenarios, first with few preemptions, until one fails.
func hunt(m mutant, first string) found {
	dir, err := os.MkdirTemp("", "mutant")
	if err != nil {
		return found{err: err}
	}
	defer os.RemoveAll(dir)
	c := overlay.Config{Test: path.Dir(m.file), Folders: []string{"counter"}, Edits: overlay.Counter, FailFast: true}
	switch c.Test {
	case "dedup":
		c.Folders, c.Edits = []string{"counter", "dedup"}, overlay.Dedup
	case "server":
		c.Folders, c.Edits = []string{"counter", "server", "server/callback"}, overlay.Server
	case "server/callback":
		c.Folders, c.Edits, c.Channels = []string{"server/callback"}, nil, true
	}
	c.Edits = slices.Concat(c.Edits, m.edits)
	binary, out, err := overlay.Build(context.Background(), dir, c)
	if err != nil {
		return found{err: notRun(err, out)}
	}
	tries := []string{first, ""}
	if first == "" {
		tries = tries[1:]
	}
	for _, c.Run = range tries {
		for _, effort := range []string{"quick", "ci"} {
			c.Env = []string{"VERVE_TEST_EXPLORE=" + effort}
			out, err := overlay.RunBuilt(context.Background(), binary, c)
			if err == nil {
				continue
			}
			by, names := failure.FindSubmatch(out), failed.FindAllSubmatch(out, -1)
			if by == nil || names == nil {
				return found{err: notRun(err, out)}
			}
			scenario := strings.TrimPrefix(string(names[len(names)-1][1]), "TestInterleavings")
			return found{scenario: scenario, schedules: string(by[1]), bound: string(by[2])}
		}
	}
	return found{err: errors.New("survived")}
}

func notRun(err error, out []byte) error {
	_ = os.WriteFile(filepath.Join(os.TempDir(), "mutant.log"), out, 0o644)
	return fmt.Errorf("does not run: %w: %.300s", err, strings.ReplaceAll(string(out), "\n", " "))
}
