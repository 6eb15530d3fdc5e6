package dedup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"verve/counter"
	"verve/internal/epochtest"
	"verve/internal/testproc"
)

func TestMain(m *testing.M) {
	testproc.Setup()
	os.Exit(m.Run())
}

// newMemory closes the Memory when the test is over, and checks that all its
// memory was given back.
func newMemory(t testing.TB, cfg Config) *Memory {
	t.Helper()
	cfg.Heap = cfg.Heap || raceEnabled
	m, err := NewMemory(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if used := m.Stats().Bytes; used != 0 && !t.Failed() {
			t.Errorf("after Close %d bytes are in use", used)
		}
	})
	return m
}

// fill adds n decimals, beginning with from, and as many texts to the k-th epoch, in which all
// must be new.
func fill(t testing.TB, e epochs, m *Memory, k, from, n int) {
	t.Helper()
	in, ok := e.Enter(e.At(k), 0, 1)
	if !ok {
		t.Fatal("the counter is sealed")
	}
	defer in.Leave(0, 0, 1)
	var b [24]byte
	for i := from; i < from+n; i++ {
		id := strconv.AppendInt(b[:0], int64(i), 10)
		for range 2 {
			if v, err := addTo(m, in.Epoch, id); v != Unique || err != nil {
				t.Fatalf("epoch %d, id %s: got %v, %v; want Unique", k, id, v, err)
			}
			id = append(id, 'x')
		}
	}
}

// run runs the cleaner for the rest of the test.
func run(t testing.TB, s Set) {
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { stop(); running.Wait() })
}

// step does what Run does if it was nudged; otherwise nothing.
func step(m *Memory) {
	select {
	case <-m.check:
		m.growAhead()
		if m.behind() {
			m.reclaim()
		}
	default:
	}
}

// TestCleanerReclaimsBeforeTagsComeRound adds ids to one epoch and turns until the tag of that
// is used again: the old ids must not be found in the new epoch.
func TestCleanerReclaimsBeforeTagsComeRound(t *testing.T) {
	const ids = 1000
	m := newMemory(t, Config{CleanupBatch: 1})
	e := newEpochs(t, m)
	fill(t, e, m, 0, 0, ids)
	for n := 1; n < lap; n++ {
		e.want(t, m, n, "only this one", Unique)
		m.reclaim()
	}
	if got := m.Stats().Reclaimed; got < 2*ids-1 {
		t.Errorf("reclaimed %d slots, want about %d", got, 2*ids)
	}
	fill(t, e, m, lap, 0, ids)
}

// TestRareCleanupIsWokenByTurns has such a long cleanup interval that all tags are used many
// times within it. The cleaner runs in the bubble, after each turn.
func TestRareCleanupIsWokenByTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{CleanupInterval: maxCleanupInterval, CleanupBatch: 1, Heap: true})
		e := newEpochs(t, m)
		run(t, m)
		for n := range 3 * lap {
			e.want(t, m, n, "42", Unique)
			e.want(t, m, n, "text", Unique)
			synctest.Wait()
		}
	})
}

// TestWithoutCleaningIdsAreRefusedNotMistaken never sweeps: while words of half a lap ago are
// still there, all ids are refused. Each answer is Unique or ErrFull; with Turned the request
// would try again for ever.
func TestWithoutCleaningIdsAreRefusedNotMistaken(t *testing.T) {
	m := newMemory(t, Config{})
	e := newEpochs(t, m)
	refused := 0
	for n := range 2*lap + 100 {
		for _, id := range []string{"42", "text"} {
			switch v, err := e.add(t, m, n, id); {
			case errors.Is(err, ErrFull):
				refused++
			case err != nil || v != Unique:
				t.Fatalf("epoch %d: got %v, %v; want Unique or ErrFull", n, v, err)
			}
		}
		if n < halfLap && refused > 0 {
			t.Fatalf("refused in epoch %d already", n)
		}
	}
	if want := 2 * (2*lap + 100 - halfLap); refused != want {
		t.Errorf("refused %d ids, want %d", refused, want)
	}
	if got := m.Stats().Full; got != uint64(refused) {
		t.Errorf("Stats has %d ids refused, want %d", got, refused)
	}
	m.reclaim()
	e.want(t, m, 2*lap+100, "42", Unique)
	e.want(t, m, 2*lap+100, "42", Repeat)
}

