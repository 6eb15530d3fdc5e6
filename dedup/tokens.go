package dedup

import (
	"encoding/binary"
	"math/bits"
	"sync"
	"sync/atomic"
	"unsafe"

	"verve/counter"
)

// tokens are the tokens of one epoch, in a table of their own. Each is a word of 64 bits, a
// keyed hash of the id and its token. The table is made when the first token arrives. It is
// never used for another epoch: during the next epoch it is only searched, and then it is
// released.
type tokens struct {
	sieved atomic.Bool // the sieves contain all tokens of the window before (sieve.go)
	spills atomic.Bool // some tokens are in spilled

	sample atomic.Uint64 // sampled tokens, as View.narrowSample
	table  table[narrowBucket]

	// spilled has the words for which there was room before their ids were added, but no memory
	// after that.
	mu      sync.Mutex // guards spilled
	spilled map[uint64]bool
}

// tokenTag is the tag of all words in a table of tokens: it serves only one epoch.
const tokenTag = 1

// tokenShare is how many slots for each expected token a table has after it has grown: with
// that many, the expected tokens do not crowd it, and no further level is made ready.
const tokenShare = 1.7

// slotsFor returns how many slots are taken with the given number of tokens. The first slot of
// each line is a sieve, and counts as taken.
func slotsFor(tokens uint64) uint64 { return tokens + tokens/(lineSlots-1) }

func (t *tokens) load() uint64 {
	if t == nil {
		return 0
	}
	return t.sample.Load() * sampleEvery
}

// hold and letTokens count how many epochs use t. Memory.mu is held.
func (t *tokens) hold() *tokens {
	if t != nil {
		t.table.refs++
	}
	return t
}

func (m *Memory) letTokens(t *tokens) {
	if t == nil {
		return
	}
	if t.table.refs--; t.table.refs == 0 && t.table.depth > 0 {
		m.narrow.old = append(m.narrow.old, &t.table) // the cleaner frees it
	}
}

// has reports whether x is in t, which may be nil.
func (t *tokens) has(x uint64) bool {
	if t == nil {
		return false
	}
	if t.spills.Load() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.spilled[x] {
			return true
		}
	}
	for i := range t.table.levels {
		l := t.table.levels[i].Load()
		if l == nil {
			break
		}
		b, rest := l.choose(x)
		there, room := findIn(b, rest|tokenTag)
		if there || room {
			return there
		}
		x = l.next(x)
	}
	return false
}

// roomFor makes sure that there is a free slot for x, which is not in t. Another request may
// take that slot before add does.
func (t *tokens) roomFor(m *Memory, x uint64) error {
	for i := range t.table.levels {
		l, err := t.level(m, i)
		if err != nil {
			return err
		}
		b, rest := l.choose(x)
		if _, room := findIn(b, rest|tokenTag); room {
			return nil
		}
		x = l.next(x)
	}
	return ErrFull
}

// roomy reports whether there was room for every token until now. If so, a request need not
// call roomFor: its token goes into the table, or else into spilled.
func (t *tokens) roomy() bool { return t.table.levels[0].Load() != nil && !t.spills.Load() }

// prefetch prefetches the bucket of x in each level that is large enough for it, and both lines
// of the bucket: the search for a token that is not there goes on to the other line if the line
// of its home is full. t may be nil.
func (t *tokens) prefetch(x uint64) {
	if t == nil {
		return
	}
	for i := range t.table.farLevels.Load() {
		l := t.table.levels[i].Load()
		b, _ := l.choose(x)
		prefetchBoth(unsafe.Pointer(b))
		x = l.next(x)
	}
}

// add adds x, which is not in t. It always succeeds.
func (t *tokens) add(m *Memory, x uint64) {
	if t.put(m, x) != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.spilled == nil {
			t.spilled = map[uint64]bool{}
		}
		t.spilled[x] = true
		t.spills.Store(true)
		return
	}
	if sampled(x) {
		t.sample.Add(1)
	}
}

// put puts x into the table, which must not have it. If all levels are full it makes another
// one.
func (t *tokens) put(m *Memory, x uint64) error {
	for i := range t.table.levels {
		l, err := t.level(m, i)
		if err != nil {
			return err
		}
		b, rest := l.choose(x)
		if done, other := putIn(b, rest|tokenTag); done {
			if other {
				crowding(m, &t.table, i)
			}
			return nil
		}
		x = l.next(x)
	}
	return ErrFull
}

// level returns the i-th level of the table, and makes it if the table has only i levels.
func (t *tokens) level(m *Memory, i int) (*level[narrowBucket], error) {
	if l := t.table.levels[i].Load(); l != nil {
		return l, nil
	}
	if err := grow(m, &t.table, i, func() []uint64 { return t.sizes(m) }); err != nil {
		return nil, err
	}
	return t.table.levels[i].Load(), nil
}

// findIn reports whether a word is in a bucket of tokens, and whether the line in which its
// search ends has a free slot. The first word of each line is a sieve, not a slot.
//
// The table serves one epoch, so a slot is empty or taken for good: a word is in the other line
// only if the line of its home is full, and in the next level only if the bucket is full. All
// slots of a line are compared without a branch: in a search from slot to slot the processor
// would have to predict how far it goes, and a wrong prediction takes as long as all
// comparisons (BenchmarkToken).
func findIn(b *narrowBucket, word uint64) (there, room bool) {
	for from := home(word) & lineSlots; ; from ^= lineSlots {
		line := (*[lineSlots]atomic.Uint64)(unsafe.Pointer(wordAt(unsafe.Pointer(b), from)))
		same, free := uint64(0), uint64(0)
		for i := 1; i < lineSlots; i++ {
			w := line[i].Load()
			same |= isZero(w ^ word)
			free |= isZero(w)
		}
		if same|free != 0 || from != home(word)&lineSlots {
			return same != 0, free != 0
		}
	}
}

