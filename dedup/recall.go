package dedup

import (
	"cmp"
	"errors"
	"fmt"
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
		m.cfg.msync = func(_ string, b []byte) error { return syncMapped(b) }
	}
	if m.cfg.bootAt == nil {
		m.cfg.bootAt = bootTime
	}
	j, err := openJournal(journalConfig{
		dir:           m.cfg.Dir,
		segmentChunks: cmp.Or(m.cfg.segmentChunks, segmentChunks),
		boot:          cmp.Or(m.cfg.boot, bootID()),
		bootAt:        m.cfg.bootAt,
		publisher:     publisherOf(m.cfg.Publisher),
		window:        m.cfg.Window,
		nudge:         m.nudge,
		onFailure:     m.cfg.OnFailure,
		step:          m.cfg.step,
		msync:         m.cfg.msync,
	}, m.cfg.OnSetAside)
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
	past, odd := m.journal.past(m.cfg.Publisher, published)
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
	if j.newest.serial == 0 || past >= j.newest.window {
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
	if had.narrow > 0 { // else there may be no table
		j.first.unfit = m.replay(segments, fillerOf(m, v, m.narrow.open, narrowKind, had.narrow))
	}
	if had.wide > 0 && j.first.unfit == nil {
		j.first.unfit = m.replay(segments, fillerOf(m, v, m.wide.open, wideKind, had.wide))
	}
	if j.first.unfit == nil {
		j.first.unfit = m.replayOptions(v, segments)
	}
}

