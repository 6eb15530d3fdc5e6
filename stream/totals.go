package stream

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"verve/counter"
)

// Totals sums records per window over all instances of a group, and records by key per
// window and key. Groups count apart, also in one topic. The zero value is ready. It keeps
// one small entry per record, and 40 bytes or so for each of its keys; it is not safe for
// concurrent use.
type Totals struct {
	windows map[windowKey]*windowSum
	seen    map[string][]Record // by key; if there are several, their values differ
	series  map[string]*seriesTotal
	keyed   map[string]*keyedRecord // by the key of their record
	repeats []string
}

// windowKey includes the length, because windows of two lengths may have the same start if
// --window was changed.
type windowKey struct {
	group  string
	start  int64
	length int64 // ms
}

// windowSum is what was added of one window. Windows leaves a window out until its first record
// is added: records by key may come before it.
type windowSum struct {
	WindowTotal
	records []Record       // each key once
	keyed   []*keyedRecord // also of records that were not added yet
}

// window returns the windowSum of a window, which it makes if there is none.
func (t *Totals) window(group string, s counter.Span) *windowSum {
	if t.windows == nil {
		t.windows = make(map[windowKey]*windowSum)
		t.seen = make(map[string][]Record)
		t.series = make(map[string]*seriesTotal)
		t.keyed = make(map[string]*keyedRecord)
	}
	at := windowKey{group, s.Start.UnixNano(), s.Window.Milliseconds()}
	w := t.windows[at]
	if w == nil {
		w = &windowSum{WindowTotal: WindowTotal{Group: group, Start: s.Start, Window: s.Window, Complete: true, Exact: true}}
		t.windows[at] = w
	}
	return w
}

// WindowTotal is the sum of one window of a group.
type WindowTotal struct {
	Group    string        // name of the group
	Start    time.Time     // UTC
	Window   time.Duration // length
	Unique   uint64        // sum over the records
	Records  int           // how many
	Complete bool          // every record of it is
	Exact    bool          // every record of it is
}

// Span returns the window.
func (w WindowTotal) Span() counter.Span { return counter.Span{Start: w.Start, Window: w.Window} }

// Gap is what is missing in the records of one instance, or of a group.
type Gap struct {
	Series string // GROUP/INSTANCE, or GROUP

	// Idle: nothing is missing, the server did not run in these windows. For an instance
	// that is certain, because the numbers of the records around them follow each other.
	// The records of a group have no numbers. There it means that neither the window before
	// the gap, which the stop cut short, nor the one after it is complete.
	Idle bool

	// The first and the last of the missing windows. Zero: the gap is one of numbers.
	FirstWindow, LastWindow time.Time
	// The first and the last of the missing sequence numbers. Zero: the gap is one of windows.
	FirstSeq, LastSeq uint64
}

// String describes the gap in one line.
func (g Gap) String() string {
	what, first, last := "window", g.FirstWindow.Format(time.RFC3339Nano), g.LastWindow.Format(time.RFC3339Nano)
	if g.FirstSeq != 0 {
		what, first, last = "record", strconv.FormatUint(g.FirstSeq, 10), strconv.FormatUint(g.LastSeq, 10)
	}
	are := " is missing"
	if what += " " + first; first != last {
		what, are = strings.Replace(what, " ", "s ", 1)+" to "+last, " are missing"
	}
	if g.Idle {
		return g.Series + ": nothing ran in the " + what
	}
	return g.Series + ": " + what + are
}

type seriesTotal struct {
	windows map[int64]*seriesWindow // by start, Unix nanoseconds
	seqs    map[uint64]Record
	last    Record // the one with the latest window
}

// seriesWindow is what the records of a window imply for the windows around it.
type seriesWindow struct {
	length            time.Duration
	firstSeq, lastSeq uint64
	complete          bool // every record is
}

// before reports whether nothing ran between two windows.
func (w *seriesWindow) before(next *seriesWindow) bool {
	if w.lastSeq == 0 { // of a group
		return !w.complete && !next.complete
	}
	return w.lastSeq+1 == next.firstSeq
}

