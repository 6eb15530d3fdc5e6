package main

import (
	"fmt"
	"math"
	"net/url"
)

// keys are the keys of a run, from 1; 0 is none. What the driver calls an id is then an
// id under a key: the number of the one gives both, so that all else is judged alike.
type keys struct {
	names, escaped []string // as a record has them, and as a query does
	numbers        map[string]int
	seed           uint64
}

const (
	maxKeys = 1_000_000

	// One id in keylessShare has no key, and one in sameIDShare is that of the
	// number before it, under another key.
	keylessShare = 8
	sameIDShare  = 16
)

func newKeys(n int, seed uint64) *keys {
	k := &keys{names: []string{""}, escaped: []string{""}, numbers: map[string]int{}, seed: seed}
	for i := 1; i <= n; i++ {
		name := fmt.Sprint("key-", i)
		if i%5 == 0 {
			name = fmt.Sprintf("clé %d/&=+", i) // takes escaping in a query
		}
		k.names, k.escaped = append(k.names, name), append(k.escaped, url.QueryEscape(name))
		k.numbers[name] = i
	}
	return k
}

// of returns the number of the id's text, and its key.
func (k *keys) of(n uint64) (id uint64, key int) {
	if k == nil {
		return n, 0
	}
	key = k.draw(n)
	if n%sameIDShare != sameIDShare-1 {
		return n, key
	}
	if key == k.draw(n-1) {
		key = (key + 1) % len(k.names)
	}
	return n - 1, key
}

// draw spreads ids over keys as the world does: a key has about half of what the one
// half as far down the list has.
func (k *keys) draw(n uint64) int {
	x := mix(mix(n) ^ k.seed)
	if x%keylessShare == 0 {
		return 0
	}
	share := float64(x>>11) / (1 << 53)
	return min(int(math.Pow(float64(len(k.names)), share)), len(k.names)-1)
}

// judgeKeys compares, for each window, what is published by key with the answers.
// without is what is left of the window's sum: the ids without a key.
func (v *verdict) judgeKeys(t *truth, rows map[int64]*windowVerdict, records published) {
	sums := make(map[int64]map[int]uint64)
	seen := make(map[string]bool, len(records.keys))
	parts := make(map[string]uint64) // how many keys a record has
	for _, r := range records.keys {
		start := r.WindowStart.UnixMilli()
		if rows[start] == nil {
			continue // before the run, or of a window whose record is still to come
		}
		key, known := t.keys.numbers[r.Key]
		if seen[r.ID()] {
			v.Faults.add("visible twice", "there are two records %s", r.ID())
		} else if seen[r.ID()] = true; !known {
			v.Faults.add("key", "%s has a record of the key %q, which no request had", label(start), r.Key)
		}
		parts[r.RecordKey()]++
		if sums[start] == nil {
			sums[start] = make(map[int]uint64)
		}
		sums[start][key] += r.Unique
	}
	for _, r := range records.windows {
		if n := parts[r.Key()]; rows[r.WindowStart.UnixMilli()] != nil && n != r.Keys {
			v.Faults.add("key", "the record %s has %d keys, and there are %d records of keys", r.Key(), r.Keys, n)
		}
	}
	for start, row := range rows {
		if row.Records > 0 && !(row.Inexact && t.lenient) {
			v.judgeWindowKeys(t.keys, row, sums[start])
		}
	}
}

func (v *verdict) judgeWindowKeys(k *keys, row *windowVerdict, sums map[int]uint64) {
	differs := func(format string, args ...any) {
		v.KeyDifferences++
		v.Faults.add("key", row.Start+format, args...)
	}
	answered := row.keys
	without := row.Sum // below zero it is far above the most
	for key, sum := range sums {
		if without -= sum; key > 0 && answered[key] == nil {
			differs(", key %q: %d in the records, and no ok answers", k.names[key], sum)
		}
	}
	for key, n := range answered {
		sum, name := sums[key], k.names[key]
		if key == 0 {
			sum, name = without, "none"
		}
		v.KeyCounts++
		if !n.allows(sum) {
			differs(", key %q: %d in the records, %d ok answers, %d to %d of those in doubt", name, sum, n.Accepted, n.Sure, n.Maybe)
		}
	}
	if answered[0] == nil && without != 0 {
		differs(": %d ids without a key in the records, and no ok answers", int64(without))
	}
}
