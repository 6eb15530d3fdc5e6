package callback

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"
)

const (
	// maxAddresses is how many addresses are remembered besides those with POSTs in
	// flight. An idle one matters for one interval of the rate.
	maxAddresses = 1 << 14

	// addressBurst is how many POSTs an address takes at once after a pause. A
	// destination alone at its address never meets the limit: its own rate is the
	// same, and what varies is the time from taking a POST to dialling.
	addressBurst = 16
)

// address is a public address that callbacks go to. What bounds a destination
// bounds an address, too: names are cheap, and any number of them may lead to one
// victim. The address of a name is known when it is dialled, so a POST that finds
// its address at a limit ends there, as resultLimited. Addresses of the operator's
// own networks (CIDR:PORT) have no such bound.
type address struct {
	inFlight int
	next     time.Time // when the next POST is due at the rate: GCRA's theoretical arrival time
}

// errLimited is the error of a POST whose address is at its limits.
var errLimited = errors.New("at its limits")

// limits reports whether addr has limits for POSTs of d.
func (s *Sender) limits(d *destination, addr netip.Addr) bool {
	return d.kind == destPublic && !s.guard.inAllowedNet(addr, d.port)
}

// acquire counts a POST of d to addr, or returns errLimited. The rate is kept
// by the generic cell rate algorithm (ITU-T I.371).
func (s *Sender) acquire(d *destination, addr netip.Addr) error {
	if !s.limits(d, addr) {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now, interval := time.Now(), s.cfg.interval()
	a := s.addresses[addr]
	if a == nil {
		if len(s.addresses) >= maxAddresses {
			s.evictAddresses(16) // more than one is added at a time
		}
		a = new(address)
		s.addresses[addr] = a
	}
	if a.inFlight >= s.cfg.Concurrency || a.next.Sub(now) > addressBurst*interval {
		return fmt.Errorf("%v is %w", addr, errLimited)
	}
	a.inFlight++
	if a.next.Before(now) {
		a.next = now
	}
	a.next = a.next.Add(interval)
	return nil
}

// release ends a POST that acquire has counted.
func (s *Sender) release(d *destination, addr netip.Addr) {
	if !s.limits(d, addr) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addresses[addr].inFlight--
}

// evictAddresses looks at n addresses and drops those that need not be remembered.
// s.mu is held.
func (s *Sender) evictAddresses(n int) {
	now := time.Now()
	for addr, a := range s.addresses {
		if a.inFlight == 0 && !a.next.After(now) {
			delete(s.addresses, addr)
		}
		if n--; n == 0 {
			return
		}
	}
}

// addressConn is a connection to a destination whose address is addr.
type addressConn struct {
	net.Conn
	addr     netip.Addr
	sender   *Sender
	dest     *destination
	acquired atomic.Bool // a POST on it is counted at the address
}

// addressConnOf returns the addressConn that guard.dial made conn of; nil for a
// connection to the own sink.
func addressConnOf(conn net.Conn) *addressConn {
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn()
	}
	ac, _ := conn.(*addressConn)
	return ac
}

// acquire counts a further POST on the connection. The dial has counted the first.
func (ac *addressConn) acquire() error {
	if ac.acquired.Load() {
		return nil
	}
	err := ac.sender.acquire(ac.dest, ac.addr)
	ac.acquired.Store(err == nil)
	return err
}

func (ac *addressConn) release() {
	if ac.acquired.Swap(false) {
		ac.sender.release(ac.dest, ac.addr)
	}
}

// Close releases, too: a connection may not live to its first POST.
func (ac *addressConn) Close() error {
	ac.release()
	return ac.Conn.Close()
}

// limitedDial wraps guard.connect: the limits of the address come first.
func (s *Sender) limitedDial(d *destination) dialFunc {
	return func(ctx context.Context, dialer *net.Dialer, to netip.AddrPort) (net.Conn, error) {
		addr := to.Addr()
		if err := s.acquire(d, addr); err != nil {
			return nil, err
		}
		conn, err := s.guard.connect(ctx, dialer, to.String())
		if err != nil {
			s.release(d, addr)
			return nil, err
		}
		ac := &addressConn{Conn: conn, addr: addr, sender: s, dest: d}
		ac.acquired.Store(true)
		return ac, nil
	}
}
