package server

import (
	"bytes"
	"errors"
	"io"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"verve/dedup"
)

// A batch is parsed as a whole before the first of its ids is judged.

// Formats of a batch.
type format uint8

const (
	formatText   format = iota // one id per line, raw bytes
	formatJSON                 // an array of items
	formatLines                // one item per line
	formatEvents               // an array of CloudEvents
	formatEvent                // one CloudEvent
	formatUnknown
)

// formats has the format of each media type.
var formats = map[string]format{
	"":                                   formatText,
	"text/plain":                         formatText,
	"application/json":                   formatJSON,
	"application/x-ndjson":               formatLines,
	"application/cloudevents-batch+json": formatEvents,
	"application/cloudevents+json":       formatEvent,
}

// formatOf returns the format of a Content-Type. Only the media type decides, in upper or lower
// case; its parameters are ignored.
func formatOf(contentType []byte) format {
	media, _, _ := bytes.Cut(contentType, []byte(";"))
	if f, ok := formats[string(bytes.ToLower(bytes.TrimSpace(media)))]; ok {
		return f
	}
	return formatUnknown
}

var errBatchClosed = errors.New("the body goes on behind the batch")

// parser is what a batch has while it is parsed.
type parser struct {
	scratch *buffer // text that had to be unquoted or joined
	decoder *jsontext.Decoder
	json    bytes.Buffer   // of the decoder, which reads the body in place
	common  *dedup.Options // of the items without options of their own; nil: these have none
}

