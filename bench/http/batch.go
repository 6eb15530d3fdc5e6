package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"

	"verve/stream"
)

// batchCase is a form of batches. Every case is a column of one table, driven in
// rounds beside single requests to the same server.
type batchCase struct {
	name   string
	script string
	ids    int
	form   string
	group  bool // the ids are in Redis, whose CPU time counts, too
}

var batchCases = []batchCase{
	{name: "single", script: "unique.lua", ids: 1},
	{name: "decimals", script: "batch.lua", ids: 1000, form: "decimal"},
	{name: "uuids", script: "batch.lua", ids: 1000, form: "uuid"},
	{name: "json", script: "batch.lua", ids: 1000, form: "json"},
	{name: "hundred", script: "batch.lua", ids: 100, form: "decimal"},
	{name: "group", script: "batch.lua", ids: 1000, form: "decimal", group: true},
}

// turnWindow makes enough windows in a round for a percentile of their lateness.
const turnWindow = 100 * time.Millisecond

// batchExpect is about the number of ids in a minute of these cases.
const batchExpect = 60_000_000

// groupConns keeps the ids that wait for Redis below what it does in the time that an
// instance waits for it, with the core shared by both.
const groupConns = 2

// batch drives the servers with one case.
func (r *run) batch(ctx context.Context, root string, c batchCase, round int, on []*process) (sample, error) {
	w := wrk{script: filepath.Join(root, "bench", "wrk", c.script), conns: min(r.Conns, 16), args: []string{strconv.Itoa(c.ids), c.form}}
	if c.group {
		w.conns = min(r.Conns, groupConns)
	}
	if round == 0 { // the tables grow to their sizes, also that of UUIDs
		_, err := measure(ctx, w, r.WarmUp+3, on...)
		if ctx.Err() == nil {
			err = nil
		}
		return sample{}, err
	}
	s, err := measure(ctx, w, r.Seconds, on...)
	if err != nil {
		return s, fmt.Errorf("%s: %w", c.name, err)
	}
	if 100*s.Failed > s.Requests {
		return s, fmt.Errorf("%s: %d batches were refused", c.name, s.Failed)
	}
	s.Scenario, s.Server, s.Round = "batch", c.name, round
	s.CPU /= float64(c.ids)
	return s, nil
}

// batches drives Verve with batches of ids. A sample's CPU is of an id, not of a
// request. The last case is how late windows are sealed while batches of 10,000 ids
// are judged.
func (r *run) batches(ctx context.Context, out io.Writer, root, dir string) (samples []sample, err error) {
	var alone, group, redis *process
	defer func() {
		for _, p := range []*process{alone, group, redis} {
			if p != nil {
				err = errors.Join(err, p.end())
			}
		}
	}()
	if alone, err = start("verve", r.Binary, filepath.Join(dir, "batch"), append(slices.Clone(r.Flags), "--expect-ids="+strconv.Itoa(batchExpect))); err != nil {
		return nil, err
	}
	if redis, err = startRedis(dir); err != nil {
		return nil, err
	}
	if group, err = start("verve", r.Binary, filepath.Join(dir, "batch-group"), []string{"--dedup=redis", "--redis-url=redis://" + redis.addr}); err != nil {
		return nil, err
	}
	fmt.Fprintln(out, "batch: CPU of the server for an id, us (decimals, uuids, json, group: 1,000 ids in a request; hundred: 100)")
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	row := func(head string, cell func(c batchCase) string) {
		fmt.Fprint(table, head, "\t")
		for _, c := range batchCases {
			fmt.Fprint(table, cell(c), "\t")
		}
		fmt.Fprintln(table)
	}
	row("round", func(c batchCase) string { return c.name })
	for round := range r.Rounds + 1 {
		for i := range batchCases {
			c := batchCases[(round+i)%len(batchCases)]
			on := []*process{alone}
			if c.group {
				on = []*process{group, redis}
			}
			s, err := r.batch(ctx, root, c, round, on)
			if err != nil {
				return samples, err
			}
			if round == 0 {
				continue // requests may wait for the growth
			}
			samples = append(samples, s)
		}
		if round > 0 {
			this := samples[len(samples)-len(batchCases):]
			row(strconv.Itoa(round), func(c batchCase) string {
				return fmt.Sprintf("%.3f", this[slices.IndexFunc(this, func(s sample) bool { return s.Server == c.name })].CPU)
			})
		}
	}
	medianOf := func(c batchCase) float64 { return median(column(samples, c.name, cpu)) }
	row("median", func(c batchCase) string { return fmt.Sprintf("%.3f", medianOf(c)) })
	row("M ids per second of CPU", func(c batchCase) string { return fmt.Sprintf("%.2f", 1/medianOf(c)) })
	row("single/it", func(c batchCase) string { return fmt.Sprintf("%.1f", median(ratios(samples, "single", c.name))) })
	_ = table.Flush() // standard output: nobody is left to tell
	late, err := r.lateness(ctx, root, dir)
	if err != nil {
		return samples, err
	}
	fmt.Fprintf(out, "windows of %v under batches of 10,000: sealed %.2f ms after their end at p99\n\n", turnWindow, late.P99)
	return append(samples, late), nil
}

// ratios of the CPU of a and b, round by round.
func ratios(samples []sample, a, b string) []float64 {
	va, vb := column(samples, a, cpu), column(samples, b, cpu)
	for i := range va {
		va[i] /= vb[i]
	}
	return va
}

// lateness drives a server with short windows, and reads from its records how long
// after their ends they were sealed.
func (r *run) lateness(ctx context.Context, root, dir string) (s sample, err error) {
	data := filepath.Join(dir, "batch-turn")
	p, err := start("verve", r.Binary, data, []string{"--window=" + turnWindow.String(), "--expect-ids=2000000"})
	if err != nil {
		return s, err
	}
	w := wrk{script: filepath.Join(root, "bench", "wrk", "batch.lua"), conns: 4, args: []string{"10000"}}
	s, err = measure(ctx, w, max(r.Seconds, 10), p)
	if err = errors.Join(err, p.end()); err != nil {
		return s, err
	}
	f, err := os.Open(filepath.Join(data, "counts.jsonl"))
	if err != nil {
		return s, err
	}
	defer f.Close()
	var late []float64
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var rec stream.Record
		if err := json.Unmarshal(lines.Bytes(), &rec); err != nil {
			return s, err
		}
		if rec.Complete && rec.Unique > 0 {
			late = append(late, float64(rec.SealedAt.Sub(rec.WindowStart.Add(turnWindow)))/float64(time.Millisecond))
		}
	}
	if len(late) == 0 {
		return s, errors.New("no window was sealed under load")
	}
	slices.Sort(late)
	s.Scenario, s.Server, s.CPU, s.P99 = "batch", "turn", s.CPU/10_000, late[len(late)*99/100]
	return s, nil
}

// startRedis runs a Redis on the servers' core.
func startRedis(dir string) (p *process, err error) {
	if _, err := exec.LookPath("redis-server"); err != nil {
		return nil, errors.New("redis-server is not installed")
	}
	p = &process{name: "redis", done: make(chan error, 1)}
	if p.addr, err = freeAddr(); err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(p.addr)
	if err != nil {
		return nil, err
	}
	p.cmd = pinned(serverCore, "redis-server", "--bind", "127.0.0.1", "--port", port, "--save", "", "--dir", dir, "--logfile", "redis.log")
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { p.done <- p.cmd.Wait() }()
	if err := p.awaitConnections(); err != nil {
		return nil, err
	}
	return p, nil
}
