// Package dedup says whether an id is new in an epoch.
//
// A Set answers for every id of an epoch Unique exactly once, whatever number
// of requests bring it and at whatever moment the epoch turns. The epoch is
// part of the key: nothing is cleared at a turn, and what past epochs left is
// reclaimed in the background.
//
// server calls Add between entering and leaving an epoch of package counter.
package dedup

import (
	"context"
	"errors"

	"verve/counter"
)

// Verdict is a Set's answer.
type Verdict uint8

const (
	// Unique: the id was not in the epoch and is now.
	Unique Verdict = iota
	// Repeat: the id was in the epoch before.
	Repeat
	// Turned: the epoch ended while the id was looked for, and its place is in
	// use by a later one. Nothing was added; ask again in the open epoch.
	Turned
)

// ErrFull says that there is no room for another id in this epoch. Ids already
// in it are still found.
var ErrFull = errors.New("dedup: full")

// ErrUnavailable says that ids can neither be added nor looked for now.
var ErrUnavailable = errors.New("dedup: unavailable")

// Set is the contract of every store of ids.
//
// All methods are safe for concurrent use, with one rule: Add is called only
// by a request inside e, after Open(e) and before Retire(e).
type Set interface {
	// Store: Open prepares e before its first Add, Retire follows its last.
	counter.Store

	// Key returns the key of id, and has what Add will look at brought near: that is
	// under way while the caller enters an epoch, or asks for other keys. It may be
	// called outside of an epoch, once one was opened.
	Key(id []byte) Key

	// Add adds id, of which k is the key, to e and says whether it was new. After
	// an error it was not added, as far as can be known, and the request must
	// count nothing: ErrFull, ErrUnavailable, or either with its reason.
	// It keeps no reference to id. It does not retry what failed.
	Add(e *counter.Epoch, id []byte, k Key) (Verdict, error)

	// Run does the work in the background until ctx ends: growing, resizing and
	// reclaiming. Without it a Set is slower and larger, and may after many
	// epochs answer ErrFull, but never wrongly.
	Run(ctx context.Context) error

	// Stats returns a snapshot for the metrics.
	Stats() Stats

	// Close lets go of memory and connections. No Open, Add or Run may follow.
	Close() error
}

// Batcher is a Set that takes ids which arrive together faster than one by one.
type Batcher interface {
	Set

	// AddMany adds the ids of keys in their order, as so many calls of Add would,
	// and puts what it says of each into verdicts, which is at least as long. It
	// returns how many it has judged. If those are not all, of the next one Add
	// would have said the error that is returned, or with none Turned; that id and
	// those after it were not added, and are for the caller to bring again. Of a
	// verdict not yet judged it writes nothing.
	AddMany(e *counter.Epoch, keys []Key, verdicts []Verdict) (judged int, err error)
}

// Stats describes a Set. What a store does not have is zero.
type Stats struct {
	Bytes     uint64 // resident memory of the ids
	Slots     uint64 // room for ids, taken or free
	Levels    int    // tables behind each other, the deepest
	Grown     uint64 // levels added while an epoch ran
	Resized   uint64 // tables replaced by one of the right size
	Reclaimed uint64 // slots of retired epochs swept
	Full      uint64 // ids refused with ErrFull
	Kept      uint64 // bytes of the files that outlive the process
	MaxBytes  uint64 // memory the ids may take, 0: no limit
	Fit       uint64 // most ids that an epoch can hold, 0: not known
	Estimated bool   // Fit follows from MaxBytes, and is about right
	Problem   string // why ids are refused, whatever they are; empty if they are not
}
