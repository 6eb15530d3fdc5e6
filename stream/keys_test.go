package stream

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	bolt "go.etcd.io/bbolt"

	"verve/counter"
	"verve/internal/testproc"
)

// withKeys gives a count keys, in order, so that one id has none.
func withKeys(c counter.Count, keys int) counter.Count {
	for i := range keys {
		key := fmt.Appendf(nil, "campaign/%06d", i)
		if i%2 != 0 {
			key = append(key, ` "é"`...)
		}
		c.Keys.Add(key, uint64(i%7+1))
	}
	return c
}

func readKeys(t *testing.T, records iter.Seq2[KeyRecord, error]) (out []KeyRecord) {
	t.Helper()
	for r, err := range records {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, r)
	}
	return out
}

// wantKeys checks that windows 0 to n-1 have their keys, in order, each once.
func wantKeys(t *testing.T, got []KeyRecord, n, keys int) {
	t.Helper()
	if len(got) != n*keys {
		t.Fatalf("%d records by key, want %d", len(got), n*keys)
	}
	of := withKeys(counter.Count{}, keys).Keys.List()
	for i, r := range got {
		w, k := window(i/keys), of[i%keys]
		if !r.WindowStart.Equal(w.Start) || r.Seq != uint64(i/keys+1) || r.Key != k.Key || r.Unique != k.Unique {
			t.Fatalf("record by key %d is %s with unique %d, want %s of window %d with %d", i, r.ID(), r.Unique, k.Key, i/keys, k.Unique)
		}
	}
}

// keyed are entries as the spool hands them out.
func keyed(t *testing.T, from, to, keys int) []spooled {
	t.Helper()
	sp := testSpool(t, "")
	if err := sp.attach([]string{"a"}); err != nil {
		t.Fatal(err)
	}
	for i := range to {
		r := record(i)
		if err := sp.append(&r, withKeys(window(i), keys).Keys, noStep); err != nil {
			t.Fatal(err)
		}
	}
	all, err := sp.next("a", to, 1<<60)
	if err != nil {
		t.Fatal(err)
	}
	return all[from:]
}

func TestKeyRecordBytesAreGolden(t *testing.T) {
	instance := sampleRecord()
	group := sampleRecord()
	group.Scope, group.Instance, group.Seq = ScopeGroup, "", 0
	odd := sampleRecord()
	odd.Instance, odd.Seq = `" "0`, 10
	for _, c := range []struct {
		record        Record
		key, id, json string
	}{
		{instance, "campaign-7", "verve/2026-11-22T06:36:00Z/host-1/17/campaign-7",
			`{"window_start":"2026-11-22T06:36:00Z","window_ms":60000,"key":"campaign-7","unique":123,"scope":"instance","group":"verve","instance":"host-1","seq":17}`},
		{group, "a/b", "verve/2026-11-22T06:36:00Z/a/b",
			`{"window_start":"2026-11-22T06:36:00Z","window_ms":60000,"key":"a/b","unique":123,"scope":"group","group":"verve","instance":"","seq":0}`},
		{odd, "\"\\<&>é\u2028", "verve/2026-11-22T06:36:00Z/\" \"0/10/\"\\<&>é\u2028",
			`{"window_start":"2026-11-22T06:36:00Z","window_ms":60000,"key":"\"\\<&>é\u2028","unique":123,"scope":"instance","group":"verve","instance":"\" \"0","seq":10}`},
	} {
		got := string(newKeyJSON(&c.record).append(nil, []byte(c.key), 123))
		if got != c.json {
			t.Errorf("got  %s\nwant %s", got, c.json)
		}
		r, err := parseKeyRecord([]byte(got))
		if err != nil || r.ID() != c.id || r.Key != c.key || r.Unique != 123 {
			t.Errorf("parsed as %+v with the identity %s, %v", r, r.ID(), err)
		}
	}
	r := sampleRecord()
	r.Keys = 3
	want := `"exact":true,"keys":3,"sealed_at":`
	if b, err := r.appendJSON(nil); err != nil || !strings.Contains(string(b), want) {
		t.Errorf("got %s, %v, want %s in it", b, err, want)
	} else if back, err := parseRecord(b); err != nil || back.Keys != 3 {
		t.Errorf("parsed as %+v, %v", back, err)
	}
}