// TestSleepingRequestNeverMeetsEpochsAcrossTheLap lets a request sleep in its epoch for a whole
// lap of tags, a minute and a half with the shortest window. While it sleeps the cleaner may
// not sweep its epoch, and epochs that are so far ahead that the request would treat their
// words as older are refused.
func TestSleepingRequestNeverMeetsEpochsAcrossTheLap(t *testing.T) {
	const ids = 3000
	m := newMemory(t, Config{CleanupBatch: 1 << 30})
	e := newEpochs(t, m)
	fill(t, e, m, 0, 0, ids)
	in, _ := e.Enter(e.At(0), 3, 1)
	refused := 0
	for n := 1; n < lap+50; n++ {
		m.reclaim()
		k := n % ids
		v, err := e.add(t, m, n, strconv.Itoa(k))
		if errors.Is(err, ErrFull) {
			refused++
			continue
		}
		if v != Unique || err != nil {
			t.Fatalf("epoch %d: got %v, %v; want Unique", n, v, err)
		}
		// The request wakes for a moment and adds an id of its own epoch, one of the open
		// epoch, and one of both.
		for _, id := range []int{(n + 1) % ids, k} {
			for _, suffix := range []string{"", "x"} {
				if v, err := addTo(m, in.Epoch, fmt.Appendf(nil, "%d%s", id, suffix)); v == Unique || err != nil {
					t.Fatalf("after %d epochs id %d%s is %v, %v in the first one; want Repeat or Turned", n, id, suffix, v, err)
				}
			}
		}
		e.want(t, m, n, strconv.Itoa(k), Repeat)
	}
	if want := lap + 49 - (halfLap - 1); refused != want {
		t.Errorf("%d epochs were refused, want %d", refused, want)
	}
	in.Leave(0, 0, 1)
	m.reclaim() // first a pass that was begun before the request left
	m.reclaim()
	fill(t, e, m, lap+60, 0, ids)
	if got := len(m.busy); got > 3 {
		t.Errorf("%d epochs are still taken for busy", got)
	}
}

// TestTablesFollowTheLoad runs epochs with far more ids than expected, then with far fewer.
// After two epochs of each kind the tables have the size for the load, and the memory of the
// old tables is given back. The bubble fails the test if a goroutine is left.
func TestTablesFollowTheLoad(t *testing.T) {
	many := 200_000 // more than three times what the smallest tables hold
	if raceEnabled {
		many = 150_000
	}
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{Heap: true})
		e := newEpochs(t, m)
		run(t, m)
		start := m.Stats()
		k := 0
		epochs := func(n, ids int) Stats {
			for range n {
				fill(t, e, m, k, 0, ids)
				k++
				e.want(t, m, k, "turn", Unique) // the next fill is in the same epoch
				time.Sleep(2 * DefaultCleanupInterval)
			}
			return m.Stats()
		}
		first := epochs(1, many)
		if first.Levels < 2 || first.Grown == 0 {
			t.Errorf("after one epoch of %d ids: %+v, want more levels than at the start", many, first)
		}
		epochs(1, many) // after it the new tables are taken
		large := epochs(1, many)
		if large.Resized != 2 || large.Levels > 3 {
			t.Errorf("after three epochs of %d ids: %+v, want both tables replaced once", many, large)
		}
		if again := epochs(3, many); again.Resized != large.Resized || again.Bytes > large.Bytes+large.Bytes/4 {
			t.Errorf("after three more: %+v, want hardly a change since %+v", again, large)
		}
		if perID := float64(large.Bytes) / float64(2*many); !raceEnabled && perID > 40 {
			t.Errorf("%.1f bytes an id, want the size of the load", perID)
		}
		if small := epochs(forecastEpochs-2, 10); small.Resized != 2 {
			t.Errorf("%+v: shrunk before %d epochs showed that the load is gone", small, forecastEpochs)
		}
		if small := epochs(5, 10); small.Bytes != start.Bytes || small.Slots != start.Slots || small.Resized != 4 {
			t.Errorf("after many small epochs: %+v, want the %d bytes of the start", small, start.Bytes)
		}
		if raceEnabled {
			return
		}
		for range 2 { // up and down again: memory must not accumulate
			epochs(2, many)
			if got := epochs(forecastEpochs+5, 10); got.Bytes != start.Bytes {
				t.Errorf("after going up and down: %+v, want the %d bytes of the start", got, start.Bytes)
			}
		}
	})
}

