package counter

import (
	"cmp"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"
)

// DefaultMaxKeys is how many keys an epoch may have where Config says nothing.
const DefaultMaxKeys = 100_000

// MaxMaxKeys bounds Config.MaxKeys.
const MaxMaxKeys = 10_000_000

// MaxKeyLen is how many bytes a key may have.
const MaxKeyLen = 128

// KeyCount is the number of new ids under a key in one window.
type KeyCount struct {
	Key    string // 1 to MaxKeyLen bytes
	Unique uint64 // ids answered as new
}

// Key is the count of one key in an epoch. All methods are safe for concurrent use.
type Key struct {
	name   string
	hash   uint64
	unique atomic.Uint64
	of     *Keys
	_      [24]byte // two keys in one cache line would slow each other
}

// Count adds n new ids. Call it before their request leaves the epoch: then the sums of
// the keys are final when the epoch is sealed.
func (k *Key) Count(n uint64) {
	if n > 0 && k.unique.Add(n) == n {
		k.of.filled.Add(1)
	}
}

// Hash returns the hash that the key was added with.
func (k *Key) Hash() uint64 { return k.hash }

// Keys are the keys of an epoch: a hash table with linear probing, to which keys are only
// added, and which is at most half full. It takes no lock to find one. It costs nothing
// until the first key. All methods are safe for concurrent use.
type Keys struct {
	max    int
	memory *keyMemory // of all epochs
	filled atomic.Int64
	table  atomic.Pointer[[]atomic.Pointer[Key]] // a power of two long; nil: no key yet

	adding sync.Mutex // held while a key is added; guards what follows
	used   int
	bytes  int64 // of memory
}

// keyMemory bounds the memory of the keys of all epochs that are not published.
type keyMemory struct {
	limit int64 // bytes; 0: none
	used  atomic.Int64
}

// full reports whether there is no room for another key.
func (m *keyMemory) full() bool { return m != nil && m.limit > 0 && m.used.Load() >= m.limit }

const (
	// firstKeys is the size of the smallest table.
	firstKeys = 1 << 10

	// keyBytes is what a key takes beside its name, which is there twice while its epoch is
	// published: itself, its count, its part of the record.
	keyBytes = int64(unsafe.Sizeof(Key{})) + int64(unsafe.Sizeof(KeyCount{})) + 32
)

// Find returns the key of a name, or nil if it is not in the epoch. hash is a hash of the
// name that nobody outside can choose, the same at every call. It may miss one that is
// being added.
func (ks *Keys) Find(hash uint64, name []byte) *Key {
	table := ks.table.Load()
	if table == nil {
		return nil
	}
	for i := hash; ; i++ {
		k := (*table)[i&uint64(len(*table)-1)].Load()
		if k == nil || k.hash == hash && k.name == string(name) {
			return k
		}
	}
}

// Add returns the key of a name, which it adds if it is not in the epoch yet. It returns
// nil if the epoch has as many keys as it may or memory for keys is used up, and for a
// name whose hash another one has.
func (ks *Keys) Add(hash uint64, name []byte) *Key {
	ks.adding.Lock()
	defer ks.adding.Unlock()
	table := ks.room()
	for i := hash; ; i++ {
		slot := &table[i&uint64(len(table)-1)]
		k := slot.Load()
		switch {
		case k == nil && (ks.used >= ks.max || ks.memory.full()):
			return nil
		case k == nil:
			k = &Key{name: string(name), hash: hash, of: ks}
			ks.take(keyBytes + 2*int64(len(name)))
			slot.Store(k)
			ks.used++
			return k
		case k.hash == hash && k.name == string(name):
			return k
		case k.hash == hash:
			return nil
		}
	}
}

// room returns the table, with an empty slot in it. ks.adding is held.
func (ks *Keys) room() []atomic.Pointer[Key] {
	table := ks.table.Load()
	if table == nil {
		return ks.resize(firstKeys)
	}
	if 2*ks.used < len(*table) {
		return *table
	}
	return ks.resize(2 * len(*table))
}

// resize makes a table of size slots with the keys of the present one, in which requests go
// on finding them. ks.adding is held.
func (ks *Keys) resize(size int) []atomic.Pointer[Key] {
	made := make([]atomic.Pointer[Key], size)
	ks.take(int64(size) * int64(unsafe.Sizeof(made[0])))
	if old := ks.table.Load(); old != nil {
		for i := range *old {
			if k := (*old)[i].Load(); k != nil {
				at := k.hash
				for made[at&uint64(size-1)].Load() != nil {
					at++
				}
				made[at&uint64(size-1)].Store(k)
			}
		}
	}
	ks.table.Store(&made)
	return made
}

// take counts memory. ks.adding is held.
func (ks *Keys) take(bytes int64) {
	ks.bytes += bytes
	if ks.memory != nil {
		ks.memory.used.Add(bytes)
	}
}

// prepare makes the table for so many keys, so that no request has to wait for it.
func (ks *Keys) prepare(keys int) {
	ks.adding.Lock()
	defer ks.adding.Unlock()
	if ks.table.Load() == nil && !ks.memory.full() {
		ks.resize(max(firstKeys, 1<<bits.Len(uint(2*min(keys, ks.max)))))
	}
}

// release gives the memory back: the counts are published.
func (ks *Keys) release() {
	ks.adding.Lock()
	defer ks.adding.Unlock()
	ks.take(-ks.bytes)
}

// Len returns how many keys have ids.
func (ks *Keys) Len() int { return int(ks.filled.Load()) }

// Full reports whether no further key has room.
func (ks *Keys) Full() bool {
	ks.adding.Lock()
	defer ks.adding.Unlock()
	return ks.used >= ks.max || ks.memory.full()
}

// Largest returns the n keys with the most ids, the largest first.
func (ks *Keys) Largest(n int) []KeyCount { return LargestKeys(ks.Counts(), n) }

// Counts returns the keys that have ids, in any order; nil if there are none. While requests
// are in flight it has Unique's weak promise. It gives way to requests.
func (ks *Keys) Counts() (counts []KeyCount) {
	table := ks.table.Load()
	if table == nil {
		return nil
	}
	counts = make([]KeyCount, 0, ks.Len())
	var pace Pace
	for i := range *table {
		pace.Step()
		if k := (*table)[i].Load(); k != nil {
			if n := k.unique.Load(); n > 0 {
				counts = append(counts, KeyCount{k.name, n})
			}
		}
	}
	return counts
}

// LargestKeys returns the n keys with the most ids, the largest first and those alike by
// name, and leaves counts as they are. It sorts few of them and gives way: a window may
// have a hundred thousand, and requests come while it closes.
func LargestKeys(counts []KeyCount, n int) []KeyCount {
	top := make([]KeyCount, 0, min(len(counts), 2*n))
	cut := func() []KeyCount {
		slices.SortFunc(top, func(a, b KeyCount) int {
			return cmp.Or(cmp.Compare(b.Unique, a.Unique), strings.Compare(a.Key, b.Key))
		})
		return top[:min(n, len(top))]
	}
	least := uint64(0)
	var pace Pace
	for _, c := range counts {
		pace.Step()
		if c.Unique < least {
			continue
		}
		if len(top) == 2*n {
			top = cut()
			least = top[n-1].Unique
		}
		top = append(top, c)
	}
	return slices.Clone(cut()) // top is twice as long
}
