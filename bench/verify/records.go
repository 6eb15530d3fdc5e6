package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"slices"

	"verve/stream"
)

// published is every record there is: of windows, and of their keys.
type published struct {
	windows []stream.Record
	keys    []stream.KeyRecord
	invalid []string // lines that are not records
	again   int      // records of a group that stand in two files, the same: they count once
}

// defaultCountsFile is where a server without brokers writes, if it was started
// in the same folder.
const defaultCountsFile = "verve-data/counts.jsonl"

// readRecords reads every record there is, from the first one.
//
// Only the reading is shared with the server. Sums, repeats and gaps are judged
// here, not by stream.Totals: a checker that adds up with the code under test
// proves less.
func (f *flags) readRecords(ctx context.Context) (p published, err error) {
	if len(f.KafkaBrokers) > 0 {
		cfg := stream.KafkaConfig{Brokers: f.KafkaBrokers, Topic: f.KafkaTopic, KeysTopic: f.KeysTopic}
		err = f.collectFrom(&p, "kafka", stream.ReadTopic(ctx, cfg, false), stream.ReadKeysTopic(ctx, cfg, false))
		return p, err
	}
	files := f.CountsFile
	if len(files) == 0 {
		files = []string{defaultCountsFile}
	}
	var missing error
	for _, path := range files {
		err = f.collectFrom(&p, path, stream.ReadFile(ctx, path, false), stream.ReadKeysFile(ctx, path, false))
		if errors.Is(err, fs.ErrNotExist) {
			missing = err // an instance that has published nothing yet
		} else if err != nil {
			return p, err
		}
	}
	if len(files) > 1 {
		p.dedupe()
	}
	if len(p.windows) == 0 {
		return p, missing
	}
	return p, nil
}

// collectFrom adds the records of windows, and those of their keys if there are keys.
func (f *flags) collectFrom(p *published, from string, windows iter.Seq2[stream.Record, error], keys iter.Seq2[stream.KeyRecord, error]) (err error) {
	if p.windows, err = collect(p, p.windows, windows); err == nil && f.Keys > 0 {
		p.keys, err = collect(p, p.keys, keys)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	return nil
}

func collect[R any](p *published, to []R, seq iter.Seq2[R, error]) ([]R, error) {
	for r, err := range seq {
		switch {
		case err == nil:
			to = append(to, r)
		case errors.Is(err, stream.ErrInvalidRecord):
			p.invalid = append(p.invalid, err.Error())
		default:
			return to, err
		}
	}
	return to, nil
}

// dedupe leaves out a record of a group that another instance has written as well, because it
// could not know: DESIGN.md, "The group".
func (p *published) dedupe() {
	seen := map[stream.Record]bool{}
	p.windows = slices.DeleteFunc(p.windows, func(r stream.Record) bool {
		again := seen[r] && r.Scope == stream.ScopeGroup
		if seen[r] = true; again {
			p.again++
		}
		return again
	})
}
