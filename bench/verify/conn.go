package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// load is what the driver does to the server, and how it reads the answers.
type load struct {
	Connections     int
	Pipeline        int
	Batch           int     // ids in a request, in its body; 0: one, in its query
	Rate            float64 // requests a second over all connections; 0: as fast as it goes
	Requests        uint64  // stop after so many; 0: when the context ends
	Repeats         float64 // share of requests that ask for an id once more
	IDs             idForm
	Seed            uint64
	Timeout         time.Duration // of one answer
	DuplicateStatus int
}

// target is one instance, or one load balancer.
type target struct {
	addr string
	head []byte // of a request, up to the id
	tail []byte // of a request, after it
	post []byte // of a request with a batch, up to the length of its body
}

func newTarget(raw string) (target, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return target{}, fmt.Errorf("--url: %w", err)
	}
	if u.Scheme != "http" || u.Hostname() == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return target{}, fmt.Errorf("--url: %q is not http://HOST[:PORT]", u.Redacted())
	}
	port := u.Port()
	if port == "" {
		port = "80"
	}
	base := u.EscapedPath()
	for len(base) > 0 && base[len(base)-1] == '/' {
		base = base[:len(base)-1]
	}
	return target{
		addr: net.JoinHostPort(u.Hostname(), port),
		head: []byte("GET " + base + "/api/verve/accept?id="),
		tail: []byte(" HTTP/1.1\r\nHost: " + u.Host + "\r\n\r\n"),
		post: []byte("POST " + base + "/api/verve/accept HTTP/1.1\r\nHost: " + u.Host + "\r\nContent-Type: text/plain\r\nContent-Length: "),
	}, nil
}

// driver puts the load on the targets and tells the truth what came back.
type driver struct {
	load    load
	targets []target
	truth   *truth
	ids     atomic.Uint64 // numbers handed out; also the upper end of the repeats
	sent    atomic.Uint64 // requests begun, for load.Requests
	dials   atomic.Uint64 // connections opened, the first ones included

	broken atomic.Uint64 // answers that are not the contract's
	stop   context.CancelFunc
}

// maxBroken answers that make no sense end the run: this is not the server, or
// not its flags, and an hour of it would say no more.
const maxBroken = 100

func (d *driver) protocol(format string, args ...any) {
	d.truth.fault("protocol", format, args...)
	if d.broken.Add(1) == maxBroken {
		d.stop()
	}
}

// run drives until ctx ends or the requests are used up. Every request that
// was sent is then answered or in doubt.
func (d *driver) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d.stop = cancel
	settler := make(chan struct{})
	go func() {
		defer close(settler)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				d.truth.settleOld()
			}
		}
	}()
	var connections sync.WaitGroup
	for i := range d.load.Connections {
		connections.Go(func() { newConn(d, i).run(ctx) })
	}
	connections.Wait()
	cancel()
	<-settler
}

// maxBackoff bounds the wait between two attempts to connect: a server that is
// started again every half second must be met within its life.
const maxBackoff = 100 * time.Millisecond

// conn is one keep-alive connection, opened again whenever it breaks. It
// writes a batch of requests, reads as many answers, and reports them; every
// buffer is reused, so that the driver leaves the cores to the server.
type conn struct {
	d      *driver
	target int
	rng    *rand.Rand
	out    []byte
	body   []byte // of one request with a batch
	in     []byte
	ids    []uint64 // of the batch under way
	again  []uint64 // in doubt since the last break, asked again first
	got    []answer
	newest int64 // the target's latest window, as far as this connection knows

	answered   bool   // since the last dial
	windowText []byte // the last Verve-Window, and what it says
	windows    []judgedIn
}

// judgedIn is a window of an answer, and how many of its ids were judged there, in
// order; math.MaxInt is all.
type judgedIn struct {
	window int64
	ids    int
}

func newConn(d *driver, i int) *conn {
	return &conn{
		d:      d,
		target: i % len(d.targets),
		rng:    rand.New(rand.NewPCG(d.load.Seed, uint64(i))),
		in:     make([]byte, 16<<10+len("unavailable\n")*d.load.Batch),
	}
}

