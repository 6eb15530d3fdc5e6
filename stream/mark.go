package stream

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"os"

	"verve/internal/durable"
)

// mark is what has to be known where the spool is damaged and set aside: how far
// this instance's records were numbered, and what the last one said. Without it
// sequence numbers would begin again, and the count of the last window might be
// published twice.
//
// It has a file of its own beside the spool, written after each append, in two
// places by turns: a write that is cut short leaves the one before.
type mark struct {
	Turn     uint64 `json:"turn"` // counts the writes
	Identity string `json:"identity"`
	Instance string `json:"instance"`
	Seq      uint64 `json:"seq"`
	Start    int64  `json:"start"` // of the last window, Unix nanoseconds
	Unique   uint64 `json:"unique"`
	Keyed    bool   `json:"keyed,omitempty"` // some of Unique is under keys: those are lost with the spool
}

const (
	markFile  = "spool.mark"
	markBytes = 4096 // a place: two names of maxName at most, and a page
)

// readMark returns the newer of the two marks that are whole, or a zero one.
func readMark(path string) (newest mark) {
	b, err := os.ReadFile(path)
	if err != nil {
		return mark{} // none yet, or as good as none
	}
	for place := range 2 {
		if len(b) < (place+1)*markBytes {
			break
		}
		p := b[place*markBytes : (place+1)*markBytes]
		n := binary.BigEndian.Uint32(p[4:])
		if n > markBytes-8 || crc32.Checksum(p[4:8+n], durable.Castagnoli) != binary.BigEndian.Uint32(p) {
			continue
		}
		var m mark
		if json.Unmarshal(p[8:8+n], &m) == nil && m.Turn >= newest.Turn {
			newest = m
		}
	}
	return newest
}

// write makes the next mark durable.
func (m *mark) write(path string) error {
	m.Turn++
	value, err := json.Marshal(m)
	if err != nil {
		return err
	}
	p := make([]byte, markBytes)
	if len(value) > markBytes-8 {
		return fmt.Errorf("%s: a mark of %d bytes", path, len(value))
	}
	copy(p[8:], value)
	binary.BigEndian.PutUint32(p[4:], uint32(len(value)))
	binary.BigEndian.PutUint32(p, crc32.Checksum(p[4:8+len(value)], durable.Castagnoli))
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	if _, err = f.WriteAt(p, int64(m.Turn%2)*markBytes); err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}
