package dedup

import (
	"crypto/rand"
	"encoding/binary"
	"math/bits"

	"github.com/dchest/siphash"
)

// secret keys every placement and hash, so that no caller can choose ids that collide. A Memory
// has one secret for all its tables; with a Dir the secret is kept there.
type secret struct {
	xor        [2]uint64
	odd        [5]uint64 // odd numbers: multiplying by one of them is a bijection
	sip0, sip1 uint64

	token [tokenKeys]uint64 // keys of tokenWord; derived from sip0 and sip1
}

func newSecret() secret {
	var words [9]uint64
	b := bytesOf(words[:])
	rand.Read(b) // never fails: crypto/rand ends the process instead
	for i := range words[2:7] {
		words[2+i] |= 1 // make these odd
	}
	return secretOf(words[:])
}

// words returns the secret as it is kept on disk.
func (s *secret) words() []uint64 {
	return []uint64{s.xor[0], s.xor[1], s.odd[0], s.odd[1], s.odd[2], s.odd[3], s.odd[4], s.sip0, s.sip1}
}

func secretOf(w []uint64) secret {
	s := secret{xor: [2]uint64(w[:2]), odd: [5]uint64(w[2:7]), sip0: w[7], sip1: w[8]}
	for i := range s.token {
		s.token[i] = siphash.Hash(s.sip0, ^s.sip1, []byte{byte(i)})
	}
	return s
}

// scatter maps 64 bits to 64 bits, one to one: xor with a secret and three
// multiplications by secret odd numbers, with the high half folded down between
// them.
//
// In a multiplication a bit affects only higher bits, and ids that differ only in their high
// bits become an arithmetic progression. So two multiplications are not enough. With ids k<<40,
// the lowest bits stayed equal after the first fold, so that all ids or none were sampled for
// the load; and with one secret in six the second progression filled some buckets three times
// over. With three multiplications no family of ids in
// TestFloodingChangesNeitherMemoryNorLevels behaves differently from random ids.
func (s *secret) scatter(key uint64) uint64 {
	x := (key ^ s.xor[0]) * s.odd[0]
	x ^= x >> 32
	x *= s.odd[1]
	x ^= x >> 32
	return x * s.odd[4]
}

// scatter128 maps 128 bits to 128 bits, one to one: two rounds of a Feistel
// network with scatter-like round functions. Either half of the key reaches
// both halves of the result.
func (s *secret) scatter128(hi, lo uint64) (uint64, uint64) {
	f := (lo ^ s.xor[1]) * s.odd[2]
	hi ^= f ^ f>>29
	f = s.scatter(hi)
	lo ^= f ^ f>>29
	f = (lo ^ s.xor[0]) * s.odd[3]
	hi ^= bits.RotateLeft64(f, 32)
	return hi, lo
}

// gather128 undoes scatter128.
func (s *secret) gather128(hi, lo uint64) (uint64, uint64) {
	f := (lo ^ s.xor[0]) * s.odd[3]
	hi ^= bits.RotateLeft64(f, 32)
	f = s.scatter(hi)
	lo ^= f ^ f>>29
	f = (lo ^ s.xor[1]) * s.odd[2]
	hi ^= f ^ f>>29
	return hi, lo
}

// hash maps any id to 128 bits by SipHash-2-4-128 (Aumasson, Bernstein, 2012),
// a keyed hash whose collisions cannot be searched for without the key: the
// chance of one among ten million ids is 1.5e-25.
func (s *secret) hash(id []byte) (hi, lo uint64) {
	return siphash.Hash128(s.sip0, s.sip1, id)
}

// Key identifies an id, with the key it is counted under, to the Set that made it, in every
// epoch. For a decimal, and for a UUID that is under no key, it is exact; any other id has a
// keyed hash of 128 bits. A Key of one Set means nothing to another Set.
type Key struct {
	hi, lo uint64 // scattered; hi is 0 for decimals
	kind   uint8  // narrowKind, wideKind, pairKind
}

// IsDecimal reports whether the id is a canonical decimal up to 2^64-1 that is under no key.
func (k Key) IsDecimal() bool { return k.kind == narrowKind }

func (s *secret) key(id []byte) Key {
	if n, ok := decimal(id); ok {
		return Key{lo: s.scatter(n), kind: narrowKind}
	}
	hi, lo, ok := ParseUUID(id)
	if !ok {
		hi, lo = s.hash(id)
	}
	hi, lo = s.scatter128(hi, lo)
	return Key{hi, lo, wideKind}
}

// keyOf returns the Key of an id with its options; o is nil if it has none.
func (s *secret) keyOf(id []byte, o *Options) Key {
	if o == nil || len(o.Under) == 0 {
		return s.key(id)
	}
	return s.keyUnder(o.nameHash(s), o.Under, id)
}

// keyUnder returns the Key of an id that is counted under the key under; name is the hash of
// that key. For a decimal the Key is the name and the number, scattered one to one: no two keys
// of an epoch have the same hash (counter.Keys). For any other id it is a hash of 128 bits of
// key and id.
func (s *secret) keyUnder(name uint64, under, id []byte) Key {
	if n, ok := decimal(id); ok {
		hi, lo := s.scatter128(name, n)
		return Key{hi, lo, pairKind}
	}
	if 1+len(under)+len(id) > 64 {
		return s.keyUnderLong(under, id)
	}
	var text [64]byte
	return s.keyOfPair(append(append(append(text[:0], byte(len(under))), under...), id...))
}

