package main

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// page is the part of the readme between the markers.
func page(m *measurements, bars []bar, plots map[string][]byte, dir string) string {
	var b strings.Builder
	plot := func(name, alt string) {
		if plots[name] != nil {
			fmt.Fprintf(&b, "![%s](%s/%s)\n\n", alt, dir, name)
		}
	}
	machine(&b, m)

	b.WriteString("### Bars\n\n")
	rows := [][]string{{"", "wanted", "measured", ""}}
	for _, x := range bars {
		rows = append(rows, []string{x.what, x.wanted(), x.measured(), string(x.state())})
	}
	table(&b, rows)

	designs := order(m.values("Add", "design"))
	kinds, mixes := m.values("Add", "kind"), m.values("Add", "mix")
	if len(designs) > 0 {
		b.WriteString("### Add: CPU of the process for one add, with its garbage collection, ns\n\n")
		plot(addPlot, "CPU per add of unique decimals by design and ids")
	}
	for _, kind := range kinds {
		for _, mix := range mixes {
			rows := [][]string{append([]string{kind + ", " + mixNames[mix], "writers"}, designs...)}
			for _, ids := range m.values("Add", "ids") {
				for _, w := range m.values("Add", "writers") {
					row := []string{count(ids), w}
					for _, d := range designs {
						row = append(row, figure(m.median(fmt.Sprintf(adds, d, ids, kind, mix, w), "cpu-ns/op")))
					}
					rows = appendRow(rows, row, 2)
				}
			}
			table(&b, rows)
		}
	}

	if designs := order(m.values("Resident", "design")); len(designs) > 0 {
		b.WriteString("### Memory: resident bytes for each id of a full epoch\n\nIn the first epoch, and in brackets in the third.\n\n")
		plot(memoryPlot, "Resident bytes per id by design")
		rows := [][]string{append([]string{"ids", "kind", "expected"}, designs...)}
		for _, ids := range m.values("Resident", "ids") {
			for _, kind := range m.values("Resident", "kind") {
				for _, expect := range m.values("Resident", "expect") {
					row := []string{count(ids), kind, expect}
					for _, d := range designs {
						name := fmt.Sprintf(memory, d, ids, kind, expect)
						cell := figure(m.median(name, "B/id"))
						if steady, ok := m.median(name, "steady-B/id"); ok {
							cell += " (" + short(steady) + ")"
						}
						row = append(row, cell)
					}
					rows = appendRow(rows, row, 3)
				}
			}
		}
		table(&b, rows)
	}

	if designs := order(m.values("GC", "design")); len(designs) > 0 {
		b.WriteString("### A full garbage collection with the set full, ms\n\n")
		rows := [][]string{append([]string{"ids"}, designs...)}
		for _, ids := range m.values("GC", "ids") {
			row := []string{count(ids)}
			for _, d := range designs {
				row = append(row, figure(m.median("GC/design="+d+"/ids="+ids, "ms/gc")))
			}
			rows = appendRow(rows, row, 1)
		}
		table(&b, rows)
	}

	if designs := order(m.values("Rollover", "design")); len(designs) > 0 {
		b.WriteString("### The turn of an epoch: latency of an add under two writers, us\n\n")
		plot(turnPlot, "Latency of an add around the turn of an epoch")
		rows := [][]string{{"design", "retired", "load", "", "p50", "p99", "p99.9", "p99.99", "max", "adds/s"}}
		for _, d := range designs {
			for _, n := range m.values("Rollover", "retired") {
				for _, load := range m.values("Rollover", "load") {
					for _, when := range []string{"steady", "turn"} {
						name := fmt.Sprintf(turns, d, n, load)
						row := []string{d, count(n), load, whenNames[when]}
						for _, q := range quantiles {
							v, ok := m.median(name, when+"-"+q+"-ns")
							row = append(row, figure(v/1000, ok))
						}
						rows = appendRow(rows, append(row, figure(m.median(name, when+"-adds/s"))), 4)
					}
				}
			}
		}
		table(&b, rows)
	}

	var http [][]string
	for _, scenario := range scenarios {
		for _, s := range servers {
			name := "http/" + scenario + "/" + s
			if cpu, ok := m.median(name, "cpu-us"); ok {
				http = append(http, []string{scenario, s, short(cpu),
					figure(m.ratio("http/"+scenario+"/bare", name, "cpu-us")),
					figure(m.median(name, "requests/s")), figure(m.median(name, "p99-ms"))})
			}
		}
	}
	if len(http) > 0 {
		b.WriteString("### HTTP: CPU of the server for a request\n\nRequests per second and the 99th percentile are with one core for the server and one for wrk.\n\n")
		plot(httpPlot, "CPU per request by server")
		table(&b, append([][]string{{"scenario", "server", "us", "bare/this", "requests/s", "p99, ms"}}, http...))
	}
	return strings.TrimRight(b.String(), "\n") + "\n"
}