// putIn puts a word, which is not there yet, into a bucket of tokens, if a slot is free. other
// reports that all slots in the line of its home were taken.
func putIn(b *narrowBucket, word uint64) (done, other bool) {
	for from := home(word) & lineSlots; ; from ^= lineSlots {
		line := (*[lineSlots]atomic.Uint64)(unsafe.Pointer(wordAt(unsafe.Pointer(b), from)))
		for {
			free := uint64(0)
			for i := 1; i < lineSlots; i++ {
				free |= isZero(line[i].Load()) >> (63 - i)
			}
			if free == 0 {
				break
			}
			if line[bits.TrailingZeros64(free)&(lineSlots-1)].CompareAndSwap(0, word) {
				return true, other
			}
		}
		if other {
			return false, true
		}
		other = true
	}
}

// isZero returns 1<<63 if x is 0, and 0 otherwise.
func isZero(x uint64) uint64 { return (x - 1) &^ x & (1 << 63) }

// sizes returns the size, in buckets, of the level that the table needs next. The first level
// has room for as many tokens as the last epochs had. A later level doubles the table, or makes
// room for as many tokens as the epoch will have if it gets the expected ids, but up to eight
// times the present size: memory that no token uses would be zeroed for nothing. The lock of
// the table is held.
func (t *tokens) sizes(m *Memory) []uint64 {
	table := &t.table
	if load := slotsFor(t.load()); table.depth == 0 || !table.outgrown(load) {
		return table.sizes(load)
	}
	n := table.slots / slotsPerBucket
	if v := m.current.Load(); v != nil && v.tokens == t {
		l := v.load()
		share := min(1, float64(l.tokens)/float64(max(1, l.sum())))
		expected := share * float64(max(m.cfg.Expect+m.cfg.ExpectWide, m.cfg.ExpectAny))
		n = max(n, min(less(buckets(slotsFor(uint64(expected)), tokenShare), n), 8*n))
	}
	return []uint64{n}
}

// openTokens gives v, the View of e, its tokens and those of the window before. m.mu is held,
// and m.current is still the View of the epoch before.
func (m *Memory) openTokens(e *counter.Epoch, v *View) {
	v.end = e.End().UnixNano()
	peak, before := uint64(0), m.current.Load()
	if before != nil {
		peak = before.tokens.load() // that epoch is not retired yet, so its load is not in m.loads
	}
	for _, l := range m.loads {
		peak = max(peak, l.tokens)
	}
	v.tokens.table.expect = peak + peak/4
	if before != nil && before.end == e.Start().UnixNano() {
		v.past = before.tokens
	} else if before == nil && m.journal != nil {
		m.takeRecalled(e, v)
	}
	v.tokens.hold()
	v.past.hold()
}

// takeRecalled gives v, the View of the first epoch e, the tokens that the journal has for it,
// and releases the others.
func (m *Memory) takeRecalled(e *counter.Epoch, v *View) {
	tokens, past := m.recalled.tokens, m.recalled.past
	m.recalled.tokens, m.recalled.past = nil, nil
	switch newest := &m.journal.newest; {
	case tokens == nil:
	case e.Serial() == newest.serial:
		v.tokens, v.past = tokens, past
	case e.Start().After(newest.start()) && !e.Start().After(newest.end()): // e may start before that end if the windows became shorter
		v.past = tokens
	}
	if tokens != v.tokens && tokens != v.past {
		m.letTokens(tokens.hold())
	}
	if past != v.past {
		m.letTokens(past.hold())
	}
}

// tokenKeys is how many words of the secret tokenWord uses: two for the key of the id, two for
// its kind and the length of the token, and one for each 8 bytes of the longest token.
const tokenKeys = 12

// tokenWord returns the word of a token that came with the id k. It is never 0.
//
// It is NH (Black, Halevi, Krawczyk, Krovetz, Rogaway, "UMAC", 1999): a secret word is added to
// each word of the text, pairs of the results are multiplied, and the products of 128 bits are
// summed. Two different texts have the same sum with a probability of 2^-64 over all secrets.
// The sums never leave the process. SipHash took three times as long (BenchmarkToken).
func (s *secret) tokenWord(k Key, token []byte) uint64 {
	le, n, keys := binary.LittleEndian, len(token), &s.token
	hi, lo := bits.Mul64(k.hi+keys[0], k.lo+keys[1])
	h, l := bits.Mul64(uint64(n)+keys[2], uint64(k.kind)+keys[3])
	a, b := uint64(0), uint64(0) // the last 16 bytes
	var carry uint64
	switch {
	case n >= 16:
		a, b = le.Uint64(token[n-16:]), le.Uint64(token[n-8:])
		for i := 6; len(token) > 16 && i+1 < len(keys); i += 2 {
			lo, carry = bits.Add64(lo, l, 0)
			hi += h + carry
			h, l = bits.Mul64(le.Uint64(token)+keys[i], le.Uint64(token[8:])+keys[i+1])
			token = token[16:]
		}
	case n >= 8:
		a, b = le.Uint64(token), le.Uint64(token[n-8:])
	default:
		var text [8]byte
		copy(text[:], token)
		a = le.Uint64(text[:])
	}
	lo, carry = bits.Add64(lo, l, 0)
	hi += h + carry
	h, l = bits.Mul64(a+keys[4], b+keys[5])
	lo, carry = bits.Add64(lo, l, 0)
	hi += h + carry
	return max(s.scatter(lo^hi*s.odd[2]), 1)
}
