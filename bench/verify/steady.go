package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/valyala/fasthttp"

	"verve/internal/retry"
)

// steady samples what a server takes while it is driven, and judges whether that
// stays level: a leak of a few bytes a window shows after many windows.
type steady struct {
	admin string // URL of the admin listener
	dir   string // the server's data directory; empty: not looked at

	samples map[string][]float64 // by what is sampled
	failed  error                // of the first sample that could not be taken
}

// steadySamples of a run are taken, however long it is.
const steadySamples = 120

// levels are the metrics that must stay level, with how much more the last
// quarter of a run may have than the second, beside a tenth: what the garbage
// collector, a connection more, or a segment more makes.
var levels = []struct {
	name, metric string
	slack        float64
}{
	{"heap", "go_memstats_alloc_bytes", 8 << 20},
	{"memory", "process_resident_memory_bytes", 32 << 20},
	{"ids", "verve_dedup_bytes", 1 << 20},
	{"goroutines", "go_goroutines", 16},
	{"descriptors", "process_open_fds", 8},
	{"disk", "", 9 << 20}, // of sizeOf
}

// run samples until ctx ends, or for about so long.
func (s *steady) run(ctx context.Context, about time.Duration) {
	s.samples = make(map[string][]float64)
	for retry.Sleep(ctx, max(about/steadySamples, 100*time.Millisecond)) == nil {
		if err := s.sample(); err != nil && ctx.Err() == nil && s.failed == nil {
			s.failed = err
		}
	}
}

// sampleLimit is how long the server may take to answer.
const sampleLimit = 10 * time.Second

func (s *steady) sample() error {
	url := strings.TrimSuffix(s.admin, "/") + "/metrics"
	status, body, err := fasthttp.GetTimeout(nil, url, sampleLimit)
	if err != nil || status != fasthttp.StatusOK {
		return fmt.Errorf("%s: status %d, %v", url, status, err)
	}
	values := map[string]float64{} // by metric
	for line := range strings.Lines(string(body)) {
		metric, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseFloat(value, 64); err == nil {
			values[metric] = n
		}
	}
	if s.dir != "" {
		if values[""], err = sizeOf(s.dir); err != nil {
			return err
		}
	}
	for _, l := range levels {
		if n, ok := values[l.metric]; ok { // else judge has too few of them
			s.samples[l.name] = append(s.samples[l.name], n)
		}
	}
	return nil
}

// sizeOf sums the files in dir but the records themselves, which only grow.
func sizeOf(dir string) (sum float64, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !strings.HasSuffix(path, ".jsonl") {
			var info fs.FileInfo
			if info, err = d.Info(); err == nil {
				sum += float64(info.Size())
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // files come and go
		}
		return err
	})
	return sum, err
}

// level is what of one thing the server took: the medians of the second and the
// last quarter of the run, and the most.
type level struct {
	Second float64 `json:"second_quarter"`
	Last   float64 `json:"last_quarter"`
	Most   float64 `json:"most"`
}

// judge adds what was found to v.
func (s *steady) judge(v *verdict) {
	if s.failed != nil {
		v.fault("sampling", "%v", s.failed)
	}
	v.Levels = make(map[string]level)
	for _, l := range levels {
		n := s.samples[l.name]
		if len(n) < 8 {
			if l.metric != "" || s.dir != "" {
				v.fault("sampling", "%d samples of %s are too few", len(n), l.name)
			}
			continue
		}
		found := level{quantile(n[len(n)/4:len(n)/2], .5), quantile(n[len(n)*3/4:], .5), slices.Max(n)}
		v.Levels[l.name] = found
		if found.Last > found.Second*1.1+l.slack {
			v.fault("grows", "%s: %.0f in the second quarter of the run, %.0f in the last", l.name, found.Second, found.Last)
		}
	}
}

// quantile returns the value that the given share of all is below; 0 of none.
func quantile(values []float64, share float64) float64 {
	if len(values) == 0 {
		return 0
	}
	values = slices.Sorted(slices.Values(values))
	return values[min(len(values)-1, int(share*float64(len(values))))]
}

// printLevels writes the levels for people.
func (v *verdict) printLevels(out io.Writer) {
	for _, l := range levels {
		if found, ok := v.Levels[l.name]; ok {
			fmt.Fprintf(out, "%s: %.0f in the second quarter, %.0f in the last, %.0f at most\n", l.name, found.Second, found.Last, found.Most)
		}
	}
}
