package stream

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"verve/counter"
	"verve/internal/retry"
)

// errInvalidRecord marks what a reader yields for a line or a Kafka record that
// is not one of ours; reading goes on behind it. Any other error ends it.
var errInvalidRecord = errors.New("not a record of this program")

// IsInvalidRecord reports whether an error is about one record, and not about the source:
// reading continues after it.
func IsInvalidRecord(err error) bool { return errors.Is(err, errInvalidRecord) }

// followEvery is how often a followed file is looked at.
const followEvery = 200 * time.Millisecond

// ReadFile yields the records of a counts file in its order. A last line without
// its end may be being written: it is read again after a while, and then as it is.
// With follow it waits for its end, and goes on with what is appended, also when the file
// is replaced, until ctx ends. Lines by key, which standard output has between those of the records,
// are left out.
func ReadFile(ctx context.Context, path string, follow bool) iter.Seq2[Record, error] {
	var p keyParser
	return readFile(ctx, path, follow, func(line []byte) (Record, error) {
		r, err := parseRecord(line)
		if err != nil {
			if _, kerr := p.parse(line); kerr == nil {
				err = errOtherKind
			}
		}
		return r, err
	})
}

// errOtherKind is a line that is right, and not one of those that are read.
var errOtherKind = errors.New("another kind of record")

func readFile[T any](ctx context.Context, path string, follow bool, parse func([]byte) (T, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		file, err := os.Open(path)
		if err != nil {
			yield(none, fmt.Errorf("read counts file: %w", err))
			return
		}
		lines := &countsLines{path: path, file: file, r: bufio.NewReaderSize(file, 1<<16)}
		defer func() { lines.file.Close() }()
		for ctx.Err() == nil {
			line, err := lines.next(ctx, follow)
			switch {
			case err == nil:
				record, err := parse(line)
				if !errors.Is(err, errOtherKind) && !yield(record, lines.invalid(err)) {
					return
				}
			case errors.Is(err, io.EOF), ctx.Err() != nil:
				return
			default:
				yield(none, fmt.Errorf("read counts file: %w", err))
				return
			}
		}
	}
}

// countsLines reads a counts file line by line.
type countsLines struct {
	path   string
	file   *os.File
	r      *bufio.Reader
	line   []byte // as far as read
	offset int64  // read so far
	number int    // of the last line

	unended bool // without follow: the last line was read before, and had no end
}

// longestLine is far above a record. If a line is longer, as in a file that is none of ours,
// the rest is dropped.
const longestLine = 1 << 16

// next returns the next line, valid until the next call; with follow it waits for it. io.EOF
// is the end of the file.
func (c *countsLines) next(ctx context.Context, follow bool) ([]byte, error) {
	for {
		part, err := c.r.ReadSlice('\n')
		c.offset += int64(len(part))
		c.line = append(c.line, part[:min(len(part), longestLine-len(c.line))]...)
		switch {
		case err == nil:
			return c.end(), nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case !errors.Is(err, io.EOF):
			return nil, err
		case follow:
			err = c.await(ctx)
		case len(c.line) == 0:
			return nil, err
		case c.unended:
			return c.end(), nil
		default:
			c.unended = true
			err = retry.Sleep(ctx, followEvery)
		}
		if err != nil {
			return nil, err
		}
	}
}

// end ends the line, which may lack its newline.
func (c *countsLines) end() []byte {
	line := bytes.TrimSuffix(c.line, []byte{'\n'})
	c.line = c.line[:0]
	c.number++
	return line
}

// invalid says of a line that it is no record, if err does.
func (c *countsLines) invalid(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s line %d: %w: %w", c.path, c.number, errInvalidRecord, err)
}

// await looks for more after a while.
func (c *countsLines) await(ctx context.Context) error {
	if err := retry.Sleep(ctx, followEvery); err != nil {
		return err
	}
	return c.catchUp()
}

// catchUp turns to the file that has the name now, or to the new end of one that
// was cut.
func (c *countsLines) catchUp() error {
	replaced, cut := fileMoved(c.file, c.path, c.offset)
	switch {
	case replaced != nil:
		c.file.Close()
		c.file, c.offset, c.number = replaced, 0, 0
	case cut > 0:
		// The torn tail that was read is gone; its record comes whole.
		if _, err := c.file.Seek(cut, io.SeekStart); err != nil {
			return err
		}
		c.offset = cut
	default:
		return nil
	}
	c.line = c.line[:0]
	c.r.Reset(c.file)
	return nil
}

