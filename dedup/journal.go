package dedup

import (
	"cmp"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"verve/counter"
	"verve/internal/durable"
)

// journal keeps, in files, what the next process needs where this one is
// killed: which epochs were opened and not yet published, and their ids. It
// takes no system call to keep an id: the files are mapped and shared, and what
// was stored in them is there after a kill -9. They are synced every syncEvery,
// which bounds what a loss of power costs.
//
// The table itself in a mapped file was the plainer way. A table is written at
// random, so each id dirties a page of its own, which every sync writes back
// and protects: at 100,000 ids a second a store took 1 to 2 us and up to 14 ms,
// and the disk 130 to 480 MB/s (DESIGN.md). A journal is written in order.
//
// The directory holds
//
//	lock       locked by the process that owns the directory; holds its number
//	state      the secret, the epochs (slots), and which segments there are
//	ids-NNNNN  segments: the ids
type journal struct {
	Config           // of its Memory
	publisher uint64 // who publishes the counts, as publisherOf
	nudge     func() // wakes Run, which calls prepare

	writers sync.Pool // of *writer

	lock   *os.File
	ran    time.Time // when the process before took the lock: right after its start; zero: not known
	state  []byte
	slots  []slot   // in state
	marks  []uint64 // in state: the segments that must be there
	secret secret

	// broken is set when the files cannot be trusted to take a store or to keep
	// it: from then on no journal of theirs adds anything (see renew.go).
	broken atomic.Pointer[error]
	failed chan struct{} // capacity 1: wakes Memory.keep after a failure
	turned chan struct{} // capacity 1: wakes Memory.keep after a slot was written or ended, to sync it
	moved  bool          // the directory was renamed to make room for the next one; only Memory.keep reads it

	making  sync.Mutex // held while a segment is made
	shortAt time.Time  // when that failed last; guarded by making

	mu       sync.Mutex // guards what follows, and the order of stores in state
	segments []*segment // by index; nil: there is none
	current  *segment   // chunks are taken from
	ready    []*segment // with chunks left, in the order of their use
	known    [slotCount]known
	newest   opened // the epoch opened last
	begun    bool   // a slot that this process has written is on the disk
	short    error  // why no segment could be made, if that was so the last time
	inUse    [forecastEpochs]int

	// Found at the start, for Past and the first Open. begin sets counts and keyed to nil:
	// while counts is not nil, this process has begun no epoch.
	counts    map[uint64]load   // records by serial
	keyed     map[uint64]*keyed // of the epochs that are needed: by key
	made      bool              // no process has begun an epoch in the directory: there was none, or a damaged one
	aside     bool              // a damaged directory was replaced, or one that is gone
	powerLost bool              // power was lost since
	resumable bool              // the newest epoch goes on: its ids are in the tables
	first     firstEpoch
}

// newJournal returns a journal that is not opened yet.
func newJournal(cfg Config, nudge func()) *journal {
	cfg.boot, cfg.segmentChunks = cmp.Or(cfg.boot, bootID()), cmp.Or(cfg.segmentChunks, segmentChunks)
	if cfg.bootAt == nil {
		cfg.bootAt = bootTime
	}
	if cfg.msync == nil {
		cfg.msync = func(_ string, b []byte) error { return syncMapped(b) }
	}
	j := &journal{Config: cfg, publisher: publisherOf(cfg.Publisher), nudge: nudge, failed: make(chan struct{}, 1), turned: make(chan struct{}, 1)}
	j.writers.New = func() any { return new(writer) }
	return j
}

const (
	journalMagic   = 0x5354415453565256 // "VRVSTATS"
	journalVersion = 4                  // the first one: upgrade.go

	// The state file: a header, the slots, the marks. A slot is a quarter of a
	// sector, which a loss of power leaves old or new.
	headerWords = 64
	slotsAt     = 4096
	slotWords   = 16
	marksAt     = slotsAt + slotCount*slotWords*8
	stateBytes  = marksAt + maxSegments*8

	// slotCount epochs may wait to be published: 17 hours of minutes. Above that
	// ids are refused. The last few (startSlots) are for the first epochs of processes that
	// start then.
	slotCount  = 1024
	startSlots = 8

	// maxSegments of 4 MiB are two billion ids.
	maxSegments = 4096

	stateName = "state"
	lockName  = "lock"
	tmpSuffix = ".tmp"

	maxSegmentChunks = 1 << 20
)

