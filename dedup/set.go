// Package dedup decides whether an id is new in an epoch.
//
// A Set answers Unique exactly once for each id of an epoch, no matter how many requests have
// the id and when the epoch turns. The epoch is part of the key: nothing is cleared at a turn,
// and the slots of past epochs are reclaimed in the background.
//
// server calls AddMany between entering and leaving an epoch of package counter.
package dedup

import (
	"context"
	"errors"
	"fmt"

	"verve/counter"
)

// Verdict is a Set's answer.
type Verdict uint8

const (
	// Unique: the id was not in the epoch before, and now is.
	Unique Verdict = iota
	// Repeat: the id was already in the epoch.
	Repeat
	// Replayed: the id is in the epoch, and the request that was answered Unique for it had the
	// same token. Nothing was added.
	Replayed
	// ReplayedBefore: the same, but in the window directly before this one. Nothing was added.
	ReplayedBefore
	// ReplayedAfter: the same, but in the window directly after this one, which another instance
	// has opened already. Nothing was added.
	ReplayedAfter
	// Turned: the epoch has ended, and a later epoch uses the place of the id, or a request
	// with a token came too late for its epoch. Nothing was added; ask again in the open epoch.
	Turned
	// Full: there is no room for another id in this epoch.
	Full
	// Unavailable: ids can neither be added nor looked up now.
	Unavailable

	Verdicts = iota // how many there are
)

// IsReplay reports whether v is the answer to a retry of an attempt that was Unique.
func (v Verdict) IsReplay() bool { return v >= Replayed && v <= ReplayedAfter }

// Refusal returns the verdict on an id that could not be judged because of err: Full for
// ErrFull, otherwise Unavailable.
func Refusal(err error) Verdict {
	if errors.Is(err, ErrFull) {
		return Full
	}
	return Unavailable
}

// Options are what a request may send with an id. Each field may be empty. The caller must not
// change them after a call of Set.Keys, which stores a hash in them.
type Options struct {
	Under []byte // the key under which the id is counted, 1 to 128 bytes: an id is unique within its key
	Token []byte // names the attempt to count the id, 1 to 64 bytes: its retries have the same one

	name uint64 // a hash of Under; 0: not made yet. Ids that share their options make it once.
}

// Item is an id to be judged.
type Item struct {
	ID      []byte   // 1 to 256 bytes
	Key     Key      // set by Set.Keys
	Options *Options // nil: none. Several items may share them.
}

// ErrFull means that there is no room for another id in this epoch. Ids already in it are
// still found.
var ErrFull = errors.New("dedup: full")

// ErrTooManyKeys means that the epoch has as many keys as it may (counter.Config.MaxKeys).
var ErrTooManyKeys = fmt.Errorf("%w: too many keys in one window", ErrFull)

// ErrUnavailable means that ids can be neither added nor looked up now.
var ErrUnavailable = errors.New("dedup: unavailable")

// Set is the contract of every store of ids.
//
// All methods are safe for concurrent use, with one rule: AddMany is called
// only by requests inside e, after Open(e) and before e.State.Retire().
type Set interface {
	// Store: Open(e) comes before the first AddMany for e. Retire of the State that Open
	// returned comes after the last.
	counter.Store

	// Keys sets the Key of each item from its ID and its Options, and prefetches the cache
	// lines that AddMany will read, so that the cache misses overlap with each other and with
	// entering the epoch. The caller need not be inside an epoch, but the first epoch must have
	// been opened.
	Keys(items []Item)

	// AddMany judges items, each by itself and in their order. It writes its verdicts into
	// verdicts, which must be as long as items and hold Turned everywhere. An item that is Full
	// or Unavailable was, as far as the Set can know, not added, and counts nothing; the error
	// is the reason of the first such item. An item that stays Turned was not added: its
	// request asks again in the open epoch. An id that is in items twice is judged twice.
	// AddMany keeps no reference to items. It counts an id that is Unique under a key in
	// e.Keys.
	AddMany(e *counter.Epoch, items []Item, verdicts []Verdict) error

	// Run does the work in the background until ctx ends: growing, resizing and reclaiming.
	// Without it a Set is slower and larger, and may answer ErrFull after many epochs, but it
	// never gives a wrong verdict.
	Run(ctx context.Context) error

	// Stats returns a snapshot for the metrics.
	Stats() Stats

	// Close releases memory and connections. No Open, AddMany or Run may follow, and no
	// second Close.
	Close() error
}

// Stats describes a Set. A field that a kind of Set does not have is zero.
type Stats struct {
	Bytes     uint64 // resident memory of the ids
	Slots     uint64 // slots for ids, taken or free
	Levels    int    // depth of the deepest chain of levels: a table grows by adding levels
	Grown     uint64 // levels added while an epoch ran
	Resized   uint64 // tables that were replaced by one of a better size
	Reclaimed uint64 // slots of past epochs that were emptied
	Full      uint64 // ids refused with ErrFull
	Kept      uint64 // bytes of the files that keep ids for the next process
	MaxBytes  uint64 // memory the ids may take, 0: no limit
	Fit       uint64 // how many ids an epoch can hold at most, 0: not known
	Estimated bool   // Fit is an estimate from MaxBytes
	Problem   string // why all new ids are refused; empty if they are not
}
