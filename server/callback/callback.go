// Package callback sends the current count to the endpoints that callers name.
//
// It guarantees that a POST goes only to an address that the policy allows, checked when it is
// dialled; that no destination and no public address gets more than its limits; that a slow
// destination does not slow another one; and that no caller waits for a POST. It does not
// guarantee that a POST arrives: it may be merged with a waiting one, dropped, or fail, and each
// of these is counted.
//
// server reserves a place for each endpoint before it counts an id, and sends or releases it
// after that; main runs the Sender and drains it at the stop.
package callback

import (
	"bufio"
	"cmp"
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"github.com/sony/gobreaker/v2"

	"verve/internal/logline"
	"verve/internal/setting"
)

// Header marks the requests of callbacks. A server that receives it
// starts no callback, which ends a loop over several servers at depth one.
const Header = "Verve-Callback"

// DescriptorShare is the part of the descriptors of the process, 1/n, that callbacks take
// at most: endpoints that do not answer must not keep callers from connecting, nor records
// from their file.
const DescriptorShare = 8

const (
	defaultConcurrency = 8
	maxConcurrency     = 10_000 // four workers each
	defaultRate        = 50
	defaultTimeout     = 5 * time.Second
	maxWaiting         = 1 << 14 // 32 MiB of endpoints at their longest
	workers            = 256     // at 200 ms an exchange, 1280 POSTs a second
	breakerFailures    = 5
	breakerOpen        = 10 * time.Second

	// destinationShare is the part of the table, 1/n, that the endpoints of one
	// destination may take: a caller that names a slow host with a new path each
	// time must not cause callers of other destinations to be refused.
	destinationShare = 8

	// maxAnswer bounds the body of an answer, which is not used. maxAnswerHeader
	// bounds its header, and is the size of the read buffer.
	maxAnswer       = 64 << 10
	maxAnswerHeader = 8 << 10

	// Connections are kept for the next POST to the same destination, but not for
	// long, so that names are resolved again, and not many, because the server needs
	// the descriptors for its callers.
	maxConnAge      = time.Minute
	idleConnTimeout = 10 * time.Second
	maxIdleConns    = 512

	// maxResting is how many destinations without work are remembered, for their
	// breakers and their rates; about 1 KiB each. To get around the rate of one, a caller
	// must have it forgotten, and for that must first have POSTs sent to as many others:
	// at 10,000 POSTs a second that is 2 a second to the victim.
	maxResting = 4096

	// rememberFor is how long a destination without work is remembered, if there is
	// room. It is longer if the breaker or the rate needs it.
	rememberFor = time.Minute

	// sweepInterval is how often idle connections and destinations are cleared out.
	sweepInterval = time.Second
)

// Config configures Sender. Zero values stand for the defaults.
type Config struct {
	// Allow lifts the default policy for what its entries name: HOST:PORT (URLs
	// with just that host and port) or CIDR:PORT (addresses, whatever the name
	// that leads to them). IPv6 addresses are in brackets.
	Allow []string
	// Concurrency bounds the POSTs in flight per destination.
	Concurrency int
	// Rate bounds the POSTs per second to each destination, and to each public address.
	// Destinations that a HOST:PORT entry names, and literal addresses in a CIDR:PORT entry,
	// have no rate.
	Rate float64
	// Timeout bounds the whole exchange: resolving, connecting, TLS, request,
	// answer and the one retry.
	Timeout time.Duration
	// Secret signs the POSTs by the Standard Webhooks scheme: 24 to 64 bytes in
	// base64, with or without whsec_ before them. Nil: unsigned.
	Secret []byte
	// SelfAddr is the address of this server's public listener. A callback may name its
	// own /test there, and reaches nothing else on this machine at that port. Optional.
	SelfAddr netip.AddrPort
	// SelfPath is the path of the sink there, the only one that a callback may name.
	SelfPath string
	// SelfTLS configures a connection to that address; nil: it speaks plain HTTP.
	SelfTLS func() *tls.Config
	// AdminAddr is the address of the admin listener; never reached by a callback.
	AdminAddr netip.AddrPort
	// Group and Instance go into the body.
	Group, Instance string
	// Descriptors is how many files the process may open, 0 if that is not known. Callbacks
	// have the share of DescriptorShare: a third for idle connections, and two to resolve
	// a name and then connect, for each POST in flight. Concurrency is lowered to that.
	Descriptors uint64
	// Took is called with the duration of each exchange. Optional.
	Took func(time.Duration)
	// Live returns start and count of the open epoch. It is called concurrently, like
	// Took. Required.
	Live func() (windowStart time.Time, unique uint64)
	Log  zerolog.Logger // results of POSTs, sampled

	// Resolver resolves names; nil: net.DefaultResolver.
	Resolver *net.Resolver
	// Connect makes a TCP connection to addr with the dialer, whose Control checks
	// the address once more; nil: the dialer makes it. Tests use it to stay off the network.
	Connect func(ctx context.Context, d *net.Dialer, addr string) (net.Conn, error)

	maxWaiting               int           // endpoints in the table
	maxWaitingPerDestination int           // how many of these may be of one destination
	workers                  int           // POSTs in flight in all
	maxIdleConns             int           // connections without a POST
	breakerFailures          int           // in a row open the breaker of a destination,
	breakerOpen              time.Duration // for this long; then one POST tries
	tls                      *tls.Config   // of https, without the server name; nil: the system's roots, TLS 1.2
}

