//go:build !unix

package durable

import (
	"errors"
	"os"
)

// Lock does nothing where there is no flock: a file is then for one process.
func Lock(*os.File) error { return nil }

// TryLock does nothing either.
func TryLock(*os.File) (taken bool, err error) { return true, nil }

// NoSpace does not know the errors of this system.
func NoSpace(error) bool { return false }

// Unsupported reports whether err means that the system does not have the call.
// Directories, among others, cannot be synced there.
func Unsupported(err error) bool {
	return errors.Is(err, errors.ErrUnsupported) || errors.Is(err, os.ErrPermission)
}