func TestParseKeyRecordRefusesWhatIsNotCanonical(t *testing.T) {
	r := sampleRecord()
	good := string(newKeyJSON(&r).append(nil, []byte("k"), 5))
	for name, s := range map[string]string{
		"empty":         "",
		"newline":       good + "\n",
		"unknown field": strings.Replace(good, `"scope"`, `"x":1,"scope"`, 1),
		"no key":        strings.Replace(good, `"key":"k",`, ``, 1),
		"empty key":     strings.Replace(good, `"k"`, `""`, 1),
		"long key":      strings.Replace(good, `"k"`, `"`+strings.Repeat("k", 129)+`"`, 1),
		"escaped":       strings.Replace(good, `"k"`, `"\u006b"`, 1),
		"no ids":        strings.Replace(good, `:5,`, `:0,`, 1),
		"too many ids":  strings.Replace(good, `:5,`, `:1099511627777,`, 1),
		"leading zero":  strings.Replace(good, `:5,`, `:05,`, 1),
		"seq 0":         strings.Replace(good, `"seq":17`, `"seq":0`, 1),
		"year 10000":    strings.Replace(good, `"2026-11-22T06:36:00Z"`, `"9999-12-31T23:59:59-01:00"`, 1),
		"a record":      func() string { b, _ := r.appendJSON(nil); return string(b) }(),
	} {
		var p keyParser
		if _, err := p.parse([]byte(good)); err != nil {
			t.Fatal(err)
		}
		for way, parse := range map[string]func([]byte) (KeyRecord, error){"alone": parseKeyRecord, "behind another": p.parse} {
			if r, err := parse([]byte(s)); err == nil {
				t.Errorf("%s, %s: accepted %s as %+v", name, way, s, r)
			}
		}
	}
}

func FuzzParseKeyRecord(f *testing.F) {
	r := sampleRecord()
	f.Add([]byte("k"), newKeyJSON(&r).append(nil, []byte("k"), 5))
	f.Add([]byte(`"é`), newKeyJSON(&r).append(nil, []byte(`"é`), 1<<63))
	f.Fuzz(func(t *testing.T, before, b []byte) {
		var p keyParser
		if checkKey(before) == nil {
			if _, err := p.parse(newKeyJSON(&r).append(nil, before, 1)); err != nil {
				t.Fatal(err)
			}
		}
		got, err := parseKeyRecord(b)
		again, err2 := p.parse(b)
		if (err == nil) != (err2 == nil) || err == nil && got != again {
			t.Fatalf("%q is %+v, %v, and behind another %+v, %v", b, got, err, again, err2)
		}
		of := got.record()
		if err == nil && string(newKeyJSON(&of).append(nil, []byte(got.Key), got.Unique)) != string(b) {
			t.Fatalf("accepted %q, which is written otherwise", b)
		}
	})
}

func TestSpoolKeepsKeysWithTheirRecord(t *testing.T) {
	dir := t.TempDir()
	sp := testSpool(t, dir)
	if err := sp.attach([]string{"a"}); err != nil {
		t.Fatal(err)
	}
	want := map[int]int{0: 3, 1: 0, 2: 5}
	for i := range 3 {
		r := record(i)
		if err := sp.append(&r, withKeys(window(i), want[i]).Keys, noStep); err != nil {
			t.Fatal(err)
		}
	}
	sp.Close()
	sp = testSpool(t, dir)
	defer sp.Close()
	if err := sp.attach([]string{"a"}); err != nil {
		t.Fatal(err)
	}
	if batch, err := sp.next("a", 10, 4); err != nil || len(batch) != 2 {
		t.Errorf("%d records for 4 keys, want those before the second with keys; %v", len(batch), err)
	}
	batch, err := sp.next("a", 10, batchKeys)
	if err != nil || len(batch) != 3 {
		t.Fatalf("%d records, %v", len(batch), err)
	}
	for i, e := range batch {
		if got, want := e.keys.List(), withKeys(window(i), want[i]).Keys.List(); !slices.Equal(got, want) || e.record.Keys != uint64(len(want)) {
			t.Errorf("record %d has %d keys %v, want %v", i, e.record.Keys, got, want)
		}
	}
	if err := sp.ack("a", 3); err != nil {
		t.Fatal(err)
	}
	if got := keyFileNames(t, dir); len(got) != 1 || !strings.HasPrefix(got[0], "0000000000000003-") {
		t.Errorf("files %q, want that of the running window, which a restart needs", got)
	}
	r := record(3)
	if err := sp.append(&r, counter.KeyCounts{}, noStep); err != nil {
		t.Fatal(err)
	}
	if got := keyFileNames(t, dir); len(got) != 0 {
		t.Errorf("files %q stayed behind", got)
	}
}

