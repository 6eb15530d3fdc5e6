//go:build interleavings

package dedup

import (
	"context"
	"fmt"
	"testing"
	"time"

	"verve/counter"
	"verve/internal/explore"
)

// kind is a kind of ids.
type kind struct {
	name string
	key  func(home, id uint64) Key // the searches for ids with the same home begin at the same slot
}

var kinds = []kind{
	{"narrow", func(home, id uint64) Key { return Key{lo: home<<60 | id<<20, kind: narrowKind} }},
	// The first words of all keys differ only in the home.
	{"wide", func(home, id uint64) Key { return Key{hi: home<<60 | 1<<20, lo: id, kind: wideKind} }},
}

// eachKind explores a scenario with each kind of ids.
func eachKind(t *testing.T, o explore.Options, scenario func(r *explore.Run, kind kind)) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			explore.Explore(t, o, func(r *explore.Run) { scenario(r, kind) })
		})
	}
}

// scene is a Memory whose epochs are opened by hand.
type scene struct {
	m      *Memory
	c      *counter.Counter
	epochs []*counter.Epoch
	added  []add
}

// add is an id that was added to an epoch, and the answer.
type add struct {
	epoch   int
	key     Key
	verdict Verdict
	done    bool
}

// Publish implements counter.Publisher.
func (s *scene) Publish(context.Context, counter.Count) error { return nil }

// newScene opens n epochs, the first of which has the given serial.
func newScene(cfg Config, serial uint64, n int) *scene { return newKeyScene(cfg, 0, serial, n) }

// newKeyScene is newScene with at most keys keys in an epoch; 0: many.
func newKeyScene(cfg Config, keys int, serial uint64, n int) *scene {
	cfg.Heap = true
	m, err := NewMemory(cfg)
	if err != nil {
		panic(err)
	}
	s := &scene{m: m}
	past := counter.Past{Serial: serial - 1, Start: time.Unix(3600, 0), Window: time.Second, Over: true}
	c, err := counter.New(counter.Config{Window: time.Second, Store: m, Publisher: s, MaxKeys: keys, Past: past})
	if err != nil {
		panic(err)
	}
	s.c = c
	for {
		s.epochs = append(s.epochs, c.Last())
		if len(s.epochs) == n {
			return s
		}
		c.TurnFrom(c.Last())
	}
}

// judge adds keys to an epoch in one call.
func (s *scene) judge(epoch int, keys ...Key) []Verdict {
	items := make([]Item, len(keys))
	verdicts := make([]Verdict, len(keys))
	for i, k := range keys {
		items[i].Key, verdicts[i] = k, Turned
	}
	_ = s.m.AddMany(s.epochs[epoch], items, verdicts) // the verdicts show the error
	return verdicts
}

// set adds keys, which must be new.
func (s *scene) set(epoch int, keys ...Key) {
	for i, v := range s.judge(epoch, keys...) {
		if v != Unique {
			panic(fmt.Sprintf("verdict %d on key %d of the preparation", v, i))
		}
		s.added = append(s.added, add{epoch, keys[i], v, true})
	}
}

// adds starts a thread that adds keys to an epoch together.
func (s *scene) adds(r *explore.Run, name string, epoch int, keys ...Key) {
	from := len(s.added)
	for _, k := range keys {
		s.added = append(s.added, add{epoch: epoch, key: k})
	}
	r.Go(name, func() {
		for i, v := range s.judge(epoch, keys...) {
			explore.Note("key %x: verdict %d", keys[i].lo, v)
			s.added[from+i].verdict, s.added[from+i].done = v, true
		}
	})
}

// visits starts a thread that adds keys one after the other, each inside the only epoch.
func (s *scene) visits(r *explore.Run, name string, keys ...Key) {
	from := len(s.added)
	for _, k := range keys {
		s.added = append(s.added, add{key: k})
	}
	r.Go(name, func() {
		for i := range keys {
			s.visit(&s.added[from+i])
		}
	})
}

