package bench

import (
	"math/bits"
	"testing"
	"time"
)

// histogram counts durations in buckets that grow with them, 32 to each
// doubling: a quantile is right within 3 %. record does not allocate.
type histogram struct {
	counts [60 * 32]uint64
	total  uint64
	max    time.Duration
}

func (h *histogram) record(d time.Duration) {
	n := uint64(max(d, 0))
	e := max(bits.Len64(n), 6) - 6 // the five bits after the first one are kept
	h.counts[e*32+int(n>>e)]++
	h.total++
	if d > h.max {
		h.max = d
	}
}

func (h *histogram) add(o *histogram) {
	for i, n := range o.counts {
		h.counts[i] += n
	}
	h.total += o.total
	h.max = max(h.max, o.max)
}

// quantile returns the upper edge of the bucket that holds the q-th part.
func (h *histogram) quantile(q float64) time.Duration {
	rank := uint64(q * float64(h.total))
	var seen uint64
	for i, n := range h.counts {
		if seen += n; seen > rank {
			if i < 64 {
				return time.Duration(i)
			}
			e := i/32 - 1
			return time.Duration((uint64(i-e*32)+1)<<e - 1)
		}
	}
	return h.max
}

func TestHistogramQuantilesAreWithinThreePercent(t *testing.T) {
	var h histogram
	for i := range 1_000_000 {
		h.record(time.Duration(i))
	}
	for _, q := range []float64{0.00001, 0.01, 0.5, 0.9, 0.99, 0.9999} {
		got, want := float64(h.quantile(q)), q*1_000_000
		if got < want || got > want*1.04 {
			t.Errorf("quantile %v of 0..999999: got %v, want %v", q, got, want)
		}
	}
	if h.max != 999_999 || h.total != 1_000_000 {
		t.Errorf("got max %d, total %d", h.max, h.total)
	}
}
