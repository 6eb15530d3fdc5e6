//go:build interleavings

package callback

import (
	"context"
	"fmt"
	"testing"
	"time"
	"unsafe"

	"github.com/rs/zerolog"

	"verve/internal/explore"
	"verve/internal/explore/atomic"
	clocks "verve/internal/explore/time"
)

// scene is a Sender with a counter, and what came of it.
type scene struct {
	s       *Sender
	counted atomic.Uint64 // ids that were new

	asking             int // requests that are not answered
	reserved, released int
	sent               []count // by each Send: of what was counted before it
	posted             []count // by each POST, in its body

	clock *clocks.Clock // of a rate; nil: every POST is due
	began time.Time

	cut      bool
	dropped  int   // as Drain has it
	exceeded error // a bound
}

type count struct {
	url    string
	unique uint64
}

// newScene has room for so many waiting endpoints, in all and of one destination, which may
// have so many POSTs in flight together. A POST that fails opens the breaker, which is half open at once.
func newScene(waiting, share, together int) *scene {
	k := new(scene)
	s, err := New(Config{
		Allow: []string{"listed.example.com:80"}, Concurrency: together, Timeout: time.Hour, Log: zerolog.Nop(),
		Live:       func() (time.Time, uint64) { return time.Time{}, k.counted.Load() },
		maxWaiting: waiting, maxWaitingPerDestination: share, workers: together + 1, breakerFailures: 1, breakerOpen: 1,
	})
	if err != nil {
		panic(err)
	}
	end := s.cut
	s.cut = func() {
		explore.Do(explore.Write, "cut", unsafe.Pointer(&k.cut))
		k.cut = true
		end()
	}
	k.s = s
	return k
}

// asks adds a thread that does what requests with these endpoints do, one after the other. It
// counts their ids if those are new.
func (k *scene) asks(r *explore.Run, name string, unique bool, urls ...string) {
	k.asking++
	r.Go(name, func() {
		defer func() { k.asking-- }()
		for _, url := range urls {
			k.ask(url, unique)
		}
	})
}

func (k *scene) ask(url string, unique bool) {
	ep, err := k.s.Parse([]byte(url))
	if err != nil {
		panic(err)
	}
	if !k.s.Reserve(ep) {
		return
	}
	k.reserved++
	k.look()
	if !unique {
		k.s.Release(ep)
		k.released++
		return
	}
	n := k.counted.Add(1)
	k.s.Send(ep)
	k.sent = append(k.sent, count{ep.url, n})
	k.look()
}

// works adds a worker, whose POSTs end as given, the last one and those after it alike. A
// POST that is cut off never ends by itself.
func (k *scene) works(r *explore.Run, name string, ends ...result) {
	r.Go(name, func() {
		for n := 0; ; n++ {
			j, ok := k.s.take()
			if !ok {
				return
			}
			k.look()
			_, unique := k.s.cfg.Live()
			k.posted = append(k.posted, count{j.ep.url, unique})
			k.lookAtRate(j.dest)
			end := ends[min(n, len(ends)-1)]
			cut := func() bool { return end.kind != Dropped || k.cut }
			explore.Until(cut, "answer", unsafe.Pointer(&k.cut))
			if k.cut {
				end.kind = Dropped
			}
			k.s.finish(j, end)
			k.look()
		}
	})
}

// deadline passes when over is closed.
type deadline struct {
	context.Context
	over chan struct{}
}

func (d *deadline) Done() <-chan struct{} { return d.over }

// drains adds the stop of the server, which waits for what is to be sent as long as it takes.
func (k *scene) drains(r *explore.Run) { r.Go("stop", func() { k.drain(context.Background()) }) }

// drainsIdle is drains when no request is left.
func (k *scene) drainsIdle(r *explore.Run) {
	r.Go("stop", func() {
		explore.Until(func() bool { return k.asking == 0 }, "idle", unsafe.Pointer(&k.asking))
		k.drain(context.Background())
	})
}

// drainsAwhile is drains with a deadline, which passes at any moment.
func (k *scene) drainsAwhile(r *explore.Run) {
	d := &deadline{context.Background(), make(chan struct{})}
	r.Go("stop", func() { k.drain(d) })
	r.Go("deadline", func() { explore.Close(d.over) })
}

func (k *scene) drain(ctx context.Context) {
	k.dropped = k.s.Drain(ctx)
	if st := k.s.stats; st.Waiting+st.InFlight > 0 {
		k.exceeded = fmt.Errorf("%d wait and %d are in flight after the stop", st.Waiting, st.InFlight)
	}
}

