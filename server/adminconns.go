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
	conns map[net.Conn]time.Time // since when each waits for a request or the rest of its headers; zero: it has one
	ended uint64
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
			a.conns[c] = time.Now()
			return
		}
		a.ended++
		_ = c.Close() // the http.Server finds out
	case http.StateActive:
		if _, ok := a.conns[c]; ok {
			a.conns[c] = time.Time{}
		}
	case http.StateIdle:
		if _, ok := a.conns[c]; ok {
			a.conns[c] = time.Now()
		}
	default:
		delete(a.conns, c)
	}
}

// makeRoom ends a connection that waits, if there is one. a.mu is held.
func (a *adminCrowd) makeRoom() bool {
	var end net.Conn
	longest := time.Now()
	for c, since := range a.conns {
		if !since.IsZero() && since.Before(longest) {
			end, longest = c, since
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
