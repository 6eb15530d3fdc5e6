package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// bar is a promise of performance and what was measured for it.
type bar struct {
	what    string
	want    float64
	atLeast bool // else at most
	unit    string
	got     float64
	known   bool
}

type state string

const (
	met        state = "met"
	missed     state = "MISSED"
	unmeasured state = "not measured"
)

func (b bar) state() state {
	switch {
	case !b.known:
		return unmeasured
	case b.atLeast && b.got >= b.want, !b.atLeast && b.got <= b.want:
		return met
	}
	return missed
}

func (b bar) wanted() string {
	if b.atLeast {
		return fmt.Sprintf("at least %s%s", short(b.want), b.unit)
	}
	return fmt.Sprintf("at most %s%s", short(b.want), b.unit)
}

func (b bar) measured() string {
	if !b.known {
		return ""
	}
	return short(b.got) + b.unit
}

// libraries are the designs made of a library for concurrent or compact maps.
var libraries = []string{"xsync", "swiss"}

const (
	adds   = "Add/design=%s/ids=%s/kind=%s/mix=%s/writers=%s"
	memory = "Resident/design=%s/ids=%s/kind=%s/expect=%s"
	turns  = "Rollover/design=%s/retired=%s/load=%s"
)

// judge lists the bars. Where one is for several cases, the worst counts.
func judge(m *measurements) (bars []bar) {
	least := func(what string, want float64, unit string, got func(worst func(float64, bool))) {
		b := bar{what: what, want: want, atLeast: true, unit: unit}
		got(func(v float64, ok bool) {
			if ok && (!b.known || v < b.got) {
				b.got, b.known = v, true
			}
		})
		bars = append(bars, b)
	}
	most := func(what string, want float64, unit string, got func(worst func(float64, bool))) {
		b := bar{what: what, want: want, unit: unit}
		got(func(v float64, ok bool) {
			if ok && (!b.known || v > b.got) {
				b.got, b.known = v, true
			}
		})
		bars = append(bars, b)
	}
	// against adds the ratios of designs' CPU to Verve's in the same case.
	against := func(worst func(float64, bool), ids, kind, mix string, designs ...string) {
		for _, w := range m.values("Add", "writers") {
			for _, d := range designs {
				worst(m.ratio(fmt.Sprintf(adds, d, ids, kind, mix, w), fmt.Sprintf(adds, "verve", ids, kind, mix, w), "cpu-ns/op"))
			}
		}
	}

	for _, ids := range []string{"50000", "1000000", "10000000"} {
		least("add, unique decimals, CPU, seed/verve, "+count(ids), 8, "x", func(worst func(float64, bool)) {
			against(worst, ids, "decimal", "unique", "seed")
		})
	}
	least("the same, best library/verve, 10 M", 2, "x", func(worst func(float64, bool)) {
		against(worst, "10000000", "decimal", "unique", libraries...)
	})
	// Not asked for: what the fast path gains where requests arrive together.
	least("the same for ids that arrive 16 together, 10 M", 2, "x", func(worst func(float64, bool)) {
		for _, w := range m.values("Add", "writers") {
			for _, d := range libraries {
				worst(m.ratio(fmt.Sprintf(adds, d, "10000000", "decimal", "unique", w), fmt.Sprintf(adds, "verve16", "10000000", "decimal", "unique", w), "cpu-ns/op"))
			}
		}
	})
	for _, ids := range m.values("Add", "ids") {
		if _, ok := m.median(fmt.Sprintf(adds, "seed", ids, "decimal", "dup99", "2"), "cpu-ns/op"); !ok {
			continue
		}
		least("add, 99 % duplicates, CPU, seed/verve, "+count(ids), 9, "x", func(worst func(float64, bool)) {
			against(worst, ids, "decimal", "dup99", "seed")
		})
		least("the same, best library/verve, "+count(ids), 1, "x", func(worst func(float64, bool)) {
			against(worst, ids, "decimal", "dup99", libraries...)
		})
	}
	least("add, unique UUIDs, CPU, seed/verve, 1 M", 5, "x", func(worst func(float64, bool)) {
		against(worst, "1000000", "uuid", "unique", "seed")
	})
	for _, c := range []struct {
		kind, expect, what string
		want               float64
	}{
		{"decimal", "right", "decimals, expected right", 12.5},
		{"decimal", "under", "decimals, expected 10x under", 18},
		{"uuid", "right", "UUIDs, expected right", 26},
		{"uuid", "under", "UUIDs, expected 10x under", 36},
	} {
		most("resident bytes per id, 1 M and above, "+c.what, c.want, "", func(worst func(float64, bool)) {
			for _, ids := range m.values("Resident", "ids") {
				worst(m.median(fmt.Sprintf(memory, "verve", ids, c.kind, c.expect), "B/id"))
			}
		})
	}
	for _, unit := range []string{"allocs/op", "B/op"} {
		most("add, "+unit, 0, "", func(worst func(float64, bool)) {
			for k := range m.samples {
				if strings.HasPrefix(k.name, "Add/design=verve") && k.unit == unit {
					worst(m.median(k.name, unit))
				}
			}
		})
	}
	most("full GC with 100 M ids", 2, " ms", func(worst func(float64, bool)) {
		worst(m.median("GC/design=verve/ids=100000000", "ms/gc"))
	})
	for _, load := range []string{"full", "paced"} {
		most("p99.99 of add, 100 ms after a turn/before it, 10 M ids retired, load "+load, 2, "x", func(worst func(float64, bool)) {
			worst(m.median(fmt.Sprintf(turns, "verve", "10000000", load), "p99.99-ratio"))
		})
		least("throughput, the same", 0.8, "x", func(worst func(float64, bool)) {
			worst(m.median(fmt.Sprintf(turns, "verve", "10000000", load), "adds-ratio"))
		})
	}
	for _, c := range []struct {
		scenario, server string
		want             float64
	}{
		{"unique", "bare", 0.95}, {"duplicates", "bare", 0.95}, {"pipelined", "bare", 0.85},
		{"unique", "seed", 1.15}, {"pipelined", "seed", 2.4},
	} {
		least(fmt.Sprintf("HTTP, CPU per request, %s/verve, %s", c.server, c.scenario), c.want, "x", func(worst func(float64, bool)) {
			worst(m.httpRatio(c.scenario, c.server, "verve"))
		})
	}
	for _, scenario := range []string{"unique", "pipelined"} {
		most("HTTP, CPU per request, with/without the data directory, "+scenario, 1.03, "x", func(worst func(float64, bool)) {
			worst(m.httpRatio(scenario, "verve", "memory"))
		})
	}
	return bars
}

func printBars(w io.Writer, bars []bar) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "bar\twanted\tmeasured\t")
	for _, b := range bars {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", b.what, b.wanted(), b.measured(), b.state())
	}
	_ = t.Flush() // standard output: nobody is left to tell
}
