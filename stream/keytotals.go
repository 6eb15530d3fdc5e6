package stream

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unique"
)

// keyedRecord is what the records by key of a record contain.
type keyedRecord struct {
	of     Record                             // as KeyRecord.record
	sums   map[unique.Handle[string]]uint64   // by key; each text of a key is in memory once
	values map[unique.Handle[string]][]uint64 // the values that a sum is of, if there are several
}

// KeyTotal is the sum of one key in one window of a group.
type KeyTotal struct {
	Key     string // empty: the ids without a key
	Unique  uint64 // sum over the records
	Records int    // how many have the key
}

// AddKey adds one record by key. They may come in any order, also before their record.
func (t *Totals) AddKey(r KeyRecord) {
	of := r.record()
	w := t.window(of.Group, of.Span())
	in := t.keyed[of.Key()]
	if in == nil {
		in = &keyedRecord{of: of, sums: make(map[unique.Handle[string]]uint64), values: make(map[unique.Handle[string]][]uint64)}
		t.keyed[of.Key()] = in
		w.keyed = append(w.keyed, in)
	}
	key := unique.Make(r.Key)
	first, again := in.sums[key]
	if !again {
		in.sums[key] = r.Unique
		return
	}
	values := in.values[key]
	if values == nil {
		values = []uint64{first}
	}
	same := slices.Contains(values, r.Unique)
	if _, recorded := t.seen[of.Key()]; same && !recorded {
		return // in a file that is followed, lines that a kill had left were written again
	}
	t.repeated(r.ID(), r.Scope, values[0], r.Unique, same)
	if !same && r.Scope != ScopeGroup {
		in.sums[key] += r.Unique
		in.values[key] = append(values, r.Unique)
	}
}

// Keys returns the sums of a window, the largest first, and at the end that of the ids
// without a key, if there are some. Together they are the sum of the window, unless Flaws
// names a difference. Records by key without a record that was added are left out.
func (t *Totals) Keys(w WindowTotal) []KeyTotal {
	sums := make(map[unique.Handle[string]]*KeyTotal)
	byKey := uint64(0)
	for _, in := range t.window(w.Group, w.Span()).keyed {
		if _, ok := t.seen[in.of.Key()]; !ok {
			continue
		}
		for key, n := range in.sums {
			s := sums[key]
			if s == nil {
				s = &KeyTotal{Key: key.Value()}
				sums[key] = s
			}
			s.Unique += n
			s.Records++
			byKey += n
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
func (t *Totals) Flaws() (flaws []string) {
	for _, w := range t.Windows() {
		flaws = append(flaws, t.WindowFlaws(w)...)
	}
	for _, key := range slices.Sorted(maps.Keys(t.keyed)) {
		in := t.keyed[key]
		if _, ok := t.seen[key]; !ok && t.isPast(&in.of) {
			flaws = append(flaws, fmt.Sprintf("%s has %d records by key and is not there itself, they are not counted", key, len(in.sums)))
		}
	}
	return flaws
}

// isPast reports whether the series of r has a later record: then r itself will not come.
func (t *Totals) isPast(r *Record) bool {
	s := t.series[r.identity()]
	return s != nil && (r.Seq < s.last.Seq || r.WindowStart.Before(s.last.WindowStart))
}

// WindowFlaws is Flaws for the records of one window that were added.
func (t *Totals) WindowFlaws(w WindowTotal) (flaws []string) {
	for _, r := range t.window(w.Group, w.Span()).records {
		sum, there := uint64(0), 0
		if in := t.keyed[r.Key()]; in != nil {
			there = len(in.sums)
			for _, n := range in.sums {
				sum += n
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