// TestOldTablesLiveAsLongAsARequestIsInside holds a request in an epoch whose
// tables are replaced.
func TestOldTablesLiveAsLongAsARequestIsInside(t *testing.T) {
	const many = 60_000
	m := newMemory(t, Config{})
	e := newEpochs(t, m)
	retired := func(n int) {
		t.Helper()
		for {
			m.mu.Lock()
			got := m.retired
			m.mu.Unlock()
			if got >= n {
				return
			}
			time.Sleep(100 * time.Microsecond)
		}
	}
	fill(t, e, m, 0, 0, many)
	in, _ := e.Enter(e.At(1), 0, 1)
	retired(1)
	m.resize() // makes tables for many ids ready
	old := m.Stats().Bytes
	if m.narrow.next == nil || m.wide.next == nil {
		t.Fatal("no larger tables were made")
	}
	next := m.narrow.next.slots*8 + m.wide.next.slots*16
	e.want(t, m, 2, "7", Unique) // turns: in is the last one in the old tables
	if m.narrow.open.slots*8+m.wide.open.slots*16 != next {
		t.Fatal("the larger tables were not taken")
	}
	m.release()
	if got := m.Stats().Bytes; got != old {
		t.Fatalf("%d bytes, want %d: tables were freed with a request inside", got, old)
	}
	for _, id := range []string{"7", "text"} {
		for _, want := range []Verdict{Unique, Repeat} {
			if v, err := addTo(m, in.Epoch, []byte(id)); v != want || err != nil {
				t.Errorf("late id %s: got %v, %v; want %v", id, v, err, want)
			}
		}
	}
	in.Leave(0, 0, 1)
	retired(2)
	m.release()
	if got := m.Stats().Bytes; got != next {
		t.Errorf("%d bytes, want the %d of the new tables", got, next)
	}
}

// TestSetGrowsUnderWriters lets writers add the same ids, far more than expected, while the
// cleaner grows the tables.
func TestSetGrowsUnderWriters(t *testing.T) {
	const writers = 4
	ids := 400_000
	if raceEnabled {
		ids = 80_000
	}
	m := newMemory(t, Config{CleanupInterval: time.Millisecond})
	e := newEpochs(t, m)
	run(t, m)
	unique := make([]atomic.Uint32, ids)
	var group sync.WaitGroup
	for w := range writers {
		group.Go(func() {
			in, _ := e.Enter(e.At(0), uint64(w), 1)
			defer in.Leave(0, 0, 1)
			var b [24]byte
			for n := range ids {
				i := n
				if w%2 == 1 {
					i = ids - 1 - n // from the other end
				}
				id := strconv.AppendInt(b[:0], int64(i), 10)
				if i%4 == 0 {
					id = append(id, "text"...)
				}
				switch v, err := addTo(m, in.Epoch, id); {
				case err != nil || v == Turned:
					t.Errorf("id %s: got %v, %v", id, v, err)
					return
				case v == Unique:
					unique[i].Add(1)
				}
			}
		})
	}
	group.Wait()
	for i := range unique {
		if n := unique[i].Load(); n != 1 {
			t.Fatalf("id %d was unique %d times", i, n)
		}
	}
	s := m.Stats()
	if s.Levels < 2 || s.Grown < uint64(s.Levels-1) {
		t.Errorf("%+v: the tables did not grow", s)
	}
}

// TestGrowthIsAskedForAgain: even if the last request for growth had no effect, the next id in
// a crowded bucket asks the cleaner again, which grows the table before an add has to. With a
// few secrets in a hundred a bucket is full by chance before that, but not three times in a
// row.
func TestGrowthIsAskedForAgain(t *testing.T) {
	if raceEnabled {
		t.Skip("one goroutine: nothing for the race detector")
	}
	var err error
	for range 3 {
		if err = growsWhenAskedAgain(t); err == nil {
			return
		}
	}
	t.Fatal(err)
}

