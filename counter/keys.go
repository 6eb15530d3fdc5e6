package counter

import (
	"bytes"
	"math/bits"
	"sync"
	"sync/atomic"
	"unsafe"
)

// DefaultMaxKeys is how many keys an epoch may have unless Config.MaxKeys is set.
const DefaultMaxKeys = 100_000

// MaxMaxKeys bounds Config.MaxKeys.
const MaxMaxKeys = 10_000_000

// MaxKeyLen is how many bytes a key may have.
const MaxKeyLen = 128

// Key is the count of one key in an epoch, in a line of memory of its own: two keys in one
// cache line would slow each other. All methods are safe for concurrent use.
//
// It has no pointer, and nor has the memory of a Keys, but for one to each 1,024 lines: with
// 100,000 keys the garbage collector took 40 ms of a processor to go through those of two
// epochs, at a turn.
type Key struct {
	hash   uint64
	unique atomic.Uint64
	size   uint8
	text   [47]byte // the name; a long one goes on in the lines behind
}

// Hash returns the hash that the key was added with.
func (k *Key) Hash() uint64 { return k.hash }

func (k *Key) name() []byte { return unsafe.Slice(&k.text[0], k.size) }

// keyLines is how many lines a key takes with a name of that size.
func keyLines(size int) int {
	return 1 + (max(size-len(Key{}.text), 0)+int(unsafe.Sizeof(Key{}))-1)/int(unsafe.Sizeof(Key{}))
}

// chunkLines is the number of lines that are allocated at once. The lines of a key are in one
// chunk.
const chunkLines = 1 << 10

// keyTable is a hash table with linear probing, to which keys are only added, and which is at
// most half full.
type keyTable struct {
	slots  []atomic.Uint32    // where the key is in the chunks, and 1; 0: none. A power of two long
	chunks []*[chunkLines]Key // nil: no key needed it yet
	lines  int                // used
}

// newKeyTable makes a table that has room in its chunks for as many keys as it may have, with
// the longest names.
func newKeyTable(slots int) *keyTable {
	const longest = 3 // lines; those left over at the end of a chunk are fewer
	return &keyTable{
		slots:  make([]atomic.Uint32, slots),
		chunks: make([]*[chunkLines]Key, slots/2*longest/(chunkLines-longest)+1),
	}
}

// at returns the key of a slot that has one.
func (t *keyTable) at(slot uint32) *Key {
	return &t.chunks[(slot-1)/chunkLines][(slot-1)%chunkLines]
}

// Keys are the keys of an epoch. It takes no lock to find one. It costs nothing until the first
// key. All methods are safe for concurrent use.
type Keys struct {
	max    int
	memory *keyMemory // of all epochs
	filled atomic.Int64
	table  atomic.Pointer[keyTable] // nil: no key yet, or released

	adding sync.Mutex // held while a key is added; guards what follows, and the lines of the table
	used   int
	bytes  int64 // of memory
	over   bool  // released

	// late is the number of callers that use the table and may not be in the epoch. They first
	// count in late and then load the table; release first takes the table away and then loads
	// late. So a table that one of them has is not used for another epoch.
	late atomic.Int64
}

// keyMemory bounds the memory of the keys of all epochs that are not published, and keeps the
// table of the last one that was: its memory is used again.
type keyMemory struct {
	limit int64 // bytes; 0: none
	used  atomic.Int64
	free  atomic.Pointer[keyTable]
}

// full reports whether there is no room for another key.
func (m *keyMemory) full() bool { return m.limit > 0 && m.used.Load() >= m.limit }

const (
	// firstKeys is the size of the smallest table.
	firstKeys = 1 << 10

	// keyBytes is what a key takes beside its lines and its name while its epoch is published:
	// in KeyCounts, and what the allocator adds.
	keyBytes = MaxPackedKey - MaxKeyLen + 32
)

// Find returns the key of a name, or nil if it is not in the epoch. hash is a hash of the
// name that no caller can choose, the same at every call. It may miss one that is
// being added. The caller is in the epoch, as that of Add and Count.
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

// Add returns the key of a name, which it adds if it is not in the epoch yet. It returns
// nil if the epoch has as many keys as it may or memory for keys is used up, for a
// name whose hash another one has, and once the epoch is released.
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

// put writes a key into the next lines. The adding lock of its Keys is held.
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

// Count adds n new ids. Call it before their request leaves the epoch: then the sums of
// the keys are final when the epoch is sealed.
func (ks *Keys) Count(k *Key, n uint64) {
	if n > 0 && k.unique.Add(n) == n {
		ks.filled.Add(1)
	}
}

// CountLate adds a new id under a name for a caller who may not be in the epoch, which may be
// released. Then, and where Add would return nil, it does nothing.
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

// room returns the table, with an empty slot in it. ks.adding is held.
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

// resize makes a table of size slots with the keys of the present one, in which requests go
// on finding them. ks.adding is held.
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

// account counts memory. ks.adding is held.
func (ks *Keys) account(n int64) {
	ks.bytes += n
	ks.memory.used.Add(n)
}

// prepare makes the table for so many keys, so that no request has to wait for it. Where the
// one that was used last is of that size, it is used again. It does nothing where the epoch has
// keys or was released: it may have been opened, and closed, meanwhile.
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

// release gives the memory back: the counts are published, and no request is in the epoch. The
// table is used again, and that of an earlier epoch is not kept for longer; but the epoch that
// is the last one keeps its keys, to be shown.
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

// Full reports whether no further key has room.
func (ks *Keys) Full() bool {
	ks.adding.Lock()
	defer ks.adding.Unlock()
	return ks.used >= ks.max || ks.memory.full()
}

// Counts returns the keys that have ids. While requests are in flight it has Unique's weak
// promise. It gives way to requests.
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
