package server

import (
	"container/heap"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"time"
)

// maxPeers is how many addresses are remembered, those with POSTs in flight or
// waiting aside. An idle one matters for one interval of the rate.
const maxPeers = 1 << 14

// peer is a public address that callbacks go to. What bounds a destination
// bounds it, too: names are cheap, and any number of them may lead to one
// victim. Which address a name leads to is known at the dial only, so a POST
// may find there that it has to wait; it is put back then, and its destination
// waits at the peer. Addresses of the operator's own networks (CIDR:PORT) have
// no such bound.
type peer struct {
	addr     netip.Addr
	inFlight int       // POSTs there, and promises
	next     time.Time // when the next POST is due at the earliest
	waiting  destList
	entries  int // of the destinations waiting
	due      int // place in Callbacks.dueAt, from 1; 0: not in it
}

// free reports whether a POST may go there now.
func (c *Callbacks) free(p *peer, now time.Time) bool {
	return p.inFlight < c.cfg.Concurrency && !p.next.After(now)
}

func (c *Callbacks) charge(p *peer, now time.Time) {
	p.inFlight++
	p.next = c.cfg.after(p.next, now)
	if p.due > 0 {
		heap.Fix(&c.dueAt, p.due-1)
	}
}

// after is when the next POST is due if one is sent now. A late wake-up may be
// made up for by one POST, so that the rate is met; idle time is not saved.
func (cfg *CallbackConfig) after(next, now time.Time) time.Time {
	interval := cfg.interval()
	if earliest := now.Add(-interval); next.Before(earliest) {
		next = earliest
	}
	return next.Add(interval)
}

// peerAt returns the peer with that address.
func (c *Callbacks) peerAt(addr netip.Addr) *peer {
	p := c.peers[addr]
	if p != nil {
		return p
	}
	if len(c.peers) >= maxPeers {
		c.forgetPeers(16) // more than one is added at a time
	}
	p = &peer{addr: addr}
	c.peers[addr] = p
	return p
}

// forgetPeers looks at n peers and forgets those that need not be remembered.
func (c *Callbacks) forgetPeers(n int) {
	now := time.Now()
	for addr, p := range c.peers {
		if p.inFlight == 0 && p.waiting.n == 0 && !p.next.After(now) {
			delete(c.peers, addr)
		}
		if n--; n == 0 {
			return
		}
	}
}

// errPeerBusy says that a POST has to wait for its turn at the address.
type errPeerBusy struct{ addr netip.Addr }

func (e errPeerBusy) Error() string { return e.addr.String() + " is at its limit" }