func growsWhenAskedAgain(t *testing.T) error {
	m := newMemory(t, Config{Expect: 700_000})
	e := newEpochs(t, m)
	in, _ := e.Enter(e.At(0), 0, 1)
	defer in.Leave(0, 0, 1)
	m.check <- struct{}{} // the channel is full with another request
	limit := m.arena.used.Load() + 1
	for i := range 2_500_000 {
		switch i {
		case 715_000:
			m.arena.max = limit // growth fails
		case 735_000:
			step(m)
			if m.narrow.open.depth != 2 || m.narrow.open.checking.Load() {
				return fmt.Errorf("%d levels, asked %t: want a growth that failed", m.narrow.open.depth, m.narrow.open.checking.Load())
			}
			m.arena.max = 0
		}
		depth := m.narrow.open.depth
		if v, err := addTo(m, in.Epoch, strconv.AppendInt(nil, int64(i), 10)); v != Unique || err != nil {
			return fmt.Errorf("id %d: got %v, %v; want Unique", i, v, err)
		}
		if m.narrow.open.depth != depth {
			return fmt.Errorf("id %d found the last of %d levels full: the cleaner was not asked in time", i, depth)
		}
		if i%100 == 0 {
			step(m)
		}
	}
	if m.narrow.open.depth < 3 {
		return fmt.Errorf("%d levels, want more", m.narrow.open.depth)
	}
	return nil
}

// TestMaxIDsHoldsUnderWriters: all writers together add at most MaxIDs ids, plus those that
// were in flight when the limit came near.
func TestMaxIDsHoldsUnderWriters(t *testing.T) {
	const writers = 4
	for _, maxIDs := range []int{1000, 90_000, 200_000} {
		if raceEnabled && maxIDs > 100_000 {
			break
		}
		// In an earlier version, ids that differ only in high bits were all sampled, or none
		// was.
		for name, id := range map[string]func(i int) []byte{
			"sequence":    func(i int) []byte { return strconv.AppendInt(nil, int64(i), 10) },
			"high bits":   func(i int) []byte { return strconv.AppendUint(nil, uint64(i)<<44, 10) },
			"texts":       func(i int) []byte { return strconv.AppendInt([]byte{'x'}, int64(i), 10) },
			"half and so": func(i int) []byte { return strconv.AppendInt([]byte("x")[:i%2], int64(i), 10) },
		} {
			t.Run(fmt.Sprint(maxIDs, " ", name), func(t *testing.T) {
				m := newMemory(t, Config{MaxIDs: uint64(maxIDs)})
				e := newEpochs(t, m)
				var in, refused atomic.Int64
				var group sync.WaitGroup
				for w := range writers {
					group.Go(func() {
						for i := w; i < maxIDs+maxIDs/2; i += writers {
							switch v, err := e.add(t, m, 0, string(id(i))); {
							case v == Unique && err == nil:
								in.Add(1)
							case errors.Is(err, ErrFull):
								refused.Add(1)
							default:
								t.Errorf("id %s: got %v, %v", id(i), v, err)
								return
							}
						}
					})
				}
				group.Wait()
				if got := int(in.Load()); got < maxIDs || got > maxIDs+writers {
					t.Errorf("%d ids got in, want %d to %d", got, maxIDs, maxIDs+writers)
				}
				if got := m.Stats().Full; got != uint64(refused.Load()) {
					t.Errorf("Stats has %d refused, want %d", got, refused.Load())
				}
			})
		}
	}
}

// TestMaxBytesRefusesWhatDoesNotFit: without memory to grow, ids that find no room are refused,
// those that are in are found, and ids that find room are still added.
func TestMaxBytesRefusesWhatDoesNotFit(t *testing.T) {
	const limit = 2 << 20 // the tables of the start and one more level
	m := newMemory(t, Config{MaxBytes: limit, CleanupInterval: time.Millisecond})
	e := newEpochs(t, m)
	run(t, m)
	for k := range 5 { // over resizes that do not fit either
		in := map[string]bool{}
		refused := 0
		for i := range 150_000 {
			id := strconv.Itoa(i)
			switch v, err := e.add(t, m, k, id); {
			case v == Unique && err == nil:
				in[id] = true
			case errors.Is(err, ErrFull):
				refused++
			default:
				t.Fatalf("epoch %d, id %s: got %v, %v", k, id, v, err)
			}
		}
		if refused == 0 || len(in) < 60_000 {
			t.Errorf("epoch %d: %d ids got in and %d were refused", k, len(in), refused)
		}
		for id := range in {
			e.want(t, m, k, id, Repeat)
		}
		if got := m.Stats().Bytes; got > limit {
			t.Fatalf("%d bytes are in use, %d allowed", got, limit)
		}
		if testing.Short() || raceEnabled {
			break
		}
	}
}

