package dedup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"verve/counter"
	"verve/internal/setting"
)

// Defaults of the cleaner. With them a table of 64 million slots is swept in about a minute, in
// steps that take one core about 1 ms.
const (
	DefaultCleanupInterval = 250 * time.Millisecond
	DefaultCleanupBatch    = 1 << 18
)

const (
	// forecastEpochs is how many past epochs are remembered to choose the size of the next
	// tables.
	forecastEpochs = 8

	// tightBelow is how many ids before MaxIDs adding becomes exact, under a lock, at the
	// latest (sample adds a sixteenth of MaxIDs). It is larger than the error of the sampled
	// load, and than the number of requests in flight.
	tightBelow = 1 << 16

	// maxExpect keeps the sizes of tables far from an overflow; so many ids are more than the
	// memory of any machine holds.
	maxExpect = 1 << 40

	// With a shorter interval a core would be busy for nothing. With a longer one the ids of
	// past epochs would stay for hours, and a larger step would delay the work that follows it.
	minCleanupInterval = time.Millisecond
	maxCleanupInterval = time.Hour
	maxCleanupBatch    = 1 << 30
)

// Config of a Memory. The zero value of a field is its default.
type Config struct {
	Expect     uint64 // canonical decimals expected in an epoch; more are accepted, too
	ExpectWide uint64 // other ids expected in an epoch
	ExpectAny  uint64 // ids expected in an epoch whose kind is not known: the memory for a kind is allocated when the first id of that kind comes
	MaxIDs     uint64 // ids an epoch may hold, 0: no limit
	MaxBytes   uint64 // bytes that the tables may take, 0: no limit

	CleanupInterval time.Duration // pause between two steps of the cleaner
	CleanupBatch    int           // slots that the cleaner sweeps in a step, at least

	Heap bool // allocate the tables on the Go heap: the race detector observes only that

	// Dir is the directory in which the ids of the open epoch and the unpublished counts are
	// kept for the next process. It is made if it is missing. Empty: nothing is kept.
	Dir string
	// Publisher is the name under which this process publishes its counts. The ids of an epoch
	// that no record has are computed from what the publisher that opened the epoch has
	// published (Past).
	Publisher string
	// Window is the length of the windows. It is needed if the whole state file of Dir is lost:
	// without Window, the windows that were unpublished then get no record.
	Window time.Duration
	// Ran is when a process that was killed began to count in Dir, if that is known from
	// elsewhere: then Dir, if it has no epoch, has lost those of that process.
	Ran time.Time
	// OnSetAside is called when what Dir kept is lost, with the reason. If Dir was damaged, it
	// was renamed to name and a new directory is in its place. If Dir was missing, or is an
	// earlier copy of itself, name is empty. The epochs that were not published are then not
	// exact.
	OnSetAside func(name string, reason error)
	// OnFailure is called when Dir cannot keep ids any more, with the reason. From then on
	// every id gets Unavailable (Full if there was never room to make Dir). OnRepair is called
	// when Dir accepts writes again and the epoch of the failure is published: then ids are
	// taken again. OnFailure may be called from AddMany. Neither may call the Memory.
	OnFailure func(error)
	OnRepair  func() // see OnFailure

	// For tests: the ID of the boot of the machine, the time of that boot, the number of chunks
	// in a segment, a function that is called between the stores of a slot, and one that syncs
	// memory to the disk.
	boot          uint32
	bootAt        func() time.Time
	segmentChunks int
	step          func()
	msync         func(file string, b []byte) error
}

