//go:build linux

package dedup

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
	"golang.org/x/sys/unix"

	"verve/counter"
	"verve/internal/durable"
	"verve/internal/testproc"
)

// fakeSpool replaces the spool: what is published to it outlives the processes of a test.
type fakeSpool struct {
	t    testing.TB
	last time.Time
	sum  uint64            // of the records of last
	keys map[string]uint64 // the same by key

	name   string // of the publisher
	others map[string]counter.Published

	mu      sync.Mutex
	records map[int64][]counter.Count // by start, ns

	topic *topic // if not nil, the records are sent on to it

	// With block, every Publish after the next allowed ones blocks until its context ends. It
	// blocks before the count is stored, or after that, as if the process were killed before
	// Retire.
	block, after bool
	allowed      int
}

func newFakeSpool(t testing.TB) *fakeSpool {
	return &fakeSpool{t: t, records: map[int64][]counter.Count{}}
}

func (l *fakeSpool) Publish(ctx context.Context, c counter.Count) error {
	l.mu.Lock()
	block, after := l.block && l.allowed == 0, l.after
	l.allowed = max(0, l.allowed-1)
	l.mu.Unlock()
	if block && !after {
		<-ctx.Done()
		return ctx.Err()
	}
	if l.topic != nil {
		if err := l.topic.stream.Publish(ctx, c); err != nil {
			return err
		}
	}
	l.mu.Lock()
	if c.Start.Before(l.last) {
		l.t.Errorf("%v was published after %v", c.Start, l.last)
	}
	if !c.Start.Equal(l.last) {
		l.last, l.sum, l.keys = c.Start, 0, map[string]uint64{}
	}
	l.sum += c.Unique
	for _, k := range c.Keys.List() {
		l.keys[k.Key] += k.Unique
	}
	l.records[c.Start.UnixNano()] = append(l.records[c.Start.UnixNano()], c)
	l.mu.Unlock()
	if block {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

// published returns the argument of Past.
func (l *fakeSpool) published() map[string]counter.Published {
	all := maps.Clone(l.others)
	if all == nil {
		all = map[string]counter.Published{}
	}
	if !l.last.IsZero() {
		p := counter.Published{Last: l.last, Unique: l.sum}
		for name, n := range l.keys {
			p.Keys.Add([]byte(name), n)
		}
		all[l.name] = p
	}
	return all
}

// rename makes another publisher publish the next records.
func (l *fakeSpool) rename(name string) {
	l.others = l.published()
	l.name = name
	l.last, l.sum, l.keys = l.others[name].Last, l.others[name].Unique, map[string]uint64{}
	for _, k := range l.others[name].Keys.List() {
		l.keys[k.Key] = k.Unique
	}
	delete(l.others, name)
}

func (l *fakeSpool) total(start time.Time) (sum uint64, records int, exact bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	exact = true
	for _, c := range l.records[start.UnixNano()] {
		sum, records, exact = sum+c.Unique, records+1, exact && c.Exact
	}
	return sum, records, exact
}

// life is one process: from New to a kill or a clean stop.
type life struct {
	t     testing.TB
	m     *Memory
	c     *counter.Counter
	topic *topic
	stop  context.CancelFunc
	ended chan error
	adds  int
}

func live(t testing.TB, cfg Config, window time.Duration, l *fakeSpool) *life {
	t.Helper()
	m, err := NewMemory(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if l.topic != nil {
		l.topic.open(l.last, l.sum)
	}
	c, err := counter.New(counter.Config{Window: window, Store: m, Publisher: l, NotBefore: counter.LastOf(l.published()), Past: m.Past(l.published())})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	p := &life{t: t, m: m, c: c, topic: l.topic, stop: stop, ended: make(chan error, 1)}
	go func() { p.ended <- c.Run(ctx) }()
	return p
}

// kill stops everything at once. Requests that are inside an epoch stay inside.
func (p *life) kill() {
	if p.topic != nil {
		p.topic.setAway(true) // nothing leaves the process any more
	}
	p.stop()
	<-p.ended
	if p.topic != nil {
		p.topic.close()
	}
	abandon(p.m)
}

// abandon releases memory, mappings and lock, as the end of a process does.
func abandon(m *Memory) {
	m.narrow.abandon(m.arena)
	m.wide.abandon(m.arena)
	m.journal.release()
}

func (ts *tables[B]) abandon(to *arena) {
	for _, t := range append(ts.old, ts.open, ts.next) {
		if t != nil {
			t.free(to)
		}
	}
}

// close stops in order: everything is published.
func (p *life) close() {
	p.t.Helper()
	p.c.Seal()
	if err := <-p.ended; err != nil {
		p.t.Error(err)
	}
	p.stop()
	if p.topic != nil {
		p.topic.flush()
		p.topic.close()
	}
	for _, k := range p.m.journal.known {
		if k.serial > 0 && !k.ended {
			p.t.Errorf("epoch %d is not said to be published", k.serial)
		}
	}
	if err := p.m.Close(); err != nil {
		p.t.Error(err)
	}
}

// add adds id at now, every other time in a batch, and returns the start of its epoch.
func (p *life) add(now time.Time, id string) (Verdict, time.Time, error) {
	p.t.Helper()
	in, ok := p.c.Enter(now.UnixNano(), 0, 1)
	if !ok {
		p.t.Fatal("sealed")
	}
	var v Verdict
	var err error
	if p.adds++; p.adds%2 == 0 {
		v, err = addTo(twice{p.m, p.t}, in.Epoch, []byte(id))
	} else {
		v, err = addTo(p.m, in.Epoch, []byte(id))
	}
	leave(in, v)
	return v, in.Start(), err
}

func (p *life) want(now time.Time, id string, want Verdict) {
	p.t.Helper()
	if v, _, err := p.add(now, id); v != want || err != nil {
		p.t.Fatalf("id %s: got %v, %v; want %v", id, v, err, want)
	}
}

func small(dir string) Config {
	return Config{Dir: filepath.Join(dir, "epochs"), segmentChunks: 16, Heap: raceEnabled}
}

// In a bubble the clock starts at midnight, the start of a window.

// TestRestartsAgreeWithAModel runs random schedules of ids, time, steps of the clock, requests
// that stay inside, publishers that hang, kills and stops against a plain model: an id is new
// once in a window over all processes, and the records of each window add up to the answers,
// including those that no client received.
//
// VERVE_TEST_SCHEDULES is how many schedules. In one of topicEvery schedules the records go on
// through the spool and the stream to a topic. Its broker is down at times, and its answers are
// lost at times, and then the process may be killed right after the broker has done its work.
func TestRestartsAgreeWithAModel(t *testing.T) {
	schedules := 600
	if n, err := strconv.Atoi(os.Getenv("VERVE_TEST_SCHEDULES")); err == nil {
		schedules = n
	}
	if raceEnabled || testing.Short() {
		schedules /= 5
	}
	dir := t.TempDir()
	seeds := make(chan uint64)
	go func() {
		defer close(seeds)
		for _, seed := range failedSeeds(t, "failed-schedules") {
			seeds <- seed
		}
		for seed := range uint64(schedules) {
			seeds <- seed + 1
		}
	}()
	var workers sync.WaitGroup
	for w := range 4 {
		workers.Go(func() {
			own := filepath.Join(dir, strconv.Itoa(w))
			for seed := range seeds {
				if t.Failed() {
					continue
				}
				synctest.Test(t, func(t *testing.T) { restartSchedule(t, seed, own) })
				if err := os.RemoveAll(own); err != nil {
					t.Error(err)
				}
			}
		})
	}
	workers.Wait()
}

// failedSeeds are the seeds of schedules that failed once.
func failedSeeds(t *testing.T, file string) (seeds []uint64) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		t.Error(err)
	}
	for line := range strings.Lines(string(b)) {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		seed, err := strconv.ParseUint(line, 10, 64)
		if err != nil {
			t.Error(err)
		}
		seeds = append(seeds, seed)
	}
	return seeds
}

// One schedule in topicEvery goes as far as the topic; it takes as long as five others.
const topicEvery = 4

func restartSchedule(t *testing.T, seed uint64, dir string) {
	rnd := rand.New(rand.NewPCG(seed, 7))
	var p *life
	const window = time.Second // short: in a bubble every tick of the counter is work
	space := 6                 // ids; few, as a new table costs a page for each
	if seed%32 == 0 {
		space = 150 // more than a chunk, and in time more than a segment
	}
	l := newFakeSpool(t)
	if seed%topicEvery == 0 {
		l.topic = newTopic(t, dir)
		l.topic.patience = window
	}
	defer func() {
		if t.Failed() {
			t.Logf("failing seed, for testdata/failed-schedules: %d", seed)
		}
		if p != nil {
			p.stop()
		}
		if t.Failed() && l.topic != nil {
			l.topic.abandon() // otherwise the bubble would wait for it for ever
		}
	}()
	type epoch struct {
		ids map[string]bool
		n   uint64 // new ids, answered or not
	}
	model := map[int64]*epoch{}
	cfg := small(dir)
	cfg.segmentChunks = []int{2, 3, 16}[rnd.IntN(3)] // in the first two every chunk is a segment, or nearly
	p = live(t, cfg, window, l)
	var latest time.Time // start of the last window seen
	var skew time.Duration
	type stay struct {
		counter.Entry
		v Verdict
	}
	var inside []stay
	opened := func(start time.Time) *epoch {
		if start.Before(latest) {
			t.Fatalf("the epoch of %v is open after that of %v", start, latest)
		}
		latest = start
		k := start.UnixNano()
		if model[k] == nil {
			model[k] = &epoch{ids: map[string]bool{}}
		}
		return model[k]
	}
	again := func() {
		// The clock of the new process is the right one again.
		skew = 0
		if l.block = rnd.IntN(4) == 0; l.block {
			l.allowed = rnd.IntN(4)
		}
		if l.topic != nil {
			l.topic.setAway(rnd.IntN(3) == 0)
		}
		p = live(t, cfg, window, l)
		opened(p.c.Last().Start())
	}
	opened(p.c.Last().Start())
	for range 10 + rnd.IntN(30) {
		switch rnd.IntN(28) {
		case 0: // kill
			p.kill()
			inside = nil
			again()
		case 1: // stop
			for _, s := range inside {
				leave(s.Entry, s.v)
			}
			inside = nil
			l.mu.Lock()
			stuck := l.block
			l.mu.Unlock()
			if stuck {
				continue
			}
			p.close()
			if rnd.IntN(2) == 0 {
				time.Sleep(time.Duration(rnd.Int64N(int64(2 * window))))
			}
			again()
		case 2: // killed while nothing runs for a while
			p.kill()
			inside = nil
			time.Sleep(time.Duration(rnd.Int64N(int64(3 * window))))
			again()
		case 3:
			skew = time.Duration(rnd.IntN(9)-4) * window / 2
		case 4, 5:
			time.Sleep(time.Duration(rnd.Int64N(int64(window))))
		case 6:
			synctest.Wait()
			time.Sleep(10 * time.Millisecond)
			synctest.Wait()
		case 7:
			l.mu.Lock()
			l.block, l.after, l.allowed = true, rnd.IntN(2) == 0, rnd.IntN(4)
			l.mu.Unlock()
		case 8:
			p.m.reclaim()
			p.m.resize()
			p.m.release()
			p.m.journal.prepare()
			if err := p.m.journal.trim(); err != nil {
				t.Fatal(err)
			}
		case 9:
			if len(inside) > 0 {
				i := rnd.IntN(len(inside))
				leave(inside[i].Entry, inside[i].v)
				inside[i] = inside[len(inside)-1]
				inside = inside[:len(inside)-1]
			}
		case 10, 11, 12, 13:
			if l.topic == nil {
				continue
			}
			request := []kmsg.Key{kmsg.Produce, kmsg.EndTxn, kmsg.InitProducerID}[rnd.IntN(3)]
			switch rnd.IntN(4) {
			case 0:
				l.topic.setAway(rnd.IntN(2) == 0)
			case 1: // its answer is lost, and perhaps the broker
				l.topic.loseAnswer(request, rnd.IntN(2) == 0)
			default: // killed when the broker has done what was asked
				l.topic.setAway(false)
				l.topic.loseAnswer(request, true)
				if l.topic.lost(2 * window) {
					p.kill()
					inside = nil
					again()
				}
			}
		default:
			for range 1 + rnd.IntN(space) {
				id := strconv.Itoa(rnd.IntN(space))
				if rnd.IntN(2) == 0 {
					id = "id-" + id
				}
				in, ok := p.c.Enter(time.Now().Add(skew).UnixNano(), rnd.Uint64(), 1)
				if !ok {
					t.Fatal("sealed")
				}
				e := opened(in.Start())
				v, err := addTo(p.m, in.Epoch, []byte(id))
				if err != nil {
					t.Fatal(err)
				}
				if want := map[bool]Verdict{false: Unique, true: Repeat}[e.ids[id]]; v != want {
					t.Fatalf("id %s in %v: got %v, want %v", id, in.Start(), v, want)
				}
				if !e.ids[id] {
					e.n++
				}
				e.ids[id] = true
				if rnd.IntN(50) == 0 {
					inside = append(inside, stay{in, v}) // its answer comes later, or never
				} else {
					leave(in, v)
				}
			}
		}
	}
	for _, s := range inside {
		leave(s.Entry, s.v)
	}
	for l.block { // the publisher hangs: the next life says the rest
		p.kill()
		again()
	}
	if l.topic != nil {
		l.topic.setAway(false)
		l.topic.patience = time.Hour
	}
	p.close()
	want := map[int64]uint64{}
	for k, e := range model {
		want[k] = e.n
		start := time.Unix(0, k).UTC()
		sum, records, exact := l.total(start)
		if sum != e.n || records == 0 || !exact {
			t.Errorf("%v: %d records add up to %d, exact %t; want %d", start, records, sum, exact, e.n)
		}
	}
	if l.topic != nil {
		l.topic.check(want)
	}
}

// TestEveryStepOfASlotLeavesTheOldOrTheNew copies the files between every two
// stores that open and end epochs, and starts from each copy.
func TestEveryStepOfASlotLeavesTheOldOrTheNew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		type copied struct {
			dir  string
			last time.Time
			sum  uint64
		}
		var copies []copied
		l := newFakeSpool(t)
		cfg := small(dir)
		cfg.step = func() {
			to := filepath.Join(dir, fmt.Sprint("copy", len(copies)))
			copyDir(t, cfg.Dir, to)
			l.mu.Lock()
			defer l.mu.Unlock()
			copies = append(copies, copied{to, l.last, l.sum})
		}
		base := time.Now()
		answered := map[int64]uint64{}
		var lives []*life
		for range 3 { // a fresh start, a restart in the window, and turns in each
			p := live(t, cfg, time.Minute, l)
			lives = append(lives, p)
			for n := range 2 {
				now := time.Now()
				for i := range 5 {
					id := fmt.Sprint(len(lives), n, i)
					p.want(now, id, Unique)
					answered[now.Truncate(time.Minute).UnixNano()]++
				}
				if n == 0 {
					time.Sleep(time.Minute)
					synctest.Wait()
				}
			}
			if len(lives) == 2 {
				p.close()
			} else {
				p.kill()
			}
		}
		if len(copies) < 40 {
			t.Fatalf("only %d copies", len(copies))
		}
		for i, c := range copies {
			l := newFakeSpool(t)
			l.last, l.sum = c.last, c.sum
			cfg := small(dir)
			cfg.Dir = c.dir
			cfg.OnSetAside = func(_ string, reason error) { t.Errorf("copy %d: set aside: %v", i, reason) }
			p := live(t, cfg, time.Minute, l)
			p.close()
			if p.c.Last().Start().Before(base) {
				t.Errorf("copy %d: the epoch of %v is open", i, p.c.Last().Start())
			}
			for k := range l.records {
				sum, _, exact := l.total(time.Unix(0, k))
				if !exact || sum > answered[k] {
					t.Errorf("copy %d: %v has %d ids, exact %t; at most %d were answered", i, time.Unix(0, k).UTC(), sum, exact, answered[k])
				}
			}
		}
	})
}

