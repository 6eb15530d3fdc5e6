// Package server is Verve's front: the accept route and the sink for
// callbacks on the public listener, callbacks out, and the admin listener.
//
// handle in accept.go answers a request: it parses it, enters the open epoch of
// package counter, adds the id to the Set of package dedup, and writes the verdict.
// main starts a Server, and stops it first.
package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"github.com/valyala/fasthttp"

	"verve/counter"
	"verve/dedup"
	"verve/internal/logline"
	"verve/internal/setting"
	"verve/server/callback"
)

// Defaults of Config.
const (
	DefaultMaxConns      = 65536
	DefaultSlowTimeout   = 5 * time.Second
	DefaultMaxBatchIDs   = 10_000
	DefaultMaxBatchBytes = 1 << 20
	DefaultIdleTimeout   = 75 * time.Second // longer than the common load balancers keep theirs
)

const (
	// readBuffer bounds the request line and the headers: an endpoint of 2 KiB,
	// percent-encoded, and an ordinary set of headers fit.
	readBuffer = 8 << 10

	// maxBody bounds the body of POST /test.
	maxBody = 64 << 10

	// maxMaxConns is more than any system has descriptors for.
	maxMaxConns = 1 << 30

	// A larger batch is better sent as several: none of its ids is judged before all of
	// it has arrived.
	maxMaxBatchIDs   = 1_000_000
	maxMaxBatchBytes = 64 << 20

	// answerGrace bounds how long the stop waits for answers that are on their way. A
	// client that has sent half of its headers delays the stop by that.
	answerGrace = 2 * time.Second

	// nextRequestGrace is how long StopAccepting lets clients send the next request on
	// an idle connection. firstRequestGrace is for the first request of a connection that
	// was accepted just now, whose client does not expect an end, and for requests under
	// way: a busy machine may need it. The answers close the connections.
	nextRequestGrace  = 250 * time.Millisecond
	firstRequestGrace = 2 * time.Second
)

// Config of a Server. Counter, Set, Callbacks and Log are required.
type Config struct {
	Counter   *counter.Counter // counts the verdicts
	Set       dedup.Set        // judges the ids
	Callbacks *callback.Sender // sends the POSTs
	Log       zerolog.Logger   // refusals, panics; sampled

	Uint64IDs       bool // only canonical decimals up to 2^64-1 are ids
	DuplicateStatus int  // status of a repeat; 409 if zero
	WindowHeader    bool // answers name the window in which the id was judged

	// Descriptors and Memory are how many files the process may open and how many bytes
	// it may take, half of them for ids; 0: not known, or no limit.
	Descriptors, Memory uint64

	// MaxConns bounds the connections that are open; DefaultMaxConns if zero. It is lowered
	// to what Descriptors and Memory have room for.
	MaxConns int

	// MaxConnsPerAddress bounds the connections of one client address (of one
	// /64 network of IPv6); 0: no bound. All callers behind a load balancer or a
	// proxy have one address.
	MaxConnsPerAddress int

	SlowTimeout time.Duration // to receive a request, to send an answer; DefaultSlowTimeout if zero
	IdleTimeout time.Duration // between two requests of a connection; DefaultIdleTimeout if zero
	TLS         *Certificate  // the listener speaks TLS; nil: plain HTTP

	// MaxBatchIDs and MaxBatchBytes bound one batch, after decompression. Zero:
	// DefaultMaxBatchIDs, DefaultMaxBatchBytes.
	MaxBatchIDs, MaxBatchBytes int

	// CORSOrigins are the origins whose pages may read answers; "*" is all of them.
	CORSOrigins []string

	limits     Limits // follow from the above; tests set some
	noFastPath bool   // set by tests
}

