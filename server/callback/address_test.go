package callback

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const (
	victimAddr = "93.184.216.34"
	otherAddr  = "93.184.216.99"
)

// startPublicCallbacks runs Sender for which all names of victim.example.com
// have one public address and all others another; both lead to receivers of the
// test.
func startPublicCallbacks(t *testing.T, cfg Config, victim, other string) *Sender {
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

// TestCallbackRateHoldsForAnAddressWithManyNames: another name is not another POST
// per second, and a POST above the limit ends at once and is counted.
func TestCallbackRateHoldsForAnAddressWithManyNames(t *testing.T) {
	const rate, names, rounds = 10, 40, 5
	var hits atomic.Int64
	_, victim := receiver(t, func(http.ResponseWriter, *http.Request) { hits.Add(1) })
	c := startPublicCallbacks(t, Config{Rate: rate, Concurrency: names, workers: 2 * names}, victim, victim)
	began := time.Now()
	for round := range rounds { // by new connections, then by pooled ones
		for n := range names {
			send(t, c, fmt.Sprintf("http://n%d.victim.example.com/%d", n, round))
		}
		await(t, c, "the end of all", func(s Stats) bool { return s.Waiting+s.InFlight == 0 })
	}
	s := c.Stats()
	// One more than the burst, as the first POST is due at once.
	if most := addressBurst + 1 + int64(time.Since(began).Seconds()*rate) + 1; hits.Load() > most || hits.Load() < addressBurst {
		t.Errorf("%d POSTs to %d names of one address, want %d to %d", hits.Load(), names, addressBurst, most)
	}
	if s.Ended[FailedLimited] == 0 || failed(s) != s.Ended[FailedLimited] || sends(s) != names*rounds {
		t.Errorf("%+v", s)
	}
}

// TestCallbackToOneNameNeverMeetsTheLimitOfItsAddress: its own rate is the same, also if each
// POST is sent twice because the peer ends connections without a word.
func TestCallbackToOneNameNeverMeetsTheLimitOfItsAddress(t *testing.T) {
	const sent = 100
	_, keeps := receiver(t, func(http.ResponseWriter, *http.Request) {})
	_, ends := rawReceiver(t, func(conn net.Conn, r *bufio.Reader) {
		if _, err := readPOST(r); err == nil {
			_, _ = io.WriteString(conn, okAnswer)
		}
	})
	for _, addr := range []string{keeps, ends} {
		c := startPublicCallbacks(t, Config{Rate: 200}, addr, addr)
		for n := range sent {
			send(t, c, fmt.Sprintf("http://n.victim.example.com/%d", n))
		}
		await(t, c, "delivery", func(s Stats) bool { return s.Waiting+s.InFlight == 0 })
		if s := c.Stats(); s.Ended[Delivered] != sent {
			t.Errorf("%d delivered, want %d: %+v", s.Ended[Delivered], sent, s)
		}
	}
}

// TestCallbackAddressesOfTheAllowedNetworksHaveNoLimit: they are the operator's.
func TestCallbackAddressesOfTheAllowedNetworksHaveNoLimit(t *testing.T) {
	const names = 50
	_, addr := receiver(t, func(http.ResponseWriter, *http.Request) {})
	_, port, _ := net.SplitHostPort(addr)
	_, resolver := newNameServer(t, func(string, int64) []netip.Addr { return addrs("127.0.0.1") })
	c := startCallbacks(t, Config{Allow: []string{"127.0.0.0/8:" + port}, Resolver: resolver, Rate: 0.001})
	for n := range names {
		send(t, c, fmt.Sprintf("http://n%d.example.com:%s/", n, port))
	}
	if s := await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == names }); failed(s) != 0 {
		t.Errorf("%+v", s)
	}
}

// TestCallbackAddressesAreEvicted also when each is at another address, and matters for long.
func TestCallbackAddressesAreEvicted(t *testing.T) {
	c := endpointPolicy(t, "")
	d := destinationOf(t, c, "http://hooks.example.com/")
	for _, c.cfg.Rate = range []float64{0.001, 1e6} {
		clear(c.addresses)
		for n := range 3 * maxAddresses {
			addr := netip.AddrFrom4([4]byte{93, byte(n >> 16), byte(n >> 8), byte(n)})
			if err := c.admit(d, addr); err != nil {
				t.Fatal(err)
			}
		}
		if len(c.addresses) > maxAddresses {
			t.Errorf("rate %v: %d addresses are remembered, want %d", c.cfg.Rate, len(c.addresses), maxAddresses)
		}
	}
	time.Sleep(2 * c.cfg.interval())
	c.evictAddresses(len(c.addresses))
	if len(c.addresses) != 0 {
		t.Errorf("%d idle addresses are remembered", len(c.addresses))
	}
}

// TestCallbackNamesThatMoveAreAccountedFor: of names that lead elsewhere with each
// look-up, connections that are closed, and answers that fail, each POST has its result.
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
	c := startCallbacks(t, Config{Resolver: resolver, Rate: 2000, Concurrency: 2, workers: 12, maxWaiting: 80, breakerFailures: 3, breakerOpen: 5 * time.Millisecond})
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
	if s := c.Stats(); sends(s) != sent || s.Waiting+s.InFlight+s.Reserved != 0 {
		t.Errorf("sent %d, accounted for %d: %+v", sent, sends(s), s)
	}
}
