package server

import (
	"bytes"
	"errors"
	"io"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// A batch is parsed as a whole before the first of its ids is judged.

// Formats of a batch.
type format uint8

const (
	formatText   format = iota // an id a line, raw bytes
	formatJSON                 // an array of items
	formatLines                // an item a line
	formatEvents               // an array of CloudEvents
	formatEvent                // one CloudEvent
	formatUnknown
)

// formatOf returns the format of a Content-Type: the media type decides, in any
// case, and its parameters are ignored.
func formatOf(contentType []byte) format {
	media, _, _ := bytes.Cut(contentType, []byte(";"))
	media = bytes.TrimSpace(media)
	for _, f := range []struct {
		media string
		format
	}{
		{"", formatText},
		{"text/plain", formatText},
		{"application/json", formatJSON},
		{"application/x-ndjson", formatLines},
		{"application/cloudevents-batch+json", formatEvents},
		{"application/cloudevents+json", formatEvent},
	} {
		if len(media) == len(f.media) && bytes.EqualFold(media, []byte(f.media)) {
			return f.format
		}
	}
	return formatUnknown
}

var (
	errBadBatch    = errors.New("the body is no batch")
	errTooManyIDs  = errors.New("too many ids in a batch")
	errBatchClosed = errors.New("the body goes on behind the batch")
)

// item is one id of a batch as it was sent.
type item struct {
	id    []byte // in the body, or in the scratch memory of the batch
	key   []byte // nil: that of the request
	token []byte // nil: that of the request
	word  word   // wordOK while nothing is wrong with it
}

// parser takes a batch apart. Its memory is used again.
type parser struct {
	items   []item
	limit   int    // of items
	scratch []byte // what had to be unquoted or put together
	decoder jsontext.Decoder
}

// parse fills items from the body, which must stay as it is while they are used. An
// error is about the body as a whole; what is wrong with one item is its word.
func (p *parser) parse(f format, body []byte) error {
	p.items, p.scratch = p.items[:0], p.scratch[:0]
	if f == formatText {
		return p.lines(body)
	}
	// Unquoted text is at most as long as the body, and a source and an id that are joined
	// take their length once more. So scratch never moves.
	if cap(p.scratch) < 2*len(body) {
		p.scratch = make([]byte, 0, 2*len(body))
	}
	p.decoder.Reset(bytes.NewReader(body), jsontext.AllowDuplicateNames(false), jsontext.AllowInvalidUTF8(false))
	err := p.values(f)
	if err != nil && !errors.Is(err, errTooManyIDs) {
		return errBadBatch
	}
	return err
}

// lines reads an id a line. The end of the last one is optional.
func (p *parser) lines(body []byte) error {
	for len(body) > 0 {
		line := body
		if i := bytes.IndexByte(body, '\n'); i >= 0 {
			line, body = body[:i], body[i+1:]
		} else {
			body = nil
		}
		if n := len(line); n > 0 && line[n-1] == '\r' {
			line = line[:n-1]
		}
		if err := p.add(item{id: line}); err != nil {
			return err
		}
	}
	return nil
}

func (p *parser) add(it item) error {
	if len(p.items) == p.limit {
		return errTooManyIDs
	}
	if it.word == wordOK && !validID(it.id) {
		it.word = wordBadID
	}
	p.items = append(p.items, it)
	return nil
}

// values reads the JSON formats.
func (p *parser) values(f format) error {
	d := &p.decoder
	if f == formatJSON || f == formatEvents {
		if t, err := d.ReadToken(); err != nil || t.Kind() != '[' {
			return errBadBatch
		}
		for d.PeekKind() != ']' {
			if err := p.value(f); err != nil {
				return err
			}
		}
		if _, err := d.ReadToken(); err != nil {
			return err
		}
		_, err := d.ReadToken()
		return atEnd(err)
	}
	for {
		if kind := d.PeekKind(); kind == 0 {
			_, err := d.ReadToken()
			return atEnd(err)
		}
		if f == formatEvent && len(p.items) > 0 {
			return errBatchClosed
		}
		if err := p.value(f); err != nil {
			return err
		}
	}
}

// atEnd is nil if err is the end of the body.
func atEnd(err error) error {
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case err == nil:
		return errBatchClosed
	}
	return err
}

