// Package settest is the suite that every dedup.Set passes.
package settest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"verve/counter"
	"verve/dedup"
	"verve/internal/epochtest"
)

// Config describes the Set under test.
type Config struct {
	// New makes a Set that is closed when the test is over. An epoch may have at most maxIDs
	// ids; 0: no limit.
	New func(t testing.TB, maxIDs uint64) dedup.Set

	Many    int               // how many ids the Set can take within seconds; 0: few, because each takes a network round trip
	Turns   int               // after how many epochs their tags are used again; 0: never
	Reclaim func(s dedup.Set) // reclaims the memory of past epochs; nil: only Set.Run does that
}

// Run runs the suite on the Set that c describes.
func Run(t *testing.T, c Config) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, Config)
	}{
		{"AnswersUniqueOncePerEpoch", answersUniqueOncePerEpoch},
		{"AgreesWithMap", agreesWithMap},
		{"AgreesWithMapOnTokensAndKeys", agreesOnTokensAndKeys},
		{"GrowsFarBeyondWhatWasExpected", growsFarBeyondWhatWasExpected},
		{"RefusesBeyondMaxIDsAndStillFindsRepeats", refusesBeyondMaxIDsAndStillFindsRepeats},
		{"IsExactWhileEpochsTurn", isExactWhileEpochsTurn},
		{"KeepsLateRequestsOutOfLaterEpochs", keepsLateRequestsOutOfLaterEpochs},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, c) })
	}
}

// AddTo adds id to e, and returns the verdict.
func AddTo(s dedup.Set, e *counter.Epoch, id []byte) (dedup.Verdict, error) {
	verdicts := [1]dedup.Verdict{dedup.Turned}
	items := []dedup.Item{{ID: id}}
	s.Keys(items)
	err := s.AddMany(e, items, verdicts[:])
	return verdicts[0], err
}