func copyDir(t testing.TB, from, to string) {
	t.Helper()
	entries, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(from, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(to, e.Name()), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// killed makes the directory of a process that was killed in the middle of a window, with ids 0
// to n-1 and as many texts, and returns the spool that belongs to it.
func killed(t testing.TB, dir string, n int) *fakeSpool {
	t.Helper()
	l := newFakeSpool(t)
	p := live(t, small(dir), time.Hour, l)
	for i := range n {
		p.want(time.Now(), strconv.Itoa(i), Unique)
		p.want(time.Now(), fmt.Sprint("text ", i), Unique)
	}
	p.kill()
	return l
}

// TestDamageIsSetAsideAndSaid: whatever part of the files is cut off or changed, the start
// either finds every id, or reports that it does not: the directory is set aside and the window
// is not exact.
func TestDamageIsSetAsideAndSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		const ids = 300
		killed(t, dir, ids)
		from := small(dir).Dir
		tries := 0
		try := func(name string, change func(dir string)) {
			if tries++; raceEnabled && tries%20 != 0 || !testproc.Thorough() && tries%3 != 0 {
				return
			}
			work := filepath.Join(dir, "work")
			copyDir(t, from, filepath.Join(work, "epochs"))
			change(filepath.Join(work, "epochs"))
			cfg := small(work)
			aside := ""
			cfg.OnSetAside = func(name string, reason error) {
				if aside = name; reason == nil {
					t.Errorf("%s: set aside without a reason", name)
				}
			}
			l := newFakeSpool(t)
			p := live(t, cfg, time.Hour, l)
			want := Repeat
			if aside != "" {
				want = Unique
				if _, err := os.Stat(aside); err != nil {
					t.Errorf("%s: what was set aside is not there: %v", name, err)
				}
				if p.c.Last().Exact() {
					t.Errorf("%s: set aside, and the window is exact", name)
				}
			}
			if v, _, err := p.add(time.Now(), strconv.Itoa(ids-1)); v != want || err != nil {
				t.Errorf("%s: an id seen before: got %v, %v; want %v", name, v, err, want)
			}
			p.close()
			if sum, _, exact := l.total(p.c.Last().Start()); aside == "" && (sum != 2*ids || !exact) {
				t.Errorf("%s: the records add up to %d, exact %t; want %d", name, sum, exact, 2*ids)
			}
			if err := os.RemoveAll(work); err != nil {
				t.Fatal(err)
			}
		}

		try("unchanged", func(string) {})
		files, err := filepath.Glob(filepath.Join(from, "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range files {
			name := filepath.Base(path)
			if name == lockName {
				continue
			}
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for size := 0; size < len(b); size += 512 {
				try(fmt.Sprint(name, " cut to ", size), func(dir string) {
					if err := os.Truncate(filepath.Join(dir, name), int64(size)); err != nil {
						t.Fatal(err)
					}
				})
			}
			try(name+" missing", func(dir string) {
				if err := os.Remove(filepath.Join(dir, name)); err != nil {
					t.Fatal(err)
				}
			})
			try(name+" longer", func(dir string) {
				if err := os.Truncate(filepath.Join(dir, name), int64(len(b)+512)); err != nil {
					t.Fatal(err)
				}
			})
			flip := func(at, bit int) {
				try(fmt.Sprintf("%s bit %d of byte %d", name, bit, at), func(dir string) {
					changed := bytes.Clone(b)
					changed[at] ^= 1 << bit
					if err := os.WriteFile(filepath.Join(dir, name), changed, 0o600); err != nil {
						t.Fatal(err)
					}
				})
			}
			var headers [][2]int // from, to
			if name == stateName {
				headers = [][2]int{{0, 80}, {headerCheckAt * 8, headerWords * 8}, {slotsAt, slotsAt + 3*64}, {marksAt, marksAt + 64}}
			} else {
				headers = [][2]int{{0, 32}, {chunkBytes, chunkBytes + 8}, {2 * chunkBytes, 2*chunkBytes + 8}}
			}
			for _, h := range headers {
				for at := h[0]; at < h[1]; at++ {
					for bit := range 8 {
						flip(at, bit)
					}
				}
			}
		}
		t.Logf("%d damages", tries)
	})
}

