package server

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

func windowAt(n int) window {
	return window{
		Start: time.Unix(int64(n)*60, 0).UTC(), MS: 60000, Unique: uint64(n), Duplicates: uint64(2 * n), Complete: true, Exact: true,
		WholeGroup: &groupWindow{Unique: uint64(3 * n), Exact: true},
	}
}

func uniques(windows []window) (out []uint64) {
	for _, w := range windows {
		out = append(out, w.Unique)
	}
	return out
}

// TestWindowsOutliveTheProcess whatever a crash has left of the file, and those of
// another instance do not.
func TestWindowsOutliveTheProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "windows.jsonl")
	open := func(instance string) *history {
		h := openHistory(path, "verve", instance, zerolog.Nop())
		t.Cleanup(h.close)
		return h
	}
	h := open("a")
	for n := 1; n <= 3; n++ {
		h.add(windowAt(n))
	}
	// A write that was cut short, and then one that was not.
	if _, err := h.file.WriteString("\n" + `{"group":"verve","instance":"a","window_st`); err != nil {
		t.Fatal(err)
	}
	h.add(windowAt(4))

	h = open("a")
	got := h.last(3)
	if want := []uint64{4, 3, 2}; !slices.Equal(uniques(got), want) {
		t.Fatalf("after a restart got %v, want %v", uniques(got), want)
	}
	if w := got[0]; w.Duplicates != 8 || !w.Complete || !w.Exact || w.WholeGroup == nil || w.WholeGroup.Unique != 12 || !w.restored || !w.Start.Equal(windowAt(4).Start) {
		t.Errorf("after a restart got %+v", w)
	}
	h.add(windowAt(5))
	if got := uniques(open("a").last(9)); !slices.Equal(got, []uint64{5, 4, 3, 2, 1}) {
		t.Errorf("after two restarts got %v", got)
	}
	if got := open("b").last(9); len(got) != 0 {
		t.Errorf("another instance shows %v", uniques(got))
	}
}

// TestWindowsShownAreBounded, on disk as in memory.
func TestWindowsShownAreBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "windows.jsonl")
	h := openHistory(path, "verve", "a", zerolog.Nop())
	defer h.close()
	const n = 5*maxWindows + 7
	for i := range n {
		h.add(windowAt(i))
	}
	if got := h.last(n); len(got) < maxWindows || len(got) > 2*maxWindows || got[0].Unique != n-1 {
		t.Errorf("%d windows, the newest %+v", len(got), got[0])
	}
	b, err := os.ReadFile(path)
	if lines := bytes.Count(b, []byte{'\n'}); err != nil || lines < maxWindows || lines > 2*maxWindows {
		t.Errorf("the file has %d lines: %v", lines, err)
	}
	again := openHistory(path, "verve", "a", zerolog.Nop())
	defer again.close()
	if got := again.last(maxWindows); len(got) != maxWindows || got[0].Unique != n-1 || got[maxWindows-1].Unique != n-maxWindows {
		t.Errorf("after a restart %d windows, from %v to %v", len(got), got[0].Unique, got[len(got)-1].Unique)
	}
}

// TestPartsOfAWindowAreShownAsOne: a process that is started again within a window
// closes it again, with what it counted itself.
func TestPartsOfAWindowAreShownAsOne(t *testing.T) {
	h := openHistory("", "verve", "a", zerolog.Nop())
	h.add(windowAt(1))
	part := windowAt(2)
	part.Complete, part.WholeGroup = false, nil
	h.add(part)
	part.Unique, part.Exact, part.WholeGroup = 5, false, &groupWindow{Unique: 9}
	h.add(part)
	h.add(windowAt(3))
	got := h.last(2)
	if want := []uint64{3, 7}; !slices.Equal(uniques(got), want) {
		t.Fatalf("got %v, want %v", uniques(got), want)
	}
	if w := got[1]; w.Duplicates != 8 || w.Complete || w.Exact || w.WholeGroup == nil || w.WholeGroup.Unique != 9 {
		t.Errorf("got %+v", w)
	}
}

// TestWindowsAreShownWithoutADisk: a file that cannot be written is no reason to
// show less, and is tried again.
func TestWindowsAreShownWithoutADisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	h := openHistory(filepath.Join(dir, "windows.jsonl"), "verve", "a", zerolog.Nop())
	h.add(windowAt(1))
	if got := uniques(h.last(2)); !slices.Equal(got, []uint64{1}) {
		t.Errorf("got %v", got)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	h.add(windowAt(2))
	h.close()
	again := openHistory(h.path, "verve", "a", zerolog.Nop())
	defer again.close()
	if got := uniques(again.last(2)); !slices.Equal(got, []uint64{2, 1}) {
		t.Errorf("after the disk was back and a restart got %v", got)
	}
}
