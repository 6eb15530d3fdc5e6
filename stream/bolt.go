package stream

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
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
type boltStore struct {
	db *bolt.DB

	// broken is set when a write ended in a panic. bbolt then reads the same file to
	// roll back, may fault there again, and keeps its lock: the next write would wait
	// for ever, and so would readiness and metrics.
	broken atomic.Pointer[error]
}

var (
	bucketMeta    = []byte("meta")    // the keys below
	bucketSeries  = []byte("series")  // identity -> seq, start, unique, files of keys
	bucketCursors = []byte("cursors") // sink -> index
	bucketRecords = []byte("records") // index -> file of its keys if it has some, record
	bucketPoison  = []byte("poison")  // index, sink -> reason, record, its keys

	keyVersion  = []byte("version")
	keyInstance = []byte("instance")
	keyHead     = []byte("head")
)

// buckets are those that every file has.
var buckets = [][]byte{bucketMeta, bucketSeries, bucketCursors, bucketRecords, bucketPoison}

const (
	// spoolVersion is the format of a file that this program has written to. It also reads
	// firstVersion, which is the same without keys, and makes it spoolVersion with the next
	// record. No release had the formats between.
	spoolVersion = 4
	firstVersion = 1

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
	errVersion = errors.New("has a format that this version of the program does not read")
)

// openBolt opens path, or sets it and the files of keys aside and starts with new ones.
func openBolt(path string, files *keyFiles) (b *boltStore, st state, setAside string, err error) {
	b, st, err = openBoltOnce(path, files)
	if !errors.Is(err, errDamaged) {
		return b, st, "", err
	}
	setAside, rerr := durable.SetAside(path)
	if rerr == nil {
		_, rerr = files.setAside(strings.TrimPrefix(setAside, path))
	}
	if rerr != nil {
		return nil, st, setAside, fmt.Errorf("%w; setting it aside: %w", err, rerr)
	}
	b, st, err = openBoltOnce(path, files)
	return b, st, setAside, err
}

func openBoltOnce(path string, files *keyFiles) (b *boltStore, st state, err error) {
	// bbolt trusts its pages: it panics on a page that makes no sense, and a read
	// beyond the end of a truncated file faults. Both mean that the file is damaged.
	// Then its mapping and its descriptor may leak, once: that is the price of
	// going on.
	defer damagedByPanic(&err, debug.SetPanicOnFault(true))

	info, statErr := os.Stat(path)
	fresh := errors.Is(statErr, os.ErrNotExist)
	blank := fresh || statErr == nil && info.Size() == 0
	if statErr == nil && info.Mode().IsRegular() && info.Size() > 0 && info.Size() < int64(2*os.Getpagesize()) {
		// bbolt has no sentinel for it. An empty file is one that was created
		// and not written before a crash: bbolt initialises it.
		return nil, st, fmt.Errorf("%w: %d bytes do not hold its header", errDamaged, info.Size())
	}
	var db *bolt.DB
	err = durable.Retry(func() (err error) {
		db, err = bolt.Open(path, 0o644, &bolt.Options{
			Timeout:      lockWait,
			FreelistType: bolt.FreelistMapType,
			// The freelist stays synced: without it bbolt rebuilds it in a goroutine
			// of its own, where a panic about a damaged page could not be caught.
			NoFreelistSync: false,
			// A file that outgrows its mapping is mapped again. If that is
			// interrupted bbolt has no mapping. Address space costs nothing.
			InitialMmapSize: mapped,
		})
		return numbered(err)
	})
	switch {
	case err == nil:
	case errors.Is(err, berrors.ErrTimeout):
		return nil, st, fmt.Errorf("%s is in use by %s", path, owner(path+ownerSuffix))
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrVersionMismatch),
		errors.Is(err, berrors.ErrChecksum), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, st, fmt.Errorf("%w: %w", errDamaged, err)
	case blank && durable.NoSpace(err):
		// bbolt may have written a part of its header.
		emptied(path)
		return nil, st, err
	case durable.Unsupported(err), errors.Is(err, syscall.ENOLCK):
		return nil, st, fmt.Errorf("%s: the file system does not have the locks (flock), mappings and syncs that the spool needs; use another one, or none: %w", path, err)
	default:
		// Permissions, a read-only disk, a directory in the way: the file may be
		// sound, so it is left alone.
		return nil, st, fmt.Errorf("%s: %w", path, err)
	}
	db.AllocSize = growBy
	b = &boltStore{db: db}
	st, err = b.init(files)
	if err == nil && fresh {
		err = durable.SyncDir(filepath.Dir(path))
	}
	if err != nil {
		db.Close()
		return nil, st, err
	}
	// This is only for the message of a second process, which can do without.
	_ = os.WriteFile(path+ownerSuffix, fmt.Appendf(nil, "%d\n", os.Getpid()), 0o644)
	return b, st, nil
}