// Memory is the Set in this process's memory. It has two tables whose words are tagged with
// their epoch. The narrow one, with 64 bits for an id, is for canonical decimals. The wide one,
// with 128 bits, is for all others: UUIDs and decimals under a key by their own bits, and any
// other id by a keyed hash (Key).
//
// AddMany allocates nothing while the ids of the epoch are below MaxIDs and the tables do not
// have to grow. For ids without Options, and while MaxIDs is not near, it then takes only one
// lock, that of the journal, once in some dozens of new ids (journal.hand). All methods are
// safe for concurrent use, by the rule of Set; Keys panics before the first Open.
type Memory struct {
	cfg    Config
	secret secret
	arena  *arena

	mu        sync.Mutex           // guards the fields down to busy, and recalled; held for moments
	journal   *journal             // for the epochs that will be opened; nil: nothing is kept
	narrow    tables[narrowBucket] // of canonical decimals; its old ones include released tables of tokens
	wide      tables[wideBucket]   // of all other ids
	loads     [forecastEpochs]load // loads of the epochs retired last, a ring
	retired   int                  // epochs that were retired with ids
	unretired int                  // epochs that were opened and are not retired yet
	spare     *View
	serial    uint64 // of the epoch opened last

	current atomic.Pointer[View] // the View of the epoch opened last; stored with mu held

	// The next fields make sure that the epochs whose words are in the tables are less than
	// half a lap of the tags apart (table.go). No word of an epoch up to clean is in the open
	// tables, and no request is left that could add one. admitted is the last epoch whose ids
	// may enter the tables.
	clean    uint64
	admitted uint64
	swept    uint64           // serial at the last step of the cleaner
	busy     []*counter.Epoch // epochs that may have requests in them, oldest first

	attempts [attemptLocks]sync.Mutex

	recalled struct{ tokens, past *tokens } // from the journal, for the first epoch
	sifted   uint64                         // the last epoch that sift has handled; Run alone uses it

	check chan struct{} // capacity 1: wakes Run: a table may have to grow, or be swept

	grown, resized, reclaimed, fulls atomic.Uint64
}

// View is the State that Open returns: the tables and the journal that one epoch uses. Between
// Open and Retire the tables stay the same; the counters, the fields for MaxIDs, and a failed
// journal may change.
type View struct {
	tag    uint64
	narrow *table[narrowBucket]
	wide   *table[wideBucket]

	// How many sampled new ids each table has: the load is sampleEvery times as large.
	narrowSample, wideSample atomic.Uint64

	serial  uint64
	journal atomic.Pointer[journal] // nil: nothing is kept. If a failed journal had no slot for this epoch, its replacement is stored here.
	kept    slotOf                  // the slot in the journal; guarded by Memory.mu
	before  load                    // ids of this epoch that an earlier process has added

	tokens *tokens // of this epoch
	past   *tokens // of the window directly before this one; nil: it was not opened
	end    int64   // when the next epoch is due, Unix ns

	// tight is set when MaxIDs is near: from then on ids are added one at a time, and MaxIDs is
	// exact.
	tight   atomic.Bool
	refused error      // why this epoch refuses all ids; set in Open, together with tight
	mu      sync.Mutex // guards left
	left    uint64

	memory *Memory
}

// errBehind is why an epoch is refused if words of an epoch half a lap ago may still be in the
// tables.
var errBehind = fmt.Errorf("%w: the slots of past epochs are not reclaimed yet", ErrFull)

// load is how many ids of each kind, and how many tokens, an epoch has.
type load struct{ narrow, wide, tokens uint64 }

func (l load) sum() uint64 { return l.narrow + l.wide }

func (v *View) load() load {
	return load{v.narrowSample.Load() * sampleEvery, v.wideSample.Load() * sampleEvery, v.tokens.load()}
}

// Check returns an error that names the setting if a value is out of bounds. 0 is always
// allowed: it means the default.
func (cfg *Config) Check() error {
	switch {
	case cfg.CleanupInterval != 0 && (cfg.CleanupInterval < minCleanupInterval || cfg.CleanupInterval > maxCleanupInterval):
		return setting.Errorf("cleanup-interval", "want %v to %v", minCleanupInterval, maxCleanupInterval)
	case cfg.CleanupBatch < 0 || cfg.CleanupBatch > maxCleanupBatch:
		return setting.Errorf("cleanup-batch", "want 1 to %d", maxCleanupBatch)
	case max(cfg.Expect, cfg.ExpectWide, cfg.ExpectAny) > maxExpect:
		return setting.Errorf("expect-ids", "want %d at most", uint64(maxExpect))
	}
	if size := tableSize[narrowBucket](cfg.Expect) + tableSize[wideBucket](cfg.ExpectWide); cfg.MaxBytes > 0 && size > cfg.MaxBytes {
		return setting.Errorf("expect-ids", "memory for this many ids takes %d MiB, and only %d MiB, half of the memory limit, are for ids", size>>20, cfg.MaxBytes>>20)
	}
	return nil
}

