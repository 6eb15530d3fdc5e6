package server

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/valyala/fasthttp"

	"verve/internal/logline"
)

const (
	// sweepInterval is how often the sweeper checks all connections, and the resolution
	// of their time stamps: fine enough for timeouts of seconds.
	sweepInterval = 100 * time.Millisecond

	// A connection closed by the server while its client is still sending is
	// read on for a moment: an immediate close would reset the connection, and
	// a reset can overtake the answer.
	lingerTime = 250 * time.Millisecond
	// lingerBytes is how much is read then: a batch four times too large, to its end.
	lingerBytes = 4 * DefaultMaxBatchBytes

	// lingerBuffer is small, because all connections may be closed at once.
	lingerBuffer = 512

	// prefix6 is the part of an IPv6 address that stands for a caller: a
	// network of this size belongs to one subscriber.
	prefix6 = 64

	// h2Preface begins a connection of HTTP/2 (RFC 9113, section 3.4).
	h2Preface = "PRI * HTTP/2"

	// sampleEvery: one of so many reads from a connection is timed. Reading the clock
	// twice takes 150 ns, so it costs 10 ns per read, of 7,000 ns and more.
	sampleEvery = 16
)

// phase is what a connection is doing. It is the three lowest bits of conn.state; the
// other bits are the time when it began, in nanoseconds.
type phase int64

const (
	phaseNew     phase = iota // nothing received yet
	phaseReading              // bytes of a request came; it is not answered yet, or its answer waits to be written
	phaseWriting              // answers are being handed to the kernel
	phaseIdle                 // all are answered, waiting for the next request
	phaseQueued               // bytes of a request came, and it waits for a place in listener.served

	phaseMask = 7
)

// busy reports whether there is a request whose answer is not yet with the kernel.
func (p phase) busy() bool { return p == phaseReading || p == phaseWriting || p == phaseQueued }

// listener wraps the public listener. It bounds the number of connections, parks
// those that are idle (park.go) and ends those that are slow, or idle for long. For that
// each connection has a stamp, conn.state. It costs two stores per read or write call; a
// deadline per request would cost 12 % of the CPU.
type listener struct {
	*patientListener
	cfg *Config

	// maxTaken bounds the bytes that are read for one answer. In chunks of one byte each
	// byte of a body takes six. The headers, and those of requests read before, are added.
	maxTaken int

	tls  *tls.Config // nil: plain
	fast *fastPath   // nil: every request is fasthttp's

	now atomic.Int64 // coarse clock: ns since the first sweep, at sweepInterval

	served  chan struct{} // one for each connection that fasthttp serves; its capacity is the limit
	waiting atomic.Int32  // how many connections with a request wait for a place in served; the stop adds 1

	steadyAfter int // see steadyAfter; another value in tests

	took histogram // from receiving a request to handing over its answer

	mu         sync.Mutex
	conns      map[*conn]struct{}
	perAddr    map[netip.Addr]int // of conns; only with MaxConnsPerAddress
	turnedAway int                // connections over the limit that are read on; more are closed at once, and may see a reset
	admitted   uint32
	stopping   atomic.Bool // set under mu, so that every connection is either refused or ended

	parked atomic.Uint64 // connections parked so far

	// Only the sweeper uses these: parked in its last round, parked when it last gave
	// memory back, and when that was.
	parkedSeen, parkedGone uint64
	gaveBack               time.Duration

	rejected, rejectedAddr, slowClosed, idleClosed, badHandshakes atomic.Uint64

	rejections logline.Sampler // of the log
}

type conn struct {
	net.Conn            // with TLS, if the listener has it
	raw      net.Conn   // the socket
	from     netip.Addr // counted in perAddr; not valid without that limit
	owner    *listener
	state    atomic.Int64 // phase and its beginning; written by the serving goroutine
	ended    atomic.Bool  // the peer is gone, or the sweeper has ended it
	close    sync.Once

	// A deadline in the past ends a read of the socket. Before it is set, one of these is:
	// nudged to park the connection, stopped to end it for good.
	nudged, stopped atomic.Bool

	parking atomic.Bool // fasthttp is leaving the connection, which stays open
	inside  atomic.Bool // fasthttp has it

	// Only attend, and then the serving goroutine, use these: the first byte of a request,
	// and whether fasthttp has not read it yet.
	first [1]byte
	ahead bool

	// Only the serving goroutine uses the following fields. These are the reads so far, and
	// when the read that is timed returned; zero while none is timed.
	reads uint32
	timed time.Time

	// The reads before fasthttp had the connection.
	readsBefore uint32

	// The bytes received since the last answer, whether there was one, and whether the
	// connection began as one of HTTP/2.
	taken    int
	answered bool
	h2       bool

	// For the fastPath: whether fasthttp is between two requests, what followed the query
	// in a plain one, and a number by which connections are spread over cache lines.
	between bool
	tail    tail
	number  uint64

	// For fastPath.waitAndRead: the socket, nil if it is not to be used, and how many reads
	// have given plain requests and nothing else.
	socket syscall.RawConn
	steady int
}

