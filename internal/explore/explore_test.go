package explore_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"verve/internal/explore"
	"verve/internal/explore/atomic"
	"verve/internal/explore/sync"
)

// lostUpdate adds to a counter by a load and a store.
func lostUpdate(r *explore.Run) {
	var n atomic.Uint64
	for i := range 2 {
		r.Go(fmt.Sprint("adder ", i), func() { n.Store(n.Load() + 1) })
	}
	r.Check(func() error {
		if got := n.Load(); got != 2 {
			return fmt.Errorf("the counter is %d, want 2", got)
		}
		return nil
	})
}

// brokenInit is double-checked locking whose flag is set before the value is written.
func brokenInit(r *explore.Run) {
	var mu sync.Mutex
	var ready atomic.Bool
	var value atomic.Uint64
	var errs [2]error
	get := func() uint64 {
		if !ready.Load() {
			mu.Lock()
			defer mu.Unlock()
			if !ready.Load() {
				ready.Store(true)
				value.Store(42)
			}
		}
		return value.Load()
	}
	for i := range errs {
		r.Go("getter", func() {
			if v := get(); v != 42 {
				errs[i] = fmt.Errorf("got %d, want 42", v)
			}
		})
	}
	r.Check(func() error { return errors.Join(errs[:]...) })
}

func lockOrder(r *explore.Run) {
	var a, b sync.Mutex
	//lint:ignore SA2001 the order of the locks is what is tested
	r.Go("ab", func() { a.Lock(); b.Lock(); b.Unlock(); a.Unlock() })
	//lint:ignore SA2001 as above
	r.Go("ba", func() { b.Lock(); a.Lock(); a.Unlock(); b.Unlock() })
}

func waitsForNobody(r *explore.Run) {
	var flag atomic.Bool
	r.Go("waiter", func() {
		for !flag.Load() {
			explore.Wait()
		}
	})
	r.Go("other", func() { flag.Store(false) })
}

func spins(r *explore.Run) {
	var flag atomic.Bool
	r.Go("spinner", func() {
		for !flag.Load() {
		}
	})
}

// wakesOne has a stop that wakes only one of two waiting threads.
func wakesOne(r *explore.Run) {
	var mu sync.Mutex
	var stopped bool
	cond := sync.NewCond(&mu)
	for range 2 {
		r.Go("waiter", func() {
			mu.Lock()
			defer mu.Unlock()
			for !stopped {
				cond.Wait()
			}
		})
	}
	r.Go("stop", func() {
		mu.Lock()
		defer mu.Unlock()
		stopped = true
		cond.Signal()
	})
}

// twoPlaces lets each of two threads take two places of a channel, one after the other.
func twoPlaces(r *explore.Run) {
	places, done := make(chan int, 2), make(chan struct{})
	for range 2 {
		r.Go("taker", func() {
			explore.Send(places, 1)
			switch explore.Select(false, explore.Sending(places, 2), explore.Receiving(done)) {
			case 0:
				explore.Receive(places)
			}
			explore.Receive(places)
		})
	}
	r.Go("other", func() {
		if explore.Select(true, explore.Receiving(done)) != -1 {
			panic("done is not closed")
		}
	})
}

// closed is twoPlaces with a way to end the wait.
func closed(r *explore.Run) {
	places, done := make(chan int, 1), make(chan struct{})
	places <- 0
	r.Go("taker", func() {
		if explore.Select(false, explore.Sending(places, 1), explore.Receiving(done)) == 1 {
			explore.Receive(done)
		}
	})
	r.Go("closer", func() { explore.Close(done) })
}

// storeBuffer can end with any results of its two loads, except that under sequential
// consistency not both can be zero.
func storeBuffer(seen map[string]int) func(*explore.Run) {
	return func(r *explore.Run) {
		var x, y atomic.Uint64
		var a, b uint64
		r.Go("a", func() { x.Store(1); a = y.Load() })
		r.Go("b", func() { y.Store(1); b = x.Load() })
		r.Check(func() error { seen[fmt.Sprint(a, b)]++; return nil })
	}
}

