package callback

import (
	"bufio"
	"bytes"
	"container/list"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strconv"
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
	)
	switch {
	case errors.Is(err, errLimited):
		return FailedLimited
	case errors.Is(err, errRefused):
		return FailedRefused
	case errors.As(err, &dnsErr):
		return FailedResolve
	case timedOut(err):
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
// time of a POST; the connections are the client's own, because HostClient
// starts a goroutine that cleans its pool, for each destination.
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

	// While it is idle.
	since time.Time
	place *list.Element // in Sender.idle
}

func (s *Sender) newClient(d *destination) *client {
	h := &client{sender: s, dest: d}
	h.HostClient = fasthttp.HostClient{
		Addr:                   net.JoinHostPort(d.host, strconv.Itoa(int(d.port))),
		IsTLS:                  d.tls,
		Transport:              h,
		Name:                   "verve",
		MaxConns:               s.cfg.Concurrency,
		MaxResponseBodySize:    maxAnswer,
		DisablePathNormalizing: true,
		SecureErrorLogMessage:  true,
	}
	return h
}

// kept takes the idle connection that was used last, or returns nil. The POST is counted
// at its address.
func (h *client) kept() (*pooled, error) {
	s := h.sender
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(h.idle)
	if n == 0 {
		return nil, nil
	}
	conn := h.idle[n-1]
	if err := s.admit(h.dest, conn.addr); err != nil {
		return nil, err
	}
	s.takeOut(conn, n-1)
	return conn, nil
}

// dial makes a connection, with TLS if the destination has it. The POST is counted at its
// address.
func (h *client) dial(deadline time.Time) (*pooled, error) {
	s := h.sender
	ctx, cancel := context.WithDeadline(s.exchanges, deadline)
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
	conn.since, conn.place = time.Now(), s.idle.PushBack(conn)
	h.idle = append(h.idle, conn)
	surplus := s.takeIdle(time.Time{}, s.cfg.maxIdleConns)
	s.mu.Unlock()
	closeAll(surplus)
}

// retry prepares for a second try: the first was on an idle connection that was dead. The
// others are as old: the peer restarted, most likely. The try counts for the rate, so that
// the address, at which it is counted too, is not at its limit before the destination is.
func (h *client) retry() {
	s := h.sender
	s.mu.Lock()
	s.stats.Retried++
	s.pace(h.dest)
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

// RoundTrip does the exchange of a POST, on an idle connection if there is one. If that is
// dead, it does one more, on a new connection. It replaces that of fasthttp, which cannot
// distinguish a dead connection from an answer that breaks off, after which nothing may be
// sent again.
func (h *client) RoundTrip(_ *fasthttp.HostClient, req *fasthttp.Request, resp *fasthttp.Response) (retry bool, err error) {
	deadline := time.Now().Add(req.GetTimeOut())
	conn, err := h.kept()
	if err != nil {
		return false, err
	}
	if conn != nil {
		unanswered, err := h.exchange(conn, deadline, req, resp)
		if !unanswered || timedOut(err) {
			return false, err
		}
		h.retry()
	}
	if conn, err = h.dial(deadline); err != nil {
		return false, err
	}
	_, err = h.exchange(conn, deadline, req, resp)
	return false, err
}

// exchange sends req on conn and reads the answer, and keeps or closes conn. A stop of the
// server ends it. unanswered: it failed, and no byte of an answer arrived.
func (h *client) exchange(conn *pooled, deadline time.Time, req *fasthttp.Request, resp *fasthttp.Response) (unanswered bool, err error) {
	s := h.sender
	keep := false
	defer func() {
		if !keep {
			_ = conn.Close()
		}
	}()
	// There is one deadline for the exchange: a peer that sends byte by byte gains no time.
	if err := conn.SetDeadline(deadline); err != nil {
		return true, err
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
		return true, err
	}

	br := s.readers.Get().(*bufio.Reader)
	br.Reset(conn)
	_, err = br.Peek(1)
	if unanswered = err != nil; !unanswered {
		err = resp.ReadLimitBody(br, h.MaxResponseBodySize)
	}
	surplus := br.Buffered() > 0
	br.Reset(nil)
	s.readers.Put(br)
	if err != nil {
		return unanswered, err
	}

	// Bytes after the answer would be taken for the next one.
	if surplus || resp.ConnectionClose() || resp.StatusCode() < 200 || time.Since(conn.made) > maxConnAge {
		return false, nil
	}
	keep = true
	h.put(conn)
	return false, nil
}

func timedOut(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.As(err, &timeout) && timeout.Timeout()
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
	if r.err != nil {
		line = line.Str(zerolog.ErrorFieldName, shortened(r.err.Error())) // a certificate has the names that its server likes
	}
	line.Msg("callback")
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
