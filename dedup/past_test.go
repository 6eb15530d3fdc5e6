//go:build linux

package dedup

import (
	"context"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"verve/counter"
)

// TestLeftCountsArePublishedOnce: a process that keeps its ids elsewhere publishes
// what a killed one left, once, and one that comes back to the directory goes on.
func TestLeftCountsArePublishedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := small(fastDir(t))
		l := newLedger(t)
		p := live(t, cfg, time.Hour, l)
		start := p.c.Last().Start()
		for i := range 10 {
			p.want(time.Now(), strconv.Itoa(i), Unique)
		}
		p.kill()
		for range 2 {
			if err := PublishLeft(cfg, l.published(), func(c counter.Count) error { return l.Publish(context.Background(), c) }); err != nil {
				t.Fatal(err)
			}
			if sum, records, exact := l.total(start); sum != 10 || records != 1 || !exact {
				t.Errorf("%d records add up to %d, exact %t; want one of 10", records, sum, exact)
			}
		}
		p = live(t, cfg, time.Hour, l)
		p.want(time.Now(), "0", Repeat)
		p.want(time.Now(), "10", Unique)
		p.close()
		if sum, _, exact := l.total(start); sum != 11 || !exact {
			t.Errorf("the records add up to %d, exact %t; want 11", sum, exact)
		}
		none := Config{Dir: cfg.Dir + "-missing"}
		if err := PublishLeft(none, nil, nil); err != nil {
			t.Errorf("no directory: %v", err)
		}
	})
}

// TestOtherPublisherWithinAWindow: what one name has published is no part of what
// another one has to.
func TestOtherPublisherWithinAWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := small(fastDir(t))
		l := newLedger(t)
		as := func(name string) *life {
			cfg.Publisher = name
			l.rename(name)
			return live(t, cfg, time.Hour, l)
		}
		p := as("verve/a")
		start := p.c.Last().Start()
		next := 0
		add := func(n int) {
			for range n {
				p.want(time.Now(), strconv.Itoa(next), Unique)
				next++
			}
		}
		add(10)
		p.close()
		p = as("verve/b")
		p.want(time.Now(), "0", Repeat)
		add(5)
		p.kill()
		p = as("verve/a")
		add(1)
		p.close()
		if sum, _, exact := l.total(start); sum != 16 || !exact {
			t.Errorf("the records add up to %d, exact %t; want 16", sum, exact)
		}
	})
}
