// Redis measures the store that instances share against what is usually done:
// a key per id with SET NX, by go-redis and by rueidis, and redis-benchmark as the
// limit of the server. All in one run, one after another, round after round, as
// only ratios within a run mean anything.
//
//	go run ./bench/redis            about two minutes
//	go run ./bench/redis -check     exits 1 if a bar is missed
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime/pprof"
	"slices"
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
	addr    = "127.0.0.1:0"
	ids     = flag.Int("ids", 400_000, "ids of a measurement of speed")
	stored  = flag.Int("stored", 1_000_000, "ids of a measurement of memory")
	callers = flag.Int("callers", 512, "goroutines that ask at once, as many as connections of a busy instance")
	rounds  = flag.Int("rounds", 3, "rounds; the median counts")
	check   = flag.Bool("check", false, "exit 1 if a bar is missed")
	asJSON  = flag.Bool("json", false, "print the measurements as JSON")
	profile = flag.String("profile", "", "file for a CPU profile of the client")
	only    = flag.String("only", "", "speed, repeats or memory")
)

// measurement of one design.
type measurement struct {
	Name      string  `json:"name"`
	PerSecond float64 `json:"ids_per_second"`
	ClientUS  float64 `json:"client_us_per_id"`
	RedisUS   float64 `json:"redis_us_per_id"`
	Bytes     float64 `json:"redis_bytes_per_id,omitempty"`
}

func (m measurement) cpu() float64 { return m.ClientUS + m.RedisUS }

func main() {
	flag.Parse()
	if *profile != "" {
		f, err := os.Create(*profile)
		if err == nil {
			pprof.StartCPUProfile(f)
			defer pprof.StopCPUProfile()
		}
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench/redis:", err)
		os.Exit(1)
	}
}

func run() error {
	stop, err := startRedis()
	if err != nil {
		return err
	}
	defer stop()
	speed := map[string][]measurement{}
	note := func(m measurement, err error) error {
		if err != nil {
			return fmt.Errorf("%s: %w", m.Name, err)
		}
		speed[m.Name] = append(speed[m.Name], m)
		return nil
	}
	for range *rounds {
		if *only == "verve" {
			if err := note(verve("verve", decimalIDs(*ids), *ids)); err != nil {
				return err
			}
		}
		if *only == "" || *only == "speed" {
			for _, f := range []func() (measurement, error){
				func() (measurement, error) { return verve("verve", decimalIDs(*ids), *ids) },
				goRedis, rueidisSetNX, redisBenchmark,
			} {
				if err := note(f()); err != nil {
					return err
				}
			}
		}
		if *only == "" || *only == "repeats" {
			// Ten times each id, in random order.
			again := repeated(*ids)
			if err := note(verve("verve, 90 % repeats", again, *ids)); err != nil {
				return err
			}
		}
	}
	if *only == "" || *only == "memory" {
		for _, f := range []func() (measurement, error){
			func() (measurement, error) {
				return verve("verve, decimals", decimalIDs(*stored), *stored)
			},
			func() (measurement, error) { return verve("verve, UUIDs", uuids(*stored), *stored) },
			func() (measurement, error) { return keyPerID("key per id, decimals", decimalIDs(*stored), *stored) },
			func() (measurement, error) { return keyPerID("key per id, UUIDs", uuids(*stored), *stored) },
		} {
			if err := note(f()); err != nil {
				return err
			}
		}
	}
	results := map[string]measurement{}
	var all []measurement
	for name, list := range speed {
		m := median(list)
		results[name] = m
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b measurement) int { return strings.Compare(a.Name, b.Name) })
	if *asJSON {
		return json.NewEncoder(os.Stdout).Encode(all)
	}
	return report(all, results)
}