// visit adds a key inside the only epoch.
func (s *scene) visit(a *add) {
	in, _ := s.c.Enter(s.epochs[0].Start().UnixNano(), 0, 1)
	a.verdict, a.done = s.judge(0, a.key)[0], true
	leaveScene(in, a.verdict)
}

// leaveScene makes a request whose id got the verdict v leave its epoch.
func leaveScene(in counter.Entry, v Verdict) {
	var n [Verdicts]uint64
	n[v] = 1
	in.Leave(n[Unique], n[Repeat], 1-n[Unique]-n[Repeat])
}

// check compares the answers for each id in each epoch with those of a set: Unique once, and
// Repeat only if another answer was Unique. An id is answered Turned only if a later epoch is
// open. An id that was answered Unique in the last epoch is found there.
func (s *scene) check() error {
	type place struct {
		epoch int
		key   Key
	}
	answers := map[place][Verdicts]int{}
	for _, a := range s.added {
		if !a.done {
			return fmt.Errorf("key %x was not answered", a.key.lo)
		}
		n := answers[place{a.epoch, a.key}]
		n[a.verdict]++
		answers[place{a.epoch, a.key}] = n
	}
	last := len(s.epochs) - 1
	for p, n := range answers {
		switch {
		case n[Unique] > 1:
			return fmt.Errorf("key %x was new %d times in epoch %d", p.key.lo, n[Unique], p.epoch)
		case n[Repeat] > 0 && n[Unique] == 0:
			return fmt.Errorf("key %x was a repeat in epoch %d, and never new", p.key.lo, p.epoch)
		case n[Turned] > 0 && p.epoch == last:
			return fmt.Errorf("key %x was turned away from the last epoch", p.key.lo)
		case n[Unavailable] > 0:
			return fmt.Errorf("key %x was unavailable", p.key.lo)
		case p.epoch == last && n[Unique] != b2i(s.knows(last, p.key)):
			return fmt.Errorf("key %x was new %d times; known: %v", p.key.lo, n[Unique], s.knows(last, p.key))
		}
	}
	return nil
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (s *scene) knows(epoch int, k Key) bool {
	return s.m.Knows(s.epochs[epoch].State.(*View), k)
}

// room checks that nothing was Full, besides check.
func (s *scene) room() error {
	for _, a := range s.added {
		if a.verdict == Full {
			return fmt.Errorf("key %x found no room", a.key.lo)
		}
	}
	return s.check()
}

// TestInterleavingsOfAnAdd: requests for one id, and for another one with the same home.
func TestInterleavingsOfAnAdd(t *testing.T) {
	eachKind(t, explore.OptionsFor(explore.All, explore.All, explore.All), func(r *explore.Run, kind kind) {
		s := newScene(Config{}, 1, 1)
		a, b := kind.key(7, 1), kind.key(7, 2)
		s.adds(r, "a", 0, a)
		s.adds(r, "a again", 0, a)
		s.adds(r, "b", 0, b)
		r.Check(s.room)
	})
}

// TestInterleavingsOfBatches: the same ids in two orders.
func TestInterleavingsOfBatches(t *testing.T) {
	eachKind(t, explore.OptionsFor(explore.All, explore.All, explore.All), func(r *explore.Run, kind kind) {
		s := newScene(Config{}, 1, 1)
		a, b := kind.key(7, 1), kind.key(7, 2)
		s.adds(r, "ab", 0, a, b)
		s.adds(r, "bba", 0, b, b, a)
		r.Check(s.room)
	})
}

// TestInterleavingsOfAStraggler: requests of an epoch add while requests of the next one take
// its slots. The tag of the next epoch is one more, or begins again at 1.
func TestInterleavingsOfAStraggler(t *testing.T) {
	for _, kind := range kinds {
		for _, serial := range []uint64{1, lap} {
			t.Run(fmt.Sprint(kind.name, "-", serial), func(t *testing.T) {
				explore.Explore(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run) {
					s := newScene(Config{}, serial, 2)
					a, b, c := kind.key(7, 1), kind.key(7, 2), kind.key(7, 3)
					s.set(0, a)
					s.adds(r, "straggler a", 0, a)
					s.adds(r, "straggler b", 0, b)
					s.adds(r, "next b", 1, b)
					s.adds(r, "next c", 1, c)
					r.Check(s.room)
				})
			})
		}
	}
}

