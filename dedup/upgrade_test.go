//go:build linux

package dedup

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"verve/counter"
)

// firstVersion writes a directory that the first version left, from testdata. Its process
// was killed, or stopped in order, in minute 1 of a bubble. In minute 0 it had 20 ids. In
// minute 1 it had the 70 of each kind that firstIDs returns, stopped, and was started
// again: ten decimals more. firstLedger is what it had published by then.
func firstVersion(t *testing.T, left, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{stateName, segmentName(0)} {
		packed, err := os.ReadFile(filepath.Join("testdata", "version-1-"+left+"-"+name+".gz"))
		if err != nil {
			t.Fatal(err)
		}
		r, err := gzip.NewReader(bytes.NewReader(packed))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

const firstBoot = 7 // of the machine that testdata says it is from

// firstIDs returns the ids of minute 1.
func firstIDs() (ids []string) {
	for i := range 80 {
		ids = append(ids, strconv.Itoa(i))
	}
	for i := range 70 {
		ids = append(ids, fmt.Sprint("text ", i), fmt.Sprintf("123e4567-e89b-12d3-a456-%012d", i))
	}
	return ids
}

// firstLedger has the records of minute 1, which begins at start.
func firstLedger(t *testing.T, left string, start time.Time) *fakeSpool {
	l := newFakeSpool(t)
	l.name, l.last, l.sum = "group/instance", start, 210
	if left == "stopped" {
		l.sum = 220
	}
	l.records[start.UnixNano()] = []counter.Count{{Start: start, Window: time.Minute, Unique: l.sum, Exact: true}}
	return l
}

// TestDirectoryOfTheFirstVersionGoesOn: after an upgrade no id is new twice in a window,
// and the records add up to the answers, wherever the process that upgrades is killed.
func TestDirectoryOfTheFirstVersionGoesOn(t *testing.T) {
	for _, tt := range []struct {
		left  string
		later time.Duration
	}{
		{"killed", 0}, {"killed", time.Minute}, {"killed", time.Hour},
		{"stopped", 0}, {"stopped", time.Minute}, {"stopped", time.Hour},
	} {
		t.Run(fmt.Sprintf("%s, %v later", tt.left, tt.later), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now().Add(time.Minute)
				time.Sleep(time.Minute + tt.later)
				dir := t.TempDir()
				cfg := small(dir)
				cfg.boot, cfg.Publisher = firstBoot, "group/instance"
				cfg.OnSetAside = func(_ string, reason error) { t.Errorf("set aside: %v", reason) }
				firstVersion(t, tt.left, cfg.Dir)
				var copies []string
				cfg.step = func() {
					copies = append(copies, filepath.Join(dir, fmt.Sprint("copy-", len(copies))))
					copyDir(t, cfg.Dir, copies[len(copies)-1])
				}
				goOn(t, cfg, tt.left, start)
				cfg.step = nil
				if len(copies) < 5 {
					t.Fatalf("the upgrade has %d steps, want at least 5", len(copies))
				}
				for _, cfg.Dir = range copies {
					goOn(t, cfg, tt.left, start)
				}
			})
		})
	}
}

// goOn starts on a directory of the first version and checks ids and records.
func goOn(t *testing.T, cfg Config, left string, start time.Time) {
	t.Helper()
	l := firstLedger(t, left, start)
	started := false
	if step := cfg.step; step != nil {
		cfg.step = func() {
			if !started { // later starts have ids of this process
				step()
			}
		}
	}
	p := live(t, cfg, time.Minute, l)
	started = true
	same := time.Now().Before(start.Add(time.Minute))
	want, ids := Unique, firstIDs()
	if same {
		want = Repeat
	}
	for _, id := range ids {
		p.want(time.Now(), id, want)
	}
	p.want(time.Now(), "new", Unique)
	open := p.c.Last().Start()
	p.close()
	check := func(window time.Time, ids int) {
		t.Helper()
		if sum, _, exact := l.total(window); sum != uint64(ids) || !exact {
			t.Errorf("%s: the records of %v add up to %d, exact %t; want %d", filepath.Base(cfg.Dir), window, sum, exact, ids)
		}
	}
	if same {
		check(start, len(ids)+1)
		return
	}
	check(start, len(ids))
	check(open, len(ids)+1)
}

