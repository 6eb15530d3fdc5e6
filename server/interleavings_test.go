//go:build interleavings

package server

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/valyala/fasthttp"

	"verve/counter"
	"verve/dedup"
	"verve/internal/epochtest"
	"verve/internal/explore"
	"verve/internal/explore/atomic"
	"verve/server/callback"
)

const plainRequest = plainStart + "1" + plainProtocol + "\r\n"

// socket is one end of a connection. A deadline in the future is taken as one that
// passes at once, as it may.
type socket struct {
	net.Conn
	sent    atomic.Int64 // parts of requests that the client has sent and nobody has read
	first   int          // bytes of the first part of a request; 0: it comes whole
	part    int          // bytes of the first request that were read
	begun   bool         // it has begun, and more of it is waited for
	late    atomic.Bool  // the deadline of reads is over
	closed  atomic.Bool
	ends    int64 // requests after which the client closes its end; 0: it does not
	read    int64
	answers int
	lost    int // answers written after Close

	unread bool        // the client does not read: a write waits until Close
	full   atomic.Bool // one does
}

func (s *socket) Read(p []byte) (int, error) {
	for s.begun = s.part > 1; ; { // await reads one byte
		if s.closed.Load() {
			return 0, net.ErrClosed
		}
		if s.late.Load() {
			return 0, os.ErrDeadlineExceeded
		}
		if n := s.sent.Load(); n > 0 {
			end := len(plainRequest)
			if s.part < s.first {
				end = s.first
			}
			n := copy(p, plainRequest[s.part:end])
			if s.part += n; s.part == end {
				s.sent.Add(-1)
			}
			if s.part == len(plainRequest) {
				s.part = 0
				s.read++
			}
			return n, nil
		}
		if s.ends > 0 && s.read == s.ends {
			return 0, io.EOF
		}
		explore.Wait()
	}
}

func (s *socket) Write(p []byte) (int, error) {
	if s.unread {
		for s.full.Store(true); !s.closed.Load(); {
			explore.Wait()
		}
	}
	if s.closed.Load() {
		s.lost++
		return 0, net.ErrClosed
	}
	s.answers++
	return len(p), nil
}

func (s *socket) SetReadDeadline(t time.Time) error { s.late.Store(!t.IsZero()); return nil }
func (s *socket) Close() error                      { s.closed.Store(true); return nil }

// allNew is a set to which every id is new.
type allNew struct{ dedup.Set }

func (allNew) Open(*counter.Epoch) counter.State { return nil }
func (allNew) Keys([]dedup.Item)                 {}
func (allNew) AddMany(_ *counter.Epoch, items []dedup.Item, verdicts []dedup.Verdict) error {
	for i := range items {
		verdicts[i] = dedup.Unique
	}
	return nil
}
func (allNew) Publish(context.Context, counter.Count) error { return nil }

// noListener has no connection to accept.
type noListener struct{ net.Listener }

func (noListener) Close() error { return nil }

// scene is a server with one connection, which has had a plain request.
type scene struct {
	s    *Server
	c    *conn
	sock *socket

	refused int  // requests answered 503
	begun   bool // a request had begun when the server was to stop
}

func newScene() *scene {
	count, err := counter.New(counter.Config{Window: epochtest.Window, Store: allNew{}, Publisher: allNew{}})
	if err != nil {
		panic(err)
	}
	cfg := Config{Counter: count, Set: allNew{}, Log: zerolog.Nop(), limits: Limits{MaxConns: 1, MaxServed: 1}, SlowTimeout: time.Hour, IdleTimeout: time.Hour}
	k := &scene{s: &Server{cfg: cfg}, sock: new(socket)}
	k.s.ln = newListener(noListener{}, &k.s.cfg)
	k.s.ln.fast = newFastPath(k.s)
	k.c = &conn{Conn: k.sock, raw: k.sock, owner: k.s.ln}
	k.s.ln.admit(k.c)
	k.c.tail = tail{bytes: []byte(plainProtocol + "\r\n")}
	k.c.between = true
	return k
}

// serves adds the thread that serves the connection, as attend and fasthttp do.
func (k *scene) serves(r *explore.Run) {
	r.Go("serving", func() {
		for {
			k.c.inside.Store(true)
			k.serve()
			_ = k.c.Close()
			k.c.inside.Store(false)
			if !k.c.parking.Swap(false) {
				return
			}
			if k.c.await() != nil {
				_ = k.c.Close()
				return
			}
		}
	})
}

