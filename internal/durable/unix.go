//go:build unix

package durable

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Lock waits for the exclusive lock of an open file, which its close releases. A
// file system without locks is taken as not shared.
func Lock(f *os.File) error {
	_, err := flock(f, unix.LOCK_EX)
	return err
}

// TryLock is Lock, but returns false where another process has the lock.
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

// NoSpace reports whether err means that there is no room for more on the disk, for
// this user, or in a file: what is there is sound.
func NoSpace(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG)
}

// Unsupported reports whether err means that the file system, or the system, does not have
// the call. Systems do not agree on the number.
func Unsupported(err error) bool {
	return errors.Is(err, errors.ErrUnsupported) || // ENOSYS, ENOTSUP, EOPNOTSUPP
		errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOTTY)
}
