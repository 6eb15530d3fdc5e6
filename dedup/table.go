package dedup

import (
	"math/bits"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"
)

// The table is a hash table without locks whose words are tagged with their epoch.
//
// A key of 64 bits is first scattered to 64 bits, one to one, and multiplied by the number of
// buckets. The high half of the product is the number of the bucket. The low half distinguishes
// the keys of one bucket: two of them differ there by at least the number of buckets, so with
// minBuckets or more the low tagBits bits are not needed. The tag of the epoch takes their
// place. The key can be computed from the bucket and the word: so the table is exact with 8
// bytes a slot.
//
// A slot whose word has the tag of an earlier epoch is empty. The search for an id begins at
// one slot of its bucket, its home, and the id takes the first empty slot from there on, by
// compare-and-swap. Slots are never emptied within an epoch. So a later request with the same
// id begins at the same home, and meets the id before any slot that it could take. A bucket
// without an empty slot stays full for the rest of the epoch, and further ids of it go to the
// next level, another array of buckets with a size of its own. Growing adds a level and moves
// nothing.
//
// It replaced sync.Map and Go maps with locks, and is used instead of the libraries with which
// package bench compares it (BenchmarkAdd there).
const (
	lineSlots      = 8 // words in a cache line
	slotsPerBucket = 2 * lineSlots
	wideLineSlots  = lineSlots / 2

	tagBits    = 12
	tagMask    = 1<<tagBits - 1
	minBuckets = 1 << tagBits

	// pending marks a wide slot whose second word is being written. The other bits of the tag
	// number the epochs from 1 to lap, and then from 1 again.
	pending = 1 << (tagBits - 1)
	lap     = pending - 1

	// A tag up to half a lap ahead is newer, all others are older. So the epochs of the words
	// in a table, and of the requests that can still add words, must be less than half a lap
	// apart; an epoch that is further ahead is refused (Memory.Open). To stay far from this
	// limit the cleaner clears words that are staleAge epochs old or older, in passes of
	// passTurns turns: no word gets older than staleAge + 2*passTurns epochs.
	halfLap   = lap / 2
	staleAge  = lap / 8
	passTurns = lap / 8

	// maxLevels bounds the number of levels that the search for an id may visit. Eight levels
	// hold 40 times the expected ids.
	maxLevels = 24

	// For each expected id the first level gets firstShare slots, and the second level
	// secondShare: with 12 ids a bucket, 2 % of the ids find their bucket in the first level
	// full. Together that is 11.5 bytes an id (BenchmarkResident).
	firstShare  = 1.34
	secondShare = 0.10

	// A first level of up to nearSlots slots, 1 MB of narrow ones, stays in the second-level
	// cache of a core. It gets up to twice its share: if more slots are free, an id is more
	// often found where its search begins.
	nearSlots = 1 << 17

	// tenfoldShare is how many slots for each expected id a table needs so that ten times as
	// many ids just do not crowd it: 13.3 bytes for each of these ids.
	tenfoldShare = 16.6

	// smallTable is the number of slots up to which a table grows by a large factor at once:
	// with narrow slots, a table of 16 MB may get a level of 128 MB.
	smallTable = 2 << 20

	// needed is a percentage of all slots. If more slots are taken and a bucket is full, the
	// table has outgrown its size.
	needed = 70

	// nearlyFull is a distance in slots. If an id takes a slot of the last level that is this
	// far from its home, the cleaner checks whether the table should grow. When three slots of
	// its bucket are free every tenth id gets that far, when five are free every eightieth.
	// With a greater distance a request would meet a full bucket before the cleaner is woken
	// (TestGrowthIsAskedForAgain).
	nearlyFull = slotsPerBucket / 2

	// One new id in sampleEvery, chosen by bits of the scattered key, adds to the load: to
	// count every id, all cores would write the same word.
	sampleEvery = 64
)

// sampled chooses one key in sampleEvery. If ids differ only in their high bits, the lowest
// bits of their scattered keys are, for some secrets, not distributed evenly enough; the
// highest bits of one more product are.
func sampled(x uint64) bool {
	const golden = 0x9e3779b97f4a7c15 // 2^64 / golden ratio: any odd number with many bits set would do
	return x*golden>>(64-6) == 0
}

// tagOf returns the tag of the epoch with a serial, which is 1 or more.
func tagOf(serial uint64) uint64 { return (serial-1)%lap + 1 }

// less returns a-b, or 0 if b is larger.
func less(a, b uint64) uint64 { return a - min(a, b) }

