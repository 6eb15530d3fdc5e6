package counter

import (
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// wallClock is the clock of the bubble, but it was set by set, and the machine was suspended
// for suspended.
type wallClock struct {
	began     time.Time
	set       atomic.Int64
	suspended atomic.Int64
}

func (w *wallClock) read() reading {
	now := time.Now()
	return reading{
		wall: now.UnixNano() + w.set.Load() + w.suspended.Load(),
		even: int64(now.Sub(w.began)) + w.suspended.Load(),
	}
}

func (w *wallClock) now() time.Time { return time.Unix(0, w.read().wall) }

// told collects what a Counter reports about the clock.
type told struct {
	clock  []string
	paused []time.Duration
}

func (c *told) begun() (n int) {
	for _, problem := range c.clock {
		if problem != "" {
			n++
		}
	}
	return n
}

func startClock(t *testing.T, cfg Config) (c *Counter, w *wallClock, heard *told, stop func() []Count) {
	t.Helper()
	w, heard = &wallClock{began: time.Now()}, &told{}
	l := &recorder{t: t}
	cfg.Store, cfg.Publisher, cfg.clocks = l, l, w.read
	cfg.OnClock = func(problem string) { heard.clock = append(heard.clock, problem) }
	cfg.OnPause = func(d time.Duration) { heard.paused = append(heard.paused, d) }
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Run(t.Context()) }()
	synctest.Wait()
	return c, w, heard, func() []Count {
		c.Seal()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		return l.counts()
	}
}

// TestClockProblemsComeAndGo: a problem beyond the skew is reported once, stays while the
// labels are wrong or the clock may be set again, and ends by itself.
func TestClockProblemsComeAndGo(t *testing.T) {
	for _, tt := range []struct {
		name      string
		set       time.Duration // by how much the clock is set, in the second half of a minute
		suspended time.Duration
		problem   string        // reported then; empty: none
		lasts     time.Duration // the problem lasts at least this long, and less than two seconds longer
		want      Clock
		published string // after four more minutes by a clock that was not set
	}{
		{"within the skew", 1900 * time.Millisecond, 0, "", 0, Clock{}, "0:0- 1:0 2:0 3:0 4:0-"},
		{"back within the skew", -2 * time.Second, 0, "", 0, Clock{}, "0:0- 1:0 2:0 3:0 4:0-"},
		{"back within the window", -25 * time.Second, 0, "set back by 25s", clockSettle, Clock{Back: 1}, "0:0- 1:0- 2:0 3:0 4:0-"},
		{"back by ten minutes", -10 * time.Minute, 0, "before the start of the open window", 9*time.Minute + 30*time.Second - 2*time.Second, Clock{Back: 1}, "0:0- 1:0-"},
		{"forward within the window", 25 * time.Second, 0, "set forward by 25s", clockSettle, Clock{Forward: 1}, "0:0- 1:0- 2:0 3:0 4:0 5:0-"},
		{"forward into the next", 40 * time.Second, 0, "set forward by 40s", clockSettle, Clock{Forward: 1}, "0:0- 1:0- 2:0- 3:0 4:0 5:0-"},
		{"forward by an hour", time.Hour, 0, "set forward by 1h0m0s", clockSettle, Clock{Forward: 1}, ""},
		{"suspended", 0, 3 * time.Minute, "", 0, Clock{Pauses: 1, Paused: 3 * time.Minute}, "0:0- 1:0- 2:0- 3:0- 4:0- 5:0 6:0 7:0-"},
		{"stopped within the window", 0, 5 * time.Second, "", 0, Clock{Pauses: 1, Paused: 5 * time.Second}, "0:0- 1:0- 2:0 3:0 4:0-"},
		{"stopped for a moment", 0, time.Second, "", 0, Clock{}, "0:0- 1:0 2:0 3:0 4:0-"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				base := time.Now()
				c, w, heard, stop := startClock(t, Config{Window: time.Minute, MaxSkew: 2 * time.Second})
				time.Sleep(90 * time.Second)
				w.set.Add(int64(tt.set))
				w.suspended.Add(int64(tt.suspended))
				time.Sleep(maxTick)
				synctest.Wait()
				if got := c.Stats().Clock.Problem; (got == "") != (tt.problem == "") || !strings.Contains(got, tt.problem) {
					t.Errorf("problem %q, want one with %q", got, tt.problem)
				}
				if tt.problem != "" {
					time.Sleep(tt.lasts - 2*maxTick)
					synctest.Wait()
					if c.Stats().Clock.Problem == "" {
						t.Errorf("the problem is over before %v", tt.lasts)
					}
					time.Sleep(2 * time.Second)
					synctest.Wait()
					if got := c.Stats().Clock.Problem; got != "" {
						t.Errorf("after %v: %s", tt.lasts+2*time.Second, got)
					}
				}
				time.Sleep(time.Until(base.Add(4*time.Minute + 45*time.Second)))
				synctest.Wait()
				if tt.lasts > 5*time.Minute {
					tt.published = "" // the time for it has passed
				}
				got := c.Stats().Clock
				got.Behind = 0
				if got != tt.want {
					t.Errorf("clock %+v, want %+v", got, tt.want)
				}
				if begun := heard.begun(); (begun == 1) != (tt.problem != "") || begun > 1 || begun > 0 && (len(heard.clock) != 2 || heard.clock[1] != "") {
					t.Errorf("told %q", heard.clock)
				}
				if tt.want.Pauses > 0 && !slices.Equal(heard.paused, []time.Duration{tt.suspended}) {
					// The ticker slept the rest of its tick.
					if len(heard.paused) != 1 || tt.suspended-heard.paused[0] > maxTick {
						t.Errorf("told of pauses %v, want %v", heard.paused, tt.suspended)
					}
				}
				published := stop()
				for i, p := range published[1:] {
					if !p.Start.After(published[i].Start) {
						t.Errorf("%v was published after %v", p.Start, published[i].Start)
					}
				}
				if tt.published != "" {
					wantCounts(t, base, published, tt.published)
				}
			})
		})
	}
}

