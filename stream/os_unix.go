//go:build unix

package stream

import (
	"errors"
	"os"
	"syscall"
)

// lockFile waits for the exclusive lock of an open file, which its close
// releases. A file system without locks is taken as not shared.
func lockFile(f *os.File) error {
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case errors.Is(err, syscall.ENOTSUP), errors.Is(err, syscall.ENOLCK), errors.Is(err, syscall.ENOSYS), errors.Is(err, syscall.EINVAL):
			return nil
		}
		return err
	}
}

// syncDir makes a created or renamed name durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
