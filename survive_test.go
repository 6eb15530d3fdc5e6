package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestKilledServerGoesOn: after a kill -9 the ids of the running window are
// still refused, and its records add up to the answers.
func TestKilledServerGoesOn(t *testing.T) {
	dir := t.TempDir()
	const lives, each = 4, 20
	accept := func(v *instance, id string, want int) {
		t.Helper()
		if status, body := v.get(v.public + "/api/verve/accept?id=" + id); status != want {
			t.Errorf("id %s: got %d %s, want %d", id, status, body, want)
		}
	}
	for life := range lives {
		v := start(t, "--window=1h", "--data-dir="+dir)
		for i := range (life + 1) * each {
			want := 409
			if i >= life*each {
				want = 200
			}
			accept(v, fmt.Sprint(i), want)
			accept(v, fmt.Sprint("text-", i), want)
		}
		if life == lives-1 {
			if code := v.stop(); code != 0 {
				t.Errorf("exit code %d\n%s", code, strings.Join(v.lines, "\n"))
			}
			break
		}
		if err := v.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = v.Wait() // killed
	}
	sum := 0
	for i, r := range records(t, filepath.Join(dir, "counts.jsonl")) {
		if sum += r.Unique; r.Seq != i+1 || r.Complete {
			t.Errorf("record %d: %+v", i, r)
		}
	}
	if want := 2 * lives * each; sum != want {
		t.Errorf("the records add up to %d, want %d", sum, want)
	}
}

// TestDamagedEpochsAreSetAside: the server starts, and says what it could not
// use.
func TestDamagedEpochsAreSetAside(t *testing.T) {
	dir := t.TempDir()
	v := start(t, "--window=1h", "--data-dir="+dir)
	if code := v.stop(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	if err := os.Truncate(filepath.Join(dir, "epochs", "state"), 100); err != nil {
		t.Fatal(err)
	}
	v = start(t, "--window=1h", "--data-dir="+dir)
	aside, err := filepath.Glob(filepath.Join(dir, "epochs.damaged-*"))
	if log := strings.Join(v.lines, "\n"); err != nil || len(aside) != 1 || !strings.Contains(log, aside[0]) {
		t.Errorf("set aside: %v, %v; the log:\n%s", aside, err, log)
	}
	if code := v.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
