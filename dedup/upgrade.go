package dedup

import (
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"
)

// A state file of an earlier version becomes one of the present version before anything
// else is read, in one step: a kill leaves the old file or the new one. Segments stay as
// they are, as every chunk that an earlier version wrote means the same here, but for the
// words of tokens. The version before refuses what this one has upgraded.
//
// Version 2 is from before tokens and keys: what it wrote means the same. The words of tokens of
// version 3 are another hash (tokens.recalled). The heads of chunks up to version 4 have no check
// of their records.

// withoutPublisher is the first version. Its slots are half as long as those of today, and the
// publisher of the epoch is not in them.
const withoutPublisher = 1

// shortSlot is the slot of the first version. Its fields mean what those of slot mean.
type shortSlot struct {
	id, number, window, logged, published, meta, check, ended uint64
}

const (
	shortMarksAt = slotsAt + slotCount*8*8
	shortBytes   = shortMarksAt + maxSegments*8
)

// upgrade gives f, a state file with this header, the present version. The header of a file
// whose slots stay is one sector: old or new.
func (j *journal) upgrade(f *os.File, header []uint64) error {
	from := header[headerVersionAt]
	header[headerVersionAt] = journalVersion
	header[headerCheckAt] = checkOf(header[:headerCheckAt])
	var err error
	if from == withoutPublisher {
		err = j.lengthenSlots(f, header)
	} else if _, err = f.WriteAt(bytesOf(header), 0); err == nil {
		err = f.Sync()
	}
	var damage *damagedError
	if err == nil || errors.As(err, &damage) {
		return err
	}
	return fmt.Errorf("the file of version %d cannot be upgraded; it is whole: free %d KiB there, or remove what prevents writing, and start again: %w",
		from, stateBytes>>10, err)
}

// lengthenSlots replaces f, a state file of the first version, by one with today's slots.
// It gets its name when it is complete and on the disk; a start removes what a kill before
// that has left.
func (j *journal) lengthenSlots(f *os.File, header []uint64) error {
	old := make([]uint64, shortBytes/8)
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() != shortBytes {
		return damaged("%s has %d bytes, not %d", stateName, info.Size(), shortBytes)
	}
	if _, err := io.ReadFull(io.NewSectionReader(f, 0, shortBytes), bytesOf(old)); err != nil {
		return damaged("%s cannot be read: %v", stateName, err)
	}
	whole := make([]uint64, stateBytes/8)
	copy(whole, header)
	copy(whole[marksAt/8:], old[shortMarksAt/8:])
	shorts := unsafe.Slice((*shortSlot)(unsafe.Pointer(&old[slotsAt/8])), slotCount)
	slots := unsafe.Slice((*slot)(unsafe.Pointer(&whole[slotsAt/8])), slotCount)
	for i := range shorts {
		var ok bool
		if slots[i], ok = shorts[i].lengthen(j.publisher); !ok {
			return damaged("slot %d of the state file is bad", i)
		}
	}
	return j.makeFile(stateName, stateBytes, whole)
}

// lengthen returns today's slot for s; a free one for a free one. The first version knew
// one publisher: whoever has the directory.
func (s *shortSlot) lengthen(publisher uint64) (to slot, ok bool) {
	if s.id == 0 {
		return to, true
	}
	if s.check != checkOf(unsafe.Slice(&s.id, 6)) {
		return to, false
	}
	to = slot{
		id: s.id, number: s.number, window: s.window, logged: s.logged, published: s.published,
		meta: s.meta &^ (1 << 63), publisher: publisher, ended: s.ended,
	}
	to.check = checkOf(to.words())
	return to, true
}
