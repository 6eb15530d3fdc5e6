package counter

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// recorder is the Store and the Publisher of the tests. It checks the order in
// which they are called and keeps what was published.
type recorder struct {
	t testing.TB

	// fault, if set, decides for each Publish which error to return, and whether the count is
	// kept in spite of the error, as after a lost acknowledgement.
	fault func(Count) (err error, kept bool)

	mu        sync.Mutex
	opened    []*Epoch
	published []Count
	retired   int // how many of opened, in their order
}

// retire is the State of an epoch that only reports its end.
type retire func()

func (r retire) Retire() { r() }

func (l *recorder) Open(e *Epoch) State {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(l.opened); n > 0 && e.Number() <= l.opened[n-1].Number() {
		l.t.Errorf("epoch %d was opened after %d", e.Number(), l.opened[n-1].Number())
	}
	if want := uint64(len(l.opened)) + 1; e.Serial() != want {
		l.t.Errorf("epoch %d has serial %d, want %d", e.Number(), e.Serial(), want)
	}
	l.opened = append(l.opened, e)
	return retire(func() { l.retire(e) })
}

func (l *recorder) Publish(_ context.Context, c Count) (err error) {
	kept := true
	if l.fault != nil {
		err, kept = l.fault(c)
	}
	if !kept {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(l.published); n > 0 && l.fault == nil && !c.Start.After(l.published[n-1].Start) {
		l.t.Errorf("%v was published after %v", c.Start, l.published[n-1].Start)
	}
	l.published = append(l.published, c)
	return err
}

func (l *recorder) retire(e *Epoch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e != l.opened[l.retired] {
		l.t.Errorf("epoch %d was retired, want %d", e.Number(), l.opened[l.retired].Number())
	}
	l.retired++
	if !e.Idle() {
		l.t.Errorf("epoch %d was retired with a request in it", e.Number())
	}
	if n := len(l.published); n == 0 || !l.published[n-1].Start.Equal(e.Start()) {
		l.t.Errorf("epoch %d was retired before it was published", e.Number())
	}
}

func (l *recorder) counts() []Count {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]Count(nil), l.published...)
}

// start runs a Counter over l in a synctest bubble. stop seals it, waits for
// Run and returns what was published.
func start(t *testing.T, l *recorder, window time.Duration) (c *Counter, stop func() []Count) {
	t.Helper()
	c, err := New(Config{Window: window, Store: l, Publisher: l})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Run(t.Context()) }()
	return c, func() []Count {
		t.Helper()
		c.Seal()
		if err := <-ended; err != nil {
			t.Errorf("Run returned %v after Seal, want nil", err)
		}
		if l.retired != len(l.opened) {
			t.Errorf("%d of %d epochs were retired", l.retired, len(l.opened))
		}
		return l.counts()
	}
}

// outcome is what a request of a test does in its epoch.
type outcome uint8

const (
	void   outcome = iota // counted nothing
	unique                // the id was new
	repeat                // the id was there
)

// leave leaves the epoch for one request with the outcome o.
func (e Entry) leave(o outcome) {
	var n [3]uint64
	n[o] = 1
	e.Leave(n[unique], n[repeat], n[void])
}

// enter makes n requests that arrive at now and have the outcome o.
func enter(t *testing.T, c *Counter, now time.Time, n int, o outcome) *Epoch {
	t.Helper()
	var in Entry
	for i := range n {
		var ok bool
		if in, ok = c.Enter(now.UnixNano(), uint64(i), 1); !ok {
			t.Fatal("Enter: sealed")
		}
		in.leave(o)
	}
	return in.Epoch
}

// show writes counts as text: start relative to base, in windows, and what was
// counted. A "-" marks those that are not complete.
func show(base time.Time, counts []Count) string {
	var b strings.Builder
	for i, c := range counts {
		if i > 0 {
			b.WriteByte(' ')
		}
		fmt.Fprintf(&b, "%d:%d", c.Start.Sub(base)/c.Window, c.Unique)
		if c.Repeats > 0 {
			fmt.Fprintf(&b, "+%d", c.Repeats)
		}
		if !c.Complete {
			b.WriteByte('-')
		}
		if !c.Exact {
			b.WriteByte('?')
		}
	}
	return b.String()
}

