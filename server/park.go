package server

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"time"
)

const (
	// parkAfter is after how long an idle connection is taken from fasthttp. Each request of
	// a client that asks rarely then costs a goroutine and the parsing of its headers, some
	// 10 us. A connection under load is never parked.
	parkAfter = time.Second

	// stopGrace is how long a connection without a request stays open after the server
	// has stopped accepting: a request may be on its way.
	stopGrace = 50 * time.Millisecond

	// After giveBackParked parkings, which free 20 KB each, memory is returned to the
	// system, if none was parked since the last sweep, and at most once in giveBackPause.
	// Without requests the garbage collector would not run for two minutes.
	giveBackParked = 256
	giveBackPause  = 10 * time.Second
)

// errParked ends fasthttp's work on a connection that stays open.
var errParked = errors.New("server: the connection is parked")

// attend waits for the first byte of a request, and then lets fasthttp serve the connection
// until it has been idle for parkAfter. Then what fasthttp needs for it is free again: buffers
// of 12 KiB and a stack of 8 KiB. A connection that waits has a goroutine with the smallest
// stack. So connections without a request cost little, however many there are, and the
// memory of those with a request is bounded by l.served.
func (s *Server) attend(c *conn) {
	l := s.ln
	if err := c.await(); err != nil {
		_ = c.Close()
		return
	}
	if !c.takePlace() {
		c.refuseBusy()
		return
	}
	c.readsBefore = c.reads
	c.inside.Store(true)
	_ = s.http.ServeConn(c) // its errors are counted in s.refused
	c.inside.Store(false)
	<-l.served
	if c.parking.Swap(false) {
		go s.attend(c) // a new goroutine, because the stack of this one is large by now
	}
}

// await returns nil when a request begins, or when a new connection has sent none for too long
// and is to be answered 408. It reads one byte: there is no other way that works on every system
// to learn that bytes have arrived.
func (c *conn) await() error {
	for {
		if c.owner.stopping.Load() {
			_ = c.raw.SetReadDeadline(time.Now().Add(stopGrace))
		}
		n, err := c.raw.Read(c.first[:])
		if n > 0 {
			c.ahead = true
			c.enter(phaseReading)
			return nil
		}
		if p, _ := c.phase(); p == phaseNew && c.ended.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
			return nil // fasthttp's read fails, too, and it answers 408
		}
		// The sweeper may interrupt, to park it, a connection that was parked meanwhile.
		if !c.goesOn(err) {
			c.ended.Store(true)
			return err
		}
	}
}

// takePlace takes a place in l.served. It waits for one for SlowTimeout at most; meanwhile
// idle connections are parked. Waiting connections get places in their order, because a channel
// serves its senders in order. The time in which the request must arrive begins with the place.
func (c *conn) takePlace() bool {
	l := c.owner
	select {
	case l.served <- struct{}{}:
		return true
	default:
	}
	c.enter(phaseQueued)
	l.waiting.Add(1)
	defer l.waiting.Add(-1)
	patience := time.NewTimer(l.cfg.SlowTimeout)
	defer patience.Stop()
	select {
	case l.served <- struct{}{}:
		c.enter(phaseReading)
		return true
	case <-patience.C:
		return false
	}
}

// refuseBusy answers 503 to a connection that got no place in time, because too many others
// have a request. It does not answer if that would take a TLS handshake, which costs too much.
func (c *conn) refuseBusy() {
	c.owner.rejected.Add(1)
	if secure, ok := c.Conn.(*tls.Conn); !ok || secure.ConnectionState().HandshakeComplete {
		_, _ = c.Write(tooManyConns)
	}
	_ = c.Close()
}

// pull reads from the connection: first the byte that await has read.
func (c *conn) pull(p []byte) (int, error) {
	if c.owner.tls == nil {
		return c.pullRaw(p)
	}
	return c.Conn.Read(p)
}

func (c *conn) pullRaw(p []byte) (int, error) {
	if c.ahead && len(p) > 0 {
		c.ahead = false
		return copy(p, c.first[:]), nil
	}
	return c.raw.Read(p)
}

// beneath is the socket under TLS.
type beneath struct {
	net.Conn
	c *conn
}

func (b beneath) Read(p []byte) (int, error) { return b.c.pullRaw(p) }

// goesOn reports whether a read that failed may be repeated. It may if the read was ended only
// to park the connection; or by the deadline that the stop sets on connections without a
// request, if a request has begun meanwhile. (It may have waited for a place until then.)
//
// It removes the deadline before it reads stopped, and stopReading sets stopped before its
// deadline. So if the connection is ended meanwhile, either goesOn sees stopped, or that
// deadline is set after this one. The same holds for stopAccepting and stopping, which await
// reads next.
//
// nudged is cleared only after the deadline: a nudge in between would lose its deadline but
// look like one under way, and the connection would never be parked again.
func (c *conn) goesOn(err error) bool {
	p, _ := c.phase()
	if !c.nudged.Load() && (p != phaseReading || !c.owner.stopping.Load()) {
		return false
	}
	_ = c.raw.SetReadDeadline(time.Time{})
	c.nudged.Store(false)
	return errors.Is(err, os.ErrDeadlineExceeded) && !c.stopped.Load()
}

// park makes fasthttp leave the connection, by the error that it returns. It drops what conn
// has learnt of its requests.
func (c *conn) park() error {
	c.parking.Store(true)
	c.owner.parked.Add(1)
	c.tail, c.between = tail{}, false
	return errParked
}

// giveBack returns the memory of many parked connections to the system.
func (l *listener) giveBack(now time.Duration) {
	parked := l.parked.Load()
	quiet := parked == l.parkedSeen
	l.parkedSeen = parked
	if !quiet || parked-l.parkedGone < giveBackParked || now-l.gaveBack < giveBackPause {
		return
	}
	l.parkedGone, l.gaveBack = parked, now
	go func() {
		runtime.GC()         // what is in pools is free after two collections
		debug.FreeOSMemory() // this is the second one
	}()
}

// stopAccepting closes the listener, and after stopGrace the connections without a request. A
// connection with a request is parked after its answer, and closed then.
func (l *listener) stopAccepting() {
	_ = l.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopping.Store(true)
	l.waiting.Add(1)
	for c := range l.conns {
		if p, _ := c.phase(); !p.busy() {
			_ = c.raw.SetReadDeadline(time.Now().Add(stopGrace))
		}
	}
}