// TestPublishedHasTheKeysOfTheWindow over restarts within it, until the next window.
func TestPublishedHasTheKeysOfTheWindow(t *testing.T) {
	dir := t.TempDir()
	publish := func(at int, keys ...counter.KeyCount) counter.Published {
		t.Helper()
		sp := testSpool(t, dir)
		defer sp.Close()
		r := record(at)
		if err := sp.append(&r, counter.KeyCountsOf(keys...), noStep); err != nil {
			t.Fatal(err)
		}
		return sp.Published()["verve/host-1"]
	}
	a, b, c := counter.KeyCount{Key: "a", Unique: 1}, counter.KeyCount{Key: "b", Unique: 2}, counter.KeyCount{Key: "c", Unique: 3}
	want := func(got counter.Published, keys ...counter.KeyCount) {
		t.Helper()
		sp := testSpool(t, dir)
		defer sp.Close()
		if kept := sp.Published()["verve/host-1"]; !slices.Equal(got.Keys.List(), keys) || got.KeysLost || !slices.Equal(kept.Keys.List(), keys) || kept.KeysLost {
			t.Errorf("published %+v, after a restart %+v, want the keys %v", got, kept, keys)
		}
	}
	want(publish(0))
	want(publish(1, a, c), a, c)
	want(publish(1, b, c), a, b, counter.KeyCount{Key: "c", Unique: 6})
	want(publish(1), a, b, counter.KeyCount{Key: "c", Unique: 6})
	want(publish(2, b), b)
	want(publish(3))
}

// TestPublishedKeysOfARepeatedAppend are counted once: the first may be in the file
// although the disk refused it.
func TestPublishedKeysOfARepeatedAppend(t *testing.T) {
	for _, stored := range []bool{false, true} {
		dir := t.TempDir()
		sp := testSpool(t, dir)
		keys := withKeys(window(0), 3).Keys
		r := record(0)
		if err := sp.append(&r, keys, noStep); err != nil {
			t.Fatal(err)
		}
		disk := sp.store
		sp.store = &failing{disk, stored}
		if err := sp.append(&r, keys, noStep); !errors.Is(err, errDisk) {
			t.Fatal(err)
		}
		sp.store = disk
		if err := sp.append(&r, keys, noStep); err != nil {
			t.Fatal(err)
		}
		for _, when := range []string{"now", "after a restart"} {
			for i, k := range sp.Published()["verve/host-1"].Keys.List() {
				if want := 2 * keys.List()[i].Unique; k.Unique != want {
					t.Errorf("stored %v, %s: %s has %d, want %d", stored, when, k.Key, k.Unique, want)
				}
			}
			sp.Close()
			sp = testSpool(t, dir)
		}
		sp.Close()
	}
}

// TestKeysOfALostSpoolAreKnownToBeLost for as long as their window is the last one.
func TestKeysOfALostSpoolAreKnownToBeLost(t *testing.T) {
	dir := t.TempDir()
	sp := testSpool(t, dir)
	for i := range 2 {
		r := record(i)
		if err := sp.append(&r, withKeys(window(i), 2).Keys, noStep); err != nil {
			t.Fatal(err)
		}
	}
	sp.Close()
	if err := os.Remove(filepath.Join(dir, spoolFile)); err != nil {
		t.Fatal(err)
	}
	for round := range 3 {
		sp = testSpool(t, dir)
		p := sp.Published()["verve/host-1"]
		if !p.KeysLost || p.Unique == 0 {
			t.Errorf("round %d: %+v", round, p)
		}
		r := record(1)
		if err := sp.append(&r, counter.KeyCounts{}, noStep); err != nil {
			t.Fatal(err)
		}
		sp.Close()
	}
	sp = testSpool(t, dir)
	defer sp.Close()
	r := record(2)
	if err := sp.append(&r, counter.KeyCounts{}, noStep); err != nil {
		t.Fatal(err)
	}
	if p := sp.Published()["verve/host-1"]; p.KeysLost {
		t.Errorf("in the next window: %+v", p)
	}
}

