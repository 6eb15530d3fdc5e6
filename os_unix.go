//go:build unix

package main

import (
	"net"
	"os/signal"
	"syscall"
)

// ignoreFileSize makes a write beyond RLIMIT_FSIZE an error like that of a full
// disk, instead of the end of the process.
func ignoreFileSize() { signal.Ignore(syscall.SIGXFSZ) }

// accepts reports whether connections can be accepted from ln: a socket that was
// handed over may be connected, or bound and no more.
func accepts(ln *net.TCPListener) bool {
	raw, err := ln.SyscallConn()
	if err != nil {
		return false
	}
	listening := 0
	if failed := raw.Control(func(fd uintptr) {
		listening, err = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN)
	}); failed != nil {
		return false
	}
	return err == nil && listening != 0
}
