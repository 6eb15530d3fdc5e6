package server

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// crowded is a site with fewer places than it has clients, and how they reach it.
type crowded struct {
	*site
	dial func() (net.Conn, *bufio.Reader)
}

// eachCrowded runs a test without TLS and with it.
func eachCrowded(t *testing.T, change func(*Config), test func(*testing.T, *crowded)) {
	t.Run("plain", func(t *testing.T) {
		t.Parallel()
		s := newSite(t, change)
		test(t, &crowded{s, s.dial})
	})
	t.Run("TLS", func(t *testing.T) {
		t.Parallel()
		s := newTLSSite(t, change)
		test(t, &crowded{s, func() (net.Conn, *bufio.Reader) {
			raw, _ := s.dial()
			trusting := s.trusting()
			trusting.DynamicRecordSizingDisabled = true // many requests in one record
			c := tls.Client(raw, trusting)
			return c, bufio.NewReader(c)
		}})
	})
}

// sweepOften does the sweeper's work all the time, so that its interrupts meet each
// step of a connection. To it each phase has lasted longer by idle.
func (s *site) sweepOften(idle time.Duration) {
	done := make(chan struct{})
	var sweeping sync.WaitGroup
	sweeping.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			s.sweepAll(time.Duration(s.ln.now.Load()) + idle)
			time.Sleep(100 * time.Microsecond) // leaves the cores to the server
		}
	})
	s.t.Cleanup(func() {
		close(done)
		sweeping.Wait()
	})
}

func (s *site) sweepAll(now time.Duration) {
	s.ln.mu.Lock()
	defer s.ln.mu.Unlock()
	for c := range s.ln.conns {
		c.sweep(now)
	}
}

// awaitBusy waits until n connections have a request, one of which has the only place,
// and the others wait for it.
func (s *site) awaitBusy(n int) {
	s.t.Helper()
	for start := time.Now(); s.ln.busy() != n || int(s.ln.waiting.Load()) != n-1 || len(s.ln.served) != 1; time.Sleep(time.Millisecond) {
		if time.Since(start) > patience {
			s.t.Fatalf("%d connections have a request, %d have a place and %d wait for it, want %d, 1 and %d",
				s.ln.busy(), len(s.ln.served), s.ln.waiting.Load(), n, n-1)
		}
	}
}

// awaitIdle waits until no connection has a request. A client can have the last answer
// before.
func (s *site) awaitIdle() {
	s.t.Helper()
	for start := time.Now(); s.ln.busy() != 0; time.Sleep(time.Millisecond) {
		if time.Since(start) > patience {
			s.t.Fatalf("%d connections have a request, want none", s.ln.busy())
		}
	}
}

// member is one client of a crowd. It sends each id once or, at random, twice in a row,
// so that the statuses show the order of the answers. Its requests have 64 bytes, so
// that they end where a buffer does.
type member struct {
	number int
	rng    *rand.Rand
	next   int
	wants  []int // statuses of the batch under way
	parts  bool  // of which it is sent in two
	ok     uint64
}

func (m *member) batch(requests int) string {
	var b strings.Builder
	for m.wants = m.wants[:0]; len(m.wants) < requests; {
		request := get(fmt.Sprintf("id=%08d-%08d", m.number, m.next))
		m.next++
		b.WriteString(request)
		m.wants = append(m.wants, 200)
		if len(m.wants) < requests && m.rng.IntN(2) == 0 {
			b.WriteString(request)
			m.wants = append(m.wants, 409)
		}
	}
	return b.String()
}

// send sends a batch, sometimes in two parts.
func (m *member) send(w io.Writer, requests int) error {
	all := m.batch(requests)
	cut := len(all)
	if m.rng.IntN(3) == 0 {
		cut = m.rng.IntN(len(all))
	}
	m.parts = cut < len(all)
	if _, err := io.WriteString(w, all[:cut]); err != nil || !m.parts {
		return err
	}
	time.Sleep(time.Duration(m.rng.IntN(1000)) * time.Microsecond) // the second part is late
	_, err := io.WriteString(w, all[cut:])
	return err
}