// TestForeignAndNewerFiles: a file of another program counts as damage; a file of a newer
// version is not touched.
func TestForeignAndNewerFiles(t *testing.T) {
	header := func(change func(h []uint64)) func(dir string) {
		return func(dir string) { changeHeader(t, dir, change) }
	}
	for _, tt := range []struct {
		name   string
		change func(dir string)
		aside  bool
		err    string
	}{
		{"newer", header(func(h []uint64) { h[headerVersionAt]++ }), false, "newer version"},
		{"before tokens", header(func(h []uint64) { h[headerVersionAt] = 2 }), false, "the format 2"},
		{"with other words of tokens", header(func(h []uint64) { h[headerVersionAt] = 3 }), false, "the format 3"},
		{"older than the first", header(func(h []uint64) { h[headerVersionAt] = 0 }), true, ""},
		{"of another length than the first", header(func(h []uint64) { h[headerVersionAt] = withoutPublisher }), true, ""},
		{"other geometry", header(func(h []uint64) { h[headerSlotsAt]++ }), true, ""},
		{"no chunks", header(func(h []uint64) { h[headerChunksAt] = 0 }), true, ""},
		{"other secret", header(func(h []uint64) { h[headerSecretAt]++ }), true, ""},
		{"foreign", func(dir string) {
			if err := os.WriteFile(filepath.Join(dir, stateName), bytes.Repeat([]byte("hello\n"), stateBytes/6+1)[:stateBytes], 0o600); err != nil {
				t.Fatal(err)
			}
		}, true, ""},
		{"a directory in its place", func(dir string) {
			if err := errors.Join(os.Remove(filepath.Join(dir, stateName)), os.Mkdir(filepath.Join(dir, stateName), 0o755)); err != nil {
				t.Fatal(err)
			}
		}, false, stateName},
		{"a stranger's file beside them", func(dir string) {
			if err := os.WriteFile(filepath.Join(dir, "ids-1"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, false, ""},
		{"half made files", func(dir string) {
			for _, name := range []string{stateName, segmentName(7)} {
				if err := os.WriteFile(filepath.Join(dir, name+tmpSuffix), []byte("half"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}, false, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			killed(t, dir, 10)
			tt.change(small(dir).Dir)
			cfg := small(dir)
			aside := false
			cfg.OnSetAside = func(string, error) { aside = true }
			m, err := NewMemory(cfg)
			if aside != tt.aside {
				t.Errorf("set aside: %t, want %t", aside, tt.aside)
			}
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || !strings.Contains(err.Error(), cfg.Dir) {
					t.Errorf("got %v, want an error with %q and the directory", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// changeHeader changes the header of a state file, and makes its check fit again.
func changeHeader(t *testing.T, dir string, change func(h []uint64)) {
	t.Helper()
	path := filepath.Join(dir, stateName)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h := make([]uint64, headerWords)
	copy(bytesOf(h), b)
	change(h)
	h[headerCheckAt] = checkOf(h[:headerCheckAt])
	copy(b, bytesOf(h))
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestSecondProcessIsToldOfTheFirst(t *testing.T) {
	dir := t.TempDir()
	m := newMemory(t, small(dir))
	_, err := NewMemory(small(dir))
	if err == nil || !strings.Contains(err.Error(), fmt.Sprint("process ", os.Getpid())) {
		t.Errorf("got %v, want an error with this process's number", err)
	}
	if m.Stats().Problem != "" {
		t.Errorf("the first has a problem: %s", m.Stats().Problem)
	}
}

// TestReadOnlyDirectoryIsAClearError mounts a directory that cannot be written.
func TestReadOnlyDirectoryIsAClearError(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_RDONLY, ""); err != nil {
		t.Skip("mounting is not allowed: ", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	_, err := NewMemory(small(dir))
	if !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), dir) {
		t.Errorf("got %v, want EROFS and the directory", err)
	}
}

// fullDisk mounts a small disk until the end of the test, and returns its directory and the file
// that fills it.
func fullDisk(t *testing.T) (dir, stuffing string) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=240k"); err != nil {
		t.Skip("mounting is not allowed: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	stuffing = filepath.Join(dir, "stuffing")
	if err := os.WriteFile(stuffing, make([]byte, 238<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, stuffing
}

// TestDirectoryLostOnAFullDisk: where the directory of a killed process is missing and there is
// no room for another, that is reported, and the open window is not exact, also if there is room
// before its end.
func TestDirectoryLostOnAFullDisk(t *testing.T) {
	dir, stuffing := fullDisk(t)
	reported := 0
	cfg := small(filepath.Join(dir, "epochs"))
	cfg.Window, cfg.Ran = time.Hour, time.Now()
	cfg.OnSetAside = func(string, error) { reported++ }
	p := live(t, cfg, cfg.Window, newFakeSpool(t))
	if err := os.Truncate(stuffing, 8<<10); err != nil {
		t.Fatal(err)
	}
	p.m.renew(p.m.kept())
	p.want(time.Now(), "1", Unique)
	if reported != 1 || p.c.Last().Exact() {
		t.Errorf("reported %d times, exact %t; want once, and not exact", reported, p.c.Last().Exact())
	}
	p.close()
}

// TestFullDiskRefusesIdsAndRecovers fills a small disk: ids that find no room are refused as
// full and not counted, those that are kept are found, and when there is room again ids are
// taken. The same holds for a start without room, with or without files there.
func TestFullDiskRefusesIdsAndRecovers(t *testing.T) {
	dir, stuffing := fullDisk(t)
	l := newFakeSpool(t)
	repaired := 0
	cfg := small(dir)
	cfg.OnRepair = func() { repaired++ }
	p := live(t, cfg, time.Hour, l)
	if v, _, err := p.add(time.Now(), "0"); !errors.Is(err, ErrFull) || !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), dir) {
		t.Errorf("an id on a full disk: got %v, %v; want ErrFull, ENOSPC and the directory", v, err)
	}
	p.m.renew(p.m.kept())
	if repaired != 0 {
		t.Error("there is no room, and ids are kept")
	}
	if err := os.Truncate(stuffing, 8<<10); err != nil {
		t.Fatal(err)
	}
	p.m.renew(p.m.kept())
	if repaired != 1 {
		t.Errorf("with room again, ids were kept again %d times, want 1", repaired)
	}
	n := 0
	for ; ; n++ {
		v, _, err := p.add(time.Now(), strconv.Itoa(n))
		if errors.Is(err, ErrFull) {
			break
		}
		if v != Unique || err != nil || n > 100_000 {
			t.Fatalf("id %d: %v, %v", n, v, err)
		}
	}
	if problem := p.m.Stats().Problem; !strings.Contains(problem, "no space") {
		t.Errorf("the problem is %q, want that there is no space", problem)
	}
	p.want(time.Now(), "0", Repeat)
	if v, _, err := p.add(time.Now(), "a text"); !errors.Is(err, ErrFull) {
		t.Errorf("a text: got %v, %v; want ErrFull", v, err)
	}
	p.kill()
	p = live(t, cfg, time.Hour, l) // there is as little room for this one
	p.want(time.Now(), "0", Repeat)
	if v, _, err := p.add(time.Now(), "a text"); !errors.Is(err, ErrFull) {
		t.Errorf("a text after a kill: got %v, %v; want ErrFull", v, err)
	}
	if err := os.Remove(stuffing); err != nil {
		t.Fatal(err)
	}
	time.Sleep(retryExtend)
	p.want(time.Now(), strconv.Itoa(n), Unique)
	p.want(time.Now(), strconv.Itoa(n), Repeat)
	if problem := p.m.Stats().Problem; problem != "" {
		t.Errorf("with room again the problem is %q", problem)
	}
	p.close()
	if sum, _, exact := l.total(p.c.Last().Start()); sum != uint64(n+1) || !exact {
		t.Errorf("the record has %d, exact %t; want %d", sum, exact, n+1)
	}
}

// TestFileCutShortUnderTheProcessIsAnError: a store into a part of a file that is no longer
// there faults, which becomes an error for this and every later id.
func TestFileCutShortUnderTheProcessIsAnError(t *testing.T) {
	for _, name := range []string{segmentName(0), stateName} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				l := newFakeSpool(t)
				cfg := small(dir)
				failures := 0
				cfg.OnFailure = func(err error) {
					if failures++; !errors.Is(err, ErrUnavailable) {
						t.Errorf("told of %v", err)
					}
				}
				p := live(t, cfg, time.Minute, l)
				p.want(time.Now(), "1", Unique)
				if err := os.Truncate(filepath.Join(small(dir).Dir, name), 0); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute) // the slot of the next epoch, and a chunk for it
				synctest.Wait()
				for i := range 3 {
					if v, _, err := p.add(time.Now(), fmt.Sprint("new ", i)); !errors.Is(err, ErrUnavailable) {
						t.Errorf("got %v, %v; want ErrUnavailable", v, err)
					}
				}
				if p.m.Stats().Problem == "" || failures != 1 {
					t.Errorf("Stats tells of the problem %q, and %d times it was told", p.m.Stats().Problem, failures)
				}
				p.m.journal.prepare()
				_ = p.m.journal.trim()
				_ = p.m.journal.sync(false)
				p.c.Seal()
				if err := <-p.ended; err != nil {
					t.Error(err)
				}
				_ = p.m.Close() // says what failed
				if sum, _, _ := l.total(time.Unix(0, p.c.Last().Number()*int64(time.Minute))); sum != 0 {
					t.Errorf("%d refused ids were counted", sum)
				}
			})
		})
	}
}

// TestLossOfPowerIsSaid: after a reboot the ids that are on the disk are used, and every record
// that may lack ids is not exact.
func TestLossOfPowerIsSaid(t *testing.T) {
	for _, tt := range []struct {
		name  string
		clean bool
		zero  bool // pages that were not written
		exact bool
	}{
		{"killed", false, false, false},
		{"pages lost", false, true, false},
		{"stopped", true, false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				l := newFakeSpool(t)
				cfg := small(dir)
				cfg.boot = 1
				p := live(t, cfg, time.Hour, l)
				for i := range 200 {
					p.want(time.Now(), strconv.Itoa(i), Unique)
				}
				if tt.clean {
					p.close()
				} else {
					p.kill()
				}
				if tt.zero {
					f, err := os.OpenFile(filepath.Join(cfg.Dir, segmentName(0)), os.O_RDWR, 0)
					if err != nil {
						t.Fatal(err)
					}
					if _, err := f.WriteAt(make([]byte, 4096), chunkBytes); err != nil {
						t.Fatal(err)
					}
					f.Close()
				}
				for boot := uint32(2); boot < 4; boot++ { // the second start is in the same boot as the third
					cfg.boot = 2
					p = live(t, cfg, time.Hour, l)
					p.want(time.Now(), fmt.Sprint("in boot ", boot), Unique)
					want := Repeat
					if tt.zero && boot == 2 {
						want = Unique // forgotten
					}
					p.want(time.Now(), "0", want)
					if got := p.c.Last().Exact(); got != tt.exact {
						t.Errorf("exact is %t, want %t", got, tt.exact)
					}
					p.kill()
				}
				p = live(t, cfg, time.Hour, l)
				p.close()
				if sum, _, exact := l.total(p.c.Last().Start()); exact != tt.exact || !tt.zero && sum != 202 || tt.zero && sum > 203 {
					t.Errorf("the records add up to %d, exact %t; want 202, %t", sum, exact, tt.exact)
				}
				// A window that began after the boot is not affected.
				time.Sleep(time.Hour)
				p = live(t, cfg, time.Hour, l)
				if !p.c.Last().Exact() {
					t.Error("the next window is not exact")
				}
				p.close()
			})
		})
	}
}

// TestSlotLostWithThePower: the disk has ids of an epoch but not its slot. These ids belong to
// no epoch, also not to the next one, which gets the same serial.
func TestSlotLostWithThePower(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newFakeSpool(t)
		cfg := small(t.TempDir())
		cfg.boot = 1
		p := live(t, cfg, time.Minute, l)
		p.want(time.Now(), "1", Unique)
		state := filepath.Join(cfg.Dir, stateName)
		old, err := os.ReadFile(state)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		for i := range 200 {
			p.want(time.Now(), strconv.Itoa(i), Unique)
		}
		p.kill()
		if err := os.WriteFile(state, old, 0o600); err != nil {
			t.Fatal(err)
		}
		cfg.boot = 2
		cfg.OnSetAside = func(_ string, reason error) { t.Error(reason) }
		for range 2 {
			p = live(t, cfg, time.Minute, l)
			p.kill()
		}
		p = live(t, cfg, time.Minute, l)
		p.want(time.Now(), "1", Unique)
		p.want(time.Now(), "new", Unique)
		p.kill()
		p = live(t, cfg, time.Minute, l)
		p.want(time.Now(), "new", Repeat)
		p.close()
		if sum, _, _ := l.total(p.c.Last().Start()); sum != 2 {
			t.Errorf("the records add up to %d, want 2", sum)
		}
	})
}

