package dedup

import (
	"sync/atomic"
	"unsafe"
)

// growAhead adds levels to a table that will soon need them, so that their memory is resident
// before a request uses it. If requests were faster, it makes those resident that they added.
func (m *Memory) growAhead() {
	v := m.current.Load()
	if v == nil {
		return
	}
	l := v.load()
	growTable(m, v.narrow, l.narrow, func() []uint64 { return v.narrow.sizes(l.narrow) })
	growTable(m, v.wide, l.wide, func() []uint64 { return v.wide.sizes(l.wide) })
	growTable(m, &v.tokens.table, slotsFor(l.tokens), func() []uint64 { return v.tokens.sizes(m) })
}

func growTable[B any](m *Memory, t *table[B], load uint64, sizes func() []uint64) {
	asked := t.checking.Swap(false) // before the look: who takes a slot after it asks again
	m.grown.Add(uint64(t.prepare(asked, load, sizes, m.arena)))
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

	if t := resized(m, narrow, peak.narrow, max(m.cfg.Expect, m.cfg.ExpectAny), sure); t != nil {
		m.mu.Lock()
		m.nextNarrow = t
		m.mu.Unlock()
	}
	if t := resized(m, wide, peak.wide, max(m.cfg.ExpectWide, m.cfg.ExpectAny), sure); t != nil {
		m.mu.Lock()
		m.nextWide = t
		m.mu.Unlock()
	}
}

// resized returns a table to replace t, or nil if t serves. What decides about
// shrinking is the room that t takes, whether it was made or grown so large.
func resized[B any](m *Memory, t *table[B], peak, least uint64, sure bool) *table[B] {
	if t == nil {
		return nil
	}
	want := max(least, peak+peak/4) // a quarter more than the largest seen
	t.mu.Lock()
	slots := t.slots
	t.mu.Unlock()
	first, second := firstLevels(want)
	switch {
	case peak > max(t.expect, minBuckets*slotsPerBucket/4*3):
	case sure && (first+second)*slotsPerBucket < slots/3:
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

// sweeper is the place of the next step in the tables. Run alone uses it.
type sweeper struct{ narrow, wide position }

type position struct {
	level, bucket int
	floor         uint64 // of the pass: words of epochs up to it are cleared
	clean         uint64 // floor of the last pass that was finished
}

// behind reports whether so many epochs turned since the last step that the
// next should not wait for its interval.
func (m *Memory) behind() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.serial-m.swept >= passTurns/4
}

// reclaim sweeps a batch of slots: it empties those whose epoch lies so far
// back that its tag would come round, and that no request is left in. A request
// still inside keeps its epoch and all later ones from being swept.
func (m *Memory) reclaim() {
	m.mu.Lock()
	narrow, wide := m.narrow, m.wide
	serial, admitted, turns := m.serial, m.admitted, m.serial-m.swept
	m.swept = serial
	m.settle()
	floor := less(serial, staleAge)
	if len(m.busy) > 0 {
		floor = min(floor, m.busy[0].Serial()-1)
	}
	m.mu.Unlock()

	n := sweepTable(narrow, &m.sweep.narrow, floor, batch(m.cfg.CleanupBatch, turns, narrow), func(b *narrowBucket, floor uint64) int {
		return sweepWords(b[:], 1, admitted, floor)
	})
	n += sweepTable(wide, &m.sweep.wide, floor, batch(m.cfg.CleanupBatch, turns, wide), func(b *wideBucket, floor uint64) int {
		return sweepWords(unsafe.Slice(&b[0][0], 2*slotsPerBucket), 2, admitted, floor)
	})
	m.reclaimed.Add(uint64(n))

	m.mu.Lock()
	m.clean = max(m.clean, min(m.sweep.narrow.clean, m.sweep.wide.clean))
	m.mu.Unlock()
}

// batch returns how many slots of t to sweep: at least so many that a pass
// takes passTurns, and one bucket of a table that has none yet.
func batch[B any](least int, turns uint64, t *table[B]) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return int(max(slotsPerBucket, min(t.slots, max(uint64(least), (t.slots/passTurns+slotsPerBucket)*turns))))
}

// sweepTable sweeps the next slots of t. A pass that began in a table, or with
// a level, that was replaced or added since goes on in the new one: that has
// words of later epochs only.
func sweepTable[B any](t *table[B], p *position, floor uint64, slots int, sweep func(b *B, floor uint64) int) (n int) {
	for ; slots > 0; slots -= slotsPerBucket {
		if p.level == 0 && p.bucket == 0 {
			if floor <= p.clean {
				return n // nothing to clear
			}
			p.floor = floor
		}
		l := t.levels[p.level].Load()
		if l != nil && p.bucket < len(l.buckets) {
			n += sweep(&l.buckets[p.bucket], p.floor)
			p.bucket++
		}
		if l == nil || p.bucket >= len(l.buckets) {
			p.level, p.bucket = p.level+1, 0
		}
		if p.level == maxLevels || t.levels[p.level].Load() == nil {
			p.level, p.bucket, p.clean = 0, 0, p.floor
		}
	}
	return n
}

// sweepWords empties the words of epochs up to floor and says how many: of all words, or
// of every second one, which are those with a tag. These are of epochs less than half a lap
// before admitted, or of later ones that were opened meanwhile. Nobody can be writing a word
// of an epoch up to floor.
func sweepWords(words []atomic.Uint64, step int, admitted, floor uint64) (n int) {
	now := tagOf(admitted)
	for i := 0; i < len(words); i += step {
		w := words[i].Load()
		t := w & tagMask &^ pending
		if t == 0 || newer(t, now) || admitted-age(t, now) > floor {
			continue
		}
		if words[i].CompareAndSwap(w, 0) {
			n++
		}
	}
	return n
}
