// Report makes the results page from what the benchmarks printed.
//
//	go run ./bench/report --readme=bench/README.md --plots=bench/results FILE...
//
// A FILE ending in .json is of bench/http, any other the output of go test
// -bench, of as many runs as there are. The tables replace what stands between
// the markers in the readme. Without --readme the bars are printed, and the
// exit status says whether all that were measured are met.
//
// Every ratio is taken within a run, between neighbours in time, and then the
// median over the runs; every other figure is the median over the runs.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/alecthomas/kong"
)

const (
	beginMarker = "<!-- report: begin -->"
	endMarker   = "<!-- report: end -->"
)

type flags struct {
	Readme string   `type:"existingfile" help:"Page whose part between the markers is replaced."`
	Plots  string   `type:"existingdir" help:"Directory for the plots."`
	Files  []string `arg:"" type:"existingfile" help:"Outputs of go test -bench and of bench/http."`
}

func main() {
	var f flags
	kong.Parse(&f, kong.Name("report"), kong.UsageOnError(), kong.Description("Makes the results page."))
	met, err := run(f)
	if err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(2)
	}
	if !met && f.Readme == "" {
		os.Exit(1)
	}
}

func run(f flags) (met bool, err error) {
	m := newMeasurements()
	for _, file := range f.Files {
		if err := m.read(file); err != nil {
			return false, fmt.Errorf("%s: %w", file, err)
		}
	}
	bars := judge(m)
	met = true
	for _, b := range bars {
		met = met && b.state() != missed
	}
	if f.Readme == "" {
		printBars(os.Stdout, bars)
		return met, nil
	}
	plots := map[string][]byte{}
	if f.Plots != "" {
		plots = drawAll(m)
		for name, svg := range plots {
			if err := os.WriteFile(filepath.Join(f.Plots, name), svg, 0o644); err != nil {
				return met, err
			}
		}
	}
	rel, err := filepath.Rel(filepath.Dir(f.Readme), f.Plots)
	if err != nil {
		return met, err
	}
	return met, replace(f.Readme, page(m, bars, plots, filepath.ToSlash(rel)))
}

// replace puts text between the markers of a file.
func replace(file, text string) error {
	old, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	head, rest, ok := bytes.Cut(old, []byte(beginMarker))
	_, tail, ok2 := bytes.Cut(rest, []byte(endMarker))
	if !ok || !ok2 {
		return errors.New(file + " has no place for the report: " + beginMarker + " and " + endMarker)
	}
	var b strings.Builder
	b.Write(head)
	b.WriteString(beginMarker + "\n\n" + text + "\n" + endMarker)
	b.Write(tail)
	return os.WriteFile(file, []byte(b.String()), 0o644)
}
