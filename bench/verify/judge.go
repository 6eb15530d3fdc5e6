package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"
	"time"

	"verve/stream"
)

// verdict is what a run found out. Its JSON is the output of --json.
type verdict struct {
	Good bool `json:"good"`
	totals
	Accepted   uint64  `json:"ok"`
	Repeated   uint64  `json:"failed"`
	RefusedP99 float64 `json:"refused_p99_ms"` // of those sent one at a time
	Recovered  uint64  `json:"recovered"`      // of the requests in doubt, how many the records count
	Dials      uint64  `json:"connects"`
	Kills      int     `json:"kills"`
	Seconds    float64 `json:"seconds"`
	PerSecond  float64 `json:"answers_per_second"`
	Windows    int     `json:"windows"`
	BadWindows int     `json:"bad_windows"`
	Inexact    int     `json:"inexact_windows"` // whose sum was not judged
	KeyCounts  uint64  `json:"key_counts"`      // keys of windows that were judged, ids without one too

	KeyDifferences uint64 `json:"key_differences"`

	Again  int `json:"records_in_two_files"` // the same, of a group
	Second int `json:"second_records"`       // windows of a group that have another record, one of which at least is not exact

	Faults faults           `json:"faults"`
	Levels map[string]level `json:"levels,omitempty"` // what the server took, with --admin
	Table  []windowVerdict  `json:"table"`            // the bad windows, or all with --verbose

	newest int64 // the latest window that has a record
}

func (v *verdict) fault(what, format string, args ...any) {
	v.Faults.add(what, format, args...)
	v.Good = false
}

// windowVerdict compares the answers and the records of one window. Sum must be the `ok`
// answers, and on top of them what the requests in doubt can or must have added.
type windowVerdict struct {
	Start string `json:"window_start"`
	windowTruth
	Records    int    `json:"records"`
	Sum        uint64 `json:"sum"`
	Difference int64  `json:"difference"` // sum less `ok` answers
	Inexact    bool   `json:"inexact,omitempty"`
	Bad        string `json:"bad,omitempty"`
}

// judge compares windows, as finish gave them, with every record that could be
// read. Records of windows before the first answer belong to other callers; with
// --skip-first the first window does, too. From there on there may have been no other
// caller.
func judge(t *truth, windows []*windowTruth, records published, f *flags) verdict {
	v := verdict{Again: records.again, totals: t.totals}
	v.Faults = faults{Count: t.faults.Count, Lines: slices.Clone(t.faults.Lines), Kinds: maps.Clone(t.faults.Kinds)}
	for _, line := range records.invalid {
		v.Faults.add("invalid record", "%s", line)
	}
	for _, w := range windows {
		v.Accepted += w.Accepted
		v.Repeated += w.Repeated
	}
	if len(windows) == 0 {
		v.Faults.add("nothing to judge", "no request was answered ok or failed")
		return v
	}
	first := windows[0].start
	if f.SkipFirst {
		first++
	}
	rows := tabulate(t, windows, records.windows, first)
	for _, start := range slices.Sorted(maps.Keys(rows)) {
		r := rows[start]
		if r.Records > 0 {
			v.newest = start
		}
		if r.orphans > 0 && !r.Inexact {
			v.Faults.add("false duplicate", "%d ids were answered failed and never ok in %s, whose record has exact:true", r.orphans, r.Start)
		}
		if t.lenient && r.twice > 0 && !r.Inexact {
			v.Faults.add("ok twice", "%d ids were answered ok twice in %s, whose record has exact:true", r.twice, r.Start)
		}
		switch {
		case r.check(t.lenient):
			v.Recovered += r.Sum - r.Accepted
		case r.Bad != "":
			v.BadWindows++
		default:
			v.Inexact++
		}
		if f.Verbose || r.Bad != "" {
			v.Table = append(v.Table, *r)
		}
	}
	// A request in doubt may fit into two windows; it has counted in one.
	if v.Recovered > v.Doubted {
		v.Faults.add("counted twice", "the records count %d ids more than were answered ok, with %d requests in doubt", v.Recovered, v.Doubted)
	}
	v.Windows = len(rows)
	v.Second = checkSequence(&v.Faults, records.windows, first, t.lenient)
	for _, rec := range records.windows {
		if r := rows[rec.WindowStart.UnixMilli()]; r != nil && r.Records > 1 && rec.Scope == stream.ScopeGroup && rec.Exact && !r.allows(rec.Unique) {
			v.Faults.add("exact and wrong", "one of the records of %s has %d and exact:true, %d were answered ok", r.Start, rec.Unique, r.Accepted)
		}
	}
	if t.keys != nil {
		v.judgeKeys(t, rows, records)
	}
	v.Good = v.BadWindows == 0 && v.Faults.Count == 0
	return v
}

// tabulate joins answers and records, for each window from first on.
func tabulate(t *truth, windows []*windowTruth, records []stream.Record, first int64) map[int64]*windowVerdict {
	rows := make(map[int64]*windowVerdict)
	for _, w := range windows {
		if w.start >= first {
			rows[w.start] = &windowVerdict{Start: label(w.start), windowTruth: *w}
		}
	}
	for _, rec := range records {
		start := rec.WindowStart.UnixMilli()
		if start < first {
			continue
		}
		r := rows[start]
		if r == nil {
			r = &windowVerdict{Start: label(start), windowTruth: *t.unanswered(start)}
			rows[start] = r
		}
		r.Records++
		r.Sum += rec.Unique
		r.Inexact = r.Inexact || !rec.Exact
	}
	return rows
}

