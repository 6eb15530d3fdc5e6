package counter

import (
	"sync/atomic"
	"time"
	"unsafe"
)

const (
	// stripeCount spreads the requests of an epoch over cache lines. 32 stripes
	// keep the chance that two of a machine's cores meet in one below the cost
	// of a miss up to some 16 cores; a sum over them takes under 100 ns.
	stripeCount = 32

	// paddingSize is two cache lines: x86 fetches them in pairs.
	paddingSize = 128
)

// stripe is one share of an epoch's counters. A request counts twice: when it enters, and by
// its outcome when it leaves. So the act of leaving is the count itself: a request cannot be seen
// to have left before it is counted.
type stripe struct {
	entered atomic.Uint64
	unique  atomic.Uint64 // left with a new id
	repeats atomic.Uint64 // left with an id already seen
	void    atomic.Uint64 // left and counted nothing
}

// idle reports whether no request was in the stripe at one moment of the call. It reads
// the requests that left first: no count ever falls and no request leaves before it
// enters, so if as many had entered afterwards, all of them had left before.
func (s *stripe) idle() bool {
	left := s.unique.Load() + s.repeats.Load() + s.void.Load()
	return s.entered.Load() == left
}

type paddedStripe struct {
	stripe
	_ [paddingSize - unsafe.Sizeof(stripe{})%paddingSize]byte
}

// Epoch is one window of time and what was counted in it. Its fields are set before it is
// opened and do not change while a request can be in it. All methods are safe for
// concurrent use.
type Epoch struct {
	number    int64  // start / window
	serial    uint64 // 1 for the first epoch, without gaps in a process
	start     int64  // Unix time, ns
	end       int64  // Unix time, ns: when the next one is due
	window    int64  // its length, ns; it ends before that where the length changes
	label     []byte // start, RFC 3339
	before    int64  // start of the epoch before it, or of the window before; Unix time, ns
	recovered bool   // counted by an earlier process

	// inexact is set by MarkInexact, and read when the count of the epoch is final.
	inexact atomic.Bool

	// Set by the turns and the clock watch, before the closer sees the epoch. Counter.mu is held.
	complete bool  // opened at its start, from the epoch before, and left at its end; the process ran then, and the clock was not set
	gap      int64 // the start of the next one opened, if there are epochs between; Unix time, ns

	// State is what the Store returned from Open: set before the first request can enter,
	// and nil again once it is retired.
	State State

	keys Keys
	owed KeyCounts // of a recovered epoch: what its record is to have by key

	// Every request reads end and State, and every request of the first stripe
	// writes there: they must not share a cache line.
	_       [paddingSize]byte
	stripes [stripeCount]paddedStripe
}

// Number returns the number of the epoch: its start divided by the window.
func (e *Epoch) Number() int64 { return e.number }

// Serial counts the epochs opened, without gaps: from 1, or on from the Past.
func (e *Epoch) Serial() uint64 { return e.serial }

// Start returns the start of the window, UTC.
func (e *Epoch) Start() time.Time { return time.Unix(0, e.start).UTC() }

// Window returns the length of the window.
func (e *Epoch) Window() time.Duration { return time.Duration(e.window) }

// End returns when the next epoch is due, UTC: the end of the window, or before it
// where the length of the windows changes.
func (e *Epoch) End() time.Time { return time.Unix(0, e.end).UTC() }

// Before returns the start of the epoch opened before it, UTC; of the window before, if
// there was none.
func (e *Epoch) Before() time.Time { return time.Unix(0, e.before).UTC() }

// Label returns Start in RFC 3339 with as many digits as needed. Read only.
func (e *Epoch) Label() []byte { return e.label }

// Keys returns the keys of the epoch. The Store counts into them.
func (e *Epoch) Keys() *Keys { return &e.keys }

// FollowsWindow has Before return the start of the window before, also if that was not opened. A
// Store that others have opened it in calls it in Open.
func (e *Epoch) FollowsWindow() { e.before = e.start - e.window }

// MarkInexact marks the epoch as one whose ids may have been lost or forgotten: its count
// gets Exact false. A Store that knows this when the epoch opens calls it in Open.
func (e *Epoch) MarkInexact() { e.inexact.Store(true) }

// Exact reports whether MarkInexact was not called.
func (e *Epoch) Exact() bool { return !e.inexact.Load() }

// Unique sums the unique ids. While requests are in flight it is not a
// snapshot: it has counted every request that left before the call and may
// have counted some that left during it.
func (e *Epoch) Unique() uint64 {
	var n uint64
	for i := range e.stripes {
		n += e.stripes[i].unique.Load()
	}
	return n
}

// Repeats sums the ids answered as already seen, with Unique's weak promise.
func (e *Epoch) Repeats() uint64 {
	var n uint64
	for i := range e.stripes {
		n += e.stripes[i].repeats.Load()
	}
	return n
}

// Idle reports whether every stripe was seen without a request in it. The result is only
// meaningful for an epoch that is no longer open: later Enters see the turn and back out.
// A Store may rely on it for all but the two newest epochs.
func (e *Epoch) Idle() bool {
	for i := range e.stripes {
		if !e.stripes[i].idle() {
			return false
		}
	}
	return true
}

// retire lets the Store go of the epoch: it is published, and no request can be in it. A
// request that adds to it against the rules fails, instead of reading freed memory.
func (e *Epoch) retire() {
	if e.State != nil {
		e.State.Retire()
		e.State = nil
	}
}

// Entry is some requests inside an epoch, which is not sealed before Leave.
type Entry struct {
	*Epoch
	stripe *stripe
}

// Leave counts how many of the requests had a new id, one that was there, and neither,
// and by that ends their stay in the epoch. It must be called exactly once, with numbers
// that add up to as many as entered: else the epoch is never sealed.
func (e Entry) Leave(unique, repeats, void uint64) {
	if unique > 0 {
		e.stripe.unique.Add(unique)
	}
	if repeats > 0 {
		e.stripe.repeats.Add(repeats)
	}
	if void > 0 {
		e.stripe.void.Add(void)
	}
}
