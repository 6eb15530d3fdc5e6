package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// readKeysTopic reads the topic of the records of the keys from its start to where it
// ended at the call.
func readKeysTopic(ctx context.Context, f *flags, records *published, invalid *[]string) error {
	client, err := kgo.NewClient(kgo.SeedBrokers(f.KafkaBrokers...), kgo.FetchIsolationLevel(kgo.ReadCommitted()),
		kgo.ConsumeTopics(f.KeysTopic), kgo.KeepControlRecords())
	if err != nil {
		return err
	}
	defer client.Close()
	ends, err := kadm.NewClient(client).ListCommittedOffsets(ctx, f.KeysTopic)
	if err == nil {
		err = ends.Error()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", f.KeysTopic, err)
	}
	left := map[int32]int64{}
	ends.Each(func(o kadm.ListedOffset) {
		if o.Offset > 0 {
			left[o.Partition] = o.Offset
		}
	})
	for len(left) > 0 {
		fetches := client.PollFetches(ctx)
		if err := fetches.Err(); err != nil {
			return fmt.Errorf("%s: %w", f.KeysTopic, err)
		}
		fetches.EachRecord(func(r *kgo.Record) {
			if end, open := left[r.Partition]; open && r.Offset >= end-1 {
				delete(left, r.Partition)
			}
			if r.Attrs.IsControl() {
				return
			}
			var rec keyRecord
			if err := json.Unmarshal(r.Value, &rec); err != nil || rec.Key == "" || rec.Unique == 0 {
				*invalid = append(*invalid, fmt.Sprintf("%s partition %d offset %d: %v: %.80q", r.Topic, r.Partition, r.Offset, err, r.Value))
				return
			}
			records.keys = append(records.keys, rec)
		})
	}
	return nil
}
