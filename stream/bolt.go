package stream

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"verve/counter"
	"verve/internal/durable"
)

// boltStore is the spool's file. bbolt is copy on write with two checksummed
// meta pages: a kill or power loss leaves the last committed transaction. It
// does not checksum data pages, so every value carries its own.
//
// A commit is two fdatasyncs. That is once per window for the append and once
// per batch for each sink's acknowledgement, so no batching is built on top.
//
// The keys of records are in files beside it. Each is removed when its record is and its
// window is no longer the last one of its series.
type boltStore struct {
	db       *bolt.DB
	instance string // is written again with each record: there may have been no room for it alone

	found    state // at the start, for load
	keyFiles *keyFiles

	// The state found at the start, as put and advance have changed it. The spool's lock is held.
	series  map[string]series
	removed uint64 // all records up to this index

	// broken is set when a write ended in a panic. bbolt then reads the same file to
	// roll back, may fault there again, and keeps its lock: the next write would wait
	// for ever, and readiness and metrics with it.
	broken atomic.Pointer[error]
}

var (
	bucketMeta    = []byte("meta")    // the keys below
	bucketSeries  = []byte("series")  // identity -> seq, start, unique
	bucketCursors = []byte("cursors") // sink -> index
	bucketRecords = []byte("records") // index -> record
	bucketPoison  = []byte("poison")  // index, sink -> reason, record, its keys

	// Only in a file of version 3: a record or a series has had keys.
	bucketKeyFiles = []byte("key-files") // index -> keyFile of the record

	// Only of version 2, and what such a version has left: the keys themselves.
	bucketRecordKeys = []byte("record-keys") // index -> the keys of the record
	bucketSeriesKeys = []byte("series-keys") // identity -> the keys of its last window

	keyVersion  = []byte("version")
	keyInstance = []byte("instance")
	keyHead     = []byte("head")
)

const (
	// spoolVersion is the newest version that this program reads. A file begins with
	// version 1 and becomes one of version 3 when there are keys to keep.
	spoolVersion = 3

	// ownerSuffix ends the name of the file that has the id of the spool's process.
	ownerSuffix = ".owner"

	// lockWait is how long a starting process waits until one that is ending has
	// released the file.
	lockWait = 2 * time.Second

	// mapped is how much of the address space is reserved for the file: three million
	// records. The file grows by growBy; a record takes 300 bytes or so.
	mapped = 1 << 30
	growBy = 16 << 10
)

var (
	errDamaged = errors.New("spool file is damaged")
	errNewer   = errors.New("was written by a newer version of this program")
)

// openBolt opens path, or sets it aside and starts a new one.
func openBolt(path string) (b *boltStore, setAside string, err error) {
	b, err = openBoltOnce(path)
	if !errors.Is(err, errDamaged) {
		return b, "", err
	}
	setAside, rerr := durable.SetAside(path)
	if rerr == nil {
		_, rerr = keyFilesOf(path).setAside(strings.TrimPrefix(setAside, path))
	}
	if rerr != nil {
		return nil, setAside, fmt.Errorf("%w; setting it aside: %w", err, rerr)
	}
	b, err = openBoltOnce(path)
	return b, setAside, err
}

