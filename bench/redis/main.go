// Redis measures the set that instances share against what is usually done: a key
// per id with SET NX, by go-redis and by rueidis. All in one run, one after another,
// round after round, as only ratios within a run mean anything. It takes two minutes or
// so and prints lines as go test -bench does, for benchstat and for bench/bars:
//
//	go run ./bench/redis | tee redis.txt && go run ./bench/bars redis.txt
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"

	"verve/counter"
	"verve/dedup"
	"verve/dedup/redis"
)

var (
	ids     = flag.Int("ids", 400_000, "ids of a measurement")
	callers = flag.Int("callers", 512, "goroutines that ask at once, as many as connections of a busy instance")
	rounds  = flag.Int("rounds", 3, "rounds; the median counts")
)

// add asks one store about an id.
type add func(id []byte) error

// The designs. Each empties the server and returns what has to be called at the end.
var designs = []struct {
	name string
	open func(addr string) (add, func(), error)
	id   func(i int) []byte
}{
	{"verve", openVerve, decimal},
	{"verve-repeats", openVerve, func(int) []byte { return decimal(rand.IntN(*ids / 10)) }}, // nine in ten
	{"verve-uuids", openVerve, uuid},
	{"go-redis", openGoRedis, decimal},
	{"rueidis", openRueidis, decimal},
	{"rueidis-uuids", openRueidis, uuid},
}

// measurement is what one design takes. CPU is in us per id.
type measurement struct {
	perSecond, clientCPU, redisCPU float64
	bytes                          float64 // of Redis per id
}

func main() {
	flag.Parse()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench/redis:", err)
		os.Exit(1)
	}
}

func run() error {
	addr := fmt.Sprintf("127.0.0.1:%d", 20000+rand.IntN(10000))
	_, port, _ := strings.Cut(addr, ":")
	server := exec.Command("redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "")
	if err := server.Start(); err != nil {
		return err
	}
	defer func() { _ = server.Process.Kill(); _ = server.Wait() }()
	time.Sleep(time.Second)
	client, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{addr}, ForceSingleClient: true, DisableCache: true})
	if err != nil {
		return err
	}
	defer client.Close()

	for range *rounds {
		for _, d := range designs {
			if err := client.Do(context.Background(), client.B().Flushall().Build()).Error(); err != nil {
				return err
			}
			ask, closeStore, err := d.open(addr)
			if err != nil {
				return fmt.Errorf("%s: %w", d.name, err)
			}
			m, err := measure(client, ask, d.id)
			closeStore()
			if err != nil {
				return fmt.Errorf("%s: %w", d.name, err)
			}
			fmt.Printf("BenchmarkShared/%s\t%d\t%.0f ids/s\t%.3f client-us/id\t%.3f redis-us/id\t%.3f cpu-us/id\t%.1f B/id\n",
				d.name, *ids, m.perSecond, m.clientCPU, m.redisCPU, m.clientCPU+m.redisCPU, m.bytes)
		}
	}
	return nil
}

// measure has all callers ask about ids, and takes what that costs.
func measure(client rueidis.Client, ask add, id func(i int) []byte) (m measurement, err error) {
	memory, redisBefore, clientBefore, began := figure(client, "used_memory"), redisTime(client), ownTime(), time.Now()
	var next atomic.Int64
	var failed atomic.Pointer[error]
	var group sync.WaitGroup
	for range *callers {
		group.Go(func() {
			for i := next.Add(1); i <= int64(*ids); i = next.Add(1) {
				if err := ask(id(int(i))); err != nil {
					failed.Store(&err)
					return
				}
			}
		})
	}
	group.Wait()
	if e := failed.Load(); e != nil {
		return m, *e
	}
	n := float64(*ids)
	m.perSecond = n / time.Since(began).Seconds()
	m.clientCPU = (ownTime() - clientBefore) / n * 1e6
	m.redisCPU = (redisTime(client) - redisBefore) / n * 1e6
	m.bytes = (figure(client, "used_memory") - memory) / n
	return m, nil
}

// figure reads one number of INFO, 0 if it is not there.
func figure(client rueidis.Client, name string) float64 {
	info, _ := client.Do(context.Background(), client.B().Info().Build()).ToString() // without it the figures are wrong at sight
	_, rest, _ := strings.Cut(info, "\n"+name+":")
	text, _, _ := strings.Cut(rest, "\r")
	n, _ := strconv.ParseFloat(text, 64)
	return n
}

func redisTime(c rueidis.Client) float64 {
	return figure(c, "used_cpu_sys") + figure(c, "used_cpu_user")
}

func ownTime() float64 {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // cannot fail
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

type discard struct{}

func (discard) Publish(context.Context, counter.Count) error { return nil }

// openVerve opens the set of this project. The epoch is entered once: its counting is
// no part of the set, and the other designs have none.
func openVerve(addr string) (add, func(), error) {
	local, err := dedup.NewMemory(dedup.Config{Expect: uint64(*ids)})
	if err != nil {
		return nil, nil, err
	}
	set, err := redis.New(redis.Config{
		URLs: []string{"redis://" + addr}, Group: "bench", Window: time.Hour, Timeout: 10 * time.Second, Local: local,
	})
	if err != nil {
		return nil, nil, err
	}
	count, err := counter.New(counter.Config{Window: time.Hour, Store: set, Publisher: discard{}})
	if err != nil {
		return nil, nil, err
	}
	in, _ := count.Enter(count.Last().Start().UnixNano(), 0)
	ask := func(id []byte) error {
		verdicts := [1]dedup.Verdict{dedup.Turned}
		items := []dedup.Item{{ID: id}}
		set.Keys(items)
		return set.AddMany(in.Epoch, items, verdicts[:])
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if err = ask([]byte("warm up")); err == nil || time.Now().After(deadline) {
			break
		}
	}
	return ask, func() { in.Leave(counter.Void); _ = set.Close() }, err
}

// openGoRedis is the usual way: SETNX with an expiry, by the library that most use,
// with its defaults.
func openGoRedis(addr string) (add, func(), error) {
	c := goredis.NewClient(&goredis.Options{Addr: addr})
	return func(id []byte) error {
		return c.SetNX(context.Background(), "29400000:"+string(id), 1, 2*time.Minute).Err()
	}, func() { _ = c.Close() }, nil
}

// openRueidis is the same by a library that puts the requests of all callers on one
// connection, as its authors recommend.
func openRueidis(addr string) (add, func(), error) {
	c, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{addr}, DisableCache: true})
	if err != nil {
		return nil, nil, err
	}
	return func(id []byte) error {
		err := c.Do(context.Background(), c.B().Set().Key("29400000:"+string(id)).Value("1").Nx().ExSeconds(120).Build()).Error()
		if rueidis.IsRedisNil(err) {
			return nil
		}
		return err
	}, c.Close, nil
}

// decimal is an id of ten digits; those of all i are in no order, and different.
func decimal(i int) []byte {
	const prime = 2_147_483_647
	return strconv.AppendUint(nil, 1_000_000_000+uint64(i+1)*1_103_515_245%prime, 10)
}

func uuid(i int) []byte {
	r := rand.NewPCG(uint64(i), 42)
	a, b := r.Uint64(), r.Uint64()
	return fmt.Appendf(nil, "%08x-%04x-4%03x-8%03x-%012x", a>>32, a>>16&0xffff, a&0xfff, b>>52, b&0xffffffffffff)
}
