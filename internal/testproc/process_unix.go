//go:build unix

package testproc

import (
	"os"
	"os/signal"
	"syscall"
)

// LimitFileSize bounds the size of the files that this process, or a program that replaces it
// by exec, writes: a write beyond that is refused, as on a full disk. The limit can be changed
// again.
func LimitFileSize(bytes uint64) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		return err
	}
	set(&limit.Cur, bytes) // not Max, so that the limit can be changed again
	return syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit)
}

// set stores a limit, which is an int64 on some systems.
func set[T int64 | uint64](limit *T, to uint64) { *limit = T(to) }

// SurviveFileSize makes a write beyond LimitFileSize return an error, without the signal that
// would end the process.
func SurviveFileSize() { signal.Ignore(syscall.SIGXFSZ) }

// Pause stops a process until Resume.
func Pause(p *os.Process) error { return p.Signal(syscall.SIGSTOP) }

// Resume continues a process after Pause.
func Resume(p *os.Process) error { return p.Signal(syscall.SIGCONT) }