// ask sends a batch and reads its answers.
func (m *member) ask(c net.Conn, r *bufio.Reader, requests int) error {
	_ = c.SetDeadline(time.Now().Add(patience)) // each batch has that time; fails where the write does
	if err := m.send(c, requests); err != nil {
		return err
	}
	for i, want := range m.wants {
		resp, body, err := answer(r)
		if err != nil {
			return fmt.Errorf("answer %d of %d: %w", i, len(m.wants), err)
		}
		if resp.StatusCode == 200 {
			m.ok++
		}
		if resp.StatusCode != want {
			return fmt.Errorf("answer %d of %d: got %d %q, want %d", i, len(m.wants), resp.StatusCode, body, want)
		}
	}
	return nil
}

// crowd has n clients work at the same time, and returns how many answers were 200.
func (s *site) crowd(n int, work func(m *member) error) uint64 {
	var all sync.WaitGroup
	var ok atomic.Uint64
	for i := range n {
		all.Go(func() {
			m := &member{number: i, rng: rand.New(rand.NewPCG(1, uint64(i)))}
			if err := work(m); err != nil {
				s.t.Errorf("client %d: %v", i, err)
			}
			ok.Add(m.ok)
		})
	}
	all.Wait()
	return ok.Load()
}

// wantRecord stops the server and compares what it has published with the answers.
func (s *site) wantRecord(ok uint64) {
	s.t.Helper()
	s.stop()
	if n := s.records.sum(); n != ok {
		s.t.Errorf("the record has %d ids, %d answers were ok", n, ok)
	}
}

// TestEveryPipelinedRequestIsAnsweredWhereConnectionsShareFewPlaces: once, in order, on
// a connection that stays open.
func TestEveryPipelinedRequestIsAnsweredWhereConnectionsShareFewPlaces(t *testing.T) {
	t.Parallel()
	const clients, places, rounds, most = 16, 3, 12, 200
	few := func(c *Config) { c.limits.MaxServed = places }
	eachCrowded(t, few, func(t *testing.T, s *crowded) {
		s.sweepOften(0)
		s.wantRecord(s.crowd(clients, func(m *member) error {
			c, r := s.dial()
			for range rounds {
				if err := m.ask(c, r, 1+m.rng.IntN(most)); err != nil {
					return err
				}
			}
			return nil
		}))
		if s.ln.parked.Load() == 0 {
			t.Error("no connection gave its place to another")
		}
	})
}

// TestShortConnectionsAreAnsweredBesideFewPlaces, among others that stay.
func TestShortConnectionsAreAnsweredBesideFewPlaces(t *testing.T) {
	t.Parallel()
	const clients, places, rounds = 12, 2, 15
	few := func(c *Config) { c.limits.MaxServed = places }
	eachCrowded(t, few, func(t *testing.T, s *crowded) {
		s.sweepOften(0)
		s.wantRecord(s.crowd(clients, func(m *member) error {
			c, r := s.dial()
			for range rounds {
				if err := m.ask(c, r, 1+m.rng.IntN(20)); err != nil {
					return err
				}
				if m.number%3 > 0 {
					c.Close()
					c, r = s.dial()
				}
			}
			return nil
		}))
	})
}

// TestStopAnswersWhatItCountedWhileConnectionsWaitForAPlace, and refuses the rest.
func TestStopAnswersWhatItCountedWhileConnectionsWaitForAPlace(t *testing.T) {
	t.Parallel()
	const clients, places = 16, 3
	few := func(c *Config) { c.limits.MaxServed = places }
	eachCrowded(t, few, func(t *testing.T, s *crowded) {
		s.sweepOften(0)
		stopped := make(chan struct{})
		var dialled sync.WaitGroup
		dialled.Add(clients)
		go func() {
			defer close(stopped)
			dialled.Wait()
			for s.ln.waiting.Load() < places || s.cfg.Counter.Stats().Unique < 20*clients {
				time.Sleep(time.Millisecond)
			}
			s.stop()
		}()
		ok := s.crowd(clients, func(m *member) error {
			c, r := s.dial()
			dialled.Done()
			for {
				if m.send(c, 32) != nil {
					return nil
				}
				for i, want := range m.wants {
					resp, body, err := answer(r)
					switch {
					case err == nil && resp.StatusCode == want:
						m.ok += uint64((409 - want) / (409 - 200))
					case err != nil && i == 0, err == nil && resp.Close && (resp.StatusCode == 503 || resp.StatusCode == 408 && m.parts):
						return nil // the end, before the batch or within it, or of a request whose rest came too late for the stop
					default:
						return fmt.Errorf("answer %d of %d: got %v %q, %v, want %d or a refusal that is the last", i, len(m.wants), resp, body, err, want)
					}
				}
			}
		})
		<-stopped
		if n := s.records.sum(); n != ok {
			t.Errorf("the record has %d ids, %d answers were ok", n, ok)
		}
	})
}

