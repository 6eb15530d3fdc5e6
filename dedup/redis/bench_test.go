//go:build unix

package redis

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"

	"verve/counter"
	"verve/dedup"
	"verve/internal/epochtest"
)

const (
	sharedIDs     = 400_000
	sharedCallers = 512 // goroutines that ask at once, as many as connections of a busy instance
)

// BenchmarkShared measures the set that instances share against what is usually done: a key
// per id with SET NX, by go-redis and by rueidis. Only ratios within a run mean anything;
// TestBars of bench has those that are promised:
//
//	for i in 1 2 3; do go test ./dedup/redis -run '^$' -bench Shared -benchtime 1x; done | tee redis.txt
//	go test ./bench -v -run '^TestBars$' -measured "$PWD/redis.txt"
func BenchmarkShared(b *testing.B) {
	type open func(b *testing.B, addr string) (ask func(id []byte) error)
	server := startRedis(b)
	for _, design := range []struct {
		name string
		open open
		id   func(i int) []byte
	}{
		{"verve", openVerve, decimalID},
		{"verve-repeats", openVerve, func(int) []byte { return decimalID(rand.IntN(sharedIDs / 10)) }}, // nine in ten
		{"verve-uuids", openVerve, uuidID},
		{"go-redis", openGoRedis, decimalID},
		{"rueidis", openRueidis, decimalID},
		{"rueidis-uuids", openRueidis, uuidID},
	} {
		b.Run(design.name, func(b *testing.B) {
			server.do("FLUSHALL")
			ask := design.open(b, server.Addr)
			memory, redisBefore, own := server.figure("used_memory"), server.cpu(), ownCPU()
			for b.Loop() {
				askAll(b, ask, design.id)
			}
			n := float64(b.N * sharedIDs)
			client, redis := (ownCPU()-own)/n*1e6, (server.cpu()-redisBefore)/n*1e6
			b.ReportMetric(n/b.Elapsed().Seconds(), "ids/s")
			b.ReportMetric(client, "client-us/id")
			b.ReportMetric(redis, "redis-us/id")
			b.ReportMetric(client+redis, "cpu-us/id")
			b.ReportMetric((server.figure("used_memory")-memory)/sharedIDs, "B/id")
		})
	}
}

// askAll has all callers ask about the ids.
func askAll(b *testing.B, ask func(id []byte) error, id func(i int) []byte) {
	var next atomic.Int64
	var group sync.WaitGroup
	for range sharedCallers {
		group.Go(func() {
			for i := next.Add(1); i <= sharedIDs; i = next.Add(1) {
				if err := ask(id(int(i))); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
}

// figure reads one number of INFO.
func (s *redisServer) figure(name string) float64 {
	_, rest, _ := strings.Cut(s.do("INFO"), "\n"+name+":")
	text, _, _ := strings.Cut(rest, "\r")
	n, err := strconv.ParseFloat(text, 64)
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

func (s *redisServer) cpu() float64 { return s.figure("used_cpu_sys") + s.figure("used_cpu_user") }

func ownCPU() float64 {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // cannot fail
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

// openVerve opens the set of this project. The epoch is entered once: its counting is
// no part of the set, and the other designs have none.
func openVerve(b *testing.B, addr string) func(id []byte) error {
	set := newRedis(b, addr, func(c *Config) {
		local, err := dedup.NewMemory(dedup.Config{Expect: sharedIDs})
		if err != nil {
			b.Fatal(err)
		}
		c.Window, c.Timeout, c.Local = time.Hour, 10*time.Second, local
	})
	count, err := counter.New(counter.Config{Window: time.Hour, Store: set, Publisher: epochtest.Nobody{}})
	if err != nil {
		b.Fatal(err)
	}
	in, _ := count.Enter(count.Last().Start().UnixNano(), 0, 1)
	b.Cleanup(func() { in.Leave(0, 0, 1) })
	ask := func(id []byte) error {
		verdicts := [1]dedup.Verdict{dedup.Turned}
		items := []dedup.Item{{ID: id}}
		set.Keys(items)
		return set.AddMany(in.Epoch, items, verdicts[:])
	}
	for deadline := time.Now().Add(10 * time.Second); ask([]byte("warm up")) != nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.Fatal("the set is not ready")
		}
	}
	return ask
}

// openGoRedis is the usual way: SETNX with an expiry, by the library that most use, with its
// defaults.
func openGoRedis(b *testing.B, addr string) func(id []byte) error {
	c := goredis.NewClient(&goredis.Options{Addr: addr})
	b.Cleanup(func() { _ = c.Close() })
	return func(id []byte) error {
		return c.SetNX(context.Background(), "29400000:"+string(id), 1, 2*time.Minute).Err()
	}
}

// openRueidis is the same by a library that puts the requests of all callers on one
// connection, as its authors recommend.
func openRueidis(b *testing.B, addr string) func(id []byte) error {
	c, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{addr}, DisableCache: true})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(c.Close)
	return func(id []byte) error {
		err := c.Do(context.Background(), c.B().Set().Key("29400000:"+string(id)).Value("1").Nx().ExSeconds(120).Build()).Error()
		if rueidis.IsRedisNil(err) {
			return nil
		}
		return err
	}
}

// decimalID is an id of ten digits; those of all i are in no order, and different.
func decimalID(i int) []byte {
	const prime = 2_147_483_647
	return strconv.AppendUint(nil, 1_000_000_000+uint64(i+1)*1_103_515_245%prime, 10)
}

func uuidID(i int) []byte {
	r := rand.NewPCG(uint64(i), 42)
	a, b := r.Uint64(), r.Uint64()
	return fmt.Appendf(nil, "%08x-%04x-4%03x-8%03x-%012x", a>>32, a>>16&0xffff, a&0xfff, b>>52, b&0xffffffffffff)
}