func TestNewMemoryNamesTheBadSetting(t *testing.T) {
	for _, cfg := range []Config{
		{CleanupInterval: -1}, {CleanupBatch: -1}, {Expect: maxExpect + 1}, {ExpectWide: 1 << 60},
	} {
		if m, err := NewMemory(cfg); err == nil {
			m.Close()
			t.Errorf("NewMemory(%+v) succeeded", cfg)
		}
	}
	if _, err := NewMemory(Config{Expect: 1_000_000, MaxBytes: 1 << 20}); err == nil || !strings.Contains(err.Error(), "expect-ids") {
		t.Errorf("more expected than fits in MaxBytes: %v, want an error that names expect-ids", err)
	}
}

// TestCloseLeavesTheTableOfARequestInside: a shutdown that runs out of time closes the Set
// while a request is still inside. The request must not use freed memory.
func TestCloseLeavesTheTableOfARequestInside(t *testing.T) {
	m, err := NewMemory(Config{Heap: raceEnabled})
	if err != nil {
		t.Fatal(err)
	}
	c, err := counter.New(counter.Config{Window: epochtest.Window, Store: m, Publisher: epochtest.Nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	in, _ := c.Enter(time.Now().UnixNano(), 0, 1)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"42", "text"} {
		if v, err := addTo(m, in.Epoch, []byte(id)); v != Unique || err != nil {
			t.Errorf("id %s: got %v, %v; want Unique", id, v, err)
		}
	}
	in.Leave(0, 0, 1)
	m.Stats() // the metrics page may still be read
}

func TestAddAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for name, maxIDs := range map[string]uint64{"no limit": 0, "below the limit": 1 << 30, "tight": 1 << 15} {
		m := newMemory(t, Config{MaxIDs: maxIDs})
		e := newEpochs(t, m)
		rnd := rand.New(rand.NewPCG(1, 1))
		var b [64]byte
		for kind, id := range map[string]func() []byte{
			"new decimal": func() []byte { return strconv.AppendUint(b[:0], rnd.Uint64(), 10) },
			"new UUID": func() []byte {
				id := append(b[:0], "3f333df6-90a4-4fda-8dd3-9"...)
				for range 11 {
					id = append(id, "0123456789abcdef"[rnd.IntN(16)])
				}
				return id
			},
			"new text": func() []byte { return strconv.AppendUint(append(b[:0], 'x'), rnd.Uint64(), 10) },
			"repeat":   func() []byte { return append(b[:0], "42"...) },
		} {
			if n := testing.AllocsPerRun(2000, func() {
				in, _ := e.Enter(e.At(0), 0, 1)
				v, err := addOne(m, in.Epoch, id())
				if err != nil || v == Turned {
					t.Error(v, err)
				}
				in.Leave(1, 0, 0)
			}); n != 0 {
				t.Errorf("%s, %s: %v allocations an add, want 0", name, kind, n)
			}
		}
	}
}

