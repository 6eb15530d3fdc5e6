package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"os"
	"os/signal"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/mattn/go-isatty"

	"verve/stream"
)

// errIncomplete makes verve totals exit 1: it has said what is missing.
var errIncomplete = errors.New("the records are not all there, or not all once")

// totalLine is one window as verve totals prints it into a pipe.
type totalLine struct {
	Start    time.Time `json:"window_start"`
	MS       int64     `json:"window_ms"`
	Unique   uint64    `json:"unique"`
	Records  int       `json:"records"`
	Complete bool      `json:"complete"`
	Exact    bool      `json:"exact"`
}

// totals prints the sum of each window: a table on a terminal, JSON Lines in a
// pipe. Gaps and repeats go to stderr and make it fail.
func totals(cfg *config, stdout, stderr *os.File) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	follow := cfg.Totals.Follow
	var records iter.Seq2[stream.Record, error]
	switch file := cfg.countsFile(); {
	case len(cfg.KafkaBrokers) > 0:
		records = stream.ReadTopic(ctx, cfg.kafka(), follow)
	case file == "" || file == "-":
		return usageError{errors.New("--counts-file: name the file to read, or --kafka-brokers")}
	default:
		records = stream.ReadFile(ctx, file, follow)
	}

	print, flush := printer(stdout)
	var sums stream.Totals
	bad := false
	for r, err := range records {
		switch {
		case stream.IsInvalidRecord(err):
			bad = true
			fmt.Fprintf(stderr, "verve: %v\n", err)
			continue
		case err != nil && ctx.Err() != nil:
			continue // told to stop
		case err != nil:
			return err
		}
		sums.Add(r)
		if follow {
			if w, ok := sums.Window(r.WindowStart); ok {
				print(w)
				flush()
			}
		}
	}
	if !follow {
		for _, w := range sums.Windows() {
			print(w)
		}
		flush()
	}
	for _, g := range sums.Gaps() {
		bad = true
		fmt.Fprintf(stderr, "gap: %v\n", g)
	}
	for _, r := range sums.Repeats() {
		bad = true
		fmt.Fprintf(stderr, "repeat: %v\n", r)
	}
	if bad {
		return errIncomplete
	}
	return nil
}

// printer returns how to print a window to out and how to end a batch of them.
func printer(out *os.File) (print func(stream.WindowTotal), flush func()) {
	if !isatty.IsTerminal(out.Fd()) {
		enc := json.NewEncoder(out)
		return func(w stream.WindowTotal) {
			_ = enc.Encode(totalLine{w.Start, w.Window.Milliseconds(), w.Unique, w.Records, w.Complete, w.Exact})
		}, func() {}
	}
	t := tabwriter.NewWriter(out, 22, 0, 2, ' ', 0)
	fmt.Fprintln(t, "WINDOW\tUNIQUE\tRECORDS\t")
	return func(w stream.WindowTotal) {
		note := ""
		if !w.Complete {
			note = "not complete"
		}
		if !w.Exact {
			note += " not exact"
		}
		fmt.Fprintf(t, "%s\t%d\t%d\t%s\n", w.Start.Format(time.RFC3339Nano), w.Unique, w.Records, note)
	}, func() { _ = t.Flush() }
}