// Server serves the public listener. Serve and Shutdown are called once each, and Serve returns
// after Shutdown. The other methods are safe for concurrent use, while Serve runs.
type Server struct {
	cfg         Config
	lastAnswers atomic.Bool // every answer is the last one of its connection; each request reads it
	http        fasthttp.Server
	ln          *listener
	batches     *batches
	stopSweep   chan struct{}
	accepted    chan struct{} // closed when no connection is accepted any more

	firstRequest time.Duration // firstRequestGrace, but for tests

	refused     [reasons]atomic.Uint64
	replayed    atomic.Uint64 // retries answered as their first attempt was
	sunk        atomic.Uint64 // POSTs taken by the sink
	refusalLogs [reasons]logline.Sampler
	panicLog    logline.Sampler
}

// Check refuses values out of bounds. 0 is the default of each.
func (cfg *Config) Check() error {
	switch s := cfg.DuplicateStatus; {
	case s == 0:
	case s < 200 || s > 599 || s == fasthttp.StatusNoContent || s == fasthttp.StatusResetContent || s == fasthttp.StatusNotModified:
		return setting.Errorf("duplicate-status", "want an HTTP status with a body, 200 to 599")
	}
	if cfg.MaxConns < 0 || cfg.MaxConns > maxMaxConns {
		return setting.Errorf("max-conns", "want 1 to %d", maxMaxConns)
	}
	if cfg.MaxConnsPerAddress < 0 || cfg.MaxConnsPerAddress > maxMaxConns {
		return setting.Errorf("max-conns-per-address", "want 1 to %d, or 0 for no limit", maxMaxConns)
	}
	if cfg.MaxBatchIDs < 0 || cfg.MaxBatchIDs > maxMaxBatchIDs {
		return setting.Errorf("max-batch-ids", "want 1 to %d", maxMaxBatchIDs)
	}
	if cfg.MaxBatchBytes < 0 || cfg.MaxBatchBytes > maxMaxBatchBytes {
		return setting.Errorf("max-batch-bytes", "want 1 to %d", maxMaxBatchBytes)
	}
	for _, origin := range cfg.CORSOrigins {
		if err := checkOrigin(origin); err != nil {
			return setting.Errorf("cors-origin", "%v", err)
		}
	}
	if err := setting.CheckTimeout("slow-timeout", cfg.SlowTimeout); err != nil {
		return err
	}
	return setting.CheckTimeout("idle-timeout", cfg.IdleTimeout)
}

// New checks cfg and makes a server for ln. An error names the bad setting; then ln is still
// the caller's to close.
func New(cfg Config, ln net.Listener) (*Server, error) {
	if cfg.Counter == nil || cfg.Set == nil || cfg.Callbacks == nil {
		return nil, errors.New("server: Counter, Set and Callbacks are required")
	}
	if err := cfg.Check(); err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	cfg.DuplicateStatus = cmp.Or(cfg.DuplicateStatus, fasthttp.StatusConflict)
	cfg.MaxBatchIDs = cmp.Or(cfg.MaxBatchIDs, DefaultMaxBatchIDs)
	cfg.MaxBatchBytes = cmp.Or(cfg.MaxBatchBytes, DefaultMaxBatchBytes)
	cfg.SlowTimeout = cmp.Or(cfg.SlowTimeout, DefaultSlowTimeout)
	cfg.IdleTimeout = cmp.Or(cfg.IdleTimeout, DefaultIdleTimeout)
	limits := LimitsFor(cfg)
	if cfg.MaxConns > 0 && limits.Lowered != "" {
		cfg.Log.Warn().Int("max_conns", cfg.MaxConns).Int("lowered_to", limits.MaxConns).Str("reason", limits.Lowered).
			Msg("--max-conns is higher than the process has room for")
	}
	limits.MaxServed = cmp.Or(cfg.limits.MaxServed, limits.MaxServed)
	limits.BatchMemory = cmp.Or(cfg.limits.BatchMemory, limits.BatchMemory)
	cfg.limits = limits
	s := &Server{
		cfg:       cfg,
		ln:        newListener(ln, &cfg),
		stopSweep: make(chan struct{}),
		accepted:  make(chan struct{}),

		firstRequest: firstRequestGrace,
		panicLog:     logline.Sampler{Every: time.Second},
	}
	for i := range s.refusalLogs {
		s.refusalLogs[i].Every = refusalsEvery
	}
	if !cfg.noFastPath {
		s.ln.fast = newFastPath(s)
	}
	s.batches = newBatches(s)
	s.http = fasthttp.Server{
		Handler:       s.handle,
		ExpectHandler: s.expect,
		ErrorHandler:  func(ctx *fasthttp.RequestCtx, err error) { s.refuse(ctx, broken(ctx, err)) },
		ConnState:     connState,
		Logger:        quiet{}, // refused counts what fasthttp would log

		Concurrency:        math.MaxInt32, // the listener bounds it
		ReadBufferSize:     readBuffer,
		MaxRequestBodySize: max(maxBody, cfg.MaxBatchBytes+packedSlack(cfg.MaxBatchBytes)),
		StreamRequestBody:  true, // handlers read bodies, within the memory allowed

		NoDefaultServerHeader:        true,
		SecureErrorLogMessage:        true,
		DisablePreParseMultipartForm: true,
	}
	return s, nil
}

