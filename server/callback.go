package server

import (
	"bufio"
	"container/heap"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"github.com/sony/gobreaker/v2"
	"github.com/valyala/fasthttp"
)

// callbackHeader marks the requests of callbacks. A server that receives it
// starts no callback, which ends a loop over several servers at depth one.
const callbackHeader = "Verve-Callback"

const (
	callbackConcurrency     = 8
	callbackRate            = 50
	callbackTimeout         = 5 * time.Second
	callbackMaxWaiting      = 1 << 14 // 32 MiB of endpoints at their longest
	callbackWorkers         = 256     // at 200 ms an exchange, 1280 POSTs a second
	callbackBreakerFailures = 5
	callbackBreakerOpen     = 10 * time.Second

	// destinationShare is the part of the table, 1/n, that the endpoints of one
	// destination may take: someone who names a slow host with a new path each
	// time must not turn the callers of all others away.
	destinationShare = 8

	// maxAnswer bounds the body of an answer, of which nothing is used;
	// maxAnswerHeader its header, and is the size of the read buffer.
	maxAnswer       = 64 << 10
	maxAnswerHeader = 8 << 10

	// Connections are kept for the next POST to the same destination, but not
	// for long and not many: names are re-resolved, and descriptors are the
	// server's first of all.
	maxConnAge      = time.Minute
	idleConnTimeout = 10 * time.Second
	maxIdleConns    = 512

	// maxResting is how many destinations without work are remembered, for
	// their breakers and their rates; about 1 KiB each. Whoever wants one
	// forgotten, to get around its rate, must have as many others POSTed to
	// first: at 10,000 POSTs a second that is 2 a second to the victim.
	maxResting = 4096

	// restFor is how long one is remembered, space permitting, if its breaker
	// or its rate does not need longer.
	restFor = time.Minute

	// callbackSweep paces the closing of idle connections.
	callbackSweep = time.Second
)

// CallbackConfig configures Callbacks. Zero values stand for the defaults.
type CallbackConfig struct {
	// Allow lifts the default policy for what its entries name: HOST:PORT (URLs
	// with just that host and port) or CIDR:PORT (addresses, whatever the name
	// that leads to them). IPv6 addresses are in brackets.
	Allow []string
	// Concurrency bounds the POSTs in flight per destination.
	Concurrency int
	// Rate bounds the POSTs per second per destination that no HOST:PORT entry
	// names, nor a CIDR:PORT entry by its literal address.
	Rate float64
	// Timeout bounds the whole exchange: resolving, connecting, TLS, request,
	// answer and the one retry.
	Timeout time.Duration
	// Secret signs the POSTs by the Standard Webhooks scheme: whsec_ and
	// base64, or the bytes themselves. Nil: unsigned.
	Secret []byte
	// SelfAddrs are the addresses on which this server listens for the public:
	// its own /test may be named there, nothing else is reached on their ports.
	SelfAddrs []string
	// SelfTLS is the certificate of those addresses; nil: they speak plain HTTP.
	SelfTLS *Certificate
	// AdminAddr is the admin listen address; never reached by a callback.
	AdminAddr string
	// Group and Instance go into the body.
	Group, Instance string
	// Live returns start and count of the open epoch. Required.
	Live func() (windowStart time.Time, unique uint64)
	Log  zerolog.Logger

	// MaxWaiting bounds the table of waiting endpoints, MaxWaitingPerDestination
	// the part of it that one destination takes.
	MaxWaiting               int
	MaxWaitingPerDestination int
	// Workers is the number of POSTs in flight in all.
	Workers int
	// BreakerFailures in a row open the breaker of a destination for
	// BreakerOpen; then one POST tries.
	BreakerFailures int
	BreakerOpen     time.Duration
	// Resolver resolves names; nil: net.DefaultResolver.
	Resolver *net.Resolver
	// TLS configures https; the server name is set per destination. Nil: the
	// system's roots, TLS 1.2.
	TLS *tls.Config
}

