package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"verve/internal/testproc"
)

const topic = "verve.unique-ids"

// inBubble runs a test against a kfake cluster on a network without sockets: all
// waiting is in the bubble's time.
func inBubble(t *testing.T, fn func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig), opts ...kfake.Opt) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var network kfake.VirtualNetwork
		opts := append([]kfake.Opt{
			kfake.NumBrokers(3), kfake.Ports(9092, 9093, 9094),
			kfake.SeedTopics(3, topic), kfake.ListenFn(network.Listen),
		}, opts...)
		c, err := kfake.NewCluster(opts...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		fn(t, c, KafkaConfig{Brokers: c.ListenAddrs(), Topic: topic, Dial: network.DialContext})
	})
}

func readTopic(t *testing.T, cfg KafkaConfig) []Record {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), brokerPatience)
	defer cancel()
	var out []Record
	for r, err := range ReadTopic(ctx, cfg, false) {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, r)
	}
	return out
}

// wantGolden compares the first record of a topic, which is of window 0.
func wantGolden(t *testing.T, cfg KafkaConfig, topic, key, value string) {
	t.Helper()
	client, err := cfg.client(kgo.ConsumeTopics(topic))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	r := client.PollFetches(t.Context()).Records()[0]
	if got := string(r.Key); got != key {
		t.Errorf("key %q, want %q", got, key)
	}
	if want := window(1).Start; !r.Timestamp.Equal(want) {
		t.Errorf("timestamp %s, want the end of the window %s", r.Timestamp.UTC(), want)
	}
	if len(r.Headers) != 1 || r.Headers[0].Key != "verve-schema" || string(r.Headers[0].Value) != "1" {
		t.Errorf("headers %v", r.Headers)
	}
	if string(r.Value) != value {
		t.Errorf("value %s\nwant  %s", r.Value, value)
	}
}

func TestKafkaRecordIsGolden(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		s.publish(t, 0, 1)
		s.flush(t, time.Minute)
		wantGolden(t, cfg, topic, "verve/2026-11-01T00:00:00Z/host-1/1",
			`{"window_start":"2026-11-01T00:00:00Z","window_ms":60000,"unique":1000,"scope":"instance","group":"verve","instance":"host-1","seq":1,"complete":true,"exact":true,"sealed_at":"2026-11-01T00:01:00.012Z"}`)
	})
}