// TestWindowsOfADamagedDirectoryAreNotExact: a window that was not published when its process
// was killed, and is over when the damage is found, gets a record that is not exact.
func TestWindowsOfADamagedDirectoryAreNotExact(t *testing.T) {
	segment := segmentName(0)
	flip := func(at int64) func(dir string) error {
		return func(dir string) error {
			b, err := os.ReadFile(filepath.Join(dir, stateName))
			if err != nil {
				return err
			}
			b[at] ^= 1
			return os.WriteFile(filepath.Join(dir, stateName), b, 0o600)
		}
	}
	for _, tt := range []struct {
		name   string
		damage func(dir string) error
	}{
		{"a segment is missing", func(dir string) error { return os.Remove(filepath.Join(dir, segment)) }},
		{"a segment is cut", func(dir string) error { return os.Truncate(filepath.Join(dir, segment), 100) }},
		{"the header has a flipped bit", flip(8)},
		{"a mark has a flipped bit", flip(marksAt)},
		{"the slot of the window has a flipped bit", flip(slotsAt + (slotCount-2)*slotWords*8 + 8)},
		{"the state file is too long", func(dir string) error { return os.Truncate(filepath.Join(dir, stateName), stateBytes+1) }},
		{"the state file is empty", func(dir string) error { return os.Truncate(filepath.Join(dir, stateName), 0) }},
		{"the state file is missing", func(dir string) error { return os.Remove(filepath.Join(dir, stateName)) }},
		{"the directory is missing", os.RemoveAll},
		{"the directory is an earlier copy", func(dir string) error { return errors.Join(os.RemoveAll(dir), os.Rename(dir+"-before", dir)) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cfg := small(t.TempDir())
				cfg.Window = time.Hour
				l := newFakeSpool(t)
				p := live(t, cfg, cfg.Window, l)
				p.want(time.Now(), "1", Unique)
				copyDir(t, cfg.Dir, cfg.Dir+"-before")
				for range 2 {
					time.Sleep(time.Hour)
					synctest.Wait()
					p.want(time.Now(), "1", Unique)
				}
				_, before, _ := l.total(p.c.Last().Start().Add(-time.Hour))
				lost := p.c.Last().Start()
				p.kill()
				if err := tt.damage(cfg.Dir); err != nil || before != 1 {
					t.Fatal(before, err)
				}
				time.Sleep(3 * time.Hour)
				aside := false
				cfg.OnSetAside = func(string, error) { aside = true }
				p = live(t, cfg, cfg.Window, l)
				p.want(time.Now(), "1", Unique)
				p.close()
				if sum, records, exact := l.total(lost); !aside || records != 1 || sum > 0 || exact {
					t.Errorf("set aside: %t; the window has %d records, which add up to %d, exact %t", aside, records, sum, exact)
				}
				for _, before := range []time.Time{lost.Add(-time.Hour), lost.Add(-2 * time.Hour)} {
					if sum, records, exact := l.total(before); sum != 1 || records != 1 || !exact {
						t.Errorf("the window of %v before it has %d records, which add up to %d, exact %t", before, records, sum, exact)
					}
				}
				if _, records, exact := l.total(p.c.Last().Start()); records != 1 || exact {
					t.Errorf("the window that was opened then has %d records, exact %t", records, exact)
				}
			})
		})
	}
}

