package stream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"verve/counter"
	"verve/internal/durable"
)

// keyFiles are the files of the keys of records, next to the file of the spool: one for each
// record that has keys. When bbolt had the keys, it copied them and wrote them twice without a
// pause, in which requests waited for 3 to 4 ms. And bbolt never gives back the room that it
// took in a long outage.
//
// A file is on the disk before the transaction that refers to it, by its size and checksum,
// and is removed after the transaction that no longer does. A file without a reference was left
// by a kill, by a transaction that failed, or by a later spool of which this one is an earlier
// copy: sweep distinguishes them.
type keyFiles struct {
	dir    string
	synced bool // the name of dir is on the disk
	loaded bool // the spool is open: read gives way to requests from now on

	testStep func() // called after each change of the disk; nil: none
}

// keyFile is a reference to a file. The record has it, and so has the series while the record is
// one of its last window. Other content has another name: a transaction that failed may be on
// the disk nevertheless, so the file that it refers to stays until the next start.
type keyFile struct {
	index uint64 // of the record
	size  uint64
	sum   uint32 // over index and content
}

const (
	keyFilesDir   = "spool-keys"
	keyFileSuffix = ".keys"
	nextKeyFile   = "next" + keyFileSuffix

	// freedAtOnce is how much of a file is freed in one call, in 20 us or so.
	freedAtOnce = 128 << 10

	// keyFileBytes is how many bytes a reference takes in the spool.
	keyFileBytes = 8 + 8 + 4
)

func (f keyFile) name() string { return fmt.Sprintf("%016x-%08x%s", f.index, f.sum, keyFileSuffix) }

func (f keyFile) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, f.index)
	b = binary.BigEndian.AppendUint64(b, f.size)
	return binary.BigEndian.AppendUint32(b, f.sum)
}

// decodeKeyFile is the reverse of append; b has keyFileBytes.
func decodeKeyFile(b []byte) keyFile {
	return keyFile{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint32(b[16:])}
}

func (k *keyFiles) step() {
	if k.testStep != nil {
		k.testStep()
	}
}

// write makes the file of a record durable. It gives way to requests.
func (k *keyFiles) write(index uint64, keys counter.KeyCounts) (keyFile, error) {
	err := durable.MkdirAll(k.dir)
	if err == nil && !k.synced { // an earlier process may have been killed before its sync
		err = durable.SyncDir(filepath.Dir(k.dir))
	}
	if k.synced = err == nil; err != nil {
		return keyFile{}, err
	}
	k.step()
	next := filepath.Join(k.dir, nextKeyFile)
	f, err := k.fill(next, index, keys)
	if err == nil {
		err = os.Rename(next, filepath.Join(k.dir, f.name()))
	}
	if err != nil {
		_ = os.Remove(next) // if this fails, the next file is written over it
		return keyFile{}, err
	}
	k.step()
	err = durable.SyncDir(k.dir)
	k.step()
	return f, err
}

func (k *keyFiles) fill(path string, index uint64, keys counter.KeyCounts) (f keyFile, err error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return keyFile{}, err
	}
	k.step()
	f = keyFile{index: index, sum: crc32.Checksum(beKey(index), durable.Castagnoli)}
	for _, piece := range keys.Pieces() {
		if _, err = file.Write(piece); err != nil {
			break
		}
		f.size += uint64(len(piece))
		f.sum = crc32.Update(f.sum, durable.Castagnoli, piece)
		k.step()
		counter.Rest()
	}
	if err == nil {
		err = file.Sync()
	}
	return f, errors.Join(err, file.Close())
}

// read returns the keys of a file. It gives way to requests, but not at the start: there are
// none, and a long outage has left thousands of files.
func (k *keyFiles) read(f keyFile) (keys counter.KeyCounts, err error) {
	damaged := func(why any) error { return fmt.Errorf("%w: %s: %v", errDamaged, f.name(), why) }
	file, err := os.Open(filepath.Join(k.dir, f.name()))
	if errors.Is(err, fs.ErrNotExist) {
		return keys, damaged("it is missing")
	}
	if err != nil {
		return keys, err
	}
	defer file.Close()
	sum := crc32.Checksum(beKey(f.index), durable.Castagnoli)
	var part []byte // of a key, at the end of what was read
	var pace *counter.Pace
	if k.loaded {
		pace = new(counter.Pace)
	}
	for left := f.size; left > 0; {
		size := min(left, counter.KeyPiece)
		piece := make([]byte, len(part)+int(size))
		_, err := io.ReadFull(file, piece[copy(piece, part):])
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.EIO):
			return keys, damaged(err)
		case err != nil:
			return keys, err
		}
		left -= size
		sum = crc32.Update(sum, durable.Castagnoli, piece[len(part):])
		if part = keys.AddPacked(piece, pace); len(part) >= counter.MaxPackedKey {
			return keys, damaged("a key that is too long")
		}
		if k.loaded {
			counter.Rest()
		}
	}
	if sum != f.sum || len(part) > 0 {
		return keys, damaged("its checksum differs")
	}
	return keys, nil
}

// sum returns the sums of the keys of files.
func (k *keyFiles) sum(files []keyFile) (counter.KeyCounts, error) {
	var all []counter.KeyCounts
	for _, f := range files {
		keys, err := k.read(f)
		if err != nil {
			return keys, err
		}
		all = append(all, keys)
	}
	return counter.SumKeys(all...), nil
}

// remove removes a file; if that fails, the next start does it. It gives way to requests: to
// free 1.5 MB in one call takes 0.3 ms.
func (k *keyFiles) remove(f keyFile) {
	path := filepath.Join(k.dir, f.name())
	for size := int64(f.size) - freedAtOnce; size > 0; size -= freedAtOnce {
		_ = os.Truncate(path, size)
		k.step()
		counter.Rest()
	}
	_ = os.Remove(path)
	k.step()
	counter.Rest()
}

// sweep removes the files that are not used; if that fails, a later start does it. head is the
// index of the last record. A kill leaves at most a file of the record after it. If there are
// files of later records, this spool is an earlier copy, and all files stay for the later one,
// which may be put back.
func (k *keyFiles) sweep(used map[string]bool, head uint64) {
	entries, _ := os.ReadDir(k.dir)
	var unused []string
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), keyFileSuffix) || used[e.Name()] {
			continue
		}
		digits, _, _ := strings.Cut(e.Name(), "-")
		if index, err := strconv.ParseUint(digits, 16, 64); err == nil && index > head+1 {
			return
		}
		unused = append(unused, e.Name())
	}
	for _, name := range unused {
		_ = os.Remove(filepath.Join(k.dir, name))
	}
}

// setAside renames the directory if there is something in it, and returns the new name.
func (k *keyFiles) setAside(suffix string) (name string, err error) {
	if entries, err := os.ReadDir(k.dir); errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return "", nil
	}
	name = k.dir + suffix
	if err := os.Rename(k.dir, name); err != nil {
		return "", err
	}
	return name, durable.SyncDir(filepath.Dir(name))
}
