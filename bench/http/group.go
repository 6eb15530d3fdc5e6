//go:build linux

package main

import (
	"cmp"
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

// designsOfGroup: two instances of Verve, and two of plain, each pair with a Redis of its own.
var designsOfGroup = []string{"group", "plain"}

// pair is two instances and their Redis.
type pair struct {
	instances []*process
	redis     *process
}

// groups compares two instances that share a Redis with plain: what each request costs the
// instances and Redis together. The core of the servers is full in none of the cases but the
// last ones.
func (r *run) groups(ctx context.Context, out io.Writer) (samples []sample, err error) {
	pairs := map[string]pair{}
	for _, name := range designsOfGroup {
		if pairs[name], err = r.startPair(name); err != nil {
			return nil, err
		}
	}
	var rows []string
	for _, c := range groupCases {
		scenario := fmt.Sprintf("group-%d-%d", c.conns, c.depth)
		w := wrk{script: r.script("unique"), conns: c.conns}
		if c.depth > 1 {
			w.script = r.script("pipelined")
		}
		title := fmt.Sprintf("%d connections, %d in flight on each: CPU for a request, us", c.conns, c.depth)
		t, err := r.rounds(ctx, out, scenario, title, designsOfGroup, r.WarmUp, func(name string, seconds int) (sample, error) {
			s, err := measure(ctx, w, seconds, pairs[name].instances, pairs[name].redis)
			return s, cmp.Or(err, s.plausible(0))
		})
		samples = append(samples, t.samples...)
		if err != nil {
			return samples, err
		}
		t.end()
		label := strconv.Itoa(c.conns)
		if c.depth > 1 {
			label += fmt.Sprintf(", pipelined by %d", c.depth)
		}
		rows = append(rows, fmt.Sprintf("| %s | %s | %s | %.2f |", label,
			parts(t.samples, "group"), parts(t.samples, "plain"), median(ratios(t.samples, "group", "plain"))))
	}
	fmt.Fprint(out, "\n| connections | verve, 2 instances + Redis, us | plain, 2 instances + Redis, us | verve/plain |\n|---|---|---|---|\n")
	for _, row := range rows {
		fmt.Fprintln(out, row)
	}
	return samples, nil
}

// parts is what a request costs the instances and Redis.
func parts(samples []sample, name string) string {
	redis := median(column(samples, name, func(s sample) float64 { return s.Redis }))
	all := median(column(samples, name, cpu))
	return fmt.Sprintf("%.1f + %.1f = %.1f", all-redis, redis, all)
}

// startPair runs a Redis and the two instances of a design.
func (r *run) startPair(design string) (p pair, err error) {
	if p.redis, err = r.startRedis(); err != nil {
		return p, err
	}
	server, flags := design, []string{p.redis.addr}
	if design == "group" {
		server, flags = "verve", append(slices.Clone(r.Flags), "--dedup=redis", "--redis-url=redis://"+p.redis.addr, batchWindow)
	}
	for i := range 2 {
		instance, err := r.start(server, design+strconv.Itoa(i), flags)
		if err != nil {
			return p, err
		}
		p.instances = append(p.instances, instance)
	}
	return p, nil
}
