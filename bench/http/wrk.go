//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// load is requests that are sent to servers: a column of a table.
type load struct {
	name    string
	script  string   // of wrk
	args    []string // of the script, behind the number of the run
	conns   int
	ids     int        // in a request; 0: one
	failing float64    // which share of the answers must be failures
	servers []*process // each gets a part of the connections
	redis   []*process // of the servers
}

// drive sends for some seconds. The sample's CPU is that of the servers and of their Redis, if
// there is one, together, for an id.
func (r *run) drive(ctx context.Context, l load, seconds int) (s sample, err error) {
	servers := l.servers[:min(l.conns, len(l.servers))]
	before, err := cpuTimes(servers, l.redis)
	if err != nil {
		return s, err
	}
	var mu sync.Mutex // of s and err
	var driving sync.WaitGroup
	for _, p := range servers {
		driving.Go(func() {
			one, failed := r.wrk(ctx, l, p.addr, l.conns/len(servers), seconds)
			mu.Lock()
			defer mu.Unlock()
			err = errors.Join(err, failed)
			s.Requests, s.Failed, s.PerSec, s.P99 = s.Requests+one.Requests, s.Failed+one.Failed, s.PerSec+one.PerSec, max(s.P99, one.P99)
		})
	}
	driving.Wait()
	after, failed := cpuTimes(servers, l.redis)
	if err = errors.Join(err, failed); err != nil {
		return s, err
	}
	ids := float64(s.Requests) * float64(max(1, l.ids))
	s.Redis = float64((after[1] - before[1]).Microseconds()) / ids
	s.CPU = float64((after[0]-before[0]).Microseconds())/ids + s.Redis
	// At a minute's turn repeats are new again, and wrk ends between the
	// sending of a request and its answer.
	if share := float64(s.Failed) / float64(s.Requests); share < l.failing-0.05 || share > l.failing+0.01 {
		return s, fmt.Errorf("%.1f %% of the answers failed, want %.0f %%", 100*share, 100*l.failing)
	}
	return s, nil
}

var (
	wrkRequests = regexp.MustCompile(`(\d+) requests in `)
	wrkFailed   = regexp.MustCompile(`Non-2xx or 3xx responses: (\d+)`)
	wrkErrors   = regexp.MustCompile(`Socket errors: .*`)
	wrkPerSec   = regexp.MustCompile(`Requests/sec:\s+([\d.]+)`)
	wrkP99      = regexp.MustCompile(`\s99%\s+([\d.]+(?:us|ms|s|m|h))`)
)

// runs numbers the runs of wrk, so that ids are new over all of them.
var runs atomic.Int64

func init() { runs.Store(1_000_000 + time.Now().Unix()%1_000_000) }

// wrk drives one server with one thread, which is what one core can use.
func (r *run) wrk(ctx context.Context, l load, addr string, conns, seconds int) (s sample, err error) {
	script := filepath.Join(r.root, "bench", "wrk", l.script+".lua")
	cmd := pinned(ctx, wrkCore, "wrk", append([]string{"-t1", "-c", strconv.Itoa(conns), "-d", strconv.Itoa(seconds), "--latency",
		"-s", script, "http://" + addr, "--", strconv.FormatInt(runs.Add(1), 10)}, l.args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return s, ctx.Err()
	}
	if err != nil {
		return s, fmt.Errorf("wrk: %w\n%s", err, out)
	}
	if e := wrkErrors.Find(out); e != nil {
		return s, fmt.Errorf("wrk: %s", e)
	}
	// The expressions let only numbers and durations through; what is not there is 0.
	text := func(re *regexp.Regexp) string {
		if m := re.FindSubmatch(out); m != nil {
			return string(m[1])
		}
		return "0"
	}
	number := func(re *regexp.Regexp) float64 {
		f, _ := strconv.ParseFloat(text(re), 64)
		return f
	}
	p99, _ := time.ParseDuration(text(wrkP99))
	s.Requests, s.Failed = uint64(number(wrkRequests)), uint64(number(wrkFailed))
	s.PerSec, s.P99 = number(wrkPerSec), float64(p99)/float64(time.Millisecond)
	if s.Requests == 0 {
		return s, errors.New("wrk: no request was answered")
	}
	return s, nil
}