// recallTokens returns the tokens that the journal has of an epoch. Those that there is
// no memory for are left out.
func (m *Memory) recallTokens(segments []*segment, serial uint64) *tokens {
	n := m.journal.counts[serial].tokens
	t := &tokens{table: table[narrowBucket]{expect: n + n/4}, recalled: true}
	if n == 0 {
		return t
	}
	t.sample.Store(n / sampleEvery)
	_ = each(m.arena.workers, len(segments), m.journal.caught, func(_, i int) error {
		return segments[i].records(serial, func(kind int, words []uint64) error {
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
	})
	return t
}

// replayOptions adds the ids with options of the newest epoch, in any order.
func (m *Memory) replayOptions(v *View, segments []*segment) error {
	return each(m.arena.workers, len(segments), m.journal.caught, func(_, i int) error {
		return segments[i].records(m.journal.newest.serial, func(kind int, words []uint64) error {
			if kind == nameKind || kind <= wideKind {
				return nil
			}
			width := int(layouts[kind].words)
			for at := 0; at+width <= len(words); at += width {
				var err error
				if layouts[kind].wide {
					_, err = m.addWide(v, words[at], words[at+1], false)
				} else {
					_, err = m.addNarrow(v, words[at], false)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// filler inserts the records of a kind into a table that no request has yet.
type filler struct {
	kind    int
	records uint64 // how many there are

	// For the first level:
	table                []byte
	buckets, bucketBytes uint64

	// add adds records as a request would. fill adds those of buckets that no
	// other call of it has at the same time, to a first level that was empty
	// before and that fill alone has written to since: a bit of occupied is a
	// slot of it. It finds no repeats, of which the journal has none.
	add  func(words []uint64) error
	fill func(words []uint64, occupied []uint16) error
}

// fillerOf is the filler of a table of v: t has ids of that kind.
func fillerOf[B any](m *Memory, v *View, t *table[B], kind int, records uint64) filler {
	first, width := t.levels[0].Load(), 1+kind // width in words
	add := func(words []uint64) (err error) {
		if kind == narrowKind {
			_, err = m.addNarrow(v, words[0], false)
		} else {
			_, err = m.addWide(v, words[0], words[1], false)
		}
		return err
	}
	return filler{
		kind: kind, records: records,
		table: first.memory.bytes, buckets: uint64(len(first.buckets)), bucketBytes: uint64(unsafe.Sizeof(first.buckets[0])),
		add: func(words []uint64) error {
			for i := 0; i+width <= len(words); i += width {
				t.prefetch(words[min(i+width*replayAhead, len(words)-width)], 1)
				if err := add(words[i:]); err != nil {
					return err
				}
			}
			return nil
		},
		fill: func(words []uint64, occupied []uint16) error {
			far := 0
			for i := 0; i+width <= len(words); i += width {
				bucket, low := bits.Mul64(words[i], uint64(len(first.buckets))) // as level.choose
				slot, n := takeFree(&occupied[bucket], low, kind)
				if n == slotsPerBucket {
					if err := add(words[i:]); err != nil {
						return err
					}
					continue
				}
				far = max(far, n)
				to := unsafe.Slice((*uint64)(unsafe.Pointer(&first.buckets[bucket])), slotsPerBucket*width)[int(slot)*width:]
				if to[0] = low&^tagMask | v.tag; width > 1 {
					to[1] = words[i+1]
				}
			}
			if far >= nearlyFull {
				crowding(m, t, 0)
			}
			return nil
		},
	}
}

// takeFree takes the slot of a bucket that its add would, the first free one from
// the word's home on, which is n slots from there. n is slotsPerBucket where there
// is none. A bit for a slot is looked at instead of the words, which takes no
// loop whose end is guessed wrong, and waits for no line of the table.
func takeFree(occupied *uint16, word uint64, kind int) (slot uint64, n int) {
	first, at := home(word), slotAt
	free := ^*occupied
	if kind == narrowKind {
		line, other := free>>(first&lineSlots), free>>(first&lineSlots^lineSlots)
		round := -int(first % lineSlots)
		free = uint16(bits.RotateLeft8(uint8(line), round)) | uint16(bits.RotateLeft8(uint8(other), round))<<lineSlots
	} else {
		at = wideSlotAt
		// Now its line first, and the others as wideSlotAt has them.
		if first&wideLineSlots != 0 {
			free = free>>4&0x0f0f | free<<4&0xf0f0
		}
		free = bits.RotateLeft16(free, int(first&(2*wideLineSlots)))
		// Now its home first in its line, and in the others likewise.
		turn := first % wideLineSlots
		low := uint16(0x1111) * (0xf >> turn)
		free = free>>turn&low | free<<(wideLineSlots-turn)&^low
	}
	if n = bits.TrailingZeros16(free); n < slotsPerBucket {
		slot = at(first, uint64(n))
		*occupied |= 1 << slot
	}
	return slot, n
}

const (
	// partBytes of a table at a time are filled: half of the cache that belongs to
	// one core in today's servers, or less.
	partBytes = 1 << 19

	// maxParts bounds the places that a worker writes to in turns: their lines
	// stay in its own cache.
	maxParts = 1 << 11

	// blockWords of a part are put one behind the other: few blocks are left half
	// full, and 1 KiB is long enough to be read in order.
	blockWords = 1 << 7

	// replaySegments at a time are sorted, which takes as much memory as they
	// have on the disk, 128 MiB; fewer where that is not to be had.
	replaySegments = 32

	// replayAhead ids before it is added the place of an id is fetched: so many
	// misses overlap.
	replayAhead = 24
)

// replay inserts the records of the newest epoch into a table, on all processors. In the
// order of arrival each id costs a cache miss or two of a large table: 1.7 s for 46
// million on two cores. So they are first sorted by their place, and one worker fills a
// part of the table at a time (BenchmarkStart).
func (m *Memory) replay(segments []*segment, f filler) error {
	if f.records == 0 {
		return nil
	}
	r := replayer{filler: f, arena: m.arena, j: m.journal, serial: m.journal.newest.serial, workers: runtime.GOMAXPROCS(0)}
	r.shift = bits.Len64(partBytes/f.bucketBytes) - 1
	for (f.buckets-1)>>r.shift >= maxParts {
		r.shift++
	}
	if r.parts = int((f.buckets-1)>>r.shift) + 1; r.parts > 1 {
		// Where there is no room to sort, or not for a level that the table needs
		// beside it, what is in the table by then is found there.
		if err := r.byPlace(segments); !errors.Is(err, ErrFull) {
			return err
		}
	}
	return r.chunks(segments, func(_ int, words []uint64) error { return r.add(words) })
}

// replayer is one replay.
type replayer struct {
	filler
	arena   *arena
	j       *journal
	serial  uint64
	workers int // read once: Go follows the container's limit while it runs

	parts, shift int // of the table: bucket>>shift is the part

	blocks [][blockWords]uint64
	before []uint32 // by block: 1 + the one before it in its chain
}

// chunks calls visit with the records of each chunk of the segments.
func (r *replayer) chunks(segments []*segment, visit func(worker int, words []uint64) error) error {
	return each(r.workers, len(segments), r.j.caught, func(worker, i int) error {
		return segments[i].records(r.serial, func(kind int, words []uint64) error {
			if kind != r.kind {
				return nil
			}
			return visit(worker, words)
		})
	})
}

// byPlace fills the table with the records of so many segments at a time as there
// is memory to sort.
func (r *replayer) byPlace(segments []*segment) error {
	occupied, memory, err := allocate[uint16](r.arena, r.buckets, true)
	if err != nil {
		return err
	}
	defer r.arena.free(memory)
	for group := replaySegments; group > 0; group /= 2 {
		words := min(uint64(min(group, len(segments))*r.j.segmentChunks*chunkWords), r.records*uint64(1+r.kind))
		n := words/blockWords + uint64(r.workers*r.parts) // the last of each may have few
		blocks, memory, err := allocate[[blockWords]uint64](r.arena, n, true)
		if err != nil {
			continue
		}
		defer r.arena.free(memory)
		r.blocks, r.before = blocks, make([]uint32, n)
		for some := range slices.Chunk(segments, group) {
			if err := r.sorted(some, occupied); err != nil {
				return err
			}
		}
		return nil
	}
	return errNoRoom
}

// chain is what a worker has of a part: blocks, of which the last is not full.
type chain struct {
	next uint32 // word to be written, if not the first of a block
	last uint32 // 1 + the last block
}

// sorted puts the records of the segments into blocks, each of one part, and
// fills the table with them.
func (r *replayer) sorted(segments []*segment, occupied []uint16) error {
	chains := make([][]chain, r.workers)
	for w := range chains {
		chains[w] = make([]chain, r.parts)
	}
	var used atomic.Uint32 // blocks
	buffer := unsafe.Slice(&r.blocks[0][0], len(r.blocks)*blockWords)
	width := 1 + r.kind
	err := r.chunks(segments, func(worker int, words []uint64) error {
		mine := chains[worker]
		for i := 0; i+width <= len(words); i += width {
			bucket, _ := bits.Mul64(words[i], r.buckets) // as level.choose
			c := &mine[bucket>>r.shift]
			if c.next%blockWords == 0 {
				block := used.Add(1)
				r.before[block-1], c.last = c.last, block
				c.next = (block - 1) * blockWords
			}
			buffer[c.next] = words[i]
			if width > 1 {
				buffer[c.next+1] = words[i+1]
			}
			c.next += uint32(width)
		}
		return nil
	})
	if err != nil {
		return err
	}
	partBytes := int(r.bucketBytes) << r.shift
	return each(r.workers, r.parts, r.j.caught, func(_, part int) error {
		bytes := r.table[part*partBytes : min((part+1)*partBytes, len(r.table))]
		for i := 0; i < len(bytes); i += 64 {
			prefetch(unsafe.Pointer(&bytes[i]))
		}
		for _, mine := range chains {
			c := mine[part]
			words := (c.next-1)%blockWords + 1 // of the last block
			for block := c.last; block > 0; block = r.before[block-1] {
				if err := r.fill(r.blocks[block-1][:words], occupied); err != nil {
					return err
				}
				words = blockWords
			}
		}
		return nil
	})
}

// each has so many workers call visit with the numbers below n, until one of them
// has an error, and returns that. caught makes one of a fault.
func each(workers, n int, caught func(*error), visit func(worker, i int) error) error {
	errs := make([]error, workers)
	var taken atomic.Int64
	var running sync.WaitGroup
	for w := range errs {
		running.Go(func() {
			defer caught(&errs[w])
			defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
			for errs[w] == nil {
				i := int(taken.Add(1)) - 1
				if i >= n {
					return
				}
				errs[w] = visit(w, i)
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

// resumed returns what the tables have of the epoch just begun, if an earlier
// process opened it.
func (j *journal) resumed(serial uint64) load {
	if serial != j.first.serial {
		return load{}
	}
	return j.first.load
}