// Every error that a broker may answer with, once, thrice, and although the work was done:
// the records arrive, in order, once.
func TestKafkaEveryErrorIsOvercome(t *testing.T) {
	type fault struct {
		key  kmsg.Key
		errs []*kerr.Error
	}
	for _, f := range []fault{
		{kmsg.Produce, []*kerr.Error{
			kerr.NotLeaderForPartition, kerr.LeaderNotAvailable, kerr.NotEnoughReplicas, kerr.NotEnoughReplicasAfterAppend,
			kerr.RequestTimedOut, kerr.UnknownTopicOrPartition, kerr.KafkaStorageError, kerr.CorruptMessage, kerr.FencedLeaderEpoch,
			kerr.UnknownServerError, kerr.TopicAuthorizationFailed, kerr.ClusterAuthorizationFailed, kerr.PolicyViolation,
			kerr.InvalidTimestamp, kerr.InvalidRequiredAcks, kerr.UnsupportedForMessageFormat, kerr.InvalidTopicException,
			kerr.InvalidProducerEpoch, kerr.ProducerFenced, kerr.OutOfOrderSequenceNumber, kerr.UnknownProducerID,
			kerr.InvalidTxnState, kerr.InvalidProducerIDMapping, kerr.ConcurrentTransactions,
			kerr.TransactionalIDAuthorizationFailed, kerr.TransactionAbortable, kerr.ThrottlingQuotaExceeded,
		}},
		{kmsg.EndTxn, []*kerr.Error{
			kerr.ConcurrentTransactions, kerr.CoordinatorNotAvailable, kerr.CoordinatorLoadInProgress, kerr.NotCoordinator,
			kerr.UnknownServerError, kerr.RequestTimedOut, kerr.InvalidProducerEpoch, kerr.ProducerFenced, kerr.InvalidTxnState,
			kerr.InvalidProducerIDMapping, kerr.TransactionAbortable, kerr.TransactionCoordinatorFenced,
			kerr.TransactionalIDAuthorizationFailed,
		}},
		{kmsg.InitProducerID, []*kerr.Error{
			kerr.ConcurrentTransactions, kerr.CoordinatorNotAvailable, kerr.CoordinatorLoadInProgress, kerr.NotCoordinator,
			kerr.UnknownServerError, kerr.TransactionalIDAuthorizationFailed, kerr.ClusterAuthorizationFailed,
			kerr.InvalidTransactionTimeout, kerr.ProducerFenced, kerr.UnsupportedVersion,
		}},
		{kmsg.Metadata, []*kerr.Error{
			kerr.UnknownTopicOrPartition, kerr.LeaderNotAvailable, kerr.TopicAuthorizationFailed, kerr.UnknownServerError,
			kerr.InvalidTopicException,
		}},
		{kmsg.ListOffsets, []*kerr.Error{kerr.NotLeaderForPartition, kerr.UnknownServerError, kerr.TopicAuthorizationFailed, kerr.OffsetNotAvailable}},
		{kmsg.Fetch, []*kerr.Error{kerr.NotLeaderForPartition, kerr.UnknownServerError, kerr.TopicAuthorizationFailed, kerr.KafkaStorageError, kerr.OffsetOutOfRange}},
		{kmsg.FindCoordinator, []*kerr.Error{kerr.CoordinatorNotAvailable, kerr.UnknownServerError, kerr.TransactionalIDAuthorizationFailed}},
	} {
		for _, err := range f.errs {
			for _, times := range []int{1, 3} {
				t.Run(fmt.Sprintf("%s/%s/%d", f.key.Name(), err.Message, times), func(t *testing.T) {
					inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
						dir := t.TempDir()
						s := start(t, dir, Config{Kafka: cfg})
						s.publish(t, 0, 2)
						s.flush(t, time.Minute)
						s.stop()
						// As a kill would leave them: in the spool, the outcome open.
						sp := testSpool(t, dir)
						if err := sp.attach([]string{"kafka"}); err != nil {
							t.Fatal(err)
						}
						appendTo(t, sp, 2, 4)
						sp.Close()
						faults := c.Fault(kfake.Fault{Keys: []kmsg.Key{f.key}, Err: err, Count: times},
							kfake.Fault{Keys: []kmsg.Key{f.key}, Err: err, Count: times, TopLevel: true})
						s = start(t, dir, Config{Kafka: cfg})
						s.flush(t, 5*time.Minute)
						if faults.Hits() == 0 {
							t.Error("the fault was not met")
						}
						faults.Remove()
						s.publish(t, 4, 5)
						s.flush(t, 5*time.Minute)
						st := s.Stats()
						if st.DeadLetters != 0 || st.Conflicts != 0 || firstError(st) != "" {
							t.Errorf("stats %+v", st)
						}
						s.stop()
						wantWindows(t, readTopic(t, cfg), 5)
					})
				})
			}
		}
	}
}

// kgo 1.22.2 can take the first transaction of a client for empty, abort it and
// say nothing. Many first transactions, each of which must be a commit.
func TestKafkaFirstCommitOfASessionIsACommit(t *testing.T) {
	const sessions = 200
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		batch := entries(t, 0, sessions)
		for i := range batch {
			k := newKafkaSink(cfg, zerolog.Nop(), 0, noStep)
			deliver(t, k, batch[i:i+1])
			k.close()
		}
		wantWindows(t, readTopic(t, cfg), sessions)
	})
}

// cutter is a network that does the work and loses the answer: it passes a
// request of the given key on, waits for the broker's reply and closes the
// connection instead of handing it over.
type cutter struct {
	dial func(context.Context, string, string) (net.Conn, error)

	mu   sync.Mutex // guards left
	key  kmsg.Key
	left int
}

func (c *cutter) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := c.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &cutConn{Conn: conn, cutter: c}, nil
}

type cutConn struct {
	net.Conn
	*cutter
	mu  sync.Mutex // guards cut
	cut bool
}

func (c *cutConn) Write(b []byte) (int, error) {
	if len(b) > 6 && kmsg.Key(binary.BigEndian.Uint16(b[4:])) == c.key {
		c.cutter.mu.Lock()
		if c.left > 0 {
			c.left--
			c.mu.Lock()
			c.cut = true
			c.mu.Unlock()
		}
		c.cutter.mu.Unlock()
	}
	return c.Conn.Write(b)
}

func (c *cutConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cut && err == nil {
		c.Conn.Close()
		return 0, io.EOF
	}
	return n, err
}

