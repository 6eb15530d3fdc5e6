package stream

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
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
	WindowStart time.Time `json:"window_start"` // that of the record, like all fields but Key and Unique
	WindowMS    int64     `json:"window_ms"`    // see WindowStart
	Key         string    `json:"key"`          // 1 to 128 bytes
	Unique      uint64    `json:"unique"`       // ids answered as new under the key, at least 1
	Scope       Scope     `json:"scope"`        // see WindowStart
	Group       string    `json:"group"`        // see WindowStart
	Instance    string    `json:"instance"`     // see WindowStart
	Seq         uint64    `json:"seq"`          // see WindowStart
}

// record returns a Record with the fields that r shares with the record that it belongs to.
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

// parseKeyRecord accepts only the bytes that keyJSON writes: see parseRecord.
func parseKeyRecord(b []byte) (KeyRecord, error) {
	var r KeyRecord
	if err := json.Unmarshal(b, &r); err != nil {
		return KeyRecord{}, fmt.Errorf("parse record of a key: %w", err)
	}
	of := r.record()
	if err := cmp.Or(of.check(), checkKey([]byte(r.Key)), checkKeyUnique(r.Unique)); err != nil {
		return KeyRecord{}, fmt.Errorf("parse record of a key: %w", err)
	}
	if !bytes.Equal(newKeyJSON(&of).line([]byte(r.Key), r.Unique), b) {
		return KeyRecord{}, errors.New("parse record of a key: not in canonical form")
	}
	r.WindowStart = r.WindowStart.UTC()
	return r, nil
}

func checkKey(key []byte) error {
	switch {
	case len(key) == 0 || len(key) > counter.MaxKeyLen:
		return fmt.Errorf("a key has %d bytes, the limits are 1 and %d", len(key), counter.MaxKeyLen)
	case !utf8.Valid(key):
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

func checkKeys(keys counter.KeyCounts) error {
	for key, unique := range keys.All() {
		if err := cmp.Or(checkKey(key), checkKeyUnique(unique)); err != nil {
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
	// The first match is ours: no text of a user precedes it.
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

// line returns the bytes of one KeyRecord.
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