// check reports whether the window adds up. If it does not, Bad is the reason, unless
// its record has exact:false and that is allowed.
func (r *windowVerdict) check(allowInexact bool) bool {
	r.Difference = int64(r.Sum - r.Accepted)
	switch {
	case r.Records == 0:
		r.Bad = "no record"
	case r.Inexact && allowInexact:
		return false
	case r.Sum < r.least():
		r.Bad = fmt.Sprintf("%d lost", r.least()-r.Sum)
	case r.Sum > r.most():
		r.Bad = fmt.Sprintf("%d too many", r.Sum-r.most())
	}
	return r.Bad == ""
}

// checkSequence looks at what names the records from the window first on: no
// record is visible twice, an instance numbers its records without gaps and in
// the order of the windows, and a group has one record per window. It returns how many
// windows of groups have two, where that is allowed because one is not exact.
func checkSequence(f *faults, records []stream.Record, first int64, allowInexact bool) (second int) {
	type series struct {
		scope           stream.Scope
		group, instance string
	}
	bySeries := make(map[series][]stream.Record)
	for _, r := range records {
		if r.WindowStart.UnixMilli() >= first {
			key := series{r.Scope, r.Group, r.Instance}
			bySeries[key] = append(bySeries[key], r)
		}
	}
	for key, list := range bySeries {
		// Records of several partitions are read in no common order.
		slices.SortFunc(list, func(a, b stream.Record) int {
			return cmp.Or(cmp.Compare(a.Seq, b.Seq), a.WindowStart.Compare(b.WindowStart))
		})
		for i := 1; i < len(list); i++ {
			before, r := list[i-1], list[i]
			start, earlier := label(r.WindowStart.UnixMilli()), label(before.WindowStart.UnixMilli())
			switch {
			case key.scope == stream.ScopeGroup:
				if start == earlier && allowInexact && !(before.Exact && r.Exact) {
					second++
				} else if start == earlier {
					f.add("visible twice", "group %s has two records of %s", key.group, start)
				}
			case r.Seq == before.Seq:
				f.add("visible twice", "%s/%s has two records with seq %d, of %s and %s",
					key.group, key.instance, r.Seq, earlier, start)
			case r.Seq != before.Seq+1:
				f.add("gap in seq", "%s/%s goes from seq %d to %d at %s",
					key.group, key.instance, before.Seq, r.Seq, start)
			case r.WindowStart.Before(before.WindowStart):
				f.add("order", "%s/%s: seq %d is of %s, after %s",
					key.group, key.instance, r.Seq, start, earlier)
			}
		}
	}
	return second
}

// print writes the verdict for people: bad windows (or all), faults, a summary.
func (v *verdict) print(out io.Writer) {
	if len(v.Table) > 0 {
		tw := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintln(tw, "window\tok answers\tin doubt\trecords\tsum\tdifference\t\t")
		for _, r := range v.Table {
			fmt.Fprintf(tw, "%s\t%d\t%d\t%d\t%d\t%+d\t%s\t\n", r.Start, r.Accepted, r.Maybe, r.Records, r.Sum, r.Difference, r.Bad)
		}
		tw.Flush()
	}
	for _, line := range v.Faults.Lines {
		fmt.Fprintln(out, line)
	}
	if hidden := v.Faults.Count - uint64(len(v.Faults.Lines)); hidden > 0 {
		fmt.Fprintf(out, "... and %d more: %v\n", hidden, v.Faults.Kinds)
	}
	v.printLevels(out)
	fmt.Fprintf(out, "%d answers in %s (%.0f a second): %d ok, %d failed, %d refused; %d requests in doubt, %d of them counted; %d connects, %d kills\n",
		v.Answers, time.Duration(v.Seconds*float64(time.Second)).Round(10*time.Millisecond), v.PerSecond,
		v.Accepted, v.Repeated, v.Refused, v.Doubted, v.Recovered, v.Dials, v.Kills)
	if v.Lost > 0 {
		fmt.Fprintf(out, "%d replies lost, %d answers ok to a retry (replayed), %d attempts set aside, %d ids only ever answered failed\n",
			v.Lost, v.Replayed, v.Aside, v.OnlyFailed)
	}
	if v.KeyCounts > 0 {
		fmt.Fprintf(out, "%d counts of keys, %d differences\n", v.KeyCounts, v.KeyDifferences)
	}
	if v.Good {
		fmt.Fprintf(out, "GOOD: the records of all %d windows add up", v.Windows)
		if v.Inexact > 0 {
			fmt.Fprintf(out, ", %d of them with exact:false", v.Inexact)
		}
		fmt.Fprintln(out)
	} else {
		fmt.Fprintf(out, "BAD: %d of %d windows do not add up, %d faults\n", v.BadWindows, v.Windows, v.Faults.Count)
	}
}