// quiet drops what fasthttp would log, because that has bytes that callers have sent.
type quiet struct{}

func (quiet) Printf(string, ...any) {}

// Serve accepts connections until Shutdown, StopAccepting, or until the listener is closed.
// It always returns nil.
func (s *Server) Serve() error {
	go s.ln.sweep(s.stopSweep)
	go every(refusalsEvery, s.stopSweep, s.logHiddenRefusals)
	for {
		c, err := s.ln.accept()
		if err != nil { // the listener is closed
			close(s.accepted)
			return nil
		}
		go s.attend(c)
	}
}

// LastAnswers makes every answer from now on the last of its connection, so that
// clients and load balancers open their next one elsewhere. Ids are still counted.
func (s *Server) LastAnswers() { s.lastAnswers.Store(true) }

// StopAccepting closes the listener, and returns when the connections that it had
// accepted are answered and closed, or have had nextRequestGrace or firstRequestGrace for
// that, or when ctx ends. If another process has the same socket open, the kernel keeps every
// connection that was not accepted here for the process that accepts next.
func (s *Server) StopAccepting(ctx context.Context) {
	_ = s.ln.Close() // nothing can be done about a failed close
	began := time.Now()
	first, cancel := context.WithTimeout(ctx, s.firstRequest)
	defer cancel()
	s.await(first, func() bool {
		select {
		case <-s.accepted:
		default: // the connection accepted last may not be counted yet
			return false
		}
		return s.ln.open() == 0 || s.ln.expecting() == 0 && time.Since(began) > nextRequestGrace
	})
}

// Shutdown waits until every request that was counted is answered, then closes the
// listener and the connections. Seal the counter before: then requests that still
// arrive are answered 503 and count nothing. If connections are still open when ctx ends,
// the error has their number. A second call panics.
func (s *Server) Shutdown(ctx context.Context) error {
	defer s.logHiddenRefusals()
	defer close(s.stopSweep)
	s.LastAnswers()
	// Requests that arrive meanwhile are answered: the socket is still open.
	grace, cancel := context.WithTimeout(ctx, answerGrace)
	defer cancel()
	s.await(grace, func() bool { return s.ln.busy() == 0 })
	s.ln.stopAccepting()
	s.await(ctx, func() bool { return s.ln.open() == 0 })
	if n := s.ln.open(); n > 0 && ctx.Err() != nil {
		return fmt.Errorf("server: %d connections were still open: %w", n, ctx.Err())
	}
	return nil
}

// every calls f once in each interval, until stop is closed.
func every(interval time.Duration, stop <-chan struct{}, f func()) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			f()
		}
	}
}

// await polls until done returns true or ctx ends.
func (s *Server) await(ctx context.Context, done func() bool) {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