// Result is how a call of Send ended.
type Result uint8

// The results. Those from FailedStatus on are failures.
const (
	Delivered      Result = iota // answered 2xx
	Merged                       // joined a POST that was waiting for the same endpoint
	Dropped                      // not sent, or cut off, at the stop
	FailedStatus                 // answered, but neither 2xx nor 3xx
	FailedRedirect               // answered 3xx; not followed
	FailedTimeout                // no answer within Timeout
	FailedResolve                // the name has no address
	FailedConnect                // TCP or TLS
	FailedRefused                // the name leads where callbacks may not go
	FailedAnswer                 // connection lost, or an answer malformed or too large
	FailedBreaker                // not tried: the breaker of the destination is open
	FailedLimited                // the address is at its limit
	Results                      // how many there are
)

// String returns the name of the result in logs and metrics.
func (r Result) String() string {
	return [Results]string{"delivered", "merged", "dropped", "status", "redirect", "timeout", "resolve", "connect", "refused", "answer", "breaker", "limited"}[r]
}

// Stats is a snapshot.
type Stats struct {
	Ended   [Results]uint64 // calls of Send that have a result, by it; the others are Waiting or InFlight
	Retried uint64          // second tries after a dead pooled connection

	Waiting      int // endpoints with a POST waiting
	Reserved     int // endpoints in the table, waiting or just reserved
	InFlight     int // POSTs being sent
	Destinations int // hosts and ports with state
	BreakersOpen int // destinations whose breaker is open, or waits for the POST that tries
}

// Sender sends the callbacks.
//
// The request handler calls Parse, Reserve, and then Send or Release, exactly one of these
// for each successful Reserve: without a reservation they panic. All methods are safe for
// concurrent use; Run is called once. A reservation keeps the place of a waiting POST
// before anything is counted; Send cannot fail. A fixed number of workers (Run) takes
// POSTs from the destinations that have some, in turn, so that no destination waits for a
// slow one: each holds at most Concurrency workers, and those that are not known to answer
// quickly (newcomers that no HOST:PORT entry names, and those whose last POST failed or took
// long) together hold at most three quarters of the workers and of the table. Names are cheap,
// and so are the addresses of an allowed network. But any number of destinations that do not
// answer leaves the rest to the others. A destination that stops answering is no longer known
// to answer quickly when its first POST times out.
type Sender struct {
	cfg   Config
	guard *guard
	key   []byte // signs; nil: unsigned

	// buffers of connections in use: there are as many as workers, not as destinations.
	readers, writers sync.Pool

	// exchanges ends when exchanges in flight are cut off.
	exchanges context.Context
	cut       context.CancelFunc

	okLog, failLog logline.Sampler

	// mu guards what follows and all fields of destinations and entries that
	// are not constant; it is never held over I/O. Breakers are called with mu
	// held, so OnStateChange runs with it held. Request handlers take mu twice
	// for a request with an endpoint, for at most two map look-ups each time.
	mu        sync.Mutex
	work      sync.Cond // ready destinations, or closed
	table     map[string]*entry
	dests     map[destKey]*destination
	ready     [2]list.List             // with a POST to send, in turn; [unproven]
	turn      int                      // index in ready of the list that is served next
	resting   list.List                // destinations without work; those that rest longest first
	idle      list.List                // connections (*pooled) without a POST; those that were used last are at the end
	addresses map[netip.Addr]time.Time // see admit

	stats         Stats
	unprovenSlots int // entries of unproven destinations
	unprovenBusy  int // workers held by unproven destinations
	draining      bool
	closed        bool
	emptied       chan struct{} // closed when draining and nothing is left; nil: no Drain waits
}

