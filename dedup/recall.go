package dedup

import (
	"cmp"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"verve/counter"
)

// openJournal opens the journal of cfg.Dir.
func (m *Memory) openJournal() error {
	j, err := openJournal(m.cfg, m.nudge)
	if err != nil {
		return err
	}
	m.journal = j
	if j.secret != (secret{}) {
		m.secret = j.secret
	}
	return nil
}

// Past returns what earlier processes left in Dir. published is what each publisher has
// published, by its name: Config.Publisher of this process or of an earlier one. With a Dir it
// must be called once, and the result passed to the Counter.
func (m *Memory) Past(published map[string]counter.Published) counter.Past {
	if m.journal == nil {
		return counter.Past{}
	}
	past, odd := m.journal.past(published)
	if odd != "" && m.cfg.OnSetAside != nil {
		m.cfg.OnSetAside("", fmt.Errorf("%s %s", m.cfg.Dir, odd))
	}
	return past
}

// recall puts the ids of the epoch opened last back into the tables, if its time
// is not over: the counter may go on with it. Its tokens serve in the window after it,
// too, and those of the window before it in it.
func (m *Memory) recall() {
	j := m.journal
	past := time.Since(j.newest.end()) // its end; negative: it is not over
	// Then the window after it is over as well.
	if j.newest.serial == 0 || past >= max(j.newest.window, m.cfg.Window) {
		return
	}
	var segments []*segment
	for _, s := range j.segments {
		if s != nil && s.last > 0 {
			segments = append(segments, s)
		}
	}
	newest, had := j.newest.serial, j.counts[j.newest.serial]
	r := &m.recalled
	r.tokens = m.recallTokens(segments, newest)
	if past >= 0 {
		return
	}
	if j.newest.follows {
		r.past = m.recallTokens(segments, newest-1)
	}
	j.resumable = true
	v := &View{tag: tagOf(newest), narrow: m.narrow.open, wide: m.wide.open}
	v.narrowSample.Store(had.narrow / sampleEvery) // what a level that is added is sized by
	v.wideSample.Store(had.wide / sampleEvery)
	j.first.unfit = m.recallIDs(v, segments)
}

// recallIDs adds the ids of the newest epoch to the tables of v. The places of the ids of a
// chunk are prefetched together, as in Keys: their cache misses overlap (BenchmarkStart).
func (m *Memory) recallIDs(v *View, segments []*segment) error {
	return m.eachChunk(segments, m.journal.newest.serial, func(kind int, words []uint64) error {
		if kind == nameKind {
			return nil
		}
		width, id := int(layouts[kind].words), Key{kind: narrowKind}
		if layouts[kind].wide {
			id.kind = wideKind
		}
		narrow, wide := v.narrow.farLevels.Load(), v.wide.farLevels.Load()
		for at := 0; at < len(words); at += width {
			if id.kind == narrowKind {
				v.narrow.prefetch(words[at], narrow)
			} else {
				v.wide.prefetch(words[at], wide)
			}
		}
		for at := 0; at < len(words); at += width {
			if id.lo = words[at]; id.kind == wideKind {
				id.hi, id.lo = words[at], words[at+1]
			}
			if _, err := m.addKey(v, id, false); err != nil {
				return err
			}
		}
		return nil
	})
}

// recallTokens returns the tokens that the journal has of an epoch. Those that there is
// no memory for are left out.
func (m *Memory) recallTokens(segments []*segment, serial uint64) *tokens {
	n := m.journal.counts[serial].tokens
	t := &tokens{table: table[narrowBucket]{expect: n + n/4}}
	if n == 0 {
		return t
	}
	t.sample.Store(n / sampleEvery)
	_ = m.eachChunk(segments, serial, func(kind int, words []uint64) error {
		if !layouts[kind].token {
			return nil
		}
		width := int(layouts[kind].words)
		for at := width - 1; at < len(words); at += width {
			if err := t.put(m, words[at]); err != nil {
				return err
			}
		}
		return nil
	})
	return t
}

// eachChunk calls visit with the records of each chunk of an epoch, on all processors, until
// one call returns an error, and returns that. A fault of a file is one, too.
func (m *Memory) eachChunk(segments []*segment, serial uint64, visit func(kind int, words []uint64) error) error {
	errs := make([]error, m.arena.workers)
	var taken atomic.Int64
	var running sync.WaitGroup
	for w := range errs {
		running.Go(func() {
			defer m.journal.caught(&errs[w], debug.SetPanicOnFault(true))
			for errs[w] == nil {
				i := int(taken.Add(1)) - 1
				if i >= len(segments) {
					return
				}
				errs[w] = segments[i].records(serial, visit)
			}
		})
	}
	running.Wait()
	return cmp.Or(errs...)
}

// startAt prepares for the first epoch of this process: the tables have words
// of the epoch before it at most.
func (m *Memory) startAt(serial uint64) {
	if j := m.journal; j != nil && j.resumable {
		serial = j.newest.serial
	}
	m.clean = serial - 1
	m.swept = serial
	m.narrow.sweep.clean, m.wide.sweep.clean = m.clean, m.clean
}

// peak is the load of the largest epoch of which records are there.
func (j *journal) peak() (p load) {
	for _, l := range j.counts {
		p.narrow, p.wide = max(p.narrow, l.narrow), max(p.wide, l.wide)
	}
	return p
}
