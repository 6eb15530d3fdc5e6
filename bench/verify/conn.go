package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"
)

// load is what the driver does to the server, and how it reads the answers.
type load struct {
	flags
	Keys *keys // under which ids are counted; nil: under none
}

// target is one instance, or one load balancer.
type target struct {
	addr string
	head []byte // of a request, up to the id
	tail []byte // of a request, after its query, but for the last empty line
	post []byte // of a request with a batch, up to its type
}

func newTarget(raw string) (target, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return target{}, fmt.Errorf("--url: %w", err)
	}
	if u.Scheme != "http" || u.Hostname() == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return target{}, fmt.Errorf("--url: %q is not http://HOST[:PORT]", u.Redacted())
	}
	base := strings.TrimRight(u.EscapedPath(), "/")
	return target{
		addr: net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "80")),
		head: []byte("GET " + base + "/api/verve/accept?id="),
		tail: []byte(" HTTP/1.1\r\nHost: " + u.Host + "\r\n"),
		post: []byte("POST " + base + "/api/verve/accept HTTP/1.1\r\nHost: " + u.Host + "\r\nContent-Type: "),
	}, nil
}

// driver puts the load on the targets and tells the truth what came back.
type driver struct {
	load    load
	targets []target
	truth   *truth
	retries *retries
	ids     atomic.Uint64 // numbers handed out; also the upper end of the repeats
	tokens  atomic.Uint64 // attempts begun
	sent    atomic.Uint64 // requests begun, for load.Requests
	dials   atomic.Uint64 // connections opened, the first ones included

	draining bool // the load is over; set while no connection runs

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
// was sent is then answered or in doubt. Attempts with a token are retried a while longer.
func (d *driver) run(ctx context.Context) {
	whole, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d.stop = func() {
		cancel()
		end()
	}
	var settling sync.WaitGroup
	settling.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-whole.Done():
				return
			case <-tick.C:
				d.truth.settleOld()
			}
		}
	})
	d.connect(ctx)
	cancel()
	if d.load.Tokens {
		d.drain(whole)
	}
	end()
	settling.Wait()
}