func (c *conn) run(ctx context.Context) {
	const minBackoff = time.Millisecond
	dialer := net.Dialer{Timeout: c.d.load.Timeout}
	backoff := minBackoff
	for ctx.Err() == nil {
		c.answered = false
		nc, err := dialer.DialContext(ctx, "tcp", c.d.targets[c.target].addr)
		if err == nil && nc.LocalAddr().String() == nc.RemoteAddr().String() {
			// With the server away, a port of the range that the kernel draws
			// from can be connected to itself, and would answer with the request.
			nc.Close()
			err = errSelf
		}
		if err == nil {
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
		wait := time.NewTimer(backoff/2 + time.Duration(c.rng.Int64N(int64(backoff/2)+1)))
		select {
		case <-ctx.Done():
			wait.Stop()
		case <-wait.C:
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

var errSelf = errors.New("connected to itself")

// serve uses one connection until it breaks. It says true when there is
// nothing left to do.
func (c *conn) serve(ctx context.Context, nc net.Conn) bool {
	load := &c.d.load
	c.newest = c.d.truth.newestOf(c.target)
	var interval time.Duration
	if load.Rate > 0 {
		interval = time.Duration(float64(load.together()*load.Connections) / load.Rate * float64(time.Second))
	}
	// The first batch of each connection falls anywhere in its interval, so
	// that a set rate is even over time and not a volley.
	now := time.Now()
	next := now
	if interval > 0 {
		next = now.Add(time.Duration(c.rng.Int64N(int64(interval))))
	}
	var deadline time.Time
	for {
		if interval > 0 && !c.pace(ctx, &next, interval) {
			return true
		}
		if ctx.Err() != nil {
			return true
		}
		if !c.fill() {
			return true
		}
		// Moving the deadline costs as much as parsing an answer: it is moved
		// when a quarter of it is used up, and never falls below the rest.
		now = time.Now()
		if deadline.Sub(now) < load.Timeout {
			deadline = now.Add(load.Timeout + load.Timeout/4)
			nc.SetDeadline(deadline) // fails only on a dead connection, and so will the write
		}
		n, err := nc.Write(c.out)
		if err != nil {
			if n > 0 {
				c.lost(c.ids, c.newest, load.lag(err))
			} else {
				c.again = append(c.again, c.ids...)
			}
			return false
		}
		if !c.answers(nc, now) {
			return false
		}
	}
}

// pace waits for the next batch's time. A connection that fell behind does not
// make up for more than a second: the rate is a ceiling, not a debt.
func (c *conn) pace(ctx context.Context, next *time.Time, interval time.Duration) bool {
	now := time.Now()
	if wait := next.Sub(now); wait > 0 {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return false
		case <-timer.C:
		}
	} else if wait < -time.Second {
		*next = now
	}
	*next = next.Add(interval)
	return true
}

// Repeats come half from the ids that are in flight right now, on this and on
// other connections, where a set that is not atomic says `ok` twice, and half
// from a longer past, which at the turn of a window is the previous window:
// the same id must then be accepted once more.
const farRepeats = 1 << 16

// fill builds the next batch. It says false when the requests are used up.
func (c *conn) fill() bool {
	load := &c.d.load
	size := load.together()
	if load.Requests > 0 {
		begun := c.d.sent.Add(uint64(size))
		if begun-uint64(size) >= load.Requests {
			return false
		}
		size -= int(max(begun, load.Requests) - load.Requests)
	}
	c.ids, c.out = c.ids[:0], c.out[:0]
	// A client asks again for what was never answered. Within the window the
	// answer also tells whether the lost request had counted.
	retries := min(size, len(c.again))
	c.ids = append(c.ids, c.again[:retries]...)
	c.again = c.again[:copy(c.again, c.again[retries:])]
	for len(c.ids) < size {
		if load.Repeats > 0 && c.rng.Float64() < load.Repeats {
			if known := c.d.ids.Load(); known > 0 {
				span := uint64(farRepeats)
				if c.rng.Uint64()&1 == 0 {
					span = uint64(2 * load.Connections * load.together())
				}
				c.ids = append(c.ids, known-1-c.rng.Uint64N(min(span, known)))
				continue
			}
		}
		c.ids = append(c.ids, c.d.ids.Add(1)-1)
	}
	t := &c.d.targets[c.target]
	if load.Batch > 0 {
		for ids := c.ids; len(ids) > 0; ids = ids[c.inRequest(len(ids)):] {
			c.body = c.body[:0]
			for _, id := range ids[:c.inRequest(len(ids))] {
				c.body = append(load.IDs.append(c.body, load.Seed, id), '\n')
			}
			c.out = strconv.AppendInt(append(c.out, t.post...), int64(len(c.body)), 10)
			c.out = append(append(c.out, "\r\n\r\n"...), c.body...)
		}
		return true
	}
	for _, id := range c.ids {
		c.out = append(c.out, t.head...)
		c.out = load.IDs.append(c.out, load.Seed, id)
		c.out = append(c.out, t.tail...)
	}
	return true
}

// together is how many ids a connection sends before it reads.
func (l *load) together() int { return l.Pipeline * max(1, l.Batch) }

// inRequest is how many of the ids that are left the next request has.
func (c *conn) inRequest(left int) int { return min(left, max(1, c.d.load.Batch)) }

// answers reads the answers of the batch, sent at the time given, and reports
// them. It says false when
// the connection is of no use any more; what was not answered is then in doubt.
func (c *conn) answers(nc net.Conn, sent time.Time) bool {
	from := c.newest // known before the batch was sent
	c.got = c.got[:0]
	n, lag, alive := c.read(nc)
	if len(c.got) > 0 {
		c.answered = true
		c.newest = c.d.truth.record(c.target, sent, c.got)
	}
	if n < len(c.ids) {
		c.lost(c.ids[n:], from, lag)
	}
	return alive
}

// read fills c.got with the answers of the batch and says how many requests
// were answered, how much longer the server may work on the others, and
// whether the connection can be used again.
func (c *conn) read(nc net.Conn) (answered int, lag time.Duration, alive bool) {
	r, w := 0, 0
	for answered < len(c.ids) {
		var a response
		size, err := parseResponse(c.in[r:w], &a)
		if errors.Is(err, errShort) {
			w, r = copy(c.in, c.in[r:w]), 0
			if w == len(c.in) {
				c.d.protocol("an answer is larger than %d bytes", len(c.in))
				return answered, 0, false
			}
			n, err := nc.Read(c.in[w:])
			w += n
			if n == 0 && err != nil {
				return answered, c.d.load.lag(err), false
			}
			continue
		}
		n := c.inRequest(len(c.ids) - answered)
		if err == nil {
			err = c.take(c.ids[answered:answered+n], &a)
		}
		if err != nil {
			c.d.protocol("id #%d: %v", c.ids[answered], err)
			return answered, 0, false
		}
		answered += n
		r += size
		if a.close {
			return answered, 0, false
		}
	}
	if r != w {
		c.d.protocol("%d bytes after the last answer: %.40q", w-r, c.in[r:w])
		return answered, 0, false
	}
	return answered, 0, true
}

// take turns a response into answers for the truth.
func (c *conn) take(ids []uint64, a *response) error {
	switch {
	case a.status == 503 && string(a.body) == "failed":
		for _, id := range ids {
			c.got = append(c.got, answer{id: id, kind: answerRefused})
		}
		return nil
	case c.d.load.Batch > 0 && a.status == 200:
		return c.takeWords(ids, a)
	}
	kind := answerRepeat
	switch {
	case a.status == 200 && string(a.body) == "ok":
		kind = answerOK
	case a.status == c.d.load.DuplicateStatus && string(a.body) == "failed":
	default:
		return fmt.Errorf("unexpected answer: status %d, body %.40q", a.status, a.body)
	}
	if err := c.readWindows(a.window); err != nil {
		return err
	}
	c.got = append(c.got, answer{id: ids[0], window: c.windows[0].window, kind: kind})
	return nil
}

// takeWords takes the answer to a batch: a word for each id.
func (c *conn) takeWords(ids []uint64, a *response) error {
	window, left := 0, -1 // of the windows, and of the ids judged in it
	body := a.body
	for _, id := range ids {
		word, rest, ok := bytes.Cut(body, []byte{'\n'})
		if !ok {
			return fmt.Errorf("%d words are missing in the answer to a batch", len(ids))
		}
		body = rest
		got := answer{id: id}
		switch string(word) {
		case "ok":
			got.kind = answerOK
		case "duplicate":
			got.kind = answerRepeat
		case "full", "unavailable", "draining":
			c.got = append(c.got, answer{id: id, kind: answerRefused})
			continue
		default:
			return fmt.Errorf("unexpected word %.40q", word)
		}
		if left < 0 {
			if err := c.readWindows(a.window); err != nil {
				return err
			}
			left = c.windows[0].ids
		}
		for ; left == 0; left = c.windows[window].ids {
			if window++; window == len(c.windows) {
				return fmt.Errorf("more ids were judged than %q lists", a.window)
			}
		}
		left--
		got.window = c.windows[window].window
		c.got = append(c.got, got)
	}
	if len(body) > 0 || left > 0 && c.windows[window].ids != math.MaxInt || left == 0 && window+1 < len(c.windows) {
		return fmt.Errorf("%d ids, and the answer has more words, or %q", len(ids), a.window)
	}
	return nil
}

// readWindows reads a Verve-Window: one by itself, or a list with numbers of ids.
func (c *conn) readWindows(text []byte) error {
	if text == nil {
		return errors.New("the answer has no Verve-Window: start the server with --window-header")
	}
	if bytes.Equal(text, c.windowText) {
		return nil
	}
	c.windowText, c.windows = append(c.windowText[:0], text...), c.windows[:0]
	for part := range bytes.SplitSeq(text, []byte(", ")) {
		label, count, many := bytes.Cut(part, []byte(";n="))
		start, err := time.Parse(time.RFC3339, string(label))
		if err != nil {
			return fmt.Errorf("Verve-Window: %w", err)
		}
		in := judgedIn{start.UnixMilli(), math.MaxInt}
		if many {
			if in.ids, err = strconv.Atoi(string(count)); err != nil {
				return fmt.Errorf("Verve-Window: %w", err)
			}
		}
		c.windows = append(c.windows, in)
	}
	return nil
}

// lost notes requests that will not be answered.
func (c *conn) lost(ids []uint64, from int64, lag time.Duration) {
	c.d.truth.broken(ids, from, lag)
	c.again = append(c.again, ids...)
}

// lag is how long the server may go on with the requests of a connection that
// failed with err: not at all if the server let go of it, but if it was the
// driver that lost patience, the server may still come round to them.
func (l *load) lag(err error) time.Duration {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return l.Timeout
	}
	return 0
}

// response is an answer as sent. Its slices point into the read buffer.
type response struct {
	status int
	window []byte // nil without Verve-Window
	body   []byte
	close  bool
}

var errShort = errors.New("incomplete")

var (
	headEnd    = []byte("\r\n\r\n")
	lineEnd    = []byte("\r\n")
	nameLength = []byte("Content-Length")
	nameWindow = []byte("Verve-Window")
	nameClose  = []byte("Connection")
	valueClose = []byte("close")
	nameCoding = []byte("Transfer-Encoding")
)

// parseResponse reads one response from the start of b and says how long it
// is: errShort if it is not all there. It knows what a server of short fixed
// bodies sends, and calls anything else an error.
func parseResponse(b []byte, a *response) (int, error) {
	end := bytes.Index(b, headEnd)
	if end < 0 {
		return 0, errShort
	}
	head, rest := b[:end+len(lineEnd)], end+len(headEnd)
	line, head, _ := bytes.Cut(head, lineEnd)
	// "HTTP/1.1 200 OK"
	if len(line) < 12 || string(line[:9]) != "HTTP/1.1 " {
		return 0, fmt.Errorf("not an HTTP/1.1 status line: %.40q", line)
	}
	for _, digit := range line[9:12] {
		if digit < '0' || digit > '9' {
			return 0, fmt.Errorf("not a status: %.40q", line)
		}
		a.status = a.status*10 + int(digit-'0')
	}
	length := -1
	for len(head) > 0 {
		line, head, _ = bytes.Cut(head, lineEnd)
		name, value, ok := bytes.Cut(line, []byte{':'})
		if !ok {
			return 0, fmt.Errorf("not a header line: %.40q", line)
		}
		value = bytes.TrimSpace(value)
		switch {
		case bytes.EqualFold(name, nameWindow):
			a.window = value
		case bytes.EqualFold(name, nameLength):
			length = 0
			for _, digit := range value {
				if digit < '0' || digit > '9' || length > 1<<20 {
					return 0, fmt.Errorf("not a Content-Length: %.40q", value)
				}
				length = length*10 + int(digit-'0')
			}
		case bytes.EqualFold(name, nameClose):
			a.close = bytes.EqualFold(value, valueClose)
		case bytes.EqualFold(name, nameCoding):
			return 0, errors.New("an answer with a Transfer-Encoding")
		}
	}
	if length < 0 {
		return 0, errors.New("an answer without Content-Length")
	}
	if len(b)-rest < length {
		return 0, errShort
	}
	a.body = b[rest : rest+length]
	return rest + length, nil
}