func TestSearchFindsTextbookBugs(t *testing.T) {
	for _, test := range []struct {
		name        string
		scenario    func(*explore.Run)
		preemptions int // how many preemptions are needed to find the fault
		want        string
	}{
		{"a lost update", lostUpdate, 1, "the counter is 1, want 2"},
		{"broken double-checked locking", brokenInit, 1, "got 0, want 42"},
		{"locks taken in two orders", lockOrder, 1, "deadlock: ab before lock; ba before lock"},
		{"a wait for nobody", waitsForNobody, 0, "deadlock: waiter before wait"},
		{"a signal for two", wakesOne, 0, "deadlock: waiter before wake"},
		{"two places one by one", twoPlaces, 1, "deadlock: taker before select; taker before select"},
		{"a loop that spins", spins, 0, "livelock: spinner before load"},
	} {
		for _, bound := range []int{test.preemptions, test.preemptions + 1, explore.All} {
			_, err := explore.Search(explore.Options{Preemptions: bound}, test.scenario)
			if err == nil || !strings.HasPrefix(err.Err.Error(), test.want) {
				t.Errorf("%s, bound %d: got %v, want %s", test.name, bound, err, test.want)
				continue
			}
			if _, again := explore.Search(explore.Options{Replay: err.Schedule}, test.scenario); again == nil || again.Err.Error() != err.Err.Error() {
				t.Errorf("%s: the schedule %s replays as %v, want %v", test.name, err.Schedule, again, err.Err)
			}
		}
		if test.preemptions > 0 {
			if _, err := explore.Search(explore.Options{Preemptions: test.preemptions - 1}, test.scenario); err != nil {
				t.Errorf("%s was found with %d preemptions, and takes %d", test.name, test.preemptions-1, test.preemptions)
			}
		}
	}
}

func TestWaitEndsWhenAChannelIsClosed(t *testing.T) {
	if _, err := explore.Search(explore.Options{Preemptions: explore.All}, closed); err != nil {
		t.Error(err)
	}
}

func TestSearchReachesEveryResult(t *testing.T) {
	for _, bound := range []int{2, explore.All} {
		seen := map[string]int{}
		r, err := explore.Search(explore.Options{Preemptions: bound}, storeBuffer(seen))
		if err != nil {
			t.Fatal(r, err)
		}
		if seen["0 0"] > 0 || seen["0 1"] == 0 || seen["1 0"] == 0 || seen["1 1"] == 0 {
			t.Errorf("bound %d: results %v, want 0 1, 1 0 and 1 1", bound, seen)
		}
	}
}

// words lets each thread add its letter to a text some times, so that the texts are all orders
// of the letters.
func words(threads, steps int, seen map[string]bool) func(*explore.Run) {
	return func(r *explore.Run) {
		var turn atomic.Uint64
		text := ""
		for i := range threads {
			r.Go("writer", func() {
				for range steps {
					turn.Add(1)
					text += string(rune('a' + i))
				}
			})
		}
		r.Check(func() error { seen[text] = true; return nil })
	}
}

func TestSearchRunsEveryOrderOnce(t *testing.T) {
	seen := map[string]bool{}
	r, err := explore.Search(explore.Options{Preemptions: explore.All}, words(3, 2, seen))
	if err != nil {
		t.Fatal(err)
	}
	if len(seen) != 90 || r.Schedules != 90 { // 6!/(2!2!2!)
		t.Errorf("%d orders in %d schedules, want 90 in 90", len(seen), r.Schedules)
	}
}

// TestBoundCountsPreemptions: a bounded search runs the orders within its bound, and
// no other.
func TestBoundCountsPreemptions(t *testing.T) {
	for bound := range 5 {
		seen := map[string]bool{}
		if _, err := explore.Search(explore.Options{Preemptions: bound}, words(2, 3, seen)); err != nil {
			t.Fatal(err)
		}
		all := map[string]bool{}
		_, _ = explore.Search(explore.Options{Preemptions: explore.All}, words(2, 3, all))
		for s := range all {
			if want := preemptions(s) <= bound; seen[s] != want {
				t.Errorf("bound %d: the order %s was run: %v, want %v", bound, s, seen[s], want)
			}
		}
	}
}

