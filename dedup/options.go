package dedup

import (
	"bytes"
	"encoding/binary"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/dchest/siphash"

	"verve/counter"
)

// Ids with a token, or under a key, take this way. Others never come here.

// tokens are those of one epoch: words of 64 bits, a keyed hash of the id and its token
// each, in a table of their own. It is made when the first one comes and is never used for
// another epoch: it is looked at in the next one and then released.
type tokens struct {
	table  table[narrowBucket]
	sample atomic.Uint64 // as View.narrowSample

	// spilled are words that found no memory although there had been room for them
	// before their ids were added.
	mu      sync.Mutex // guards spilled
	spilled map[uint64]bool
	spills  atomic.Bool // there are some
}

// tokenTag is the tag of all words in such a table.
const tokenTag = 1

// tokenShare is how many slots there are for an expected token where the table has grown:
// with so many no level is made ready before the last one comes.
const tokenShare = 1.7

// attemptLocks is the number of locks that ids with tokens are spread over.
const attemptLocks = 256

// attemptLock makes the attempts to count one id wait for each other, in whatever epochs
// they are.
type attemptLock struct {
	sync.Mutex
	_ [56]byte // locks of their own cache lines
}

func (t *tokens) load() uint64 {
	if t == nil {
		return 0
	}
	return t.sample.Load() * sampleEvery
}

// hold and letTokens count the epochs that use t. Memory.mu is held.
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
		m.oldNarrow = append(m.oldNarrow, &t.table) // freed when the cleaner comes by
	}
}

// newView is the view of an epoch that is to be opened.
func (m *Memory) newView() *View { return &View{tokens: new(tokens), memory: m} }

// has reports whether x is in t, which may be nil.
func (t *tokens) has(x uint64) bool {
	if t == nil {
		return false
	}
	p, _ := t.look(nil, x)
	return p == found
}

// look looks for x. With m it makes sure that there is a slot for it, if it is not there;
// others may take the slot before add does.
func (t *tokens) look(m *Memory, x uint64) (place, error) {
	if t.spills.Load() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.spilled[x] {
			return found, nil
		}
	}
	return t.walk(m, x, true)
}

// roomy reports whether there was room for every token until now. Then there is for those of
// the requests under way: in the table, or in spilled.
func (t *tokens) roomy() bool { return t.table.levels[0].Load() != nil && !t.spills.Load() }

// prefetch is that of the table, and of the other cache line of the bucket in its first
// level: a token that is not there is looked for up to a free slot, in the other line if
// that of its home is full. t may be nil.
func (t *tokens) prefetch(x uint64) {
	if t == nil {
		return
	}
	if levels := t.table.farLevels.Load(); levels > 0 {
		t.table.prefetch(x, levels)
		b, rest := t.table.levels[0].Load().choose(x)
		prefetch(unsafe.Pointer(wordAt(unsafe.Pointer(b), home(rest)^lineSlots)))
	}
}

// add puts x in. It always succeeds.
func (t *tokens) add(m *Memory, x uint64) {
	p, err := t.walk(m, x, false)
	if err != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.spilled == nil {
			t.spilled = map[uint64]bool{}
		}
		t.spilled[x] = true
		t.spills.Store(true)
	}
	if p == taken && sampled(x) {
		t.sample.Add(1)
	}
}

// walk looks for x, or adds it. With m it makes a level where all are full.
func (t *tokens) walk(m *Memory, x uint64, look bool) (place, error) {
	for i := range t.table.levels {
		l := t.table.levels[i].Load()
		if l == nil {
			if m == nil {
				return absent, nil
			}
			if err := grow(m, &t.table, i, func() []uint64 { return t.sizes(m) }); err != nil {
				return full, err
			}
			l = t.table.levels[i].Load()
		}
		b, rest := l.choose(x)
		p, slot := b.add(rest|tokenTag, look)
		if p != full {
			if p == taken && slot >= nearlyFull {
				crowding(m, &t.table, i)
			}
			return p, nil
		}
		x = l.next(x)
	}
	return full, ErrFull
}

