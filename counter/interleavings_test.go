//go:build interleavings

package counter

import (
	"context"
	"fmt"
	"testing"
	"time"

	"verve/internal/explore"
)

// scene is a Counter whose clock stands still, with the answers of its requests and its
// records.
type scene struct {
	c         *Counter
	first     *Epoch
	opened    []*Epoch
	published []Count
	retired   []*Epoch
	answers   [][]answer                   // by request
	under     map[string]map[string]uint64 // ids answered as new, by window and key
	keyless   int                          // ids refused because there was no room for their key
}

// answer is what a request was answered: the epoch and how much it counted there.
type answer struct {
	epoch           *Epoch
	start           time.Time
	unique, repeats uint64
}

func (s *scene) Open(e *Epoch) State {
	s.opened = append(s.opened, e)
	return sceneState{s, e}
}

type sceneState struct {
	s *scene
	e *Epoch
}

func (i sceneState) Retire() { i.s.retired = append(i.s.retired, i.e) }

func (s *scene) Publish(_ context.Context, c Count) error {
	s.published = append(s.published, c)
	return nil
}

func newScene() *scene { return newKeyScene(DefaultMaxKeys) }

// newKeyScene returns a scene in which an epoch may have the given number of keys.
func newKeyScene(keys int) *scene {
	s := new(scene)
	start := time.Unix(1000, 0)
	c, err := New(Config{Window: time.Second, Store: s, Publisher: s, MaxKeys: keys,
		clocks: func() reading { return reading{wall: start.UnixNano()} }})
	if err != nil {
		panic(err)
	}
	s.c, s.first = c, c.Last()
	return s
}

// request adds a thread of some requests, which enter together at the given moment, and leave.
func (s *scene) request(r *explore.Run, name string, now int64, hint, unique, repeats, void uint64) {
	i := len(s.answers)
	s.answers = append(s.answers, nil)
	r.Go(name, func() {
		in, open := s.c.Enter(now, hint, unique+repeats+void)
		if !open {
			return
		}
		a := answer{in.Epoch, in.Start(), unique, repeats}
		in.Leave(unique, repeats, void)
		s.answers[i] = append(s.answers[i], a)
	})
}

// closer adds a thread that closes the given number of epochs, or all until Seal.
func (s *scene) closer(r *explore.Run, epochs int) {
	r.Go("closer", func() {
		for n := 0; n != epochs; {
			e, sealed := s.c.oldest()
			switch {
			case e != nil:
				if err := s.c.close(context.Background(), e); err != nil {
					panic(err)
				}
				n++
			case sealed:
				return
			default:
				explore.Wait()
			}
		}
	})
}

// check compares the records with the answers, and the counts of unpublished epochs with the
// remaining answers.
func (s *scene) check() error {
	unique, repeats := map[int64]uint64{}, map[int64]uint64{}
	for _, answers := range s.answers {
		for _, a := range answers {
			unique[a.start.UnixNano()] += a.unique
			repeats[a.start.UnixNano()] += a.repeats
		}
	}
	for i, c := range s.published {
		at := c.Start.UnixNano()
		if c.Unique != unique[at] || c.Repeats != repeats[at] {
			return fmt.Errorf("record %d, of %v, has %d and %d repeats; answered were %d and %d", i, c.Start, c.Unique, c.Repeats, unique[at], repeats[at])
		}
		if i > 0 && !c.Start.After(s.published[i-1].Start) {
			return fmt.Errorf("record %v came after %v", c.Start, s.published[i-1].Start)
		}
		delete(unique, at)
		delete(repeats, at)
	}
	for i, e := range s.opened {
		if i > 0 && e.start <= s.opened[i-1].start {
			return fmt.Errorf("epoch %v was opened after %v", e.Start(), s.opened[i-1].Start())
		}
	}
	for i, e := range s.retired {
		if e != s.opened[i] {
			return fmt.Errorf("epoch %v was retired, want %v", e.Start(), s.opened[i].Start())
		}
		if !e.Idle() {
			return fmt.Errorf("epoch %v was retired with a request in it", e.Start())
		}
	}
	for _, e := range s.opened[len(s.retired):] {
		if got, want := e.Unique(), unique[e.start]; got != want {
			return fmt.Errorf("epoch %v counts %d; answered were %d", e.Start(), got, want)
		}
		if got, want := e.Repeats(), repeats[e.start]; got != want {
			return fmt.Errorf("epoch %v counts %d repeats; answered were %d", e.Start(), got, want)
		}
		if !e.Idle() {
			return fmt.Errorf("a request never left epoch %v", e.Start())
		}
	}
	stats := s.c.Stats()
	for _, answers := range s.answers {
		for _, a := range answers {
			stats.Unique -= a.unique
			stats.Repeats -= a.repeats
		}
	}
	if stats.Unique != 0 || stats.Repeats != 0 {
		return fmt.Errorf("Stats counts %d and %d repeats more than were answered", int64(stats.Unique), int64(stats.Repeats))
	}
	return nil
}

