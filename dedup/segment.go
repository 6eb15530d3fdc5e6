package dedup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"verve/counter"
	"verve/internal/durable"
)

// A segment is a file of chunks; the whole file is allocated and mapped. A request that finds
// its id new writes the id into a chunk before it answers, which is a store into memory that
// outlives the process.
//
// A chunk has records of one epoch, by one writer, and is filled from its front. Its first
// word, the head, has the serial of the epoch, the kind of the records, their number, and a
// check of all this and of the records. A record counts only when the number in the head
// includes it. So a kill between any two stores leaves the chunk with or without the record,
// and a chunk need not be cleared before it is used again.
const (
	chunkWords = 64 // half a kilobyte: a turn leaves few chunks partly empty, and heads take 1.6 %
	chunkBytes = chunkWords * 8

	// segmentChunks chunks are 4 MiB, or half a million decimals. At a million ids a second the
	// next segment is made in time, and on a small server little space is unused.
	segmentChunks = 8192

	// A head is check<<48 | kind bit 2<<47 | serial<<8 | kind bit 0<<7 | kind bit 1<<6 |
	// records. The check covers the bits below it and the sum of the records. It detects every
	// flipped bit of a record or of the serial, because checkFactor has no 16 equal bits in a
	// row. A flipped bit of the number or the kind changes which words are summed, and passes
	// the check once in 65,536 times. The first version had only bit 0 of the kind, with zeros
	// for the other two, and its check did not cover the sum.
	serialBits  = 39
	recordMask  = 1<<6 - 1
	checkShift  = 48
	checkFactor = 0x9e3779b97f4a7c15
)

// Kinds of records. narrowKind is a scattered decimal in one word, and wideKind any other id in
// two scattered words. With underKind added, the hash of the key that the id is counted under
// follows; ids under a key are always wide. With tokenKind added, the word of the token comes
// last. nameKind is the name of a key: its hash, its length, its bytes. pairKind is a decimal
// under a key without a token: the hash of the key is in its two words (secret.keyUnder).
const (
	narrowKind  = 0
	wideKind    = 1
	tokenKind   = 2 // added to one of those
	underKind   = 4 // added to wideKind
	nameKind    = 4
	pairKind    = 6
	recordKinds = 8

	nameWords = counter.MaxKeyLen / 8
)

// layouts describes the records of each kind.
var layouts = [recordKinds]struct {
	words uint64 // words in a record; 0: no writer writes this kind
	wide  bool   // the id has two words
	under bool   // the id is under a key, whose hash is the third word, or in the first two
	token bool   // the last word is that of a token
}{
	narrowKind:             {words: 1},
	narrowKind | tokenKind: {words: 2, token: true},

	wideKind:                         {words: 2, wide: true},
	wideKind | tokenKind:             {words: 3, wide: true, token: true},
	wideKind | underKind:             {words: 3, wide: true, under: true},
	wideKind | underKind | tokenKind: {words: 4, wide: true, under: true, token: true},
	pairKind:                         {words: 2, wide: true, under: true},

	nameKind: {words: 2 + nameWords},
}

// chunkRoom is how many records of each kind a chunk has room for.
var chunkRoom = func() (room [recordKinds]uint64) {
	for i, kind := range layouts {
		if kind.words > 0 {
			room[i] = (chunkWords - 1) / kind.words
		}
	}
	return room
}()

type chunk [chunkWords]uint64

func headOf(body, sum uint64) uint64 { return (body^sum)*checkFactor>>checkShift<<checkShift | body }

// bodyOf returns the head, without its check, of a chunk that has no records yet.
func bodyOf(serial uint64, kind int) uint64 {
	k := uint64(kind)
	return k>>2<<47 | serial<<8 | k&1<<7 | k>>1&1<<6
}

// serialOf returns the serial in a head; 0 if the chunk was never used.
func serialOf(head uint64) uint64 { return head >> 8 & (1<<serialBits - 1) }

// parse splits the head of a chunk. ok is false if the head is not one that a writer wrote, or
// if the records do not fit its check.
func (c *chunk) parse() (serial uint64, kind int, records uint64, ok bool) {
	head := c[0]
	body := head & (1<<checkShift - 1)
	serial, records = serialOf(head), body&recordMask
	kind = int(body>>7&1 | body>>6&1<<1 | body>>47<<2)
	if serial == 0 || layouts[kind].words == 0 || records > chunkRoom[kind] {
		return serial, kind, records, false
	}
	var sum uint64
	for _, w := range c.records(kind, records) {
		sum ^= w
	}
	return serial, kind, records, head == headOf(body, sum) || head == headOf(body, 0) // a chunk of the first version
}

