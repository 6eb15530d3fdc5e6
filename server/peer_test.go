package server

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const (
	victimAddr = "93.184.216.34"
	otherAddr  = "93.184.216.99"
)

// startPublicCallbacks runs Callbacks for which all names of victim.example.com
// have one public address and all others another; both lead to receivers of the
// test.
func startPublicCallbacks(t *testing.T, cfg CallbackConfig, victim, other string) *Callbacks {
	t.Helper()
	_, cfg.Resolver = newNameServer(t, func(name string, _ int64) []netip.Addr {
		if strings.HasSuffix(name, ".victim.example.com") {
			return addrs(victimAddr)
		}
		return addrs(otherAddr)
	})
	c := startCallbacks(t, cfg)
	c.guard.connect = func(ctx context.Context, d *net.Dialer, addr string) (net.Conn, error) {
		to := other
		if strings.HasPrefix(addr, victimAddr+":") {
			to = victim
		}
		return new(net.Dialer).DialContext(ctx, "tcp", to)
	}
	return c
}

// peersAtRest checks that nothing is counted at a peer when nothing is sent.
func peersAtRest(t *testing.T, c *Callbacks) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.peers {
		if p.inFlight != 0 || p.entries != 0 || p.waiting.n != 0 {
			t.Errorf("%v: %d in flight, %d entries of %d destinations waiting", p.addr, p.inFlight, p.entries, p.waiting.n)
		}
	}
	for _, d := range c.dests {
		if d.promises != 0 {
			t.Errorf("%v: %d promises", d.key, d.promises)
		}
	}
}

// TestCallbackRateHoldsForAnAddressWithManyNames: a name more is no POST more
// per second.
func TestCallbackRateHoldsForAnAddressWithManyNames(t *testing.T) {
	const rate, names = 100, 40
	var mu sync.Mutex
	var arrived []time.Time
	_, victim := receiver(t, func(http.ResponseWriter, *http.Request) {
		mu.Lock()
		arrived = append(arrived, time.Now())
		mu.Unlock()
	})
	c := startPublicCallbacks(t, CallbackConfig{Rate: rate}, victim, victim)
	for round := range 2 { // by new connections, then by pooled ones
		for n := range names {
			send(t, c, fmt.Sprintf("http://n%d.victim.example.com/%d", n, round))
		}
		await(t, c, "delivery", func(s CallbackStats) bool { return s.Delivered == uint64(names*(round+1)) })
	}
	mu.Lock()
	defer mu.Unlock()
	// One that makes up for a late wake-up comes on top of the first.
	if took, least := arrived[2*names-1].Sub(arrived[0]), (2*names-2)*time.Second/rate; took < least-least/10 {
		t.Errorf("%d POSTs to %d names of one address in %v, want at least %v", 2*names, names, took, least)
	}
	if s := c.Stats(); s.Deferred == 0 || s.failed() != 0 || s.sends() != 2*names {
		t.Errorf("%+v", s)
	}
	peersAtRest(t, c)
}

func TestCallbackConcurrencyHoldsForAnAddressWithManyNames(t *testing.T) {
	const limit, names = 3, 30
	var now, most atomic.Int64
	gate, open := newGate()
	_, victim := receiver(t, func(http.ResponseWriter, *http.Request) {
		n := now.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		<-gate
		now.Add(-1)
	})
	_, other := receiver(t, func(http.ResponseWriter, *http.Request) {})
	c := startPublicCallbacks(t, CallbackConfig{Rate: 1e6, Concurrency: limit, Timeout: time.Hour, Workers: 16}, victim, other)
	t.Cleanup(open)
	for n := range names {
		send(t, c, fmt.Sprintf("http://n%d.victim.example.com/", n))
	}
	await(t, c, "a full address", func(s CallbackStats) bool { return now.Load() == limit && s.InFlight == limit })
	// Whoever waits for the address holds no worker.
	for n := range 20 {
		send(t, c, fmt.Sprintf("http://n%d.example.org/", n))
		await(t, c, "the others", func(s CallbackStats) bool { return s.Delivered == uint64(n)+1 })
	}
	if s := c.Stats(); s.Waiting != names-limit || s.InFlight != limit {
		t.Errorf("%+v", s)
	}
	open()
	s := await(t, c, "delivery", func(s CallbackStats) bool { return s.Delivered == names+20 })
	if most.Load() != limit || s.sends() != names+20 {
		t.Errorf("%d in flight at most, want %d; %+v", most.Load(), limit, s)
	}
	peersAtRest(t, c)
}

