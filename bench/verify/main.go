// Verify drives a running verve over HTTP and checks, window by window, whether
// its records add up to its answers.
//
//	verve --window=1s --window-header
//	go run ./bench/verify --duration=60s
//
// It takes the answers of the server for the truth: each names the window
// in which its id was judged (--window-header), so the sum of the records of a
// window must be the number of ids answered `ok` in it, no more and no less.
// Only requests that were never answered, because a connection broke, leave
// room: those may have counted. Nobody else may call the server during a run.
//
// With --spawn it runs the server itself, and ends it with SIGTERM or SIGKILL
// at random moments under full load.
//
// Exit status: 0 if everything adds up, 1 if not, 2 if it could not be tried.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
)

type flags struct {
	URL         []string      `name:"url" default:"http://127.0.0.1:8080" help:"Server, or several instances that count as one."`
	Duration    time.Duration `default:"60s" help:"How long to drive."`
	Requests    uint64        `help:"Stop after so many ids (0: by time alone)."`
	Connections int           `default:"64" help:"Keep-alive connections."`
	Pipeline    int           `default:"1" help:"Requests in flight on each connection."`
	Batch       int           `help:"Ids in a request, as a batch (0: one, in the query)."`
	Rate        float64       `help:"Ids a second in all (0: as fast as it goes)."`
	Repeats     float64       `default:"0.1" help:"Share of requests that ask for a recent id once more."`
	Lose        float64       `help:"Share of the replies that the client does not read, or throws away: it asks again, at another instance if there are several."`
	Tokens      bool          `help:"Each attempt to count an id has a token, and its retries the same one: every attempt must get its own answer."`
	Keys        int           `help:"Ids are spread over so many keys, a few of them hot (0: no keys): each key's record must add up."`
	Window      time.Duration `default:"1m" help:"The server's --window. With --tokens a retry comes in the window of its first request or the next."`
	IDs         idForm        `name:"ids" default:"decimal" enum:"decimal,uuid,string" help:"Form of the ids: ${enum}."`
	Seed        uint64        `help:"Of the ids and the repeats (0: drawn)."`
	Timeout     time.Duration `default:"5s" help:"For one answer; then the request is in doubt."`
	MinAnswers  uint64        `default:"1" help:"Fewer answers than this are a failure. With --kills the run waits for them, up to --duration."`

	DuplicateStatus int  `default:"409" help:"Status of repeats, as set on the server."`
	SkipFirst       bool `help:"Do not judge the first window, in which others called the server too."`
	Strict          bool `help:"Requests that were never answered must not have counted."`
	AllowInexact    bool `help:"A window whose record has exact:false may not add up, or have an id ok twice."`

	CountsFile   []string      `type:"path" help:"Where the records are (default: verve-data/counts.jsonl unless there are brokers)."`
	KafkaBrokers []string      `help:"Read the records from Kafka."`
	KafkaTopic   string        `default:"verve.unique-ids" help:"The topic of the records."`
	KeysTopic    string        `name:"kafka-keys-topic" default:"verve.unique-ids-by-key" help:"The topic of the records of the keys."`
	Wait         time.Duration `default:"75s" help:"How long the last records may take to appear."`

	Spawn     []string      `sep:"none" placeholder:"COMMAND" help:"Run this server, and stop it at the end. Repeatable: instances of a group, in the order of --url."`
	SpawnLog  string        `type:"path" help:"File for the output of the server (default: standard error)."`
	KillEvery string        `placeholder:"MIN-MAX" help:"End the server after a random time between these, and start it again."`
	Signal    string        `enum:"TERM,KILL" default:"TERM" help:"How the server is ended: ${enum}."`
	Kills     int           `help:"End the run after so many kills of each server (0: by time alone)."`
	StopLimit time.Duration `default:"15s" help:"How long the server may take to exit after SIGTERM."`

	Admin   string `placeholder:"URL" help:"Admin listener of the server: memory, goroutines and descriptors are sampled, and must stay level."`
	DataDir string `type:"path" help:"The server's data directory: with --admin, its files must stay level too."`

	JSON    bool `name:"json" help:"Print the verdict as one JSON object."`
	Verbose bool `short:"v" help:"List all windows, not only the bad ones."`
}

