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
	"cmp"
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
	"sync"
	"syscall"

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
	Redis    float64 `json:"redis_cpu_us,omitempty"` // of CPU
	PerSec   float64 `json:"requests_per_second"`
	P99      float64 `json:"p99_ms"`
	P999     float64 `json:"p999_ms,omitempty"` // in the scenario turn
}

func (r *run) run(ctx context.Context, out io.Writer) error {
	if r.Rounds < 1 || r.Seconds < 1 || r.Conns < 1 || r.WarmUp < 1 {
		return errors.New("--rounds, --seconds, --warm-up and --conns must be above 0")
	}
	var err error
	if r.root, err = repository(); err != nil {
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
		samples, err := drive(ctx, out)
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
	for _, name := range r.Servers {
		if _, err := r.start(name, scenario+"-"+name, r.Flags); err != nil {
			return nil, err
		}
	}
	w := wrk{script: r.script(scenario), conns: r.Conns}
	title := fmt.Sprintf("%s: CPU of the server for a request, us", scenario)
	t, err := r.rounds(ctx, out, scenario, title, r.Servers, r.WarmUp, func(name string, seconds int) (sample, error) {
		i := slices.Index(r.Servers, name)
		s, err := measure(ctx, w, seconds, r.servers[i:i+1])
		failing := 0.0
		if scenario == "duplicates" && name != "bare" {
			failing = 0.9
		}
		return s, cmp.Or(err, s.plausible(failing))
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

// measure drives some servers, each with a part of the connections. A sample's CPU is that
// of the servers and of their Redis, if there is one, together.
func measure(ctx context.Context, w wrk, seconds int, servers []*process, redis ...*process) (s sample, err error) {
	servers = servers[:min(w.conns, len(servers))]
	w.conns /= len(servers)
	before, err := cpuTimes(servers)
	beforeRedis, rerr := cpuTimes(redis)
	if err = errors.Join(err, rerr); err != nil {
		return s, err
	}
	var mu sync.Mutex // of s and err
	var driving sync.WaitGroup
	for _, p := range servers {
		driving.Go(func() {
			one, failed := w.drive(ctx, p.addr, seconds)
			mu.Lock()
			defer mu.Unlock()
			err = errors.Join(err, failed)
			s.Requests, s.Failed, s.PerSec, s.P99 = s.Requests+one.Requests, s.Failed+one.Failed, s.PerSec+one.PerSec, max(s.P99, one.P99)
		})
	}
	driving.Wait()
	after, aerr := cpuTimes(servers)
	afterRedis, rerr := cpuTimes(redis)
	s.Redis = float64((afterRedis - beforeRedis).Microseconds()) / float64(s.Requests)
	s.CPU = float64((after-before).Microseconds())/float64(s.Requests) + s.Redis
	return s, errors.Join(err, aerr, rerr)
}

// script is the path of a script of wrk.
func (r *run) script(name string) string { return filepath.Join(r.root, "bench", "wrk", name+".lua") }

// plausible returns an error if another share of the answers has failed than is wanted.
func (s *sample) plausible(want float64) error {
	failed := float64(s.Failed) / float64(s.Requests)
	// At a minute's turn repeats are new again, and wrk ends between the
	// sending of a request and its answer.
	if failed < want-0.05 || failed > want+0.01 {
		return fmt.Errorf("%.1f %% of the answers failed, want %.0f %%", 100*failed, 100*want)
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