// TestAddManyAgreesWithAddsOfOne adds the same ids, of all kinds and with repeats within a
// batch, one by one to one store and in batches to another.
func TestAddManyAgreesWithAddsOfOne(t *testing.T) {
	for _, maxIDs := range []uint64{0, 3000, 1 << 20} {
		one, many := newMemory(t, Config{MaxIDs: maxIDs}), newMemory(t, Config{MaxIDs: maxIDs, Dir: t.TempDir()})
		e, f := newEpochs(t, one), newEpochs(t, many)
		rnd := rand.New(rand.NewPCG(5, maxIDs))
		for turn := range 3 {
			for range 1000 {
				ids := make([][]byte, rnd.IntN(40))
				for i := range ids {
					n := rnd.IntN(5000)
					switch rnd.IntN(3) {
					case 0:
						ids[i] = strconv.AppendInt(nil, int64(n), 10)
					case 1:
						ids[i] = fmt.Appendf(nil, "3f333df6-90a4-4fda-8dd3-9485d27ce%03d", n%1000)
					default:
						ids[i] = fmt.Appendf(nil, "text %d", n)
					}
				}
				in, _ := f.Enter(f.At(turn), 0, uint64(len(ids)))
				verdicts := make([]Verdict, len(ids))
				items := make([]Item, len(ids))
				for i, id := range ids {
					items[i], verdicts[i] = Item{ID: id, Key: many.secret.keyOf(id, nil)}, Turned
				}
				err := many.AddMany(in.Epoch, items, verdicts)
				var left [Verdicts]uint64
				for i, v := range verdicts {
					left[v]++
					if got, cause := e.add(t, one, turn, string(ids[i])); got != v || (v == Full) != errors.Is(cause, ErrFull) {
						t.Fatalf("id %q: %v in a batch; %v, %v alone", ids[i], v, got, cause)
					}
				}
				in.Leave(left[Unique], left[Repeat], left[Full])
				if left[Turned]+left[Unavailable] > 0 || (left[Full] > 0) != errors.Is(err, ErrFull) {
					t.Fatalf("%v, %v", verdicts, err)
				}
			}
			if a, b := e.Last().Unique(), f.Last().Unique(); a != b || a == 0 {
				t.Errorf("turn %d: %d unique by Add, %d by AddMany", turn, a, b)
			}
		}
	}
}

// TestKeyMayComeAfterTheTablesAreLetGo: a request at the stop may prefetch places that are no
// longer mapped.
func TestKeyMayComeAfterTheTablesAreLetGo(t *testing.T) {
	m, err := NewMemory(Config{Expect: 1_000_000, ExpectWide: 1_000_000, Heap: raceEnabled})
	if err != nil {
		t.Fatal(err)
	}
	c, err := counter.New(counter.Config{Window: epochtest.Window, Store: m, Publisher: epochtest.Nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	ids := []string{"42", "3f333df6-90a4-4fda-8dd3-9485d27cee36", "text"}
	before := make([]Key, len(ids))
	for i, id := range ids {
		before[i] = m.secret.keyOf([]byte(id), nil)
	}
	c.Last().State.Retire()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	for i, id := range ids {
		if k := m.secret.keyOf([]byte(id), nil); k != before[i] {
			t.Errorf("id %q: %v, want %v as before", id, k, before[i])
		}
	}
}

func TestAddManyAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for _, dir := range []string{"", t.TempDir()} {
		m := newMemory(t, Config{Expect: 100_000, Dir: dir})
		e := newEpochs(t, m)
		id, items, verdicts := make([]byte, 0, 20), make([]Item, 20), make([]Verdict, 20)
		n := uint64(0)
		if got := testing.AllocsPerRun(2000, func() {
			for i := range items {
				n++
				id = strconv.AppendUint(id[:0], n, 10)
				items[i].Key, verdicts[i] = m.secret.keyOf(id, nil), Turned
			}
			in, _ := e.Enter(e.At(0), 0, 20)
			if err := m.AddMany(in.Epoch, items, verdicts); verdicts[19] != Unique || err != nil {
				t.Fatal(verdicts, err)
			}
			in.Leave(20, 0, 0)
		}); got != 0 {
			t.Errorf("with directory %q: %v allocations, want 0", dir, got)
		}
	}
}

// TestOpenAllocatesNothing turns epochs while the earlier ones are retired in time.
func TestOpenAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	// The runtime allocates now and then, too, on a busy machine: not in each of the runs.
	var allocated []int
	for range 5 {
		if allocated = opensThatAllocate(t); len(allocated) == 0 {
			return
		}
	}
	t.Errorf("opening the epochs %d allocated", allocated)
}