// TestLostWindowOfAProcessThatHadPublishedNothingIsNotExact: its slot is lost as well, and
// there is no record from which its window follows, or only one from long before its start.
func TestLostWindowOfAProcessThatHadPublishedNothingIsNotExact(t *testing.T) {
	for _, earlier := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			cfg := small(t.TempDir())
			cfg.Window = time.Hour
			l := newFakeSpool(t)
			if earlier {
				p := live(t, cfg, cfg.Window, l)
				p.want(time.Now(), "1", Unique)
				p.close()
				time.Sleep(5 * time.Hour)
			}
			start := time.Now()
			p := live(t, cfg, cfg.Window, l)
			p.want(time.Now(), "1", Unique)
			lost := p.c.Last().Start()
			p.kill()
			// Files do not get the time of the bubble.
			if err := errors.Join(os.Chtimes(filepath.Join(cfg.Dir, lockName), start, start), os.Truncate(filepath.Join(cfg.Dir, stateName), 0)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(3 * time.Hour)
			p = live(t, cfg, cfg.Window, l)
			p.close()
			if sum, records, exact := l.total(lost); records != 1 || sum > 0 || exact {
				t.Errorf("earlier records: %t: the window has %d records, which add up to %d, exact %t", earlier, records, sum, exact)
			}
		})
	}
}

// TestEarlierCopyOfTheSameWindowIsNotExact: an id that was counted after the copy was made is
// not known, although the record includes it; and the window after that of the record may be
// lost.
func TestEarlierCopyOfTheSameWindowIsNotExact(t *testing.T) {
	for _, pause := range []time.Duration{0, 3 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			cfg := small(t.TempDir())
			cfg.Window = time.Hour
			l := newFakeSpool(t)
			p := live(t, cfg, cfg.Window, l)
			start := p.c.Last().Start()
			p.want(time.Now(), "1", Unique)
			copyDir(t, cfg.Dir, cfg.Dir+"-before")
			p.want(time.Now(), "2", Unique)
			if p.close(); pause > 0 {
				time.Sleep(pause)
			}
			if err := errors.Join(os.RemoveAll(cfg.Dir), os.Rename(cfg.Dir+"-before", cfg.Dir)); err != nil {
				t.Fatal(err)
			}
			p = live(t, cfg, cfg.Window, l)
			open := p.c.Last().Exact()
			p.close()
			if _, records, exact := l.total(start.Add(time.Hour)); open || pause > 0 && (records != 1 || exact) {
				t.Errorf("after %v the open window is exact: %t; the one behind the record has %d records, exact %t", pause, open, records, exact)
			}
		})
	}
}

