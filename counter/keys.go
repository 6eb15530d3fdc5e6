package counter

import (
	"cmp"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// DefaultMaxKeys is how many keys an epoch may have where Config says nothing.
const DefaultMaxKeys = 100_000

// MaxMaxKeys bounds Config.MaxKeys: a table for more takes 256 MiB before the first key.
const MaxMaxKeys = 10_000_000

// KeyCount is the number of new ids under a key in one window.
type KeyCount struct {
	Key    string // 1 to 128 bytes
	Unique uint64 // ids answered as new
}

// Key is the count of one key in an epoch. All methods are safe for concurrent use.
type Key struct {
	name   string
	hash   uint64
	unique atomic.Uint64
	_      [32]byte // two keys in one cache line would slow each other
}

// Count adds n new ids. Call it before their request leaves the epoch: then the sums of
// the keys are final when the epoch is sealed.
func (k *Key) Count(n uint64) { k.unique.Add(n) }

// Hash returns the hash that the key was added with.
func (k *Key) Hash() uint64 { return k.hash }

// Keys are the keys of an epoch: a hash table with linear probing, to which keys are only
// added. It takes no lock to find one. It costs nothing until the first key. All methods are safe
// for concurrent use.
type Keys struct {
	max    int
	adding sync.Mutex // held while a key is added
	used   atomic.Int64
	table  atomic.Pointer[[]atomic.Pointer[Key]] // twice max or more, a power of two; nil: no key yet
}

// Find returns the key of a name, or nil if it is not in the epoch. hash is a hash of the
// name that nobody outside can choose, the same at every call.
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
// nil if the epoch has as many keys as it may, and for a name whose hash another one has.
func (ks *Keys) Add(hash uint64, name []byte) *Key {
	table := ks.prepare()
	ks.adding.Lock()
	defer ks.adding.Unlock()
	for i := hash; ; i++ {
		slot := &(*table)[i&uint64(len(*table)-1)]
		k := slot.Load()
		switch {
		case k == nil && ks.Full():
			return nil
		case k == nil:
			k = &Key{name: string(name), hash: hash}
			slot.Store(k)
			ks.used.Add(1)
			return k
		case k.hash == hash && k.name == string(name):
			return k
		case k.hash == hash:
			return nil
		}
	}
}

// prepare makes the table, if there is none.
func (ks *Keys) prepare() *[]atomic.Pointer[Key] {
	if table := ks.table.Load(); table != nil {
		return table
	}
	made := make([]atomic.Pointer[Key], 1<<bits.Len(uint(2*ks.max)))
	ks.table.CompareAndSwap(nil, &made)
	return ks.table.Load()
}

// Len returns how many keys were added.
func (ks *Keys) Len() int { return int(ks.used.Load()) }

// Full reports whether the epoch has as many keys as it may.
func (ks *Keys) Full() bool { return ks.Len() >= ks.max }

// Counts returns the keys that have ids, in the order of their names; nil if there are
// none. While requests are in flight it has Unique's weak promise.
func (ks *Keys) Counts() []KeyCount {
	counts := ks.counts()
	slices.SortFunc(counts, func(a, b KeyCount) int { return strings.Compare(a.Key, b.Key) })
	return counts
}

// Largest returns the n keys with the most ids, the largest first.
func (ks *Keys) Largest(n int) []KeyCount { return LargestKeys(ks.counts(), n) }

func (ks *Keys) counts() (counts []KeyCount) {
	table := ks.table.Load()
	if table == nil {
		return nil
	}
	counts = make([]KeyCount, 0, ks.Len())
	for i := range *table {
		if k := (*table)[i].Load(); k != nil {
			if n := k.unique.Load(); n > 0 {
				counts = append(counts, KeyCount{k.name, n})
			}
		}
	}
	return counts
}

// LargestKeys sorts counts, the largest first and those alike by name, and returns the
// first n.
func LargestKeys(counts []KeyCount, n int) []KeyCount {
	slices.SortFunc(counts, func(a, b KeyCount) int {
		return cmp.Or(cmp.Compare(b.Unique, a.Unique), strings.Compare(a.Key, b.Key))
	})
	return counts[:min(n, len(counts))]
}
