package stream

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"verve/counter"
)

func entries(t *testing.T, from, to int) []spooled {
	t.Helper()
	var out []spooled
	for i := from; i < to; i++ {
		r := record(i)
		r.Seq = uint64(i + 1)
		b, err := r.appendJSON(nil)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, spooled{index: r.Seq, record: r, value: b})
	}
	return out
}

func deliver(t *testing.T, k sink, batch []spooled) {
	t.Helper()
	for len(batch) > 0 {
		n, err := k.deliver(context.Background(), batch)
		if n == 0 || err != nil {
			t.Fatalf("delivered %d of %d, %v", n, len(batch), err)
		}
		batch = batch[n:]
	}
}

// TestLinesWhoseSyncFailedAreWrittenAgain: the next sync succeeds without what the first one could
// not write. A line of a record stays meanwhile: if it went, a reader that follows the file would
// read all of it again. So do lines by key if another process has appended behind them.
func TestLinesWhoseSyncFailedAreWrittenAgain(t *testing.T) {
	for _, tt := range []struct {
		failing int // 1: the lines by key, 2: the line of the record
		behind  string
	}{{1, ""}, {1, "of another process\n"}, {2, ""}} {
		path := filepath.Join(t.TempDir(), "counts.jsonl")
		f := newFileSink(path, nil, 0, noStep)
		deliver(t, f, entries(t, 0, 1))
		r := record(1)
		r.Seq, r.Keys = 2, 1
		b, err := r.appendJSON(nil)
		if err != nil {
			t.Fatal(err)
		}
		second := []spooled{{index: 2, record: r, value: b, keys: withKeys(counter.Count{}, 1).Keys}}
		line, syncs, long := string(b)+"\n", 0, time.Unix(1, 0)
		want, failed := fileText(t, path)+line, ""
		f.sync = func(file *os.File) error {
			if syncs++; syncs == tt.failing {
				failed = file.Name()
				return errors.Join(syscall.EIO, os.Chtimes(failed, long, long))
			}
			if info, err := file.Stat(); err != nil || failed == file.Name() && info.ModTime().Equal(long) {
				t.Errorf("%+v: %s is synced, but not written again, %v", tt, failed, err)
			}
			return file.Sync()
		}
		if n, err := f.deliver(t.Context(), second); n != 0 || !errors.Is(err, syscall.EIO) {
			t.Fatalf("delivered %d, %v; want the error", n, err)
		}
		if got := fileText(t, path); tt.failing == 2 && got != want {
			t.Errorf("after the failure the file is %q, want %q", got, want)
		}
		if tt.behind != "" {
			appendFile(t, failed, []byte(tt.behind))
			if err := os.Chtimes(failed, long, long); err != nil {
				t.Fatal(err)
			}
		}
		deliver(t, f, second)
		if got, keys := fileText(t, path), fileText(t, keysFile(path)); got != want || strings.Count(keys, `"key"`) != 1 {
			t.Errorf("%+v: the file is %q, and that of the keys %q", tt, got, keys)
		}
	}
}

func TestCountsFileIsNotWrittenTwiceAfterALostAck(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "counts.jsonl")
	deliver(t, newFileSink(path, nil, 0, noStep), entries(t, 0, 5))
	// The next process finds records 4 to 8 in the spool.
	f := newFileSink(path, nil, 8, noStep)
	deliver(t, f, entries(t, 3, 8))
	deliver(t, f, entries(t, 8, 10))
	wantWindows(t, readCounts(t, path), 10)
}

