package callback

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"code.dny.dev/ssrf"

	"verve/internal/setting"
)

// errRefused is returned by a dial whose destination has no address that the policy
// allows. It is not the error of a connection that failed: nothing was sent.
var errRefused = errors.New("callback address refused")

// maxCandidates is how many addresses of a name are tried. Resolvers put the
// best first; a name with hundreds of addresses must not buy hundreds of
// connection attempts.
const maxCandidates = 4

// extraDenied4 are public-looking IPv4 addresses that serve the machine itself.
// The rest of what must not be dialled is in the lists of package ssrf; what is
// not in 2000::/3 is refused there as a whole (v4-compatible, NAT64, site-local,
// SRv6, unique and link-local).
var extraDenied4 = []netip.Prefix{
	netip.MustParsePrefix("168.63.129.16/32"), // Azure's host agent
}

// neverByName are addresses that an allow-listed name may not have, although it may
// have private ones: no webhook receiver has them, and some of them serve the
// credentials of the machine. An entry that names the address itself still allows it.
var neverByName = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),     // link-local, metadata of most clouds
	netip.MustParsePrefix("168.63.129.16/32"),   // Azure
	netip.MustParsePrefix("192.0.0.192/32"),     // Oracle
	netip.MustParsePrefix("100.100.100.200/32"), // Alibaba
	netip.MustParsePrefix("224.0.0.0/3"),        // multicast, reserved, broadcast
	netip.MustParsePrefix("::/128"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("fd00:ec2::254/128"), // AWS
	netip.MustParsePrefix("fd20:ce::254/128"),  // Google
	netip.MustParsePrefix("ff00::/8"),
	netip.MustParsePrefix("64:ff9b::/96"), // any of the above through NAT64
	netip.MustParsePrefix("64:ff9b:1::/48"),
	netip.MustParsePrefix("::/96"), // and in v4-compatible form
}

// allowedNet is a CIDR:PORT entry of the allow-list.
type allowedNet struct {
	prefix netip.Prefix
	port   uint16
}

// hostPort is a HOST:PORT entry of the allow-list, the host in canonical form.
type hostPort struct {
	host string
	port uint16
}

// guard decides where callbacks may go: by the text of the URL (Sender.Parse), and
// again by the address of every connection when it is made, so that it does not
// matter what a resolver answered before. A guard does not change after newGuard.
type guard struct {
	hosts    map[hostPort]bool
	nets     []allowedNet
	self     netip.AddrPort // of the public listener; the zero value: there is none
	ownPorts []uint16       // of the public and the admin listener; 0: there is none
	selfTLS  func() *tls.Config
	selfPath string
	base     *ssrf.Guardian
	resolver *net.Resolver
	tls      *tls.Config

	// interfaces lists the addresses of this machine.
	interfaces func() ([]net.Addr, error)
	// connect makes the connection with the given dialer.
	connect func(ctx context.Context, d *net.Dialer, addr string) (net.Conn, error)
}

func newGuard(cfg *Config) (*guard, error) {
	g := &guard{
		base:       ssrf.New(ssrf.WithAnyPort(), ssrf.WithAnyNetwork(), ssrf.WithDeniedV4Prefixes(extraDenied4...)),
		resolver:   cmp.Or(cfg.Resolver, net.DefaultResolver),
		tls:        cfg.tls,
		self:       cfg.SelfAddr,
		ownPorts:   []uint16{cfg.SelfAddr.Port(), cfg.AdminAddr.Port()},
		selfTLS:    cfg.SelfTLS,
		selfPath:   cfg.SelfPath,
		interfaces: net.InterfaceAddrs,
		connect:    cfg.Connect,
	}
	if g.connect == nil {
		g.connect = func(ctx context.Context, d *net.Dialer, addr string) (net.Conn, error) {
			return d.DialContext(ctx, "tcp", addr)
		}
	}
	if err := g.allowAll(cfg.Allow); err != nil {
		return nil, err
	}
	return g, nil
}

// allowAll adds the entries of the allow-list.
func (g *guard) allowAll(entries []string) error {
	g.hosts = make(map[hostPort]bool)
	for i, entry := range entries {
		err := g.allow(entry)
		switch {
		case err == nil:
		case len(entries) > 1:
			return setting.Errorf("callback-allow", "entry %d: %v", i+1, err)
		default:
			return setting.Errorf("callback-allow", "%v", err)
		}
	}
	return nil
}

