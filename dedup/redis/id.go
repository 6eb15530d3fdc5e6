package redis

import (
	"crypto/sha256"
	"encoding/binary"
	"strings"

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
	kindUnder   = 'k' // 128 bits of a SHA-256 of an id and the key that it is counted under
	kinds       = "duth"

	// namedIDs numbers, behind the kinds, the list of the ids whose requests named a key or a
	// token. In the log they have this kind, also those of kindUnder.
	namedIDs  = len(kinds)
	kindNamed = 'm'

	maxText   = 40
	headerLen = 2 // kind and length
)

// encoded is an id as Redis holds it, behind a header with its kind and length.
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
	return en.finish(key, body)
}

// encodeUnder does the same for an id that is counted under a key.
func (en *encoded) encodeUnder(key [2]uint64, under, id []byte) uint64 {
	var text [1 + 128 + 256]byte
	pair := append(append(append(text[:0], byte(len(under))), under...), id...)
	sum := sha256.Sum256(pair)
	en.data[0] = kindUnder
	return en.finish(key, append(en.data[headerLen:headerLen], sum[:16]...))
}

// finish ends an id whose kind and body are there, and returns the hash that chooses the
// lane.
func (en *encoded) finish(key [2]uint64, body []byte) uint64 {
	en.data[1] = byte(len(body))
	en.n = uint8(headerLen + len(body))
	return siphash.Hash(key[0], key[1]^uint64(en.data[0]), body)
}

// token is a digest of an id, in its form, and the token of its request: no other pair
// has it. All zero: there is no token.
type token [16]byte

// named is what an id has beside its form if its request named a key or a token. It is
// never changed.
type named struct {
	under string // the key; empty: none
	token token
	full  bool   // a new id has no room under the key: only a retry has an answer
	log   []byte // as it stands in the log: kindNamed, length, and a string each, behind its length: the id with its kind, token, key
}

// fullKey stands before a key for which there is no room.
const fullKey = "\x00"

// newNamed makes the one of an id. full: see named.
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
	m.log = append(make([]byte, 0, headerLen+3+int(en.n)+len(token)+len(name)), kindNamed, 0, en.n-1, en.data[0])
	m.log = append(append(m.log, en.bytes()[headerLen:]...), byte(len(token)))
	m.log = append(append(append(m.log, token...), byte(len(name))), name...)
	m.log[1] = byte(len(m.log) - headerLen)
	return m
}

func (m *named) hasToken() bool { return m != nil && m.token != token{} }

// sameAttempt reports whether requests that named a and b, for one id, are the same attempt
// to count it.
func sameAttempt(a, b *named) bool {
	return a == b || a.hasToken() == b.hasToken() && (!a.hasToken() || a.token == b.token)
}

// kindOf numbers the kinds as lane.lua does, from 0.
func kindOf(header byte) int { return strings.IndexByte(kinds+string(kindNamed), header) }

// lists are ids on their way to lane.lua, a list of each kind: MessagePack, one
// raw after another. An id of the list namedIDs is four raws: kind, id, token, key.
type lists [len(kinds) + 1]string

// only numbers the list that all the ids are in, if that is one of the kinds; else -1.
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

// appendPacked adds an id, as it stands in the log, to such a list.
func appendPacked(list, id []byte) []byte {
	body := id[headerLen:]
	if id[0] != kindNamed {
		return appendRaw(list, body)
	}
	list = appendRaw(list, body[1:2])
	n := int(body[0]) + 1
	list = appendRaw(list, body[2:n])
	for body = body[n:]; len(body) > 0; body = body[n:] {
		n = int(body[0]) + 1
		list = appendRaw(list, body[1:n])
	}
	return list
}

func appendRaw(list, body []byte) []byte {
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

// logged is an id as it stands in the log.
func logged(en *encoded, m *named) []byte {
	if m != nil {
		return m.log
	}
	return en.bytes()
}
