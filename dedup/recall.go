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

// openJournal opens the journal in cfg.Dir, and takes over its secret.
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

// Past returns what earlier processes left in Dir. published has what each publisher has
// published, by its name, which is the Config.Publisher of this process or of an earlier one.
// With a Dir, Past must be called once, before the first Open, and its result passed to the
// Counter.
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

// recall puts the ids of the epoch opened last back into the tables if that epoch is not over,
// because the Counter may go on with it. It also recalls tokens: those of that epoch, which are
// needed in the window after it, too, and, if it is not over, those of the window before it.
func (m *Memory) recall() {
	j := m.journal
	past := time.Since(j.newest.end()) // time since its end; negative: it is not over
	// There is no such epoch, or the window after it is over as well.
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
	v.narrowSample.Store(had.narrow / sampleEvery) // the size of added levels depends on these
	v.wideSample.Store(had.wide / sampleEvery)
	j.first.unfit = m.recallIDs(v, segments)
}

// recallIDs adds the ids of the newest epoch to the tables of v. It prefetches the places of
// all ids of a chunk first, as Keys does, so that their cache misses overlap (BenchmarkStart).
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

// recallTokens returns the tokens of an epoch that the journal has. If there is no memory for
// all, some are left out.
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

// eachChunk calls visit with the records of each chunk of an epoch, in m.arena.workers
// goroutines at the same time. Each goroutine stops at its first error; a fault of a file is
// one, too. eachChunk returns one of these errors.
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

// startAt prepares the cleaner for the first epoch of this process. The tables are empty, or
// have the words of the epoch that is to go on.
func (m *Memory) startAt(serial uint64) {
	if j := m.journal; j != nil && j.resumable {
		serial = j.newest.serial
	}
	m.clean = serial - 1
	m.swept = serial
	m.narrow.sweep.clean, m.wide.sweep.clean = m.clean, m.clean
}

// peak returns, for each kind of ids, the largest load of the epochs that have records in the
// journal.
func (j *journal) peak() (p load) {
	for _, l := range j.counts {
		p.narrow, p.wide = max(p.narrow, l.narrow), max(p.wide, l.wide)
	}
	return p
}
