package stream

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"strconv"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"

	"verve/internal/retry"
)

// ErrInvalidRecord is in the error that a reader yields for a line or a Kafka record that
// is not one of ours; reading goes on after it. A reader that follows a topic may go on after
// other errors, too. For all others any error but this one and ErrCaughtUp is the last.
var ErrInvalidRecord = errors.New("not a record of this program")

// ErrCaughtUp is no error: a reader that follows yields it, once or more, when it has yielded what
// was there when it began. Before that, records of one instance may come in another order than it
// sent them, because a topic has several partitions. Reading goes on after it.
var ErrCaughtUp = errors.New("all that was there is read")

// followEvery is how often a followed file is checked for new lines.
const followEvery = 200 * time.Millisecond

// ReadFile yields the records of a counts file in its order. A last line without a
// newline may still be written: it is read again after followEvery, and then taken as it is.
// With follow it waits for the newline, and goes on with what is appended, also when the file
// is replaced, until ctx ends. Lines by key, which standard output has between those of the
// records, are left out.
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

// errOtherKind is the error of parse for a valid line of a kind that is not read.
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
				if errors.Is(err, errOtherKind) {
					continue
				}
				if err != nil {
					err = fmt.Errorf("%s line %d: %w: %w", path, lines.number, ErrInvalidRecord, err)
				}
				if !yield(record, err) {
					return
				}
			case errors.Is(err, ErrCaughtUp):
				if !yield(none, err) {
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
	last   []byte // the last whole line of it; empty: none, or it was too long
	number int    // of the last line

	unended  bool // without follow: the last line was read before, and had no end
	caughtUp bool // with follow: the end was reached once
}

// longestLine is far above a record. If a line is longer, as in a file that is none of ours,
// the rest is dropped.
const longestLine = 1 << 16

// next returns the next line, valid until the next call. At the end of the file it returns
// io.EOF. With follow it waits for a line there instead, and returns ErrCaughtUp the first time.
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
		case follow && !c.caughtUp:
			c.caughtUp = true
			return nil, ErrCaughtUp
		case follow:
			if err = retry.Sleep(ctx, followEvery); err == nil {
				err = c.catchUp()
			}
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

// end returns the line that was read, which may lack its newline, and begins the next one.
func (c *countsLines) end() []byte {
	c.last = append(c.last[:0], c.line...)
	if len(c.line) == longestLine {
		c.last = c.last[:0]
	}
	line := bytes.TrimSuffix(c.line, []byte{'\n'})
	c.line = c.line[:0]
	c.number++
	return line
}

// catchUp goes on with the file that has the name now, or at the new end of a file that was
// truncated.
func (c *countsLines) catchUp() error {
	here, err := c.file.Stat()
	if err != nil {
		return nil // it is read on as it is
	}
	size, whole := here.Size(), c.offset-int64(len(c.line))
	cut := size < whole || len(c.line) < longestLine && !c.has(c.last, whole-int64(len(c.last)))
	torn := size < c.offset || !c.has(c.line, whole)
	if size > c.offset && !cut && !torn {
		return nil // there is more to read; if the file was renamed, its rest comes first, too
	}
	replaced := c.replacement(here)
	switch {
	case replaced != nil:
		c.file.Close()
		c.file, c.offset, c.number = replaced, 0, 0
	case cut:
		// Whole lines are gone: all that is there now was written after that.
		c.offset, c.number = 0, 0
	case torn:
		// The torn tail that was read is gone; its record is written again, whole.
		c.offset = whole
	default:
		return nil
	}
	if _, err := c.file.Seek(c.offset, io.SeekStart); err != nil {
		return err
	}
	c.line, c.last = c.line[:0], c.last[:0]
	c.r.Reset(c.file)
	return nil
}

// has reports whether the file still has b, which was read there, at this place. The file may
// have been truncated, and may have grown to the same length since.
func (c *countsLines) has(b []byte, at int64) bool {
	if len(b) == 0 || len(b) == longestLine {
		return true // not known
	}
	there := make([]byte, len(b))
	_, err := c.file.ReadAt(there, at)
	return err == nil && bytes.Equal(there, b)
}

// replacement opens the file that now has the name of the one that is read; nil: it is the
// same. here is the one that is read.
func (c *countsLines) replacement(here os.FileInfo) *os.File {
	named, err := os.Stat(c.path)
	if err != nil || os.SameFile(here, named) {
		return nil
	}
	file, err := os.Open(c.path)
	if err != nil {
		return nil // it is looked for again
	}
	return file
}

// ReadTopic yields the records of the topic, in order within an instance. It
// reads committed records up to the end that the topic has when it starts. If
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
			kgo.KeepControlRecords(), // they show the position after records that are not yielded
		)
		if err != nil {
			yield(none, err)
			return
		}
		defer client.Close()
		records := readToEnd(ctx, client, topic, time.Time{})
		if follow {
			records = followTopic(ctx, client, topic)
		}
		for r, err := range records {
			record := none
			switch {
			case err != nil:
				err = fmt.Errorf("read %s: %w", topic, last.explain(err))
			case r.Attrs.IsControl():
				continue
			default:
				record, err = parse(r.Value)
				if err = cmp.Or(checkSchema(r), err); err == nil && id(&record) != string(r.Key) {
					err = fmt.Errorf("key %q belongs to %q", r.Key, id(&record))
				}
				if err != nil {
					err = fmt.Errorf("%s partition %d offset %d: %w: %w", r.Topic, r.Partition, r.Offset, ErrInvalidRecord, err)
				}
			}
			if !yield(record, err) {
				return
			}
		}
	}
}

