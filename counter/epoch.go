package counter

import (
	"sync/atomic"
	"time"
	"unsafe"
)

const (
	// stripeCount spreads the requests of an epoch over cache lines. With 32 stripes and up to
	// some 16 cores, two cores use the same stripe so rarely that the cache misses cost little;
	// a sum over the stripes takes under 100 ns.
	stripeCount = 32

	// paddingSize is two cache lines: x86 fetches them in pairs.
	paddingSize = 128
)

// stripe is one share of an epoch's counters. A request adds to it twice: when it enters, and,
// by its outcome, when it leaves. Leaving is the same step as counting the outcome: a request
// cannot be seen to have left before it is counted.
type stripe struct {
	entered atomic.Uint64
	unique  atomic.Uint64 // left with a new id
	repeats atomic.Uint64 // left with an id already seen
	void    atomic.Uint64 // left and counted nothing
}

// idle reports true if at some moment of the call no request was in the stripe. It first reads
// how many requests have left, and then how many have entered. No count ever falls, and no
// request leaves before it enters: so if the two are equal, every request that had entered had
// left.
func (s *stripe) idle() bool {
	left := s.unique.Load() + s.repeats.Load() + s.void.Load()
	return s.entered.Load() == left
}

type paddedStripe struct {
	stripe
	_ [paddingSize - unsafe.Sizeof(stripe{})%paddingSize]byte
}

// Epoch is one window of time and what was counted in it. Unless noted otherwise, its fields
// are set before it is opened and do not change while a request can be in it. All methods are
// safe for concurrent use.
type Epoch struct {
	number    int64  // start / window
	serial    uint64 // 1 for the first epoch, without gaps in a process
	start     int64  // Unix time, ns
	end       int64  // Unix time, ns: when the next one is due
	window    int64  // its length, ns; it may end earlier before a change of the length
	label     []byte // start, RFC 3339
	before    int64  // start of the epoch opened before it; of the window before it if there was none; Unix time, ns
	recovered bool   // counted by an earlier process

	// inexact is set by MarkInexact, and read when the count of the epoch is final.
	inexact atomic.Bool

	// Set by the turns and the clock watch, with Counter.mu held, before the closer sees the
	// epoch.
	complete bool  // the epoch before it ended when it began, it was open until its end, the process ran all the time, and the clock was not set
	gap      int64 // the start of the epoch opened next, if epochs between the two were skipped; 0: none were; Unix time, ns

	// State is what the Store returned from Open: set before the first request can enter,
	// and nil again once it is retired.
	State State

	keys Keys
	owed KeyCounts // of a recovered epoch: the counts by key that its record gets

	// Every request reads end and State, and the requests of the first stripe write that
	// stripe: the two must not share a cache line.
	_       [paddingSize]byte
	stripes [stripeCount]paddedStripe
}

// Number returns the number of the epoch: its start divided by the window.
func (e *Epoch) Number() int64 { return e.number }

// Serial returns how many epochs were opened up to this one: they are numbered without gaps,
// from 1, or from the serial of the Past.
func (e *Epoch) Serial() uint64 { return e.serial }

// Start returns the start of the window, UTC.
func (e *Epoch) Start() time.Time { return time.Unix(0, e.start).UTC() }

// Window returns the length of the window.
func (e *Epoch) Window() time.Duration { return time.Duration(e.window) }

// End returns when the next epoch is due, UTC: at the end of the window, or earlier if the
// length of the windows changes then.
func (e *Epoch) End() time.Time { return time.Unix(0, e.end).UTC() }

// Before returns the start of the epoch that was opened before this one, UTC; if there was
// none, or after FollowsWindow, the start of the window before this one.
func (e *Epoch) Before() time.Time { return time.Unix(0, e.before).UTC() }

// Label returns Start in RFC 3339 with as many digits as needed. Read only.
func (e *Epoch) Label() []byte { return e.label }

// Keys returns the keys of the epoch. The Store counts into them.
func (e *Epoch) Keys() *Keys { return &e.keys }

// FollowsWindow makes Before return the start of the window before this one, even if this
// process did not open that. A Store that is shared with other instances, which may have opened
// it, calls FollowsWindow in Open.
func (e *Epoch) FollowsWindow() { e.before = e.start - e.window }

// MarkInexact marks the epoch as one whose ids may have been lost or forgotten: its count
// gets Exact false. A Store that knows this when the epoch opens calls it in Open.
func (e *Epoch) MarkInexact() { e.inexact.Store(true) }

// Exact reports whether MarkInexact was not called.
func (e *Epoch) Exact() bool { return !e.inexact.Load() }

// Unique sums the unique ids. While requests are in flight it is not a snapshot: it includes
// every request that left before the call, and may include some that left during the call.
func (e *Epoch) Unique() uint64 {
	var n uint64
	for i := range e.stripes {
		n += e.stripes[i].unique.Load()
	}
	return n
}

// Repeats sums the ids answered as already seen. While requests are in flight it is no more a
// snapshot than Unique.
func (e *Epoch) Repeats() uint64 {
	var n uint64
	for i := range e.stripes {
		n += e.stripes[i].repeats.Load()
	}
	return n
}

// Idle reports whether it saw each stripe, one after the other, without a request in it. The
// result is only meaningful for an epoch that is no longer open: a request that enters later
// sees the turn and backs out. A Store may rely on it for all but the two newest epochs.
func (e *Epoch) Idle() bool {
	for i := range e.stripes {
		if !e.stripes[i].idle() {
			return false
		}
	}
	return true
}

// retire makes the Store release what it holds for the epoch, which is published, and which no
// request can be in. If a request breaks that rule and uses State, it fails on nil instead of
// reading freed memory.
func (e *Epoch) retire() {
	if e.State != nil {
		e.State.Retire()
		e.State = nil
	}
}

// Entry stands for the requests that one Enter put into an epoch. The epoch is not sealed
// before Leave.
type Entry struct {
	*Epoch
	stripe *stripe
}

// Leave counts how many of the requests had a new id, how many an id already seen, and how many
// counted nothing. With that the requests have left the epoch. It must be called exactly once,
// with numbers that add up to the n of Enter: otherwise the epoch is never sealed.
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