// opens checks that n epochs were opened.
func (s *scene) opens(n int) func() error {
	return func() error {
		if len(s.opened) != n {
			return fmt.Errorf("%d epochs were opened, want %d", len(s.opened), n)
		}
		return s.check()
	}
}

func TestInterleavingsOfEnterLeaveTurnClose(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run) {
		s := newScene()
		end := s.first.end
		s.request(r, "early", end-1, 0, 1, 0, 0)
		s.request(r, "other", end-1, 0, 1, 0, 0)
		s.request(r, "late", end, 1, 1, 0, 0)
		s.closer(r, 1)
		r.Check(s.opens(2))
	})
}

func TestInterleavingsOfOutcomes(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run) {
		s := newScene()
		end := s.first.end
		s.request(r, "repeat", end-1, 0, 0, 1, 0)
		s.request(r, "void", end-1, 1, 0, 0, 1)
		s.request(r, "late", end, 0, 0, 1, 0)
		s.closer(r, 1)
		r.Check(s.opens(2))
	})
}

func TestInterleavingsOfBatches(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run) {
		s := newScene()
		end := s.first.end
		s.request(r, "batch", end-1, 0, 2, 1, 0)
		s.request(r, "single", end-1, 0, 1, 0, 0)
		s.request(r, "late", end, 0, 0, 1, 1)
		s.closer(r, 1)
		r.Check(s.opens(2))
	})
}

func TestInterleavingsOfSeal(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run) {
		s := newScene()
		end := s.first.end
		s.request(r, "early", end-1, 0, 1, 0, 0)
		s.request(r, "late", end, 0, 1, 0, 0)
		r.Go("stop", func() { s.c.Seal() })
		s.closer(r, -1)
		r.Check(func() error {
			if s.c.open.Load() != nil || len(s.retired) != len(s.opened) {
				return fmt.Errorf("%d of %d epochs were retired after Seal", len(s.retired), len(s.opened))
			}
			return s.check()
		})
	})
}

func TestInterleavingsOfTurns(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run) {
		s := newScene()
		end := s.first.end
		s.request(r, "late", end, 0, 1, 0, 0)
		s.request(r, "later", end+1, 1, 1, 0, 0)
		r.Go("turn from", func() { s.c.TurnFrom(s.first) })
		r.Go("spare", func() { s.c.provide() })
		r.Check(s.opens(2))
	})
}

func TestInterleavingsOfTwoTurns(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run) {
		s := newScene()
		s.c.provide()
		end := s.first.end
		window := int64(time.Second)
		s.request(r, "early", end-1, 0, 1, 0, 0)
		s.request(r, "late", end, 0, 1, 0, 0)
		s.request(r, "next", end+window, 0, 1, 0, 0)
		s.closer(r, 1)
		r.Check(s.check)
	})
}