func newListener(ln net.Listener, cfg *Config) *listener {
	l := &listener{
		patientListener: newPatientListener(ln, "public", cfg.Log), cfg: cfg,
		served: make(chan struct{}, cfg.limits.MaxServed), maxTaken: 8*max(maxBody, cfg.MaxBatchBytes) + 2*readBuffer,
		conns: map[*conn]struct{}{}, perAddr: map[netip.Addr]int{},
		took:        newHistogram("verve_request_duration_seconds", requestBuckets),
		rejections:  logline.Sampler{Every: refusalsEvery},
		steadyAfter: steadyAfter,
	}
	if cfg.TLS != nil {
		l.tls = cfg.TLS.serverConfig()
	}
	return l
}

var tooManyConns = []byte("HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\n" +
	"Cache-Control: no-store\r\nContent-Length: 6\r\nRetry-After: " + retryAfter + "\r\nVerve-Reason: busy\r\nConnection: close\r\n\r\nfailed")

// accept returns the next connection within the limits. A connection over a limit gets 503.
func (l *listener) accept() (*conn, error) {
	for {
		nc, err := l.Accept()
		if err != nil {
			return nil, err
		}
		c := &conn{Conn: nc, raw: nc, owner: l}
		if l.tls != nil {
			c.Conn = tls.Server(beneath{nc, c}, l.tls) // shakes hands at the first Read
		} else if sc, ok := nc.(syscall.Conn); ok && edgeTriggered {
			c.socket, _ = sc.SyscallConn() // if this fails it is nil, and not used
		}
		c.enter(phaseNew)
		if refused, limit := l.admit(c); refused != nil {
			refused.Add(1)
			l.logRejection(limit)
			l.turnAway(c)
			continue
		}
		return c, nil
	}
}

// admit adds c to the connections, or returns the counter of the limit that it is over, and its
// name.
func (l *listener) admit(c *conn) (refused *atomic.Uint64, limit string) {
	if l.cfg.MaxConnsPerAddress > 0 {
		c.from = caller(c.raw.RemoteAddr())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.stopping.Load(), len(l.conns) >= l.cfg.limits.MaxConns:
		return &l.rejected, "max-conns"
	case l.cfg.MaxConnsPerAddress > 0 && l.perAddr[c.from] >= l.cfg.MaxConnsPerAddress:
		return &l.rejectedAddr, "max-conns-per-address"
	}
	l.conns[c] = struct{}{}
	l.admitted++
	c.reads = l.admitted // so that of connections with a single read one in sampleEvery is timed
	c.number = uint64(l.admitted)
	if l.cfg.MaxConnsPerAddress > 0 {
		l.perAddr[c.from]++
	}
	return nil, ""
}

// logRejection logs the first connection over a limit in a while.
func (l *listener) logRejection(limit string) {
	if l.stopping.Load() {
		return
	}
	if hidden, ok := l.rejections.Allow(time.Now()); ok {
		l.log.Warn().Stringer("reason", reasonBusy).Str("limit", limit).Uint64("hidden", hidden).Msg("a connection over the limit was refused")
	}
}

// caller is the part of an address that counts as one client.
func caller(addr net.Addr) netip.Addr {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	if ip.Is6() {
		ip = netip.PrefixFrom(ip, prefix6).Masked().Addr()
	}
	return ip
}

// turnAway answers a connection over the limit, and closes it.
func (l *listener) turnAway(c *conn) {
	if l.tls != nil {
		_ = c.raw.Close() // a TLS handshake only for a refusal costs too much
		return
	}
	l.mu.Lock()
	readOn := l.turnedAway < l.cfg.limits.MaxTurnedAway
	if readOn {
		l.turnedAway++
	}
	l.mu.Unlock()
	// This does not block: the send buffer is empty, and these are few bytes.
	_, _ = c.raw.Write(tooManyConns)
	if !readOn {
		_ = c.raw.Close()
		return
	}
	go func() {
		linger(c.raw)
		l.mu.Lock()
		l.turnedAway--
		l.mu.Unlock()
	}()
}