// sizes returns the size of the level that the table needs next. A table that had none
// begins with what the last epochs needed. Later ones double it, or make room for as many
// tokens as the epoch will have if it gets the ids that are expected, up to eight times what
// is there: memory that no token uses would have to be zeroed for nothing. The lock of the
// table is held.
func (t *tokens) sizes(m *Memory) []uint64 {
	table := &t.table
	if load := t.load(); table.depth == 0 || !table.outgrown(load) {
		return table.sizes(load)
	}
	n := table.slots / slotsPerBucket
	if v := m.current.Load(); v != nil && v.tokens == t {
		l := v.load()
		share := min(1, float64(l.tokens)/float64(max(1, l.sum())))
		expected := share * float64(max(m.cfg.Expect+m.cfg.ExpectWide, m.cfg.ExpectAny))
		n = max(n, min(less(buckets(uint64(expected), tokenShare), n), 8*n))
	}
	return []uint64{n}
}

// openTokens gives v, the view of e, its tokens and those of the window before. m.mu is
// held, and m.current is still the epoch before.
func (m *Memory) openTokens(e *counter.Epoch, v *View) {
	v.start, v.end = e.Start().UnixNano(), e.End().UnixNano()
	peak := uint64(0)
	for _, l := range m.loads {
		peak = max(peak, l.tokens)
	}
	v.tokens.table.expect = peak + peak/4
	if before := m.current.Load(); before != nil && before.end == v.start {
		v.past = before.tokens
	} else if before == nil && m.journal != nil {
		m.takeRecalled(e, v)
	}
	v.tokens.hold()
	v.past.hold()
}

// takeRecalled gives the first epoch the tokens that the journal has for it.
func (m *Memory) takeRecalled(e *counter.Epoch, v *View) {
	tokens, past := m.recalled.tokens, m.recalled.past
	m.recalled.tokens, m.recalled.past = nil, nil
	switch newest := &m.journal.newest; {
	case tokens == nil:
	case e.Serial() == newest.serial:
		v.tokens, v.past = tokens, past
	case e.Start().After(newest.start()) && !e.Start().After(newest.end()): // earlier where the windows got shorter
		v.past = tokens
	}
	if tokens != v.tokens && tokens != v.past {
		m.letTokens(tokens.hold())
	}
	if past != v.past {
		m.letTokens(past.hold())
	}
}

// tokensAhead is how many items before its own the word of a token is made and its places
// are prefetched: as many as there are misses under way at once.
const tokensAhead = 8

// optionRun is a run of items with options that are judged one after the other.
type optionRun struct {
	e *counter.Epoch
	v *View
	j *journal // nil, as w, where nothing is kept
	w *writer

	words [tokensAhead]uint64 // of the tokens of the next items; 0: it has none

	// The key of the items judged last, which those behind them often share.
	name  []byte
	under *counter.Key // nil: there was none
	new   uint64       // ids under it that are not counted yet
}

// addRun adds the items that have options, up to the first one that has none. n is the
// number of those judged, also after a panic; fresh grows by those that were new. An item
// that turned ends it: so did those behind.
//
// What it does for items together is what no other request can see: the words of tokens are
// made ahead, and the count of a key is added once for the items under it that follow each
// other, before their request leaves the epoch.
func (m *Memory) addRun(r *optionRun, items []Item, verdicts []Verdict, n *int, fresh *uint64) (turned bool, err error) {
	defer r.count() // also what a fault of the journal leaves
	ahead := 0
	for i := range items {
		it := &items[i]
		if it.Options == nil {
			break
		}
		var v Verdict
		var cause error
		if len(it.Options.Token) == 0 {
			v, cause = m.addWith(r, it, 0, *fresh)
		} else {
			for ahead = max(ahead, i); ahead < min(i+tokensAhead, len(items)); ahead++ {
				r.words[ahead%tokensAhead] = m.prepare(r.v, &items[ahead])
			}
			v, cause = m.addAttempt(r, it, r.words[i%tokensAhead], *fresh)
		}
		if cause != nil && err == nil {
			err = cause
		}
		if v == Turned {
			return true, err
		}
		if verdicts[i] = v; v == Unique {
			*fresh++
		}
		*n++
	}
	return false, err
}

