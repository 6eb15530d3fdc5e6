package stream

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"verve/counter"
	"verve/internal/durable"
)

// fileSink appends records to the counts file, one a line, and syncs them.
//
// A kill between the write and the acknowledgement in the spool leaves lines that the
// next process would write again; a kill within the write leaves half a line. So a
// half line is cut off before the next append (its record is still in the
// spool), and records whose outcome is open are first looked for in the file.
//
// The file may be renamed or removed at any time, as log rotation does: it is
// opened by its path again for every batch. Records that were written and not
// acknowledged before a kill, and rotated away before the restart, are written
// again. Several processes may share a file; each batch is appended under a
// lock.
//
// On standard output and in a pipe nothing can be looked up: after a kill the last batch may
// be written there again. A named pipe without a reader is an error.
//
// The lines by key are in a file of their own, see keysfile.go; on standard output, and in
// a pipe, they are right before the line of their record.
//
// The files of a group together have one line per window: an instance claims each line
// right before it writes it, and reports it as written right after.
type fileSink struct {
	path   string
	stdout io.Writer // not nil: the sink is standard output
	step   func(string)
	claims Claims // nil: this instance counts for itself

	// rest is the part of the lines of the record at restOf that standard output has
	// not taken: the next write begins with it.
	rest   []byte
	restOf uint64

	// unsure is the index up to which a record may be in the file although the
	// spool does not have its acknowledgement. It only grows.
	unsure uint64

	// named is set while the names of the files are known to be on the disk. That is not known
	// at the start: an earlier process may have made them, and been killed before its sync.
	named bool

	sync func(*os.File) error // os.File.Sync; a variable for tests
}

// filePatience is far longer than a write and a sync take on a disk that works, and short
// enough that a reader that stalls is noticed within a few of the shorter windows.
const filePatience = 2 * time.Second

// tornPrefix is what a half line of ours begins with.
var tornPrefix = []byte(`{"window_start":"`)

func newFileSink(path string, stdout io.Writer, unsure uint64, step func(string)) *fileSink {
	f := &fileSink{path: path, unsure: unsure, step: step, sync: (*os.File).Sync}
	if path == "-" {
		if f.stdout = stdout; stdout == nil {
			f.stdout = os.Stdout
		}
	}
	return f
}

// mayHave raises unsure.
func (f *fileSink) mayHave(upTo uint64) { f.unsure = max(f.unsure, upTo) }

// Claims decides which instance of a group writes the line of a record. The group may be another
// one than that of this process, if an earlier process left the record in the spool.
type Claims interface {
	// Claim is called right before the line of a window is written. An error leaves
	// the line to a later try.
	Claim(ctx context.Context, group string, s counter.Span) (counter.Claim, error)
	// Written reports that the line is in a counts file of the group.
	Written(ctx context.Context, group string, s counter.Span) error
}

// errElsewhere keeps a record in the spool until its writer has reported it.
var errElsewhere = errors.New("another instance of the group publishes, this record is left to it")

func (f *fileSink) deliver(ctx context.Context, batch []spooled) (int, error) {
	if batch[0].record.Scope == ScopeGroup && f.claims != nil {
		return f.deliverClaimed(ctx, batch[:1])
	}
	// A record of this instance alone is from before it joined a group.
	if i := slices.IndexFunc(batch, func(e spooled) bool { return e.record.Scope == ScopeGroup }); i > 0 && f.claims != nil {
		batch = batch[:i]
	}
	return f.write(batch)
}

