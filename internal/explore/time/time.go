// Package time has what the product uses of time. A scenario that has called Start has
// a clock of its own: it stands, until a step of the schedule moves it to the next timer
// that is due. Without one every rate allows a POST at once (Until), and the rest is that
// of time.
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

// Clock is the time of a scenario. It is of the location of the channels, on which timers
// send.
type Clock struct {
	Now    Time
	Ahead  Duration // how far it has moved while a thread could go on
	Idle   func()   // called when it has moved because none could
	timers []*Timer
	ended  bool
}

var clock *Clock // of the scenario that runs

// Start gives a scenario a clock, and the thread that moves it to the next timer: so many
// times at any moment, and then when no thread can go on. That needs a bound on
// preemptions: whether a thread can go on does not depend on one location, which sleep sets
// are about. Start uses Cleanup.
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

// next is the timer that is due first; nil: there is none.
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

// Timer is a time.Timer of a clock.
type Timer struct {
	C     <-chan Time
	c     chan Time
	f     func() // called in the place of a send
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

// AfterFunc has the thread of the clock call f, which is as if no other timer were due until
// f has ended.
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

// Stop, and Reset, leave nothing in the channel, as those of time do.
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