func TestKafkaLostReplyMakesNoCopy(t *testing.T) {
	for _, key := range []kmsg.Key{kmsg.Produce, kmsg.EndTxn, kmsg.InitProducerID, kmsg.AddPartitionsToTxn} {
		for _, times := range []int{1, 4} {
			t.Run(fmt.Sprintf("%s/%d", key.Name(), times), func(t *testing.T) {
				inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
					cut := &cutter{dial: cfg.Dial, key: key, left: times}
					cutCfg := cfg
					cutCfg.Dial = cut.DialContext
					s := start(t, t.TempDir(), Config{Kafka: cutCfg})
					for i := range 6 {
						s.publish(t, i, i+1)
						s.flush(t, 5*time.Minute)
					}
					s.stop()
					wantWindows(t, readTopic(t, cfg), 6)
				})
			})
		}
	}
}

func TestKafkaLeaderMoves(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		for i := range 20 {
			s.publish(t, i, i+1)
			if i%2 == 0 {
				c.ShufflePartitionLeaders()
			}
			if i%5 == 0 {
				c.RehashCoordinators()
			}
			if i%3 == 0 {
				s.flush(t, 5*time.Minute)
			}
		}
		s.flush(t, 5*time.Minute)
		s.stop()
		wantWindows(t, readTopic(t, cfg), 20)
	})
}

func TestKafkaTopicIsCreatedWhenTheBrokerAllows(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		cfg.Topic = "made.by.verve"
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		s.publish(t, 0, 3)
		s.flush(t, time.Minute)
		wantWindows(t, readTopic(t, cfg), 3)
	}, kfake.AllowAutoTopicCreation())
}

func TestKafkaMissingTopicIsWaitedFor(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		cfg.Topic = "made.by.hand"
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		s.publish(t, 0, 3)
		time.Sleep(10 * time.Minute)
		st := s.Stats()
		if st.Pending != 3 || !strings.Contains(firstError(st), "UNKNOWN_TOPIC_OR_PARTITION") || !strings.Contains(firstError(st), cfg.Topic) {
			t.Errorf("stats %+v", st)
		}
		if err := c.CreateTopic(cfg.Topic, 1, nil); err != nil {
			t.Fatal(err)
		}
		s.flush(t, 30*time.Second)
		wantWindows(t, readTopic(t, cfg), 3)
	})
}

func TestKafkaBrokerAwayForHours(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		var mu sync.Mutex
		away := true
		dial := cfg.Dial
		cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			mu.Lock()
			defer mu.Unlock()
			if away {
				return nil, errors.New("connection refused")
			}
			return dial(ctx, network, address)
		}
		var log testproc.Buffer
		dir := t.TempDir()
		s := start(t, dir, Config{Kafka: cfg, Log: zerolog.New(&log).Level(zerolog.WarnLevel)})
		s.spool.store.(*boltStore).db.NoSync, s.spool.dir = true, "" // the hours are virtual, the syncs would not be
		const windows = 2 * 60
		for i := range windows {
			s.publish(t, i, i+1)
			time.Sleep(time.Minute)
		}
		st := s.Stats()
		if st.Pending != windows || !strings.Contains(firstError(st), "connection refused") || st.Sinks[0].Failing == "" {
			t.Errorf("stats %+v", st)
		}
		if n := strings.Count(log.String(), "\n"); n > windows*2+10 || !strings.Contains(log.String(), `"hidden":`) {
			t.Errorf("%d log lines in %d minutes", n, windows)
		}
		mu.Lock()
		away = false
		mu.Unlock()
		s.flush(t, 30*time.Second)
		s.stop()
		wantWindows(t, readTopic(t, cfg), windows)
	})
}

func TestKafkaStopWithoutABrokerKeepsTheRecords(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		dead := cfg
		dead.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
			<-ctx.Done() // a host that drops packets
			return nil, ctx.Err()
		}
		dir := t.TempDir()
		s := start(t, dir, Config{Kafka: dead})
		s.publish(t, 0, 7)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := s.Flush(ctx); err == nil || !strings.Contains(err.Error(), "7 records") {
			t.Errorf("flush: %v", err)
		}
		before := time.Now()
		s.stop()
		if d := time.Since(before); d > 5*time.Second {
			t.Errorf("the stop took %s", d)
		}
		s = start(t, dir, Config{Kafka: cfg})
		s.flush(t, time.Minute)
		wantWindows(t, readTopic(t, cfg), 7)
	})
}

