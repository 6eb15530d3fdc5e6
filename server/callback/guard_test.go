package callback

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// nameServer is a DNS server on loopback. answer gets a name without the root
// dot and a counter of the queries, and returns the addresses.
type nameServer struct {
	conn    net.PacketConn
	queries atomic.Int64
	done    chan struct{}
}

func newNameServer(t testing.TB, answer func(name string, n int64) []netip.Addr) (*nameServer, *net.Resolver) {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &nameServer{conn: conn, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if reply := s.reply(buf[:n], answer); reply != nil {
				_, _ = conn.WriteTo(reply, from)
			}
		}
	}()
	t.Cleanup(func() { _ = conn.Close(); <-s.done })
	return s, &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "udp", conn.LocalAddr().String())
		},
	}
}

// reply answers a query of one question for A or AAAA, with a time to live of 0.
func (s *nameServer) reply(query []byte, answer func(string, int64) []netip.Addr) []byte {
	const header = 12
	if len(query) < header {
		return nil
	}
	var labels []string
	i := header
	for i < len(query) && query[i] != 0 {
		end := i + 1 + int(query[i])
		if end >= len(query) {
			return nil
		}
		labels = append(labels, string(query[i+1:end]))
		i = end
	}
	question := query[header : i+5]
	qtype := binary.BigEndian.Uint16(query[i+1:])

	reply := append([]byte{}, query[0], query[1], 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0)
	reply = append(reply, question...)
	var count uint16
	for _, addr := range answer(strings.Join(labels, "."), s.queries.Add(1)) {
		if addr.Is4() != (qtype == 1) {
			continue
		}
		reply = append(reply, 0xc0, header) // the name of the question
		reply = binary.BigEndian.AppendUint16(reply, qtype)
		reply = append(reply, 0, 1, 0, 0, 0, 0)
		reply = binary.BigEndian.AppendUint16(reply, uint16(addr.BitLen()/8))
		reply = append(reply, addr.AsSlice()...)
		count++
	}
	binary.BigEndian.PutUint16(reply[6:], count)
	return reply
}

func addrs(list ...string) []netip.Addr {
	out := make([]netip.Addr, len(list))
	for i, a := range list {
		out[i] = netip.MustParseAddr(a)
	}
	return out
}

// canary listens on a loopback address with a port of the default policy and counts
// connections.
func canary(t *testing.T) (addr netip.AddrPort, touched *atomic.Int64) {
	t.Helper()
	for _, port := range []string{"8443", "8080", "443", "80"} {
		ln, err := net.Listen("tcp4", "127.71.14.3:"+port)
		if err != nil {
			continue
		}
		touched := new(atomic.Int64)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				touched.Add(1)
				_ = conn.Close()
			}
		}()
		t.Cleanup(func() { _ = ln.Close(); <-done })
		return netip.MustParseAddrPort(ln.Addr().String()), touched
	}
	t.Skip("no port of the default policy is free on 127.71.14.3")
	return netip.AddrPort{}, nil
}

var errNoRoute = errors.New("no route in the test")

// noRoute connects to loopback really and to nothing else.
func noRoute(ctx context.Context, d *net.Dialer, addr string) (net.Conn, error) {
	if !netip.MustParseAddrPort(addr).Addr().IsLoopback() {
		return nil, errNoRoute
	}
	return d.DialContext(ctx, "tcp", addr)
}

// anyRate connects as the workers do, but for the limits of the address.
func anyRate(c *Sender) dialFunc {
	return func(ctx context.Context, d *net.Dialer, to netip.AddrPort) (net.Conn, error) {
		return c.guard.connect(ctx, d, to.String())
	}
}

func destinationOf(t testing.TB, c *Sender, url string) *destination {
	t.Helper()
	ep, err := c.Parse([]byte(url))
	if err != nil {
		t.Fatal(err)
	}
	return c.newDestination(ep)
}

