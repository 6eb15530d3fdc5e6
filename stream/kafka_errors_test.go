package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"verve/counter"
)

// everyError is franz-go's own list.
func everyError() (all []*kerr.Error) {
	for code := int16(-1); code < 1000; code++ {
		if e := kerr.TypedErrorForCode(code); e != nil && (code == -1 || e != kerr.UnknownServerError) {
			all = append(all, e)
		}
	}
	return all
}

// TestKafkaWholeErrorListIsOvercome: whatever a broker answers twice, to
// whatever request of a session, the record comes through, once and in order;
// only what a broker says of the record itself sets it aside.
func TestKafkaWholeErrorListIsOvercome(t *testing.T) {
	t.Parallel()
	all := everyError()
	if len(all) < 130 {
		t.Fatalf("the list has %d errors", len(all))
	}
	if testing.Short() {
		all = all[:20]
	}
	aside := []*kerr.Error{kerr.MessageTooLarge, kerr.RecordListTooLarge, kerr.InvalidRecord}
	for _, key := range []kmsg.Key{
		kmsg.Produce, kmsg.InitProducerID, kmsg.EndTxn, kmsg.Metadata, kmsg.FindCoordinator, kmsg.ListOffsets, kmsg.Fetch,
	} {
		t.Run(key.Name(), func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
				batch := entries(t, 0, len(all)+1)
				first := newKafkaSink(cfg, zerolog.Nop(), 0, noStep)
				deliver(t, first, batch[:1]) // so that there is something to look at
				first.close()
				var want []string
				want = append(want, batch[0].record.Key())
				met := 0
				for i, e := range all {
					if key == kmsg.Produce && e == kerr.DuplicateSequenceNumber {
						continue // it says that the record is there: see below
					}
					b := batch[i+1 : i+2]
					faults := c.Fault(kfake.Fault{Keys: []kmsg.Key{key}, Err: e, Count: 2},
						kfake.Fault{Keys: []kmsg.Key{key}, Err: e, Count: 2, TopLevel: true})
					k := newKafkaSink(cfg, zerolog.Nop(), b[0].index, noStep)
					var err error
					for try := range 20 {
						if _, err = k.deliver(context.Background(), b); err == nil {
							break
						}
						if _, poison := errors.AsType[*poisonError](err); poison {
							break
						}
						time.Sleep(time.Duration(try) * time.Second)
					}
					if faults.Hits() > 0 {
						met++
					}
					faults.Remove()
					k.close()
					_, poison := errors.AsType[*poisonError](err)
					switch {
					case poison && key == kmsg.Produce && slices.Contains(aside, e):
					case err != nil:
						t.Errorf("%s: %v", e.Message, err)
					default:
						want = append(want, b[0].record.Key())
					}
				}
				if met < len(all)*9/10 {
					t.Errorf("only %d of %d faults were met", met, len(all))
				}
				var got []string
				for _, r := range readTopic(t, cfg) {
					got = append(got, r.Key())
				}
				if !slices.Equal(got, want) {
					t.Errorf("%d records are visible, want %d", len(got), len(want))
				}
				for i, e := range all { // which it was
					if k := batch[i+1].record.Key(); slices.Contains(want, k) && !slices.Contains(got, k) {
						t.Errorf("after %s the record is not there", e.Message)
					}
				}
			})
		})
	}
}

// TestKafkaDuplicateSequenceIsLookedInto: the client takes it for success. Where
// the broker has no such record the commit fails, and the record is sent again.
func TestKafkaDuplicateSequenceIsLookedInto(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		answered := 0
		c.ControlKey(int16(kmsg.Produce), func(r kmsg.Request) (kmsg.Response, error, bool) {
			answered++
			req := r.(*kmsg.ProduceRequest)
			resp := req.ResponseKind().(*kmsg.ProduceResponse)
			for _, rt := range req.Topics {
				topic := kmsg.NewProduceResponseTopic()
				topic.Topic, topic.TopicID = rt.Topic, rt.TopicID
				for _, rp := range rt.Partitions {
					p := kmsg.NewProduceResponseTopicPartition()
					p.Partition, p.ErrorCode, p.BaseOffset = rp.Partition, kerr.DuplicateSequenceNumber.Code, -1
					topic.Partitions = append(topic.Partitions, p)
				}
				resp.Topics = append(resp.Topics, topic)
			}
			return resp, nil, true
		})
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		s.publish(t, 0, 3)
		s.flush(t, time.Minute)
		s.stop()
		if answered == 0 {
			t.Error("nothing was answered so")
		}
		wantWindows(t, readTopic(t, cfg), 3)
	})
}