// CallbackStats is a snapshot. Every call of Send ends in exactly one of
// Delivered, Merged, Dropped or a Failed field, or is still Waiting or InFlight.
type CallbackStats struct {
	Delivered uint64 // answered 2xx
	Merged    uint64 // joined a POST that was waiting for the same endpoint
	Dropped   uint64 // not sent, or cut off, at the stop

	FailedStatus   uint64 // answered, but neither 2xx nor 3xx
	FailedRedirect uint64 // answered 3xx; not followed
	FailedTimeout  uint64
	FailedResolve  uint64 // the name has no address
	FailedConnect  uint64 // TCP or TLS
	FailedRefused  uint64 // the name leads where callbacks may not go
	FailedAnswer   uint64 // connection lost, or an answer malformed or too large
	FailedBreaker  uint64 // not tried: the breaker of the destination is open
	FailedLimited  uint64 // the address is at its limits, and too many wait for it

	Retried uint64 // second tries after a dead pooled connection
	Busy    uint64 // Reserve returned false

	Deferred uint64 // tries that found the address at its limits

	Waiting      int // endpoints with a POST waiting
	Reserved     int // endpoints in the table, waiting or just reserved
	InFlight     int
	Destinations int
	BreakersOpen int // destinations whose breaker is open, or waits for the POST that tries
}

// Callbacks sends the callbacks.
//
// The request handler calls Parse, Reserve, and then Send or Release. A
// reservation keeps the place of a waiting POST before anything is counted;
// Send cannot fail. A fixed number of workers (Run) takes POSTs from the
// destinations that have some, in turn, so that none waits for another one's
// slowness: a destination holds at most Concurrency workers, and all those
// together that are not known to answer quickly (newcomers, and those whose
// last POST failed or took long) hold at most three quarters of the workers
// and of the table. Names are cheap; any number of tarpits leaves the rest to
// destinations that answer.
type Callbacks struct {
	cfg      CallbackConfig
	guard    *guard
	key      []byte // signs; nil: unsigned
	bodyTail []byte // the body from "group" on, which never changes
	retried  atomic.Uint64

	// buffers of connections in use; per worker, not per destination.
	readers, writers sync.Pool

	// exchanges ends when exchanges in flight are to be cut off.
	exchanges context.Context
	cut       context.CancelFunc

	okLog, failLog logSampler
	took           histogram // of whole exchanges

	// mu guards what follows and all fields of destinations and entries that
	// are not constant; it is never held over I/O. Breakers are called with it
	// held, so that their state changes arrive under it. Request handlers take
	// it twice per accept with an endpoint, for two map look-ups at most.
	mu       sync.Mutex
	work     sync.Cond // ready destinations, or closed
	table    map[string]*entry
	dests    map[destKey]*destination
	ready    [2]destList // with a POST to send, in turn; [unproven]
	turn     int         // list of ready that is served next
	later    laterHeap   // with a POST to send, but above their rate
	warm     destList    // at rest, with pooled connections; oldest first
	warmConn int         // pooled connections of warm
	cold     destList    // at rest, without; oldest first
	peers    map[netip.Addr]*peer
	dueAt    peerHeap // peers where some wait, and could go but for the rate
	paceWake chan struct{}

	stats         CallbackStats
	unprovenSlots int // entries of unproven destinations
	unprovenBusy  int // workers held by unproven destinations
	draining      bool
	closed        bool
	emptied       chan struct{} // closed when draining and nothing is left; nil: nobody waits
}

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
	destNone    destState = iota
	destReady             // Callbacks.ready
	destLater             // Callbacks.later
	destWarm              // Callbacks.warm
	destCold              // Callbacks.cold
	destWaiting           // waitsAt.waiting
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

	client *fasthttp.HostClient // nil until used, and again at rest without connections

	queue, queueTail *entry
	entries          int // in the table
	inFlight         int
	next             time.Time // rate: when the next POST is due at the earliest
	restSince        time.Time
	used             bool       // a POST was sent
	peer             netip.Addr // where it was last found; not valid: nowhere yet, or without limits there
	waitsAt          *peer      // while destWaiting
	promises         int        // places kept for its next POSTs at peer
	open             bool       // breaker not closed; kept by its OnStateChange
	unproven         bool       // not known to answer quickly

	state     destState
	readyIn   int // index in ready while destReady
	prevD     *destination
	nextD     *destination
	warmConns int // pooled connections, counted when it became warm
}

