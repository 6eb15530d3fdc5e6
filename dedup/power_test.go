//go:build linux

package dedup

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"verve/counter"
)

// TestPowerLostAtAnyTime runs random schedules of ids, kills, stops, other names and windows,
// and losses of power, against a model of what the disk has: the pages that were synced, and
// those that the kernel happened to write back. In every window whose record is exact no id got
// ok twice, and the sum is right; every window in which an id was given ok has a record; and an
// id is not forgotten that was answered more than a second before a loss of power, or more than
// a second before the last process before that was killed.
//
// VERVE_TEST_SCHEDULES is the number of schedules; VERVE_TEST_SCHEDULE is the only one to run.
func TestPowerLostAtAnyTime(t *testing.T) {
	schedules := 300
	if n, err := strconv.Atoi(os.Getenv("VERVE_TEST_SCHEDULES")); err == nil {
		schedules = n
	}
	if raceEnabled || testing.Short() {
		schedules /= 5
	}
	var seeds []uint64
	if seed, err := strconv.ParseUint(os.Getenv("VERVE_TEST_SCHEDULE"), 10, 64); err == nil {
		seeds = []uint64{seed}
	} else {
		seeds = failedSeeds(t, "failed-power-schedules")
		for n := range schedules {
			seeds = append(seeds, uint64(n)+1)
		}
	}
	dir := t.TempDir()
	failed := 0
	for _, seed := range seeds {
		own := filepath.Join(dir, "epochs-of-a-schedule")
		var found []string
		synctest.Test(t, func(t *testing.T) { found = powerSchedule(t, seed, own) })
		if err := os.RemoveAll(own); err != nil {
			t.Fatal(err)
		}
		if len(found) > 0 {
			failed++
			t.Errorf("failing seed, for testdata/failed-power-schedules: %d, for %d reasons, the first of them: %s", seed, len(found), found[0])
		}
		if failed > 5 {
			t.Fatal("and perhaps more")
		}
	}
}

// TestPowerLostRightAfterAStart, before anything was synced in the background: ids that are
// forgotten then may be answered ok again, and the records are not exact.
func TestPowerLostRightAfterAStart(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		t.Run(fmt.Sprintf("restarted %t", restarted), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { powerLostAfterStart(t, restarted) })
		})
	}
}

func powerLostAfterStart(t *testing.T, restarted bool) {
	l := newFakeSpool(t)
	cfg := small(t.TempDir())
	disk := &platter{t: t, dir: cfg.Dir, files: map[string][]byte{}}
	cfg.boot, cfg.bootAt, cfg.msync = 1, time.Now, disk.msync
	p := live(t, cfg, time.Hour, l)
	if restarted {
		p.want(time.Now(), "before", Unique)
		p.close()
		disk.follow()
		p = live(t, cfg, time.Hour, l)
		p.want(time.Now(), "before", Repeat)
	}
	start := p.c.Last().Start()
	p.want(time.Now(), "id", Unique)
	p.kill()
	disk.restore(t, cfg.Dir)
	cfg.boot = 2
	p = live(t, cfg, time.Hour, l)
	v, again, err := p.add(time.Now(), "id")
	if err != nil || v != Unique || !again.Equal(start) {
		t.Fatalf("the id again: got %v in %v, %v; want %v in %v, as it was not on the disk", v, again, err, Unique, start)
	}
	p.close()
	if sum, records, exact := l.total(start); exact {
		t.Errorf("an id got ok twice, and %d records with %d ids say that they are exact", records, sum)
	}
}

