//go:build linux

package dedup

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"verve/counter"
)

// TestLeftCountsArePublishedOnce: a process that keeps its ids elsewhere publishes once what a
// killed process left, and a later process that uses the directory again goes on with the
// window.
func TestLeftCountsArePublishedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := small(t.TempDir())
		l := newFakeSpool(t)
		p := live(t, cfg, time.Hour, l)
		start := p.c.Last().Start()
		for i := range 10 {
			p.want(time.Now(), strconv.Itoa(i), Unique)
		}
		p.kill()
		for range 2 {
			if err := publishRecovered(cfg, l); err != nil {
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
		if err := PublishRecovered(none, nil, nil, nil); err != nil {
			t.Errorf("no directory: %v", err)
		}
	})
}

// publishRecovered is what a process does that keeps its ids elsewhere.
func publishRecovered(cfg Config, l *fakeSpool) error {
	return PublishRecovered(cfg, l.published(), func(counter.Past) {}, func(c counter.Count) error { return l.Publish(context.Background(), c) })
}

// TestLeftCountsThatAreDamagedAreNotExact: a process that keeps its ids elsewhere reports that
// those of a killed one are lost, whatever has become of their directory, and their window gets
// a record, once.
func TestLeftCountsThatAreDamagedAreNotExact(t *testing.T) {
	state := func(dir string) string { return filepath.Join(dir, stateName) }
	for name, damage := range map[string]func(dir string) error{
		"header": func(dir string) error { return os.WriteFile(state(dir), make([]byte, stateBytes), 0o600) },
		"size":   func(dir string) error { return os.Truncate(state(dir), stateBytes-1) },
		"state":  func(dir string) error { return os.Remove(state(dir)) },
		"ids":    func(dir string) error { return os.Remove(filepath.Join(dir, segmentName(0))) },
		"all":    os.RemoveAll,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cfg, l := small(t.TempDir()), newFakeSpool(t)
				cfg.Window = time.Minute
				p := live(t, cfg, time.Minute, l)
				time.Sleep(time.Minute)
				synctest.Wait() // the first window is published
				start := p.c.Last().Start()
				p.want(time.Now(), "1", Unique)
				p.kill()
				if err := damage(cfg.Dir); err != nil {
					t.Fatal(err)
				}
				time.Sleep(2 * time.Minute)
				said := 0
				cfg.OnSetAside = func(string, error) { said++ }
				for range 2 {
					if err := publishRecovered(cfg, l); err != nil {
						t.Fatal(err)
					}
				}
				if sum, records, exact := l.total(start); sum != 0 || records != 1 || exact || said != 1 {
					t.Errorf("%d records with %d ids, exact %t, and %d reports; want one record that is not exact, and one report", records, sum, exact, said)
				}
			})
		})
	}
}

// TestLeftCountsOnAFailedDisk: a process that keeps its ids elsewhere gets the error of the
// disk that those of a killed one are on.
func TestLeftCountsOnAFailedDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg, l := small(t.TempDir()), newFakeSpool(t)
		p := live(t, cfg, time.Hour, l)
		p.want(time.Now(), "1", Unique)
		p.kill()
		cfg.msync = func(string, []byte) error { return syscall.EIO }
		if err := publishRecovered(cfg, l); !errors.Is(err, syscall.EIO) {
			t.Errorf("got %v, want the error of the disk", err)
		}
	})
}

// TestOtherPublisherWithinAWindow: what one publisher has published does not reduce what
// another one has to publish.
func TestOtherPublisherWithinAWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := small(t.TempDir())
		l := newFakeSpool(t)
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

// TestWindowsOfAnotherNameAreBehindThose that any name has published in the data
// directory: the next process, of whatever name, may have to publish their counts.
func TestWindowsOfAnotherNameAreBehindThose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := small(t.TempDir())
		l := newFakeSpool(t)
		as := func(name string, window time.Duration) *life {
			cfg.Publisher = name
			l.rename(name)
			return live(t, cfg, window, l)
		}
		p := as("verve/a", 100*time.Millisecond)
		time.Sleep(3750 * time.Millisecond)
		p.close()
		last := p.c.Last().Start()
		if err := os.RemoveAll(cfg.Dir); err != nil { // what it says of a is gone
			t.Fatal(err)
		}
		p = as("verve/b", 3*time.Second)
		p.want(time.Now(), "1", Unique)
		start := p.c.Last().Start()
		if start.Before(last) {
			t.Errorf("b has opened %v, and a has published %v", start, last)
		}
		p.kill()
		p = as("verve/a", 3*time.Second)
		p.close()
		if lost := p.c.Stats().Lost; lost > 0 {
			t.Errorf("%d windows are lost, want none", lost)
		}
		if sum, records, _ := l.total(start); sum != 1 {
			t.Errorf("%d records of %v add up to %d, want 1", records, start, sum)
		}
	})
}

// TestWindowWithoutARecordIsSaid: counts that another publisher left cannot be published if
// this one has published a later window.
func TestWindowWithoutARecordIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := small(t.TempDir())
		cfg.Publisher = "verve/b"
		p := live(t, cfg, 3*time.Second, newFakeSpool(t))
		p.want(time.Now(), "1", Unique)
		start := p.c.Last().Start()
		p.kill()
		time.Sleep(time.Second)
		cfg.Publisher = "verve/a"
		m, err := NewMemory(cfg)
		if err != nil {
			t.Fatal(err)
		}
		past := m.Past(map[string]counter.Published{"verve/a": {Last: start.Add(700 * time.Millisecond), Unique: 3}})
		if len(past.Recovered) != 0 || len(past.Lost) != 1 || !past.Lost[0].Start.Equal(start) || past.Lost[0].Unique != 1 {
			t.Errorf("left %v, lost %v; want the window of %v with one id to be lost", past.Recovered, past.Lost, start)
		}
		abandon(m)
	})
}
