package counter

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"iter"
	"slices"
)

// KeyCount is the number of new ids under a key in one window.
type KeyCount struct {
	Key    string // 1 to MaxKeyLen bytes
	Unique uint64 // ids answered as new
}

// KeyCounts are the counts of the keys of one window, each key once, in any order. The zero
// value has no keys. Several goroutines may read them at the same time, as long as none adds a
// key.
//
// They are packed as the spool writes them: for each key the length of its name, its name and
// its count. The bytes are split into pieces of whole keys, because Go clears a block of a
// megabyte or more in one stretch, during which requests wait.
type KeyCounts struct {
	pieces [][]byte
	n      int
}

const (
	// KeyPiece is the size of a piece in bytes. Writing one to a file takes some 10 us.
	KeyPiece = 16 << 10

	// MaxPackedKey is how many bytes of a piece one key takes at most.
	MaxPackedKey = 2 + MaxKeyLen + binary.MaxVarintLen64
)

// KeyCountsOf packs a list, in which each key may be only once.
func KeyCountsOf(list ...KeyCount) (c KeyCounts) {
	for _, k := range list {
		c.Add([]byte(k.Key), k.Unique)
	}
	return c
}

// Add adds a key that is not among them yet.
func (c *KeyCounts) Add(key []byte, unique uint64) {
	last := len(c.pieces) - 1
	switch {
	case last < 0:
		c.pieces, last = [][]byte{nil}, 0 // few keys take little memory: the first piece grows
	case len(c.pieces[last])+MaxPackedKey > KeyPiece:
		c.pieces, last = append(c.pieces, make([]byte, 0, KeyPiece)), last+1
	}
	piece := binary.AppendUvarint(c.pieces[last], uint64(len(key)))
	piece = append(piece, key...)
	c.pieces[last] = binary.AppendUvarint(piece, unique)
	c.n++
}

// AddPacked adds the keys of a piece, and keeps the memory of the piece. It returns the bytes
// after the last whole key: a part of a key, or bytes that are no key. It gives way to requests
// by pace.
func (c *KeyCounts) AddPacked(piece []byte, pace *Pace) (rest []byte) {
	rest = piece
	for {
		pace.Step()
		_, _, next, ok := cutKey(rest)
		if !ok {
			break
		}
		rest = next
		c.n++
	}
	if piece = piece[:len(piece)-len(rest)]; len(piece) > 0 {
		c.pieces = append(c.pieces, piece)
	}
	return rest
}

// Pieces returns the packed bytes, each piece as AddPacked takes it. The caller must not change
// them.
func (c KeyCounts) Pieces() [][]byte { return c.pieces }

// Size returns the number of bytes in all pieces.
func (c KeyCounts) Size() (n int) {
	for _, piece := range c.pieces {
		n += len(piece)
	}
	return n
}

// Len returns the number of keys.
func (c KeyCounts) Len() int { return c.n }

// Unique returns the sum of the counts. It gives way to requests.
func (c KeyCounts) Unique() (sum uint64) {
	for _, unique := range c.All() {
		sum += unique
	}
	return sum
}

// All yields each key and its count. The caller may keep the bytes of the key but not change
// them. All gives way to requests.
func (c KeyCounts) All() iter.Seq2[[]byte, uint64] {
	return func(yield func([]byte, uint64) bool) {
		var pace Pace
		for _, piece := range c.pieces {
			for len(piece) > 0 {
				pace.Step()
				key, unique, rest, ok := cutKey(piece)
				if !ok || !yield(key, unique) {
					return
				}
				piece = rest
			}
		}
	}
}

// List returns the counts in the order of the names of their keys. It is meant for few keys.
func (c KeyCounts) List() (list []KeyCount) {
	for key, unique := range c.All() {
		list = append(list, KeyCount{string(key), unique})
	}
	slices.SortFunc(list, func(a, b KeyCount) int { return cmp.Compare(a.Key, b.Key) })
	return list
}

// SumKeys adds up several KeyCounts, key by key. It gives way to requests.
func SumKeys(all ...KeyCounts) KeyCounts {
	all = slices.DeleteFunc(all, func(c KeyCounts) bool { return c.n == 0 })
	if len(all) == 0 {
		return KeyCounts{}
	}
	if len(all) == 1 {
		return all[0]
	}
	sums := make(map[string]uint64)
	for _, c := range all {
		for key, unique := range c.All() {
			sums[string(key)] += unique
		}
	}
	var sum KeyCounts
	var pace Pace
	for key, unique := range sums {
		pace.Step()
		sum.Add([]byte(key), unique)
	}
	return sum
}

// Largest returns the n keys with the most ids, the largest first; keys with equal counts are
// in the order of their names. A window may have a hundred thousand keys, and requests arrive
// while it closes: so Largest sorts only 2n keys at a time, and gives way to requests.
func (c KeyCounts) Largest(n int) []KeyCount {
	var pace Pace
	order := func(a, b KeyCount) int {
		pace.Step()
		return cmp.Or(cmp.Compare(b.Unique, a.Unique), cmp.Compare(a.Key, b.Key))
	}
	top := make([]KeyCount, 0, min(c.n, 2*n))
	var least KeyCount // the last of the n largest keys so far; keys that come after it in the order are skipped
	for key, unique := range c.All() {
		if unique < least.Unique || unique == least.Unique && bytes.Compare(key, []byte(least.Key)) > 0 {
			continue
		}
		if len(top) == 2*n {
			slices.SortFunc(top, order)
			top = top[:n]
			least = top[n-1]
		}
		top = append(top, KeyCount{string(key), unique})
	}
	slices.SortFunc(top, order)
	return slices.Clone(top[:min(n, len(top))]) // a copy, because top has room for 2n keys
}

// cutKey takes the first key off b. It returns ok false if b does not begin with a whole key.
func cutKey(b []byte) (key []byte, unique uint64, rest []byte, ok bool) {
	size, n := binary.Uvarint(b)
	if n <= 0 || size > uint64(len(b)-n) {
		return nil, 0, b, false
	}
	key, rest = b[n:n+int(size)], b[n+int(size):]
	if unique, n = binary.Uvarint(rest); n <= 0 {
		return nil, 0, b, false
	}
	return key, unique, rest[n:], true
}