// runSet runs the background work of s until the test is over.
func runSet(t testing.TB, s dedup.Set) {
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// Epochs lets a test turn epochs by hand, and add ids to them.
type Epochs struct{ epochtest.Epochs }

// NewEpochs starts a counter on s. When the test is over it seals the counter and waits until
// every epoch is retired. So a cleanup that was registered before can close s.
func NewEpochs(t testing.TB, s dedup.Set) Epochs { return Epochs{epochtest.New(t, s)} }

// Add adds id to the n-th epoch.
func (e Epochs) Add(t testing.TB, s dedup.Set, n int, id string) (dedup.Verdict, error) {
	t.Helper()
	in, ok := e.Enter(e.At(n), 0, 1)
	if !ok {
		t.Fatal("the counter is sealed")
	}
	v, err := AddTo(s, in.Epoch, []byte(id))
	leave(in, v)
	return v, err
}

// leave makes a request whose id got the verdict v leave its epoch.
func leave(in counter.Entry, v dedup.Verdict) {
	var n [dedup.Verdicts]uint64
	n[v] = 1
	in.Leave(n[dedup.Unique], n[dedup.Repeat], 1-n[dedup.Unique]-n[dedup.Repeat])
}

// Want fails the test unless the n-th epoch answers want to id.
func (e Epochs) Want(t testing.TB, s dedup.Set, n int, id string, want dedup.Verdict) {
	t.Helper()
	if got, err := e.Add(t, s, n, id); got != want || err != nil {
		t.Fatalf("epoch %d, id %q: got %v, %v; want %v", n, id, got, err, want)
	}
}

func answersUniqueOncePerEpoch(t *testing.T, c Config) {
	s := c.New(t, 0)
	e := NewEpochs(t, s)
	for n := range 3 {
		for _, id := range epochtest.Alike {
			e.Want(t, s, n, id, dedup.Unique)
		}
		for _, id := range epochtest.Alike {
			e.Want(t, s, n, id, dedup.Repeat)
		}
	}
}

// agreesWithMap adds few ids at random over more epochs than there are tags, and compares the
// verdicts with a plain map.
func agreesWithMap(t *testing.T, c Config) {
	s := c.New(t, 0)
	turns := cmp.Or(c.Turns, 100)
	rnd := rand.New(rand.NewPCG(1, 2))
	e := NewEpochs(t, s)
	for n := range turns {
		seen := map[string]bool{}
		for i := range 40 {
			if c.Reclaim != nil && n%8 == 0 && i == 20 {
				c.Reclaim(s) // leaves the open epoch alone
			}
			id := fmt.Sprint(rnd.IntN(50))
			if rnd.IntN(2) == 0 {
				id = fmt.Sprintf("%08x-0000-4000-8000-%012x", rnd.IntN(5), rnd.IntN(5))
			}
			want := dedup.Unique
			if seen[id] {
				want = dedup.Repeat
			}
			e.Want(t, s, n, id, want)
			seen[id] = true
		}
	}
}

// agreesOnTokensAndKeys adds few ids at random, under few keys and with few tokens, in batches,
// over some epochs, and compares the verdicts with plain maps.
func agreesOnTokensAndKeys(t *testing.T, c Config) {
	type name struct{ under, id string }
	s := c.New(t, 0)
	rnd := rand.New(rand.NewPCG(18, 20))
	e := NewEpochs(t, s)
	before, now := map[name]string{}, map[name]string{} // the token that each id was counted with, in the window before and in this one
	for n := range 12 {
		unique := map[string]uint64{}
		for range 40 {
			items := make([]dedup.Item, 1+rnd.IntN(24))
			verdicts, wants := make([]dedup.Verdict, len(items)), make([]dedup.Verdict, len(items))
			for i := range items {
				at := name{[]string{"", "a", "a/b"}[rnd.IntN(3)], epochtest.Alike[rnd.IntN(len(epochtest.Alike))]}
				o := &dedup.Options{Under: []byte(at.under), Token: []byte([]string{"", "1", "2"}[rnd.IntN(3)])}
				if at.under == "" && len(o.Token) == 0 {
					o = nil
				}
				items[i] = dedup.Item{ID: []byte(at.id), Options: o}
				verdicts[i], wants[i] = dedup.Turned, dedup.Repeat
				had, there := now[at]
				switch {
				case o != nil && len(o.Token) > 0 && before[at] == string(o.Token):
					wants[i] = dedup.ReplayedBefore
				case o != nil && len(o.Token) > 0 && had == string(o.Token):
					wants[i] = dedup.Replayed
				case !there:
					wants[i] = dedup.Unique
					now[at] = ""
					if unique[at.under]++; o != nil {
						now[at] = string(o.Token)
					}
				}
			}
			s.Keys(items)
			in, _ := e.Enter(e.At(n), 0, uint64(len(items)))
			err := s.AddMany(in.Epoch, items, verdicts)
			in.Leave(0, 0, uint64(len(items)))
			if err != nil || !slices.Equal(verdicts, wants) {
				t.Fatalf("epoch %d: got %v, %v; want %v", n, verdicts, err, wants)
			}
		}
		for _, k := range e.Last().Keys().Counts().List() {
			if unique[k.Key] != k.Unique {
				t.Errorf("epoch %d: key %q has %d ids, want %d", n, k.Key, k.Unique, unique[k.Key])
			}
		}
		before, now = now, map[name]string{}
	}
}

func growsFarBeyondWhatWasExpected(t *testing.T, c Config) {
	ids := cmp.Or(c.Many, 10_000)
	s := c.New(t, 0)
	e := NewEpochs(t, s)
	in, _ := e.Enter(e.At(0), 0, 1)
	defer in.Leave(0, 0, 1)
	for pass, want := range []dedup.Verdict{dedup.Unique, dedup.Repeat} {
		for i := range ids {
			var id []byte
			if id = fmt.Append(id, i); i%4 == 0 {
				id = append(id, 'x')
			}
			if v, err := AddTo(s, in.Epoch, id); v != want || err != nil {
				t.Fatalf("pass %d, id %s: got %v, %v; want %v", pass, id, v, err, want)
			}
		}
	}
}

func refusesBeyondMaxIDsAndStillFindsRepeats(t *testing.T, c Config) {
	for _, maxIDs := range []int{1, 100, 200_000} {
		if maxIDs > cmp.Or(c.Many, 1000) {
			continue // each id takes a network round trip
		}
		t.Run(fmt.Sprint(maxIDs), func(t *testing.T) {
			s := c.New(t, uint64(maxIDs))
			e := NewEpochs(t, s)
			for n := range 2 {
				for i := range maxIDs {
					e.Want(t, s, n, fmt.Sprint(i), dedup.Unique)
				}
				if v, err := e.Add(t, s, n, "one too many"); !errors.Is(err, dedup.ErrFull) {
					t.Fatalf("got %v, %v; want dedup.ErrFull", v, err)
				}
				e.Want(t, s, n, fmt.Sprint(maxIDs-1), dedup.Repeat)
				e.Want(t, s, n, "0", dedup.Repeat)
			}
		})
	}
}

// isExactWhileEpochsTurn lets writers add the same ids to the same epochs at the same time,
// while the epochs turn and some requests sleep inside them. Each id must be Unique exactly
// once in each epoch in which it is answered, and the counts of the epochs must be the numbers
// of these ids.
func isExactWhileEpochsTurn(t *testing.T, c Config) {
	const window = counter.MinWindow
	for _, tt := range []struct {
		name         string
		writers, ids int
		turns        int
		speed        time.Duration // how fast the clock runs, in fifths of real time
		id           func(i int) []byte
	}{
		{"turns of 20 ms", 4, 400, 50, 12, func(i int) []byte {
			id := strconv.AppendInt(nil, int64(i), 10)
			if i%2 == 0 {
				id = append(id, "-text"...)
			}
			return id
		}},
		// All writers add every id in the first moments of an epoch.
		{"turns of 1 ms, few UUIDs and texts", 8, 10, 500, 250, func(i int) []byte {
			if i%2 == 0 {
				return fmt.Appendf(nil, "text %d", i)
			}
			return fmt.Appendf(nil, "3f333df6-90a4-4fda-8dd3-9485d27ce%03d", i)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := c.New(t, 0)
			counts := make(chan counter.Count, 100*tt.turns)
			count, err := counter.New(counter.Config{Window: window, Store: s, Publisher: epochtest.Nobody{Counts: counts}})
			if err != nil {
				t.Fatal(err)
			}
			runSet(t, s)
			closed := make(chan error, 1)
			go func() { closed <- count.Run(t.Context()) }()

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
							in, open := count.Enter(now, uint64(w), 1)
							if !open {
								return
							}
							switch rnd.IntN(4096) {
							case 0:
								time.Sleep(window * 5 / tt.speed) // until the next epoch is open
							case 1, 2, 3, 4:
								runtime.Gosched()
							}
							v, err := AddTo(s, in.Epoch, ids[i])
							if err != nil {
								t.Error(err)
							}
							again = v == dedup.Turned
							k := answer{in.Number(), i}
							a := given[w][k]
							switch v {
							case dedup.Unique:
								a.unique++
							case dedup.Repeat:
								a.repeat++
							case dedup.Turned:
								stale.Add(1)
							}
							leave(in, v)
							given[w][k] = a
						}
					}
				})
			}
			for count.Last().Serial() <= uint64(tt.turns) {
				time.Sleep(time.Millisecond)
			}
			count.Seal()
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
	}
}

