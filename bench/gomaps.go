package bench

import (
	"sync"
	"sync/atomic"
	"unsafe"
)

// Maps is what a Go programmer reaches for first: Go maps in shards, each
// behind its mutex. A shard that meets a new epoch clears its maps and keeps
// their memory.
type Maps struct {
	epoch  atomic.Int64
	total  uint64
	shards [shardCount]struct {
		mapShard
		_ [128 - unsafe.Sizeof(mapShard{})%128]byte
	}
}

type mapShard struct {
	mu      sync.Mutex
	epoch   int64
	numbers map[uint64]struct{}
	others  map[wide]struct{}
	total   uint64 // of the epochs before
}

// NewMaps makes maps of the size expected.
func NewMaps(expect Sizes) *Maps {
	m := new(Maps)
	for i := range m.shards {
		m.shards[i].numbers = make(map[uint64]struct{}, expect.Numbers/shardCount)
		m.shards[i].others = make(map[wide]struct{}, expect.Others/shardCount)
	}
	return m
}

// Add implements Design.
func (m *Maps) Add(id []byte, _ int) bool {
	epoch := m.epoch.Load()
	n, w, isNumber := parse(id)
	if isNumber {
		s := &m.shards[shardOfNumber(n)].mapShard
		s.mu.Lock()
		defer s.mu.Unlock()
		s.reach(epoch)
		// Growing tells a new key from an old one with a single look-up.
		before := len(s.numbers)
		s.numbers[n] = struct{}{}
		return len(s.numbers) > before
	}
	s := &m.shards[shardOfWide(&w)].mapShard
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reach(epoch)
	before := len(s.others)
	s.others[w] = struct{}{}
	return len(s.others) > before
}

// reach clears the shard for an epoch it has not seen. s.mu is held.
func (s *mapShard) reach(epoch int64) {
	if epoch <= s.epoch {
		return
	}
	s.total += uint64(len(s.numbers) + len(s.others))
	s.epoch = epoch
	clear(s.numbers)
	clear(s.others)
}

// Turn opens the next epoch and clears the shards that no Add clears before.
func (m *Maps) Turn() {
	epoch := m.epoch.Add(1)
	m.total = 0
	for i := range m.shards {
		s := &m.shards[i].mapShard
		s.mu.Lock()
		s.reach(epoch)
		m.total += s.total
		s.mu.Unlock()
	}
}

// Settle implements Design.
func (m *Maps) Settle() uint64 { return m.total }

// Close implements Design.
func (m *Maps) Close() {}