// NewMemory makes the tables for the expected ids. With a Dir it opens that, and puts the ids
// of the epoch opened last into the tables if the time of that epoch is not over. It returns an
// error if Check does, if the memory for the tables cannot be had, or if Dir is in use, cannot
// be opened, or is of a newer version.
func NewMemory(cfg Config) (*Memory, error) {
	if err := cfg.Check(); err != nil {
		return nil, fmt.Errorf("dedup: %w", err)
	}
	if cfg.CleanupInterval == 0 {
		cfg.CleanupInterval = DefaultCleanupInterval
	}
	if cfg.CleanupBatch == 0 {
		cfg.CleanupBatch = DefaultCleanupBatch
	}
	m := &Memory{
		cfg:    cfg,
		secret: newSecret(),
		arena:  &arena{heap: cfg.Heap, max: cfg.MaxBytes, workers: runtime.GOMAXPROCS(0)},
		check:  make(chan struct{}, 1),
	}
	var peak load
	if cfg.Dir != "" {
		if err := m.openJournal(); err != nil {
			return nil, err
		}
		peak = m.journal.peak()
	}
	err := m.makeTables(load{narrow: max(cfg.Expect, peak.narrow+peak.narrow/4), wide: max(cfg.ExpectWide, peak.wide+peak.wide/4)})
	if err != nil && peak != (load{}) {
		err = m.makeTables(load{narrow: cfg.Expect, wide: cfg.ExpectWide}) // with smaller tables, which grow
	}
	if err != nil {
		if m.journal != nil {
			m.journal.release()
		}
		return nil, err
	}
	if m.journal != nil {
		m.recall()
	}
	m.arena.workers = 1 // from here on requests need the other processors
	return m, nil
}

func (m *Memory) makeTables(expect load) (err error) {
	if m.narrow.open, err = firstTable[narrowBucket](expect.narrow, m.cfg.ExpectAny, m.arena); err != nil {
		return err
	}
	if m.wide.open, err = firstTable[wideBucket](expect.wide, m.cfg.ExpectAny, m.arena); err != nil {
		m.narrow.open.free(m.arena)
	}
	return err
}

// firstTable returns a table for the expected ids of its kind. If only the number of ids of any
// kind is known, the table has no memory until the first id of its kind comes.
func firstTable[B any](expect, anyKind uint64, from *arena) (*table[B], error) {
	if expect == 0 && anyKind > 0 {
		return &table[B]{expect: anyKind}, nil
	}
	return newTable[B](max(expect, anyKind), from)
}

// Open returns the View of e. If the cleaner has made tables of a better size, e is the first
// epoch to use them.
//
// If words or requests of an epoch half a lap ago are still there, e refuses all ids: those old
// words would be taken for words of a later epoch, and old requests could overwrite words of e.
// This happens only if the cleaner or a request stood still for a thousand epochs; with the
// shortest window that is 51 seconds.
func (m *Memory) Open(e *counter.Epoch) counter.State {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.spare
	if v == nil {
		v = m.newView()
	}
	m.spare = nil
	if m.serial == 0 {
		m.startAt(e.Serial())
	}
	m.serial = e.Serial()
	v.serial, v.tag, v.narrow, v.wide = m.serial, tagOf(m.serial), m.narrow.acquire(), m.wide.acquire()
	m.openTokens(e, v)
	m.unretired++
	if m.journal != nil {
		v.journal.Store(m.journal)
		if v.kept, v.before, v.refused = m.journal.begin(e); m.journal.broken.Load() != nil {
			v.refused = nil // the failed journal itself refuses the ids, until it is replaced
		}
		v.narrowSample.Store(v.before.narrow / sampleEvery)
		v.wideSample.Store(v.before.wide / sampleEvery)
	}
	if before := v.before.sum(); m.cfg.MaxIDs > 0 && m.cfg.MaxIDs <= before+tightBelow {
		v.left = less(m.cfg.MaxIDs, before)
		v.tight.Store(true)
	}
	m.dropIdle()
	m.busy = append(m.busy, e)
	if m.serial-m.clean > halfLap {
		v.refused = errBehind
	} else {
		m.admitted = m.serial
	}
	if v.refused != nil {
		v.tight.Store(true)
	}
	if m.serial-m.swept >= passTurns/4 {
		m.nudge() // with such short windows the cleanup interval is too long
	}
	m.current.Store(v)
	return v
}

// dropIdle forgets the epochs that no request can be in any more. It keeps the last two: the
// last one may not be open yet, and until it is, requests enter the one before it. m.mu is
// held.
func (m *Memory) dropIdle() {
	n := 0
	for n+2 < len(m.busy) && m.busy[n].Idle() {
		n++
	}
	m.busy = slices.Delete(m.busy, 0, n)
}