// New checks cfg and makes a Sender, which the caller must Run. An error names the bad
// setting.
func New(cfg Config) (*Sender, error) {
	if cfg.Live == nil {
		return nil, errors.New("callbacks: no source of the live count")
	}
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	g, err := newGuard(&cfg)
	if err != nil {
		return nil, err
	}
	s := &Sender{
		cfg:       cfg,
		guard:     g,
		table:     make(map[string]*entry),
		dests:     make(map[destKey]*destination),
		addresses: make(map[netip.Addr]time.Time),
		okLog:     logline.Sampler{Lines: 1, Every: time.Second},
		failLog:   logline.Sampler{Lines: 4, Every: time.Second},
	}
	if cfg.Secret != nil {
		if s.key, err = parseSecret(cfg.Secret); err != nil {
			return nil, err
		}
		s.cfg.Secret = nil
	}
	s.work.L = &s.mu
	s.readers.New = func() any { return bufio.NewReaderSize(nil, maxAnswerHeader) }
	s.writers.New = func() any { return bufio.NewWriter(nil) }
	s.exchanges, s.cut = context.WithCancel(context.Background())
	return s, nil
}

// complete sets defaults and checks the rest.
func (cfg *Config) complete() error {
	cfg.Concurrency = cmp.Or(cfg.Concurrency, defaultConcurrency)
	cfg.Rate = cmp.Or(cfg.Rate, defaultRate)
	cfg.Timeout = cmp.Or(cfg.Timeout, defaultTimeout)
	cfg.maxWaiting = cmp.Or(cfg.maxWaiting, maxWaiting)
	cfg.maxWaitingPerDestination = cmp.Or(cfg.maxWaitingPerDestination, max(cfg.maxWaiting/destinationShare, 1))
	cfg.workers = cmp.Or(cfg.workers, max(workers, 4*cfg.Concurrency))
	cfg.breakerFailures = cmp.Or(cfg.breakerFailures, breakerFailures)
	cfg.breakerOpen = cmp.Or(cfg.breakerOpen, breakerOpen)
	if cfg.Took == nil {
		cfg.Took = func(time.Duration) {}
	}
	switch {
	case cfg.Concurrency < 1 || cfg.Concurrency > maxConcurrency:
		return setting.Errorf("callback-concurrency", "want 1 to %d", maxConcurrency)
	case !(cfg.Rate >= 0.001 && cfg.Rate <= 1e6): // not a number fails, too
		return setting.Errorf("callback-rate", "want 0.001 to 1000000")
	}
	cfg.maxIdleConns = maxIdleConns
	if cfg.Descriptors > 0 {
		third := int(max(4, min(cfg.Descriptors, 1<<30)/DescriptorShare/3))
		cfg.workers, cfg.maxIdleConns = min(cfg.workers, third), min(maxIdleConns, third)
		if most := max(1, cfg.workers/4); cfg.Concurrency > most {
			cfg.Log.Warn().Int("callback_concurrency", cfg.Concurrency).Int("lowered_to", most).
				Str("reason", fmt.Sprintf("the process may open %d files (ulimit -n), and callbacks have one in %d of them", cfg.Descriptors, DescriptorShare)).
				Msg("--callback-concurrency is higher than the process has room for")
			cfg.Concurrency = most
		}
	}
	return setting.CheckTimeout("callback-timeout", cfg.Timeout)
}

// Check returns an error, which names the setting, for a Config that can never work. It is for
// the time before there is a listener or a count: Live may be nil. Its errors do not quote the
// secret.
func (cfg *Config) Check() error {
	c := *cfg // defaults stay out of cfg
	c.Live = func() (start time.Time, unique uint64) { return start, 0 }
	_, err := New(c)
	return err
}

// Descriptors is how many files callbacks have open at most: idle connections, and two for each
// POST in flight, while it resolves a name.
func (s *Sender) Descriptors() int { return s.cfg.maxIdleConns + 2*s.cfg.workers }

// interval is the time between two POSTs to a destination with a rate.
func (cfg *Config) interval() time.Duration {
	return time.Duration(float64(time.Second) / cfg.Rate)
}

