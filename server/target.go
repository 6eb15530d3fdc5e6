package server

import (
	"bytes"
	"encoding/binary"
	"net/url"
	"unicode/utf8"

	"verve/counter"
	"verve/dedup"
)

const (
	acceptPath = "/api/verve/accept"
	SinkPath   = "/test" // the built-in receiver of callbacks

	// Bounds after decoding, in bytes.
	maxIDLen    = 256
	maxKeyLen   = counter.MaxKeyLen
	maxTokenLen = 64
)

// query has the parameters of a request to the accept route. nil: it does not have this one.
type query struct {
	id       []byte
	endpoint []byte
	key      []byte
	token    []byte
}

// plainBytes are the bytes that need neither decoding nor another check in an id: the
// unreserved characters of RFC 3986.
var plainBytes = setOf("a-zA-Z0-9._~-")

// setOf returns the set of the bytes in list: single ones, and ranges such as a-z.
func setOf(list string) (set [256]bool) {
	for i := 0; i < len(list); i++ {
		first, last := int(list[i]), int(list[i])
		if i+2 < len(list) && list[i+1] == '-' {
			last = int(list[i+2])
			i += 2
		}
		for c := first; c <= last; c++ {
			set[c] = true
		}
	}
	return set
}

// lengthOf returns how many of the first bytes of b are in the set.
func lengthOf(b []byte, set *[256]bool) (n int) {
	for n < len(b) && set[b[n]] {
		n++
	}
	return n
}

// plainQuery is the common case of parseQuery: a query that is exactly "id=" and plain
// bytes, with or without a key and a token of plain bytes after them, in any order. It
// needs no decoding. parseQuery parses any other query, good or bad.
// FuzzPlainQueryAgreesWithParseQuery checks that the two agree.
func plainQuery(raw []byte, o *dedup.Options) (id []byte, ok bool) {
	const prefix = "id="
	if len(raw) <= len(prefix) || string(raw[:len(prefix)]) != prefix {
		return nil, false
	}
	rest := raw[len(prefix):]
	n := lengthOf(rest, &plainBytes)
	id, rest = rest[:n], rest[n:]
	if n == 0 || n > maxIDLen {
		return nil, false
	}
	rest, like := plainOptions(rest, o)
	return id, like == whole && len(rest) == 0
}

var (
	keyStart   = []byte("&key=")
	tokenStart = []byte("&token=")
)

// plainOptions sets o to the key and the token that b begins with, each of plain bytes and
// at most once, and returns the bytes after them. If b ends before a value begins, it returns
// begun. A value may end with b: then it may go on in bytes that are still to be read.
func plainOptions(b []byte, o *dedup.Options) (rest []byte, like likeness) {
	*o = dedup.Options{}
	for len(b) > 0 && b[0] == '&' {
		value, start, most := &o.Under, keyStart, maxKeyLen
		if len(b) > 1 && b[1] == tokenStart[1] {
			value, start, most = &o.Token, tokenStart, maxTokenLen
		}
		if like = begins(b, start); like != whole {
			return nil, like
		}
		b = b[len(start):]
		n := lengthOf(b, &plainBytes)
		switch {
		case *value != nil || n > most:
			return nil, other
		case n == 0 && len(b) == 0:
			return nil, begun
		case n == 0:
			return nil, other
		}
		*value, b = b[:n], b[n:]
	}
	return b, whole
}

// splitTarget returns the path and the query of a request's target as they were
// sent. In an absolute-form target (RFC 9112, section 3.2.2) they follow the
// authority; ok is false if that is no host.
func splitTarget(target []byte) (path, query []byte, ok bool) {
	scheme, rest, absolute := bytes.Cut(target, []byte("://"))
	if absolute && (bytes.EqualFold(scheme, []byte("http")) || bytes.EqualFold(scheme, []byte("https"))) {
		end := bytes.IndexAny(rest, "/?#")
		if end < 0 {
			end = len(rest)
		}
		if !validHost(rest[:end]) {
			return nil, nil, false
		}
		target = rest[end:]
	}
	path, query, _ = bytes.Cut(target, []byte("?"))
	return path, query, true
}

