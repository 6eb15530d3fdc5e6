package counter

import (
	"fmt"
	"time"
)

// clockSettle is how long Problem reports a step of the wall clock: a clock is often set twice,
// and a load balancer that polls every few seconds should see the problem. The time is bounded
// because the step may have corrected the clock.
const clockSettle = 10 * time.Second

// reading is one moment as two clocks show it, in ns.
type reading struct {
	wall int64 // Unix time, which can be set
	even int64 // time since some moment; this clock is never set, and on Linux it also runs while the machine is suspended
}

var began = time.Now()

// monotonic returns t on the clock of the process, which is never set, in ns.
func monotonic(t time.Time) int64 { return int64(t.Sub(began)) }

// Clock is what the Counter has observed of the wall clock, and of the time this process did
// not run. Without Config.MaxSkew it is zero.
type Clock struct {
	Behind  time.Duration // how far the clock is behind the start of the open epoch; 0 if it is not
	Forward uint64        // steps forward by more than MaxSkew
	Back    uint64        // steps back by more than MaxSkew
	Pauses  uint64        // how many times the process did not run for more than MaxSkew: stopped, suspended, or starved of CPU
	Paused  time.Duration // all pauses together

	// Problem is the reason why the open epoch may not be that of the present time;
	// empty if there is none. It ends when the wall clock has reached the open epoch
	// and no step was seen for clockSettle.
	Problem string
}

// clockWatch compares the two clocks at every tick of the ticker. Counter.mu guards it.
type clockWatch struct {
	skew    int64   // ns; 0: nothing is watched
	last    reading // at the last tick
	due     int64   // when the next tick is due, on the even clock, ns
	stepped reading // the clocks when the last step was noticed
	by      int64   // the size of that step, ns
	seen    Clock
}

// irregular returns by how much the wall clock was set since the last tick, and for how long
// the process did not run, in ns. Each is 0 if it is within the allowed skew.
func (w *clockWatch) irregular(now reading) (step, pause int64) {
	if w.skew == 0 || w.last == (reading{}) {
		return 0, 0
	}
	if d := (now.wall - w.last.wall) - (now.even - w.last.even); d > w.skew || d < -w.skew {
		step = d
	}
	if d := now.even - w.due; d > w.skew {
		pause = d
	}
	return step, pause
}

// look takes the reading of a tick; the next tick follows after sleep. It returns what was
// irregular since the last tick, and whether Problem has begun or ended.
func (w *clockWatch) look(now reading, e *Epoch, sleep time.Duration) (step, pause int64, changed bool) {
	if w.skew == 0 {
		return 0, 0, false
	}
	step, pause = w.irregular(now)
	w.last, w.due = now, now.even+int64(sleep)
	if step > 0 {
		w.seen.Forward++
	} else if step < 0 {
		w.seen.Back++
	}
	if step != 0 {
		w.stepped, w.by = now, step
	}
	if pause > 0 {
		w.seen.Pauses++
		w.seen.Paused += time.Duration(pause)
	}
	w.seen.Behind = time.Duration(max(0, e.start-now.wall))
	was := w.seen.Problem
	w.seen.Problem = ""
	switch {
	case int64(w.seen.Behind) > w.skew:
		w.seen.Problem = fmt.Sprintf("the clock is at %s, %v before the start of the open window: the clock was set back, or was ahead before; ids count in the window of %s until the clock passes its end",
			clockTime(now.wall), round(w.seen.Behind), clockTime(e.start))
	case w.by != 0 && now.even-w.stepped.even < int64(clockSettle):
		how, by := "forward", time.Duration(w.by)
		if by < 0 {
			how, by = "back", -by
		}
		w.seen.Problem = fmt.Sprintf("the clock was set %s by %v, to %s; ready again after %v without a step",
			how, round(by), clockTime(w.stepped.wall), clockSettle)
	}
	return step, pause, (was == "") != (w.seen.Problem == "")
}

func clockTime(ns int64) string {
	return time.Unix(0, ns).UTC().Truncate(time.Millisecond).Format(time.RFC3339Nano)
}

func round(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

// watch compares the clocks for the ticker, which then sleeps, and calls OnPause and OnClock if
// something has changed. An epoch in which the clock was set, or the process did not run, is
// not complete.
func (c *Counter) watch(now reading, sleep time.Duration) {
	c.mu.Lock()
	step, pause, changed := c.clock.look(now, c.last, sleep)
	if e := c.open.Load(); e != nil && (step != 0 || pause > 0 && now.wall-e.start > c.clock.skew) {
		e.complete = false
	}
	problem := c.clock.seen.Problem
	c.mu.Unlock()
	if pause > 0 && c.cfg.OnPause != nil {
		c.cfg.OnPause(time.Duration(pause))
	}
	if changed && c.cfg.OnClock != nil {
		c.cfg.OnClock(problem)
	}
}
