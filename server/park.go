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
	// parkAfter is how long a connection is idle until fasthttp gives it back. A
	// client that asks once in a while then pays for a goroutine and the reading of
	// its headers, some 10 us, each time; one under load never does.
	parkAfter = time.Second

	// stopGrace is how long a connection without a request is open after the server
	// has stopped accepting: one may be on its way.
	stopGrace = 50 * time.Millisecond

	// After giveBackParked parkings, of 20 KB each, and with none since the last
	// sweep, memory goes back to the system, at most once in giveBackPause: without
	// requests there is no garbage collection for two minutes.
	giveBackParked = 256
	giveBackPause  = 10 * time.Second
)

// errParked ends fasthttp's work on a connection that stays open.
var errParked = errors.New("server: the connection is parked")

// attend waits for the first byte of a request and has fasthttp serve the connection
// until it is idle for a while. That gives back what fasthttp needs for it: buffers of
// 12 KiB and a stack of 8 KiB. What a waiting connection costs is a goroutine with the
// smallest stack. So a connection without a request costs little, however many there
// are, and the memory of those with one is bounded by l.served.
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
		go s.attend(c) // the stack of this goroutine is large by now
	}
}

// await returns when a request begins, or when a connection without one has been open
// for too long and is to be answered 408. It reads one byte: no other way to learn that
// the socket has some works on every system.
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
		// The sweeper may interrupt for parking a connection that was parked meanwhile.
		if !c.goesOn(err) {
			c.ended.Store(true)
			return err
		}
	}
}

// takePlace takes a place in l.served. It waits for one as long as a request may take to
// arrive; meanwhile the connections that are idle are parked. Places are given in the
// order in which connections came to wait: a channel serves its senders so. The time
// for the request to arrive begins with the place.
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

// refuseBusy answers 503 to a connection whose request could not be read in time, because
// too many others are being read. A TLS handshake only for that costs too much.
func (c *conn) refuseBusy() {
	c.owner.rejected.Add(1)
	if secure, ok := c.Conn.(*tls.Conn); !ok || secure.ConnectionState().HandshakeComplete {
		_, _ = c.Write(tooManyConns)
	}
	_ = c.Close()
}

// pull reads from the connection, first what await has read.
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

// goesOn reports whether a read that failed may be taken up again: it was ended for parking
// alone, or by the deadline of the stop for connections without a request, on which one has
// begun meanwhile. (It may have waited for a place until then.)
//
// It sets the deadline before it looks at stopped, which stopReading sets
// before its deadline: an end that comes meanwhile is either seen here or has its
// deadline after this one. The same holds for stopAccepting and stopping, at which await
// looks next.
//
// nudged stays set until then: a nudge in between would lose its deadline and be taken for
// one that is under way, so that the connection was never parked again.
func (c *conn) goesOn(err error) bool {
	p, _ := c.phase()
	if !c.nudged.Load() && (p != phaseReading || !c.owner.stopping.Load()) {
		return false
	}
	_ = c.raw.SetReadDeadline(time.Time{})
	c.nudged.Store(false)
	return errors.Is(err, os.ErrDeadlineExceeded) && !c.stopped.Load()
}

// park makes fasthttp leave the connection. What conn has learnt of its requests is
// dropped.
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
		runtime.GC()         // what pools hold is free after the second
		debug.FreeOSMemory() // which is this
	}()
}

// stopAccepting closes the listener, and the connections without a request. One that has a
// request is parked behind its answer, and closed then.
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
