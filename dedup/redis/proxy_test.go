package redis

import (
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"verve/internal/settest"
)

// proxy is a bad way to a Redis. Every request it takes arrives; the replies
// meet the faults that are set.
type proxy struct {
	ln net.Listener
	to string

	latency   atomic.Int64 // ns, for each piece of a reply
	jitter    atomic.Int64 // ns, up to so much more
	bandwidth atomic.Int64 // bytes per second of replies, 0: no limit
	deaf      atomic.Bool  // replies are thrown away
	refusing  atomic.Bool  // connections are closed at once
	passed    atomic.Int64 // pieces of replies that have arrived, since cutAgain last cut

	mu    sync.Mutex
	conns map[net.Conn]*atomic.Bool // of clients; set: replies are thrown away
	cuts  int
	group sync.WaitGroup
}

// pairByProxy is two instances of a group, the first with a proxy on its way to Redis.
func pairByProxy(t *testing.T) (server *redisServer, way *proxy, a, b *Set, ea, eb settest.Epochs) {
	t.Helper()
	server = startRedis(t)
	way = startProxy(t, server.Addr)
	a, b = newRedis(t, way.addr()), newRedis(t, server.Addr)
	return server, way, a, b, settest.NewEpochs(t, a), settest.NewEpochs(t, b)
}

func startProxy(t testing.TB, to string) *proxy {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{ln: ln, to: to, conns: map[net.Conn]*atomic.Bool{}}
	p.group.Go(p.accept)
	t.Cleanup(func() {
		ln.Close()
		p.cut(0)
		p.group.Wait()
	})
	return p
}

func (p *proxy) addr() string { return p.ln.Addr().String() }

func (p *proxy) accept() {
	for {
		c, err := p.ln.Accept()
		if err != nil {
			return
		}
		if p.refusing.Load() {
			c.Close()
			continue
		}
		s, err := net.Dial("tcp", p.to)
		if err != nil {
			c.Close()
			continue
		}
		deaf := new(atomic.Bool)
		p.mu.Lock()
		p.conns[c] = deaf
		p.mu.Unlock()
		p.group.Go(func() {
			io.Copy(s, c)
			s.Close()
		})
		p.group.Go(func() {
			p.replies(c, s, deaf)
			c.Close()
			s.Close()
			p.mu.Lock()
			delete(p.conns, c)
			p.mu.Unlock()
		})
	}
}

func (p *proxy) replies(c, s net.Conn, deaf *atomic.Bool) {
	buf := make([]byte, 16<<10)
	for {
		n, err := s.Read(buf)
		if n > 0 && !deaf.Load() && !p.deaf.Load() {
			wait := time.Duration(p.latency.Load())
			if j := p.jitter.Load(); j > 0 {
				wait += time.Duration(rand.Int64N(j))
			}
			if b := p.bandwidth.Load(); b > 0 {
				wait += time.Duration(n) * time.Second / time.Duration(b)
			}
			if wait > 0 {
				time.Sleep(wait)
			}
			if _, err := c.Write(buf[:n]); err != nil {
				return
			}
			p.passed.Add(1)
		}
		if err != nil {
			return
		}
	}
}

// cut throws away what is on its way back for a while, so that what was asked is
// done and not answered, and then ends every connection.
func (p *proxy) cut(swallow time.Duration) {
	p.mu.Lock()
	var ends []net.Conn
	for c, deaf := range p.conns {
		deaf.Store(true)
		ends = append(ends, c)
	}
	if len(ends) > 0 {
		p.cuts++
	}
	p.mu.Unlock()
	time.Sleep(swallow)
	for _, c := range ends {
		c.Close()
	}
}

// cutInReply ends every connection in the middle of a reply: a few bytes of
// nothing good go out first.
func (p *proxy) cutInReply() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c, deaf := range p.conns {
		deaf.Store(true)
		c.Write([]byte("*4\r\n$2\r\nok\r"))
		c.Close()
		p.cuts++
	}
}
