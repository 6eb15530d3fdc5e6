package server

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// awaitParked waits until n connections were parked.
func (s *site) awaitParked(n uint64) {
	s.t.Helper()
	for start := time.Now(); s.ln.parked.Load() < n; time.Sleep(time.Millisecond) {
		if time.Since(start) > patience {
			s.t.Fatalf("%d connections were parked, want %d", s.ln.parked.Load(), n)
		}
	}
}

// TestParkedConnectionIsServedAgain, and again on the fast path, whether the next
// request comes whole, in parts, or with others behind it.
func TestParkedConnectionIsServedAgain(t *testing.T) {
	t.Parallel()
	for name, site := range map[string]*site{"plain": newSite(t, nil), "TLS": newTLSSite(t, nil)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var c net.Conn
			var r *bufio.Reader
			if name == "TLS" {
				c, r = site.dialTLS()
			} else {
				c, r = site.dial()
			}
			ask := func(requests ...string) {
				t.Helper()
				for _, part := range requests {
					io.WriteString(c, part)
				}
				for range strings.Count(strings.Join(requests, ""), "GET ") {
					if resp, body, err := answer(r); err != nil || resp.StatusCode != 200 {
						t.Fatalf("%q: got %v %q, %v", requests, resp, body, err)
					}
				}
			}
			ask(get("id=1"))
			for i, next := range [][]string{{get("id=2"), get("id=3")}, {"G", get("id=4")[1:]}, {get("id=5") + get("id=6") + get("id=7")}, {get("id=8")}} {
				site.awaitParked(uint64(i + 1))
				ask(next...)
			}
			if n := site.cfg.Counter.Stats().Unique; n != 8 {
				t.Errorf("%d ids counted, want 8", n)
			}
		})
	}
}

// TestTLSConnectionThatEndsWithoutARequestIsNotAnswered, new or parked, nor counted as one
// that was refused: a request does not begin with the first byte of TLS.
func TestTLSConnectionThatEndsWithoutARequestIsNotAnswered(t *testing.T) {
	t.Parallel()
	s := newTLSSite(t, nil)
	for name, requests := range map[string]int{"new": 0, "parked": 1} {
		nc, r := s.dialTLS()
		c := nc.(*tls.Conn)
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		for range requests {
			io.WriteString(c, get("id=1"))
			answer(r)
			s.awaitParked(1)
		}
		c.CloseWrite()
		if b, err := io.ReadAll(r); err != nil || len(b) > 0 {
			t.Errorf("%s: got %q, %v, want the end", name, b, err)
		}
	}
	for _, refused := range s.otherRefusals() {
		if refused.Count > 0 {
			t.Errorf("%d are counted as %s", refused.Count, refused.Result)
		}
	}
}

// sweptConn is a socket that the sweeper looks at when its deadline is about to be cleared.
type sweptConn struct {
	*net.TCPConn
	c *conn
}

func (s *sweptConn) SetReadDeadline(t time.Time) error {
	if t.IsZero() {
		_, since := s.c.phase()
		s.c.sweep(since + 2*parkAfter)
	}
	return s.TCPConn.SetReadDeadline(t)
}

// TestConnectionIsParkedAgainWhereTheSweeperCameMeanwhile: it looks a second time at a
// connection that is being parked.
func TestConnectionIsParkedAgainWhereTheSweeperCameMeanwhile(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	client, r, there := socketPair(t)
	raw := &sweptConn{TCPConn: there}
	raw.c = &conn{Conn: raw, raw: raw, owner: s.ln}
	raw.c.socket, _ = raw.SyscallConn()
	s.ln.admit(raw.c)
	go s.attend(raw.c)
	for i := range 3 {
		io.WriteString(client, get(fmt.Sprint("id=", i)))
		if _, _, err := answer(r); err != nil {
			t.Fatal(err)
		}
		s.awaitParked(uint64(i + 1))
	}
}

// TestParkingLeavesTheIdleTimeoutAlone: it counts from the last answer.
func TestParkingLeavesTheIdleTimeoutAlone(t *testing.T) {
	t.Parallel()
	const idle = 10 * parkAfter
	s := newSite(t, func(c *Config) { c.IdleTimeout = idle })
	c, r := s.dial()
	io.WriteString(c, get("id=1"))
	answer(r)
	s.awaitIdle()
	since := func() (since time.Duration) {
		s.ln.mu.Lock()
		defer s.ln.mu.Unlock()
		for c := range s.ln.conns {
			_, since = c.phase()
		}
		return since
	}
	answered := since()
	s.awaitParked(1)
	if got := since(); got != answered {
		t.Errorf("parked, it counts from %v, want %v", got, answered)
	}
	if b, err := io.ReadAll(r); err != nil || len(b) > 0 {
		t.Errorf("got %q, %v", b, err)
	}
	if lasted := time.Duration(s.ln.now.Load()) - answered; lasted < idle {
		t.Errorf("ended after %v, want %v", lasted, idle)
	}
	if n := s.ln.idleClosed.Load(); n != 1 {
		t.Errorf("%d ended as idle, want 1", n)
	}
}