func main() {
	var f flags
	parser := kong.Must(&f, kong.Name("verify"),
		kong.Description("Drives a running verve and reports whether its records add up to its answers."))
	if _, err := parser.Parse(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "verify:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second interrupt ends the judging too
	v, err := run(ctx, &f)
	if err != nil {
		fmt.Fprintln(os.Stderr, "verify:", err)
		os.Exit(2)
	}
	if f.JSON {
		if err := json.NewEncoder(os.Stdout).Encode(v); err != nil {
			fmt.Fprintln(os.Stderr, "verify:", err)
			os.Exit(2)
		}
	} else {
		v.print(os.Stdout)
	}
	if !v.Good {
		os.Exit(1)
	}
}

// run drives, stops what it started, and reads the records until they are
// final or the wait is over. An interrupt ends the driving, not the judging.
func run(ctx context.Context, f *flags) (*verdict, error) {
	d, err := newDriver(f)
	if err != nil {
		return nil, err
	}
	if len(f.CountsFile) > 0 && len(f.KafkaBrokers) > 0 {
		// Each is a complete account; together they would count double.
		return nil, errors.New("--counts-file and --kafka-brokers: give one of them")
	}
	drive, cancel := context.WithTimeout(ctx, f.Duration)
	defer cancel()
	spawned := make(chan error, 1)
	var spawners []*spawner
	if len(f.Spawn) > 0 {
		log, err := spawnLog(f.SpawnLog)
		if err != nil {
			return nil, err
		}
		defer log.Close()
		for i := range f.Spawn {
			s, err := newSpawner(f, i, d, log)
			if err != nil {
				return nil, err
			}
			spawners = append(spawners, s)
		}
		go func() {
			spawned <- runAll(drive, spawners)
			cancel() // the kills are used up, or there is no server to drive
		}()
	} else {
		spawned <- nil
	}
	var level *steady
	var sampling sync.WaitGroup
	if f.Admin != "" {
		level = &steady{admin: f.Admin, dir: f.DataDir}
		sampling.Go(func() { level.run(drive, f.Duration) })
	}
	began := time.Now()
	d.run(drive)
	cancel()
	sampling.Wait()
	seconds := time.Since(began).Seconds()
	err = <-spawned
	endAll(spawners)
	if err != nil {
		return nil, err
	}

	windows := d.truth.finish()
	// A load balancer before the servers takes connections on.
	over := func() bool { return len(spawners) > 0 || d.gone() }
	v := d.await(context.WithoutCancel(ctx), f, newSource(f), windows, over)
	v.Seconds, v.PerSecond = seconds, float64(v.Answers)/seconds
	v.Dials = d.dials.Load()
	if level != nil {
		level.judge(&v)
	}
	v.RefusedP99 = float64(d.truth.refusedWithin(0.99)) / float64(time.Millisecond)
	for _, s := range spawners {
		v.Kills += s.killed
	}
	if v.Answers < f.MinAnswers {
		v.fault("too little", "%d answers, fewer than %d", v.Answers, f.MinAnswers)
	}
	return &v, nil
}

// maxBatch ids are as many as a server takes by default.
const maxBatch = 10_000

func newDriver(f *flags) (*driver, error) {
	switch {
	case f.Connections < 1:
		return nil, errors.New("--connections: must be at least 1")
	case f.Pipeline < 1 || f.Pipeline > 1024:
		return nil, errors.New("--pipeline: must be 1 to 1024")
	case f.Batch < 0 || f.Batch > maxBatch:
		return nil, fmt.Errorf("--batch: must be 0 to %d", maxBatch)
	case f.Rate < 0:
		return nil, errors.New("--rate: must not be negative")
	case f.Repeats < 0 || f.Repeats > 1:
		return nil, errors.New("--repeats: must be 0 to 1")
	case f.Lose < 0 || f.Lose > 1:
		return nil, errors.New("--lose: must be 0 to 1")
	case f.Keys < 0 || f.Keys > maxKeys:
		return nil, fmt.Errorf("--keys: must be 0 to %d", maxKeys)
	case f.Tokens && f.Window < time.Millisecond:
		return nil, errors.New("--window: must be the server's")
	case f.Timeout <= 0:
		return nil, errors.New("--timeout: must be above 0")
	}
	d := &driver{load: load{flags: *f}}
	if d.load.Seed == 0 {
		d.load.Seed = rand.Uint64()
	}
	for _, raw := range f.URL {
		t, err := newTarget(raw)
		if err != nil {
			return nil, err
		}
		d.targets = append(d.targets, t)
	}
	// A request is answered or given up within 1.25 timeouts, and one that was
	// given up may be served within another: see conn.serve and load.lag.
	d.truth = newTruth(len(d.targets), 4*f.Timeout, f.Strict)
	d.truth.lenient = f.AllowInexact
	d.retries = newRetries(len(d.targets))
	if f.Tokens {
		d.truth.span = f.Window.Milliseconds()
	}
	if f.Keys > 0 {
		d.load.Keys = newKeys(f.Keys, d.load.Seed)
		d.truth.keys = d.load.Keys
	}
	return d, nil
}

// runAll runs every spawner until its end, or until one has nothing to run.
func runAll(ctx context.Context, spawners []*spawner) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, len(spawners))
	for _, s := range spawners {
		go func() { ended <- s.run(ctx) }()
	}
	var first error
	for range spawners {
		if err := <-ended; err != nil && first == nil {
			first = err
			cancel()
		}
	}
	return first
}