// linger closes a connection whose last answer is written. Before that it waits until the
// client has closed its side, or has had lingerTime to read.
func linger(raw net.Conn) {
	if half, ok := raw.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		_ = raw.SetReadDeadline(time.Now().Add(lingerTime))
		var b [lingerBuffer]byte
		for read := 0; read < lingerBytes; {
			n, err := raw.Read(b[:])
			if err != nil {
				break
			}
			read += n
		}
	}
	_ = raw.Close() // nothing can be done about a failed close
}

func (c *conn) enter(p phase) { c.state.Store(c.owner.now.Load()&^phaseMask | int64(p)) }

func (c *conn) phase() (p phase, since time.Duration) {
	s := c.state.Load()
	return phase(s & phaseMask), time.Duration(s &^ phaseMask)
}

// idle notes that the connection waits for the first byte of a request.
func (c *conn) idle() {
	c.enter(phaseIdle)
	c.taken = 0
}

// Read gives fasthttp the bytes of requests that the fastPath does not answer.
func (c *conn) Read(p []byte) (int, error) {
	if c.between {
		if len(c.tail.bytes) > 0 {
			return c.owner.fast.read(c, p)
		}
		c.idle()
	}
	return c.receive(p, c.between)
}

// receive reads from the connection. With the first byte of a request it enters phaseReading.
// Between two requests it may return errParked instead.
func (c *conn) receive(p []byte, between bool) (int, error) {
	if between {
		c.yieldIfAwaited()
	}
	var n int
	var err error
	if c.ahead {
		n, err = c.pull(p)
	} else { // pull is not called: after a wait each function to return from costs 20 ns
		n, err = c.Conn.Read(p)
	}
	for err != nil && n == 0 && c.goesOn(err) {
		if between {
			return 0, c.park()
		}
		n, err = c.pull(p)
	}
	return n, c.received(p, n, err)
}

// yieldIfAwaited makes the next read end, to park c, if another connection waits for its place.
func (c *conn) yieldIfAwaited() {
	if c.owner.waiting.Load() > 0 && !c.nudged.Swap(true) {
		c.interrupt() // c is not parked at once, because TLS may have requests that it has read
	}
}

// received notes what a read into p has given, and returns the error to pass on.
func (c *conn) received(p []byte, n int, err error) error {
	if n > 0 && phase(c.state.Load()&phaseMask) != phaseReading {
		c.enter(phaseReading)
	}
	if c.taken < len(h2Preface) {
		next := h2Preface[c.taken:min(c.taken+n, len(h2Preface))]
		c.h2 = !c.answered && (c.h2 || c.taken == 0) && string(p[:len(next)]) == next
	}
	// Endless input ends here: the handler bounds the bytes of a body, but not the number of
	// its chunks, which may have extensions.
	if c.taken += n; c.taken > c.owner.maxTaken {
		err = fasthttp.ErrBodyTooLarge
	}
	if err != nil {
		c.ended.Store(true)
		if c.owner.tls != nil {
			c.handshakeFailed(err)
		}
		// If fasthttp gets an io.EOF before a body, it drops the answers to earlier
		// requests that are not flushed. After any other error it writes these and then
		// the answer to the error. With TLS the end can be all that came: then there is
		// no request.
		if err == io.EOF && c.reads != c.readsBefore && phase(c.state.Load()&phaseMask) == phaseReading {
			err = io.ErrUnexpectedEOF
		}
	}
	// A request that arrives in several parts is timed from the last one.
	if c.reads++; c.reads%sampleEvery == 0 || !c.timed.IsZero() {
		c.timed = time.Now()
	}
	return err
}

// Write marks the end of requests with their answers. The connection is idle only when more
// is to be read: fasthttp also writes when its buffer is full, while the answers to later
// requests are still to come.
func (c *conn) Write(p []byte) (int, error) {
	c.enter(phaseWriting)
	n, err := c.Conn.Write(p)
	c.enter(phaseReading)
	c.taken, c.answered = 0, true
	if !c.timed.IsZero() {
		c.owner.took.observe(time.Since(c.timed))
		c.timed = time.Time{}
	}
	if err != nil {
		c.ended.Store(true)
	}
	return n, err
}