// TestKillWhileSettingAsideIsNotForgotten: the window is not exact either if the process that
// set the damaged directory aside was killed right after that.
func TestKillWhileSettingAsideIsNotForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		killed(t, dir, 10)
		cfg := small(dir)
		if _, err := durable.SetAside(cfg.Dir); err != nil {
			t.Fatal(err)
		}
		for _, exact := range []bool{false, true} { // of this window, and of the next
			p := live(t, cfg, time.Hour, newFakeSpool(t))
			if got := p.c.Last().Exact(); got != exact {
				t.Errorf("exact is %t, want %t", got, exact)
			}
			p.close()
			time.Sleep(time.Hour)
		}
	})
}

// TestKillBeforeTheFirstEpochOfANewDirectory: the process that made a directory in the place of
// one that was damaged or missing is killed before it has begun an epoch. The loss is known
// to the next one: the window of the ids has a record, and neither that nor the open one is exact.
func TestKillBeforeTheFirstEpochOfANewDirectory(t *testing.T) {
	testLostDirectory(t, time.Hour)
}

// TestDirectoryLostInTheFirstWindow: the same holds if nothing was published before, where
// another file shows that a killed process counted in the directory.
func TestDirectoryLostInTheFirstWindow(t *testing.T) { testLostDirectory(t, 0) }

// testLostDirectory damages the directory of a process that was killed, after it had counted
// for the time published.
func testLostDirectory(t *testing.T, published time.Duration) {
	for name, damage := range map[string]func(dir string) error{
		"damaged": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, stateName), make([]byte, stateBytes), 0o600)
		},
		"missing": os.RemoveAll,
	} {
		for _, pause := range []time.Duration{0, 2 * time.Hour} {
			t.Run(fmt.Sprint(name, pause), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					cfg, l := small(t.TempDir()), newFakeSpool(t)
					cfg.Window = time.Hour
					p := live(t, cfg, cfg.Window, l)
					cfg.Ran = time.Now()
					time.Sleep(published)
					synctest.Wait() // the windows before this one are published
					start := p.c.Last().Start()
					p.want(time.Now(), "1", Unique)
					p.kill()
					if err := damage(cfg.Dir); err != nil {
						t.Fatal(err)
					}
					time.Sleep(pause)
					for range 2 {
						m, err := NewMemory(cfg)
						if err != nil {
							t.Fatal(err)
						}
						abandon(m)
					}
					p = live(t, cfg, cfg.Window, l)
					if p.c.Last().Exact() {
						t.Error("the open window is exact")
					}
					p.close()
					if _, records, exact := l.total(start); records != 1 || exact {
						t.Errorf("the window of the ids has %d records, exact %t", records, exact)
					}
				})
			})
		}
	}
}

// TestOtherWindowGoesOnFromTheLast: a process with windows of another length
// goes on with the ids of an epoch that is still open, or publishes what the last
// one left and begins its own.
func TestOtherWindowGoesOnFromTheLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := time.Now()
		dir := t.TempDir()
		l := newFakeSpool(t)
		lengths := []time.Duration{time.Minute, time.Hour, time.Second, time.Minute, time.Hour, time.Minute}
		var newest counter.Span
		went := 0
		for i, window := range lengths {
			before := newest
			p := live(t, small(dir), window, l)
			newest = counter.Span{Start: p.c.Last().Start(), Window: p.c.Last().Window()}
			want := Unique
			if newest == before {
				want = Repeat // the epoch goes on
				went++
			}
			p.want(time.Now(), "the same", want)
			p.want(time.Now(), fmt.Sprint("other ", i), Unique)
			p.kill()
			p = live(t, small(dir), window, l)
			p.want(time.Now(), "the same", Repeat)
			if i%2 == 0 {
				synctest.Wait() // until what was left is published
			}
			p.kill()
			time.Sleep(20 * time.Second)
		}
		p := live(t, small(dir), time.Hour, l)
		p.close()
		var sum uint64
		for k := range l.records {
			n, _, _ := l.total(time.Unix(0, k))
			sum += n
		}
		if went == 0 || went == len(lengths) {
			t.Errorf("%d of %d times an epoch went on", went, len(lengths))
		}
		if want := uint64(2*len(lengths) - went); sum != want {
			t.Errorf("the records since %v add up to %d, want %d", base, sum, want)
		}
	})
}

// TestEpochsThatCannotBePublishedAreBounded: while the epochs of all slots wait to be
// published, ids are refused; when the publisher works again, no count is missing.
func TestEpochsThatCannotBePublishedAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		l := newFakeSpool(t)
		l.block = true
		p := live(t, small(dir), time.Minute, l)
		var sum uint64
		refused := 0
		const waiting = slotCount - startSlots
		for n := range waiting + 5 {
			v, _, err := p.add(time.Now(), strconv.Itoa(n))
			switch {
			case errors.Is(err, ErrUnavailable) && n >= waiting:
				refused++
			case v != Unique || err != nil:
				t.Fatalf("epoch %d: %v, %v", n, v, err)
			default:
				sum++
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			p.m.reclaim()
		}
		if refused != 5 {
			t.Errorf("%d ids were refused, want 5", refused)
		}
		p.kill()
		l.block = false
		p = live(t, small(dir), time.Minute, l)
		p.want(time.Now(), "again", Unique)
		p.close()
		var got uint64
		for k := range l.records {
			n, _, _ := l.total(time.Unix(0, k))
			got += n
		}
		if got != sum+1 || len(l.records) < waiting {
			t.Errorf("%d windows add up to %d, want %d and %d", len(l.records), got, waiting, sum+1)
		}
	})
}

// TestWaitingEpochsKeepTheirIds: when an earlier epoch is published, the segments of a later
// one that is not published stay.
func TestWaitingEpochsKeepTheirIds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := time.Now()
		cfg := small(t.TempDir())
		cfg.segmentChunks = 2 // a chunk each
		l := newFakeSpool(t)
		for allowed := range 4 { // the publisher takes so many records and hangs
			l.block, l.allowed = true, allowed
			p := live(t, cfg, time.Minute, l)
			held, _ := p.c.Enter(time.Now().UnixNano(), 0, 1) // no epoch is published before all are there
			for range 5 {
				for i := range 200 {
					p.want(time.Now(), strconv.Itoa(i), Unique)
				}
				time.Sleep(time.Minute)
				synctest.Wait()
			}
			held.Leave(0, 0, 1)
			time.Sleep(time.Second)
			synctest.Wait()
			for i := range 200 {
				p.want(time.Now(), strconv.Itoa(i), Unique)
			}
			p.kill()
			time.Sleep(time.Minute)
		}
		l.block = false
		p := live(t, cfg, time.Minute, l)
		p.close()
		for n := range 4 * 6 {
			if sum, _, _ := l.total(base.Add(time.Duration(n) * time.Minute)); sum != 200 {
				t.Errorf("the records of minute %d add up to %d, want 200", n, sum)
			}
		}
	})
}

// TestFilesStayAsLargeAsTheEpochs: the segments of published epochs are used again, and those
// of a large one are removed after some time.
func TestFilesStayAsLargeAsTheEpochs(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector has a sync.Pool forget writers, and so their chunks")
	}
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		l := newFakeSpool(t)
		p := live(t, small(dir), time.Minute, l)
		var most, last uint64
		for n := range 60 {
			ids := 300
			if n == 5 {
				ids = 20_000
			}
			for i := range ids {
				p.want(time.Now(), strconv.Itoa(i), Unique)
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			time.Sleep(time.Second)
			synctest.Wait()
			for range 3 {
				if err := p.m.journal.trim(); err != nil {
					t.Fatal(err)
				}
			}
			last = p.m.Stats().Kept - stateBytes
			most = max(most, last)
		}
		if most < 20_000*8 || most > 20_000*12 || last > 5*16*chunkBytes {
			t.Errorf("the files took up to %d and in the end %d bytes", most, last)
		}
		files, err := filepath.Glob(filepath.Join(small(dir).Dir, "ids-*"))
		if err != nil || uint64(len(files)) != last/(16*chunkBytes) {
			t.Errorf("%d files, %v; want %d", len(files), err, last/(16*chunkBytes))
		}
		p.close()
	})
}

