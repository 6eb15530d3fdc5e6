package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"
	"unicode"

	"verve/counter"
	"verve/internal/setting"
	"verve/stream"

	"github.com/alecthomas/kong"
	"github.com/mattn/go-isatty"
)

const description = `Counts unique ids per window, exactly: GET /api/verve/accept?id=ID is answered ok the first time in a minute, and failed for a repeat. The count of each minute goes to a Kafka topic or to a file.

Each setting is a flag, an environment variable (in brackets below) or a key of the --config file; the first one given is used, in this order. An empty variable counts as not set. A value that can never work, and an unknown VERVE_ variable or key, stop the start before anything is written.

Examples:

	verve                                 Run the server. Live page: http://127.0.0.1:8081,
	                                      counts: verve-data/counts.jsonl.
	verve --kafka-brokers=kafka:9092      Send the counts to a Kafka topic.
	verve --window=2s                     Use short windows to try it.
	verve --config=/etc/verve.yaml --print-config
	                                      Show the settings in force and their sources.
	verve totals                          Add up the records and report what is missing.

Exit codes: 0 after a clean stop, 1 after a failure, 2 on a bad setting.`

// relevant has the settings that each command reads; serve, which is not here, reads all.
var relevant = map[string][]string{
	"totals": {"config", "print-config", "data-dir", "counts-file", "kafka-brokers", "kafka-topic", "kafka-keys-topic", "kafka-tls",
		"kafka-sasl", "kafka-user", "kafka-password-file"},
	"healthcheck": {"config", "admin-listen"},
	"version":     {},
}

// reads reports whether the command reads a setting of the server.
func reads(command, name string) bool {
	command, _, _ = strings.Cut(command, " ")
	read, limited := relevant[command]
	return !limited || slices.Contains(read, name)
}

// printHelp shows the flags that the command reads.
func printHelp(options kong.HelpOptions, ctx *kong.Context) error {
	for _, f := range ctx.Model.Flags {
		f.Hidden = f.Hidden || f.Name != "help" && !reads(ctx.Command(), f.Name)
	}
	for _, flags := range ctx.Model.AllFlags(false) {
		for _, f := range flags {
			f.Tag.Envs = f.Envs // config.flags has removed them
		}
	}
	return kong.DefaultHelpPrinter(options, ctx)
}

// output is the standard output of a command. It keeps the first error, because a command whose
// output cannot be written has failed.
type output struct {
	file *os.File
	err  error
}

// Write implements io.Writer.
func (o *output) Write(b []byte) (int, error) {
	n, err := o.file.Write(b)
	o.err = cmp.Or(o.err, err)
	return n, err
}

// errIncomplete makes verve totals exit 1, after the gaps and repeats are printed.
var errIncomplete = errors.New("records are missing or repeated")

// With --follow, windows are printed totalsSettle after the first record that changed them. The
// records of several instances arrive within that time, as do many records of a topic that is
// read from its beginning: so most windows get only one line.
const totalsSettle = 300 * time.Millisecond

// totalsKeysWait is how long verve totals --follow --by-key waits for the records by key that
// belong to a record: they come from another topic or file.
const totalsKeysWait = 10 * time.Second

// totalLine is the JSON line that verve totals prints into a pipe for a window or for one of
// its keys.
type totalLine struct {
	Group    string    `json:"group"`
	Start    time.Time `json:"window_start"`
	MS       int64     `json:"window_ms"`
	Key      *string   `json:"key,omitempty"` // nil: the whole window; empty: its ids without a key
	Unique   uint64    `json:"unique"`
	Records  int       `json:"records"`
	Complete bool      `json:"complete"`
	Exact    bool      `json:"exact"`
}

// start returns the time that --since means: a time in RFC 3339, or a duration before now.
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