// inPieces sends text in pieces of random length, some with a pause before the next.
func (m *member) inPieces(w io.Writer, rng *rand.Rand, text string) error {
	for len(text) > 0 {
		n := len(text)
		switch rng.IntN(4) {
		case 0:
			n = 1 + rng.IntN(3)
		case 1:
			n = 1 + rng.IntN(130)
		case 2: // a full buffer, or almost
			n = readBuffer - 1 + rng.IntN(3)
		}
		n = min(n, len(text))
		if _, err := io.WriteString(w, text[:n]); err != nil {
			return err
		}
		text = text[n:]
		if rng.IntN(8) == 0 {
			time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
		}
	}
	return nil
}

// mixed is a batch with requests between the others that the fast path does not answer.
func (m *member) mixed(requests int) string {
	var b strings.Builder
	var wants []int
	for range 1 + m.rng.IntN(3) {
		b.WriteString(m.batch(requests))
		wants = append(wants, m.wants...)
		switch m.rng.IntN(3) {
		case 0:
			b.WriteString("GET /elsewhere HTTP/1.1\r\nHost: x\r\n\r\n")
			wants = append(wants, 404)
		case 1:
			id := fmt.Sprintf("%08d-%08d", m.number, m.next)
			m.next++
			fmt.Fprintf(&b, "POST /api/verve/accept HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s", len(id), id)
			wants = append(wants, 200)
		}
	}
	m.wants = wants
	return b.String()
}

// How a client ends a connection.
const (
	closes        = iota // when it has its answers
	closesItsSide        // behind its last bytes
	resets
	ways
)

// connection sends so many batches on c, and ends it in one of the ways. open is how many
// ids without an answer may be counted.
func (m *member) connection(c net.Conn, r *bufio.Reader, rounds, way int) (open uint64, err error) {
	defer c.Close()
	for round := range rounds {
		text, last := m.mixed(1+m.rng.IntN(1+m.rng.IntN(150))), round == rounds-1
		rng := rand.New(rand.NewPCG(m.rng.Uint64(), 0))
		sent := make(chan error, 1)
		go func() {
			err := m.inPieces(c, rng, text)
			if err == nil && last && way == closesItsSide {
				err = c.(interface{ CloseWrite() error }).CloseWrite()
			}
			sent <- err
		}()
		ends := len(m.wants)
		if last && way == resets {
			ends = m.rng.IntN(ends)
		}
		for i, want := range m.wants[:ends] {
			resp, body, err := answer(r)
			if err == nil && resp.StatusCode != want {
				err = fmt.Errorf("got %d %q, want %d", resp.StatusCode, body, want)
			}
			if err != nil {
				c.Close()
				<-sent
				return countNew(m.wants[i:]), fmt.Errorf("answer %d of %d: %w", i, len(m.wants), err)
			}
			m.ok += countNew(m.wants[i : i+1])
		}
		if last && way == resets {
			raw := c
			if secure, ok := c.(*tls.Conn); ok {
				raw = secure.NetConn()
			}
			_ = raw.(*net.TCPConn).SetLinger(0) // else it is closed
			raw.Close()
			<-sent
			return countNew(m.wants[ends:]), nil
		}
		if err := <-sent; err != nil {
			return 0, err
		}
	}
	if way == closesItsSide {
		if rest, err := io.ReadAll(r); err != nil || len(rest) > 0 {
			return 0, fmt.Errorf("behind the last answer: got %q, %v, want the end", rest, err)
		}
	}
	return 0, nil
}

