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
// buckets, the high half of the product chooses the bucket, and the low half
// distinguishes the keys of that bucket: two of them differ by at least the
// number of buckets there, so with minBuckets the low tagBits bits can go. In
// their place stands the tag of the epoch. Bucket and word give the key back:
// the table is exact at 8 bytes a slot.
//
// A word with the tag of another epoch is an empty slot. An id takes the first empty slot
// of its bucket from its home on, by compare-and-swap; slots are never emptied within an
// epoch, so a later request with the same id starts at the same home and meets the id
// before any slot that it could take. A bucket without an empty slot stays full for the
// rest of the epoch, and its further ids go to the next level, a table of its own size.
// Growing adds a level and moves nothing.
//
// It replaced sync.Map, Go maps behind locks, and the libraries that package bench compares
// with it (BenchmarkAdd there).
const (
	lineSlots      = 8 // words in a cache line
	slotsPerBucket = 2 * lineSlots
	wideLineSlots  = lineSlots / 2

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

	// maxLevels bounds the chain that an id may walk: eight hold 40 times what
	// was expected.
	maxLevels = 24

	// The first level gets firstShare of the slots for n expected ids, the second
	// secondShare: at 12 ids a bucket 2 % find the first one full. That is 11.5 bytes an
	// id (BenchmarkResident).
	firstShare  = 1.34
	secondShare = 0.10

	// A first level of up to nearSlots slots, 1 MB of narrow ones, stays in a
	// core's second cache. It gets up to twice its share: with more of them free,
	// an id is more often found where its search begins.
	nearSlots = 1 << 17

	// tenfoldShare is the room, for an expected id, in which ten times as many
	// are just not crowded: 13.3 bytes for each of those.
	tenfoldShare = 16.6

	// smallTable is the number of slots up to which a table grows by much at
	// once: 16 MB of narrow ones, and 128 MB after it.
	smallTable = 2 << 20

	// needed is in percent of all slots. If more are taken and a bucket is full, the table
	// has outgrown its size.
	needed = 70

	// nearlyFull is how far from its home an id that takes a slot in the last
	// level makes the cleaner look whether the table should grow. With three
	// slots left every tenth id comes that far, with five every eightieth; any
	// further, and the first full bucket is met before the cleaner is asked
	// (TestGrowthIsAskedForAgain).
	nearlyFull = slotsPerBucket / 2

	// sampleEvery is the share of the new ids, chosen by bits of the scattered
	// key, that add to the load: exact counting would make one word hot.
	sampleEvery = 64
)

// sampled chooses one key in sampleEvery. Of ids that differ only in their high
// bits the lowest bits of the scattered key are not even enough for some secrets;
// the highest of one more product are.
func sampled(x uint64) bool {
	const golden = 0x9e3779b97f4a7c15 // 2^64 / golden ratio: any odd number with many bits serves
	return x*golden>>(64-6) == 0
}

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
	// the first word, 64 bits in the second. The two stand together: mostly an id finds
	// its slot in the one cache line that it reads. With all first words before all
	// second ones each id read two (BenchmarkOptions).
	wideBucket [slotsPerBucket][2]atomic.Uint64
)

// place is what a bucket did with a key.
type place uint8

const (
	taken  place = iota // put in, so many slots from its home
	found               // was there
	turned              // met a later epoch
	full                // no slot left
	absent              // not there, and nothing was to be put in
)

// home returns the slot of a bucket where the search for a word begins, by bits
// that tell the bucket's keys apart. Beginning at the first slot all ids would read what
// is taken before they find room.
func home(word uint64) uint64 { return word >> (64 - 4) }

// slotAt returns the slot where the search from a home looks as its n-th, n from 0: round
// its cache line first, and then round the other one, which is read only if this is full.
func slotAt(home, n uint64) uint64 { return (home^n)&lineSlots | (home+n)&(lineSlots-1) }

// wideSlotAt is slotAt of a wide bucket, which has four lines.
func wideSlotAt(home, n uint64) uint64 {
	return (home^n)&^(wideLineSlots-1) | (home+n)&(wideLineSlots-1)
}

// wordAt returns the i-th word of a bucket. For b[i] of a pointer to an array Go first
// reads b[0], to check that b is not nil: both cache lines of a bucket would be loaded
// although the search needs one.
func wordAt(bucket unsafe.Pointer, i uint64) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Add(bucket, i*8))
}

// add puts word into the bucket. With look it only looks.
func (b *narrowBucket) add(word uint64, look bool) (place, int) {
	tag := word & tagMask
	for n := range uint64(slotsPerBucket) {
		slot := wordAt(unsafe.Pointer(b), slotAt(home(word), n))
		for {
			w := slot.Load()
			if w == word {
				return found, int(n)
			}
			t := w & tagMask
			if t == tag {
				break // another id of this epoch
			}
			if newer(t, tag) {
				return turned, int(n)
			}
			if look {
				return absent, int(n)
			}
			if slot.CompareAndSwap(w, word) {
				return taken, int(n)
			}
			// Lost the slot: to this id, to another one or to a later epoch.
		}
	}
	return full, slotsPerBucket
}

