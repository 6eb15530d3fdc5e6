package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
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
	m := newMeasurements()
	for _, f := range []string{write(t, "go.txt", output), write(t, "http.json", httpOutput)} {
		if err := m.read(f); err != nil {
			t.Fatal(err)
		}
	}
	want := map[string]struct {
		got   float64
		state state
	}{
		"add, unique UUIDs, CPU, seed/verve, 1 M": {6, met},
		"add, allocs/op":                                                 {0, met},
		"full GC with 100 M ids":                                         {3, missed},
		"HTTP, CPU per request, bare/verve, unique":                      {0.95, met},
		"HTTP, CPU per request, seed/verve, unique":                      {0, unmeasured},
		"add, unique decimals, CPU, seed/verve, 10 M":                    {0, unmeasured},
		"resident bytes per id, 1 M and above, decimals, expected right": {0, unmeasured},
	}
	for _, b := range judge(m) {
		w, ok := want[b.what]
		if !ok {
			continue
		}
		delete(want, b.what)
		if b.got != w.got || b.state() != w.state {
			t.Errorf("%s: got %v, %s; want %v, %s", b.what, b.got, b.state(), w.got, w.state)
		}
	}
	for what := range want {
		t.Errorf("no bar %q", what)
	}
}

// TestServersThatAreCloseAreJudgedByTheirOwnRounds, and tables are of the rounds in
// which all servers took part.
func TestServersThatAreCloseAreJudgedByTheirOwnRounds(t *testing.T) {
	m := newMeasurements()
	own := strings.ReplaceAll(httpOutput, `"verve","cpu_us":10`, `"verve","cpu_us":11`)
	for _, f := range []string{write(t, "http.json", httpOutput), write(t, "close.json", own)} {
		if err := m.read(f); err != nil {
			t.Fatal(err)
		}
	}
	for _, b := range judge(m) {
		if b.what == "HTTP, CPU per request, bare/verve, unique" && b.got != 0.9 {
			t.Errorf("got %v, want 0.9", b.got)
		}
	}
	if v, _ := m.median("http/unique/verve", "cpu-us"); v != 10 {
		t.Errorf("the table has %v us, want 10", v)
	}
}

func TestReportReplacesOnlyItsPart(t *testing.T) {
	readme := write(t, "README.md", "before\n"+beginMarker+"\nold\n"+endMarker+"\nafter\n")
	plots := t.TempDir()
	for range 2 { // the second time finds what the first one wrote
		if _, err := run(flags{Readme: readme, Plots: plots, Files: []string{write(t, "go.txt", output), write(t, "http.json", httpOutput)}}); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	if !strings.HasPrefix(page, "before\n"+beginMarker) || !strings.HasSuffix(page, endMarker+"\nafter\n") || strings.Contains(page, "old") {
		t.Errorf("got\n%s", page)
	}
	for _, want := range []string{"| CPU | A Machine |", "| 1 M | 2 | 100 | 700 |", "http.svg"} {
		if !strings.Contains(page, want) {
			t.Errorf("no %q in\n%s", want, page)
		}
	}
	svgs, err := filepath.Glob(filepath.Join(plots, "*.svg"))
	if err != nil || len(svgs) == 0 {
		t.Fatalf("plots: %v, %v", svgs, err)
	}
	for _, f := range svgs {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for d := xml.NewDecoder(bytes.NewReader(b)); ; {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", f, err)
			}
		}
	}
}