// age returns how many epochs the tag t lies behind now, 0 to lap-1.
func age(t, now uint64) uint64 {
	if t <= now {
		return now - t
	}
	return now + lap - t
}

// newer reports whether t, the tag of a word, is of a later epoch than the tag now. t must not
// be equal to now. The tag 0, of a word that was never used, is older than all.
func newer(t, now uint64) bool { return t != 0 && age(t, now) > halfLap }

type (
	narrowBucket [slotsPerBucket]atomic.Uint64

	// wideBucket holds 128-bit keys: 52 bits, the pending bit and the tag in the first word, 64
	// bits in the second. The two words of a slot are next to each other, so most ids read only
	// one cache line. When all first words came before all second words, each id read two
	// (BenchmarkOptions).
	wideBucket [slotsPerBucket][2]atomic.Uint64
)

// place is what a bucket did with a key.
type place uint8

const (
	taken  place = iota // put into an empty slot
	found               // already there
	turned              // met a word of a later epoch
	full                // no slot left
	absent              // not there, and the caller only looked
)

// home returns the slot of a bucket where the search for a word begins, from bits that differ
// between the keys of a bucket. If all searches began at the first slot, each would pass the
// taken slots before it finds an empty one.
func home(word uint64) uint64 { return word >> (64 - 4) }

// slotAt returns the n-th slot, n from 0, of the search from a home. The search goes around the
// cache line of the home first, and then around the other line, which is read only if the first
// line is full.
func slotAt(home, n uint64) uint64 { return (home^n)&lineSlots | (home+n)&(lineSlots-1) }

// wideSlotAt is slotAt for a wide bucket, which has four cache lines.
func wideSlotAt(home, n uint64) uint64 {
	return (home^n)&^(wideLineSlots-1) | (home+n)&(wideLineSlots-1)
}

// wordAt returns the i-th word of a bucket. If b is a pointer to an array, Go first reads b[0]
// for b[i], to check that b is not nil: so both cache lines of a bucket would be loaded
// although the search needs only one.
func wordAt(bucket unsafe.Pointer, i uint64) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Add(bucket, i*8))
}

// add puts word into the bucket, or with look only looks it up. It also returns how many slots
// from its home the search ended.
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

// add puts the key of two words into the bucket, or with look only looks it up. It also returns
// how many slots from its home the search ended.
//
// A request claims the first word with the pending bit set, then writes the second word, then
// clears the bit. From the claim until the bit is cleared no other request writes either word:
// a request that meets a pending word waits, even if the word is of an older epoch.
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
				// Another request is writing this very id, most likely, or the epoch of the
				// word is ending. Its writer clears the bit after two stores.
				pause(wait)
				wait++
				continue
			case w == word:
				s := other.Load()
				if slot.Load() != w {
					continue // a later epoch took the slot between the loads
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

// pause lets the writer of a pending slot go on. The first pauses yield, in case the writer
// waits for this core; later ones sleep, in case the kernel has stopped the thread of the
// writer.
func pause(n int) {
	if n < 16 {
		runtime.Gosched()
		return
	}
	time.Sleep(20 * time.Microsecond)
}

// level is one array of buckets in the chain of a table.
type level[B any] struct {
	buckets []B
	odd     uint64 // factor by which next gives the key another place in the next level
	memory  []byte // the memory of buckets, as the arena allocated it
}

// table is a chain of levels. A level stays until the table is freed, and every request visits
// the levels in the same order.
type table[B any] struct {
	levels [maxLevels]atomic.Pointer[level[B]]
	expect uint64 // how many ids the first two levels are made for

	mu    sync.Mutex // guards growing
	depth int        // number of levels
	slots uint64     // number of slots in all levels
	cold  [][]byte   // memory of levels that requests added and whose pages are not resident yet

	// A level of far buckets or more is worth a prefetch. Only the first farLevels levels can
	// be that large.
	far, farLevels atomic.Uint64

	checking atomic.Bool // a request asked the cleaner to check the load
	refs     int         // epochs that use the table; guarded by Memory.mu
}

// buckets returns how many buckets have share*ids slots; minBuckets at least.
func buckets(ids uint64, share float64) uint64 {
	return max(minBuckets, uint64(float64(ids)*share)/slotsPerBucket+1)
}

// firstLevels returns the numbers of buckets of the first two levels of a table for the given
// number of ids. If the second level would have the smallest size, it is 0: the level is added
// when it is needed.
func firstLevels(ids uint64) (first, second uint64) {
	if second = buckets(ids, secondShare); second <= minBuckets {
		second = 0
	}
	first = max(buckets(ids, firstShare), min(buckets(ids, 2*firstShare), nearSlots/slotsPerBucket))
	return first, second
}

// newLevel makes a level of n buckets, which is not part of a table yet. Its pages are
// resident, or become resident one by one, when ids first use them.
func newLevel[B any](n uint64, from *arena, resident bool) (*level[B], error) {
	buckets, memory, err := allocate[B](from, n, resident)
	if err != nil {
		return nil, err
	}
	return &level[B]{buckets: buckets, odd: newSecret().odd[0], memory: memory}, nil
}

// append adds l after the other levels, or frees it and returns ErrFull. t.mu is held, or no
// other goroutine has t yet.
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

// grow makes sure that t has another level after the first have ones, for a request that found
// all of these full. sizes returns the sizes of the levels that the table needs; it is called
// with t.mu held. The pages of a new level are not resident yet, so t.mu is held only for
// moments, and requests that need the level do not wait for long. The cleaner makes the pages
// resident (prepare).
func (t *table[B]) grow(have int, sizes func() []uint64, from *arena) (grown bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.depth > have {
		return false, nil
	}
	for i, n := range sizes() {
		err = t.extend(n, from, false)
		if err != nil && i == 0 && n > minBuckets {
			err = t.extend(minBuckets, from, false) // there is no memory for that many buckets
		}
		if err != nil {
			break
		}
		grown = true
		t.cold = append(t.cold, t.levels[t.depth-1].Load().memory)
	}
	if grown {
		err = nil // one level is enough for now; the next is added when it is needed
	}
	return grown, err
}

// prepare makes the pages of levels that requests have added resident. If there are no such
// levels, and asked (a bucket of the last level is nearly full), and load ids crowd the table,
// it adds the levels that are needed next, with resident pages. Only one goroutine at a time
// may call it, and t must not be freed meanwhile.
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
			break // memory has run out: requests use the slots that are left
		}
		t.mu.Lock()
		if t.append(l, from) == nil {
			grown++
		}
		t.mu.Unlock()
	}
	return grown
}

