package stream

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
)

func TestTotalsAddUpOverInstancesAndNameWhatIsOdd(t *testing.T) {
	at := func(instance string, seq uint64, minute int, unique uint64) Record {
		r := record(minute)
		r.Instance, r.Seq, r.Unique = instance, seq, unique
		return r
	}
	// One record for a whole group, from two publishers; and one that lies.
	group := record(2)
	group.Scope, group.Instance, group.Seq, group.Group = ScopeGroup, "", 0, "other"
	copied := group
	copied.SealedAt = copied.SealedAt.Add(time.Second)
	lying := group
	lying.Unique++
	later := group
	later.WindowStart = group.WindowStart.Add(2 * time.Minute)

	var totals Totals
	for _, r := range []Record{
		at("a", 1, 0, 10), at("b", 1, 0, 5),
		at("a", 2, 1, 7),
		at("b", 2, 4, 1), // b did not run in the windows 1 to 3
		at("a", 5, 2, 3), // records 3 and 4 of a
		at("a", 2, 1, 7), // a copy
		at("a", 2, 1, 9), // the same key, another value
		at("a", 2, 1, 9), // a copy of that one
		at("a", 5, 3, 2), // the same number for another window
		group, copied, lying, later,
	} {
		totals.Add(r)
	}
	var sums string
	for _, w := range totals.Windows() {
		sums += fmt.Sprint(w.Group, " ", w.Start.Sub(origin), "=", w.Unique, "/", w.Records, "; ")
	}
	want := "verve 0s=15/2; verve 1m0s=16/2; other 2m0s=1002/1; verve 2m0s=3/1; verve 3m0s=2/1; other 4m0s=1002/1; verve 4m0s=1/1; "
	if sums != want {
		t.Errorf("sums %s\nwant %s", sums, want)
	}
	var gaps string
	for _, g := range totals.Gaps() {
		gaps += g.String() + "\n"
	}
	want = "other: window 2026-11-01T00:03:00Z is missing\n" +
		"verve/a: records 3 to 4 are missing\nverve/b: nothing ran in the windows 2026-11-01T00:01:00Z to 2026-11-01T00:03:00Z\n"
	if gaps != want {
		t.Errorf("gaps %s\nwant %s", gaps, want)
	}
	var repeats string
	for _, r := range totals.Repeats() {
		repeats += r + "\n"
	}
	want = "verve/2026-11-01T00:01:00Z/a/2 is there twice and counted once (unique 7)\n" +
		"verve/2026-11-01T00:01:00Z/a/2 is there with two values, both are counted (unique 7 and 9)\n" +
		"verve/2026-11-01T00:01:00Z/a/2 is there twice and counted once (unique 9)\n" +
		"verve/2026-11-01T00:02:00Z/a/5 shares its number with verve/2026-11-01T00:03:00Z/a/5 (unique 3 and 2)\n" +
		"other/2026-11-01T00:02:00Z is there twice and counted once (unique 1002)\n" +
		"other/2026-11-01T00:02:00Z is there with two values, the first is counted (unique 1002 and 1003)\n"
	if repeats != want {
		t.Errorf("repeats %s\nwant %s", repeats, want)
	}
	if w, ok := totals.Window("verve", window(4).Span()); !ok || w.Unique != 1 {
		t.Errorf("window 4: %+v, %v", w, ok)
	}
	if _, ok := totals.Window("verve", window(9).Span()); ok {
		t.Error("window 9 is there")
	}
}

// TestGapsAreKnownAsTheyCome: what is missing is named with the record behind it.
func TestGapsAreKnownAsTheyCome(t *testing.T) {
	var totals Totals
	var got []string
	for _, at := range []struct {
		minute int
		seq    uint64
	}{{0, 1}, {1, 2}, {1, 2}, {2, 5}, {4, 6}} {
		r := record(at.minute)
		r.Seq = at.seq
		for _, g := range totals.Before(r) {
			got = append(got, g.String())
		}
		totals.Add(r)
	}
	want := []string{
		"verve/host-1: records 3 to 4 are missing",
		"verve/host-1: nothing ran in the window 2026-11-01T00:03:00Z",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
}

// TestReadTopicFollows, and marks where it has read what was there, of every partition.
func TestReadTopicFollows(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		s.publish(t, 0, 2)
		s.flush(t, time.Minute)
		var got []Record
		marks := 0
		for r, err := range ReadTopic(t.Context(), cfg, true) {
			if errors.Is(err, ErrCaughtUp) {
				if marks++; marks > 1 || len(got) != 2 {
					t.Errorf("mark %d behind %d records", marks, len(got))
				}
				s.publish(t, 2, 4)
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if got = append(got, r); len(got) == 4 {
				break
			}
		}
		wantWindows(t, got, 4)
		synctest.Wait()
	})
}

// TestReadTopicFollowsOnlyWhatItCanReach: a wrong address or password ends it, with the reason, as
// without follow. A topic that is missing it waits for.
func TestReadTopicFollowsOnlyWhatItCanReach(t *testing.T) {
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("wrong"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name  string
		with  kfake.Opt
		wrong func(cfg *KafkaConfig)
		want  string // empty: it waits
	}{
		{"address", kfake.AllowAutoTopicCreation(), func(cfg *KafkaConfig) { cfg.Brokers = []string{"127.0.0.1:1"} }, "unable to dial"},
		{"password", kfake.EnableSASL(), func(cfg *KafkaConfig) { cfg.SASL, cfg.User, cfg.PasswordFile = "PLAIN", "admin", password }, "list end offsets: EOF"},
		{"topic", kfake.AllowAutoTopicCreation(), func(cfg *KafkaConfig) { cfg.Topic = "later" }, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
				right := cfg
				tt.wrong(&cfg)
				if tt.want == "" {
					right.Topic = cfg.Topic
					dir := t.TempDir()
					time.AfterFunc(time.Minute, func() { start(t, dir, Config{Kafka: right}).publish(t, 0, 1) })
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				var last error
				var got []Record
				for r, err := range ReadTopic(ctx, cfg, true) {
					if errors.Is(err, ErrCaughtUp) {
						continue
					}
					if last = err; err == nil {
						got = append(got, r)
						break
					}
				}
				if tt.want == "" {
					wantWindows(t, got, 1)
				} else if last == nil || !strings.Contains(last.Error(), tt.want) {
					t.Errorf("error %v, want %q", last, tt.want)
				}
				synctest.Wait()
			}, tt.with)
		})
	}
}

// TestReadTopicNamesAnOpenTransaction, behind which nothing can be read.
func TestReadTopicNamesAnOpenTransaction(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		client, err := cfg.client(kgo.TransactionalID("another"), kgo.TransactionTimeout(10*time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		if err := client.BeginTransaction(); err != nil {
			t.Fatal(err)
		}
		if err := client.ProduceSync(t.Context(), &kgo.Record{Topic: topic}).FirstErr(); err != nil {
			t.Fatal(err)
		}
		var last error
		for _, err := range ReadTopic(t.Context(), cfg, false) {
			last = err
		}
		if last == nil || !strings.Contains(last.Error(), "a transaction is open") {
			t.Errorf("error %v", last)
		}
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
	if last == nil || errors.Is(last, ErrInvalidRecord) {
		t.Errorf("got %v", last)
	}
}
