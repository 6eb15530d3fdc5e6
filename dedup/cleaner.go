package dedup

import (
	"slices"
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
	asked := t.checking.Swap(false) // first: a request that takes a slot from now on sets it again
	m.grown.Add(uint64(t.prepare(asked, load, sizes, m.arena)))
}

// tables are those of one kind of ids. Memory.mu guards them, but for sweep.
type tables[B any] struct {
	open *table[B]   // of the epochs to be opened
	next *table[B]   // of another size: it takes over at the next turn; nil: there is none
	old  []*table[B] // replaced; freed when no epoch uses them

	sweep position // of the cleaner, which alone uses it
}

// acquire returns the table for an epoch that is being opened. m.mu is held.
func (ts *tables[B]) acquire() *table[B] {
	if ts.next != nil {
		ts.old = append(ts.old, ts.open)
		ts.open, ts.next = ts.next, nil
	}
	ts.open.refs++
	return ts.open
}

// resize makes tables of the right size for the next epochs, if those of the
// present are too small for the largest of the last epochs or far too large for
// all of them.
func (m *Memory) resize() {
	m.mu.Lock()
	var peak load
	for _, l := range m.loads {
		peak.narrow, peak.wide = max(peak.narrow, l.narrow), max(peak.wide, l.wide)
	}
	sure := m.retired >= forecastEpochs // enough seen to shrink
	m.mu.Unlock()
	m.narrow.resize(m, peak.narrow, max(m.cfg.Expect, m.cfg.ExpectAny), sure)
	m.wide.resize(m, peak.wide, max(m.cfg.ExpectWide, m.cfg.ExpectAny), sure)
}

// resize makes the table that takes over, if one of another size is better. What decides
// about shrinking is the room that the open one takes, whether it was made or grown so large.
func (ts *tables[B]) resize(m *Memory, peak, least uint64, sure bool) {
	m.mu.Lock()
	t, waits := ts.open, ts.next != nil
	m.mu.Unlock()
	want := max(least, peak+peak/4) // a quarter more than the largest seen
	t.mu.Lock()
	slots := t.slots
	t.mu.Unlock()
	first, second := firstLevels(want)
	grow := peak > max(t.expect, minBuckets*slotsPerBucket/4*3)
	shrink := sure && (first+second)*slotsPerBucket < slots/3
	if waits || !grow && !shrink {
		return
	}
	next, err := newTable[B](want, m.arena)
	if err != nil {
		return // no memory for both: the chain of levels serves, only slower
	}
	m.resized.Add(1)
	m.mu.Lock()
	ts.next = next
	m.mu.Unlock()
}

// release frees replaced tables that no epoch uses any more.
func (m *Memory) release() {
	m.mu.Lock()
	narrow, wide := m.narrow.unused(), m.wide.unused()
	m.mu.Unlock()
	freeAll(narrow, m.arena)
	freeAll(wide, m.arena)
}

// unused removes the old tables that no epoch uses, and returns them.
func (ts *tables[B]) unused() (free []*table[B]) {
	ts.old = slices.DeleteFunc(ts.old, func(t *table[B]) bool {
		if t.refs == 0 {
			free = append(free, t)
		}
		return t.refs == 0
	})
	return free
}

func freeAll[B any](tables []*table[B], to *arena) {
	for _, t := range tables {
		t.free(to)
	}
}

// close frees the tables that no epoch uses. m.mu is held.
func (ts *tables[B]) close(to *arena) {
	ts.old = append(ts.old, ts.open)
	if ts.next != nil {
		ts.old = append(ts.old, ts.next)
	}
	freeAll(ts.unused(), to)
	*ts = tables[B]{open: new(table[B])}
}

// position is that of the next step of the sweep in a table.
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
	narrow, wide := m.narrow.open, m.wide.open
	serial, admitted, turns := m.serial, m.admitted, m.serial-m.swept
	m.swept = serial
	m.dropIdle()
	floor := less(serial, staleAge)
	if len(m.busy) > 0 {
		floor = min(floor, m.busy[0].Serial()-1)
	}
	m.mu.Unlock()

	n := sweepTable(narrow, &m.narrow.sweep, floor, admitted, batch(m.cfg.CleanupBatch, turns, narrow))
	n += sweepTable(wide, &m.wide.sweep, floor, admitted, batch(m.cfg.CleanupBatch, turns, wide))
	m.reclaimed.Add(uint64(n))

	m.mu.Lock()
	m.clean = max(m.clean, min(m.narrow.sweep.clean, m.wide.sweep.clean))
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
func sweepTable[B any](t *table[B], p *position, floor, admitted uint64, slots int) (n int) {
	for ; slots > 0; slots -= slotsPerBucket {
		if p.level == 0 && p.bucket == 0 {
			if floor <= p.clean {
				return n // nothing to clear
			}
			p.floor = floor
		}
		l := t.levels[p.level].Load()
		if l != nil && p.bucket < len(l.buckets) {
			b := &l.buckets[p.bucket]
			n += sweepWords(unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(b)), unsafe.Sizeof(*b)/8), admitted, p.floor)
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

// sweepWords empties the words of a bucket that are of epochs up to floor, and returns how many
// it emptied. The first word of each slot has the tag: that of an epoch less than half a lap
// before admitted, or of a later one that was opened meanwhile. No request can be writing a word of
// an epoch up to floor.
func sweepWords(words []atomic.Uint64, admitted, floor uint64) (n int) {
	now := tagOf(admitted)
	for i := 0; i < len(words); i += len(words) / slotsPerBucket {
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