// emptied truncates a new file. It does not remove the file, because another process may wait
// for its lock.
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

// owner describes the process that uses the spool, by the file next to it.
func owner(path string) string {
	if b, err := os.ReadFile(path); err == nil && len(b) > 0 {
		return "process " + strings.TrimSpace(string(b))
	}
	return "another process"
}

// init makes the buckets of a new file. It reads every page, and every file of keys that is in
// use, so that damage shows here, where the file can be set aside, and not in the middle of a run.
func (b *boltStore) init(files *keyFiles) (st state, err error) {
	empty := false
	err = b.view(func(tx *bolt.Tx) error {
		first, _ := tx.Cursor().First()
		empty = first == nil
		return nil
	})
	if err != nil {
		return st, err
	}
	var lost error
	if empty {
		aside, err := files.setAside(durable.Aside("", durable.DamagedSuffix))
		if err != nil {
			return st, err
		}
		if aside != "" {
			lost = fmt.Errorf("%s is missing: the files of its keys were set aside as %s", spoolFile, aside)
		}
		err = b.update(func(tx *bolt.Tx) error {
			for _, name := range buckets {
				if _, err := tx.CreateBucketIfNotExists(name); err != nil {
					return err
				}
			}
			return put(tx.Bucket(bucketMeta), keyVersion, beKey(spoolVersion))
		})
		if err != nil {
			return st, err
		}
	}
	err = b.view(func(tx *bolt.Tx) error {
		if st, err = readState(tx, files); err == nil {
			err = checkPages(b.db, tx)
		}
		return err
	})
	st.keysLost = cmp.Or(st.keysLost, lost)
	return st, err
}

// checkPages looks for damage that would otherwise show only when a record is appended, after every
// start again: wrong numbers of pages, and a wrong list of the free ones. bbolt's own check comes
// last: if the length of a page is damaged it takes all memory, and a fault in its goroutine could
// not be caught.
func checkPages(db *bolt.DB, tx *bolt.Tx) error {
	file, err := os.Open(db.Path())
	if err != nil {
		return err
	}
	defer file.Close()
	size, own := int64(db.Info().PageSize), make([]byte, 8)
	free, pages := 0, int(tx.Size()/size)
	for id := 2; id < pages; { // after the meta pages
		page, err := tx.Page(id)
		switch {
		case err != nil:
			return err
		case page.Type == "free":
			free++
			id++
			continue
		}
		if _, err := file.ReadAt(own, int64(id)*size); err != nil {
			return fmt.Errorf("%w: page %d: %w", errDamaged, id, err)
		}
		if n := binary.NativeEndian.Uint64(own); n != uint64(id) || page.OverflowCount >= pages-id {
			return fmt.Errorf("%w: page %d has the number %d, and %d behind it", errDamaged, id, n, page.OverflowCount)
		}
		id += 1 + page.OverflowCount
	}
	if stats := db.Stats(); free != stats.FreePageN+stats.PendingPageN {
		return fmt.Errorf("%w: %d pages are free, and %d in the list of them", errDamaged, free, stats.FreePageN+stats.PendingPageN)
	}
	for flaw := range tx.Check() { // read to its end: only then its goroutine ends
		if err == nil {
			err = fmt.Errorf("%w: %w", errDamaged, flaw)
		}
	}
	return err
}