// serve is fasthttp's work on the connection: its reads, and the requests that it
// gets there.
func (k *scene) serve() {
	buffer := make([]byte, readBuffer)
	for have := 0; ; {
		n, err := k.c.Read(buffer[have:])
		if err != nil {
			return
		}
		if have += n; have < len(plainRequest) {
			continue
		}
		have = 0
		k.c.between = false
		in, open := k.s.cfg.Counter.Enter(0, 0, 1)
		if open {
			in.Leave(1, 0, 0)
		} else {
			k.refused++
		}
		last := !open || k.s.lastAnswers.Load()
		if _, err := k.c.Write([]byte("answer")); err != nil || last {
			return
		}
		k.c.tail = tail{bytes: []byte(plainProtocol + "\r\n")} // learnt
		k.c.between = true
	}
}

// sends adds a client that sends n requests, or parts of them, one after the other.
func (k *scene) sends(r *explore.Run, n int) {
	r.Go("client", func() {
		for range n {
			k.sock.sent.Add(1)
		}
	})
}

// stops adds the stop of the server, as main and Shutdown do it; with patience if
// answerGrace is long enough for all answers.
func (k *scene) stops(r *explore.Run, patience bool) {
	r.Go("stop", func() {
		k.s.LastAnswers()
		k.begun = k.sock.begun
		k.s.cfg.Counter.Seal()
		for patience && k.s.ln.busy() > 0 {
			explore.Wait()
		}
		k.s.ln.stopAccepting()
	})
}

// sweeps adds so many looks of the sweeper, each long after the last.
func (k *scene) sweeps(r *explore.Run, looks int) {
	r.Go("sweeper", func() {
		for n := range looks {
			now := time.Duration(n+1) * 2 * parkAfter
			k.c.sweep(now)
		}
	})
}

// check holds what was counted against the answers.
func (k *scene) check(ended bool) error {
	counted := int(k.s.cfg.Counter.Stats().Unique)
	if k.sock.lost > 0 && counted > k.sock.answers-k.refused {
		return fmt.Errorf("%d ids are counted, %d answered: the connection was closed before", counted, k.sock.answers-k.refused)
	}
	if counted != k.sock.answers-k.refused {
		return fmt.Errorf("%d ids are counted, %d answered", counted, k.sock.answers-k.refused)
	}
	if k.begun && k.sock.answers == 0 {
		return fmt.Errorf("a request that had begun before the stop was not answered")
	}
	if k.c.nudged.Load() && !k.sock.late.Load() {
		return fmt.Errorf("a nudge has lost its deadline: the connection is never parked again")
	}
	if ended && (!k.sock.closed.Load() || k.s.ln.open() != 0) {
		return fmt.Errorf("the connection is open after the stop: closed %v, %d in the list", k.sock.closed.Load(), k.s.ln.open())
	}
	return nil
}

// TestInterleavingsOfTheStop: a plain request comes while the server stops.
func TestInterleavingsOfTheStop(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, 3, explore.All), func(r *explore.Run) {
		k := newScene()
		k.serves(r)
		k.sends(r, 1)
		k.stops(r, true)
		r.Check(func() error { return k.check(true) })
	})
}

// TestInterleavingsOfAPart: a part of a request has come when the server is to stop. It is
// answered when the rest comes.
func TestInterleavingsOfAPart(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, 2, explore.All), func(r *explore.Run) {
		k := newScene()
		k.c.enter(phaseIdle)
		k.sock.first = len(plainRequest) / 2
		k.serves(r)
		k.sends(r, 2)
		k.stops(r, true)
		r.Check(func() error { return k.check(true) })
	})
}

// TestInterleavingsOfAnImpatientStop: the server does not wait for the answer to a request
// that is counted. It is answered nevertheless.
func TestInterleavingsOfAnImpatientStop(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, 3, explore.All), func(r *explore.Run) {
		k := newScene()
		k.serves(r)
		k.sends(r, 1)
		k.stops(r, false)
		r.Check(func() error { return k.check(true) })
	})
}

// TestInterleavingsOfAnEnd: the sweeper parks the connection, and then ends it, once. No
// request comes.
func TestInterleavingsOfAnEnd(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run) {
		k := newScene()
		k.s.ln.cfg.IdleTimeout = 3 * parkAfter
		k.c.enter(phaseIdle)
		k.serves(r)
		k.sweeps(r, 2)
		r.Check(func() error { return k.check(true) })
	})
}

