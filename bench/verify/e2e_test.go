package main

import (
	"path/filepath"
	"testing"
	"time"

	"verve/internal/testproc"
)

// TestSIGTERMUnderLoadLosesNothing runs the whole program against the server
// of this tree: built, started, ended in the middle of the load, started again,
// and its counts file read back.
func TestSIGTERMUnderLoadLosesNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds of real time")
	}
	t.Parallel() // they wait more than they work
	dir := t.TempDir()
	server := testproc.Program(t)
	listen, admin := testproc.FreeAddr(t), testproc.FreeAddr(t)
	data := filepath.Join(dir, "data")
	v, err := run(t.Context(), &flags{
		URL: []string{"http://" + listen}, Connections: 8, Pipeline: 4, IDs: idsUUID, DuplicateStatus: 409,
		Duration: 2 * time.Minute, Timeout: time.Minute, Wait: time.Minute, MinAnswers: 1000,
		CountsFile: []string{filepath.Join(data, "counts.jsonl")},
		Spawn: []string{server + " --listen=" + listen + " --admin-listen=" + admin +
			" --window=200ms --window-header --shutdown-timeout=1m --data-dir=" + data},
		SpawnLog: filepath.Join(dir, "server.log"),
		Signal:   "TERM", KillEvery: "100ms-700ms", Kills: 4, StopLimit: 2 * time.Minute,
		// A request that broke was not answered, so it was not counted. And no
		// repeats: what a new process knows of the ids of the last one is not
		// what this test is about.
		Strict: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	if !v.Good || v.Kills != 4 || v.Windows < 3 {
		t.Errorf("got good=%t, %d kills, %d windows, %+v, %+v; want 4 kills and every window to add up",
			v.Good, v.Kills, v.Windows, v.Table, v.Faults)
	}
}

// TestBatchesAddUpOverKillsAndStops: every verdict of a batch is held against the
// records, over kill -9 and SIGTERM.
func TestBatchesAddUpOverKillsAndStops(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds of real time")
	}
	t.Parallel() // they wait more than they work
	server := testproc.Program(t)
	for _, signal := range []string{"TERM", "KILL"} {
		t.Run(signal, func(t *testing.T) {
			t.Parallel() // they wait more than they work
			dir := t.TempDir()
			listen, data := testproc.FreeAddr(t), filepath.Join(dir, "data")
			wantGood(t, &flags{
				URL: []string{"http://" + listen}, Connections: 4, Pipeline: 2, Batch: 500, IDs: idsUUID, DuplicateStatus: 409, Repeats: 0.2,
				Rate: 100_000, Duration: 2 * time.Minute, Timeout: time.Minute, Wait: time.Minute, MinAnswers: 10_000,
				CountsFile: []string{filepath.Join(data, "counts.jsonl")},
				Spawn: []string{server + " --listen=" + listen + " --admin-listen=" + testproc.FreeAddr(t) +
					" --window=200ms --window-header --shutdown-timeout=1m --data-dir=" + data},
				SpawnLog: filepath.Join(dir, "server.log"), Signal: signal, KillEvery: "200ms-900ms", Kills: 4, StopLimit: 2 * time.Minute,
			}, 4, 3)
		})
	}
}

// TestServerHasEveryMetricThatMustStayLevel: the soak asks the server for them by
// name.
func TestServerHasEveryMetricThatMustStayLevel(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds of real time")
	}
	t.Parallel() // they wait more than they work
	dir := t.TempDir()
	listen, admin := testproc.FreeAddr(t), testproc.FreeAddr(t)
	data := filepath.Join(dir, "data")
	v, err := run(t.Context(), &flags{
		URL: []string{"http://" + listen}, Connections: 2, Pipeline: 1, IDs: idsUUID, DuplicateStatus: 409, Rate: 1000,
		Requests: 8000, Duration: time.Minute, Timeout: time.Minute, Wait: time.Minute, // two samples a second, for seven seconds or more
		CountsFile: []string{filepath.Join(data, "counts.jsonl")},
		Spawn: []string{testproc.Program(t) + " --listen=" + listen + " --admin-listen=" + admin +
			" --window=200ms --window-header --shutdown-timeout=1m --data-dir=" + data},
		SpawnLog: filepath.Join(dir, "server.log"), StopLimit: 2 * time.Minute,
		Admin: "http://" + admin, DataDir: data,
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range levels {
		if v.Levels[l.name].Most == 0 {
			t.Errorf("no samples of %s (%s): %+v", l.name, l.metric, v.Faults)
		}
	}
}
