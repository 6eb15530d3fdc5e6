package main

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"verve/internal/testproc"
)

// faultSeconds is how long each fault lasts. The long runs are made with
// VERVE_TEST_FAULT_SECONDS=60.
func faultSeconds() time.Duration {
	if n, err := strconv.Atoi(os.Getenv("VERVE_TEST_FAULT_SECONDS")); err == nil {
		return time.Duration(n) * time.Second
	}
	return time.Second
}

// faultyProxy stands before a server and does to its connections what networks
// do.
type faultyProxy struct {
	addr, to string

	mu    sync.Mutex
	fault string
	conns map[net.Conn]bool
}

func newFaultyProxy(t *testing.T, to string) *faultyProxy {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &faultyProxy{addr: ln.Addr().String(), to: to, conns: map[net.Conn]bool{}}
	t.Cleanup(func() {
		ln.Close()
		p.set("")
	})
	go func() {
		for {
			client, err := ln.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", to)
			if err != nil {
				client.Close()
				continue
			}
			p.mu.Lock()
			p.conns[client], p.conns[server] = true, true
			p.mu.Unlock()
			go p.pipe(client, server, false)
			go p.pipe(server, client, true)
		}
	}()
	return p
}

// set begins a fault on new connections and ends those there are.
func (p *faultyProxy) set(fault string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = fault
	for c := range p.conns {
		c.Close()
	}
	clear(p.conns)
}

func (p *faultyProxy) pipe(from, to net.Conn, reply bool) {
	defer from.Close()
	defer to.Close()
	buf := make([]byte, 16<<10)
	ends := time.Now().Add(time.Duration(50+rand.IntN(400)) * time.Millisecond)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		p.mu.Lock()
		fault := p.fault
		p.mu.Unlock()
		b := buf[:n]
		switch fault {
		case "latency":
			time.Sleep(20 * time.Millisecond)
		case "jitter":
			time.Sleep(rand.N(150 * time.Millisecond))
		case "bandwidth":
			time.Sleep(time.Duration(n) * time.Second / (200 << 10))
		case "reset":
			if time.Now().After(ends) {
				if c, ok := to.(*net.TCPConn); ok {
					_ = c.SetLinger(0)
				}
				return
			}
		case "cut in a reply":
			if reply && time.Now().After(ends) {
				_, _ = to.Write(b[:n/2])
				return
			}
		}
		if _, err := to.Write(b); err != nil {
			return
		}
	}
}

// TestFaultsOnTheWayToRedis: under load and whatever the network does, the
// records of two instances are the ids that were accepted.
func TestFaultsOnTheWayToRedis(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds of real time")
	}
	t.Parallel() // they wait more than they work
	p := newFaultyProxy(t, testproc.StartRedis(t).Addr)
	f := groupOf(t, 2, p.addr, "1s")
	f.Pipeline, f.Connections, f.IDs = 1, 32, idsDecimal
	faults := []string{"latency", "jitter", "reset", "bandwidth", "cut in a reply"}
	f.Duration = time.Duration(len(faults))*faultSeconds() + 2*time.Minute // ended before
	accepted := atAll(f, "ok")
	ctx, end := context.WithCancel(t.Context())
	defer end()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer end()
		for _, fault := range faults {
			awaitMore(ctx, accepted, 200)
			p.set(fault)
			time.Sleep(faultSeconds())
			p.set("")
		}
		awaitMore(ctx, accepted, 200)
	}()
	v, err := run(ctx, f)
	end()
	<-done
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d answers: %d ok, %d failed, %d refused, 99 %% of those within %.0f ms", v.Answers, v.Accepted, v.Repeated, v.Refused, v.RefusedP99)
	if !v.Good {
		t.Errorf("%+v, %+v", v.Table, v.Faults)
	}
	// Short runs are made on busy machines.
	if faultSeconds() >= time.Minute && v.RefusedP99 > 250 {
		t.Errorf("99 %% of the refusals came within %.0f ms, want 250", v.RefusedP99)
	}
}

