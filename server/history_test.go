package server

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"verve/counter"
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
	open := func(instance string) *history { return openHistory(path, "verve", instance, zerolog.Nop()) }
	h := open("a")
	for n := 1; n <= 3; n++ {
		h.add(windowAt(n))
	}
	// A write that was cut short, and then one that was not.
	half, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = half.WriteString("\n" + `{"group":"verve","instance":"a","window_st`)
	}
	if err != nil {
		t.Fatal(err)
	}
	half.Close()
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

// TestKeysOfWindowsAreBounded: each window has its largest, and all of them together
// keptKeys at most, the newest first. The file has their number only.
func TestKeysOfWindowsAreBounded(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "windows.jsonl")
	h := openHistory(path, "verve", "a", zerolog.Nop())
	var counts []counter.KeyCount
	for i := range 10 * maxShownKeys {
		counts = append(counts, counter.KeyCount{Key: fmt.Sprintf("%05d", i), Unique: uint64(i*7919%(10*maxShownKeys)) + 1})
	}
	given := counter.KeyCountsOf(counts...)
	const n = keptKeys/maxShownKeys + 10
	want := given.Largest(maxShownKeys) // gives way to whatever runs, so it takes long on a busy machine
	for i := range n {
		w := windowAt(i)
		w.Keys, w.largest = len(counts), slices.Clone(want)
		h.add(w)
	}
	for i, w := range h.last(n) {
		if kept := i < keptKeys/maxShownKeys; w.Keys != len(counts) || kept != slices.Equal(w.largest, want) || !kept && w.largest != nil || kept == w.forgotten() {
			t.Fatalf("window %d before the last has %d of %d keys", i, len(w.largest), w.Keys)
		}
	}
	again := openHistory(path, "verve", "a", zerolog.Nop())
	if w := again.last(1)[0]; w.Keys != len(counts) || w.largest != nil || !w.forgotten() {
		t.Errorf("after a restart %d keys, %d of them named, forgotten %t", w.Keys, len(w.largest), w.forgotten())
	}
	if b, err := os.ReadFile(path); err != nil || len(b) > 400*n {
		t.Errorf("the file has %d bytes for %d windows: %v", len(b), n, err)
	}
}

// TestKeysOfPartsOfAWindowAddUp where they are known.
func TestKeysOfPartsOfAWindowAddUp(t *testing.T) {
	h := openHistory("", "verve", "a", zerolog.Nop())
	part := windowAt(1)
	part.WholeGroup = nil
	part.Keys, part.largest = 2, []counter.KeyCount{{Key: "a", Unique: 5}, {Key: "b", Unique: 2}}
	h.add(part)
	part.Keys, part.largest = 2, []counter.KeyCount{{Key: "c", Unique: 6}, {Key: "b", Unique: 4}}
	h.add(part)
	got := h.last(1)[0]
	if want := []counter.KeyCount{{Key: "b", Unique: 6}, {Key: "c", Unique: 6}, {Key: "a", Unique: 5}}; !slices.Equal(got.largest, want) || got.Keys != 3 {
		t.Errorf("got %d keys, %v", got.Keys, got.largest)
	}
	if !slices.Equal(part.largest, []counter.KeyCount{{Key: "c", Unique: 6}, {Key: "b", Unique: 4}}) {
		t.Error("a part was changed")
	}
	// The keys of the whole group are no part.
	part.WholeGroup = &groupWindow{Unique: 100, Keys: 4}
	part.Keys, part.largest = 1, []counter.KeyCount{{Key: "g", Unique: 90}}
	h.add(part)
	if got := h.last(1)[0]; len(got.largest) != 1 || got.largest[0].Key != "g" || got.WholeGroup.Keys != 4 {
		t.Errorf("got %+v", got)
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
	again := openHistory(h.path, "verve", "a", zerolog.Nop())
	if got := uniques(again.last(2)); !slices.Equal(got, []uint64{2, 1}) {
		t.Errorf("after the disk was back and a restart got %v", got)
	}
}