// TestPowerLostAtTheReuseOfAChunk: the names of keys were in a chunk that the next window
// writes again. The process is killed between the stores of a record, and then power is lost
// before the disk has the slot in which the window of the names is published. The chunk must
// not be read as names, which would count as damage.
func TestPowerLostAtTheReuseOfAChunk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newFakeSpool(t)
		cfg := small(t.TempDir())
		cfg.boot, cfg.bootAt = 1, time.Now
		cfg.OnSetAside = func(_ string, reason error) { t.Errorf("set aside: %v", reason) }
		p := live(t, cfg, time.Hour, l)
		start := p.c.Last().Start()
		if v, _, err := p.with(time.Now(), "id", "a key", ""); v != Unique || err != nil {
			t.Fatalf("got %v, %v", v, err)
		}
		path := filepath.Join(cfg.Dir, stateName)
		disk, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if records := len(l.records[start.UnixNano()]); records != 1 {
			t.Fatalf("%d records of the first window, want 1", records)
		}
		used := p.m.journal.segments[0].chunks[1:3] // of the name, and of the id
		for range used {
			c, err := p.m.journal.reserve(new(writer), p.c.Last().Serial(), wideKind)
			if err != nil {
				t.Fatal(err)
			}
			if c.chunk != &used[0] && c.chunk != &used[1] {
				t.Fatal("the chunk is not one that the first window has used")
			}
			c.chunk[1], c.chunk[2] = 1, 2 // and the head not yet
		}
		p.kill()
		if err := os.WriteFile(path, disk, 0o600); err != nil {
			t.Fatal(err)
		}
		cfg.boot = 2
		p = live(t, cfg, time.Hour, l)
		p.want(time.Now(), "id", Unique)
		p.close()
		if sum, _, _ := l.total(start); sum != 1 {
			t.Errorf("the first window has %d ids, want 1", sum)
		}
	})
}

// TestDiskThatFailedInARecordedWindow: its records may lack ids and are not exact, whether the
// next process starts within the window or later.
func TestDiskThatFailedInARecordedWindow(t *testing.T) {
	for _, within := range []bool{true, false} {
		t.Run(fmt.Sprintf("started again within the window %t", within), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { diskFailedInRecordedWindow(t, within) })
		})
	}
}

func diskFailedInRecordedWindow(t *testing.T, within bool) {
	l := newFakeSpool(t)
	cfg := small(t.TempDir())
	fails := false
	cfg.msync = func(_ string, b []byte) error {
		if fails {
			return errors.New("EIO")
		}
		return syncMapped(b)
	}
	p := live(t, cfg, time.Hour, l)
	p.want(time.Now(), "1", Unique)
	p.close()
	p = live(t, cfg, time.Hour, l)
	start := p.c.Last().Start()
	p.want(time.Now(), "2", Unique)
	fails = true
	if err := p.m.journal.sync(false); err == nil {
		t.Fatal("the sync did not fail")
	}
	p.m.journal.doubt()
	p.kill()
	// The chunk of the second process was only in the page cache, and is lost.
	f, err := os.OpenFile(filepath.Join(cfg.Dir, segmentName(0)), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, chunkBytes), 2*chunkBytes); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	fails = false
	if !within {
		time.Sleep(time.Hour)
	}
	p = live(t, cfg, time.Hour, l)
	synctest.Wait()
	p.close()
	if sum, records, exact := l.total(start); sum != 1 || exact {
		t.Errorf("%d records say %d, exact %t; want 1 of 2 ids, not exact", records, sum, exact)
	}
}

// platter is what the disk has of the files of a journal, page by page.
type platter struct {
	t   *testing.T
	dir string

	mu    sync.Mutex // guards what follows: a request that turns an epoch may sync while keep does
	rnd   *rand.Rand // a source of its own, so that the schedule does not depend on the order of goroutines
	files map[string][]byte

	// Power is lost in the dies-th sync from now on; 0: in none. After that nothing reaches the
	// disk.
	dies int
	dead func()
}

const page = 4096

func (d *platter) msync(name string, b []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dies < 0 {
		return nil // the machine is off
	}
	d.learn()
	disk := d.files[name]
	dies := d.dies == 1
	for at := 0; at < len(b); at += page {
		if dies && d.rnd.IntN(2) == 0 {
			continue
		}
		copy(disk[at:], b[at:min(at+page, len(b))])
	}
	if d.dies > 0 {
		d.dies--
	}
	if dies {
		d.dies = -1
		d.dead()
	}
	return nil
}

