package stream

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// errUnsettled is the error for an open transaction that has a record which is looked for.
var errUnsettled = errors.New("a transaction that is still open holds the record")

// look returns the entries that are not in the topic, each key once. After the
// fence of a session the answer is final for its identity.
//
// It begins to read by time: a record's timestamp is the end of its window,
// so the first offset at or after the oldest open record's timestamp is not
// after that record, in whatever order the windows of several instances arrived.
// Topics that stamp records when they append them stamp later, give or take lookMargin.
// All partitions are read, as the number of them may have grown. They are read
// to their end, uncommitted, and look itself evaluates the commit and abort
// markers: a transaction that another instance left open would hold back a
// committed read until the broker times it out.
func (k *kafkaSink) look(ctx context.Context, batch []spooled) ([]spooled, error) {
	want := make(map[string]bool, len(batch))
	for i := range batch {
		want[batch[i].record.Key()] = true
	}
	var last lastError
	client, err := k.cfg.client(
		kgo.WithHooks(&last),
		kgo.KeepControlRecords(), // the markers
		kgo.FetchIsolationLevel(kgo.ReadUncommitted()),
	)
	if err != nil {
		return nil, err
	}
	defer k.closing.Go(client.Close)

	there := topicValues{want: want, visible: make(map[string][]string), open: make(map[transaction][]*kgo.Record)}
	for r, err := range readToEnd(ctx, client, k.cfg.Topic, lookFrom(batch)) {
		if err != nil {
			return nil, k.lacks("Read", k.cfg.Topic, last.explain(err))
		}
		there.take(r)
	}
	for _, data := range there.open {
		// After the fence no transaction of our id is open, so this is one that no
		// fence covers: we look without a session, or the broker now refuses
		// transactions. Its end will show whether the record is there.
		return nil, fmt.Errorf("%w: %s", errUnsettled, data[0].Key)
	}
	return k.missing(batch, there.visible), nil
}

// lookFrom returns a time that is before the timestamps which the records of the batch can have
// in the topic, or zero if no such time is known.
func lookFrom(batch []spooled) time.Time {
	now := time.Now()
	oldest := now
	for i := range batch {
		end := batch[i].record.end()
		if end.After(now) {
			return time.Time{} // it may be there with any time up to the present
		}
		if end.Before(oldest) {
			oldest = end
		}
	}
	return oldest.Add(-lookMargin)
}

// topicValues collects the committed values of some keys from a topic that is read with
// its control records.
type topicValues struct {
	want    map[string]bool
	visible map[string][]string // key -> values
	open    map[transaction][]*kgo.Record
}

// transaction identifies the open transaction of a producer on one partition. A transaction
// ends on each partition by itself, with a marker of its producer: one producer may have
// data on two partitions if their number has grown, and the marker on one means nothing
// for the data on the other.
type transaction struct {
	partition int32
	producer  int64
}

func (v *topicValues) take(r *kgo.Record) {
	of := transaction{r.Partition, r.ProducerID}
	switch {
	case r.Attrs.IsControl():
		// The key is a version and a type: 0 aborts, 1 commits.
		if len(r.Key) >= 4 && binary.BigEndian.Uint16(r.Key[2:]) == 1 {
			for _, data := range v.open[of] {
				v.show(data)
			}
		}
		delete(v.open, of)
	case !v.want[string(r.Key)]:
	case r.Attrs.IsTransactional():
		v.open[of] = append(v.open[of], r)
	default:
		v.show(r)
	}
}

func (v *topicValues) show(r *kgo.Record) {
	v.visible[string(r.Key)] = append(v.visible[string(r.Key)], string(r.Value))
}

// missing returns the entries of the batch whose key is not visible, each key once.
func (k *kafkaSink) missing(batch []spooled, visible map[string][]string) (missing []spooled) {
	taken := make(map[string]bool)
	for _, e := range batch {
		key := e.record.Key()
		values := visible[key]
		same := slices.Contains(values, string(e.value))
		if len(values) > 0 && !same {
			if e.record.Scope == ScopeInstance || !sameCount(values[0], &e.record) {
				k.conflicts.Add(1)
				k.log.Error().Str("key", key).RawJSON("record", e.value).Str("there", values[0]).
					Msg("the topic has this key with another value: two processes use the same name")
			}
			// A group has one record of a window, whichever instance sealed it. That of
			// an instance is of another process with its name, and ours still has to count.
			same = e.record.Scope == ScopeGroup
		}
		if !same && !taken[key] {
			taken[key] = true
			missing = append(missing, e)
		}
	}
	return missing
}

// sameCount reports whether a group's record has the same count; the time of the seal
// may differ.
func sameCount(value string, r *Record) bool {
	there, err := parseRecord([]byte(value))
	return err == nil && there.Unique == r.Unique
}

