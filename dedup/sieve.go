package dedup

import (
	"math/bits"
	"sync/atomic"
	"unsafe"

	"verve/counter"
)

// A token that arrives in a window may have been in the window before, but hardly ever was. To
// look it up in the table of that window takes a cache miss and a miss of the translation
// buffer, which together are most of what a token costs. So the first word of each cache line
// of a table of tokens is a sieve (a Bloom filter; Bloom, 1970). It contains those tokens of
// the window before whose place in this table would be in this line. A token that is not in the
// sieve was not in the window before. The sieve costs no further miss, because the line is read
// anyway.
//
// The cleaner fills the sieves after the turn, when no token can be added to the window before
// any more. Until then, and for one token in thirty that the sieve lets pass, the table of the
// window before is searched.

// sieveMost bounds how many tokens of the window before there may be for each line: with more,
// a sieve would let one in six of all other tokens pass.
const sieveMost = 16

// sieveBits returns the bits that a word sets in the sieve of its line. They do not depend on
// the highest bit of the word, which chooses the line.
func sieveBits(word uint64) uint64 { return 1<<(word>>57&63) | 1<<(word>>51&63) }

// sieveOf returns the sieve for x in l, the first level of a table, and the bits of x in it.
func sieveOf(l *level[narrowBucket], x uint64) (sieve *atomic.Uint64, mask uint64) {
	b, rest := l.choose(x)
	return wordAt(unsafe.Pointer(b), home(rest)&lineSlots), sieveBits(rest)
}

// mayBePast reports whether x may be a token of the window before that of t. It returns true if
// the sieves are not filled yet.
func (t *tokens) mayBePast(x uint64) bool {
	if !t.sieved.Load() {
		return true
	}
	sieve, mask := sieveOf(t.table.levels[0].Load(), x)
	return sieve.Load()&mask == mask
}

// sift fills the sieves of the open epoch, once, when the table of its tokens exists. Only Run
// calls it.
func (m *Memory) sift() {
	m.mu.Lock()
	v := m.current.Load()
	if v == nil || v.past == nil || v.serial == m.sifted || v.tokens.table.levels[0].Load() == nil {
		m.mu.Unlock()
		return
	}
	m.sifted = v.serial
	t, past := v.tokens.hold(), v.past.hold()
	m.mu.Unlock()
	if m.pastSettled(v) && m.fillSieves(v, t, past) {
		t.sieved.Store(true)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.letTokens(t)
	m.letTokens(past)
}

// pastSettled returns true when no attempt can add to the tokens of the window before v any
// more, or false if the epoch has turned. It takes each lock once: an attempt holds the lock of
// its id from the moment when it checks which epoch is open until it has added its token.
func (m *Memory) pastSettled(v *View) bool {
	for i := range m.attempts {
		lock := &m.attempts[i]
		lock.Lock()
		turned := m.current.Load() != v
		lock.Unlock()
		if turned {
			return false
		}
	}
	return true
}

// fillSieves adds the tokens of past, to which none is added any more, to the sieves of t. It
// gives up and returns false if some of them are not in the table, if there are too many, if
// the other levels of their table are larger than the first, or if the epoch turns. The tokens
// in the first level come in the order of the lines of t; for each token of another level a
// line of t has to be loaded, which is a cache miss.
func (m *Memory) fillSieves(v *View, t, past *tokens) bool {
	const part = minBuckets
	first := t.table.levels[0].Load()
	if past.spills.Load() || past.load() > 2*sieveMost*uint64(len(first.buckets)) {
		return false
	}
	past.table.mu.Lock()
	slots := past.table.slots
	past.table.mu.Unlock()
	if before := past.table.levels[0].Load(); before != nil && slots > 2*slotsPerBucket*uint64(len(before.buckets)) {
		return false
	}
	var pace counter.Pace
	for i := range past.table.levels {
		l := past.table.levels[i].Load()
		if l == nil {
			break
		}
		for n := range l.buckets {
			if n%part == part-1 {
				m.growAhead() // the tables must not wait until all sieves are filled
				if m.current.Load() != v {
					return false
				}
			}
			pace.Step()
			// Plain loads and stores are enough: no request writes past any more, and none
			// reads a sieve before all are filled. An atomic store would wait for all stores
			// before it.
			for at, word := range (*[slotsPerBucket]uint64)(unsafe.Pointer(&l.buckets[n])) {
				if at%lineSlots == 0 || word == 0 {
					continue
				}
				sieve, mask := sieveOf(first, past.table.origin(i, uint64(n), word))
				*(*uint64)(unsafe.Pointer(sieve)) |= mask
			}
		}
	}
	return true
}

// origin returns the x with which the search began that put word into this bucket of the i-th
// level. A level has minBuckets or more, so x can be computed from the word and the number of
// the bucket although the lowest bits of the word are a tag.
func (t *table[B]) origin(i int, bucket, word uint64) uint64 {
	x, rest := bits.Div64(bucket, word&^tagMask, uint64(len(t.levels[i].Load().buckets)))
	if rest > 0 {
		x++
	}
	for i--; i >= 0; i-- {
		odd := t.levels[i].Load().odd
		inverse := odd // correct in three bits; each step doubles their number
		for range 5 {
			inverse *= 2 - odd*inverse
		}
		x = bits.RotateLeft64(x*inverse, 32)
	}
	return x
}
