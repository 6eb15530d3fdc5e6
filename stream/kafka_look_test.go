package stream

import (
	"testing"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// X was aborted on partition 0, then Y committed on partition 1: X is missing.
// It must not be taken for being there.
func TestLookKeepsPartitionsApartAborted(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		e := entries(t, 0, 2)
		inTransactions(t, cfg,
			sent{&e[0], 0, kgo.TryAbort},
			sent{&e[1], 1, kgo.TryCommit})
		oneBatchAnAnswer(t, c, 0, 1, 1, 0)
		if missing := look(t, cfg, e); len(missing) != 1 || missing[0].record.Key() != e[0].record.Key() {
			t.Errorf("missing: %d entries, want the aborted one alone", len(missing))
		}
	}, kfake.NumBrokers(1), kfake.Ports(9092))
}

// An aborted copy of X on partition 0, then X committed on partition 1: nothing
// is missing: X must not be sent again.
func TestLookKeepsPartitionsApartCommitted(t *testing.T) {
	inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
		e := entries(t, 0, 1)
		inTransactions(t, cfg,
			sent{&e[0], 0, kgo.TryAbort},
			sent{&e[0], 1, kgo.TryCommit})
		oneBatchAnAnswer(t, c, 0, 1, 0, 1, 0, 1)
		if missing := look(t, cfg, e); len(missing) != 0 {
			t.Errorf("missing: %d entries, want none, it was committed", len(missing))
		}
	}, kfake.NumBrokers(1), kfake.Ports(9092))
}

// look returns the entries that are not in the topic.
func look(t *testing.T, cfg KafkaConfig, e []spooled) []spooled {
	t.Helper()
	k := newKafkaSink(cfg, zerolog.Nop(), uint64(len(e)), noStep)
	defer k.close()
	missing, err := k.look(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	return missing
}

type sent struct {
	entry     *spooled
	partition int32
	how       kgo.TransactionEndTry
}

// inTransactions sends each by itself, all with one transactional id and so one
// producer id.
func inTransactions(t *testing.T, cfg KafkaConfig, all ...sent) {
	t.Helper()
	cl, err := cfg.client(kgo.TransactionalID("verve/verve/host-1"), kgo.RecordPartitioner(kgo.ManualPartitioner()))
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	for _, s := range all {
		if err := cl.BeginTransaction(); err != nil {
			t.Fatal(err)
		}
		r := &s.entry.record
		data := &kgo.Record{Topic: topic, Partition: s.partition, Key: []byte(r.Key()), Value: s.entry.value, Timestamp: r.end()}
		if err := cl.ProduceSync(t.Context(), data).FirstErr(); err != nil {
			t.Fatal(err)
		}
		if err := cl.EndTransaction(t.Context(), s.how); err != nil {
			t.Fatal(err)
		}
	}
}

// oneBatchAnAnswer has fetches answered with one batch, of the partitions in this
// order, as answers that end at their size are.
func oneBatchAnAnswer(t *testing.T, c *kfake.Cluster, order ...int32) {
	n := 0
	c.ControlKey(int16(kmsg.Fetch), func(req kmsg.Request) (kmsg.Response, error, bool) {
		c.KeepControl()
		f := req.(*kmsg.FetchRequest)
		if f.Version < 4 || len(f.Topics) == 0 {
			return nil, nil, false
		}
		f.SessionID, f.SessionEpoch = 0, -1
		for i := range f.Topics {
			p := f.Topics[i].Partitions
			for j := range p {
				p[j].PartitionMaxBytes = 1
			}
			if len(p) > 1 {
				if p[0].Partition != order[min(n, len(order)-1)] {
					p[0], p[1] = p[1], p[0]
				}
				n++
			}
		}
		return nil, nil, false
	})
}
