package bench

import (
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/dolthub/swiss"
)

// Swiss is Maps with the maps of dolthub/swiss, which take less memory.
type Swiss struct {
	epoch  atomic.Int64
	total  uint64
	shards [shardCount]struct {
		swissShard
		_ [128 - unsafe.Sizeof(swissShard{})%128]byte
	}
}

type swissShard struct {
	mu      sync.Mutex
	epoch   int64
	numbers *swiss.Map[uint64, struct{}]
	others  *swiss.Map[wide, struct{}]
	total   uint64 // of the epochs before
}

// NewSwiss makes maps of the size expected.
func NewSwiss(expect Sizes) *Swiss {
	m := new(Swiss)
	for i := range m.shards {
		m.shards[i].numbers = swiss.NewMap[uint64, struct{}](uint32(expect.Numbers / shardCount))
		m.shards[i].others = swiss.NewMap[wide, struct{}](uint32(expect.Others / shardCount))
	}
	return m
}

// Add implements Design.
func (m *Swiss) Add(id []byte, _ int) bool {
	epoch := m.epoch.Load()
	n, w, isNumber := parse(id)
	if isNumber {
		s := &m.shards[shardOfNumber(n)].swissShard
		s.mu.Lock()
		defer s.mu.Unlock()
		s.reach(epoch)
		before := s.numbers.Count()
		s.numbers.Put(n, struct{}{})
		return s.numbers.Count() > before
	}
	s := &m.shards[shardOfWide(&w)].swissShard
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reach(epoch)
	before := s.others.Count()
	s.others.Put(w, struct{}{})
	return s.others.Count() > before
}

// reach clears the shard for an epoch it has not seen. s.mu is held.
func (s *swissShard) reach(epoch int64) {
	if epoch <= s.epoch {
		return
	}
	s.total += uint64(s.numbers.Count() + s.others.Count())
	s.epoch = epoch
	s.numbers.Clear()
	s.others.Clear()
}

// Turn opens the next epoch and clears the shards that no Add clears before.
func (m *Swiss) Turn() {
	epoch := m.epoch.Add(1)
	m.total = 0
	for i := range m.shards {
		s := &m.shards[i].swissShard
		s.mu.Lock()
		s.reach(epoch)
		m.total += s.total
		s.mu.Unlock()
	}
}

// Settle implements Design.
func (m *Swiss) Settle() uint64 { return m.total }

// Close implements Design.
func (m *Swiss) Close() {}