// TestInterleavingsOfAnUnreadAnswer: the client does not read its answer. The sweeper, which
// looks before that and then, ends the connection as one that is slow.
func TestInterleavingsOfAnUnreadAnswer(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run) {
		k := newScene()
		k.sock.unread = true
		k.s.ln.cfg.SlowTimeout = 3 * parkAfter
		k.c.enter(phaseIdle)
		k.serves(r)
		k.sends(r, 1)
		r.Go("sweeper", func() {
			k.c.sweep(2 * parkAfter)
			for !k.sock.full.Load() {
				explore.Wait()
			}
			k.c.sweep(4 * parkAfter)
		})
		r.Check(func() error {
			slow, idle := k.s.ln.slowClosed.Load(), k.s.ln.idleClosed.Load()
			if slow != 1 || idle != 0 || !k.sock.closed.Load() || k.s.ln.open() != 0 {
				return fmt.Errorf("closed %v, as slow %d, as idle %d, %d in the list", k.sock.closed.Load(), slow, idle, k.s.ln.open())
			}
			return nil
		})
	})
}

// TestInterleavingsOfParking: the sweeper parks the connection while requests come and
// the server stops.
func TestInterleavingsOfParking(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(1, 2, 3), func(r *explore.Run) {
		k := newScene()
		k.c.enter(phaseIdle)
		k.serves(r)
		k.sends(r, 2)
		k.sweeps(r, 1)
		k.stops(r, true)
		r.Check(func() error { return k.check(true) })
	})
}

// TestInterleavingsOfParkingAtTheStop: the sweeper looks twice, and parks the connection at
// the first look or interrupts it at the second when it is parked. The server stops.
func TestInterleavingsOfParkingAtTheStop(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, 3, explore.All), func(r *explore.Run) {
		k := newScene()
		k.c.enter(phaseIdle)
		k.serves(r)
		k.sweeps(r, 2)
		k.stops(r, true)
		r.Check(func() error { return k.check(true) })
	})
}

// TestInterleavingsOfParkingAlone: each request of a connection that is parked, once or
// twice, is answered.
func TestInterleavingsOfParkingAlone(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, explore.All, explore.All), func(r *explore.Run) {
		k := newScene()
		k.sock.ends = 2
		k.c.enter(phaseIdle)
		k.serves(r)
		k.sends(r, 2)
		k.sweeps(r, 2)
		r.Check(func() error {
			if k.sock.answers != 2 {
				return fmt.Errorf("%d of 2 requests were answered", k.sock.answers)
			}
			return k.check(true)
		})
	})
}

// onceNew is a set to which the first id is new, and each one after that a repeat.
type onceNew struct {
	allNew
	seen atomic.Bool
}

func (s *onceNew) AddMany(_ *counter.Epoch, _ []dedup.Item, verdicts []dedup.Verdict) error {
	verdicts[0] = dedup.Unique
	if s.seen.Swap(true) {
		verdicts[0] = dedup.Repeat
	}
	return nil
}

// TestInterleavingsOfACallback: two requests name an id and an endpoint, while the server
// stops. A POST waits if the id was counted, and not before; no place stays reserved.
func TestInterleavingsOfACallback(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, 2, explore.All), func(r *explore.Run) {
		set := new(onceNew)
		count, err := counter.New(counter.Config{Window: epochtest.Window, Store: set, Publisher: set})
		if err != nil {
			panic(err)
		}
		calls, err := callback.New(callback.Config{Allow: []string{"listed.example.com:80"}, Live: func() (time.Time, uint64) { return count.Last().Start(), count.Last().Unique() }})
		if err != nil {
			panic(err)
		}
		s, err := New(Config{Counter: count, Set: set, Callbacks: calls, Log: zerolog.Nop()}, noListener{})
		if err != nil {
			panic(err)
		}
		var news, others int
		for range 2 {
			var ctx fasthttp.RequestCtx
			ctx.Init(new(fasthttp.Request), nil, nil)
			ctx.Request.SetRequestURI(acceptPath + "?id=1&endpoint=http%3A%2F%2Flisted.example.com%2F")
			r.Go("request", func() {
				err := s.accept(&ctx, ctx.URI().QueryString(), headerLines{})
				if err == nil && ctx.Response.StatusCode() == fasthttp.StatusOK {
					news++
				} else {
					others++
				}
			})
		}
		early := false
		r.Go("look", func() {
			waiting := calls.Stats().Waiting
			unique := count.Last().Unique()
			early = waiting > 0 && unique == 0
		})
		r.Go("stop", count.Seal)
		r.Check(func() error {
			unique := count.Last().Unique()
			st := calls.Stats()
			if early || news+others != 2 || int(unique) != news || st.Waiting != news || st.Reserved != news || st.Ended[callback.Merged] > 0 {
				return fmt.Errorf("%d ids are counted, %d requests answered ok and %d failed; early POST %v; %+v", unique, news, others, early, st)
			}
			return nil
		})
	})
}
