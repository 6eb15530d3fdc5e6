package stream

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// TestNumbersGoOnBehindADamagedSpool: what was set aside keeps its numbers, its
// instance keeps its name, and what its last window had is not forgotten.
func TestNumbersGoOnBehindADamagedSpool(t *testing.T) {
	dir := t.TempDir()
	sp := testSpool(t, dir)
	if err := sp.attach([]string{"a"}); err != nil {
		t.Fatal(err)
	}
	appendTo(t, sp, 0, 7)
	sp.Close()
	for round := range 3 {
		path := filepath.Join(dir, spoolFile)
		if round == 2 { // gone altogether
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(path, bytes.Repeat([]byte("x"), 1<<16), 0o644); err != nil {
			t.Fatal(err)
		}
		sp, err := OpenSpool(SpoolConfig{Dir: dir, Group: "verve"})
		if err != nil {
			t.Fatal(err)
		}
		if (sp.setAside != "") != (round < 2) || sp.Instance() != "host-1" {
			t.Errorf("round %d: set aside as %q, instance %q", round, sp.setAside, sp.Instance())
		}
		last := 6 + 2*round
		if start, unique := lastWindow(sp); !start.Equal(window(last).Start) || unique != window(last).Unique {
			t.Errorf("round %d: last window %v with %d, want %v with %d", round, start, unique, window(last).Start, window(last).Unique)
		}
		if err := sp.attach([]string{"a"}); err != nil {
			t.Fatal(err)
		}
		appendTo(t, sp, last+1, last+3)
		got := drain(t, sp, "a")
		if len(got) != 2 || got[0].Seq != uint64(last+2) || got[1].Seq != uint64(last+3) {
			t.Errorf("round %d: %+v", round, got)
		}
		sp.Close()
	}
}

// TestDamagedMarkIsNoMark: of the two places the other one serves, and a good
// spool needs neither.
func TestDamagedMarkIsNoMark(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, checkpointFile)
	sp := testSpool(t, dir)
	appendTo(t, sp, 0, 5)
	sp.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := readCheckpoint(path); got.Seq != 5 || got.Unique != window(4).Unique {
		t.Errorf("read %+v", got)
	}
	for at := range whole {
		b := bytes.Clone(whole)
		b[at] ^= 0x10
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		if got := readCheckpoint(path); got.Seq != 5 && got.Seq != 4 {
			t.Fatalf("with byte %d changed: %+v", at, got)
		}
	}
	for size := range len(whole) {
		if err := os.WriteFile(path, whole[:size], 0o644); err != nil {
			t.Fatal(err)
		}
		if got := readCheckpoint(path); got.Seq != 0 && got.Seq != 5 && got.Seq != 4 {
			t.Fatalf("cut to %d bytes: %+v", size, got)
		}
	}
	sp = testSpool(t, dir)
	defer sp.Close()
	appendTo(t, sp, 5, 6)
	if got := readCheckpoint(path); got.Seq != 6 {
		t.Errorf("read %+v, want 6", got)
	}
}
