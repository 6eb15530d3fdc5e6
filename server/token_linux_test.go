package server

import (
	"context"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"verve/dedup"
)

// BenchmarkTokenServed is what the fast path takes for a new id without a token and with one,
// in slices that take turns on one server: from the bytes of the request to those of its
// answer. With kernel each request and each answer goes over one of 64 connections of TCP
// meanwhile, outside of what is timed: the kernel takes the processor's caches, as it does in a
// server, and what the fast path touches first has to come back. plain-ns is the mean of the
// fastest nine tenths of the requests without a token, token-ns what a token adds to it.
// The tables hold so many ids and tokens, in this window and the one before.
func BenchmarkTokenServed(b *testing.B) {
	for _, ids := range []int{100_000, 4_000_000} {
		b.Run(fmt.Sprintf("ids=%d", ids), func(b *testing.B) {
			s := newServing(b, ids)
			for _, kernel := range []bool{false, true} {
				for _, depth := range []int{1, 16} {
					s.turn(b, ids/2)
					// What the cleaner does behind a turn (dedup/sieve.go).
					time.Sleep(dedup.DefaultCleanupInterval + time.Duration(ids)*400*time.Nanosecond)
					b.Run(fmt.Sprintf("kernel=%t/depth=%d", kernel, depth), func(b *testing.B) { s.measure(b, depth, kernel) })
					s.turn(b, ids) // the window before the next one
				}
			}
		})
	}
}

// serving is a server whose fast path is called without sockets.
type serving struct {
	*site
	wires   []*wire
	id      int // the last one
	window  int
	in, out []byte
}

// newServing makes one whose tables have so many ids and tokens.
func newServing(b *testing.B, ids int) *serving {
	set, err := dedup.NewMemory(dedup.Config{Expect: uint64(2 * ids), Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	s := &serving{site: newSite(b, func(c *Config) { replaceSet(b, c, set) }), id: 1e10, in: make([]byte, 4<<10), out: make([]byte, 4<<10)}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- set.Run(ctx) }()
	b.Cleanup(func() {
		stop()
		<-ended
	})
	s.turn(b, ids)
	s.turn(b, ids)
	for range 64 {
		s.wires = append(s.wires, newWire(b, s.site))
	}
	return s
}

// turn opens the next window and puts so many ids with tokens into it.
func (s *serving) turn(b *testing.B, ids int) {
	s.window++
	s.cfg.Counter.TurnFrom(s.cfg.Counter.Last())
	items, verdicts, options := make([]dedup.Item, together), make([]dedup.Verdict, together), make([]dedup.Options, together)
	for n := 0; n < ids; n += together {
		for i := range items {
			verdicts[i] = dedup.Turned
			options[i] = dedup.Options{Token: strconv.AppendInt(options[i].Token[:0], int64(n+i), 10)}
			items[i] = dedup.Item{ID: strconv.AppendInt(items[i].ID[:0], int64(s.window+7919*(n+i)), 10), Options: &options[i]}
		}
		s.cfg.Set.Keys(items)
		in, _ := s.cfg.Counter.Enter(time.Now().UnixNano(), 0, together)
		if err := s.cfg.Set.AddMany(in.Epoch, items, verdicts); err != nil {
			b.Fatal(err)
		}
		in.Leave(together, 0, 0)
	}
}

func (s *serving) measure(b *testing.B, depth int, kernel bool) {
	const slice = 256
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	pipes := [2]*pipe{newPipe(depth, ""), newPipe(depth, "&token=7f3a9c41-5be2-4d10-a7c5-0"+pipeID)}
	var spent [2][]float64
	turn := func(side int) {
		p := pipes[side]
		for i := range slice / depth {
			w := s.wires[i%len(s.wires)]
			p.left, p.id = depth, s.id
			n, _ := p.Read(s.out)
			s.id = p.id
			if kernel {
				n = w.carry(b, w.client, w.server, s.in, s.out[:n])
			} else {
				copy(s.in, s.out[:n])
			}
			began := time.Now()
			rest, like, err := s.ln.fast.serve(w.conn, s.in[:n])
			took := time.Since(began)
			if len(rest) > 0 || like != begun || err != nil {
				b.Fatal(string(rest), like, err)
			}
			spent[side] = append(spent[side], float64(took.Nanoseconds())/float64(depth))
			if kernel {
				w.carry(b, w.server, w.client, s.out, w.answers)
			}
			w.answers = w.answers[:0]
		}
	}
	for b.Loop() {
		turn(0)
		turn(1)
	}
	var cost [2]float64
	for side, all := range spent {
		slices.Sort(all)
		all = all[:len(all)*9/10]
		for _, ns := range all {
			cost[side] += ns / float64(len(all))
		}
	}
	b.ReportMetric(cost[0], "plain-ns")
	b.ReportMetric(cost[1]-cost[0], "token-ns")
	b.ReportMetric(0, "ns/op")
}

// wire is a connection of the fast path, which gives its answers to the test, beside one of
// TCP, which it does not use.
type wire struct {
	net.Conn
	answers        []byte
	conn           *conn
	client, server int // descriptors of TCP; reads and writes of them wait in the kernel
}

func (w *wire) Write(b []byte) (int, error) {
	w.answers = append(w.answers, b...)
	return len(b), nil
}

func newWire(b *testing.B, s *site) *wire {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	first := newPipe(1, "")
	first.left = 1
	c := &conn{Conn: first, raw: first, owner: s.ln, number: 1}
	if err := s.http.ServeConn(c); err != nil || len(c.tail.bytes) == 0 {
		b.Fatal(err, "no tail")
	}
	w := &wire{conn: c, client: descriptor(b, client), server: descriptor(b, server)}
	c.Conn, c.raw = w, w
	return w
}

func descriptor(b *testing.B, c net.Conn) int {
	f, err := c.(*net.TCPConn).File()
	_ = c.Close()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = f.Close() })
	return int(f.Fd())
}

// carry sends text over TCP and returns how much of it arrived in b.
func (w *wire) carry(b *testing.B, from, to int, in, text []byte) int {
	if n, err := unix.Write(from, text); n != len(text) || err != nil {
		b.Fatal(n, err)
	}
	n, err := unix.Read(to, in)
	if err != nil {
		b.Fatal(err)
	}
	return n
}