// fileMoved tells what happened to a followed file at its end: another one took
// its name (returned open), or it was cut shorter than what was read (returned
// as the new end).
func fileMoved(file *os.File, path string, read int64) (replaced *os.File, cut int64) {
	here, err := file.Stat()
	if err != nil {
		return nil, 0
	}
	if here.Size() < read {
		cut = here.Size()
	}
	named, err := os.Stat(path)
	if err != nil || os.SameFile(here, named) {
		return nil, cut
	}
	if replaced, err = os.Open(path); err != nil {
		return nil, cut
	}
	return replaced, cut
}

// ReadTopic yields the records of the topic, in order within an instance. It
// reads committed records up to the end that the topic has when it starts; where
// a transaction is open it waits for its end. With follow it goes on until ctx
// ends.
func ReadTopic(ctx context.Context, cfg KafkaConfig, follow bool) iter.Seq2[Record, error] {
	return consumeTopic(ctx, cfg, cfg.Topic, follow, parseRecord, (*Record).Key)
}

// consumeTopic yields what parse makes of the values of a topic; id is the key that goes
// with it.
func consumeTopic[T any](ctx context.Context, cfg KafkaConfig, topic string, follow bool, parse func([]byte) (T, error), id func(*T) string) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		if err := cfg.Check(); err != nil {
			yield(none, err)
			return
		}
		var last lastError
		client, err := cfg.client(
			kgo.WithHooks(&last),
			kgo.FetchIsolationLevel(kgo.ReadCommitted()),
			kgo.KeepControlRecords(), // they carry the position over what is not yielded
			kgo.FetchMaxWait(250*time.Millisecond),
		)
		if err != nil {
			yield(none, err)
			return
		}
		defer client.Close()
		stopped := errors.New("stopped")
		emit := func(r *kgo.Record) error {
			if r.Attrs.IsControl() {
				return nil
			}
			record, err := parse(r.Value)
			err = cmp.Or(checkSchema(r), err)
			if err == nil && id(&record) != string(r.Key) {
				err = fmt.Errorf("key %q belongs to %q", r.Key, id(&record))
			}
			if err != nil {
				err = fmt.Errorf("%s partition %d offset %d: %w: %w", r.Topic, r.Partition, r.Offset, errInvalidRecord, err)
			}
			if !yield(record, err) {
				return stopped
			}
			return nil
		}
		if follow {
			followTopic(ctx, client, topic, emit, func(err error) bool { return yield(none, err) })
			return
		}
		err = readToEnd(ctx, client, topic, time.Time{}, emit)
		if err != nil && !errors.Is(err, stopped) {
			yield(none, fmt.Errorf("read %s: %w", topic, last.explain(err)))
		}
	}
}

// followTopic calls emit with the records of the topic, and fail with what fails,
// until one of them or ctx ends it.
func followTopic(ctx context.Context, client *kgo.Client, topic string, emit func(*kgo.Record) error, fail func(error) bool) {
	client.AddConsumeTopics(topic)
	for ctx.Err() == nil {
		fetches := client.PollFetches(ctx)
		for _, e := range fetches.Errors() {
			if ctx.Err() == nil && !fail(fmt.Errorf("read %s: %w", topic, e.Err)) {
				return
			}
		}
		for r := range fetches.RecordsAll() {
			if emit(r) != nil {
				return
			}
		}
	}
}

// checkSchema refuses a Kafka record of another program.
func checkSchema(r *kgo.Record) error {
	for _, h := range r.Headers {
		if h.Key == schemaHeader && string(h.Value) != schemaVersion {
			return fmt.Errorf("schema %q, this program reads %s", h.Value, schemaVersion)
		}
	}
	return nil
}

// Totals sums records per window over all instances of a group. Groups count
// apart, also in one topic. The zero value is ready. It keeps one small entry per
// record; it is not safe for concurrent use.
type Totals struct {
	windows map[windowKey]*WindowTotal
	seen    map[string]Record
	series  map[string]*seriesTotal
	repeats []string
}