// segment is one mapped file. journal.mu guards the fields that change.
type segment struct {
	index  int
	memory []byte
	chunks []chunk // the first holds the header
	next   int     // the next chunk to hand out; those before it were handed out, or are needed
	last   uint64  // serial of the newest epoch that has chunks before next; 0: the segment is free
	tokens uint64  // serial of the newest such epoch that has tokens here
	synced int     // up to which chunk the last sync went
	warm   bool    // its pages were touched since it became free, so that no store has to wait for a page fault
}

// The header of a segment is in the words of its first chunk.
const segmentMagic = 0x5347534449565256 // "VRVIDSGS"

const (
	segmentMagicAt = iota
	segmentIndexAt
	segmentOwnerAt // journal.owner, which differs between directories
	segmentCheckAt
)

func segmentName(index int) string { return fmt.Sprintf("ids-%05d", index) }

// newSegment makes the file of a segment and maps it.
func (j *journal) newSegment(index int) (*segment, error) {
	header := make([]uint64, chunkWords)
	header[segmentMagicAt], header[segmentIndexAt], header[segmentOwnerAt] = segmentMagic, uint64(index), j.owner()
	header[segmentCheckAt] = checkOf(header[:segmentCheckAt])
	if err := j.makeFile(segmentName(index), j.segmentChunks*chunkBytes, header); err != nil {
		return nil, err
	}
	s, err := j.mapSegment(index)
	if err != nil {
		return nil, err
	}
	touch(s.memory)
	s.warm = true
	return s, nil
}

// openSegment maps a segment of an earlier process and checks its header.
func (j *journal) openSegment(index int) (*segment, error) {
	s, err := j.mapSegment(index)
	if errors.Is(err, os.ErrNotExist) {
		return nil, damaged("%s is missing", segmentName(index))
	}
	if err != nil {
		return nil, err
	}
	header := s.chunks[0][:]
	if header[segmentMagicAt] != segmentMagic || header[segmentIndexAt] != uint64(index) ||
		header[segmentOwnerAt] != j.owner() || header[segmentCheckAt] != checkOf(header[:segmentCheckAt]) {
		unmapFile(s.memory)
		return nil, damaged("%s has a bad header", segmentName(index))
	}
	return s, nil
}

// mapSegment maps the file of a segment.
func (j *journal) mapSegment(index int) (*segment, error) {
	f, err := os.OpenFile(filepath.Join(j.Dir, segmentName(index)), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	memory, err := mapWhole(f, j.segmentChunks*chunkBytes)
	if err != nil {
		return nil, err
	}
	return &segment{index: index, memory: memory, chunks: chunksOf(memory), next: 1}, nil
}

// mapWhole maps a file that must have this size.
func mapWhole(f *os.File, size int) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != int64(size) {
		return nil, damaged("%s has %d bytes, not %d", filepath.Base(f.Name()), info.Size(), size)
	}
	return mapFile(f, size)
}

func chunksOf(memory []byte) []chunk {
	return unsafe.Slice((*chunk)(unsafe.Pointer(&memory[0])), len(memory)/chunkBytes)
}

// scan adds the records in s to counts and keyed, and finds the first chunk that may be handed
// out: the one after all chunks of needed epochs, and after all tokens of the newest epoch and
// the one before it.
//
// Chunks of an epoch after newest belong to an epoch whose slot was lost when power was lost.
// Its serial will be used again, so the chunks are cleared.
func (s *segment) scan(secret *secret, newest uint64, needed map[uint64]bool, counts map[uint64]load, keyed map[uint64]*keyed) error {
	for i := 1; i < len(s.chunks); i++ {
		if s.chunks[i][0] == 0 {
			continue
		}
		serial, kind, records, ok := s.chunks[i].parse()
		if !ok {
			return damaged("%s has a bad chunk %d", segmentName(s.index), i)
		}
		if serial > newest {
			atomic.StoreUint64(&s.chunks[i][0], 0)
			continue
		}
		l := counts[serial]
		l.count(kind, records)
		counts[serial] = l
		token := layouts[kind].token && serial+1 >= newest
		if !needed[serial] && !token {
			continue
		}
		s.next, s.last = i+1, max(s.last, serial)
		if token {
			s.tokens = max(s.tokens, serial)
		}
		if (layouts[kind].under || kind == nameKind) && needed[serial] {
			if keyed[serial] == nil {
				keyed[serial] = newKeyed()
			}
			if err := keyed[serial].read(secret, kind, s.chunks[i].records(kind, records)); err != nil {
				return err
			}
		}
	}
	return nil
}