// deliverClaimed writes the line of one record of a group, if it is this
// instance's to write.
func (f *fileSink) deliverClaimed(ctx context.Context, one []spooled) (int, error) {
	group, s := one[0].record.Group, one[0].record.Span()
	claim, err := f.claims.Claim(ctx, group, s)
	if err != nil {
		return 0, fmt.Errorf("counts file: %w", err)
	}
	if claim.Unknown {
		f.mayHave(one[0].index)
	}
	switch {
	case claim.Written:
		// By another instance perhaps, after this one was killed at its keys.
		if err := f.removeKeys(one); err != nil {
			return 0, fmt.Errorf("counts file: %w", err)
		}
		return 1, nil
	case !claim.Mine:
		return 0, errElsewhere
	}
	if n, err := f.write(one); err != nil {
		return n, err
	}
	if err := f.claims.Written(ctx, group, s); err != nil {
		f.mayHave(one[0].index) // it is there
		return 0, fmt.Errorf("counts file: %w", err)
	}
	return 1, nil
}

func (f *fileSink) write(batch []spooled) (n int, err error) {
	if f.stdout != nil {
		// Each is acknowledged by itself: a stop repeats no line that was taken.
		batch = batch[:1]
		if err = f.print(&batch[0]); err != nil {
			return 0, fmt.Errorf("standard output: %w", err)
		}
	} else if err = f.append(batch); err != nil {
		f.mayHave(batch[len(batch)-1].index)
		return 0, fmt.Errorf("counts file: %w", err)
	}
	f.step(stepProduced)
	return len(batch), nil
}

// print writes a record's lines to standard output. A pipe takes them whole or not at
// all; of what takes a part of them, as a file on a full disk does, the next call
// writes the rest.
func (f *fileSink) print(e *spooled) error {
	if f.rest == nil || f.restOf != e.index {
		f.rest, f.restOf = appendLines(nil, e), e.index
	}
	n, err := f.stdout.Write(f.rest)
	if f.rest = f.rest[n:]; err == nil {
		f.rest = nil
	}
	return err
}

func (f *fileSink) append(batch []spooled) (err error) {
	file, err := f.open(f.path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if err := durable.Lock(file); err != nil {
		return err
	}
	info, err := file.Stat()
	if err != nil {
		return err
	}
	var lines []byte
	if !info.Mode().IsRegular() { // a pipe or a device has no tail
		for i := range batch {
			lines = appendLines(lines, &batch[i])
		}
		_, err = file.Write(lines)
		return err
	}
	if err := repairTail(file, info.Size()); err != nil {
		return err
	}
	counter.Rest()
	if batch[0].index <= f.unsure {
		there, from, err := f.lookup(file, batch)
		if err == nil && len(there) > 0 {
			err = rewrite(file, f.path, from)
		}
		if err != nil {
			return err
		}
		batch = slices.DeleteFunc(slices.Clone(batch), func(e spooled) bool { return there[string(e.value)] })
	}
	if err := f.appendKeys(batch); err != nil {
		return err
	}
	for i := range batch {
		lines = append(append(lines, batch[i].value...), '\n')
	}
	if len(lines) > 0 {
		if _, err := file.Write(lines); err != nil {
			return err
		}
	}
	counter.Rest()
	// Also without lines: the process that wrote those in the file may have been killed before its sync.
	if err := f.sync(file); err != nil {
		return err
	}
	if !f.named {
		err = durable.SyncDir(filepath.Dir(f.path))
		f.named = err == nil
	}
	return err
}

// rewrite writes once more, in place, what the file with this path has from an offset on. After a
// sync that failed Linux takes lines for written, and the next sync would succeed without them. They
// are not removed meanwhile, because a reader that follows the file would read all of it again.
func rewrite(file *os.File, path string, from int64) error {
	lines, err := io.ReadAll(io.NewSectionReader(file, from, 1<<62))
	if err != nil {
		return err
	}
	inPlace, err := os.OpenFile(path, os.O_WRONLY, 0) // file only appends
	if err != nil {
		return err
	}
	here, err := file.Stat()
	named, nerr := inPlace.Stat()
	switch err = cmp.Or(err, nerr); {
	case err == nil && os.SameFile(here, named):
		_, err = inPlace.WriteAt(lines, from)
	case err == nil:
		err = fmt.Errorf("%s was replaced meanwhile", path)
	}
	return errors.Join(err, inPlace.Close())
}

// appendLines appends the lines by key of a record, and its own.
func appendLines(b []byte, e *spooled) []byte {
	if e.keys.Len() > 0 {
		lines := newKeyJSON(&e.record)
		for key, unique := range e.keys.All() {
			b = append(lines.append(b, key, unique), '\n')
		}
	}
	return append(append(b, e.value...), '\n')
}

// open opens one of the files to append to it, and makes it if it is missing.
func (f *fileSink) open(path string) (file *os.File, err error) {
	info, err := os.Stat(path)
	if err == nil && info.Mode()&os.ModeNamedPipe != 0 {
		// Opened for reading too, it would take lines that nothing reads.
		if file, err = os.OpenFile(path, os.O_WRONLY|syscall.O_NONBLOCK, 0); errors.Is(err, syscall.ENXIO) {
			err = fmt.Errorf("nothing reads from the pipe %s", path)
		}
		return file, err
	}
	if errors.Is(err, os.ErrNotExist) {
		f.named = false
		if err := durable.MkdirAll(filepath.Dir(path)); err != nil {
			return nil, err
		}
	}
	return os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o644)
}

