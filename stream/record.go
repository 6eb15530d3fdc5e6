package stream

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"verve/counter"
)

// Scope is what a record counts: the ids of one process, or those of all
// processes that share a store.
type Scope string

const (
	ScopeInstance Scope = "instance" // the ids of one process
	ScopeGroup    Scope = "group"    // the ids of all processes of the group
)

// Record is the published count of one epoch. It is final: it is never revised
// and never sent with another value. The sum of Unique over all records of a
// window is the number of ids that were answered as new in it.
//
// The order of the fields is the order of the bytes. parseRecord takes these bytes only, so
// a new field needs omitempty, as Keys has it: a record of an earlier version lacks it.
type Record struct {
	WindowStart time.Time `json:"window_start"`   // UTC
	WindowMS    int64     `json:"window_ms"`      // length of the window, milliseconds
	Unique      uint64    `json:"unique"`         // ids answered as new
	Scope       Scope     `json:"scope"`          // whose ids
	Group       string    `json:"group"`          // name of the group
	Instance    string    `json:"instance"`       // empty in group scope
	Seq         uint64    `json:"seq"`            // from 1 without gaps per instance; 0 in group scope
	Complete    bool      `json:"complete"`       // the process served the whole window
	Exact       bool      `json:"exact"`          // a promise: README.md, "Eight words"
	Keys        uint64    `json:"keys,omitempty"` // keys that have ids: as many KeyRecords belong to it; absent: none
	SealedAt    time.Time `json:"sealed_at"`      // UTC, milliseconds
}

// The header that every Kafka record has, so that a consumer can distinguish
// a later schema from this one without parsing the value.
const (
	schemaHeader  = "verve-schema"
	schemaVersion = "1"
)

// maxName bounds group and instance: both go into the key, the transactional id
// and the topic's every record. 249 is what Kafka allows a topic name.
const maxName = 249

// checkName returns an error for a text that cannot be a part of a record's key. A slash
// would make two different pairs of group and instance share one key.
func checkName(what, s string) error {
	switch {
	case s == "":
		return fmt.Errorf("%s is empty", what)
	case len(s) > maxName:
		return fmt.Errorf("%s is %d bytes long, the limit is %d", what, len(s), maxName)
	case !utf8.ValidString(s):
		return fmt.Errorf("%s %q is not valid UTF-8", what, s)
	case strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f || r == '/' }):
		return fmt.Errorf("%s %q holds a slash or a control character", what, s)
	}
	return nil
}

func (r *Record) window() time.Duration { return time.Duration(r.WindowMS) * time.Millisecond }

// Span returns the window that r counts.
func (r *Record) Span() counter.Span {
	return counter.Span{Start: r.WindowStart.UTC(), Window: r.window()}
}

// end is the end of the window and the timestamp of the Kafka record.
func (r *Record) end() time.Time { return r.WindowStart.Add(r.window()) }

// check returns an error for a record that this package neither writes nor reads: a
// reader may rely on that.
func (r *Record) check() error {
	switch r.Scope {
	case ScopeInstance:
		if err := checkName("instance", r.Instance); err != nil {
			return err
		}
		if r.Seq == 0 {
			return errors.New("seq of an instance starts at 1")
		}
	case ScopeGroup:
		if r.Instance != "" || r.Seq != 0 {
			return errors.New("a group record has neither instance nor seq")
		}
	default:
		return fmt.Errorf("unknown scope %q", r.Scope)
	}
	if r.WindowMS <= 0 || r.WindowMS > maxWindowMS {
		return fmt.Errorf("window_ms %d is out of range", r.WindowMS)
	}
	if y := r.WindowStart.UTC().Year(); y < 1970 || y > maxYear {
		return fmt.Errorf("window_start in year %d", y)
	}
	if err := checkUnique(r.Unique); err != nil {
		return err
	}
	return checkName("group", r.Group)
}

func checkUnique(n uint64) error {
	if n > maxUnique {
		return fmt.Errorf("unique %d is more than a server counts", n)
	}
	return nil
}

const (
	// maxYear is the last whole year whose times fit into 64 bits of nanoseconds, by which
	// readers identify windows.
	maxYear = 2261

	// maxUnique ids would take 8 TB of memory, at 8 bytes each. The limit keeps the sums of
	// readers within 64 bits.
	maxUnique = 1 << 40
)

// maxWindowMS is far above any window that the server accepts; it keeps
// window() from overflowing.
const maxWindowMS = int64(366 * 24 * time.Hour / time.Millisecond)

// appendJSON appends the record's bytes, which are the same for the same record
// wherever it is written: times are RFC 3339 in UTC with only as many fractional
// digits as are needed, names are escaped only where JSON demands it.
func (r *Record) appendJSON(b []byte) ([]byte, error) {
	if err := r.check(); err != nil {
		return b, err
	}
	c := *r
	c.WindowStart, c.SealedAt = r.WindowStart.UTC(), r.SealedAt.UTC()
	return appendUnescaped(b, &c), nil
}

// parseRecord accepts only the bytes that appendJSON writes: unknown, missing, repeated
// or reordered fields, other spellings of a time or a number, and trailing bytes are
// errors. A reader that sums counts must not guess.
func parseRecord(b []byte) (Record, error) {
	var r Record
	if err := json.Unmarshal(b, &r); err != nil {
		return Record{}, fmt.Errorf("parse record: %w", err)
	}
	canonical, err := r.appendJSON(nil)
	if err != nil {
		return Record{}, fmt.Errorf("parse record: %w", err)
	}
	if !bytes.Equal(canonical, b) {
		return Record{}, errors.New("parse record: not in canonical form")
	}
	r.WindowStart, r.SealedAt = r.WindowStart.UTC(), r.SealedAt.UTC()
	return r, nil
}

// Key is the record's identity: at most one record with it is visible.
func (r *Record) Key() string {
	k := r.Group + "/" + r.WindowStart.UTC().Format(time.RFC3339Nano)
	if r.Scope == ScopeGroup {
		return k
	}
	return k + "/" + r.Instance + "/" + strconv.FormatUint(r.Seq, 10)
}

// identity returns the name of the series that the record is a part of: GROUP/INSTANCE, or
// GROUP if the whole group counts as one. It determines the partition and the transactional id.
func (r *Record) identity() string {
	if r.Scope == ScopeGroup {
		return r.Group
	}
	return r.Group + "/" + r.Instance
}
