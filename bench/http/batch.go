//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"verve/stream"
)

// form is a form of requests: a column of a table, driven in rounds beside the others.
type form struct {
	name   string
	script string
	ids    int      // in a request
	args   []string // of the script, behind the number of the run
	group  bool     // the ids are in Redis, whose CPU time counts, too
	than   string   // the form that it is compared with
}

var batchForms = []form{
	{name: "single", script: "unique", ids: 1},
	{name: "decimals", script: "batch", ids: 1000, args: []string{"1000", "decimal"}},
	{name: "uuids", script: "batch", ids: 1000, args: []string{"1000", "uuid"}},
	{name: "json", script: "batch", ids: 1000, args: []string{"1000", "json"}},
	{name: "hundred", script: "batch", ids: 100, args: []string{"100", "decimal"}},
	{name: "group", script: "batch", ids: 1000, args: []string{"1000", "decimal"}, group: true},
}

// optionForms compare requests with a token, or with one of 1,000 keys, with the same
// without.
var optionForms = []form{
	{name: "plain", script: "unique", ids: 1},
	{name: "token", script: "unique", ids: 1, args: []string{"token"}, than: "plain"},
	{name: "key", script: "unique", ids: 1, args: []string{"key"}, than: "plain"},
	{name: "lines", script: "batch", ids: 1000, args: []string{"1000", "decimal"}},
	{name: "lines-key", script: "batch", ids: 1000, args: []string{"1000", "decimal", "key"}, than: "lines"},
	{name: "items", script: "batch", ids: 1000, args: []string{"1000", "items"}},
	{name: "items-key", script: "batch", ids: 1000, args: []string{"1000", "items", "key"}, than: "items"},
	{name: "items-token", script: "batch", ids: 1000, args: []string{"1000", "items", "token"}, than: "items"},
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

// forms drives a server with requests of the forms, and a group with those that are for it:
// one instance and its Redis.
func (r *run) forms(ctx context.Context, out io.Writer, scenario, title string, forms []form, server *process, group ...*process) (*table, error) {
	const grow = 3 // seconds more: also the table of UUIDs grows
	return r.rounds(ctx, out, scenario, title, names(forms), r.WarmUp+grow, func(name string, seconds int) (s sample, err error) {
		f := formOf(forms, name)
		w := wrk{script: r.script(f.script), conns: min(r.Conns, 16), args: f.args}
		if f.group {
			w.conns = min(r.Conns, groupConns)
			s, err = measure(ctx, w, seconds, group[:1], group[1:]...)
		} else {
			s, err = measure(ctx, w, seconds, []*process{server})
		}
		s.CPU /= float64(f.ids)
		s.Redis /= float64(f.ids)
		return s, cmp.Or(err, s.plausible(0))
	})
}

func formOf(forms []form, name string) form {
	return forms[slices.IndexFunc(forms, func(f form) bool { return f.name == name })]
}

func names(forms []form) (names []string) {
	for _, f := range forms {
		names = append(names, f.name)
	}
	return names
}

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
	title := "batch: CPU of the server for an id, us (decimals, uuids, json, group: 1,000 ids in a request; hundred: 100)"
	t, err := r.forms(ctx, out, "batch", title, batchForms, alone, group, redis)
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
	t, err := r.forms(ctx, out, "options", title, optionForms, p)
	if err != nil {
		return t.samples, err
	}
	t.row("it/without", func(name string) string {
		if than := formOf(optionForms, name).than; than != "" {
			return fmt.Sprintf("%.3f", median(ratios(t.samples, name, than)))
		}
		return ""
	})
	t.end()
	plain := column(t.samples, "plain", cpu)
	costs := column(t.samples, "token", cpu)
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
	if _, err := r.start("verve", folder, []string{"--window=" + turnWindow.String(), "--expect-ids=2000000"}); err != nil {
		return s, err
	}
	unix.Sync() // else stores into the journal wait for the disk, which writes what the build has left
	w := wrk{script: r.script("batch"), conns: 4, args: []string{"10000"}}
	// In its first windows the server makes the files of its journal, each of which is synced.
	if _, err = measure(ctx, w, max(r.WarmUp, 3), r.servers); err != nil {
		return s, err
	}
	began := time.Now()
	s, err = measure(ctx, w, max(r.Seconds, 20), r.servers) // 200 windows
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
	slices.Sort(late)
	s.Scenario, s.Server, s.CPU, s.P99 = "batch", "turn", s.CPU/10_000, late[len(late)*99/100]
	return s, nil
}
