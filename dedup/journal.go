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

// journal keeps in files what the next process needs if this one is killed: which epochs were
// opened and are not published yet, and their ids. To keep an id takes no system call: the
// files are mapped as shared memory, and a store into them survives a kill -9. They are synced
// every syncEvery, which bounds what a loss of power costs.
//
// The plainer way was to keep the table itself in a mapped file. But a table is written at
// random places, so each id dirties a page of its own, which every sync writes back and
// protects: at 100,000 ids a second a store took 1 to 2 us, and up to 14 ms, and 130 to 480
// MB/s went to the disk (DESIGN.md). A journal is written in order.
//
// The directory holds
//
//	lock       locked by the process that owns the directory; holds its number
//	state      the secret, the epochs (slots), and which segments there are
//	ids-NNNNN  segments: the ids
type journal struct {
	Config           // that of its Memory
	publisher uint64 // publisherOf the name of the publisher of this process
	nudge     func() // wakes Run, which calls prepare

	writers sync.Pool // of *writer

	lock   *os.File
	ran    time.Time // when the process before this one took the lock, right after its start; zero: not known
	state  []byte
	slots  []slot   // in state
	marks  []uint64 // in state: which segments must be there
	secret secret

	// broken is set, with the reason, when the files cannot be trusted to keep what is stored
	// in them: from then on this journal adds nothing (see renew.go).
	broken atomic.Pointer[error]
	failed chan struct{} // capacity 1: wakes Memory.keep after a failure
	turned chan struct{} // capacity 1: wakes Memory.keep to sync the slots after one was written or ended
	moved  bool          // the directory was renamed to make room for its replacement, or is gone; only Memory.keep reads it

	making  sync.Mutex // held while a segment is made
	shortAt time.Time  // when making one failed last; guarded by making

	mu       sync.Mutex // guards the fields down to inUse, and the order of stores into state
	segments []*segment // by index; nil: there is none
	current  *segment   // the segment whose chunks are handed out; nil: none yet
	ready    []*segment // segments with free chunks, in the order in which they will be used
	known    [slotCount]known
	newest   opened              // the epoch opened last
	begun    bool                // a slot that this process has written is on the disk
	short    error               // why the last attempt to make a segment failed; nil: it did not
	inUse    [forecastEpochs]int // how many segments each of the last epochs needed, a ring

	// The next fields are found at the start, for Past and the first Open. The first begin sets
	// counts and keyed to nil: while counts is not nil, this process has begun no epoch.
	counts    map[uint64]load   // records by serial
	keyed     map[uint64]*keyed // keys of the epochs that are still needed, by serial
	made      bool              // no process has begun an epoch in the directory: there was none, or a damaged one
	aside     bool              // what an earlier process kept is lost: the directory was damaged, is gone, or is an earlier copy
	powerLost bool              // power was lost since the newest epoch was opened, and the files may lack what was not synced
	resumable bool              // the newest epoch is not over, so this process may go on with it
	first     firstEpoch
}

// newJournal returns a journal whose directory is not opened yet. nudge wakes Memory.Run.
func newJournal(cfg Config, nudge func()) *journal {
	cfg.boot, cfg.segmentChunks = cmp.Or(cfg.boot, bootID()), cmp.Or(cfg.segmentChunks, segmentChunks)
	if cfg.bootAt == nil {
		cfg.bootAt = bootTime
	}
	if cfg.msync == nil {
		cfg.msync = func(_ string, b []byte) error { return syncMapped(b) }
	}
	j := &journal{Config: cfg, ran: cfg.Ran, publisher: publisherOf(cfg.Publisher), nudge: nudge, failed: make(chan struct{}, 1), turned: make(chan struct{}, 1)}
	j.writers.New = func() any { return new(writer) }
	return j
}

const (
	journalMagic   = 0x5354415453565256 // "VRVSTATS"
	journalVersion = 4                  // upgrade.go reads version 1

	// The state file has a header, the slots, and the marks. A slot is a quarter of a sector of
	// 512 bytes; a loss of power leaves a sector either old or new.
	headerWords = 64
	slotsAt     = 4096
	slotWords   = 16
	marksAt     = slotsAt + slotCount*slotWords*8
	stateBytes  = marksAt + maxSegments*8

	// slotCount is how many epochs may wait to be published: 17 hours of minutes. If more wait,
	// ids are refused. The last startSlots slots are reserved for the first epochs of processes
	// that start while so many wait.
	slotCount  = 1024
	startSlots = 8

	// maxSegments segments of 4 MiB hold two billion ids.
	maxSegments = 4096

	stateName = "state"
	lockName  = "lock"
	tmpSuffix = ".tmp"

	maxSegmentChunks = 1 << 20
)