// keepsLateRequestsOutOfLaterEpochs lets a request sleep in an epoch while the next epochs get
// their ids. An id that it then adds to its own epoch must not displace an id of a later epoch,
// and must not be found there.
func keepsLateRequestsOutOfLaterEpochs(t *testing.T, c Config) {
	id := func(i int) string {
		if i%2 == 0 {
			return strconv.Itoa(i)
		}
		return "text " + strconv.Itoa(i)
	}
	s := c.New(t, 0)
	ids := min(cmp.Or(c.Many, 4_000), 20_000)
	e := NewEpochs(t, s)
	for i := range ids / 2 {
		e.Want(t, s, 0, id(i), dedup.Unique)
	}
	in, _ := e.Enter(e.At(0), 1, 1)
	defer in.Leave(0, 0, 1)
	late := map[int]bool{}
	for n := 1; n < 4; n++ {
		for i := 0; i < ids; i += 2 + n {
			e.Want(t, s, n, id(i), dedup.Unique)
		}
		// The late request adds ids that are in its epoch, and others.
		for i := 0; i < ids; i += 3 {
			switch v, err := AddTo(s, in.Epoch, []byte(id(i))); {
			case err != nil:
				t.Fatal(err)
			case v == dedup.Unique:
				if i < ids/2 || late[i] {
					t.Fatalf("id %s is unique in epoch 0 for a second time", id(i))
				}
				late[i] = true
			case v == dedup.Repeat:
				if i >= ids/2 && !late[i] {
					t.Fatalf("id %s was never in epoch 0 and is a repeat there", id(i))
				}
			}
		}
		for i := range ids {
			want := dedup.Unique
			if i%(2+n) == 0 {
				want = dedup.Repeat
			}
			e.Want(t, s, n, id(i), want)
		}
	}
}
