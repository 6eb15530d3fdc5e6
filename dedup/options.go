package dedup

import (
	"bytes"

	"verve/counter"
)

// Ids with a token, or under a key, take this way. Others never come here.

// attemptLocks is the number of locks that ids with tokens are spread over. Each makes the
// attempts to count one id wait for each other, in whatever epochs they are. They fill 32 cache
// lines: with a line for each, the line of a lock had mostly left the core's cache before the
// lock was needed again.
const attemptLocks = 256

// newView is the view of an epoch that is to be opened.
func (m *Memory) newView() *View { return &View{tokens: new(tokens), memory: m} }

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
// Two things are done for several items together, as no other request can see that: the words
// of tokens are made ahead, and the new ids under one key, of items that follow each other, are
// added to its count at once, before their request leaves the epoch.
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
	token := m.secret.tokenWord(it.Key, it.Options.Token)
	if !v.tokens.sieved.Load() {
		v.past.prefetch(token)
	}
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

// addAttempt adds an id that has a token. token is the word of that.
//
// Attempts with tokens to count one id wait for each other, and none is judged in an epoch
// that was left. So a late attempt finds the token of its retry in the open epoch, and a retry
// in the open epoch finds that of its first attempt in the epoch before. An attempt without a
// token does not wait: if it adds the id, no token is added.
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
	case v.tokens.mayBePast(token) && v.past.has(token):
		return ReplayedBefore, nil
	}
	if !v.tokens.roomy() {
		if v.tokens.has(token) {
			return Replayed, nil
		}
		if none := v.tokens.roomFor(m, token); none != nil {
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
	p, cause := m.lookFull(v, k, cause)
	if cause != nil {
		return m.refused(cause), cause
	}
	return verdict(p), nil
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
func (k *keyed) counts(published map[string]uint64) (counts counter.KeyCounts, sum uint64, ok bool) {
	for hash, n := range k.ids {
		name, named := k.names[hash]
		if !named {
			return counter.KeyCounts{}, 0, false
		}
		if n = less(n, published[name]); n > 0 {
			counts.Add([]byte(name), n)
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