// The places in the header of the state file, in words. The check is the last word in every
// version: so a damaged header can be distinguished from one of another version.
const (
	headerMagicAt = iota
	headerVersionAt
	headerSlotsAt
	headerSegmentsAt
	headerChunksAt // in a segment
	headerSecretAt
	headerCheckAt = headerWords - 1
)

// slot is the place of an epoch in the state file. It is written in this order: 0 as id, all
// other fields, the id. So a kill between two stores leaves it free or whole. Later only ended
// changes, in one store. If a bit is flipped, the check fails; and one flipped bit cannot make
// the id 0, which would free the slot.
type slot struct {
	id        uint64 // serial<<8 | slotMark; 0: free
	number    uint64
	window    uint64
	logged    uint64 // how many of the ids in the journal the sum in published includes
	published uint64 // sum of the records for the window when the slot was written
	meta      uint64 // follows<<63 | generation<<33 | inexact<<32 | boot
	publisher uint64 // publisherOf the publisher of these records
	check     uint64 // check of the words before it
	ended     uint64 // 0, or one of the marks below, xor id
	_         [slotWords - 9]uint64
}

const (
	slotMark   = 0xa5
	endedMark  = 0x6465646e65767276 // the epoch is published, or no record lacks any of its ids
	doubtMark  = 0x7462756f64767276 // the epoch is not published, and ids may be missing because the disk failed
	syncedMark = 0x6465636e79737672 // as endedMark; in addition all files are on the disk
	markMagic  = 0x6d67657365767276
)

const maxGeneration = 1<<30 - 1

// opened is the decoded content of a slot: an epoch that was opened.
type opened struct {
	serial            uint64
	number            int64
	window            time.Duration
	logged, published uint64
	generation        uint32 // how many times a process took the epoch over into another slot
	publisher         uint64
	inexact           bool
	follows           bool // its window is the one directly after that of the epoch with the serial before
	boot              uint32
	ended, synced     bool
	slot              int
}

func (o *opened) start() time.Time { return time.Unix(0, o.number*int64(o.window)).UTC() }
func (o *opened) end() time.Time   { return o.start().Add(o.window) }

// known is a copy, in memory, of what is needed often from a slot: reading the slot itself may
// fault.
type known struct {
	serial uint64 // 0: free
	ended  bool
}

// firstEpoch is what is found at the start and needed for the first epoch of this process.
type firstEpoch struct {
	pastRead          bool                // journal.past was called
	logged, published uint64              // these fields of the new slot of the newest epoch, if that goes on
	start             time.Time           // start of the last window that has records, or will have records when Past.Recovered is published
	sum               uint64              // of the records for that window
	others            []counter.Published // the last windows of other publishers
	settled           bool                // the newest epoch needs no record, but its slot is not ended
	unfit             error               // the ids of the newest epoch do not fit the tables
}

// damagedError is the error if the content of the directory cannot be trusted.
type damagedError struct{ reason string }

func (e *damagedError) Error() string { return e.reason }

func damaged(format string, args ...any) error {
	return &damagedError{fmt.Sprintf(format, args...)}
}

// cannotKeep returns err, wrapped in errors.ErrUnsupported if the operating system or the file
// system lacks a call: then the caller may go on without a journal.
func cannotKeep(err error) error {
	if durable.Unsupported(err) {
		return fmt.Errorf("ids cannot be kept on disk: %w: %w", errors.ErrUnsupported, err)
	}
	return err
}

// openJournal opens the directory, or makes it. If the directory is damaged, openJournal
// renames it, calls OnSetAside with its new name, and makes a new one.
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
	// With a full disk, the journal refuses ids until there is room; after a failure of the
	// disk, until the disk accepts writes again. In both cases the process starts, and
	// publishes what earlier ones left.
	serves := err == nil || errors.Is(err, ErrFull) || j.broken.Load() != nil && !errors.Is(err, errors.ErrUnsupported)
	if !serves {
		j.release()
		return nil, fmt.Errorf("open %s: %w", j.Dir, err)
	}
	return j, nil
}

// hasState reports whether a directory has the state file of a journal. Without that file it
// has no epochs.
func hasState(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, stateName))
	return !errors.Is(err, os.ErrNotExist)
}

// unmade makes j a journal without files, because there is no room for them. It refuses ids,
// and is replaced when there is room, like a journal that failed.
func (j *journal) unmade(err error) {
	reason := fmt.Errorf("%w: keeping ids on disk: %w", ErrFull, err)
	j.broken.Store(&reason)
	j.moved = true
	j.made, j.ran = true, j.Ran
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
	j.removeReplaced() // these directories have only epochs that were published
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
		j.made, j.ran = true, j.Ran // the process before may have been killed while it made this
	}
	// One that was killed right after it had set a damaged directory aside has begun no epoch.
	j.aside, err = durable.SetAsideSince(j.Dir, j.newest.end())
	return err
}