// lookup returns which of the batch's unsure records are in the file, and where the first of their
// lines begins. It reads the file from its start: that happens once after a kill and takes a fraction
// of a second per year of minutes. To read less would be a guess about what other
// processes have written.
//
// The record of a group counts as there if a line of its window and group is, even with other
// values: if a leader is killed after that line and Redis loses everything, the window is
// published again, perhaps without the counts of its keys. A record is never revised.
func (f *fileSink) lookup(file *os.File, batch []spooled) (there map[string]bool, from int64, err error) {
	want := make(map[string]bool)
	windows := make(map[string]*spooled) // of groups, by what their lines begin with
	for i := range batch {
		if e := &batch[i]; e.index <= f.unsure {
			want[string(e.value)] = true
			if begins, _, is := bytes.Cut(e.value, uniqueField); is && e.record.Scope == ScopeGroup {
				windows[string(begins)] = e
			}
		}
	}
	there = make(map[string]bool)
	found := func(e string, c *countsLines) {
		if len(there) == 0 {
			from = c.offset - int64(len(c.last))
		}
		there[e] = true
	}
	lines := countsLines{r: bufio.NewReaderSize(io.NewSectionReader(file, 0, 1<<62), 1<<16)}
	for {
		line, err := lines.next(context.Background(), false)
		switch {
		case errors.Is(err, io.EOF):
			return there, from, nil
		case err != nil:
			return nil, 0, err
		case want[string(line)]:
			found(string(line), &lines)
		case len(windows) > 0:
			begins, _, _ := bytes.Cut(line, uniqueField)
			if e := windows[string(begins)]; e != nil {
				if r, err := parseRecord(line); err == nil && r.Key() == e.record.Key() {
					found(string(e.value), &lines)
				}
			}
		}
	}
}

// uniqueField follows the window in a line.
var uniqueField = []byte(`,"unique":`)

// repairTail makes the file end in a newline. It cuts off what follows the last one
// if that is a torn record or the zeros that a power loss leaves. Anything else gets
// a newline instead: it is of another program, or a whole record that an editor has
// saved without its newline. If a torn write left a whole record, lookup finds it.
func repairTail(file *os.File, size int64) error {
	var start int64
	var tail []byte
	err := linesBack(file, size, func(at int64, line []byte) (more bool) {
		if line[len(line)-1] == '\n' {
			return false
		}
		start, tail = at, line
		return true // it may be a part of the line
	})
	if err != nil || len(tail) == 0 {
		return err
	}
	_, notRecord := parseRecord(tail)
	_, notKeyRecord := parseKeyRecord(tail)
	torn := notRecord != nil && notKeyRecord != nil && bytes.HasPrefix(tail, tornPrefix) || bytes.HasPrefix(tornPrefix, tail) || tail[0] == 0
	if !torn {
		_, err := file.Write([]byte{'\n'})
		return err
	}
	return file.Truncate(start)
}