// TestStopEndsParkedConnections, those that never sent a request, and answers the
// request that arrives with the stop.
func TestStopEndsParkedConnections(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	silent, _ := s.dial()
	parked, r := s.dial()
	io.WriteString(parked, get("id=1"))
	answer(r)
	s.awaitParked(1)
	late, lateR := s.dial()
	io.WriteString(late, get("id=2"))
	answer(lateR)
	s.cfg.Counter.Seal()
	io.WriteString(late, get("id=3"))
	done := s.shutdown(patience)
	if resp, _, err := answer(lateR); err != nil || resp.StatusCode != 503 || !resp.Close {
		t.Errorf("the request that came with the stop: got %v, %v", resp, err)
	}
	for name, c := range map[string]net.Conn{"silent": silent, "parked": parked} {
		if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
			t.Errorf("%s: got %q, %v, want the end", name, b, err)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	<-s.closed
	if err := <-s.done; err != nil {
		t.Error(err)
	}
	if n := s.cfg.Counter.Stats().Unique; n != 2 {
		t.Errorf("%d counted, want 2", n)
	}
}

// TestRequestsTakeTurnsWithinMaxServed: many connections that are kept alive share a
// few places, and every request is answered.
func TestRequestsTakeTurnsWithinMaxServed(t *testing.T) {
	const conns, rounds, places = 40, 5, 2
	s := newSite(t, func(c *Config) { c.limits.MaxServed = places })
	var crowd sync.WaitGroup
	for i := range conns {
		c, r := s.dial()
		crowd.Go(func() {
			for k := range rounds {
				io.WriteString(c, get(fmt.Sprintf("id=%d-%d", i, k)))
				if resp, body, err := answer(r); err != nil || resp.StatusCode != 200 {
					t.Errorf("connection %d, request %d: got %v %q, %v", i, k, resp, body, err)
					return
				}
			}
		})
	}
	crowd.Wait()
	if n := s.cfg.Counter.Stats().Unique; n != conns*rounds {
		t.Errorf("%d counted, want %d", n, conns*rounds)
	}
	if s.ln.parked.Load() == 0 {
		t.Error("no connection gave its place to another")
	}
}

// TestHalfSentRequestsTakeNoMoreThanMaxServed: the others wait as long as a request
// may take, and are answered 503.
func TestHalfSentRequestsTakeNoMoreThanMaxServed(t *testing.T) {
	t.Parallel()
	const conns, places = 20, 4
	few := func(c *Config) { c.limits.MaxServed, c.SlowTimeout = places, seldomSlow }
	eachCrowded(t, few, func(t *testing.T, s *crowded) {
		var slow, busy int
		var writers []net.Conn
		var readers []*bufio.Reader
		for i := range conns {
			c, r := s.dial()
			io.WriteString(c, get(fmt.Sprint("id=whole-", i)))
			if resp, body, err := answer(r); err != nil || resp.StatusCode != 200 {
				t.Fatalf("got %v %q, %v", resp, body, err)
			}
			writers, readers = append(writers, c), append(readers, r)
		}
		for _, c := range writers {
			io.WriteString(c, "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\n")
		}
		for _, r := range readers {
			switch resp, _, err := answer(r); {
			case err != nil:
				t.Error(err)
			case resp.StatusCode == 408:
				slow++
			case resp.StatusCode == 503 && resp.Header.Get("Retry-After") != "" && resp.Close:
				busy++
			default:
				t.Errorf("got %v", resp)
			}
		}
		if slow < places || slow+busy != conns || busy == 0 {
			t.Errorf("%d answered 408, %d 503, want %d or more, and the rest", slow, busy, places)
		}
		c, r := s.dial()
		io.WriteString(c, get("id=2"))
		if resp, body, err := answer(r); err != nil || resp.StatusCode != 200 {
			t.Errorf("afterwards: got %v %q, %v", resp, body, err)
		}
	})
}