// add puts the key of two words into the bucket. With look it only looks.
//
// The first word is claimed with the pending bit set, then the second is
// written, then the bit is cleared. From claim to clearing no other request writes
// either word: an older epoch's pending word is waited for, not taken.
func (b *wideBucket) add(word, second uint64, look bool) (place, int) {
	tag := word & tagMask
	for n := range uint64(slotsPerBucket) {
		i := wideSlotAt(home(word), n)
		slot, other := wordAt(unsafe.Pointer(b), 2*i), wordAt(unsafe.Pointer(b), 2*i+1)
		for wait := 0; ; {
			w := slot.Load()
			t := w & tagMask &^ pending
			switch {
			case t == tag && w&^pending != word:
				// Another id of this epoch, written or being written.
			case newer(t, tag):
				return turned, int(n)
			case w&pending != 0:
				// Very likely this very id, or the slot of an epoch that is
				// ending: its writer is two stores away from clearing the bit.
				pause(wait)
				wait++
				continue
			case w == word:
				s := other.Load()
				if slot.Load() != w {
					continue // taken over by the next epoch between the loads
				}
				if s == second {
					return found, int(n)
				}
			case look:
				return absent, int(n)
			default:
				if !slot.CompareAndSwap(w, word|pending) {
					continue
				}
				other.Store(second)
				slot.Store(word) // hands the slot to the readers
				return taken, int(n)
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
	odd     uint64 // gives the key another place in the next level
	memory  []byte // of buckets, as the arena gave it
}

// table is a chain of levels. A level, once there, stays until the table is
// let go, and every request walks the chain in the same order.
type table[B any] struct {
	levels [maxLevels]atomic.Pointer[level[B]]
	expect uint64 // ids the first two levels are made for

	mu    sync.Mutex // guards growing
	depth int        // levels there
	slots uint64     // in all levels
	cold  [][]byte   // of levels that requests added, whose pages are not resident yet

	// Levels of far buckets or more are worth a prefetch. None behind the first farLevels is.
	far, farLevels atomic.Uint64

	checking atomic.Bool // the cleaner was asked to look at the load
	refs     int         // epochs that use the table; guarded by Memory.mu
}

// buckets returns the number of buckets with room for share*ids slots.
func buckets(ids uint64, share float64) uint64 {
	return max(minBuckets, uint64(float64(ids)*share)/slotsPerBucket+1)
}

// firstLevels returns the numbers of buckets that a table for so many ids
// begins with. Where the second level would be of the smallest size it can wait
// until it is needed.
func firstLevels(ids uint64) (first, second uint64) {
	if second = buckets(ids, secondShare); second <= minBuckets {
		second = 0
	}
	first = max(buckets(ids, firstShare), min(buckets(ids, 2*firstShare), nearSlots/slotsPerBucket))
	return first, second
}

// newLevel makes a level of n buckets that no table has yet. Its pages are resident, or
// become so one by one, as ids take them.
func newLevel[B any](n uint64, from *arena, resident bool) (*level[B], error) {
	buckets, memory, err := allocate[B](from, n, resident)
	if err != nil {
		return nil, err
	}
	return &level[B]{buckets: buckets, odd: newSecret().odd[0], memory: memory}, nil
}

// append puts l behind the other levels. t.mu is held, or no other goroutine has t yet.
func (t *table[B]) append(l *level[B], from *arena) error {
	if t.depth == maxLevels {
		from.free(l.memory)
		return ErrFull
	}
	t.levels[t.depth].Store(l)
	t.depth++
	n := uint64(len(l.buckets))
	if n > nearSlots/slotsPerBucket {
		far := max(t.far.Load(), n/2)
		t.far.Store(far)
		if n >= far {
			t.farLevels.Store(uint64(t.depth))
		}
	}
	t.slots += n * slotsPerBucket
	return nil
}

// extend makes a level of n buckets and appends it.
func (t *table[B]) extend(n uint64, from *arena, resident bool) error {
	if t.depth == maxLevels {
		return ErrFull
	}
	l, err := newLevel[B](n, from, resident)
	if err != nil {
		return err
	}
	return t.append(l, from)
}

// grow makes sure that there is a level after the first have ones, for a request that found
// those full. sizes returns the sizes of the levels that the table needs; t.mu is held while
// it is called. The level is there at once, before its pages are: requests that wait for it
// hold t.mu only for moments, and the cleaner makes the pages resident (prepare).
func (t *table[B]) grow(have int, sizes func() []uint64, from *arena) (grown bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.depth > have {
		return false, nil
	}
	for i, n := range sizes() {
		err = t.extend(n, from, false)
		if err != nil && i == 0 && n > minBuckets {
			err = t.extend(minBuckets, from, false) // no memory for so many
		}
		if err != nil {
			break
		}
		grown = true
		t.cold = append(t.cold, t.levels[t.depth-1].Load().memory)
	}
	if grown {
		err = nil // a second level comes when it is needed
	}
	return grown, err
}

// prepare makes the pages resident of the levels that requests have added. If none has and
// the table is crowded with so many ids, it adds the levels that are needed next, which
// requests find resident. One at a time may call it, and t must not be freed meanwhile. asked:
// a bucket of the last level is nearly full.
func (t *table[B]) prepare(asked bool, load uint64, sizes func() []uint64, from *arena) (grown int) {
	t.mu.Lock()
	cold := t.cold
	t.cold = nil
	var wanted []uint64
	if len(cold) == 0 && asked && t.crowded(load) {
		wanted = sizes()
	}
	t.mu.Unlock()
	for _, m := range cold {
		from.populate(m)
	}
	for _, n := range wanted {
		l, err := newLevel[B](n, from, true)
		for least := max(n/8, minBuckets); err != nil && n/2 >= least; {
			n /= 2
			l, err = newLevel[B](n, from, true)
		}
		if err != nil {
			break // memory has run out: requests use what is left
		}
		t.mu.Lock()
		if t.append(l, from) == nil {
			grown++
		}
		t.mu.Unlock()
	}
	return grown
}

// outgrown reports whether the load explains that a bucket is full. Else some buckets are
// full by chance, as with any load, or by malice. t.mu is held.
func (t *table[B]) outgrown(load uint64) bool { return load > t.slots/100*needed }

// sizes returns the sizes of the levels that t needs next, in buckets. load is the number of
// ids in it. A small table that it has outgrown grows to hold ten times the expected ids,
// then to nine times its size, and a large one by three quarters: so a table that knew little
// of what would come walks few levels. If it has not, a level of the smallest size serves.
// t.mu is held.
func (t *table[B]) sizes(load uint64) []uint64 {
	switch {
	case t.depth == 0:
		first, second := firstLevels(t.expect)
		if second == 0 {
			return []uint64{first}
		}
		return []uint64{first, second}
	case !t.outgrown(load):
		return []uint64{minBuckets}
	case t.slots > smallTable:
		return []uint64{t.slots * 3 / 4 / slotsPerBucket}
	}
	n := t.slots * 8 / slotsPerBucket
	tenfold := buckets(max(t.expect, minBuckets*slotsPerBucket/2), tenfoldShare)
	if have := t.slots / slotsPerBucket; tenfold > 2*have {
		n = tenfold - have
	}
	return []uint64{n}
}

// crowded reports whether a new level should be made ready, now that a bucket
// of the last one is nearly full. The first bucket fills long before the level
// does, the sooner the more buckets there are: at 66 % of all slots or later, or
// before half load, where a small level helps. The small second level of a
// table of the expected size holds out until 104 % of those ids; there the load
// must not ask at 100 %, which is 69 % of the slots. t.mu is held.
func (t *table[B]) crowded(load uint64) bool {
	last := uint64(len(t.levels[t.depth-1].Load().buckets)) * slotsPerBucket
	percent := load / (t.slots/100 + 1)
	switch {
	case t.depth == 1 || percent < 50:
		return true
	case t.depth == 2 && last < t.slots/8:
		return percent >= 72
	default:
		return percent >= 62
	}
}

// tableSize is how many bytes a table for the ids expected takes at first.
func tableSize[B any](expect uint64) uint64 {
	first, second := firstLevels(expect)
	return (first + second) * uint64(unsafe.Sizeof(*new(B)))
}

func newTable[B any](expect uint64, from *arena) (*table[B], error) {
	t := &table[B]{expect: expect}
	first, second := firstLevels(expect)
	// Asked before the large level is made resident for nothing: the cleaner
	// tries again at every interval.
	err := from.room(tableSize[B](expect))
	if err == nil {
		err = t.extend(first, from, true)
	}
	if err == nil && second > 0 {
		err = t.extend(second, from, true)
	}
	if err != nil {
		t.free(from)
		return nil, err
	}
	return t, nil
}

// addTo adds what t has to a snapshot.
func (t *table[B]) addTo(s *Stats) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s.Slots, s.Levels = s.Slots+t.slots, max(s.Levels, t.depth)
}

// free gives the memory back. No goroutine may use t any more.
func (t *table[B]) free(to *arena) {
	for i := range t.depth {
		to.free(t.levels[i].Load().memory)
	}
}

// choose returns the bucket of x in l, and the bits that tell x apart in it.
func (l *level[B]) choose(x uint64) (b *B, rest uint64) {
	hi, lo := bits.Mul64(x, uint64(len(l.buckets)))
	return &l.buckets[hi], lo &^ tagMask
}

// next returns the x of the level after l: the ids of one bucket part there.
func (l *level[B]) next(x uint64) uint64 { return bits.RotateLeft64(x, 32) * l.odd }