func TestGuardRebindingNameNeverReachesLoopback(t *testing.T) {
	trap, touched := canary(t)
	loop := trap.Addr()
	public := netip.MustParseAddr("93.184.216.34")
	mapped := netip.AddrFrom16(loop.As16()) // ::ffff:127.71.14.3 in an AAAA record
	for _, tc := range []struct {
		name   string
		answer func(name string, n int64) []netip.Addr
	}{
		{"public first", func(_ string, n int64) []netip.Addr {
			if n <= 2 { // A and AAAA of the first look-up
				return []netip.Addr{public}
			}
			return []netip.Addr{loop}
		}},
		{"in turn", func(_ string, n int64) []netip.Addr { return []netip.Addr{[]netip.Addr{public, loop}[n/2%2]} }},
		{"mixed", func(string, int64) []netip.Addr { return []netip.Addr{public, loop} }},
		{"mixed, loopback first", func(string, int64) []netip.Addr { return []netip.Addr{loop, mapped, public} }},
		{"v4-mapped", func(string, int64) []netip.Addr { return []netip.Addr{mapped} }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, resolver := newNameServer(t, tc.answer)
			c := endpointPolicy(t, "")
			c.guard.resolver = resolver
			c.guard.connect = noRoute
			d := destinationOf(t, c, fmt.Sprintf("http://rebind.example.com:%d/", trap.Port()))
			const tries, at = 2000, 4
			var wg sync.WaitGroup
			for range at {
				wg.Go(func() {
					for range tries / at {
						ctx, cancel := context.WithTimeout(t.Context(), patience)
						conn, err := c.guard.dial(ctx, d, anyRate(c))
						cancel()
						if err == nil {
							_ = conn.Close()
							t.Error("connected")
							return
						}
						if !errors.Is(err, errRefused) && !errors.Is(err, errNoRoute) {
							t.Errorf("dial: %v", err)
							return
						}
					}
				})
			}
			wg.Wait()
		})
	}
	if n := touched.Load(); n != 0 {
		t.Fatalf("loopback was reached %d times", n)
	}
}

// Should the address change between check and connection, the socket has the
// last word.
func TestGuardChecksTheAddressAtTheSocket(t *testing.T) {
	trap, touched := canary(t)
	_, resolver := newNameServer(t, func(string, int64) []netip.Addr { return addrs("93.184.216.34") })
	c := endpointPolicy(t, "")
	c.guard.resolver = resolver
	for _, elsewhere := range []string{trap.String(), fmt.Sprintf("[::ffff:%v]:%d", trap.Addr(), trap.Port())} {
		c.guard.connect = func(ctx context.Context, d *net.Dialer, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "tcp", elsewhere)
		}
		d := destinationOf(t, c, fmt.Sprintf("http://rebind.example.com:%d/", trap.Port()))
		if _, err := c.guard.dial(t.Context(), d, anyRate(c)); !errors.Is(err, errRefused) {
			t.Errorf("dial of %s: %v, want refused", elsewhere, err)
		}
	}
	if n := touched.Load(); n != 0 {
		t.Fatalf("loopback was reached %d times", n)
	}
}

func TestGuardPermitsByAddress(t *testing.T) {
	c := endpointPolicy(t, "0.0.0.0:8080", "hooks.lan:9000", "169.254.169.254:9000", "10.0.0.0/8:9004", "127.0.0.0/8:8080", "127.0.0.0/8:9008")
	c.guard.ownPorts = append(c.guard.ownPorts, 9008) // admin
	c.guard.interfaces = func() ([]net.Addr, error) {
		return []net.Addr{&net.IPNet{IP: net.IPv4(93, 184, 216, 1), Mask: net.CIDRMask(24, 32)}}, nil
	}
	const (
		public  = "http://hooks.example.com/"
		p8080   = "http://hooks.example.com:8080/"
		p9004   = "http://hooks.example.com:9004/"
		p9008   = "http://hooks.example.com:9008/"
		listed  = "http://hooks.lan:9000/"
		literal = "http://169.254.169.254:9000/"
	)
	for _, tc := range []struct {
		url, addr string
		permit    bool
	}{
		{public, "93.184.216.34", true},
		{public, "::ffff:93.184.216.34", true}, // as resolvers return it
		{public, "2606:4700::1111", true},
		{public, "172.32.0.1", true},
		{public, "127.0.0.1", false},
		{public, "::ffff:127.0.0.1", false},
		{public, "0.0.0.0", false},
		{public, "10.1.2.3", false},
		{public, "100.64.0.1", false},
		{public, "169.254.169.254", false},
		{public, "168.63.129.16", false},
		{public, "::ffff:168.63.129.16", false},
		{public, "192.0.0.192", false},
		{public, "255.255.255.255", false},
		{public, "::", false},
		{public, "::1", false},
		{public, "::127.0.0.1", false},
		{public, "::8.8.8.8", false},
		{public, "64:ff9b::808:808", false},
		{public, "64:ff9b:1::808:808", false},
		{public, "2002:808:808::", false},
		{public, "2001:0:808:808::1", false},
		{public, "fe80::1%eth0", false},
		{public, "2606:4700::1111%eth0", false},
		{public, "fec0::1", false},
		{public, "fd00::1", false},
		{public, "5f00::1", false},
		{public, "ff02::1", false},
		{public, "2001:db8::1", false},
		{p8080, "93.184.216.34", true},
		{p8080, "93.184.216.1", false}, // own address, own port
		{public, "93.184.216.1", true}, // own address, somebody else's port
		{p8080, "127.0.0.1", false},    // own, though the allow-list has it
		{p9008, "127.0.0.1", false},
		{p9004, "10.1.2.3", true},
		{p9004, "::ffff:10.1.2.3", true},
		{p9004, "11.1.2.3", false},
		{p9004, "127.0.0.1", false},
		{listed, "127.0.0.1", true},
		{listed, "::1", true},
		{listed, "10.1.2.3", true},
		{listed, "fd00::1", true},
		{listed, "93.184.216.34", true},
		{listed, "169.254.169.254", false},
		{listed, "::ffff:169.254.169.254", false},
		{listed, "168.63.129.16", false},
		{listed, "0.0.0.0", false},
		{listed, "224.0.0.1", false},
		{listed, "64:ff9b::a9fe:a9fe", false},
		{listed, "fe80::1", false},
		{literal, "169.254.169.254", true},
		{literal, "169.254.169.253", false},
	} {
		d := destinationOf(t, c, tc.url)
		if err := c.guard.permit(d, netip.MustParseAddr(tc.addr)); (err == nil) != tc.permit {
			t.Errorf("%s at %s: %v, want permitted %v", tc.url, tc.addr, err, tc.permit)
		} else if err != nil && !errors.Is(err, errRefused) {
			t.Errorf("%s at %s: %v is not errRefused", tc.url, tc.addr, err)
		}
	}
	c.guard.interfaces = func() ([]net.Addr, error) { return nil, errors.New("no netlink") }
	if err := c.guard.permit(destinationOf(t, c, p8080), netip.MustParseAddr("93.184.216.34")); err == nil {
		t.Error("own port permitted without knowing the own addresses")
	}
}