func containsKey(r kmsg.Request, key string) bool {
	return bytes.Contains(r.(*kmsg.ProduceRequest).Topics[0].Partitions[0].Records, []byte(key))
}

// TestKafkaTimeThatIsRefused: a record whose window ended too long ago for the
// topic, or ends too far ahead, is sent with the present time, at once and in its
// place, and does not hold up the records behind it.
func TestKafkaTimeThatIsRefused(t *testing.T) {
	for _, tt := range []struct {
		name  string
		start time.Duration // of the window, from now
	}{
		{"days ago", -48 * time.Hour},
		{"a minute ago", -time.Minute},
		{"in a year", 365 * 24 * time.Hour},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
				first := time.Now().Add(tt.start).Truncate(time.Minute).UTC()
				const refused = 2 // of 5
				end := first.Add((refused + 1) * time.Minute)
				key := fmt.Sprint("verve/", first.Add(refused*time.Minute).Format(time.RFC3339), "/host-1/", refused+1)
				c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.InvalidTimestamp, Count: -1, When: func(r kmsg.Request) bool {
					return containsKey(r, key) && slices.Contains(timesOf(t, r), end.UnixMilli())
				}})
				began := time.Now()
				s := start(t, t.TempDir(), Config{Kafka: cfg})
				for i := range 5 {
					at := first.Add(time.Duration(i) * time.Minute)
					if err := s.Publish(t.Context(), counter.Count{Start: at, Window: time.Minute, Unique: 1, Exact: true, SealedAt: at.Add(time.Minute)}); err != nil {
						t.Fatal(err)
					}
				}
				s.flush(t, time.Minute)
				if took := time.Since(began); took > 10*time.Second {
					t.Errorf("delivered after %v", took)
				}
				if st := s.Stats(); st.DeadLetters != 0 || firstError(st) != "" {
					t.Errorf("stats %+v, want nothing set aside", st)
				}
				s.stop()
				got := readTopic(t, cfg)
				if len(got) != 5 || !slices.IsSortedFunc(got, func(a, b Record) int { return int(a.Seq) - int(b.Seq) }) {
					t.Errorf("%d records, want 5 in their order: %v", len(got), got)
				}
			})
		})
	}
}

// timesOf returns the timestamps of the records of a produce request, in ms; none if the client
// gave the batch up while it wrote the request.
func timesOf(t *testing.T, r kmsg.Request) (times []int64) {
	t.Helper()
	raw := r.(*kmsg.ProduceRequest).Topics[0].Partitions[0].Records
	if len(raw) == 0 {
		return nil
	}
	var b kmsg.RecordBatch
	if err := b.ReadFrom(raw); err != nil {
		t.Fatal(err)
	}
	for records := b.Records; len(records) > 0; {
		var one kmsg.Record
		n, size := binary.Varint(records)
		if err := one.ReadFrom(records[:size+int(n)]); err != nil {
			t.Fatal(err)
		}
		times, records = append(times, b.FirstTimestamp+one.TimestampDelta64), records[size+int(n):]
	}
	return times
}

// olderThan reports whether a produce request has a record from before the limit.
func olderThan(t *testing.T, r kmsg.Request, limit time.Duration) bool {
	return slices.ContainsFunc(timesOf(t, r), func(ms int64) bool { return time.Since(time.UnixMilli(ms)) > limit })
}

// TestKafkaOutageLongerThanTheTopicTakesRecords: the topic takes records of the last ten
// minutes, and the broker was down for twenty. All records arrive, and only those that were too
// old have another time than the end of their window.
func TestKafkaOutageLongerThanTheTopicTakesRecords(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		const away, limit, windows = 20 * time.Minute, 10 * time.Minute, 2 * 60
		began := time.Now()
		c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.KafkaStorageError, Count: -1, When: func(r kmsg.Request) bool {
			return time.Since(began) < away
		}})
		c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.InvalidTimestamp, Count: -1, When: func(r kmsg.Request) bool {
			return time.Since(began) >= away && olderThan(t, r, limit)
		}})
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		for range windows {
			at := time.Now().Truncate(time.Minute).UTC()
			time.Sleep(time.Minute)
			if err := s.Publish(t.Context(), counter.Count{Start: at, Window: time.Minute, Unique: 1, Exact: true, SealedAt: at.Add(time.Minute)}); err != nil {
				t.Fatal(err)
			}
		}
		s.flush(t, time.Minute)
		if st := s.Stats(); st.DeadLetters != 0 || firstError(st) != "" {
			t.Errorf("stats %+v", st)
		}
		s.stop()
		if n := len(readTopic(t, cfg)); n != windows {
			t.Errorf("in the topic: %d of %d records", n, windows)
		}
		other := withOtherTime(t, cfg)
		if other == 0 || other > 12 {
			t.Errorf("%d records have another time than the end of their window", other)
		}
	})
}

