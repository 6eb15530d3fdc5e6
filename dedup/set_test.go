package dedup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"verve/counter"
)

// newSets are the stores that fulfil the contract of Set. Each closes its Set
// when the test is over.
var newSets = map[string]func(t testing.TB, maxIDs uint64) Set{
	"memory": func(t testing.TB, maxIDs uint64) Set {
		return newMemory(t, Config{MaxIDs: maxIDs})
	},
	"memory, in batches": func(t testing.TB, maxIDs uint64) Set {
		return twice{newMemory(t, Config{MaxIDs: maxIDs}), t}
	},
}

// twice brings each id two times in one batch: the second is a repeat of the
// first, whatever that is.
type twice struct {
	*Memory
	t testing.TB
}

func (s twice) Add(e *counter.Epoch, id []byte, k Key) (Verdict, error) {
	verdicts := [2]Verdict{Turned, Turned}
	n, err := s.AddMany(e, []Key{k, k}, verdicts[:])
	if n == 0 {
		return Turned, err // Turned, if there is no error
	}
	if n == 2 && verdicts[1] != Repeat {
		s.t.Errorf("id %q twice: %v", id, verdicts)
	}
	return verdicts[0], nil // whatever happened to the second
}

// addTo makes the key of id and adds it.
func addTo(s Set, e *counter.Epoch, id []byte) (Verdict, error) { return s.Add(e, id, s.Key(id)) }

