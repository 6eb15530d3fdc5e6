package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/valyala/fasthttp"

	"verve/internal/retry"
)

// Between two attempts to connect a connection waits this long: a server that is
// started again every half second must be met within its life.
const (
	minBackoff = time.Millisecond
	maxBackoff = 100 * time.Millisecond
)

// conn is one keep-alive connection, opened again whenever it breaks. It
// writes a batch of requests, reads as many answers, and reports them; every
// buffer is reused, so that the driver leaves the cores to the server.
type conn struct {
	d      *driver
	target int
	rng    *rand.Rand
	out    []byte
	body   []byte // of the last request with a batch
	net    net.Conn
	in     *bufio.Reader // reads c, and so net
	failed error         // of the last read from net
	reply  fasthttp.Response
	ids    []ask    // of the batch under way
	words  [][]byte // of an answer, one for each id
	got    []answer
	newest int64 // the target's latest window, as far as this connection knows

	windows []judgedIn // of an answer

	answered bool // since the last dial
}

func newConn(d *driver, i int) *conn {
	return &conn{
		d:      d,
		target: i % len(d.targets),
		rng:    rand.New(rand.NewPCG(d.Seed, uint64(i))),
		in:     bufio.NewReaderSize(nil, 16<<10),
	}
}

// Read implements io.Reader for c.in, and keeps the error of a connection apart from those
// of an answer that makes no sense.
func (c *conn) Read(b []byte) (n int, err error) {
	n, c.failed = c.net.Read(b)
	return n, c.failed
}

func (c *conn) run(ctx context.Context) {
	backoff := minBackoff
	for ctx.Err() == nil {
		c.answered = false
		if nc, err := dial(ctx, c.d.targets[c.target].addr, c.d.Timeout); err == nil {
			c.d.dials.Add(1)
			done := c.serve(ctx, nc)
			nc.Close()
			if done {
				return
			}
			if c.answered {
				backoff = minBackoff
			}
		}
		// A server that is starting must not be met by all connections in
		// step: the wait is drawn between half and all of the backoff.
		_ = retry.Sleep(ctx, backoff/2+time.Duration(c.rng.Int64N(int64(backoff/2)+1)))
		backoff = min(2*backoff, maxBackoff)
	}
}

// dial connects to a server. While that is down, a port of the range that the kernel draws
// from can be connected to itself, and would answer with the request: that is an error.
func dial(ctx context.Context, addr string, timeout time.Duration) (net.Conn, error) {
	dialer := net.Dialer{Timeout: timeout}
	nc, err := dialer.DialContext(ctx, "tcp", addr)
	if err == nil && nc.LocalAddr().String() == nc.RemoteAddr().String() {
		nc.Close()
		return nil, errors.New("connected to itself")
	}
	return nc, err
}

// listens reports whether a server takes connections.
func listens(addr string, timeout time.Duration) bool {
	nc, err := dial(context.Background(), addr, timeout)
	if err == nil {
		nc.Close()
	}
	return err == nil
}

// serve uses one connection until it breaks. It returns true when there is
// nothing left to do.
func (c *conn) serve(ctx context.Context, nc net.Conn) bool {
	c.net, c.failed = nc, nil
	c.in.Reset(c)
	c.newest = c.d.truth.record(c.target, time.Now(), nil)
	// The first batch of each connection falls anywhere in its interval, so
	// that a set rate is even over time and not a volley.
	interval := c.d.interval()
	next := time.Now().Add(time.Duration(c.rng.Float64() * float64(interval)))
	var deadline time.Time
	for {
		if !pace(ctx, &next, interval) || !c.fill() {
			return true
		}
		if len(c.ids) == 0 { // others wait for the last answers
			time.Sleep(drainPoll)
			continue
		}
		// Moving the deadline costs as much as parsing an answer: it is moved
		// when a quarter of it is used up, and never falls below the rest.
		now := time.Now()
		if deadline.Sub(now) < c.d.Timeout {
			deadline = now.Add(c.d.Timeout + c.d.Timeout/4)
			nc.SetDeadline(deadline) // fails only on a dead connection, and so will the write
		}
		if n, err := nc.Write(c.out); err != nil {
			if n > 0 {
				c.lost(c.ids, c.earliest(now), c.d.lag(err))
			} else {
				c.d.retries.put(c.target, c.ids...)
			}
			return false
		}
		if c.d.Lose > 0 && c.rng.Float64() < c.d.Lose*cutShare {
			c.lose(now)
			return false
		}
		if !c.answers(now) {
			return false
		}
	}
}

// pace waits for the next batch's time, and returns false if ctx has ended. A connection that
// fell behind does not make up for more than a second: the rate is a ceiling, not a debt.
func pace(ctx context.Context, next *time.Time, interval time.Duration) bool {
	if interval > 0 {
		wait := time.Until(*next)
		if wait > 0 {
			_ = retry.Sleep(ctx, wait)
		} else if wait < -time.Second {
			*next = time.Now()
		}
		*next = next.Add(interval)
	}
	return ctx.Err() == nil
}

// Repeats come half from the ids that are in flight right now, on this and on
// other connections, where a set that is not atomic says `ok` twice, and half
// from a longer past, which at the turn of a window is the previous window:
// the same id must then be accepted once more.
const farRepeats = 1 << 16