// TestRequestsDoNotWaitForTheDisk: a sync leaves the pages that many requests are writing to
// the next sync; if few ids arrive, it leaves nothing out. A segment that was synced is touched
// before it is used again.
func TestRequestsDoNotWaitForTheDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		synced := map[string]int{} // chunks of a file, by its last sync
		cfg := small(t.TempDir())
		cfg.segmentChunks = 4 * busyChunks
		cfg.msync = func(name string, b []byte) error {
			synced[name] = len(b) / chunkBytes
			return nil
		}
		p := live(t, cfg, time.Minute, newFakeSpool(t))
		j, id := p.m.journal, 0
		chunks := func(n int) (handed int) {
			for to := j.handed() + n; j.handed() < to; id++ {
				p.want(time.Now(), strconv.Itoa(id), Unique)
			}
			return j.handed()
		}
		p.want(time.Now(), "first", Unique) // there is a segment
		for _, tt := range []struct {
			name  string
			taken int
			left  bool
		}{{"busy", busyChunks, true}, {"quiet", busyChunks - busyTail - 8, false}, {"idle", 0, false}, {"busy again", busyChunks, true}} {
			handed := chunks(tt.taken)
			if err := j.sync(true); err != nil {
				t.Fatal(err)
			}
			left := handed - synced[segmentName(0)]
			if tt.left && (left < busyTail || left > busyTail+8) || !tt.left && left != 0 {
				t.Errorf("%s: %d of %d chunks are left to the next sync", tt.name, left, handed)
			}
		}
		handed := chunks(busyChunks - 8)
		if err := j.sync(false); err != nil || synced[segmentName(0)] != handed {
			t.Errorf("a full sync had %d of %d chunks, %v", synced[segmentName(0)], handed, err)
		}

		for ; j.current.index == 0; id++ { // into the next segment
			p.want(time.Now(), strconv.Itoa(id), Unique)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		p.want(time.Now(), "next", Unique) // the first segment is free
		if len(j.ready) != 1 || j.ready[0].index != 0 || j.ready[0].warm {
			t.Fatalf("ready are %+v, want the first segment, not touched", j.ready)
		}
		chunks(j.segmentChunks / 2) // to the middle of the one in use
		j.prepare()
		if !j.ready[0].warm {
			t.Error("the segment that is used next was not touched")
		}
		p.close()
	})
}

// handed returns how many chunks of the current segment were handed out.
func (j *journal) handed() int {
	if j.current == nil {
		return 0
	}
	return j.current.next
}

// TestMaxIDsHoldsOverRestarts: the ids that earlier processes added to an epoch count, too.
func TestMaxIDsHoldsOverRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, maxIDs := range []int{20, 2 * tightBelow} {
			dir := t.TempDir()
			l := newFakeSpool(t)
			cfg := small(dir)
			cfg.MaxIDs = uint64(maxIDs)
			for n := range 4 {
				p := live(t, cfg, time.Hour, l)
				for i := n * maxIDs / 4; i < (n+1)*maxIDs/4; i++ {
					p.want(time.Now(), strconv.Itoa(i), Unique)
				}
				p.kill()
			}
			p := live(t, cfg, time.Hour, l)
			p.want(time.Now(), "0", Repeat)
			if v, _, err := p.add(time.Now(), "x"); !errors.Is(err, ErrFull) {
				t.Errorf("one too many: %v, %v", v, err)
			}
			p.close()
			if sum, _, _ := l.total(p.c.Last().Start()); sum != uint64(maxIDs) {
				t.Errorf("counted %d, want %d", sum, maxIDs)
			}
		}
	})
}

// TestIdsThatDoNotFitAreRefusedNotForgotten: a process with less memory than the last one
// cannot judge ids in the open window, but can in the next.
func TestIdsThatDoNotFitAreRefusedNotForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		l := newFakeSpool(t)
		const ids = 200_000
		cfg := small(dir)
		p := live(t, cfg, time.Minute, l)
		for i := range ids {
			p.want(time.Now(), strconv.Itoa(i), Unique)
		}
		p.kill()
		cfg.MaxBytes = 1536<<10 + 1<<19 // the smallest tables, and a level
		p = live(t, cfg, time.Minute, l)
		if v, _, err := p.add(time.Now(), "0"); !errors.Is(err, ErrFull) {
			t.Errorf("got %v, %v; want ErrFull", v, err)
		}
		window := p.c.Last().Start()
		time.Sleep(time.Minute)
		p.want(time.Now(), "0", Unique)
		p.close()
		if sum, _, exact := l.total(window); sum != ids || !exact {
			t.Errorf("the records add up to %d, exact %t; want %d", sum, exact, ids)
		}
	})
}

func TestKeptAddAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	dir := t.TempDir()
	m := newMemory(t, Config{Dir: dir, Expect: 100_000, ExpectWide: 100_000})
	e := newEpochs(t, m)
	in, _ := e.Enter(e.At(0), 0, 1)
	defer in.Leave(0, 0, 1)
	for name, format := range map[string]string{"decimal": "1%d", "text": "text %d"} {
		ids := make([][]byte, 20_000)
		for i := range ids {
			ids[i] = fmt.Appendf(nil, format, i)
		}
		n := 0
		if got := testing.AllocsPerRun(len(ids)-1, func() {
			if v, err := addOne(m, in.Epoch, ids[n]); v != Unique || err != nil {
				t.Fatal(v, err)
			}
			n++
		}); got != 0 {
			t.Errorf("%s: Add allocates %v times, want 0", name, got)
		}
	}
}

// TestFlippedBitsOfChunksAreFound: every bit of a head, and of a record that counts. A flipped
// bit of the number or the kind of the records may pass once in 65,536 times, and so may a
// record if its check is by chance that of the first version.
func TestFlippedBitsOfChunksAreFound(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 1))
	tried, missed := 0, 0
	for range 300 {
		kind := rnd.IntN(recordKinds)
		if layouts[kind].words == 0 {
			continue
		}
		var ch chunk
		for i := range ch {
			ch[i] = rnd.Uint64() // what an earlier epoch left
		}
		opened, records := 1+rnd.Uint64N(1<<rnd.IntN(serialBits)), rnd.Uint64N(chunkRoom[kind]+1)
		c := cursor{chunk: &ch, body: bodyOf(opened, kind)}
		ch[0] = headOf(c.body, 0)
		for range records {
			words := make([]uint64, layouts[kind].words)
			for i := range words {
				words[i] = rnd.Uint64()
			}
			switch kind {
			case narrowKind:
				c.append(Key{kind: narrowKind, lo: words[0]})
			case wideKind, pairKind:
				c.append(Key{kind: wideKind, hi: words[0], lo: words[1]})
			default:
				c.put(words)
			}
		}
		serial, k, n, ok := ch.parse()
		if !ok || serial != opened || k != kind || n != records {
			t.Fatalf("head %x: %d, %d, %d, %t", ch[0], serial, k, n, ok)
		}
		for bit := range 64 * (1 + int(records*layouts[kind].words)) {
			ch[bit/64] ^= 1 << (bit % 64)
			if _, _, _, ok := ch.parse(); ok {
				missed++
			}
			ch[bit/64] ^= 1 << (bit % 64)
			tried++
		}
	}
	if tried < 100_000 || missed > tried/10_000 {
		t.Errorf("of %d flipped bits %d were missed", tried, missed)
	}
}

