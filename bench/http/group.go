package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"time"
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
	instances [2]*process
	redis     *process
}

func (p *pair) all() []*process {
	return slices.DeleteFunc([]*process{p.instances[0], p.instances[1], p.redis}, func(p *process) bool { return p == nil })
}

// groups compares two instances that share a Redis with plain: what each request costs the
// instances and Redis together. The core of the servers is full in none of the cases but the
// last ones.
func (r *run) groups(ctx context.Context, out io.Writer, root, dir string) (samples []sample, err error) {
	pairs := map[string]*pair{}
	defer func() {
		for _, p := range pairs {
			for _, one := range p.all() {
				err = errors.Join(err, one.end())
			}
		}
	}()
	for _, name := range designsOfGroup {
		pairs[name] = &pair{}
		if err = pairs[name].start(r, name, dir); err != nil {
			return nil, err
		}
	}
	var rows []string
	for _, c := range groupCases {
		scenario := fmt.Sprintf("group-%d-%d", c.conns, c.depth)
		w := wrk{script: filepath.Join(root, "bench", "wrk", "unique.lua"), conns: c.conns}
		if c.depth > 1 {
			w.script = filepath.Join(root, "bench", "wrk", "pipelined.lua")
		}
		title := fmt.Sprintf("%d connections, %d in flight on each: CPU for a request, us", c.conns, c.depth)
		t, err := r.rounds(out, title, designsOfGroup, func(name string, round int) (sample, error) {
			if round == 0 { // requests may wait for tables that grow to their size
				_, _ = pairs[name].measure(ctx, w, r.WarmUp)
				return sample{}, ctx.Err()
			}
			s, err := pairs[name].measure(ctx, w, r.Seconds)
			if err == nil && 100*s.Failed > s.Requests {
				err = fmt.Errorf("%d of %d requests were refused", s.Failed, s.Requests)
			}
			s.Scenario, s.Server = scenario, name
			return s, err
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

// start runs a Redis and the two instances of a design.
func (p *pair) start(r *run, design, dir string) (err error) {
	if p.redis, err = startRedis(dir); err != nil {
		return err
	}
	server, flags := design, []string{p.redis.addr}
	if design == "group" {
		server, flags = "verve", append(slices.Clone(r.Flags), "--dedup=redis", "--redis-url=redis://"+p.redis.addr, batchWindow)
	}
	for i := range p.instances {
		if p.instances[i], err = start(server, r.Binary, filepath.Join(dir, design+strconv.Itoa(i)), flags); err != nil {
			return err
		}
	}
	return nil
}

// measure drives both instances, each with half of the connections, or one with the only
// one. CPU is that of all, Redis its part.
func (p *pair) measure(ctx context.Context, w wrk, seconds int) (s sample, err error) {
	driven := p.instances[:min(w.conns, len(p.instances))]
	w.conns /= len(driven)
	before, beforeRedis, err := p.cpuTime()
	if err != nil {
		return s, err
	}
	type outcome struct {
		sample
		err error
	}
	done := make(chan outcome)
	for _, instance := range driven {
		go func() {
			s, err := w.drive(ctx, instance.addr, seconds)
			done <- outcome{s, err}
		}()
	}
	for range driven {
		o := <-done
		err = errors.Join(err, o.err)
		s.Requests, s.Failed, s.PerSec, s.P99 = s.Requests+o.Requests, s.Failed+o.Failed, s.PerSec+o.PerSec, max(s.P99, o.P99)
	}
	after, afterRedis, cerr := p.cpuTime()
	if err = errors.Join(err, cerr); err != nil {
		return s, err
	}
	s.CPU = float64((after - before).Microseconds()) / float64(s.Requests)
	s.Redis = float64((afterRedis - beforeRedis).Microseconds()) / float64(s.Requests)
	return s, nil
}

// cpuTime is the CPU time of all so far, and of Redis.
func (p *pair) cpuTime() (all, redis time.Duration, err error) {
	for _, one := range p.all() {
		t, err := one.cpuTime()
		if err != nil {
			return 0, 0, err
		}
		if all += t; one == p.redis {
			redis = t
		}
	}
	return all, redis, nil
}
