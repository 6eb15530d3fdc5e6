//go:build linux

package dedup

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"verve/counter"
)

// disk is a disk whose syncs can be made to fail.
type disk struct {
	failing  atomic.Bool
	failures atomic.Int64 // told
	repairs  atomic.Int64
}

func (d *disk) config(dir string) Config {
	cfg := small(dir)
	cfg.msync = func(_ string, b []byte) error {
		if d.failing.Load() {
			return unix.EIO
		}
		return syncMapped(b)
	}
	cfg.OnFailure = func(error) { d.failures.Add(1) }
	cfg.OnRepair = func() { d.repairs.Add(1) }
	return cfg
}

// keep runs Memory.keep until the process is over.
func (p *life) keep() {
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { p.m.keep(ctx) })
	end := p.stop
	p.stop = func() { end(); stop(); running.Wait() }
}

// TestRemovedDirectoryIsNoticed: what is written to files without a name is not kept. So ids
// are refused, with the reason, until the next window begins in a new directory.
func TestRemovedDirectoryIsNoticed(t *testing.T) {
	for name, remove := range map[string]func(dir string) error{
		"removed": os.RemoveAll,
		"moved":   func(dir string) error { return os.Rename(dir, dir+".elsewhere") },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var d disk
				cfg := d.config(filepath.Join(t.TempDir(), "data", "epochs"))
				base := time.Now()
				l := newFakeSpool(t)
				p := live(t, cfg, time.Minute, l)
				p.keep()
				p.want(time.Now(), "0", Unique)
				time.Sleep(2 * syncEvery)
				p.want(time.Now(), "1", Unique)
				if err := remove(cfg.Dir); err != nil {
					t.Fatal(err)
				}
				time.Sleep(2 * syncEvery)
				synctest.Wait()
				if _, _, err := p.add(time.Now(), "2"); !errors.Is(err, ErrUnavailable) || !strings.Contains(p.m.Stats().Problem, "was removed") {
					t.Errorf("got %v, problem %q", err, p.m.Stats().Problem)
				}
				time.Sleep(time.Until(base.Add(time.Minute)))
				_, _, _ = p.add(time.Now(), "3") // turns the epoch
				time.Sleep(2 * syncEvery)
				synctest.Wait()
				p.want(time.Now(), "0", Unique)
				if s := p.m.Stats(); s.Problem != "" || d.failures.Load() != 1 || d.repairs.Load() != 1 {
					t.Errorf("problem %q, told %d times of failure, %d of repair", s.Problem, d.failures.Load(), d.repairs.Load())
				}
				p.kill()

				p = live(t, cfg, time.Minute, l)
				p.want(time.Now(), "0", Repeat)
				p.want(time.Now(), "1", Unique)
				p.kill()
			})
		})
	}
}

// TestFailedJournalIsReplaced: after a failure of the disk every id is refused until the end of
// the window, and the ids that were answered are published. When the disk works again, the next
// window takes ids and keeps them, without a restart.
func TestFailedJournalIsReplaced(t *testing.T) {
	for _, tt := range []struct {
		name string
		fail func(d *disk, cfg Config)
	}{
		{"sync", func(d *disk, _ Config) { d.failing.Store(true) }},
		{"ids", func(_ *disk, cfg Config) {
			segments, _ := filepath.Glob(filepath.Join(cfg.Dir, "ids-*"))
			for _, path := range segments {
				_ = os.Truncate(path, 0)
			}
		}},
		{"state", func(_ *disk, cfg Config) { _ = os.Truncate(filepath.Join(cfg.Dir, stateName), 0) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var d disk
				dir := t.TempDir()
				cfg := d.config(filepath.Join(dir, "data"))
				base := time.Now()
				l := newFakeSpool(t)
				p := live(t, cfg, time.Minute, l)
				p.keep()
				for i := range 100 {
					p.want(time.Now(), strconv.Itoa(i), Unique)
				}
				tt.fail(&d, cfg)
				answered := uint64(100)
				for i := 100; ; i++ { // a chunk has room, and the sync comes in time
					v, _, err := p.add(time.Now(), strconv.Itoa(i))
					if v == Unique { // also where its repeat in the same batch failed
						answered++
					}
					if err != nil {
						break
					}
					time.Sleep(10 * time.Millisecond)
				}
				refused := func(when string) {
					t.Helper()
					for _, id := range []string{"0", "new", "7777"} {
						if v, _, err := p.add(time.Now(), id); !errors.Is(err, ErrUnavailable) {
							t.Errorf("%s, id %s: got %v, %v; want ErrUnavailable", when, id, v, err)
						}
					}
					if p.m.Stats().Problem == "" {
						t.Errorf("%s there is no problem", when)
					}
				}
				refused("failed")
				d.failing.Store(false) // the disk works again, and what was lost is lost
				time.Sleep(10 * time.Second)
				refused("in the same window")

				parent := filepath.Dir(cfg.Dir)
				if err := os.Rename(parent, parent+".away"); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Until(base.Add(time.Minute + 10*time.Second)))
				refused("in the next window, without a disk")
				if err := os.Rename(parent+".away", parent); err != nil {
					t.Fatal(err)
				}
				time.Sleep(syncEvery)
				synctest.Wait()
				p.want(time.Now(), "0", Unique)
				p.want(time.Now(), "0", Repeat)
				if s := p.m.Stats(); s.Problem != "" || s.Kept == 0 || d.failures.Load() != 1 || d.repairs.Load() != 1 {
					t.Errorf("problem %q, %d bytes kept, told %d times of failure, %d of repair", s.Problem, s.Kept, d.failures.Load(), d.repairs.Load())
				}
				p.kill() // what was kept since is there

				p = live(t, cfg, time.Minute, l)
				p.want(time.Now(), "0", Repeat)
				p.want(time.Now(), "1", Unique)
				if left, err := filepath.Glob(cfg.Dir + ".*"); len(left) > 0 || err != nil {
					t.Errorf("left beside the directory: %v, %v", left, err)
				}
				p.close()
				for n, want := range []uint64{answered, 2} {
					if sum, _, exact := l.total(base.Add(time.Duration(n) * time.Minute)); sum != want || !exact {
						t.Errorf("minute %d: the records add up to %d, exact %t; want %d", n, sum, exact, want)
					}
				}
			})
		})
	}
}

