package counter

import (
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestCountsOfEpochsAreTheAnswersGivenInThem lets writers enter and leave while the epochs
// turn. Some writers stay until well after a turn, and the counter is sealed while they run.
// Each published count is what the writers counted in that epoch: nothing lost, nothing in a
// wrong epoch.
func TestCountsOfEpochsAreTheAnswersGivenInThem(t *testing.T) {
	for _, tt := range []struct {
		name  string
		speed int64 // of the clock that requests see
		turns int
		stay  int // one request in so many stays until the epoch has turned
	}{
		// At real speed the ticker and the requests race for each turn. If the clock runs
		// faster, the ticker is always too late.
		{"ticker and requests turn", 1, 20, 100_000},
		{"requests turn every 2.5 ms", 20, 600, 5000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const writers = 4
			l := &recorder{t: t}
			c, err := New(Config{Window: MinWindow, Store: l, Publisher: l})
			if err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- c.Run(t.Context()) }()

			type sums struct{ unique, repeats uint64 }
			answers := make([]map[int64]sums, writers)
			var late, total atomic.Int64
			began := time.Now()
			clock := func() int64 { return began.UnixNano() + tt.speed*int64(time.Since(began)) }
			var group sync.WaitGroup
			for w := range writers {
				answers[w] = map[int64]sums{}
				group.Go(func() {
					rnd := rand.New(rand.NewPCG(uint64(w), 3))
					for {
						in, ok := c.Enter(clock(), rnd.Uint64N(2*writers), 1)
						if !ok {
							return
						}
						switch n := rnd.IntN(tt.stay); {
						case n%1000 == 1:
							runtime.Gosched()
						case n == 0: // until the next epoch is open, or all is over
							for c.open.Load() == in.Epoch {
								runtime.Gosched()
							}
							late.Add(1)
						}
						o := outcome(rnd.IntN(3))
						s := answers[w][in.Number()]
						switch o {
						case unique:
							s.unique++
						case repeat:
							s.repeats++
						}
						answers[w][in.Number()] = s
						total.Add(1)
						in.leave(o)
					}
				})
			}
			// A reader of the sums: they never fall.
			watching := make(chan struct{})
			group.Go(func() {
				var last Stats
				for {
					select {
					case <-watching:
						return
					default:
					}
					s := c.Stats()
					if s.Unique < last.Unique || s.Repeats < last.Repeats {
						t.Errorf("Stats fell from %+v to %+v", last, s)
					}
					last = s
					c.Last().Unique()
					time.Sleep(50 * time.Microsecond)
				}
			})

			for c.Last().Serial() <= uint64(tt.turns) {
				// All writers may be waiting for the turn.
				if in, ok := c.Enter(clock(), 0, 1); ok {
					in.Leave(0, 0, 1)
				}
				time.Sleep(time.Millisecond)
			}
			c.Seal()
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			close(watching)
			group.Wait()

			want := map[int64]sums{}
			for _, m := range answers {
				for n, s := range m {
					sum := want[n]
					want[n] = sums{sum.unique + s.unique, sum.repeats + s.repeats}
				}
			}
			var all sums
			for _, p := range l.counts() {
				n := p.Start.UnixNano() / int64(MinWindow)
				got := sums{p.Unique, p.Repeats}
				if got != want[n] {
					t.Errorf("epoch %d: published %+v, answered %+v", n, got, want[n])
				}
				delete(want, n)
				all.unique += got.unique
				all.repeats += got.repeats
			}
			if len(want) > 0 {
				t.Errorf("%d epochs with answers were not published", len(want))
			}
			if s := c.Stats(); s.Unique != all.unique || s.Repeats != all.repeats || s.Unclosed != 0 {
				t.Errorf("Stats %+v, want %+v and nothing unclosed", s, all)
			}
			t.Logf("%d requests in %d epochs, %d left after the turn", total.Load(), len(l.opened), late.Load())
		})
	}
}

// TestEntriesGivenInTheMomentOfATurnAreCounted runs more threads than there are cores, which
// only enter and leave while the epochs turn. The kernel stops some of them after they have
// found an epoch open and before they have entered it. If such a thread got an Entry, the
// published count would lack it.
func TestEntriesGivenInTheMomentOfATurnAreCounted(t *testing.T) {
	const writers = 6
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(writers + 4))
	l := &recorder{t: t}
	c, err := New(Config{Window: MaxWindow, Store: l, Publisher: l})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Run(t.Context()) }()
	var clock atomic.Int64
	clock.Store(c.Last().start)
	counted := make([]map[int64]uint64, writers)
	var group sync.WaitGroup
	for w := range writers {
		counted[w] = map[int64]uint64{}
		group.Go(func() {
			now, number, n := clock.Load(), c.Last().Number(), uint64(0)
			for i := 0; ; i++ {
				if i%64 == 0 {
					now = clock.Load()
				}
				many := uint64(1 + i%3)
				in, ok := c.Enter(now, uint64(w), many)
				if !ok || in.Number() != number {
					counted[w][number] += n
					n = 0
				}
				if !ok {
					return
				}
				number = in.Number()
				n++
				if many == 1 {
					in.Leave(1, 0, 0)
				} else {
					in.Leave(1, many-2, 1)
				}
			}
		})
	}
	for began := time.Now(); time.Since(began) < 1500*time.Millisecond; {
		if c.Stats().Unclosed > 64 {
			time.Sleep(time.Millisecond) // on a busy machine the closer falls behind
			continue
		}
		if in, ok := c.Enter(clock.Add(int64(MaxWindow)), 0, 1); ok {
			in.Leave(0, 0, 1)
		}
		time.Sleep(100 * time.Microsecond) // the length of an epoch
	}
	c.Seal()
	group.Wait()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	want := map[int64]uint64{}
	for _, m := range counted {
		for number, n := range m {
			want[number] += n
		}
	}
	var total uint64
	for _, p := range l.counts() {
		number := p.Start.UnixNano() / int64(MaxWindow)
		if p.Unique != want[number] {
			t.Errorf("epoch %d: published %d, counted %d", number, p.Unique, want[number])
		}
		total += want[number]
	}
	t.Logf("%d entries in %d epochs", total, len(l.counts()))
}