func TestPublishRefusesKeysThatAreNone(t *testing.T) {
	s := start(t, "", Config{})
	for name, keys := range map[string][]counter.KeyCount{
		"empty":   {{Key: "", Unique: 1}},
		"long":    {{Key: strings.Repeat("k", 129), Unique: 1}},
		"no ids":  {{Key: "a"}},
		"no text": {{Key: "\xff", Unique: 1}},
	} {
		c := window(0)
		c.Keys = counter.KeyCountsOf(keys...)
		if err := s.Publish(t.Context(), c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestKeysFileIsBesideTheCountsFile(t *testing.T) {
	for counts, want := range map[string]string{
		"verve-data/counts.jsonl": "verve-data/counts-by-key.jsonl",
		"/var/log/ids.json":       "/var/log/ids-by-key.json",
		"a.b/counts":              "a.b/counts-by-key",
		"a/.counts":               "a/.counts-by-key",
	} {
		if got := keysFile(counts); got != want {
			t.Errorf("%s: got %s, want %s", counts, got, want)
		}
	}
}

func appendText(t *testing.T, path string, lines ...string) {
	t.Helper()
	appendFile(t, path, []byte(strings.Join(lines, "")))
}

// TestLinesByKeyOfAKillAreRemoved wherever it fell: those of records whose lines are not
// there, also if other processes have appended behind them, and no others.
func TestLinesByKeyOfAKillAreRemoved(t *testing.T) {
	const keys = 4
	all := keyed(t, 0, 4, keys)
	var left []byte
	for i := 2; i < 4; i++ {
		left = append(left, strings.TrimSuffix(string(appendLines(nil, &all[i])), string(all[i].value)+"\n")...)
	}
	foreign := strings.ReplaceAll(string(left), `"host-1"`, `"host-2"`)
	for n := 0; n <= len(left); n += 13 {
		for name, behind := range map[string]string{"alone": "", "shared": foreign, "zeros": string(make([]byte, 5000))} {
			path := filepath.Join(t.TempDir(), "counts.jsonl")
			deliver(t, newFileSink(path, nil, 0, noStep), all[:2])
			appendText(t, keysFile(path), foreign, string(left[:n]))
			if behind != "" && n%2 == 0 {
				file, err := os.OpenFile(keysFile(path), os.O_RDWR|os.O_APPEND, 0)
				if err != nil {
					t.Fatal(err)
				}
				info, _ := file.Stat()
				if err := repairTail(file, info.Size()); err != nil { // as the other process does
					t.Fatal(err)
				}
				file.Close()
				appendText(t, keysFile(path), behind)
			}
			// One by one: the second one's lines are left over for the first, too.
			f := newFileSink(path, nil, 4, noStep)
			for i := range 4 {
				deliver(t, f, all[i:i+1])
			}
			wantWindows(t, readCounts(t, path), 4)
			var own []KeyRecord
			others := 0
			for _, r := range readKeys(t, ReadKeysFile(t.Context(), path, false)) {
				if r.Instance == "host-1" {
					own = append(own, r)
				} else {
					others++
				}
			}
			wantKeys(t, own, 4, keys)
			if want := strings.Count(foreign, "\n"); others != want && others != 2*want {
				t.Fatalf("%s, %d bytes: %d lines of another instance are left", name, n, others)
			}
		}
	}
}

// TestKeysOnStandardOutputAreBeforeTheirRecord, also where it takes a line in parts.
func TestKeysOnStandardOutputAreBeforeTheirRecord(t *testing.T) {
	var out strings.Builder
	deliver(t, newFileSink("-", &out, 0, noStep), keyed(t, 0, 2, 3))
	var got []KeyRecord
	var records []Record
	for line := range strings.Lines(out.String()) {
		line := []byte(strings.TrimSuffix(line, "\n"))
		if r, err := parseKeyRecord(line); err == nil {
			got = append(got, r)
		} else if r, err := parseRecord(line); err != nil {
			t.Fatal(err)
		} else if records = append(records, r); len(got) != 3*len(records) {
			t.Errorf("record %d behind %d lines by key", len(records), len(got))
		}
	}
	wantKeys(t, got, 2, 3)
	wantWindows(t, records, 2)
}

// refuseKeys makes the topic of the keys refuse batches above a size.
func refuseKeys(t *testing.T, c *kfake.Cluster, e *kerr.Error, size int) *kfake.FaultHandle {
	t.Helper()
	if err := c.CreateTopic(DefaultKeysTopic, 3, nil); err != nil {
		t.Fatal(err)
	}
	id := c.TopicInfo(DefaultKeysTopic).TopicID
	return c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: e, Count: -1, When: func(r kmsg.Request) bool {
		of := &r.(*kmsg.ProduceRequest).Topics[0]
		return of.TopicID == id && len(of.Partitions[0].Records) > size
	}})
}

func TestKafkaKeysAreGolden(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		count := window(0)
		count.Keys = counter.KeyCountsOf(counter.KeyCount{Key: "a/b", Unique: 7})
		if err := s.Publish(t.Context(), count); err != nil {
			t.Fatal(err)
		}
		s.flush(t, time.Minute)
		wantGolden(t, cfg, DefaultKeysTopic, "verve/2026-11-01T00:00:00Z/host-1/1/a/b",
			`{"window_start":"2026-11-01T00:00:00Z","window_ms":60000,"key":"a/b","unique":7,"scope":"instance","group":"verve","instance":"host-1","seq":1}`)
		if got := readTopic(t, cfg); len(got) != 1 || got[0].Keys != 1 {
			t.Errorf("records %+v", got)
		}
	}, kfake.AllowAutoTopicCreation())
}

