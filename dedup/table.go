package dedup

import (
	"math/bits"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"
)

// The table is an epoch-tagged hash table without locks.
//
// A key is first scattered to 64 bits, one to one. Multiplied by the number of
// buckets, the high half of the product chooses the bucket and the low half
// tells the keys of that bucket apart: two of them differ by at least the
// number of buckets there, so with minBuckets the low tagBits bits can go. In
// their place stands the tag of the epoch. Bucket and word give the key back:
// the table is exact at 8 bytes a slot.
//
// A word with the tag of another epoch is an empty slot. An id takes the first
// empty slot of its bucket, by compare-and-swap; slots are never emptied within
// an epoch, so whoever brings the same id meets it before any slot that could
// be taken. A bucket without an empty slot stays full for the rest of the
// epoch, and its further ids go to the next level, a table of its own size.
// Growing adds a level and moves nothing.
//
// It replaced sync.Map, Go maps behind locks, and the libraries that stand
// beside it in bench; BenchmarkAdd there says what it gains.
const (
	slotsPerBucket = 16 // two cache lines of words

	tagBits    = 12
	tagMask    = 1<<tagBits - 1
	minBuckets = 1 << tagBits

	// pending marks a wide slot whose second word is being written. The rest of
	// the tag bits number the epochs, from 1, over and over.
	pending = 1 << (tagBits - 1)
	lap     = pending - 1

	// A tag up to half a lap ahead is newer, the rest are older. So the words of
	// a table, and the requests that can still add some, must be less than half
	// a lap apart; an epoch further than that is refused (Memory.Open). To stay
	// far from it the cleaner clears words of staleAge and more, in passes of
	// passTurns turns: a word gets no older than staleAge + 2*passTurns.
	halfLap   = lap / 2
	staleAge  = lap / 8
	passTurns = lap / 8

	// maxLevels bounds the chain that an id may walk. Ordinary growth adds
	// three quarters each time: eight levels hold 40 times what was expected.
	maxLevels = 24

	// Of the slots for n expected ids the first level gets firstShare and the
	// second secondShare: at 12 ids a bucket 2 % find the first one full. That
	// is 11.5 bytes an id (BenchmarkResident).
	firstShare  = 1.34
	secondShare = 0.10

	// nearlyFull is the slot of a bucket that, taken in the last level, makes
	// the cleaner look whether the table should grow.
	nearlyFull = slotsPerBucket - 3

	// sampleEvery is the share of the new ids, chosen by bits of the scattered
	// key, that add to the load: exact counting would make one word hot.
	sampleEvery = 64
)

// tagOf returns the tag of the n-th epoch opened, n from 1.
func tagOf(serial uint64) uint64 { return (serial-1)%lap + 1 }

// less is a-b, or 0 where there is nothing left.
func less(a, b uint64) uint64 { return a - min(a, b) }

// age returns how many epochs the tag t lies behind now, 0 to lap-1.
func age(t, now uint64) uint64 {
	if t <= now {
		return now - t
	}
	return now + lap - t
}

// newer reports whether the tag of a word is of an epoch after now's. t must
// not be now. 0, a word never used, is older than all.
func newer(t, now uint64) bool { return t != 0 && age(t, now) > halfLap }

type (
	narrowBucket [slotsPerBucket]atomic.Uint64

	// wideBucket holds 128-bit keys: 52 bits, the pending bit and the tag in
	// the first word, 64 bits in the second. The first words stand together, so
	// that a search reads as little as in a narrow bucket.
	wideBucket struct{ first, second [slotsPerBucket]atomic.Uint64 }
)

// place says what a bucket did with a key.
type place uint8

const (
	taken  place = iota // put in: slot is its place
	found               // was there
	turned              // met a later epoch
	full                // no slot left
	absent              // not there, and nothing was to be put in
)

// add puts word into the bucket. With look it only looks.
func (b *narrowBucket) add(word uint64, look bool) (place, int) {
	tag := word & tagMask
	for i := range b {
		for {
			w := b[i].Load()
			if w == word {
				return found, i
			}
			t := w & tagMask
			if t == tag {
				break // another id of this epoch
			}
			if newer(t, tag) {
				return turned, i
			}
			if look {
				return absent, i
			}
			if b[i].CompareAndSwap(w, word) {
				return taken, i
			}
			// Lost the slot: to this id, to another one or to a later epoch.
		}
	}
	return full, slotsPerBucket
}

