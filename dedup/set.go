// Package dedup decides whether an id is new in an epoch.
//
// A Set answers Unique exactly once for each id of an epoch, whatever number of requests
// have it and whenever the epoch turns. The epoch is part of the key: nothing is cleared
// at a turn, and the slots of past epochs are reclaimed in the background.
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
	// Unique: the id was not in the epoch and is now.
	Unique Verdict = iota
	// Repeat: the id was in the epoch before.
	Repeat
	// Replayed: the id is in the epoch, and the request that was answered Unique had the
	// same token. Nothing was added.
	Replayed
	// ReplayedBefore: the same of the window before the epoch.
	ReplayedBefore
	// Turned: the epoch ended while the id was looked for, and its place is in
	// use by a later one. Nothing was added; ask again in the open epoch.
	Turned
	// Full: there is no room for another id in this epoch.
	Full
	// Unavailable: ids can neither be added nor looked for now.
	Unavailable

	Verdicts = iota // how many there are
)

// Refusal is the verdict on an id that could not be judged because of err.
func Refusal(err error) Verdict {
	if errors.Is(err, ErrFull) {
		return Full
	}
	return Unavailable
}

// Options are what a request has with an id. Each may be empty. They must not change after a
// call of Set.Keys, which stores a hash in them.
type Options struct {
	Under []byte // the key under which the id is counted, 1 to 128 bytes: an id is unique within its key
	Token []byte // names the attempt to count the id, 1 to 64 bytes: its retries have the same one

	name uint64 // a hash of Under; 0: not made yet. Ids that share their options make it once.
}

// Item is an id to be judged.
type Item struct {
	ID      []byte   // 1 to 256 bytes
	Key     Key      // as Set.Keys sets it
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
	// Store: Open prepares e before its first AddMany, the Retire of what it returns
	// follows the last.
	counter.Store

	// Keys sets the Key of each item, by its ID and its Options, and prefetches the cache
	// lines that AddMany will read, so that the misses overlap with each other and with
	// entering the epoch. It may be called outside of an epoch, once one was opened.
	Keys(items []Item)

	// AddMany judges items, each on its own and in their order, and writes its verdicts
	// into verdicts, which is as long and holds Turned everywhere. An item that is
	// Full or Unavailable was not added, as far as can be known, and counts nothing;
	// err is the reason of the first of them. An item that stays Turned was not added:
	// its request asks again in the open epoch. The same id twice is judged twice.
	// Nothing of items is kept. An id that is Unique under a key was counted in e.Keys.
	AddMany(e *counter.Epoch, items []Item, verdicts []Verdict) error

	// Run does the work in the background until ctx ends: growing, resizing and
	// reclaiming. Without it a Set is slower and larger, and may after many
	// epochs answer ErrFull, but never wrongly.
	Run(ctx context.Context) error

	// Stats returns a snapshot for the metrics.
	Stats() Stats

	// Close releases memory and connections. No Open, AddMany or Run may follow, and no
	// second Close.
	Close() error
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
