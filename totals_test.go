package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"verve/stream"
)

// followed is one thing that a reader yields, and the pause before it.
type followed[T any] struct {
	record T
	err    error
	pause  time.Duration // how long the reader waits before it
}

// yields returns a reader that yields all, and then waits for the end of ctx.
func yields[T any](ctx context.Context, all ...followed[T]) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for _, f := range all {
			time.Sleep(f.pause)
			if !yield(f.record, f.err) {
				return
			}
		}
		<-ctx.Done()
	}
}

// caughtUp returns the error with which a reader reports that it has read everything that
// existed at the start.
func caughtUp(t *testing.T) error {
	t.Helper()
	path := filepath.Join(t.TempDir(), "counts.jsonl")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, err := range stream.ReadFile(t.Context(), path, true) {
		if !errors.Is(err, stream.ErrCaughtUp) {
			t.Fatal(err)
		}
		return err
	}
	return nil
}

// minutes returns the records of some minutes, which are numbered from 1.
func minutes(keys uint64, numbers ...int) (all []followed[stream.Record]) {
	day := time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
	for _, n := range numbers {
		at := day.Add(time.Duration(n) * time.Minute)
		all = append(all, followed[stream.Record]{record: stream.Record{
			WindowStart: at, WindowMS: 60_000, Unique: 5, Scope: stream.ScopeInstance, Group: "verve", Instance: "a",
			Seq: uint64(n), Complete: true, Exact: true, Keys: keys, SealedAt: at.Add(time.Minute),
		}})
	}
	return all
}

// byKey returns the record by key of a minute.
func byKey(key string, n int) followed[stream.KeyRecord] {
	r := minutes(0, n)[0].record
	return followed[stream.KeyRecord]{record: stream.KeyRecord{
		WindowStart: r.WindowStart, WindowMS: r.WindowMS, Key: key, Unique: 2, Scope: r.Scope, Group: r.Group, Instance: r.Instance, Seq: r.Seq,
	}}
}

// follow runs verve totals --follow for some time, and returns what it prints.
func follow(t *testing.T, records []followed[stream.Record], keys []followed[stream.KeyRecord]) (stdout, stderr string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	var out, complaints bytes.Buffer
	r := totalsReport{from: "topic", stdout: &output{}, err: &complaints, out: newTotalsPrinter(&out, false, keys != nil)}
	var byKey iter.Seq2[stream.KeyRecord, error]
	if keys != nil {
		byKey = yields(ctx, keys...)
	}
	err = r.follow(ctx, yields(ctx, records...), byKey)
	return out.String(), complaints.String(), err
}

// TestTotalsFollowNamesNoGapThatIsNone: the records of an instance are on two partitions,
// because the topic got more partitions, and those of the second one are read first. Gaps are
// reported when everything that existed at the start is read, and later when they occur.
func TestTotalsFollowNamesNoGapThatIsNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mark := []followed[stream.Record]{{err: caughtUp(t)}}
		second, first := minutes(0, 5, 6, 7, 8), minutes(0, 1, 2, 3, 4)
		first[2].pause = 10 * totalsSettle
		later := minutes(0, 10, 9, 11) // they arrive within one totalsSettle
		later[0].pause = time.Minute
		all := append(append(append(second, first...), mark...), later...)
		stdout, stderr, err := follow(t, all, nil)
		if n := strings.Count(stdout, `"unique":5`); n != 11 || stderr != "" || err != nil {
			t.Errorf("%d windows, %v, %q", n, err, stderr)
		}

		stdout, stderr, err = follow(t, append(append(append(minutes(0, 5, 6), minutes(0, 1, 2, 3)...), mark...), minutes(0, 8)...), nil)
		const want = "gap: verve/a: window 2026-11-22T00:04:00Z is missing\ngap: verve/a: record 4 is missing\n" +
			"gap: verve/a: window 2026-11-22T00:07:00Z is missing\ngap: verve/a: record 7 is missing\n"
		if n := strings.Count(stdout, `"unique":5`); n != 6 || stderr != want || err == nil {
			t.Errorf("%d windows, %v, %q, want %q", n, err, stderr, want)
		}
	})
}

// TestTotalsFollowReadsAllKeysThatAreThere, however long that takes, before it reports a
// missing one.
func TestTotalsFollowReadsAllKeysThatAreThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mark := followed[stream.Record]{err: caughtUp(t)}
		records := append(minutes(1, 1, 2, 3), mark)
		late := byKey("x", 2)
		late.pause = 10 * totalsKeysWait
		keys := []followed[stream.KeyRecord]{byKey("x", 1), late, {err: mark.err}}
		stdout, stderr, err := follow(t, records, keys)
		const want = "keys: verve/2026-11-22T00:03:00Z/a/3 has 1 records by key, 0 are there\n"
		for n := 1; n <= 3; n++ {
			if line := fmt.Sprintf(`00:%02d:00Z","window_ms":60000,"key":"x","unique":2`, n); strings.Contains(stdout, line) != (n < 3) {
				t.Errorf("the line %s: %s", line, stdout)
			}
		}
		if stderr != want || err == nil {
			t.Errorf("%v, %q, want %q", err, stderr, want)
		}
	})
}