func TestKafkaZombieIsFenced(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		// The first process is frozen between produce and commit.
		frozen, thaw := make(chan struct{}), make(chan struct{})
		old := newKafkaSink(cfg, zerolog.Nop(), 0, func(step string) {
			if step == stepProduced {
				close(frozen)
				<-thaw
			}
		})
		batch := entries(t, 0, 2)
		outcome := make(chan error)
		go func() {
			_, err := old.deliver(context.Background(), batch)
			outcome <- err
		}()
		<-frozen
		// Its successor finds the same records in the spool.
		heir := newKafkaSink(cfg, zerolog.Nop(), 2, noStep)
		deliver(t, heir, batch)
		close(thaw)
		if err := <-outcome; err == nil {
			t.Error("the zombie's commit went through")
		}
		// Had the zombie lived on, it would have looked.
		old.step = noStep
		deliver(t, old, batch)
		old.close()
		heir.close()
		wantWindows(t, readTopic(t, cfg), 2)
	})
}

func TestKafkaGroupRecordIsVisibleOnceWhoeverPublishes(t *testing.T) {
	const instances, windows, keys = 5, 6, 3
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		var streams []*Stream
		for i := range instances {
			sp, err := OpenSpool(SpoolConfig{Group: "verve", Instance: fmt.Sprint("host-", i)})
			if err != nil {
				t.Fatal(err)
			}
			s, err := New(Config{Scope: ScopeGroup, Kafka: cfg}, sp)
			if err != nil {
				t.Fatal(err)
			}
			streams = append(streams, s)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for _, s := range streams {
			wg.Go(func() { s.Run(ctx) })
		}
		for w := range windows {
			var all sync.WaitGroup
			for i, s := range streams {
				all.Go(func() {
					count := withKeys(window(w), keys)
					count.SealedAt = count.SealedAt.Add(time.Duration(i) * time.Millisecond)
					if err := s.Publish(ctx, count); err != nil {
						t.Error(err)
					}
				})
			}
			all.Wait() // all at the same moment
			for _, s := range streams {
				fctx, fcancel := context.WithTimeout(ctx, 5*time.Minute)
				if err := s.Flush(fctx); err != nil {
					t.Errorf("%v, stats %+v", err, s.Stats())
				}
				fcancel()
			}
		}
		cancel()
		wg.Wait()
		for _, s := range streams {
			if st := s.Stats(); st.Conflicts != 0 || st.Published != windows {
				t.Errorf("stats %+v", st)
			}
			s.Close()
		}
		got := readTopic(t, cfg)
		if len(got) != windows {
			t.Fatalf("%d records, want %d: %v", len(got), windows, got)
		}
		for i, r := range got {
			if r.Key() != "verve/"+window(i).Start.Format(time.RFC3339) || r.Unique != window(i).Unique || r.Instance != "" || r.Seq != 0 {
				t.Errorf("record %d: %+v", i, r)
			}
		}
		byKey := readKeys(t, ReadKeysTopic(t.Context(), cfg, false))
		if len(byKey) != windows*keys {
			t.Fatalf("%d records by key, want %d: %v", len(byKey), windows*keys, byKey)
		}
		for i, r := range byKey {
			if r.RecordKey() != got[i/keys].Key() || r.Seq != 0 {
				t.Errorf("record by key %d: %+v", i, r)
			}
		}
	}, kfake.AllowAutoTopicCreation())
}

// A transaction that another instance left open does not hold this one back.
func TestKafkaHangingTransactionOfAnotherInstance(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		hanging, err := cfg.client(kgo.TransactionalID("other"), kgo.TransactionTimeout(10*time.Minute),
			kgo.RecordPartitioner(kgo.ManualPartitioner()))
		if err != nil {
			t.Fatal(err)
		}
		defer hanging.Close()
		if err := hanging.BeginTransaction(); err != nil {
			t.Fatal(err)
		}
		partition := partitionFor("verve/host-1", 3)
		if err := hanging.ProduceSync(t.Context(), &kgo.Record{Topic: topic, Partition: partition, Value: []byte("x")}).FirstErr(); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		s := start(t, dir, Config{Kafka: cfg})
		s.publish(t, 0, 2)
		s.flush(t, time.Minute)
		s.stop()
		// As after a kill: in the topic, and still in the spool.
		k := newKafkaSink(cfg, zerolog.Nop(), 2, noStep)
		deliver(t, k, entries(t, 0, 2))
		k.close()
		if err := hanging.EndTransaction(t.Context(), kgo.TryAbort); err != nil {
			t.Fatal(err)
		}
		wantWindows(t, readTopic(t, cfg), 2)
	})
}

