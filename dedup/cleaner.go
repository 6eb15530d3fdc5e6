package dedup

import (
	"sync/atomic"
)

// growAhead adds a level to a table that will soon need one, so that the
// memory is resident before a request stands in front of a full bucket.
func (m *Memory) growAhead() {
	m.mu.Lock()
	v := m.current
	m.mu.Unlock()
	if v == nil {
		return
	}
	l := v.load()
	growTable(m, v.narrow, l.narrow)
	growTable(m, v.wide, l.wide)
}

func growTable[B any](m *Memory, t *table[B], load uint64) {
	t.checking.Store(false)
	if depth, yes := t.crowded(load); yes {
		// An error means that memory has run out: the ids that find no room
		// are refused and counted, each with its own error.
		_ = grow(m, t, depth, load)
	}
}

// resize makes a table of the right size for the next epochs, if that of the
// present is too small for the largest of the last epochs or far too large for
// all of them.
func (m *Memory) resize() {
	m.mu.Lock()
	var peak load
	for _, l := range m.loads {
		peak.narrow, peak.wide = max(peak.narrow, l.narrow), max(peak.wide, l.wide)
	}
	sure := m.retired >= forecastEpochs // enough seen to shrink
	narrow, wide := m.narrow, m.wide
	if m.nextNarrow != nil {
		narrow = nil // waits for a turn
	}
	if m.nextWide != nil {
		wide = nil
	}
	m.mu.Unlock()

	if t := resized(m, narrow, peak.narrow, m.cfg.Expect, sure); t != nil {
		m.mu.Lock()
		m.nextNarrow = t
		m.mu.Unlock()
	}
	if t := resized(m, wide, peak.wide, m.cfg.ExpectWide, sure); t != nil {
		m.mu.Lock()
		m.nextWide = t
		m.mu.Unlock()
	}
}

// resized returns a table to replace t, or nil if t serves.
func resized[B any](m *Memory, t *table[B], peak, least uint64, sure bool) *table[B] {
	if t == nil {
		return nil
	}
	want := max(least, peak+peak/4) // a quarter more than the largest seen
	have := max(t.expect, minBuckets*slotsPerBucket/4*3)
	switch {
	case peak > have:
	case sure && want < have/4 && t.expect > least:
	default:
		return nil
	}
	next, err := newTable[B](want, m.arena)
	if err != nil {
		return nil // no memory for both: the chain of levels serves, only slower
	}
	m.resized.Add(1)
	return next
}

// release frees replaced tables that no epoch uses any more.
func (m *Memory) release() {
	m.mu.Lock()
	var narrow []*table[narrowBucket]
	var wide []*table[wideBucket]
	m.oldNarrow, narrow = unused(m.oldNarrow)
	m.oldWide, wide = unused(m.oldWide)
	m.mu.Unlock()
	for _, t := range narrow {
		t.free(m.arena)
	}
	for _, t := range wide {
		t.free(m.arena)
	}
}

func unused[B any](tables []*table[B]) (used, free []*table[B]) {
	for _, t := range tables {
		if t.refs == 0 {
			free = append(free, t)
		} else {
			used = append(used, t)
		}
	}
	return used, free
}

// sweeper is the place of the next step in the tables.
type sweeper struct {
	narrow, wide position
	serial       uint64 // of the open epoch at the last step
}

type position struct{ level, bucket int }

// reclaim sweeps a batch of slots: it empties those whose epoch lies so far
// back that its tag would come round. One pass over a table takes less than
// staleAge epochs, however short they are, so no tag is ever taken for that of
// a later epoch.
func (m *Memory) reclaim() {
	m.mu.Lock()
	narrow, wide, serial := m.narrow, m.wide, m.serial
	m.mu.Unlock()
	turns := serial - m.sweep.serial
	m.sweep.serial = serial
	now := tagOf(serial)
	n := sweepTable(narrow, &m.sweep.narrow, batch(m.cfg.CleanupBatch, turns, narrow), func(b *narrowBucket) int {
		return sweepWords(b[:], now)
	})
	n += sweepTable(wide, &m.sweep.wide, batch(m.cfg.CleanupBatch, turns, wide), func(b *wideBucket) int {
		return sweepWords(b.first[:], now)
	})
	m.reclaimed.Add(uint64(n))
}

// batch returns how many slots of t to sweep: at least so many that a pass
// takes half of staleAge epochs.
func batch[B any](least int, turns uint64, t *table[B]) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return int(min(t.slots, max(uint64(least), t.slots/(staleAge/2)*turns)))
}

func sweepTable[B any](t *table[B], p *position, slots int, sweep func(*B) int) (n int) {
	for ; slots > 0; slots -= slotsPerBucket {
		var l *level[B]
		if p.level < maxLevels {
			l = t.levels[p.level].Load()
		}
		if l == nil {
			*p = position{}
			l = t.levels[0].Load()
		}
		if p.bucket >= len(l.buckets) { // the table was replaced by a smaller one
			*p = position{level: p.level + 1}
			continue
		}
		n += sweep(&l.buckets[p.bucket])
		if p.bucket++; p.bucket == len(l.buckets) {
			*p = position{level: p.level + 1}
		}
	}
	return n
}

// sweepWords empties the words of epochs that are stale at the epoch of tag
// now, and says how many. A word being written is not of a stale epoch.
func sweepWords(words []atomic.Uint64, now uint64) (n int) {
	for i := range words {
		w := words[i].Load()
		t := w & tagMask &^ pending
		if t == 0 || w&pending != 0 || newer(t, now) || age(t, now) < staleAge {
			continue
		}
		if words[i].CompareAndSwap(w, 0) {
			n++
		}
	}
	return n
}
