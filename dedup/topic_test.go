//go:build linux

package dedup

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"

	"verve/stream"
)

// topic is what main.go connects to the counter: a spool and a stream, and in addition a broker
// that outlives them. The broker may be down, and its answers may be lost.
type topic struct {
	t     testing.TB
	dir   string // of the spool
	kafka stream.KafkaConfig
	dial  func(ctx context.Context, network, address string) (net.Conn, error)

	// The running process:
	spool    *stream.Spool
	stream   *stream.Stream
	end      func()
	patience time.Duration // of a stop without a broker

	mu    sync.Mutex // guards what follows
	away  bool
	conns []net.Conn
	lose  kmsg.Key // the next answer to such a request
	then  bool     // the broker is down from then on
	armed bool     // until it was lost
}

func newTopic(t testing.TB, dir string) *topic {
	t.Helper()
	var network kfake.VirtualNetwork
	b := &topic{t: t, dir: dir, dial: network.DialContext}
	c, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.Ports(9092), kfake.SeedTopics(1, "counts"), kfake.ListenFn(network.Listen))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	b.kafka = stream.KafkaConfig{Brokers: c.ListenAddrs(), Topic: "counts", Dial: b.connect}
	return b
}

// open starts the spool and the stream of a process. last and sum are what its spool must have.
func (b *topic) open(last time.Time, sum uint64) {
	b.t.Helper()
	var err error
	if b.spool, err = stream.OpenSpool(stream.SpoolConfig{Dir: filepath.Join(b.dir, "spool"), Group: "verve", Instance: "host-1"}); err != nil {
		b.t.Fatal(err)
	}
	if p := b.spool.Published()[b.spool.Identity()]; !p.Last.Equal(last) || p.Unique != sum {
		b.t.Fatalf("the spool ends with %d in %v, want %d in %v", p.Unique, p.Last, sum, last)
	}
	if b.stream, err = stream.New(stream.Config{Scope: stream.ScopeInstance, Kafka: b.kafka}, b.spool); err != nil {
		b.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = b.stream.Run(ctx) })
	b.end = func() { stop(); running.Wait(); b.stream.Close() }
}

// flush delivers what can be delivered, as a stop in order does.
func (b *topic) flush() {
	ctx, cancel := context.WithTimeout(context.Background(), b.patience)
	defer cancel()
	b.mu.Lock()
	away := b.away
	b.mu.Unlock()
	if err := b.stream.Flush(ctx); err != nil && !away && b.patience > time.Minute {
		b.t.Errorf("with the broker there: %v: %+v", err, b.stream.Stats())
	}
}

func (b *topic) close() {
	b.end()
	if err := b.spool.Close(); err != nil {
		b.t.Error(err)
	}
}

// abandon ends everything that still runs after a schedule has failed.
func (b *topic) abandon() {
	b.setAway(true)
	if b.end != nil {
		b.end()
	}
}

// setAway closes every connection, and accepts none until the broker is up again.
func (b *topic) setAway(away bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.away, b.armed = away, false
	if away {
		b.hangUp()
	}
}

// hangUp closes the connections. b.mu is held.
func (b *topic) hangUp() {
	for _, c := range b.conns {
		_ = c.Close()
	}
	b.conns = nil
}

// loseAnswer makes the broker process the next request of that kind without an answer;
// after that it is down, if wanted.
func (b *topic) loseAnswer(to kmsg.Key, then bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lose, b.then, b.armed = to, then, true
}

// lost waits a little for the lost answer, and reports whether it was lost.
func (b *topic) lost(wait time.Duration) bool {
	time.Sleep(wait)
	synctest.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.armed
}

func (b *topic) connect(ctx context.Context, network, address string) (net.Conn, error) {
	b.mu.Lock()
	away := b.away
	b.mu.Unlock()
	if away {
		return nil, errors.New("connection refused")
	}
	c, err := b.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conns = append(b.conns, c)
	return &topicConn{Conn: c, b: b}, nil
}

// topicConn looks at the requests of one connection.
type topicConn struct {
	net.Conn
	b      *topic
	silent atomic.Bool // the answer under way gets lost
}

func (c *topicConn) Write(p []byte) (int, error) {
	if len(p) > 6 { // length and kind
		c.b.mu.Lock()
		if c.b.armed && kmsg.Key(binary.BigEndian.Uint16(p[4:])) == c.b.lose {
			c.b.armed = false
			c.silent.Store(true)
		}
		c.b.mu.Unlock()
	}
	return c.Conn.Write(p)
}

func (c *topicConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if !c.silent.Load() || err != nil {
		return n, err
	}
	c.b.mu.Lock()
	defer c.b.mu.Unlock()
	if c.b.away = c.b.away || c.b.then; c.b.away {
		c.b.hangUp()
	}
	_ = c.Close()
	return 0, io.EOF
}

// check compares the topic with the sums that it must have: each record once, in
// the order of the numbers, without a gap.
func (b *topic) check(want map[int64]uint64) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	got := map[int64]uint64{}
	n := uint64(0)
	for r, err := range stream.ReadTopic(ctx, b.kafka, false) {
		if err != nil {
			b.t.Fatal(err)
		}
		if n++; r.Seq != n {
			b.t.Fatalf("record %d of the topic is %s", n, r.Key())
		}
		got[r.WindowStart.UnixNano()] += r.Unique
	}
	for k, sum := range got {
		if sum != want[k] {
			b.t.Errorf("%v: the records in the topic add up to %d, want %d", time.Unix(0, k).UTC(), sum, want[k])
		}
	}
	for k := range want {
		if _, here := got[k]; !here {
			b.t.Errorf("%v has no record in the topic", time.Unix(0, k).UTC())
		}
	}
}