// TestCallbackFloodOfNamesForOneVictimLeavesTheTable: a million names of one
// address fill its share of the table, and the callers of others get a place.
func TestCallbackFloodOfNamesForOneVictimLeavesTheTable(t *testing.T) {
	var hits atomic.Int64
	_, victim := receiver(t, func(http.ResponseWriter, *http.Request) { hits.Add(1) })
	_, other := receiver(t, func(http.ResponseWriter, *http.Request) {})
	c := startPublicCallbacks(t, CallbackConfig{Rate: 5, MaxWaiting: 160, Workers: 16}, victim, other)
	began := time.Now()
	const share, flood = 160 / destinationShare, 1000
	var sent uint64
	for n := range flood {
		ep, err := c.Parse(fmt.Appendf(nil, "http://n%d.victim.example.com/", n))
		if err != nil {
			t.Fatal(err)
		}
		for !c.Reserve(ep) { // the table is full of names that are being looked up
			time.Sleep(time.Millisecond)
		}
		c.Send(ep)
		sent++
	}
	await(t, c, "the names to be looked up", func(s CallbackStats) bool { return s.InFlight == 0 && s.Waiting <= share })
	for n := range 20 {
		send(t, c, fmt.Sprintf("http://n%d.example.org/%d", n%4, n))
		sent++
	}
	s := c.Stats()
	if s.FailedLimited == 0 || s.sends() != sent {
		t.Errorf("sent %d, accounted for %d: %+v", sent, s.sends(), s)
	}
	if n, most := hits.Load(), int64(time.Since(began).Seconds()*5)+2; n > most {
		t.Errorf("the victim was hit %d times, want at most %d", n, most)
	}
}

// TestCallbackAddressesOfTheAllowedNetworksHaveNoLimit: they are the operator's.
func TestCallbackAddressesOfTheAllowedNetworksHaveNoLimit(t *testing.T) {
	const names = 50
	_, addr := receiver(t, func(http.ResponseWriter, *http.Request) {})
	_, port, _ := net.SplitHostPort(addr)
	_, resolver := newNameServer(t, func(string, int64) []netip.Addr { return addrs("127.0.0.1") })
	c := startCallbacks(t, CallbackConfig{Allow: []string{"127.0.0.0/8:" + port}, Resolver: resolver, Rate: 0.001})
	for n := range names {
		send(t, c, fmt.Sprintf("http://n%d.example.com:%s/", n, port))
	}
	if s := await(t, c, "delivery", func(s CallbackStats) bool { return s.Delivered == names }); s.Deferred != 0 {
		t.Errorf("%+v", s)
	}
}

// TestCallbackPeersAreForgotten also when each is at another address.
func TestCallbackPeersAreForgotten(t *testing.T) {
	c := endpointPolicy(t, nil)
	d := destinationOf(t, c, "http://hooks.example.com/")
	c.cfg.Rate = 1e6
	for n := range 3 * maxPeers {
		addr := netip.AddrFrom4([4]byte{93, byte(n >> 16), byte(n >> 8), byte(n)})
		if err := c.enter(d, addr); err != nil {
			t.Fatal(err)
		}
		c.leave(d, addr)
	}
	if len(c.peers) > maxPeers+1 {
		t.Errorf("%d addresses are remembered, want %d", len(c.peers), maxPeers)
	}
	time.Sleep(2 * c.cfg.interval())
	c.forgetPeers(len(c.peers))
	if len(c.peers) != 0 {
		t.Errorf("%d idle addresses are remembered", len(c.peers))
	}
}

// TestCallbackNamesThatMoveAreAccountedFor: names that lead elsewhere with each
// look-up, connections that are closed, and answers that fail leave no place at
// any address taken.
func TestCallbackNamesThatMoveAreAccountedFor(t *testing.T) {
	var n atomic.Int64
	_, addr := rawReceiver(t, func(conn net.Conn, r *bufio.Reader) {
		for {
			if _, err := readPOST(r); err != nil {
				return
			}
			switch n.Add(1) % 5 {
			case 0:
				return
			case 1:
				_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
				return
			default:
				_, _ = io.WriteString(conn, okAnswer)
			}
		}
	})
	_, resolver := newNameServer(t, func(name string, n int64) []netip.Addr {
		switch {
		case n%7 == 0:
			return nil
		case n%5 == 0:
			return addrs(otherAddr, victimAddr)
		case n%2 == 0:
			return addrs(otherAddr)
		}
		return addrs(victimAddr)
	})
	c := startCallbacks(t, CallbackConfig{Resolver: resolver, Rate: 2000, Concurrency: 2, Workers: 12, MaxWaiting: 80, BreakerFailures: 3, BreakerOpen: 5 * time.Millisecond})
	c.guard.connect = func(ctx context.Context, _ *net.Dialer, to string) (net.Conn, error) {
		if n.Add(1)%11 == 0 {
			return nil, errNoRoute
		}
		return new(net.Dialer).DialContext(ctx, "tcp", addr)
	}
	var sent uint64
	for i := range 3000 {
		ep, err := c.Parse(fmt.Appendf(nil, "http://n%d.example.com/%d", i%17, i%40))
		if err != nil {
			t.Fatal(err)
		}
		if c.Reserve(ep) {
			c.Send(ep)
			sent++
		}
		if i%20 == 0 {
			time.Sleep(time.Millisecond) // lets breakers turn over
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if dropped := c.Drain(ctx); dropped != 0 {
		t.Errorf("%d dropped: something waits for ever", dropped)
	}
	if s := c.Stats(); s.sends() != sent || s.Waiting+s.InFlight+s.Reserved != 0 || s.Deferred == 0 {
		t.Errorf("sent %d, accounted for %d: %+v", sent, s.sends(), s)
	}
	peersAtRest(t, c)
}