// Add adds one record. They may come in any order.
func (t *Totals) Add(r Record) {
	w := t.window(r.Group, r.Span())
	r.WindowStart, r.SealedAt = r.WindowStart.UTC(), r.SealedAt.UTC() // comparable
	key := r.Key()
	if seen := t.seen[key]; len(seen) > 0 {
		same := slices.Contains(seen, r) || r.Scope == ScopeGroup && seen[0].Unique == r.Unique
		t.repeated(key, r.Scope, seen[0].Unique, r.Unique, same)
		if same || r.Scope == ScopeGroup {
			return
		}
	} else {
		w.records = append(w.records, r)
	}
	t.seen[key] = append(t.seen[key], r)
	s := t.series[r.identity()]
	if s == nil {
		s = &seriesTotal{windows: make(map[int64]*seriesWindow), seqs: make(map[uint64]Record)}
		t.series[r.identity()] = s
	}
	if in := s.windows[r.WindowStart.UnixNano()]; in == nil {
		s.windows[r.WindowStart.UnixNano()] = &seriesWindow{r.window(), r.Seq, r.Seq, r.Complete}
	} else {
		*in = seriesWindow{max(in.length, r.window()), min(in.firstSeq, r.Seq), max(in.lastSeq, r.Seq), in.complete && r.Complete}
	}
	if !r.WindowStart.Before(s.last.WindowStart) {
		s.last = r
	}
	if r.Scope == ScopeInstance {
		if first, ok := s.seqs[r.Seq]; !ok {
			s.seqs[r.Seq] = r
		} else if first.Key() != key { // the same key is reported above
			t.repeats = append(t.repeats, fmt.Sprintf("%s shares its number with %s (unique %d and %d)", first.Key(), key, first.Unique, r.Unique))
		}
	}
	w.Unique += r.Unique
	w.Records++
	w.Complete = w.Complete && r.Complete
	w.Exact = w.Exact && r.Exact
}

// repeated notes a record, or one by key, that should not be there. same: it is a copy,
// counted once. Otherwise one sequence number has two values, which two processes with one
// name produce; both are counted. A group has one record per window: the first is counted.
func (t *Totals) repeated(id string, scope Scope, first, again uint64, same bool) {
	counted := "with two values, both are counted"
	switch {
	case same:
		t.repeats = append(t.repeats, fmt.Sprintf("%s is there twice and counted once (unique %d)", id, again))
		return
	case scope == ScopeGroup:
		counted = "with two values, the first is counted"
	}
	t.repeats = append(t.repeats, fmt.Sprintf("%s is there %s (unique %d and %d)", id, counted, first, again))
}

// Before returns what is missing between the last record of r's series and r, which is
// not added yet. It is for a reader that reports gaps while records come, in order. If r is
// earlier than the last record it returns nil: r was reported as missing when that one came.
func (t *Totals) Before(r Record) []Gap {
	s := t.series[r.identity()]
	if s == nil || cmp.Or(r.WindowStart.Compare(s.last.WindowStart), cmp.Compare(r.Seq, s.last.Seq)) < 0 {
		return nil
	}
	var two Totals
	two.Add(s.last)
	two.Add(r)
	return two.Gaps()
}

// Compare orders windows by their start, then by their group, then by their length.
func (w WindowTotal) Compare(other WindowTotal) int {
	return cmp.Or(w.Start.Compare(other.Start), cmp.Compare(w.Group, other.Group), cmp.Compare(w.Window, other.Window))
}

// Windows returns the sums in the order of Compare.
func (t *Totals) Windows() []WindowTotal {
	out := make([]WindowTotal, 0, len(t.windows))
	for _, w := range t.windows {
		if w.Records > 0 {
			out = append(out, w.WindowTotal)
		}
	}
	slices.SortFunc(out, WindowTotal.Compare)
	return out
}

// Window returns the sum of one window, and false if no record of it was added.
func (t *Totals) Window(group string, s counter.Span) (WindowTotal, bool) {
	w := t.windows[windowKey{group, s.Start.UnixNano(), s.Window.Milliseconds()}]
	if w == nil || w.Records == 0 {
		return WindowTotal{}, false
	}
	return w.WindowTotal, true
}

// Repeats describes the records, and those by key, that should not be there, each in one
// line, in the order they were added.
func (t *Totals) Repeats() []string { return t.repeats }

// Gaps returns what is missing between the first and the last record of each
// series, windows first.
func (t *Totals) Gaps() []Gap {
	var out []Gap
	for name, s := range t.series {
		starts := slices.Sorted(maps.Keys(s.windows))
		for i := 1; i < len(starts); i++ {
			before, next := s.windows[starts[i-1]], s.windows[starts[i]]
			expected := starts[i-1] + int64(before.length)
			if starts[i] > expected {
				out = append(out, Gap{
					Series:      name,
					Idle:        before.before(next),
					FirstWindow: time.Unix(0, expected).UTC(),
					LastWindow:  time.Unix(0, max(expected, starts[i]-int64(next.length))).UTC(),
				})
			}
		}
		seqs := slices.Sorted(maps.Keys(s.seqs))
		for i := 1; i < len(seqs); i++ {
			if seqs[i] != seqs[i-1]+1 {
				out = append(out, Gap{Series: name, FirstSeq: seqs[i-1] + 1, LastSeq: seqs[i] - 1})
			}
		}
	}
	slices.SortFunc(out, func(a, b Gap) int {
		return cmp.Or(cmp.Compare(a.Series, b.Series), cmp.Compare(a.FirstSeq, b.FirstSeq), a.FirstWindow.Compare(b.FirstWindow))
	})
	return out
}
