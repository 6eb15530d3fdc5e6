package server

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// sweepInterval is how often connections are looked at, and the resolution
	// of their time stamps: fine enough for timeouts of seconds.
	sweepInterval = 100 * time.Millisecond

	// A connection closed by the server while its client is still sending is
	// read on for a moment: an immediate close would reset the connection, and
	// a reset can overtake the answer.
	lingerTime  = 250 * time.Millisecond
	lingerBytes = 256 << 10
)

// phase is what a connection is doing. It is kept in the two lowest bits of
// conn.state, under the time it began, in nanoseconds.
type phase int64

const (
	phaseNew     phase = iota // nothing received yet
	phaseReading              // bytes of a request came; it is not answered yet
	phaseWriting              // an answer is being handed to the kernel
	phaseIdle                 // answered, waiting for the next request

	phaseMask = 3
)

// listener wraps the public listener: it bounds the number of connections and
// ends those that are slow or idle. The stamp costs two stores per read or
// write call, where a deadline per request costs 12 % of the CPU.
type listener struct {
	net.Listener
	max  int
	slow time.Duration // for a request to arrive, for an answer to be taken
	idle time.Duration // between requests

	// ahead is called with what was just read from a connection, before it is
	// parsed. Optional.
	ahead func(received []byte)

	now atomic.Int64 // coarse clock: ns since the first sweep, at sweepInterval

	mu    sync.Mutex
	conns map[*conn]struct{}

	rejected, slowClosed, idleClosed atomic.Uint64
}

type conn struct {
	net.Conn
	owner *listener
	state atomic.Int64 // phase and its beginning; written by the serving goroutine
	ended atomic.Bool  // the peer is gone, or the sweeper has ended it
	close sync.Once
}

func newListener(ln net.Listener, maxConns int, slow, idle time.Duration) *listener {
	return &listener{Listener: ln, max: maxConns, slow: slow, idle: idle, conns: map[*conn]struct{}{}}
}

var tooManyConns = []byte("HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\n" +
	"Content-Length: 6\r\nRetry-After: " + retryAfter + "\r\nVerve-Reason: busy\r\nConnection: close\r\n\r\nfailed")

// Accept returns the next connection within the limit. Those over it get 503.
func (l *listener) Accept() (net.Conn, error) {
	for {
		nc, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &conn{Conn: nc, owner: l}
		c.enter(phaseNew)
		l.mu.Lock()
		over := len(l.conns) >= l.max
		if !over {
			l.conns[c] = struct{}{}
		}
		l.mu.Unlock()
		if !over {
			return c, nil
		}
		l.rejected.Add(1)
		// An empty send buffer takes so few bytes without blocking.
		_, _ = nc.Write(tooManyConns)
		_ = nc.Close()
	}
}

func (c *conn) enter(p phase) { c.state.Store(c.owner.now.Load()&^phaseMask | int64(p)) }

func (c *conn) phase() (p phase, since time.Duration) {
	s := c.state.Load()
	return phase(s & phaseMask), time.Duration(s &^ phaseMask)
}

// Read marks the beginning of a request with its first byte. A reader that has
// not its whole buffer to fill holds the first part of a pipelined request.
func (c *conn) Read(p []byte) (int, error) {
	if len(p) < readBuffer && phase(c.state.Load()&phaseMask) == phaseIdle {
		c.enter(phaseReading)
	}
	n, err := c.Conn.Read(p)
	if n > 0 && phase(c.state.Load()&phaseMask) != phaseReading {
		c.enter(phaseReading)
	}
	if err != nil {
		c.ended.Store(true)
	}
	if c.owner.ahead != nil && n > 0 {
		c.owner.ahead(p[:n])
	}
	return n, err
}

// Write marks the end of a request with its answer.
func (c *conn) Write(p []byte) (int, error) {
	c.enter(phaseWriting)
	n, err := c.Conn.Write(p)
	c.enter(phaseIdle)
	if err != nil {
		c.ended.Store(true)
	}
	return n, err
}

// Close lets the client read its last answer before the connection goes.
func (c *conn) Close() error {
	c.close.Do(func() {
		half, ok := c.Conn.(interface{ CloseWrite() error })
		if c.ended.Load() || !ok || half.CloseWrite() != nil {
			c.remove()
			return
		}
		go func() {
			_ = c.Conn.SetReadDeadline(time.Now().Add(lingerTime))
			_, _ = io.CopyN(io.Discard, c.Conn, lingerBytes)
			c.remove()
		}()
	})
	return nil
}

func (c *conn) remove() {
	_ = c.Conn.Close() // nothing can be done about a failed close
	c.owner.mu.Lock()
	delete(c.owner.conns, c)
	c.owner.mu.Unlock()
}

// sweep ends the connections whose phase has lasted too long, until stop.
func (l *listener) sweep(stop <-chan struct{}) {
	began := time.Now()
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		now := time.Since(began)
		l.now.Store(int64(now))
		l.mu.Lock()
		for c := range l.conns {
			c.sweep(now)
		}
		l.mu.Unlock()
	}
}

func (c *conn) sweep(now time.Duration) {
	p, since := c.phase()
	lasted := now - since
	switch l := c.owner; {
	case p == phaseIdle && lasted > l.idle:
		l.idleClosed.Add(c.end())
	case p == phaseWriting && lasted > l.slow:
		l.slowClosed.Add(c.end())
		_ = c.Conn.Close() // unblocks the write: the client does not read
	case (p == phaseNew || p == phaseReading) && lasted > l.slow:
		l.slowClosed.Add(c.end())
	}
}

// end makes the next read fail: a request begun is answered 408, an idle
// connection is closed. It returns 1 the first time.
func (c *conn) end() uint64 {
	_ = c.Conn.SetReadDeadline(time.Unix(1, 0)) // long ago
	if c.ended.Swap(true) {
		return 0
	}
	return 1
}

// busy counts the connections whose answer is not yet with the kernel.
func (l *listener) busy() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		if p, _ := c.phase(); p == phaseReading || p == phaseWriting {
			n++
		}
	}
	return n
}

func (l *listener) open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.conns)
}
