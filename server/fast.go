package server

import (
	"bytes"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"

	"verve/counter"
	"verve/dedup"
)

const (
	// A plain request is plainStart, an id of plain bytes, a key and a token of plain
	// bytes if it has them (plainOptions), and a tail: the rest of the request line and
	// the headers.
	plainStart    = "GET " + acceptPath + "?id="
	plainProtocol = " HTTP/1.1\r\n"

	// maxTail bounds what a connection remembers. With it a plain request fits
	// into readBuffer several times over.
	maxTail = 1 << 10

	// maxBegun bounds a plain request that has no end yet: with values other than
	// those remembered it may be longer than they are, and it must fit into
	// readBuffer.
	maxBegun = 4 << 10

	// maxTogether bounds how many requests are put into the set at once, and so how
	// long the seal of their epoch waits for them.
	maxTogether = 16

	// steadyAfter is after how many reads that gave plain requests and nothing else a
	// connection is steady (waitAndRead).
	steadyAfter = 16

	// enoughOut is after how many bytes answers are written while more requests are
	// there: the size of fasthttp's own write buffer.
	enoughOut = 4 << 10
)

var crlfcrlf = []byte("\r\n\r\n")

// fastPath answers a plain request itself, without fasthttp. A plain request differs from
// an earlier one on the same connection only in its id, its key, its token, and in the values
// of headers that have no effect. Clients that keep their connections send such requests, all
// but the first one. So do proxies, which add an id and a time of its own to each request.
//
// fasthttp reads the first request and every one that is not plain. When the handler has
// answered a plain one, the connection remembers its tail (accept, conn.learn). How fasthttp
// reads the bytes after the query depends on these bytes alone, so it would read, and answer, a
// request with the same tail in the same way. Therefore no header is parsed here, and none can
// be read differently than by fasthttp. The same holds for the same names in the same order
// with another value of visible bytes, if neither fasthttp nor the handler uses that value. The
// ids of requests that arrived together go into the set together, so that their cache misses
// overlap, and their answers are written together.
//
// It works inside conn.Read, when fasthttp waits for the beginning of a request, has
// nothing read ahead, and has flushed every answer. It leaves other requests, and an id without
// a verdict (draining, a panic), to fasthttp as if they had just arrived. It refuses an id that
// is Full or Unavailable itself. (If a client has sent another request, and sends on without a
// pause, fasthttp serves it until it has read all that there is.)
//
// FuzzFastPathAnswersAsFasthttp compares the answers of the two. BenchmarkServer measures what
// the fastPath gains: a pipelined request takes less CPU than one of a bare fasthttp handler.
type fastPath struct {
	server  *Server
	free    sync.Pool               // of *reads
	current atomic.Pointer[answers] // rendered last
}

// reads is the memory for the requests of one read: their ids, keys and tokens are in the
// buffer read into.
type reads struct {
	work
	options [maxTogether]dedup.Options // of the items that have any
	ends    [maxTogether]int           // of the requests in the buffer
	out     []byte
}

// answers are the bytes that fasthttp writes for each verdict, for one second of the Date header.
type answers struct {
	second int64
	epoch  *counter.Epoch // the one that they name; nil: they name none
	of     [dedup.Verdicts][]byte
}

func newFastPath(s *Server) *fastPath {
	f := &fastPath{server: s}
	f.free.New = func() any { return new(reads) }
	return f
}

// connState is called by fasthttp. It notes on the connection that fasthttp is done with a
// request: if fasthttp reads next, its buffers, in and out, are empty.
func connState(nc net.Conn, state fasthttp.ConnState) {
	if state == fasthttp.StateClosed { // the connection may be parked, and belong to another goroutine
		return
	}
	c := nc.(*conn)
	if c.between = state == fasthttp.StateIdle; c.between {
		c.taken = 0 // of the request that is done; the next one may be here already
	}
}

// tail is what followed the query of a plain request: the protocol and the headers.
type tail struct {
	bytes  []byte
	values []span // of bytes: what may differ, in order
}

type span struct{ from, to uint16 }

