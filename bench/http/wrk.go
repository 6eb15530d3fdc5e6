//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

// wrk drives a server with a script.
type wrk struct {
	script string
	conns  int
	args   []string // of the script, behind the number of the run
}

var (
	wrkRequests = regexp.MustCompile(`(\d+) requests in `)
	wrkFailed   = regexp.MustCompile(`Non-2xx or 3xx responses: (\d+)`)
	wrkErrors   = regexp.MustCompile(`Socket errors: .*`)
	wrkPerSec   = regexp.MustCompile(`Requests/sec:\s+([\d.]+)`)
	wrkP99      = regexp.MustCompile(`\s99%\s+(\S+)`)
)

// runs numbers the runs of wrk, so that ids are new over all of them.
var runs atomic.Int64

func init() { runs.Store(1_000_000 + time.Now().Unix()%1_000_000) }

// drive sends for some seconds with one thread, which is what one core can use.
func (w wrk) drive(ctx context.Context, addr string, seconds int) (s sample, err error) {
	cmd := pinned(ctx, wrkCore, "wrk", append([]string{"-t1", "-c", strconv.Itoa(w.conns), "-d", strconv.Itoa(seconds), "--latency",
		"-s", w.script, "http://" + addr, "--", strconv.FormatInt(runs.Add(1), 10)}, w.args...)...)
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
	number := func(re *regexp.Regexp) float64 {
		m := re.FindSubmatch(out)
		if m == nil {
			return 0
		}
		f, _ := strconv.ParseFloat(string(m[1]), 64) // the expression lets only numbers through
		return f
	}
	s.Requests, s.Failed = uint64(number(wrkRequests)), uint64(number(wrkFailed))
	s.PerSec = number(wrkPerSec)
	if m := wrkP99.FindSubmatch(out); m != nil {
		p99, err := time.ParseDuration(string(m[1]))
		if err != nil {
			return s, fmt.Errorf("wrk: %w", err)
		}
		s.P99 = float64(p99) / float64(time.Millisecond)
	}
	if s.Requests == 0 {
		return s, errors.New("wrk: no request was answered")
	}
	return s, nil
}
