package counter

import (
	"bytes"
	"math/bits"
	"sync"
	"sync/atomic"
	"unsafe"
)

// DefaultMaxKeys is how many keys an epoch may have if Config.MaxKeys is 0.
const DefaultMaxKeys = 100_000

// MaxMaxKeys bounds Config.MaxKeys.
const MaxMaxKeys = 10_000_000

// MaxKeyLen is how many bytes a key may have.
const MaxKeyLen = 128

// Key is the count of one key in an epoch. It has a cache line (64 bytes) of its own: two keys
// in one line would slow each other down. All methods are safe for concurrent use.
//
// A Key contains no pointers, and Keys has only one pointer for each 1,024 lines. With pointers
// to each key, the garbage collector needed 40 ms of CPU at a turn to scan the keys of two
// epochs with 100,000 keys each.
type Key struct {
	hash   uint64
	unique atomic.Uint64
	size   uint8
	text   [47]byte // the name; a long name continues in the lines after this one
}

// Hash returns the hash that the key was added with.
func (k *Key) Hash() uint64 { return k.hash }

func (k *Key) name() []byte { return unsafe.Slice(&k.text[0], k.size) }

// keyLines returns how many lines a key takes whose name has size bytes.
func keyLines(size int) int {
	return 1 + (max(size-len(Key{}.text), 0)+int(unsafe.Sizeof(Key{}))-1)/int(unsafe.Sizeof(Key{}))
}

// chunkLines is the number of lines that are allocated at once. The lines of a key are in one
// chunk.
const chunkLines = 1 << 10

// keyTable is a hash table with linear probing. Keys are added but never removed, and it is at
// most half full.
type keyTable struct {
	slots  []atomic.Uint32    // 1 + the index of the key's first line in chunks; 0: no key. The length is a power of two
	chunks []*[chunkLines]Key // nil: not needed yet
	lines  int                // used
}

// newKeyTable makes a table whose chunks have room for as many keys as it can hold, each with a
// name of the greatest length.
func newKeyTable(slots int) *keyTable {
	const longest = 3 // lines of a key at most; fewer than these are left unused at the end of a chunk
	return &keyTable{
		slots:  make([]atomic.Uint32, slots),
		chunks: make([]*[chunkLines]Key, slots/2*longest/(chunkLines-longest)+1),
	}
}

// at returns the key for the value of a slot, which must not be 0.
func (t *keyTable) at(slot uint32) *Key {
	return &t.chunks[(slot-1)/chunkLines][(slot-1)%chunkLines]
}

// Keys are the keys of an epoch. Finding a key takes no lock. No memory is allocated before the
// first key is added, or prepare is called. All methods are safe for concurrent use.
type Keys struct {
	max    int
	memory *keyMemory // shared by all epochs
	filled atomic.Int64
	table  atomic.Pointer[keyTable] // nil: no key yet, or released

	adding sync.Mutex // held while a key is added; guards used, bytes and over, and the lines of the table
	used   int
	bytes  int64 // that these keys have added to memory.used
	over   bool  // released

	// late is how many callers of CountLate and Counts are using the table; they need not be
	// inside the epoch. Such a caller first adds to late and then loads the table; release
	// first takes the table away and then loads late. So a table that one of them is using is
	// not used for another epoch.
	late atomic.Int64
}

// keyMemory bounds the memory that the keys of all unpublished epochs take. It also keeps the
// table of a published epoch, whose memory a later epoch uses again.
type keyMemory struct {
	limit int64 // bytes; 0: none
	used  atomic.Int64
	free  atomic.Pointer[keyTable]
}

// full reports whether there is no room for another key.
func (m *keyMemory) full() bool { return m.limit > 0 && m.used.Load() >= m.limit }

const (
	// firstKeys is the number of slots of the smallest table.
	firstKeys = 1 << 10

	// keyBytes is how many bytes a key takes in KeyCounts while its epoch is published, without
	// its name, and with what the allocator adds.
	keyBytes = MaxPackedKey - MaxKeyLen + 32
)

// Find returns the key of a name, or nil if it is not in the epoch. hash is a hash of the name
// that no caller can choose, the same at every call. It may miss a key that is being added. The
// caller of Find, of Add and of Count must be inside the epoch, or have added to late.
func (ks *Keys) Find(hash uint64, name []byte) *Key {
	table := ks.table.Load()
	if table == nil {
		return nil
	}
	for i := hash; ; i++ {
		slot := table.slots[i&uint64(len(table.slots)-1)].Load()
		if slot == 0 {
			return nil
		}
		if k := table.at(slot); k.hash == hash && bytes.Equal(k.name(), name) {
			return k
		}
	}
}

// Add returns the key of a name, and adds it if it is not in the epoch yet. It returns nil if
// the epoch has as many keys as it may, if the memory for keys is used up, if another name has
// the same hash, or if the epoch is released.
func (ks *Keys) Add(hash uint64, name []byte) *Key {
	ks.adding.Lock()
	defer ks.adding.Unlock()
	if ks.over {
		return nil
	}
	table := ks.room()
	for i := hash; ; i++ {
		slot := &table.slots[i&uint64(len(table.slots)-1)]
		at := slot.Load()
		if at == 0 {
			if ks.used >= ks.max || ks.memory.full() {
				return nil
			}
			k, at := table.put(hash, name)
			ks.account(int64(keyLines(len(name)))*int64(unsafe.Sizeof(Key{})) + keyBytes + int64(len(name)))
			slot.Store(at)
			ks.used++
			return k
		}
		if k := table.at(at); k.hash == hash {
			if bytes.Equal(k.name(), name) {
				return k
			}
			return nil
		}
	}
}

