package stream

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"verve/counter"
)

// KeyTotals sums records per window and key over all instances of a group, and the windows
// as Totals. The zero value is ready. It keeps 40 bytes or so for each key of each record;
// it is not safe for concurrent use.
type KeyTotals struct {
	Totals

	names    map[string]uint32 // key -> its place in inOrder, so that each is kept once
	inOrder  []string
	records  map[string]*keyedRecord // by the key of their record
	byWindow map[windowKey]*keyedWindow
}

// keyedWindow is what was added of one window.
type keyedWindow struct {
	records []Record       // each key once
	keyed   []*keyedRecord // of records that were added, or not yet
}

// keyedRecord is a record as its records by key tell it.
type keyedRecord struct {
	of     Record // as KeyRecord.record
	unique map[uint32]uint64
	values map[uint32][]uint64 // what unique is the sum of, where it is of several
}

// KeyTotal is the sum of one key in one window of a group.
type KeyTotal struct {
	Key     string // empty: the ids without a key
	Unique  uint64 // sum over the records
	Records int    // how many have the key
}

// window returns what was added of one.
func (t *KeyTotals) window(group string, s counter.Span) *keyedWindow {
	if t.byWindow == nil {
		t.names = make(map[string]uint32)
		t.records = make(map[string]*keyedRecord)
		t.byWindow = make(map[windowKey]*keyedWindow)
	}
	at := windowKey{group, s.Start.UnixNano(), s.Window.Milliseconds()}
	w := t.byWindow[at]
	if w == nil {
		w = new(keyedWindow)
		t.byWindow[at] = w
	}
	return w
}

// Add is that of Totals.
func (t *KeyTotals) Add(r Record) {
	if _, again := t.seen[r.Key()]; !again {
		w := t.window(r.Group, r.Span())
		w.records = append(w.records, r)
	}
	t.Totals.Add(r)
}

// AddKey takes one record by key, in any order.
func (t *KeyTotals) AddKey(r KeyRecord) {
	of := r.record()
	w := t.window(of.Group, of.Span())
	in := t.records[of.Key()]
	if in == nil {
		in = &keyedRecord{of: of, unique: make(map[uint32]uint64)}
		t.records[of.Key()] = in
		w.keyed = append(w.keyed, in)
	}
	name, ok := t.names[r.Key]
	if !ok {
		name = uint32(len(t.inOrder))
		t.names[r.Key] = name
		t.inOrder = append(t.inOrder, r.Key)
	}
	first, again := in.unique[name]
	if !again {
		in.unique[name] = r.Unique
		return
	}
	values := in.values[name]
	if values == nil {
		values = []uint64{first}
	}
	same := slices.Contains(values, r.Unique)
	if _, recorded := t.seen[of.Key()]; same && !recorded {
		return // a file that is followed: lines that a kill had left were written again
	}
	t.repeated(r.ID(), r.Scope, values[0], r.Unique, same)
	if !same && r.Scope != ScopeGroup {
		in.unique[name] += r.Unique
		if in.values == nil {
			in.values = make(map[uint32][]uint64)
		}
		in.values[name] = append(values, r.Unique)
	}
}

// Keys returns the sums of a window, the largest first, and at the end that of the ids
// without a key, if there are some. Together they are the sum of the window, unless Flaws
// has something to say. What belongs to no record that was added is left out.
func (t *KeyTotals) Keys(w WindowTotal) []KeyTotal {
	sums := make(map[uint32]*KeyTotal)
	byKey := uint64(0)
	for _, in := range t.window(w.Group, w.Span()).keyed {
		if _, ok := t.seen[in.of.Key()]; !ok {
			continue
		}
		for name, unique := range in.unique {
			s := sums[name]
			if s == nil {
				s = &KeyTotal{Key: t.inOrder[name]}
				sums[name] = s
			}
			s.Unique += unique
			s.Records++
			byKey += unique
		}
	}
	out := make([]KeyTotal, 0, len(sums)+1)
	for _, s := range sums {
		out = append(out, *s)
	}
	slices.SortFunc(out, func(a, b KeyTotal) int {
		return cmp.Or(cmp.Compare(b.Unique, a.Unique), strings.Compare(a.Key, b.Key))
	})
	if w.Unique > byKey {
		out = append(out, KeyTotal{Unique: w.Unique - byKey, Records: w.Records})
	}
	return out
}

// Flaws describes where records by key and their records do not agree, in the order of
// windows.
func (t *KeyTotals) Flaws() (flaws []string) {
	for _, w := range t.Windows() {
		flaws = append(flaws, t.WindowFlaws(w)...)
	}
	for _, key := range slices.Sorted(maps.Keys(t.records)) {
		in := t.records[key]
		if _, ok := t.seen[key]; !ok && t.isPast(&in.of) {
			flaws = append(flaws, fmt.Sprintf("%s has %d records by key and is not there itself, they are not counted", key, len(in.unique)))
		}
	}
	return flaws
}

// isPast reports whether a record's series has a later one: then it is not about to come.
func (t *KeyTotals) isPast(r *Record) bool {
	s := t.series[r.identity()]
	return s != nil && (r.Seq < s.last.Seq || r.WindowStart.Before(s.last.WindowStart))
}

// WindowFlaws is Flaws for the records of one window that were added.
func (t *KeyTotals) WindowFlaws(w WindowTotal) (flaws []string) {
	for _, r := range t.window(w.Group, w.Span()).records {
		sum, there := uint64(0), 0
		if in := t.records[r.Key()]; in != nil {
			there = len(in.unique)
			for _, unique := range in.unique {
				sum += unique
			}
		}
		if uint64(there) != r.Keys {
			flaws = append(flaws, fmt.Sprintf("%s has %d records by key, %d are there", r.Key(), r.Keys, there))
		}
		if sum > r.Unique {
			flaws = append(flaws, fmt.Sprintf("%s has more ids by key than in total (%d and %d)", r.Key(), sum, r.Unique))
		}
	}
	return flaws
}
