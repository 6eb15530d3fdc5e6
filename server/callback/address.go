package callback

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
)

const (
	// maxAddresses is how many addresses are remembered. An address matters for one interval
	// of the rate. If that is long, all may matter, and some are forgotten: a caller that
	// wants one forgotten must have POSTs sent to as many others.
	maxAddresses = 1 << 14

	// addressBurst is how many POSTs an address gets at once after a pause. A
	// destination that is alone at its address never meets the limit: its own rate is
	// the same, and only the time from taking a POST to dialling varies.
	addressBurst = 16
)

// errLimited is the error of a POST to an address that is at its limit.
var errLimited = errors.New("at its limit")

// admit counts a POST of d to addr, or returns errLimited. A public address has the same rate
// as a destination: names are cheap, and any number of them may lead to one victim. The address
// of a name is known only when it is dialled, so a POST whose address is at the limit ends there,
// as FailedLimited. Addresses of the operator's own networks (CIDR:PORT) have no limit.
//
// Sender.addresses has the time when the next POST to each address is due: the theoretical
// arrival time of the generic cell rate algorithm (ITU-T I.371). s.mu is held.
func (s *Sender) admit(d *destination, addr netip.Addr) error {
	if d.kind != destPublic || s.guard.inAllowedNet(addr, d.port) {
		return nil
	}
	now, interval := time.Now(), s.cfg.interval()
	due, known := s.addresses[addr]
	switch {
	case due.Sub(now) > addressBurst*interval:
		return fmt.Errorf("%v is %w", addr, errLimited)
	case due.Before(now):
		due = now
	}
	if !known && len(s.addresses) >= maxAddresses {
		s.evictAddresses(16) // more than one is added at a time
	}
	s.addresses[addr] = due.Add(interval)
	return nil
}

// evictAddresses checks n addresses. It drops those that need not be remembered, and any while
// there are too many. s.mu is held.
func (s *Sender) evictAddresses(n int) {
	now := time.Now()
	for addr, due := range s.addresses {
		if !due.After(now) || len(s.addresses) >= maxAddresses {
			delete(s.addresses, addr)
		}
		if n--; n == 0 {
			return
		}
	}
}
