package dedup

import (
	"fmt"
	"io"
	"os"
	"unsafe"
)

// A state file of the first version is upgraded to the present version before anything else is
// read, in one step: a kill leaves the old file or the new one. Segments stay as they are: a
// chunk of the first version means the same now, except that its check does not cover its
// records. The first version refuses to open an upgraded directory. The versions in between
// were in no release.

// withoutPublisher is the first version. Its slots are half as long as the present ones, and do
// not contain the publisher of the epoch.
const withoutPublisher = 1

// shortSlot is the slot of the first version. Its fields have the same meaning as those of
// slot.
type shortSlot struct {
	id, number, window, logged, published, meta, check, ended uint64
}

const (
	shortMarksAt = slotsAt + slotCount*8*8
	shortBytes   = shortMarksAt + maxSegments*8
)

// upgrade replaces f, a state file of the first version with the given header, by one of the
// present version. The new file gets its name only when it is complete and on the disk. If the
// process is killed before that, the next start removes the temporary file.
func (j *journal) upgrade(f *os.File, header []uint64) error {
	header[headerVersionAt] = journalVersion
	header[headerCheckAt] = checkOf(header[:headerCheckAt])
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
	if err := j.makeFile(stateName, stateBytes, whole); err != nil {
		return fmt.Errorf("the file of version %d cannot be upgraded. It is undamaged: free %d KiB there, or remove what prevents writing, and start again: %w",
			withoutPublisher, stateBytes>>10, err)
	}
	return nil
}

// lengthen returns s as a slot of the present version; a free slot stays free. In the first
// version only one publisher could use the directory, so publisher is that of this process. It
// returns ok false if s is damaged.
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