func median(list []measurement) measurement {
	pick := func(f func(measurement) float64) float64 {
		var v []float64
		for _, m := range list {
			v = append(v, f(m))
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	return measurement{
		list[0].Name,
		pick(func(m measurement) float64 { return m.PerSecond }),
		pick(func(m measurement) float64 { return m.ClientUS }),
		pick(func(m measurement) float64 { return m.RedisUS }),
		pick(func(m measurement) float64 { return m.Bytes }),
	}
}

func report(all []measurement, m map[string]measurement) error {
	fmt.Println("| | ids/s | CPU per id, us: client | Redis | sum | Redis bytes per id |")
	fmt.Println("|---|---|---|---|---|---|")
	for _, m := range all {
		size := ""
		if m.Bytes > 0 {
			size = fmt.Sprintf("%.1f", m.Bytes)
		}
		fmt.Printf("| %s | %.0f | %.2f | %.2f | %.2f | %s |\n", m.Name, m.PerSecond, m.ClientUS, m.RedisUS, m.cpu(), size)
	}
	fmt.Println("\n| | wanted | measured | |\n|---|---|---|---|")
	missed := false
	bar := func(what string, limit float64, atLeast bool, a, b float64) {
		if a == 0 || b == 0 {
			return
		}
		word, met := "at most", a/b <= limit
		if atLeast {
			word, met = "at least", a/b >= limit
		}
		verdict := "met"
		if !met {
			verdict, missed = "MISSED", true
		}
		fmt.Printf("| %s | %s %.3f | %.3f | %s |\n", what, word, limit, a/b, verdict)
	}
	v := m["verve"]
	bar("CPU per id, client and Redis, verve / go-redis SETNX", 1./6, false, v.cpu(), m["go-redis SETNX"].cpu())
	bar("the same, verve / rueidis SET NX EX", 1./3, false, v.cpu(), m["rueidis SET NX EX"].cpu())
	bar("ids/s, verve / redis-benchmark -P 64 SADD", 0.5, true, v.PerSecond, m["redis-benchmark -P 64 SADD"].PerSecond)
	repeats := m["verve, 90 % repeats"]
	bar("throughput, 90 % repeats / new ids", 2.5, true, repeats.PerSecond, v.PerSecond)
	bar("CPU of Redis per id, 90 % repeats / new ids", 0.2, false, repeats.RedisUS, v.RedisUS)
	bar("Redis bytes per UUID / key per id", 0.7, false, m["verve, UUIDs"].Bytes, m["key per id, UUIDs"].Bytes)
	bar("Redis bytes per decimal / key per id", 0.7, false, m["verve, decimals"].Bytes, m["key per id, decimals"].Bytes)
	if missed && *check {
		return fmt.Errorf("a bar is missed")
	}
	return nil
}

// startRedis starts a server that keeps nothing on disk.
func startRedis() (stop func(), err error) {
	dir, err := os.MkdirTemp("", "verve-bench-redis")
	if err != nil {
		return nil, err
	}
	port := 20000 + rand.IntN(10000)
	addr = fmt.Sprintf("127.0.0.1:%d", port)
	cmd := exec.Command("redis-server", "--port", strconv.Itoa(port), "--bind", "127.0.0.1", "--save", "", "--dir", dir, "--logfile", dir+"/log")
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop = func() {
		cmd.Process.Kill()
		cmd.Wait()
		os.RemoveAll(dir)
	}
	for range 200 {
		if _, err = command("PING"); err == nil {
			return stop, nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	stop()
	return nil, err
}

// command runs one command on a connection of its own.
func command(args ...string) (string, error) {
	c, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{addr}, ForceSingleClient: true, DisableCache: true})
	if err != nil {
		return "", err
	}
	defer c.Close()
	return c.Do(context.Background(), c.B().Arbitrary(args...).Build()).ToString()
}

// figure reads one number of INFO.
func figure(section, name string) float64 {
	info, err := command("INFO", section)
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(info, "\n"+name+":")
	text, _, _ := strings.Cut(rest, "\r")
	n, _ := strconv.ParseFloat(text, 64)
	return n
}

func redisCPU() float64 { return figure("cpu", "used_cpu_sys") + figure("cpu", "used_cpu_user") }

func clientCPU() float64 {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

// measure has all callers take numbers below n and call f with each.
func measure(name string, n int, f func(i int) error) (measurement, error) {
	m := measurement{Name: name}
	memory := figure("memory", "used_memory")
	client, redis, began := clientCPU(), redisCPU(), time.Now()
	var next atomic.Int64
	var failed atomic.Pointer[error]
	var group sync.WaitGroup
	for range *callers {
		group.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := f(i); err != nil {
					failed.Store(&err)
					return
				}
			}
		})
	}
	group.Wait()
	took := time.Since(began).Seconds()
	m.PerSecond = float64(n) / took
	m.ClientUS = (clientCPU() - client) / float64(n) * 1e6
	m.RedisUS = (redisCPU() - redis) / float64(n) * 1e6
	m.Bytes = (figure("memory", "used_memory") - memory) / float64(n)
	if err := failed.Load(); err != nil {
		return m, *err
	}
	return m, nil
}

func flush() error {
	_, err := command("FLUSHALL")
	return err
}

type discard struct{}

func (discard) Publish(context.Context, counter.Count) error { return nil }