// nudge wakes Run before the cleanup interval is over.
func (m *Memory) nudge() {
	select {
	case m.check <- struct{}{}:
	default:
	}
}

// Retire remembers the load of the epoch, for the size of later tables, marks the epoch as
// published in the journal, and releases its tables.
func (v *View) Retire() {
	m := v.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	if j := v.journal.Load(); j != nil {
		j.end(v.kept)
	}
	v.narrow.refs--
	v.wide.refs--
	m.letTokens(v.tokens)
	m.letTokens(v.past)
	m.unretired--
	if v.refused == nil { // a refused epoch has no ids, so its load would mislead
		m.loads[m.retired%forecastEpochs] = v.load()
		m.retired++
	}
	if m.spare == nil {
		m.spare = m.newView()
	}
}

// Keys implements Set. To read the place of an id in a large table is a cache miss, and takes
// most of the time of an add. With the prefetch, that miss overlaps with what happens between
// Keys and AddMany, and above all with the misses of the other items (BenchmarkAddMany).
//
// A prefetch occupies the processor until it has the physical address, and the address of the
// page of an id is rarely in the translation buffer. These waits overlap only if the prefetches
// follow each other closely. So all Keys are made before the first prefetch: with each prefetch
// right after its Key, a batch under one key took 120 ns an id instead of 80.
func (m *Memory) Keys(items []Item) {
	v := m.current.Load()
	narrow, wide := v.narrow.farLevels.Load(), v.wide.farLevels.Load()
	for i := range items {
		it := &items[i]
		it.Key = m.secret.keyOf(it.ID, it.Options)
	}
	for i := range items {
		if k := &items[i].Key; k.kind != narrowKind {
			v.wide.prefetch(k.hi, wide)
		} else {
			v.narrow.prefetch(k.lo, narrow)
		}
	}
	if len(items) == 1 {
		m.prepare(v, &items[0]) // in a batch addRun does this, some items ahead
	}
}

// AddMany implements Set. With a journal, a record is reserved there before an id goes into the
// table, and written before the next item is judged. If the process is killed in between, the
// request has not been answered yet.
//
// The journal is mapped memory: a store into it faults if the disk fails. To prepare for such a
// fault costs as much as writing a record, so this is done once for a batch. After a fault no
// further item is judged.
func (m *Memory) AddMany(e *counter.Epoch, items []Item, verdicts []Verdict) (err error) {
	v := e.State.(*View)
	j := v.journal.Load() // nil, as is w, if nothing is kept
	var w *writer
	n := 0
	if j != nil {
		w = j.writers.Get().(*writer)
		defer j.writers.Put(w)
		defer func() {
			if err != nil && j.broken.Load() != nil {
				for ; n < len(items); n++ {
					verdicts[n] = Unavailable
				}
			}
		}()
		defer j.caught(&err, debug.SetPanicOnFault(true))
	}
	fresh := uint64(0)
	for ; n < len(items); n++ {
		if items[n].Options != nil {
			unique := fresh
			turned, cause := m.addRun(&optionRun{e: e, v: v, j: j, w: w}, items[n:], verdicts[n:], &n, &unique)
			if err = cmp.Or(err, cause); turned {
				return err
			}
			n, fresh = n-1, unique
			continue
		}
		k := items[n].Key
		var c *cursor
		var p place
		var cause error
		if j != nil {
			c, cause = j.reserve(w, v.serial, int(k.kind))
		}
		if cause == nil {
			p, cause = m.insert(e, v, k, fresh)
		} else {
			p, cause = m.lookFull(v, k, cause)
		}
		switch {
		case cause != nil:
			verdicts[n] = m.refused(cause)
			err = cmp.Or(err, cause)
			continue
		case p == turned:
			return err // the items after it stay Turned, too
		case p == taken:
			if c != nil {
				c.append(k)
			}
			fresh++
		}
		verdicts[n] = verdict(p)
	}
	return err
}

// refused returns the verdict on an id that is refused because of err, and counts it if there
// was no room.
func (m *Memory) refused(err error) Verdict {
	v := Refusal(err)
	if v == Full {
		m.fulls.Add(1)
	}
	return v
}