func openBoltOnce(path string) (b *boltStore, err error) {
	// bbolt trusts its pages: it panics on one that makes no sense, and reads
	// beyond the end of a file cut short fault. Both mean the same here. On
	// this path the mapping and the descriptor of the damaged file may leak,
	// once, which is the price of going on.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			b, err = nil, fmt.Errorf("%w: %v", errDamaged, r)
		}
	}()

	info, statErr := os.Stat(path)
	fresh := errors.Is(statErr, os.ErrNotExist)
	blank := fresh || statErr == nil && info.Size() == 0
	if statErr == nil && info.Mode().IsRegular() && info.Size() > 0 && info.Size() < int64(2*os.Getpagesize()) {
		// bbolt has no sentinel for it. An empty file is one that was created
		// and not written before a crash: bbolt initialises it.
		return nil, fmt.Errorf("%w: %d bytes do not hold its header", errDamaged, info.Size())
	}
	var db *bolt.DB
	err = durable.Retry(func() (err error) {
		db, err = bolt.Open(path, 0o644, &bolt.Options{
			Timeout:      lockWait,
			FreelistType: bolt.FreelistMapType,
			// The freelist stays synced: without it bbolt rebuilds it in a goroutine
			// of its own, where a panic about a damaged page could not be caught.
			NoFreelistSync: false,
			// A file that outgrows its mapping is mapped anew, and where that is
			// interrupted bbolt has none. Address space costs nothing.
			InitialMmapSize: mapped,
		})
		return numbered(err)
	})
	switch {
	case err == nil:
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("%s is in use by %s", path, owner(path+ownerSuffix))
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrVersionMismatch),
		errors.Is(err, berrors.ErrChecksum), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	case blank && durable.NoSpace(err):
		// bbolt may have written a part.
		emptied(path)
		return nil, err
	case durable.Unsupported(err), errors.Is(err, syscall.ENOLCK):
		return nil, fmt.Errorf("%s: the file system does not have the locks (flock), mappings and syncs that the spool needs; use another one, or none: %w", path, err)
	default:
		// Permissions, a read-only disk, a directory in the way: the file may be
		// sound, so it is left alone.
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	db.AllocSize = growBy
	b = &boltStore{db: db, keyFiles: keyFilesOf(path)}
	if err := b.init(); err != nil {
		db.Close()
		return nil, err
	}
	if fresh {
		if err := durable.SyncDir(filepath.Dir(path)); err != nil {
			db.Close()
			return nil, err
		}
	}
	// Only for the message to a second process, which can do without.
	_ = os.WriteFile(path+ownerSuffix, fmt.Appendf(nil, "%d\n", os.Getpid()), 0o644)
	return b, nil
}

// emptied removes what was written into a new file. The file itself stays, as another
// process may wait for its lock.
func emptied(path string) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer f.Close()
	if taken, err := durable.TryLock(f); taken && err == nil {
		_ = f.Truncate(0) // else the next open sets it aside
	}
}

// owner describes the process that has the spool, by the file beside it.
func owner(path string) string {
	if b, err := os.ReadFile(path); err == nil && len(b) > 0 {
		return "process " + strings.TrimSpace(string(b))
	}
	return "another process"
}

// keyFilesOf returns the files of the keys beside that of a spool.
func keyFilesOf(path string) *keyFiles {
	return &keyFiles{dir: filepath.Join(filepath.Dir(path), keyFilesDir)}
}

// buckets are those that every file has.
var buckets = [][]byte{bucketMeta, bucketSeries, bucketCursors, bucketRecords, bucketPoison}

// init creates what a new file needs and reads every page that is in use, so
// that damage shows here, where it can be dealt with, and not in the middle of a
// run.
func (b *boltStore) init() error {
	empty := false
	err := b.view(func(tx *bolt.Tx) error {
		first, _ := tx.Cursor().First()
		empty = first == nil
		return nil
	})
	if err != nil {
		return err
	}
	if empty {
		aside, err := b.keyFiles.setAside(durable.Aside("", durable.DamagedSuffix))
		if err != nil {
			return err
		}
		if aside != "" {
			b.found.keysLost = fmt.Errorf("%s is missing: the files of its keys were set aside as %s", spoolFile, aside)
		}
		err = b.update(func(tx *bolt.Tx) error {
			for _, name := range buckets {
				if _, err := tx.CreateBucketIfNotExists(name); err != nil {
					return err
				}
			}
			return put(tx.Bucket(bucketMeta), keyVersion, beKey(1))
		})
		if err != nil {
			return err
		}
	}
	return b.view(b.check)
}