func eachSet(t *testing.T, f func(t *testing.T, s Set)) {
	for name, newSet := range newSets {
		t.Run(name, func(t *testing.T) {
			f(t, newSet(t, 0))
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

// newEpochs seals the counter when the test is over, and waits until every
// epoch is retired: the Set that was made before can then be closed.
func newEpochs(t testing.TB, s Set) epochs {
	c, err := counter.New(counter.Config{Window: time.Hour, Store: s, Publish: nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	t.Cleanup(func() {
		c.Seal()
		// A test that failed may have left a request inside.
		defer time.AfterFunc(5*time.Second, stop).Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
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
	v, err := addTo(s, in.Epoch, []byte(id))
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
		turns := lap + 100
		if _, far := s.(*Redis); far {
			turns = 100 // has no tags
		}
		rnd := rand.New(rand.NewPCG(1, 2))
		e := newEpochs(t, s)
		var m *Memory
		switch s := s.(type) {
		case *Memory:
			m = s
		case twice:
			m = s.Memory
		}
		for n := range turns {
			seen := map[string]bool{}
			for i := range 40 {
				if m != nil && n%8 == 0 && i == 20 {
					m.reclaim() // leaves the open epoch alone
				}
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
		}
	})
}

func TestSetGrowsFarBeyondWhatWasExpected(t *testing.T) {
	ids := 2_000_000 // 30 times the smallest table
	if raceEnabled {
		ids = 300_000
	}
	eachSet(t, func(t *testing.T, s Set) {
		ids := ids
		if _, far := s.(*Redis); far {
			ids = 10_000 // each takes a trip
		}
		e := newEpochs(t, s)
		in, _ := e.Enter(e.at(0), 0)
		defer in.Leave(counter.Void)
		for pass, want := range []Verdict{Unique, Repeat} {
			for i := range ids {
				var id []byte
				if id = fmt.Append(id, i); i%4 == 0 {
					id = append(id, 'x')
				}
				if v, err := addTo(s, in.Epoch, id); v != want || err != nil {
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
				if _, far := s.(*Redis); far && maxIDs > 1000 {
					t.Skip("each id takes a trip")
				}
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
// epochs at the same time, while the epochs turn under them and some requests
// sleep inside: each id is Unique once in each epoch that it is answered in, and
// the counts of the epochs are the numbers of those.
func TestSetIsExactWhileEpochsTurn(t *testing.T) {
	const window = counter.MinWindow
	for _, tt := range []struct {
		name         string
		writers, ids int
		turns        int
		speed        time.Duration // how fast the clock runs, in fifths of real time
		id           func(i int) []byte
	}{
		{"turns of 20 ms", 4, 400, 100, 12, func(i int) []byte {
			id := strconv.AppendInt(nil, int64(i), 10)
			if i%2 == 0 {
				id = append(id, "-text"...)
			}
			return id
		}},
		// Every id is brought by all writers in the first moments of an epoch.
		{"turns of 1 ms, few UUIDs and texts", 8, 10, 1000, 250, func(i int) []byte {
			if i%2 == 0 {
				return fmt.Appendf(nil, "text %d", i)
			}
			return fmt.Appendf(nil, "3f333df6-90a4-4fda-8dd3-9485d27ce%03d", i)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			eachSet(t, func(t *testing.T, s Set) {
				counts := make(chan counter.Count, 100*tt.turns)
				c, err := counter.New(counter.Config{Window: window, Store: s, Publish: nobody{counts}})
				if err != nil {
					t.Fatal(err)
				}
				run(t, s)
				closed := make(chan error, 1)
				go func() { closed <- c.Run(t.Context()) }()

				type answer struct {
					epoch int64
					id    int
				}
				type answers struct{ unique, repeat int }
				given := make([]map[answer]answers, tt.writers)
				var stale atomic.Int64
				var group sync.WaitGroup
				began := time.Now()
				ids := make([][]byte, tt.ids)
				for i := range ids {
					ids[i] = tt.id(i)
				}
				for w := range tt.writers {
					given[w] = map[answer]answers{}
					group.Go(func() {
						rnd := rand.New(rand.NewPCG(uint64(w), 9))
						for {
							now := began.UnixNano() + int64(time.Since(began)*tt.speed/5)
							i := rnd.IntN(tt.ids)
							for again := true; again; {
								in, open := c.Enter(now, uint64(w))
								if !open {
									return
								}
								switch rnd.IntN(4096) {
								case 0:
									time.Sleep(window * 5 / tt.speed) // until the next epoch
								case 1, 2, 3, 4:
									runtime.Gosched()
								}
								v, err := addTo(s, in.Epoch, ids[i])
								if err != nil {
									t.Error(err)
								}
								again = v == Turned
								k := answer{in.Number(), i}
								a := given[w][k]
								switch v {
								case Unique:
									a.unique++
									in.Leave(counter.Unique)
								case Repeat:
									a.repeat++
									in.Leave(counter.Repeat)
								case Turned:
									stale.Add(1)
									in.Leave(counter.Void)
								}
								given[w][k] = a
							}
						}
					})
				}
				for c.Last().Serial() <= uint64(tt.turns) {
					time.Sleep(time.Millisecond)
				}
				c.Seal()
				group.Wait()
				if err := <-closed; err != nil {
					t.Fatal(err)
				}
				close(counts)

				all := map[answer]answers{}
				for _, m := range given {
					for k, a := range m {
						sum := all[k]
						all[k] = answers{sum.unique + a.unique, sum.repeat + a.repeat}
					}
				}
				type sums struct{ unique, repeats uint64 }
				want := map[int64]sums{}
				for k, a := range all {
					if a.unique != 1 && a.unique+a.repeat > 0 {
						t.Errorf("id %s in epoch %d: %d times unique, %d times a repeat", ids[k.id], k.epoch, a.unique, a.repeat)
					}
					s := want[k.epoch]
					want[k.epoch] = sums{s.unique + uint64(a.unique), s.repeats + uint64(a.repeat)}
				}
				var total sums
				n, last := 0, int64(0)
				for p := range counts {
					number := p.Start.UnixNano() / int64(window)
					if number <= last {
						t.Errorf("epoch %d was published after %d", number, last)
					}
					last = number
					got := sums{p.Unique, p.Repeats}
					if got != want[number] {
						t.Errorf("epoch %d: published %+v, answered %+v", number, got, want[number])
					}
					delete(want, number)
					total.unique += got.unique
					total.repeats += got.repeats
					n++
				}
				for number, s := range want {
					if s != (sums{}) {
						t.Errorf("epoch %d was answered %+v and not published", number, s)
					}
				}
				t.Logf("%d epochs, %+v, %d adds met a later epoch", n, total, stale.Load())
			})
		})
	}
}

// TestSetKeepsLateRequestsOutOfLaterEpochs has a request sleep in an epoch
// while the next ones fill. What it then brings to its own epoch neither takes
// anything from a later one nor shows there.
func TestSetKeepsLateRequestsOutOfLaterEpochs(t *testing.T) {
	id := func(i int) string {
		if i%2 == 0 {
			return strconv.Itoa(i)
		}
		return "text " + strconv.Itoa(i)
	}
	eachSet(t, func(t *testing.T, s Set) {
		ids := 20_000
		if _, far := s.(*Redis); far {
			ids = 4_000 // each takes a trip
		}
		e := newEpochs(t, s)
		for i := range ids / 2 {
			e.want(t, s, 0, id(i), Unique)
		}
		in, _ := e.Enter(e.at(0), 1)
		defer in.Leave(counter.Void)
		late := map[int]bool{}
		for n := 1; n < 4; n++ {
			for i := 0; i < ids; i += 2 + n {
				e.want(t, s, n, id(i), Unique)
			}
			// Late: ids that are in its epoch, and others.
			for i := 0; i < ids; i += 3 {
				switch v, err := addTo(s, in.Epoch, []byte(id(i))); {
				case err != nil:
					t.Fatal(err)
				case v == Unique:
					if i < ids/2 || late[i] {
						t.Fatalf("id %s is unique in epoch 0 for a second time", id(i))
					}
					late[i] = true
				case v == Repeat:
					if i >= ids/2 && !late[i] {
						t.Fatalf("id %s was never in epoch 0 and is a repeat there", id(i))
					}
				}
			}
			for i := range ids {
				want := Unique
				if i%(2+n) == 0 {
					want = Repeat
				}
				e.want(t, s, n, id(i), want)
			}
		}
	})
}
