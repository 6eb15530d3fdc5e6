package counter

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// directory is a Store and a Publisher that outlives the processes that use it, as
// the journal and the spool do.
type directory struct {
	newest   Span
	serial   uint64
	counts   []Count
	answered map[int64]uint64 // ids, by the start of their window
	recorded map[int64]uint64 // the ids that are in records
}

func (d *directory) Open(e *Epoch) State {
	d.newest, d.serial = Span{e.Start(), e.Window()}, e.Serial()
	return nil
}

func (d *directory) Publish(_ context.Context, c Count) error {
	d.counts = append(d.counts, c)
	d.recorded[c.Start.UnixNano()] += c.Unique
	return nil
}

// config returns the Config of a process that starts on the directory.
func (d *directory) config(window time.Duration) Config {
	cfg := Config{Window: window, Store: d, Publisher: d, MaxSkew: 2 * time.Second}
	if n := len(d.counts); n > 0 {
		cfg.NotBefore = d.counts[n-1].Start
	}
	if d.serial == 0 {
		return cfg
	}
	p := Past{Serial: d.serial, Start: d.newest.Start, Window: d.newest.Window, Over: !time.Now().Before(d.newest.End())}
	at := d.newest.Start.UnixNano()
	if missing := d.answered[at] - d.recorded[at]; missing > 0 || !cfg.NotBefore.Equal(p.Start) {
		p.Recovered = []Recovered{{Serial: p.Serial, Start: p.Start, Window: p.Window, Unique: missing, Exact: true}}
	}
	cfg.Past = p
	return cfg
}

// TestAnotherWindowHasTrueLabels: processes with windows of any length follow each other on one
// data directory, stopped or killed. Each takes ids at once, in a window that has the time of
// the answer; labels strictly increase and are multiples of the length, no two lengths share a
// label, and the records add up to the answers. No problem of the clock is reported.
func TestAnotherWindowHasTrueLabels(t *testing.T) {
	for seed := range uint64(30) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rnd := rand.New(rand.NewPCG(seed, 13))
				d := &directory{answered: map[int64]uint64{}, recorded: map[int64]uint64{}}
				round := []time.Duration{50 * time.Millisecond, time.Second, 2 * time.Second, time.Minute, 7 * time.Minute, time.Hour}
				for range 100 {
					window := round[rnd.IntN(len(round))]
					if rnd.IntN(2) == 0 {
						window = time.Duration(50+rnd.Int64N(1<<rnd.IntN(22)+1)) * time.Millisecond
					}
					oneProcess(t, d, min(window, MaxWindow), rnd)
					if rnd.IntN(4) == 0 {
						time.Sleep(time.Duration(rnd.Int64N(int64(10 * time.Minute))))
					}
				}
				oneProcess(t, d, time.Hour, nil) // publishes what is left
				wantTrueLabels(t, d)
			})
		})
	}
}

