//go:build linux

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"text/tabwriter"
)

// table is printed while its rounds are driven: a column for each load.
type table struct {
	*tabwriter.Writer
	loads   []load
	samples []sample
}

// rounds drives each load once in a round, each time in another order: being driven
// after a certain other is no advantage. Round 0 warms up: tables grow to their sizes, and
// requests may fail that wait for it.
func (r *run) rounds(ctx context.Context, out io.Writer, scenario, title string, warmUp int, loads []load) (*table, error) {
	fmt.Fprintln(out, title)
	t := &table{Writer: tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight), loads: loads}
	t.row("round", func(name string) string { return name })
	for round := range r.Rounds + 1 {
		for i := range loads {
			l := loads[(round+i)%len(loads)]
			if round == 0 {
				_, _ = r.drive(ctx, l, warmUp)
				continue
			}
			s, err := r.drive(ctx, l, r.Seconds)
			if err = cmp.Or(ctx.Err(), err); err != nil {
				return t, fmt.Errorf("%s: %w", l.name, err)
			}
			s.Scenario, s.Server, s.Round = scenario, l.name, round
			t.samples = append(t.samples, s)
		}
		if round > 0 {
			this := t.samples[len(t.samples)-len(loads):]
			t.row(strconv.Itoa(round), func(name string) string { return fmt.Sprintf("%.3f", column(this, name, cpu)[0]) })
		}
	}
	t.row("median", func(name string) string { return fmt.Sprintf("%.3f", median(column(t.samples, name, cpu))) })
	return t, nil
}

func (t *table) row(head string, cell func(name string) string) {
	fmt.Fprint(t, head, "\t")
	for _, l := range t.loads {
		fmt.Fprint(t, cell(l.name), "\t")
	}
	fmt.Fprintln(t)
}

// end prints what is left of the table.
func (t *table) end() {
	fmt.Fprintln(t)
	_ = t.Flush() // standard output: there is no other place for its error
}

func cpu(s sample) float64      { return s.CPU }
func redisCPU(s sample) float64 { return s.Redis }
func perSec(s sample) float64   { return s.PerSec }

// column returns a value of the server's samples, in order of the rounds.
func column(samples []sample, server string, value func(sample) float64) (c []float64) {
	for _, s := range samples {
		if s.Server == server {
			c = append(c, value(s))
		}
	}
	return c
}

// ratios of the CPU of a and b: of each round, as those are neighbours in time.
func ratios(samples []sample, a, b string) []float64 {
	va, vb := column(samples, a, cpu), column(samples, b, cpu)
	for i := range va {
		va[i] /= vb[i]
	}
	return va
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2
}
