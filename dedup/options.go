package dedup

import (
	"bytes"

	"verve/counter"
)

// This file adds ids that have Options: a token, or a key they are counted under.

// attemptLocks is the number of locks that ids with tokens are spread over. With them the
// attempts to count one id wait for each other, even if they are in different epochs. The locks
// fill 32 cache lines: with a line for each lock, the line had mostly left the core's cache
// before the lock was needed again.
const attemptLocks = 256

// newView makes the View of an epoch that will be opened.
func (m *Memory) newView() *View { return &View{tokens: new(tokens), memory: m} }

// tokensAhead is how many items ahead the words of tokens are made and their places prefetched:
// about as many cache misses as a core has under way at once.
const tokensAhead = 8

// optionRun is a sequence of items with options that are judged one after the other.
type optionRun struct {
	e *counter.Epoch
	v *View
	j *journal // nil, as w, where nothing is kept
	w *writer

	words [tokensAhead]uint64 // words of the tokens of the next items; 0: the item has none

	// The key of the items judged last: the next items often have the same one.
	name  []byte
	under *counter.Key // nil: no item had a key yet
	new   uint64       // new ids under that key that are not counted yet
}

// addRun adds the items that have options, up to the first one that has none. It adds the
// number of judged items to n, even if it panics, and the number of new ids to fresh. It stops
// at an item that is Turned and returns true: the items after it are Turned, too.
//
// It does two things for several items together, which no other request can notice. The words
// of tokens are made some items ahead. And new ids under one key, if their items follow each
// other, are added to the count of that key together, before their request leaves the epoch.
func (m *Memory) addRun(r *optionRun, items []Item, verdicts []Verdict, n *int, fresh *uint64) (turned bool, err error) {
	defer r.count() // also after a fault of the journal
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

// prepare returns the word of the token of an item, 0 if it has none, and prefetches the places
// where the word will be looked up.
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

// count adds the new ids that are not counted yet to the count of their key.
func (r *optionRun) count() {
	if r.new > 0 {
		r.e.Keys().Count(r.under, r.new)
		r.new = 0
	}
}

// nameHash returns the hash of the key Under, and stores it in o.
func (o *Options) nameHash(s *secret) uint64 {
	if o.name == 0 {
		o.name = s.name(o.Under)
	}
	return o.name
}

// key returns the counter.Key of the key in o, and adds it to the epoch if it is new there; nil
// if o has no key. The name is written to the journal before the key is added to the epoch: so
// the journal has no id under a key whose name it does not have.
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
		// Another request may have added this key meanwhile, as the last one that had room.
		if k = keys.Find(hash, name); k == nil {
			return nil, ErrTooManyKeys
		}
	}
	if k == nil {
		if r.v.tight.Load() && r.v.nothingLeft() {
			return nil, ErrFull // the id would be refused, so the key is not needed
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

// addAttempt adds an id that has a token; token is the word of the token.
//
// Attempts with tokens to count one id wait for each other, and none is judged in an epoch that
// is no longer open. So if a retry was faster than the first attempt, the late first attempt
// finds the token in the open epoch; and a retry in the open epoch finds the token of a first
// attempt in the window before. A request without a token does not wait: if it adds the id, no
// token is added.
//
// A token is in an epoch only if its id is. So the token is looked up only if the id was found,
// which is rare: most ids are new.
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

// addWith adds an id that has options; token is the word of its token, 0 if it has none.
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

// known returns the verdict on an id that cannot be added, because of cause.
func (m *Memory) known(v *View, k Key, cause error) (Verdict, error) {
	p, cause := m.lookFull(v, k, cause)
	if cause != nil {
		return m.refused(cause), cause
	}
	return verdict(p), nil
}

// recordKind returns the kind of the journal record of an id.
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

// appendWith adds the record of an id with options.
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

// nameRecord returns the journal record of the name of a key.
func nameRecord(hash uint64, name []byte) (words [2 + nameWords]uint64) {
	words[0], words[1] = hash, uint64(len(name))
	copy(bytesOf(words[2:]), name)
	return words
}

// keyed is what the journal has of the keys of an epoch.
type keyed struct {
	names map[uint64]string // names of keys by their hash
	ids   map[uint64]uint64 // number of ids by the hash of their key
}

func newKeyed() *keyed { return &keyed{map[uint64]string{}, map[uint64]uint64{}} }

// read adds the records of one kind, which has keys.
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

// readName adds the record of the name of a key.
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

// counts returns the number of ids under each key, less those that are published, and their
// sum. It returns ok false if the name of a key is missing.
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

// resume adds the keys of the epoch that goes on to e, so that they count against the limit on
// the keys of e.
func (k *keyed) resume(e *counter.Epoch) {
	if k == nil {
		return
	}
	for hash, name := range k.names {
		e.Keys().Add(hash, []byte(name))
	}
}