// insert adds a Key to its table. fresh is how many ids of the same batch are in the tables but
// not counted in e yet.
func (m *Memory) insert(e *counter.Epoch, v *View, k Key, fresh uint64) (place, error) {
	if v.tight.Load() {
		return m.insertTight(v, k)
	}
	if k.kind == narrowKind {
		p, err := m.addNarrow(v, k.lo, false)
		if p == taken && sampled(k.lo) {
			m.sample(e, v, &v.narrowSample, fresh+1)
		}
		return p, err
	}
	p, err := m.addWide(v, k.hi, k.lo, false)
	if p == taken && sampled(k.lo) {
		m.sample(e, v, &v.wideSample, fresh+1)
	}
	return p, err
}

func verdict(p place) Verdict {
	switch p {
	case taken:
		return Unique
	case turned:
		return Turned
	default:
		return Repeat
	}
}

func (m *Memory) addNarrow(v *View, x uint64, look bool) (place, error) {
	for i := range v.narrow.levels {
		l := v.narrow.levels[i].Load()
		if l == nil {
			if look {
				return absent, nil
			}
			if err := grow(m, v.narrow, i, func() []uint64 { return v.narrow.sizes(v.load().narrow) }); err != nil {
				return full, err
			}
			l = v.narrow.levels[i].Load()
		}
		b, rest := l.choose(x)
		p, slot := b.add(rest|v.tag, look)
		if p != full {
			if p == taken && slot >= nearlyFull {
				crowding(m, v.narrow, i)
			}
			return p, nil
		}
		x = l.next(x)
	}
	return full, ErrFull
}

func (m *Memory) addWide(v *View, hi, lo uint64, look bool) (place, error) {
	for i := range v.wide.levels {
		l := v.wide.levels[i].Load()
		if l == nil {
			if look {
				return absent, nil
			}
			if err := grow(m, v.wide, i, func() []uint64 { return v.wide.sizes(v.load().wide) }); err != nil {
				return full, err
			}
			l = v.wide.levels[i].Load()
		}
		b, rest := l.choose(hi)
		p, slot := b.add(rest|v.tag, lo, look)
		if p != full {
			if p == taken && slot >= nearlyFull {
				crowding(m, v.wide, i)
			}
			return p, nil
		}
		hi = l.next(hi)
	}
	return full, ErrFull
}

// grow adds a level because an id found the last one full, and wakes the cleaner, which makes
// the pages of the new level resident.
func grow[B any](m *Memory, t *table[B], have int, sizes func() []uint64) error {
	grown, err := t.grow(have, sizes, m.arena)
	if grown {
		m.grown.Add(1)
		m.nudge()
	}
	return err
}

// crowding asks the cleaner to make the next level ready if i is the last one.
func crowding[B any](m *Memory, t *table[B], i int) {
	if i+1 < maxLevels && t.levels[i+1].Load() == nil && t.checking.CompareAndSwap(false, true) {
		m.nudge()
	}
}

// sample adds a sampled new id, which stands for sampleEvery ids, to the load, and sets tight
// if MaxIDs is near. fresh ids of the same batch are in the tables but not yet counted in e:
// they are counted when their requests leave.
func (m *Memory) sample(e *counter.Epoch, v *View, of *atomic.Uint64, fresh uint64) {
	of.Add(1)
	if m.cfg.MaxIDs == 0 {
		return
	}
	l := v.load()
	if l.narrow+l.wide+tightBelow < m.cfg.MaxIDs-m.cfg.MaxIDs/16 {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.tight.Load() {
		// The flag is set before the count is read: a request that sees the flag waits for
		// v.mu. Requests that did not see it and are not counted yet may exceed MaxIDs, by
		// their number.
		v.tight.Store(true)
		v.left = less(m.cfg.MaxIDs, v.before.sum()+e.Unique()+fresh)
	}
}

// nothingLeft reports whether every new id will be refused.
func (v *View) nothingLeft() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.refused != nil || v.left == 0
}