// pace notes that a POST to d is sent now, for its rate. A late wake-up may be made up for
// by one POST, so that the rate is met; idle time is not saved.
func (s *Sender) pace(d *destination) {
	if d.kind == destListed {
		return
	}
	interval := s.cfg.interval()
	if earliest := time.Now().Add(-interval); d.next.Before(earliest) {
		d.next = earliest
	}
	d.next = d.next.Add(interval)
}

// Reserve keeps a place for a POST to ep. The caller then calls Send, to fill it, or
// Release, to give it back. False: no place is kept, because the table or this
// destination's share of it is full, or the server stops.
func (s *Sender) Reserve(ep Endpoint) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining || s.closed {
		return false
	}
	if e := s.table[ep.url]; e != nil {
		e.refs++
		return true
	}
	if len(s.table) >= s.cfg.maxWaiting {
		return false
	}
	d := s.dests[keyOf(ep)]
	unproven := !s.guard.vouched(&ep)
	if d != nil {
		unproven = d.unproven
	}
	if d != nil && d.entries >= s.cfg.maxWaitingPerDestination ||
		unproven && s.unprovenSlots >= unprovenShare(s.cfg.maxWaiting) {
		return false
	}
	if d == nil {
		d = s.newDestination(ep)
	}
	s.activate(d)
	s.countEntry(d, 1)
	s.table[ep.url] = &entry{ep: ep, dest: d, refs: 1}
	return true
}

// countEntry adds n to the places that d has in the table.
func (s *Sender) countEntry(d *destination, n int) {
	d.entries += n
	if d.unproven {
		s.unprovenSlots += n
	}
}

// unprovenShare is how many of n workers or places may be held by destinations that
// are not known to answer quickly.
func unprovenShare(n int) int { return max(n-n/4, 1) }

// Send turns a reservation into a waiting POST, or merges it with one that waits already:
// the count is the newest when the body is built. It does not block, and panics if ep has
// no reservation.
func (s *Sender) Send(ep Endpoint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.table[ep.url]
	d := e.dest
	e.refs--
	switch {
	case e.queued:
		s.stats.Ended[Merged]++
		return
	case s.closed:
		s.stats.Ended[Dropped]++
	case d.open && d.breaker.State() == gobreaker.StateOpen:
		s.stats.Ended[FailedBreaker]++
	default:
		e.queued = true
		s.stats.Waiting++
		d.queue = append(d.queue, e)
		s.schedule(d)
		return
	}
	s.unreserve(e)
}

// Release gives a reservation back. It panics if ep has none.
func (s *Sender) Release(ep Endpoint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.table[ep.url]
	e.refs--
	s.unreserve(e)
}

// unreserve removes e from the table if it has no reservation and no waiting POST.
func (s *Sender) unreserve(e *entry) {
	if e.refs > 0 || e.queued {
		return
	}
	d := e.dest
	delete(s.table, e.ep.url)
	s.countEntry(d, -1)
	s.park(d)
	s.noticeEmpty()
}

// dequeue takes the first waiting entry of d, which must have one.
func (s *Sender) dequeue(d *destination) Endpoint {
	e := d.queue[0]
	d.queue[0] = nil
	d.queue = d.queue[1:]
	e.queued = false
	s.stats.Waiting--
	ep := e.ep
	// The place in the table is free before the exchange begins: a Send for the same
	// endpoint meanwhile is for a newer count, and gets a POST of its own.
	s.unreserve(e)
	return ep
}

// job is a POST that a worker has taken.
type job struct {
	ep       Endpoint
	dest     *destination
	done     func(error) // reports the outcome to the breaker
	unproven bool        // counted in unprovenBusy
}

// take waits for a POST to send. False: closed.
func (s *Sender) take() (job, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.closed {
		d := s.popReady()
		if d == nil {
			s.work.Wait()
			continue
		}
		if len(d.queue) == 0 {
			s.park(d)
			continue
		}
		done, err := d.breaker.Allow()
		if err == gobreaker.ErrOpenState {
			s.failWaiting(d)
			continue
		}
		if err != nil {
			// The breaker is half open, and the POST that tries is in flight:
			// when it ends, finish schedules the others or fails them.
			continue
		}
		if d.client == nil {
			d.client = s.newClient(d)
		}
		d.used = true
		d.inFlight++
		s.stats.InFlight++
		if d.unproven {
			s.unprovenBusy++
		}
		s.pace(d)
		j := job{ep: s.dequeue(d), dest: d, done: done, unproven: d.unproven}
		s.schedule(d)
		return j, true
	}
	return job{}, false
}

