package dedup

import (
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestTagsOrderEpochsUpToHalfALapApart over more than two laps.
func TestTagsOrderEpochsUpToHalfALapApart(t *testing.T) {
	for serial := uint64(1); serial < 2*lap+2; serial += 7 {
		now := tagOf(serial)
		if now == 0 || now&pending != 0 || now > tagMask {
			t.Fatalf("epoch %d has tag %x", serial, now)
		}
		if newer(0, now) {
			t.Fatalf("a word never used is newer than epoch %d", serial)
		}
		for d := uint64(1); d <= halfLap; d++ {
			later := tagOf(serial + d)
			if !newer(later, now) || newer(now, later) || age(now, later) != d {
				t.Fatalf("epochs %d and %d are not told apart", serial, serial+d)
			}
		}
	}
}

// TestKeysOfABucketHaveDifferentWords: a key can be computed from the number of its bucket and
// its word only if no two keys of a bucket have the same word. Neighbouring keys are the
// hardest case.
func TestKeysOfABucketHaveDifferentWords(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	for _, n := range []uint64{minBuckets, minBuckets + 1, 5489, 10_007, 1 << 20} {
		l := &level[uint64]{buckets: make([]uint64, n), odd: newSecret().odd[0]}
		for range 20_000 {
			x := rnd.Uint64()
			y := x + 1<<rnd.IntN(64)
			bx, rx := l.choose(x)
			by, ry := l.choose(y)
			if bx == by && rx == ry {
				t.Fatalf("with %d buckets %x and %x have the same bucket and word", n, x, y)
			}
			if rx&tagMask != 0 {
				t.Fatalf("the word of %x has bits in the place of the tag", x)
			}
			if l.next(x) == l.next(y) {
				t.Fatalf("%x and %x are the same in the next level", x, y)
			}
		}
	}
}

// bucketOf lets one test use both kinds of bucket.
type bucketOf interface {
	put(rest, tag uint64, look bool) place
}

type narrowOf struct{ *narrowBucket }

func (b narrowOf) put(rest, tag uint64, look bool) place {
	p, _ := b.add(rest<<tagBits|tag, look)
	return p
}

type wideOf struct{ *wideBucket }

// put gives every fourth id the first word of another one.
func (b wideOf) put(rest, tag uint64, look bool) place {
	p, _ := b.add(rest/4<<tagBits|tag, rest, look)
	return p
}

func TestBucketFollowsItsRules(t *testing.T) {
	for name, b := range map[string]bucketOf{"narrow": narrowOf{new(narrowBucket)}, "wide": wideOf{new(wideBucket)}} {
		t.Run(name, func(t *testing.T) {
			want := func(rest, tag uint64, look bool, want place) {
				t.Helper()
				if got := b.put(rest, tag, look); got != want {
					t.Fatalf("id %d, epoch %d, look %t: got %d, want %d", rest, tag, look, got, want)
				}
			}
			for _, tag := range []uint64{1, 2, 700, 1500, lap, 1, 2} { // forward, and round
				want(0, tag, true, absent)
				for rest := range uint64(slotsPerBucket) {
					want(rest, tag, true, absent)
					want(rest, tag, false, taken)
					want(rest, tag, false, found)
					want(rest, tag, true, found)
				}
				want(slotsPerBucket, tag, false, full)
				want(slotsPerBucket, tag, true, full)
				want(3, tag, false, found)
			}
			want(0, 3, false, taken) // overwrites the first of epoch 2
			want(0, 2, false, turned)
			want(9, 2, false, turned) // may be there or not: the next epoch tells
			want(9, 2, true, turned)
			want(0, 3, false, found)
		})
	}
}

// TestWideSlotIsReadOnlyWhenWritten stops a writer between its two words while other requests
// come to the slot.
func TestWideSlotIsReadOnlyWhenWritten(t *testing.T) {
	const (
		rest   = 77 << tagBits
		tag    = 5
		second = 1234
	)
	for _, tt := range []struct {
		name      string
		word, two uint64 // the key that is added
		look      bool
		waits     bool
		want      place
		slot      int
	}{
		{"the same id", rest | tag, second, false, true, found, 0},
		{"the same id, looking", rest | tag, second, true, true, found, 0},
		{"an id with the same first word", rest | tag, second + 1, false, true, taken, 1},
		{"another id", 78<<tagBits | tag, second, false, false, taken, 1},
		{"an id of the next epoch", 78<<tagBits | tag + 1, second, false, true, taken, 0},
		{"the same id in the next epoch", rest | tag + 1, second, false, true, taken, 0},
		{"the same id in the epoch before", rest | tag - 1, second, false, false, turned, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var b wideBucket
				b[0][0].Store(rest | tag | pending) // claimed; now its writer sleeps
				b[0][1].Store(999)                  // of an id long past
				var got place
				slot := -1
				done := make(chan struct{})
				go func() {
					got, slot = b.add(tt.word, tt.two, tt.look)
					close(done)
				}()
				time.Sleep(50 * time.Millisecond) // thousands of looks at the slot
				select {
				case <-done:
					if tt.waits {
						t.Fatalf("got %d in slot %d while the slot was being written", got, slot)
					}
				default:
					if !tt.waits {
						t.Fatal("waits for a slot it has nothing to do with")
					}
				}
				b[0][1].Store(second)
				b[0][0].Store(rest | tag)
				<-done
				if got != tt.want || slot != tt.slot {
					t.Errorf("got %d in slot %d, want %d in slot %d", got, slot, tt.want, tt.slot)
				}
			})
		})
	}
}

