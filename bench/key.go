package bench

import (
	"encoding/binary"
	"math/bits"

	"github.com/dchest/siphash"

	"verve/dedup"
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
	hi, lo, ok := dedup.ParseUUID(id)
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

// shardCount keeps two writers out of each other's way: they meet in a shard
// once in 256 adds.
const shardCount = 256

// fibonacci spreads keys over shards by the high bits of the product.
const fibonacci = 0x9e3779b97f4a7c15

func shardOfNumber(n uint64) uint64 { return n * fibonacci >> 56 }

func shardOfWide(w *wide) uint64 {
	return (binary.LittleEndian.Uint64(w[:8]) ^ binary.LittleEndian.Uint64(w[8:])) * fibonacci >> 56
}
