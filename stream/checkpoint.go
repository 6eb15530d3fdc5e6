package stream

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"

	"verve/internal/durable"
)

// checkpoint is what must be known after the spool was damaged and set aside: the last
// number of this instance's records, and the last window with its sum. Without it
// sequence numbers would begin again, and the count of the last window might be
// published twice.
//
// It has a file of its own beside the spool, which is written after each append, into one
// of two places alternately: a write that is cut short leaves the checkpoint before it.
type checkpoint struct {
	Turn     uint64 `json:"turn"` // counts the writes
	Identity string `json:"identity"`
	Instance string `json:"instance"`
	Seq      uint64 `json:"seq"`
	Start    int64  `json:"start"` // of the last window, Unix nanoseconds
	Unique   uint64 `json:"unique"`
	Keyed    bool   `json:"keyed,omitempty"` // some of Unique is under keys: those are lost with the spool
}

const (
	checkpointFile  = "spool.mark"
	checkpointBytes = 4096 // a place: two names of maxName at most, and a page
)

// readCheckpoint returns the newer of the two checkpoints that are whole, or a zero one.
func readCheckpoint(path string) (newest checkpoint) {
	b, err := os.ReadFile(path)
	if err != nil {
		return checkpoint{} // none yet, or as good as none
	}
	for place := range 2 {
		if len(b) < (place+1)*checkpointBytes {
			break
		}
		p := b[place*checkpointBytes : (place+1)*checkpointBytes]
		n := binary.BigEndian.Uint32(p[4:])
		if n > checkpointBytes-8 || crc32.Checksum(p[4:8+n], durable.Castagnoli) != binary.BigEndian.Uint32(p) {
			continue
		}
		var m checkpoint
		if json.Unmarshal(p[8:8+n], &m) == nil && m.Turn >= newest.Turn {
			newest = m
		}
	}
	return newest
}

// write makes the next checkpoint durable.
func (m *checkpoint) write(path string) error {
	m.Turn++
	value, err := json.Marshal(m)
	if err != nil {
		return err
	}
	p := make([]byte, checkpointBytes)
	if len(value) > checkpointBytes-8 {
		return fmt.Errorf("%s: a checkpoint of %d bytes", path, len(value))
	}
	copy(p[8:], value)
	binary.BigEndian.PutUint32(p[4:], uint32(len(value)))
	binary.BigEndian.PutUint32(p, crc32.Checksum(p[4:8+len(value)], durable.Castagnoli))
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(p, int64(m.Turn%2)*checkpointBytes)
	return errors.Join(err, f.Sync(), f.Close())
}