// TestFailedAgainIsReplacedAgain: the old files stay until the windows that wait for the
// publisher are published.
func TestFailedAgainIsReplacedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var d disk
		cfg := d.config(t.TempDir())
		base := time.Now()
		l := newFakeSpool(t)
		p := live(t, cfg, time.Minute, l)
		p.keep()
		want := map[int]uint64{}
		for round := range 4 {
			p.want(time.Now(), "a", Unique)
			want[int(time.Since(base)/time.Minute)]++
			held, _ := p.c.Enter(time.Now().UnixNano(), 0, 1)
			d.failing.Store(true)
			time.Sleep(2 * syncEvery)
			d.failing.Store(false)
			time.Sleep(2 * time.Minute) // the window is over, and not published
			if v, _, err := p.add(time.Now(), "b"); !errors.Is(err, ErrUnavailable) {
				t.Fatalf("round %d: %v, %v while the files are needed", round, v, err)
			}
			if state, err := os.Stat(filepath.Join(cfg.Dir, stateName)); err != nil || state.Size() == 0 {
				t.Errorf("round %d: the files that are needed are gone: %v", round, err)
			}
			held.Leave(0, 1, 0)
			time.Sleep(2 * syncEvery)
			synctest.Wait()
			if got := d.repairs.Load(); got != int64(round+1) {
				t.Errorf("round %d: %d repairs", round, got)
			}
		}
		p.stop()
		p.c.Seal()
		<-p.ended
		if err := p.m.Close(); err != nil {
			t.Error(err)
		}
		for minute, n := range want {
			if sum, _, _ := l.total(base.Add(time.Duration(minute) * time.Minute)); sum != n && minute < 6 {
				t.Errorf("minute %d: %d, want %d", minute, sum, n)
			}
		}
	})
}

// TestKillAfterAFailureIsNotExact: after a failure it is not certain what the files contain.
func TestKillAfterAFailureIsNotExact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var d disk
		cfg := d.config(t.TempDir())
		l := newFakeSpool(t)
		p := live(t, cfg, time.Minute, l)
		p.keep()
		p.want(time.Now(), "1", Unique)
		start := p.c.Last().Start()
		d.failing.Store(true)
		time.Sleep(syncEvery)
		synctest.Wait()
		p.kill()
		d.failing.Store(false)
		p = live(t, cfg, time.Minute, l)
		if p.c.Last().Exact() {
			t.Error("the window is exact")
		}
		p.want(time.Now(), "1", Repeat)
		p.close()
		if sum, _, exact := l.total(start); sum != 1 || exact {
			t.Errorf("the records add up to %d, exact %t; want 1, not exact", sum, exact)
		}
	})
}

// TestMarkIsSyncedBeforeItsFileIsRemoved: after a loss of power between the two
// a mark without its file would be damage.
func TestMarkIsSyncedBeforeItsFileIsRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := small(t.TempDir())
		var j *journal
		synced := map[string]bool{} // files that were there when their mark was synced as cleared
		cfg.msync = func(_ string, b []byte) error {
			if j != nil && len(b) == stateBytes {
				for index, mark := range j.marks {
					path := filepath.Join(cfg.Dir, segmentName(index))
					if _, err := os.Stat(path); mark == 0 && err == nil {
						synced[path] = true
					}
				}
			}
			return syncMapped(b)
		}
		p := live(t, cfg, time.Minute, newFakeSpool(t))
		j = p.m.journal
		for i := range 20_000 {
			p.want(time.Now(), strconv.Itoa(i), Unique)
		}
		before, err := filepath.Glob(filepath.Join(cfg.Dir, "ids-*"))
		if err != nil {
			t.Fatal(err)
		}
		for range 20 {
			time.Sleep(time.Minute)
			synctest.Wait()
			for range 3 {
				if err := p.m.journal.trim(); err != nil {
					t.Fatal(err)
				}
			}
		}
		removed := 0
		for _, path := range before {
			if _, err := os.Stat(path); err == nil {
				continue
			}
			if removed++; !synced[path] {
				t.Errorf("%s was removed before its mark was synced", path)
			}
		}
		if removed == 0 {
			t.Error("nothing was removed")
		}
		p.close()
	})
}

