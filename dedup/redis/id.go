package redis

import (
	"crypto/sha256"
	"encoding/binary"
	"strings"

	"github.com/dchest/siphash"

	"verve/dedup"
)

// How ids are stored in Redis. Each id has one form, and each kind has sets of its
// own, so that no id is mistaken for another.
const (
	kindDecimal = 'd' // canonical decimals below 2^63, as text: Redis keeps them as integers
	kindUUID    = 'u' // the 16 bytes of a UUID
	kindText    = 't' // other ids as they are
	kindDigest  = 'h' // SHA-256 of ids longer than maxText
	kindUnder   = 'k' // 128 bits of a SHA-256 of an id and the key that it is counted under
	kinds       = "duth"

	// namedIDs is the index, after those of the kinds, of the list with the ids whose requests
	// named a key or a token. In the log all of these have kindNamed, also those of kindUnder.
	namedIDs  = len(kinds)
	kindNamed = 'm'

	maxText = 40
)

// encoded is an id as Redis holds it: its kind, and then the id as a MessagePack raw.
type encoded struct {
	n    uint8
	data [1 + 2 + maxText]byte
}

func (en *encoded) bytes() []byte { return en.data[:en.n] }

// encode sets en to the form of an id, and returns the hash of that, whose highest bits
// choose the lane. All instances of a group must compute it alike, so its key is no secret:
// an attacker who knows it can make one lane busier than the others, but no more.
func (en *encoded) encode(key [2]uint64, decimal bool, id []byte) uint64 {
	if decimal && (len(id) < 19 || len(id) == 19 && string(id) <= "9223372036854775807") {
		return en.set(key, kindDecimal, id)
	}
	if hi, lo, ok := dedup.ParseUUID(id); ok {
		var uuid [16]byte
		return en.set(key, kindUUID, binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(uuid[:0], hi), lo))
	}
	if len(id) <= maxText {
		return en.set(key, kindText, id)
	}
	sum := sha256.Sum256(id)
	return en.set(key, kindDigest, sum[:])
}

// encodeUnder does the same for an id that is counted under a key.
func (en *encoded) encodeUnder(key [2]uint64, under, id []byte) uint64 {
	var text [1 + 128 + 256]byte
	sum := sha256.Sum256(append(append(append(text[:0], byte(len(under))), under...), id...))
	return en.set(key, kindUnder, sum[:16])
}

func (en *encoded) set(key [2]uint64, kind byte, body []byte) uint64 {
	en.n = uint8(len(appendRaw(append(en.data[:0], kind), body)))
	return siphash.Hash(key[0], key[1]^uint64(kind), body)
}

// token is a digest of the form of an id and the token of its request: no other pair of
// them has it. All zero: there is no token.
type token [16]byte

// named has the key and the token that the request for an id named, if it named one of
// them. It is never changed.
type named struct {
	under string // the key; empty: none
	token token
	full  bool   // there is no room under the key: the id is refused if it is new
	log   []byte // its form in the log: kindNamed, and then kind, id, token and key, each as a MessagePack raw
}

// fullKey stands before a key for which there is no room.
const fullKey = "\x00"

// newNamed makes the named of the id with the form en. key: see hashKey; full: see named.
func newNamed(key [2]uint64, en *encoded, o *dedup.Options, full bool) *named {
	m := &named{under: string(o.Under), full: full}
	name, token := m.under, m.token[:0]
	if full {
		name = fullKey + name
	}
	if len(o.Token) > 0 {
		text := make([]byte, 0, 256)
		text = binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(text, key[0]), key[1])
		sum := sha256.Sum256(append(append(text, en.bytes()...), o.Token...))
		token = append(token, sum[:len(m.token)]...)
	}
	m.log = append(make([]byte, 0, 6+int(en.n)+len(token)+len(name)), kindNamed)
	m.log = append(appendRaw(m.log, en.data[:1]), en.bytes()[1:]...)
	m.log = appendRaw(appendRaw(m.log, token), name)
	return m
}

func (m *named) hasToken() bool { return m != nil && m.token != token{} }

// sameAttempt reports whether requests that named a and b, for one id, are the same attempt
// to count it.
func sameAttempt(a, b *named) bool {
	return a == b || a.hasToken() == b.hasToken() && (!a.hasToken() || a.token == b.token)
}

// kindOf returns the index in lists of the kind with this letter. lane.lua has the same
// order, but counts from 1.
func kindOf(header byte) int { return strings.IndexByte(kinds+string(kindNamed), header) }

// lists are ids on their way to lane.lua, with a list for each kind: MessagePack, one
// raw after another. An id in the list namedIDs is four raws: kind, id, token, key.
type lists [len(kinds) + 1]string

// only returns the index of the list that has all the ids, or -1 if several lists have some
// or an id has a key or a token.
func (l *lists) only() int {
	k := -1
	for i := range l {
		switch {
		case l[i] == "":
		case k >= 0 || i == namedIDs:
			return -1
		default:
			k = i
		}
	}
	return k
}

// appendRaw appends body, of 255 bytes at most, to a list as a MessagePack raw.
func appendRaw[T []byte | string](list []byte, body T) []byte {
	if len(body) < 32 {
		list = append(list, 0xa0|byte(len(body)))
	} else {
		list = append(list, 0xd9, byte(len(body)))
	}
	return append(list, body...)
}

// hashKey is the key of the hash that chooses lanes, which all instances compute alike.
func hashKey(group string) [2]uint64 {
	sum := sha256.Sum256([]byte("verve lane\x00" + group))
	return [2]uint64{binary.LittleEndian.Uint64(sum[:]), binary.LittleEndian.Uint64(sum[8:])}
}

// logged returns the form that an id has in the log.
func logged(en *encoded, m *named) []byte {
	if m != nil {
		return m.log
	}
	return en.bytes()
}

// firstLogged returns the first id of b, a part of the log.
func firstLogged(b []byte) []byte {
	raws, n := 1, 1
	if b[0] == kindNamed {
		raws = 4
	}
	for range raws {
		if b[n] == 0xd9 {
			n += 2 + int(b[n+1])
		} else {
			n += 1 + int(b[n]&0x1f)
		}
	}
	return b[:n]
}
