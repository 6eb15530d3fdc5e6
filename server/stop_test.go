package server

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/valyala/fasthttp"

	"verve/counter"
	"verve/dedup"
)

// flood has a client send plain requests and not read until the server is blocked
// in a write.
func (s *site) flood(c net.Conn) {
	s.t.Helper()
	io.WriteString(c, get("id=first")) // for its tail
	var b [512]byte
	n, err := c.Read(b[:])
	if err != nil || !strings.HasSuffix(string(b[:n]), "ok") {
		s.t.Fatalf("%q, %v", b[:n], err)
	}
	blocked := func() bool {
		s.ln.mu.Lock()
		defer s.ln.mu.Unlock()
		for c := range s.ln.conns {
			if p, _ := c.phase(); p != phaseWriting {
				return false
			}
		}
		return true
	}
	for i := 0; ; i += 100 {
		var burst strings.Builder
		for k := range 100 {
			burst.WriteString(get(fmt.Sprint("id=", i+k)))
		}
		if _, err := io.WriteString(c, burst.String()); err != nil {
			s.t.Fatal(err)
		}
		for start := time.Now(); s.cfg.Counter.Stats().Unique < uint64(i+101); time.Sleep(50 * time.Microsecond) {
			if !blocked() {
				start = time.Now()
			}
			if time.Since(start) > time.Second {
				return
			}
		}
	}
}

// shutdown is the stop with a budget for the server.
func (s *site) shutdown(budget time.Duration) <-chan error {
	s.stopped = true
	s.cfg.Counter.Seal()
	done := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), budget)
		defer cancel()
		done <- s.Shutdown(ctx)
	}()
	return done
}

// TestStopWaitsForAClientThatReadsLate: answers that the client takes only after
// the grace, and within the stop's time, are all there.
func TestStopWaitsForAClientThatReadsLate(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.(*net.TCPConn).SetReadBuffer(64 << 10)
	s.flood(c)
	done := s.shutdown(patience)
	time.Sleep(answerGrace + 300*time.Millisecond) // the lateness under test
	c.SetDeadline(time.Now().Add(patience))
	got, err := io.ReadAll(c)
	if err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	told := strings.Count(string(got), "HTTP/1.1 200") + 1
	if n := s.cfg.Counter.Stats().Unique; uint64(told) != n {
		t.Errorf("%d counted, %d told ok", n, told)
	}
}

// TestStopKeepsItsTimeBesideATLSClientThatDoesNotRead, whose connection cannot be
// closed in order while a write holds it.
func TestStopKeepsItsTimeBesideATLSClientThatDoesNotRead(t *testing.T) {
	t.Parallel()
	files := newKeyFiles(t)
	cert, key := newKeyPair(t, "verve.test")
	files.replace(files.cert, cert)
	files.replace(files.key, key)
	s := newSite(t, func(c *Config) {
		c.TLS = files.load(zerolog.Nop())
		c.SlowTimeout = 10 * patience
	})
	raw, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	raw.(*net.TCPConn).SetReadBuffer(64 << 10)
	s.flood(tls.Client(raw, &tls.Config{InsecureSkipVerify: true}))
	const budget = answerGrace + 500*time.Millisecond
	began := time.Now()
	if err := <-s.shutdown(budget); err == nil {
		t.Error("a client that does not read was waited for in vain, and the stop does not say so")
	}
	if took := time.Since(began); took > budget+patience {
		t.Errorf("with %v for it the stop took %v", budget, took)
	}
	raw.Close()
	<-s.closed
	<-s.done
}

