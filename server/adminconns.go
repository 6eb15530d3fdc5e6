package server

import (
	"net"
	"net/http"
	"sync"
	"time"
)

// adminSendBuffer bounds what the kernel holds for a client that does not read, and
// with that the time until a write waits.
const adminSendBuffer = 16 << 10

// adminCrowd bounds the connections of the admin listener. One too many ends the one
// that has waited longest without a request: a probe needs a moment, a flood of
// connections waits. Where all have a request, the new one goes.
type adminCrowd struct {
	max int

	mu    sync.Mutex
	conns map[net.Conn]adminConn
	ended uint64
}

type adminConn struct {
	waiting bool // for a request, or the rest of its headers
	since   time.Time
}

// changed is the ConnState of the admin's http.Server.
func (a *adminCrowd) changed(c net.Conn, state http.ConnState) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch state {
	case http.StateNew:
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetWriteBuffer(adminSendBuffer) // the default works, too
		}
		if len(a.conns) < a.max || a.makeRoom() {
			a.conns[c] = adminConn{true, time.Now()}
			return
		}
		a.ended++
		_ = c.Close() // the http.Server finds out
	case http.StateActive:
		if _, ok := a.conns[c]; ok {
			a.conns[c] = adminConn{}
		}
	case http.StateIdle:
		if _, ok := a.conns[c]; ok {
			a.conns[c] = adminConn{true, time.Now()}
		}
	default:
		delete(a.conns, c)
	}
}

// makeRoom ends a connection that waits, if there is one. a.mu is held.
func (a *adminCrowd) makeRoom() bool {
	var end net.Conn
	longest := time.Now()
	for c, s := range a.conns {
		if s.waiting && s.since.Before(longest) {
			end, longest = c, s.since
		}
	}
	if end == nil {
		return false
	}
	a.ended++
	delete(a.conns, end)
	_ = end.Close()
	return true
}

func (a *adminCrowd) stats() (open int, ended uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.conns), a.ended
}