// countNew is how many of the answers are for an id that is counted.
func countNew(wants []int) (n uint64) {
	for _, want := range wants {
		if want == 200 {
			n++
		}
	}
	return n
}

// TestClientsAreAnsweredHoweverTheySendAndEnd, while their connections are parked all the
// time, and until the server stops: each gets its answers and nothing else, and then the end.
func TestClientsAreAnsweredHoweverTheySendAndEnd(t *testing.T) {
	t.Parallel()
	const clients, connections = 12, 20
	for places, name := range map[int]string{3: "few places", clients: "a place for each"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachCrowded(t, func(c *Config) { c.limits.MaxServed = places }, func(t *testing.T, s *crowded) {
				s.sweepOften(2 * parkAfter)
				var dialled sync.WaitGroup
				dialled.Add(clients)
				stopped := make(chan struct{})
				go func() {
					defer close(stopped)
					dialled.Wait()
					s.stop()
				}()
				var open atomic.Uint64
				ok := s.crowd(clients, func(m *member) error {
					for range connections {
						c, r := s.dial()
						without, err := m.connection(c, r, 1+m.rng.IntN(6), m.rng.IntN(ways))
						open.Add(without)
						if err != nil {
							dialled.Done()
							return err
						}
					}
					c, r := s.dial()
					dialled.Done()
					without, _ := m.connection(c, r, math.MaxInt, closes) // ends with the stop
					open.Add(without)
					return nil
				})
				<-stopped
				if n := s.records.sum(); n < ok || n > ok+open.Load() {
					t.Errorf("the record has %d ids, %d answers were ok and %d have none", n, ok, open.Load())
				}
			})
		})
	}
}

// TestPlacesAreGivenInTurn: a client that goes on at once does not get the only place
// again before those that wait for it.
func TestPlacesAreGivenInTurn(t *testing.T) {
	const waiting = 4
	eachCrowded(t, func(c *Config) { c.limits.MaxServed = 1 }, func(t *testing.T, s *crowded) {
		want200 := func(who string, r *bufio.Reader) {
			t.Helper()
			if resp, body, err := answer(r); err != nil || resp.StatusCode != 200 {
				t.Fatalf("%s: got %v %q, %v", who, resp, body, err)
			}
		}
		first, firstR := s.dial()
		io.WriteString(first, get("id=1"))
		want200("the first", firstR)
		s.awaitIdle() // else what is read before the next request is for the one above
		again := get("id=2")
		io.WriteString(first, again[:20]) // holds the place
		s.awaitBusy(1)
		var others []*bufio.Reader
		for i := range waiting {
			c, r := s.dial()
			go io.WriteString(c, get(fmt.Sprint("id=other-", i))) // a handshake waits for the place
			s.awaitBusy(i + 2)
			others = append(others, r)
		}
		io.WriteString(first, again[20:])
		want200("the first, again", firstR)
		last := get("id=3")
		io.WriteString(first, last[:20]) // would hold it again
		for i, r := range others {
			want200(fmt.Sprint("the one that waited, ", i), r)
		}
		io.WriteString(first, last[20:])
		want200("the first, at last", firstR)
	})
}

// TestWaitingForAPlaceIsNotTheClientsTime: the time for a request to arrive begins with
// the place.
func TestWaitingForAPlaceIsNotTheClientsTime(t *testing.T) {
	s := newSite(t, func(c *Config) { c.limits.MaxServed = 1 })
	holder, holderR := s.dial()
	request := get("id=1")
	io.WriteString(holder, request[:20])
	s.awaitBusy(1)
	c, r := s.dial()
	io.WriteString(c, get("id=2"))
	s.awaitBusy(2)
	s.ln.mu.Lock()
	for c := range s.ln.conns {
		if p, _ := c.phase(); p == phaseQueued {
			c.sweep(10 * patience)
		}
	}
	s.ln.mu.Unlock()
	io.WriteString(holder, request[20:])
	for name, r := range map[string]*bufio.Reader{"the one with the place": holderR, "the one that waited": r} {
		if resp, body, err := answer(r); err != nil || resp.StatusCode != 200 {
			t.Errorf("%s: got %v %q, %v", name, resp, body, err)
		}
	}
}
