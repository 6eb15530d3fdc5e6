package dedup

import (
	"crypto/rand"
	"encoding/binary"
	"math/bits"

	"github.com/dchest/siphash"
)

// secret keys every placement and hash, so that nobody outside can choose ids
// that fall together. It lives as long as the table whose words it made.
type secret struct {
	xor        [2]uint64
	odd        [5]uint64 // odd: multiplication by them is a bijection
	sip0, sip1 uint64
}

func newSecret() secret {
	var b [9 * 8]byte
	rand.Read(b[:]) // never fails: crypto/rand ends the process instead
	word := func(i int) uint64 { return binary.LittleEndian.Uint64(b[8*i:]) }
	return secret{
		xor:  [2]uint64{word(0), word(1)},
		odd:  [5]uint64{word(2) | 1, word(3) | 1, word(4) | 1, word(5) | 1, word(6) | 1},
		sip0: word(7),
		sip1: word(8),
	}
}

// words are the secret as it is kept on disk.
func (s *secret) words() []uint64 {
	return []uint64{s.xor[0], s.xor[1], s.odd[0], s.odd[1], s.odd[2], s.odd[3], s.odd[4], s.sip0, s.sip1}
}

func secretOf(w []uint64) secret {
	return secret{xor: [2]uint64(w[:2]), odd: [5]uint64(w[2:7]), sip0: w[7], sip1: w[8]}
}

// scatter maps 64 bits to 64 bits, one to one: xor with a secret and three
// multiplications by secret odd numbers, with the high half folded down between
// them.
//
// A multiplication moves what differs only upwards, and of ids that differ only
// in their high bits it makes an arithmetic progression. Two of them are not
// enough: of ids k<<40 the first fold leaves the lowest bits alike, so that all
// or none were sampled for the load, and the second progression filled some
// buckets three times over for one secret in six. With three no family of ids
// in TestFloodingChangesNeitherMemoryNorLevels can be told from random ones.
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

// hash maps any id to 128 bits by SipHash-2-4-128 (Aumasson, Bernstein, 2012),
// a keyed hash whose collisions cannot be searched for without the key: the
// chance of one among ten million ids is 1.5e-25.
func (s *secret) hash(id []byte) (hi, lo uint64) {
	return siphash.Hash128(s.sip0, s.sip1, id)
}

// idKey tells ids apart in this process: exactly, but for texts, which are told
// apart by a keyed hash of 128 bits.
type idKey struct {
	hi, lo uint64 // scattered; hi is 0 for decimals
	kind   uint8  // narrowKind, wideKind
}

func (s *secret) key(id []byte) idKey {
	if n, ok := decimal(id); ok {
		return idKey{lo: s.scatter(n), kind: narrowKind}
	}
	hi, lo, ok := uuid(id)
	if !ok {
		hi, lo = s.hash(id)
	}
	hi, lo = s.scatter128(hi, lo)
	return idKey{hi, lo, wideKind}
}

// decimal parses a canonical decimal up to 2^64-1: no sign, no leading zero.
func decimal(id []byte) (uint64, bool) {
	if len(id) == 0 || len(id) > 20 || id[0] == '0' && len(id) > 1 {
		return 0, false
	}
	var n uint64
	rest := id
	for len(rest) >= 8 {
		d, ok := decimal8(binary.LittleEndian.Uint64(rest))
		if !ok {
			return 0, false
		}
		n, rest = n*1e8+d, rest[8:]
	}
	for i, c := range rest {
		d := uint64(c - '0')
		if d > 9 {
			return 0, false
		}
		if len(id)-len(rest)+i == 19 { // only the twentieth digit can overflow
			hi, lo := bits.Mul64(n, 10)
			sum, carry := bits.Add64(lo, d, 0)
			return sum, hi == 0 && carry == 0
		}
		n = n*10 + d
	}
	return n, true
}

// decimal8 parses eight digits at once, the first in the lowest byte: pairs,
// then fours, then all eight are put together by a multiplication each (Langdale
// and Lemire, "Quickly parsing eight digits", 2018). Digit by digit took longer
// than finding the bucket (BenchmarkDecimal).
func decimal8(b uint64) (uint64, bool) {
	const (
		zeros = 0x3030303030303030
		highs = 0xf0f0f0f0f0f0f0f0
		sixes = 0x0606060606060606
	)
	// A digit has the high half 3, also after adding 6.
	if b&highs != zeros || (b+sixes)&highs != zeros {
		return 0, false
	}
	b -= zeros
	b = b*10 + b>>8
	const pairs = 0x000000ff000000ff
	return (b&pairs*(100+1_000_000<<32) + b>>16&pairs*(1+10_000<<32)) >> 32, true
}

const uuidLen = 36

// unhex maps lower-case hexadecimal digits to their value, all else to 0xff.
var unhex = func() (t [256]byte) {
	for i := range t {
		t[i] = 0xff
	}
	for i, c := range []byte("0123456789abcdef") {
		t[c] = byte(i)
	}
	return t
}()

// uuid parses a UUID in its canonical text (RFC 9562, section 4): lower case,
// with hyphens. Any other spelling is another id and is hashed.
func uuid(id []byte) (hi, lo uint64, ok bool) {
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
