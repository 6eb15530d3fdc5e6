package dedup

import "testing"

// This file exports what the suite in set_test.go needs.

// NewTestMemory is a Memory on the heap.
func NewTestMemory(t testing.TB, maxIDs uint64) Set { return newMemory(t, Config{MaxIDs: maxIDs}) }

// NewTestJournal is a Memory with a journal.
func NewTestJournal(t testing.TB, maxIDs uint64) Set {
	return newMemory(t, Config{MaxIDs: maxIDs, Dir: t.TempDir()})
}

// NewTestBatches is a Memory to which each id comes two times in one batch.
func NewTestBatches(t testing.TB, maxIDs uint64) Set {
	return twice{newMemory(t, Config{MaxIDs: maxIDs}), t}
}

// ReclaimTest reclaims the slots of past epochs in one of these Sets.
func ReclaimTest(s Set) {
	if two, batches := s.(twice); batches {
		s = two.Memory
	}
	s.(*Memory).reclaim()
}

// TestLap is how many epochs there are tags for.
const TestLap = lap

// TestMany is 15 times the ids of the smallest table, or fewer with the race detector, where
// each id costs more.
var TestMany = func() int {
	if raceEnabled {
		return 300_000
	}
	return 1_000_000
}()