// parse splits the body into its items: each gets a word, and the well-formed ids are
// to be judged. They point into the body, which must not change while they are used. An
// error is about the body as a whole; a fault of one item is its word. shared are the
// options of all items, as far as an item has none itself.
func (b *batch) parse(f format, body []byte, shared *dedup.Options) error {
	most := 1
	switch f {
	case formatJSON, formatEvents:
		most += bytes.Count(body, []byte(","))
	case formatText, formatLines:
		most += bytes.Count(body, []byte("\n"))
	}
	err := b.makeTables(min(most, b.owner.maxIDs))
	if err != nil {
		return err
	}
	b.common = b.work.sharing(shared)
	if f == formatText {
		return b.lines(body)
	}
	// Unquoted text is at most as long as the body, and so are joined sources and ids. So
	// scratch never grows: pointers lead into it.
	size := 0
	if bytes.IndexByte(body, '\\') >= 0 {
		size += len(body)
	}
	if f == formatEvents || f == formatEvent {
		size += len(body)
	}
	if size > 0 {
		if b.scratch, err = b.grow(nil, size, b.owner.limit); err != nil {
			return err
		}
	}
	if !utf8.Valid(body) {
		return errBadRequest
	}
	d, _ := b.owner.decoders.Get().(*jsontext.Decoder)
	if d == nil {
		d = new(jsontext.Decoder)
	}
	b.decoder, b.json = d, *bytes.NewBuffer(body)
	// The grammar of JSON allows a name twice in an object (RFC 8259, section 4) and half of a
	// surrogate pair in a string (section 8.2). The decoder lets both pass; object, event and
	// text find them, so that each is the fault of its item alone.
	d.Reset(&b.json, jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
	err = b.values(f, body)
	b.owner.decoders.Put(d)
	b.decoder, b.json = nil, bytes.Buffer{}
	switch {
	case err == errTooLarge, err == errBusy:
		return err
	case err != nil, f == formatEvent && len(b.words) == 0: // space alone is no event
		return errBadRequest
	}
	return nil
}

// lines reads one id per line. It does what add does, whose call would cost 11 ns per id. The
// newline of the last line is optional.
func (b *batch) lines(body []byte) error {
	decimals := b.owner.server.cfg.Uint64IDs
	items, words := b.work.items, b.words
	for line := range bytes.Lines(body) {
		if len(words) == b.owner.maxIDs {
			return errTooLarge
		}
		if ended, ok := bytes.CutSuffix(line, []byte("\n")); ok {
			line = bytes.TrimSuffix(ended, []byte("\r"))
		}
		if decimals && !canonicalUint64(line) || !validID(line) {
			words = append(words, wordBadID)
			continue
		}
		words = append(words, wordOK)
		items = append(items, dedup.Item{ID: line, Options: b.common})
	}
	b.work.items, b.words = items, words
	return nil
}

// add adds an item. w is its word so far: wordOK, or its fault. own are the key and the token
// that it has itself. A well-formed item is to be judged.
func (b *batch) add(id []byte, w word, own dedup.Options) (err error) {
	switch len(b.words) {
	case b.owner.maxIDs:
		return errTooLarge
	case cap(b.words): // several items are on one line; the tables of the items have the same capacity
		return errBadRequest
	}
	if !validID(id) || b.owner.server.cfg.Uint64IDs && !canonicalUint64(id) {
		w = wordBadID
	}
	options := b.common
	if w == wordOK && (own.Under != nil || own.Token != nil) {
		if own.Under == nil {
			own.Under = b.work.shared.Under
		}
		if own.Token == nil {
			own.Token = b.work.shared.Token
		}
		if len(b.options) == 0 { // pointers lead into it, so it gets room for all items that may come
			if b.options, err = room(b, b.options, cap(b.words)-len(b.words), optionsBytes); err != nil {
				return err
			}
		}
		b.options = append(b.options, own)
		options = &b.options[len(b.options)-1]
	}
	b.words = append(b.words, w)
	if w == wordOK {
		b.work.items = append(b.work.items, dedup.Item{ID: id, Options: options})
	}
	return nil
}

// values reads the JSON formats.
func (b *batch) values(f format, body []byte) error {
	d := b.decoder
	if f == formatJSON || f == formatEvents {
		if t, err := d.ReadToken(); err != nil || t.Kind() != '[' {
			return errBadRequest
		}
		for d.PeekKind() != ']' {
			if err := b.value(f); err != nil {
				return err
			}
		}
		if _, err := d.ReadToken(); err != nil {
			return err
		}
		_, err := d.ReadToken()
		return atEnd(err)
	}
	for end := int64(0); ; {
		if kind := d.PeekKind(); kind == 0 {
			_, err := d.ReadToken()
			return atEnd(err)
		}
		if f == formatEvent && len(b.words) > 0 {
			return errBatchClosed
		}
		if err := b.value(f); err != nil {
			return err
		}
		if f == formatLines {
			from := end
			end = d.InputOffset()
			if !ownLine(body[from:end], from == 0) {
				return errBadRequest
			}
		}
	}
}

// ownLine reports whether an item is on a line of its own. item begins with the space before
// it, in which a line must end, unless the item is the first. No line may end within the item.
func ownLine(item []byte, first bool) bool {
	began := bytes.TrimLeft(item, " \t\r\n")
	space := item[:len(item)-len(began)]
	return (first || bytes.IndexByte(space, '\n') >= 0) && bytes.IndexByte(began, '\n') < 0
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

// value reads one item. JSON that is no item is added as a bad id.
func (b *batch) value(f format) error {
	events := f == formatEvents || f == formatEvent
	switch kind := b.decoder.PeekKind(); {
	case kind == '{' && events:
		return b.event()
	case kind == '{':
		return b.object()
	case (kind == '"' || kind == '0') && !events:
		v, err := b.decoder.ReadValue()
		if err != nil {
			return err
		}
		return b.add(b.text(v, true), wordOK, dedup.Options{})
	}
	if err := b.decoder.SkipValue(); err != nil {
		return err
	}
	return b.add(nil, wordBadID, dedup.Options{})
}

// text returns the text of a JSON string, or of a number that is a canonical decimal
// if numbers are allowed; nil for any other value. The text is in the body, or in scratch
// if the string has an escape.
func (b *batch) text(v jsontext.Value, numbers bool) []byte {
	switch {
	case v.Kind() == '"' && bytes.IndexByte(v, '\\') < 0:
		return v[1 : len(v)-1 : len(v)-1]
	case v.Kind() == '"':
		from := len(b.scratch.b)
		out, err := jsontext.AppendUnquote(b.scratch.b, v)
		if err != nil {
			return nil // half of a surrogate pair
		}
		b.scratch.b = out
		return out[from:len(out):len(out)]
	case v.Kind() == '0' && numbers && digitsOnly(v): // JSON has no leading zeros
		return v
	}
	return nil
}

// object reads {"id":…,"key":…,"token":…}, each once at most. Other members are ignored. If
// there are several faults, the word is that of the first in this order.
func (b *batch) object() error {
	var id []byte
	var own dedup.Options
	var ids, keys, tokens int
	err := b.members(func(name []byte, v jsontext.Value) {
		switch string(name) {
		case "id":
			ids++
			id = b.text(v, true)
		case "key":
			keys++
			own.Under = b.text(v, false)
		case "token":
			tokens++
			own.Token = b.text(v, false)
		}
	})
	w := wordOK
	switch {
	case err != nil:
		return err
	case ids != 1:
		w = wordBadID
	case keys > 1 || keys == 1 && !validKey(own.Under):
		w = wordBadKey
	case tokens > 1 || tokens == 1 && !validToken(own.Token):
		w = wordBadToken
	}
	return b.add(id, w, own)
}

// event reads a CloudEvent (version 1.0, JSON format). The id that is counted is its source, a
// space, and its id: source and id together identify an event (section 3.1 there). A source is a
// URI reference, which has no space: with one, two events could have the same id.
func (b *batch) event() error {
	var source, id []byte
	var version, kind bool
	required := 0 // how many required attributes were read; all four must be there once
	err := b.members(func(name []byte, v jsontext.Value) {
		required++
		switch string(name) {
		case "source":
			source = b.text(v, false)
		case "id":
			id = b.text(v, false)
		case "specversion":
			version = string(b.text(v, false)) == "1.0"
		case "type":
			kind = v.Kind() == '"' && len(v) > len(`""`)
		default:
			required--
		}
	})
	if err != nil {
		return err
	}
	if required != 4 || !version || !kind || len(source) == 0 || bytes.IndexByte(source, ' ') >= 0 || len(id) == 0 {
		return b.add(nil, wordBadID, dedup.Options{})
	}
	from := len(b.scratch.b)
	out := append(append(append(b.scratch.b, source...), ' '), id...)
	b.scratch.b = out
	return b.add(out[from:len(out):len(out)], wordOK, dedup.Options{})
}

// members calls member for each member of an object.
func (b *batch) members(member func(name []byte, v jsontext.Value)) error {
	d := b.decoder
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
			n = nil // half of a surrogate pair: it is no name that is used here
		}
		if v, err = d.ReadValue(); err != nil {
			return err
		}
		member(n, v)
	}
	_, err := d.ReadToken()
	return err
}