// learn remembers the tail of a plain request that fasthttp has read and that
// leaves the connection open. It remembers none if the headers do not end in CRLFCRLF:
// how they are read then depends on the bytes after them, too.
func (c *conn) learn(h *fasthttp.RequestHeader) {
	headers := h.RawHeaders()
	t := &c.tail
	if c.owner.fast == nil || !bytes.HasSuffix(headers, crlfcrlf) || len(plainProtocol)+len(headers) > maxTail ||
		len(t.bytes) > 0 && string(t.bytes[len(plainProtocol):]) == string(headers) {
		return
	}
	t.bytes = append(append(t.bytes[:0], plainProtocol...), headers...)
	t.values = t.values[:0]
	for at := len(plainProtocol); ; {
		end := at + bytes.IndexByte(t.bytes[at:], '\n')
		line := t.bytes[at:end]
		at = end + 1
		if at == len(t.bytes) {
			return // the empty line
		}
		if line[len(line)-1] != '\r' {
			t.values = t.values[:0] // readers differ about where this line ends
			return
		}
		if colon := bytes.IndexByte(line, ':'); mayDiffer(line[:colon]) {
			t.values = append(t.values, span{uint16(end - len(line) + colon + 1), uint16(end - 1)})
		}
	}
}

// mayDiffer reports whether a request may have another value for this header than the
// one before it, and still be read and answered in the same way. It may not if fasthttp or
// the handler uses the header, or if the header decides how a message is framed, answered,
// or passed on.
func mayDiffer(name []byte) bool {
	var lower [32]byte
	if len(name) > len(lower) {
		return true // it is longer than each name below
	}
	for i, c := range name {
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		lower[i] = c
	}
	switch string(lower[:len(name)]) {
	case "connection", "expect", "host", "http2-settings", "idempotency-key", "keep-alive", "origin",
		"te", "trailer", "transfer-encoding", "upgrade":
		return false
	}
	for _, prefix := range []string{"access-control-", "content-", "proxy-", "verve-"} {
		if bytes.HasPrefix(lower[:len(name)], []byte(prefix)) {
			return false
		}
	}
	return true
}

// visible are the bytes that a value may have if it differs from the one that was learnt: all
// readers read these in the same way.
var visible = setOf(" -~")

// match is called if b does not begin with t itself. It reports whether b begins with a tail
// that differs from t in values only, and how long that is.
func (t *tail) match(b []byte) (n int, like likeness) {
	at := 0
	for _, v := range t.values {
		from, to := int(v.from), int(v.to)
		if like = begins(b[n:], t.bytes[at:from]); like != whole {
			return 0, like
		}
		n += from - at
		// The CR after the value is compared, too: without it the value may be longer.
		if begins(b[n:], t.bytes[from:to+1]) == whole {
			n += to - from
		} else {
			n += lengthOf(b[n:], &visible)
		}
		at = to
	}
	return n + len(t.bytes) - at, begins(b[n:], t.bytes[at:])
}

// begins returns whole if b begins with what, begun if b is the beginning of what, else other.
func begins(b, what []byte) likeness {
	switch {
	case len(b) >= len(what) && string(b[:len(what)]) == string(what):
		return whole
	case len(b) < len(what) && string(b) == string(what[:len(b)]):
		return begun
	}
	return other
}

// likeness is how far some bytes are like a plain request.
type likeness uint8

const (
	other likeness = iota
	begun          // all there is so far
	whole
)

// cut takes the first request from b if it is plain and ends in the tail that c
// remembers. It writes a key and a token into o, and returns o as options; nil if the
// request has neither.
func (c *conn) cut(b []byte, o *dedup.Options) (id []byte, options *dedup.Options, rest []byte, like likeness) {
	if len(b) < len(plainStart) {
		if plainStart[:len(b)] == string(b) {
			return nil, nil, nil, begun
		}
		return nil, nil, nil, other
	}
	if string(b[:len(plainStart)]) != plainStart {
		return nil, nil, nil, other
	}
	b = b[len(plainStart):]
	n := lengthOf(b, &plainBytes)
	rest = b[n:]
	if n > maxIDLen || n == 0 && len(rest) > 0 {
		return nil, nil, nil, other
	}
	if len(rest) > 0 && rest[0] == '&' {
		if rest, like = plainOptions(rest, o); like != whole {
			return nil, nil, nil, like
		}
		options = o
	}
	if tail := c.tail.bytes; len(rest) >= len(tail) && string(rest[:len(tail)]) == string(tail) {
		return b[:n], options, rest[len(tail):], whole
	}
	switch length, like := c.tail.match(rest); {
	case like == whole:
		return b[:n], options, rest[length:], whole
	case like == begun && len(b) < maxBegun:
		return nil, nil, nil, begun
	}
	return nil, nil, nil, other
}

// read is conn.Read when a request may begin. It answers the plain requests that arrive. It
// returns when there are other bytes, which are for fasthttp, or an error.
func (f *fastPath) read(c *conn, p []byte) (have int, err error) {
	for done := false; !done; {
		if have == 0 {
			c.idle()
			if c.socket != nil && c.steady >= c.owner.steadyAfter {
				have, done, err = f.waitAndRead(c, p)
				continue
			}
		}
		n, failed := c.receive(p[have:], have == 0)
		have, done, err = f.take(c, p, have, n, failed)
	}
	return have, err
}