// put writes a key into the next free lines, and returns it and the value of its slot. The lock
// Keys.adding is held.
func (t *keyTable) put(hash uint64, name []byte) (k *Key, slot uint32) {
	n := keyLines(len(name))
	if t.lines/chunkLines != (t.lines+n-1)/chunkLines {
		t.lines = (t.lines + n - 1) / chunkLines * chunkLines
	}
	slot = uint32(t.lines) + 1
	t.lines += n
	if chunk := &t.chunks[(slot-1)/chunkLines]; *chunk == nil {
		*chunk = new([chunkLines]Key)
	}
	k = t.at(slot)
	k.hash, k.size = hash, uint8(len(name))
	k.unique.Store(0)
	copy(k.name(), name)
	return k, slot
}

// Count adds n new ids to k. Call it before the request with these ids leaves the epoch: so the
// sums of the keys are final when the epoch is sealed.
func (ks *Keys) Count(k *Key, n uint64) {
	if n > 0 && k.unique.Add(n) == n {
		ks.filled.Add(1)
	}
}

// CountLate adds a new id under a name. The caller need not be inside the epoch. If the epoch
// is released already, or if Add returns nil, CountLate does nothing.
func (ks *Keys) CountLate(hash uint64, name []byte) {
	ks.late.Add(1)
	defer ks.late.Add(-1)
	k := ks.Find(hash, name)
	if k == nil {
		k = ks.Add(hash, name)
	}
	if k != nil {
		ks.Count(k, 1)
	}
}

// room returns the table; if it is half full, a larger one. ks.adding is held.
func (ks *Keys) room() *keyTable {
	table := ks.table.Load()
	if table == nil {
		return ks.resize(firstKeys)
	}
	if 2*ks.used < len(table.slots) {
		return table
	}
	return ks.resize(2 * len(table.slots))
}

// resize replaces the table by one with size slots and the same keys. Meanwhile requests find
// the keys in the old table. ks.adding is held.
func (ks *Keys) resize(size int) *keyTable {
	made := newKeyTable(size)
	ks.account(int64(size) * int64(unsafe.Sizeof(made.slots[0])))
	if old := ks.table.Load(); old != nil {
		made.lines = old.lines
		copy(made.chunks, old.chunks)
		for i := range old.slots {
			if slot := old.slots[i].Load(); slot != 0 {
				at := made.at(slot).hash
				for made.slots[at&uint64(size-1)].Load() != 0 {
					at++
				}
				made.slots[at&uint64(size-1)].Store(slot)
			}
		}
	}
	ks.table.Store(made)
	return made
}

// account adds n bytes to the memory in use. ks.adding is held.
func (ks *Keys) account(n int64) {
	ks.bytes += n
	ks.memory.used.Add(n)
}

// prepare makes a table for the given number of keys, so that no request has to wait for it. If
// the table that was released last has the right size, it is used again. prepare does nothing
// if the epoch already has a table or was released: it may have been opened, and closed,
// meanwhile.
func (ks *Keys) prepare(keys int) {
	ks.adding.Lock()
	defer ks.adding.Unlock()
	if ks.table.Load() != nil || ks.over || ks.memory.full() {
		return
	}
	size := max(firstKeys, 1<<bits.Len(uint(2*min(keys, ks.max))))
	free := ks.memory.free.Swap(nil)
	if free == nil || len(free.slots) != size {
		ks.resize(size)
		return
	}
	clear(free.slots)
	free.lines = 0
	ks.account(int64(size) * int64(unsafe.Sizeof(free.slots[0])))
	ks.table.Store(free)
}

// release gives the memory back when the counts are published and no request is in the epoch.
// The table is kept for a later epoch, in place of the one kept so far. last: the epoch is the
// one opened last, which keeps its keys so that they can be shown.
func (ks *Keys) release(last bool) {
	ks.adding.Lock()
	defer ks.adding.Unlock()
	ks.account(-ks.bytes)
	if ks.over = true; last {
		return
	}
	if table := ks.table.Swap(nil); ks.late.Load() == 0 {
		ks.memory.free.Store(table)
	}
}

// Len returns how many keys have ids.
func (ks *Keys) Len() int { return int(ks.filled.Load()) }

// Full reports whether there is no room for another key. It takes the lock of Add.
func (ks *Keys) Full() bool {
	ks.adding.Lock()
	defer ks.adding.Unlock()
	return ks.used >= ks.max || ks.memory.full()
}

// Counts returns the keys that have ids, with their counts. While requests are in flight it is
// no more a snapshot than Epoch.Unique. After release it returns none, unless the epoch is the
// last one. It gives way to requests. The caller need not be inside the epoch.
func (ks *Keys) Counts() (counts KeyCounts) {
	ks.late.Add(1)
	defer ks.late.Add(-1)
	table := ks.table.Load()
	if table == nil {
		return counts
	}
	var pace Pace
	for i := range table.slots {
		pace.Step()
		slot := table.slots[i].Load()
		if slot == 0 {
			continue
		}
		if k := table.at(slot); k.unique.Load() > 0 {
			counts.Add(k.name(), k.unique.Load())
		}
	}
	return counts
}