// check reads every page and every file of keys that is in use, and removes the files that are
// not.
func (b *boltStore) check(tx *bolt.Tx) error {
	for _, name := range buckets {
		if tx.Bucket(name) == nil {
			return fmt.Errorf("%w: no bucket %q", errDamaged, name)
		}
	}
	meta := tx.Bucket(bucketMeta)
	version, err := unsealUint(keyVersion, meta.Get(keyVersion))
	switch {
	case err != nil:
		return err
	case version == 0:
		return fmt.Errorf("%w: no version", errDamaged)
	case version > spoolVersion:
		return fmt.Errorf("%s %w (format %d, this one reads %d)", tx.DB().Path(), errNewer, version, spoolVersion)
	}
	st, err := b.loadState(tx)
	if err != nil {
		return err
	}
	st.keysLost = cmp.Or(st.keysLost, b.found.keysLost)
	b.found = st
	used := make(map[string]bool)
	for _, s := range st.series {
		for _, f := range s.files {
			used[f.name()] = true
		}
	}
	want := uint64(0)
	err = tx.Bucket(bucketRecords).ForEach(func(k, v []byte) error {
		e, err := decodeEntry(k, v)
		if err != nil {
			return err
		}
		if want != 0 && e.index != want {
			return fmt.Errorf("%w: record %d where %d belongs", errDamaged, e.index, want)
		}
		want = e.index + 1
		f, err := keyFileOf(tx, k)
		if err != nil || e.record.Keys == 0 {
			return err
		}
		n := uint64(0)
		if f.index > 0 {
			used[f.name()] = true
			_, n, err = b.keyFiles.read(f)
		} else {
			_, n, err = oldKeys(tx, bucketRecordKeys, k)
		}
		if err == nil && n != e.record.Keys {
			err = fmt.Errorf("%w: %d keys of record %d, not %d", errDamaged, n, e.index, e.record.Keys)
		}
		return err
	})
	if err == nil {
		b.keyFiles.sweep(used, st.head)
	}
	return err
}

// keyFileOf returns the file that has the keys of the record with the index k; its own index
// is 0 if there is none.
func keyFileOf(tx *bolt.Tx, k []byte) (f keyFile, err error) {
	b := tx.Bucket(bucketKeyFiles)
	if b == nil || b.Get(k) == nil {
		return keyFile{}, nil
	}
	v, err := unseal(k, b.Get(k))
	if err == nil && len(v) != keyFileBytes {
		err = fmt.Errorf("%w: file of keys %x has %d bytes", errDamaged, k, len(v))
	}
	if err != nil {
		return keyFile{}, err
	}
	return decodeKeyFile(v), nil
}

// oldKeys returns the keys that a file of version 2 has under k, and how many they are.
func oldKeys(tx *bolt.Tx, bucket, k []byte) (keys packedKeys, n uint64, err error) {
	b := tx.Bucket(bucket)
	if b == nil || b.Get(k) == nil {
		return nil, 0, nil
	}
	v, err := unseal(k, b.Get(k))
	if err != nil {
		return nil, 0, err
	}
	keys = packedKeys{bytes.Clone(v)}
	var pace counter.Pace
	for range keys.all() {
		pace.Step()
		n++
	}
	return keys, n, nil
}

func (b *boltStore) keys(index uint64) (keys packedKeys, err error) {
	var f keyFile
	err = b.view(func(tx *bolt.Tx) error {
		if f, err = keyFileOf(tx, beKey(index)); err == nil && f.index == 0 {
			keys, _, err = oldKeys(tx, bucketRecordKeys, beKey(index))
		}
		return err
	})
	if err == nil && f.index > 0 {
		keys, _, err = b.keyFiles.read(f)
	}
	if err == nil && len(keys) == 0 {
		err = fmt.Errorf("%w: the keys of record %d are missing", errDamaged, index)
	}
	return keys, err
}