// connect runs all connections until ctx ends or there is nothing left to do.
func (d *driver) connect(ctx context.Context) {
	var connections sync.WaitGroup
	for i := range d.load.Connections {
		connections.Go(func() { newConn(d, i).run(ctx) })
	}
	connections.Wait()
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
	net    net.Conn
	in     *bufio.Reader // reads c, and so net
	failed error         // of the last read from net
	reply  fasthttp.Response
	ids    []ask    // of the batch under way
	words  [][]byte // of the answer to a batch
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
	const minBackoff = time.Millisecond
	backoff := minBackoff
	for ctx.Err() == nil {
		c.answered = false
		if nc, err := dial(ctx, c.d.targets[c.target].addr, c.d.load.Timeout); err == nil {
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
		select {
		case <-ctx.Done():
		case <-time.After(backoff/2 + time.Duration(c.rng.Int64N(int64(backoff/2)+1))):
		}
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

// serve uses one connection until it breaks. It says true when there is
// nothing left to do.
func (c *conn) serve(ctx context.Context, nc net.Conn) bool {
	load := &c.d.load
	c.net, c.failed = nc, nil
	c.in.Reset(c)
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
		if len(c.ids) == 0 { // others wait for the last answers
			time.Sleep(drainPoll)
			continue
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
				c.lost(c.ids, c.earliest(now), load.lag(err))
			} else {
				c.d.retries.put(c.target, c.ids...)
			}
			return false
		}
		if x, lose := c.draw(); lose {
			c.lose(nc, x, now)
			return false
		}
		if !c.answers(now) {
			return false
		}
	}
}

// pace waits for the next batch's time. A connection that fell behind does not
// make up for more than a second: the rate is a ceiling, not a debt.
func (c *conn) pace(ctx context.Context, next *time.Time, interval time.Duration) bool {
	now := time.Now()
	if wait := next.Sub(now); wait > 0 {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(wait):
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

// drainPoll is how often a connection looks for a retry when there is nothing else.
const drainPoll = 2 * time.Millisecond

// fill builds the next batch. It says false when there is nothing left to ask.
func (c *conn) fill() bool {
	load := &c.d.load
	size := load.together()
	c.ids, c.out = c.ids[:0], c.out[:0]
	if c.d.draining {
		c.retry(size)
		c.write()
		return len(c.ids) > 0 || c.d.truth.pending() > 0
	}
	if load.Requests > 0 {
		begun := c.d.sent.Add(uint64(size))
		if begun-uint64(size) >= load.Requests {
			return false
		}
		size -= int(max(begun, load.Requests) - load.Requests)
	}
	// A client asks again for what was never answered. Within the window the
	// answer also tells whether the lost request had counted.
	if c.retry(size); len(c.ids) > 0 && c.ids[0].from != 0 {
		size = len(c.ids) // new ids would be in another window
	}
	for len(c.ids) < size {
		var a ask
		if load.Tokens {
			a.token = c.d.tokens.Add(1)
		}
		if known := c.d.ids.Load(); load.Repeats > 0 && known > 0 && c.rng.Float64() < load.Repeats {
			span := uint64(farRepeats)
			if c.rng.Uint64()&1 == 0 {
				span = uint64(2 * load.Connections * load.together())
			}
			a.id = known - 1 - c.rng.Uint64N(min(span, known))
		} else {
			a.id = c.d.ids.Add(1) - 1
		}
		c.ids = append(c.ids, a)
	}
	c.write()
	return true
}

// write renders the requests for the batch.
func (c *conn) write() {
	load, t := &c.d.load, &c.d.targets[c.target]
	if load.Batch > 0 {
		for asks := c.ids; len(asks) > 0; asks = asks[c.inRequest(asks):] {
			c.writeBody(asks[:c.inRequest(asks)])
			c.out = append(c.out, t.post...)
			if load.items() {
				c.out = append(c.out, "application/json"...)
			} else {
				c.out = append(c.out, "text/plain"...)
			}
			c.out = strconv.AppendInt(append(c.out, "\r\nContent-Length: "...), int64(len(c.body)), 10)
			c.out = append(append(c.out, "\r\n\r\n"...), c.body...)
		}
		return
	}
	for _, a := range c.ids {
		id, key := load.Keys.of(a.id)
		c.out = append(c.out, t.head...)
		c.out = load.IDs.append(c.out, load.Seed, id)
		if key > 0 {
			c.out = append(append(c.out, "&key="...), load.Keys.escaped[key]...)
		}
		header := a.token%2 == 1 // half of the tokens are there, half in the query
		if a.token != 0 && !header {
			c.out = load.appendToken(append(c.out, "&token="...), a.token)
		}
		c.out = append(c.out, t.tail...)
		if header {
			c.out = append(load.appendToken(append(c.out, "Idempotency-Key: "...), a.token), "\r\n"...)
		}
		c.out = append(c.out, "\r\n"...)
	}
}

// writeBody makes the body of a batch: a line for each id, or JSON.
func (c *conn) writeBody(asks []ask) {
	load := &c.d.load
	c.body = c.body[:0]
	for i, a := range asks {
		if !load.items() {
			c.body = append(load.IDs.append(c.body, load.Seed, a.id), '\n')
			continue
		}
		id, key := load.Keys.of(a.id)
		c.body = append(c.body, "[,"[min(i, 1)])
		c.body = append(load.IDs.append(append(c.body, `{"id":"`...), load.Seed, id), '"')
		if key > 0 {
			c.body = append(append(append(c.body, `,"key":"`...), load.Keys.names[key]...), '"')
		}
		if a.token != 0 {
			c.body = append(load.appendToken(append(c.body, `,"token":"`...), a.token), '"')
		}
		c.body = append(c.body, '}')
	}
	if load.items() {
		c.body = append(c.body, ']')
	}
}

// items reports whether batches are JSON, which alone has a key and a token for each id.
func (l *load) items() bool { return l.Tokens || l.Keys != nil }

// appendToken writes the text of a token, which no other run has.
func (l *load) appendToken(dst []byte, n uint64) []byte {
	dst = append(strconv.AppendUint(dst, l.Seed, 36), '-')
	return strconv.AppendUint(dst, n, 36)
}

// together is how many ids a connection sends before it reads.
func (l *load) together() int { return l.Pipeline * max(1, l.Batch) }

// inRequest is how many of the ids that are left the next request has.
func (c *conn) inRequest(left []ask) int {
	most := max(1, c.d.load.Batch)
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
// them. It says false when
// the connection is of no use any more; what was not answered is then in doubt.
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

// report passes the first n answers of the batch to the truth, but for those that are
// thrown away.
func (c *conn) report(sent time.Time, from int64, n int) {
	if c.discard(n, from); len(c.got) > 0 {
		c.answered = true
		c.newest = c.d.truth.record(c.target, sent, c.got)
	}
}

// read fills c.got with the answers of the batch, or with the first ones of them up to
// most ids or a little more, and says how many requests were answered, how much longer the
// server may work on the others, and whether the connection can be used again.
func (c *conn) read(most int) (answered int, lag time.Duration, alive bool) {
	for answered < most {
		err := c.reply.ReadLimitBody(c.in, maxAnswer)
		if err != nil && c.failed != nil {
			return answered, c.d.load.lag(c.failed), false
		}
		n := c.inRequest(c.ids[answered:])
		if err == nil {
			err = c.take(c.ids[answered:answered+n], &c.reply)
		}
		if err != nil {
			c.d.protocol("id #%d: %v", c.ids[answered].id, err)
			return answered, 0, false
		}
		answered += n
		if c.reply.ConnectionClose() {
			return answered, 0, false
		}
	}
	if left := c.in.Buffered(); left > 0 && answered == len(c.ids) {
		text, _ := c.in.Peek(min(left, 40)) // it is there
		c.d.protocol("%d bytes after the last answer: %q", left, text)
		return answered, 0, false
	}
	return answered, 0, true
}

// take turns a response into answers for the truth, one for each id.
func (c *conn) take(asks []ask, a *fasthttp.Response) error {
	status, body, replayed := a.StatusCode(), a.Body(), len(a.Header.Peek("Verve-Replayed")) > 0
	switch {
	case (status == 503 || status == 408) && string(body) == "failed": // 408: this machine is busy, and the server stops waiting
		for _, ask := range asks {
			c.got = append(c.got, answer{id: ask.id, token: ask.token, kind: answerRefused})
		}
		return nil
	case c.d.load.Batch > 0 && status == 200:
		return c.takeWords(asks, a)
	}
	got := answer{id: asks[0].id, token: asks[0].token, kind: answerRepeat, replayed: replayed}
	switch {
	case status == 200 && string(body) == "ok":
		got.kind = answerOK
	case status == c.d.load.DuplicateStatus && string(body) == "failed" && !replayed:
	default:
		return fmt.Errorf("unexpected answer: status %d, body %.40q", status, body)
	}
	if replayed && got.token == 0 {
		return errors.New("an answer is replayed, to a request without a token")
	}
	if err := c.readWindows(a.Header.Peek(headerWindow)); err != nil {
		return err
	}
	got.window = c.windows[0].window
	c.got = append(c.got, got)
	return nil
}

// splitWords fills c.words with the verdicts in the answer to a batch.
func (c *conn) splitWords(body []byte) error {
	c.words = c.words[:0]
	if !c.d.load.items() {
		lines, ok := bytes.CutSuffix(body, []byte{'\n'})
		if !ok {
			return errors.New("the answer to a batch ends within a line")
		}
		c.words = slices.AppendSeq(c.words, bytes.SplitSeq(lines, []byte{'\n'}))
		return nil
	}
	var answer struct {
		OK, Duplicate, Replayed, Refused int
		Results                          []string
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return fmt.Errorf("the answer to a batch: %w", err)
	}
	n := map[string]int{}
	for _, word := range answer.Results {
		c.words = append(c.words, []byte(word))
		n[word]++
	}
	ok, duplicate, replayed := n["ok"], n["duplicate"], n["replayed"]
	if answer.OK != ok || answer.Duplicate != duplicate || answer.Replayed != replayed || answer.Refused != len(c.words)-ok-duplicate-replayed {
		return fmt.Errorf("the numbers in the answer to a batch are not those of its results: %.80q", body)
	}
	return nil
}

// takeWords takes the answer to a batch: a word for each id.
func (c *conn) takeWords(asks []ask, a *fasthttp.Response) error {
	if err := c.splitWords(a.Body()); err != nil {
		return err
	}
	if len(c.words) != len(asks) {
		return fmt.Errorf("%d words in the answer to a batch of %d", len(c.words), len(asks))
	}
	first, judged := len(c.got), 0
	replays := false
	for i, ask := range asks {
		got := answer{id: ask.id, token: ask.token}
		switch string(c.words[i]) {
		case "ok":
			got.kind = answerOK
		case "duplicate":
			got.kind = answerRepeat
		case "replayed":
			got.kind, got.replayed, replays = answerOK, true, true
			if ask.token == 0 {
				return errors.New("an id is replayed that has no token")
			}
		case "full", "unavailable", "draining":
			got.kind = answerRefused
		default:
			return fmt.Errorf("unexpected word %.40q", c.words[i])
		}
		if got.kind != answerRefused {
			judged++
		}
		c.got = append(c.got, got)
	}
	if judged == 0 {
		return nil
	}
	return c.place(c.got[first:], judged, replays, a.Header.Peek(headerWindow))
}

// place finds the windows of the answers to a batch. If they are several and an id is
// replayed, the list does not tell which ids were counted in which of them: they are
// asked once more, in smaller batches.
func (c *conn) place(got []answer, judged int, replays bool, text []byte) error {
	if err := c.readWindows(text); err != nil {
		return err
	}
	sum := 0
	for _, w := range c.windows {
		sum += w.ids
	}
	if sum != judged && (len(c.windows) > 1 || sum != math.MaxInt) {
		return fmt.Errorf("%d ids were judged, and the answer has %q", judged, text)
	}
	window, left := 0, c.windows[0].ids
	for i := range got {
		if got[i].kind == answerRefused {
			continue
		}
		if replays && len(c.windows) > 1 {
			got[i].kind, got[i].window = answerUnplaced, c.windows[len(c.windows)-1].window
			continue
		}
		for ; left == 0; left = c.windows[window].ids {
			window++
		}
		left--
		got[i].window = c.windows[window].window
	}
	return nil
}

// readWindows reads a Verve-Window: one by itself, or a list with numbers of ids.
func (c *conn) readWindows(text []byte) error {
	if len(text) == 0 {
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

// headerWindow is what --window-header adds.
const headerWindow = "Verve-Window"

// maxAnswer is above the answer to a batch of maxBatch ids.
const maxAnswer = 1 << 20

// lag is how long the server may go on with the requests of a connection that
// failed with err: not at all if the server let go of it, but if it was the
// driver that lost patience, the server may still come round to them.
func (l *load) lag(err error) time.Duration {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return l.Timeout
	}
	return 0
}