// TestInterleavingsOfAPublisherThatStands: if as many epochs wait as are kept, a further epoch
// that counted nothing becomes part of a gap, but one with a request in it does not.
func TestInterleavingsOfAPublisherThatStands(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run) {
		s := newScene()
		end, window := s.first.end, int64(time.Second)
		for i := range int64(maxWaiting) {
			if i == 0 {
				in, _ := s.c.Enter(end-1, 0, 1)
				in.Leave(1, 0, 0)
				s.answers = append(s.answers, []answer{{in.Epoch, in.Start(), 1, 0}})
			}
			s.c.turn(end + i*window)
		}
		open := s.c.Last()
		s.request(r, "early", open.end-1, 0, 1, 0, 0)
		s.request(r, "late", open.end, 0, 1, 0, 0)
		r.Go("next", func() { s.c.turn(open.end + window) })
		r.Check(func() error {
			for _, answers := range s.answers {
				for _, a := range answers {
					for _, e := range s.retired {
						if a.epoch == e {
							return fmt.Errorf("epoch %v was retired without a record, and has answers", e.Start())
						}
					}
				}
			}
			return nil
		})
	})
}

// TestInterleavingsOfStats: the sums never fall, and include everything that was counted before
// the call.
func TestInterleavingsOfStats(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(1, 2, explore.All), func(r *explore.Run) {
		s := newScene()
		end := s.first.end
		var before, after Stats
		s.request(r, "early", end-1, 0, 1, 0, 0)
		s.request(r, "late", end, 0, 0, 1, 0)
		s.closer(r, 1)
		r.Go("stats", func() { before, after = s.c.Stats(), s.c.Stats() })
		r.Check(func() error {
			if after.Unique < before.Unique || after.Repeats < before.Repeats || after.Unique > 1 || after.Repeats > 1 {
				return fmt.Errorf("Stats counts %d and %d repeats, then %d and %d", before.Unique, before.Repeats, after.Unique, after.Repeats)
			}
			return s.check()
		})
	})
}

// TestInterleavingsOfLeaves: requests leave one stripe with each kind of outcome.
func TestInterleavingsOfLeaves(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run) {
		s := newScene()
		end := s.first.end
		s.request(r, "repeat", end-1, 0, 0, 1, 0)
		s.request(r, "void", end-1, 0, 0, 0, 1)
		s.request(r, "batch", end-1, 0, 0, 1, 1)
		s.request(r, "void batch", end-1, 0, 0, 0, 1)
		r.Check(s.opens(1))
	})
}

// files adds a thread that counts a new id under a key. The hashes of all keys lead to the same
// slots.
func (s *scene) files(r *explore.Run, now int64, key string) {
	i := len(s.answers)
	s.answers = append(s.answers, nil)
	hash := uint64(key[0]) * 8
	r.Go(key, func() {
		in, _ := s.c.Enter(now, 0, 1)
		keys := in.Keys()
		k := keys.Find(hash, []byte(key))
		if full := k == nil && keys.Full(); full {
			k = keys.Find(hash, []byte(key))
		} else if k == nil {
			k = keys.Add(hash, []byte(key))
		}
		if k == nil {
			in.Leave(0, 0, 1)
			s.keyless++
			return
		}
		keys.Count(k, 1)
		in.Leave(1, 0, 0)
		s.answers[i] = append(s.answers[i], answer{in.Epoch, in.Start(), 1, 0})
		at := in.Start().String()
		if s.under == nil {
			s.under = map[string]map[string]uint64{}
		}
		if s.under[at] == nil {
			s.under[at] = map[string]uint64{}
		}
		s.under[at][key]++
	})
}