// endAll stops all servers at once, as a stop of the whole group does.
func endAll(spawners []*spawner) {
	var ending sync.WaitGroup
	for _, s := range spawners {
		ending.Go(func() { s.end() })
	}
	ending.Wait()
}

func newSpawner(f *flags, i int, d *driver, output io.Writer) (*spawner, error) {
	s := &spawner{
		flags:   f,
		command: f.Spawn[i],
		output:  output,
		rng:     rand.New(rand.NewPCG(d.load.Seed, uint64(i))),
		truth:   d.truth,
	}
	if len(d.targets) == len(f.Spawn) {
		s.addr, s.target = d.targets[i].addr, i
	}
	if f.KillEvery != "" {
		var err error
		if s.min, s.max, err = parseEvery(f.KillEvery); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func spawnLog(path string) (*os.File, error) {
	if path == "" {
		return os.Stderr, nil
	}
	return os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
}

// await reads the records until they add up and no more can come, or for
// --wait. No more can come for the windows of the run when there is a record
// of a later one, or when no server answers any longer.
func (d *driver) await(ctx context.Context, f *flags, read source, windows []*windowTruth, over func() bool) verdict {
	deadline := time.Now().Add(f.Wait)
	for {
		gone := over() // before the reading: what it wrote last is then read
		records, invalid, err := read(ctx)
		v := judge(d.truth, windows, records, f)
		for _, line := range invalid {
			v.fault("invalid record", "%s", line)
		}
		if err != nil {
			v.fault("reading the records", "%v", err)
		}
		switch {
		case len(windows) == 0 || !time.Now().Before(deadline):
			return v
		case gone && (err == nil || errors.Is(err, fs.ErrNotExist)):
			return v
		case v.Good && v.newest > windows[len(windows)-1].start:
			return v
		}
		time.Sleep(rereadEvery)
	}
}

// rereadEvery is far below the shortest wait that matters, a window, and far
// above what reading a topic from its start costs.
const rereadEvery = 250 * time.Millisecond

// gone reports that no target takes connections any more.
func (d *driver) gone() bool {
	return !slices.ContainsFunc(d.targets, func(t target) bool { return listens(t.addr, d.load.Timeout) })
}
