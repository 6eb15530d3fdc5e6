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
	again   int // records of a group that stand in two files, the same: they count once
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
	if len(f.KafkaBrokers) > 0 {
		return f.readKafka
	}
	files := f.CountsFile
	if len(files) == 0 {
		files = []string{defaultCountsFile}
	}
	return func(ctx context.Context) (p published, invalid []string, err error) {
		var missing error
		for _, path := range files {
			err = collect(&p.windows, path, stream.ReadFile(ctx, path, false), &invalid)
			if err == nil && f.Keys > 0 {
				err = collect(&p.keys, path, stream.ReadKeysFile(ctx, path, false), &invalid)
			}
			if errors.Is(err, fs.ErrNotExist) {
				missing, err = err, nil // an instance that has published nothing yet
			}
			if err != nil {
				return p, invalid, err
			}
		}
		if len(files) > 1 {
			p.dedupe()
		}
		if len(p.windows) == 0 {
			err = missing
		}
		return p, invalid, err
	}
}

func (f *flags) readKafka(ctx context.Context) (p published, invalid []string, err error) {
	cfg := stream.KafkaConfig{Brokers: f.KafkaBrokers, Topic: f.KafkaTopic, KeysTopic: f.KeysTopic}
	err = collect(&p.windows, "kafka", stream.ReadTopic(ctx, cfg, false), &invalid)
	if err == nil && f.Keys > 0 {
		err = collect(&p.keys, "kafka", stream.ReadKeysTopic(ctx, cfg, false), &invalid)
	}
	return p, invalid, err
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

// collect adds the records that a reader yields.
func collect[R any](to *[]R, what string, seq iter.Seq2[R, error], invalid *[]string) error {
	for r, err := range seq {
		switch {
		case err == nil:
			*to = append(*to, r)
		case stream.IsInvalidRecord(err):
			*invalid = append(*invalid, err.Error())
		default:
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	return nil
}
