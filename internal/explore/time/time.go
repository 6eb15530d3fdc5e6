// Package time has the part of the API of time that the product uses. A scenario that has
// called Start has a clock of its own, which stands still until a step of the schedule moves it
// to the next timer. Without such a clock, Until returns a duration with which every rate
// allows a POST at once, and everything else is that of time.
package time

import (
	real "time"

	"verve/internal/explore"
)

type (
	Time     = real.Time
	Duration = real.Duration
)

const (
	Second = real.Second
	Minute = real.Minute
)

func Unix(sec, nsec int64) Time { return real.Unix(sec, nsec) }

// Clock is the time of a scenario. For the search its location is that of the channels, because
// timers send on channels.
type Clock struct {
	Now    Time
	Ahead  Duration // how far the clock has moved while another thread could go on
	Idle   func()   // called when the clock has moved because no other thread could go on
	timers []*Timer
	ended  bool
}

var clock *Clock // the clock of the running scenario

// Start gives a scenario a clock, and a thread that moves the clock to the next timer: up to
// moves times at any moment, and after that only if no other thread can go on. This needs a
// bound on preemptions: whether a thread can go on does not depend on one location, as sleep
// sets assume. Start uses Run.Cleanup.
func Start(r *explore.Run, moves int) *Clock {
	c := &Clock{Now: real.Unix(1<<30, 0)}
	clock = c
	r.Cleanup(func() { clock = nil })
	r.Go("clock", func() {
		ready := func() bool { return c.ended || c.next() != nil }
		for ; ; moves-- {
			if moves > 0 {
				explore.Until(ready, "time passes", explore.Channels())
			} else {
				explore.Idle(ready, "time passes when all wait", explore.Channels())
			}
			if c.ended {
				return
			}
			t := c.next()
			by := max(t.at.Sub(c.Now), 0)
			c.Now = c.Now.Add(by)
			t.armed = false
			if t.f != nil {
				t.f()
			} else {
				t.c <- c.Now
			}
			if moves > 0 {
				c.Ahead += by
			} else if c.Idle != nil {
				c.Idle()
			}
		}
	})
	return c
}

// End ends the thread of the clock.
func (c *Clock) End() {
	explore.Do(explore.Write, "end of the clock", explore.Channels())
	c.ended = true
}

// next returns the timer that is due first; nil if there is none.
func (c *Clock) next() (first *Timer) {
	for _, t := range c.timers {
		if t.armed && (first == nil || t.at.Before(first.at)) {
			first = t
		}
	}
	return first
}

func Now() Time {
	if clock == nil {
		return real.Now()
	}
	explore.Do(explore.Read, "now", explore.Channels())
	return clock.Now
}

func Since(t Time) Duration { return Now().Sub(t) }

func Until(t Time) Duration {
	if clock == nil {
		return -1
	}
	return t.Sub(Now())
}

// Timer is a time.Timer on the clock of a scenario.
type Timer struct {
	C     <-chan Time
	c     chan Time
	f     func() // called instead of a send
	at    Time
	armed bool
}

func NewTimer(d Duration) *Timer {
	if clock == nil {
		panic("explore: a timer, and no clock")
	}
	c := make(chan Time, 1)
	t := &Timer{C: c, c: c}
	t.Reset(d)
	clock.timers = append(clock.timers, t)
	return t
}

// AfterFunc makes the thread of the clock call f, so no other timer is due until f has ended.
func AfterFunc(d Duration, f func()) *Timer {
	t := NewTimer(d)
	t.f = f
	return t
}

func (t *Timer) Reset(d Duration) bool {
	was := t.Stop()
	t.at, t.armed = clock.Now.Add(d), true
	return was
}

// Stop and Reset leave no value in the channel, as those of package time.
func (t *Timer) Stop() bool {
	explore.Do(explore.Write, "timer", explore.Channels())
	was := t.armed
	t.armed = false
	select {
	case <-t.c:
	default:
	}
	return was
}
