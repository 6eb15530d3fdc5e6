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

// Defaults of the cleaner: a table of 64 million slots is swept in about a minute, in steps
// of about 1 ms of one core.
const (
	DefaultCleanupInterval = 250 * time.Millisecond
	DefaultCleanupBatch    = 1 << 18
)

const (
	// forecastEpochs is how many past epochs are remembered to size the next.
	forecastEpochs = 8

	// tightBelow is how far from MaxIDs adding becomes exact, under a lock: the
	// sampled load is off by less, and so many requests are not in flight.
	tightBelow = 1 << 16

	// maxExpect keeps sizes far from overflowing; it is more than any machine's
	// memory.
	maxExpect = 1 << 40

	// A shorter pause would keep a core busy for nothing; after a longer one, or
	// in larger steps, retired ids would stay for hours or hold up the epoch.
	minCleanupInterval = time.Millisecond
	maxCleanupInterval = time.Hour
	maxCleanupBatch    = 1 << 30
)

// Config of a Memory. The zero value of a field is its default.
type Config struct {
	Expect     uint64 // canonical decimals expected in an epoch; more are taken too
	ExpectWide uint64 // other ids expected in an epoch
	ExpectAny  uint64 // ids expected of a kind that is not known: the first one of a kind makes the room for it
	MaxIDs     uint64 // ids an epoch may hold, 0: no limit
	MaxBytes   uint64 // memory the tables may take, 0: no limit

	CleanupInterval time.Duration // pause between two steps of the cleaner
	CleanupBatch    int           // slots swept in a step

	Heap bool // tables on the Go heap: the race detector sees only those

	// Dir is where the ids of the running epoch and the counts not published are
	// kept for the next process. It is made if missing. Empty: nothing is kept.
	Dir string
	// Publisher is the name of the publisher of the counts. Counts that another publisher
	// has published are not subtracted from what is missing.
	Publisher string
	// Window is the length of the windows. Without it the windows of a Dir whose state file is
	// lost as a whole get no record.
	Window time.Duration
	// OnSetAside is called with the new name of a Dir that was damaged, or none if it is
	// missing or an earlier copy, and the reason. A new directory is in the place of a damaged
	// one. The epochs that were not published are not exact.
	OnSetAside func(name string, reason error)
	// OnFailure is called with the reason why Dir cannot keep ids any more: from then on
	// every id gets Unavailable, until OnRepair is called, when Dir accepts writes again
	// and the epoch of the failure is published. Both may be called from AddMany, and must
	// not call the Memory.
	OnFailure func(error)
	OnRepair  func() // see OnFailure

	// For tests: the boot of the machine, when that was, the size of a segment, what is called
	// between the stores of a slot, and what syncs memory to the disk.
	boot          uint32
	bootAt        func() time.Time
	segmentChunks int
	step          func()
	msync         func(file string, b []byte) error
}

// Memory is the Set in this process's memory: two epoch-tagged tables, a
// narrow one for canonical decimals, which are exact in 64 bits, and a wide
// one for the rest, UUIDs by their own 128 bits and other ids by a keyed hash.
//
// AddMany allocates nothing while the ids of the epoch are below MaxIDs and their table does
// not have to grow. For ids without Options it then takes no lock but that of the journal,
// once in some dozens of new ids (journal.hand). All methods are safe for concurrent use, by
// the rule of Set; Keys panics before the first Open.
type Memory struct {
	cfg    Config
	secret secret
	arena  *arena

	mu        sync.Mutex           // guards what follows; held for moments
	journal   *journal             // of the epochs to be opened; nil: nothing is kept
	narrow    tables[narrowBucket] // of canonical decimals, and of tokens that are let go
	wide      tables[wideBucket]   // of all other ids
	loads     [forecastEpochs]load // of the epochs retired last
	retired   int
	unretired int // epochs opened and not retired
	spare     *View
	serial    uint64 // of the epoch opened last

	current atomic.Pointer[View] // of the epoch opened last; stored with mu held

	// These keep words of different epochs less than half a lap apart. No word of an epoch up
	// to clean is in the open tables, and no request is left that could add one. No id of an
	// epoch after admitted was let in.
	clean    uint64
	admitted uint64
	swept    uint64           // serial at the last step of the cleaner
	busy     []*counter.Epoch // that may have requests in them, oldest first

	attempts [attemptLocks]sync.Mutex

	recalled struct{ tokens, past *tokens } // for the first epoch
	sifted   uint64                         // the last epoch that sift has handled; Run alone uses it

	check chan struct{} // capacity 1: a table may have to grow, or be swept

	grown, resized, reclaimed, fulls atomic.Uint64
}