// take answers the plain requests in p. p has bytes from earlier reads, have of them, and the n
// bytes of a read that returned the error failed. take moves what is left to the front of p. It
// returns how many bytes that are; done: they, or the error, are for fasthttp.
func (f *fastPath) take(c *conn, p []byte, have, n int, failed error) (left int, done bool, err error) {
	have += n
	like := begun
	if n > 0 && f.server.lastAnswers.Load() {
		like = other // fasthttp closes the connection after its answer
	} else if n > 0 {
		rest, as, unwritten := f.serve(c, p[:have])
		if unwritten != nil {
			return 0, true, unwritten
		}
		if have, like = copy(p, rest), as; have == 0 {
			c.steady++
		}
	}
	return have, failed != nil || like == other, failed
}

// serve answers the plain requests that b begins with. It returns the bytes after them, and
// whether these are not plain (other) or a request that has begun (begun).
func (f *fastPath) serve(c *conn, b []byte) (rest []byte, like likeness, err error) {
	w := f.free.Get().(*reads)
	defer f.free.Put(w)
	w.out = w.out[:0]
	now := time.Now()
	for like = whole; like == whole; {
		w.reset(maxTogether)
		items := w.items[:maxTogether]
		n, end := 0, 0
		for rest = b; n < maxTogether; n++ {
			var id, after []byte
			var options *dedup.Options
			if id, options, after, like = c.cut(rest, &w.options[n]); like != whole {
				break
			}
			if f.server.cfg.Uint64IDs && !canonicalUint64(id) {
				like = other
				break
			}
			rest, end = after, len(b)-len(after)
			it := &items[n] // it is filled in place: a copy would cost some ns (BenchmarkServer)
			it.ID, it.Options, w.ends[n] = id, options, end
		}
		w.items, w.keyed = items[:n], n
		f.server.cfg.Set.Keys(w.items)
		if answered := f.count(c, w, now); answered < n {
			if like, end = other, 0; answered > 0 {
				end = w.ends[answered-1]
			}
		}
		b = b[end:]
		if len(w.out) > 0 && (like != whole || len(w.out) >= enoughOut) {
			if _, err = c.Write(w.out); err != nil {
				break
			}
			w.out = w.out[:0]
		}
	}
	return b, like, err
}

// count judges the ids of w and appends their answers. It returns how many requests,
// from the front, are answered. The others were not judged, because the counter is sealed
// or the set panicked: the handler refuses them.
func (f *fastPath) count(c *conn, w *reads, now time.Time) (answered int) {
	n := len(w.items)
	err := f.server.judge(now.UnixNano(), c.number, &w.work)
	judged := n
	for judged > 0 && w.verdicts[judged-1] == dedup.Turned {
		judged--
	}
	second := now.Unix()
	a, out := f.answers(second, nil), w.out
	for i, v := range w.verdicts[:judged] {
		switch {
		case v <= dedup.Repeat:
		case v <= dedup.ReplayedAfter:
			f.server.replayed.Add(1)
		default:
			if v == dedup.Turned { // a shared store has judged ids after this one, so it must be answered, too
				v = dedup.Unavailable
			}
			f.server.countRefusals(refusalOf(v), 1, err)
		}
		if f.server.cfg.WindowHeader && w.epochs[i] != nil {
			a = f.answers(second, w.epochs[i])
		}
		out = append(out, a.of[v]...)
	}
	w.out = out
	return judged
}

// answers returns what the handler would answer, in the present second, to ids that
// were judged in e; nil: in the last epoch.
func (f *fastPath) answers(second int64, e *counter.Epoch) *answers {
	if !f.server.cfg.WindowHeader {
		e = nil
	} else if e == nil {
		e = f.server.cfg.Counter.Last()
	}
	if a := f.current.Load(); a != nil && a.second == second && a.epoch == e {
		return a
	}
	a := &answers{second: second, epoch: e}
	for v := range a.of {
		var r fasthttp.Response
		var b bytes.Buffer
		if v := dedup.Verdict(v); v <= dedup.ReplayedAfter {
			f.server.answer(&r, v, e)
		} else {
			setRefusal(&r, refusalOf(v))
		}
		_, _ = r.WriteTo(&b) // a Buffer takes everything
		a.of[v] = b.Bytes()
	}
	f.current.Store(a)
	return a
}