// die makes power be lost in the in-th sync from now on; 0: in none.
func (d *platter) die(in int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dies = in
}

// off reports whether power was lost.
func (d *platter) off() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.dies < 0
}

// writeBack writes a random page to the disk, as the kernel may.
func (d *platter) writeBack(j *journal) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name, memory := stateName, j.state
	if d.rnd.IntN(3) > 0 {
		var have []*segment
		for _, s := range j.segments {
			if s != nil {
				have = append(have, s)
			}
		}
		if len(have) == 0 {
			return
		}
		s := have[d.rnd.IntN(len(have))]
		name, memory = segmentName(s.index), s.memory
	}
	at := d.rnd.IntN(len(memory)/page) * page
	if name == stateName && d.rnd.IntN(2) == 0 {
		at = slotsAt + d.rnd.IntN(2)*page // where the slots are that are used
	}
	copy(d.files[name][at:], memory[at:at+page])
}

// follow notices files that were made or removed since the last call: a file that has its name
// is on the disk, with its header and zeros.
func (d *platter) follow() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.learn()
}

func (d *platter) learn() {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	there := map[string]bool{}
	for _, e := range entries {
		name := e.Name()
		if name == lockName || strings.HasSuffix(name, tmpSuffix) {
			continue
		}
		there[name] = true
		if d.files[name] != nil {
			continue
		}
		b, err := os.ReadFile(filepath.Join(d.dir, name))
		if err != nil {
			d.t.Fatal(err)
		}
		header := chunkBytes
		if name == stateName {
			header = slotsAt
		}
		clear(b[header:])
		d.files[name] = b
	}
	for name := range d.files {
		if !there[name] {
			delete(d.files, name)
		}
	}
}