// TestBucketsUnderWritersOfTwoEpochs lets writers of one epoch and of the next add to one
// bucket: no id is taken twice in an epoch, and no id of the later epoch is lost.
func TestBucketsUnderWritersOfTwoEpochs(t *testing.T) {
	const writers, ids = 4, 12
	rounds := 3000
	if raceEnabled {
		rounds = 300
	}
	for name, b := range map[string]bucketOf{"narrow": narrowOf{new(narrowBucket)}, "wide": wideOf{new(wideBucket)}} {
		t.Run(name, func(t *testing.T) {
			for round := range rounds {
				old := tagOf(uint64(2*round + 1))
				var mu sync.Mutex
				took := map[uint64]map[uint64]int{} // by tag and id
				var group sync.WaitGroup
				for w := range writers {
					group.Go(func() {
						rnd := rand.New(rand.NewPCG(uint64(round), uint64(w)))
						mine := map[[2]uint64]int{}
						for i := range 3 * ids {
							tag := old
							if rnd.IntN(3*ids) < i { // more and more of the next epoch
								tag = tagOf(uint64(2*round + 2))
							}
							rest := rnd.Uint64N(ids)
							if b.put(rest, tag, false) == taken {
								mine[[2]uint64{tag, rest}]++
							}
						}
						mu.Lock()
						defer mu.Unlock()
						for k, n := range mine {
							if took[k[0]] == nil {
								took[k[0]] = map[uint64]int{}
							}
							took[k[0]][k[1]] += n
						}
					})
				}
				group.Wait()
				for tag, m := range took {
					for rest, n := range m {
						if n > 1 {
							t.Fatalf("round %d: id %d was taken %d times in epoch %d", round, rest, n, tag)
						}
						if tag != old && b.put(rest, tag, true) != found {
							t.Fatalf("round %d: id %d of the later epoch is lost", round, rest)
						}
					}
				}
			}
		})
	}
}

// TestWideSlotTakenOverBetweenTwoLoads lets requests of an old epoch look for an id that is
// there while the next epoch takes its slot. A request that has read its own first word and
// then the second word of the other id must not go on and add its id a second time.
func TestWideSlotTakenOverBetweenTwoLoads(t *testing.T) {
	const readers = 2
	rounds := 200_000
	if raceEnabled {
		rounds = 20_000
	}
	const old, next, id, other = 1<<tagBits | 5, 2<<tagBits | 6, 1234, 4321
	buckets := make([]wideBucket, rounds)
	for i := range buckets {
		if p, _ := buckets[i].add(old, id, false); p != taken {
			t.Fatalf("the first id of a bucket: got %d", p)
		}
	}
	var at [readers]atomic.Int64 // the bucket that each reader looks at
	var group sync.WaitGroup
	for r := range readers {
		group.Go(func() {
			for i := range buckets {
				at[r].Store(int64(i))
				for tries := 0; ; tries++ {
					p, _ := buckets[i].add(old, id, false)
					if p == turned {
						break
					}
					if p != found {
						t.Errorf("round %d: an id that was there: got %d, want found or turned", i, p)
						return
					}
					if tries%1000 == 999 {
						runtime.Gosched()
					}
				}
			}
		})
	}
	for i := range buckets {
		for at[0].Load() < int64(i) && at[1].Load() < int64(i) && !t.Failed() {
			runtime.Gosched()
		}
		for range i % 50 { // at another moment each time
			at[0].Load()
		}
		if p, _ := buckets[i].add(next, other, false); p != taken {
			t.Fatalf("round %d: an id of the next epoch: got %d, want taken", i, p)
		}
	}
	group.Wait()
}
