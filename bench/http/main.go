//go:build linux

// Http compares servers over HTTP by the CPU time that a request costs them.
//
//	go run ./bench/http
//
// It builds the server of this repository and starts it with its default
// settings and tables of the size that it would have learnt, and once more without
// a data directory. Beside it run a
// bare fasthttp handler that answers `ok` to everything, which is the limit,
// and the seed design on fasthttp and on net/http. wrk drives them one after
// another, round by round, so that a ratio is between neighbours in time; each
// server runs on one core and wrk on another. What a request costs is the
// server process's own CPU time, user and system.
//
// It runs on Linux, from anywhere in the repository, and needs wrk.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"github.com/alecthomas/kong"

	"verve/internal/testproc"
)

// run holds the settings of a comparison.
type run struct {
	Rounds   int      `default:"10" help:"Rounds; each drives every server once."`
	Seconds  int      `default:"5" help:"Seconds wrk drives a server in a round."`
	Scenario []string `default:"unique,duplicates,pipelined" enum:"unique,duplicates,pipelined,headers,batch,options,group,turn" help:"What is sent: ${enum}."`
	Servers  []string `default:"bare,verve,memory,seed,nethttp" enum:"bare,verve,before,memory,seed,nethttp" help:"What is driven: ${enum}. memory is Verve with --data-dir=none, before that of --before."`
	Conns    int      `default:"64" help:"Connections."`
	WarmUp   int      `default:"2" help:"Seconds wrk drives a server before it counts."`
	Expect   int      `name:"expect-ids" default:"12000000" help:"Ids a window that Verve makes room for, as it would have learnt from windows before: 12 million are the most that these scenarios send. 0: none, as in the first window after a start."`
	Flags    []string `name:"verve-flag" sep:"none" placeholder:"FLAG" help:"One more flag for Verve, such as --window-header. Repeatable."`
	Binary   string   `type:"existingfile" help:"Verve to measure, instead of building it."`
	Before   string   `type:"existingfile" help:"Another build of Verve, to compare with."`
	JSON     string   `name:"json" placeholder:"FILE" help:"Write the results there too."`

	root    string     `kong:"-"` // of the repository
	dir     string     `kong:"-"` // of this run
	servers []*process `kong:"-"` // those that run
}

// serve is a server to be driven, as a process of its own.
type serve struct {
	Design string `arg:"" enum:"bare,seed,nethttp,plain"`
	Listen string `arg:""`
	Redis  string `arg:"" optional:"" help:"Address, for plain."`
}

type cli struct {
	Run   run   `cmd:"" default:"withargs" help:"Compare (the default)."`
	Serve serve `cmd:"" hidden:""`
}

func main() {
	var c cli
	k := kong.Parse(&c, kong.Name("http"), kong.UsageOnError(),
		kong.Description("Compares servers over HTTP by the CPU time that a request costs them."))
	k.FatalIfErrorf(k.Run())
}

// results is the JSON file: TestBars of bench reads it.
type results struct {
	Conns   int      `json:"conns"`
	Seconds int      `json:"seconds"`
	Flags   []string `json:"verve_flags"`
	Samples []sample `json:"samples"`
}

// sample is one server driven in one round.
type sample struct {
	Scenario string  `json:"scenario"`
	Round    int     `json:"round"`
	Server   string  `json:"server"`
	Requests uint64  `json:"requests"`
	Failed   uint64  `json:"failed"`                 // answered with a status above 399
	CPU      float64 `json:"cpu_us"`                 // a request; an id of the scenarios batch and options
	Redis    float64 `json:"redis_cpu_us,omitempty"` // of CPU
	PerSec   float64 `json:"requests_per_second"`
	P99      float64 `json:"p99_ms"`
	P999     float64 `json:"p999_ms,omitempty"` // in the scenario turn
}

// Run makes the comparison.
func (r *run) Run() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if r.Rounds < 1 || r.Seconds < 1 || r.Conns < 1 || r.WarmUp < 1 {
		return errors.New("--rounds, --seconds, --warm-up and --conns must be above 0")
	}
	var err error
	if r.root, err = testproc.ModuleRoot(); err != nil {
		return err
	}
	if _, err := exec.LookPath("wrk"); err != nil {
		return errors.New("wrk is not installed")
	}
	if r.dir, err = os.MkdirTemp("", "verve-bench"); err != nil {
		return err
	}
	defer os.RemoveAll(r.dir)
	if r.Binary == "" {
		r.Binary = filepath.Join(r.dir, "verve")
		build := exec.CommandContext(ctx, "go", "build", "-o", r.Binary, ".")
		build.Dir, build.Stdout, build.Stderr = r.root, os.Stderr, os.Stderr
		if err := build.Run(); err != nil {
			return fmt.Errorf("build: %w", err)
		}
	}

	if r.Expect > 0 {
		r.Flags = append(r.Flags, "--expect-ids="+strconv.Itoa(r.Expect))
	}
	res := results{Conns: r.Conns, Seconds: r.Seconds, Flags: r.Flags}
	for _, scenario := range r.Scenario {
		drive := map[string]func(context.Context, io.Writer) ([]sample, error){
			"batch": r.batches, "options": r.options, "group": r.groups, "turn": r.turns,
		}[scenario]
		if drive == nil {
			drive = func(ctx context.Context, out io.Writer) ([]sample, error) { return r.compare(ctx, out, scenario) }
		}
		samples, err := drive(ctx, os.Stdout)
		res.Samples = append(res.Samples, samples...)
		// New processes for each scenario: none starts with the heap of another.
		if err = errors.Join(err, r.endAll()); err != nil {
			return err
		}
	}
	if r.JSON == "" {
		return nil
	}
	b, err := json.MarshalIndent(res, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(r.JSON, append(b, '\n'), 0o644)
}

// compare drives the servers with one scenario.
func (r *run) compare(ctx context.Context, out io.Writer, scenario string) ([]sample, error) {
	var loads []load
	for _, name := range r.Servers {
		p, err := r.start(name, scenario+"-"+name, r.Flags)
		if err != nil {
			return nil, err
		}
		l := load{name: name, script: scenario, conns: r.Conns, servers: []*process{p}}
		if scenario == "duplicates" && name != "bare" {
			l.failing = 0.9
		}
		loads = append(loads, l)
	}
	title := scenario + ": CPU of the server for a request, us"
	t, err := r.rounds(ctx, out, scenario, title, r.WarmUp, loads)
	if err != nil {
		return t.samples, err
	}
	t.row("requests/s", func(name string) string { return fmt.Sprintf("%.0f", median(column(t.samples, name, perSec))) })
	if slices.Contains(r.Servers, "verve") {
		t.row("server/verve", func(name string) string { return fmt.Sprintf("%.3f", median(ratios(t.samples, name, "verve"))) })
	}
	t.end()
	return t.samples, nil
}