// paces gives the scene a clock, which moves so often at any moment and makes destinations
// ready when their rate allows, and adds the thread that sweeps. It ends with the stop, which
// begins when no request is left.
func (k *scene) paces(r *explore.Run, moves int) {
	k.clock = clocks.Start(r, moves)
	k.began = k.clock.Now
	k.clock.Idle = func() {
		// A timer is late by what passes between the look at the clock and its setting.
		for _, d := range k.s.dests {
			if late := k.clock.Now.Sub(d.next); d.state == destLater && late > k.clock.Ahead {
				k.exceeded = fmt.Errorf("a POST was due %v ago, and nothing was to send it", late)
			}
		}
	}
	ctx := &deadline{context.Background(), make(chan struct{})}
	r.Go("sweep", func() { k.s.sweep(ctx) })
	r.Go("stop", func() {
		explore.Until(func() bool { return k.asking == 0 }, "idle", unsafe.Pointer(&k.asking))
		k.drain(context.Background())
		explore.Close(ctx.over)
		k.clock.End()
	})
}

// lookAtRate compares the POSTs to the only destination with its rate: in any time two more
// than fit into it.
func (k *scene) lookAtRate(d *destination) {
	if k.clock == nil || d.kind == destListed {
		return
	}
	took, must := k.clock.Now.Sub(k.began), time.Duration(len(k.posted)-2)*k.s.cfg.interval()
	if took < must {
		k.exceeded = fmt.Errorf("%d POSTs were sent in %v, want %v at least", len(k.posted), took, must)
	}
}

// look compares what is in use with the bounds.
func (k *scene) look() {
	s := k.s
	waiting := 0
	for key, d := range s.dests {
		waiting += d.entries
		if d.entries > s.cfg.maxWaitingPerDestination || d.inFlight > s.cfg.Concurrency {
			k.exceeded = fmt.Errorf("%v has %d places and %d POSTs in flight", key, d.entries, d.inFlight)
		}
	}
	if len(s.table) > s.cfg.maxWaiting || waiting != len(s.table) {
		k.exceeded = fmt.Errorf("%d places are taken, %d by destinations; there are %d", len(s.table), waiting, s.cfg.maxWaiting)
	}
	if s.unprovenSlots > unprovenShare(s.cfg.maxWaiting) || s.unprovenBusy > unprovenShare(s.cfg.workers) {
		k.exceeded = fmt.Errorf("unproven destinations have %d places and %d workers", s.unprovenSlots, s.unprovenBusy)
	}
}

// check compares the outcome of each reservation with its request. Nothing is left.
func (k *scene) check() error {
	st := k.s.Stats()
	if k.exceeded != nil {
		return k.exceeded
	}
	if k.reserved != k.released+len(k.sent) {
		return fmt.Errorf("%d places were reserved, %d given back and %d sent", k.reserved, k.released, len(k.sent))
	}
	if st.Reserved+st.Waiting+st.InFlight+k.s.unprovenSlots+k.s.unprovenBusy != 0 {
		return fmt.Errorf("something is left: %+v, %d places and %d workers of unproven destinations", st, k.s.unprovenSlots, k.s.unprovenBusy)
	}
	if posts := st.Ended[Delivered] + st.Ended[FailedStatus] + st.Ended[FailedTimeout]; posts > uint64(len(k.posted)) ||
		posts+st.Ended[Merged]+st.Ended[Dropped]+st.Ended[FailedBreaker] != uint64(len(k.sent)) {
		return fmt.Errorf("%d were sent, %d POSTs were made: %+v", len(k.sent), len(k.posted), st)
	}
	open := 0
	for key, d := range k.s.dests {
		if d.entries+d.inFlight != 0 || len(d.queue) > 0 {
			return fmt.Errorf("%v has %d places and %d POSTs in flight at the end", key, d.entries, d.inFlight)
		}
		if d.open {
			open++
		}
	}
	if open != st.BreakersOpen {
		return fmt.Errorf("%d breakers are open, counted are %d", open, st.BreakersOpen)
	}
	return k.checkCounts(st)
}

// checkCounts checks that an endpoint gets no more POSTs than were sent, and, unless some
// were not made, for each one with a count that has what was counted before.
func (k *scene) checkCounts(st Stats) error {
	posts := map[string]int{}
	last := map[string]uint64{}
	for _, p := range k.posted {
		posts[p.url]++
		last[p.url] = max(last[p.url], p.unique)
	}
	for _, s := range k.sent {
		posts[s.url]--
		if st.Ended[Dropped]+st.Ended[FailedBreaker] == 0 && last[s.url] < s.unique {
			return fmt.Errorf("%s got the count %d, and was to get %d", s.url, last[s.url], s.unique)
		}
	}
	for url, n := range posts {
		if n > 0 {
			return fmt.Errorf("%s got %d POSTs more than were sent", url, n)
		}
	}
	return nil
}

