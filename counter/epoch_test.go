package counter

import (
	"runtime"
	"testing"
	"time"
	"unsafe"
)

func TestStripesShareNoCacheLine(t *testing.T) {
	if got := unsafe.Sizeof(paddedStripe{}); got%paddingSize != 0 || got == 0 {
		t.Errorf("a padded stripe takes %d bytes, want a multiple of %d", got, paddingSize)
	}
	var e Epoch
	// Wherever the allocator puts e, the fields that every request reads must be a whole cache
	// line away from those that requests write.
	if gap := unsafe.Offsetof(e.stripes) - unsafe.Offsetof(e.State) - unsafe.Sizeof(e.State); gap < paddingSize {
		t.Errorf("the first stripe begins %d bytes after State, want at least %d", gap, paddingSize)
	}
}

func TestLeaveCountsItsOutcome(t *testing.T) {
	l := &recorder{t: t}
	c, err := New(Config{Window: time.Hour, Store: l, Publisher: l})
	if err != nil {
		t.Fatal(err)
	}
	e := c.Last()
	for _, tt := range []struct {
		outcome         outcome
		unique, repeats uint64
	}{
		{void, 0, 0}, {unique, 1, 0}, {repeat, 1, 1}, {unique, 2, 1}, {void, 2, 1},
	} {
		in, ok := c.Enter(e.start, 5, 1)
		if !ok || in.Epoch != e {
			t.Fatal("Enter gave no entry of the open epoch")
		}
		if e.Idle() {
			t.Error("the epoch is idle with a request in it")
		}
		in.leave(tt.outcome)
		if !e.Idle() {
			t.Error("the epoch is not idle after the request left")
		}
		if u, r := e.Unique(), e.Repeats(); u != tt.unique || r != tt.repeats {
			t.Errorf("after outcome %d the epoch has %d unique and %d repeats, want %d and %d", tt.outcome, u, r, tt.unique, tt.repeats)
		}
	}
}

// TestManyRequestsInOneStripeAreAllWaitedFor has more requests in flight with
// one hint than 16 bits can count.
func TestManyRequestsInOneStripeAreAllWaitedFor(t *testing.T) {
	l := &recorder{t: t}
	c, err := New(Config{Window: time.Hour, Store: l, Publisher: l})
	if err != nil {
		t.Fatal(err)
	}
	e := c.Last()
	in := make([]Entry, 1<<17)
	for i := range in {
		in[i], _ = c.Enter(e.start, 32, 1)
		if e.Idle() {
			t.Fatalf("idle with %d requests in flight", i+1)
		}
	}
	for i := range in {
		if e.Idle() {
			t.Fatalf("idle with %d requests in flight", len(in)-i)
		}
		in[i].Leave(1, 0, 0)
	}
	if !e.Idle() || e.Unique() != uint64(len(in)) {
		t.Errorf("idle %t, %d unique; want true, %d", e.Idle(), e.Unique(), len(in))
	}
}

func TestEnterAndLeaveAllocateNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	l := &recorder{t: t}
	c, err := New(Config{Window: time.Hour, Store: l, Publisher: l})
	if err != nil {
		t.Fatal(err)
	}
	now := c.Last().start
	for _, o := range []outcome{void, unique, repeat} {
		if n := testing.AllocsPerRun(1000, func() {
			in, _ := c.Enter(now, 3, 1)
			in.leave(o)
		}); n != 0 {
			t.Errorf("Enter and Leave(%d) allocate %v times, want 0", o, n)
		}
	}
}

// nothing is a Store and a Publisher that keeps nothing.
type nothing struct{ Publisher }

func (nothing) Open(*Epoch) State { return nil }

// TestTurnAllocatesNothing turns epochs while the closer keeps up and the ticker has made the
// spare: then the request that turns allocates nothing.
func TestTurnAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	l := &recorder{t: t}
	c, err := New(Config{Window: time.Hour, Store: nothing{}, Publisher: l})
	if err != nil {
		t.Fatal(err)
	}
	for n := range 50 {
		c.provide()
		now := c.Last().end
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		in, _ := c.Enter(now, 0, 1)
		runtime.ReadMemStats(&after)
		in.Leave(1, 0, 0)
		if got := after.Mallocs - before.Mallocs; got > 0 && n > 0 { // the first turn grows the slice of turned epochs
			t.Errorf("turn %d allocated %d times, want 0", n, got)
		}
		e, _ := c.oldest()
		if err := c.close(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
}
