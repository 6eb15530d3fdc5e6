package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"

	"verve/stream"
)

// published is every record there is: of windows, and of their keys.
type published struct {
	windows []stream.Record
	keys    []keyRecord
}

// source reads every record there is, from the first one, each time it is called. Lines
// that are not records it returns as text.
//
// Only the reading is shared with the server. Sums, repeats and gaps are judged
// here, not by stream.Totals: a checker that adds up with the code under test
// proves less.
type source func(ctx context.Context) (records published, invalid []string, err error)

// defaultCountsFile is where a server without brokers writes, if it was started
// in the same folder.
const defaultCountsFile = "verve-data/counts.jsonl"

func newSource(f *flags) source {
	files := f.CountsFile
	if len(files) == 0 && len(f.KafkaBrokers) == 0 {
		files = []string{defaultCountsFile}
	}
	return func(ctx context.Context) (records published, invalid []string, err error) {
		collect := func(what string, seq iter.Seq2[stream.Record, error]) error {
			for r, err := range seq {
				switch {
				case err == nil:
					records.windows = append(records.windows, r)
				case stream.IsInvalidRecord(err):
					invalid = append(invalid, err.Error())
				default:
					return fmt.Errorf("%s: %w", what, err)
				}
			}
			return nil
		}
		if len(f.KafkaBrokers) > 0 {
			cfg := stream.KafkaConfig{Brokers: f.KafkaBrokers, Topic: f.KafkaTopic}
			err = collect("kafka", stream.ReadTopic(ctx, cfg, false))
			if err == nil && f.Keys > 0 {
				err = readKeysTopic(ctx, f, &records, &invalid)
			}
			return records, invalid, err
		}
		var missing error
		for _, path := range files {
			err = collect(path, stream.ReadFile(ctx, path, false))
			if err == nil && f.Keys > 0 {
				var wrong []string
				var more []keyRecord
				more, wrong, err = readKeysFile(ctx, keysFile(path))
				records.keys, invalid = append(records.keys, more...), append(invalid, wrong...)
			}
			if err != nil && len(files) > 1 && errors.Is(err, fs.ErrNotExist) {
				missing, err = err, nil // an instance that has published nothing yet
			}
			if err != nil {
				break
			}
		}
		if err == nil && len(records.windows) == 0 {
			err = missing
		}
		return records, invalid, err
	}
}
