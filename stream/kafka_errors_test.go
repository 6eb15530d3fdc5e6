package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
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

// TestKafkaTimestampThatIsRefused: too old for the topic, it is set aside at once;
// ahead of the broker's clock, when it has not become right for an hour. The
// records behind it come through.
func TestKafkaTimestampThatIsRefused(t *testing.T) {
	for _, tt := range []struct {
		name  string
		start time.Duration // of the window, from now
		after time.Duration // it is set aside between this and a minute later
	}{
		{"days ago", -48 * time.Hour, 0},
		{"a minute ago", -time.Minute, time.Hour},
		{"in a year", 365 * 24 * time.Hour, time.Hour},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
				refused := 2 // of 5
				first := time.Now().Add(tt.start).Truncate(time.Minute).UTC()
				c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.InvalidTimestamp, Count: -1, When: func(r kmsg.Request) bool {
					key := fmt.Sprint("verve/", first.Add(time.Duration(refused)*time.Minute).Format(time.RFC3339), "/host-1/", refused+1)
					return containsKey(r, key)
				}})
				s := start(t, t.TempDir(), Config{Kafka: cfg})
				for i := range 5 {
					at := first.Add(time.Duration(i) * time.Minute)
					if err := s.Publish(t.Context(), counter.Count{Start: at, Window: time.Minute, Unique: 1, Exact: true, SealedAt: at.Add(time.Minute)}); err != nil {
						t.Fatal(err)
					}
				}
				if tt.after > 0 {
					time.Sleep(tt.after - time.Minute)
					if st := s.Stats(); st.Poison != 0 || st.LastError() == "" {
						t.Errorf("before %v: stats %+v", tt.after, st)
					}
					time.Sleep(time.Minute)
				}
				s.flush(t, time.Minute)
				if st := s.Stats(); st.Poison != 1 || st.LastError() != "" {
					t.Errorf("stats %+v", st)
				}
				s.stop()
				if got := readTopic(t, cfg); len(got) != 4 {
					t.Errorf("%d records, want 4: %v", len(got), got)
				}
			})
		})
	}
}