// TestKafkaTopicOfTheKeysIsNotAskedForWithoutKeys, is created for the first one, and
// waited for where the broker does not.
func TestKafkaTopicOfTheKeysIsNotAskedForWithoutKeys(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		s.publish(t, 0, 2)
		s.flush(t, time.Minute)
		if err := s.Publish(t.Context(), withKeys(window(2), 3)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		if st := s.Stats(); st.Pending != 1 || !strings.Contains(firstError(st), DefaultKeysTopic) {
			t.Errorf("stats %+v", st)
		}
		if got := readTopic(t, cfg); len(got) != 2 {
			t.Errorf("%d records, want those without keys", len(got))
		}
		if err := c.CreateTopic(DefaultKeysTopic, 1, nil); err != nil {
			t.Fatal(err)
		}
		s.flush(t, time.Minute)
		wantWindows(t, readTopic(t, cfg), 3)
		if got := readKeys(t, ReadKeysTopic(t.Context(), cfg, false)); len(got) != 3 {
			t.Errorf("%d records by key", len(got))
		}
	})
}

// TestKafkaKeysThatAreTooManyForABatch go in smaller ones; nothing is set aside.
func TestKafkaKeysThatAreTooManyForABatch(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		refuse := refuseKeys(t, c, kerr.MessageTooLarge, 5000)
		const keys = 3000
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		for i := range 3 {
			if err := s.Publish(t.Context(), withKeys(window(i), keys)); err != nil {
				t.Fatal(err)
			}
		}
		s.flush(t, 5*time.Minute)
		if st := s.Stats(); st.DeadLetters != 0 || refuse.Hits() == 0 {
			t.Errorf("stats %+v, %d requests refused", st, refuse.Hits())
		}
		wantWindows(t, readTopic(t, cfg), 3)
		wantKeys(t, readKeys(t, ReadKeysTopic(t.Context(), cfg, false)), 3, keys)
	}, kfake.AllowAutoTopicCreation())
}

// TestKafkaKeyThatIsTooLargeSlowsNoOther: it is set aside with its record, and the records by
// key of the others are sent as many at a time as before, also if they are in one batch with it,
// as after an outage.
func TestKafkaKeyThatIsTooLargeSlowsNoOther(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		const large = "a key that is too large"
		requests := 0
		c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.MessageTooLarge, Count: -1, When: func(r kmsg.Request) bool {
			requests++
			return containsKey(r, large)
		}})
		const keys, records, victim = 3000, 5, 2
		batch := entries(t, 0, records)
		for i := range batch {
			e := &batch[i]
			if e.keys = withKeys(window(i), keys).Keys; i == victim {
				e.keys = counter.KeyCountsOf(counter.KeyCount{Key: large, Unique: 7})
			}
			e.record.Keys = uint64(e.keys.Len())
			e.value, _ = e.record.appendJSON(nil)
		}
		k := newKafkaSink(cfg, zerolog.Nop(), 0, noStep)
		var aside []string
		for len(batch) > 0 {
			n, err := k.deliver(t.Context(), batch)
			if _, poison := errors.AsType[*poisonError](err); poison {
				aside = append(aside, batch[n].record.Key())
				n++
			} else if err != nil {
				t.Fatal(err)
			}
			batch = batch[n:]
		}
		k.close()
		if len(aside) != 1 || !strings.HasSuffix(aside[0], "/3") {
			t.Errorf("set aside: %q", aside)
		}
		if requests > keys/2 { // else one for each
			t.Errorf("%d requests for %d records by key", requests, (records-1)*keys)
		}
		if got := readKeys(t, ReadKeysTopic(t.Context(), cfg, false)); len(got) != (records-1)*keys {
			t.Errorf("%d records by key", len(got))
		}
	}, kfake.AllowAutoTopicCreation())
}

