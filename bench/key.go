package bench

import (
	"encoding/binary"
	"math/bits"

	"github.com/dchest/siphash"
)

// wide is the key of an id that is not a number.
type wide [16]byte

// parse turns an id into a key that a generic map takes without an allocation, as Verve
// does: the maps are not made to pay for strings. It returns a canonical decimal as a
// number, a UUID as its 128 bits and any other id as a hash of 128 bits.
func parse(id []byte) (n uint64, w wide, isNumber bool) {
	if n, ok := number(id); ok {
		return n, w, true
	}
	hi, lo, ok := uuid(id)
	if !ok {
		hi, lo = siphash.Hash128(0, 0, id)
	}
	binary.BigEndian.PutUint64(w[:8], hi)
	binary.BigEndian.PutUint64(w[8:], lo)
	return 0, w, false
}

func number(id []byte) (n uint64, ok bool) {
	if len(id) == 0 || len(id) > 20 || id[0] == '0' && len(id) > 1 {
		return 0, false
	}
	for _, c := range id {
		d := uint64(c - '0')
		hi, lo := bits.Mul64(n, 10)
		sum, carry := bits.Add64(lo, d, 0)
		if d > 9 || hi|carry != 0 {
			return 0, false
		}
		n = sum
	}
	return n, true
}

// nibble is the value of a lower-case hexadecimal digit, 0xff for all else.
var nibble = func() (t [256]byte) {
	for i := range t {
		t[i] = 0xff
	}
	for i, c := range []byte("0123456789abcdef") {
		t[c] = byte(i)
	}
	return t
}()

func uuid(id []byte) (hi, lo uint64, ok bool) {
	if len(id) != 36 || id[8] != '-' || id[13] != '-' || id[18] != '-' || id[23] != '-' {
		return 0, 0, false
	}
	var bad byte
	hex := func(digits []byte) (n uint64) {
		for _, c := range digits {
			d := nibble[c]
			bad |= d
			n = n<<4 | uint64(d&0xf)
		}
		return n
	}
	hi = hex(id[:8])<<32 | hex(id[9:13])<<16 | hex(id[14:18])
	lo = hex(id[19:23])<<48 | hex(id[24:])
	return hi, lo, bad&0xf0 == 0
}

// shardCount keeps two writers out of each other's way: they meet in a shard
// once in 256 adds.
const shardCount = 256

// fibonacci spreads keys over shards by the high bits of the product.
const fibonacci = 0x9e3779b97f4a7c15

func shardOfNumber(n uint64) uint64 { return n * fibonacci >> 56 }

func shardOfWide(w *wide) uint64 {
	return (binary.LittleEndian.Uint64(w[:8]) ^ binary.LittleEndian.Uint64(w[8:])) * fibonacci >> 56
}
