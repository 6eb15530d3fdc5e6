package bench

import (
	"encoding/binary"
	"strconv"

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

// number parses a canonical decimal. What begins otherwise does not get as far as an error,
// which takes memory.
func number(id []byte) (n uint64, ok bool) {
	if len(id) == 0 || len(id) > 20 || id[0] < '0' || id[0] > '9' || id[0] == '0' && len(id) > 1 {
		return 0, false
	}
	n, err := strconv.ParseUint(string(id), 10, 64)
	return n, err == nil
}