// TestReadFileNamesATornLine: a last line without its end counts if it is whole, and is named
// if it is not.
func TestReadFileNamesATornLine(t *testing.T) {
	all := entries(t, 0, 3)
	path := filepath.Join(t.TempDir(), "counts.jsonl")
	deliver(t, newFileSink(path, nil, 0, noStep), all[:2])
	for _, tt := range []struct {
		end              []byte
		records, invalid int
	}{
		{all[2].value, 3, 0},
		{all[2].value[:len(all[2].value)-1], 2, 1},
		{make([]byte, 4096), 2, 1},
		{bytes.Repeat([]byte("x"), 3*longestLine), 2, 1},
		{append(append(bytes.Repeat([]byte("x"), 3*longestLine), '\n'), all[2].value...), 3, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			file := path + ".ended"
			whole, err := os.ReadFile(path)
			if err == nil {
				err = os.WriteFile(file, append(whole, tt.end...), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			records, invalid := 0, 0
			for _, err := range ReadFile(t.Context(), file, false) {
				switch {
				case err == nil:
					records++
				case errors.Is(err, ErrInvalidRecord):
					invalid++
				default:
					t.Error(err)
				}
			}
			if records != tt.records || invalid != tt.invalid {
				t.Errorf("behind %.20q: %d records and %d named lines, want %d and %d", tt.end, records, invalid, tt.records, tt.invalid)
			}
		})
	}
}

func TestCountsFileTornLineIsRepaired(t *testing.T) {
	whole := entries(t, 0, 3)
	line := append(append([]byte(nil), whole[2].value...), '\n')
	for n := 1; n < len(line); n += 11 {
		path := filepath.Join(t.TempDir(), "counts.jsonl")
		deliver(t, newFileSink(path, nil, 0, noStep), whole[:2])
		appendFile(t, path, line[:n])
		deliver(t, newFileSink(path, nil, 3, noStep), whole[1:])
		wantWindows(t, readCounts(t, path), 3)
	}
}

// TestCountsFileKeepsAWholeLastLine: an editor, or a copy, may have taken its newline. Readers
// count it, so the next record does not take its place.
func TestCountsFileKeepsAWholeLastLine(t *testing.T) {
	for _, unsure := range []uint64{0, 3} {
		all := entries(t, 0, 3)
		path := filepath.Join(t.TempDir(), "counts.jsonl")
		deliver(t, newFileSink(path, nil, 0, noStep), all[:1])
		appendFile(t, path, all[1].value)
		next := all[2:]
		if unsure > 0 {
			next = all[1:] // the write was torn right there
		}
		deliver(t, newFileSink(path, nil, unsure, noStep), next)
		wantWindows(t, readCounts(t, path), 3)
	}
}

func TestCountsFileZerosOfAPowerLossAreCutOff(t *testing.T) {
	for _, torn := range []int{0, 100} { // bytes of a line before them
		for _, zeros := range []int{1, 10_000, 1 << 20} {
			path := filepath.Join(t.TempDir(), "counts.jsonl")
			deliver(t, newFileSink(path, nil, 0, noStep), entries(t, 0, 2))
			appendFile(t, path, append(entries(t, 2, 3)[0].value[:torn], make([]byte, zeros)...))
			deliver(t, newFileSink(path, nil, 3, noStep), entries(t, 1, 3))
			wantWindows(t, readCounts(t, path), 3)
		}
	}
}

func TestCountsFileLeavesForeignTextAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "counts.jsonl")
	appendFile(t, path, []byte("note to self"))
	deliver(t, newFileSink(path, nil, 0, noStep), entries(t, 0, 1))
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := "note to self\n" + string(entries(t, 0, 1)[0].value) + "\n"; string(b) != want {
		t.Errorf("got %q", b)
	}
	var records, invalid int
	for _, err := range ReadFile(t.Context(), path, false) {
		if errors.Is(err, ErrInvalidRecord) {
			invalid++
		} else if err == nil {
			records++
		}
	}
	if records != 1 || invalid != 1 {
		t.Errorf("%d records and %d invalid lines", records, invalid)
	}
}

func appendFile(t *testing.T, path string, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err == nil {
		_, err = f.Write(b)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestCountsFileFollowsRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "counts.jsonl")
	f := newFileSink(path, nil, 0, noStep)
	deliver(t, f, entries(t, 0, 2))
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	deliver(t, f, entries(t, 2, 4))
	wantWindows(t, append(readCounts(t, path+".1"), readCounts(t, path)...), 4)
}

func TestCountsFileIsSharedByProcesses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "counts.jsonl")
	done := make(chan error)
	for range 4 {
		go func() {
			f := newFileSink(path, nil, 0, noStep)
			for range 25 {
				if _, err := f.deliver(context.Background(), entries(t, 0, 20)); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for range 4 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if n := len(readCounts(t, path)); n != 4*25*20 {
		t.Errorf("%d whole records, want %d", n, 4*25*20)
	}
}

func TestStandardOutputGetsTheSameLines(t *testing.T) {
	var out bytes.Buffer
	deliver(t, newFileSink("-", &out, 0, noStep), entries(t, 0, 2))
	var want strings.Builder
	for _, e := range entries(t, 0, 2) {
		want.Write(e.value)
		want.WriteByte('\n')
	}
	if out.String() != want.String() {
		t.Errorf("got %q", out.String())
	}
}

func TestReadFileFollowsAppendsRepairsAndRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "counts.jsonl")
	all := entries(t, 0, 5)
	deliver(t, newFileSink(path, nil, 0, noStep), all[:1])
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	later := func(batch []spooled) {
		f := newFileSink(path, nil, batch[0].index, noStep)
		if _, err := f.deliver(ctx, batch); err != nil {
			t.Error(err)
		}
	}
	var got []Record
	for r, err := range ReadFile(ctx, path, true) {
		if errors.Is(err, ErrCaughtUp) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, r)
		switch len(got) {
		case 1:
			appendFile(t, path, all[1].value[:50]) // torn, and read half
			go later(all[1:2])
		case 2:
			if err := os.Rename(path, path+".1"); err != nil {
				t.Fatal(err)
			}
			go later(all[2:4])
		case 4:
			if err := os.Truncate(path, 0); err != nil { // copytruncate
				t.Fatal(err)
			}
			go later(all[4:])
		case 5:
			cancel()
		}
	}
	wantWindows(t, got, 5)
}

