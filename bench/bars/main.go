// Bars checks whether the promises of performance hold: it reads what the benchmarks
// printed and prints each promise beside what was measured.
//
//	go run ./bench/bars FILE...
//
// A FILE ending in .json is of bench/http, any other the output of go test -bench, of as
// many runs as there are. Every ratio is taken within a run, between
// neighbours in time, and then the median over the runs; every other figure is the
// median over the runs. The exit status is 1 if a promise is missed. Tables of
// everything that was measured are made by benchstat (bench/run).
package main

import (
	"fmt"
	"io"
	"os"
	"text/tabwriter"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: bars FILE...")
		os.Exit(2)
	}
	m := measurements{}
	for _, file := range os.Args[1:] {
		if err := m.read(file); err != nil {
			fmt.Fprintf(os.Stderr, "bars: %s: %v\n", file, err)
			os.Exit(2)
		}
	}
	if !print(os.Stdout, m) {
		os.Exit(1)
	}
}

// bar is a promise of performance. Its figure is taken in every case that fits the
// pattern, with DESIGN in the place of each design to be compared; the worst counts.
type bar struct {
	what    string
	want    float64
	atLeast bool     // else at most
	pattern string   // of the names of benchmarks; * is any part of a name
	unit    string   // of the figure
	design  string   // to be judged
	against []string // designs: the figure is theirs divided by design's
}

// libraries are the designs made of a library for concurrent or compact maps.
var libraries = []string{"xsync", "swiss"}

const (
	adds  = "Add/design=DESIGN/ids=%s/kind=%s/mix=%s/writers=*"
	turns = "Rollover/design=DESIGN/retired=10000000/load=%s"
)

func addBar(what string, want float64, ids, kind, mix, design string, against ...string) bar {
	return bar{what: "CPU of an add: " + what, want: want, atLeast: true,
		pattern: fmt.Sprintf(adds, ids, kind, mix), unit: "cpu-ns/op", design: design, against: against}
}

func residentBar(want float64, kind, expect string) bar {
	return bar{what: fmt.Sprintf("resident bytes per %s, forecast %s, 1 M ids and more", kind, expect), want: want,
		pattern: fmt.Sprintf("Resident/design=DESIGN/ids=*/kind=%s/expect=%s", kind, expect), unit: "B/id", design: "verve"}
}

func turnBar(want float64, atLeast bool, load, unit string) bar {
	return bar{what: fmt.Sprintf("the 100 ms after a turn with 10 M ids against before, load %s: %s", load, unit), want: want, atLeast: atLeast,
		pattern: fmt.Sprintf(turns, load), unit: unit, design: "verve"}
}

// httpBar compares the CPU of a request with that of another server, by the rounds
// in which the two were closest in time.
func httpBar(want float64, scenario, server, of string, atLeast bool) bar {
	return bar{what: fmt.Sprintf("CPU of a request, %s: %s/%s", scenario, of, server), want: want, atLeast: atLeast,
		pattern: "*/" + scenario + "/DESIGN", unit: "cpu-us", design: server, against: []string{of}}
}

// batchBar bounds the CPU of an id in a batch, given in millions of ids per second of
// CPU.
func batchBar(millions float64, what, kind string) bar {
	return bar{what: fmt.Sprintf("CPU of an id, us, %s (%v M ids per second)", what, millions), want: 1 / millions,
		pattern: "http/batch/DESIGN", unit: "cpu-us", design: kind}
}

// sharedBar compares the set that instances share with another.
func sharedBar(want float64, atLeast bool, what, unit, design, against string) bar {
	return bar{what: fmt.Sprintf("%s, %s/%s", what, against, design), want: want, atLeast: atLeast,
		pattern: "Shared/DESIGN", unit: unit, design: design, against: []string{against}}
}