// parseQuery reads the raw query of an accept request. The result may point into raw.
//
// A query without an id is an error only if needsID: the ids of a batch are in the body.
// After an error, the result still has the parts of the query that are right, unless the id
// is bad.
//
// It is strict if two readers could disagree: exactly one id, at most one endpoint, key
// and token, however their names are escaped. Their values may have no bytes that a URI
// cannot have, and no ";", which some readers take for "&". Other parameters are ignored,
// whatever they contain.
func parseQuery(raw []byte, needsID bool) (query, error) {
	var id, endpoint, key, token parameter
	for len(raw) > 0 {
		var pair []byte
		pair, raw, _ = bytes.Cut(raw, []byte("&"))
		name, value, _ := bytes.Cut(pair, []byte("="))
		name, _ = unescape(name) // badly escaped: empty, and so another parameter
		var p *parameter
		switch string(name) {
		case "id":
			p = &id
		case "endpoint":
			p = &endpoint
		case "key":
			p = &key
		case "token":
			p = &token
		default:
			continue
		}
		p.set(value)
	}
	q := query{id.value, endpoint.value, key.value, token.value}
	switch {
	case id.bad || id.given && !validID(q.id) || needsID && !id.given:
		return query{}, errBadID
	case endpoint.bad || endpoint.given && len(q.endpoint) == 0:
		return q, errBadEndpoint
	case key.bad || key.given && !validKey(q.key):
		return q, errBadKey
	case token.bad || token.given && !validToken(q.token):
		return q, errBadToken
	}
	return q, nil
}

// parameter is a parameter of a query that may be given once.
type parameter struct {
	value      []byte
	given, bad bool
}

// set decodes the value of a parameter. If it is given twice, it is bad, whatever the values.
func (p *parameter) set(value []byte) {
	ok := !p.given && validValue(value)
	if p.given = true; ok {
		p.value, ok = unescape(value)
	}
	if !ok {
		p.value, p.bad = nil, true
	}
}

// validValue checks a value before decoding.
func validValue(value []byte) bool {
	for _, c := range value {
		if c <= ' ' || c >= 0x7f || c == '#' || c == ';' {
			return false
		}
	}
	return true
}

// validID checks an id after decoding. It checks eight bytes at a time as long as all are
// visible ASCII or spaces, because a batch may have very many ids.
func validID(id []byte) bool {
	if len(id) == 0 || len(id) > maxIDLen || id[0] == ' ' || id[len(id)-1] == ' ' {
		return false
	}
	const ones = 0x0101010101010101
	rest := id
	for ; len(rest) >= 8; rest = rest[8:] {
		w := binary.LittleEndian.Uint64(rest)
		if (w|(w-0x20*ones)|(w+ones))&(0x80*ones) != 0 {
			return validText(id)
		}
	}
	for _, c := range rest {
		if c < ' ' || c >= 0x7f {
			return validText(id)
		}
	}
	return true
}

// validText is validID for ids in UTF-8.
func validText(id []byte) bool {
	for _, c := range id {
		if c < ' ' || c == 0x7f {
			return false
		}
	}
	return utf8.Valid(id)
}

// Keys and tokens follow the rules of ids, but for their length.

func validKey(key []byte) bool { return len(key) <= maxKeyLen && validID(key) }

func validToken(token []byte) bool { return len(token) <= maxTokenLen && validID(token) }

// canonicalUint64 reports whether id is a decimal up to 2^64-1 in its only
// spelling.
func canonicalUint64(id []byte) bool {
	const largest = "18446744073709551615"
	if len(id) == 0 || len(id) > len(largest) || id[0] == '0' && len(id) > 1 || !digitsOnly(id) {
		return false
	}
	return len(id) < len(largest) || string(id) <= largest
}

func digitsOnly(b []byte) bool {
	for _, c := range b {
		if c < '0' || c > '9' {
			return false
		}
	}
	return true
}

// unescape decodes s once: "%XX" is a byte and "+" a space. It copies s only if there is
// something to decode.
func unescape(s []byte) (out []byte, ok bool) {
	if bytes.IndexByte(s, '%') < 0 && bytes.IndexByte(s, '+') < 0 {
		return s, true
	}
	text, err := url.QueryUnescape(string(s))
	return []byte(text), err == nil
}