// oneProcess opens the directory, takes ids, and is stopped or killed.
func oneProcess(t *testing.T, d *directory, window time.Duration, rnd *rand.Rand) {
	t.Helper()
	cfg := d.config(window)
	cfg.OnClock = func(problem string) {
		if problem != "" {
			t.Errorf("window %v after %v: %s", window, d.newest, problem)
		}
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, kill := context.WithCancel(t.Context())
	defer kill()
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	ids, stops := 0, rnd == nil
	if rnd != nil {
		ids, stops = rnd.IntN(12), rnd.IntN(2) == 0
	}
	for range ids {
		now := time.Now()
		in, ok := c.Enter(now.UnixNano(), 0, 1)
		if !ok {
			t.Fatal("an id is not taken")
		}
		if end := in.Start().Add(in.Window()); now.Before(in.Start()) || !now.Before(end) {
			t.Errorf("window %v: an id of %v is counted in that of %v for %v", window, now, in.Start(), in.Window())
		}
		d.answered[in.Start().UnixNano()]++
		in.Leave(1, 0, 0)
		time.Sleep(time.Duration(rnd.Int64N(1 << rnd.IntN(37))))
	}
	synctest.Wait()
	if stops {
		c.Seal()
	} else {
		kill()
	}
	if err := <-ended; (err == nil) != stops {
		t.Errorf("Run: %v", err)
	}
}

func wantTrueLabels(t *testing.T, d *directory) {
	t.Helper()
	var last Count
	lengths := map[time.Duration]bool{}
	for _, c := range d.counts {
		lengths[c.Window] = true
		switch {
		case c.Start.UnixNano()%int64(c.Window) != 0:
			t.Errorf("the window of %v is no multiple of its length %v", c.Start, c.Window)
		case c.Start.Before(last.Start), c.Start.Equal(last.Start) && c.Window != last.Window:
			t.Errorf("%v for %v was published after %v for %v", c.Start, c.Window, last.Start, last.Window)
		}
		last = c
	}
	for start, n := range d.answered {
		if d.recorded[start] != n {
			t.Errorf("%v: %d ids were answered, the records have %d", time.Unix(0, start).UTC(), n, d.recorded[start])
		}
	}
	if len(lengths) < 10 {
		t.Errorf("only %d lengths were published", len(lengths))
	}
}

// TestWindowsKeepTheirLengthUntilALongerOneBegins checks what is published around such a
// change, also if the machine was suspended at its end.
func TestWindowsKeepTheirLengthUntilALongerOneBegins(t *testing.T) {
	for _, tt := range []struct {
		name      string
		old, new  time.Duration
		suspended time.Duration // a minute after the start
		until     time.Duration // when the change ends, from midnight, the time of the start
		want      string        // the first starts and lengths of windows
		skipped   uint64
	}{
		{"a divisor", time.Minute, 5 * time.Minute, 0, 5 * time.Minute, "2m0s/1m0s- 3m0s/1m0s 4m0s/1m0s 5m0s/5m0s 10m0s/5m0s", 0},
		{"no divisor", 40 * time.Second, 3 * time.Minute, 0, 3 * time.Minute, "2m0s/40s- 2m40s/40s- 3m0s/3m0s 6m0s/3m0s 9m0s/3m0s", 0},
		{"gone at the change", time.Minute, 5 * time.Minute, 8 * time.Minute, 5 * time.Minute, "2m0s/1m0s- 3m0s/1m0s- 4m0s/1m0s- 5m0s/5m0s- 10m0s/5m0s-", 2},
		{"shorter", 5 * time.Minute, time.Minute, 0, 0, "2m0s/1m0s- 3m0s/1m0s 4m0s/1m0s 5m0s/1m0s 6m0s/1m0s", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				midnight := time.Now()
				w := &wallClock{began: midnight}
				d := &directory{answered: map[int64]uint64{}, recorded: map[int64]uint64{}}
				time.Sleep(2*time.Minute + time.Second)
				last := Count{Start: time.Now().Truncate(tt.old).UTC(), Window: tt.old}
				if err := d.Publish(t.Context(), last); err != nil {
					t.Fatal(err)
				}
				cfg := d.config(tt.new)
				cfg.LastLen, cfg.clocks = tt.old, w.read
				c, err := New(cfg)
				if err != nil {
					t.Fatal(err)
				}
				old, until, changes := c.Change()
				if changes != (tt.until > 0) || changes && (old != tt.old || until.Sub(midnight) != tt.until) {
					t.Errorf("windows of %v until %v, %v; want until %v", old, until, changes, tt.until)
				}
				ended := make(chan error, 1)
				go func() { ended <- c.Run(t.Context()) }()
				time.Sleep(time.Minute)
				w.suspended.Add(int64(tt.suspended))
				time.Sleep(15 * time.Minute)
				skipped := c.Stats().Skipped
				c.Seal()
				if err := <-ended; err != nil {
					t.Error(err)
				}
				var got []string
				for _, p := range d.counts[1:] {
					s := fmt.Sprint(p.Start.Sub(midnight), "/", p.Window)
					if !p.Complete {
						s += "-"
					}
					got = append(got, s)
				}
				if got := strings.Join(got[:5], " "); got != tt.want || skipped != tt.skipped {
					t.Errorf("published %s, %d skipped; want %s, %d", got, skipped, tt.want, tt.skipped)
				}
			})
		})
	}
}