// value reads one item. JSON that is no item is a bad id.
func (p *parser) value(f format) error {
	events := f == formatEvents || f == formatEvent
	switch kind := p.decoder.PeekKind(); {
	case kind == '{' && events:
		return p.event()
	case kind == '{':
		return p.object()
	case (kind == '"' || kind == '0') && !events:
		v, err := p.decoder.ReadValue()
		if err != nil {
			return err
		}
		return p.add(item{id: p.text(v, true)})
	}
	if err := p.decoder.SkipValue(); err != nil {
		return err
	}
	return p.add(item{word: wordBadID})
}

// text returns the text of a JSON string, or of a number that is a canonical decimal
// if numbers are allowed; nil for any other value. A string without an escape is
// copied, as the decoder uses its memory again.
func (p *parser) text(v jsontext.Value, numbers bool) []byte {
	from := len(p.scratch)
	switch {
	case v.Kind() == '"':
		if bytes.IndexByte(v, '\\') < 0 {
			p.scratch = append(p.scratch, v[1:len(v)-1]...)
		} else {
			var err error
			if p.scratch, err = jsontext.AppendUnquote(p.scratch, v); err != nil {
				return nil // cannot be: the decoder has checked it
			}
		}
	case v.Kind() == '0' && numbers && canonicalDecimal(v):
		p.scratch = append(p.scratch, v...)
	default:
		return nil
	}
	return p.scratch[from:len(p.scratch):len(p.scratch)]
}

// canonicalDecimal reports whether a JSON number is digits alone: JSON has no leading
// zeros.
func canonicalDecimal(v []byte) bool {
	for _, c := range v {
		if c < '0' || c > '9' {
			return false
		}
	}
	return true
}

// object reads {"id":…,"key":…,"token":…}. Other members are ignored.
func (p *parser) object() error {
	var it item
	err := p.members(func(name []byte, v jsontext.Value) {
		switch string(name) {
		case "id":
			it.id = p.text(v, true)
		case "key":
			if it.key = p.text(v, false); !validKey(it.key) && it.word == wordOK {
				it.word = wordBadKey
			}
		case "token":
			if it.token = p.text(v, false); !validToken(it.token) && it.word == wordOK {
				it.word = wordBadToken
			}
		}
	})
	if err != nil {
		return err
	}
	if !validID(it.id) {
		it.word = wordBadID
	}
	return p.add(it)
}

// event reads a CloudEvent (version 1.0, JSON format): the id counted is its source, a
// space, and its id, which together tell events apart (section 3.1 there).
func (p *parser) event() error {
	var source, id []byte
	var version, kind bool
	err := p.members(func(name []byte, v jsontext.Value) {
		switch string(name) {
		case "source":
			source = p.text(v, false)
		case "id":
			id = p.text(v, false)
		case "specversion":
			version = string(v) == `"1.0"`
		case "type":
			kind = v.Kind() == '"' && len(v) > len(`""`)
		}
	})
	if err != nil {
		return err
	}
	if !version || !kind || len(source) == 0 || len(id) == 0 {
		return p.add(item{word: wordBadID})
	}
	from := len(p.scratch)
	p.scratch = append(append(append(p.scratch, source...), ' '), id...)
	return p.add(item{id: p.scratch[from:len(p.scratch):len(p.scratch)]})
}

// members calls member for each of an object's. The decoder refuses a name that is
// there twice.
func (p *parser) members(member func(name []byte, v jsontext.Value)) error {
	d := &p.decoder
	if _, err := d.ReadToken(); err != nil {
		return err
	}
	var name [16]byte
	for d.PeekKind() != '}' {
		v, err := d.ReadValue()
		if err != nil {
			return err
		}
		n, err := jsontext.AppendUnquote(name[:0], v)
		if err != nil {
			return err
		}
		if v, err = d.ReadValue(); err != nil {
			return err
		}
		member(n, v)
	}
	_, err := d.ReadToken()
	return err
}

// Lengths of what an id may be sent with, in bytes after decoding.
const (
	maxKeyLen   = 128
	maxTokenLen = 64
)

func validKey(key []byte) bool { return len(key) <= maxKeyLen && validID(key) }

func validToken(token []byte) bool {
	return len(token) <= maxTokenLen && utf8.Valid(token) && validID(token)
}
