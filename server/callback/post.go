package callback

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"github.com/valyala/fasthttp"
)

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
	resultLimited // its address is at its limits
)

var resultNames = [...]string{"delivered", "status", "redirect", "timeout", "resolve", "connect", "refused", "answer", "cut", "limited"}

func (k resultKind) counter(s *Stats) *uint64 {
	return [...]*uint64{
		&s.Delivered, &s.FailedStatus, &s.FailedRedirect, &s.FailedTimeout, &s.FailedResolve,
		&s.FailedConnect, &s.FailedRefused, &s.FailedAnswer, &s.Dropped, &s.FailedLimited,
	}[k]
}

type result struct {
	kind   resultKind
	status int // of the answer, if there was one
	err    error
	took   time.Duration
}

var (
	errNotTried  = errors.New("not tried") // or cut off by the stop: excluded by the breaker
	errUnhealthy = errors.New("unhealthy destination")
)

// breakerErr is what the breaker gets. A destination that answers counts as up, unless its
// answer says otherwise.
func (r result) breakerErr() error {
	switch {
	case r.kind == resultCut, r.kind == resultLimited:
		return errNotTried
	case r.kind == resultDelivered, r.kind == resultRedirect,
		r.kind == resultStatus && r.status < 500 && r.status != fasthttp.StatusTooManyRequests:
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
	err := j.client.DoTimeout(req, resp, s.cfg.Timeout)
	r := result{err: err, took: time.Since(start)}
	// The error first: a failed call leaves a status of 200 behind.
	if err != nil {
		r.kind = classify(err)
		if s.exchanges.Err() != nil {
			r.kind = resultCut
		}
		return r
	}
	r.status = resp.StatusCode()
	switch r.status / 100 {
	case 2:
		r.kind = resultDelivered
	case 3:
		r.kind = resultRedirect
	default: // 101 too: another protocol was not requested
		r.kind = resultStatus
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
	case errors.Is(err, errLimited):
		return resultLimited
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
// HostClient starts a goroutine that cleans its pool, for each destination. Here
// trim does that for all.
type client struct {
	fasthttp.HostClient
	sender  *Sender
	dest    *destination
	connect dialFunc

	mu   sync.Mutex
	idle []*pooled // the one used last is at the end; guarded by mu
}

// pooled is a connection of a client.
type pooled struct {
	net.Conn
	made time.Time
	used bool // by an exchange before: its peer may have closed it meanwhile
}

func (s *Sender) newClient(d *destination) *client {
	h := &client{sender: s, dest: d, connect: s.limitedDial(d)}
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
		// RoundTrip asks for a retry on a dead idle connection only. The others
		// are as old: the peer restarted, most likely.
		h.closeIdle()
		s.retried.Add(1)
		return false, true
	}
	return h
}

// get returns the idle connection that was used last, or dials. TLS is done by
// the dial, within the time of the exchange.
func (h *client) get(timeout time.Duration) (*pooled, error) {
	h.mu.Lock()
	if n := len(h.idle); n > 0 {
		conn := h.idle[n-1]
		h.idle[n-1] = nil
		h.idle = h.idle[:n-1]
		h.mu.Unlock()
		return conn, nil
	}
	h.mu.Unlock()
	ctx, cancel := context.WithTimeout(h.sender.exchanges, timeout)
	defer cancel()
	conn, err := h.sender.guard.dial(ctx, h.dest, h.connect)
	if err != nil {
		return nil, dialError{err}
	}
	return &pooled{Conn: conn, made: time.Now()}, nil
}

func (h *client) put(conn *pooled) {
	conn.used = true
	h.mu.Lock()
	defer h.mu.Unlock()
	h.idle = append(h.idle, conn)
}

func (h *client) idleConns() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.idle)
}

func (h *client) closeIdle() {
	h.mu.Lock()
	idle := h.idle
	h.idle = nil
	h.mu.Unlock()
	for _, conn := range idle {
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
	counted := addressConnOf(conn.Conn)
	if counted != nil {
		if err := counted.acquire(); err != nil {
			h.put(conn)
			return false, err
		}
	}
	keep := false
	defer func() {
		if !keep {
			_ = conn.Close()
		}
	}()
	// One deadline for all: a peer that drips bytes gains no time by it.
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

	// What follows an answer unasked would be taken for the next one.
	if surplus || resp.ConnectionClose() || resp.StatusCode() < 200 || time.Since(conn.made) > maxConnAge {
		return false, nil
	}
	if counted != nil {
		counted.release() // before another POST may use it
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
	if r.kind == resultDelivered {
		sampler, level = &s.okLog, zerolog.InfoLevel
	}
	hidden, ok := sampler.Allow(time.Now())
	if !ok {
		return
	}
	line := s.cfg.Log.WithLevel(level).Str("url", ep.logURL()).Str("result", resultNames[r.kind]).Dur("took_ms", r.took)
	if r.status != 0 {
		line = line.Int("status", r.status)
	}
	if hidden > 0 {
		line = line.Uint64("hidden", hidden)
	}
	line.Err(r.err).Msg("callback")
}

// logHidden says how many results were not logged, when none follows to say it.
func (s *Sender) logHidden() {
	if n := s.okLog.TakeHidden(); n > 0 {
		s.cfg.Log.Info().Uint64("hidden", n).Str("result", "delivered").Msg("callback results not logged")
	}
	if n := s.failLog.TakeHidden(); n > 0 {
		s.cfg.Log.Warn().Uint64("hidden", n).Str("result", "failed").Msg("callback results not logged")
	}
}
