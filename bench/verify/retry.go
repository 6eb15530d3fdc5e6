package main

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// ask is one request for an id: the first of an attempt to count it, or a retry.
type ask struct {
	id    uint64
	token uint64 // number of the attempt, from 1; 0: it has no token
	from  int64  // the earliest window that can have counted the attempt; 0: nothing of it was lost
	most  int    // ids in its request: the answer to a larger batch did not tell in which window; 0: no bound
}

// retries are requests without an answer, which are to be asked again: by a connection
// to another target than the last one, where there are several. Safe for concurrent use.
type retries struct {
	mu      sync.Mutex
	queues  [][]ask // by the target that was asked last; guarded by mu
	waiting atomic.Int64
}

func newRetries(targets int) *retries { return &retries{queues: make([][]ask, targets)} }

func (r *retries) put(target int, asks ...ask) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.queues[target] = append(r.queues[target], asks...)
	r.waiting.Add(int64(len(asks)))
}

// take moves up to most requests that this target may be asked to dst: such as can be in one
// batch. If an answer has several windows and replays, it does not tell which are in which.
func (r *retries) take(dst []ask, target, most int) []ask {
	if r.waiting.Load() == 0 {
		return dst
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range max(len(r.queues)-1, 1) { // its own only if it is the only one
		q := &r.queues[(target+1+i)%len(r.queues)]
		if len(*q) == 0 {
			continue
		}
		first := (*q)[0]
		if first.most > 0 {
			most = min(most, first.most)
		}
		n := 1
		for n < min(most, len(*q)) && (*q)[n].from == first.from && (*q)[n].most == first.most {
			n++
		}
		dst = append(dst, (*q)[:n]...)
		*q = (*q)[:copy(*q, (*q)[n:])]
		r.waiting.Add(-int64(n))
		break
	}
	return dst
}

// retry adds what is to be asked again to the batch that is built. A token is good for
// the window that counted its id and the next one: an attempt that cannot be asked
// again by then is set aside.
func (c *conn) retry(most int) {
	before := len(c.ids)
	c.ids = c.d.retries.take(c.ids, c.target, most)
	kept := c.ids[:before]
	for _, a := range c.ids[before:] {
		if a.from != 0 && a.token != 0 && time.Now().UnixMilli() >= a.from+2*c.d.truth.span {
			c.d.truth.setAside(a.token)
			continue
		}
		kept = append(kept, a)
	}
	c.ids = kept
}

// lost notes requests that will not be answered. They are asked again.
func (c *conn) lost(asks []ask, from int64, lag time.Duration) {
	c.d.truth.broken(asks, from, lag)
	c.d.retries.put(c.target, asks...)
}

// clockLag is by how much the servers' clocks, and the turns of their windows, may be
// behind the driver's clock when there are tokens.
const clockLag = 250 * time.Millisecond

// earliest is the first window in which a request can be judged that is sent now.
func (c *conn) earliest(sent time.Time) int64 {
	span := c.d.truth.span
	if span == 0 {
		return c.newest
	}
	at := c.d.truth.clock(sent.Add(-clockLag))
	return max(c.newest, at-at%span)
}

// stray is how long a server may take to judge what it had read, or has yet to read,
// from a connection that the driver closed. On a busy machine that is more than a second.
const stray = 5 * time.Second

// cut is how a connection loses replies: the driver closes it.
type cut struct {
	now   bool // before anything of the reply is read
	reset bool // with a TCP reset
	bytes int  // after so many bytes of the reply; 0: after answers
	after int  // ids answered
}

// draw decides whether the replies to a batch are lost with their connection. Two thirds
// of what is lost is lost so, as far as one reply a connection goes; see discard.
func (c *conn) draw() (x cut, lose bool) {
	if share := c.d.load.Lose; share == 0 || c.rng.Float64() >= share*2/3 {
		return x, false
	}
	switch c.rng.IntN(4) {
	case 0:
		x.now = true
	case 1:
		x.now, x.reset = true, true
	case 2:
		x.bytes = 1 + c.rng.IntN(40)
	default:
		x.after = c.rng.IntN(len(c.ids))
	}
	return x, true
}

// lose closes a connection whose batch was sent, at another moment each time.
func (c *conn) lose(nc net.Conn, x cut, sent time.Time) {
	from := c.earliest(sent)
	c.got = c.got[:0]
	n := 0
	switch {
	case x.now:
		if tcp, ok := nc.(*net.TCPConn); ok && x.reset {
			_ = tcp.SetLinger(0)
		}
	case x.bytes > 0:
		_, _ = nc.Read(make([]byte, x.bytes)) // whatever came of it is thrown away
	case x.after > 0:
		n, _, _ = c.read(x.after)
		c.report(sent, from, n)
	}
	nc.Close()
	c.lost(c.ids[n:], from, stray)
}

// discard throws answers away that have arrived: all those to a request. The rest
// stays in c.got, for the truth.
func (c *conn) discard(n int, from int64) {
	kept, refused := c.got[:0], false
	for at := 0; at < n; {
		size := c.inRequest(c.ids[at:n])
		throw := c.d.load.Lose > 0 && c.rng.Float64() < c.d.load.Lose/3
		for i := at; i < at+size; i++ {
			a, got := c.ids[i], c.got[i]
			switch {
			case throw || got.kind == answerUnplaced:
				if a.most = 0; got.kind == answerUnplaced {
					a.most = max(1, size/unplacedParts)
				}
				a.from = c.d.truth.thrown(a, got, from)
				c.d.retries.put(c.target, a)
			case got.kind == answerRefused && a.from != 0 && a.token != 0:
				c.d.retries.put(c.target, a)
				kept, refused = append(kept, got), true
			default:
				kept = append(kept, got)
			}
		}
		at += size
	}
	if c.got = kept; refused {
		time.Sleep(refusedPause)
	}
}

// unplacedParts is in how many requests a batch is asked again whose answer did not tell the
// windows. With a request for each id it took seconds, and tokens became too old.
const unplacedParts = 8

// refusedPause is how long a connection waits when a retry was refused: it is asked again
// until there is an answer, and would keep the servers busy with nothing else.
const refusedPause = 10 * time.Millisecond

// drain asks again what has a token and no answer yet, when the load is over.
func (d *driver) drain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 4*d.load.Timeout)
	defer cancel()
	d.draining, d.load.Lose, d.load.Rate = true, 0, 0
	d.connect(ctx)
}
