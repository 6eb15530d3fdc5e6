package stream

import (
	"fmt"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
)

func TestTotalsAddUpOverInstancesAndNameWhatIsOdd(t *testing.T) {
	at := func(instance string, seq uint64, minute int, unique uint64) Record {
		r := record(minute)
		r.Instance, r.Seq, r.Unique = instance, seq, unique
		return r
	}
	group := record(2)
	group.Scope, group.Instance, group.Seq = ScopeGroup, "", 0
	group.Group = "other"

	var totals Totals
	for _, r := range []Record{
		at("a", 1, 0, 10), at("b", 1, 0, 5),
		at("a", 2, 1, 7),
		at("b", 2, 4, 1), // windows 1 to 3 are missing for b
		at("a", 5, 2, 3), // records 3 and 4 of a
		at("a", 2, 1, 7), // a copy
		at("a", 2, 1, 9), // the same key, another value
		at("a", 5, 3, 2), // the same number for another window
		group,
	} {
		totals.Add(r)
	}
	var sums string
	for _, w := range totals.Windows() {
		sums += fmt.Sprint(w.Start.Sub(origin), "=", w.Unique, "/", w.Records, " ")
	}
	if want := "0s=15/2 1m0s=16/2 2m0s=1005/2 3m0s=2/1 4m0s=1/1 "; sums != want {
		t.Errorf("sums %s\nwant %s", sums, want)
	}
	var gaps string
	for _, g := range totals.Gaps() {
		gaps += g.String() + "\n"
	}
	want := "verve/a: records 3 to 4 are missing\nverve/b: windows 2026-11-01T00:01:00Z to 2026-11-01T00:03:00Z are missing\n"
	if gaps != want {
		t.Errorf("gaps %s\nwant %s", gaps, want)
	}
	var repeats string
	for _, r := range totals.Repeats() {
		repeats += r.String() + "\n"
	}
	want = "verve/2026-11-01T00:01:00Z/a/2 is there twice (unique 7 and 7)\n" +
		"verve/2026-11-01T00:01:00Z/a/2 shares its number with verve/2026-11-01T00:01:00Z/a/2 (unique 7 and 9)\n" +
		"verve/2026-11-01T00:02:00Z/a/5 shares its number with verve/2026-11-01T00:03:00Z/a/5 (unique 3 and 2)\n"
	if repeats != want {
		t.Errorf("repeats %s\nwant %s", repeats, want)
	}
	if w, ok := totals.Window(window(4).Start); !ok || w.Unique != 1 {
		t.Errorf("window 4: %+v, %v", w, ok)
	}
	if _, ok := totals.Window(window(9).Start); ok {
		t.Error("window 9 is there")
	}
}

func TestReadTopicFollows(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		s.publish(t, 0, 2)
		s.flush(t, time.Minute)
		var got []Record
		for r, err := range ReadTopic(t.Context(), cfg, true) {
			if err != nil {
				t.Fatal(err)
			}
			if got = append(got, r); len(got) == 2 {
				s.publish(t, 2, 4)
			}
			if len(got) == 4 {
				break
			}
		}
		wantWindows(t, got, 4)
		synctest.Wait()
	})
}

func TestReadTopicOfAnEmptyAndAMissingTopic(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		if got := readTopic(t, cfg); len(got) != 0 {
			t.Errorf("%d records in an empty topic", len(got))
		}
		cfg.Topic = "nowhere"
		var last error
		for _, err := range ReadTopic(t.Context(), cfg, false) {
			last = err
		}
		if last == nil {
			t.Error("a missing topic is no error")
		}
	})
}

func TestReadFileOfAMissingFile(t *testing.T) {
	var last error
	for _, err := range ReadFile(t.Context(), filepath.Join(t.TempDir(), "none"), false) {
		last = err
	}
	if last == nil || IsInvalidRecord(last) {
		t.Errorf("got %v", last)
	}
}
