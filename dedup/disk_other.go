//go:build !unix

package dedup

import (
	"errors"
	"fmt"
	"os"
	"time"
)

// Without these system calls a Memory keeps nothing on disk: openJournal fails
// in lockFile, before any other is called.

func lockFile(*os.File) (bool, error) {
	return false, fmt.Errorf("ids cannot be kept on disk on this system: %w", errors.ErrUnsupported)
}

func mapFile(*os.File, int) ([]byte, error) { return nil, errors.ErrUnsupported }
func unmapFile([]byte)                      {}
func syncMapped([]byte) error               { return errors.ErrUnsupported }
func syncDir(string) error                  { return errors.ErrUnsupported }
func reserve(*os.File, int) error           { return errors.ErrUnsupported }
func touch([]byte)                          {}
func noSpace(error) bool                    { return false }
func bootID() uint32                        { return 0 }
func bootTime() time.Time                   { return time.Time{} }
