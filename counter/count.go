package counter

import (
	"context"
	"time"
)

// Count is the outcome of one sealed epoch. It is final: no request is in the epoch any
// more.
type Count struct {
	Start    time.Time     // start of the window, UTC
	Window   time.Duration // length of the window
	Unique   uint64        // ids answered as new
	Repeats  uint64        // ids answered as already seen
	Complete bool          // this process served the whole window
	Exact    bool          // false if the process knows of something that may have lost ids
	SealedAt time.Time     // when the last request left the epoch, UTC
	Keys     KeyCounts     // how many of Unique are under each key; empty if no key was used
}

// Span is a window of time, the same for every instance that counts it.
type Span struct {
	Start  time.Time     // UTC
	Window time.Duration // length
}

// End returns the end of the window.
func (s Span) End() time.Time { return s.Start.Add(s.Window) }

// Span returns the window that c counts.
func (c Count) Span() Span { return Span{c.Start, c.Window} }

// Claim is the answer of a group when an instance wants to write the line of a window into its
// counts file. Exactly one instance of the group writes that line.
type Claim struct {
	Mine    bool // this instance writes the line
	Written bool // the line is in a counts file of the group: no instance writes it
	Unknown bool // an earlier writer may have written the line into this file without reporting it
}

// Published is what a publisher has published of its last window.
type Published struct {
	Last   time.Time // the start of that window; zero: nothing was published
	Unique uint64    // the sum of the records for that window
	Keys   KeyCounts // the same for each key

	// KeysLost: some of the ids in Unique are under keys, and Keys does not count all of these.
	KeysLost bool
}

// LastOf returns the start of the last window that any of the publishers has published; zero if
// none has. No publisher may open an earlier window, because another one may have to publish
// the count of that.
func LastOf(published map[string]Published) (last time.Time) {
	for _, p := range published {
		if p.Last.After(last) {
			last = p.Last
		}
	}
	return last
}

// Publisher takes the counts of sealed epochs, in order of their start.
//
// Publish returns nil only when a crash of the process can no longer lose the count; it does
// not wait for the broker. It retries by itself what can be retried, and gives up only when ctx
// ends. One goroutine at a time calls it.
type Publisher interface {
	Publish(ctx context.Context, c Count) error // see above; an error means that the count is still the caller's
}