// allow adds an entry of the allow-list: HOST:PORT or CIDR:PORT, v6 addresses
// in brackets.
func (g *guard) allow(entry string) error {
	colon := strings.LastIndexByte(entry, ':')
	switch {
	case colon < 0:
		return errors.New("want HOST:PORT or CIDR:PORT")
	case strings.Contains(entry, "://"):
		return errors.New("want HOST:PORT or CIDR:PORT, without a scheme")
	}
	host := entry[:colon]
	port, ok := parsePort(entry[colon+1:])
	if !ok {
		return errors.New("bad port, want 1 to 65535")
	}
	if strings.Contains(host, "/") {
		// Both [fd00::/8]:80 and [fd00::]/8:80 are accepted.
		prefix, err := netip.ParsePrefix(strings.NewReplacer("[", "", "]", "").Replace(host))
		if err != nil {
			return errors.New("bad CIDR")
		}
		if prefix != prefix.Masked() || prefix.Addr().Is4In6() {
			return fmt.Errorf("bad CIDR, want the network address as in %v", prefix.Masked())
		}
		g.nets = append(g.nets, allowedNet{prefix, port})
		return nil
	}
	name, _, ok := canonicalHost([]byte(host))
	if !ok {
		return errors.New("bad host, want a name, an IPv4 address, or an IPv6 address in brackets")
	}
	g.hosts[hostPort{name, port}] = true
	return nil
}

// isSelf reports whether host and port name this server's public listener.
func (g *guard) isSelf(host string, addr netip.Addr, port uint16) bool {
	return port == g.self.Port() && (host == "localhost" || addr.IsValid() && (addr == g.self.Addr().Unmap().WithZone("") ||
		addr == netip.IPv6Loopback() || addr == netip.AddrFrom4([4]byte{127, 0, 0, 1})))
}

// vouched reports whether the operator named the destination itself: it is taken for one that
// answers quickly until it does not.
func (g *guard) vouched(ep *Endpoint) bool {
	return ep.kind == destSelf || g.hosts[hostPort{ep.host, ep.port}]
}

func (g *guard) inAllowedNet(addr netip.Addr, port uint16) bool {
	return slices.ContainsFunc(g.nets, func(n allowedNet) bool { return n.port == port && n.prefix.Contains(addr) })
}

func (g *guard) allowedNetPort(port uint16) bool {
	return slices.ContainsFunc(g.nets, func(n allowedNet) bool { return n.port == port })
}

// defaultPort reports whether the default policy allows the port.
func defaultPort(port uint16) bool {
	return port == 80 || port == 443 || port == 8080 || port == 8443
}

// permit returns nil if a connection to addr may be made for d, and errRefused with
// the reason if not.
func (g *guard) permit(d *destination, addr netip.Addr) error {
	// Resolvers return v4 addresses in their v6 form, which no v4 rule matches.
	addr = addr.Unmap()
	switch {
	case addr.Zone() != "":
		return fmt.Errorf("%w: %v has a zone", errRefused, addr)
	case g.own(addr, d.port):
		return fmt.Errorf("%w: %v port %d is this server", errRefused, addr, d.port)
	case g.inAllowedNet(addr, d.port):
		return nil
	case d.kind == destListed:
		if d.addr == addr || addr.IsLoopback() {
			return nil
		}
		if slices.ContainsFunc(neverByName, func(p netip.Prefix) bool { return p.Contains(addr) }) {
			return fmt.Errorf("%w: %v, not even by an allow-listed name", errRefused, addr)
		}
		return nil
	case !defaultPort(d.port):
		return fmt.Errorf("%w: %v port %d is in no allowed network", errRefused, addr, d.port)
	}
	if err := g.base.SafeAddr(addr); err != nil {
		return fmt.Errorf("%w: %w", errRefused, err)
	}
	return nil
}

