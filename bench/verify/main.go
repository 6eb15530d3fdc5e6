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
	"io/fs"
	"os"
	"os/signal"
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

	CountsFile   []string      `type:"path" xor:"records" help:"Where the records are (default: verve-data/counts.jsonl unless there are brokers)."`
	KafkaBrokers []string      `xor:"records" help:"Read the records from Kafka."`
	KafkaTopic   string        `default:"verve.unique-ids" help:"The topic of the records."`
	KeysTopic    string        `name:"kafka-keys-topic" default:"verve.unique-ids-by-key" help:"The topic of the records of the keys."`
	Wait         time.Duration `default:"75s" help:"How long the last records may take to appear."`

	Spawn     []string      `sep:"none" placeholder:"COMMAND" help:"Run this server, and stop it at the end. Repeatable: instances of a group, in the order of --url."`
	SpawnLog  string        `type:"path" default:"/dev/stderr" help:"File for the output of the server."`
	KillEvery string        `placeholder:"MIN-MAX" help:"End the server after a random time between these, and start it again."`
	Signal    string        `enum:"TERM,KILL" default:"TERM" help:"How the server is ended: ${enum}."`
	Kills     int           `help:"End the run after so many kills of each server (0: by time alone)."`
	StopLimit time.Duration `default:"15s" help:"How long the server may take to exit after SIGTERM."`

	Admin   string `placeholder:"URL" help:"Admin listener of the server: memory, goroutines and descriptors are sampled, and must stay level."`
	DataDir string `type:"path" help:"The server's data directory: with --admin, its files must stay level too."`

	JSON    bool `name:"json" help:"Print the verdict as one JSON object."`
	Verbose bool `short:"v" help:"List all windows, not only the bad ones."`
}

// maxBatch ids are as many as a server takes by default.
const maxBatch = 10_000

// Validate implements kong's interface of that name.
func (f *flags) Validate() error {
	for _, rule := range []struct {
		kept bool
		text string
	}{
		{f.Connections >= 1, "--connections: must be at least 1"},
		{f.Pipeline >= 1 && f.Pipeline <= 1024, "--pipeline: must be 1 to 1024"},
		{f.Batch >= 0 && f.Batch <= maxBatch, fmt.Sprint("--batch: must be 0 to ", maxBatch)},
		{f.Rate >= 0, "--rate: must not be negative"},
		{f.Repeats >= 0 && f.Repeats <= 1, "--repeats: must be 0 to 1"},
		{f.Lose >= 0 && f.Lose <= 1, "--lose: must be 0 to 1"},
		{f.Keys >= 0 && f.Keys <= maxKeys, fmt.Sprint("--keys: must be 0 to ", maxKeys)},
		{f.Window >= time.Millisecond, "--window: must be the server's"},
		{f.Timeout > 0, "--timeout: must be above 0"},
	} {
		if !rule.kept {
			return errors.New(rule.text)
		}
	}
	return nil
}

func main() {
	var f flags
	k := kong.Parse(&f, kong.Name("verify"),
		kong.Description("Drives a running verve and reports whether its records add up to its answers."),
		kong.Exit(func(code int) { os.Exit(2 * min(code, 1)) })) // kong has codes of its own for errors
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second interrupt ends the judging too
	v, err := run(ctx, &f)
	k.FatalIfErrorf(err)
	if f.JSON {
		k.FatalIfErrorf(json.NewEncoder(os.Stdout).Encode(v))
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
	var spawners []*spawner
	if len(f.Spawn) > 0 {
		log, err := spawnLog(f.SpawnLog)
		if err != nil {
			return nil, err
		}
		defer log.Close()
		if spawners, err = newSpawners(d, log); err != nil {
			return nil, err
		}
	}
	drive, cancel := context.WithTimeout(ctx, f.Duration)
	defer cancel()
	var beside sync.WaitGroup
	if len(spawners) > 0 {
		beside.Go(func() {
			defer cancel() // the kills are used up, or there is no server to drive
			each(spawners, func(s *spawner) { s.run(drive) })
		})
	}
	level := &steady{admin: f.Admin, dir: f.DataDir}
	if f.Admin != "" {
		beside.Go(func() { level.run(drive, f.Duration) })
	}
	began := time.Now()
	d.run(drive)
	seconds := time.Since(began).Seconds()
	cancel()
	beside.Wait()
	each(spawners, func(s *spawner) { s.end() })

	v := d.await(context.WithoutCancel(ctx), d.truth.finish(), len(spawners) > 0)
	v.Seconds, v.PerSecond = seconds, float64(v.Answers)/seconds
	v.Dials = d.dials.Load()
	if f.Admin != "" {
		level.judge(&v)
	}
	v.RefusedP99 = quantile(d.truth.waits, .99)
	for _, s := range spawners {
		v.Kills += s.killed
	}
	if v.Answers < f.MinAnswers {
		v.fault("too little", "%d answers, fewer than %d", v.Answers, f.MinAnswers)
	}
	return &v, nil
}

// rereadEvery is far below the shortest wait that matters, a window, and far
// above what reading a topic from its start costs.
const rereadEvery = 250 * time.Millisecond

// await reads the records until they add up and no more can come, or for
// --wait. No more can come for the windows of the run when there is a record
// of a later one, or when no server answers any longer, as is known if the run has ended them:
// a load balancer before them takes connections on.
func (d *driver) await(ctx context.Context, windows []*windowTruth, ended bool) verdict {
	for deadline := time.Now().Add(d.Wait); ; time.Sleep(rereadEvery) {
		gone := ended || d.gone() // before the reading: what it wrote last is then read
		records, err := d.readRecords(ctx)
		v := judge(d.truth, windows, records, &d.flags)
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
	}
}
