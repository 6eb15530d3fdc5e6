package counter

import (
	"testing"
	"testing/synctest"
	"time"
)

// pastLedger is a recorder that begins where an earlier process ended.
type pastLedger struct {
	*recorder
	inexact bool // what Open finds
	retired []string
}

func (l *pastLedger) Open(e *Epoch) State {
	l.opened = append(l.opened, e)
	if l.inexact && len(l.opened) == 1 {
		e.MarkInexact()
	}
	return retire(func() {
		if !e.Idle() {
			l.t.Errorf("epoch %d was retired with a request in it", e.Number())
		}
		l.retired = append(l.retired, "here")
	})
}

// TestFirstEpochGoesOnFromThePast: the process goes on with the last epoch, under its serial,
// if that is the present one and its ids are kept; otherwise its first epoch gets the next
// serial, and never starts before the last one.
func TestFirstEpochGoesOnFromThePast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now() // midnight
		const minute = time.Minute
		for _, tt := range []struct {
			name      string
			past      Past
			notBefore time.Time
			start     time.Time
			serial    uint64
		}{
			{"no past", Past{}, time.Time{}, now, 1},
			{"the present epoch", Past{Serial: 7, Start: now, Window: minute}, now, now, 7},
			{"the present epoch, over", Past{Serial: 7, Start: now, Window: minute, Over: true}, now, now.Add(minute), 8},
			{"the last epoch", Past{Serial: 7, Start: now.Add(-minute), Window: minute, Over: true}, now.Add(-minute), now, 8},
			{"long ago", Past{Serial: 7, Start: now.Add(-time.Hour), Window: minute, Over: true}, time.Time{}, now, 8},
			{"the clock was set back", Past{Serial: 7, Start: now.Add(time.Hour), Window: minute}, now.Add(time.Hour), now.Add(time.Hour), 7},
			{"another window goes on", Past{Serial: 7, Start: now, Window: time.Second}, now, now, 7},
			{"another window, over", Past{Serial: 7, Start: now.Add(-time.Second), Window: time.Second, Over: true}, now.Add(-time.Second), now, 8},
			{"a later epoch was published", Past{Serial: 7, Start: now, Window: minute}, now.Add(minute), now.Add(minute), 8},
		} {
			l := &pastLedger{recorder: &recorder{t: t}}
			c, err := New(Config{Window: minute, Store: l, Publisher: l, NotBefore: tt.notBefore, Past: tt.past})
			if err != nil {
				t.Fatal(err)
			}
			if e := c.Last(); !e.Start().Equal(tt.start) || e.Serial() != tt.serial {
				t.Errorf("%s: opened %v, serial %d; want %v, %d", tt.name, e.Start(), e.Serial(), tt.start, tt.serial)
			}
			next, _ := c.Enter(c.Last().end, 0, 1)
			if next.Serial() != tt.serial+1 {
				t.Errorf("%s: the second epoch has serial %d, want %d", tt.name, next.Serial(), tt.serial+1)
			}
			next.Leave(0, 0, 1)
		}
	})
}

// TestLeftCountsArePublishedFirst: counts that an earlier process left are published before
// others, as not complete, for their own windows, and do not count as answers of this process.
func TestLeftCountsArePublishedFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now()
		for _, tt := range []struct {
			name string
			last Recovered
			want string
		}{
			{"the present epoch goes on", Recovered{Serial: 7, Start: now, Window: time.Minute, Unique: 4, Exact: true}, "-2:5-? -1:0- 0:4- 0:1-?"},
			{"and had nothing new", Recovered{Serial: 7, Start: now, Window: time.Minute, Exact: true}, "-2:5-? -1:0- 0:1-?"},
		} {
			l := &pastLedger{recorder: &recorder{t: t, fault: func(Count) (error, bool) { return nil, true }}, inexact: true}
			left := retire(func() { l.retired = append(l.retired, "left") })
			tt.last.State = left
			c, err := New(Config{Window: time.Minute, Store: l, Publisher: l, Past: Past{
				Recovered: []Recovered{
					{Serial: 5, Start: now.Add(-2 * time.Minute), Window: time.Minute, Unique: 5, State: left},
					{Serial: 6, Start: now.Add(-time.Minute), Window: time.Minute, Exact: true, State: left},
					tt.last,
				},
				Serial: 7, Start: now, Window: time.Minute,
			}})
			if err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- c.Run(t.Context()) }()
			enter(t, c, now, 1, unique)
			if s := c.Stats(); s.Unique != 1 {
				t.Errorf("%s: Stats has %d unique ids before they are published, want 1", tt.name, s.Unique)
			}
			c.Seal()
			if err := <-ended; err != nil {
				t.Error(err)
			}
			if got := show(now, l.counts()); got != tt.want {
				t.Errorf("%s: published %q, want %q", tt.name, got, tt.want)
			}
			if s := c.Stats(); s.Unique != 1 || s.Unclosed != 0 {
				t.Errorf("%s: Stats %+v, want 1 unique id", tt.name, s)
			}
			if n := len(l.retired); n != len(l.counts()) || l.retired[0] != "left" || l.retired[n-1] != "here" {
				t.Errorf("%s: retired %v", tt.name, l.retired)
			}
		}
	})
}

// TestLeftCountsKeepTheirWindow if this process has windows of another length.
func TestLeftCountsKeepTheirWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &pastLedger{recorder: &recorder{t: t}}
		start := time.Now().Add(-90 * time.Second)
		c, err := New(Config{Window: time.Hour, Store: l, Publisher: l, Past: Past{
			Recovered: []Recovered{{Serial: 3, Start: start, Window: 30 * time.Second, Unique: 2, Exact: true}},
			Serial:    3, Start: start, Window: 30 * time.Second, Over: true,
		}})
		if err != nil {
			t.Fatal(err)
		}
		c.Seal()
		if err := c.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		got := l.counts()
		if len(got) != 2 || got[0].Window != 30*time.Second || !got[0].Start.Equal(start) || got[0].Unique != 2 || got[1].Window != time.Hour {
			t.Errorf("published %+v", got)
		}
	})
}
