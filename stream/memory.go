package stream

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
)

const (
	// memoryKeysLimit bounds the keys of the records in memory, in bytes: two hours of
	// minutes with 100,000 keys of a dozen letters. They also take at most this share
	// of SpoolConfig.Memory: 1/memoryKeysShare. The first record with keys is always taken.
	memoryKeysLimit = 256 << 20
	memoryKeysShare = 8
)

// memoryStore is the store of --data-dir=none.
type memoryStore struct {
	mu        sync.Mutex // guards entries against scan, which does not hold the spool's
	entries   []spooled
	keyBytes  int // of the keys of entries
	keysLimit int // of keyBytes
}

// newMemoryStore returns the store of a process that may use this many bytes of memory; 0: it
// is not known how many.
func newMemoryStore(memory uint64) *memoryStore {
	limit := uint64(memoryKeysLimit)
	if memory > 0 {
		limit = min(limit, memory/memoryKeysShare)
	}
	return &memoryStore{keysLimit: int(limit)}
}

func (m *memoryStore) put(e spooled, _ string, _ series, beforeCommit func()) error {
	beforeCommit()
	m.mu.Lock()
	defer m.mu.Unlock()
	if e.keys.Len() > 0 && m.keyBytes > 0 && m.keyBytes+e.keys.Size() > m.keysLimit {
		return fmt.Errorf("%w: %d bytes of keys wait for delivery, of %d at most", errSpoolFull, m.keyBytes, m.keysLimit)
	}
	m.entries = append(m.entries, e)
	m.keyBytes += e.keys.Size()
	return nil
}

// at returns how many entries are before an index. mu is held.
func (m *memoryStore) at(index uint64) int {
	n, _ := slices.BinarySearchFunc(m.entries, index, func(e spooled, index uint64) int { return cmp.Compare(e.index, index) })
	return n
}

func (m *memoryStore) scan(after, upTo uint64, limit int) ([]spooled, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	from, to := m.at(after+1), m.at(upTo+1)
	return slices.Clone(m.entries[from:min(to, from+limit)]), nil
}

func (m *memoryStore) advance(_ string, _, _, upTo uint64) ([]keyFile, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.at(upTo + 1)
	for i := range m.entries[:n] {
		m.keyBytes -= m.entries[i].keys.Size()
		m.entries[i] = spooled{} // the slice keeps its array; let the record go
	}
	m.entries = m.entries[n:]
	return nil, nil
}

func (m *memoryStore) deadLetter(spooled, string, string) error { return nil } // the log has it
func (m *memoryStore) keepInstance(string) error                { return nil }
func (m *memoryStore) close() error                             { return nil }
