package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/mattn/go-isatty"

	"verve/counter"
	"verve/internal/setting"
	"verve/stream"
)

// errIncomplete makes verve totals exit 1: it has said what is missing.
var errIncomplete = errors.New("records are missing or repeated")

// totalsSettle is how long records may come one after the other before the
// windows that they changed are printed: those of several instances, and a whole
// topic that is read from its beginning, then give each window one line.
const totalsSettle = 300 * time.Millisecond

// totalLine is one window as verve totals prints it into a pipe.
type totalLine struct {
	Group    string    `json:"group"`
	Start    time.Time `json:"window_start"`
	MS       int64     `json:"window_ms"`
	Unique   uint64    `json:"unique"`
	Records  int       `json:"records"`
	Complete bool      `json:"complete"`
	Exact    bool      `json:"exact"`
}

// start is the time that --since means: RFC 3339, or so long before now.
func (c totalsCmd) start(now time.Time) (time.Time, error) {
	if c.Since == "" {
		return time.Time{}, nil
	}
	if at, err := time.Parse(time.RFC3339, c.Since); err == nil {
		return at, nil
	}
	if ago, err := time.ParseDuration(c.Since); err == nil && ago >= 0 {
		return now.Add(-ago), nil
	}
	return time.Time{}, setting.Errorf("since", "want a time as 2026-11-22T06:36:00Z, or a duration as 2h")
}

// totals prints the sum of each window: a table on a terminal, JSON Lines in a
// pipe. Gaps and repeats go to stderr and make it fail; pauses in which nothing
// ran go to stderr only.
func totals(cfg *config, stdout, stderr *os.File) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	follow := cfg.Totals.Follow
	var records iter.Seq2[stream.Record, error]
	from := "topic " + cfg.KafkaTopic
	switch file := cfg.countsFile(); {
	case len(cfg.KafkaBrokers) > 0:
		records = stream.ReadTopic(ctx, cfg.kafka(), follow)
	case file == "" || file == "-":
		return cfg.explain(setting.Errorf("counts-file", "no file to read: name one, or set --kafka-brokers"))
	default:
		records = stream.ReadFile(ctx, file, follow)
		from = file
	}
	since, _ := cfg.Totals.start(time.Now()) // judged by config.judge
	r := totalsReport{from: from, since: since, out: newTotalsPrinter(stdout, isatty.IsTerminal(stdout.Fd())), err: stderr}
	if follow {
		return r.follow(ctx, records)
	}
	return r.whole(ctx, records)
}

// totalsReport reads records and says what they add up to and what is wrong.
type totalsReport struct {
	from  string    // what is read, for messages
	since time.Time // windows that start before are left out
	any   bool      // record was added

	sums    stream.Totals
	changed map[groupWindow]bool // by records that were taken and not printed
	out     *totalsPrinter
	err     io.Writer
	bad     bool
}

func (t *totalsReport) complain(format string, args ...any) {
	t.bad = true
	fmt.Fprintf(t.err, format+"\n", args...)
}

// gap names what is missing, and what is not because nothing ran.
func (t *totalsReport) gap(g stream.Gap) {
	if g.Idle {
		fmt.Fprintf(t.err, "idle: %v\n", g)
		return
	}
	t.complain("gap: %v", g)
}

// empty says that there was nothing to add up.
func (t *totalsReport) empty() {
	if t.any {
		return
	}
	after := ""
	if !t.since.IsZero() {
		after = " of windows since " + t.since.UTC().Format(time.RFC3339)
	}
	fmt.Fprintf(t.err, "no records%s in %s\n", after, t.from)
}

// read names a record that is none, leaves out those of earlier windows, and
// returns what ends the reading.
func (t *totalsReport) read(ctx context.Context, r stream.Record, err error) (skip bool, end error) {
	switch {
	case stream.IsInvalidRecord(err):
		t.complain("invalid: %v", err)
		return true, nil
	case err != nil && ctx.Err() != nil:
		return true, nil // told to stop
	}
	if err != nil {
		return false, err
	}
	skip = r.WindowStart.Before(t.since)
	t.any = t.any || !skip
	return skip, nil
}

