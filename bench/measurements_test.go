package bench

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// measurements are all samples by name and unit, in order of the runs.
type measurements map[figure][]float64

// figure names what was measured: a benchmark's name without the number of
// cores, or FILE/SCENARIO/SERVER: http has all servers, close those that differ by
// little, in rounds of their own.
type figure struct{ name, unit string }

var coresTail = regexp.MustCompile(`-\d+$`)

// measure reads what was measured from files.
func measure(t *testing.T, files ...string) measurements {
	t.Helper()
	m := measurements{}
	for _, file := range files {
		if err := m.read(file); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
	}
	return m
}

func (m measurements) read(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if strings.HasSuffix(file, ".json") {
		return m.readHTTP(b, strings.TrimSuffix(filepath.Base(file), ".json"))
	}
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		m.readLine(lines.Text())
	}
	return lines.Err()
}

// readLine takes a line of the Go benchmark format.
func (m measurements) readLine(line string) {
	fields := strings.Fields(line)
	if len(fields) < 4 || !strings.HasPrefix(fields[0], "Benchmark") {
		return
	}
	name := coresTail.ReplaceAllString(strings.TrimPrefix(fields[0], "Benchmark"), "")
	for i := 2; i+1 < len(fields); i += 2 {
		v, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			return // a log line in between
		}
		k := figure{name, fields[i+1]}
		m[k] = append(m[k], v)
	}
}

// readHTTP takes the results of bench/http; of begins their names.
func (m measurements) readHTTP(b []byte, of string) error {
	var r struct {
		Samples []struct {
			Scenario string
			Server   string
			CPU      float64 `json:"cpu_us"`
			PerSec   float64 `json:"requests_per_second"`
			P99      float64 `json:"p99_ms"`
		}
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return err
	}
	for _, s := range r.Samples {
		for unit, v := range map[string]float64{"cpu-us": s.CPU, "requests/s": s.PerSec, "p99-ms": s.P99} {
			k := figure{of + "/" + s.Scenario + "/" + s.Server, unit}
			m[k] = append(m[k], v)
		}
	}
	return nil
}

// ratio of a to b: of each run, then the median.
func (m measurements) ratio(a, b, unit string) (float64, bool) {
	va, vb := m[figure{a, unit}], m[figure{b, unit}]
	ratios := make([]float64, min(len(va), len(vb)))
	for i := range ratios {
		ratios[i] = va[i] / vb[i]
	}
	return median(ratios)
}

// worst returns the figure of a bar in the case where it is worst.
func (m measurements) worst(b bar) (worst float64, known bool) {
	pattern := strings.ReplaceAll(regexp.QuoteMeta(b.pattern), `\*`, `.+`)
	fits := regexp.MustCompile(`^` + strings.Replace(pattern, "DESIGN", regexp.QuoteMeta(b.design), 1) + `$`)
	take := func(v float64, ok bool) {
		if ok && (!known || b.atLeast && v < worst || !b.atLeast && v > worst) {
			worst, known = v, true
		}
	}
	for k := range m {
		if k.unit != b.unit || !fits.MatchString(k.name) {
			continue
		}
		if len(b.against) == 0 {
			take(median(m[k]))
		}
		for _, other := range b.against {
			than := strings.Replace(k.name, b.design, other, 1)
			if of, isHTTP := strings.CutPrefix(than, "http/"); isHTTP && m[figure{"close/" + of, k.unit}] != nil {
				continue // these two have rounds of their own
			}
			take(m.ratio(than, k.name, b.unit))
		}
	}
	return worst, known
}

func median(v []float64) (float64, bool) {
	if len(v) == 0 {
		return 0, false
	}
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2, true
}