// TestKafkaSlowKeysGetMoreTime: a broker that takes few records by key a second, here as it
// takes only small batches, has them all in the end.
func TestKafkaSlowKeysGetMoreTime(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		// kfake keeps the timeout of the first session of a transactional id: this one is so
		// long that none is used, and the faults below abort as a broker does.
		first, err := cfg.client(kgo.TransactionalID(transactionalID("verve/host-1")), kgo.TransactionTimeout(15*time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := first.ProducerID(t.Context()); err != nil {
			t.Fatal(err)
		}
		first.Close()
		var timeout time.Duration // of the session
		var began time.Time       // its transaction; zero: there is none
		c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.InitProducerID}, Err: kerr.UnknownServerError, Count: -1, When: func(r kmsg.Request) bool {
			timeout, began = time.Duration(r.(*kmsg.InitProducerIDRequest).TransactionTimeoutMillis)*time.Millisecond, time.Time{}
			return false
		}})
		c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.EndTxn}, Err: kerr.UnknownServerError, Count: -1, When: func(kmsg.Request) bool {
			began = time.Time{}
			return false
		}})
		aborted := c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.InvalidProducerEpoch, Count: -1, When: func(kmsg.Request) bool {
			if began.IsZero() {
				began = time.Now()
			}
			time.Sleep(100 * time.Millisecond)
			return time.Since(began) > timeout
		}})
		refuseKeys(t, c, kerr.MessageTooLarge, 600)
		const keys = 3000
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		for i := range 2 {
			if err := s.Publish(t.Context(), withKeys(window(i), keys)); err != nil {
				t.Fatal(err)
			}
		}
		s.flush(t, time.Hour)
		if aborted.Hits() == 0 {
			t.Error("no transaction took too long")
		}
		wantWindows(t, readTopic(t, cfg), 2)
		wantKeys(t, readKeys(t, ReadKeysTopic(t.Context(), cfg, false)), 2, keys)
	})
}

// TestKafkaKeysForWhichTransactionsAreTooShort: where a broker does not allow transactions as
// long as the records by key take, they are sent without, and hold nothing up.
func TestKafkaKeysForWhichTransactionsAreTooShort(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.UnknownServerError, Count: -1, When: func(kmsg.Request) bool {
			time.Sleep(time.Second)
			return false
		}})
		var log testproc.Buffer
		const keys = 3 * keysAtOnce
		s := start(t, t.TempDir(), Config{Kafka: cfg, Log: zerolog.New(&log).Level(zerolog.WarnLevel)})
		for i := range 2 {
			if err := s.Publish(t.Context(), withKeys(window(i), keys)); err != nil {
				t.Fatal(err)
			}
		}
		s.flush(t, time.Hour)
		s.stop()
		if n := strings.Count(log.String(), "transaction.max.timeout.ms"); n != 1 {
			t.Errorf("%d lines about it: %s", n, log.String())
		}
		wantWindows(t, readTopic(t, cfg), 2)
		wanted := make(map[string]int)
		for _, r := range readKeys(t, ReadKeysTopic(t.Context(), cfg, false)) {
			wanted[r.ID()]++
		}
		if len(wanted) != 2*keys {
			t.Errorf("%d records by key, want %d", len(wanted), 2*keys)
		}
		for id, n := range wanted {
			if n != 1 {
				t.Fatalf("%s is there %d times", id, n)
			}
		}
	}, kfake.AllowAutoTopicCreation(), kfake.BrokerConfigs(map[string]string{"transaction.max.timeout.ms": "1500"}))
}

// TestKafkaRefusedKeysAreSetAsideWithTheirRecord, so that they can be produced by hand.
func TestKafkaRefusedKeysAreSetAsideWithTheirRecord(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		refuseKeys(t, c, kerr.InvalidRecord, 0)
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		if err := s.Publish(t.Context(), withKeys(window(0), 2)); err != nil {
			t.Fatal(err)
		}
		s.publish(t, 1, 2)
		s.flush(t, 5*time.Minute)
		var aside string
		s.spool.store.(*boltStore).view(func(tx *bolt.Tx) error {
			return tx.Bucket(bucketPoison).ForEach(func(_, v []byte) error { aside += string(v); return nil })
		})
		if st := s.Stats(); st.DeadLetters != 1 || strings.Count(aside, `"key":"campaign/`) != 2 {
			t.Errorf("stats %+v, set aside %q", st, aside)
		}
	}, kfake.AllowAutoTopicCreation())
}

// TestKafkaLooksForKeysByTheirRecord: what a kill left undecided is there once.
func TestKafkaLooksForKeysByTheirRecord(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		batch := keyed(t, 0, 4, 3)
		first := newKafkaSink(cfg, zerolog.Nop(), 0, noStep)
		deliver(t, first, batch[:2])
		first.close()
		second := newKafkaSink(cfg, zerolog.Nop(), 4, noStep)
		deliver(t, second, batch)
		second.close()
		wantWindows(t, readTopic(t, cfg), 4)
		wantKeys(t, readKeys(t, ReadKeysTopic(t.Context(), cfg, false)), 4, 3)
	}, kfake.AllowAutoTopicCreation())
}

