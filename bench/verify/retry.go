package main

import (
	"net"
	"slices"
	"sync"
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
	mu     sync.Mutex
	queues [][]ask // by the target that was asked last; guarded by mu
}

func newRetries(targets int) *retries { return &retries{queues: make([][]ask, targets)} }

func (r *retries) put(target int, asks ...ask) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.queues[target] = append(r.queues[target], asks...)
}

// take moves up to most requests that this target may be asked to dst: such as can be in one
// batch. If an answer has several windows and replays, it does not tell which are in which.
func (r *retries) take(dst []ask, target, most int) []ask {
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
		break
	}
	return dst
}

// retry begins a batch with what is to be asked again. A token is good for the window that
// counted its id and the next one: an attempt that cannot be asked again by then is set
// aside.
func (c *conn) retry(most int) {
	c.ids = slices.DeleteFunc(c.d.retries.take(c.ids[:0], c.target, most), func(a ask) bool {
		old := a.from != 0 && a.token != 0 && c.d.truth.clock(time.Now()) >= a.from+2*c.d.truth.span
		if old {
			c.d.truth.setAside(a.token)
		}
		return old
	})
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

// cutShare of the replies that are lost are lost with their connection, as far as one reply a
// connection goes; discard loses the others.
const cutShare = 2. / 3

// lose closes a connection whose batch was sent, at a moment that is drawn.
func (c *conn) lose(sent time.Time) {
	from, n := c.earliest(sent), 0
	c.got = c.got[:0]
	switch c.rng.IntN(4) {
	case 0: // before anything of the reply is read
	case 1: // the same, with a TCP reset
		if tcp, ok := c.net.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
	case 2: // within a reply
		_, _ = c.net.Read(make([]byte, 1+c.rng.IntN(40))) // whatever came of it is thrown away
	case 3: // after some answers
		n, _, _ = c.read(c.rng.IntN(len(c.ids)))
		c.report(sent, from, n)
	}
	c.net.Close()
	c.lost(c.ids[n:], from, stray)
}

// discard throws answers away that have arrived: all those to a request. The rest
// stays in c.got, for the truth.
func (c *conn) discard(n int, from int64) {
	kept, refused := c.got[:0], false
	for at := 0; at < n; {
		size := c.inRequest(c.ids[at:n])
		throw := c.d.Lose > 0 && c.rng.Float64() < c.d.Lose*(1-cutShare)
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