func (t *totalsReport) whole(ctx context.Context, records iter.Seq2[stream.Record, error]) error {
	for r, err := range records {
		skip, err := t.read(ctx, r, err)
		if err != nil {
			return err
		}
		if !skip {
			t.sums.Add(r)
		}
	}
	t.empty()
	t.out.print(t.sums.Windows())
	for _, g := range t.sums.Gaps() {
		t.gap(g)
	}
	for _, r := range t.sums.Repeats() {
		t.complain("repeat: %v", r)
	}
	return t.verdict()
}

// follow prints each window when its records stop coming, again if another one
// comes, and names what is wrong when it sees it.
func (t *totalsReport) follow(ctx context.Context, records iter.Seq2[stream.Record, error]) error {
	reads := make(chan readRecord)
	done := make(chan struct{})
	defer close(done)
	go func() {
		defer close(reads)
		for r, err := range records {
			select {
			case reads <- readRecord{r, err}:
			case <-done:
				return
			}
		}
	}()
	t.changed = make(map[groupWindow]bool)
	var settled <-chan time.Time
	for {
		select {
		case <-settled:
			t.printChanged()
			settled = nil
		case r, ok := <-reads:
			if !ok {
				t.printChanged()
				t.empty()
				t.bad = t.bad || slices.ContainsFunc(t.sums.Gaps(), func(g stream.Gap) bool { return !g.Idle })
				return t.verdict()
			}
			if err := t.take(ctx, r); err != nil {
				t.printChanged()
				return err
			}
			if settled == nil && len(t.changed) > 0 {
				settled = time.After(totalsSettle)
			}
		}
	}
}

// readRecord is what a reader of records yields.
type readRecord struct {
	stream.Record
	err error
}

// groupWindow is a window of a group.
type groupWindow struct {
	group string
	counter.Span
}

// take adds a record that comes in order, and names what is missing before it.
func (t *totalsReport) take(ctx context.Context, r readRecord) error {
	skip, err := t.read(ctx, r.Record, r.err)
	if skip || err != nil {
		return err
	}
	for _, g := range t.sums.Before(r.Record) {
		t.gap(g)
	}
	known := len(t.sums.Repeats())
	t.sums.Add(r.Record)
	for _, again := range t.sums.Repeats()[known:] {
		t.complain("repeat: %v", again)
	}
	t.changed[groupWindow{r.Group, r.Span()}] = true
	return nil
}

// printChanged prints the windows that were added to since it was last called.
func (t *totalsReport) printChanged() {
	var sums []stream.WindowTotal
	for w := range t.changed {
		if s, ok := t.sums.Window(w.group, w.Span); ok {
			sums = append(sums, s)
		}
	}
	slices.SortFunc(sums, func(a, b stream.WindowTotal) int {
		return cmp.Or(a.Start.Compare(b.Start), cmp.Compare(a.Group, b.Group), cmp.Compare(a.Window, b.Window))
	})
	t.out.print(sums)
	clear(t.changed)
}

func (t *totalsReport) verdict() error {
	if t.bad {
		return errIncomplete
	}
	return nil
}

// totalsPrinter writes windows as a table or as JSON Lines.
type totalsPrinter struct {
	json  *json.Encoder // nil: a table
	table *tabwriter.Writer
}

func newTotalsPrinter(out io.Writer, table bool) *totalsPrinter {
	if !table {
		return &totalsPrinter{json: json.NewEncoder(out)}
	}
	t := &totalsPrinter{table: tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)}
	fmt.Fprintf(t.table, "%-20s\t%-8s\t%12s\t%7s\t%s\n", "WINDOW", "GROUP", "UNIQUE", "RECORDS", "NOTE")
	return t
}

func (p *totalsPrinter) print(windows []stream.WindowTotal) {
	for _, w := range windows {
		if p.json != nil {
			_ = p.json.Encode(totalLine{w.Group, w.Start, w.Window.Milliseconds(), w.Unique, w.Records, w.Complete, w.Exact})
			continue
		}
		var notes []string
		if !w.Complete {
			notes = append(notes, "partial")
		}
		if !w.Exact {
			notes = append(notes, "not exact")
		}
		// Padded, as rows that are printed later should stand below each other.
		fmt.Fprintf(p.table, "%-20s\t%-8s\t%12d\t%7d\t%s\n", w.Start.Format(time.RFC3339Nano), w.Group, w.Unique, w.Records, strings.Join(notes, ", "))
	}
	if p.table != nil {
		_ = p.table.Flush()
	}
}
