//go:build !unix

package testproc

import (
	"errors"
	"os"
)

// LimitFileSize fails: this system has no such limit.
func LimitFileSize(uint64) error { return errors.ErrUnsupported }

// SurviveFileSize does nothing.
func SurviveFileSize() {}

// Pause fails: this system has no such signal.
func Pause(*os.Process) error { return errors.ErrUnsupported }

// Resume fails, too.
func Resume(*os.Process) error { return errors.ErrUnsupported }
