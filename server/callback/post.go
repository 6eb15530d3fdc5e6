package callback

import (
	"bufio"
	"bytes"
	"container/list"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"github.com/valyala/fasthttp"
)

// result is how a POST ended.
type result struct {
	kind   Result
	status int // of the answer, if there was one
	err    error
	took   time.Duration
}

var (
	errNotTried  = errors.New("not tried") // or cut off by the stop: excluded by the breaker
	errUnhealthy = errors.New("unhealthy destination")
)

// breakerErr returns the outcome for the breaker. A destination that answers counts as up,
// unless the status is 429 or 5xx.
func (r result) breakerErr() error {
	switch {
	case r.kind == Dropped, r.kind == FailedLimited:
		return errNotTried
	case r.kind == Delivered, r.kind == FailedRedirect,
		r.kind == FailedStatus && r.status < 500 && r.status != fasthttp.StatusTooManyRequests:
		return nil
	}
	return errUnhealthy
}

// post does one exchange.
func (s *Sender) post(j job) result {
	start := time.Now()
	body := s.body()
	req, resp := fasthttp.AcquireRequest(), fasthttp.AcquireResponse()
	defer fasthttp.ReleaseRequest(req)
	defer fasthttp.ReleaseResponse(resp)
	setRequest(req, j.dest, j.ep)
	req.SetBodyRaw(body)
	if s.key != nil {
		sign(&req.Header, s.key, start, body)
	}

	// Do, not Post: no redirect is followed.
	err := j.dest.client.DoTimeout(req, resp, s.cfg.Timeout)
	r := result{err: err, took: time.Since(start)}
	// The error is checked first, because after a failed call the status is 200.
	if err != nil {
		r.kind = resultOf(err)
		if s.exchanges.Err() != nil {
			r.kind = Dropped
		}
		return r
	}
	r.status = resp.StatusCode()
	switch r.status / 100 {
	case 2:
		r.kind = Delivered
	case 3:
		r.kind = FailedRedirect
	default: // 101 too: another protocol was not requested
		r.kind = FailedStatus
	}
	return r
}

// setRequest fills an empty request, the body and its signature aside, from
// the parts that were checked.
func setRequest(req *fasthttp.Request, d *destination, ep Endpoint) {
	req.Header.SetMethod(fasthttp.MethodPost)
	req.Header.SetContentType("application/json")
	req.Header.Set(Header, "1")
	uri := req.URI()
	uri.SetScheme("http")
	if d.tls {
		uri.SetScheme("https")
	}
	uri.SetHost(d.hostHeader)
	// The target is sent as it was given, with its query: nothing is decoded and
	// encoded again (the client has DisablePathNormalizing).
	uri.SetPath(ep.target)
}

// resultOf is the result of a POST that ended with err.
func resultOf(err error) Result {
	var (
		dnsErr  *net.DNSError
		dialErr dialError
		timeout interface{ Timeout() bool }
	)
	switch {
	case errors.Is(err, errLimited):
		return FailedLimited
	case errors.Is(err, errRefused):
		return FailedRefused
	case errors.As(err, &dnsErr):
		return FailedResolve
	case errors.As(err, &timeout) && timeout.Timeout():
		return FailedTimeout
	case errors.As(err, &dialErr):
		return FailedConnect
	}
	return FailedAnswer
}

