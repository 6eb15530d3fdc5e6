package stream

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	"verve/counter"
)

// KeyRecord is the part of a record's Unique that was counted under one key. A record
// with keys is published with one for each of them, and all are visible or none is. The
// sum of Unique over the KeyRecords of a record, and the ids without a key, are the
// record's Unique.
//
// The order of the fields is the order of the bytes.
type KeyRecord struct {
	WindowStart time.Time `json:"window_start"` // that of the record, as what follows but Key and Unique
	WindowMS    int64     `json:"window_ms"`    // see WindowStart
	Key         string    `json:"key"`          // 1 to 128 bytes
	Unique      uint64    `json:"unique"`       // ids answered as new under the key, at least 1
	Scope       Scope     `json:"scope"`        // see WindowStart
	Group       string    `json:"group"`        // see WindowStart
	Instance    string    `json:"instance"`     // see WindowStart
	Seq         uint64    `json:"seq"`          // see WindowStart
}

// record has what r says about the record that it belongs to.
func (r *KeyRecord) record() Record {
	return Record{WindowStart: r.WindowStart, WindowMS: r.WindowMS, Scope: r.Scope, Group: r.Group, Instance: r.Instance, Seq: r.Seq}
}

// RecordKey is the identity of the record that r belongs to.
func (r *KeyRecord) RecordKey() string {
	of := r.record()
	return of.Key()
}

// ID is the identity of r: at most one KeyRecord with it is visible.
func (r *KeyRecord) ID() string { return r.RecordKey() + "/" + r.Key }

// parseKeyRecord accepts exactly the bytes that a KeyRecord is written as, as
// parseRecord does.
func parseKeyRecord(b []byte) (KeyRecord, error) {
	var r KeyRecord
	if err := json.Unmarshal(b, &r); err != nil {
		return KeyRecord{}, fmt.Errorf("parse record of a key: %w", err)
	}
	of := r.record()
	if err := cmp.Or(of.check(), checkKey(r.Key), checkKeyUnique(r.Unique)); err != nil {
		return KeyRecord{}, fmt.Errorf("parse record of a key: %w", err)
	}
	if !bytes.Equal(newKeyJSON(&of).line([]byte(r.Key), r.Unique), b) {
		return KeyRecord{}, errors.New("parse record of a key: not in canonical form")
	}
	r.WindowStart = r.WindowStart.UTC()
	return r, nil
}

func checkKey(key string) error {
	switch {
	case key == "" || len(key) > counter.MaxKeyLen:
		return fmt.Errorf("a key has %d bytes, the limits are 1 and %d", len(key), counter.MaxKeyLen)
	case !utf8.ValidString(key):
		return fmt.Errorf("key %q is not valid UTF-8", key)
	}
	return nil
}

func checkKeyUnique(n uint64) error {
	if n == 0 {
		return errors.New("a key without ids has no record")
	}
	return checkUnique(n)
}

func checkKeys(keys []counter.KeyCount) error {
	var pace counter.Pace
	for _, k := range keys {
		pace.Step()
		if err := cmp.Or(checkKey(k.Key), checkKeyUnique(k.Unique)); err != nil {
			return err
		}
	}
	return nil
}

// keyJSON writes the KeyRecords of one record: most of their bytes are the same. With
// encoding/json 100,000 of them take ten times as long.
type keyJSON struct{ before, between, after []byte }

func newKeyJSON(r *Record) *keyJSON {
	const unescaped = " " // stands where key and unique will
	all := appendUnescaped(nil, KeyRecord{
		WindowStart: r.WindowStart.UTC(), WindowMS: r.WindowMS, Key: unescaped,
		Scope: r.Scope, Group: r.Group, Instance: r.Instance, Seq: r.Seq,
	})
	// The first is ours: in what precedes it there is no text of anybody.
	before, rest, _ := bytes.Cut(all, []byte(`" "`))
	between, after, _ := bytes.Cut(rest, []byte("0"))
	return &keyJSON{before, between, after}
}

func (j *keyJSON) append(b, key []byte, unique uint64) []byte {
	b = append(b, j.before...)
	if isPlain(key) {
		b = append(append(append(b, '"'), key...), '"')
	} else {
		b = appendUnescaped(b, string(key))
	}
	b = append(b, j.between...)
	return append(strconv.AppendUint(b, unique, 10), j.after...)
}

