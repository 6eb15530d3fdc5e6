package server

import (
	"net"
	"net/http"
	"sync"
	"time"
)

// adminSendBuffer bounds what the kernel holds for a client that does not read, in bytes. A
// write waits when it is full, and then ends at its deadline.
const adminSendBuffer = 16 << 10

// connLimit bounds the connections of the admin listener. If there is one too many, it ends
// the one that has waited longest without a request: a probe needs only a moment, and a flood
// of connections waits. If all have a request, it ends the new one.
type connLimit struct {
	max int

	mu    sync.Mutex
	conns map[net.Conn]time.Time // since when each waits for a request or the rest of its headers; zero: it has one
	ended uint64
}

// changed is the ConnState of the admin's http.Server.
func (l *connLimit) changed(c net.Conn, state http.ConnState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch state {
	case http.StateNew:
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetWriteBuffer(adminSendBuffer) // if it fails, the default works, too
		}
		if len(l.conns) < l.max || l.makeRoom() {
			l.conns[c] = time.Now()
			return
		}
		l.ended++
		_ = c.Close() // the http.Server notices at its next read
	case http.StateActive:
		if _, ok := l.conns[c]; ok {
			l.conns[c] = time.Time{}
		}
	case http.StateIdle:
		if _, ok := l.conns[c]; ok {
			l.conns[c] = time.Now()
		}
	default:
		delete(l.conns, c)
	}
}

// makeRoom ends a connection that waits, if there is one. l.mu is held.
func (l *connLimit) makeRoom() bool {
	var end net.Conn
	longest := time.Now()
	for c, since := range l.conns {
		if !since.IsZero() && since.Before(longest) {
			end, longest = c, since
		}
	}
	if end == nil {
		return false
	}
	l.ended++
	delete(l.conns, end)
	_ = end.Close()
	return true
}

func (l *connLimit) stats() (open int, ended uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.conns), l.ended
}
