package dedup

import (
	"cmp"
	"math/bits"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"verve/counter"
)

// openJournal opens the journal of cfg.Dir.
func (m *Memory) openJournal() error {
	if m.cfg.msync == nil {
		m.cfg.msync = syncMapped
	}
	j, err := openJournal(&journal{
		dir:           m.cfg.Dir,
		segmentChunks: cmp.Or(m.cfg.segmentChunks, segmentChunks),
		boot:          cmp.Or(m.cfg.boot, bootID()),
		nudge:         m.nudge,
		onFailure:     m.cfg.OnFailure,
		step:          m.cfg.step,
		msync:         m.cfg.msync,
	}, m.cfg.OnSetAside)
	if err != nil {
		return err
	}
	m.journal, m.secret = j, j.secret
	return nil
}

// Past says what earlier processes left in Dir. last and unique are what the
// publisher has: the last window with a record, and the sum of the records for
// it. With a Dir it must be called, once, and the Counter be given the answer.
func (m *Memory) Past(last time.Time, unique uint64) counter.Past {
	if m.journal == nil {
		return counter.Past{}
	}
	return m.journal.past(last, unique)
}

// recall puts the ids of the epoch opened last back into the tables, if its time
// is not over: the counter may go on with it.
func (m *Memory) recall() {
	j := m.journal
	if j.newest.serial == 0 || !time.Now().Before(j.newest.end()) {
		return
	}
	j.resumable = true
	v := &view{tag: tagOf(j.newest.serial), narrow: m.narrow, wide: m.wide}
	v.narrowSample.Store(j.counts[j.newest.serial].narrow / sampleEvery) // what a level that is added is sized by
	v.wideSample.Store(j.counts[j.newest.serial].wide / sampleEvery)
	var segments []*segment
	for _, s := range j.segments {
		if s != nil && s.last > 0 {
			segments = append(segments, s)
		}
	}
	narrow, wide := v.narrow.levels[0].Load(), v.wide.levels[0].Load()
	err := m.replay(segments, narrowKind, uint64(len(narrow.buckets))*uint64(unsafe.Sizeof(narrowBucket{})), func(words []uint64) error {
		for i, x := range words {
			b, rest := narrow.choose(words[min(i+replayAhead, len(words)-1)])
			prefetch(unsafe.Pointer(&b[home(rest)]))
			if _, err := m.addNarrow(v, x, false); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		err = m.replay(segments, wideKind, uint64(len(wide.buckets))*uint64(unsafe.Sizeof(wideBucket{})), func(words []uint64) error {
			for i := 0; i < len(words); i += 2 {
				b, rest := wide.choose(words[min(i+2*replayAhead, len(words)-2)])
				prefetch(unsafe.Pointer(&b.first[home(rest)]))
				if _, err := m.addWide(v, words[i], words[i+1], false); err != nil {
					return err
				}
			}
			return nil
		})
	}
	j.first.unfit = err
}

const (
	// partBytes of a table at a time are filled: half of the cache that belongs to
	// one core in today's servers, or less.
	partBytes = 1 << 19

	// maxParts bounds the places that a worker writes to in turns: their lines
	// stay in the first cache.
	maxParts = 1 << 10

	// replaySegments at a time are sorted, which takes as much memory as they
	// have on the disk, 128 MiB; fewer where that is not to be had.
	replaySegments = 32

	// replayAhead ids before it is added the place of an id is fetched: so many
	// misses overlap.
	replayAhead = 24
)

// replay calls add with the records of a kind that the newest epoch has in the
// segments, on all processors. In the order they came in, each id costs a miss or
// two of a large table: 1.7 s for 46 million on two cores. So they are sorted by
// their place first, and a part of the table is filled at a time (BenchmarkStart).
func (m *Memory) replay(segments []*segment, kind int, tableBytes uint64, add func(words []uint64) error) error {
	words := m.journal.counts[m.journal.newest.serial].narrow
	if kind == wideKind {
		words = 2 * m.journal.counts[m.journal.newest.serial].wide
	}
	if words == 0 {
		return nil
	}
	r := replayer{m: m, kind: kind, add: add, parts: int(min(tableBytes/partBytes, maxParts)), workers: runtime.GOMAXPROCS(0)}
	group := 0 // segments at a time; 0: no sorting
	if r.parts > 1 {
		group = replaySegments
	}
	for ; group > 0; group /= 2 {
		most := uint64(min(group, len(segments)) * m.journal.segmentChunks * chunkWords)
		buffer, memory, err := allocate[uint64](m.arena, min(most, words))
		if err == nil {
			defer m.arena.free(memory)
			r.buffer = buffer
			break
		}
	}
	if group == 0 {
		return r.asTheyCame(segments)
	}
	for some := range slices.Chunk(segments, group) {
		if err := r.sorted(some); err != nil {
			return err
		}
	}
	return nil
}

// replayer adds records to a table.
type replayer struct {
	m      *Memory
	kind   int
	add    func(words []uint64) error
	parts  int // of the table
	buffer []uint64

	workers int
}

// each calls visit, on all processors, with the records of each chunk of the
// segments, with the same worker for the same segment each time.
func (r *replayer) each(segments []*segment, visit func(worker int, words []uint64) error) error {
	serial := r.m.journal.newest.serial
	return r.parallel(func(worker int) error {
		for i := worker; i < len(segments); i += r.workers {
			err := segments[i].records(serial, func(kind int, words []uint64) error {
				if kind != r.kind {
					return nil
				}
				return visit(worker, words)
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// parallel runs work on each processor and returns an error of one of them. A
// fault is one.
func (r *replayer) parallel(work func(worker int) error) error {
	errs := make([]error, r.workers)
	var running sync.WaitGroup
	for w := range errs {
		running.Go(func() {
			defer r.m.journal.caught(&errs[w])
			defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
			errs[w] = work(w)
		})
	}
	running.Wait()
	return cmp.Or(errs...)
}

func (r *replayer) asTheyCame(segments []*segment) error {
	return r.each(segments, func(_ int, words []uint64) error { return r.add(words) })
}

// sorted counts the records of each part, puts them into the buffer part by part,
// and adds them.
func (r *replayer) sorted(segments []*segment) error {
	width := 1 + r.kind
	partOf := func(x uint64) int { // in the order of level.choose
		part, _ := bits.Mul64(x, uint64(r.parts))
		return int(part)
	}
	at := make([][]int, r.workers) // by worker and part
	for w := range at {
		at[w] = make([]int, r.parts)
	}
	err := r.each(segments, func(worker int, words []uint64) error {
		counts := at[worker]
		for i := 0; i < len(words); i += width {
			counts[partOf(words[i])] += width
		}
		return nil
	})
	if err != nil {
		return err
	}
	ends := make([]int, r.parts)
	n := 0
	for part := range r.parts {
		for w := range at {
			n, at[w][part] = n+at[w][part], n
		}
		ends[part] = n
	}
	err = r.each(segments, func(worker int, words []uint64) error {
		next := at[worker]
		for i := 0; i < len(words); i += width {
			part := partOf(words[i])
			to := next[part]
			next[part] = to + width
			r.buffer[to] = words[i]
			if width > 1 {
				r.buffer[to+1] = words[i+1]
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	var taken atomic.Int64
	return r.parallel(func(int) error {
		for {
			part := int(taken.Add(1)) - 1
			if part >= r.parts {
				return nil
			}
			from := 0
			if part > 0 {
				from = ends[part-1]
			}
			if err := r.add(r.buffer[from:ends[part]]); err != nil {
				return err
			}
		}
	})
}

// startAt prepares for the first epoch of this process: the tables have words
// of the epoch before it at most.
func (m *Memory) startAt(serial uint64) {
	if j := m.journal; j != nil && j.resumable {
		serial = j.newest.serial
	}
	m.clean = serial - 1
	m.swept = serial
	m.sweep.narrow.clean, m.sweep.wide.clean = m.clean, m.clean
}

// peak is the load of the largest epoch of which records are there.
func (j *journal) peak() (p load) {
	for _, l := range j.counts {
		p.narrow, p.wide = max(p.narrow, l.narrow), max(p.wide, l.wide)
	}
	return p
}

// resumed returns what the tables have of the epoch just begun, if an earlier
// process opened it.
func (j *journal) resumed(serial uint64) load {
	if serial != j.first.serial {
		return load{}
	}
	return j.first.load
}