// takeLock makes this process the owner of the directory, or returns an error that names the
// owner.
func (j *journal) takeLock() error {
	path := filepath.Join(j.Dir, lockName)
	if before, err := os.Stat(path); err == nil {
		j.ran = before.ModTime() // its owner wrote its process number then, below
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
	// The previous owner may have renamed the directory between the opening and the locking.
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
		return nil // the number only serves a message; Btrfs needs room even to make a file shorter
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

// makeFile makes a file of size bytes that begins with words; the rest is zeros. It replaces a
// file of that name, if there is one. The file gets its name only when it is complete and
// synced.
func (j *journal) makeFile(name string, size int, words []uint64) (err error) {
	path := filepath.Join(j.Dir, name)
	f, err := os.OpenFile(path+tmpSuffix, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		_ = f.Close() // it was synced, or making it has failed
		if err != nil {
			_ = os.Remove(path + tmpSuffix) // if this fails, the next start removes it
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

// load reads the state file and the segments. have has the numbers of the segment files that
// exist.
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
		// If the segment had no mark, the last process was killed while it made or removed the
		// segment.
		atomic.StoreUint64(&j.marks[index], markOf(index))
		if s.next < len(s.chunks) {
			j.ready = append(j.ready, s)
		}
	}
	j.powerLost = j.lost(&j.newest) && !j.newest.synced
	return nil
}

// noSpace returns an error if dir has no room for a small file. On a full file system that
// writes every page to a new place, such as Btrfs, a store into a mapped page faults, which
// looks like damage.
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
		return fmt.Errorf("%s has the format %d of a newer version; this version reads up to %d", f.Name(), header[headerVersionAt], journalVersion)
	case header[headerVersionAt] > withoutPublisher && header[headerVersionAt] < journalVersion:
		return fmt.Errorf("%s has the format %d, which this version does not read; it reads %d and %d", f.Name(), header[headerVersionAt], withoutPublisher, journalVersion)
	case header[headerVersionAt] < withoutPublisher || header[headerSlotsAt] != slotCount || header[headerSegmentsAt] != maxSegments ||
		header[headerChunksAt] < 2 || header[headerChunksAt] > maxSegmentChunks:
		return damaged("the state file has a header that no version writes")
	case header[headerVersionAt] == withoutPublisher:
		if err := j.upgrade(f, header); err != nil {
			return err
		}
		return j.loadState() // the state file is now another one
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
		// An epoch has two slots if a process was killed after it had written a new slot for
		// the epoch and before it freed the old one. The newer slot counts.
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

// lost reports whether the machine was started again since o was written. It may have lost
// power, so stores that were not synced may be missing.
func (j *journal) lost(o *opened) bool {
	return o.serial > 0 && o.boot != j.boot && o.boot != 0 && j.boot != 0
}

// owner returns the number that the headers of the segments of this directory have. Those of
// another directory have another number. The secret cannot be computed from it.
func (j *journal) owner() uint64 { return checkOf(j.secret.words()) }

// read returns the content of the slot; its serial is 0 if the slot is free. ok is false if the
// slot is damaged.
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

// words returns the words that the check covers.
func (s *slot) words() []uint64 { return unsafe.Slice(&s.id, 7) }

// write writes o into the slot o.slot, which is free. j.mu is held.
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

// errWaiting is why an epoch for which no slot was free refuses ids.
var errWaiting = fmt.Errorf("%w: %d epochs wait to be published", ErrUnavailable, slotCount-startSlots)

// begin writes a slot for e, which is being opened. It returns the slot, which the caller later
// passes to end, and how many ids of e the tables have already, if an earlier process opened e.
// Ids may be added to e only if begin returns no error.
//
// The slots of the first epoch of a process, and of an epoch whose length differs from the last
// one, are on the disk when begin returns: recreate relies on them. The other slots are synced
// in the background. If power is lost before such a slot is on the disk, the next process makes
// it again (recreate).
func (j *journal) begin(e *counter.Epoch) (of slotOf, had load, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	first := j.counts != nil
	goesOn := first && j.resumable && j.first.pastRead && e.Serial() == j.newest.serial
	if broken := j.broken.Load(); broken != nil { // the journal has failed, and its files may be unmapped
		if goesOn {
			of = j.newest.of()
		}
		if first && j.aside { // the journal that replaces this one does not know that ids of e are lost
			e.MarkInexact()
			j.aside = false
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
	of = o.of() // from here on the slot is to be passed to end, even after a fault
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
		j.free(before.slot) // the new slot is on the disk
	case first && j.first.settled: // the newest epoch was over before it could go on
		j.endLocked(before.of())
	}
	if o.inexact {
		e.MarkInexact()
	}
	j.changed()
	return of, had, nil
}

// opening returns the content for the slot of e, which is being opened.
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
		o.inexact = true // the window has records, so it had ids, and those are not in the journal
	}
	if first {
		o.inexact = o.inexact || j.aside || slices.ContainsFunc(j.first.others, recorded) ||
			j.powerLost && e.Start().Before(j.bootAt())
	}
	return o
}

// freeSlot returns a free slot, and how many are free. A slot that is ended counts as free,
// except that of the newest epoch.
func (j *journal) freeSlot() (i, free int) {
	for n, k := range &j.known {
		if k.serial == 0 || k.ended && k.serial != j.newest.serial {
			i, free = n, free+1
		}
	}
	return i, free
}

// changed wakes Memory.keep, which syncs the slots in the background.
func (j *journal) changed() {
	select {
	case j.turned <- struct{}{}:
	default:
	}
}

// end marks the slot of an epoch as ended: nothing of the epoch is left to be published. It
// does nothing if this process has gone on with the epoch in another slot.
func (j *journal) end(o slotOf) {
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.caught(nil, debug.SetPanicOnFault(true)) // broken keeps the error
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

// slotOf identifies a slot while it has the epoch with this serial. The zero value is no slot.
type slotOf struct {
	slot   int
	serial uint64
}

func (o *opened) of() slotOf { return slotOf{o.slot, o.serial} }

// caught is deferred by functions that store into mapped memory. before is the result of
// debug.SetPanicOnFault(true). If a store faults, because the disk fails or the file was
// truncated, caught makes the journal fail, and stores the error in err if err is not nil.
func (j *journal) caught(err *error, before bool) {
	debug.SetPanicOnFault(before)
	if fault := faultOf(recover()); fault != nil {
		fault = j.fail(fmt.Errorf("%w: a file in %s cannot be written", fault, j.Dir))
		if err != nil {
			*err = fault
		}
	}
}

// damagedByFault is deferred like caught while the files are read at the start: if a part of a
// file cannot be read, the directory counts as damaged.
func damagedByFault(err *error, before bool) {
	debug.SetPanicOnFault(before)
	if fault := faultOf(recover()); fault != nil {
		*err = damaged("%v: a file cannot be read", fault)
	}
}

// faultOf returns the fault that caused a panic, or nil if p is nil. Any other panic goes on.
func faultOf(p any) error {
	switch p := p.(type) {
	case nil:
		return nil
	case interface{ Addr() uintptr }:
		return fmt.Errorf("fault at %#x", p.Addr())
	}
	panic(p)
}

// fail makes the journal refuse ids from now on, and returns the reason. If it is called
// several times, the first reason stays.
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

// problem returns why ids cannot be kept now; empty if they can.
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

// bytes returns the size of all files.
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
	// If busyChunks or more chunks were handed out since the last sync, many new ids arrive.
	// Then the last busyTail chunks, from the last tenth of that time, are left to the next
	// sync: requests are still writing them, and a store into a page that is being written to
	// the disk waits until that is done.
	busyChunks = 256
	busyTail   = 16
)

// sync returns when everything stored before the call is on the disk. With most it may leave
// out the chunks that many requests are writing now (busyTail). It must not run at the same
// time as trim. Syncing pages that are clean takes a microsecond.
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

// syncPart syncs b, which is the named file or the part of it that matters.
func (j *journal) syncPart(name string, b []byte) error {
	if broken := j.broken.Load(); broken != nil {
		return *broken
	}
	if err := j.msync(name, b); err != nil {
		return j.fail(fmt.Errorf("sync %s: %w", filepath.Join(j.Dir, name), err))
	}
	return nil
}

// syncFound syncs the files that an earlier process left, because it may have been killed
// before it did so, and the chunks that load has cleared. The slots of this process are written
// only after that.
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

// close syncs the files and releases the lock. idle: no request is in an epoch any more, so
// close unmaps the files as well.
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

// markSynced records in the slot of the newest epoch, if that is ended, that all files are on
// the disk: a loss of power after this point loses nothing.
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

// release unmaps the files and releases the lock. No request may be inside an epoch that was
// begun in j.
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
		_ = j.lock.Close() // nothing that matters was written to it
	}
	j.segments, j.ready, j.current = nil, nil, nil
	j.slots, j.marks, j.state, j.lock = nil, nil, nil, nil
}

// checkOf returns a CRC of words, which detects every flipped bit, and in the high half its
// complement.
func checkOf(words []uint64) uint64 {
	c := crc32.Checksum(bytesOf(words), durable.Castagnoli)
	return uint64(^c)<<32 | uint64(c)
}

func bytesOf(words []uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), len(words)*8)
}

func markOf(index int) uint64 { return markMagic ^ uint64(index)<<8 }
