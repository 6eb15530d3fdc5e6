package dedup

import (
	"math/bits"
	"sync/atomic"
	"unsafe"

	"verve/counter"
)

// A token that comes in a window may be one of the window before, and hardly ever is. To find
// that out in the table of that window takes a cache miss, and a miss of the translation buffer,
// which is most of what a token costs. So the first word of each cache line of a table of tokens
// is a sieve (Bloom, 1970) of those tokens of the window before that would have this line: a
// token that is not in the sieve was not in that window. Its line is read anyway.
//
// The cleaner fills the sieves behind the turn, when no token can be added to the window before
// any more. Until then, and for one token in thirty, the table of that window is looked at.

// sieveMost bounds the tokens of that window for each line: with more, one in six of the other
// tokens passes the sieve.
const sieveMost = 16

// sieveBits is the mask of a word in the sieve of its line. Its highest bit chooses the line.
func sieveBits(word uint64) uint64 { return 1<<(word>>57&63) | 1<<(word>>51&63) }

// sieveOf is the sieve for x in l, the first level of a table.
func sieveOf(l *level[narrowBucket], x uint64) (sieve *atomic.Uint64, mask uint64) {
	b, rest := l.choose(x)
	return wordAt(unsafe.Pointer(b), home(rest)&lineSlots), sieveBits(rest)
}

// mayBePast reports whether x may be a token of the window before that of t.
func (t *tokens) mayBePast(x uint64) bool {
	if !t.sieved.Load() {
		return true
	}
	sieve, mask := sieveOf(t.table.levels[0].Load(), x)
	return sieve.Load()&mask == mask
}

// sift fills the sieves of the open epoch, once: when its table is there. Run alone calls it.
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

// pastSettled returns when no attempt can add to the tokens of the window before v: it holds
// the lock of its id from looking which epoch is open until it has added its token.
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
// gives up if they are not all in the table, if they are too many, if most are not in the first
// level, and if the epoch turns. The order of the first level is that of the lines of t: a token
// of another one takes a cache miss.
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
				m.growAhead() // no table waits for this
				if m.current.Load() != v {
					return false
				}
			}
			pace.Step()
			// Plain loads and stores: no request writes here any more, and none looks at a sieve
			// before all are filled. With an atomic store each waits for those before it.
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

// origin returns the x that the search for a word in a bucket of the i-th level began with. A
// level has minBuckets or more, so the word and the number of the bucket give it back although
// the lowest bits of the word are a tag.
func (t *table[B]) origin(i int, bucket, word uint64) uint64 {
	x, rest := bits.Div64(bucket, word&^tagMask, uint64(len(t.levels[i].Load().buckets)))
	if rest > 0 {
		x++
	}
	for i--; i >= 0; i-- {
		odd := t.levels[i].Load().odd
		inverse := odd // of three bits; each step doubles them
		for range 5 {
			inverse *= 2 - odd*inverse
		}
		x = bits.RotateLeft64(x*inverse, 32)
	}
	return x
}
