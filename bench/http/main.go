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
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
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
	var err error
	if strings.HasPrefix(k.Command(), "serve") {
		err = c.Serve.run()
	} else {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		err = c.Run.run(ctx, os.Stdout)
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "http:", err)
		os.Exit(1)
	}
}

// results is the JSON file: bars reads it.
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
	Redis    float64 `json:"redis_cpu_us,omitempty"` // of CPU, in the scenario group
	PerSec   float64 `json:"requests_per_second"`
	P99      float64 `json:"p99_ms"`
	P999     float64 `json:"p999_ms,omitempty"` // in the scenario turn
}

func (r *run) run(ctx context.Context, out io.Writer) error {
	if r.Rounds < 1 || r.Seconds < 1 || r.Conns < 1 || r.WarmUp < 1 {
		return errors.New("--rounds, --seconds, --warm-up and --conns must be above 0")
	}
	root, err := repository()
	if err != nil {
		return err
	}
	if _, err := exec.LookPath("wrk"); err != nil {
		return errors.New("wrk is not installed")
	}
	dir, err := os.MkdirTemp("", "verve-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if r.Binary == "" {
		r.Binary = filepath.Join(dir, "verve")
		build := exec.CommandContext(ctx, "go", "build", "-o", r.Binary, ".")
		build.Dir, build.Stdout, build.Stderr = root, os.Stderr, os.Stderr
		if err := build.Run(); err != nil {
			return fmt.Errorf("build: %w", err)
		}
	}

	if r.Expect > 0 {
		r.Flags = append(r.Flags, "--expect-ids="+strconv.Itoa(r.Expect))
	}
	res := results{Conns: r.Conns, Seconds: r.Seconds, Flags: r.Flags}
	for _, scenario := range r.Scenario {
		if drive, is := map[string]func(context.Context, io.Writer, string, string) ([]sample, error){
			"batch": r.batches, "options": r.options, "group": r.groups, "turn": r.turns,
		}[scenario]; is {
			samples, err := drive(ctx, out, root, dir)
			res.Samples = append(res.Samples, samples...)
			if err != nil {
				return err
			}
			continue
		}
		w := wrk{
			script: filepath.Join(root, "bench", "wrk", scenario+".lua"),
			conns:  r.Conns,
		}
		// New processes for each scenario: none starts with the heap of another.
		samples, err := r.compare(ctx, out, scenario, w, dir)
		res.Samples = append(res.Samples, samples...)
		if err != nil {
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
func (r *run) compare(ctx context.Context, out io.Writer, scenario string, w wrk, dir string) (samples []sample, err error) {
	var servers []*process
	defer func() {
		for _, p := range servers {
			err = errors.Join(err, p.end())
		}
	}()
	for _, name := range r.Servers {
		binary := r.Binary
		if name == "before" {
			binary = r.Before
		}
		p, err := start(name, binary, filepath.Join(dir, scenario+"-"+name), r.Flags)
		if err != nil {
			return nil, err
		}
		servers = append(servers, p)
	}
	t, err := r.rounds(out, fmt.Sprintf("%s: CPU of the server for a request, us", scenario), r.Servers, func(name string, round int) (s sample, err error) {
		p := servers[slices.Index(r.Servers, name)]
		if round == 0 {
			_, err = w.drive(ctx, p.addr, r.WarmUp)
			return s, err
		}
		if s, err = measure(ctx, w, r.Seconds, p); err == nil {
			err = plausible(scenario, s)
		}
		s.Scenario = scenario
		return s, err
	})
	if err != nil {
		return t.samples, err
	}
	t.row("requests/s", func(name string) string { return fmt.Sprintf("%.0f", median(column(t.samples, name, perSec))) })
	if slices.Contains(r.Servers, "verve") {
		t.row("server/verve", func(name string) string { return fmt.Sprintf("%.3f", median(ratios(t.samples, name, "verve"))) })
	}
	t.end()
	fmt.Fprintln(out)
	return t.samples, nil
}

// measure drives the first of some processes, and takes the CPU time of all.
func measure(ctx context.Context, w wrk, seconds int, on ...*process) (s sample, err error) {
	var before, after time.Duration
	sum := func() (all time.Duration, err error) {
		for _, p := range on {
			t, err := p.cpuTime()
			if err != nil {
				return 0, err
			}
			all += t
		}
		return all, nil
	}
	if before, err = sum(); err != nil {
		return s, err
	}
	if s, err = w.drive(ctx, on[0].addr, seconds); err != nil {
		return s, err
	}
	if after, err = sum(); err != nil {
		return s, err
	}
	s.Server = on[0].name
	s.CPU = float64((after - before).Microseconds()) / float64(s.Requests)
	return s, nil
}

// plausible refuses a sample whose answers are not those of the scenario.
func plausible(scenario string, s sample) error {
	failed := float64(s.Failed) / float64(s.Requests)
	want := 0.0
	if scenario == "duplicates" && s.Server != "bare" {
		want = 0.9
	}
	// At a minute's turn repeats are new again, and wrk ends between the
	// sending of a request and its answer.
	if failed < want-0.05 || failed > want+0.01 {
		return fmt.Errorf("%s, %s: %.1f %% of the answers failed, want %.0f %%", s.Server, scenario, 100*failed, 100*want)
	}
	return nil
}

// repository returns the root of the module.
func repository() (string, error) {
	mod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", err
	}
	dir := filepath.Dir(strings.TrimSpace(string(mod)))
	if _, err := os.Stat(filepath.Join(dir, "bench", "wrk")); err != nil {
		return "", errors.New("run it in the repository")
	}
	return dir, nil
}