// TestPublisherOfTheFirstVersionIsThisOne: no id of an epoch that it left is published twice,
// whether it was killed before or after publishing its record.
func TestPublisherOfTheFirstVersionIsThisOne(t *testing.T) {
	for _, tt := range []struct{ sum, left uint64 }{{210, 10}, {220, 0}} {
		cfg := small(t.TempDir())
		cfg.boot, cfg.Publisher = firstBoot, "group/instance"
		firstVersion(t, "killed", cfg.Dir)
		m, err := NewMemory(cfg)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Unix(0, m.journal.newest.number*int64(time.Minute))
		past := m.Past(map[string]counter.Published{cfg.Publisher: {Last: start, Unique: tt.sum}})
		var left uint64
		for _, l := range past.Recovered {
			left += l.Unique
		}
		if left != tt.left || len(past.Lost) > 0 {
			t.Errorf("with %d published: got %d left and %v lost, want %d", tt.sum, left, past.Lost, tt.left)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestDamageInAFileOfTheFirstVersionIsFound: a flipped bit in header, slots or marks.
func TestDamageInAFileOfTheFirstVersionIsFound(t *testing.T) {
	dir := t.TempDir()
	from := filepath.Join(dir, "from")
	firstVersion(t, "killed", from)
	b, err := os.ReadFile(filepath.Join(from, stateName))
	if err != nil {
		t.Fatal(err)
	}
	var at []int
	for i := range b {
		inSlot := i >= slotsAt && i < shortMarksAt
		if inSlot && b[i&^63] == 0 {
			continue // a free slot means nothing
		}
		if b[i] != 0 {
			at = append(at, i)
		}
	}
	for n, i := range at {
		cfg := small(filepath.Join(dir, "work"))
		cfg.boot = firstBoot
		aside := false
		cfg.OnSetAside = func(string, error) { aside = true }
		copyDir(t, from, cfg.Dir)
		changed := bytes.Clone(b)
		changed[i] ^= 1 << (n % 8)
		if err := os.WriteFile(filepath.Join(cfg.Dir, stateName), changed, 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := NewMemory(cfg)
		if err == nil {
			err = m.Close()
		}
		if err != nil || !aside {
			t.Errorf("byte %d changed: set aside %t, %v", i, aside, err)
		}
		if err := os.RemoveAll(filepath.Join(dir, "work")); err != nil {
			t.Fatal(err)
		}
	}
}

// TestUpgradeWithoutRoomRefusesToStart with a line that says what to do; nothing has changed
// then, and with room it starts.
func TestUpgradeWithoutRoomRefusesToStart(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=200k"); err != nil {
		t.Skip("mounting is not allowed: ", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	cfg := small(dir)
	cfg.boot = firstBoot
	cfg.OnSetAside = func(_ string, reason error) { t.Errorf("set aside: %v", reason) }
	firstVersion(t, "killed", cfg.Dir)
	for range 2 {
		_, err := NewMemory(cfg)
		if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "version 1") || !strings.Contains(err.Error(), cfg.Dir) || !strings.Contains(err.Error(), "start again") {
			t.Errorf("got %v, want ENOSPC with the version, the directory and what to do", err)
		}
	}
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_REMOUNT, "size=1m"); err != nil {
		t.Fatal(err)
	}
	m, err := NewMemory(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if got := m.journal.counts[m.journal.newest.serial].sum(); got != 220 {
		t.Errorf("the running window has %d ids, want 220", got)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// TestOrderlyStopOfTheFirstVersionIsKnown: nothing that it left is published again under
// another name, and a loss of power after the stop loses nothing.
func TestOrderlyStopOfTheFirstVersionIsKnown(t *testing.T) {
	cfg := small(t.TempDir())
	cfg.boot, cfg.Publisher = firstBoot+1, "group/other"
	firstVersion(t, "stopped", cfg.Dir)
	m, err := NewMemory(cfg)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Unix(0, m.journal.newest.number*int64(time.Minute))
	past := m.Past(map[string]counter.Published{"group/instance": {Last: start, Unique: 220}})
	if len(past.Recovered)+len(past.Lost) > 0 || m.journal.powerLost {
		t.Errorf("got %v left, %v lost, power lost %t; want nothing", past.Recovered, past.Lost, m.journal.powerLost)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}
