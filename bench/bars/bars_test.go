package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const output = `goos: linux
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

func write(t *testing.T, name, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestBarsAreJudgedByMediansOfRatios(t *testing.T) {
	m := measurements{}
	for _, f := range []string{write(t, "go.txt", output), write(t, "http.json", httpOutput)} {
		if err := m.read(f); err != nil {
			t.Fatal(err)
		}
	}
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
	var table strings.Builder
	if print(&table, m) {
		t.Errorf("a full GC of 3 ms misses its bar of 2 ms:\n%s", table.String())
	}
}

// TestServersThatAreCloseAreJudgedByTheirOwnRounds: those of all servers are further
// apart in time.
func TestServersThatAreCloseAreJudgedByTheirOwnRounds(t *testing.T) {
	m := measurements{}
	own := strings.ReplaceAll(httpOutput, `"verve","cpu_us":10`, `"verve","cpu_us":11`)
	for _, f := range []string{write(t, "http.json", httpOutput), write(t, "close.json", own)} {
		if err := m.read(f); err != nil {
			t.Fatal(err)
		}
	}
	for _, b := range bars {
		if got, _ := m.worst(b); b.what == "CPU of a request, unique: bare/verve" && got != 0.9 {
			t.Errorf("got %v, want 0.9", got)
		}
	}
}