// TestStopAcceptingWaitsForFirstRequests: a client that has connected and is slow to send
// is answered. One that is between two requests has less time, and is not waited for.
func TestStopAcceptingWaitsForFirstRequests(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	s.firstRequest = patience
	idle, idleR := s.dial()
	io.WriteString(idle, get("id=1"))
	if resp, _, err := answer(idleR); err != nil || resp.StatusCode != 200 {
		t.Fatal(resp, err)
	}
	c, r := s.dial()
	eventually(t, "both are accepted", func() bool { return s.ln.open() == 2 })
	s.LastAnswers()
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.StopAccepting(t.Context())
	}()
	select {
	case <-stopped:
		t.Error("the first request is not waited for")
	case <-time.After(2 * nextRequestGrace): // the slowness under test
	}
	io.WriteString(c, get("id=2"))
	if resp, _, err := answer(r); err != nil || resp.StatusCode != 200 || !resp.Close {
		t.Errorf("got %v, %v", resp, err)
	}
	<-stopped
	if s.ln.open() == 0 {
		t.Error("the idle connection was waited for")
	}
}

// TestStopEndsNoRequestThatWaitsForAPlace: the deadline of the stop is for connections
// without a request. One that begins before it, and waits for a place until it has passed, is
// answered.
func TestStopEndsNoRequestThatWaitsForAPlace(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.limits.MaxServed = 1 })
	s.ln.served <- struct{}{} // the only place
	c, r := s.dial()
	eventually(t, "the connection is accepted", func() bool { return s.ln.open() == 1 })
	s.ln.stopping.Store(true)
	io.WriteString(c, get("id=1"))
	eventually(t, "it waits for a place", func() bool { return s.ln.waiting.Load() == 1 })
	s.ln.mu.Lock()
	for c := range s.ln.conns {
		_ = c.raw.SetReadDeadline(time.Now()) // that of the stop has passed
	}
	s.ln.mu.Unlock()
	<-s.ln.served
	if resp, body, err := answer(r); err != nil || resp.StatusCode != 200 {
		t.Errorf("got %v %q, %v", resp, body, err)
	}
}

// looking has a look before each add.
type looking struct {
	dedup.Set
	look func()
}

func (l *looking) AddMany(e *counter.Epoch, items []dedup.Item, verdicts []dedup.Verdict) error {
	l.look()
	return l.Set.AddMany(e, items, verdicts)
}

// TestConnectionIsBusyUntilItsAnswersAreWritten, and not only up to the first
// write: fasthttp's buffer is full before the last of these is answered.
func TestConnectionIsBusyUntilItsAnswersAreWritten(t *testing.T) {
	l := &looking{}
	s := newSite(t, func(c *Config) { l.Set, c.Set = c.Set, l })
	idle := 0
	l.look = func() {
		if s.ln.busy() == 0 {
			idle++
		}
	}
	c, r := s.dial()
	for i := range 100 {
		io.WriteString(c, get(fmt.Sprint("id=", i)))
	}
	for range 100 {
		if _, _, err := answer(r); err != nil {
			t.Fatal(err)
		}
	}
	if idle > 0 {
		t.Errorf("taken for idle before %d of 100 requests, with answers not written", idle)
	}
	s.awaitIdle()
}

// TestStopBetweenTwoPipelinedRequests comes when fasthttp has answered one, and
// neither written the answer nor begun with the next.
func TestStopBetweenTwoPipelinedRequests(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server, err := New(s.cfg, ln) // before it serves
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	ended := make(chan error, 2) // of Shutdown and Serve
	server.http.ConnState = func(nc net.Conn, state fasthttp.ConnState) {
		connState(nc, state)
		if state != fasthttp.StateIdle {
			return
		}
		if n++; n == 60 {
			s.cfg.Counter.Seal()
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				ended <- server.Shutdown(ctx)
			}()
			time.Sleep(300 * time.Millisecond) // off its core
		}
	}
	go func() { ended <- server.Serve() }()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	var burst strings.Builder
	for i := range 100 {
		burst.WriteString(get(fmt.Sprint("id=", i)))
	}
	io.WriteString(c, burst.String())
	got, err := io.ReadAll(c)
	if err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	if told, n := strings.Count(string(got), "HTTP/1.1 200"), s.cfg.Counter.Stats().Unique; uint64(told) != n {
		t.Errorf("%d counted, %d told ok", n, told)
	}
}
