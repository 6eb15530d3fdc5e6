package dedup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"verve/counter"
)

// newSets are the stores that fulfil the contract of Set.
var newSets = map[string]func(t testing.TB, maxIDs uint64) Set{
	"memory": func(t testing.TB, maxIDs uint64) Set {
		m, err := NewMemory(Config{MaxIDs: maxIDs, Heap: raceEnabled})
		if err != nil {
			t.Fatal(err)
		}
		return m
	},
}

func eachSet(t *testing.T, f func(t *testing.T, s Set)) {
	for name, newSet := range newSets {
		t.Run(name, func(t *testing.T) {
			s := newSet(t, 0)
			t.Cleanup(func() {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			})
			f(t, s)
		})
	}
}

// nobody publishes nothing: the tests read the counts of the epochs themselves.
type nobody struct{ counts chan counter.Count }

func (n nobody) Publish(_ context.Context, c counter.Count) error {
	if n.counts != nil {
		n.counts <- c
	}
	return nil
}

// epochs lets a test turn epochs by hand: at(n) is a time inside the n-th.
type epochs struct {
	*counter.Counter
	base int64
}

func newEpochs(t testing.TB, s Set) epochs {
	c, err := counter.New(counter.Config{Window: time.Hour, Store: s, Publish: nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var run sync.WaitGroup
	run.Go(func() { c.Run(ctx) })
	t.Cleanup(func() { stop(); run.Wait() })
	return epochs{c, c.Last().Start().UnixNano()}
}

func (e epochs) at(n int) int64 { return e.base + int64(n)*int64(time.Hour) }

// add brings id to the n-th epoch.
func (e epochs) add(t testing.TB, s Set, n int, id string) (Verdict, error) {
	t.Helper()
	in, ok := e.Enter(e.at(n), 0)
	if !ok {
		t.Fatal("the counter is sealed")
	}
	v, err := s.Add(in.Epoch, []byte(id))
	switch {
	case err != nil || v == Turned:
		in.Leave(counter.Void)
	case v == Unique:
		in.Leave(counter.Unique)
	default:
		in.Leave(counter.Repeat)
	}
	return v, err
}

func (e epochs) want(t testing.TB, s Set, n int, id string, want Verdict) {
	t.Helper()
	if got, err := e.add(t, s, n, id); got != want || err != nil {
		t.Fatalf("epoch %d, id %q: got %v, %v; want %v", n, id, got, err, want)
	}
}

// alike are ids that a careless set takes for one another.
var alike = []string{
	"0", "00", "42", "042", "+42", " 42", "42.0", "0x2a", "٤٢",
	"18446744073709551615", "18446744073709551616", "9223372036854775807",
	"3f333df6-90a4-4fda-8dd3-9485d27cee36", "3F333DF6-90A4-4FDA-8DD3-9485D27CEE36",
	"3f333df690a44fda8dd39485d27cee36", "{3f333df6-90a4-4fda-8dd3-9485d27cee36}",
	"00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff",
	"00000000-0000-0000-0000-00000000002a",
	"a", "A", "\u00e9", "e\u0301", "a\x00", "a\x00\x00",
}

func TestSetAnswersUniqueOncePerEpoch(t *testing.T) {
	eachSet(t, func(t *testing.T, s Set) {
		e := newEpochs(t, s)
		for n := range 3 {
			for _, id := range alike {
				e.want(t, s, n, id, Unique)
			}
			for _, id := range alike {
				e.want(t, s, n, id, Repeat)
			}
		}
	})
}

// TestSetAgreesWithMap runs random adds of few ids over many epochs, more than
// there are tags, against a plain map.
func TestSetAgreesWithMap(t *testing.T) {
	eachSet(t, func(t *testing.T, s Set) {
		const turns = lap + 100
		rnd := rand.New(rand.NewPCG(1, 2))
		e := newEpochs(t, s)
		m, _ := s.(*Memory)
		for n := range turns {
			seen := map[string]bool{}
			for range 40 {
				id := fmt.Sprint(rnd.IntN(50))
				if rnd.IntN(2) == 0 {
					id = fmt.Sprintf("%08x-0000-4000-8000-%012x", rnd.IntN(5), rnd.IntN(5))
				}
				want := Unique
				if seen[id] {
					want = Repeat
				}
				e.want(t, s, n, id, want)
				seen[id] = true
			}
			if m != nil && n%8 == 0 {
				m.reclaim()
			}
		}
	})
}

func TestSetGrowsFarBeyondWhatWasExpected(t *testing.T) {
	ids := 2_000_000 // 30 times the smallest table
	if raceEnabled {
		ids = 300_000
	}
	eachSet(t, func(t *testing.T, s Set) {
		e := newEpochs(t, s)
		in, _ := e.Enter(e.at(0), 0)
		defer in.Leave(counter.Void)
		for pass, want := range []Verdict{Unique, Repeat} {
			for i := range ids {
				var id []byte
				if id = fmt.Append(id, i); i%4 == 0 {
					id = append(id, 'x')
				}
				if v, err := s.Add(in.Epoch, id); v != want || err != nil {
					t.Fatalf("pass %d, id %s: got %v, %v; want %v", pass, id, v, err, want)
				}
			}
		}
	})
}

func TestSetRefusesBeyondMaxIDsAndStillFindsRepeats(t *testing.T) {
	for _, maxIDs := range []int{0 + 1, 100, 200_000} {
		for name, newSet := range newSets {
			t.Run(fmt.Sprint(name, maxIDs), func(t *testing.T) {
				s := newSet(t, uint64(maxIDs))
				defer s.Close()
				e := newEpochs(t, s)
				for n := range 2 {
					for i := range maxIDs {
						e.want(t, s, n, fmt.Sprint(i), Unique)
					}
					if v, err := e.add(t, s, n, "one too many"); !errors.Is(err, ErrFull) {
						t.Fatalf("got %v, %v; want ErrFull", v, err)
					}
					e.want(t, s, n, fmt.Sprint(maxIDs-1), Repeat)
					e.want(t, s, n, "0", Repeat)
				}
			})
		}
	}
}

// TestSetIsExactWhileEpochsTurn has writers bring the same ids to the same
// epochs at the same time, while the epochs turn under them: each id is Unique
// once per epoch, and the counts of the epochs are the numbers of those.
func TestSetIsExactWhileEpochsTurn(t *testing.T) {
	const (
		writers = 4
		turns   = 100
		window  = counter.MinWindow
		ids     = 400
	)
	span := time.Duration(turns) * window / 2
	eachSet(t, func(t *testing.T, s Set) {
		counts := make(chan counter.Count, 10*turns)
		c, err := counter.New(counter.Config{Window: window, Store: s, Publish: nobody{counts}})
		if err != nil {
			t.Fatal(err)
		}
		bg, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { s.Run(bg) })
		defer running.Wait()
		defer stop()
		closed := make(chan error, 1)
		go func() { closed <- c.Run(t.Context()) }()

		// ok[w] counts, for writer w, the Unique answers by epoch and id.
		type answer struct {
			epoch int64
			id    int
		}
		ok := make([]map[answer]int, writers)
		var stale atomic.Int64
		var group sync.WaitGroup
		began := time.Now()
		for w := range writers {
			ok[w] = map[answer]int{}
			group.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(w), 9))
				for time.Since(began) < span {
					// The clock runs twice as fast as real time: turns of half a window.
					now := began.UnixNano() + 2*int64(time.Since(began))
					i := rnd.IntN(ids)
					id := fmt.Append(nil, i)
					if i%2 == 0 {
						id = append(id, "-text"...)
					}
					for {
						in, open := c.Enter(now, uint64(w))
						if !open {
							t.Error("sealed while writing")
							return
						}
						if rnd.IntN(64) == 0 {
							runtime.Gosched() // sleep inside the epoch
						}
						v, err := s.Add(in.Epoch, id)
						if err != nil {
							t.Error(err)
						}
						switch v {
						case Unique:
							ok[w][answer{in.Number(), i}]++
							in.Leave(counter.Unique)
						case Repeat:
							in.Leave(counter.Repeat)
						case Turned:
							stale.Add(1)
							in.Leave(counter.Void)
							continue
						}
						break
					}
				}
			})
		}
		group.Wait()
		c.Seal()
		if err := <-closed; err != nil {
			t.Fatal(err)
		}
		close(counts)

		want := map[int64]uint64{}
		twice := map[answer]int{}
		for _, m := range ok {
			for a, n := range m {
				want[a.epoch] += uint64(n)
				if twice[a] += n; twice[a] > 1 {
					t.Errorf("id %d was unique %d times in epoch %d", a.id, twice[a], a.epoch)
				}
			}
		}
		var got, total uint64
		last := int64(0)
		n := 0
		for cnt := range counts {
			number := cnt.Start.UnixNano() / int64(window)
			if number <= last {
				t.Errorf("epoch %d was published after %d", number, last)
			}
			last = number
			if cnt.Unique != want[number] {
				t.Errorf("epoch %d: published %d, answered %d", number, cnt.Unique, want[number])
			}
			got += cnt.Unique
			n++
		}
		for _, u := range want {
			total += u
		}
		if got != total || n < turns {
			t.Errorf("published %d in %d epochs, answered %d; want as many, in at least %d", got, n, total, turns)
		}
		t.Logf("%d epochs, %d unique, %d adds met a later epoch", n, total, stale.Load())
	})
}

// TestCleanerReclaimsBeforeTagsComeRound leaves ids of one epoch behind and
// turns until its tag is used again: they must not be taken for ids of today.
func TestCleanerReclaimsBeforeTagsComeRound(t *testing.T) {
	const ids = 1000
	m, err := NewMemory(Config{CleanupBatch: 1, Heap: raceEnabled})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	e := newEpochs(t, m)
	for i := range ids {
		e.want(t, m, 0, fmt.Sprint(i), Unique)
		e.want(t, m, 0, fmt.Sprint("text", i), Unique)
	}
	for n := 1; n < lap; n++ {
		e.want(t, m, n, "only this one", Unique)
		m.reclaim()
	}
	if got := m.Stats().Reclaimed; got < 2*ids-1 {
		t.Errorf("reclaimed %d slots, want about %d", got, 2*ids)
	}
	for i := range ids {
		e.want(t, m, lap, fmt.Sprint(i), Unique)
		e.want(t, m, lap, fmt.Sprint("text", i), Unique)
	}
}