// withOtherTime returns how many records of the topic have another time than the end of their
// window.
func withOtherTime(t *testing.T, cfg KafkaConfig) (n int) {
	t.Helper()
	client, err := cfg.client(kgo.KeepControlRecords())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for r, err := range readToEnd(t.Context(), client, topic, time.Time{}) {
		if err != nil {
			t.Fatal(err)
		}
		if record, err := parseRecord(r.Value); err == nil && !record.end().Equal(r.Timestamp) {
			n++
		}
	}
	return n
}

// TestKafkaShortWindowsThatAreTooOldAreSentTogether: the topic takes records of the last three
// seconds, the broker was down for twenty, and there are twenty records a second. To try each
// that is too old would take longer than a window, so the queue would never become shorter.
func TestKafkaShortWindowsThatAreTooOldAreSentTogether(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		const away, limit, window, windows = 20 * time.Second, 3 * time.Second, 50 * time.Millisecond, 2 * 400
		began := time.Now()
		c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.KafkaStorageError, Count: -1, When: func(r kmsg.Request) bool {
			return time.Since(began) < away
		}})
		refuse := c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.InvalidTimestamp, Count: -1, When: func(r kmsg.Request) bool {
			return time.Since(began) >= away && olderThan(t, r, limit)
		}})
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		for range windows {
			at := time.Now().Truncate(window).UTC()
			time.Sleep(window)
			if err := s.Publish(t.Context(), counter.Count{Start: at, Window: window, Unique: 1, Exact: true, SealedAt: at.Add(window)}); err != nil {
				t.Fatal(err)
			}
		}
		s.flush(t, time.Minute)
		s.stop()
		if n := refuse.Hits(); n == 0 || n > 40 {
			t.Errorf("%d requests were refused", n)
		}
		if n := len(readTopic(t, cfg)); n != windows {
			t.Errorf("in the topic: %d of %d records", n, windows)
		}
		other := withOtherTime(t, cfg)
		// Those of an eighth of the limit, beside those that were too old.
		if most := int((away + 2*time.Second - limit + limit/8) / window); other == 0 || other > most {
			t.Errorf("%d records have another time than the end of their window, want %d at most", other, most)
		}
	})
}

// TestKafkaReasonOfABatchThatIsSentAgainIsNamed: the client tries again what may pass, such as
// too few replicas for min.insync.replicas.
func TestKafkaReasonOfABatchThatIsSentAgainIsNamed(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		refuse := c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.NotEnoughReplicas, Count: -1})
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		s.publish(t, 0, 3)
		time.Sleep(time.Minute)
		if got := firstError(s.Stats()); !strings.Contains(got, "NOT_ENOUGH_REPLICAS") {
			t.Errorf("the reason is %q", got)
		}
		refuse.Remove()
		s.flush(t, time.Minute)
		wantWindows(t, readTopic(t, cfg), 3)
	})
}

// TestKafkaClockThatTheTopicRefuses: no record is set aside where the topic refuses
// the present time; all arrive when the clocks agree again.
func TestKafkaClockThatTheTopicRefuses(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		began := time.Now()
		c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.InvalidTimestamp, Count: -1, When: func(r kmsg.Request) bool {
			return time.Since(began) < 45*time.Minute
		}})
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		s.publish(t, 0, 3)
		time.Sleep(30 * time.Minute)
		if st := s.Stats(); st.DeadLetters != 0 || !strings.Contains(firstError(st), "clock") {
			t.Errorf("stats %+v", st)
		}
		s.flush(t, 2*time.Hour)
		s.stop()
		wantWindows(t, readTopic(t, cfg), 3)
	})
}
