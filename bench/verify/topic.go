package main

import (
	"context"
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
	admin := kadm.NewClient(client)
	starts, err := admin.ListStartOffsets(ctx, f.KeysTopic)
	if err == nil {
		err = starts.Error()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", f.KeysTopic, err)
	}
	ends, err := admin.ListCommittedOffsets(ctx, f.KeysTopic)
	if err == nil {
		err = ends.Error()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", f.KeysTopic, err)
	}
	left := map[int32]int64{}
	ends.Each(func(o kadm.ListedOffset) {
		if start, _ := starts.Lookup(o.Topic, o.Partition); o.Offset > start.Offset {
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
			records.take(fmt.Sprintf("%s partition %d offset %d", r.Topic, r.Partition, r.Offset), r.Value, invalid)
		})
	}
	return nil
}