// totals prints the sum of each window: as a table on a terminal, as JSON Lines in a pipe. It
// reports gaps and repeats on stderr and then returns an error. Windows in which no instance
// ran are reported on stderr, too, but are no error.
func totals(cfg *config, stdout *output, stderr *os.File) error {
	follow := cfg.Totals.Follow
	ctx := context.Background()
	if follow { // else a signal would leave sums of a part, as if they were all
		var stop context.CancelFunc
		ctx, stop = signal.NotifyContext(ctx, syscall.SIGTERM, os.Interrupt)
		context.AfterFunc(ctx, stop) // a second signal ends it at once, also in a read that does not return
	}
	var records iter.Seq2[stream.Record, error]
	var keys iter.Seq2[stream.KeyRecord, error]
	from := "topic " + cfg.KafkaTopic
	switch file := cfg.countsFile(); {
	case len(cfg.KafkaBrokers) > 0:
		records, keys = stream.ReadTopic(ctx, cfg.kafka(), follow), stream.ReadKeysTopic(ctx, cfg.kafka(), follow)
	case file == "" || file == "-":
		return cfg.explain(setting.Errorf("counts-file", "no file to read: name one, or set --kafka-brokers"))
	default:
		records, keys = stream.ReadFile(ctx, file, follow), stream.ReadKeysFile(ctx, file, follow)
		from = file
	}
	if !cfg.Totals.ByKey {
		keys = nil
	}
	since, _ := cfg.Totals.start(time.Now()) // config.judge has checked it
	r := totalsReport{from: from, since: since, stdout: stdout, err: stderr}
	r.out = newTotalsPrinter(stdout, isatty.IsTerminal(stdout.file.Fd()), keys != nil)
	if follow {
		return r.follow(ctx, records, keys)
	}
	return r.whole(ctx, records, keys)
}

// totalsReport reads records, and prints their sums and what is wrong with them.
type totalsReport struct {
	from  string    // names the topic or file that is read, for messages
	since time.Time // windows that start before this time are left out
	any   bool      // a record was read that is not left out

	sums stream.Totals // keys are added with --by-key only

	// With --follow only. fresh has the records that were read but not added to sums yet.
	// changed has the windows whose sums have changed since they were printed, and when that
	// was. behind and keysBehind are true until the records, and the records by key, that
	// existed at the start are read.
	fresh              []stream.Record
	changed            map[groupWindow]time.Time // nil: without --follow
	behind, keysBehind bool

	out    *totalsPrinter
	stdout *output // where out prints
	err    io.Writer
	bad    bool
}

func (t *totalsReport) complain(format string, args ...any) {
	t.bad = true
	fmt.Fprintln(t.err, printable(fmt.Sprintf(format, args...)))
}

// printable returns s with escapes for characters that are not printable. A key is text from a
// client, and may have control characters, such as U+009B, that a terminal obeys instead of
// showing them.
func printable(s string) string {
	var b strings.Builder
	for _, r := range s {
		if unicode.IsPrint(r) {
			b.WriteRune(r)
			continue
		}
		b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
	}
	return b.String()
}

// gap prints a gap: missing records make totals fail; with Idle no instance ran, and nothing is
// missing. With --follow the missing records may still arrive, so they do not make it fail yet.
func (t *totalsReport) gap(g stream.Gap) {
	name := "gap"
	if g.Idle {
		name = "idle"
	} else if t.changed == nil {
		t.bad = true
	}
	fmt.Fprintln(t.err, printable(fmt.Sprintf("%s: %v", name, g)))
}

// repeats prints the repeated records, from the one with index from on.
func (t *totalsReport) repeats(from int) {
	for _, r := range t.sums.Repeats()[from:] {
		t.complain("repeat: %s", r)
	}
}

// empty reports it if no record was read.
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

// whole reads all records and prints the report once. It reads the records by key after the
// others: they belong to records that are then known.
func (t *totalsReport) whole(ctx context.Context, records iter.Seq2[stream.Record, error], keys iter.Seq2[stream.KeyRecord, error]) error {
	for r, err := range records {
		if err := t.add(ctx, readRecord{Record: r, err: err}); err != nil {
			return err
		}
	}
	if keys != nil {
		for r, err := range keys {
			if err := t.add(ctx, readRecord{key: &r, err: err}); err != nil {
				return err
			}
		}
	}
	t.empty()
	t.print(t.sums.Windows())
	for _, g := range t.sums.Gaps() {
		t.gap(g)
	}
	t.repeats(0)
	if keys != nil {
		for _, flaw := range t.sums.Flaws() {
			t.complain("keys: %v", flaw)
		}
	}
	return t.verdict()
}