func wantCounts(t *testing.T, base time.Time, got []Count, want string) {
	t.Helper()
	if s := show(base, got); s != want {
		t.Errorf("published %q, want %q", s, want)
	}
}

// In a bubble the clock starts at midnight, the start of a window.

func TestIdleEpochsPublishZeroOnTime(t *testing.T) {
	for _, window := range []time.Duration{MinWindow, time.Second, time.Minute, MaxWindow} {
		t.Run(window.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				base := time.Now()
				time.Sleep(window / 3)
				c, stop := start(t, &recorder{t: t}, window)
				for n := range 4 {
					time.Sleep(time.Until(base.Add(time.Duration(n+1)*window - 1)))
					synctest.Wait()
					if got := c.Last().Start(); !got.Equal(base.Add(time.Duration(n) * window)) {
						t.Errorf("a moment before its end the epoch of %v is not open but %v", base.Add(time.Duration(n)*window), got)
					}
					time.Sleep(time.Nanosecond)
					synctest.Wait()
					if got := c.Last().Start(); !got.Equal(base.Add(time.Duration(n+1) * window)) {
						t.Errorf("at %v the epoch of %v is open", time.Now(), got)
					}
				}
				got := stop()
				wantCounts(t, base, got, "0:0- 1:0 2:0 3:0 4:0-")
				for _, c := range got[:4] {
					if late := c.SealedAt.Sub(c.Start.Add(c.Window)); late != 0 {
						t.Errorf("%v was sealed %v after its end", c.Start, late)
					}
				}
			})
		})
	}
}

// TestEpochsThatBeganElsewhereAreNotExact: epochs that begin after InexactBefore are exact.
func TestEpochsThatBeganElsewhereAreNotExact(t *testing.T) {
	for _, tt := range []struct {
		before time.Time
		want   bool
	}{{time.Time{}, true}, {time.Now(), false}, {time.Now().Add(-2 * time.Hour), true}} {
		l := &recorder{t: t}
		c, err := New(Config{Window: time.Hour, Store: l, Publisher: l, InexactBefore: tt.before})
		if err != nil {
			t.Fatal(err)
		}
		if got := c.Last().Exact(); got != tt.want {
			t.Errorf("ids were counted elsewhere until %v: exact %t, want %t", tt.before, got, tt.want)
		}
	}
}

func TestFirstRequestAfterTheEndTurnsTheEpoch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := time.Now()
		c, stop := start(t, &recorder{t: t}, time.Minute)
		enter(t, c, base, 2, unique)
		enter(t, c, base.Add(time.Minute-1), 3, unique)
		enter(t, c, base.Add(time.Minute), 5, unique) // the ticker has not run yet
		if start, unique := c.Last().Start(), c.Last().Unique(); !start.Equal(base.Add(time.Minute)) || unique != 5 {
			t.Errorf("Live is %v, %d; want %v, 5", start, unique, base.Add(time.Minute))
		}
		wantCounts(t, base, stop(), "0:5- 1:5-")
	})
}

// TestEpochThatTheGroupSealedIsLeftOnce: the clock of this process lags, and the Store
// reports that. Requests with the lagging time count in the next epoch, and labels still
// increase when the clock has caught up.
func TestEpochThatTheGroupSealedIsLeftOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := time.Now()
		c, stop := start(t, &recorder{t: t}, time.Minute)
		first := enter(t, c, base, 2, unique)
		var both sync.WaitGroup
		for range 8 {
			both.Go(func() { c.TurnFrom(first) }) // only the first of them turns
		}
		both.Wait()
		if e := enter(t, c, base.Add(59*time.Second), 3, unique); e.Number() != first.Number()+1 {
			t.Errorf("after the turn epoch %d is open, want %d", e.Number(), first.Number()+1)
		}
		c.TurnFrom(first) // long left
		enter(t, c, base.Add(time.Minute), 5, unique)
		enter(t, c, base.Add(2*time.Minute), 7, unique)
		wantCounts(t, base, stop(), "0:2- 1:8 2:7-")
		c.TurnFrom(c.Last())
		if _, open := c.Enter(base.Add(3*time.Minute).UnixNano(), 0, 1); open {
			t.Error("TurnFrom opened an epoch after Seal")
		}
	})
}