// verve measures the store of this project, by its own interface.
func verve(name string, id func(i int) []byte, n int) (m measurement, err error) {
	m.Name = name
	if err := flush(); err != nil {
		return m, err
	}
	local, err := dedup.NewMemory(dedup.Config{Expect: uint64(n)})
	if err != nil {
		return m, err
	}
	set, err := redis.New(redis.Config{
		URLs: []string{"redis://" + addr}, Group: "bench", Window: time.Hour, Timeout: 10 * time.Second, Local: local,
	})
	if err != nil {
		return m, err
	}
	defer set.Close()
	count, err := counter.New(counter.Config{Window: time.Hour, Store: set, Publish: discard{}})
	if err != nil {
		return m, err
	}
	// The epoch is entered once: its counting is no part of the store, and the
	// other designs have none.
	in, _ := count.Enter(count.Last().Start().UnixNano(), 0)
	defer in.Leave(counter.Void)
	add := func(id []byte) error {
		verdicts := [1]dedup.Verdict{dedup.Turned}
		return set.AddMany(in.Epoch, []dedup.Item{{ID: id, Key: set.Key(id)}}, verdicts[:])
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if err := add([]byte("warm up")); err == nil {
			break
		} else if time.Now().After(deadline) {
			return m, err
		}
	}
	return measure(name, n, func(i int) error { return add(id(i)) })
}

// goRedis is the usual way: SETNX with an expiry, by the library that most use,
// with its defaults.
func goRedis() (measurement, error) {
	if err := flush(); err != nil {
		return measurement{}, err
	}
	c := goredis.NewClient(&goredis.Options{Addr: addr})
	defer c.Close()
	ctx := context.Background()
	epoch := strconv.FormatInt(time.Now().Unix()/60, 10) + ":"
	id := decimalIDs(*ids)
	return measure("go-redis SETNX", *ids, func(i int) error {
		_, err := c.SetNX(ctx, epoch+string(id(i)), 1, 2*time.Minute).Result()
		return err
	})
}

// rueidisSetNX is the same by a library that puts the requests of all callers on
// one connection, as its authors recommend.
func rueidisSetNX() (measurement, error) {
	return keyPerID("rueidis SET NX EX", decimalIDs(*ids), *ids)
}

func keyPerID(name string, id func(i int) []byte, n int) (measurement, error) {
	if err := flush(); err != nil {
		return measurement{}, err
	}
	c, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{addr}, DisableCache: true})
	if err != nil {
		return measurement{}, err
	}
	defer c.Close()
	ctx := context.Background()
	epoch := strconv.FormatInt(time.Now().Unix()/60, 10) + ":"
	return measure(name, n, func(i int) error {
		err := c.Do(ctx, c.B().Set().Key(epoch+string(id(i))).Value("1").Nx().ExSeconds(120).Build()).Error()
		if rueidis.IsRedisNil(err) {
			return nil
		}
		return err
	})
}

// redisBenchmark is what the server takes at most, from a client in C that sends
// 64 at a time and looks at no reply.
func redisBenchmark() (m measurement, err error) {
	m.Name = "redis-benchmark -P 64 SADD"
	if err := flush(); err != nil {
		return m, err
	}
	host, port, _ := strings.Cut(addr, ":")
	redis := redisCPU()
	n := 2 * *ids
	out, err := exec.Command("redis-benchmark", "-h", host, "-p", port, "-n", strconv.Itoa(n), "-P", "64", "-r", "1000000000", "--csv", "SADD", "set", "__rand_int__").Output()
	if err != nil {
		return m, err
	}
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	fields := strings.Split(string(lines[len(lines)-1]), ",")
	if len(fields) < 2 {
		return m, fmt.Errorf("unexpected output %q", out)
	}
	m.PerSecond, err = strconv.ParseFloat(strings.Trim(fields[len(fields)-7], `"`), 64)
	m.RedisUS = (redisCPU() - redis) / float64(n) * 1e6
	return m, err
}

// decimalIDs are ids of ten digits in no order, all different.
func decimalIDs(n int) func(i int) []byte {
	const prime = 2_147_483_647
	_ = n
	return func(i int) []byte {
		return strconv.AppendUint(nil, 1_000_000_000+uint64(i+1)*1_103_515_245%prime, 10)
	}
}

func uuids(int) func(i int) []byte {
	return func(i int) []byte {
		r := rand.NewPCG(uint64(i), 42)
		a, b := r.Uint64(), r.Uint64()
		return fmt.Appendf(nil, "%08x-%04x-4%03x-8%03x-%012x", a>>32, a>>16&0xffff, a&0xfff, b>>52, b&0xffffffffffff)
	}
}

// repeated sends a tenth as many ids, ten times each, in random order.
func repeated(n int) func(i int) []byte {
	id := decimalIDs(n)
	order := rand.Perm(n)
	return func(i int) []byte { return id(order[i] / 10) }
}