// add puts the key of two words into the bucket. With look it only looks.
//
// The first word is claimed with the pending bit set, then the second is
// written, then the bit is cleared. From claim to clearing nobody else writes
// either word: an older epoch's pending word is waited for, not taken.
func (b *wideBucket) add(word, second uint64, look bool) (place, int) {
	tag := word & tagMask
	for i := range b.first {
		for wait := 0; ; {
			w := b.first[i].Load()
			t := w & tagMask &^ pending
			switch {
			case t == tag && w&^pending != word:
				// Another id of this epoch, written or being written.
			case newer(t, tag):
				return turned, i
			case w&pending != 0:
				// Very likely this very id, or the slot of an epoch that is
				// ending: its writer is two stores away from clearing the bit.
				pause(wait)
				wait++
				continue
			case w == word:
				s := b.second[i].Load()
				if b.first[i].Load() != w {
					continue // taken over by the next epoch between the loads
				}
				if s == second {
					return found, i
				}
			case look:
				return absent, i
			default:
				if !b.first[i].CompareAndSwap(w, word|pending) {
					continue
				}
				b.second[i].Store(second)
				b.first[i].Store(word) // hands the slot to the readers
				return taken, i
			}
			break
		}
	}
	return full, slotsPerBucket
}

// pause lets the writer of a pending slot go on: at once if it waits for this
// core, soon if its thread was taken off another.
func pause(n int) {
	if n < 16 {
		runtime.Gosched()
		return
	}
	time.Sleep(20 * time.Microsecond)
}

// level is one table of a chain.
type level[B any] struct {
	buckets []B
	odd     uint64 // places the key anew in the next level
	memory  memory
}

// table is a chain of levels. A level, once there, stays until the table is
// let go, and every request walks the chain in the same order.
type table[B any] struct {
	levels [maxLevels]atomic.Pointer[level[B]]
	expect uint64 // ids the first two levels are made for

	mu    sync.Mutex // guards growing
	depth int        // levels there
	slots uint64     // in all levels
	bytes uint64     // of all levels

	checking atomic.Bool // the cleaner was asked to look at the load
	refs     int         // epochs that use the table; guarded by Memory.mu
}

// buckets returns the number of buckets with room for share*ids slots.
func buckets(ids uint64, share float64) uint64 {
	return max(minBuckets, uint64(float64(ids)*share)/slotsPerBucket+1)
}

// extend appends a level of n buckets. t.mu is held, or nobody else has t yet.
func (t *table[B]) extend(n uint64, from *arena) error {
	if t.depth == maxLevels {
		return ErrFull
	}
	buckets, memory, err := allocate[B](from, n)
	if err != nil {
		return err
	}
	l := &level[B]{buckets: buckets, odd: newSecret().odd[0], memory: memory}
	t.levels[t.depth].Store(l)
	t.depth++
	t.slots += n * slotsPerBucket
	t.bytes += l.memory.size()
	return nil
}

// grow makes sure that there is a level after the first have ones. load is the
// number of ids in the table. Where the load explains the need, the table
// grows by three quarters: after any growth it is then at least 45 % used, and
// ten times the expected ids fit in six levels. Else a few buckets are crowded
// by chance or by malice, and a level of the smallest size serves.
func (t *table[B]) grow(have int, load uint64, from *arena) (grown bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.depth > have {
		return false, nil
	}
	n := uint64(minBuckets)
	if load > t.slots/2 {
		n = max(n, t.slots*3/4/slotsPerBucket)
	}
	err = t.extend(n, from)
	return err == nil, err
}

// crowded reports whether a new level should be made ready. At 78 % of all
// slots the last level still has room for the time that takes.
func (t *table[B]) crowded(load uint64) (depth int, yes bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.depth, load > t.slots/100*78
}

func newTable[B any](expect uint64, from *arena) (*table[B], error) {
	t := &table[B]{expect: expect}
	first, second := buckets(expect, firstShare), buckets(expect, secondShare)
	if second <= minBuckets {
		second = 0
	}
	// Asked before the large level is made resident for nothing: the cleaner
	// tries again at every interval.
	err := from.room((first + second) * uint64(unsafe.Sizeof(*new(B))))
	if err == nil {
		err = t.extend(first, from)
	}
	if err == nil && second > 0 {
		err = t.extend(second, from)
	}
	if err != nil {
		t.free(from)
		return nil, err
	}
	return t, nil
}

// free gives the memory back. Nobody may use t any more.
func (t *table[B]) free(to *arena) {
	for i := range t.depth {
		to.free(t.levels[i].Load().memory)
	}
}

// choose returns the bucket of x in l, the bits that tell x apart in it, and
// the x of the next level.
func (l *level[B]) choose(x uint64) (b *B, rest, next uint64) {
	hi, lo := bits.Mul64(x, uint64(len(l.buckets)))
	return &l.buckets[hi], lo &^ tagMask, bits.RotateLeft64(x, 32) * l.odd
}