// readState reads all of the file, and the files of keys that it refers to. It removes files of
// keys that nothing refers to: see keyFiles.sweep.
func readState(tx *bolt.Tx, files *keyFiles) (st state, err error) {
	for _, name := range buckets {
		if tx.Bucket(name) == nil {
			return st, fmt.Errorf("%w: no bucket %q", errDamaged, name)
		}
	}
	meta := tx.Bucket(bucketMeta)
	version, err := unsealUint(keyVersion, meta.Get(keyVersion))
	switch {
	case err != nil:
		return st, err
	case version == 0:
		return st, fmt.Errorf("%w: no version", errDamaged)
	case version != firstVersion && version != spoolVersion:
		return st, fmt.Errorf("%s %w (it has format %d, and %d or %d can be read)", tx.DB().Path(), errVersion, version, firstVersion, spoolVersion)
	}
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
	used := make(map[string]bool)
	if err := st.readSeries(tx, files, used); err != nil {
		return st, err
	}
	st.cursors, st.lacking = make(map[string]uint64), make(map[int64]bool)
	err = tx.Bucket(bucketCursors).ForEach(func(k, v []byte) error {
		at, err := unsealUint(k, v)
		if err == nil && at > st.head {
			err = fmt.Errorf("%w: cursor %d beyond the head %d", errDamaged, at, st.head)
		}
		st.cursors[string(k)] = at
		return err
	})
	if err != nil {
		return st, err
	}
	if err := st.readRecords(tx, files, used); err != nil {
		return st, err
	}
	files.sweep(used, st.head)
	err = st.readDeadLetters(tx)
	return st, err
}

// readDeadLetters counts the records that a sink has refused for good, each once, and notes the
// windows that lack them.
func (st *state) readDeadLetters(tx *bolt.Tx) error {
	last := uint64(0)
	return tx.Bucket(bucketPoison).ForEach(func(k, v []byte) error {
		if len(k) < 8 {
			return fmt.Errorf("%w: dead letter with a key of %d bytes", errDamaged, len(k))
		}
		index := binary.BigEndian.Uint64(k)
		if index == last {
			return nil // the same record, refused by another sink
		}
		last = index
		st.deadLetters++
		if index > st.head-uint64(st.pending) {
			st.refused = append(st.refused, index)
		}
		// The value is the reason, which may have several lines, the record, and its records by key.
		for line := range bytes.Lines(v) {
			if r, err := parseRecord(bytes.TrimSuffix(line, []byte("\n"))); err == nil {
				st.lacking[r.WindowStart.UnixNano()] = true
				break
			}
		}
		return nil
	})
}

// readSeries reads the series and the sums by key of their last windows.
func (st *state) readSeries(tx *bolt.Tx, files *keyFiles, used map[string]bool) error {
	st.series = make(map[string]series)
	return tx.Bucket(bucketSeries).ForEach(func(k, v []byte) error {
		s, err := decodeSeries(k, v)
		if err != nil {
			return err
		}
		s.Keys, err = files.sum(s.files)
		if errors.Is(err, errDamaged) {
			// Either these records are delivered, or readRecords finds the same damage. Only
			// the sums by key are lost: that of the window is known.
			st.keysLost = err
			s.files, s.KeysLost, err = nil, true, nil
		}
		for _, f := range s.files {
			used[f.name()] = true
		}
		st.series[string(k)] = s
		return err
	})
}

// readRecords reads the records, and checks that each has its keys.
func (st *state) readRecords(tx *bolt.Tx, files *keyFiles, used map[string]bool) error {
	last := uint64(0)
	err := tx.Bucket(bucketRecords).ForEach(func(k, v []byte) error {
		e, err := decodeEntry(k, v)
		if err != nil {
			return err
		}
		if last != 0 && e.index != last+1 {
			return fmt.Errorf("%w: record %d where %d belongs", errDamaged, e.index, last+1)
		}
		last = e.index
		st.pending++
		if e.record.Keys == 0 {
			return nil
		}
		used[e.file.name()] = true
		keys, err := files.read(e.file)
		if n := uint64(keys.Len()); err == nil && n != e.record.Keys {
			err = fmt.Errorf("%w: %d keys of record %d, not %d", errDamaged, n, e.index, e.record.Keys)
		}
		return err
	})
	if err == nil && st.pending > 0 && last != st.head {
		err = fmt.Errorf("%w: the last record is not the head", errDamaged)
	}
	return err
}

// update runs fn in a transaction that writes. It turns a panic of bbolt about a page, or a
// fault of the mapping, into an error: a disk that fails makes the spool unavailable, but
// does not end the process. The spool stays unavailable until the next start, which sets a
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
	// bbolt does not repeat a sync that was interrupted, so the transaction is repeated.
	// What it wrote may be on the disk or not, as after any error.
	return durable.Retry(func() error {
		return numbered(b.db.Update(func(tx *bolt.Tx) error {
			err := fn(tx)
			counter.Rest() // the commit takes as long
			return err
		}))
	})
}

// numbered wraps the errno in a system error that bbolt returns as text only.
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
	defer damagedByPanic(&err, debug.SetPanicOnFault(true))
	return b.db.View(fn)
}