// View is the State that Open returns: the tables and the journal that the epoch uses. Only
// its counters change between Open and Retire.
type View struct {
	tag    uint64
	narrow *table[narrowBucket]
	wide   *table[wideBucket]

	// sampled new ids of each table: a load is sampleEvery times as large.
	narrowSample, wideSample atomic.Uint64

	serial  uint64
	journal atomic.Pointer[journal] // nil: nothing is kept. It is replaced where nothing could be.
	kept    slotOf                  // in the journal; guarded by Memory.mu
	before  load                    // ids that an earlier process has added

	tokens *tokens // of the epoch
	past   *tokens // of the window directly before; nil: there was none
	end    int64   // when the next epoch is due, Unix ns

	// tight is set when MaxIDs is near: from then on adding is serial and exact.
	tight   atomic.Bool
	refused error      // why no id gets in; set in Open together with tight
	mu      sync.Mutex // guards left
	left    uint64

	memory *Memory
}

// errBehind answers the ids of a refused epoch.
var errBehind = fmt.Errorf("%w: the slots of past epochs are not reclaimed yet", ErrFull)

// load is how many ids of each kind an epoch has, and how many tokens.
type load struct{ narrow, wide, tokens uint64 }

func (l load) sum() uint64 { return l.narrow + l.wide }

func (v *View) load() load {
	return load{v.narrowSample.Load() * sampleEvery, v.wideSample.Load() * sampleEvery, v.tokens.load()}
}

// Check refuses values out of bounds. 0 is the default of each.
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
		return setting.Errorf("expect-ids", "so many ids take %d MiB, and %d MiB are allowed: half of the memory limit", size>>20, cfg.MaxBytes>>20)
	}
	return nil
}

// NewMemory makes the tables for the ids expected.
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
		err = m.makeTables(load{narrow: cfg.Expect, wide: cfg.ExpectWide}) // smaller ones that grow
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
	m.arena.workers = 1 // from here on requests need the others
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

// firstTable is a table for the ids of its kind that are expected, or where only the
// number of ids is known, one whose room is made when the first id of its kind comes.
func firstTable[B any](expect, anyKind uint64, from *arena) (*table[B], error) {
	if expect == 0 && anyKind > 0 {
		return &table[B]{expect: anyKind}, nil
	}
	return newTable[B](max(expect, anyKind), from)
}

// Open gives e its view of the tables, those of the right size if the cleaner
// has made such.
//
// If words or requests of an epoch half a lap ago are still there, e gets none
// of its ids in: they would be taken for ids of a later epoch, or be overwritten
// by them. It takes a cleaner or a request that stood still for a thousand
// epochs; with the shortest window that is 51 seconds.
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
			v.refused = nil // the journal refuses, until it is replaced
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
		m.nudge() // the interval is long for such windows
	}
	m.current.Store(v)
	return v
}

// dropIdle forgets the epochs that no request can be in any more. It keeps the last two: the
// last one may not be open yet, and then requests enter the one before it. m.mu is held.
func (m *Memory) dropIdle() {
	n := 0
	for n+2 < len(m.busy) && m.busy[n].Idle() {
		n++
	}
	m.busy = slices.Delete(m.busy, 0, n)
}

// nudge wakes the cleaner before its interval is over.
func (m *Memory) nudge() {
	select {
	case m.check <- struct{}{}:
	default:
	}
}

// Retire keeps the load of the epoch, for the size of later tables, and releases its tables.
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
	if v.refused == nil { // else it has no ids, whatever came
		m.loads[m.retired%forecastEpochs] = v.load()
		m.retired++
	}
	if m.spare == nil {
		m.spare = m.newView()
	}
}

// Keys implements Set. The place of an id in a large table is a cache miss, and most
// of the time that an add takes: what happens between Keys and AddMany happens meanwhile,
// the misses of other ids above all (BenchmarkAddMany).
//
// A prefetch occupies the processor until it has the physical address, and the place of an
// id is rarely in a page whose address it knows. Such waits overlap only where prefetches
// follow each other closely, so all keys are made before the first one: with each prefetch
// behind its key a batch under a key took 120 ns an id in place of 80.
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
		m.prepare(v, &items[0]) // nothing else is done until its places are there
	}
}

