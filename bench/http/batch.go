//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"verve/stream"
)

// batchLoads compare forms of requests, and options the same with a token, or with one of
// 1,000 keys: what stands before the hyphen is the form without.
var (
	batchLoads = []load{
		{name: "single", script: "unique"},
		{name: "decimals", script: "batch", ids: 1000, args: []string{"1000", "decimal"}},
		{name: "uuids", script: "batch", ids: 1000, args: []string{"1000", "uuid"}},
		{name: "json", script: "batch", ids: 1000, args: []string{"1000", "json"}},
		{name: "hundred", script: "batch", ids: 100, args: []string{"100", "decimal"}},
	}
	optionLoads = []load{
		{name: "plain", script: "unique"},
		{name: "plain-token", script: "unique", args: []string{"token"}},
		{name: "plain-key", script: "unique", args: []string{"key"}},
		{name: "lines", script: "batch", ids: 1000, args: []string{"1000", "decimal"}},
		{name: "lines-key", script: "batch", ids: 1000, args: []string{"1000", "decimal", "key"}},
		{name: "items", script: "batch", ids: 1000, args: []string{"1000", "items"}},
		{name: "items-key", script: "batch", ids: 1000, args: []string{"1000", "items", "key"}},
		{name: "items-token", script: "batch", ids: 1000, args: []string{"1000", "items", "token"}},
	}
)

// sentTo returns the loads with the server that they are for.
func (r *run) sentTo(p *process, loads []load) []load {
	loads = slices.Clone(loads)
	for i := range loads {
		loads[i].conns, loads[i].servers = min(r.Conns, 16), []*process{p}
	}
	return loads
}

// turnWindow makes enough windows in a round for a percentile of their lateness.
const turnWindow = 100 * time.Millisecond

// batchExpect is more than the number of ids in a window of these cases: what a table costs
// that grows is not measured here.
const batchExpect = "--expect-ids=60000000"

const batchWindow = "--window=15s"

// groupConns keeps the ids that wait for Redis below what it does in the time that an
// instance waits for it, with the core shared by both.
const groupConns = 2

// grow is how many seconds more it takes to warm up: also the table of UUIDs grows.
const grow = 3

// batches drives Verve with batches of ids. A sample's CPU is of an id, not of a
// request. The first case is how late windows are sealed while batches of 10,000 ids
// are judged, with no other server on the core.
func (r *run) batches(ctx context.Context, out io.Writer) ([]sample, error) {
	late, err := r.lateness(ctx)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(out, "windows of %v under batches of 10,000: sealed %.2f ms after their end at p99\n", turnWindow, late.P99)
	alone, err := r.start("verve", "batch", append(slices.Clone(r.Flags), batchWindow, batchExpect))
	if err != nil {
		return nil, err
	}
	redis, err := r.startRedis()
	if err != nil {
		return nil, err
	}
	group, err := r.start("verve", "batch-group", []string{"--dedup=redis", "--redis-url=redis://" + redis.addr})
	if err != nil {
		return nil, err
	}
	loads := append(r.sentTo(alone, batchLoads), load{
		name: "group", script: "batch", ids: 1000, args: []string{"1000", "decimal"},
		conns: min(r.Conns, groupConns), servers: []*process{group}, redis: []*process{redis},
	})
	title := "batch: CPU of the server for an id, us (decimals, uuids, json, group: 1,000 ids in a request; hundred: 100)"
	t, err := r.rounds(ctx, out, "batch", title, r.WarmUp+grow, loads)
	if err != nil {
		return t.samples, err
	}
	t.row("M ids per second of CPU", func(name string) string { return fmt.Sprintf("%.2f", 1/median(column(t.samples, name, cpu))) })
	t.row("single/it", func(name string) string { return fmt.Sprintf("%.1f", median(ratios(t.samples, "single", name))) })
	t.end()
	return append(t.samples, late), nil
}

// options drives Verve with requests with and without tokens and keys. token-cost is what
// a token costs more than the same request without.
func (r *run) options(ctx context.Context, out io.Writer) ([]sample, error) {
	p, err := r.start("verve", "options", append(slices.Clone(r.Flags), batchWindow, batchExpect))
	if err != nil {
		return nil, err
	}
	title := "options: CPU of the server for an id, us (key: one of 1,000; lines: 1,000 ids in a request; items: the same in JSON, an object each)"
	t, err := r.rounds(ctx, out, "options", title, r.WarmUp+grow, r.sentTo(p, optionLoads))
	if err != nil {
		return t.samples, err
	}
	t.row("it/without", func(name string) string {
		if without, _, with := strings.Cut(name, "-"); with {
			return fmt.Sprintf("%.3f", median(ratios(t.samples, name, without)))
		}
		return ""
	})
	t.end()
	plain := column(t.samples, "plain", cpu)
	costs := column(t.samples, "plain-token", cpu)
	for i := range costs {
		costs[i] -= plain[i]
		t.samples = append(t.samples, sample{Scenario: "options", Server: "token-cost", Round: i + 1, CPU: costs[i]})
	}
	fmt.Fprintf(out, "a token costs %.0f ns of CPU more\n\n", 1000*median(costs))
	return t.samples, nil
}

// lateness drives a server with short windows, and reads from its records how long
// after their ends they were sealed, without those of its first seconds.
func (r *run) lateness(ctx context.Context) (s sample, err error) {
	const folder = "batch-turn"
	p, err := r.start("verve", folder, []string{"--window=" + turnWindow.String(), "--expect-ids=2000000"})
	if err != nil {
		return s, err
	}
	unix.Sync() // else stores into the journal wait for the disk, which writes what the build has left
	l := load{script: "batch", conns: 4, args: []string{"10000"}, ids: 10_000, servers: []*process{p}}
	// In its first windows the server makes the files of its journal, each of which is synced.
	if _, err = r.drive(ctx, l, max(r.WarmUp, 3)); err != nil {
		return s, err
	}
	began := time.Now()
	s, err = r.drive(ctx, l, max(r.Seconds, 20)) // 200 windows
	if err = errors.Join(err, r.endAll()); err != nil {
		return s, err
	}
	var late []float64
	for rec, err := range stream.ReadFile(ctx, filepath.Join(r.dir, folder, "counts.jsonl"), false) {
		if err != nil {
			return s, err
		}
		if rec.Complete && rec.Unique > 0 && rec.WindowStart.After(began) {
			late = append(late, float64(rec.SealedAt.Sub(rec.WindowStart.Add(turnWindow)))/float64(time.Millisecond))
		}
	}
	if len(late) == 0 {
		return s, errors.New("no window was sealed under load")
	}
	s.Scenario, s.Server, s.P99 = "batch", "turn", quantile(late, .99)
	return s, nil
}