// NewCallbacks checks cfg; errors name the bad setting.
func NewCallbacks(cfg CallbackConfig) (*Callbacks, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	g, err := newGuard(&cfg)
	if err != nil {
		return nil, err
	}
	c := &Callbacks{
		cfg:      cfg,
		guard:    g,
		table:    make(map[string]*entry),
		dests:    make(map[destKey]*destination),
		peers:    make(map[netip.Addr]*peer),
		paceWake: make(chan struct{}, 1),
		took:     newHistogram("verve_callback_duration_seconds", callbackBuckets),
		okLog:    logSampler{perSecond: 1},
		failLog:  logSampler{perSecond: 4},
	}
	if cfg.Secret != nil {
		if c.key, err = parseSecret(cfg.Secret); err != nil {
			return nil, fmt.Errorf("callback-secret: %w", err)
		}
		c.cfg.Secret = nil
	}
	if c.bodyTail, err = bodyTail(cfg.Group, cfg.Instance); err != nil {
		return nil, err
	}
	c.work.L = &c.mu
	c.readers.New = func() any { return bufio.NewReaderSize(nil, maxAnswerHeader) }
	c.writers.New = func() any { return bufio.NewWriter(nil) }
	c.exchanges, c.cut = context.WithCancel(context.Background())
	return c, nil
}

// complete sets defaults and checks the rest.
func (cfg *CallbackConfig) complete() error {
	setDefault(&cfg.Concurrency, callbackConcurrency)
	setDefault(&cfg.Rate, callbackRate)
	setDefault(&cfg.Timeout, callbackTimeout)
	setDefault(&cfg.MaxWaiting, callbackMaxWaiting)
	setDefault(&cfg.MaxWaitingPerDestination, max(cfg.MaxWaiting/destinationShare, 1))
	setDefault(&cfg.Workers, max(callbackWorkers, 4*cfg.Concurrency))
	setDefault(&cfg.BreakerFailures, callbackBreakerFailures)
	setDefault(&cfg.BreakerOpen, callbackBreakerOpen)
	switch {
	case cfg.Live == nil:
		return errors.New("callbacks: no source of the live count")
	case cfg.Concurrency < 1:
		return fmt.Errorf("callback-concurrency %d: must be positive", cfg.Concurrency)
	case !(cfg.Rate >= 0.001 && cfg.Rate <= 1e6): // not a number fails, too
		return fmt.Errorf("callback-rate %v: want 0.001 to 1000000", cfg.Rate)
	case cfg.Timeout < 0:
		return fmt.Errorf("callback-timeout %v: must be positive", cfg.Timeout)
	case cfg.MaxWaiting < 1:
		return fmt.Errorf("callback table size %d: must be positive", cfg.MaxWaiting)
	case cfg.MaxWaitingPerDestination < 1:
		return fmt.Errorf("callback table share %d: must be positive", cfg.MaxWaitingPerDestination)
	case cfg.Workers < 2 || cfg.Workers <= cfg.Concurrency:
		return fmt.Errorf("callback workers %d: one destination may hold %d", cfg.Workers, cfg.Concurrency)
	case cfg.BreakerFailures < 1:
		return fmt.Errorf("callback breaker failures %d: must be positive", cfg.BreakerFailures)
	case cfg.BreakerOpen < 0:
		return fmt.Errorf("callback breaker time %v: must be positive", cfg.BreakerOpen)
	}
	return nil
}

// interval is the time between two POSTs to a destination with a rate.
func (cfg *CallbackConfig) interval() time.Duration {
	return time.Duration(float64(time.Second) / cfg.Rate)
}

func setDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// Parse checks raw, the percent-decoded value of the endpoint parameter, by
// its text. It does not keep raw.
func (c *Callbacks) Parse(raw []byte) (Endpoint, error) { return c.guard.parse(raw) }

// Reserve keeps a place for a POST to ep, to be filled by Send or given back
// by Release. False: the table is full, or this destination's share of it is,
// or the server stops; nothing is kept.
func (c *Callbacks) Reserve(ep Endpoint) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	ok := c.reserve(ep)
	if !ok {
		c.stats.Busy++
	}
	return ok
}