// drainPoll is how often a connection looks for a retry when there is nothing else.
const drainPoll = 2 * time.Millisecond

// fill builds the next batch. It returns false when there is nothing left to ask.
func (c *conn) fill() bool {
	d := c.d
	size := d.together()
	c.out = c.out[:0]
	if d.draining {
		c.retry(size)
		c.write()
		return len(c.ids) > 0 || d.truth.pending() > 0
	}
	if d.Requests > 0 {
		begun := d.sent.Add(uint64(size))
		if begun-uint64(size) >= d.Requests {
			return false
		}
		size -= int(max(begun, d.Requests) - d.Requests)
	}
	// A client asks again for what was never answered. Within the window the
	// answer also tells whether the lost request had counted.
	if c.retry(size); len(c.ids) > 0 && c.ids[0].from != 0 {
		size = len(c.ids) // new ids would be in another window
	}
	for len(c.ids) < size {
		var a ask
		if d.Tokens {
			a.token = d.tokens.Add(1)
		}
		if known := d.ids.Load(); d.Repeats > 0 && known > 0 && c.rng.Float64() < d.Repeats {
			span := uint64(farRepeats)
			if c.rng.Uint64()&1 == 0 {
				span = uint64(2 * d.Connections * d.together())
			}
			a.id = known - 1 - c.rng.Uint64N(min(span, known))
		} else {
			a.id = d.ids.Add(1) - 1
		}
		c.ids = append(c.ids, a)
	}
	c.write()
	return true
}

// write renders the requests for the batch.
func (c *conn) write() {
	for asks := c.ids; len(asks) > 0; {
		n := c.inRequest(asks)
		if c.d.Batch > 0 {
			c.writeBatch(asks[:n])
		} else {
			c.writeSingle(asks[0])
		}
		asks = asks[n:]
	}
}

// writeSingle renders a request for one id. Half of the tokens are in a header, half in the
// query.
func (c *conn) writeSingle(a ask) {
	d, t, out := c.d, &c.d.targets[c.target], c.out
	id, key := d.keys.of(a.id)
	out = d.IDs.append(append(out, t.head...), d.Seed, id)
	if key > 0 {
		out = append(append(out, "&key="...), d.keys.escaped[key]...)
	}
	inHeader := a.token%2 == 1
	if a.token != 0 && !inHeader {
		out = d.appendToken(append(out, "&token="...), a.token)
	}
	out = append(out, t.tail...)
	if inHeader {
		out = append(d.appendToken(append(out, "Idempotency-Key: "...), a.token), "\r\n"...)
	}
	c.out = append(out, "\r\n"...)
}

// writeBatch renders a request for several ids: a line for each, or JSON.
func (c *conn) writeBatch(asks []ask) {
	d, body, media := c.d, c.body[:0], "text/plain"
	if d.items() {
		body, media = d.appendItems(body, asks), "application/json"
	} else {
		for _, a := range asks {
			body = append(d.IDs.append(body, d.Seed, a.id), '\n')
		}
	}
	c.out = fmt.Appendf(c.out, "%s%s\r\nContent-Length: %d\r\n\r\n%s", d.targets[c.target].post, media, len(body), body)
	c.body = body
}

// appendItems writes a batch in JSON.
func (d *driver) appendItems(dst []byte, asks []ask) []byte {
	for i, a := range asks {
		id, key := d.keys.of(a.id)
		dst = append(dst, "[,"[min(i, 1)])
		dst = append(d.IDs.append(append(dst, `{"id":"`...), d.Seed, id), '"')
		if key > 0 {
			dst = append(append(append(dst, `,"key":"`...), d.keys.names[key]...), '"')
		}
		if a.token != 0 {
			dst = append(d.appendToken(append(dst, `,"token":"`...), a.token), '"')
		}
		dst = append(dst, '}')
	}
	return append(dst, ']')
}

// appendToken writes the text of a token, which no other run has.
func (d *driver) appendToken(dst []byte, n uint64) []byte {
	dst = append(strconv.AppendUint(dst, d.Seed, 36), '-')
	return strconv.AppendUint(dst, n, 36)
}

// inRequest is how many of the ids that are left the next request has.
func (c *conn) inRequest(left []ask) int {
	most := max(1, c.d.Batch)
	for n, a := range left {
		if a.most > 0 {
			most = min(most, a.most)
		}
		if n > 0 && n >= most {
			return n
		}
	}
	return len(left)
}

// answers reads the answers of the batch, sent at the time given, and reports
// them. It returns false when the connection is of no use any more; what was not
// answered is then in doubt.
func (c *conn) answers(sent time.Time) bool {
	from := c.earliest(sent) // while newest is that of before the batch
	c.got = c.got[:0]
	n, lag, alive := c.read(len(c.ids))
	c.report(sent, from, n)
	if n < len(c.ids) {
		c.lost(c.ids[n:], from, lag)
	}
	return alive
}

// lag is how long the server may go on with the requests of a connection that
// failed with err: not at all if the server let go of it, but if it was the
// driver that lost patience, the server may still come round to them.
func (d *driver) lag(err error) time.Duration {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return d.Timeout
	}
	return 0
}
