package server

import (
	"io"
	"syscall"
)

// edgeTriggered: the runtime waits for a socket with EPOLLET.
const edgeTriggered = true

// waitAndRead is read for a steady connection of which everything is answered: it waits
// before it reads. Read of package net reads first, and finds nothing after each answer,
// since the next request comes only then; that costs 8 % of the CPU of a request
// (bench/README.md, "Against commit 9d5ec71"; BenchmarkSteady has the client's part in it).
//
// It is safe to wait without a look where the read before it, within one call of
// RawConn.Read, has not filled its buffer: the socket was empty then, and what arrives later
// wakes the waiter (epoll(7), "edge-triggered"). Two things go unseen: the end of a client's
// side that came together with its last requests, and what came behind a byte of urgent data,
// where a read ends early. Parking finds them after a second. Clients that do so are small
// tools, which send little; that is why a connection is steady only after steadyAfter reads.
//
// It returns as take does, and have > 0 without done where a request has begun.
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
			if n < len(p) || c.nudged.Load() { // then the wait ends at once
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