// opensThatAllocate opens epochs and returns the numbers of those with which something was
// allocated.
func opensThatAllocate(t *testing.T) (allocated []int) {
	m := newMemory(t, Config{})
	es := make([]*counter.Epoch, 0, 64)
	c, err := counter.New(counter.Config{Window: epochtest.Window, Store: keep{m, &es}, Publisher: epochtest.Nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	base := c.Last().Start().UnixNano()
	for n := range cap(es) - 1 {
		in, _ := c.Enter(base+int64(n+1)*int64(epochtest.Window), 0, 1)
		in.Leave(0, 0, 1)
	}
	for n, e := range es {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		e.State = m.Open(e)
		runtime.ReadMemStats(&after)
		if after.Mallocs > before.Mallocs && n > 4 { // the first make room
			allocated = append(allocated, n)
		}
		e.State.Retire()
	}
	return allocated
}

// keep is a Store that only keeps the epochs.
type keep struct {
	*Memory
	epochs *[]*counter.Epoch
}

func (k keep) Open(e *counter.Epoch) counter.State {
	*k.epochs = append(*k.epochs, e)
	return nil // the test opens e
}

// TestOpenEpochIsNotTakenForOneThatWasLeft: between the opening of an epoch in the Set and in
// the Counter, requests still enter the epoch before it.
func TestOpenEpochIsNotTakenForOneThatWasLeft(t *testing.T) {
	m := newMemory(t, Config{})
	o := &opening{Memory: m, t: t}
	e := newEpochs(t, o)
	for n := range 10 {
		e.want(t, m, n, "42", Unique)
		o.open = e.Last()
	}
}

// opening settles in Open, before the Counter goes on.
type opening struct {
	*Memory
	t    *testing.T
	open *counter.Epoch
}

func (o *opening) Open(e *counter.Epoch) counter.State {
	s := o.Memory.Open(e)
	o.reclaim()
	if o.open != nil && !slices.Contains(o.busy, o.open) {
		o.t.Errorf("epoch %d is forgotten, and a request can still enter it", o.open.Number())
	}
	return s
}

// TestNewTablesServeAnySerial: after a restart the serials of the epochs may go
// on where an earlier process left them, in tables that are new.
func TestNewTablesServeAnySerial(t *testing.T) {
	for _, first := range []int{halfLap, halfLap + 1, lap, 2*lap + 7} {
		m := newMemory(t, Config{CleanupBatch: 1})
		var es []*counter.Epoch
		c, err := counter.New(counter.Config{Window: epochtest.Window, Store: keep{m, &es}, Publisher: epochtest.Nobody{}})
		if err != nil {
			t.Fatal(err)
		}
		base := c.Last().Start().UnixNano()
		for n := range first + lap {
			in, _ := c.Enter(base+int64(n)*int64(epochtest.Window), 0, 1)
			in.Leave(0, 0, 1)
		}
		for _, e := range es[first:] {
			e.State = m.Open(e)
			for _, want := range []Verdict{Unique, Repeat} {
				if v, err := addTo(m, e, []byte("42")); v != want || err != nil {
					t.Fatalf("first serial %d, serial %d: got %v, %v; want %v", first+1, e.Serial(), v, err, want)
				}
			}
			m.reclaim()
			e.State.Retire()
		}
	}
}

// TestStatsTellHowManyIDsFit: MaxIDs, or what the memory allowed has room for, by
// the kinds of ids that come.
func TestStatsTellHowManyIDsFit(t *testing.T) {
	for _, c := range []struct {
		name      string
		cfg       Config
		fit       uint64
		estimated bool
	}{
		{"nothing set", Config{}, 0, false},
		{"ids", Config{MaxIDs: 1000}, 1000, false},
		{"memory", Config{MaxBytes: 14 << 20}, 1 << 20, true},
		{"both, the ids are fewer", Config{MaxIDs: 1000, MaxBytes: 14 << 20}, 1000, false},
		{"both, the memory is less", Config{MaxIDs: 2 << 20, MaxBytes: 14 << 20}, 1 << 20, true},
	} {
		c.cfg.Heap = true
		m, err := NewMemory(c.cfg)
		if err != nil {
			t.Fatal(err)
		}
		if s := m.Stats(); s.Fit != c.fit || s.Estimated != c.estimated {
			t.Errorf("%s: got %d, estimated %v, want %d, %v", c.name, s.Fit, s.Estimated, c.fit, c.estimated)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
	m, err := NewMemory(Config{Heap: true, MaxBytes: 28 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	e := new(counter.Epoch)
	e.State = m.Open(e)
	for i := range 100_000 {
		id := fmt.Appendf(nil, "text %d", i)
		if _, err := addTo(m, e, id); err != nil {
			t.Fatal(err)
		}
	}
	if s := m.Stats(); s.Fit != 1<<20 || !s.Estimated {
		t.Errorf("of text got %d, estimated %v, want %d", s.Fit, s.Estimated, 1<<20)
	}
	e.State.Retire()
}