// redisCLI sends one command and returns the whole answer.
func redisCLI(t *testing.T, addr string, command ...string) string {
	t.Helper()
	host, port, _ := net.SplitHostPort(addr)
	out, err := exec.Command("redis-cli", append([]string{"-h", host, "-p", port}, command...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("redis-cli %v: %v\n%s", command, err, out)
	}
	return strings.TrimSpace(string(out))
}

// redisRole is what a node says of itself, empty if it does not answer.
func redisRole(addr, password string) string {
	host, port, _ := net.SplitHostPort(addr)
	cmd := exec.Command("redis-cli", "-h", host, "-p", port, "ROLE")
	if password != "" {
		cmd.Env = append(os.Environ(), "REDISCLI_AUTH="+password)
	}
	out, _ := cmd.Output()
	return string(out)
}

// answeredAt reads how many ids an instance has answered with the result.
func answeredAt(admin, result string) (n uint64) {
	resp, err := http.Get("http://" + admin + "/metrics")
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if m := regexp.MustCompile(`(?m)^verve_accept_total\{result="` + result + `"\} (\d+)`).FindSubmatch(b); err == nil && m != nil {
		n, _ = strconv.ParseUint(string(m[1]), 10, 64)
	}
	return n
}

// atAll sums that up over the servers of a run.
func atAll(f *flags, result string) func() uint64 {
	var admins []string
	for _, command := range f.Spawn {
		admins = append(admins, regexp.MustCompile(`--admin-listen=(\S+)`).FindStringSubmatch(command)[1])
	}
	return func() (n uint64) {
		for _, a := range admins {
			n += answeredAt(a, result)
		}
		return n
	}
}

// awaitMore returns when count is n more, or when ctx ends.
func awaitMore(ctx context.Context, count func() uint64, n uint64) {
	for before := count(); ctx.Err() == nil && count() < before+n; {
		time.Sleep(20 * time.Millisecond)
	}
}

// awaitWindows returns when ids were accepted in n windows of a second, or when ctx ends.
func awaitWindows(ctx context.Context, accepted func() uint64, n int) {
	for range n {
		awaitMore(ctx, accepted, 50)
		time.Sleep(time.Second)
	}
}

// outage is what a failover meant for the callers.
type outage struct {
	taken  time.Duration // until the replica was the master
	lasted time.Duration // until the last id that failed
	failed uint64
	over   bool // that was the last one
}

// watchOutage measures one that begins now, by the number of ids that have failed,
// until none has for the time of calm.
func watchOutage(failed func() uint64, before uint64, taken func() bool, calm time.Duration) (o outage) {
	began := time.Now()
	for last := before; time.Since(began) < time.Minute; time.Sleep(50 * time.Millisecond) {
		if o.taken == 0 && taken() {
			o.taken = time.Since(began)
		}
		if now := failed(); now != last {
			last, o.lasted, o.failed = now, time.Since(began), now-before
		}
		if o.taken > 0 && time.Since(began)-o.lasted > calm {
			o.over = true
			break
		}
	}
	return o
}

// check fails if ids failed for too long: for most beyond what the change took, where the
// machine is not busy with something else.
func (o outage) check(t *testing.T, change, most time.Duration) {
	t.Helper()
	if most += max(change, o.taken); !o.over || faultSeconds() >= time.Minute && o.lasted > most {
		t.Errorf("%d ids failed after the change, for %v, the last of them: %t; want that, and no longer than %v", o.failed, o.lasted, o.over, most)
	}
}

var calls = regexp.MustCompile(`cmdstat_(?:evalsha):calls=(\d+)`)

// batchesAt is how many batches of ids each of the masters has had.
func batchesAt(masters []string) (batches []int) {
	for _, m := range masters {
		n := 0
		if out, err := exec.Command("redis-cli", "-p", m[strings.LastIndexByte(m, ':')+1:], "INFO", "commandstats").Output(); err == nil {
			for _, c := range calls.FindAllSubmatch(out, -1) {
				k, _ := strconv.Atoi(string(c[1]))
				n += k
			}
		}
		batches = append(batches, n)
	}
	return batches
}

// TestClusterThatLosesAMaster: ids are spread evenly over the masters; when one is
// killed only its part fails, until its replica has taken over, and every window
// adds up or says that it does not.
func TestClusterThatLosesAMaster(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds of real time")
	}
	t.Parallel() // they wait more than they work
	const nodeTimeout = 1500 * time.Millisecond
	c := startCluster(t, nodeTimeout)
	var masters []string
	for _, n := range c.nodes[:3] {
		masters = append(masters, n.addr)
	}
	more := []string{"--redis-url=redis://" + masters[1], "--redis-url=redis://" + masters[2]}
	f := groupOf(t, 2, masters[0], "1s", more...)
	f.Duration, f.Rate, f.Pipeline, f.Connections = 3*time.Minute, 3000, 1, 64 // ended before
	f.AllowInexact = true
	sum, accepted := atAll(f, "unavailable"), atAll(f, "ok")
	ctx, end := context.WithCancel(t.Context())
	defer end()
	var spread []int
	seen := make(chan outage, 1)
	go func() {
		defer end()
		awaitWindows(ctx, accepted, 3)
		for spread = batchesAt(masters); ctx.Err() == nil && slices.Min(spread) < 100; spread = batchesAt(masters) {
			time.Sleep(100 * time.Millisecond)
		}
		before := sum()
		_ = c.nodes[1].cmd.Process.Kill()
		seen <- watchOutage(sum, before, func() bool { return strings.Contains(redisRole(c.nodes[4].addr, ""), "master") }, time.Second) // what fails later is this machine's being busy
		awaitWindows(ctx, accepted, 4)
	}()
	v, err := run(ctx, f)
	if err != nil {
		t.Fatal(err)
	}
	end()
	o := <-seen
	t.Logf("%d answers: %d ok, %d failed, %d refused, p99 of those %.0f ms; batches at the masters %v; the replica took over after %v; %d failed after the kill, for %v; %d of %d windows say that they are not exact",
		v.Answers, v.Accepted, v.Repeated, v.Refused, v.RefusedP99, spread, o.taken.Round(10*time.Millisecond), o.failed, o.lasted.Round(10*time.Millisecond), v.Inexact, v.Windows)
	if !v.Good || v.Windows < 6 {
		t.Errorf("%+v, %+v", v.Table, v.Faults)
	}
	for _, n := range spread {
		if n*2 < spread[0] || n > spread[0]*2 {
			t.Errorf("batches at the masters: %v", spread)
		}
	}
	if o.failed == 0 {
		t.Error("no ids failed after the kill")
	}
	o.check(t, nodeTimeout, 8*time.Second)
	// A third of the ids for as long as that, with room for what waited.
	if most := uint64(f.Rate * o.lasted.Seconds() * 0.6); o.failed > most {
		t.Errorf("%d ids failed in %v, more than the killed master's part", o.failed, o.lasted)
	}
}