func TestKafkaPoisonIsSetAsideAndBlocksNothing(t *testing.T) {
	for _, e := range []*kerr.Error{kerr.MessageTooLarge, kerr.RecordListTooLarge, kerr.InvalidRecord} {
		t.Run(e.Message, func(t *testing.T) {
			inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
				victim := []byte("verve/" + window(2).Start.Format(time.RFC3339) + "/host-1/3")
				c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: e, Count: -1, When: func(r kmsg.Request) bool {
					return bytes.Contains(r.(*kmsg.ProduceRequest).Topics[0].Partitions[0].Records, victim)
				}})
				var log testproc.Buffer
				dir := t.TempDir()
				sp := testSpool(t, dir)
				appendWithSink(t, sp) // ten at once, so that the bad one is in a batch
				sp.Close()
				s := start(t, dir, Config{Kafka: cfg, Log: zerolog.New(&log)})
				s.flush(t, 5*time.Minute)
				if st := s.Stats(); st.DeadLetters != 1 || firstError(st) != "" {
					t.Errorf("stats %+v", st)
				}
				if !strings.Contains(log.String(), string(victim)) {
					t.Errorf("the log does not name %s: %s", victim, log.String())
				}
				s.stop()
				var totals Totals
				for _, r := range readTopic(t, cfg) {
					totals.Add(r)
				}
				if gaps := fmt.Sprint(totals.Gaps()); len(totals.Windows()) != 9 || len(totals.Repeats()) != 0 || !strings.Contains(gaps, "record 3 is missing") {
					t.Errorf("%d windows, repeats %v, gaps %v", len(totals.Windows()), totals.Repeats(), gaps)
				}
			})
		})
	}
}

// TestKafkaTopicOfSmallBatchesTakesManyRecordsAtOnce: after an outage a transaction, and a look,
// for each record would take longer than records of short windows take to come.
func TestKafkaTopicOfSmallBatchesTakesManyRecordsAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		cfg.Topic = "small"
		if err := c.CreateTopic(cfg.Topic, 1, map[string]string{"max.message.bytes": "20000"}); err != nil {
			t.Fatal(err)
		}
		const records = 2000
		k := newKafkaSink(cfg, zerolog.Nop(), records, noStep)
		batches := 0
		for left := entries(t, 0, records); len(left) > 0; batches++ {
			n, err := k.deliver(t.Context(), left[:min(len(left), batchSize)])
			if err != nil {
				t.Fatal(err)
			}
			left = left[n:]
		}
		k.close()
		if batches > records/20 { // a batch of 20 has 6 KB
			t.Errorf("%d batches for %d records", batches, records)
		}
		wantWindows(t, readTopic(t, cfg), records)
	})
}

// TestKafkaTopicThatTakesNoRecordIsAskedOnceForEach, behind the first.
func TestKafkaTopicThatTakesNoRecordIsAskedOnceForEach(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		const records = 300
		asked := c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.MessageTooLarge, Count: -1})
		k := newKafkaSink(cfg, zerolog.Nop(), records, noStep)
		aside := 0
		for left := entries(t, 0, records); len(left) > 0; aside++ {
			n, err := k.deliver(t.Context(), left[:min(len(left), batchSize)])
			if _, poison := errors.AsType[*poisonError](err); !poison || n != 0 {
				t.Fatalf("%d, %v", n, err)
			}
			left = left[1:]
		}
		k.close()
		if n := asked.Hits(); aside != records || n > records+10 {
			t.Errorf("%d set aside of %d, with %d requests", aside, records, n)
		}
	})
}

func TestKafkaWithoutTransactionsFallsBackWithOneLine(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		refuse := c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.InitProducerID}, Err: kerr.TransactionalIDAuthorizationFailed, Count: -1, TopLevel: true,
			When: func(r kmsg.Request) bool { return r.(*kmsg.InitProducerIDRequest).TransactionalID != nil }})
		var log testproc.Buffer
		dir := t.TempDir()
		cfgs := Config{Kafka: cfg, Log: zerolog.New(&log).Level(zerolog.WarnLevel)}
		s := start(t, dir, cfgs)
		for i := range 6 {
			if i == 3 { // a new session
				c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.UnknownServerError})
			}
			s.publish(t, i, i+1)
			s.flush(t, time.Minute)
		}
		if n := strings.Count(log.String(), "refuses transactions"); n != 1 {
			t.Errorf("%d lines about it: %s", n, log.String())
		}
		s.stop()
		// The look alone recognises what is there.
		k := newKafkaSink(cfg, zerolog.Nop(), 6, noStep)
		deliver(t, k, entries(t, 0, 6))
		k.close()
		refuse.Remove()
		s = start(t, dir, cfgs)
		s.publish(t, 6, 7)
		s.flush(t, time.Minute)
		s.stop()
		wantWindows(t, readTopic(t, cfg), 7)
	})
}

