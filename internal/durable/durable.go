// Package durable has what the packages that keep files share: system calls that
// may be interrupted or not be there, names that survive a loss of power, and
// the names of damaged files that were set aside.
//
// os retries what is interrupted by itself; what is called below it goes through
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

// Castagnoli is the polynomial of all checksums on disk: processors have an
// instruction for it.
var Castagnoli = crc32.MakeTable(crc32.Castagnoli)

// DamagedSuffix, and the time, end the name of what was set aside.
const DamagedSuffix = ".damaged-"

// timeFormat sorts by time, and two names of one process differ.
const timeFormat = "20060102T150405.000000000Z"

// Retry calls call until it is not interrupted by a signal, and returns its error.
// The Go runtime preempts goroutines by signals, and a file system that is slow
// enough, as one over a network, lets them interrupt it.
func Retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

// SetAside renames what is damaged to a name that nothing else has, and returns
// that.
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

// Aside is a name beside path with the suffix and the time.
func Aside(path, suffix string) string { return path + suffix + time.Now().UTC().Format(timeFormat) }

// MkdirAll makes a directory and those above it that are missing. Their names are
// on the disk when it returns.
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
		if info, serr := os.Stat(dir); serr != nil || !info.IsDir() { // made by another process meanwhile
			return err
		}
	}
	return SyncDir(parent)
}

// ReplaceFile writes a small file as a whole: after a loss of power it has its former
// content or b. A file that it makes has the mode perm. Callers take turns.
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
		_ = os.Remove(next) // else the next call writes over it
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes a created, renamed or removed name in dir durable. A file system
// that cannot sync a directory is taken as one that keeps its names, and so is a
// directory that this process may not read.
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

// writeZeros gives a file its size where the system cannot allocate.
func writeZeros(f *os.File, size int) error {
	zeros := make([]byte, 1<<20)
	for at := 0; at < size; at += len(zeros) {
		if _, err := f.WriteAt(zeros[:min(len(zeros), size-at)], int64(at)); err != nil {
			return fmt.Errorf("allocate: %w", err)
		}
	}
	return nil
}