// putKeys stores the keys of a record, and which files have the sums of its series. It makes
// the file one of the version that has such.
func (b *boltStore) putKeys(tx *bolt.Tx, e *spooled, identity string, s *series) error {
	before := b.series[identity]
	s.files = nil
	if before.start == s.start && !s.keysLost {
		for _, f := range before.files {
			if f.index < e.index { // else of an append that is repeated
				s.files = append(s.files, f)
			}
		}
	} else if old := tx.Bucket(bucketSeriesKeys); old != nil {
		if err := old.Delete([]byte(identity)); err != nil {
			return err
		}
	}
	if len(e.keys) == 0 && !s.keysLost {
		return nil
	}
	files, err := tx.CreateBucketIfNotExists(bucketKeyFiles)
	if err == nil {
		err = put(tx.Bucket(bucketMeta), keyVersion, beKey(spoolVersion))
	}
	if err != nil || len(e.keys) == 0 {
		return err
	}
	f, err := b.keyFiles.write(e.index, e.keys)
	if err != nil {
		return err
	}
	if !s.keysLost {
		s.files = append(s.files, f)
	}
	return put(files, beKey(e.index), f.append(nil))
}

// release removes files that nothing refers to any more.
func (b *boltStore) release(files []keyFile) {
	for _, f := range files {
		used := f.index > b.removed
		for _, s := range b.series {
			used = used || slices.Contains(s.files, f)
		}
		if !used {
			b.keyFiles.remove(f)
		}
	}
}

// update turns a panic of bbolt about a page, or a fault of the mapping, into an
// error: a disk that fails while running makes the spool unavailable, it does
// not end the process. It stays unavailable until the next start, which sets a
// damaged file aside.
func (b *boltStore) update(fn func(*bolt.Tx) error) (err error) {
	if broken := b.broken.Load(); broken != nil {
		return *broken
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			broken := fmt.Errorf("%w: %v", errDamaged, r)
			b.broken.Store(&broken)
			err = broken
		}
	}()
	// bbolt does not repeat a sync that was interrupted. The bytes written then may be
	// there or not, as after any error, and are written again.
	return durable.Retry(func() error { return numbered(b.db.Update(fn)) })
}

// numbered makes an error of the system that bbolt returns as text an errno again.
func numbered(err error) error {
	if err == nil {
		return nil
	}
	for _, number := range []syscall.Errno{syscall.EINTR, syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG} {
		if text, found := strings.CutSuffix(err.Error(), number.Error()); found {
			return fmt.Errorf("%s%w", text, number)
		}
	}
	return err
}

func (b *boltStore) view(fn func(*bolt.Tx) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", errDamaged, r)
		}
	}()
	return b.db.View(fn)
}

func (b *boltStore) load() state {
	st := b.found
	b.found, b.series, b.removed = state{}, maps.Clone(st.series), st.head-uint64(st.pending)
	b.keyFiles.loaded = true
	return st
}