// The header of the state file, in words. The check is its last, in every version: this
// distinguishes a damaged header from one of another version.
const (
	headerMagicAt = iota
	headerVersionAt
	headerSlotsAt
	headerSegmentsAt
	headerChunksAt // in a segment
	headerSecretAt
	headerCheckAt = headerWords - 1
)

// slot is the place of an epoch in the state file. It is written in this order: id 0, the
// rest, id. So a kill between two stores leaves it free or whole. Only ended changes later, in
// one store. A flipped bit fails the check; one bit cannot make an id 0, which frees a slot.
type slot struct {
	id        uint64 // serial<<8 | slotMark; 0: free
	number    uint64
	window    uint64
	logged    uint64 // records of the epoch that published covers
	published uint64 // sum of the window's records, as the publisher knew it then
	meta      uint64 // follows<<63 | generation<<33 | inexact<<32 | boot
	publisher uint64 // whose records published is the sum of
	check     uint64 // of the words before it
	ended     uint64 // 0, or a mark below with the serial
	_         [slotWords - 9]uint64
}

const (
	slotMark   = 0xa5
	endedMark  = 0x6465646e65767276 // published, or nothing was missing
	doubtMark  = 0x7462756f64767276 // not published, and ids may be missing: the disk failed
	syncedMark = 0x6465636e79737672 // as endedMark, and all files are on the disk
	markMagic  = 0x6d67657365767276
)

const maxGeneration = 1<<30 - 1

// opened is the content of a slot.
type opened struct {
	serial            uint64
	number            int64
	window            time.Duration
	logged, published uint64
	generation        uint32 // counts the processes that went on with the epoch
	publisher         uint64
	inexact           bool
	follows           bool // its window is the next one after that of the serial before
	boot              uint32
	ended, synced     bool
	slot              int
}

func (o *opened) start() time.Time { return time.Unix(0, o.number*int64(o.window)).UTC() }
func (o *opened) end() time.Time   { return o.start().Add(o.window) }

// known is what this process knows of a slot in memory: a read of the slot may fault.
type known struct {
	serial uint64 // 0: free
	ended  bool
}

// firstEpoch is what the start finds for the first epoch of this process.
type firstEpoch struct {
	pastRead          bool                // journal.past was called
	logged, published uint64              // for the new slot of the newest epoch, if that goes on
	start             time.Time           // of the last window that has records, or will have when Past.Recovered is published
	sum               uint64              // of those records
	others            []counter.Published // the last windows of other publishers
	settled           bool                // the newest epoch is published, but its slot is not ended
	unfit             error               // the ids of the newest epoch do not fit the tables
}

// damagedError is returned if the content of the directory cannot be trusted.
type damagedError struct{ reason string }

func (e *damagedError) Error() string { return e.reason }

func damaged(format string, args ...any) error {
	return &damagedError{fmt.Sprintf(format, args...)}
}

// cannotKeep wraps an error of a system, or a file system, that lacks a call in
// errors.ErrUnsupported: the caller may do without a journal.
func cannotKeep(err error) error {
	if durable.Unsupported(err) {
		return fmt.Errorf("ids cannot be kept on disk: %w: %w", errors.ErrUnsupported, err)
	}
	return err
}

