package server

import (
	"bufio"
	"bytes"
	"container/heap"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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

	Retried uint64 // second tries after a dead pooled connection
	Busy    uint64 // Reserve returned false

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
	destNone  destState = iota
	destReady           // Callbacks.ready
	destLater           // Callbacks.later
	destWarm            // Callbacks.warm
	destCold            // Callbacks.cold
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
	used             bool // a POST was sent
	open             bool // breaker not closed; kept by its OnStateChange
	unproven         bool // not known to answer quickly

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
		paceWake: make(chan struct{}, 1),
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
		unproven && c.unprovenSlots >= unprovenShare(c.cfg.MaxWaiting) {
		return false
	}
	if d == nil {
		d = c.newDestination(ep)
	}
	c.rouse(d)
	d.entries++
	if d.unproven {
		c.unprovenSlots++
	}
	c.table[ep.url] = &entry{ep: ep, dest: d, refs: 1}
	return true
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
	d.entries--
	if d.unproven {
		c.unprovenSlots--
	}
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

// schedule puts d where its next POST is found: in turn, or when its rate
// allows. Nothing happens if it is there, has no POST, or is at its limit of
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
	c.pushReady(d)
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
			c.rest(d)
			continue
		}
		done, err := d.breaker.Allow()
		if err == gobreaker.ErrOpenState {
			c.failWaiting(d)
			continue
		}
		if err != nil {
			// Half open, and the POST that tries is in flight: its end
			// schedules the rest or fails it.
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
			// A late wake-up may be made up for by one POST, so that the rate
			// is met; idle time is not saved.
			interval, now := c.cfg.interval(), time.Now()
			if earliest := now.Add(-interval); d.next.Before(earliest) {
				d.next = earliest
			}
			d.next = d.next.Add(interval)
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

// finish books the end of a POST.
func (c *Callbacks) finish(j job, r result) {
	d := j.dest
	c.mu.Lock()
	d.inFlight--
	c.stats.InFlight--
	if j.unproven {
		c.unprovenBusy--
	}
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
	c.schedule(d)
	c.rest(d)
	victims := c.trim(time.Time{}, time.Time{})
	c.noticeEmpty()
	c.mu.Unlock()
	closeIdle(victims)
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
		swept := !now.Before(sweep)
		if swept {
			victims = c.trim(now.Add(-idleConnTimeout), now.Add(-remember))
			sweep = now.Add(callbackSweep)
		}
		wake := sweep
		if len(c.later) > 0 && c.later[0].next.Before(wake) {
			wake = c.later[0].next
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

// resultKind is how a POST ended.
type resultKind uint8

const (
	resultDelivered resultKind = iota
	resultStatus
	resultRedirect
	resultTimeout
	resultResolve
	resultConnect
	resultRefused
	resultAnswer
	resultCut
)

var resultNames = [...]string{"delivered", "status", "redirect", "timeout", "resolve", "connect", "refused", "answer", "cut"}

func (k resultKind) counter(s *CallbackStats) *uint64 {
	return [...]*uint64{
		&s.Delivered, &s.FailedStatus, &s.FailedRedirect, &s.FailedTimeout, &s.FailedResolve,
		&s.FailedConnect, &s.FailedRefused, &s.FailedAnswer, &s.Dropped,
	}[k]
}

type result struct {
	kind   resultKind
	status int // of the answer, if there was one
	err    error
	took   time.Duration
}

var (
	errCut       = errors.New("cut off by the stop")
	errUnhealthy = errors.New("unhealthy destination")
)

// breakerErr is what the breaker is told. A destination that answers is up,
// unless it answers that it is not.
func (r result) breakerErr() error {
	switch {
	case r.kind == resultCut:
		return errCut
	case r.kind == resultDelivered, r.kind == resultRedirect,
		r.kind == resultStatus && r.status < 500 && r.status != fasthttp.StatusTooManyRequests:
		return nil
	}
	return errUnhealthy
}

// worker holds what one worker uses again for each POST.
type worker struct {
	req    fasthttp.Request
	resp   fasthttp.Response
	body   []byte
	signer *signer
}

// post does one exchange.
func (c *Callbacks) post(w *worker, j job) result {
	start := time.Now()
	windowStart, unique := c.cfg.Live()
	w.body = c.appendBody(w.body[:0], windowStart, unique)

	req := &w.req
	req.Reset()
	setRequest(req, j.dest, j.ep)
	req.SetBodyRaw(w.body)
	if w.signer != nil {
		w.signer.sign(start, w.body, req.Header.Set)
	}

	// Do, not Post: no redirect is followed.
	err := j.client.DoTimeout(req, &w.resp, c.cfg.Timeout)
	defer w.resp.Reset() // the body of the answer is not kept until the next one
	r := result{err: err, took: time.Since(start)}
	// The error first: a failed call leaves a status of 200 behind.
	if err != nil {
		r.kind = classify(err)
		if c.exchanges.Err() != nil {
			r.kind = resultCut
		}
		return r
	}
	r.status = w.resp.StatusCode()
	switch r.status / 100 {
	case 2:
		r.kind = resultDelivered
	case 3:
		r.kind = resultRedirect
	default: // 101 too: nobody asked for another protocol
		r.kind = resultStatus
	}
	return r
}

// setRequest fills an empty request, the body and its signature aside, from
// the parts that were checked.
func setRequest(req *fasthttp.Request, d *destination, ep Endpoint) {
	req.Header.SetMethod(fasthttp.MethodPost)
	req.Header.SetContentType("application/json")
	req.Header.Set(callbackHeader, "1")
	uri := req.URI()
	uri.SetScheme("http")
	if d.tls {
		uri.SetScheme("https")
	}
	uri.SetHost(d.hostHeader)
	// The target goes out as it came in, query and all: nothing is decoded and
	// encoded again (the client has DisablePathNormalizing).
	uri.SetPath(ep.target)
}

func classify(err error) resultKind {
	var (
		dnsErr  *net.DNSError
		dialErr dialError
		timeout interface{ Timeout() bool }
	)
	switch {
	case errors.Is(err, errRefused):
		return resultRefused
	case errors.As(err, &dnsErr):
		return resultResolve
	case errors.As(err, &timeout) && timeout.Timeout():
		return resultTimeout
	case errors.As(err, &dialErr):
		return resultConnect
	}
	return resultAnswer
}

// bodyTail returns the end of the body. The strings are escaped once, here.
func bodyTail(group, instance string) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(struct {
		Group    string `json:"group"`
		Instance string `json:"instance"`
	}{group, instance})
	// The opening brace becomes the comma after what goes before.
	tail := bytes.TrimSuffix(b.Bytes(), []byte("\n"))
	tail[0] = ','
	return tail, err
}

// appendBody appends the body of a POST. RFC3339Nano drops trailing zeros.
func (c *Callbacks) appendBody(dst []byte, windowStart time.Time, unique uint64) []byte {
	dst = append(dst, `{"window_start":"`...)
	dst = windowStart.UTC().AppendFormat(dst, time.RFC3339Nano)
	dst = append(dst, `","unique":`...)
	dst = strconv.AppendUint(dst, unique, 10)
	return append(dst, c.bodyTail...)
}

// dialError marks an error of the dial, so that it is told apart from one of
// the exchange.
type dialError struct{ err error }

func (e dialError) Error() string { return e.err.Error() }
func (e dialError) Unwrap() error { return e.err }

// newClient returns the client of d. One per destination, not one
// fasthttp.Client for all: that one keeps a map and a goroutine of its own.
func (c *Callbacks) newClient(d *destination) *fasthttp.HostClient {
	client := &fasthttp.HostClient{
		Addr:  net.JoinHostPort(d.host, strconv.Itoa(int(d.port))),
		IsTLS: d.tls,
		// Not by Addr but by d, and TLS is done in there, too: within the time
		// of the exchange. A connection of type *tls.Conn is taken as it is.
		DialTimeout: func(_ string, timeout time.Duration) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(c.exchanges, timeout)
			defer cancel()
			conn, err := c.guard.dial(ctx, d)
			if err != nil {
				return nil, dialError{err}
			}
			return conn, nil
		},
		Transport:                 (*transport)(c),
		Name:                      "verve",
		MaxConns:                  c.cfg.Concurrency,
		MaxIdemponentCallAttempts: 2,
		MaxResponseBodySize:       maxAnswer,
		DisablePathNormalizing:    true,
		SecureErrorLogMessage:     true,
	}
	client.RetryIfErr = func(*fasthttp.Request, int, error) (resetTimeout, retry bool) {
		// The transport asks for a retry on a dead pooled connection only. The
		// others of the pool are as old: the peer restarted, most likely.
		client.CloseIdleConnections()
		c.retried.Add(1)
		return false, true
	}
	return client
}

// transport does an exchange over a connection of the client's pool. It
// replaces fasthttp's for three reasons: it knows whether the connection came
// from the pool, which decides about a retry; it ends exchanges when the
// server stops; and it keeps the client from starting a goroutine per
// destination that cleans the pool, which trim does for all.
type transport Callbacks

func (t *transport) RoundTrip(hc *fasthttp.HostClient, req *fasthttp.Request, resp *fasthttp.Response) (retry bool, err error) {
	deadline := time.Now().Add(req.GetTimeOut())
	// As if the connection was to be closed after use: no cleaner.
	const connectionClose = true
	cc, err := hc.AcquireConn(req.GetTimeOut(), connectionClose)
	if err != nil {
		return false, err
	}
	conn, pooled := cc.Conn(), !cc.LastUseTime().IsZero()
	// One deadline for all: a peer that drips bytes gains no time by it.
	if err := conn.SetDeadline(deadline); err != nil {
		hc.CloseConn(cc)
		return pooled, err
	}
	stop := context.AfterFunc(t.exchanges, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	bw := t.writers.Get().(*bufio.Writer)
	bw.Reset(conn)
	err = req.Write(bw)
	if err == nil {
		err = bw.Flush()
	}
	bw.Reset(nil)
	t.writers.Put(bw)
	if err != nil {
		hc.CloseConn(cc)
		return pooled && connectionDead(err), err
	}

	br := t.readers.Get().(*bufio.Reader)
	br.Reset(conn)
	err = resp.ReadLimitBody(br, hc.MaxResponseBodySize)
	surplus := br.Buffered() > 0
	br.Reset(nil)
	t.readers.Put(br)
	if err != nil {
		hc.CloseConn(cc)
		return pooled && connectionDead(err), err
	}

	// What follows an answer unasked would be taken for the next one.
	if surplus || resp.ConnectionClose() || resp.StatusCode() < 200 || time.Since(cc.CreatedTime()) > maxConnAge {
		hc.CloseConn(cc)
	} else {
		hc.ReleaseConn(cc)
	}
	return false, nil
}

// connectionDead reports whether err is that of a connection which the peer
// had closed before it saw the request, as far as one can tell: no byte of an
// answer came. fasthttp turns errors at the first byte into io.EOF.
func connectionDead(err error) bool {
	return err == io.EOF || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
}

// logSampler lets some lines per second through and counts the others.
type logSampler struct {
	perSecond int

	mu     sync.Mutex
	second int64
	lines  int
	hidden uint64
}

// allow reports whether a line may be written now, and how many were hidden
// since the last one.
func (s *logSampler) allow(now time.Time) (hidden uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if second := now.Unix(); second != s.second {
		s.second, s.lines = second, 0
	}
	if s.lines++; s.lines > s.perSecond {
		s.hidden++
		return 0, false
	}
	hidden, s.hidden = s.hidden, 0
	return hidden, true
}

func (s *logSampler) takeHidden() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	hidden := s.hidden
	s.hidden = 0
	return hidden
}

func (c *Callbacks) logResult(ep Endpoint, r result) {
	sampler, level := &c.failLog, zerolog.WarnLevel
	if r.kind == resultDelivered {
		sampler, level = &c.okLog, zerolog.InfoLevel
	}
	hidden, ok := sampler.allow(time.Now())
	if !ok {
		return
	}
	line := c.cfg.Log.WithLevel(level).Str("url", ep.logURL()).Str("result", resultNames[r.kind]).Dur("took", r.took)
	if r.status != 0 {
		line = line.Int("status", r.status)
	}
	if hidden > 0 {
		line = line.Uint64("hidden", hidden)
	}
	line.Err(r.err).Msg("callback")
}

// logHidden says how many results were not logged, when none follows to say it.
func (c *Callbacks) logHidden() {
	if n := c.okLog.takeHidden(); n > 0 {
		c.cfg.Log.Info().Uint64("hidden", n).Str("result", "delivered").Msg("callbacks not logged one by one")
	}
	if n := c.failLog.takeHidden(); n > 0 {
		c.cfg.Log.Warn().Uint64("hidden", n).Str("result", "failed").Msg("callbacks not logged one by one")
	}
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