// The search list of the resolver is for the names of the own network.
func TestGuardResolvesPublicNamesInFull(t *testing.T) {
	c := endpointPolicy(t, "", "hooks.lan:9000", "10.0.0.0/8:9004")
	for url, want := range map[string]string{
		"http://hooks.example.com/": "hooks.example.com.",
		"http://hooks.lan:9000/":    "hooks.lan",
		"http://worker.prod:9004/":  "worker.prod",
	} {
		if got := c.guard.lookupName(destinationOf(t, c, url)); got != want {
			t.Errorf("%s is looked up as %q, want %q", url, got, want)
		}
	}
}

func TestGuardTriesTheNextAddress(t *testing.T) {
	_, resolver := newNameServer(t, func(string, int64) []netip.Addr {
		return addrs("93.184.216.1", "10.0.0.1", "93.184.216.2", "93.184.216.3", "93.184.216.4", "93.184.216.5")
	})
	c := endpointPolicy(t, "")
	c.guard.resolver = resolver
	var tried []string
	c.guard.connect = func(_ context.Context, _ *net.Dialer, addr string) (net.Conn, error) {
		tried = append(tried, addr)
		return nil, errNoRoute
	}
	_, err := c.guard.dial(t.Context(), destinationOf(t, c, "http://hooks.example.com/"), anyRate(c))
	if !errors.Is(err, errNoRoute) || len(tried) != maxCandidates {
		t.Fatalf("tried %v: %v", tried, err)
	}
	for _, addr := range tried {
		if strings.HasPrefix(addr, "10.") {
			t.Errorf("tried %s", addr)
		}
	}
}

func TestGuardDialsOwnSinkAtOwnListenerOnly(t *testing.T) {
	for _, tc := range []struct{ listen, dialled string }{
		{"0.0.0.0:8080", "127.0.0.1:8080 [::1]:8080"},
		{"[::]:8080", "127.0.0.1:8080 [::1]:8080"},
		{"192.0.2.7:8080", "192.0.2.7:8080"},
	} {
		c := endpointPolicy(t, tc.listen)
		var dialled []string
		c.guard.connect = func(_ context.Context, _ *net.Dialer, addr string) (net.Conn, error) {
			dialled = append(dialled, addr)
			return nil, errNoRoute
		}
		_, _ = c.guard.dial(t.Context(), destinationOf(t, c, "http://localhost:8080/test"), anyRate(c))
		if got := strings.Join(dialled, " "); got != tc.dialled {
			t.Errorf("listening at %s: dialled %s, want %s", tc.listen, got, tc.dialled)
		}
	}
}