// readToEnd yields the records of all partitions from the first one that is not older than
// since up to the ends as they are now. An error is the last it yields.
func readToEnd(ctx context.Context, client *kgo.Client, topic string, since time.Time) iter.Seq2[*kgo.Record, error] {
	return func(yield func(*kgo.Record, error) bool) {
		left, err := assign(ctx, client, topic, since)
		for err == nil && len(left) > 0 {
			var fetches kgo.Fetches
			if fetches, err = poll(ctx, client); err != nil {
				break
			}
			for r := range fetches.RecordsAll() {
				end, ok := left[r.Partition]
				if ok && r.Offset >= end-1 {
					delete(left, r.Partition) // read to its end
				}
				if ok && r.Offset < end && !yield(r, nil) {
					return
				}
			}
		}
		if err != nil {
			yield(nil, err)
		}
	}
}

// assign makes the client consume the partitions that have records to read, and returns
// where they end.
func assign(ctx context.Context, client *kgo.Client, topic string, since time.Time) (map[int32]int64, error) {
	from, ends, err := bounds(ctx, client, topic, since)
	if len(ends) > 0 {
		client.AddConsumePartitions(map[string]map[int32]kgo.Offset{topic: from})
	}
	return ends, err
}

// bounds returns where the partitions that have records to read begin and end.
func bounds(ctx context.Context, client *kgo.Client, topic string, since time.Time) (from map[int32]kgo.Offset, ends map[int32]int64, err error) {
	adm := kadm.NewClient(client)
	ctx, cancel := context.WithTimeout(ctx, stepWait)
	defer cancel()
	listed, err := adm.ListEndOffsets(ctx, topic)
	if err = cmp.Or(err, listed.Error()); err != nil {
		return nil, nil, fmt.Errorf("list end offsets: %w", err)
	}
	var starts kadm.ListedOffsets
	if since.IsZero() {
		starts, err = adm.ListStartOffsets(ctx, topic)
	} else {
		starts, err = adm.ListOffsetsAfterMilli(ctx, since.UnixMilli(), topic)
	}
	if err = cmp.Or(err, starts.Error()); err != nil {
		return nil, nil, fmt.Errorf("list start offsets: %w", err)
	}
	ends, from = make(map[int32]int64), make(map[int32]kgo.Offset)
	listed.Each(func(end kadm.ListedOffset) {
		start, ok := starts.Lookup(topic, end.Partition)
		if ok && start.Offset >= 0 && start.Offset < end.Offset {
			ends[end.Partition] = end.Offset
			from[end.Partition] = kgo.NewOffset().At(start.Offset)
		}
	})
	return from, ends, nil
}

// poll fetches once. It waits for lookStall at most.
func poll(ctx context.Context, client *kgo.Client) (kgo.Fetches, error) {
	fetches, stalled := pollFor(ctx, client, lookStall)
	if stalled {
		return nil, fmt.Errorf("nothing came for %s, perhaps because a transaction is open: if its process was killed, the broker ends it after its timeout: %w", lookStall, fetches.Err0())
	}
	if err := fetches.Err0(); err != nil {
		return nil, fmt.Errorf("read: %w", err)
	}
	for _, e := range fetches.Errors() {
		return nil, fmt.Errorf("read partition %d: %w", e.Partition, e.Err)
	}
	return fetches, nil
}

// lastError is a hook that keeps the last error of a connection, and a logger that keeps
// why a broker did not take a batch, which the client sends again. The error of a step that
// ran into its deadline has neither.
type lastError struct{ err atomic.Pointer[error] }

var (
	_ kgo.HookBrokerConnect = (*lastError)(nil)
	_ kgo.Logger            = (*lastError)(nil)
)

// Level implements kgo.Logger.
func (*lastError) Level() kgo.LogLevel { return kgo.LogLevelDebug }

// Log implements kgo.Logger. kgo has no other way to show why it tries again.
func (l *lastError) Log(_ kgo.LogLevel, msg string, keyvals ...any) {
	if msg != "produced" {
		return
	}
	for _, v := range keyvals {
		text, _ := v.(string)
		_, why, retried := strings.Cut(text, "{retrying@")
		_, why, found := strings.Cut(why, "(")
		if why, _, ended := strings.Cut(why, ")}"); retried && found && ended {
			err := errors.New(why)
			l.err.Store(&err)
		}
	}
}

func (l *lastError) OnBrokerConnect(_ kgo.BrokerMetadata, _ time.Duration, _ net.Conn, err error) {
	if err != nil {
		l.err.Store(&err)
	}
}

func (l *lastError) explain(err error) error {
	if last := l.err.Load(); last != nil && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, errNoAcknowledgement)) {
		return fmt.Errorf("%w (last: %w)", err, *last)
	}
	return err
}