// count adds a number of records of one kind.
func (l *load) count(kind int, records uint64) {
	switch {
	case kind == nameKind:
		return
	case layouts[kind].wide:
		l.wide += records
	default:
		l.narrow += records
	}
	if layouts[kind].token {
		l.tokens += records
	}
}

// records returns the words of the first n records of a chunk.
func (c *chunk) records(kind int, n uint64) []uint64 { return c[1 : 1+n*layouts[kind].words] }

// records calls batch with the records of each chunk of an epoch, until that returns an error,
// and returns the error.
func (s *segment) records(serial uint64, batch func(kind int, words []uint64) error) error {
	for i := range s.chunks[1:] {
		c := &s.chunks[1+i]
		if serialOf(c[0]) != serial {
			continue
		}
		_, kind, records, ok := c.parse()
		if !ok {
			return damaged("%s has a bad chunk %d", segmentName(s.index), 1+i) // scan found it good
		}
		if err := batch(kind, c.records(kind, records)); err != nil {
			return err
		}
	}
	return nil
}

// writer has the chunks that a request writes its new ids to: one of each kind for the open
// epoch, and one of each kind for the epoch before it, in which requests may still be. Only one
// request at a time uses a writer.
type writer struct {
	of [2]struct {
		serial  uint64
		cursors [recordKinds]cursor
	}
}

// cursor is a chunk that is being filled.
type cursor struct {
	chunk *chunk
	body  uint64 // its head without the check
	sum   uint64 // the exclusive or of all words of its records
}