func TestSkippedEpochsArePublishedEmptyAndNotComplete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := time.Now()
		c, stop := start(t, &recorder{t: t}, time.Minute)
		at := func(n int) time.Time { return base.Add(time.Duration(n) * time.Minute) }
		enter(t, c, at(1), 1, unique)
		enter(t, c, at(2), 2, unique) // 1 is complete
		enter(t, c, at(6), 6, unique) // no request and no tick came at the end of 2
		enter(t, c, at(7), 7, unique) // 6 was opened late
		enter(t, c, at(8), 8, unique) // 7 is complete
		wantCounts(t, base, stop(), "0:0- 1:1 2:2- 3:0- 4:0- 5:0- 6:6- 7:7 8:8-")
		if got := c.Stats().Skipped; got != 3 {
			t.Errorf("skipped %d epochs, want 3", got)
		}
	})
}

// TestEpochsAreReportedInOrder, also those around a gap: the live page relies on the order.
func TestEpochsAreReportedInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := time.Now()
		var reported []Count
		l := &recorder{t: t}
		c, err := New(Config{Window: time.Minute, Store: l, Publisher: l, OnClose: func(n Count, _ time.Duration, _ error) { reported = append(reported, n) }})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() { done <- c.Run(t.Context()) }()
		enter(t, c, base, 1, unique)
		enter(t, c, base.Add(3*time.Minute), 2, unique)
		c.Seal()
		if err := <-done; err != nil {
			t.Error(err)
		}
		wantCounts(t, base, reported, "0:1- 1:0- 2:0- 3:2-")
	})
}

func TestLongGapPublishesABoundedNumberOfEpochs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := time.Now()
		c, stop := start(t, &recorder{t: t}, MinWindow)
		const gap = 100_000
		enter(t, c, base, 1, unique)
		enter(t, c, base.Add(gap*MinWindow), 2, unique)
		got := stop()
		if len(got) != maxSkipped+2 {
			t.Fatalf("published %d counts, want %d", len(got), maxSkipped+2)
		}
		wantCounts(t, base, got[:2], fmt.Sprintf("0:1- %d:0-", gap-maxSkipped))
		wantCounts(t, base, got[maxSkipped:], fmt.Sprintf("%d:0- %d:2-", gap-1, gap))
		if got := c.Stats().Skipped; got != gap-1 {
			t.Errorf("skipped %d epochs, want %d", got, gap-1)
		}
	})
}

// TestStopLeavesOutSkippedEpochs: a stop whose time is over while skipped epochs are published
// goes on with the epoch after them, whose ids need a record.
func TestStopLeavesOutSkippedEpochs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := time.Now()
		ctx, stop := context.WithCancel(t.Context())
		l := &recorder{t: t}
		l.fault = func(c Count) (error, bool) {
			if c.Unique == 0 {
				stop() // while the first skipped epoch is published
			}
			return nil, true
		}
		c, err := New(Config{Window: time.Minute, Store: l, Publisher: l})
		if err != nil {
			t.Fatal(err)
		}
		enter(t, c, base, 1, unique)
		enter(t, c, base.Add(time.Hour), 2, unique)
		c.Seal()
		if err := c.Run(ctx); err != nil {
			t.Error(err)
		}
		wantCounts(t, base, l.counts(), "0:1- 1:0- 60:2-")
	})
}