// TestInterleavingsOfThreeEpochs: requests of two epochs write a slot that a request of a third
// one still reads.
func TestInterleavingsOfThreeEpochs(t *testing.T) {
	eachKind(t, explore.OptionsFor(2, 3, explore.All), func(r *explore.Run, kind kind) {
		s := newScene(Config{}, lap-1, 3)
		a, b := kind.key(7, 1), kind.key(7, 2)
		s.set(0, a)
		s.adds(r, "first a", 0, a)
		s.adds(r, "second b", 1, b)
		s.adds(r, "third a", 2, a)
		s.adds(r, "third b", 2, b)
		r.Check(s.room)
	})
}

// TestInterleavingsOfASweep: the cleaner empties what the adds take.
func TestInterleavingsOfASweep(t *testing.T) {
	eachKind(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run, kind kind) {
		s := newScene(Config{}, 1, 1)
		a, b := kind.key(7, 1), kind.key(8, 2)
		s.set(0, a, b)
		s.added = nil
		// As if staleAge or more epochs had been opened and closed since then.
		*s = *s.after(staleAge + 2)
		s.adds(r, "a", 0, a)
		s.adds(r, "a again", 0, a)
		r.Go("cleaner", s.m.reclaim)
		r.Check(func() error {
			if err := s.room(); err != nil {
				return err
			}
			first := s.m.narrow.open.levels[0].Load().buckets[0][8].Load()
			if kind.name == "wide" {
				first = s.m.wide.open.levels[0].Load().buckets[0][8][0].Load()
			}
			if first != 0 {
				return fmt.Errorf("the cleaner left the word %#x of an epoch long past", first)
			}
			return nil
		})
	})
}

// after returns the scene n epochs later, with only the open epoch.
func (s *scene) after(n int) *scene {
	m := s.m
	m.mu.Lock()
	m.busy = m.busy[:0]
	m.serial += uint64(n) - 1
	m.mu.Unlock()
	past := counter.Past{Serial: m.serial, Start: time.Unix(3600, 0), Window: time.Second, Over: true}
	next := &scene{m: m}
	c, err := counter.New(counter.Config{Window: time.Second, Store: m, Publisher: next, Past: past})
	if err != nil {
		panic(err)
	}
	next.epochs = append(next.epochs, c.Last())
	return next
}

// crowd fills all but free slots of the first level, from home 0 on.
func (s *scene) crowd(key func(home, id uint64) Key, free uint64) {
	for n := range slotsPerBucket - free {
		s.set(0, key(n, 100+n))
	}
}

// TestInterleavingsOfGrowth: the last slot of a level is taken, and one level is added
// by the requests that find it full.
func TestInterleavingsOfGrowth(t *testing.T) {
	eachKind(t, explore.OptionsFor(1, 3, explore.All), func(r *explore.Run, kind kind) {
		s := newScene(Config{}, 1, 1)
		s.crowd(kind.key, 1)
		a, b := kind.key(7, 1), kind.key(7, 2)
		s.adds(r, "a", 0, a)
		s.adds(r, "a again", 0, a)
		s.adds(r, "b", 0, b)
		r.Check(func() error {
			if depth := s.m.narrow.open.depth + s.m.wide.open.depth; depth != 3 {
				return fmt.Errorf("there are %d levels, want 3", depth)
			}
			return s.room()
		})
	})
}