// openJournal opens or makes the directory. A damaged one is renamed, OnSetAside is called
// with its new name, and a new one is made.
func openJournal(cfg Config, nudge func()) (*journal, error) {
	if !mappable {
		return nil, cannotKeep(errors.ErrUnsupported)
	}
	j := newJournal(cfg, nudge)
	err := j.open()
	var damage *damagedError
	if errors.As(err, &damage) {
		if full := noSpace(j.Dir); full != nil {
			j.release()
			return nil, fmt.Errorf("dedup: %s cannot be opened: %w: %w", j.Dir, full, damage)
		}
		left := salvage(filepath.Join(j.Dir, stateName))
		name, asideErr := durable.SetAside(j.Dir)
		if asideErr != nil {
			j.release()
			return nil, fmt.Errorf("dedup: %s is damaged (%w) and cannot be set aside: %w", j.Dir, damage, asideErr)
		}
		j.release()
		if j.OnSetAside != nil {
			j.OnSetAside(name, damage)
		}
		ran := j.ran
		j = newJournal(j.Config, nudge)
		if err = j.open(); err == nil {
			j.ran = ran
			err = j.restore(left)
		}
	}
	if durable.NoSpace(err) && !hasState(j.Dir) {
		j.release()
		j.unmade(err)
		return j, nil
	}
	if err == nil {
		err = j.syncFound()
	}
	if err == nil && len(j.ready) == 0 {
		err = j.extend()
	}
	// Without room ids are refused one by one until there is some, and where the disk
	// failed until it takes writes. Both publish what is left first.
	serves := err == nil || errors.Is(err, ErrFull) || j.broken.Load() != nil && !errors.Is(err, errors.ErrUnsupported)
	if !serves {
		j.release()
		return nil, fmt.Errorf("open %s: %w", j.Dir, err)
	}
	return j, nil
}

// hasState reports whether the directory of a journal has a state file: without one nothing
// in it matters.
func hasState(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, stateName))
	return !errors.Is(err, os.ErrNotExist)
}

// unmade makes j a journal without files, as there is no room for them: it refuses ids, and
// is replaced when there is room, like one that failed.
func (j *journal) unmade(err error) {
	reason := fmt.Errorf("%w: keeping ids on disk: %w", ErrFull, err)
	j.broken.Store(&reason)
	j.moved = true
	j.counts = map[uint64]load{}
	if j.OnFailure != nil {
		j.OnFailure(reason)
	}
}

func (j *journal) open() error {
	if err := durable.MkdirAll(j.Dir); err != nil {
		return err
	}
	if err := j.takeLock(); err != nil {
		return err
	}
	j.removeReplaced() // what it holds was published
	entries, err := os.ReadDir(j.Dir)
	if err != nil {
		return err
	}
	have := map[int]bool{}
	for _, entry := range entries {
		name := entry.Name()
		var index int
		if strings.HasSuffix(name, tmpSuffix) {
			if err := os.Remove(filepath.Join(j.Dir, name)); err != nil {
				return err
			}
		} else if n, err := fmt.Sscanf(name, "ids-%05d", &index); err == nil && n == 1 && name == segmentName(index) && index < maxSegments {
			have[index] = true
		}
	}
	if !hasState(j.Dir) {
		if len(have) > 0 {
			return damaged("the state file is missing")
		}
		if err := j.create(); err != nil {
			return err
		}
	}
	if err := j.load(have); err != nil {
		return err
	}
	if j.newest.serial == 0 {
		j.made, j.ran = true, time.Time{} // the process before may have been killed while it made this
	}
	// One that was killed right after it had set a damaged directory aside has begun no epoch.
	j.aside, err = durable.SetAsideSince(j.Dir, j.newest.end())
	return err
}

