package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// measurements are all samples by name and unit, in order of the runs.
type measurements struct {
	samples map[key][]float64
	machine map[string][]string // what the outputs say of it, in order
}

// key names what was measured: a benchmark's name without the number of
// cores, or FILE/SCENARIO/SERVER: http has all servers, close those that differ by
// little, in rounds of their own.
type key struct{ name, unit string }

func newMeasurements() *measurements {
	return &measurements{samples: map[key][]float64{}, machine: map[string][]string{}}
}

var (
	configLine = regexp.MustCompile(`^([a-z][a-z-]*): +(.*)$`)
	coresTail  = regexp.MustCompile(`-\d+$`)
)

func (m *measurements) read(file string) error {
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
func (m *measurements) readLine(line string) {
	if c := configLine.FindStringSubmatch(line); c != nil {
		if !slices.Contains(m.machine[c[1]], c[2]) {
			m.machine[c[1]] = append(m.machine[c[1]], c[2])
		}
		return
	}
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
		k := key{name, fields[i+1]}
		m.samples[k] = append(m.samples[k], v)
	}
}

// readHTTP takes the results of bench/http; of begins their names.
func (m *measurements) readHTTP(b []byte, of string) error {
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
			k := key{of + "/" + s.Scenario + "/" + s.Server, unit}
			m.samples[k] = append(m.samples[k], v)
		}
	}
	return nil
}

// median of what was measured, if it was.
func (m *measurements) median(name, unit string) (float64, bool) {
	return median(m.samples[key{name, unit}])
}

// ratio of a to b: of each run, then the median.
func (m *measurements) ratio(a, b, unit string) (float64, bool) {
	va, vb := m.samples[key{a, unit}], m.samples[key{b, unit}]
	ratios := make([]float64, min(len(va), len(vb)))
	for i := range ratios {
		ratios[i] = va[i] / vb[i]
	}
	return median(ratios)
}

// httpRatio is the ratio of a server's CPU to another's, by the rounds in which
// they were closest in time.
func (m *measurements) httpRatio(scenario, a, b string) (float64, bool) {
	if r, ok := m.ratio("close/"+scenario+"/"+a, "close/"+scenario+"/"+b, "cpu-us"); ok {
		return r, true
	}
	return m.ratio("http/"+scenario+"/"+a, "http/"+scenario+"/"+b, "cpu-us")
}

// values returns the different values that a part of the names of a benchmark
// has, such as the designs, those that are numbers in their order.
func (m *measurements) values(benchmark, part string) (values []string) {
	for k := range m.samples {
		if !strings.HasPrefix(k.name, benchmark+"/") {
			continue
		}
		for p := range strings.SplitSeq(k.name, "/") {
			if v, ok := strings.CutPrefix(p, part+"="); ok && !slices.Contains(values, v) {
				values = append(values, v)
			}
		}
	}
	slices.SortFunc(values, func(a, b string) int {
		na, _ := strconv.Atoi(a) // 0 for names, which are compared next
		nb, _ := strconv.Atoi(b)
		return cmp.Or(cmp.Compare(na, nb), cmp.Compare(a, b))
	})
	return values
}

func median(v []float64) (float64, bool) {
	if len(v) == 0 {
		return 0, false
	}
	v = slices.Clone(v)
	slices.Sort(v)
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2, true
}
