// Mutants seeds faults in the files that the scenarios cover, one at a time, and
// runs the scenarios: each must be found. It prints the table of docs/interleavings.md.
//
//	go run ./internal/explore/mutants [NAME...]
//
// A fault is a line that looks right: a second look that is left out, two loads in
// the other order, a store in the place of a compare-and-swap. Product files stay as
// they are (package overlay).
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"verve/internal/explore/overlay"
)

// mutant is one fault.
type mutant struct {
	name string
	in   string // the folder with the scenarios
	overlay.Edit
	also []overlay.Edit
}

func main() {
	wanted := os.Args[1:]
	survived := 0
	fmt.Println("| fault | file | found by | schedules until then | preemptions |")
	fmt.Println("|---|---|---|---|---|")
	for _, m := range mutants {
		if len(wanted) > 0 && !slices.Contains(wanted, m.name) {
			continue
		}
		scenario, schedules, bound, err := hunt(m)
		if err != nil {
			survived++
			scenario, schedules, bound = "**"+err.Error()+"**", "", ""
		}
		fmt.Printf("| %s | `%s` | %s | %s | %s |\n", m.name, m.File, scenario, schedules, bound)
	}
	if survived > 0 {
		fmt.Fprintf(os.Stderr, "%d faults were not found\n", survived)
		os.Exit(1)
	}
}

var (
	failure = regexp.MustCompile(`(?m)failed at schedule (\d+), with (\w+)`)
	failed  = regexp.MustCompile(`(?m)^ *--- FAIL: (TestInterleavings\S*)`)
)

// hunt runs the scenarios, first with few preemptions, until one fails.
func hunt(m mutant) (scenario, schedules, bound string, err error) {
	c := overlay.Config{Test: m.in, Folders: []string{"counter"}, Edits: overlay.Counter, FailFast: true}
	switch m.in {
	case "dedup":
		c.Folders, c.Edits = []string{"counter", "dedup"}, overlay.Dedup
	case "server":
		c.Folders, c.Edits = []string{"counter", "server", "server/callback"}, overlay.Server
	case "server/callback":
		c.Folders, c.Edits, c.Channels = []string{"server/callback"}, overlay.Callback, true
	}
	c.Edits = append(append(slices.Clone(c.Edits), m.Edit), m.also...)
	for _, effort := range []string{"quick", "ci"} {
		dir, err := os.MkdirTemp("", "mutant")
		if err != nil {
			return "", "", "", err
		}
		c.Env = []string{"VERVE_TEST_EXPLORE=" + effort}
		out, err := overlay.Run(context.Background(), dir, c)
		_ = os.RemoveAll(dir)
		if err == nil {
			continue
		}
		found, names := failure.FindSubmatch(out), failed.FindAllSubmatch(out, -1)
		if found == nil || names == nil {
			_ = os.WriteFile(filepath.Join(os.TempDir(), "mutant.log"), out, 0o644)
			return "", "", "", fmt.Errorf("does not run: %w: %.300s", err, strings.ReplaceAll(string(out), "\n", " "))
		}
		bound = string(found[2])
		return strings.TrimPrefix(string(names[len(names)-1][1]), "TestInterleavings"), string(found[1]), bound, nil
	}
	return "", "", "", fmt.Errorf("survived")
}