// takeLock makes this process the owner of the directory.
func (j *journal) takeLock() error {
	path := filepath.Join(j.Dir, lockName)
	if before, err := os.Stat(path); err == nil {
		j.ran = before.ModTime() // it was written to last then, below
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	taken, err := durable.TryLock(f)
	if err != nil {
		_ = f.Close()
		return err
	}
	if !taken {
		owner := make([]byte, 64)
		n, _ := f.ReadAt(owner, 0)
		_ = f.Close()
		return fmt.Errorf("%s is in use by process %s", j.Dir, strings.TrimSpace(string(owner[:n])))
	}
	j.lock = f
	// The owner before may have renamed the directory between the two calls.
	mine, err := f.Stat()
	if err != nil {
		return err
	}
	if there, err := os.Stat(f.Name()); err != nil || !os.SameFile(mine, there) {
		return fmt.Errorf("%s is in use by another process", j.Dir)
	}
	if err = f.Truncate(0); err == nil {
		_, err = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	}
	if durable.NoSpace(err) {
		return nil // it is for a message only; Btrfs needs room to make a file shorter, too
	}
	return err
}

// create makes the state file.
func (j *journal) create() error {
	header := make([]uint64, headerWords)
	header[headerMagicAt], header[headerVersionAt] = journalMagic, journalVersion
	header[headerSlotsAt], header[headerSegmentsAt], header[headerChunksAt] = slotCount, maxSegments, uint64(j.segmentChunks)
	if j.secret == (secret{}) {
		j.secret = newSecret()
	}
	copy(header[headerSecretAt:], j.secret.words())
	header[headerCheckAt] = checkOf(header[:headerCheckAt])
	if err := j.makeFile(stateName, stateBytes, header); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(j.Dir))
}