func (c *Callbacks) reserve(ep Endpoint) bool {
	if c.draining || c.closed {
		return false
	}
	if e := c.table[ep.url]; e != nil {
		e.refs++
		return true
	}
	if len(c.table) >= c.cfg.MaxWaiting {
		return false
	}
	key := destKey{ep.origin, ep.kind == destSelf}
	d := c.dests[key]
	unproven := ep.kind == destPublic && (d == nil || d.unproven)
	if d != nil && d.entries >= c.cfg.MaxWaitingPerDestination ||
		d != nil && d.state == destWaiting && d.waitsAt.entries >= c.cfg.MaxWaitingPerDestination ||
		unproven && c.unprovenSlots >= unprovenShare(c.cfg.MaxWaiting) {
		return false
	}
	if d == nil {
		d = c.newDestination(ep)
	}
	c.rouse(d)
	c.countEntry(d, 1)
	c.table[ep.url] = &entry{ep: ep, dest: d, refs: 1}
	return true
}

// countEntry adds n to the places that d has in the table.
func (c *Callbacks) countEntry(d *destination, n int) {
	d.entries += n
	if d.unproven {
		c.unprovenSlots += n
	}
	if d.state == destWaiting {
		d.waitsAt.entries += n
	}
}

// unprovenShare is the part of n workers or places that destinations may hold
// which are not known to answer quickly.
func unprovenShare(n int) int { return max(n-n/4, 1) }

// Send turns a reservation into a waiting POST, or merges it with one that
// waits already: the count is the newest when the body is built.
func (c *Callbacks) Send(ep Endpoint) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.table[ep.url]
	d := e.dest
	e.refs--
	switch {
	case e.queued:
		c.stats.Merged++
		return
	case c.closed:
		c.stats.Dropped++
	case d.open && d.breaker.State() == gobreaker.StateOpen:
		c.stats.FailedBreaker++
	default:
		e.queued = true
		c.stats.Waiting++
		if d.queue == nil {
			d.queue = e
		} else {
			d.queueTail.next = e
		}
		d.queueTail = e
		c.schedule(d)
		return
	}
	c.unreserve(e)
}

// Release gives a reservation back.
func (c *Callbacks) Release(ep Endpoint) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.table[ep.url]
	e.refs--
	c.unreserve(e)
}

// unreserve takes e out of the table if nothing needs its place any more.
func (c *Callbacks) unreserve(e *entry) {
	if e.refs > 0 || e.queued {
		return
	}
	d := e.dest
	delete(c.table, e.ep.url)
	c.countEntry(d, -1)
	c.rest(d)
	c.noticeEmpty()
}

// dequeue takes the first waiting entry of d; there is one.
func (c *Callbacks) dequeue(d *destination) Endpoint {
	e := d.queue
	d.queue, e.next = e.next, nil
	e.queued = false
	c.stats.Waiting--
	ep := e.ep
	// The place in the table is free again before the exchange: what comes in
	// meanwhile for the same endpoint has a newer count and waits for its own.
	c.unreserve(e)
	return ep
}

// newDestination adds the destination of ep.
func (c *Callbacks) newDestination(ep Endpoint) *destination {
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
	d.hostHeader = d.host
	if ep.addr.Is6() {
		d.hostHeader = "[" + d.host + "]"
	}
	if !(d.tls && d.port == 443 || !d.tls && d.port == 80) {
		d.hostHeader += ":" + strconv.Itoa(int(d.port))
	}
	d.breaker = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		Timeout: c.cfg.BreakerOpen,
		ReadyToTrip: func(counts gobreaker.Counts) bool {
			return int64(counts.ConsecutiveFailures) >= int64(c.cfg.BreakerFailures)
		},
		OnStateChange: func(_ string, _, to gobreaker.State) {
			if open := to != gobreaker.StateClosed; open != d.open {
				d.open = open
				c.countOpen(open)
			}
		},
		IsExcluded: func(err error) bool { return err == errCut },
	})
	c.dests[d.key] = d
	return d
}

func (c *Callbacks) countOpen(open bool) {
	if open {
		c.stats.BreakersOpen++
	} else {
		c.stats.BreakersOpen--
	}
}

