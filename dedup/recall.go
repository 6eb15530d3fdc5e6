package dedup

import (
	"cmp"
	"runtime"
	"runtime/debug"
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
	var next atomic.Int64
	var unfit atomic.Pointer[error]
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(j.segments) || unfit.Load() != nil {
					return
				}
				if s := j.segments[i]; s != nil && s.last > 0 {
					if err := m.recallSegment(v, s, j.newest.serial); err != nil {
						unfit.Store(&err)
					}
				}
			}
		})
	}
	workers.Wait()
	if err := unfit.Load(); err != nil {
		j.first.unfit = *err
	}
}

func (m *Memory) recallSegment(v *view, s *segment, serial uint64) (err error) {
	defer m.journal.caught(&err)
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	narrow, wide := v.narrow.levels[0].Load(), v.wide.levels[0].Load()
	return s.records(serial, func(kind int, words []uint64) error {
		if kind == narrowKind {
			for _, x := range words { // the misses of a chunk overlap
				b, rest := narrow.choose(x)
				prefetch(unsafe.Pointer(&b[home(rest)]))
			}
			for _, x := range words {
				if _, err := m.addNarrow(v, x, false); err != nil {
					return err
				}
			}
			return nil
		}
		for i := 0; i < len(words); i += 2 {
			b, rest := wide.choose(words[i])
			prefetch(unsafe.Pointer(&b.first[home(rest)]))
		}
		for i := 0; i < len(words); i += 2 {
			if _, err := m.addWide(v, words[i], words[i+1], false); err != nil {
				return err
			}
		}
		return nil
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
