package dedup

import (
	"slices"
	"sync/atomic"
	"unsafe"
)

// growAhead adds levels to the tables that will soon need them, so that their memory is
// resident before a request uses it. If a request was faster and added a level itself,
// growAhead makes the pages of that level resident.
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
	asked := t.checking.Swap(false) // cleared first: a request that takes a slot from now on may set it again
	m.grown.Add(uint64(t.prepare(asked, load, sizes, m.arena)))
}

// tables are the tables for one kind of ids. Memory.mu guards all fields except sweep.
type tables[B any] struct {
	open *table[B]   // for the epochs that will be opened
	next *table[B]   // a table of another size, which replaces open at the next turn; nil: none
	old  []*table[B] // replaced tables; each is freed when no epoch uses it

	sweep position // only the cleaner uses it
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

// resize makes tables of the right size for the next epochs, if the present tables are too
// small for the largest of the last epochs, or far too large for all of them.
func (m *Memory) resize() {
	m.mu.Lock()
	var peak load
	for _, l := range m.loads {
		peak.narrow, peak.wide = max(peak.narrow, l.narrow), max(peak.wide, l.wide)
	}
	sure := m.retired >= forecastEpochs // enough epochs were seen to decide about shrinking
	m.mu.Unlock()
	m.narrow.resize(m, peak.narrow, max(m.cfg.Expect, m.cfg.ExpectAny), sure)
	m.wide.resize(m, peak.wide, max(m.cfg.ExpectWide, m.cfg.ExpectAny), sure)
}

// resize makes the next table if another size is better. Whether to shrink depends on how many
// slots the open table has now, whether it was made with them or grew.
func (ts *tables[B]) resize(m *Memory, peak, least uint64, sure bool) {
	m.mu.Lock()
	t, waits := ts.open, ts.next != nil
	m.mu.Unlock()
	want := max(least, peak+peak/4) // a quarter more than the largest load seen
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
		return // no memory for both tables: the open one, with more levels, still works, but is slower
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

// position is where the next step of the sweep begins in a table.
type position struct {
	level, bucket int
	floor         uint64 // this pass clears the words of epochs up to this serial
	clean         uint64 // floor of the last pass that was completed
}

// behind reports whether so many epochs were opened since the last step of the sweep that the
// next step should not wait for the cleanup interval.
func (m *Memory) behind() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.serial-m.swept >= passTurns/4
}

// reclaim sweeps a batch of slots: it empties the slots of epochs that lie staleAge or more
// back, before their tag is used again. While a request is still inside an epoch, the slots of
// that epoch and of all later ones are not swept.
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

// batch returns how many slots of t to sweep after the given number of turns: enough that a
// pass takes about passTurns turns, least or more if there are as many, and one bucket if t has
// no slots yet.
func batch[B any](least int, turns uint64, t *table[B]) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return int(max(slotsPerBucket, min(t.slots, max(uint64(least), (t.slots/passTurns+slotsPerBucket)*turns))))
}

// sweepTable sweeps the next slots of t, and returns how many it emptied. If the table was
// replaced during a pass, the pass goes on in the new table; it also includes levels that were
// added during the pass. Both have only words of later epochs.
func sweepTable[B any](t *table[B], p *position, floor, admitted uint64, slots int) (n int) {
	for ; slots > 0; slots -= slotsPerBucket {
		if p.level == 0 && p.bucket == 0 {
			if floor <= p.clean {
				return n // no words are old enough to be cleared
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

// sweepWords empties the words of a bucket that belong to epochs up to floor, and returns how
// many it emptied. The first word of each slot has the tag of its epoch. That epoch is less
// than half a lap before admitted, or it is a later one that was opened meanwhile. No request
// can be writing a word of an epoch up to floor.
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