// prepare returns the word of the token of an item, 0 if it has none, and prefetches where
// it is looked for.
func (m *Memory) prepare(v *View, it *Item) uint64 {
	if it.Options == nil || len(it.Options.Token) == 0 {
		return 0
	}
	token := m.secret.token(it.Key, it.Options.Token)
	v.past.prefetch(token)
	v.tokens.prefetch(token)
	return token
}

// count adds the new ids to the count of their key.
func (r *optionRun) count() {
	if r.new > 0 {
		r.e.Keys().Count(r.under, r.new)
		r.new = 0
	}
}

// nameHash returns the hash of the key.
func (o *Options) nameHash(s *secret) uint64 {
	if o.name == 0 {
		o.name = s.name(o.Under)
	}
	return o.name
}

// key returns the count of a key of the epoch; nil if there is none in o. The name is in the
// journal before the key is in the epoch: no id is kept under a key whose name is not.
func (m *Memory) key(r *optionRun, o *Options) (*counter.Key, error) {
	name := o.Under
	if len(name) == 0 {
		return nil, nil
	}
	if r.under != nil && bytes.Equal(r.name, name) {
		return r.under, nil
	}
	hash, keys := o.nameHash(&m.secret), r.e.Keys()
	k := keys.Find(hash, name)
	if k == nil && keys.Full() {
		// Another request may have added it meanwhile, as the last one.
		if k = keys.Find(hash, name); k == nil {
			return nil, ErrTooManyKeys
		}
	}
	if k == nil {
		if r.v.tight.Load() && r.v.nothingLeft() {
			return nil, ErrFull // its id would be refused
		}
		if r.j != nil {
			c, err := r.j.reserve(r.w, r.v.serial, nameKind)
			if err != nil {
				return nil, err
			}
			record := nameRecord(hash, name)
			c.put(record[:])
		}
		if k = keys.Add(hash, name); k == nil {
			return nil, ErrTooManyKeys
		}
	}
	r.count()
	r.name, r.under = name, k
	return k, nil
}

// addAttempt adds an id that has a token, whose word is token.
//
// The attempts to count one id wait for each other if they have tokens, and none of them
// is judged in an epoch that was left: so one that comes late finds the token of its retry
// in the open epoch, and a retry in the open epoch that of its first attempt in the one
// before. An attempt without a token waits for nobody: where it adds the id, no token is
// added.
//
// A token is in an epoch only if its id is. So it is looked for there only if the id was
// found: most ids are new.
func (m *Memory) addAttempt(r *optionRun, it *Item, token, fresh uint64) (Verdict, error) {
	v := r.v
	lock := &m.attempts[it.Key.lo%attemptLocks]
	lock.Lock()
	defer lock.Unlock()
	switch {
	case m.current.Load() != v:
		return Turned, nil
	case v.past.has(token):
		return ReplayedBefore, nil
	}
	if !v.tokens.roomy() {
		p, none := v.tokens.look(m, token)
		if p == found {
			return Replayed, nil
		}
		if none != nil {
			return m.known(v, it.Key, none)
		}
	}
	verdict, err := m.addWith(r, it, token, fresh)
	if verdict != Unique && verdict != Turned && v.tokens.has(token) {
		return Replayed, nil
	}
	return verdict, err
}

// addWith adds an id that has options. token is the word of its token, 0 if it has none.
func (m *Memory) addWith(r *optionRun, it *Item, token, fresh uint64) (Verdict, error) {
	v, k := r.v, it.Key
	under, cause := m.key(r, it.Options)
	kind := recordKind(k, under != nil, token != 0)
	var c *cursor
	if cause == nil && r.j != nil {
		c, cause = r.j.reserve(r.w, v.serial, kind)
	}
	if cause != nil {
		return m.known(v, k, cause)
	}
	p, cause := m.insert(r.e, v, k, fresh)
	if cause != nil {
		return m.refused(cause), cause
	}
	if p == taken {
		if token != 0 {
			v.tokens.add(m, token)
		}
		if c != nil {
			c.appendWith(k, kind, under, token)
		}
		if under != nil {
			r.new++
		}
	}
	return verdict(p), nil
}

