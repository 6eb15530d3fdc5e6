//go:build unix

package durable

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Lock waits for the exclusive lock of an open file. Closing the file releases the lock. If the
// file system has no locks, Lock assumes that no other process uses the file, and succeeds.
func Lock(f *os.File) error {
	_, err := flock(f, unix.LOCK_EX)
	return err
}

// TryLock is like Lock, but does not wait: it returns false if another process has the lock.
func TryLock(f *os.File) (taken bool, err error) { return flock(f, unix.LOCK_EX|unix.LOCK_NB) }

func flock(f *os.File, how int) (taken bool, err error) {
	err = Retry(func() error { return unix.Flock(int(f.Fd()), how) })
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return false, nil
	case Unsupported(err), errors.Is(err, unix.ENOLCK):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return true, nil
}

// NoSpace reports whether err means that there is no more space on the disk or for this user,
// or that the file may not get larger. The data that is already there is not damaged then.
func NoSpace(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG)
}

// Unsupported reports whether err means that the file system, or the operating system, does not
// have the call. Systems return different error numbers for that.
func Unsupported(err error) bool {
	return errors.Is(err, errors.ErrUnsupported) || // ENOSYS, ENOTSUP, EOPNOTSUPP
		errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOTTY)
}
