//go:build !unix

package durable

import (
	"errors"
	"os"
)

// Lock does nothing on systems without flock: only one process may use a file there.
func Lock(*os.File) error { return nil }

// TryLock does nothing either, and always returns true.
func TryLock(*os.File) (taken bool, err error) { return true, nil }

// NoSpace always returns false: the errors of this system are not known.
func NoSpace(error) bool { return false }

// Unsupported reports whether err means that the system does not have the call. Such systems
// cannot sync directories, for example.
func Unsupported(err error) bool {
	return errors.Is(err, errors.ErrUnsupported) || errors.Is(err, os.ErrPermission)
}