// filed does what check does, and compares the keys of each epoch with the answers. No epoch
// may have more than max keys, or refuse a key while it has fewer.
func (s *scene) filed(max int) error {
	of := map[string][]KeyCount{}
	memory := int64(0)
	for _, c := range s.published {
		of[c.Start.String()] = c.Keys.List()
	}
	for _, e := range s.opened[len(s.retired):] {
		if e.keys.Len() != e.keys.Counts().Len() {
			return fmt.Errorf("epoch %v has %d keys; %d are counted", e.Start(), e.keys.Counts().Len(), e.keys.Len())
		}
		of[e.Start().String()] = e.keys.Counts().List()
		memory += e.keys.bytes
	}
	if used := s.c.keys.used.Load(); used != memory {
		return fmt.Errorf("keys take %d bytes; counted are %d", memory, used)
	}
	for at, keys := range of {
		if len(keys) > max || s.keyless > 0 && len(keys) < max {
			return fmt.Errorf("epoch %s has %d keys of %d; %d ids found no room", at, len(keys), max, s.keyless)
		}
		for _, k := range keys {
			if k.Unique != s.under[at][k.Key] {
				return fmt.Errorf("epoch %s has %d ids under %s; answered were %d", at, k.Unique, k.Key, s.under[at][k.Key])
			}
			delete(s.under[at], k.Key)
		}
		if len(s.under[at]) > 0 {
			return fmt.Errorf("epoch %s does not have the keys %v", at, s.under[at])
		}
	}
	return s.check()
}

// TestInterleavingsOfKeys: two requests use one key, a third one uses another key, and the
// table grows.
func TestInterleavingsOfKeys(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, 3, explore.All), func(r *explore.Run) {
		s := newKeyScene(8)
		for _, key := range []string{"a", "b", "a"} {
			s.files(r, s.first.end-1, key)
		}
		r.Check(func() error { return s.filed(8) })
	})
}

// TestInterleavingsOfKeysInTwoEpochs: the first epoch is closed while the second one gets its
// key.
func TestInterleavingsOfKeysInTwoEpochs(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, 2, explore.All), func(r *explore.Run) {
		s := newKeyScene(8)
		s.files(r, s.first.end-1, "a")
		s.files(r, s.first.end, "b")
		s.closer(r, 1)
		r.Check(func() error { return s.filed(8) })
	})
}

// TestInterleavingsOfKeysWhoseMemoryIsUsedAgain: the keys of an epoch are read, and one is
// counted late, while it is closed and the next epoch gets their memory. Neither sees or
// changes a count of the other epoch.
func TestInterleavingsOfKeysWhoseMemoryIsUsedAgain(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, 2, 3), func(r *explore.Run) {
		var memory keyMemory
		first, next := &Keys{max: 8, memory: &memory}, &Keys{max: 8, memory: &memory}
		first.prepare(1)
		first.Count(first.Add(1, []byte("a")), 1)
		var read []KeyCount
		r.Go("reader", func() { read = first.Counts().List() })
		r.Go("late", func() { first.CountLate(2, []byte("late")) })
		r.Go("closer", func() {
			first.release(false)
			next.prepare(1)
			next.Count(next.Add(2, []byte("b")), 1)
		})
		r.Check(func() error {
			for _, k := range read {
				if k.Key != "a" && k.Key != "late" || k.Unique != 1 {
					return fmt.Errorf("the first epoch has %v", read)
				}
			}
			if got := next.Counts().List(); len(got) != 1 || got[0] != (KeyCount{"b", 1}) {
				return fmt.Errorf("the next epoch has %v", got)
			}
			if memory.used.Load() != next.bytes {
				return fmt.Errorf("%d bytes are taken, the next epoch has %d", memory.used.Load(), next.bytes)
			}
			return nil
		})
	})
}

// TestInterleavingsOfTooManyKeys: there is room for two of three keys.
func TestInterleavingsOfTooManyKeys(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, 3, explore.All), func(r *explore.Run) {
		s := newKeyScene(2)
		for _, key := range []string{"a", "b", "c"} {
			s.files(r, s.first.end-1, key)
		}
		r.Check(func() error { return s.filed(2) })
	})
}
