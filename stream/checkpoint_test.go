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

// TestDamagedCheckpointIsNone, and a good spool does not need it.
func TestDamagedCheckpointIsNone(t *testing.T) {
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
	write := func(b []byte) {
		t.Helper()
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for at := range whole {
		b := bytes.Clone(whole)
		b[at] ^= 0x10
		write(b)
		if got := readCheckpoint(path); got != (checkpoint{}) {
			t.Fatalf("with byte %d changed: %+v", at, got)
		}
	}
	for size := range len(whole) {
		write(whole[:size])
		if got := readCheckpoint(path); got != (checkpoint{}) {
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

// TestCheckpointInTwoPlacesIsRead: of the form of an earlier version, of which either place may
// be cut short, the newer one counts.
func TestCheckpointInTwoPlacesIsRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), checkpointFile)
	two := make([]byte, 2*checkpointPlace)
	place := func(turn, seq uint64) {
		t.Helper()
		c := checkpoint{Identity: "verve/host-1", Instance: "host-1", Seq: seq, Turn: turn}
		if err := c.write(path); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		copy(two[turn%2*checkpointPlace:], b)
	}
	want := func(what string, seq uint64, b []byte) {
		t.Helper()
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		if got := readCheckpoint(path); got.Seq != seq {
			t.Errorf("%s: read %+v, want %d", what, got, seq)
		}
	}
	place(1, 1)
	want("the first one", 1, two)
	place(2, 2)
	want("both", 2, two)
	place(3, 3)
	want("the first place again", 3, two)
	want("cut", 2, two[:checkpointPlace+40])
	damaged := bytes.Clone(two)
	damaged[checkpointPlace+20] ^= 1
	want("damaged", 2, damaged)
}