// all is check, and that nothing was dropped.
func (k *scene) all() error {
	if st := k.s.Stats(); k.dropped != 0 || st.Ended[Dropped] != 0 {
		return fmt.Errorf("the stop has dropped %d of %d", k.dropped, st.Ended[Dropped])
	}
	return k.check()
}

const (
	listed      = "http://listed.example.com/a"
	listedOther = "http://listed.example.com/b"
	public      = "http://one.example.com/"
	publicOther = "http://two.example.com/"
)

var (
	delivered = result{kind: Delivered}
	slow      = result{kind: Delivered, took: time.Hour}
	timesOut  = result{kind: FailedTimeout, took: time.Hour}
	hangs     = result{kind: Dropped}
)

// TestInterleavingsOfMerging: requests name one endpoint while its POST is reserved, waits or
// is in flight, and the server stops.
func TestInterleavingsOfMerging(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run) {
		k := newScene(4, 4, 1)
		k.asks(r, "new", true, listed)
		k.asks(r, "new too", true, listed)
		k.works(r, "worker", delivered)
		k.drains(r)
		r.Check(k.all)
	})
}

// TestInterleavingsOfReleasing: the id of one request was there before.
func TestInterleavingsOfReleasing(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run) {
		k := newScene(4, 4, 1)
		k.asks(r, "new", true, public)
		k.asks(r, "repeat", false, public)
		k.works(r, "worker", delivered)
		k.drains(r)
		r.Check(k.all)
	})
}

// TestInterleavingsOfPlaces: there is room for two endpoints, one of each destination.
func TestInterleavingsOfPlaces(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(1, 2, explore.All), func(r *explore.Run) {
		k := newScene(2, 1, 1)
		k.asks(r, "listed", true, listed)
		k.asks(r, "listed other", true, listedOther)
		k.asks(r, "public", false, public)
		k.asks(r, "public other", false, publicOther)
		k.works(r, "worker", delivered)
		k.drainsIdle(r)
		r.Check(k.all)
	})
}

// TestInterleavingsOfWorkers: two workers, and two POSTs to one destination, which may have
// one in flight. The first takes long.
func TestInterleavingsOfWorkers(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(1, 2, explore.All), func(r *explore.Run) {
		k := newScene(4, 4, 1)
		k.asks(r, "a", true, public)
		k.asks(r, "b", true, public+"b")
		k.works(r, "worker", slow, delivered)
		k.works(r, "worker too", slow, delivered)
		k.drainsIdle(r)
		r.Check(k.all)
	})
}

// TestInterleavingsOfProving: of two POSTs in flight together one proves the destination.
func TestInterleavingsOfProving(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(1, 2, explore.All), func(r *explore.Run) {
		k := newScene(4, 4, 2)
		k.asks(r, "a", true, public)
		k.asks(r, "b", true, public+"b")
		k.works(r, "worker", delivered)
		k.works(r, "worker too", slow)
		k.drainsIdle(r)
		r.Check(k.all)
	})
}

// TestInterleavingsOfFailures: POSTs fail, the breaker opens, and one tries again.
func TestInterleavingsOfFailures(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(1, 2, explore.All), func(r *explore.Run) {
		k := newScene(4, 4, 1)
		k.asks(r, "a", true, public)
		k.asks(r, "b", true, public+"b")
		k.asks(r, "c", true, public+"c")
		k.works(r, "worker", timesOut, delivered)
		k.drainsIdle(r)
		r.Check(k.all)
	})
}

// TestInterleavingsOfADeadline: the deadline of the stop passes at any moment, while a POST
// hangs.
func TestInterleavingsOfADeadline(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(1, 2, explore.All), func(r *explore.Run) {
		k := newScene(4, 4, 1)
		k.asks(r, "a", true, listed)
		k.works(r, "worker", hangs)
		k.works(r, "worker too", delivered)
		k.drainsAwhile(r)
		r.Check(k.check)
	})
}

// TestInterleavingsOfARate: three POSTs to a destination with a rate, which lets two go at
// once. The third goes when it is due, and not before. Time passes at any moment, once, and
// else when all wait.
func TestInterleavingsOfARate(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(0, 1, 2), func(r *explore.Run) {
		k := newScene(4, 4, 1)
		k.paces(r, 1)
		k.ask(public, true)
		k.ask(public+"b", true)
		k.asks(r, "c", true, public+"c")
		k.works(r, "worker", delivered)
		r.Check(k.all)
	})
}
