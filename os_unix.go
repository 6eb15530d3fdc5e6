//go:build unix

package main

import (
	"os/signal"
	"syscall"
)

// ignoreFileSize makes a write beyond RLIMIT_FSIZE an error like that of a full
// disk, instead of the end of the process.
func ignoreFileSize() { signal.Ignore(syscall.SIGXFSZ) }