// restore gives the directory the content that the disk has.
func (d *platter) restore(t *testing.T, dir string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, b := range d.files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// given is an id that was answered ok.
type given struct {
	at        time.Time
	killed    bool // its process was killed within a second, and no process has synced since
	forgotten bool // power was lost within a second, or before that sync
}

type powerWindow struct {
	ids   map[string]*given
	oks   uint64
	twice bool
}

// powerRun is one schedule.
type powerRun struct {
	t      *testing.T
	rnd    *rand.Rand
	cfg    Config
	disk   *platter
	ledger *fakeSpool
	p      *life
	window time.Duration
	booted time.Time
	synced time.Time // by keep
	model  map[counter.Span]*powerWindow
	losses int
	found  []string
	trace  func(format string, args ...any)
}

func powerSchedule(t *testing.T, seed uint64, dir string) []string {
	rnd := rand.New(rand.NewPCG(seed, 99))
	r := &powerRun{t: t, rnd: rnd, ledger: newFakeSpool(t), model: map[counter.Span]*powerWindow{}}
	r.trace = func(string, ...any) {}
	if os.Getenv("VERVE_TEST_SCHEDULE") != "" {
		r.trace = func(format string, args ...any) {
			fmt.Printf("%s  "+format+"\n", append([]any{time.Now().UTC().Format("04:05.000000")}, args...)...)
		}
	}
	r.disk = &platter{t: t, rnd: rand.New(rand.NewPCG(seed, 98)), files: map[string][]byte{}}
	r.disk.dead = func() {
		r.ledger.mu.Lock()
		r.ledger.block, r.ledger.after, r.ledger.allowed = true, false, 0
		r.ledger.mu.Unlock()
	}
	r.cfg = small(dir)
	r.disk.dir = r.cfg.Dir
	r.cfg.segmentChunks = []int{16, 32, 64}[rnd.IntN(3)]
	r.cfg.boot = 1
	r.cfg.bootAt = func() time.Time { return r.booted }
	r.cfg.msync = r.disk.msync
	r.cfg.OnSetAside = func(_ string, reason error) { r.say("damage: %v", reason) }
	r.settings()
	r.start()
	ids := 5 + rnd.IntN(200)
	for range 20 + rnd.IntN(60) {
		r.step(ids)
	}
	r.disk.die(0)
	r.p.close()
	r.judge()
	return r.found
}

func (r *powerRun) say(format string, args ...any) {
	r.found = append(r.found, fmt.Sprintf(format, args...))
	r.trace("FOUND "+format, args...)
}

// settings chooses the name and the window of the next process.
func (r *powerRun) settings() {
	windows := []time.Duration{100 * time.Millisecond, 700 * time.Millisecond, 3 * time.Second, 20 * time.Second, time.Minute}
	r.window = windows[r.rnd.IntN(len(windows))]
	r.cfg.Publisher = []string{"verve/a", "verve/b"}[r.rnd.IntN(2)]
}

// start starts a process. Power may be lost in one of its first syncs.
func (r *powerRun) start() {
	if r.rnd.IntN(6) == 0 {
		r.settings()
	}
	for {
		r.ledger.rename(r.cfg.Publisher)
		dying := 0
		if r.rnd.IntN(8) == 0 {
			dying = 1 + r.rnd.IntN(4)
		}
		r.disk.die(dying)
		r.p = live(r.t, r.cfg, r.window, r.ledger)
		r.trace("start boot %d as %s: epoch %v of %v, serial %d, exact %v", r.cfg.boot, r.cfg.Publisher,
			r.p.c.Last().Start(), r.window, r.p.c.Last().Serial(), r.p.c.Last().Exact())
		r.synced = time.Now()
		if !r.disk.off() {
			r.disk.die(0)
			r.disk.follow()
			r.each(func(g *given) { g.killed = false })
			return
		}
		r.trace("power lost in sync %d of the start", dying)
		r.lost()
	}
}

// lost ends a process by a loss of power, and begins the next boot.
func (r *powerRun) lost() {
	now := time.Now()
	r.losses++
	if !r.disk.off() {
		for range r.rnd.IntN(12) {
			r.disk.writeBack(r.p.m.journal)
		}
	}
	r.p.kill()
	r.ledger.block = false
	r.disk.restore(r.t, r.cfg.Dir)
	r.cfg.boot++
	r.forget(time.Second)
	r.booted = now.Add(time.Millisecond)
	time.Sleep(2 * time.Millisecond)
	r.pause()
}

// forget allows ids that were answered within the given time to be answered ok again, if the
// record is not exact.
func (r *powerRun) forget(within time.Duration) {
	r.each(func(g *given) { g.forgotten = g.forgotten || g.killed || time.Since(g.at) <= within })
}

func (r *powerRun) each(visit func(*given)) {
	for _, w := range r.model {
		for _, g := range w.ids {
			visit(g)
		}
	}
}

func (r *powerRun) pause() {
	if r.rnd.IntN(2) == 0 {
		time.Sleep(time.Duration(r.rnd.Int64N(int64(2 * r.window))))
	}
}

func (r *powerRun) step(ids int) {
	j := r.p.m.journal
	switch r.rnd.IntN(16) {
	case 0:
		if r.rnd.IntN(2) == 0 { // right after a turn
			r.sleep(time.Until(r.p.c.Last().End()))
			r.ask("first")
		}
		synctest.Wait()
		r.disk.follow()
		r.trace("power lost")
		r.lost()
		r.start()
	case 1:
		r.p.kill()
		r.trace("killed")
		r.each(func(g *given) { g.killed = g.killed || time.Since(g.at) <= time.Second })
		r.pause()
		r.start()
	case 2:
		r.p.close()
		r.trace("stopped")
		if r.rnd.IntN(3) == 0 {
			r.losses++
			r.disk.restore(r.t, r.cfg.Dir)
			r.cfg.boot++
			r.booted = time.Now()
			time.Sleep(time.Millisecond)
		}
		r.pause()
		r.start()
	case 3, 4:
		r.disk.follow()
		for range r.rnd.IntN(6) {
			r.disk.writeBack(j)
		}
	case 5, 6, 7:
		r.sleep(time.Duration(r.rnd.Int64N(int64(400 * time.Millisecond))))
		j.prepare()
	case 8:
		r.sleep(time.Duration(r.rnd.Int64N(int64(r.window))))
	default:
		for range 1 + r.rnd.IntN(ids) {
			id := strconv.Itoa(r.rnd.IntN(ids))
			if r.rnd.IntN(4) == 0 {
				id = "x" + id
			}
			r.ask(id)
		}
	}
	r.keep(false)
}

// sleep lets time pass, during which keep syncs.
func (r *powerRun) sleep(d time.Duration) {
	for d > 0 {
		some := min(d, syncEvery)
		time.Sleep(some)
		d -= some
		synctest.Wait()
		r.keep(d > 0)
	}
}

// keep is what Memory.keep does: it syncs the slots soon after a turn, and
// everything once in a while.
func (r *powerRun) keep(always bool) {
	j := r.p.m.journal
	if time.Since(r.synced) >= syncEvery {
		r.trace("sync")
		if err := j.sync(true); err != nil {
			r.t.Fatal(err)
		}
		r.disk.follow()
		if err := j.trim(); err != nil {
			r.t.Fatal(err)
		}
		r.disk.follow()
		r.synced = time.Now()
	}
	if always || r.rnd.IntN(2) == 0 {
		select {
		case <-j.turned:
			_ = j.syncPart(stateName, j.state)
		default:
		}
	}
}

func (r *powerRun) ask(id string) {
	v, start, err := r.p.add(time.Now(), id)
	if err != nil {
		r.say("id %s: %v", id, err)
		return
	}
	span := counter.Span{Start: start, Window: r.p.c.Last().Window()} // not r.window yet where that has changed
	w := r.model[span]
	if w == nil {
		w = &powerWindow{ids: map[string]*given{}}
		r.model[span] = w
	}
	g := w.ids[id]
	switch {
	case v == Unique && g == nil:
		w.ids[id] = &given{at: time.Now()}
		w.oks++
	case v == Unique:
		if !g.forgotten {
			r.say("id %s got ok twice in %v (%v), first at %v", id, start, span.Window, g.at)
		}
		w.oks++
		w.twice = true
		g.at, g.forgotten = time.Now(), false
	case v == Repeat && g == nil:
		r.say("id %s is a repeat in %v (%v), and never got ok", id, start, span.Window)
		w.ids[id] = &given{at: time.Now()}
	}
}

// judge compares the records with the answers.
func (r *powerRun) judge() {
	records := map[counter.Span][]counter.Count{}
	for _, counts := range r.ledger.records {
		for _, c := range counts {
			records[c.Span()] = append(records[c.Span()], c)
		}
	}
	for span, w := range r.model {
		var sum uint64
		exact := true
		for _, c := range records[span] {
			sum, exact = sum+c.Unique, exact && c.Exact
		}
		switch what := fmt.Sprintf("window %v (%v): %d records say %d, exact %t; %d ok answers", span.Start, span.Window, len(records[span]), sum, exact, w.oks); {
		case len(records[span]) == 0 && slices.ContainsFunc(r.ledger.records[span.Start.UnixNano()], func(c counter.Count) bool { return !c.Exact }):
			// The slot was lost, and with it the length of the window.
		case len(records[span]) == 0:
			r.say("no record: %s", what)
		case sum > w.oks:
			r.say("too many: %s", what)
		case exact && sum < w.oks:
			r.say("too few: %s", what)
		case exact && w.twice:
			r.say("ids twice: %s", what)
		case !exact && r.losses == 0:
			r.say("nothing happened: %s", what)
		}
	}
}
