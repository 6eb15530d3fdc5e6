// Package durable has what the packages that keep files share: system calls that may be
// interrupted or missing, names of files that survive a loss of power, and the names of damaged
// files that were set aside. All functions are safe for concurrent use, except as noted.
//
// Package os retries interrupted calls by itself; system calls that do not go through os use
// Retry.
package durable

import (
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Castagnoli is the table of the CRC-32 polynomial of all checksums on disk: processors have an
// instruction for that polynomial.
var Castagnoli = crc32.MakeTable(crc32.Castagnoli)

// The name of something that was set aside ends with DamagedSuffix and the time.
const DamagedSuffix = ".damaged-"

// timeFormat sorts by time, and has nanoseconds, so that two names of one process differ.
const timeFormat = "20060102T150405.000000000Z"

// Retry calls call until a signal does not interrupt it, and returns its error. The Go runtime
// preempts goroutines with signals, and these can interrupt a call to a slow file system, such
// as one over a network.
func Retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

// SetAside renames a damaged file or directory to a name that no other one has, and returns
// that name. The new name is on the disk when it returns, unless there is an error.
func SetAside(path string) (name string, err error) {
	name = Aside(path, DamagedSuffix)
	if err := os.Rename(path, name); err != nil {
		return "", err
	}
	return name, SyncDir(filepath.Dir(path))
}

// SetAsideSince reports whether path was set aside at t or later, as far as this process may read the
// directory.
func SetAsideSince(path string, t time.Time) (bool, error) {
	beside, err := os.ReadDir(filepath.Dir(path))
	if errors.Is(err, os.ErrPermission) {
		err = nil
	}
	return slices.ContainsFunc(beside, func(e os.DirEntry) bool {
		at, is := strings.CutPrefix(e.Name(), filepath.Base(path)+DamagedSuffix)
		aside, err := time.Parse(timeFormat, at)
		return is && err == nil && !aside.Before(t)
	}), err
}

// Aside returns path with the suffix and the present time appended.
func Aside(path, suffix string) string { return path + suffix + time.Now().UTC().Format(timeFormat) }

// MkdirAll makes a directory and all missing directories above it. Their names are on the disk
// when it returns. It does nothing if the directory exists.
func MkdirAll(dir string) error {
	dir = filepath.Clean(dir)
	if info, err := os.Stat(dir); err == nil && info.IsDir() {
		return nil
	}
	parent := filepath.Dir(dir)
	if parent != dir {
		if err := MkdirAll(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		if info, serr := os.Stat(dir); serr != nil || !info.IsDir() { // unless another process made it meanwhile
			return err
		}
	}
	return SyncDir(parent)
}

// ReplaceFile replaces the content of a small file as a whole: after a loss of power the file
// has either its former content or b. A new file gets the mode perm. Only one call at a time
// may write the same path.
func ReplaceFile(path string, b []byte, perm os.FileMode) error {
	next := path + ".tmp"
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		_ = os.Remove(next) // if this fails, the next call overwrites it
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes the creation, renaming or removal of a name in dir durable. If the file system
// cannot sync directories, or this process may not read dir, SyncDir assumes that names are
// kept, and returns no error.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if errors.Is(err, os.ErrPermission) {
		return nil
	}
	if err != nil {
		return err
	}
	err = d.Sync()
	if Unsupported(err) {
		err = nil
	}
	return errors.Join(err, d.Close())
}

// writeZeros writes size zeros to a file, for systems that cannot allocate.
func writeZeros(f *os.File, size int) error {
	zeros := make([]byte, 1<<20)
	for at := 0; at < size; at += len(zeros) {
		if _, err := f.WriteAt(zeros[:min(len(zeros), size-at)], int64(at)); err != nil {
			return fmt.Errorf("allocate: %w", err)
		}
	}
	return nil
}
