package system_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"verve/internal/testproc"
)

// countsLine is a record of an instance as it stands in a counts file.
func countsLine(minute int, unique int, instance string, seq int) string {
	return fmt.Sprintf(`{"window_start":"2026-11-22T06:%02d:00Z","window_ms":60000,"unique":%d,"scope":"instance","group":"verve","instance":%q,"seq":%d,"complete":true,"exact":true,"sealed_at":"2026-11-22T06:%02d:00.012Z"}`+"\n",
		minute, unique, instance, seq, minute+1)
}

// groupCountsLine is a record of a whole group.
func groupCountsLine(minute, unique int) string {
	return fmt.Sprintf(`{"window_start":"2026-11-22T06:%02d:00Z","window_ms":60000,"unique":%d,"scope":"group","group":"shop","instance":"","seq":0,"complete":true,"exact":true,"sealed_at":"2026-11-22T06:%02d:02Z"}`+"\n",
		minute, unique, minute+1)
}

// partial is a record of a window that its server did not serve wholly.
func partial(line string) string {
	return strings.Replace(line, `"complete":true`, `"complete":false`, 1)
}

// TestTotalsNameWhatIsMissing, and exit 1 for it; what is in order exits 0.
func TestTotalsNameWhatIsMissing(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, records string
		stdout        []string // parts of its lines
		stderr        string
		code          int
	}{
		{"in order", countsLine(1, 5, "a", 1) + countsLine(1, 7, "b", 1) + countsLine(2, 3, "a", 2) + countsLine(2, 0, "b", 2),
			[]string{`{"group":"verve","window_start":"2026-11-22T06:01:00Z","window_ms":60000,"unique":12,"records":2,"complete":true,"exact":true}`, `"unique":3,"records":2`}, "", 0},
		{"empty", "", nil, "no records in FILE\n", 0},
		{"a record", countsLine(1, 5, "a", 1) + countsLine(3, 4, "a", 3),
			[]string{`06:01:00Z`, `06:03:00Z`}, "gap: verve/a: window 2026-11-22T06:02:00Z is missing\ngap: verve/a: record 2 is missing\n", 1},
		{"a window in which nobody ran", countsLine(1, 5, "a", 1) + countsLine(4, 4, "a", 2),
			[]string{`06:01:00Z`, `06:04:00Z`}, "idle: verve/a: nothing ran in the windows 2026-11-22T06:02:00Z to 2026-11-22T06:03:00Z\n", 0},
		{"a start and a stop in a window, then nobody ran", countsLine(1, 5, "a", 1) + countsLine(1, 4, "a", 2) + countsLine(3, 4, "a", 3),
			[]string{`"unique":9,"records":2`, `06:03:00Z`}, "idle: verve/a: nothing ran in the window 2026-11-22T06:02:00Z\n", 0},
		{"a record before the pause", countsLine(1, 5, "a", 1) + countsLine(4, 4, "a", 3),
			[]string{`06:01:00Z`, `06:04:00Z`}, "gap: verve/a: windows 2026-11-22T06:02:00Z to 2026-11-22T06:03:00Z are missing\ngap: verve/a: record 2 is missing\n", 1},
		{"a group that did not run", partial(groupCountsLine(1, 5)) + partial(groupCountsLine(4, 5)),
			[]string{`06:01:00Z`, `06:04:00Z`}, "idle: shop: nothing ran in the windows 2026-11-22T06:02:00Z to 2026-11-22T06:03:00Z\n", 0},
		{"a record of a group", groupCountsLine(1, 5) + groupCountsLine(3, 5),
			[]string{`06:01:00Z`, `06:03:00Z`}, "gap: shop: window 2026-11-22T06:02:00Z is missing\n", 1},
		{"windows of two lengths", countsLine(0, 5, "a", 1) + strings.ReplaceAll(countsLine(0, 4, "b", 1), `"window_ms":60000`, `"window_ms":3600000`),
			[]string{`06:00:00Z","window_ms":60000,"unique":5`, `06:00:00Z","window_ms":3600000,"unique":4`}, "", 0},
		{"a copy", countsLine(1, 5, "a", 1) + countsLine(1, 5, "a", 1),
			[]string{`"unique":5,"records":1`}, "repeat: verve/2026-11-22T06:01:00Z/a/1 is there twice and counted once (unique 5)\n", 1},
		{"a copy of a group's", groupCountsLine(1, 5) + groupCountsLine(1, 5) + groupCountsLine(2, 6),
			[]string{`{"group":"shop","window_start":"2026-11-22T06:01:00Z","window_ms":60000,"unique":5,"records":1`, `"unique":6`}, "repeat: shop/2026-11-22T06:01:00Z is there twice and counted once (unique 5)\n", 1},
		{"groups count apart", groupCountsLine(1, 5) + countsLine(1, 7, "a", 1),
			[]string{`{"group":"shop"`, `{"group":"verve"`}, "", 0},
		{"the end of the last line is missing", countsLine(1, 5, "a", 1) + strings.TrimSuffix(countsLine(2, 6, "a", 2), "\n"),
			[]string{`"unique":5`, `"unique":6`}, "", 0},
		{"a torn line", countsLine(1, 5, "a", 1) + countsLine(2, 6, "a", 2)[:100],
			[]string{`"unique":5`}, "invalid: FILE line 2: ", 1},
		{"counts that no server has, whose sum is none", strings.Replace(countsLine(1, 5, "a", 1), `"unique":5`, `"unique":18446744073709551615`, 1) + countsLine(1, 7, "b", 1),
			[]string{`"unique":7,"records":1`}, "invalid: FILE line 1: not a record of this program: parse record: unique 18446744073709551615 is more than a server counts\n", 1},
		{"a time that no clock has", countsLine(1, 5, "a", 1) + strings.ReplaceAll(countsLine(2, 6, "a", 2), "2026-", "2611-"),
			[]string{`"unique":5`}, "invalid: FILE line 2: not a record of this program: parse record: window_start in year 2611\n", 1},
		{"a line that is none", countsLine(1, 5, "a", 1) + "{}\n" + countsLine(2, 6, "a", 2),
			[]string{`"unique":5`, `"unique":6`}, "invalid: ", 1},
	} {
		file := filepath.Join(t.TempDir(), "counts.jsonl")
		if err := os.WriteFile(file, []byte(c.records), 0o644); err != nil {
			t.Fatal(err)
		}
		cmd := testproc.Verve(t, "totals", "--counts-file="+file)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if code := testproc.ExitCode(err); code != c.code {
			t.Errorf("%s: exit code %d, want %d", c.name, code, c.code)
		}
		lines := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
		if len(out) == 0 {
			lines = nil
		}
		if len(lines) != len(c.stdout) {
			t.Errorf("%s: got %d lines, want %d\n%s", c.name, len(lines), len(c.stdout), out)
			continue
		}
		for i, want := range c.stdout {
			if !strings.Contains(lines[i], want) {
				t.Errorf("%s: line %s\nwithout %s", c.name, lines[i], want)
			}
		}
		got, _, _ := strings.Cut(strings.ReplaceAll(stderr.String(), file, "FILE"), "verve: ")
		if !strings.HasPrefix(got, c.stderr) || c.stderr == "" && got != "" {
			t.Errorf("%s: said %q, want %q", c.name, got, c.stderr)
		}
	}
	if out, err := testproc.Verve(t, "totals", "--counts-file=nowhere").CombinedOutput(); testproc.ExitCode(err) != 1 || !bytes.Contains(out, []byte("nowhere")) {
		t.Errorf("a file that is not there: exit code %d, %s", testproc.ExitCode(err), out)
	}
}