// schedule puts d where its next POST is found: in turn, or when its rate or
// that of its address allows. Nothing happens if it is there, has no POST, or is at its limit of
// concurrency; a POST that ends schedules again.
func (c *Callbacks) schedule(d *destination) {
	if d.state != destNone || d.queue == nil || d.inFlight >= c.cfg.Concurrency {
		return
	}
	if d.kind != destListed && time.Until(d.next) > 0 {
		d.state = destLater
		heap.Push(&c.later, d)
		if c.later[0] == d {
			c.wakePace()
		}
		return
	}
	if c.promise(d) {
		c.pushReady(d)
	}
}

func (c *Callbacks) pushReady(d *destination) {
	d.state, d.readyIn = destReady, 0
	if d.unproven {
		d.readyIn = 1
	}
	c.ready[d.readyIn].push(d)
	c.work.Signal()
}

// popReady takes the next destination in turn. Proven and unproven ones
// alternate, so that a crowd of newcomers costs the others half at most.
func (c *Callbacks) popReady() *destination {
	for range 2 {
		list := &c.ready[c.turn]
		skip := c.turn == 1 && c.unprovenBusy >= unprovenShare(c.cfg.Workers)
		c.turn = 1 - c.turn
		if d := list.head; d != nil && !skip {
			list.remove(d)
			d.state = destNone
			return d
		}
	}
	return nil
}

// rest puts a destination without work aside. One that never sent anything is
// forgotten at once: repeated ids reserve and release any number of them.
func (c *Callbacks) rest(d *destination) {
	if d.state != destNone || d.entries > 0 || d.inFlight > 0 {
		return
	}
	if !d.used {
		c.forget(d)
		return
	}
	d.restSince = time.Now()
	d.warmConns = 0
	if d.client != nil {
		d.warmConns = d.client.IdleConnsCount()
	}
	if d.warmConns > 0 {
		d.state = destWarm
		c.warm.push(d)
		c.warmConn += d.warmConns
		return
	}
	c.cool(d)
}

// cool puts d, which has no connections, to those remembered only for their
// breaker and rate.
func (c *Callbacks) cool(d *destination) {
	d.client = nil
	d.state = destCold
	c.cold.push(d)
	if c.cold.n > maxResting {
		c.forget(c.cold.head)
	}
}

// rouse takes d out of rest.
func (c *Callbacks) rouse(d *destination) {
	switch d.state {
	case destWarm:
		c.warm.remove(d)
		c.warmConn -= d.warmConns
	case destCold:
		c.cold.remove(d)
	default:
		return
	}
	d.state = destNone
}

func (c *Callbacks) forget(d *destination) {
	c.rouse(d)
	if d.open {
		c.countOpen(false)
	}
	delete(c.dests, d.key)
}

// trim gives up connections and destinations at rest: those beyond the limits
// and those at rest since before. The caller closes the idle connections of
// what it returns, without the lock.
func (c *Callbacks) trim(warmBefore, coldBefore time.Time) []*fasthttp.HostClient {
	var victims []*fasthttp.HostClient
	for d := c.warm.head; d != nil && (c.warmConn > maxIdleConns || d.restSince.Before(warmBefore)); d = c.warm.head {
		victims = append(victims, d.client)
		c.rouse(d)
		c.cool(d)
	}
	for d := c.cold.head; d != nil && d.restSince.Before(coldBefore); d = c.cold.head {
		c.forget(d)
	}
	return victims
}

func closeIdle(clients []*fasthttp.HostClient) {
	for _, client := range clients {
		client.CloseIdleConnections()
	}
}

// job is a POST that a worker has taken.
type job struct {
	ep       Endpoint
	dest     *destination
	client   *fasthttp.HostClient
	done     func(error) // tells the breaker
	unproven bool        // counted in unprovenBusy
}