// windowKey has the length, as another --window may have had a window with the
// same start.
type windowKey struct {
	group  string
	start  int64
	length int64 // ms
}

// WindowTotal is the sum of one window of a group.
type WindowTotal struct {
	Group    string        // name of the group
	Start    time.Time     // UTC
	Window   time.Duration // length
	Unique   uint64        // sum over the records
	Records  int           // how many
	Complete bool          // every record of it is
	Exact    bool          // every record of it is
}

// Span returns the window.
func (w WindowTotal) Span() counter.Span { return counter.Span{Start: w.Start, Window: w.Window} }

// Gap is what is missing in the records of one instance, or of a group.
type Gap struct {
	Series string // GROUP/INSTANCE, or GROUP

	// Idle: nothing is missing, the server did not run in these windows. For an instance
	// that is certain, because the numbers of the records around them follow each other.
	// The records of a group have no numbers: there the window before was cut by the stop
	// and the one behind by the start, and both say so.
	Idle bool

	// Either a run of windows, the first and last of them, both missing,
	FirstWindow, LastWindow time.Time
	// or a run of sequence numbers. Zero: the gap is one of windows.
	FirstSeq, LastSeq uint64
}

// String describes the gap in one line.
func (g Gap) String() string {
	first, last := g.FirstWindow.Format(time.RFC3339Nano), g.LastWindow.Format(time.RFC3339Nano)
	switch {
	case g.Idle && first == last:
		return fmt.Sprintf("%s: nothing ran in the window %s", g.Series, first)
	case g.Idle:
		return fmt.Sprintf("%s: nothing ran in the windows %s to %s", g.Series, first, last)
	case g.FirstSeq != 0 && g.FirstSeq == g.LastSeq:
		return fmt.Sprintf("%s: record %d is missing", g.Series, g.FirstSeq)
	case g.FirstSeq != 0:
		return fmt.Sprintf("%s: records %d to %d are missing", g.Series, g.FirstSeq, g.LastSeq)
	case first == last:
		return fmt.Sprintf("%s: window %s is missing", g.Series, first)
	}
	return fmt.Sprintf("%s: windows %s to %s are missing", g.Series, first, last)
}

type seriesTotal struct {
	windows map[int64]*seriesWindow // by start, Unix nanoseconds
	seqs    map[uint64]Record
	last    Record // the one with the latest window
}

// seriesWindow is what the records of a window say about the windows around it.
type seriesWindow struct {
	length            time.Duration
	firstSeq, lastSeq uint64
	complete          bool // every record is
}

// before reports whether nothing ran between two windows.
func (w *seriesWindow) before(next *seriesWindow) bool {
	if w.lastSeq == 0 { // of a group
		return !w.complete && !next.complete
	}
	return w.lastSeq+1 == next.firstSeq
}

// Add takes one record, in any order.
func (t *Totals) Add(r Record) {
	if t.windows == nil {
		t.windows = make(map[windowKey]*WindowTotal)
		t.seen = make(map[string]Record)
		t.series = make(map[string]*seriesTotal)
	}
	r.WindowStart, r.SealedAt = r.WindowStart.UTC(), r.SealedAt.UTC() // comparable
	key := r.Key()
	if first, ok := t.seen[key]; ok {
		same := first == r || r.Scope == ScopeGroup && first.Unique == r.Unique
		t.repeated(key, r.Scope, first.Unique, r.Unique, same)
		if same || r.Scope == ScopeGroup {
			return
		}
	} else {
		t.seen[key] = r
	}
	s := t.series[r.identity()]
	if s == nil {
		s = &seriesTotal{windows: make(map[int64]*seriesWindow), seqs: make(map[uint64]Record)}
		t.series[r.identity()] = s
	}
	if in := s.windows[r.WindowStart.UnixNano()]; in == nil {
		s.windows[r.WindowStart.UnixNano()] = &seriesWindow{r.window(), r.Seq, r.Seq, r.Complete}
	} else {
		*in = seriesWindow{max(in.length, r.window()), min(in.firstSeq, r.Seq), max(in.lastSeq, r.Seq), in.complete && r.Complete}
	}
	if !r.WindowStart.Before(s.last.WindowStart) {
		s.last = r
	}
	if r.Scope == ScopeInstance {
		if first, ok := s.seqs[r.Seq]; !ok {
			s.seqs[r.Seq] = r
		} else if first.Key() != key { // the same key is reported above
			t.repeats = append(t.repeats, fmt.Sprintf("%s shares its number with %s (unique %d and %d)", first.Key(), key, first.Unique, r.Unique))
		}
	}
	at := windowKey{r.Group, r.WindowStart.UnixNano(), r.WindowMS}
	w := t.windows[at]
	if w == nil {
		w = &WindowTotal{Group: r.Group, Start: r.WindowStart, Window: r.window(), Complete: true, Exact: true}
		t.windows[at] = w
	}
	w.Unique += r.Unique
	w.Records++
	w.Complete = w.Complete && r.Complete
	w.Exact = w.Exact && r.Exact
}