// TestKafkaTransactionsAreUsedAgain some minutes after the right to them is granted, although
// nothing fails meanwhile.
func TestKafkaTransactionsAreUsedAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		refuse := c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.InitProducerID}, Err: kerr.TransactionalIDAuthorizationFailed, Count: -1, TopLevel: true,
			When: func(r kmsg.Request) bool { return r.(*kmsg.InitProducerIDRequest).TransactionalID != nil }})
		var log testproc.Buffer
		s := start(t, t.TempDir(), Config{Kafka: cfg, Log: zerolog.New(&log)})
		for i := range 60 {
			if i == 30 {
				refuse.Remove()
			}
			s.publish(t, i, i+1)
			s.flush(t, time.Minute)
			time.Sleep(time.Minute)
		}
		s.stop()
		if got := log.String(); strings.Count(got, "refuses transactions") != 1 || strings.Count(got, "accepts transactions again") != 1 {
			t.Errorf("the log: %s", got)
		}
		wantWindows(t, readTopic(t, cfg), 60)
	})
}

func TestKafkaWrongPasswordIsPutRightWithoutARestart(t *testing.T) {
	for _, mechanism := range []string{"PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"} {
		t.Run(mechanism, func(t *testing.T) {
			inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
				path := filepath.Join(t.TempDir(), "password")
				write := func(s string) {
					if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				write("wrong\n")
				cfg.SASL, cfg.User, cfg.PasswordFile = strings.ToLower(mechanism), "verve", path
				s := start(t, t.TempDir(), Config{Kafka: cfg})
				s.publish(t, 0, 3)
				time.Sleep(5 * time.Minute)
				if st := s.Stats(); st.Pending != 3 || firstError(st) == "" {
					t.Errorf("stats %+v", st)
				}
				write("secret\n")
				s.flush(t, 30*time.Second)
				wantWindows(t, readTopic(t, cfg), 3)
			}, kfake.EnableSASL(), kfake.Superuser(mechanism, "verve", "secret"))
		})
	}
}

func TestKafkaRestartAfterANewName(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		dir := t.TempDir()
		sp := testSpool(t, dir)
		appendWithSink(t, sp)
		sp.Close()
		var log testproc.Buffer
		sp, err := OpenSpool(SpoolConfig{Dir: dir, Group: "verve", Instance: "host-2", Log: zerolog.New(&log)})
		if err != nil {
			t.Fatal(err)
		}
		defer sp.Close()
		if got := log.String(); !strings.Contains(got, `"before":"host-1","instance":"host-2","records":10`) {
			t.Errorf("the log: %s", got)
		}
		s, err := New(Config{Scope: ScopeInstance, Kafka: cfg}, sp)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Publish(t.Context(), window(10)); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.Run(ctx) }()
		running{Stream: s}.flush(t, time.Minute)
		cancel()
		<-done
		s.Close()
		var totals Totals
		for _, r := range readTopic(t, cfg) {
			totals.Add(r)
		}
		if len(totals.Windows()) != 11 || len(totals.Gaps()) != 0 || len(totals.Repeats()) != 0 {
			t.Errorf("%d windows, gaps %v, repeats %v", len(totals.Windows()), totals.Gaps(), totals.Repeats())
		}
	})
}

func TestKafkaNamesakeIsReported(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		first := newKafkaSink(cfg, zerolog.Nop(), 0, noStep)
		deliver(t, first, entries(t, 0, 1))
		first.close()
		other := entries(t, 0, 1)
		other[0].record.Unique = 5
		other[0].value, _ = other[0].record.appendJSON(nil)
		second := newKafkaSink(cfg, zerolog.Nop(), 1, noStep)
		deliver(t, second, other)
		second.close()
		if second.conflicts.Load() != 1 {
			t.Errorf("%d conflicts, want 1", second.conflicts.Load())
		}
		var totals Totals
		for _, r := range readTopic(t, cfg) {
			totals.Add(r)
		}
		w, _ := totals.Window("verve", window(0).Span())
		if r := totals.Repeats(); w.Unique != window(0).Unique+5 || len(r) != 1 || !strings.Contains(r[0], "both are counted") {
			t.Errorf("unique %d, repeats %v", w.Unique, r)
		}
	})
}