// take waits for a POST to send. False: closed.
func (c *Callbacks) take() (job, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.closed {
		d := c.popReady()
		if d == nil {
			c.work.Wait()
			continue
		}
		if d.queue == nil {
			c.keepPromises(d, d.users())
			c.rest(d)
			continue
		}
		done, err := d.breaker.Allow()
		if err == gobreaker.ErrOpenState {
			c.keepPromises(d, d.users())
			c.failWaiting(d)
			continue
		}
		if err != nil {
			// Half open, and the POST that tries is in flight: its end
			// schedules the rest or fails it.
			c.keepPromises(d, d.users())
			continue
		}
		if d.client == nil {
			d.client = c.newClient(d)
		}
		d.used = true
		d.inFlight++
		c.stats.InFlight++
		if d.unproven {
			c.unprovenBusy++
		}
		if d.kind != destListed {
			d.next = c.cfg.after(d.next, time.Now())
		}
		j := job{ep: c.dequeue(d), dest: d, client: d.client, done: done, unproven: d.unproven}
		c.schedule(d)
		return j, true
	}
	return job{}, false
}

// failWaiting fails all that waits for d: its breaker is open. Waiting for it
// to close would fill d's share of the table and turn callers away.
func (c *Callbacks) failWaiting(d *destination) {
	for d.queue != nil {
		c.stats.FailedBreaker++
		c.dequeue(d)
	}
	c.rest(d)
}

// ended takes j out of what is in flight.
func (c *Callbacks) ended(j job) {
	j.dest.inFlight--
	c.stats.InFlight--
	if j.unproven {
		c.unprovenBusy--
	}
}

// finish books the end of a POST.
func (c *Callbacks) finish(j job, r result) {
	if r.kind == resultLimited {
		if addr, _ := busyPeer(r.err); !c.postpone(j, addr) {
			c.logResult(j.ep, r)
		}
		return
	}
	d := j.dest
	c.mu.Lock()
	c.ended(j)
	*r.kind.counter(&c.stats)++
	j.done(r.breakerErr())
	if d.kind == destPublic && r.kind != resultCut {
		// A fifth of the time allowed is quick: it takes five such POSTs to
		// hold a worker as long as one that times out.
		c.prove(d, r.breakerErr() == nil && r.took <= c.cfg.Timeout/5)
	}
	if d.open && d.breaker.State() == gobreaker.StateOpen {
		c.failWaiting(d)
	}
	c.keepPromises(d, d.users())
	c.schedule(d)
	c.rest(d)
	victims := c.trim(time.Time{}, time.Time{})
	c.noticeEmpty()
	c.mu.Unlock()
	closeIdle(victims)
	c.took.observe(r.took)
	c.logResult(j.ep, r)
}

// prove notes whether d answers quickly, and moves what is counted by that.
func (c *Callbacks) prove(d *destination, quick bool) {
	if d.unproven == !quick {
		return
	}
	d.unproven = !quick
	if quick {
		c.unprovenSlots -= d.entries
	} else {
		c.unprovenSlots += d.entries
	}
	if d.state == destReady {
		c.ready[d.readyIn].remove(d)
		c.pushReady(d)
	}
}

// Run sends until ctx ends, and returns when the last worker has: exchanges in
// flight are cut off then, and what waits is dropped, so Drain goes first. It
// is called once.
func (c *Callbacks) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for range c.cfg.Workers {
		wg.Go(func() {
			var w worker
			if c.key != nil {
				w.signer = newSigner(c.key)
			}
			for {
				j, ok := c.take()
				if !ok {
					return
				}
				c.finish(j, c.post(&w, j))
			}
		})
	}
	wg.Go(func() { c.pace(ctx) })
	<-ctx.Done()
	c.close()
	wg.Wait()

	c.mu.Lock()
	var idle []*fasthttp.HostClient
	for _, d := range c.dests {
		if d.client != nil {
			idle = append(idle, d.client)
		}
	}
	c.mu.Unlock()
	closeIdle(idle)
	c.logHidden()
	return nil
}