// TestClockStepsNeverReopenNorMerge sets the clock back and forth: the ticker,
// which reads the bubble's clock, then sees a time long past.
func TestClockStepsNeverReopenNorMerge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := time.Now()
		c, stop := start(t, &recorder{t: t}, time.Minute)
		at := func(n int) time.Time { return base.Add(time.Duration(n) * time.Minute) }
		enter(t, c, at(0), 1, unique)
		five := enter(t, c, at(5), 5, unique)
		for _, back := range []time.Time{at(0), at(4), at(5).Add(-1), base.Add(-1000 * time.Hour)} {
			if e := enter(t, c, back, 1, unique); e != five {
				t.Errorf("a request of %v entered the epoch of %v, want that of %v", back, e.Start(), five.Start())
			}
		}
		time.Sleep(3 * time.Minute) // the ticker works on times before epoch 5
		if e := enter(t, c, at(6).Add(-1), 1, unique); e != five {
			t.Errorf("the epoch of %v is open, want that of %v", e.Start(), five.Start())
		}
		enter(t, c, at(6), 6, unique)
		wantCounts(t, base, stop(), "0:1- 1:0- 2:0- 3:0- 4:0- 5:10- 6:6-")
	})
}

// TestRandomStepsAgreeWithAModel lets requests of random times enter, stay and
// leave, over any steps of the clock, and compares what is published with a
// plain model of the rules.
func TestRandomStepsAgreeWithAModel(t *testing.T) {
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			const window = time.Minute // long, so that the ticker, which uses the clock of the bubble, turns no epoch
			base := time.Now()
			l := &recorder{t: t}
			c, stop := start(t, l, window)

			type epoch struct {
				unique, repeats uint64
				complete        bool
			}
			model := map[int64]*epoch{0: {}} // by the number of windows since base
			open := int64(0)
			type stay struct {
				Entry
				epoch int64
			}
			var inside []stay
			leave := func(i int) {
				o := outcome(rnd.IntN(3))
				switch m := model[inside[i].epoch]; o {
				case unique:
					m.unique++
				case repeat:
					m.repeats++
				}
				inside[i].leave(o)
				inside[i] = inside[len(inside)-1]
				inside = inside[:len(inside)-1]
			}
			now := base
			for range 300 {
				switch rnd.IntN(10) {
				case 0: // the clock is set, back more often than forward
					now = now.Add(time.Duration(rnd.IntN(20)-13) * window / 2)
				case 1, 2:
					now = now.Add(time.Duration(rnd.Int64N(int64(window))))
				case 3:
					now = now.Truncate(window).Add(window - 1 + time.Duration(rnd.IntN(2)))
				case 4:
					time.Sleep(drainMax)
					synctest.Wait()
					if len(inside) > 0 {
						first := inside[0].epoch
						for _, s := range inside {
							first = min(first, s.epoch)
						}
						for _, p := range l.counts() {
							if int64(p.Start.Sub(base)/window) >= first {
								t.Fatalf("seed %d: %v was published with a request in it or before it", seed, p.Start)
							}
						}
					}
				case 5, 6:
					if len(inside) > 0 {
						leave(rnd.IntN(len(inside)))
					}
				default:
					in, ok := c.Enter(now.UnixNano(), rnd.Uint64(), 1)
					if !ok {
						t.Fatal("sealed")
					}
					if n := numberOf(now, base, window); n > open {
						if n == open+1 {
							model[n] = &epoch{complete: true}
						} else {
							model[open].complete = false
							for k := open + 1; k <= n; k++ {
								model[k] = &epoch{}
							}
						}
						open = n
					}
					if got := int64(in.Start().Sub(base) / window); got != open {
						t.Fatalf("seed %d: a request of %v entered %d, want %d", seed, now, got, open)
					}
					inside = append(inside, stay{in, open})
				}
			}
			for len(inside) > 0 {
				leave(0)
			}
			model[open].complete = false // by Seal
			got := stop()
			if len(got) != len(model) {
				t.Errorf("seed %d: published %d counts, want %d", seed, len(got), len(model))
			}
			for i, g := range got {
				m := model[int64(i)]
				if n := int64(g.Start.Sub(base) / window); n != int64(i) || m == nil ||
					g.Unique != m.unique || g.Repeats != m.repeats || g.Complete != m.complete {
					t.Errorf("seed %d: published %+v as number %d, want %+v", seed, g, i, m)
				}
			}
		})
	}
}

func numberOf(now, base time.Time, window time.Duration) int64 {
	d := now.Sub(base)
	if d < 0 {
		return -1
	}
	return int64(d / window)
}

