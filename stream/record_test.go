package stream

import (
	"strings"
	"testing"
	"time"
)

func sampleRecord() Record {
	return Record{
		WindowStart: time.Date(2026, 11, 22, 6, 36, 0, 0, time.UTC),
		WindowMS:    60000, Unique: 48211, Scope: ScopeInstance, Group: "verve", Instance: "host-1",
		Seq: 17, Complete: true, Exact: true,
		SealedAt: time.Date(2026, 11, 22, 6, 37, 0, 12e6, time.UTC),
	}
}

func TestRecordBytesAreGolden(t *testing.T) {
	instance := sampleRecord()
	group := sampleRecord()
	group.Scope, group.Instance, group.Seq, group.Complete = ScopeGroup, "", 0, false
	short := sampleRecord()
	short.WindowStart = time.Date(2026, 11, 22, 7, 36, 0, 50e6, time.FixedZone("", 3600))
	short.WindowMS, short.Unique, short.Instance = 50, maxUnique, "h\"<&>\\é"

	for _, c := range []struct {
		name, key, json string
		record          Record
	}{
		{"instance", "verve/2026-11-22T06:36:00Z/host-1/17",
			`{"window_start":"2026-11-22T06:36:00Z","window_ms":60000,"unique":48211,"scope":"instance","group":"verve","instance":"host-1","seq":17,"complete":true,"exact":true,"sealed_at":"2026-11-22T06:37:00.012Z"}`,
			instance},
		{"group", "verve/2026-11-22T06:36:00Z",
			`{"window_start":"2026-11-22T06:36:00Z","window_ms":60000,"unique":48211,"scope":"group","group":"verve","instance":"","seq":0,"complete":false,"exact":true,"sealed_at":"2026-11-22T06:37:00.012Z"}`,
			group},
		{"short window, other zone, escapes", "verve/2026-11-22T06:36:00.05Z/h\"<&>\\é/17",
			`{"window_start":"2026-11-22T06:36:00.05Z","window_ms":50,"unique":1099511627776,"scope":"instance","group":"verve","instance":"h\"<&>\\é","seq":17,"complete":true,"exact":true,"sealed_at":"2026-11-22T06:37:00.012Z"}`,
			short},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, err := c.record.appendJSON(nil)
			if err != nil || string(b) != c.json {
				t.Errorf("got  %s, %v\nwant %s", b, err, c.json)
			}
			if k := c.record.Key(); k != c.key {
				t.Errorf("key %q, want %q", k, c.key)
			}
			back, err := parseRecord(b)
			if err != nil {
				t.Fatal(err)
			}
			if again, _ := back.appendJSON(nil); string(again) != c.json {
				t.Errorf("parsed and written again: %s", again)
			}
		})
	}
}

func TestParseRecordRefusesWhatIsNotCanonical(t *testing.T) {
	r := sampleRecord()
	b, _ := r.appendJSON(nil)
	good := string(b)
	for name, s := range map[string]string{
		"empty":            "",
		"trailing newline": good + "\n",
		"two records":      good + good,
		"unknown field":    strings.Replace(good, `"seq"`, `"x":1,"seq"`, 1),
		"missing field":    strings.Replace(good, `"exact":true,`, ``, 1),
		"field twice":      strings.Replace(good, `"exact":true,`, `"exact":false,"exact":true,`, 1),
		"other order":      strings.Replace(good, `"complete":true,"exact":true`, `"exact":true,"complete":true`, 1),
		"other case":       strings.Replace(good, `"unique"`, `"Unique"`, 1),
		"offset":           strings.Replace(good, `:36:00Z`, `:36:00+00:00`, 1),
		"idle digits":      strings.Replace(good, `.012Z`, `.0120Z`, 1),
		"no keys as 0":     strings.Replace(good, `"sealed_at"`, `"keys":0,"sealed_at"`, 1),
		"exponent":         strings.Replace(good, `48211`, `4.8211e4`, 1),
		"negative":         strings.Replace(good, `48211`, `-1`, 1),
		"no scope":         strings.Replace(good, `"instance","group"`, `"host","group"`, 1),
		"seq 0":            strings.Replace(good, `"seq":17`, `"seq":0`, 1),
		"slash in a name":  strings.Replace(good, `host-1`, `host/1`, 1),
		"no window":        strings.Replace(good, `60000`, `0`, 1),
	} {
		if r, err := parseRecord([]byte(s)); err == nil {
			t.Errorf("%s: accepted %s as %+v", name, s, r)
		}
	}
}

func FuzzParseRecord(f *testing.F) {
	r := sampleRecord()
	b, _ := r.appendJSON(nil)
	f.Add(b)
	r.Scope, r.Instance, r.Seq, r.Keys = ScopeGroup, "", 0, 12
	b, _ = r.appendJSON(nil)
	f.Add(b)
	f.Add([]byte(`{"window_start":"`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRecord(b)
		if err != nil {
			return
		}
		again, err := r.appendJSON(nil)
		if err != nil || string(again) != string(b) {
			t.Fatalf("accepted %q, writes %q, %v", b, again, err)
		}
		if r.Key() == "" || r.end().Before(r.WindowStart) {
			t.Fatalf("accepted %q with key %q and end %s", b, r.Key(), r.end())
		}
	})
}
