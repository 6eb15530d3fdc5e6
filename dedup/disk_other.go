//go:build !unix

package dedup

import (
	"errors"
	"os"
	"time"
)

// Without these system calls a Memory keeps nothing on disk.
const mappable = false

func mapFile(*os.File, int) ([]byte, error) { return nil, errors.ErrUnsupported }
func unmapFile([]byte)                      {}
func syncMapped([]byte) error               { return errors.ErrUnsupported }
func touch([]byte)                          {}
func bootID() uint32                        { return 0 }
func bootTime() time.Time                   { return time.Time{} }
