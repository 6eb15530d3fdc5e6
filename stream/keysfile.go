package stream

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"

	"verve/internal/durable"
)

// The file of the lines by key, next to the counts file.
//
// The lines by key of a record are written and synced before its own line. So if the line of a
// record is there, its keys are. Lines by key without that line were left by a kill, or by a
// disk that was full: the record is still in the spool, and its next delivery removes them
// before it writes them again. A reader takes them as it takes a torn line: lines by key count
// only together with the line of their record.
//
// The lock of the counts file covers both files. With one process the lines to remove are the
// last ones. If several processes share the files, others may have appended lines after them:
// then they stay, and only the missing ones are written.

// keysFile returns the path of the file of the lines by key of a counts file:
// counts-by-key.jsonl for counts.jsonl.
func keysFile(countsFile string) string {
	ext := filepath.Ext(countsFile)
	if ext == filepath.Base(countsFile) {
		ext = ""
	}
	return strings.TrimSuffix(countsFile, ext) + "-by-key" + ext
}

// appendKeys appends and syncs the lines by key of records whose own lines are not there.
// The lock of the counts file is held.
func (f *fileSink) appendKeys(batch []spooled) (err error) {
	if keysOf(batch) == 0 {
		return nil
	}
	file, stay, err := f.openKeys(batch)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	w := bufio.NewWriterSize(file, 1<<16)
	var line []byte
	for i := range batch {
		lines := newKeyJSON(&batch[i].record)
		for key, unique := range batch[i].keys.All() {
			line = append(lines.append(line[:0], key, unique), '\n')
			if stay[string(line)] {
				continue
			}
			if _, err := w.Write(line); err != nil {
				return err
			}
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if err := f.sync(file); err != nil {
		return err
	}
	if !f.named {
		err = durable.SyncDir(filepath.Dir(f.path))
	}
	f.step(stepKeys)
	return err
}

// openKeys opens the file, to append, and removes the lines that an earlier attempt has left of
// these records, if they are at its end. It returns those that stay.
func (f *fileSink) openKeys(batch []spooled) (file *os.File, stay map[string]bool, err error) {
	if file, err = f.open(keysFile(f.path)); err != nil {
		return nil, nil, err
	}
	info, err := file.Stat()
	if err == nil && info.Mode().IsRegular() {
		err = repairTail(file, info.Size())
		if err == nil && batch[0].index <= f.unsure {
			var from int64
			stay, from, err = removeLeft(file, &batch[0].record)
			if err == nil && len(stay) > 0 {
				err = rewrite(file, keysFile(f.path), from)
			}
		}
	}
	if err != nil {
		return nil, nil, errors.Join(err, file.Close())
	}
	return file, stay, nil
}

// removeKeys removes what an earlier attempt has left of a record whose line another
// instance has written to its own file.
func (f *fileSink) removeKeys(one []spooled) (err error) {
	if f.stdout != nil || keysOf(one) == 0 || one[0].index > f.unsure {
		return nil
	}
	counts, err := f.open(f.path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, counts.Close()) }()
	if info, err := counts.Stat(); err != nil || !info.Mode().IsRegular() {
		return err
	}
	if err := durable.Lock(counts); err != nil {
		return err
	}
	there, _, err := f.lookup(counts, one)
	if err != nil || len(there) > 0 {
		return err
	}
	file, _, err := f.openKeys(one)
	if err != nil {
		return err
	}
	return errors.Join(file.Sync(), file.Close())
}

// leftover returns a function that sorts the lines of the file. A line is left if an earlier
// attempt left it: it is of the first record, or of one that was to be written with it. Records
// are written in order, so if the line of the first one is missing, theirs are, too. A line is
// before if it is of an earlier record: then no earlier line is left. Any other line is of
// another process, or of another window of the group.
func leftover(first *Record) func(line []byte) (left, before bool) {
	key := first.Key()
	series := bytes.TrimRight(newKeyJSON(first).after, "}0123456789") // to the number
	return func(line []byte) (left, before bool) {
		if bytes.IndexByte(line, 0) >= 0 {
			return true, false // a power loss has left zeros
		}
		var r KeyRecord
		if !bytes.Contains(line, series) || json.Unmarshal(line, &r) != nil {
			return false, false // of another process, as most lines of a shared file
		}
		if r.Seq < first.Seq || r.WindowStart.Before(first.WindowStart) {
			return false, true
		}
		return first.Scope == ScopeInstance || r.RecordKey() == key, false // else another window of the group
	}
}

// removeLeft removes the lines that an earlier attempt has left, as far as no other lines follow
// them. It returns those that stay, and where the first of them begins.
func removeLeft(file *os.File, first *Record) (stay map[string]bool, from int64, err error) {
	info, err := file.Stat()
	if err != nil {
		return nil, 0, err
	}
	kind, end, last := leftover(first), info.Size(), true
	stay = make(map[string]bool)
	err = linesBack(file, end, func(at int64, line []byte) (more bool) {
		left, before := kind(line)
		switch {
		case before:
			return false
		case !left:
			last = false
		case last:
			end = at
		default:
			stay[string(line)], from = true, at
		}
		return true
	})
	if err == nil && end < info.Size() {
		err = file.Truncate(end)
	}
	return stay, from, err
}

// linesBack calls fn with the lines of the first size bytes of a file, the last one first, and
// with the offset of each, until fn returns false. Lines that are longer than any of ours, such
// as the zeros that a power loss leaves, come in parts.
func linesBack(file io.ReaderAt, size int64, fn func(at int64, line []byte) (more bool)) error {
	var rest []byte // of the file, from size on
	for size > 0 {
		n := min(1<<16, size)
		b := make([]byte, n, n+int64(len(rest)))
		if _, err := file.ReadAt(b, size-n); err != nil {
			return err
		}
		rest, size = append(b, rest...), size-n
		for {
			i := bytes.LastIndexByte(bytes.TrimSuffix(rest, []byte{'\n'}), '\n')
			if i < 0 {
				break
			}
			if !fn(size+int64(i)+1, rest[i+1:]) {
				return nil
			}
			rest = rest[:i+1]
		}
		if len(rest) > 4*longestLine {
			if !fn(size, rest) {
				return nil
			}
			rest = nil
		}
	}
	if len(rest) > 0 {
		fn(0, rest)
	}
	return nil
}