// keyUnderLong is keyUnder for a long key and id, with a larger buffer: clearing that buffer
// takes as long as hashing a short pair.
func (s *secret) keyUnderLong(under, id []byte) Key {
	var text [1 + 128 + 256]byte
	return s.keyOfPair(append(append(append(text[:0], byte(len(under))), under...), id...))
}

func (s *secret) keyOfPair(pair []byte) Key {
	hi, lo := siphash.Hash128(^s.sip0, s.sip1, pair)
	hi, lo = s.scatter128(hi, lo)
	return Key{hi, lo, wideKind}
}

// name returns a keyed hash of a key that ids are counted under.
func (s *secret) name(under []byte) uint64 { return siphash.Hash(^s.sip0, s.sip1, under) }

// decimal parses a canonical decimal up to 2^64-1: it has no sign and no leading zero.
//
// The length only chooses how many words to read. After that there is no branch on the length
// and no loop: when ids of 18, 19 and 20 digits are mixed, as in random numbers, mispredicted
// branches took longer than all the rest (BenchmarkDecimal).
func decimal(id []byte) (uint64, bool) {
	le, n := binary.LittleEndian, uint(len(id))
	switch {
	case n > 20:
		return 0, false
	case n > 16:
		first := le.Uint32(id)
		a, b, c := digits(uint64(first), n-16), digits(le.Uint64(id[n-16:]), 8), digits(le.Uint64(id[n-8:]), 8)
		hi, lo := bits.Mul64(decimal8(a)*1e8+decimal8(b), 1e8)
		sum, carry := bits.Add64(lo, decimal8(c), 0)
		return sum, byte(first) != '0' && wrong(a)|wrong(b)|wrong(c)|hi|carry == 0
	case n > 8:
		first := le.Uint64(id)
		a, b := digits(first, n-8), digits(le.Uint64(id[n-8:]), 8)
		return decimal8(a)*1e8 + decimal8(b), byte(first) != '0' && wrong(a)|wrong(b) == 0
	case n >= 4: // two words, which may overlap
		first := le.Uint32(id)
		a := digits(uint64(first)|uint64(le.Uint32(id[n-4:]))<<(8*(n-4)), n)
		return decimal8(a), byte(first) != '0' && wrong(a) == 0
	case n > 0: // three bytes that may be the same
		a := digits(uint64(id[0])|uint64(id[n/2])<<(8*(n/2))|uint64(id[n-1])<<(8*(n-1)), n)
		return decimal8(a), (id[0] != '0' || n == 1) && wrong(a) == 0
	}
	return 0, false
}

// digits returns the values of the first n bytes of w (1 to 8), if these are digits, as the
// last n of eight digits; the digits before them are zeros. w was read in little-endian order,
// so the first byte of the text is the lowest byte of w.
func digits(w uint64, n uint) uint64 {
	const zeros = 0x3030303030303030
	return (w ^ zeros) << (8 * (8 - n) & 63)
}

// wrong returns 0 if every byte of d is the value of a digit. Any other byte has a bit set in
// its high half, or gets one there when 6 is added.
func wrong(d uint64) uint64 {
	const highs, sixes = 0xf0f0f0f0f0f0f0f0, 0x0606060606060606
	return (d | (d + sixes)) & highs
}

// decimal8 returns the number that eight digits make. One multiplication each joins digits into
// pairs, pairs into fours, and fours into the number (Langdale and Lemire, "Quickly parsing
// eight digits", 2018).
func decimal8(d uint64) uint64 {
	const pairs = 0x000000ff000000ff
	d = d*10 + d>>8
	return (d&pairs*(100+1_000_000<<32) + d>>16&pairs*(1+10_000<<32)) >> 32
}

const uuidLen = 36

// unhex maps a lower-case hexadecimal digit to its value, and any other byte to 0xff.
var unhex = func() (t [256]byte) {
	for i := range t {
		t[i] = 0xff
	}
	for i, c := range []byte("0123456789abcdef") {
		t[c] = byte(i)
	}
	return t
}()

// ParseUUID parses a UUID in its canonical text (RFC 9562, section 4): lower case, with
// hyphens. ok is false for any other text: another spelling of a UUID is another id, and is
// hashed. Safe for concurrent use.
func ParseUUID(id []byte) (hi, lo uint64, ok bool) {
	if len(id) != uuidLen || id[8] != '-' || id[13] != '-' || id[18] != '-' || id[23] != '-' {
		return 0, 0, false
	}
	var bad byte
	hex := func(from, to int) (n uint64) {
		for _, c := range id[from:to] {
			d := unhex[c]
			bad |= d
			n = n<<4 | uint64(d&0xf)
		}
		return n
	}
	hi = hex(0, 8)<<32 | hex(9, 13)<<16 | hex(14, 18)
	lo = hex(19, 23)<<48 | hex(24, 36)
	return hi, lo, bad&0xf0 == 0
}