// damagedByPanic is deferred in functions in which bbolt reads its file: it makes a panic an
// error. before is the result of debug.SetPanicOnFault(true), and is restored.
func damagedByPanic(err *error, before bool) {
	debug.SetPanicOnFault(before)
	if r := recover(); r != nil {
		*err = fmt.Errorf("%w: %v", errDamaged, r)
	}
}

// encodeSeries returns what decodeSeries reads. Without keys the format is that of firstVersion.
func encodeSeries(s *series) []byte {
	v := binary.BigEndian.AppendUint64(nil, s.seq)
	v = binary.BigEndian.AppendUint64(v, uint64(s.Last.UnixNano()))
	v = binary.BigEndian.AppendUint64(v, s.Unique)
	switch {
	case s.KeysLost:
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
	s.Last = time.Unix(0, int64(binary.BigEndian.Uint64(v[8:]))).UTC()
	s.Unique = binary.BigEndian.Uint64(v[16:])
	if len(v) > 24 {
		s.KeysLost = v[24] == 1
		for f := range slices.Chunk(v[25:], keyFileBytes) {
			s.files = append(s.files, decodeKeyFile(f))
		}
	}
	return s, nil
}

func (b *boltStore) keepInstance(name string) error {
	return b.update(func(tx *bolt.Tx) error {
		return put(tx.Bucket(bucketMeta), keyInstance, []byte(name))
	})
}

func (b *boltStore) put(e spooled, identity string, s series, beforeCommit func()) error {
	value := e.value
	if e.record.Keys > 0 {
		value = append(e.file.append(nil), value...)
	}
	return b.update(func(tx *bolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		err := cmp.Or(
			put(tx.Bucket(bucketRecords), beKey(e.index), value),
			put(tx.Bucket(bucketSeries), []byte(identity), encodeSeries(&s)),
			put(meta, keyHead, beKey(e.index)),
			put(meta, keyVersion, beKey(spoolVersion)),
		)
		if err == nil {
			beforeCommit()
		}
		return err // an error rolls all of it back
	})
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

func (b *boltStore) advance(sink string, to, removed, upTo uint64) (files []keyFile, err error) {
	err = b.update(func(tx *bolt.Tx) (err error) {
		if sink != "" {
			err = put(tx.Bucket(bucketCursors), []byte(sink), beKey(to))
		}
		records := tx.Bucket(bucketRecords)
		for i := removed + 1; i <= upTo && err == nil; i++ {
			k := beKey(i)
			v := records.Get(k)
			if v == nil {
				continue // removed by an attempt that failed and was stored nevertheless
			}
			var f keyFile
			if f, _, err = splitEntry(k, v); f.index > 0 && !slices.Contains(files, f) {
				files = append(files, f)
			}
			err = cmp.Or(err, records.Delete(k))
		}
		return err
	})
	return files, err
}

func (b *boltStore) deadLetter(e spooled, sink, reason string) error {
	return b.update(func(tx *bolt.Tx) error {
		v := append(append([]byte(reason), '\n'), e.value...)
		lines := newKeyJSON(&e.record)
		for key, unique := range e.keys.All() {
			v = lines.append(append(v, '\n'), key, unique)
		}
		return put(tx.Bucket(bucketPoison), append(beKey(e.index), sink...), v)
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

// put stores a value after a checksum over the key and the value.
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

func decodeEntry(k, v []byte) (e spooled, err error) {
	if len(k) != 8 {
		return e, fmt.Errorf("%w: key of %d bytes", errDamaged, len(k))
	}
	e.index = binary.BigEndian.Uint64(k)
	if e.file, v, err = splitEntry(k, v); err != nil {
		return e, err
	}
	e.value = bytes.Clone(v)
	if e.record, err = parseRecord(v); err != nil {
		return e, fmt.Errorf("%w: record %d: %w", errDamaged, e.index, err)
	}
	if e.record.Keys > 0 && e.file.index == 0 {
		return e, fmt.Errorf("%w: record %d does not refer to its keys", errDamaged, e.index)
	}
	return e, nil
}

// splitEntry splits a value into the reference to the file of the record's keys, if there is
// one, and the bytes of the record. A reference begins with a zero byte, a record does not.
func splitEntry(k, v []byte) (f keyFile, record []byte, err error) {
	if v, err = unseal(k, v); err != nil || len(v) < keyFileBytes || v[0] != 0 {
		return f, v, err
	}
	return decodeKeyFile(v), v[keyFileBytes:], nil
}

// beKey orders bbolt's keys by number.
func beKey(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