// TestStartWithAClockBehind: an earlier process was in a window that the clock has not
// reached. The process goes on from there, and reports the problem until the clock has
// reached it.
func TestStartWithAClockBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := time.Now()
		c, _, heard, stop := startClock(t, Config{Window: time.Minute, MaxSkew: 2 * time.Second, NotBefore: base.Add(10 * time.Minute)})
		if got := c.Stats().Clock; got.Behind != 10*time.Minute || !strings.Contains(got.Problem, "10m0s before the start of the open window") || heard.begun() != 1 {
			t.Errorf("clock %+v, told %q", got, heard.clock)
		}
		time.Sleep(10*time.Minute - 3*time.Second)
		synctest.Wait()
		if c.Stats().Clock.Problem == "" {
			t.Error("no problem with the clock 3 s behind")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got := c.Stats().Clock; got.Problem != "" || got.Behind != time.Second || len(heard.clock) != 2 {
			t.Errorf("clock %+v, told %q", got, heard.clock)
		}
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		wantCounts(t, base, stop(), "10:0- 11:0-")
	})
}

// TestRequestThatTurnsSeesThePause: after the process was stopped, the first request may turn
// the epoch before the ticker does. Even then both epochs are marked as not complete.
func TestRequestThatTurnsSeesThePause(t *testing.T) {
	for _, tt := range []struct {
		name           string
		set, suspended time.Duration
		want           string
	}{
		{"not stopped", 0, 0, "0:1- 1:1 2:1 3:1-"},
		{"stopped to the middle of the next", 0, 40 * time.Second, "0:1- 1:1- 2:1- 3:1-"},
		{"stopped to its beginning", 0, 31 * time.Second, "0:1- 1:1- 2:1 3:1-"},
		{"set to the middle of the next", 40 * time.Second, 0, "0:1- 1:1- 2:1- 3:1-"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				base := time.Now()
				c, w, _, stop := startClock(t, Config{Window: time.Minute, MaxSkew: 2 * time.Second})
				enter(t, c, w.now(), 1, unique)
				time.Sleep(90 * time.Second)
				synctest.Wait()
				enter(t, c, w.now(), 1, unique)
				if tt.set+tt.suspended == 0 {
					time.Sleep(31 * time.Second)
				}
				w.set.Add(int64(tt.set))
				w.suspended.Add(int64(tt.suspended))
				enter(t, c, w.now(), 1, unique) // the ticker sleeps
				time.Sleep(time.Until(base.Add(3*time.Minute + time.Second - tt.set - tt.suspended)))
				synctest.Wait()
				enter(t, c, w.now(), 1, unique)
				wantCounts(t, base, stop(), tt.want)
			})
		})
	}
}

// TestStarvedTickerLosesNoEpoch: requests turn the epochs while the ticker does not run.
func TestStarvedTickerLosesNoEpoch(t *testing.T) {
	base := time.Now().Truncate(time.Hour)
	now := base
	l := &recorder{t: t}
	c, err := New(Config{Window: time.Second, Store: l, Publisher: l, MaxSkew: time.Hour, clocks: func() reading {
		return reading{now.UnixNano(), int64(now.Sub(base))}
	}})
	if err != nil {
		t.Fatal(err)
	}
	for n := range 10 {
		now = base.Add(time.Duration(n)*time.Second + time.Millisecond)
		enter(t, c, now, n, unique)
	}
	c.Seal()
	if err := c.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantCounts(t, base, l.counts(), "0:0- 1:1 2:2 3:3 4:4 5:5 6:6 7:7 8:8 9:9-")
}

// TestClocksAgree: the process's own clocks show no step.
func TestClocksAgree(t *testing.T) {
	first := readClocks()
	time.Sleep(time.Millisecond)
	second := readClocks()
	wall, even := second.wall-first.wall, second.even-first.even
	if even < int64(time.Millisecond) || wall-even > int64(time.Second) || even-wall > int64(time.Second) {
		t.Errorf("in a millisecond the wall clock went on by %d ns, the even one by %d", wall, even)
	}
}