// own reports whether addr and port may be this server: a callback there would
// be a loop, or reach the admin listener. If the machine's addresses cannot be read,
// it returns true.
func (g *guard) own(addr netip.Addr, port uint16) bool {
	if !slices.Contains(g.ownPorts, port) {
		return false
	}
	if addr.IsLoopback() || addr.IsUnspecified() {
		return true
	}
	// The addresses are read each time, because they change. Few destinations have one
	// of this server's own ports.
	interfaces, err := g.interfaces()
	if err != nil {
		return true
	}
	return slices.ContainsFunc(interfaces, func(a net.Addr) bool {
		ipNet, ok := a.(*net.IPNet)
		if !ok {
			return false
		}
		ip, ok := netip.AddrFromSlice(ipNet.IP)
		return ok && ip.Unmap() == addr
	})
}

// dialFunc makes a TCP connection with the dialer.
type dialFunc func(ctx context.Context, d *net.Dialer, to netip.AddrPort) (net.Conn, error)

// dial connects to d, with TLS if d has it, before ctx ends. It tries only those addresses
// of a name that the policy allows, each by connect.
func (g *guard) dial(ctx context.Context, d *destination, connect dialFunc) (net.Conn, error) {
	conn, err := g.dialTCP(ctx, d, connect)
	if err != nil || !d.tls {
		return conn, err
	}
	var cfg *tls.Config
	switch {
	case d.kind == destSelf:
		cfg = g.selfTLS()
	case g.tls != nil:
		cfg = g.tls.Clone()
	default:
		cfg = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	cfg.ServerName = d.host
	secure := tls.Client(conn, cfg)
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("tls handshake: %w", err)
	}
	return secure, nil
}

func (g *guard) dialTCP(ctx context.Context, d *destination, connect dialFunc) (net.Conn, error) {
	if d.kind == destSelf {
		return g.dialSelf(ctx)
	}
	candidates := []netip.Addr{d.addr}
	if !d.addr.IsValid() {
		var err error
		candidates, err = g.resolver.LookupNetIP(ctx, "ip", g.lookupName(d))
		if err != nil {
			return nil, err
		}
	}
	err := fmt.Errorf("%w: no address", errRefused)
	allowed := candidates[:0]
	for _, addr := range candidates {
		if refused := g.permit(d, addr); refused != nil {
			err = refused
			continue
		}
		allowed = append(allowed, addr.Unmap())
	}
	allowed = allowed[:min(len(allowed), maxCandidates)]

	dialer := &net.Dialer{
		// The last check is at the socket: it is of the address that is dialled.
		Control: func(_, address string, _ syscall.RawConn) error {
			ap, err := netip.ParseAddrPort(address)
			if err != nil || ap.Port() != d.port {
				return fmt.Errorf("%w: %s", errRefused, address)
			}
			return g.permit(d, ap.Addr())
		},
	}
	for i, addr := range allowed {
		conn, dialErr := connectShare(ctx, connect, dialer, netip.AddrPortFrom(addr, d.port), len(allowed)-i)
		if dialErr == nil {
			return conn, nil
		}
		err = dialErr
		if ctx.Err() != nil {
			break
		}
	}
	return nil, err
}

// lookupName returns the name to resolve for d. A public name gets a dot at its
// end: without it the resolver would also try its search list, whose names are in the
// own network.
func (g *guard) lookupName(d *destination) string {
	if d.kind == destPublic && !g.allowedNetPort(d.port) {
		return d.host + "."
	}
	return d.host
}

// dialSelf connects to this server's own listener, without a name or an address of the URL. If
// the listener has all addresses, it is reached over loopback. The name localhost is not used:
// without a hosts file, as in an empty container, it would be resolved over the network.
func (g *guard) dialSelf(ctx context.Context) (conn net.Conn, err error) {
	at := []netip.Addr{g.self.Addr()}
	if at[0].IsUnspecified() {
		at = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	}
	for _, addr := range at {
		if conn, err = g.connect(ctx, &net.Dialer{}, netip.AddrPortFrom(addr, g.self.Port()).String()); err == nil {
			break
		}
	}
	return conn, err
}

// connectShare tries one of the n addresses that are left, with its share of
// the time that is left, so that one dead address does not hide the next.
func connectShare(ctx context.Context, connect dialFunc, dialer *net.Dialer, to netip.AddrPort, n int) (net.Conn, error) {
	if deadline, ok := ctx.Deadline(); ok && n > 1 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(n))
		defer cancel()
	}
	return connect(ctx, dialer, to)
}