// follow prints each window soon after a record has changed it, and again after another record
// has. It reports problems when it finds them.
func (t *totalsReport) follow(ctx context.Context, records iter.Seq2[stream.Record, error], keys iter.Seq2[stream.KeyRecord, error]) error {
	done := make(chan struct{})
	defer close(done)
	reads := readBoth(records, keys, done)
	t.changed = make(map[groupWindow]time.Time)
	t.behind, t.keysBehind = true, keys != nil
	var quiet <-chan time.Time
	for {
		select {
		case now := <-quiet:
			t.printChanged(now.Add(-totalsKeysWait))
			if t.stdout.err != nil {
				return t.verdict()
			}
			quiet = nil
			if len(t.changed) > 0 {
				quiet = time.After(totalsSettle)
			}
		case r, ok := <-reads:
			if !ok {
				t.printChanged(time.Time{})
				t.empty()
				t.bad = t.bad || !t.behind && slices.ContainsFunc(t.sums.Gaps(), func(g stream.Gap) bool { return !g.Idle })
				return t.verdict()
			}
			if err := t.add(ctx, r); err != nil {
				t.printChanged(time.Time{})
				return err
			}
			if quiet == nil && len(t.fresh)+len(t.changed) > 0 {
				quiet = time.After(totalsSettle)
			}
		}
	}
}

// readRecord is what a reader of records yields.
type readRecord struct {
	stream.Record
	key *stream.KeyRecord // if not nil, this was read, not Record
	err error
}

// readBoth reads records and, if keys is not nil, records by key at the same time, until done
// is closed. The returned channel is closed when both have ended.
func readBoth(records iter.Seq2[stream.Record, error], keys iter.Seq2[stream.KeyRecord, error], done <-chan struct{}) <-chan readRecord {
	reads := make(chan readRecord)
	send := func(r readRecord) (more bool) {
		select {
		case reads <- r:
			return true
		case <-done:
			return false
		}
	}
	var both sync.WaitGroup
	both.Go(func() {
		records(func(r stream.Record, err error) bool { return send(readRecord{Record: r, err: err}) })
	})
	if keys != nil {
		both.Go(func() {
			keys(func(r stream.KeyRecord, err error) bool { return send(readRecord{key: &r, err: err}) })
		})
	}
	go func() {
		both.Wait()
		close(reads)
	}()
	return reads
}

// groupWindow is a window of a group.
type groupWindow struct {
	group string
	counter.Span
}

// add adds a record to the sums, or, with --follow, to fresh. It leaves out windows before
// --since, and reports an invalid record. An error that it returns ends the reading.
func (t *totalsReport) add(ctx context.Context, r readRecord) error {
	switch {
	case errors.Is(r.err, stream.ErrCaughtUp):
		t.caughtUp(r.key != nil)
		return nil
	case errors.Is(r.err, stream.ErrInvalidRecord):
		t.complain("invalid: %v", r.err)
		return nil
	case r.err != nil && ctx.Err() != nil:
		return nil // a signal has ended the reading
	case r.err != nil:
		return r.err
	}
	if r.key != nil {
		r.WindowStart = r.key.WindowStart
	}
	if r.WindowStart.Before(t.since) {
		return nil
	}
	t.any = true
	known := len(t.sums.Repeats())
	switch {
	case r.key == nil && t.changed != nil:
		t.fresh = append(t.fresh, r.Record)
	case r.key == nil:
		t.sums.Add(r.Record)
	default:
		t.sums.AddKey(*r.key) // its window is printed when the record of the window is added
		if t.changed != nil {
			t.repeats(known)
		}
	}
	return nil
}

// addFresh adds the records in fresh to the sums, and reports gaps before them, and repeats. It
// sorts them first: the records of one instance may arrive out of order, because they go to
// another partition when the topic gets more partitions.
func (t *totalsReport) addFresh() {
	slices.SortStableFunc(t.fresh, func(a, b stream.Record) int {
		return cmp.Or(a.WindowStart.Compare(b.WindowStart), cmp.Compare(a.Seq, b.Seq))
	})
	known := len(t.sums.Repeats())
	for _, r := range t.fresh {
		if !t.behind {
			for _, g := range t.sums.Before(r) {
				t.gap(g)
			}
		}
		t.changed[groupWindow{r.Group, r.Span()}] = time.Now()
		t.sums.Add(r)
	}
	t.fresh = t.fresh[:0]
	t.repeats(known)
}

// caughtUp is called when all records, or with ofKeys all records by key, that existed at the
// start are read. Only then it is known which records are missing.
func (t *totalsReport) caughtUp(ofKeys bool) {
	switch {
	case ofKeys && t.keysBehind:
		t.keysBehind = false
		for w := range t.changed {
			t.changed[w] = time.Now()
		}
	case !ofKeys && t.behind:
		t.addFresh()
		t.behind = false
		for _, g := range t.sums.Gaps() {
			t.gap(g)
		}
	}
}