// loadState reads what the file has, but for the records.
func (b *boltStore) loadState(tx *bolt.Tx) (state, error) {
	st := state{series: make(map[string]series), cursors: make(map[string]uint64), lacking: make(map[int64]bool)}
	meta := tx.Bucket(bucketMeta)
	var err error
	if st.head, err = unsealUint(keyHead, meta.Get(keyHead)); err != nil {
		return st, err
	}
	if v := meta.Get(keyInstance); v != nil {
		name, err := unseal(keyInstance, v)
		if err != nil {
			return st, err
		}
		st.kept = string(name)
	}
	err = tx.Bucket(bucketSeries).ForEach(func(k, v []byte) error {
		s, err := decodeSeries(k, v)
		if err != nil {
			return err
		}
		old, _, err := oldKeys(tx, bucketSeriesKeys, k)
		if err != nil {
			return err
		}
		s.keys, err = b.keyFiles.sum(old, s.files)
		if errors.Is(err, errDamaged) {
			// The records are delivered, or check finds the same. The sum of the window is known.
			st.keysLost = err
			s.files, s.keysLost, err = nil, true, nil
		}
		st.series[string(k)] = s
		return err
	})
	if err != nil {
		return st, err
	}
	err = tx.Bucket(bucketCursors).ForEach(func(k, v []byte) error {
		at, err := unsealUint(k, v)
		if err != nil {
			return err
		}
		if at > st.head {
			return fmt.Errorf("%w: cursor %d beyond the head %d", errDamaged, at, st.head)
		}
		st.cursors[string(k)] = at
		return nil
	})
	if err != nil {
		return st, err
	}
	c := tx.Bucket(bucketRecords).Cursor()
	if first, _ := c.First(); first != nil {
		last, _ := c.Last()
		if len(first) != 8 || len(last) != 8 || binary.BigEndian.Uint64(last) != st.head {
			return st, fmt.Errorf("%w: the last record is not the head", errDamaged)
		}
		st.pending = int(st.head - binary.BigEndian.Uint64(first) + 1)
	}
	err = tx.Bucket(bucketPoison).ForEach(func(k, v []byte) error {
		st.poison++
		// The reason may have lines, too; the records by key are behind the record.
		for line := range bytes.Lines(v) {
			if r, err := parseRecord(bytes.TrimSuffix(line, []byte("\n"))); err == nil {
				st.lacking[r.WindowStart.UnixNano()] = true
				break
			}
		}
		return nil
	})
	return st, err
}

// encodeSeries returns what decodeSeries reads. Without keys it is that of every version.
func encodeSeries(s *series) []byte {
	v := binary.BigEndian.AppendUint64(nil, s.seq)
	v = binary.BigEndian.AppendUint64(v, uint64(s.start))
	v = binary.BigEndian.AppendUint64(v, s.unique)
	switch {
	case s.keysLost:
		v = append(v, 1)
	case len(s.files) > 0:
		v = append(v, 0)
	}
	for _, f := range s.files {
		v = f.append(v)
	}
	return v
}

func decodeSeries(k, v []byte) (s series, err error) {
	if v, err = unseal(k, v); err != nil {
		return s, err
	}
	if len(v) != 24 && (len(v) < 25 || (len(v)-25)%keyFileBytes > 0) {
		return s, fmt.Errorf("%w: series %q has %d bytes", errDamaged, k, len(v))
	}
	s.seq = binary.BigEndian.Uint64(v)
	s.start = int64(binary.BigEndian.Uint64(v[8:]))
	s.unique = binary.BigEndian.Uint64(v[16:])
	if len(v) > 24 {
		s.keysLost = v[24] == 1
		for f := range slices.Chunk(v[25:], keyFileBytes) {
			s.files = append(s.files, decodeKeyFile(f))
		}
	}
	return s, nil
}

func (b *boltStore) keepInstance(name string) error {
	b.instance = name
	return b.update(func(tx *bolt.Tx) error {
		return put(tx.Bucket(bucketMeta), keyInstance, []byte(name))
	})
}

func (b *boltStore) put(e spooled, identity string, s series, beforeCommit func()) error {
	err := b.update(func(tx *bolt.Tx) error {
		if err := b.putKeys(tx, &e, identity, &s); err != nil {
			return err
		}
		meta := tx.Bucket(bucketMeta)
		err := cmp.Or(
			put(tx.Bucket(bucketRecords), beKey(e.index), e.value),
			put(tx.Bucket(bucketSeries), []byte(identity), encodeSeries(&s)),
			put(meta, keyHead, beKey(e.index)),
		)
		if err == nil && b.instance != "" {
			err = put(meta, keyInstance, []byte(b.instance))
		}
		if err == nil {
			beforeCommit()
		}
		return err // an error rolls all of it back
	})
	if err != nil {
		return err
	}
	before := b.series[identity].files
	b.series[identity] = s
	b.release(before)
	return nil
}