// reserve returns a cursor of w with room for one record of the epoch and kind. It is called
// before the id goes into the table: if the journal has no room, the id must not go there.
func (j *journal) reserve(w *writer, serial uint64, kind int) (*cursor, error) {
	if broken := j.broken.Load(); broken != nil {
		return nil, *broken
	}
	of := &w.of[serial&1]
	if of.serial != serial {
		of.serial = serial
		of.cursors = [recordKinds]cursor{}
	}
	c := &of.cursors[kind]
	if c.chunk == nil || c.body&recordMask == chunkRoom[kind] {
		if err := j.hand(c, serial, kind); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// append adds the record of a Key. When it returns, the record survives a kill of the process.
//
// The stores need not be atomic. While this process lives no other goroutine reads these words.
// The compiler keeps the order of the stores, because it does not know that they go to
// different words. A kill stops a thread between two instructions, and all stores before that
// are done. Atomic stores took 6 ns more (BenchmarkAddKept).
func (c *cursor) append(k Key) {
	n := c.body & recordMask
	if k.kind == narrowKind {
		c.chunk[1+n] = k.lo
	} else {
		c.chunk[1+2*n], c.chunk[2+2*n] = k.hi, k.lo
		c.sum ^= k.hi
	}
	c.sum ^= k.lo
	c.count()
}

// count updates the head, so that the record that was just written counts.
func (c *cursor) count() {
	c.body++
	c.chunk[0] = headOf(c.body, c.sum)
}

// put adds a record that consists of words.
func (c *cursor) put(words []uint64) {
	n := int(c.body&recordMask) * len(words)
	copy(c.chunk[1+n:], words)
	for _, w := range words {
		c.sum ^= w
	}
	c.count()
}

// hand makes c a cursor in the next free chunk.
func (j *journal) hand(c *cursor, serial uint64, kind int) (err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.caught(&err, debug.SetPanicOnFault(true))
	if broken := j.broken.Load(); broken != nil {
		return *broken
	}
	for j.current == nil || j.current.next == len(j.current.chunks) {
		if len(j.ready) > 0 {
			j.current = j.ready[0]
			j.ready = slices.Delete(j.ready, 0, 1)
			continue
		}
		j.mu.Unlock()
		err := j.extend()
		j.mu.Lock()
		if err != nil {
			return err
		}
	}
	s := j.current
	body := bodyOf(serial, kind)
	atomic.StoreUint64(&s.chunks[s.next][0], headOf(body, 0))
	*c = cursor{chunk: &s.chunks[s.next], body: body}
	s.next++
	s.last = max(s.last, serial)
	if layouts[kind].token {
		s.tokens = max(s.tokens, serial)
	}
	if s.next == len(s.chunks)/2 && (len(j.ready) == 0 || !j.ready[0].warm) {
		j.nudge()
	}
	return nil
}

// retryExtend is the pause after an attempt to make a segment failed: without it, every request
// would try on a full disk.
const retryExtend = 200 * time.Millisecond

// extend makes a segment ready if none is. If it fails, it returns ErrFull or ErrUnavailable
// with the reason.
func (j *journal) extend() (err error) {
	j.making.Lock()
	defer j.making.Unlock()
	j.mu.Lock()
	index, ready, short := slices.Index(j.segments, nil), len(j.ready), j.short
	j.mu.Unlock()
	broken := j.broken.Load()
	switch {
	case broken != nil:
		return *broken
	case ready > 0:
		return nil
	case short != nil && time.Since(j.shortAt) < retryExtend:
		return short
	case index < 0:
		return errNoRoom // only after two billion ids
	}
	s, err := j.newSegment(index)
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.caught(&err, debug.SetPanicOnFault(true))
	if err != nil {
		kind := ErrUnavailable
		if durable.NoSpace(err) {
			kind = ErrFull
		}
		j.shortAt = time.Now()
		j.short = fmt.Errorf("%w: keeping ids on disk: %w", kind, err)
		return j.short
	}
	if broken := j.broken.Load(); broken != nil {
		unmapFile(s.memory)
		return *broken
	}
	j.short = nil
	j.segments[index] = s
	atomic.StoreUint64(&j.marks[index], markOf(index))
	j.ready = append(j.ready, s)
	return nil
}

// prepare makes the next segment ready when the present one is half full, so that requests do
// not have to. If the next one is a segment that is used again, prepare touches its pages:
// after a sync the first store into each page is a fault, which has to wait if the disk is
// writing just then. j may be nil.
func (j *journal) prepare() {
	if j == nil {
		return // no ids are kept
	}
	j.mu.Lock()
	low := j.current == nil || j.current.next >= len(j.current.chunks)/2
	none := len(j.ready) == 0
	j.mu.Unlock()
	switch {
	case low && none:
		_ = j.extend() // a request that finds no room tries it again and gets the error
	case low:
		j.making.Lock() // so that trim does not unmap the segment
		defer j.making.Unlock()
		for s := j.coldest(); s != nil; s = j.coldest() {
			touch(s.memory)
		}
	}
}

// coldest looks at the two segments that will be used next. It returns the first one that was
// not touched, and marks it as touched; nil if both were.
func (j *journal) coldest() *segment {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, s := range j.ready[:min(2, len(j.ready))] {
		if !s.warm {
			s.warm = true
			return s
		}
	}
	return nil
}

// recycle frees the segments that are not needed. A segment is needed while it has records of
// an unpublished epoch or of the newest epoch, or tokens of the epoch before the newest. j.mu
// is held.
func (j *journal) recycle() {
	floor := j.newest.serial
	for i := range j.slots {
		if k := &j.known[i]; k.serial > 0 && !k.ended {
			floor = min(floor, k.serial)
		}
	}
	inUse := &j.inUse[j.newest.serial%forecastEpochs]
	*inUse = 0
	for _, s := range j.segments {
		if s == nil || s.last == 0 {
			continue
		}
		*inUse++
		if s.last >= floor || s.tokens > 0 && s.tokens+1 >= j.newest.serial {
			continue
		}
		s.next, s.last, s.tokens, s.synced, s.warm = 1, 0, 0, 0, false
		if s != j.current && !slices.Contains(j.ready, s) {
			j.ready = append(j.ready, s)
		}
	}
}

// trim removes one segment if there are more than the last epochs needed. It must not run at
// the same time as sync.
func (j *journal) trim() (err error) {
	defer j.caught(&err, debug.SetPanicOnFault(true))
	s := j.spareSegment()
	if s == nil {
		return nil
	}
	// Writers may still point to chunks of this segment, but only to those of epochs that are
	// published. No request is in such an epoch, so nothing is written there.
	atomic.StoreUint64(&j.marks[s.index], 0)
	// A mark without its file would count as damage. So the cleared mark must be on the disk
	// first: after a loss of power the removal may be there, but not a store that was only in
	// the page cache.
	if err := j.syncPart(stateName, j.state); err != nil {
		return err
	}
	j.making.Lock()
	unmapFile(s.memory)
	j.making.Unlock()
	err = os.Remove(filepath.Join(j.Dir, segmentName(s.index)))
	j.mu.Lock()
	defer j.mu.Unlock()
	j.segments[s.index] = nil // from here on another segment may get this index
	return err
}

// spareSegment takes a free segment out of ready, if more segments exist than are needed; else
// it returns nil.
func (j *journal) spareSegment() *segment {
	j.mu.Lock()
	defer j.mu.Unlock()
	have := 0
	for _, s := range j.segments {
		if s != nil {
			have++
		}
	}
	i := slices.IndexFunc(j.ready, func(s *segment) bool { return s.last == 0 })
	if i < 0 || have <= slices.Max(j.inUse[:])+2 { // one being filled, one ready
		return nil
	}
	s := j.ready[i]
	j.ready = slices.Delete(j.ready, i, i+1)
	return s
}
