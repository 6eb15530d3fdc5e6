package bench

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
)

// shardCount keeps two writers out of each other's way: they meet in a shard
// once in 256 adds.
const shardCount = 256

// shards are what Maps and Swiss have in common: sets of numbers and of other keys in
// shards, each behind its mutex. A shard that meets a new epoch empties its sets and keeps
// their memory.
type shards[N, W any] struct {
	epoch atomic.Int64
	total uint64
	empty func(N, W) (held int) // empties the sets of a shard
	all   [shardCount]struct {
		shard[N, W]
		_ [128 - 5*8]byte // N and W are pointers or maps
	}
}

type shard[N, W any] struct {
	mu      sync.Mutex
	epoch   int64
	numbers N
	others  W
	total   uint64 // of the epochs before
}

// lock returns a shard of the open epoch, whose mu the caller unlocks.
func (s *shards[N, W]) lock(at uint64) *shard[N, W] {
	one := &s.all[at].shard
	one.mu.Lock()
	if epoch := s.epoch.Load(); epoch > one.epoch {
		one.total += uint64(s.empty(one.numbers, one.others))
		one.epoch = epoch
	}
	return one
}

// Turn opens the next epoch and empties the shards that no Add empties before.
func (s *shards[N, W]) Turn() {
	s.epoch.Add(1)
	s.total = 0
	for i := range uint64(shardCount) {
		one := s.lock(i)
		s.total += one.total
		one.mu.Unlock()
	}
}

// Settle implements Design.
func (s *shards[N, W]) Settle() uint64 { return s.total }

// Close implements Design.
func (s *shards[N, W]) Close() {}

// fibonacci spreads keys over shards by the high bits of the product.
const fibonacci = 0x9e3779b97f4a7c15

func shardOfNumber(n uint64) uint64 { return n * fibonacci >> 56 }

func shardOfWide(w *wide) uint64 {
	return (binary.LittleEndian.Uint64(w[:8]) ^ binary.LittleEndian.Uint64(w[8:])) * fibonacci >> 56
}