// TestFlippedRecordsAreDamage: with a wrong id in the journal, the right one would get ok twice
// in an exact window; with a wrong token, the replay of its id would be answered as a repeat.
func TestFlippedRecordsAreDamage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		cfg := small(dir)
		p := live(t, cfg, time.Hour, newFakeSpool(t))
		for i, options := range [][2]string{{"", ""}, {"key", ""}, {"", "token"}, {"key", "token"}} {
			for _, id := range []string{strconv.Itoa(i), fmt.Sprint("text ", i)} {
				if v, _, err := p.with(time.Now(), id, options[0], options[1]); err != nil || v != Unique {
					t.Fatal(id, options, v, err)
				}
			}
		}
		p.kill()
		whole, err := os.ReadFile(filepath.Join(cfg.Dir, segmentName(0)))
		if err != nil {
			t.Fatal(err)
		}
		tried := 0
		for at := chunkBytes; at < len(whole); at += 8 {
			if at%chunkBytes == 0 || binary.NativeEndian.Uint64(whole[at:]) == 0 {
				continue
			}
			tried++
			again := small(filepath.Join(dir, "again"))
			copyDir(t, cfg.Dir, again.Dir)
			b := bytes.Clone(whole)
			b[at+tried%8] ^= 1 << (tried / 8 % 8)
			if err := os.WriteFile(filepath.Join(again.Dir, segmentName(0)), b, 0o600); err != nil {
				t.Fatal(err)
			}
			aside := false
			again.OnSetAside = func(string, error) { aside = true }
			p := live(t, again, time.Hour, newFakeSpool(t))
			if exact := p.c.Last().Exact(); !aside || exact {
				t.Errorf("word %d of chunk %d has a flipped bit: set aside: %t, the window is exact: %t", at%chunkBytes/8, at/chunkBytes, aside, exact)
			}
			p.close()
			if err := os.RemoveAll(filepath.Join(dir, "again")); err != nil {
				t.Fatal(err)
			}
		}
		if tried < 10 {
			t.Errorf("%d words are not 0", tried)
		}
	})
}

// TestKilledProcessesLoseNothing kills processes under load. Their answers hold in the next
// process: an id that got ok in a window does not get it again, and the records of each window
// add up to the answers, plus at most one id for each writer of a killed process.
func TestKilledProcessesLoseNothing(t *testing.T) {
	if dir := os.Getenv("VERVE_TEST_LIFE"); dir != "" {
		liveUntilKilled(dir)
		return
	}
	for _, tt := range []struct {
		window  time.Duration
		rounds  int
		answers int // of a life, at most
	}{
		{time.Hour, 20, 8000},                // lives of one window
		{50 * time.Millisecond, 10, 80_000},  // windows of one life
		{200 * time.Millisecond, 15, 40_000}, // both
	} {
		t.Run(tt.window.String(), func(t *testing.T) {
			if raceEnabled || testing.Short() {
				tt.rounds /= 5
			}
			dir := t.TempDir()
			rnd := rand.New(rand.NewPCG(3, uint64(tt.window)))
			oks := map[string]bool{}
			answered := map[int64]uint64{} // ok, by window
			var total int
			for round := range tt.rounds {
				last := round == tt.rounds-1
				cmd := exec.Command(os.Args[0], "-test.run=^TestKilledProcessesLoseNothing$")
				cmd.Env = append(os.Environ(), "VERVE_TEST_LIFE="+dir, fmt.Sprint("VERVE_TEST_WINDOW=", tt.window), fmt.Sprint("VERVE_TEST_ROUND=", round))
				cmd.Stderr = os.Stderr
				stdin, err := cmd.StdinPipe()
				if err != nil {
					t.Fatal(err)
				}
				out, err := cmd.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() }) // it hangs
				limit := 200 + rnd.IntN(tt.answers)
				lines := bufio.NewReader(out)
				for n := 0; ; n++ {
					if n == limit {
						if last {
							stdin.Close()
						} else if err := cmd.Process.Kill(); err != nil {
							t.Fatal(err)
						}
					}
					line, err := lines.ReadString('\n') // what was written before the kill is still read
					if err != nil {
						break
					}
					var window int64
					var id, verdict string
					if _, err := fmt.Sscan(line, &window, &id, &verdict); err != nil || verdict == "error" {
						if verdict != "error" {
							continue // the test framework's
						}
						t.Fatalf("round %d: %s", round, line)
					}
					total++
					key := fmt.Sprint(window, " ", id)
					if verdict == "ok" {
						if oks[key] {
							t.Fatalf("round %d: id %s got ok twice in window %d", round, id, window)
						}
						oks[key] = true
						answered[window]++
					}
				}
				_ = cmd.Wait() // killed
			}
			sums := map[int64]uint64{}
			readRecords(t, dir, func(window int64, unique uint64, exact bool) {
				sums[window] += unique
				if !exact {
					t.Errorf("window %d is not exact", window)
				}
			})
			var more uint64
			for window, n := range answered {
				if sums[window] < n {
					t.Errorf("window %d: records add up to %d, %d were answered", window, sums[window], n)
				}
			}
			for window, n := range sums {
				more += n - min(n, answered[window])
			}
			if most := uint64(lifeWriters * (tt.rounds - 1)); more > most {
				t.Errorf("%d ids were counted and not answered, want at most %d", more, most)
			}
			t.Logf("%d answers, %d ok in %d windows, %d lives, %d counted and not answered", total, len(oks), len(sums), tt.rounds, more)
		})
	}
}

const lifeWriters = 3

func readRecords(t testing.TB, dir string, f func(window int64, unique uint64, exact bool)) {
	b, err := os.ReadFile(filepath.Join(dir, "records"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		if t == nil {
			panic(err)
		}
		t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		var window int64
		var unique uint64
		var exact bool
		if _, err := fmt.Sscan(string(line), &window, &unique, &exact); err != nil {
			panic(fmt.Sprintf("%q: %v", line, err))
		}
		f(window, unique, exact)
	}
}

// recordsFile publishes by appending to a file, which outlives a kill.
type recordsFile struct{ *os.File }

func (f recordsFile) Publish(_ context.Context, c counter.Count) error {
	_, err := f.Write(fmt.Appendf(nil, "%d %d %t\n", c.Start.UnixNano(), c.Unique, c.Exact))
	return err
}

func liveUntilKilled(dir string) {
	check := func(err error) {
		if err != nil {
			fmt.Println(0, err, "error")
			os.Exit(1)
		}
	}
	window, err := time.ParseDuration(os.Getenv("VERVE_TEST_WINDOW"))
	check(err)
	var last, sum int64
	readRecords(nil, dir, func(window int64, unique uint64, _ bool) {
		if window != last {
			last, sum = window, 0
		}
		sum += int64(unique)
	})
	var lastStart time.Time
	if last != 0 {
		lastStart = time.Unix(0, last).UTC()
	}
	cfg := small(dir)
	cfg.CleanupInterval = 10 * time.Millisecond
	cfg.OnSetAside = func(_ string, reason error) { check(reason) }
	m, err := NewMemory(cfg)
	check(err)
	f, err := os.OpenFile(filepath.Join(dir, "records"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	check(err)
	c, err := counter.New(counter.Config{Window: window, Store: m, Publisher: recordsFile{f}, NotBefore: lastStart, Past: m.Past(map[string]counter.Published{"": {Last: lastStart, Unique: uint64(sum)}})})
	check(err)
	var running sync.WaitGroup
	ctx, stop := context.WithCancel(context.Background())
	go m.Run(ctx)
	running.Go(func() { check(c.Run(context.Background())) })
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		c.Seal()
	}()
	round, err := strconv.Atoi(os.Getenv("VERVE_TEST_ROUND"))
	check(err)
	for w := range lifeWriters {
		running.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(round), uint64(w)))
			var line []byte
			for {
				// Ids of this process and of earlier ones.
				id := strconv.Itoa(rnd.IntN(1500 * (round + 1)))
				if rnd.IntN(2) == 0 {
					id = "t" + id
				}
				in, ok := c.Enter(time.Now().UnixNano(), uint64(w), 1)
				if !ok {
					return
				}
				v, err := addTo(m, in.Epoch, []byte(id))
				check(err)
				leave(in, v)
				word := map[Verdict]string{Unique: "ok", Repeat: "failed"}[v]
				if word == "" {
					continue
				}
				line = fmt.Appendf(line[:0], "%d %s %s\n", in.Start().UnixNano(), id, word)
				if _, err := os.Stdout.Write(line); err != nil {
					return
				}
			}
		})
	}
	running.Wait()
	stop()
	check(m.Close())
}
