package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestLineThatIsNoRecordIsAFault, and a file of an instance that has published nothing is none,
// as long as there is a record elsewhere.
func TestLineThatIsNoRecordIsAFault(t *testing.T) {
	dir := t.TempDir()
	f := &flags{CountsFile: []string{filepath.Join(dir, "missing"), filepath.Join(dir, "counts.jsonl")}}
	if err := os.WriteFile(f.CountsFile[1], []byte("no record\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := f.readRecords(t.Context())
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want that there is no file", err)
	}
	truth := newTruth(1, time.Second, false)
	truth.record(0, time.Now(), []answer{{id: 1, window: 1000}})
	if v := judge(truth, truth.finish(), p, f); v.Good || v.Faults.Kinds["invalid record"] != 1 {
		t.Errorf("got good=%t, %+v; want one invalid record", v.Good, v.Faults)
	}
}