// repeated notes a record, or one by key, that should not be there. same: it is a copy,
// counted once. Otherwise one number has two values, as two processes under one name
// produce them; both are counted. A whole group has one record: the first is counted.
func (t *Totals) repeated(id string, scope Scope, first, again uint64, same bool) {
	counted := "with two values, both are counted"
	switch {
	case same:
		t.repeats = append(t.repeats, fmt.Sprintf("%s is there twice and counted once (unique %d)", id, first))
		return
	case scope == ScopeGroup:
		counted = "with two values, the first is counted"
	}
	t.repeats = append(t.repeats, fmt.Sprintf("%s is there %s (unique %d and %d)", id, counted, first, again))
}

// Before returns what is missing between the last record of r's series and r,
// which was not added yet: for records that come in order, as they come.
func (t *Totals) Before(r Record) []Gap {
	s := t.series[r.identity()]
	if s == nil {
		return nil
	}
	var two Totals
	two.Add(s.last)
	two.Add(r)
	return two.Gaps()
}

// Windows returns the sums in order of their start, then of their group.
func (t *Totals) Windows() []WindowTotal {
	out := make([]WindowTotal, 0, len(t.windows))
	for _, w := range t.windows {
		out = append(out, *w)
	}
	slices.SortFunc(out, func(a, b WindowTotal) int {
		return cmp.Or(a.Start.Compare(b.Start), cmp.Compare(a.Group, b.Group), cmp.Compare(a.Window, b.Window))
	})
	return out
}

// Window returns one sum.
func (t *Totals) Window(group string, s counter.Span) (WindowTotal, bool) {
	w := t.windows[windowKey{group, s.Start.UnixNano(), s.Window.Milliseconds()}]
	if w == nil {
		return WindowTotal{}, false
	}
	return *w, true
}

// Repeats describes the records, and those by key, that should not be there, each in one
// line, in the order they were added.
func (t *Totals) Repeats() []string { return t.repeats }

// Gaps returns what is missing between the first and the last record of each
// series, windows first.
func (t *Totals) Gaps() []Gap {
	var out []Gap
	for name, s := range t.series {
		starts := slices.Sorted(maps.Keys(s.windows))
		for i := 1; i < len(starts); i++ {
			before, next := s.windows[starts[i-1]], s.windows[starts[i]]
			expected := starts[i-1] + int64(before.length)
			if starts[i] > expected {
				out = append(out, Gap{
					Series:      name,
					Idle:        before.before(next),
					FirstWindow: time.Unix(0, expected).UTC(),
					LastWindow:  time.Unix(0, max(expected, starts[i]-int64(next.length))).UTC(),
				})
			}
		}
		seqs := slices.Sorted(maps.Keys(s.seqs))
		for i := 1; i < len(seqs); i++ {
			if seqs[i] != seqs[i-1]+1 {
				out = append(out, Gap{Series: name, FirstSeq: seqs[i-1] + 1, LastSeq: seqs[i] - 1})
			}
		}
	}
	slices.SortFunc(out, func(a, b Gap) int {
		return cmp.Or(cmp.Compare(a.Series, b.Series), cmp.Compare(a.FirstSeq, b.FirstSeq), a.FirstWindow.Compare(b.FirstWindow))
	})
	return out
}
