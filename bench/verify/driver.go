package main

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// target is one instance, or one load balancer.
type target struct {
	addr string
	head []byte // of a request, up to the id
	tail []byte // of a request, after its query, but for the last empty line
	post []byte // of a request with a batch, up to its type
}

func newTarget(raw string) (target, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return target{}, fmt.Errorf("--url: %w", err)
	}
	if u.Scheme != "http" || u.Hostname() == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return target{}, fmt.Errorf("--url: %q is not http://HOST[:PORT]", u.Redacted())
	}
	base := strings.TrimRight(u.EscapedPath(), "/")
	return target{
		addr: net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "80")),
		head: []byte("GET " + base + "/api/verve/accept?id="),
		tail: []byte(" HTTP/1.1\r\nHost: " + u.Host + "\r\n"),
		post: []byte("POST " + base + "/api/verve/accept HTTP/1.1\r\nHost: " + u.Host + "\r\nContent-Type: "),
	}, nil
}

// driver puts the load on the targets and reports what they answered to the truth.
type driver struct {
	flags
	targets []target
	keys    *keys // under which ids are counted; nil: under none
	truth   *truth
	retries *retries
	ids     atomic.Uint64 // numbers handed out; also the upper end of the repeats
	tokens  atomic.Uint64 // attempts begun
	sent    atomic.Uint64 // ids in requests, for Requests
	dials   atomic.Uint64 // connections opened, the first ones included
	broken  atomic.Uint64 // answers that are not the contract's

	// Set while no connection runs.
	stop     context.CancelFunc // ends the connections
	draining bool               // the load is over
}

func newDriver(f *flags) (*driver, error) {
	d := &driver{flags: *f}
	if d.Seed == 0 {
		d.Seed = rand.Uint64()
	}
	for _, raw := range f.URL {
		t, err := newTarget(raw)
		if err != nil {
			return nil, err
		}
		d.targets = append(d.targets, t)
	}
	// A request is answered or given up within 1.25 timeouts, and one that was
	// given up may be served within another: see conn.serve and driver.lag.
	d.truth = newTruth(len(d.targets), 4*f.Timeout, f.Strict)
	d.truth.lenient = f.AllowInexact
	d.retries = newRetries(len(d.targets))
	if f.Tokens {
		d.truth.span = f.Window.Milliseconds()
	}
	if f.Keys > 0 {
		d.keys = newKeys(f.Keys, d.Seed)
		d.truth.keys = d.keys
	}
	return d, nil
}

// maxBroken answers that make no sense end the run: this is not the server, or
// not its flags, and an hour of it would show no more.
const maxBroken = 100

func (d *driver) protocol(format string, args ...any) {
	d.truth.fault("protocol", format, args...)
	if d.broken.Add(1) == maxBroken {
		d.stop()
	}
}

// run drives until ctx ends or the requests are used up. Every request that was sent is then
// answered or in doubt. Attempts with a token that have no answer yet are retried a while
// longer.
func (d *driver) run(ctx context.Context) {
	d.connect(ctx)
	if d.Tokens && d.broken.Load() < maxBroken {
		d.draining, d.Lose, d.Rate = true, 0, 0
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 4*d.Timeout)
		defer cancel()
		d.connect(ctx)
	}
}

// connect runs all connections until ctx ends or there is nothing left to do.
func (d *driver) connect(ctx context.Context) {
	ctx, d.stop = context.WithCancel(ctx)
	defer d.stop()
	var connections sync.WaitGroup
	for i := range d.Connections {
		connections.Go(func() { newConn(d, i).run(ctx) })
	}
	connections.Wait()
}

// gone reports that no target takes connections any more.
func (d *driver) gone() bool {
	return !slices.ContainsFunc(d.targets, func(t target) bool { return listens(t.addr, d.Timeout) })
}

// together is how many ids a connection sends before it reads.
func (d *driver) together() int { return d.Pipeline * max(1, d.Batch) }

// items reports whether batches are JSON, which alone has a key and a token for each id.
func (d *driver) items() bool { return d.Tokens || d.keys != nil }

// interval is the time between two batches of a connection; 0: none, it is as fast as it goes.
func (d *driver) interval() time.Duration {
	if d.Rate == 0 {
		return 0
	}
	return time.Duration(float64(d.together()*d.Connections) / d.Rate * float64(time.Second))
}