func preemptions(s string) (n int) {
	for i := 1; i < len(s); i++ {
		if s[i] != s[i-1] && strings.IndexByte(s[i:], s[i-1]) >= 0 {
			n++
		}
	}
	return n
}

// TestIndependentStepsAreNotReordered: for threads that share no location only one order is
// run.
func TestIndependentStepsAreNotReordered(t *testing.T) {
	scenario := func(r *explore.Run) {
		n := make([]atomic.Uint64, 4)
		var sum atomic.Uint64
		for i := range n {
			r.Go("own", func() {
				for range 5 {
					n[i].Add(1)
				}
				sum.Tally(1)
			})
		}
	}
	r, err := explore.Search(explore.Options{Preemptions: explore.All}, scenario)
	if err != nil || r.Schedules != 1 {
		t.Errorf("got %d schedules, %v; want 1", r.Schedules, err)
	}
}

func TestKillEndsTheThreadsAnywhere(t *testing.T) {
	seen := map[uint64]bool{}
	scenario := func(r *explore.Run) {
		var n atomic.Uint64
		r.Go("counts", func() {
			for range 4 {
				n.Add(1)
			}
		})
		r.Kill()
		r.Check(func() error { seen[n.Load()] = true; return nil })
	}
	for _, bound := range []int{0, explore.All} {
		clear(seen)
		if _, err := explore.Search(explore.Options{Preemptions: bound}, scenario); err != nil {
			t.Fatal(err)
		}
		if len(seen) != 5 {
			t.Errorf("bound %d: killed at %v, want 0 to 4", bound, seen)
		}
	}
}

// TestReductionLosesNoState compares the results of random programs, searched with
// and without the reduction of a complete search.
func TestReductionLosesNoState(t *testing.T) {
	for seed := range uint64(40) {
		bounded, all := map[string]bool{}, map[string]bool{}
		// Programs of that length cannot have more preemptions than this.
		if _, err := explore.Search(explore.Options{Preemptions: 12}, randomProgram(seed, bounded)); err != nil {
			t.Fatal(err)
		}
		if _, err := explore.Search(explore.Options{Preemptions: explore.All}, randomProgram(seed, all)); err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(bounded) != fmt.Sprint(all) {
			t.Errorf("program %d: %d results with a bound, %d without: %v, %v", seed, len(bounded), len(all), bounded, all)
		}
	}
}

// randomProgram has three threads of three operations on two atomics.
func randomProgram(seed uint64, results map[string]bool) func(*explore.Run) {
	return func(r *explore.Run) {
		state := seed*0x9e3779b97f4a7c15 + 1
		random := func(n uint64) uint64 {
			state ^= state << 13
			state ^= state >> 7
			state ^= state << 17
			return state % n
		}
		var cells [2]atomic.Uint64
		var mu sync.Mutex
		var log [3]string
		for i := range log {
			var program []func()
			for range 3 {
				c := &cells[random(2)]
				n := random(3)
				program = append(program, []func(){
					func() { log[i] += fmt.Sprint(" l", c.Load()) },
					func() { c.Store(n) },
					func() { c.Tally(n) },
					func() { log[i] += fmt.Sprint(" c", c.CompareAndSwap(n, n+5)) },
					func() { mu.Lock(); v := c.Load(); c.Store(v*2 + 1); mu.Unlock() },
				}[random(5)])
			}
			r.Go("random", func() {
				for _, f := range program {
					f()
				}
			})
		}
		r.Check(func() error {
			results[fmt.Sprint(log, cells[0].Load(), cells[1].Load())] = true
			return nil
		})
	}
}

// ExampleSearch finds a lost update: two threads add one by a load and a store.
func ExampleSearch() {
	_, failure := explore.Search(explore.Options{Preemptions: explore.All}, lostUpdate)
	fmt.Println(failure.Err)
	fmt.Println(failure.Schedule)
	// Output:
	// the counter is 1, want 2
	// a1b2a1
}
