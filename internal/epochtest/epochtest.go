// Package epochtest has what the tests of every set share, including those inside package
// dedup: epochs that a test turns by hand, and ids that are easily mistaken for one another.
package epochtest

import (
	"context"
	"testing"
	"time"

	"verve/counter"
)

// Nobody is a counter.Publisher that publishes nothing: the tests read the counts of the
// epochs.
type Nobody struct {
	Counts chan counter.Count // gets the counts; nil: they are dropped
}

// Publish passes the count to the test, or drops it.
func (n Nobody) Publish(_ context.Context, c counter.Count) error {
	if n.Counts != nil {
		n.Counts <- c
	}
	return nil
}

// Window is a length with which the present window began minutes ago and does not end before
// the tests do. So a counter does not turn an epoch by itself in the middle of a test, as it
// would at the end of an hour if Window were an hour.
var Window = func() time.Duration {
	now := time.Now().UnixNano()
	for w := counter.MaxWindow; ; w -= time.Second { // about a fifth of the lengths qualify
		if since := time.Duration(now % int64(w)); w/10 < since && since < w/3 {
			return w
		}
	}
}()

// Epochs lets a test turn epochs by hand: entering at At(n), a time inside the n-th epoch,
// opens that epoch.
type Epochs struct {
	*counter.Counter
	base int64
}

// New starts a counter on s. When the test is over it seals the counter and waits until every
// epoch is retired. So a cleanup that was registered before New can close the store.
func New(t testing.TB, s counter.Store) Epochs { return NewWithin(t, s, 0) }

// NewWithin is New with at most maxKeys keys in an epoch; 0: the default.
func NewWithin(t testing.TB, s counter.Store, maxKeys int) Epochs {
	c, err := counter.New(counter.Config{Window: Window, Store: s, Publisher: Nobody{}, MaxKeys: maxKeys})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	t.Cleanup(func() {
		c.Seal()
		// Bounded, because a test that failed may have left a request inside an epoch.
		defer time.AfterFunc(5*time.Second, stop).Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return Epochs{c, c.Last().Start().UnixNano()}
}

// At returns the start of the n-th epoch, from 0, in Unix ns.
func (e Epochs) At(n int) int64 { return e.base + int64(n)*int64(Window) }

// Alike are different ids that a careless set would treat as equal.
var Alike = []string{
	"0", "00", "42", "042", "+42", " 42", "42.0", "0x2a", "٤٢",
	"18446744073709551615", "18446744073709551616", "9223372036854775807",
	"3f333df6-90a4-4fda-8dd3-9485d27cee36", "3F333DF6-90A4-4FDA-8DD3-9485D27CEE36",
	"3f333df690a44fda8dd39485d27cee36", "{3f333df6-90a4-4fda-8dd3-9485d27cee36}",
	"00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff",
	"00000000-0000-0000-0000-00000000002a",
	"a", "A", "\u00e9", "e\u0301", "a\x00", "a\x00\x00",
}