func TestSealPublishesTheLastEpochAsPartial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := time.Now()
		c, stop := start(t, &recorder{t: t}, time.Minute)
		enter(t, c, base.Add(time.Minute), 3, unique)
		enter(t, c, base.Add(time.Minute), 2, repeat)
		last, _ := c.Enter(base.Add(time.Minute).UnixNano(), 9, 1)
		time.Sleep(90 * time.Second)
		c.Seal()
		c.Seal() // a second call does nothing
		for _, now := range []time.Time{base, time.Now(), base.Add(24 * time.Hour)} {
			if _, ok := c.Enter(now.UnixNano(), 0, 1); ok {
				t.Errorf("Enter(%v) succeeded after Seal", now)
			}
		}
		time.Sleep(time.Minute)
		last.Leave(1, 0, 0) // this request was inside before Seal, so it counts
		wantCounts(t, base, stop(), "0:0- 1:4+2-")
		if start, unique := c.Last().Start(), c.Last().Unique(); !start.Equal(base.Add(time.Minute)) || unique != 4 {
			t.Errorf("after Seal Live is %v, %d; want the sealed epoch, 4", start, unique)
		}
	})
}

// TestStuckPublisherKeepsWhatCountsAlone: while nothing can be published, epochs that counted
// nothing take no memory beyond a bound, and no epoch that counted something is lost. The
// dropped epochs are published later as skipped ones: empty and not complete.
func TestStuckPublisherKeepsWhatCountsAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := time.Now()
		l := &stuckLedger{recorder: &recorder{t: t}, stuck: make(chan struct{})}
		c, err := New(Config{Window: time.Minute, Store: l, Publisher: l})
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- c.Run(t.Context()) }()
		const turns = maxWaiting + 500
		want := map[int]uint64{0: 1, maxWaiting + 100: 5, turns: 7}
		for n := range turns + 1 {
			enter(t, c, base.Add(time.Duration(n)*time.Minute), int(want[n]), unique)
			if want[n] == 0 { // a request arrives, and is refused
				in, _ := c.Enter(base.Add(time.Duration(n)*time.Minute).UnixNano(), 0, 1)
				in.Keys().Add(1, []byte("key"))
				in.Leave(0, 0, 1)
			}
		}
		if got := c.Stats().Unclosed; got > maxWaiting+2 {
			t.Errorf("%d epochs wait, want %d at most", got, maxWaiting+2)
		}
		close(l.stuck)
		c.Seal()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		got := l.counts()
		for i, g := range got {
			if n := int(g.Start.Sub(base) / time.Minute); n != i || g.Unique != want[i] {
				t.Fatalf("record %d is of minute %d with %d, want %d", i, n, g.Unique, want[i])
			}
			if g.Complete && i >= maxWaiting && want[i] == 0 {
				t.Errorf("minute %d is complete", i)
			}
		}
		if len(got) != turns+1 || len(l.opened) != l.retiredAll {
			t.Errorf("%d records, want %d; %d of %d epochs were retired", len(got), turns+1, l.retiredAll, len(l.opened))
		}
		if n := c.keys.used.Load(); n != 0 {
			t.Errorf("%d bytes of keys are not given back", n)
		}
	})
}

// stuckLedger publishes nothing until stuck is closed.
type stuckLedger struct {
	*recorder
	stuck      chan struct{}
	retiredAll int
}

func (l *stuckLedger) Publish(ctx context.Context, c Count) error {
	<-l.stuck
	return l.recorder.Publish(ctx, c)
}

func (l *stuckLedger) Open(e *Epoch) State {
	l.recorder.Open(e)
	return retire(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.retiredAll++
		if !e.Idle() {
			l.t.Errorf("epoch %d was retired with a request in it", e.Number())
		}
	})
}

