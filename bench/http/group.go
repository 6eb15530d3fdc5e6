//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
)

// groupCases are the connections of both instances together, and how many requests each
// has in flight.
var groupCases = []struct {
	conns, depth int
}{{1, 1}, {8, 1}, {16, 1}, {64, 1}, {256, 1}, {1024, 1}, {4, 16}, {64, 16}}

// groups compares two instances of Verve that share a Redis with two of plain: what each request
// costs the instances and Redis together. The core of the servers is full in none of the cases
// but the last ones.
func (r *run) groups(ctx context.Context, out io.Writer) (samples []sample, err error) {
	loads := make([]load, 2)
	for i, name := range []string{"group", "plain"} {
		if loads[i], err = r.startPair(name); err != nil {
			return nil, err
		}
	}
	for _, c := range groupCases {
		scenario, script := fmt.Sprintf("group-%d-%d", c.conns, c.depth), "unique"
		if c.depth > 1 {
			script = "pipelined"
		}
		for i := range loads {
			loads[i].script, loads[i].conns = script, c.conns
		}
		title := fmt.Sprintf("%d connections, %d in flight on each: CPU for a request, us", c.conns, c.depth)
		t, err := r.rounds(ctx, out, scenario, title, r.WarmUp, loads)
		samples = append(samples, t.samples...)
		if err != nil {
			return samples, err
		}
		t.row("of that, Redis", func(name string) string { return fmt.Sprintf("%.3f", median(column(t.samples, name, redisCPU))) })
		t.row("it/plain", func(name string) string { return fmt.Sprintf("%.2f", median(ratios(t.samples, name, "plain"))) })
		t.end()
	}
	return samples, nil
}

// startPair runs a Redis of their own and two instances of a design.
func (r *run) startPair(design string) (l load, err error) {
	redis, err := r.startRedis()
	if err != nil {
		return l, err
	}
	server, flags := design, []string{redis.addr}
	if design == "group" {
		server, flags = "verve", append(slices.Clone(r.Flags), "--dedup=redis", "--redis-url=redis://"+redis.addr, batchWindow)
	}
	l = load{name: design, redis: []*process{redis}}
	for i := range 2 {
		instance, err := r.start(server, design+strconv.Itoa(i), flags)
		if err != nil {
			return l, err
		}
		l.servers = append(l.servers, instance)
	}
	return l, nil
}