// known is the verdict on an id that cannot be added, because of cause.
func (m *Memory) known(v *View, k Key, cause error) (Verdict, error) {
	p, cause := m.lookFull(v, int(k.kind), k.hi, k.lo, cause)
	if cause != nil {
		return m.refused(cause), cause
	}
	return verdict(p), nil
}

// token is the word of a token that came with an id. It is never 0.
func (s *secret) token(k Key, token []byte) uint64 {
	var text [17 + 64]byte
	binary.LittleEndian.PutUint64(text[:], k.hi)
	binary.LittleEndian.PutUint64(text[8:], k.lo)
	text[16] = k.kind
	x := s.scatter(siphash.Hash(s.sip0, ^s.sip1, append(text[:17], token...)))
	return max(x, 1)
}

// recordKind is the kind of the record of an id.
func recordKind(k Key, under, token bool) int {
	kind := int(k.kind)
	if kind == pairKind {
		if !token {
			return pairKind
		}
		kind = wideKind
	}
	if under {
		kind |= underKind
	}
	if token {
		kind |= tokenKind
	}
	return kind
}

// appendWith is append of an id with options.
func (c *cursor) appendWith(k Key, kind int, under *counter.Key, token uint64) {
	if kind == pairKind {
		c.append(k)
		return
	}
	var record [4]uint64
	words := record[:0]
	if layouts[kind].wide {
		words = append(words, k.hi)
	}
	words = append(words, k.lo)
	if layouts[kind].under {
		words = append(words, under.Hash())
	}
	if layouts[kind].token {
		words = append(words, token)
	}
	c.put(words)
}

// nameRecord is the record of a key.
func nameRecord(hash uint64, name []byte) (words [2 + nameWords]uint64) {
	words[0], words[1] = hash, uint64(len(name))
	copy(bytesOf(words[2:]), name)
	return words
}

// keyed is what the journal has of an epoch by key.
type keyed struct {
	names map[uint64]string // by their hash
	ids   map[uint64]uint64 // how many
}

func newKeyed() *keyed { return &keyed{map[uint64]string{}, map[uint64]uint64{}} }

// read adds records of a kind with keys.
func (k *keyed) read(s *secret, kind int, words []uint64) error {
	width := int(layouts[kind].words)
	for i := 0; i+width <= len(words); i += width {
		switch kind {
		case nameKind:
			if err := k.readName(s, words[i:i+width]); err != nil {
				return err
			}
		case pairKind:
			name, _ := s.gather128(words[i], words[i+1])
			k.ids[name]++
		default:
			k.ids[words[i+2]]++
		}
	}
	return nil
}

// readName adds the record of a key.
func (k *keyed) readName(s *secret, record []uint64) error {
	hash, n := record[0], record[1]
	if n == 0 || n > counter.MaxKeyLen {
		return damaged("the name of a key has %d bytes", n)
	}
	name := bytesOf(record[2:])[:n]
	if s.name(name) != hash {
		return damaged("the name of a key does not have its hash")
	}
	k.names[hash] = string(name)
	return nil
}

// counts returns the ids under each key less those that are published. It is not
// ok if a name is missing.
func (k *keyed) counts(published map[string]uint64) (counts []counter.KeyCount, sum uint64, ok bool) {
	for hash, n := range k.ids {
		name, named := k.names[hash]
		if !named {
			return nil, 0, false
		}
		if n = less(n, published[name]); n > 0 {
			counts = append(counts, counter.KeyCount{Key: name, Unique: n})
			sum += n
		}
	}
	return counts, sum, true
}

// resume puts the keys of the epoch that goes on into e: they count as used there.
func (k *keyed) resume(e *counter.Epoch) {
	if k == nil {
		return
	}
	for hash, name := range k.names {
		e.Keys().Add(hash, []byte(name))
	}
}
