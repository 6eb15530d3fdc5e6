package main

import (
	"fmt"
	"strconv"
)

// idForm turns the number of an id into its text. Numbers are handed out densely from zero
// over all connections, so that a run can remember each id that was answered `ok` in one
// bit per window (see bitmap).
//
// The text is one-to-one with the number for a given seed, never a random draw:
// a collision in the driver would look exactly like a lost id in the server.
type idForm string

const (
	idsDecimal idForm = "decimal" // canonical decimals up to 2^64-1
	idsUUID    idForm = "uuid"    // version 4 layout, lower case
	idsString  idForm = "string"  // bytes that need percent-encoding
)

// append writes the id numbered n, percent-encoded for a query, to dst.
func (f idForm) append(dst []byte, seed, n uint64) []byte {
	// mix is a bijection and so is adding the seed: two numbers never give the
	// same word, and two runs with other seeds hardly share an id.
	word := mix(n + seed)
	switch f {
	case idsUUID:
		return appendUUID(dst, word, mix(word^seed))
	case idsString:
		dst = append(dst, "v%C3%A9rify%2F"...)
		dst = strconv.AppendUint(dst, seed, 36)
		dst = append(dst, '%', '2', 'B')
		return strconv.AppendUint(dst, n, 10)
	}
	return strconv.AppendUint(dst, word, 10)
}

// appendUUID lays word and filler out as a version 4 UUID. The version takes
// four bits of word; they move to the end of the second half, so that the
// whole of word stays in the text and ids stay one-to-one with numbers.
func appendUUID(dst []byte, word, filler uint64) []byte {
	lost := word >> 12 & 0xf
	word = word&^(0xf<<12) | 4<<12
	half := filler&^(3<<62|0xf) | 2<<62 | lost
	return fmt.Appendf(dst, "%08x-%04x-%04x-%04x-%012x", word>>32, word>>16&0xffff, word&0xffff, half>>48, half&(1<<48-1))
}

// mix is the finaliser of SplitMix64: a bijection on 64 bits that spreads
// neighbouring numbers, so that decimals have the length and the scatter of
// real ids and do not favour a table that happens to like small ones.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