var plainOnTLS = []byte("HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n" +
	"Cache-Control: no-store\r\nContent-Length: 6\r\nVerve-Reason: bad-request\r\nConnection: close\r\n\r\nfailed")

// handshakeFailed counts a connection whose TLS handshake failed. A client that sent
// plain HTTP gets an answer in plain HTTP.
func (c *conn) handshakeFailed(err error) {
	if secure, ok := c.Conn.(*tls.Conn); !ok || secure.ConnectionState().HandshakeComplete {
		return
	}
	c.owner.badHandshakes.Add(1)
	notTLS, ok := errors.AsType[tls.RecordHeaderError](err)
	if !ok || notTLS.Conn == nil {
		return
	}
	for _, b := range notTLS.RecordHeader { // the first letters of a method and a space
		if (b < 'A' || b > 'Z') && b != ' ' && b != '/' {
			return
		}
	}
	_, _ = c.raw.Write(plainOnTLS)
}

// Close lets the client read its last answer before the connection goes. A connection that
// is being parked stays open.
func (c *conn) Close() error {
	if c.parking.Load() {
		return nil
	}
	c.close.Do(func() {
		p, _ := c.phase()
		c.enter(phaseIdle) // the stop does not wait for it
		if secure, ok := c.Conn.(*tls.Conn); ok {
			_ = secure.CloseWrite() // so the client knows that nothing was cut off
		}
		// If the sweeper has ended c within a request, the client may still send, and must
		// get its 408: c lingers. Else an ended connection is closed at once.
		if c.ended.Load() && !(c.stopped.Load() && p == phaseReading) {
			c.remove()
			return
		}
		go func() {
			linger(c.raw)
			c.remove()
		}()
	})
	return nil
}

func (c *conn) remove() {
	_ = c.raw.Close() // nothing can be done about a failed close
	l := c.owner
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, c)
	if l.cfg.MaxConnsPerAddress > 0 {
		if l.perAddr[c.from]--; l.perAddr[c.from] == 0 {
			delete(l.perAddr, c.from)
		}
	}
}

// sweep ends the connections whose phase has lasted too long, until stop.
func (l *listener) sweep(stop <-chan struct{}) {
	began := time.Now()
	every(sweepInterval, stop, func() {
		now := time.Since(began)
		l.now.Store(int64(now))
		l.mu.Lock()
		for c := range l.conns {
			c.sweep(now)
		}
		l.mu.Unlock()
		l.giveBack(now)
	})
}

func (c *conn) sweep(now time.Duration) {
	p, since := c.phase()
	lasted := now - since
	switch l := c.owner; {
	case p == phaseIdle && lasted > l.cfg.IdleTimeout:
		c.end(&l.idleClosed)
	case p == phaseWriting && lasted > l.cfg.SlowTimeout:
		c.end(&l.slowClosed)
		_ = c.raw.Close() // unblocks the write: the client does not read
	case (p == phaseNew || p == phaseReading) && lasted > l.cfg.SlowTimeout:
		c.end(&l.slowClosed)
	case p == phaseIdle && c.inside.Load() && (lasted > parkAfter || l.waiting.Load() > 0) && !c.nudged.Swap(true):
		c.interrupt()
	}
}

// end makes the next read fail: then a request that has begun is answered 408, and an
// idle connection is closed. It counts the connection, once, and before the client can
// notice the end.
func (c *conn) end(count *atomic.Uint64) {
	if !c.ended.Swap(true) {
		count.Add(1)
	}
	c.stopReading()
}

// stopReading makes the read under way, or the next one, fail.
func (c *conn) stopReading() {
	c.stopped.Store(true)
	c.interrupt()
}

func (c *conn) interrupt() { _ = c.raw.SetReadDeadline(time.Unix(1, 0)) } // long ago

// busy counts the connections whose answer is not yet with the kernel.
func (l *listener) busy() int { return l.count(phase.busy) }

// expecting counts the connections that are busy or new: the clients of new ones expect an
// answer as well.
func (l *listener) expecting() int {
	return l.count(func(p phase) bool { return p == phaseNew || p.busy() })
}

func (l *listener) count(of func(phase) bool) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		if p, _ := c.phase(); of(p) {
			n++
		}
	}
	return n
}

func (l *listener) open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.conns) + l.turnedAway
}