// TestKafkaMissingRightOnTheTopicOfTheKeysIsNamed in the error, with the topic.
func TestKafkaMissingRightOnTheTopicOfTheKeysIsNamed(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		refuse := refuseKeys(t, c, kerr.TopicAuthorizationFailed, 0)
		var log testproc.Buffer
		s := start(t, t.TempDir(), Config{Kafka: cfg, Log: zerolog.New(&log)})
		if err := s.Publish(t.Context(), withKeys(window(0), 2)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if want := "lacks the ACL Write on topic " + DefaultKeysTopic; !strings.Contains(firstError(s.Stats()), want) || !strings.Contains(log.String(), want) {
			t.Errorf("stats %+v", s.Stats())
		}
		refuse.Remove()
		s.flush(t, 5*time.Minute)
	}, kfake.AllowAutoTopicCreation())
}

// claimed is a group that answers every question alike.
type claimed struct{ answer counter.Claim }

func (c claimed) Claim(context.Context, string, counter.Span) (counter.Claim, error) {
	return c.answer, nil
}
func (claimed) Written(context.Context, string, counter.Span) error { return nil }

// TestGroupLinesByKeyOfAKillAreRemoved by the instance that was killed, whether it writes
// the line of the window in the end or another one did; those of other windows stay.
func TestGroupLinesByKeyOfAKillAreRemoved(t *testing.T) {
	grouped := func(i int) spooled {
		r := record(i)
		r.Scope, r.Instance, r.Keys = ScopeGroup, "", 3
		b, err := r.appendJSON(nil)
		if err != nil {
			t.Fatal(err)
		}
		return spooled{index: uint64(i + 1), record: r, value: b, keys: withKeys(window(i), 3).Keys}
	}
	for name, claim := range map[string]counter.Claim{
		"mine": {Mine: true}, "mine, unknown": {Mine: true, Unknown: true}, "written": {Written: true}, "written, unknown": {Written: true, Unknown: true},
	} {
		path := filepath.Join(t.TempDir(), "counts.jsonl")
		f := newFileSink(path, nil, 0, noStep)
		f.claims = claimed{counter.Claim{Mine: true}}
		deliver(t, f, []spooled{grouped(0)})
		left := grouped(1)
		appendText(t, keysFile(path), strings.TrimSuffix(string(appendLines(nil, &left)), string(left.value)+"\n"))
		unsure := uint64(2)
		if claim.Unknown {
			unsure = 0
		}
		f = newFileSink(path, nil, unsure, noStep)
		f.claims = claimed{claim}
		deliver(t, f, []spooled{left})
		want := 1
		if claim.Mine {
			want = 2
		}
		if lines, keys := len(readCounts(t, path)), len(readKeys(t, ReadKeysFile(t.Context(), path, false))); lines != want || keys != 3*want {
			t.Errorf("%s: %d lines and %d by key, want %d and %d", name, lines, keys, want, 3*want)
		}
	}
}

func TestKeyTotalsAddUpAndNameWhatIsOdd(t *testing.T) {
	instance := func(name string, i, keys int) (Record, []KeyRecord) {
		r := record(i)
		r.Instance, r.Seq, r.Keys, r.Unique = name, uint64(i+1), uint64(keys), 10
		var of []KeyRecord
		for k := range keys {
			of = append(of, KeyRecord{r.WindowStart, r.WindowMS, string(rune('a' + k)), uint64(k + 1), r.Scope, r.Group, r.Instance, r.Seq})
		}
		return r, of
	}
	var sums Totals
	for _, name := range []string{"x", "y"} {
		for i := range 4 {
			r, keys := instance(name, i, 2)
			switch {
			case name == "x" && i == 1:
				keys = append(keys[:1], keys[0]) // one is missing, one a copy
			case name == "y" && i == 1:
				r.Unique = 2
			case name == "x" && i == 2:
				keys[1].Key, keys[1].Unique = "a", 9 // another value
				keys = append(keys, keys[1])         // and a copy of it
			}
			if name != "y" || i != 2 { // no record of the keys
				sums.Add(r)
			}
			for _, k := range keys {
				sums.AddKey(k)
			}
		}
	}
	early, keys := instance("x", 4, 1)
	sums.AddKey(keys[0]) // its record is about to come
	windows := sums.Windows()
	want := []string{
		"[{b 4 2} {a 2 2} { 14 2}]",
		"[{a 2 2} {b 2 1} { 8 2}]",
		"[{a 10 1}]",
		"[{b 4 2} {a 2 2} { 14 2}]",
	}
	for i, w := range windows {
		if got := fmt.Sprint(sums.Keys(w)); got != want[i] {
			t.Errorf("window %d: %s, want %s", i, got, want[i])
		}
	}
	at := func(i int, instance string) string {
		return fmt.Sprintf("verve/%s/%s/%d", window(i).Start.Format(time.RFC3339), instance, i+1)
	}
	if got, want := sums.Repeats(), []string{
		at(1, "x") + "/a is there twice and counted once (unique 1)",
		at(2, "x") + "/a is there with two values, both are counted (unique 1 and 9)",
		at(2, "x") + "/a is there twice and counted once (unique 9)",
	}; !slices.Equal(got, want) {
		t.Errorf("repeats %q\nwant %q", got, want)
	}
	if got, want := sums.Flaws(), []string{
		at(1, "x") + " has 2 records by key, 1 are there",
		at(1, "y") + " has more ids by key than in total (3 and 2)",
		at(2, "x") + " has 2 records by key, 1 are there",
		at(2, "y") + " has 2 records by key and is not there itself, they are not counted",
	}; !slices.Equal(got, want) {
		t.Errorf("flaws %q\nwant %q", got, want)
	}
	sums.Add(early)
	if got := sums.Flaws(); len(got) != 4 {
		t.Errorf("flaws %q", got)
	}
}