// printChanged prints the windows that have changed. With --by-key, a window whose records by
// key are incomplete is left for later if it changed after the given time; and no window is
// printed before all records by key that existed at the start are read.
func (t *totalsReport) printChanged(after time.Time) {
	t.addFresh()
	if t.keysBehind {
		return
	}
	var sums []stream.WindowTotal
	for w, at := range t.changed {
		s, ok := t.sums.Window(w.group, w.Span)
		if !ok {
			continue
		}
		if t.out.byKey {
			flaws := t.sums.WindowFlaws(s)
			if len(flaws) > 0 && at.After(after) {
				continue
			}
			for _, flaw := range flaws {
				t.complain("keys: %v", flaw)
			}
		}
		sums = append(sums, s)
		delete(t.changed, w)
	}
	slices.SortFunc(sums, stream.WindowTotal.Compare)
	t.print(sums)
}

// print prints windows, or the sums of each of their keys.
func (t *totalsReport) print(windows []stream.WindowTotal) {
	for _, w := range windows {
		if !t.out.byKey {
			t.out.print(w, nil)
			continue
		}
		for _, k := range t.sums.Keys(w) {
			t.out.print(w, &k)
		}
	}
	t.out.flush()
}

func (t *totalsReport) verdict() error {
	if t.stdout.err != nil {
		return t.stdout.err
	}
	if t.bad {
		return errIncomplete
	}
	return nil
}

// totalsPrinter writes windows, or their keys, as a table or as JSON Lines.
type totalsPrinter struct {
	json  *json.Encoder // nil: print a table
	table *tabwriter.Writer
	byKey bool
}

func newTotalsPrinter(out io.Writer, table, byKey bool) *totalsPrinter {
	if !table {
		e := json.NewEncoder(out)
		e.SetEscapeHTML(false)
		return &totalsPrinter{json: e, byKey: byKey}
	}
	t := &totalsPrinter{table: tabwriter.NewWriter(out, 0, 0, 2, ' ', 0), byKey: byKey}
	fmt.Fprintf(t.table, "%-20s\t%-8s\t", "WINDOW", "GROUP")
	if byKey {
		fmt.Fprintf(t.table, "%-20s\t", "KEY")
	}
	fmt.Fprintf(t.table, "%12s\t%7s\t%s\n", "UNIQUE", "RECORDS", "NOTE")
	return t
}

// print writes the line of a window, or of one of its keys.
func (p *totalsPrinter) print(w stream.WindowTotal, k *stream.KeyTotal) {
	var key *string
	if k != nil {
		key, w.Unique, w.Records = &k.Key, k.Unique, k.Records
	}
	if p.json != nil {
		_ = p.json.Encode(totalLine{w.Group, w.Start, w.Window.Milliseconds(), key, w.Unique, w.Records, w.Complete, w.Exact})
		return
	}
	var notes []string
	if !w.Complete {
		notes = append(notes, "partial")
	}
	if !w.Exact {
		notes = append(notes, "not exact")
	}
	// Padded, so that the columns of rows that are printed later are aligned, too.
	fmt.Fprintf(p.table, "%-20s\t%-8s\t", w.Start.Format(time.RFC3339Nano), w.Group)
	if key != nil {
		fmt.Fprintf(p.table, "%-20s\t", cmp.Or(printable(*key), "(no key)"))
	}
	fmt.Fprintf(p.table, "%12d\t%7d\t%s\n", w.Unique, w.Records, strings.Join(notes, ", "))
}

func (p *totalsPrinter) flush() {
	if p.table != nil {
		_ = p.table.Flush()
	}
}

// healthTimeout bounds how long verve healthcheck waits for an answer.
const healthTimeout = 3 * time.Second

// healthcheck asks the admin listener whether the server is alive.
func healthcheck(adminListen string) error {
	// A URL has no place for all that an address may be: http-alt as a port, fe80::1%eth0 as a host.
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, reachable(adminListen))
	}
	client := http.Client{Timeout: healthTimeout, Transport: &http.Transport{DialContext: dial}}
	resp, err := client.Get("http://admin/healthz")
	if err != nil {
		return fmt.Errorf("not alive: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("not alive: %s", resp.Status)
	}
	return nil
}
