package callback

import (
	"container/list"
	"strings"
	"time"

	"github.com/sony/gobreaker/v2"
)

// entry is an endpoint in the table: reserved, waiting, or both.
type entry struct {
	ep     Endpoint
	dest   *destination
	refs   int  // reservations
	queued bool // in dest.queue
}

type destKey struct {
	origin string
	self   bool
}

// destState is which list a destination is in.
type destState uint8

const (
	destNone    destState = iota
	destReady             // Sender.ready
	destLater             // none: a timer calls due
	destResting           // Sender.resting
)

// destination is a scheme, host and port that endpoints name.
type destination struct {
	// Constant.
	Endpoint   // without url and target
	hostHeader string
	breaker    *gobreaker.TwoStepCircuitBreaker[struct{}]

	client *client // nil until used, and when it rests without idle connections

	queue    []*entry
	entries  int // in the table
	inFlight int
	next     time.Time // by its rate, the earliest time of the next POST
	used     bool      // a POST was sent
	open     bool      // breaker not closed; kept by its OnStateChange
	unproven bool      // not known to answer quickly

	state      destState
	readyIn    int           // index in Sender.ready, while destReady
	place      *list.Element // in the list of its state; destLater has none
	restsSince time.Time     // while destResting
}

func keyOf(ep Endpoint) destKey { return destKey{ep.origin, ep.kind == destSelf} }

// newDestination adds the destination of ep.
func (s *Sender) newDestination(ep Endpoint) *destination {
	d := &destination{Endpoint: ep, unproven: !s.guard.vouched(&ep)}
	// The origin is cloned: it is a part of the whole URL, which would stay in memory.
	d.url, d.target, d.origin = "", "", strings.Clone(ep.origin)
	scheme, port := "http://", ":80"
	if d.tls {
		scheme, port = "https://", ":443"
	}
	d.hostHeader = strings.TrimSuffix(strings.TrimPrefix(d.origin, scheme), port)
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
	s.dests[keyOf(d.Endpoint)] = d
	return d
}

func (s *Sender) countOpen(open bool) {
	if open {
		s.stats.BreakersOpen++
	} else {
		s.stats.BreakersOpen--
	}
}

// schedule makes d ready for a worker, now or when its rate allows the next POST. It does
// nothing if that is done already, or if d has no waiting POST or is at its limit of
// concurrency: the end of a POST schedules d again.
func (s *Sender) schedule(d *destination) {
	if d.state != destNone || len(d.queue) == 0 || d.inFlight >= s.cfg.Concurrency {
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
// alternate, so that many newcomers take half of the turns at most.
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

// park moves a destination without work to Sender.resting. It forgets at once a destination
// to which nothing was sent: repeated ids reserve and release any number of them.
func (s *Sender) park(d *destination) {
	if d.state != destNone || d.entries > 0 || d.inFlight > 0 {
		return
	}
	if !d.used {
		s.drop(d)
		return
	}
	if d.client != nil && len(d.client.idle) == 0 {
		d.client = nil
	}
	d.state, d.restsSince = destResting, time.Now()
	d.place = s.resting.PushBack(d)
	if s.resting.Len() > maxResting {
		s.drop(first(&s.resting))
	}
}

// activate takes d out of rest.
func (s *Sender) activate(d *destination) {
	if d.state == destResting {
		s.resting.Remove(d.place)
		d.state = destNone
	}
}

func (s *Sender) drop(d *destination) {
	s.activate(d)
	if d.open {
		s.countOpen(false)
	}
	delete(s.dests, keyOf(d.Endpoint))
}

// failWaiting fails all POSTs that wait for d, because its breaker is open. If they waited
// until it closes, they would fill d's share of the table, and callers would be refused.
func (s *Sender) failWaiting(d *destination) {
	for len(d.queue) > 0 {
		s.stats.Ended[FailedBreaker]++
		s.dequeue(d)
	}
	s.park(d)
}

// prove notes whether d answers quickly, and corrects the counts and the list that depend
// on it.
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
