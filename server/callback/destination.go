package callback

import (
	"container/list"
	"net/netip"
	"strings"
	"time"

	"github.com/sony/gobreaker/v2"
)

// entry is an endpoint in the table: reserved, waiting, or both.
type entry struct {
	ep     Endpoint
	dest   *destination
	next   *entry // in dest.queue
	refs   int    // reservations
	queued bool   // in dest.queue
}

type destKey struct {
	origin string
	self   bool
}

// destState says which list a destination is in.
type destState uint8

const (
	destNone  destState = iota
	destReady           // Sender.ready
	destLater           // none: a timer calls due
	destWarm            // Sender.warm
	destCold            // Sender.cold
)

// destination is a scheme, host and port that endpoints name.
type destination struct {
	// Constant.
	key        destKey
	host       string
	hostHeader string
	addr       netip.Addr // of a literal host
	port       uint16
	kind       destKind
	tls        bool
	breaker    *gobreaker.TwoStepCircuitBreaker[struct{}]

	client *client // nil until used, and again at rest without connections

	queue, queueTail *entry
	entries          int // in the table
	inFlight         int
	next             time.Time // rate: when the next POST is due at the earliest
	idleSince        time.Time
	used             bool // a POST was sent
	open             bool // breaker not closed; kept by its OnStateChange
	unproven         bool // not known to answer quickly

	state     destState
	readyIn   int           // index in ready while destReady
	place     *list.Element // in the list of its state; destLater has none
	warmConns int           // pooled connections, counted when it became warm
}

// newDestination adds the destination of ep.
func (s *Sender) newDestination(ep Endpoint) *destination {
	d := &destination{
		// Cloned: the strings of ep are parts of the whole URL, which the
		// destination outlives.
		key:      destKey{strings.Clone(ep.origin), ep.kind == destSelf},
		host:     strings.Clone(ep.host),
		addr:     ep.addr,
		port:     ep.port,
		kind:     ep.kind,
		tls:      ep.tls,
		unproven: ep.kind == destPublic,
	}
	scheme, port := "http://", ":80"
	if d.tls {
		scheme, port = "https://", ":443"
	}
	d.hostHeader = strings.TrimSuffix(strings.TrimPrefix(d.key.origin, scheme), port)
	d.breaker = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		Timeout: s.cfg.breakerOpen,
		ReadyToTrip: func(counts gobreaker.Counts) bool {
			return int64(counts.ConsecutiveFailures) >= int64(s.cfg.breakerFailures)
		},
		OnStateChange: func(_ string, _, to gobreaker.State) {
			if open := to != gobreaker.StateClosed; open != d.open {
				d.open = open
				s.countOpen(open)
			}
		},
		IsExcluded: func(err error) bool { return err == errNotTried },
	})
	s.dests[d.key] = d
	return d
}

func (s *Sender) countOpen(open bool) {
	if open {
		s.stats.BreakersOpen++
	} else {
		s.stats.BreakersOpen--
	}
}

// schedule puts d where its next POST is found: in turn, or when its rate allows.
// Nothing happens if it is there, has no POST, or is at its limit of concurrency; a
// POST that ends schedules again.
func (s *Sender) schedule(d *destination) {
	if d.state != destNone || d.queue == nil || d.inFlight >= s.cfg.Concurrency {
		return
	}
	if wait := time.Until(d.next); d.kind != destListed && wait > 0 {
		d.state = destLater
		time.AfterFunc(wait, func() { s.due(d) })
		return
	}
	s.pushReady(d)
}

// due schedules d, which is destLater, when its rate allows.
func (s *Sender) due(d *destination) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d.state = destNone
	s.schedule(d)
	s.park(d)
}

func (s *Sender) pushReady(d *destination) {
	d.state, d.readyIn = destReady, 0
	if d.unproven {
		d.readyIn = 1
	}
	d.place = s.ready[d.readyIn].PushBack(d)
	s.work.Signal()
}

// popReady takes the next destination in turn. Proven and unproven ones
// alternate, so that a crowd of newcomers costs the others half at most.
func (s *Sender) popReady() *destination {
	for range 2 {
		ready := &s.ready[s.turn]
		skip := s.turn == 1 && s.unprovenBusy >= unprovenShare(s.cfg.workers)
		s.turn = 1 - s.turn
		if d := first(ready); d != nil && !skip {
			ready.Remove(d.place)
			d.state = destNone
			return d
		}
	}
	return nil
}

// first returns the destination at the front of a list; nil if it is empty.
func first(l *list.List) *destination {
	if l.Len() == 0 {
		return nil
	}
	return l.Front().Value.(*destination)
}

// park puts a destination without work aside. One that never sent anything is
// forgotten at once: repeated ids reserve and release any number of them.
func (s *Sender) park(d *destination) {
	if d.state != destNone || d.entries > 0 || d.inFlight > 0 {
		return
	}
	if !d.used {
		s.drop(d)
		return
	}
	d.idleSince = time.Now()
	d.warmConns = 0
	if d.client != nil {
		d.warmConns = d.client.idleConns()
	}
	if d.warmConns > 0 {
		d.state = destWarm
		d.place = s.warm.PushBack(d)
		s.warmConn += d.warmConns
		return
	}
	s.toCold(d)
}

// toCold puts d, which has no connections, to those remembered only for their breaker
// and rate.
func (s *Sender) toCold(d *destination) {
	d.client = nil
	d.state = destCold
	d.place = s.cold.PushBack(d)
	if s.cold.Len() > maxParked {
		s.drop(first(&s.cold))
	}
}

// activate takes d out of rest.
func (s *Sender) activate(d *destination) {
	switch d.state {
	case destWarm:
		s.warm.Remove(d.place)
		s.warmConn -= d.warmConns
	case destCold:
		s.cold.Remove(d.place)
	default:
		return
	}
	d.state = destNone
}

func (s *Sender) drop(d *destination) {
	s.activate(d)
	if d.open {
		s.countOpen(false)
	}
	delete(s.dests, d.key)
}

// trim gives up connections and destinations at rest: those beyond the limits
// and those at rest since before. The caller closes the idle connections of
// what it returns, without the lock.
func (s *Sender) trim(warmBefore, coldBefore time.Time) []*client {
	var victims []*client
	for d := first(&s.warm); d != nil && (s.warmConn > maxIdleConns || d.idleSince.Before(warmBefore)); d = first(&s.warm) {
		victims = append(victims, d.client)
		s.activate(d)
		s.toCold(d)
	}
	for d := first(&s.cold); d != nil && d.idleSince.Before(coldBefore); d = first(&s.cold) {
		s.drop(d)
	}
	return victims
}

func closeIdle(clients []*client) {
	for _, client := range clients {
		client.closeIdle()
	}
}

// failWaiting fails all that waits for d: its breaker is open. Waiting for it
// to close would fill d's share of the table and turn callers away.
func (s *Sender) failWaiting(d *destination) {
	for d.queue != nil {
		s.stats.FailedBreaker++
		s.dequeue(d)
	}
	s.park(d)
}

// prove notes whether d answers quickly, and moves what is counted by that.
func (s *Sender) prove(d *destination, quick bool) {
	if d.unproven == !quick {
		return
	}
	d.unproven = !quick
	if quick {
		s.unprovenSlots -= d.entries
	} else {
		s.unprovenSlots += d.entries
	}
	if d.state == destReady {
		s.ready[d.readyIn].Remove(d.place)
		s.pushReady(d)
	}
}