// TestInterleavingsOfGrowthAhead: the cleaner adds a level meanwhile.
func TestInterleavingsOfGrowthAhead(t *testing.T) {
	eachKind(t, explore.OptionsFor(1, 2, explore.All), func(r *explore.Run, kind kind) {
		s := newScene(Config{}, 1, 1)
		s.crowd(kind.key, 1)
		s.m.narrow.open.checking.Store(kind.name == "narrow")
		s.m.wide.open.checking.Store(kind.name == "wide")
		a, b := kind.key(7, 1), kind.key(7, 2)
		s.adds(r, "ab", 0, a, b)
		s.adds(r, "b", 0, b)
		r.Go("cleaner", s.m.growAhead)
		r.Check(func() error {
			if has, used := s.m.narrow.open.slots*8+s.m.wide.open.slots*16, s.m.arena.used.Load(); has != used {
				return fmt.Errorf("the levels have %d bytes, and %d are in use", has, used)
			}
			return s.room()
		})
	})
}

// TestInterleavingsOfTheLimit: with room for two ids exactly two get in, repeats are
// known, and take no room.
func TestInterleavingsOfTheLimit(t *testing.T) {
	eachKind(t, explore.OptionsFor(explore.All, explore.All, explore.All), func(r *explore.Run, kind kind) {
		s := newScene(Config{MaxIDs: 2}, 1, 1)
		a, b, c := kind.key(7, 1), kind.key(7, 2), kind.key(8, 3)
		s.adds(r, "a", 0, a)
		s.adds(r, "a again", 0, a)
		s.adds(r, "bc", 0, b, c)
		r.Check(func() error { return s.limited(2, 0) })
	})
}

// limited checks that max ids are in, or up to a given number more, and that none was refused
// while there was room.
func (s *scene) limited(max, over int) error {
	in, refused := 0, 0
	for _, a := range s.added {
		in += b2i(a.verdict == Unique)
		refused += b2i(a.verdict == Full)
	}
	if in > max+over || refused > 0 && in < max {
		return fmt.Errorf("%d ids are in and %d were refused; %d may be in, or %d more", in, refused, max, over)
	}
	return s.check()
}

// TestInterleavingsOfTheLimitComingNear: the epoch becomes strict while requests add.
// Only those under way then may be too many.
func TestInterleavingsOfTheLimitComingNear(t *testing.T) {
	eachKind(t, explore.OptionsFor(1, 2, explore.All), func(r *explore.Run, kind kind) {
		s := newScene(Config{MaxIDs: 3}, 1, 1)
		for id := range uint64(3) {
			s.visits(r, fmt.Sprint("id ", id), kind.key(2*id, 10+id), kind.key(2*id, 20+id))
		}
		r.Check(func() error { return s.limited(3, 2) })
	})
}

// TestInterleavingsOfTheLimitBetweenSamples: one id is sampled, and with it the epoch becomes
// strict. The other ids, which are not sampled, come one after the other. If more ids get in
// than the limit and the request under way allow, all these must have been added before the
// epoch was strict, so that left, which is computed after that, includes them.
func TestInterleavingsOfTheLimitBetweenSamples(t *testing.T) {
	eachKind(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run, kind kind) {
		s := newScene(Config{MaxIDs: 3}, 1, 1)
		for id := range uint64(4) {
			k := kind.key(2*id, 10+id)
			k.lo |= 1 << 50
			s.added = append(s.added, add{key: k})
		}
		view, late := s.epochs[0].State.(*View), 0
		r.Go("not sampled", func() {
			for i := range 4 {
				strict := view.tight.Load()
				s.visit(&s.added[i])
				late += b2i(strict && s.added[i].verdict == Unique)
			}
		})
		s.visits(r, "sampled", kind.key(9, 1))
		r.Check(func() error {
			if late > 0 {
				return s.limited(3, 1)
			}
			return s.limited(3, 2)
		})
	})
}