// makeFile makes a file of size bytes with these words and zeros behind them, in the place of
// the one of that name, if there is one. The file is complete and synced before it has its name.
func (j *journal) makeFile(name string, size int, words []uint64) (err error) {
	path := filepath.Join(j.Dir, name)
	f, err := os.OpenFile(path+tmpSuffix, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		_ = f.Close() // synced, or given up
		if err != nil {
			_ = os.Remove(path + tmpSuffix) // else the next start does
		}
	}()
	for _, step := range []func() error{
		func() error { return durable.Allocate(f, size) },
		func() error { _, err := f.WriteAt(bytesOf(words), 0); return err },
		f.Sync,
		func() error { return os.Rename(path+tmpSuffix, path) },
		func() error { return durable.SyncDir(j.Dir) },
	} {
		if j.step != nil {
			j.step()
		}
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// load reads the state and the segments that are there.
func (j *journal) load(have map[int]bool) (err error) {
	defer damagedByFault(&err, debug.SetPanicOnFault(true))
	if err := j.loadState(); err != nil {
		return err
	}
	bySerial, err := j.loadSlots()
	if err != nil {
		return err
	}
	needed := map[uint64]bool{}
	for serial, o := range bySerial {
		needed[serial] = !o.ended || serial == j.newest.serial
	}
	j.segments = make([]*segment, maxSegments)
	j.counts, j.keyed = map[uint64]load{}, map[uint64]*keyed{}
	for index := range j.marks {
		switch mark := atomic.LoadUint64(&j.marks[index]); {
		case mark != 0 && mark != markOf(index):
			return damaged("the mark of segment %d is bad", index)
		case mark == 0 && !have[index]:
			continue
		}
		s, err := j.openSegment(index)
		if err != nil {
			return err
		}
		j.segments[index] = s
		if err := s.scan(&j.secret, j.newest.serial, needed, j.counts, j.keyed); err != nil {
			return err
		}
		// A segment without a mark: the last process was killed while it made or removed it.
		atomic.StoreUint64(&j.marks[index], markOf(index))
		if s.next < len(s.chunks) {
			j.ready = append(j.ready, s)
		}
	}
	j.powerLost = j.lost(&j.newest) && !j.newest.synced
	return nil
}

// noSpace returns an error if there is no room for a small file in dir. Without room a file
// system that writes each page to another place, such as Btrfs, ends a store to a mapped page
// with a fault, which looks like damage.
func noSpace(dir string) error {
	path := filepath.Join(dir, "room")
	err := durable.ReplaceFile(path, make([]byte, os.Getpagesize()), 0o600)
	_ = os.Remove(path)
	if durable.NoSpace(err) {
		return err
	}
	return nil
}

func (j *journal) loadState() error {
	f, err := os.OpenFile(filepath.Join(j.Dir, stateName), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	header := make([]uint64, headerWords)
	if n, err := f.ReadAt(bytesOf(header), 0); n < headerWords*8 {
		return damaged("the state file ends in its header: %v", err)
	}
	switch {
	case header[headerCheckAt] != checkOf(header[:headerCheckAt]) || header[headerMagicAt] != journalMagic:
		return damaged("the state file has a bad header")
	case header[headerVersionAt] > journalVersion:
		return fmt.Errorf("%s has the format %d of a newer version; this one knows %d", f.Name(), header[headerVersionAt], journalVersion)
	case header[headerVersionAt] > withoutPublisher && header[headerVersionAt] < journalVersion:
		return fmt.Errorf("%s has the format %d, which this version does not read; it reads %d and %d", f.Name(), header[headerVersionAt], withoutPublisher, journalVersion)
	case header[headerVersionAt] < withoutPublisher || header[headerSlotsAt] != slotCount || header[headerSegmentsAt] != maxSegments ||
		header[headerChunksAt] < 2 || header[headerChunksAt] > maxSegmentChunks:
		return damaged("the state file has a header that no version writes")
	case header[headerVersionAt] == withoutPublisher:
		if err := j.upgrade(f, header); err != nil {
			return err
		}
		return j.loadState() // it is another file now
	}
	if j.state, err = mapWhole(f, stateBytes); err != nil {
		return err
	}
	touch(j.state)
	j.segmentChunks = int(header[headerChunksAt])
	j.secret = secretOf(header[headerSecretAt:])
	j.slots = unsafe.Slice((*slot)(unsafe.Pointer(&j.state[slotsAt])), slotCount)
	j.marks = unsafe.Slice((*uint64)(unsafe.Pointer(&j.state[marksAt])), maxSegments)
	return nil
}

// loadSlots returns the epochs of the slots, by their serial, and sets newest and known.
func (j *journal) loadSlots() (map[uint64]opened, error) {
	bySerial := map[uint64]opened{}
	for i := range j.slots {
		o, ok := j.slots[i].read()
		if !ok {
			return nil, damaged("slot %d of the state file is bad", i)
		}
		if o.serial == 0 {
			continue
		}
		o.slot = i
		// Two slots of one epoch: a process was killed after it had gone on with the epoch,
		// and before it freed the slot that the epoch had.
		if other, twice := bySerial[o.serial]; twice {
			if other.generation == o.generation {
				return nil, damaged("slots %d and %d of the state file are of one epoch", i, other.slot)
			}
			if other.generation > o.generation {
				o, other = other, o
			}
			j.free(other.slot)
		}
		bySerial[o.serial] = o
	}
	for _, o := range bySerial {
		j.known[o.slot] = known{o.serial, o.ended}
		if o.serial > j.newest.serial {
			j.newest = o
		}
	}
	return bySerial, nil
}

// lost reports whether the machine was started again since o was written: with a loss of
// power, as far as is known.
func (j *journal) lost(o *opened) bool {
	return o.serial > 0 && o.boot != j.boot && o.boot != 0 && j.boot != 0
}

// owner is a number that the segments of this directory have in their headers, and those of
// another directory do not. The secret does not follow from it.
func (j *journal) owner() uint64 { return checkOf(j.secret.words()) }

// read returns the content of the slot; serial 0 if it is free. It is not ok if the slot is
// damaged.
func (s *slot) read() (o opened, ok bool) {
	id := atomic.LoadUint64(&s.id)
	if id == 0 {
		return o, true
	}
	o = opened{
		serial: id >> 8, number: int64(s.number), window: time.Duration(s.window),
		logged: s.logged, published: s.published, publisher: s.publisher,
		generation: uint32(s.meta >> 33 & maxGeneration), inexact: s.meta>>32&1 != 0, follows: s.meta>>63 != 0, boot: uint32(s.meta),
	}
	switch s.ended {
	case 0:
	case endedMark ^ id:
		o.ended = true
	case syncedMark ^ id:
		o.ended, o.synced = true, true
	case doubtMark ^ id:
		o.inexact = true
	default:
		return o, false
	}
	return o, id&0xff == slotMark && s.check == checkOf(s.words()) &&
		o.serial > 0 && o.serial < 1<<serialBits && o.window > 0
}

// words are those under the check.
func (s *slot) words() []uint64 { return unsafe.Slice(&s.id, 7) }

// write writes o into its slot, which is free. j.mu is held.
func (j *journal) write(o *opened) {
	meta := uint64(o.generation&maxGeneration)<<33 | uint64(o.boot)
	if o.inexact {
		meta |= 1 << 32
	}
	if o.follows {
		meta |= 1 << 63
	}
	to := &j.slots[o.slot]
	whole := slot{
		id: o.serial<<8 | slotMark, number: uint64(o.number), window: uint64(o.window),
		logged: o.logged, published: o.published, meta: meta, publisher: o.publisher,
	}
	store := func(to *uint64, v uint64) {
		atomic.StoreUint64(to, v) // in this order
		if j.step != nil {
			j.step()
		}
	}
	store(&to.id, 0)
	store(&to.ended, 0)
	store(&to.number, whole.number)
	store(&to.window, whole.window)
	store(&to.logged, whole.logged)
	store(&to.published, whole.published)
	store(&to.meta, whole.meta)
	store(&to.publisher, whole.publisher)
	store(&to.check, checkOf(whole.words()))
	store(&to.id, whole.id) // from here on the slot counts
	j.known[o.slot] = known{o.serial, false}
}

func (j *journal) free(i int) {
	atomic.StoreUint64(&j.slots[i].id, 0)
	if j.step != nil {
		j.step()
	}
	j.known[i] = known{}
}

// errWaiting answers the ids of an epoch that got no slot.
var errWaiting = fmt.Errorf("%w: %d epochs wait to be published", ErrUnavailable, slotCount-startSlots)

// begin writes a slot for e, which is being opened, and returns the slot, which is for end, and
// what the tables have of e, if an earlier process opened it. The ids of e may be added only if
// there is no error.
//
// The slot of the first epoch of a process, and of one of another length than the last, is on
// the disk when begin returns: the next process trusts it. The other slots are synced in the
// background. If power is lost before that, the next process makes such slots again (recreate).
func (j *journal) begin(e *counter.Epoch) (of slotOf, had load, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	first := j.counts != nil
	goesOn := first && j.resumable && j.first.pastRead && e.Serial() == j.newest.serial
	if broken := j.broken.Load(); broken != nil { // meanwhile, and may be closed
		if goesOn {
			of = j.newest.of()
		}
		return of, had, *broken
	}
	defer j.caught(&err, debug.SetPanicOnFault(true))
	if goesOn && j.first.unfit != nil {
		return j.newest.of(), had, j.first.unfit
	}
	if !goesOn && e.Serial() <= j.newest.serial {
		return of, had, fmt.Errorf("%w: epoch %d was opened by an earlier process", ErrUnavailable, e.Serial())
	}
	i, free := j.freeSlot()
	if free == 0 || free <= startSlots && !first {
		return of, had, errWaiting
	}
	o := j.opening(e, first, goesOn)
	o.slot = i
	before := j.newest
	if goesOn {
		had = j.counts[o.serial]
		j.keyed[o.serial].resume(e)
	}
	of = o.of() // from here on it is for end, also after a fault
	j.write(&o)
	if !j.begun || o.window != before.window {
		if err := j.syncPart(stateName, j.state); err != nil {
			return of, had, err
		}
		j.begun = true
	}
	j.newest, j.counts, j.keyed = o, nil, nil
	switch {
	case goesOn:
		j.free(before.slot) // the disk has the new one
	case first && j.first.settled: // its time was over before it could go on
		j.endLocked(before.of())
	}
	if o.inexact {
		e.MarkInexact()
	}
	j.changed()
	return of, had, nil
}

// opening returns the content of the slot of e.
func (j *journal) opening(e *counter.Epoch, first, goesOn bool) opened {
	o := opened{
		serial: e.Serial(), number: e.Number(), window: e.Window(),
		boot: j.boot, publisher: j.publisher, inexact: !e.Exact(),
	}
	if goesOn {
		o.generation = j.newest.generation + 1
		o.logged, o.published = j.first.logged, j.first.published
		o.inexact = o.inexact || j.newest.inexact || j.powerLost || j.aside
		o.follows = j.newest.follows
		return o
	}
	o.follows = o.serial == j.newest.serial+1 && o.number == j.newest.number+1 && o.window == j.newest.window
	recorded := func(p counter.Published) bool { return p.Last.Equal(e.Start()) }
	if j.first.pastRead && recorded(counter.Published{Last: j.first.start}) {
		o.published = j.first.sum
		o.inexact = true // it had ids, as it has records, and they are not in the journal
	}
	if first {
		o.inexact = o.inexact || j.aside || slices.ContainsFunc(j.first.others, recorded) ||
			j.powerLost && e.Start().Before(j.bootAt())
	}
	return o
}

// freeSlot returns a free slot, and how many there are.
func (j *journal) freeSlot() (i, free int) {
	for n, k := range &j.known {
		if k.serial == 0 || k.ended && k.serial != j.newest.serial {
			i, free = n, free+1
		}
	}
	return i, free
}

// changed has the slots synced, in the background.
func (j *journal) changed() {
	select {
	case j.turned <- struct{}{}:
	default:
	}
}

// end marks the slot of an epoch of which nothing is left to be published. It does nothing if
// this process has gone on with the epoch in another slot.
func (j *journal) end(o slotOf) {
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.caught(nil, debug.SetPanicOnFault(true)) // an error is kept in broken
	j.endLocked(o)
}

func (j *journal) endLocked(o slotOf) {
	k := &j.known[o.slot]
	if o.serial == 0 || k.serial != o.serial {
		return
	}
	k.ended = true
	if j.state == nil {
		return // closed
	}
	atomic.StoreUint64(&j.slots[o.slot].ended, endedMark^(o.serial<<8|slotMark))
	j.recycle()
	j.changed()
}

// slotOf names an epoch in its slot.
type slotOf struct {
	slot   int
	serial uint64
}

func (o *opened) of() slotOf { return slotOf{o.slot, o.serial} }

// caught is deferred where mapped memory is stored to, and gets debug.SetPanicOnFault(true): a
// fault there, as of a disk that fails or a file that was cut short, is an error from then on,
// for err, too, if that is not nil.
func (j *journal) caught(err *error, before bool) {
	debug.SetPanicOnFault(before)
	if fault := faultOf(recover()); fault != nil {
		fault = j.fail(fmt.Errorf("%w: a file in %s cannot be written", fault, j.Dir))
		if err != nil {
			*err = fault
		}
	}
}

// damagedByFault is deferred like caught where files are first read: a part that cannot be read
// counts as damage.
func damagedByFault(err *error, before bool) {
	debug.SetPanicOnFault(before)
	if fault := faultOf(recover()); fault != nil {
		*err = damaged("%v: a file cannot be read", fault)
	}
}

// faultOf returns the fault that a panic was about, or nil if there was none. It panics again
// about anything else.
func faultOf(p any) error {
	switch p := p.(type) {
	case nil:
		return nil
	case interface{ Addr() uintptr }:
		return fmt.Errorf("fault at %#x", p.Addr())
	}
	panic(p)
}

// fail makes the journal refuse from now on, with the first reason.
func (j *journal) fail(reason error) error {
	err := fmt.Errorf("%w: %w", ErrUnavailable, reason)
	if j.broken.CompareAndSwap(nil, &err) {
		j.failed <- struct{}{}
		if j.OnFailure != nil {
			j.OnFailure(err)
		}
	}
	return *j.broken.Load()
}

// problem returns the reason why ids cannot be kept now; empty if they can.
func (j *journal) problem() string {
	if broken := j.broken.Load(); broken != nil {
		return (*broken).Error()
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.short != nil && len(j.ready) == 0 && (j.current == nil || j.current.next == len(j.current.chunks)) {
		return j.short.Error()
	}
	return ""
}

// bytes is the size of the files.
func (j *journal) bytes() uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := uint64(len(j.state))
	for _, s := range j.segments {
		if s != nil {
			n += uint64(len(s.memory))
		}
	}
	return n
}

const (
	// If busyChunks or more were handed out since the last sync, many ids come. Then the last
	// busyTail of them, which are of the last tenth of that time, are left to the next sync: a
	// store into a page that is being written to the disk waits until that is done.
	busyChunks = 256
	busyTail   = 16
)

// sync returns when everything stored before the call is on the disk; with most, all but what
// many requests are writing now. It must not run at the same time as trim. Pages that are clean
// cost a microsecond.
func (j *journal) sync(most bool) error {
	const pageChunks = 4096 / chunkBytes
	j.mu.Lock()
	var names []string
	var parts [][]byte
	for _, s := range j.segments {
		if s == nil || s.last == 0 {
			continue
		}
		to := s.next
		if most && s == j.current && s.next-s.synced >= busyChunks {
			to = (s.next - busyTail) / pageChunks * pageChunks
		}
		s.synced = to
		names, parts = append(names, segmentName(s.index)), append(parts, s.memory[:to*chunkBytes])
	}
	j.mu.Unlock()
	for i, b := range parts {
		if err := j.syncPart(names[i], b); err != nil {
			return err
		}
	}
	return j.syncPart(stateName, j.state)
}

// syncPart syncs a file, or what of it matters.
func (j *journal) syncPart(name string, b []byte) error {
	if broken := j.broken.Load(); broken != nil {
		return *broken
	}
	if err := j.msync(name, b); err != nil {
		return j.fail(fmt.Errorf("sync %s: %w", filepath.Join(j.Dir, name), err))
	}
	return nil
}

// syncFound syncs the segments that an earlier process has left, as it may have been killed
// before it did, with what load has cleared in them. The slots are written only afterwards.
func (j *journal) syncFound() error {
	for _, s := range j.segments {
		if s == nil {
			continue
		}
		if err := j.syncPart(segmentName(s.index), s.memory); err != nil {
			return err
		}
	}
	return j.syncPart(stateName, j.state)
}

// close syncs and releases the lock. If idle, no request is in an epoch any more, and it
// unmaps the files as well.
func (j *journal) close(idle bool) error {
	err := j.sync(false)
	if err == nil {
		err = j.markSynced()
	}
	if idle {
		j.release()
	} else if e := j.lock.Close(); err == nil {
		err = e
	}
	return err
}

// markSynced marks the newest epoch as one whose files are on the disk: a loss of power from
// here on loses nothing.
func (j *journal) markSynced() (err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.caught(&err, debug.SetPanicOnFault(true))
	if n := j.newest; n.serial > 0 && j.known[n.slot].ended {
		atomic.StoreUint64(&j.slots[n.slot].ended, syncedMark^(n.serial<<8|slotMark))
		return j.syncPart(stateName, j.state)
	}
	return nil
}

// release unmaps the files and releases the lock. No request may be in an epoch that was
// begun in j any more.
func (j *journal) release() {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, s := range j.segments {
		if s != nil {
			unmapFile(s.memory)
		}
	}
	if j.state != nil {
		unmapFile(j.state)
	}
	if j.lock != nil {
		_ = j.lock.Close() // nothing was written that matters
	}
	j.segments, j.ready, j.current = nil, nil, nil
	j.slots, j.marks, j.state, j.lock = nil, nil, nil, nil
}

// checkOf is a CRC of words, which finds every flipped bit, and its inverse.
func checkOf(words []uint64) uint64 {
	c := crc32.Checksum(bytesOf(words), durable.Castagnoli)
	return uint64(^c)<<32 | uint64(c)
}

func bytesOf(words []uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), len(words)*8)
}

func markOf(index int) uint64 { return markMagic ^ uint64(index)<<8 }