// AddMany implements Set. With a journal a key has a place there before it goes into the table,
// and is written there before the next key is looked at. So a kill between the two is one before
// the request was answered.
//
// The journal is mapped memory: a store into it faults when the disk fails. Catching that
// costs as much as writing a record, and is done once for a batch. After a fault no further
// item is judged.
func (m *Memory) AddMany(e *counter.Epoch, items []Item, verdicts []Verdict) (err error) {
	v := e.State.(*View)
	j := v.journal.Load() // nil, as w, where nothing is kept
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
			return err // so are those behind it
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

// refused counts an id that there was no room for, and returns its verdict.
func (m *Memory) refused(err error) Verdict {
	v := Refusal(err)
	if v == Full {
		m.fulls.Add(1)
	}
	return v
}

// insert adds a key to its table. fresh ids that came with it are in there and not
// counted yet.
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

// grow adds a level because an id found the last one full, and has the cleaner make its
// pages resident.
func grow[B any](m *Memory, t *table[B], have int, sizes func() []uint64) error {
	grown, err := t.grow(have, sizes, m.arena)
	if grown {
		m.grown.Add(1)
		m.nudge()
	}
	return err
}

// crowding asks the cleaner to make the next level ready if i is the last.
func crowding[B any](m *Memory, t *table[B], i int) {
	if i+1 < maxLevels && t.levels[i+1].Load() == nil && t.checking.CompareAndSwap(false, true) {
		m.nudge()
	}
}

// sample counts one new id for sampleEvery and sees MaxIDs coming. fresh ids of
// its own request, or of those that arrived with it, are in and not counted: they
// are when they leave.
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
		// First the flag: a request that sees it waits for v.mu. Then the count. Requests
		// that saw no flag and are not counted yet can exceed MaxIDs by their number.
		v.tight.Store(true)
		v.left = less(m.cfg.MaxIDs, v.before.sum()+e.Unique()+fresh)
	}
}

// nothingLeft reports whether no id gets in any more.
func (v *View) nothingLeft() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.refused != nil || v.left == 0
}

// insertTight adds under the lock that guards what is left of MaxIDs.
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

// addKey adds a key to its table. With look it only looks for it.
func (m *Memory) addKey(v *View, k Key, look bool) (place, error) {
	if k.kind == narrowKind {
		return m.addNarrow(v, k.lo, look)
	}
	return m.addWide(v, k.hi, k.lo, look)
}

// lookFull answers an id that has no room in the journal, because of refused: if it is in the
// table it is still a repeat.
func (m *Memory) lookFull(v *View, k Key, refused error) (place, error) {
	if !errors.Is(refused, ErrFull) {
		return full, refused
	}
	if p, err := m.addKey(v, k, true); p == found || p == turned {
		return p, err
	}
	return full, refused
}

// Knows reports whether an id is in v. Nothing is added. Safe for concurrent use
// between Open and Retire of v's epoch.
func (m *Memory) Knows(v *View, k Key) bool {
	p, _ := m.addKey(v, k, true)
	return p == found
}

// Learn adds an id to v, the View of e, and not to the journal. If there is no room, it
// returns an error, and Knows returns false for the id.
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

// Bytes of memory per id, in tables that grew from one ten times too small
// (docs/operations.md, Sizing).
const narrowBytes, wideBytes = 14, 28

// fit returns the most ids that an epoch can hold: MaxIDs, or fewer if the memory
// allowed has no room for as many of the kinds in the open epoch.
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
	// Those of two windows are kept.
	ids = max(l.sum(), uint64(float64(m.cfg.MaxBytes)/(narrowBytes*(1-wide)+wideBytes*wide+2*narrowBytes*tokens)))
	if m.cfg.MaxIDs > 0 && m.cfg.MaxIDs <= ids {
		return m.cfg.MaxIDs, false
	}
	return ids, true
}

// Close gives the memory back, except for the tables of epochs that are not retired: a
// request may still be in one. No Open and no Run may follow.
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

// Run is the cleaner: it makes levels ready before they are needed, replaces
// tables of the wrong size, and sweeps what retired epochs left. Beside it the
// journal is synced.
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