var bars = []bar{
	addBar("seed/verve, 50 k new decimals", 8, "50000", "decimal", "unique", "verve", "seed"),
	addBar("seed/verve, 1 M new decimals", 8, "1000000", "decimal", "unique", "verve", "seed"),
	addBar("seed/verve, 10 M new decimals", 8, "10000000", "decimal", "unique", "verve", "seed"),
	addBar("best library/verve, 10 M new decimals", 2, "10000000", "decimal", "unique", "verve", libraries...),
	addBar("best library/verve, the same, 16 together", 2, "10000000", "decimal", "unique", "verve16", libraries...),
	addBar("seed/verve, 99 % repeats of 50 k", 9, "50000", "decimal", "dup99", "verve", "seed"),
	addBar("best library/verve, the same", 1, "50000", "decimal", "dup99", "verve", libraries...),
	addBar("seed/verve, 99 % repeats of 1 M", 9, "1000000", "decimal", "dup99", "verve", "seed"),
	addBar("best library/verve, the same", 1, "1000000", "decimal", "dup99", "verve", libraries...),
	addBar("seed/verve, 1 M new UUIDs", 5, "1000000", "uuid", "unique", "verve", "seed"),
	{what: "allocations of an add", want: 0, pattern: "Add/design=DESIGN/*", unit: "allocs/op", design: "verve"},
	residentBar(12.5, "decimal", "right"),
	residentBar(18, "decimal", "under"),
	residentBar(26, "uuid", "right"),
	residentBar(36, "uuid", "under"),
	{what: "full GC with 100 M ids", want: 2, pattern: "GC/design=DESIGN/ids=100000000", unit: "ms/gc", design: "verve"},
	turnBar(2, false, "full", "p99.99-ratio"),
	turnBar(0.8, true, "full", "adds-ratio"),
	turnBar(2, false, "paced", "p99.99-ratio"),
	turnBar(0.8, true, "paced", "adds-ratio"),
	httpBar(0.95, "unique", "verve", "bare", true),
	httpBar(0.95, "duplicates", "verve", "bare", true),
	httpBar(0.85, "pipelined", "verve", "bare", true),
	httpBar(0.97, "headers", "verve", "bare", true),
	httpBar(1.15, "unique", "verve", "seed", true),
	httpBar(2.4, "pipelined", "verve", "seed", true),
	httpBar(1.03, "unique", "memory", "verve", false),
	httpBar(1.03, "pipelined", "memory", "verve", false),
	batchBar(8, "1,000 decimals a request", "decimals"),
	batchBar(4, "1,000 UUIDs a request", "uuids"),
	batchBar(4, "1,000 decimals a request in JSON", "json"),
	batchBar(3.5, "100 decimals a request", "hundred"),
	batchBar(0.5, "1,000 decimals a request in a group, with Redis", "group"),
	{what: "CPU of an id: single/1,000 decimals a request", want: 50, atLeast: true,
		pattern: "http/batch/DESIGN", unit: "cpu-us", design: "decimals", against: []string{"single"}},
	{what: "CPU that a token costs, us", want: 0.1, pattern: "http/options/DESIGN", unit: "cpu-us", design: "token-cost"},
	{what: "CPU of a request with one of 1,000 keys/without", want: 1.05,
		pattern: "http/options/DESIGN", unit: "cpu-us", design: "plain", against: []string{"key"}},
	{what: "CPU of an id in a batch with one of 1,000 keys/without", want: 1.5,
		pattern: "http/options/DESIGN", unit: "cpu-us", design: "lines", against: []string{"lines-key"}},
	{what: "CPU of an id in a batch with 1,000 keys/without", want: 1.5,
		pattern: "http/options/DESIGN", unit: "cpu-us", design: "items", against: []string{"items-key"}},
	{what: "p99 of windows sealed late under batches of 10,000, ms", want: 5,
		pattern: "http/batch/DESIGN", unit: "p99-ms", design: "turn"},
	sharedBar(6, true, "CPU of an id, client and Redis", "cpu-us/id", "verve", "go-redis"),
	sharedBar(3, true, "CPU of an id, client and Redis", "cpu-us/id", "verve", "rueidis"),
	sharedBar(0.4, false, "ids/s", "ids/s", "verve-repeats", "verve"),
	sharedBar(5, true, "CPU of Redis for an id", "redis-us/id", "verve-repeats", "verve"),
	sharedBar(1/0.7, true, "bytes of Redis for a decimal", "B/id", "verve", "rueidis"),
	sharedBar(1/0.7, true, "bytes of Redis for a UUID", "B/id", "verve-uuids", "rueidis-uuids"),
}

// print writes the table and reports whether no promise is missed.
func print(w io.Writer, m measurements) bool {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "bar\twanted\tmeasured\t")
	kept := true
	for _, b := range bars {
		word := "at most"
		if b.atLeast {
			word = "at least"
		}
		got, known := m.worst(b)
		state, measured := "not measured", ""
		if known {
			state, measured = "met", fmt.Sprintf("%.4g", got)
			if b.atLeast && got < b.want || !b.atLeast && got > b.want {
				state, kept = "MISSED", false
			}
		}
		fmt.Fprintf(t, "%s\t%s %.4g\t%s\t%s\n", b.what, word, b.want, measured, state)
	}
	_ = t.Flush() // standard output: there is no other place for its error
	return kept
}
