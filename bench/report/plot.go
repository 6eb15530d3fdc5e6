package main

import (
	"bytes"
	"fmt"
	"html"
	"math"
)

const (
	addPlot    = "add.svg"
	memoryPlot = "memory.svg"
	turnPlot   = "turn.svg"
	httpPlot   = "http.svg"
)

// chart is a bar chart with a logarithmic axis: the designs differ by orders
// of magnitude. It is drawn here because a plotting library would weigh more
// in go.mod than the rest of the suite.
type chart struct {
	title  string
	series []string
	groups []group
}

// group is a set of bars under one label, in order of the series; 0 is none.
type group struct {
	label  string
	values []float64
}

var colours = []string{"#0b7285", "#e8590c", "#868e96", "#5c940d", "#862e9c", "#c92a2a"}

// svg draws the chart.
func (c chart) svg() []byte {
	const (
		barHeight, gap  = 16, 14
		left, right     = 150, 70
		top, plot       = 64, 480
		width           = left + plot + right
		text            = `font-family="sans-serif" font-size="12" fill="#212529"`
		labelCharacters = 7 // pixels of one in the legend, about
	)
	low, high := math.Inf(1), 0.0
	bars := 0
	for _, g := range c.groups {
		for _, v := range g.values {
			if v > 0 {
				low, high, bars = min(low, v), max(high, v), bars+1
			}
		}
	}
	if bars == 0 {
		return nil
	}
	from, to := math.Floor(math.Log10(low)), math.Ceil(math.Log10(high))
	if low == math.Pow(10, from) {
		from-- // a bar of no length would say nothing
	}
	x := func(v float64) float64 { return left + plot*(math.Log10(v)-from)/(to-from) }
	height := top + bars*barHeight + len(c.groups)*gap + 10

	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d">`+"\n", width, height, width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", width, height)
	fmt.Fprintf(&b, `<text x="10" y="18" %s font-weight="bold">%s</text>`+"\n", text, html.EscapeString(c.title))
	at := 10
	for i, s := range c.series {
		fmt.Fprintf(&b, `<rect x="%d" y="27" width="11" height="11" fill="%s"/><text x="%d" y="37" %s>%s</text>`+"\n",
			at, colours[i%len(colours)], at+16, text, html.EscapeString(s))
		at += 34 + labelCharacters*len(s)
	}
	for e := from; e <= to; e++ {
		v := math.Pow(10, e)
		fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#dee2e6"/><text x="%.1f" y="%d" %s text-anchor="middle">%s</text>`+"\n",
			x(v), x(v), top-4, height-6, x(v), top-8, text, short(v))
	}
	y := top
	for _, g := range c.groups {
		first := y
		for i, v := range g.values {
			if v <= 0 {
				continue
			}
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/><text x="%.1f" y="%d" %s>%s</text>`+"\n",
				left, y, x(v)-left, barHeight-2, colours[i%len(colours)], x(v)+5, y+11, text, short(v))
			y += barHeight
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d" %s text-anchor="end">%s</text>`+"\n", left-8, (first+y)/2+3, text, html.EscapeString(g.label))
		y += gap
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// drawAll draws what was measured.
func drawAll(m *measurements) map[string][]byte {
	value := func(v float64, _ bool) float64 { return v }
	designs := order(m.values("Add", "design"))
	add := chart{title: "CPU of an add, unique decimals, 2 writers, with GC (ns, logarithmic)", series: designs}
	for _, ids := range m.values("Add", "ids") {
		g := group{label: count(ids) + " ids"}
		for _, d := range designs {
			g.values = append(g.values, value(m.median(fmt.Sprintf(adds, d, ids, "decimal", "unique", "2"), "cpu-ns/op")))
		}
		add.groups = append(add.groups, g)
	}

	designs = order(m.values("Resident", "design"))
	mem := chart{title: "Resident bytes per id, expected right (logarithmic)", series: designs}
	for _, kind := range m.values("Resident", "kind") {
		for _, ids := range m.values("Resident", "ids") {
			g := group{label: count(ids) + " " + kind + "s"}
			for _, d := range designs {
				g.values = append(g.values, value(m.median(fmt.Sprintf(memory, d, ids, kind, "right"), "B/id")))
			}
			mem.groups = append(mem.groups, g)
		}
	}

	turn := chart{title: "Add under two busy writers before and after a turn (us, logarithmic)"}
	for _, n := range m.values("Rollover", "retired") {
		for _, q := range quantiles {
			g := group{label: q}
			turn.series = turn.series[:0]
			for _, d := range order(m.values("Rollover", "design")) {
				if d == "gomaps" {
					continue // three pairs would need six colours
				}
				for _, when := range []string{"steady", "turn"} {
					turn.series = append(turn.series, d+", "+whenNames[when])
					g.values = append(g.values, value(m.median(fmt.Sprintf(turns, d, n, "full"), when+"-"+q+"-ns"))/1000)
				}
			}
			turn.groups = append(turn.groups, g)
		}
	}

	http := chart{title: "CPU of the server for a request (us, logarithmic)", series: servers}
	for _, s := range scenarios {
		g := group{label: s}
		for _, srv := range servers {
			g.values = append(g.values, value(m.median("http/"+s+"/"+srv, "cpu-us")))
		}
		http.groups = append(http.groups, g)
	}

	plots := map[string][]byte{}
	for name, c := range map[string]chart{addPlot: add, memoryPlot: mem, turnPlot: turn, httpPlot: http} {
		if svg := c.svg(); svg != nil {
			plots[name] = svg
		}
	}
	return plots
}