// enter begins a POST of d to addr, if the limits of that address allow it.
func (c *Callbacks) enter(d *destination, addr netip.Addr) error {
	if d.kind != destPublic || c.guard.inAllowedNet(addr, d.port) {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settleAt(d, addr)
	if d.promises > 0 {
		d.promises--
		return nil
	}
	p, now := c.peerAt(addr), time.Now()
	if !c.free(p, now) {
		return errPeerBusy{addr}
	}
	c.charge(p, now)
	return nil
}

// leave ends what enter began.
func (c *Callbacks) leave(d *destination, addr netip.Addr) {
	if d.kind != destPublic || c.guard.inAllowedNet(addr, d.port) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.vacate(c.peerAt(addr))
}

func (c *Callbacks) vacate(p *peer) {
	p.inFlight--
	c.arm(p)
}

// settleAt notes that d is at addr now. Promises of another address are void.
func (c *Callbacks) settleAt(d *destination, addr netip.Addr) {
	if d.peer != addr {
		c.keepPromises(d, 0)
		d.peer = addr
	}
}

// keepPromises gives up those of d's promises that nobody is left to use.
func (c *Callbacks) keepPromises(d *destination, users int) {
	for d.promises > users {
		d.promises--
		c.vacate(c.peerAt(d.peer))
	}
}

// promise keeps a place at the peer that d was last found at, or has d wait for
// one. True: d may send.
func (c *Callbacks) promise(d *destination) bool {
	if !d.peer.IsValid() {
		return true
	}
	p, now := c.peerAt(d.peer), time.Now()
	if p.waiting.n == 0 && c.free(p, now) {
		c.charge(p, now)
		d.promises++
		return true
	}
	d.state, d.waitsAt = destWaiting, p
	p.waiting.push(d)
	p.entries += d.entries
	c.arm(p)
	return false
}

// arm sees to it that what waits at p is looked at when its time comes.
func (c *Callbacks) arm(p *peer) {
	if p.due > 0 || p.waiting.n == 0 || p.inFlight >= c.cfg.Concurrency {
		return
	}
	heap.Push(&c.dueAt, p)
	if c.dueAt[0] == p {
		c.wakePace()
	}
}

// release lets those go whose turn at their peer has come.
func (c *Callbacks) release(now time.Time) {
	for len(c.dueAt) > 0 && !c.dueAt[0].next.After(now) {
		p := heap.Pop(&c.dueAt).(*peer)
		for p.waiting.n > 0 && c.free(p, now) {
			d := p.waiting.head
			p.waiting.remove(d)
			p.entries -= d.entries
			d.state, d.waitsAt = destNone, nil
			if d.queue == nil {
				c.rest(d)
				continue
			}
			c.settleAt(d, p.addr)
			c.charge(p, now)
			d.promises++
			c.pushReady(d)
		}
		c.arm(p)
	}
}

// postpone puts a POST back that has found the address at its limit. False: it
// is given up.
func (c *Callbacks) postpone(j job, addr netip.Addr) bool {
	d := j.dest
	kept := true
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended(j)
	j.done(errCut) // which tells the breaker nothing
	c.stats.Deferred++
	c.settleAt(d, addr)
	e := c.table[j.ep.url]
	switch {
	case c.closed:
		c.stats.Dropped++
	case e != nil && e.queued:
		c.stats.Merged++ // its successor waits already
	case c.peerAt(addr).entries >= c.cfg.MaxWaitingPerDestination:
		// However many names: one victim does not take the table from the others.
		c.stats.FailedLimited++
		kept = false
	default:
		if e == nil { // at most a place for each worker is taken beyond the table's end
			e = &entry{ep: j.ep, dest: d}
			c.table[j.ep.url] = e
			c.countEntry(d, 1)
		}
		e.queued = true
		c.stats.Waiting++
		if e.next = d.queue; e.next == nil {
			d.queueTail = e
		}
		d.queue = e
	}
	c.keepPromises(d, d.users())
	c.schedule(d)
	c.rest(d)
	c.noticeEmpty()
	return kept
}

// users is how many POSTs may still make use of a promise to d.
func (d *destination) users() int {
	if d.state == destReady {
		return d.inFlight + 1
	}
	return d.inFlight
}

// peerConn is a connection to a destination whose address is addr.
type peerConn struct {
	net.Conn
	addr    netip.Addr
	owner   *Callbacks
	dest    *destination
	entered atomic.Bool // counted at the peer
}

// peerConnOf is what guard.dial made conn of; nil for the own sink.
func peerConnOf(conn net.Conn) *peerConn {
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn()
	}
	pc, _ := conn.(*peerConn)
	return pc
}

// enter counts a further POST on the connection.
func (pc *peerConn) enter() error {
	if pc.entered.Load() {
		return nil // by the dial
	}
	err := pc.owner.enter(pc.dest, pc.addr)
	pc.entered.Store(err == nil)
	return err
}

func (pc *peerConn) leave() {
	if pc.entered.Swap(false) {
		pc.owner.leave(pc.dest, pc.addr)
	}
}

// Close leaves, too: a connection may not live to its first POST.
func (pc *peerConn) Close() error {
	pc.leave()
	return pc.Conn.Close()
}

// through wraps connect: the limits of the address come first.
func (c *Callbacks) through(d *destination) dialFunc {
	return func(ctx context.Context, dialer *net.Dialer, addr netip.Addr, address string) (net.Conn, error) {
		if err := c.enter(d, addr); err != nil {
			return nil, err
		}
		conn, err := c.guard.connect(ctx, dialer, address)
		if err != nil {
			c.leave(d, addr)
			return nil, err
		}
		pc := &peerConn{Conn: conn, addr: addr, owner: c, dest: d}
		pc.entered.Store(true)
		return pc, nil
	}
}

// busyPeer returns the address that err says is at its limit.
func busyPeer(err error) (netip.Addr, bool) {
	var busy errPeerBusy
	ok := errors.As(err, &busy)
	return busy.addr, ok
}

// peerHeap orders peers by when their next POST is due.
type peerHeap []*peer

func (h peerHeap) Len() int           { return len(h) }
func (h peerHeap) Less(i, j int) bool { return h[i].next.Before(h[j].next) }
func (h peerHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].due, h[j].due = i+1, j+1
}
func (h *peerHeap) Push(p any) {
	*h = append(*h, p.(*peer))
	p.(*peer).due = len(*h)
}
func (h *peerHeap) Pop() any {
	old := *h
	p := old[len(old)-1]
	p.due = 0
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return p
}