// body returns the body of a POST that is sent now.
func (s *Sender) body() []byte {
	start, unique := s.cfg.Live()
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(struct { // each of these can be encoded
		WindowStart time.Time `json:"window_start"`
		Unique      uint64    `json:"unique"`
		Group       string    `json:"group"`
		Instance    string    `json:"instance"`
	}{start.UTC(), unique, s.cfg.Group, s.cfg.Instance})
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// dialError marks an error of the dial, to distinguish it from one of the exchange.
type dialError struct{ err error }

func (e dialError) Error() string { return e.err.Error() }
func (e dialError) Unwrap() error { return e.err }

// client sends the POSTs of one destination. fasthttp's HostClient bounds the
// time of a POST and repeats it; the connections are the client's own, because
// HostClient starts a goroutine that cleans its pool, for each destination.
type client struct {
	fasthttp.HostClient
	sender *Sender
	dest   *destination
	idle   []*pooled // those of Sender.idle that are its own, in the same order
}

// pooled is a connection of a client.
type pooled struct {
	net.Conn
	client *client
	addr   netip.Addr // that was dialled
	made   time.Time
	used   bool // by an exchange before: its peer may have closed it meanwhile

	// While it is idle.
	since time.Time
	place *list.Element // in Sender.idle
}

func (s *Sender) newClient(d *destination) *client {
	h := &client{sender: s, dest: d}
	h.HostClient = fasthttp.HostClient{
		Addr:                      net.JoinHostPort(d.host, strconv.Itoa(int(d.port))),
		IsTLS:                     d.tls,
		Transport:                 h,
		Name:                      "verve",
		MaxConns:                  s.cfg.Concurrency,
		MaxIdemponentCallAttempts: 2,
		MaxResponseBodySize:       maxAnswer,
		DisablePathNormalizing:    true,
		SecureErrorLogMessage:     true,
	}
	h.RetryIfErr = func(*fasthttp.Request, int, error) (resetTimeout, retry bool) {
		h.retry()
		return false, true
	}
	return h
}

// get returns the idle connection that was used last, or dials. TLS is done by
// the dial, within the time of the exchange. The POST is counted at its address.
func (h *client) get(timeout time.Duration) (*pooled, error) {
	s := h.sender
	s.mu.Lock()
	if n := len(h.idle); n > 0 {
		defer s.mu.Unlock()
		conn := h.idle[n-1]
		if err := s.admit(h.dest, conn.addr); err != nil {
			return nil, err
		}
		s.takeOut(conn, n-1)
		return conn, nil
	}
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(s.exchanges, timeout)
	defer cancel()
	conn := &pooled{client: h, made: time.Now()}
	var err error
	conn.Conn, err = s.guard.dial(ctx, h.dest, func(ctx context.Context, dialer *net.Dialer, to netip.AddrPort) (net.Conn, error) {
		s.mu.Lock()
		err := s.admit(h.dest, to.Addr())
		s.mu.Unlock()
		if err != nil {
			return nil, err
		}
		conn.addr = to.Addr()
		return s.guard.connect(ctx, dialer, to.String())
	})
	if err != nil {
		return nil, dialError{err}
	}
	return conn, nil
}

// put keeps conn for the next POST. If too many connections are idle, it closes the one that
// has been idle for longest.
func (h *client) put(conn *pooled) {
	s := h.sender
	s.mu.Lock()
	conn.used, conn.since, conn.place = true, time.Now(), s.idle.PushBack(conn)
	h.idle = append(h.idle, conn)
	surplus := s.takeIdle(time.Time{}, maxIdleConns)
	s.mu.Unlock()
	closeAll(surplus)
}

// retry prepares for a second try. RoundTrip asks for one on a dead idle connection only.
// The others are as old: the peer restarted, most likely.
func (h *client) retry() {
	s := h.sender
	s.mu.Lock()
	s.stats.Retried++
	idle := slices.Clone(h.idle)
	for _, conn := range idle {
		s.takeOut(conn, 0)
	}
	s.mu.Unlock()
	closeAll(idle)
}

// takeIdle takes out the connections that became idle before the time before, and the oldest
// of the others until most are left. s.mu is held. The caller closes them without holding it.
func (s *Sender) takeIdle(before time.Time, most int) (taken []*pooled) {
	for e := s.idle.Front(); e != nil; e = s.idle.Front() {
		conn := e.Value.(*pooled)
		if s.idle.Len() <= most && !conn.since.Before(before) {
			break
		}
		s.takeOut(conn, 0) // it is the oldest of its client, too
		taken = append(taken, conn)
	}
	return taken
}

// takeOut takes an idle connection, which is the one at that place of its client, for a
// POST or to be closed. s.mu is held.
func (s *Sender) takeOut(conn *pooled, at int) {
	s.idle.Remove(conn.place)
	conn.client.idle = slices.Delete(conn.client.idle, at, at+1)
}

func closeAll(conns []*pooled) {
	for _, conn := range conns {
		_ = conn.Close()
	}
}

// RoundTrip does one exchange. It replaces fasthttp's because it knows whether
// the connection was used before, which decides about a retry, and because it
// ends when the server stops.
func (h *client) RoundTrip(_ *fasthttp.HostClient, req *fasthttp.Request, resp *fasthttp.Response) (retry bool, err error) {
	s := h.sender
	deadline := time.Now().Add(req.GetTimeOut())
	conn, err := h.get(req.GetTimeOut())
	if err != nil {
		return false, err
	}
	keep := false
	defer func() {
		if !keep {
			_ = conn.Close()
		}
	}()
	// There is one deadline for the exchange: a peer that sends byte by byte gains no time.
	if err := conn.SetDeadline(deadline); err != nil {
		return conn.used, err
	}
	stop := context.AfterFunc(s.exchanges, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	bw := s.writers.Get().(*bufio.Writer)
	bw.Reset(conn)
	err = req.Write(bw)
	if err == nil {
		err = bw.Flush()
	}
	bw.Reset(nil)
	s.writers.Put(bw)
	if err != nil {
		return conn.used && connectionDead(err), err
	}

	br := s.readers.Get().(*bufio.Reader)
	br.Reset(conn)
	err = resp.ReadLimitBody(br, h.MaxResponseBodySize)
	surplus := br.Buffered() > 0
	br.Reset(nil)
	s.readers.Put(br)
	if err != nil {
		return conn.used && connectionDead(err), err
	}

	// Bytes after the answer would be taken for the next one.
	if surplus || resp.ConnectionClose() || resp.StatusCode() < 200 || time.Since(conn.made) > maxConnAge {
		return false, nil
	}
	keep = true
	h.put(conn)
	return false, nil
}

// connectionDead reports whether err is that of a connection which the peer
// had closed before it saw the request, as far as one can tell: no byte of an
// answer came. fasthttp turns errors at the first byte into io.EOF.
func connectionDead(err error) bool {
	return err == io.EOF || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
}

func (s *Sender) logResult(ep Endpoint, r result) {
	sampler, level := &s.failLog, zerolog.WarnLevel
	if r.kind == Delivered {
		sampler, level = &s.okLog, zerolog.InfoLevel
	}
	hidden, ok := sampler.Allow(time.Now())
	if !ok {
		return
	}
	line := s.cfg.Log.WithLevel(level).Str("url", ep.logURL()).Str("result", r.kind.String()).Dur("took_ms", r.took)
	if r.status != 0 {
		line = line.Int("status", r.status)
	}
	if hidden > 0 {
		line = line.Uint64("hidden", hidden)
	}
	line.Err(r.err).Msg("callback")
}

// logHidden logs how many results were not logged, if no later one has reported that.
func (s *Sender) logHidden() {
	if n := s.okLog.TakeHidden(); n > 0 {
		s.cfg.Log.Info().Uint64("hidden", n).Str("result", "delivered").Msg("callback results not logged")
	}
	if n := s.failLog.TakeHidden(); n > 0 {
		s.cfg.Log.Warn().Uint64("hidden", n).Str("result", "failed").Msg("callback results not logged")
	}
}