// TestHeldEntryDelaysOnlyPublishing holds one request in an epoch for over a
// minute of one-second windows.
func TestHeldEntryDelaysOnlyPublishing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := time.Now()
		l := &recorder{t: t}
		c, stop := start(t, l, time.Second)
		enter(t, c, base, 1, unique)
		held, _ := c.Enter(base.UnixNano(), 7, 1)
		for n := 1; n <= 61; n++ {
			time.Sleep(time.Second)
			synctest.Wait()
			if got := c.Last().Start(); !got.Equal(time.Now()) {
				t.Fatalf("at %v the epoch of %v is open", time.Now(), got)
			}
			enter(t, c, time.Now(), n, unique)
		}
		if got := c.Stats(); got.Unclosed != 61 || got.Unique != 1+61*62/2 {
			t.Errorf("Stats %+v, want 61 unclosed epochs and %d unique ids", got, 1+61*62/2)
		}
		if got := l.counts(); len(got) > 0 {
			t.Errorf("published %s with a request in the first epoch", show(base, got))
		}
		held.Leave(1, 0, 0)
		time.Sleep(drainMax)
		synctest.Wait()
		got := l.counts()
		if len(got) != 61 || got[0].Unique != 2 || got[60].Unique != 60 {
			t.Errorf("published %s, want 61 epochs, the first with 2", show(base, got))
		}
		if at := got[0].SealedAt; at.Before(base.Add(61 * time.Second)) {
			t.Errorf("sealed at %v, before the last request left", at)
		}
		stop()
	})
}

func TestBlockedPublisherDelaysNoTurnAndLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := time.Now()
		unblock := make(chan struct{})
		l := &recorder{t: t}
		l.fault = func(Count) (error, bool) { <-unblock; return nil, true }
		c, stop := start(t, l, time.Second)
		for n := range 100 {
			enter(t, c, time.Now(), n, unique)
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if got := c.Stats(); got.Unclosed != 100 || got.Unique != 99*100/2 {
			t.Errorf("Stats %+v, want 100 unclosed epochs and %d unique ids", got, 99*100/2)
		}
		close(unblock)
		got := stop()
		if len(got) != 101 {
			t.Fatalf("published %d counts, want 101", len(got))
		}
		for n, g := range got[:100] {
			if g.Unique != uint64(n) || !g.Start.Equal(base.Add(time.Duration(n)*time.Second)) {
				t.Errorf("count %d is %+v", n, g)
			}
		}
	})
}

// TestFailedPublishEndsRunAndKeepsTheCount has a Publisher that gives up. The count stays with
// the Counter: its epoch is not retired, it is still in Stats, and the next Run publishes it
// and the following ones.
func TestFailedPublishEndsRunAndKeepsTheCount(t *testing.T) {
	for name, kept := range map[string]bool{"not stored": false, "stored": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				base := time.Now()
				broken := errors.New("broken")
				fail := true
				l := &recorder{t: t}
				l.fault = func(c Count) (error, bool) {
					if fail && c.Unique == 2 {
						return broken, kept
					}
					return nil, true
				}
				var outcomes []error
				c, err := New(Config{Window: time.Second, Store: l, Publisher: l, OnClose: func(_ Count, _ time.Duration, err error) {
					outcomes = append(outcomes, err)
				}})
				if err != nil {
					t.Fatal(err)
				}
				enter(t, c, base, 1, unique)
				enter(t, c, base.Add(time.Second), 2, unique)
				enter(t, c, base.Add(2*time.Second), 3, unique)
				if err := c.Run(t.Context()); !errors.Is(err, broken) {
					t.Errorf("Run returned %v, want %v", err, broken)
				}
				if len(outcomes) != 2 || outcomes[0] != nil || !errors.Is(outcomes[1], broken) {
					t.Errorf("OnClose was told %v", outcomes)
				}
				if s := c.Stats(); s.Unclosed != 1 || s.Unique != 6 || l.retired != 1 {
					t.Errorf("Stats %+v and %d retired, want 1 unclosed, 6 unique ids, 1 retired", s, l.retired)
				}
				fail = false
				c.Seal()
				if err := c.Run(t.Context()); err != nil {
					t.Errorf("the second Run returned %v", err)
				}
				want := "0:1- 1:2 2:3-"
				if kept {
					want = "0:1- 1:2 1:2 2:3-" // the Publisher must recognize a count that it has kept
				}
				wantCounts(t, base, l.counts(), want)
				if s := c.Stats(); s.Unclosed != 0 || s.Unique != 6 || l.retired != 3 {
					t.Errorf("Stats %+v and %d retired, want 0 unclosed, 6 unique ids, 3 retired", s, l.retired)
				}
			})
		})
	}
}

