package bench

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"text/tabwriter"
)

var (
	measuredFlag = flag.String("measured", "", "files that TestBars judges, comma-separated, instead of those in results")
	updateFlag   = flag.Bool("update", false, "TestBars writes results/bars.txt")
)

// TestBars checks whether the promises of performance hold: it prints each beside what was
// measured, and fails if one is missed.
//
//	go test ./bench -v -run '^TestBars$' -measured FILE,...
//
// A FILE ending in .json is of bench/http, any other the output of go test -bench, of as
// many runs as there are. Every ratio is taken within a run, between neighbours in time,
// and then the median over the runs; every other figure is the median over the runs.
// Tables of everything that was measured are made by benchstat (bench/run).
//
// Without a FILE it checks that results/bars.txt is the table of the measurements beside it.
func TestBars(t *testing.T) {
	if *measuredFlag != "" {
		table, missed := measure(t, strings.Split(*measuredFlag, ",")...).table()
		fmt.Print(table)
		if missed > 0 {
			t.Errorf("%d bars are missed", missed)
		}
		return
	}
	of := func(name string) string { return filepath.Join("results", name) }
	table, _ := measure(t, of("runs.txt"), of("once.txt"), of("http.json"), of("close.json")).table()
	if *updateFlag {
		if err := os.WriteFile(of("bars.txt"), []byte(table), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if kept, err := os.ReadFile(of("bars.txt")); err != nil || string(kept) != table {
		t.Errorf("results/bars.txt: %v; got\n%s\nwant, as by -update\n%s", err, kept, table)
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
		pattern: "http/options/DESIGN", unit: "cpu-us", design: "plain", against: []string{"plain-key"}},
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

// table returns the bars with what was measured, and how many are missed.
func (m measurements) table() (table string, missed int) {
	var text strings.Builder
	t := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "bar\twanted\tmeasured\t")
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
				state = "MISSED"
				missed++
			}
		}
		fmt.Fprintf(t, "%s\t%s %.4g\t%s\t%s\n", b.what, word, b.want, measured, state)
	}
	_ = t.Flush() // into memory
	return text.String(), missed
}

const goOutput = `goos: linux
cpu: A Machine
commit: abc
BenchmarkAdd/design=verve/ids=1000000/kind=uuid/mix=unique/writers=2-8   3   50 ns/op   100 cpu-ns/op   0 B/op   0 allocs/op
BenchmarkAdd/design=seed/ids=1000000/kind=uuid/mix=unique/writers=2-8    1   900 ns/op   700 cpu-ns/op   160 B/op   4 allocs/op
BenchmarkAdd/design=verve/ids=1000000/kind=uuid/mix=unique/writers=2-8   3   50 ns/op   200 cpu-ns/op   0 B/op   0 allocs/op
BenchmarkAdd/design=seed/ids=1000000/kind=uuid/mix=unique/writers=2-8    1   900 ns/op   800 cpu-ns/op   160 B/op   4 allocs/op
BenchmarkAdd/design=verve/ids=1000000/kind=uuid/mix=unique/writers=2-8   3   50 ns/op   100 cpu-ns/op   0 B/op   0 allocs/op
BenchmarkAdd/design=seed/ids=1000000/kind=uuid/mix=unique/writers=2-8    1   900 ns/op   600 cpu-ns/op   160 B/op   4 allocs/op
BenchmarkGC/design=verve/ids=100000000-8  5  3000000 ns/op  3 ms/gc
PASS
`

const httpOutput = `{"samples":[
 {"scenario":"unique","server":"bare","cpu_us":8},{"scenario":"unique","server":"verve","cpu_us":10},
 {"scenario":"unique","server":"bare","cpu_us":9.9},{"scenario":"unique","server":"verve","cpu_us":10},
 {"scenario":"unique","server":"bare","cpu_us":19},{"scenario":"unique","server":"verve","cpu_us":20}]}`

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestBarsAreJudgedByMediansOfRatios(t *testing.T) {
	m := measure(t, writeFile(t, "go.txt", goOutput), writeFile(t, "http.json", httpOutput))
	want := map[string]struct {
		got   float64
		known bool
	}{
		"CPU of an add: seed/verve, 1 M new UUIDs":                     {6, true},
		"allocations of an add":                                        {0, true},
		"full GC with 100 M ids":                                       {3, true},
		"CPU of a request, unique: bare/verve":                         {0.95, true},
		"CPU of a request, unique: seed/verve":                         {0, false},
		"CPU of an add: seed/verve, 10 M new decimals":                 {0, false},
		"resident bytes per decimal, forecast right, 1 M ids and more": {0, false},
	}
	for _, b := range bars {
		w, ok := want[b.what]
		if !ok {
			continue
		}
		delete(want, b.what)
		if got, known := m.worst(b); got != w.got || known != w.known {
			t.Errorf("%s: got %v, %v; want %v, %v", b.what, got, known, w.got, w.known)
		}
	}
	for what := range want {
		t.Errorf("no bar %q", what)
	}
	if table, missed := m.table(); missed == 0 {
		t.Errorf("a full GC of 3 ms misses its bar of 2 ms:\n%s", table)
	}
}

// TestServersThatAreCloseAreJudgedByTheirOwnRounds: those of all servers are further
// apart in time.
func TestServersThatAreCloseAreJudgedByTheirOwnRounds(t *testing.T) {
	own := strings.ReplaceAll(httpOutput, `"verve","cpu_us":10`, `"verve","cpu_us":11`)
	m := measure(t, writeFile(t, "http.json", httpOutput), writeFile(t, "close.json", own))
	for _, b := range bars {
		if got, _ := m.worst(b); b.what == "CPU of a request, unique: bare/verve" && got != 0.9 {
			t.Errorf("got %v, want 0.9", got)
		}
	}
}