// pace makes destinations ready when their rate allows, and clears out what
// is idle, until ctx ends.
func (c *Callbacks) pace(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	sweep := time.Now()
	remember := max(restFor, 2*c.cfg.BreakerOpen, 2*c.cfg.interval())
	for {
		now := time.Now()
		var victims []*fasthttp.HostClient
		c.mu.Lock()
		for len(c.later) > 0 && !c.later[0].next.After(now) {
			d := heap.Pop(&c.later).(*destination)
			d.state = destNone
			c.schedule(d)
			c.rest(d)
		}
		c.release(now)
		swept := !now.Before(sweep)
		if swept {
			c.forgetPeers(len(c.peers))
			victims = c.trim(now.Add(-idleConnTimeout), now.Add(-remember))
			sweep = now.Add(callbackSweep)
		}
		wake := sweep
		if len(c.later) > 0 && c.later[0].next.Before(wake) {
			wake = c.later[0].next
		}
		if len(c.dueAt) > 0 && c.dueAt[0].next.Before(wake) {
			wake = c.dueAt[0].next
		}
		c.mu.Unlock()
		closeIdle(victims)
		if swept {
			c.logHidden()
		}

		timer.Reset(time.Until(wake))
		select {
		case <-timer.C:
		case <-c.paceWake:
		case <-ctx.Done():
			return
		}
	}
}

func (c *Callbacks) wakePace() {
	select {
	case c.paceWake <- struct{}{}:
	default: // it has not looked since the last one
	}
}

// Drain refuses new reservations and waits until all POSTs are sent, those of
// reservations already made included. When ctx ends first, it drops what waits
// and cuts off what is in flight. It returns how many were lost in one of
// these ways. Run must go on meanwhile.
func (c *Callbacks) Drain(ctx context.Context) (dropped int) {
	c.mu.Lock()
	before := c.stats.Dropped
	c.draining = true
	empty := c.awaitEmpty()
	c.mu.Unlock()
	select {
	case <-empty:
	case <-ctx.Done():
	}
	c.close()
	// Exchanges end at once when they are cut off.
	c.mu.Lock()
	empty = c.awaitEmpty()
	c.mu.Unlock()
	<-empty
	c.mu.Lock()
	defer c.mu.Unlock()
	return int(c.stats.Dropped - before)
}

// awaitEmpty returns a channel that is closed when nothing waits or is in
// flight, and, before close, nothing is reserved.
func (c *Callbacks) awaitEmpty() <-chan struct{} {
	if c.emptied == nil {
		c.emptied = make(chan struct{})
	}
	empty := c.emptied
	c.noticeEmpty()
	return empty
}

func (c *Callbacks) noticeEmpty() {
	if c.emptied != nil && c.stats.InFlight == 0 && c.stats.Waiting == 0 && (c.closed || len(c.table) == 0) {
		close(c.emptied)
		c.emptied = nil
	}
}

// close drops what waits and cuts off what is in flight. Workers return.
func (c *Callbacks) close() {
	c.mu.Lock()
	c.closed = true
	for _, d := range c.dests {
		for d.queue != nil {
			c.stats.Dropped++
			c.dequeue(d)
		}
	}
	c.work.Broadcast()
	c.noticeEmpty()
	c.mu.Unlock()
	c.cut()
}

// Stats returns a snapshot.
func (c *Callbacks) Stats() CallbackStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	s.Retried = c.retried.Load()
	s.Reserved = len(c.table)
	s.Destinations = len(c.dests)
	return s
}

// destList is a list of destinations through prevD and nextD; each is in one
// list at most.
type destList struct {
	head, tail *destination
	n          int
}

func (l *destList) push(d *destination) {
	d.prevD, d.nextD = l.tail, nil
	if l.tail == nil {
		l.head = d
	} else {
		l.tail.nextD = d
	}
	l.tail = d
	l.n++
}

func (l *destList) remove(d *destination) {
	if d.prevD == nil {
		l.head = d.nextD
	} else {
		d.prevD.nextD = d.nextD
	}
	if d.nextD == nil {
		l.tail = d.prevD
	} else {
		d.nextD.prevD = d.prevD
	}
	d.prevD, d.nextD = nil, nil
	l.n--
}

// laterHeap orders destinations by when their rate allows the next POST.
type laterHeap []*destination

func (h laterHeap) Len() int           { return len(h) }
func (h laterHeap) Less(i, j int) bool { return h[i].next.Before(h[j].next) }
func (h laterHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *laterHeap) Push(d any)        { *h = append(*h, d.(*destination)) }
func (h *laterHeap) Pop() any {
	old := *h
	d := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return d
}