// outgrown reports whether the load is high enough to explain that a bucket is full. If it is
// not, some buckets are full by chance, as with any load, or because of an attack. t.mu is
// held.
func (t *table[B]) outgrown(load uint64) bool { return load > t.slots/100*needed }

// sizes returns the sizes, in buckets, of the levels that t needs next. load is the number of
// ids in it. A small table whose ids have outgrown it first grows to hold ten times the
// expected ids, and then to nine times its size; a large one grows by three quarters. So even a
// table that was made for far too few ids has few levels. If the ids have not outgrown the
// table, a level of the smallest size is enough. t.mu is held.
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

// crowded reports whether a new level should be made ready, now that a bucket of the last one
// is nearly full. The first bucket is full long before the level is, and the earlier the more
// buckets there are: when 66 % of all slots are taken or later; or below half, and then a small
// level helps. The small second level of a table with the expected number of ids is enough for
// 104 % of these ids, so no level is made ready at 100 %, where 69 % of the slots are taken.
// t.mu is held.
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

// tableSize returns how many bytes a table for the expected ids takes at first.
func tableSize[B any](expect uint64) uint64 {
	first, second := firstLevels(expect)
	return (first + second) * uint64(unsafe.Sizeof(*new(B)))
}

func newTable[B any](expect uint64, from *arena) (*table[B], error) {
	t := &table[B]{expect: expect}
	first, second := firstLevels(expect)
	// Checked first, so that the large level is not made resident for nothing: the cleaner
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

// addTo adds the slots and levels of t to a snapshot.
func (t *table[B]) addTo(s *Stats) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s.Slots, s.Levels = s.Slots+t.slots, max(s.Levels, t.depth)
}

// free gives the memory of t back. No goroutine may use t any more.
func (t *table[B]) free(to *arena) {
	for i := range t.depth {
		to.free(t.levels[i].Load().memory)
	}
}

// choose returns the bucket of x in l, and the bits that distinguish x from the other keys of
// that bucket.
func (l *level[B]) choose(x uint64) (b *B, rest uint64) {
	hi, lo := bits.Mul64(x, uint64(len(l.buckets)))
	return &l.buckets[hi], lo &^ tagMask
}

// next returns x for the level after l, where the ids of one bucket of l are spread over other
// buckets.
func (l *level[B]) next(x uint64) uint64 { return bits.RotateLeft64(x, 32) * l.odd }