// followTopic yields the records of the topic, and what fails, until ctx ends, and between
// them ErrCaughtUp. A topic that is missing may be on its way; another failure at the start is
// no outage that it could outlast, but a wrong address or a wrong password.
func followTopic(ctx context.Context, client *kgo.Client, topic string) iter.Seq2[*kgo.Record, error] {
	return func(yield func(*kgo.Record, error) bool) {
		_, left, err := bounds(ctx, client, topic, time.Time{})
		if err != nil && !errors.Is(err, kerr.UnknownTopicOrPartition) {
			yield(nil, err)
			return
		}
		client.AddConsumeTopics(topic)
		for caughtUp := false; ctx.Err() == nil; {
			if !caughtUp && len(left) == 0 {
				if caughtUp = true; !yield(nil, ErrCaughtUp) {
					return
				}
			}
			fetches, stalled := pollFor(ctx, client, lookStall)
			if stalled {
				left = nil // what was there was deleted
			} else if !yieldFetches(ctx, fetches, left, yield) {
				return
			}
		}
	}
}

// yieldFetches yields records and errors, and takes the partitions that were read to their
// ends out of left.
func yieldFetches(ctx context.Context, fetches kgo.Fetches, left map[int32]int64, yield func(*kgo.Record, error) bool) (more bool) {
	for _, e := range fetches.Errors() {
		if ctx.Err() == nil && !yield(nil, e.Err) {
			return false
		}
	}
	for r := range fetches.RecordsAll() {
		if r.Offset >= left[r.Partition]-1 {
			delete(left, r.Partition)
		}
		if !yield(r, nil) {
			return false
		}
	}
	return true
}

// pollFor fetches once. stalled: nothing came within the time.
func pollFor(ctx context.Context, client *kgo.Client, most time.Duration) (fetches kgo.Fetches, stalled bool) {
	within, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	fetches = client.PollFetches(within)
	return fetches, ctx.Err() == nil && errors.Is(fetches.Err0(), context.DeadlineExceeded)
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

// ReadKeysFile yields the lines by key of a counts file, as ReadFile does. Their file does not
// exist before a key is used, and never if the counts file was standard output: without follow
// the lines are then looked for in the counts file itself.
func ReadKeysFile(ctx context.Context, countsFile string, follow bool) iter.Seq2[KeyRecord, error] {
	return func(yield func(KeyRecord, error) bool) {
		path := keysFile(countsFile)
		for waits := false; ; {
			if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
				break
			}
			if !follow {
				path = countsFile
				break
			}
			if !waits && !yield(KeyRecord{}, ErrCaughtUp) {
				return
			}
			waits = true
			if retry.Sleep(ctx, followEvery) != nil {
				return
			}
		}
		var p keyParser
		readFile(ctx, path, follow, func(line []byte) (KeyRecord, error) {
			r, err := p.parse(line)
			if err != nil && path == countsFile {
				err = errOtherKind // ReadFile reports a line that is no record either
			}
			return r, err
		})(yield)
	}
}

// ReadKeysTopic yields the records by key of their topic, as ReadTopic does. There is no
// such topic until a key was used.
func ReadKeysTopic(ctx context.Context, cfg KafkaConfig, follow bool) iter.Seq2[KeyRecord, error] {
	return func(yield func(KeyRecord, error) bool) {
		var p keyParser
		for r, err := range consumeTopic(ctx, cfg, cfg.keysTopic(), follow, p.parse, (*KeyRecord).ID) {
			if errors.Is(err, kerr.UnknownTopicOrPartition) {
				continue
			}
			if !yield(r, err) {
				return
			}
		}
	}
}

// keyParser does what parseKeyRecord does, faster if records by key of one record follow each
// other: these differ in key and unique only.
type keyParser struct {
	last  KeyRecord
	lines *keyJSON // of last's record; nil: none yet
}

func (p *keyParser) parse(b []byte) (KeyRecord, error) {
	if p.lines != nil {
		rest, ok := bytes.CutPrefix(b, p.lines.before)
		rest, also := bytes.CutSuffix(rest, p.lines.after)
		key, unique, found := bytes.Cut(rest, p.lines.between)
		if n, err := strconv.ParseUint(string(unique), 10, 64); ok && also && found && err == nil && len(key) > 2 {
			r := p.last
			key = key[1 : len(key)-1]
			r.Key, r.Unique = string(key), n
			// A line that would be written otherwise, with escapes, takes the long way.
			if cmp.Or(checkKey(key), checkKeyUnique(n)) == nil && bytes.Equal(p.lines.line(key, n), b) {
				return r, nil
			}
		}
	}
	r, err := parseKeyRecord(b)
	if err == nil {
		of := r.record()
		p.last, p.lines = r, newKeyJSON(&of)
	}
	return r, err
}