// keyLine is a line by key of a record that countsLine makes.
func keyLine(minute int, key string, unique int, instance string, seq int) string {
	return fmt.Sprintf(`{"window_start":"2026-11-22T06:%02d:00Z","window_ms":60000,"key":%q,"unique":%d,"scope":"instance","group":"verve","instance":%q,"seq":%d}`+"\n",
		minute, key, unique, instance, seq)
}

// withKeys is a record that has some.
func withKeys(line string, n int) string {
	return strings.Replace(line, `"exact":true,`, fmt.Sprintf(`"exact":true,"keys":%d,`, n), 1)
}

// TestTotalsByKey adds up keys over instances, and names where they do not agree with the
// records.
func TestTotalsByKey(t *testing.T) {
	t.Parallel()
	records := withKeys(countsLine(1, 9, "a", 1), 2) + withKeys(countsLine(1, 4, "b", 1), 1) + countsLine(2, 3, "a", 2)
	keys := keyLine(1, "x", 2, "a", 1) + keyLine(1, "y", 3, "a", 1) + keyLine(1, "x", 4, "b", 1)
	for _, c := range []struct {
		name, records, keys, stdout, stderr string
		code                                int
	}{
		{"in order", records, keys,
			`{"group":"verve","window_start":"2026-11-22T06:01:00Z","window_ms":60000,"key":"x","unique":6,"records":2,"complete":true,"exact":true}
{"group":"verve","window_start":"2026-11-22T06:01:00Z","window_ms":60000,"key":"y","unique":3,"records":1,"complete":true,"exact":true}
{"group":"verve","window_start":"2026-11-22T06:01:00Z","window_ms":60000,"key":"","unique":4,"records":2,"complete":true,"exact":true}
{"group":"verve","window_start":"2026-11-22T06:02:00Z","window_ms":60000,"key":"","unique":3,"records":1,"complete":true,"exact":true}
`, "", 0},
		{"no keys at all", countsLine(1, 5, "a", 1), "",
			`{"group":"verve","window_start":"2026-11-22T06:01:00Z","window_ms":60000,"key":"","unique":5,"records":1,"complete":true,"exact":true}` + "\n", "", 0},
		{"a key is missing", withKeys(countsLine(1, 5, "a", 1), 2), keyLine(1, "x", 2, "a", 1), "",
			"keys: verve/2026-11-22T06:01:00Z/a/1 has 2 records by key, 1 are there\n", 1},
		{"more by key than in total", withKeys(countsLine(1, 5, "a", 1), 1), keyLine(1, "x", 7, "a", 1), "",
			"keys: verve/2026-11-22T06:01:00Z/a/1 has more ids by key than in total (7 and 5)\n", 1},
		{"a copy", withKeys(countsLine(1, 5, "a", 1), 1), keyLine(1, "x", 5, "a", 1) + keyLine(1, "x", 5, "a", 1), "",
			"repeat: verve/2026-11-22T06:01:00Z/a/1/x is there twice and counted once (unique 5)\n", 1},
		{"a gap", countsLine(1, 5, "a", 1) + countsLine(2, 5, "a", 3), "", "",
			"gap: verve/a: record 2 is missing\n", 1},
		{"of no record", countsLine(1, 5, "a", 1) + countsLine(2, 5, "a", 2), keyLine(1, "x", 5, "b", 1) + keyLine(1, "x", 5, "a", 1), "",
			"keys: verve/2026-11-22T06:01:00Z/a/1 has 0 records by key, 1 are there\n", 1},
		{"what was standard output", keyLine(1, "x", 3, "a", 1) + withKeys(countsLine(1, 3, "a", 1), 1), "",
			`{"group":"verve","window_start":"2026-11-22T06:01:00Z","window_ms":60000,"key":"x","unique":3,"records":1,"complete":true,"exact":true}` + "\n", "", 0},
		{"left by a kill", countsLine(1, 5, "a", 1), keyLine(2, "x", 5, "a", 2), "", "", 0},
	} {
		file := filepath.Join(t.TempDir(), "counts.jsonl")
		if err := os.WriteFile(file, []byte(c.records), 0o644); err != nil {
			t.Fatal(err)
		}
		if c.keys != "" {
			if err := os.WriteFile(strings.TrimSuffix(file, ".jsonl")+"-by-key.jsonl", []byte(c.keys), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		cmd := testproc.Verve(t, "totals", "--by-key", "--counts-file="+file)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		got, _, _ := strings.Cut(stderr.String(), "verve: ")
		if testproc.ExitCode(err) != c.code || c.stdout != "" && string(out) != c.stdout || got != c.stderr {
			t.Errorf("%s: exit code %d, want %d\n%s\nsaid %q, want %q", c.name, testproc.ExitCode(err), c.code, out, got, c.stderr)
		}
	}
}

// TestTotalsFollowByKey prints a window when its keys are there.
func TestTotalsFollowByKey(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "counts.jsonl")
	write := func(file, line string) {
		t.Helper()
		f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err == nil {
			_, err = f.WriteString(line)
			f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	keys := strings.TrimSuffix(file, ".jsonl") + "-by-key.jsonl"
	write(file, countsLine(1, 5, "a", 1)+withKeys(countsLine(2, 5, "a", 2), 1))
	cmd := testproc.Verve(t, "totals", "--by-key", "--follow", "--counts-file="+file)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out := bufio.NewScanner(stdout)
	next := func(want string) {
		t.Helper()
		if !out.Scan() || !strings.Contains(out.Text(), want) {
			t.Errorf("got %q, want %q in it", out.Text(), want)
		}
	}
	next(`06:01:00Z","window_ms":60000,"key":"","unique":5`)
	write(keys, keyLine(2, "x", 3, "a", 2))
	next(`06:02:00Z","window_ms":60000,"key":"x","unique":3`)
	next(`06:02:00Z","window_ms":60000,"key":"","unique":2`)
	write(keys, keyLine(3, "x", 1, "a", 3))
	write(file, withKeys(countsLine(3, 1, "a", 3), 1))
	next(`06:03:00Z","window_ms":60000,"key":"x","unique":1`)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); testproc.ExitCode(err) != 0 || stderr.Len() > 0 {
		t.Errorf("exit code %d, said %q", testproc.ExitCode(err), stderr.String())
	}
}

// TestTotalsSince leaves out earlier windows, by a time or by a duration.
func TestTotalsSince(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "counts.jsonl")
	long := func(lines string) string { return strings.ReplaceAll(lines, "2026-", "2016-") } // ago
	recent := time.Now().UTC().Truncate(time.Minute).Add(-3 * time.Minute).Format(time.RFC3339)
	text := long(countsLine(1, 5, "a", 1)+countsLine(2, 6, "a", 2)+countsLine(5, 7, "a", 7)+countsLine(6, 8, "a", 8)) +
		strings.ReplaceAll(long(countsLine(7, 9, "b", 1)), "2016-11-22T06:07:00Z", recent)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := testproc.Verve(t, "totals", "--counts-file="+file)
	cmd.Env = append(cmd.Env, "VERVE_SINCE=tomorrow")
	if out, err := cmd.CombinedOutput(); testproc.ExitCode(err) != exitUsage || !bytes.Contains(out, []byte(`--since="tomorrow" (from VERVE_SINCE)`)) {
		t.Errorf("exit code %d: %s", testproc.ExitCode(err), out)
	}
	for _, c := range []struct {
		since  string
		unique []int
		stderr string
		code   int
	}{
		{"2016-11-22T06:01:00Z", []int{5, 6, 7, 8, 9}, "gap: verve/a: windows", 1},
		{"2016-11-22T06:02:00+00:00", []int{6, 7, 8, 9}, "gap: verve/a: windows", 1},
		{"2016-11-22T06:02:01Z", []int{7, 8, 9}, "", 0},
		{"2016-11-22T07:06:00+01:00", []int{8, 9}, "", 0},
		{"5m", []int{9}, "", 0},
		{"0s", nil, "no records of windows since", 0},
		{"9999-01-01T00:00:00Z", nil, "no records of windows since 9999-01-01T00:00:00Z in " + file, 0},
		{"yesterday", nil, `verve: --since="yesterday" (from the command line): want a time`, 2},
		{"-2h", nil, `--since="-2h"`, 2},
		{"2016-11-22", nil, `--since="2016-11-22"`, 2},
	} {
		cmd := testproc.Verve(t, "totals", "--since="+c.since, "--counts-file="+file)
		cmd.Env = append(cmd.Env, "VERVE_SINCE=1h") // the flag goes before it
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if code := testproc.ExitCode(err); code != c.code || !strings.Contains(stderr.String(), c.stderr) || c.stderr == "" && stderr.Len() > 0 {
			t.Errorf("--since=%s: exit code %d, want %d; got %q, want %q", c.since, code, c.code, stderr.String(), c.stderr)
		}
		var unique []int
		for l := range bytes.Lines(out) {
			var r testproc.Record
			if err := json.Unmarshal(l, &r); err != nil {
				t.Fatalf("%s: %v", l, err)
			}
			unique = append(unique, r.Unique)
		}
		if !slices.Equal(unique, c.unique) {
			t.Errorf("--since=%s: got windows with %v ids, want %v", c.since, unique, c.unique)
		}
	}
}

// TestTotalsFollow: a window once for what is there, again when another instance
// adds to it; gaps when they are seen, and exit 1 for them at the end.
func TestTotalsFollow(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "counts.jsonl")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	write := func(lines ...string) {
		t.Helper()
		if _, err := f.WriteString(strings.Join(lines, "")); err != nil {
			t.Fatal(err)
		}
	}
	write(countsLine(1, 5, "a", 1), countsLine(1, 7, "b", 1), countsLine(2, 3, "a", 2))
	cmd := testproc.Verve(t, "totals", "--follow", "--counts-file="+file)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out, complaints := bufio.NewScanner(stdout), bufio.NewScanner(stderr)
	next := func(lines *bufio.Scanner, want string) {
		t.Helper()
		if !lines.Scan() || !strings.Contains(lines.Text(), want) {
			t.Errorf("got %q, want %q in it", lines.Text(), want)
		}
	}
	next(out, `06:01:00Z","window_ms":60000,"unique":12,"records":2`)
	next(out, `06:02:00Z","window_ms":60000,"unique":3,"records":1`)
	write(countsLine(2, 4, "b", 2))
	next(out, `06:02:00Z","window_ms":60000,"unique":7,"records":2`)
	write(countsLine(4, 1, "a", 4))
	next(complaints, "gap: verve/a: window 2026-11-22T06:03:00Z is missing")
	next(complaints, "gap: verve/a: record 3 is missing")
	next(out, `06:04:00Z","window_ms":60000,"unique":1,"records":1`)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	next(complaints, "records are missing or repeated")
	for out.Scan() {
		t.Errorf("after the end: %s", out.Text())
	}
	if code := testproc.ExitCode(cmd.Wait()); code != exitFailed {
		t.Errorf("exit code %d", code)
	}
}