var (
	mixNames  = map[string]string{"unique": "unique", "half": "every second a repeat", "dup99": "99 % repeats"}
	whenNames = map[string]string{"steady": "before", "turn": "100 ms after"}
	quantiles = []string{"p50", "p99", "p99.9", "p99.99", "max"}
	scenarios = []string{"unique", "duplicates", "pipelined"}
	servers   = []string{"bare", "verve", "memory", "seed", "nethttp"}
)

// machine says where and of what the figures are.
func machine(b *strings.Builder, m *measurements) {
	rows := [][]string{{"measured on", ""}}
	for _, line := range []struct{ key, label string }{
		{"commit", "commit"}, {"date", "date"}, {"cpu", "CPU"}, {"cores", "cores"}, {"memory", "memory"}, {"kernel", "kernel"}, {"go", "Go"}, {"runs", "runs"},
	} {
		if v := m.machine[line.key]; len(v) > 0 {
			rows = append(rows, []string{line.label, strings.Join(v, "; ")})
		}
	}
	table(b, rows)
}

// order puts the designs in the order that they are told in.
func order(designs []string) []string {
	rank := []string{"verve", "verve16", "seed", "gomaps", "xsync", "swiss"}
	slices.SortFunc(designs, func(a, b string) int { return slices.Index(rank, a) - slices.Index(rank, b) })
	return designs
}

// appendRow leaves out rows in which nothing follows the heads.
func appendRow(rows [][]string, row []string, heads int) [][]string {
	if strings.Join(row[heads:], "") == "" {
		return rows
	}
	return append(rows, row)
}

// table writes a table of Markdown, unless it has only its heads.
func table(b *strings.Builder, rows [][]string) {
	if len(rows) < 2 {
		return
	}
	for i, row := range rows {
		b.WriteString("| " + strings.Join(row, " | ") + " |\n")
		if i == 0 {
			b.WriteString("|" + strings.Repeat("---|", len(row)) + "\n")
		}
	}
	b.WriteString("\n")
}

func figure(v float64, ok bool) string {
	if !ok {
		return ""
	}
	return short(v)
}

// short writes three digits that count.
func short(v float64) string {
	switch a := math.Abs(v); {
	case v == math.Trunc(v) && a < 1000:
		return strconv.FormatFloat(v, 'f', -1, 64)
	case a >= 1e6:
		return strconv.FormatFloat(v/1e6, 'f', 2, 64) + " M"
	case a >= 1000:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case a >= 0.01:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return strconv.FormatFloat(v, 'g', 2, 64)
}

// count writes a number of ids as people say it.
func count(ids string) string {
	n, err := strconv.Atoi(ids)
	switch {
	case err != nil:
		return ids
	case n >= 1e6 && n%1e5 == 0:
		return strconv.FormatFloat(float64(n)/1e6, 'f', -1, 64) + " M"
	case n >= 1000 && n%1000 == 0:
		return strconv.Itoa(n/1000) + " k"
	}
	return ids
}