func TestReadKeysFollow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "counts.jsonl")
	all := keyed(t, 0, 2, 2)
	f := newFileSink(path, nil, 0, noStep)
	first := make(chan struct{})
	time.AfterFunc(followEvery/2, func() { f.deliver(context.Background(), all[:1]); close(first) })
	var got []KeyRecord
	for r, err := range ReadKeysFile(t.Context(), path, true) {
		if errors.Is(err, ErrCaughtUp) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if got = append(got, r); len(got) == 2 {
			<-first // it goes on after the lines are there
			deliver(t, f, all[1:])
		}
		if len(got) == 4 {
			break
		}
	}
	wantKeys(t, got, 2, 2)

	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		if got := readKeys(t, ReadKeysTopic(t.Context(), cfg, false)); len(got) != 0 {
			t.Errorf("%d records by key of no topic", len(got))
		}
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		time.AfterFunc(time.Minute, func() { s.Publish(t.Context(), withKeys(window(0), 2)) })
		var got []KeyRecord
		for r, err := range ReadKeysTopic(t.Context(), cfg, true) {
			if errors.Is(err, ErrCaughtUp) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if got = append(got, r); len(got) == 2 {
				break
			}
		}
		wantKeys(t, got, 1, 2)
		synctest.Wait()
	}, kfake.AllowAutoTopicCreation())
}

// TestKeysThatWaitInMemoryTakeAShareOfIt: above it publishing waits until some were
// delivered. A record whose keys take more is taken alone, and without keys each is.
func TestKeysThatWaitInMemoryTakeAShareOfIt(t *testing.T) {
	var keys []counter.KeyCount
	for i := range 1_000 {
		keys = append(keys, counter.KeyCount{Key: fmt.Sprintf("campaign-%04d", i), Unique: 1})
	}
	one := uint64(counter.KeyCountsOf(keys...).Size())
	for _, tt := range []struct {
		memory uint64
		fit    int
	}{
		{0, 20}, {1 << 40, 20}, {8 * one, 1}, {8*(3*one+1) - 1, 3}, {8*3*one - 1, 2}, {1, 1},
	} {
		sp, err := OpenSpool(SpoolConfig{Group: "verve", Instance: "host-1", Memory: tt.memory})
		if err != nil {
			t.Fatal(err)
		}
		if err := sp.attach([]string{"a"}); err != nil {
			t.Fatal(err)
		}
		n := 0
		put := func(keys []counter.KeyCount) error {
			r := record(n)
			err := sp.append(&r, counter.KeyCountsOf(keys...), noStep)
			if err == nil {
				n++
			}
			return err
		}
		for n < 20 && err == nil {
			err = put(keys)
		}
		if n != tt.fit || n < 20 && !errors.Is(err, errSpoolFull) {
			t.Errorf("with %d bytes %d records fit, then %v; want %d, each with %d bytes of keys", tt.memory, n, err, tt.fit, one)
		}
		if err := put(nil); err != nil {
			t.Errorf("with %d bytes, a record without keys: %v", tt.memory, err)
		}
		drain(t, sp, "a")
		if err := put(keys); err != nil {
			t.Errorf("with %d bytes, after the delivery: %v", tt.memory, err)
		}
		if store := sp.store.(*memoryStore); store.keysLimit > memoryKeysLimit {
			t.Errorf("with %d bytes the limit is %d", tt.memory, store.keysLimit)
		}
		sp.Close()
	}
}