// isPlain reports whether JSON has the bytes of a key as they are.
func isPlain(key []byte) bool {
	for _, c := range key {
		if c < ' ' || c >= 0x7f || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}

// line returns one of them.
func (j *keyJSON) line(key []byte, unique uint64) []byte {
	const room = len(`""`) + len("18446744073709551615")
	return j.append(make([]byte, 0, len(j.before)+len(j.between)+len(j.after)+len(key)+room), key, unique)
}

// appendUnescaped appends the JSON of v, in which only what JSON demands is escaped.
func appendUnescaped(b []byte, v any) []byte {
	buf := bytes.NewBuffer(b)
	enc := json.NewEncoder(buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		panic(err) // strings, numbers and a time whose year was checked
	}
	return bytes.TrimSuffix(buf.Bytes(), []byte{'\n'})
}

// packedKeys are the keys of a record as the spool keeps them: for each the length of its
// name, its name, and its count. Nil: none. They are in pieces, each of whole keys: memory of
// a megabyte and more would be cleared in one stretch, while requests wait.
type packedKeys [][]byte

const (
	// keyPiece is the size of a piece. It is written to a file in some 10 us.
	keyPiece = 16 << 10

	// maxPackedKey is how many bytes of it one key takes at most.
	maxPackedKey = 2 + counter.MaxKeyLen + binary.MaxVarintLen64
)

func packKeys(keys []counter.KeyCount) (p packedKeys) {
	var piece []byte
	var pace counter.Pace
	for i, k := range keys {
		pace.Step()
		if piece == nil {
			piece = make([]byte, 0, keyPiece)
		}
		piece = binary.AppendUvarint(piece, uint64(len(k.Key)))
		piece = append(piece, k.Key...)
		piece = binary.AppendUvarint(piece, k.Unique)
		if i == len(keys)-1 {
			return append(p, bytes.Clone(piece)) // a record with few keys takes little
		}
		if len(piece)+maxPackedKey > keyPiece {
			p, piece = append(p, piece), nil
		}
	}
	return nil
}

// firstKey takes the first key off b; ok: b has all of it.
func firstKey(b []byte) (key []byte, unique uint64, rest []byte, ok bool) {
	size, n := binary.Uvarint(b)
	if n <= 0 || size > uint64(len(b)-n) {
		return nil, 0, b, false
	}
	key, rest = b[n:n+int(size)], b[n+int(size):]
	if unique, n = binary.Uvarint(rest); n <= 0 {
		return nil, 0, b, false
	}
	return key, unique, rest[n:], true
}

// all yields each key, as a part of p, and its count. Bytes that packKeys did not make end
// it early: the spool compares the number of keys with that in the record.
func (p packedKeys) all() iter.Seq2[[]byte, uint64] {
	return func(yield func([]byte, uint64) bool) {
		for _, piece := range p {
			for len(piece) > 0 {
				key, unique, rest, ok := firstKey(piece)
				if !ok || !yield(key, unique) {
					return
				}
				piece = rest
			}
		}
	}
}

// size is how many bytes they take.
func (p packedKeys) size() (n int) {
	for _, piece := range p {
		n += len(piece)
	}
	return n
}

func (p packedKeys) unpack() (keys []counter.KeyCount) {
	for key, unique := range p.all() {
		keys = append(keys, counter.KeyCount{Key: string(key), Unique: unique})
	}
	return keys
}

// sumKeys returns the sums of some.
func sumKeys(all ...packedKeys) packedKeys {
	all = slices.DeleteFunc(all, func(p packedKeys) bool { return len(p) == 0 })
	if len(all) == 0 {
		return nil
	}
	if len(all) == 1 {
		return all[0]
	}
	var sums []counter.KeyCount
	at := make(map[string]int)
	for _, p := range all {
		for key, unique := range p.all() {
			if i, again := at[string(key)]; again {
				sums[i].Unique += unique
				continue
			}
			k := counter.KeyCount{Key: string(key), Unique: unique}
			at[k.Key] = len(sums)
			sums = append(sums, k)
		}
	}
	return packKeys(sums)
}
