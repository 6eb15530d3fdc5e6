package server

import (
	"io"
	"syscall"
)

// edgeTriggered: the runtime waits for a socket with EPOLLET.
const edgeTriggered = true

// waitAndRead does what read does, for a steady connection on which everything is answered:
// it waits before it reads. Read of package net reads first. After an answer it finds nothing,
// because the client sends its next request only then, and that costs 8 % of the CPU of a request
// (bench/README.md, "Against commit 9d5ec71"; BenchmarkSteady includes the client's part).
//
// To wait without a read is safe if the read before, within one call of RawConn.Read, has not
// filled its buffer: then the socket was empty, and bytes that arrive later wake the waiter
// (epoll(7), "edge-triggered"). Two things are missed: that a client closed its side together
// with its last requests, and bytes after a byte of urgent data, at which a read ends early.
// Parking finds both after parkAfter. Clients that do so are small tools, which send little;
// that is why a connection is steady only after steadyAfter reads.
//
// It returns what take does, and have > 0 without done if a request has begun.
func (f *fastPath) waitAndRead(c *conn, p []byte) (have int, done bool, err error) {
	c.yieldIfAwaited()
	ended := c.socket.Read(func(fd uintptr) bool {
		for {
			n, failed := syscall.Read(int(fd), p)
			switch {
			case failed == syscall.EINTR:
				continue
			case failed == syscall.EAGAIN:
				return false
			case failed != nil:
				n = 0
			case n == 0:
				failed = io.EOF
			}
			have, done, err = f.take(c, p, 0, n, c.received(p, n, failed))
			if done || have > 0 {
				return true
			}
			c.idle()
			c.yieldIfAwaited()
			if n < len(p) || c.nudged.Load() { // if nudged, the wait ends at once
				return false
			}
		}
	})
	switch {
	case ended == nil:
		return have, done, err
	case c.goesOn(ended):
		return 0, true, c.park()
	default:
		return 0, true, c.received(p, 0, ended)
	}
}