func (b *boltStore) scan(after, upTo uint64, limit int) (out []spooled, err error) {
	err = b.view(func(tx *bolt.Tx) error {
		c := tx.Bucket(bucketRecords).Cursor()
		for k, v := c.Seek(beKey(after + 1)); k != nil && len(out) < limit; k, v = c.Next() {
			e, err := decodeEntry(k, v)
			if err != nil {
				return err
			}
			if e.index > upTo {
				break
			}
			out = append(out, e)
		}
		return nil
	})
	return out, err
}

func (b *boltStore) advance(sink string, to, upTo uint64) error {
	var files []keyFile
	err := b.update(func(tx *bolt.Tx) (err error) {
		files = nil // of an attempt before
		if sink != "" {
			err = put(tx.Bucket(bucketCursors), []byte(sink), beKey(to))
		}
		for i := b.removed + 1; i <= upTo && err == nil; i++ {
			var f keyFile
			if f, err = keyFileOf(tx, beKey(i)); f.index > 0 {
				files = append(files, f)
			}
			for _, name := range [][]byte{bucketRecords, bucketKeyFiles, bucketRecordKeys} {
				if bucket := tx.Bucket(name); bucket != nil {
					err = cmp.Or(err, bucket.Delete(beKey(i)))
				}
			}
		}
		return err
	})
	if err != nil {
		return err
	}
	b.removed = max(b.removed, upTo)
	b.release(files)
	return nil
}

func (b *boltStore) condemn(e spooled, sink, reason string) error {
	return b.update(func(tx *bolt.Tx) error {
		v := append(append([]byte(reason), '\n'), e.value...)
		lines := newKeyJSON(&e.record)
		for key, unique := range e.keys.all() {
			v = lines.append(append(v, '\n'), key, unique)
		}
		return put(tx.Bucket(bucketPoison), append(beKey(e.index), sink...), v)
	})
}

func (b *boltStore) dropSink(sink string) error {
	return b.update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketCursors).Delete([]byte(sink))
	})
}

// close does not wait for a broken file, whose lock bbolt may hold: the end of the process
// closes it.
func (b *boltStore) close() error {
	if broken := b.broken.Load(); broken != nil {
		return *broken
	}
	return b.db.Close()
}

// put stores a value behind a checksum over its key and itself.
func put(b *bolt.Bucket, k, v []byte) error {
	return b.Put(k, append(binary.BigEndian.AppendUint32(nil, checksum(k, v)), v...))
}

func checksum(k, v []byte) uint32 {
	return crc32.Update(crc32.Checksum(k, durable.Castagnoli), durable.Castagnoli, v)
}

// unseal returns the value that put stored under k. It is only valid within the
// transaction.
func unseal(k, v []byte) ([]byte, error) {
	if len(v) < 4 || checksum(k, v[4:]) != binary.BigEndian.Uint32(v) {
		return nil, fmt.Errorf("%w: checksum of %q", errDamaged, k)
	}
	return v[4:], nil
}

// unsealUint is unseal for a number; a key that is absent is 0.
func unsealUint(k, v []byte) (uint64, error) {
	if v == nil {
		return 0, nil
	}
	v, err := unseal(k, v)
	if err != nil {
		return 0, err
	}
	if len(v) != 8 {
		return 0, fmt.Errorf("%w: %q has %d bytes", errDamaged, k, len(v))
	}
	return binary.BigEndian.Uint64(v), nil
}

func decodeEntry(k, v []byte) (spooled, error) {
	if len(k) != 8 {
		return spooled{}, fmt.Errorf("%w: key of %d bytes", errDamaged, len(k))
	}
	index := binary.BigEndian.Uint64(k)
	value, err := unseal(k, v)
	if err != nil {
		return spooled{}, err
	}
	r, err := parseRecord(value)
	if err != nil {
		return spooled{}, fmt.Errorf("%w: record %d: %w", errDamaged, index, err)
	}
	return spooled{index: index, record: r, value: bytes.Clone(value)}, nil
}

// beKey orders bbolt's keys by number.
func beKey(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
