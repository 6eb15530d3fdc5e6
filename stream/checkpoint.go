package stream

import (
	"encoding/binary"
	"encoding/json"
	"hash/crc32"
	"os"
	"slices"

	"verve/internal/durable"
)

// checkpoint is what must be known after the spool was damaged and set aside: the last
// number of this instance's records, and the last window with its sum. Without it
// sequence numbers would begin again, and the count of the last window might be
// published twice.
//
// It has a file of its own next to the spool, which is replaced after each append: a
// checksum, the length, and the checkpoint as JSON. An earlier version had two places in the
// file and wrote into them in turn.
type checkpoint struct {
	Identity string `json:"identity"`
	Instance string `json:"instance"`
	Seq      uint64 `json:"seq"`
	Start    int64  `json:"start"` // of the last window, Unix nanoseconds
	Unique   uint64 `json:"unique"`
	Keyed    bool   `json:"keyed,omitempty"` // some of Unique is under keys: those are lost with the spool
	Turn     uint64 `json:"turn,omitempty"`  // of the two places, the one with the higher number counts
}

const (
	checkpointFile  = "spool.mark"
	checkpointPlace = 4096 // bytes of each of the two places
)

// readCheckpoint returns the last checkpoint, or a zero one if there is none that is whole.
func readCheckpoint(path string) (last checkpoint) {
	b, err := os.ReadFile(path)
	if err != nil {
		return checkpoint{} // there is none yet, or it cannot be read
	}
	for p := range slices.Chunk(b, checkpointPlace) {
		if len(p) < 8 {
			break
		}
		sum, p := binary.BigEndian.Uint32(p), p[4:]
		n := 4 + uint64(binary.BigEndian.Uint32(p))
		var c checkpoint
		if n <= uint64(len(p)) && crc32.Checksum(p[:n], durable.Castagnoli) == sum && json.Unmarshal(p[4:n], &c) == nil && c.Turn >= last.Turn {
			last = c
		}
	}
	last.Turn = 0
	return last
}

// write makes the checkpoint durable.
func (c *checkpoint) write(path string) error {
	value, err := json.Marshal(c)
	if err != nil {
		return err
	}
	value = append(binary.BigEndian.AppendUint32(nil, uint32(len(value))), value...)
	return durable.ReplaceFile(path, append(binary.BigEndian.AppendUint32(nil, crc32.Checksum(value, durable.Castagnoli)), value...), 0o644)
}