// TestLargeTablesAreRecalledWhole: ids of each kind, from many segments.
func TestLargeTablesAreRecalledWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := small(t.TempDir())
		cfg.Expect, cfg.ExpectWide = 1_000_000, 1_000_000
		ids := 60_000
		if raceEnabled {
			ids = 4000
		}
		l := newFakeSpool(t)
		p := live(t, cfg, time.Hour, l)
		for i := range ids {
			p.want(time.Now(), strconv.Itoa(i), Unique)
			p.want(time.Now(), "text "+strconv.Itoa(i), Unique)
		}
		p.kill()
		p = live(t, cfg, time.Hour, l)
		for i := range ids {
			p.want(time.Now(), strconv.Itoa(i), Repeat)
			p.want(time.Now(), "text "+strconv.Itoa(i), Repeat)
		}
		p.want(time.Now(), strconv.Itoa(ids), Unique)
		start := p.c.Last().Start()
		p.close()
		if sum, _, exact := l.total(start); sum != uint64(2*ids+1) || !exact {
			t.Errorf("the records add up to %d, exact %t; want %d", sum, exact, 2*ids+1)
		}
	})
}

// TestRecalledIdsFitTheMemoryThatTheyHad: a table that is made for all of them does not fit,
// and one that grows does.
func TestRecalledIdsFitTheMemoryThatTheyHad(t *testing.T) {
	if raceEnabled {
		t.Skip("half a million ids take the race detector long")
	}
	const ids, expect = 550_000, 200_000
	cfg := Config{Dir: filepath.Join(t.TempDir(), "epochs"), Heap: raceEnabled, Expect: expect}
	l := newFakeSpool(t)
	p := live(t, cfg, counter.MaxWindow, l)
	now := p.c.Last().Start()
	for i := range ids {
		p.want(now, strconv.Itoa(i), Unique)
	}
	p.kill()
	cfg.MaxBytes = 8_300_000
	p = live(t, cfg, counter.MaxWindow, l)
	for i := range ids {
		p.want(now, strconv.Itoa(i), Repeat)
	}
	p.kill()
}

// TestFaultWhileRecallingIsAnError: a part of a segment cannot be read, in each way in which it
// is read.
func TestFaultWhileRecallingIsAnError(t *testing.T) {
	cfg := small(t.TempDir())
	p := live(t, cfg, time.Hour, newFakeSpool(t))
	for i := range 100 {
		p.want(time.Now(), strconv.Itoa(i), Unique)
	}
	p.kill()
	m := &Memory{cfg: cfg, arena: &arena{heap: cfg.Heap, workers: 2}}
	if err := m.openJournal(); err != nil {
		t.Fatal(err)
	}
	if err := m.makeTables(load{}); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(cfg.Dir, segmentName(0)), 0); err != nil {
		t.Fatal(err)
	}
	m.recall()
	if unfit := m.journal.first.unfit; !errors.Is(unfit, ErrUnavailable) || !strings.Contains(unfit.Error(), "fault") {
		t.Errorf("got %v", unfit)
	}
	abandon(m)
}

// TestSegmentThatCannotBeMadeRefusesIds: ids that find no room are refused until a segment can
// be made; as unavailable if the disk is not full.
func TestSegmentThatCannotBeMadeRefusesIds(t *testing.T) {
	dir := t.TempDir()
	cfg := small(dir)
	cfg.segmentChunks = 2
	p := live(t, cfg, time.Hour, newFakeSpool(t))
	if err := os.Rename(cfg.Dir, cfg.Dir+".away"); err != nil {
		t.Fatal(err)
	}
	var err error
	n := 0
	for ; err == nil && n < 10_000; n++ {
		_, _, err = p.add(time.Now(), strconv.Itoa(n))
	}
	if !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrFull) || !strings.Contains(p.m.Stats().Problem, "no such file") {
		t.Errorf("after %d ids: %v; the problem is %q", n, err, p.m.Stats().Problem)
	}
	if err := os.Rename(cfg.Dir+".away", cfg.Dir); err != nil {
		t.Fatal(err)
	}
	time.Sleep(retryExtend)
	p.want(time.Now(), strconv.Itoa(n), Unique)
	p.want(time.Now(), "0", Repeat)
	if problem := p.m.Stats().Problem; problem != "" {
		t.Errorf("the problem is %q", problem)
	}
	p.close()
}