// TestRunEndsWithItsContext in each place where Run can wait. The bubble fails the test if a
// goroutine is left.
func TestRunEndsWithItsContext(t *testing.T) {
	for name, prepare := range map[string]func(c *Counter){
		"idle":     func(*Counter) {},
		"draining": func(c *Counter) { c.Enter(time.Now().UnixNano(), 0, 1); c.Seal() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := &recorder{t: t}
				c, err := New(Config{Window: time.Minute, Store: l, Publisher: l})
				if err != nil {
					t.Fatal(err)
				}
				prepare(c)
				ctx, stop := context.WithTimeout(t.Context(), time.Second)
				defer stop()
				if err := c.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("Run returned %v, want the context's error", err)
				}
				if got := l.counts(); len(got) > 0 {
					t.Errorf("published %d counts of epochs that are not sealed", len(got))
				}
			})
		})
	}
}

func TestFirstEpochIsNotBeforeTheLastPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now() // midnight
		for _, tt := range []struct {
			window    time.Duration
			notBefore time.Time
			want      time.Time
		}{
			{time.Minute, time.Time{}, now},
			{time.Minute, now.Add(-time.Minute), now},
			{time.Minute, now, now}, // a restart within the epoch
			{time.Minute, now.Add(time.Minute), now.Add(time.Minute)},
			{time.Minute, now.Add(5 * time.Hour), now.Add(5 * time.Hour)}, // the clock was set back
			// The windows were shorter before: the long window around the last start begins
			// before that start.
			{time.Hour, now.Add(36 * time.Minute), now.Add(time.Hour)},
			{time.Hour, now.Add(-24 * time.Minute), now},
			{time.Hour, time.Unix(-1, 0), now},
		} {
			l := &recorder{t: t}
			c, err := New(Config{Window: tt.window, Store: l, Publisher: l, NotBefore: tt.notBefore})
			if err != nil {
				t.Fatal(err)
			}
			if got := c.Last().Start(); !got.Equal(tt.want) {
				t.Errorf("window %v, not before %v: opened %v, want %v", tt.window, tt.notBefore, got, tt.want)
			}
			if e := enter(t, c, now, 1, unique); !e.Start().Equal(tt.want) {
				t.Errorf("window %v, not before %v: entered %v, want %v", tt.window, tt.notBefore, e.Start(), tt.want)
			}
		}
	})
}

func TestNumberRoundsDownAlsoBefore1970(t *testing.T) {
	for _, tt := range []struct{ ns, at int64 }{
		{0, 0}, {1, 0}, {1e9 - 1, 0}, {1e9, 1}, {-1, -1}, {-1e9, -1}, {-1e9 - 1, -2},
	} {
		if at := floor(tt.ns, int64(time.Second)); at != tt.at {
			t.Errorf("at %d ns the epoch is %d, want %d", tt.ns, at, tt.at)
		}
	}
	c := &Counter{cfg: Config{Window: time.Second}}
	e := c.newEpoch(nil, -2e9, 1e9)
	if got := string(e.Label()); got != "1969-12-31T23:59:58Z" || e.Number() != -2 {
		t.Errorf("label of epoch %d is %s", e.Number(), got)
	}
}

func TestNewNamesTheBadSetting(t *testing.T) {
	l := &recorder{t: t}
	for _, tt := range []struct {
		cfg  Config
		want string
	}{
		{Config{Window: MinWindow - 1, Store: l, Publisher: l}, "Window"},
		{Config{Window: MaxWindow + 1, Store: l, Publisher: l}, "Window"},
		{Config{Store: l, Publisher: l}, "Window"},
		{Config{Window: time.Minute, Publisher: l}, "Store"},
		{Config{Window: time.Minute, Store: l}, "Publish"},
	} {
		if _, err := New(tt.cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("New(%+v): %v, want an error about %s", tt.cfg, err, tt.want)
		}
	}
}
