// Package bench measures Verve beside what else one could write: README.md has the commands
// and their figures. Benchmarks and designs are in test files, but for Seed, which http
// serves, too.
//
// The commands beside it: http compares servers over HTTP, verify checks a running server's
// records against its answers.
package bench

import (
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// The cleanup thread begins within the first moments of a minute and leaves half of a core
// to others: slower passes keep more dead entries on the heap.
const (
	cleanupInterval = 100 * time.Millisecond // between two passes
	cleanupBatch    = 10_000                 // entries deleted before it rests
	cleanupRest     = time.Millisecond
)

// Seed is the design that the project began with: one sync.Map for all
// minutes, keyed "minute:id", so that a new minute needs no clearing. The value
// is the time of entry, by which a cleanup thread finds what is old and deletes
// it in batches.
type Seed struct {
	ids    sync.Map     // "minute:id" to time.Time
	minute atomic.Int64 // counts up from 0
	began  atomic.Int64 // when the open minute began, Unix time, ns
	rpm    atomic.Int64 // unique ids of the open minute

	total    uint64     // of the minutes before
	cleaning sync.Mutex // one pass at a time
	stop     chan struct{}
	stopped  sync.WaitGroup
}

// NewSeed starts the cleanup thread.
func NewSeed() *Seed {
	s := &Seed{stop: make(chan struct{})}
	s.began.Store(time.Now().UnixNano())
	s.stopped.Go(s.cleanUp)
	return s
}

// Add reports whether id is new in the open minute.
func (s *Seed) Add(id []byte, _ int) bool {
	// Not fmt.Sprintf: the seed is not to lose by the price of formatting.
	key := strconv.FormatInt(s.minute.Load(), 10) + ":" + string(id)
	if _, seen := s.ids.LoadOrStore(key, time.Now()); seen {
		return false
	}
	s.rpm.Add(1)
	return true
}

// Turn is what the ticker does: take the count, begin the next minute.
func (s *Seed) Turn() {
	s.total += uint64(s.rpm.Swap(0))
	s.began.Store(time.Now().UnixNano())
	s.minute.Add(1)
}

// RPM returns the unique ids of the open minute so far.
func (s *Seed) RPM() int64 { return s.rpm.Load() }

// Settle returns the unique ids of the minutes before, of which no entry is left.
func (s *Seed) Settle() uint64 {
	s.evict()
	return s.total
}

// Close ends the cleanup thread.
func (s *Seed) Close() {
	close(s.stop)
	s.stopped.Wait()
}

func (s *Seed) cleanUp() {
	tick := time.NewTicker(cleanupInterval)
	defer tick.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-tick.C:
			s.evict()
		}
	}
}

// evict deletes the entries of minutes before the open one, in one pass.
func (s *Seed) evict() {
	s.cleaning.Lock()
	defer s.cleaning.Unlock()
	began := time.Unix(0, s.began.Load())
	evicted := 0
	s.ids.Range(func(key, entered any) bool {
		if !entered.(time.Time).Before(began) {
			return true
		}
		s.ids.Delete(key)
		if evicted++; evicted%cleanupBatch == 0 {
			time.Sleep(cleanupRest)
		}
		return true
	})
}
