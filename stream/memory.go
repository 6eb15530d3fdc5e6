package stream

import (
	"fmt"
	"sync"
)

const (
	// memoryKeysLimit bounds the keys of the records in memory, in bytes: two hours of
	// minutes with 100,000 keys of a dozen letters. memoryKeysShare of SpoolConfig.Memory
	// bounds them, too. One record is always taken.
	memoryKeysLimit = 256 << 20
	memoryKeysShare = 8
)

// memoryStore is the store of --data-dir=none.
type memoryStore struct {
	mu        sync.Mutex // guards entries against scan and keys, which do not hold the spool's
	entries   []spooled
	keyBytes  int // of the keys of entries
	keysLimit int // of keyBytes
}

// newMemoryStore returns the store of a process that may take so many bytes; 0: it is not
// known how many.
func newMemoryStore(memory uint64) *memoryStore {
	limit := uint64(memoryKeysLimit)
	if memory > 0 {
		limit = min(limit, memory/memoryKeysShare)
	}
	return &memoryStore{keysLimit: int(limit)}
}

func (m *memoryStore) load() state {
	return state{series: make(map[string]series), cursors: make(map[string]uint64), lacking: make(map[int64]bool)}
}

func (m *memoryStore) put(e spooled, _ string, _ series, beforeCommit func()) error {
	beforeCommit()
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(e.keys) > 0 && m.keyBytes > 0 && m.keyBytes+e.keys.size() > m.keysLimit {
		return fmt.Errorf("%w: %d bytes of keys wait for delivery, of %d at most", errSpoolFull, m.keyBytes, m.keysLimit)
	}
	m.entries = append(m.entries, e)
	m.keyBytes += e.keys.size()
	return nil
}

func (m *memoryStore) keys(index uint64) (packedKeys, error) {
	found, err := m.scan(index-1, index, 1)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	return found[0].keys, nil
}

func (m *memoryStore) scan(after, upTo uint64, limit int) ([]spooled, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []spooled
	if len(m.entries) == 0 {
		return nil, nil
	}
	skip := uint64(0)
	if first := m.entries[0].index; after >= first {
		skip = after - first + 1 // indexes are consecutive
	}
	for i := skip; i < uint64(len(m.entries)) && len(out) < limit && m.entries[i].index <= upTo; i++ {
		out = append(out, m.entries[i])
	}
	return out, nil
}

func (m *memoryStore) advance(_ string, _, removeTo uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for n < len(m.entries) && m.entries[n].index <= removeTo {
		m.keyBytes -= m.entries[n].keys.size()
		m.entries[n] = spooled{} // the slice keeps its array; let the record go
		n++
	}
	m.entries = m.entries[n:]
	return nil
}

func (m *memoryStore) condemn(spooled, string, string) error { return nil } // the log has it
func (m *memoryStore) keepInstance(string) error             { return nil }
func (m *memoryStore) dropSink(string) error                 { return nil }
func (m *memoryStore) close() error                          { return nil }