// followed returns the first n records that a reader which follows the file yields.
func followed(t *testing.T, path string, n int) (got []Record) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for r, err := range ReadFile(ctx, path, true) {
		if errors.Is(err, ErrCaughtUp) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if got = append(got, r); len(got) == n {
			cancel()
		}
	}
	return got
}

// TestReadFileFollowsAFileThatIsAsLongAgain: it is cut, as log rotation does, and has at least as
// many bytes again before the reader looks. Also in the middle of a line.
func TestReadFileFollowsAFileThatIsAsLongAgain(t *testing.T) {
	for _, again := range []int{1, 2, 3} {
		for _, torn := range []int{0, 20} {
			synctest.Test(t, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "counts.jsonl")
				all := entries(t, 0, 2+again)
				write := func(batch []spooled) { deliver(t, newFileSink(path, nil, 0, noStep), batch) }
				write(all[:2])
				appendFile(t, path, all[2].value[:torn])
				time.AfterFunc(followEvery/2, func() { // while the reader waits for more
					if err := os.Truncate(path, 0); err != nil {
						t.Error(err)
					}
					write(all[2:])
				})
				wantWindows(t, followed(t, path, len(all)), len(all))
			})
		}
	}
}

// TestReadFileFollowsARenamedFileToItsEnd: a line may be written between the last look at the
// file and its renaming.
func TestReadFileFollowsARenamedFileToItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "counts.jsonl")
		all := entries(t, 0, 3)
		write := func(batch []spooled) { deliver(t, newFileSink(path, nil, 0, noStep), batch) }
		write(all[:1])
		time.AfterFunc(followEvery/2, func() { // while the reader waits for more
			write(all[1:2])
			if err := os.Rename(path, path+".1"); err != nil {
				t.Error(err)
			}
			write(all[2:])
		})
		wantWindows(t, followed(t, path, len(all)), len(all))
	})
}

// TestRecordOfAGroupIsNeverRevised: the line of a window is in the file, and the group, whose
// Redis has lost that, gives the window again with another record. Nothing is written.
func TestRecordOfAGroupIsNeverRevised(t *testing.T) {
	path := filepath.Join(t.TempDir(), "counts.jsonl")
	of := func(group string, exact bool, keys ...string) []spooled {
		r := record(1)
		r.Scope, r.Instance, r.Group, r.Exact = ScopeGroup, "", group, exact
		var counts counter.KeyCounts
		for _, key := range keys {
			counts.Add([]byte(key), 2)
		}
		r.Keys = uint64(len(keys))
		b, err := r.appendJSON(nil)
		if err != nil {
			t.Fatal(err)
		}
		return []spooled{{index: 1, record: r, value: b, keys: counts}}
	}
	deliver(t, newFileSink(path, nil, 0, noStep), of("verve", true, "a", "b"))
	deliver(t, newFileSink(path, nil, 0, noStep), of("other", true))
	lines, keys := fileText(t, path), fileText(t, keysFile(path))

	f := newFileSink(path, nil, 0, noStep)
	f.claims = claimed{counter.Claim{Mine: true, Unknown: true}}
	deliver(t, f, of("verve", false, "a"))
	if got := fileText(t, path); got != lines {
		t.Errorf("the file is %q, want %q", got, lines)
	}
	if got := fileText(t, keysFile(path)); got != keys {
		t.Errorf("the lines by key are %q, want %q", got, keys)
	}
	deliver(t, f, of("third", false))
	if got := fileText(t, path); got == lines || !strings.HasPrefix(got, lines) {
		t.Errorf("the line of another group is not written: %q", got)
	}
}

// byGroup is a ledger in which the lines of some groups are written.
type byGroup map[string]bool

func (b byGroup) Claim(_ context.Context, group string, _ counter.Span) (counter.Claim, error) {
	return counter.Claim{Mine: !b[group], Written: b[group]}, nil
}

func (b byGroup) Written(_ context.Context, group string, _ counter.Span) error {
	b[group] = true
	return nil
}

// TestLineIsClaimedFromItsGroup: a record that another --group has left in the spool is not taken
// for the one of this group in the same window, nor this one for that.
func TestLineIsClaimedFromItsGroup(t *testing.T) {
	path := filepath.Join(t.TempDir(), "counts.jsonl")
	f := newFileSink(path, nil, 0, noStep)
	f.claims = byGroup{"written": true}
	for i, group := range []string{"before", "now", "written"} {
		r := record(0)
		r.Scope, r.Group, r.Instance, r.Seq = ScopeGroup, group, "", 0
		b, err := r.appendJSON(nil)
		if err != nil {
			t.Fatal(err)
		}
		deliver(t, f, []spooled{{index: uint64(i + 1), record: r, value: b}})
	}
	text := fileText(t, path)
	if strings.Count(text, "\n") != 2 || strings.Contains(text, "written") {
		t.Errorf("the file is %q, want the lines of two groups", text)
	}
}

func fileText(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