// ended notes that j is no longer in flight.
func (s *Sender) ended(j job) {
	j.dest.inFlight--
	s.stats.InFlight--
	if j.unproven {
		s.unprovenBusy--
	}
}

// finish notes the result of a POST, and schedules the next one of its destination.
func (s *Sender) finish(j job, r result) {
	d := j.dest
	s.mu.Lock()
	s.ended(j)
	s.stats.Ended[r.kind]++
	j.done(r.breakerErr())
	if r.breakerErr() != errNotTried {
		// A fifth of the time allowed is quick: it takes five such POSTs to
		// hold a worker as long as one that times out.
		s.prove(d, r.breakerErr() == nil && r.took <= s.cfg.Timeout/5)
	}
	if d.open && d.breaker.State() == gobreaker.StateOpen {
		s.failWaiting(d)
	}
	s.schedule(d)
	s.park(d)
	s.noticeEmpty()
	s.mu.Unlock()
	s.cfg.Took(r.took)
	s.logResult(j.ep, r)
}

// Run sends POSTs until ctx ends. Then it cuts off exchanges in flight, drops POSTs
// that wait, and returns nil when the last worker has ended: so call Drain first. Run
// is called once.
func (s *Sender) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for range s.cfg.workers {
		wg.Go(func() {
			for j, ok := s.take(); ok; j, ok = s.take() {
				s.finish(j, s.post(j))
			}
		})
	}
	wg.Go(func() { s.sweep(ctx) })
	<-ctx.Done()
	s.close()
	wg.Wait()

	s.mu.Lock()
	idle := s.takeIdle(time.Time{}, 0)
	s.mu.Unlock()
	closeAll(idle)
	s.logHidden()
	return nil
}

// sweep clears out idle connections, destinations and addresses, and logs how many results
// were hidden, until ctx ends.
func (s *Sender) sweep(ctx context.Context) {
	timer := time.NewTimer(sweepInterval)
	defer timer.Stop()
	remember := max(rememberFor, 2*s.cfg.breakerOpen, 2*s.cfg.interval())
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		now := time.Now()
		s.mu.Lock()
		s.evictAddresses(len(s.addresses))
		for d := first(&s.resting); d != nil && d.restsSince.Before(now.Add(-remember)); d = first(&s.resting) {
			s.drop(d)
		}
		old := s.takeIdle(now.Add(-idleConnTimeout), s.cfg.maxIdleConns)
		s.mu.Unlock()
		closeAll(old)
		s.logHidden()
		timer.Reset(sweepInterval)
	}
}

// Drain refuses new reservations and waits until all POSTs are sent, also those of
// reservations already made. If ctx ends first, it drops POSTs that wait and cuts off
// those in flight. It returns how many were lost in one of these ways. Run must be
// running until Drain returns.
func (s *Sender) Drain(ctx context.Context) (dropped int) {
	s.mu.Lock()
	before := s.stats.Ended[Dropped]
	s.draining = true
	empty := s.awaitEmpty()
	s.mu.Unlock()
	select {
	case <-empty:
	case <-ctx.Done():
	}
	s.close()
	// Exchanges end at once when they are cut off.
	s.mu.Lock()
	empty = s.awaitEmpty()
	s.mu.Unlock()
	<-empty
	s.mu.Lock()
	defer s.mu.Unlock()
	return int(s.stats.Ended[Dropped] - before)
}

// awaitEmpty returns a channel that is closed when no POST waits or is in flight. Before
// close was called, no place may be reserved either. s.mu is held.
func (s *Sender) awaitEmpty() <-chan struct{} {
	if s.emptied == nil {
		s.emptied = make(chan struct{})
	}
	empty := s.emptied
	s.noticeEmpty()
	return empty
}

func (s *Sender) noticeEmpty() {
	if s.emptied != nil && s.stats.InFlight == 0 && s.stats.Waiting == 0 && (s.closed || len(s.table) == 0) {
		close(s.emptied)
		s.emptied = nil
	}
}

// close drops POSTs that wait and cuts off those in flight. Then the workers return.
func (s *Sender) close() {
	s.mu.Lock()
	s.closed = true
	for _, d := range s.dests {
		for len(d.queue) > 0 {
			s.stats.Ended[Dropped]++
			s.dequeue(d)
		}
	}
	s.work.Broadcast()
	s.noticeEmpty()
	s.mu.Unlock()
	s.cut()
}

// Stats returns a snapshot.
func (s *Sender) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Reserved = len(s.table)
	st.Destinations = len(s.dests)
	return st
}
