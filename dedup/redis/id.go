package redis

import (
	"crypto/sha256"
	"encoding/binary"

	"github.com/dchest/siphash"

	"verve/dedup"
)

// How ids stand in Redis. Each has one form, and the kinds have keys of their
// own, so that none is taken for another.
const (
	kindDecimal = 'd' // canonical decimals below 2^63, as text: Redis keeps them as integers
	kindUUID    = 'u' // the 16 bytes of a UUID
	kindText    = 't' // other ids as they are
	kindDigest  = 'h' // SHA-256 of ids longer than maxText
	kinds       = "duth"

	maxText   = 40
	headerLen = 2 // kind and length
)

// encoded is an id as Redis holds it, behind a header that tells where it ends.
type encoded struct {
	n    uint8
	data [headerLen + maxText]byte
}

func (en *encoded) bytes() []byte { return en.data[:en.n] }

// encode returns the hash that chooses the lane by its highest bits. All
// instances of a group must agree on it, so its key cannot be a secret: who
// knows it can make one lane busier than the others, no more.
func (en *encoded) encode(key [2]uint64, decimal bool, id []byte) uint64 {
	body := en.data[headerLen:headerLen]
	if decimal && (len(id) < 19 || len(id) == 19 && string(id) <= "9223372036854775807") {
		en.data[0] = kindDecimal
		body = append(body, id...)
	} else if hi, lo, ok := dedup.ParseUUID(id); ok {
		en.data[0] = kindUUID
		body = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(body, hi), lo)
	} else if len(id) <= maxText {
		en.data[0] = kindText
		body = append(body, id...)
	} else {
		en.data[0] = kindDigest
		sum := sha256.Sum256(id)
		body = append(body, sum[:]...)
	}
	en.data[1] = byte(len(body))
	en.n = uint8(headerLen + len(body))
	return siphash.Hash(key[0], key[1]^uint64(en.data[0]), body)
}

// kind numbers the kinds as function.lua does.
func (en *encoded) kind() int { return kindOf(en.data[0]) }

func kindOf(header byte) int {
	switch header {
	case kindDecimal:
		return 0
	case kindUUID:
		return 1
	case kindText:
		return 2
	}
	return 3
}

// lists are ids on their way to function.lua, a list of each kind: MessagePack, one
// raw after another.
type lists [len(kinds)]string

// appendPacked adds an id to such a list.
func appendPacked(list, id []byte) []byte {
	body := id[headerLen:]
	if len(body) < 32 {
		list = append(list, 0xa0|byte(len(body)))
	} else {
		list = append(list, 0xd9, byte(len(body)))
	}
	return append(list, body...)
}

// laneKey is the key of the hash that chooses lanes.
func laneKey(group string) [2]uint64 {
	sum := sha256.Sum256([]byte("verve lane\x00" + group))
	return [2]uint64{binary.LittleEndian.Uint64(sum[:]), binary.LittleEndian.Uint64(sum[8:])}
}
