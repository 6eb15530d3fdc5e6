//go:build unix

package testproc

import (
	"os"
	"os/signal"
	"syscall"
)

// LimitFileSize bounds the files that this process writes, and the program that it becomes:
// beyond it a write is refused, as on a full disk. The limit can be changed again.
func LimitFileSize(bytes uint64) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		return err
	}
	set(&limit.Cur, bytes) // and not Max
	return syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit)
}

// set stores a limit, which is an int64 on some systems.
func set[T int64 | uint64](limit *T, to uint64) { *limit = T(to) }

// SurviveFileSize makes a write beyond LimitFileSize an error only, and no signal.
func SurviveFileSize() { signal.Ignore(syscall.SIGXFSZ) }

// Pause stops a process until Resume.
func Pause(p *os.Process) error { return p.Signal(syscall.SIGSTOP) }

// Resume continues a process after Pause.
func Resume(p *os.Process) error { return p.Signal(syscall.SIGCONT) }