// insertTight adds a Key with the lock held that guards left, how many more ids MaxIDs allows.
func (m *Memory) insertTight(v *View, k Key) (place, error) {
	if v.refused != nil {
		return full, v.refused
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	look := v.left == 0
	p, err := m.addKey(v, k, look)
	switch p {
	case absent:
		err = ErrFull
	case taken:
		v.left--
	}
	return p, err
}

// addKey adds a Key to its table. With look it only looks it up.
func (m *Memory) addKey(v *View, k Key, look bool) (place, error) {
	if k.kind == narrowKind {
		return m.addNarrow(v, k.lo, look)
	}
	return m.addWide(v, k.hi, k.lo, look)
}

// lookFull judges an id that the journal has no room for; refused is the reason. If the id is
// in the table, it is still a repeat.
func (m *Memory) lookFull(v *View, k Key, refused error) (place, error) {
	if !errors.Is(refused, ErrFull) {
		return full, refused
	}
	if p, err := m.addKey(v, k, true); p == found || p == turned {
		return p, err
	}
	return full, refused
}

// Knows reports whether an id is in v. It adds nothing. Safe for concurrent use between Open
// and Retire of v's epoch.
func (m *Memory) Knows(v *View, k Key) bool {
	p, _ := m.addKey(v, k, true)
	return p == found
}

// Learn adds an id to v, the View of e, but not to the journal. If there is no room it returns
// an error, and Knows returns false for the id. Safe for concurrent use by requests inside e.
func (m *Memory) Learn(e *counter.Epoch, v *View, k Key) (Verdict, error) {
	p, err := m.insert(e, v, k, 0)
	return verdict(p), err
}

// Stats implements Set.
func (m *Memory) Stats() Stats {
	m.mu.Lock()
	narrow, wide := m.narrow.open, m.wide.open
	var refused error
	if v := m.current.Load(); v != nil {
		refused = v.refused
	}
	j := m.journal
	m.mu.Unlock()
	s := Stats{
		Bytes:     m.arena.used.Load(),
		MaxBytes:  m.cfg.MaxBytes,
		Grown:     m.grown.Load(),
		Resized:   m.resized.Load(),
		Reclaimed: m.reclaimed.Load(),
		Full:      m.fulls.Load(),
	}
	s.Fit, s.Estimated = m.fit()
	if j != nil {
		s.Kept, s.Problem = j.bytes(), j.problem()
	}
	if s.Problem == "" && refused != nil {
		s.Problem = refused.Error()
	}
	narrow.addTo(&s)
	wide.addTo(&s)
	return s
}

// Bytes of memory per id in a table that was made for a tenth of the ids and has grown
// (docs/operations.md, Sizing).
const narrowBytes, wideBytes = 14, 28

// fit returns how many ids an epoch can hold: MaxIDs, or fewer if MaxBytes is not enough for
// that many ids of the kinds that the open epoch has. In that case the number is estimated.
func (m *Memory) fit() (ids uint64, estimated bool) {
	if m.cfg.MaxBytes == 0 {
		return m.cfg.MaxIDs, false
	}
	var l load
	if v := m.current.Load(); v != nil {
		l = v.load()
	}
	wide, tokens := 0.0, 0.0
	if n := l.sum(); n > 0 {
		wide, tokens = float64(l.wide)/float64(n), float64(l.tokens)/float64(n)
	}
	// The tokens of two windows are kept at a time.
	ids = max(l.sum(), uint64(float64(m.cfg.MaxBytes)/(narrowBytes*(1-wide)+wideBytes*wide+2*narrowBytes*tokens)))
	if m.cfg.MaxIDs > 0 && m.cfg.MaxIDs <= ids {
		return m.cfg.MaxIDs, false
	}
	return ids, true
}

// Close implements Set. It syncs and closes the journal, and frees the memory, except for the
// tables of epochs that are not retired: a request may still be in one. An error is that of the
// disk.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.narrow.close(m.arena)
	m.wide.close(m.arena)
	if m.journal != nil {
		return m.journal.close(m.unretired == 0)
	}
	return nil
}

// Run implements Set. It is the cleaner: it makes levels ready before they are needed, replaces
// tables of the wrong size, and sweeps the slots of past epochs. Another goroutine syncs the
// journal. Call it once; it returns nil when ctx ends.
func (m *Memory) Run(ctx context.Context) error {
	if m.kept() != nil {
		var keeping sync.WaitGroup
		keeping.Go(func() { m.keep(ctx) })
		defer keeping.Wait()
	}
	tick := time.NewTicker(m.cfg.CleanupInterval)
	defer tick.Stop()
	for {
		due := false
		select {
		case <-ctx.Done():
			return nil
		case <-m.check:
		case <-tick.C:
			due = true
		}
		m.growAhead()
		m.kept().prepare()
		m.sift()
		if due {
			m.resize()
			m.release()
		}
		if due || m.behind() {
			m.reclaim()
		}
	}
}
